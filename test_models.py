"""models.py against torch.distributions, the plain forms of bench.py and an integral; bench.py.

Comparisons are in float64 unless a test says otherwise. Every random number has its seed.
"""
import json
import math

import pytest
import torch
import torch.distributions as td
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import models
from bench import plain, plain_decode, plain_draw, plain_log_prior
from models import (MODELS, PRIORS, Config, MixturePrior, StandardPrior, VampPrior, build,
                    log_bernoulli, log_logistic, log_mixture, log_normal)

each_cell = pytest.mark.parametrize("model, prior", [(m, p) for m in MODELS for p in PRIORS])
LEVELS = torch.arange(256, dtype=torch.double)[:, None] / 255


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def uniform(low, high, *shape, seed=0):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed), dtype=torch.double)


def gradients(value, inputs):
    """Gradients of a random combination of `value`, so that no two entries can cancel."""
    weights = randn(*value.shape, seed=99).to(value.dtype)
    return torch.autograd.grad((value * weights).sum(), inputs, retain_graph=True,
                               allow_unused=True, materialize_grads=True)


def assert_same(ours, theirs, inputs):
    """Equal values and equal gradients, to 1e-8 of the largest entry."""
    for a, b in zip([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, inputs)]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * (1 + b.abs().max().item()))


def small(model="vae", prior="vamp", seed=0, **changes):
    shape = {"x_dim": 6, "hidden": 5, "z_dim": 2, "components": 3, "learned_weights": True}
    torch.manual_seed(seed)
    made = build(Config(model, prior, **(shape | changes)))
    for name, p in made.prior.named_parameters():       # first values are too equal to show errors
        p.data.copy_(torch.rand_like(p) if name == "u" else torch.randn_like(p))
    return made


def normal(x, mu, logvar):
    return td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1, validate_args=False).log_prob(x)


def mixture(z, mu, logvar, logits=None):
    logits = torch.zeros_like(mu[:, 0]) if logits is None else logits
    parts = td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1)
    return td.MixtureSameFamily(td.Categorical(logits=logits), parts).log_prob(z)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("of_x, of_mu", [((5, 4, 20), (4, 20)), ((2, 8), (8,)), ((1,), (1,)),
                                         ((4, 784), (5, 1, 784))])
def test_log_normal_and_log_bernoulli_equal_torch_distributions(of_x, of_mu, scale):
    inputs = [t.requires_grad_() for t in (scale * randn(*of_x), randn(*of_mu, seed=1),
                                           uniform(-6, 2, *of_mu, seed=2))]
    assert_same(log_normal(*inputs), normal(*inputs), inputs)
    logits = (scale * randn(*of_mu, seed=3)).float().double().requires_grad_()
    grey = uniform(0, 1, *of_x).float().double()
    for x in (grey, grey.round()):
        # a clamped probability would stop at 11.5 nats a pixel, and have no gradient beyond
        exact = td.Independent(td.Bernoulli(logits=logits, validate_args=False), 1).log_prob(x)
        assert_same(log_bernoulli(x, logits), exact, [logits])
        value = log_bernoulli(x.float(), logits.float())
        assert ((value - exact).abs() <= 1e-6 * exact.abs() + 2e-7 * x.shape[-1]).all()
    narrow = log_normal(*(t.bfloat16() for t in inputs)), log_bernoulli(x, logits.bfloat16())
    assert {value.dtype for value in narrow} == {torch.float32}


@pytest.mark.parametrize("tile", [1024, 4])
@pytest.mark.parametrize("less", [0, 60, math.inf])     # log weight of half of the components
@pytest.mark.parametrize("lead, K, D, reach", [((7,), 5, 3, 2), ((2, 5), 9, 4, 2), ((1,), 1, 1, 0),
                                               ((), 5, 2, 2), ((3, 1), 6, 1, 50), ((9,), 1, 3, 2)])
def test_log_mixture_equals_torch_distributions(monkeypatch, tile, less, lead, K, D, reach):
    monkeypatch.setattr(models, "TILE", tile)
    logits = randn(K, seed=3)
    logits[:K // 2] -= less         # for K = 9 and 4 a block, a whole block
    inputs = reach * randn(*lead, D), reach * randn(K, D, seed=1), uniform(-6, 2, K, D, seed=2)
    inputs = [t.requires_grad_() for t in (*inputs, logits)]
    assert_same(log_mixture(*inputs[:3], logits.log_softmax(0)), mixture(*inputs), inputs)


@pytest.mark.parametrize("x", [[255.0, 0.0], [-0.1, 1.0], [math.nan, 0.5]])
def test_what_is_no_pixel_is_refused(x):
    for log_px, parameters in ((log_bernoulli, 2), (models.logistic_pixels, 4)):
        with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
            log_px(torch.tensor(x), torch.zeros(parameters))
        log_px(torch.tensor([-1e-7, 1 + 1e-7]), torch.zeros(parameters))    # rounding is allowed


def test_float32_error_of_log_mixture():
    z, mu, logvar = (uniform(low, high, n, 40, seed=n).float()
                     for low, high, n in [(-5, 5, 64), (-5, 5, 500), (-6, 2, 500)])
    # the expanded squares cancel worst at the centres of components equally narrow in all axes
    logvar[::2] = torch.linspace(-6, 2, 250)[:, None]
    z[:16] = mu[:32:2]
    inputs = [t.requires_grad_() for t in (z, mu, logvar)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = mixture(*doubles)
    with torch.autocast("cpu", dtype=torch.bfloat16):       # which must not reach the products
        value = log_mixture(*inputs)
        slopes = gradients(value, inputs)
    assert value.dtype == torch.float32     # and of no more error than its own rounding
    assert ((value - exact).abs() <= 6e-8 * exact.abs() + 1e-9).all()
    for ours, theirs in zip(slopes, gradients(exact, doubles)):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    narrow = mu[:64], mu, torch.full_like(mu, -14.0)        # as narrow as log_mixture promises
    assert (log_mixture(*narrow) - mixture(*(t.double() for t in narrow))).abs().max() <= 2e-5


class Largest(TorchDispatchMode):
    numel = 0       # of the largest tensor made while it is on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.numel = max(self.numel, *made, 0)
        return out


@pytest.mark.parametrize("B, K, D", [(100, 50_000, 2), (300, 2000, 40), (1500, 1100, 10)])
def test_log_mixture_never_makes_a_large_tensor(B, K, D):
    inputs = [t.requires_grad_() for t in (randn(B, D), randn(K, D, seed=1), randn(K, D, seed=2))]
    with Largest() as seen:
        log_mixture(*inputs).sum().backward()
    assert seen.numel <= max(models.TILE * min(B, models.TILE), 2 * K * D) < B * K


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("logscale", [-12.0, -4.5, -2.0, 0.0, 6.0])
def test_log_logistic_sums_to_one_and_equals_the_plain_form(dtype, logscale):
    mean = torch.tensor([-3.0, 0, 1 / 512, 0.3, 0.5, 1, 40])[:, None].to(dtype)
    value = log_logistic(LEVELS[:, None], mean, torch.full_like(mean, logscale))
    assert value.dtype == dtype and (value.double().exp().sum(0) - 1).abs().max() <= 1e-6
    # the cdf's difference between the ends of a bin, where it has digits left
    ends = torch.arange(257, dtype=torch.double)[:, None] / 256
    ends[0], ends[-1] = -math.inf, math.inf
    mass = torch.sigmoid((ends - mean[:, 0].double()) / math.exp(logscale)).diff(dim=0)
    sound = mass > 1e-9
    assert sound.sum() > 7
    torch.testing.assert_close(value.double()[sound], mass[sound].log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logscale", [-30.0, -4.5, 0.0, 30.0])
@pytest.mark.parametrize("mean", [-50.0, 0.0, 0.5, 50.0])
def test_log_logistic_keeps_its_gradient_in_the_tails(mean, logscale):
    at = [torch.full((256, 1), v).requires_grad_() for v in (mean, logscale)]
    value = log_logistic(LEVELS.float(), *at)
    slopes = torch.autograd.grad(value.sum(), at)
    assert all(torch.isfinite(t).all() for t in (value, *slopes))
    if abs(mean) == 50 and logscale < 30:       # towards the level
        assert (slopes[0][1:255] * mean < 0).all()


def vamp_prior(learned):        # a stranger's encoder, of images and not of vectors
    weight, pixels = randn(49, 6) / 3, uniform(0, 1, 6, 7, 7).round()
    prior = VampPrior(lambda u: (u.flatten(1) @ weight).chunk(2, -1), pixels, learned)
    if learned:
        prior.weight_logits.data.copy_(randn(6))
    return prior


@torch.no_grad()
@pytest.mark.parametrize("prior", [
    StandardPrior(3).double(), vamp_prior(False), vamp_prior(True),
    *(MixturePrior(3 * randn(6, 3), randn(6, 3, seed=1), logits) for logits in (None, randn(6)))])
def test_samples_belong_to_the_density(prior):
    mu, logvar = torch.zeros(2, 1, 3).double()
    if not isinstance(prior, StandardPrior):
        mu, logvar = prior.components()
    n, z = 20_000, randn(4, 5, 3)
    learned = getattr(prior, "weight_logits", None)
    w = (torch.zeros_like(mu[:, 0]) if learned is None else learned).softmax(0)
    torch.testing.assert_close(prior.log_prob(z), mixture(z, mu, logvar, w.log()))
    # mean and covariance of the samples against the mixture's, in standard errors
    mean = w @ mu
    covariance = (mu.T * w) @ mu + torch.diag(w @ logvar.exp()) - torch.outer(mean, mean)
    draws = prior.sample(n, seeded(5))
    assert ((draws.mean(0) - mean).abs() <= 5 * (covariance.diag() / n).sqrt()).all()
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / math.sqrt(n)).all()


def test_pseudo_inputs_stay_inside_their_bounds():
    prior = VampPrior(lambda u: (u, u), torch.rand(2, 3))
    prior.u.data.copy_(torch.tensor([[-1.0, 0.5, 0.0], [1.0, 2.0, 0.25]]))
    inside = [[0.0, 0.5, 0.0], [1.0, 1.0, 0.25]]
    prior.components()[0].sum().backward()
    assert prior.components()[0].tolist() == inside and (prior.u.grad == 1).all()
    prior.project_()
    assert prior.u.tolist() == inside
    beyond = torch.tensor([[-1.0, 2.0]])
    with pytest.raises(ValueError, match="from -1 to 2 are beyond bounds.*None"):
        VampPrior(None, beyond)
    white = (torch.ones(1, 2) - 0.1307) / 0.3081        # rounds to more than float64's white
    VampPrior(None, white, bounds=(-0.1307 / 0.3081, (1 - 0.1307) / 0.3081))
    prior = VampPrior(None, beyond, bounds=None)
    prior.project_()
    assert prior.u.tolist() == [[-1.0, 2.0]]


def test_an_encoder_that_mixes_images_or_returns_no_pair_is_named():
    with pytest.warns(UserWarning, match="BatchNorm.*LayerNorm"):
        VampPrior(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.rand(2, 3))
    for encoder in (nn.Linear(3, 2), lambda u: (u, u, u), lambda u: td.Normal(u, 1)):
        with pytest.raises(ValueError, match="must return two tensors, mu and logvar"):
            VampPrior(encoder, torch.rand(2, 3)).log_prob(torch.rand(5, 3))


@each_cell
@pytest.mark.parametrize("seed", range(6))
def test_terms_of_models_of_any_size_equal_the_plain_form_with_gradients(model, prior, seed):
    S, B, K, D = torch.randint(1, 6, (4,), generator=seeded(seed)).tolist()
    ours = small(model, prior, seed, x_dim=4, hidden=3, z_dim=D, components=K).double()
    for name, p in ours.named_parameters():
        p.data.mul_(30 if seed % 2 and name != "prior.u" else 1)        # 30 meets every clip
    x, one, two = uniform(0, 1, B, 4, seed=seed).round(), seeded(seed), seeded(seed)
    parts, theirs = ours.terms(x, S, one), bench.plain_terms(ours, x, S, two)
    assert torch.equal(one.get_state(), two.get_state())        # no latent is drawn twice
    assert parts.keys() == theirs.keys()
    for name in parts:
        assert_same(parts[name], theirs[name], list(ours.parameters()))
    kept = ours.terms(x, S, seeded(seed), ours.infer(x), ours.prior.frozen())
    assert all(torch.equal(kept[name], parts[name]) for name in parts)


@pytest.mark.parametrize("model, prior", [("vae", "standard"), ("vae", "vamp"), ("hvae", "vamp")])
def test_compiled_terms_are_the_same(model, prior):
    """As one graph; a C++ compiler is not needed."""
    ours, x = small(model, prior).double(), uniform(0, 1, 4, 6).round()
    torch.manual_seed(3)
    plain = ours.terms(x)
    ours.compile(backend="eager", dynamic=False, fullgraph=True)
    torch.manual_seed(3)
    compiled, parameters = ours(x), list(ours.parameters())
    for name in plain:
        assert_same(compiled[name], plain[name], parameters)


def test_autocast_does_not_touch_the_gradients_of_a_compiled_mixture():
    inputs = [t.float().requires_grad_() for t in (randn(50, 8), randn(30, 8, seed=1),
                                                   uniform(-3, -1, 30, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(lambda z, *q: models.CenteredMixture(*q).log_prob(z),
                              backend="aot_eager")(*inputs)
    for a, b in zip(gradients(found, inputs), gradients(bench.plain_mixture(*inputs), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@each_cell
def test_path_gradient_is_the_gradient_less_the_score(model, prior):
    ours, x = small(model, prior).double(), uniform(0, 1, 4, 6).round()
    full, path = (ours.terms(x, 1, seeded(3), path_gradient=on) for on in (False, True))
    assert all(torch.equal(full[name], path[name]) for name in full)
    score = sum(normal(z.detach(), *q) for z, q in ours.latents(x, seeded(3)).values())[None]
    of_full, of_path, of_score = (gradients(value, list(ours.parameters()))
                                  for value in (full["kl"], path["kl"], score))
    torch.testing.assert_close(of_full, tuple(a + b for a, b in zip(of_path, of_score)))


@each_cell
@pytest.mark.parametrize("likelihood", models.LIKELIHOODS)
def test_densities_and_latents_stay_float32_under_autocast(model, prior, likelihood):
    ours, x = small(model, prior, likelihood=likelihood), uniform(0, 1, 4, 6).round().float()
    with torch.autocast("cpu", torch.bfloat16):
        terms, latents = ours.terms(x), ours.encode(x)
    assert all(value.dtype == torch.float32 for value in (*terms.values(), *latents))


@pytest.mark.parametrize("model, count", [("vae", 1_116_864), ("hvae", 2_431_024)])
@pytest.mark.parametrize("prior, more", [("standard", 0), ("vamp", 500 * 784), ("mog", 1000 * 40)])
def test_parameter_counts_and_first_values_are_the_papers(model, count, prior, more):
    torch.manual_seed(0)
    ours = build(Config(model, prior))
    assert sum(p.numel() for p in ours.parameters()) == count + more
    for name, p in ours.named_parameters():
        if name == "prior.u":
            assert p.mean().item() == pytest.approx(0.05, rel=0.01) and 0.009 < p.std() < 0.011
        elif name.endswith("weight"):       # 12,000 or more
            assert p.std().item() == pytest.approx(math.sqrt(2 / p.shape[1]), rel=0.03)
        elif name == "prior.mu":            # equal components would stay equal
            assert p.std().item() == pytest.approx(1, rel=0.03)


@each_cell
@torch.no_grad()
def test_ancestral_samples_and_reconstructions(model, prior):
    ours, x, generator = small(model, prior).double(), uniform(0, 1, 4, 6), seeded(3)
    latents = [ours.prior.sample(9, generator)]
    if model == "hvae":         # z1 from p(z1 | z2), not from N(0, I)
        latents.insert(0, plain_draw(*plain(ours.p1, latents[0]), generator))
    torch.testing.assert_close(ours.sample(9, seeded(3)).logit(), plain_decode(ours, *latents))
    for one, two in ((None, None), (seeded(4), seeded(4))):     # the posteriors' means, then draws
        found = ours.latents(x, one)
        assert tuple(found) == ours.layers
        assert all(torch.equal(z, q[0]) == (one is None) for z, q in found.values())
        logits = plain_decode(ours, *(z for z, _ in found.values()))
        torch.testing.assert_close(ours.reconstruct(x, two).logit(), logits)


@each_cell
@torch.no_grad()
def test_bound_approaches_the_integral(model, prior):
    ours, S = small(model, prior, z_dim=1, x_dim=3, seed=2).double(), 20_000
    # broad posteriors, so that the weights have a variance; narrow ones would need more samples
    for layer in [ours.encoder.head] + ([ours.q1_head] if model == "hvae" else []):
        layer.linear.weight.data.mul_(0.3)
        layer.linear.bias.data[1] = 1.5
    x = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]).double()
    log_w = ours.log_weights(x, S, seeded(0))
    bound = torch.logsumexp(log_w, 0) - math.log(S)
    error = (log_w - bound).exp().std(0) / math.sqrt(S)     # standard error of the logarithm
    assert (error < 0.03).all()         # otherwise the last line would prove nothing
    step = 0.02 if model == "vae" else 0.1          # of the rectangle rule
    z = torch.arange(-12, 12, step, dtype=torch.double)[:, None]
    latents, log_p = [z], plain_log_prior(ours, z) + math.log(step)
    if model == "hvae":         # every z1 for every z2
        latents = [z.expand(len(z), -1, 1), z[:, None].expand(-1, len(z), 1)]
        log_z1 = normal(latents[0], *plain(ours.p1, latents[1])) + math.log(step)
        log_p = log_z1 + log_p[:, None]
    log_px = [log_bernoulli(image, plain_decode(ours, *latents)) for image in x]
    exact = torch.stack([(one + log_p).flatten().logsumexp(0) for one in log_px])
    assert ((bound - exact).abs() <= 4 * error + 1e-4).all()


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_models_use_their_likelihood(model, likelihood):
    ours, x = small(model, likelihood=likelihood), torch.randint(0, 256, (4, 6)) / 255
    outputs = ours.decode(*(z for z, _ in ours.latents(x).values()))
    torch.testing.assert_close(ours.reconstruct(x), outputs[:, :6].sigmoid())
    ours.output.weight.zero_()
    ours.output.bias.copy_(torch.tensor([0.0, 2, -3, 1, 0, 0, -9, -1, 5, -2, -3, -4]))
    mean, logscale = ours.output.bias[:6].sigmoid(), ours.output.bias[6:].clamp(-4.5, 0)
    exact = normal(x, mean, 2 * logscale)
    if likelihood == "logistic":
        exact = log_logistic(x, mean, logscale)
    torch.testing.assert_close(ours.terms(x, 2)["recon"], exact.expand(2, -1))
    mean, spread = torch.linspace(0, 1, 6), torch.tensor([0, 0.01, 0.05, 0.1, 0.3, 0.5])
    ours.set_output_bias(mean, spread)
    found, logscale = models.mean_and_logscale(ours.output.bias)
    torch.testing.assert_close(found, mean.clamp(0.01, 0.99))
    torch.testing.assert_close(logscale[2:5].exp(), spread[2:5])
    assert (logscale > -4.5).all() and (logscale < 0).all()     # inside, the clamp has a gradient


@pytest.mark.parametrize("field, value", [("prior", "vampire"), ("model", None), ("x_dim", True),
                                          ("components", 0), ("components", 10**7 + 1)])
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"{field}|{value}"):
        Config(**{field: value})


@pytest.mark.parametrize("shapes", [((4, 2), (4, 2)), ((4, 3), (4, 3), (3,)), ((0, 3), (0, 3))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="log_mixture"):
        log_mixture(torch.zeros(2, 3), *map(torch.zeros, shapes))


def test_quick_run_writes_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", bool)      # not for the tests that follow
    bench.main(["--quick", "--out", str(tmp_path / "bench.json")])
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"mixture", "step", "likelihood"}
    for row in rows:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["bound_share"] > 0
        assert row["error"] is None or row["error"] < 3     # a wrong form is tens of nats off
