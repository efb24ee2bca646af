"""Tests of models.py: the mathematics against torch.distributions, plain forms, grids.

Comparisons are made in float64 unless a test says otherwise; every random number has its seed.
"""
import copy
import dataclasses
import math

import pytest
import torch
import torch.distributions as td
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from models import (MODELS, PRIORS, Config, MixturePrior, StandardPrior, VampPrior, build,
                    gaussian_pixels, log_bernoulli, log_logistic, log_mixture, log_normal,
                    logistic_pixels)

each_cell = pytest.mark.parametrize("model, prior", [(m, p) for m in MODELS for p in PRIORS])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def uniform(low, high, *shape, seed=0):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed), dtype=torch.double)


def gradients(value, inputs):
    """Gradients of a fixed random combination of `value`, so that no two entries can cancel."""
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
    """The paper's mixture, out of torch.distributions."""
    logits = torch.zeros_like(mu[:, 0]) if logits is None else logits
    parts = td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1)
    return td.MixtureSameFamily(td.Categorical(logits=logits), parts).log_prob(z)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("of_x, of_mu", [((4, 3), (4, 3)), ((5, 4, 20), (4, 20)), ((2, 8), (8,)),
                                         ((4, 784), (5, 1, 784)), ((1,), (1,))])
def test_log_normal_and_log_bernoulli_equal_their_plain_forms(of_x, of_mu, scale):
    inputs = [t.requires_grad_() for t in (scale * randn(*of_x), randn(*of_mu, seed=1),
                                           uniform(-6, 2, *of_mu, seed=2))]
    assert_same(log_normal(*inputs), normal(*inputs), inputs)
    x, logits = uniform(0, 1, *of_x), (scale * randn(*of_mu, seed=3)).float().double()
    for x in (x.float().double(), x.round()):       # grey; black and white
        logits.requires_grad_()
        # a clamped probability would stop at 11.5 nats a pixel, and have no gradient beyond
        plain = (x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(-1)
        assert_same(log_bernoulli(x, logits), plain, [logits])
        for on in (True, False):        # without gradients there is a shorter way
            with torch.set_grad_enabled(on):
                value = log_bernoulli(x.float(), logits.float())
            assert ((value - plain).abs() <= 1e-6 * plain.abs() + 2e-7 * x.shape[-1]).all()
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
    ours = log_mixture(*inputs[:3], logits.log_softmax(0))
    assert ours.shape == lead
    assert_same(ours, mixture(*inputs), inputs)
    assert_same(log_mixture(*inputs[:3]), mixture(*inputs[:3]), inputs[:3])     # equal weights


def test_float32_error_of_log_mixture(monkeypatch):
    z, mu, logvar = (uniform(low, high, n, 40, seed=n).float()
                     for low, high, n in [(-5, 5, 64), (-5, 5, 500), (-6, 2, 500)])
    # the expanded squares cancel worst at the centres of components equally narrow in all axes
    logvar[::2] = torch.linspace(-6, 2, 250)[:, None]
    z[:16] = mu[:32:2]
    inputs = [t.requires_grad_() for t in (z, mu, logvar)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact, before = mixture(*doubles), torch.get_float32_matmul_precision()
    try:        # the caller's settings must not reach the matrix product
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = log_mixture(*inputs)
            slopes = gradients(value, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    assert value.dtype == torch.float32     # and of no more error than its own rounding
    assert ((value - exact).abs() <= 6e-8 * exact.abs() + 1e-9).all()
    for ours, theirs in zip(slopes, gradients(exact, doubles)):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    for level, low, high in ((-14, 0, 2e-5), (-30, 0.5, 5)):
        narrow = (mu[:64], mu, torch.full_like(mu, level))
        assert low <= (log_mixture(*narrow) - mixture(*(t.double() for t in narrow))).abs().max() <= high
    monkeypatch.setattr(models, "products_dtype", lambda device: torch.float32)     # Apple's GPUs
    assert 1e-4 < (log_mixture(*inputs) - exact).abs().max() <= 0.1


class Largest(TorchDispatchMode):
    numel = 0       # of the largest tensor made while it is on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.numel = max(self.numel, *made, 0)
        return out


@pytest.mark.parametrize("B, K, D", [(300, 2000, 40), (300, 20_000, 2), (1500, 1100, 10)])
def test_log_mixture_never_makes_a_large_tensor(B, K, D):
    inputs = [t.requires_grad_() for t in (randn(B, D), randn(K, D, seed=1), randn(K, D, seed=2))]
    with Largest() as seen:
        log_mixture(*inputs).sum().backward()
    assert seen.numel <= max(models.TILE * min(B, models.TILE), 2 * K * D) < B * K


# --------------------------------------------------------------------------------------- priors


def vamp_prior(learned):
    torch.manual_seed(3)        # a stranger's encoder, of images and not of vectors
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 6)).double()
    pixels = uniform(0, 1, 6, 1, 7, 7).round()
    prior = VampPrior(lambda u: (4 * net(u)).chunk(2, -1), pixels, learned)
    if learned:
        prior.weight_logits.data.copy_(randn(6))
    return prior, net


@torch.no_grad()
@pytest.mark.parametrize("prior", [
    StandardPrior(3).double(), MixturePrior(3 * randn(6, 3), randn(6, 3, seed=1)),
    MixturePrior(3 * randn(6, 3), randn(6, 3, seed=1), randn(6)), vamp_prior(False)[0],
    vamp_prior(True)[0]])
def test_density_and_samples_and_the_frozen_prior_belong_together(prior):
    (mu, logvar), n, z = prior.components(), 20_000, randn(4, 5, 3)
    learned = getattr(prior, "weight_logits", None)
    w = (torch.zeros_like(mu[:, 0]) if learned is None else learned).softmax(0)
    torch.testing.assert_close(prior.log_prob(z), mixture(z, mu, logvar, w.log()))
    # mean and covariance of the samples against those of the mixture, in standard errors
    mean = w @ mu
    covariance = (mu.T * w) @ mu + torch.diag(w @ logvar.exp()) - torch.outer(mean, mean)
    draws = prior.sample(n, seeded(5))
    assert draws.shape == (n, 3)
    assert ((draws.mean(0) - mean).abs() <= 5 * (covariance.diag() / n).sqrt()).all()
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / math.sqrt(n)).all()
    frozen = prior.frozen()
    before = frozen.log_prob(z)
    assert torch.equal(before, prior.log_prob(z))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(frozen.sample(n, seeded(5)), draws)
    for p in prior.parameters():        # training goes on without moving the copy
        p.add_(0.3)
    assert torch.equal(frozen.log_prob(z), before)
    half = torch.zeros(300, 2, dtype=torch.bfloat16)        # whose weights sum to one all the same
    torch.testing.assert_close(MixturePrior(half, half, half[:, 0]).log_prob(half[:5]),
                               MixturePrior(half, half).log_prob(half[:5]))
    many = MixturePrior(torch.arange(1000.0)[:, None], torch.full((1000, 1), -6.0))
    assert many.sample(20, seeded(0)).mean() > 200      # not of the first twenty components


def test_gradients_reach_a_foreign_encoder_the_weights_and_pixels_at_the_bounds():
    prior, net = vamp_prior(learned=True)
    prior.log_prob(randn(50, 3)).sum().backward()
    assert ((prior.u == 0) | (prior.u == 1)).all()      # torch.clamp would let none of them move
    assert all((p.grad != 0).all() for p in [*prior.parameters(), *net.parameters()])


@pytest.mark.parametrize("model", MODELS)
def test_many_pseudo_inputs_are_encoded_in_blocks_to_the_same_gradients(model, monkeypatch):
    """In blocks of three, the last of one, and each anew in the backward pass."""
    found, seen = [], []
    for block in (7, 3):
        monkeypatch.setattr(models, "BLOCK", block)
        made = small(model, components=7).double()
        made.prior.u.data.mul_(3).sub_(1)       # some beyond the bounds
        encode = made.encoder.forward
        torch.testing.assert_close(made.prior.components(), encode(made.prior.u.clamp(0, 1)))
        made.encoder.forward = lambda x: (seen.append(len(x)), encode(x))[1]
        loss = made.terms(uniform(0, 1, 5, 6).round(), generator=seeded(1))["kl"]
        found.append([loss, *gradients(loss, list(made.parameters()))])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12 * (1 + whole.abs().max().item()))
    assert sorted(seen) == sorted([5, 7] + [5, 3, 3, 1, 3, 3, 1])


def test_blocks_are_encoded_anew_with_the_same_dropout(monkeypatch):
    monkeypatch.setattr(models, "BLOCK", 3)
    prior = VampPrior(lambda u: (torch.dropout(u, 0.5, True), u), torch.ones(7, 50))
    mu, _ = prior.components()
    mu.sum().backward()
    assert 0 < (mu == 0).sum() < mu.numel() and torch.equal(prior.u.grad, mu)


def test_pseudo_inputs_stay_inside_their_bounds():
    prior = VampPrior(None, torch.tensor([[-1.0, 0.5, 0.0], [1.0, 2.0, 0.25]]))
    inside = [[0.0, 0.5, 0.0], [1.0, 1.0, 0.25]]
    assert prior.clipped() == pytest.approx(4 / 6) and prior.pseudo_inputs().tolist() == inside
    prior.project_()
    assert prior.u.tolist() == inside
    prior = VampPrior(None, torch.tensor([[-1.0, 2.0]]), bounds=None)
    prior.project_()
    assert prior.pseudo_inputs().tolist() == [[-1.0, 2.0]] and prior.clipped() is None


def test_the_encoder_is_held_once_and_copied_with_its_model():
    first, z = small().double(), randn(4, 2)
    assert [n for n in first.state_dict() if n[:5] == "prior"] == ["prior.u", "prior.weight_logits"]
    second = copy.deepcopy(first)
    second.encoder.head.linear.bias.data.add_(1)
    assert (first.prior.log_prob(z) != second.prior.log_prob(z)).all()


# --------------------------------------------------------------------------------------- models


def gated(layer, *inputs):
    value, gate = layer.linear(torch.cat(inputs, -1)).chunk(2, -1)
    return value * torch.sigmoid(gate)


def head(layer, h):
    mu, logvar = layer.linear(h).chunk(2, -1)
    return mu, torch.clip(logvar, -6, 2)


def network(net, x):
    return head(net.head, gated(net.body[1], gated(net.body[0], x)))


def plain_prior(model, z):
    if model.config.prior == "standard":
        return normal(z, torch.zeros_like(z), torch.zeros_like(z))
    p, vamp = model.prior, model.config.prior == "vamp"
    return mixture(z, *(network(model.encoder, p.u) if vamp else (p.mu, p.logvar)), p.weight_logits)


def plain_q1(model, x, z2):
    h = gated(model.q1_x, x).expand(len(z2), -1, -1), gated(model.q1_z2, z2)
    return head(model.q1_head, gated(model.q1_joint, *h))


def plain_decode(model, *latents):
    if len(latents) == 1:
        return model.output(gated(model.decoder[1], gated(model.decoder[0], *latents)))
    parts = gated(model.px_z1, latents[0]), gated(model.px_z2, latents[1])
    return model.output(gated(model.px_joint, *parts))


def draw(mu, logvar, generator, *size):
    eps = torch.randn((*size, *mu.shape[-2:]), generator=generator, dtype=torch.double)
    return mu + (0.5 * logvar).exp() * eps


def plain_terms(model, x, S, generator):
    q = network(model.encoder, x)
    z = draw(*q, generator, S)
    kl = normal(z, *q) - plain_prior(model, z)
    if model.config.model == "vae":
        logits, parts = plain_decode(model, z), {"kl": kl}
    else:
        q1 = plain_q1(model, x, z)
        z1 = draw(*q1, generator, S)
        kl1 = normal(z1, *q1) - normal(z1, *network(model.p1, z))
        logits, parts = plain_decode(model, z1, z), {"kl": kl1 + kl, "kl1": kl1, "kl2": kl}
    return parts | {"recon": td.Independent(td.Bernoulli(logits=logits), 1).log_prob(x)}


@each_cell
@pytest.mark.parametrize("seed", range(6))
def test_terms_of_models_of_any_size_equal_the_plain_form_with_gradients(model, prior, seed):
    S, B, K, D = torch.randint(1, 6, (4,), generator=seeded(seed)).tolist()
    ours = small(model, prior, seed, x_dim=4, hidden=3, z_dim=D, components=K).double()
    for name, p in ours.named_parameters():
        p.data.mul_(30 if seed % 2 and name != "prior.u" else 1)        # 30 meets every clip
    x, one, two = uniform(0, 1, B, 4, seed=seed).round(), seeded(seed), seeded(seed)
    parts, plain = ours.terms(x, S, one), plain_terms(ours, x, S, two)
    assert torch.equal(one.get_state(), two.get_state())        # no latent is drawn twice
    assert parts.keys() == plain.keys()
    stacks = (torch.stack([of[name] for name in plain]) for of in (parts, plain))
    assert_same(*stacks, list(ours.parameters()))
    log_w = ours.log_weights(x, S, seeded(seed))
    assert log_w.shape == (S, B) and torch.equal(log_w, parts["recon"] - parts["kl"])
    kept = ours.terms(x, S, seeded(seed), ours.infer(x), ours.prior.frozen())
    assert all(torch.equal(kept[name], parts[name]) for name in parts)
    with torch.no_grad():
        assert ours.log_weights(x[:0], S).shape == (S, 0)


@each_cell
def test_path_gradient_is_the_gradient_less_the_score(model, prior):
    ours, x, S, noise = small(model, prior).double(), uniform(0, 1, 4, 6).round(), 3, seeded(3)
    full, path = (ours.terms(x, S, seeded(3), path_gradient=on) for on in (False, True))
    assert all(torch.equal(full[name], path[name]) for name in full)
    q = network(ours.encoder, x)
    z = draw(*q, noise, S)
    score = normal(z.detach(), *q)
    if model == "hvae":
        q1 = plain_q1(ours, x, z)
        score = score + normal(draw(*q1, noise, S).detach(), *q1)
    of_full, of_path, of_score = (gradients(value, list(ours.parameters()))
                                  for value in (full["kl"], path["kl"], score))
    torch.testing.assert_close(of_full, tuple(a + b for a, b in zip(of_path, of_score)))


@each_cell
def test_gradients_in_bfloat16_point_where_those_in_float32_do(model, prior):
    torch.manual_seed(2)
    ours, x = build(Config(model, prior, components=50)), (torch.rand(64, 784) < 0.3).float()
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, half):
            terms = ours.terms(x, generator=seeded(1), path_gradient=True)
            latents = ours.encode(x)
        assert all(value.dtype == torch.float32 for value in (*terms.values(), *latents))
        loss = (terms["kl"] - terms["recon"]).mean()
        found.append((loss, torch.autograd.grad(loss, list(ours.parameters()))))
    (exact, slopes), (value, halved) = found
    assert value.item() != exact.item() and value.item() == pytest.approx(exact.item(), rel=1e-2)
    for a, b in zip(slopes, halved):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
        assert (a - b).norm() < 0.15 * a.norm()


@pytest.mark.parametrize("model, count", [("vae", 1_116_864), ("hvae", 2_431_024)])
@pytest.mark.parametrize("prior, more", [("standard", 0), ("vamp", 500 * 784), ("mog", 1000 * 40)])
def test_parameter_counts_and_first_values_are_the_papers(model, count, prior, more):
    torch.manual_seed(0)
    ours, mean = build(Config(model, prior)), torch.linspace(0, 1, 784)
    assert sum(p.numel() for p in ours.parameters()) == count + more
    for name, p in ours.named_parameters():
        if name == "prior.u":
            assert p.mean().item() == pytest.approx(0.05, rel=0.01) and 0.009 < p.std() < 0.011
        elif name.endswith("weight"):       # 12,000 or more
            assert p.std().item() == pytest.approx(math.sqrt(2 / p.shape[1]), rel=0.03)
    ours.set_output_bias(mean)      # of pixels that are always black, too
    torch.testing.assert_close(ours.output.bias.sigmoid(), mean.clamp(0.01, 0.99))


@each_cell
@torch.no_grad()
def test_ancestral_samples_and_reconstructions(model, prior):
    ours, x, generator = small(model, prior).double(), uniform(0, 1, 4, 6), seeded(3)
    latents = [ours.prior.sample(9, generator)]
    if model == "hvae":         # z1 from p(z1 | z2), not from N(0, I)
        latents.insert(0, draw(*network(ours.p1, latents[0]), generator))
    torch.testing.assert_close(ours.sample(9, seeded(3)).logit(), plain_decode(ours, *latents))
    for one, two in ((None, None), (seeded(4), seeded(4))):     # the posteriors' means, then draws
        found = ours.latents(x, one)
        assert tuple(found) == ours.layers and found[ours.layers[-1]][2] is None
        assert all(torch.equal(z, q[0]) == (one is None) for z, q, _ in found.values())
        logits = plain_decode(ours, *(z for z, _, _ in found.values()))
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
    latents, log_p = [z], plain_prior(ours, z) + math.log(step)
    if model == "hvae":         # every z1 for every z2
        latents = [z.expand(len(z), -1, 1), z[:, None].expand(-1, len(z), 1)]
        log_z1 = normal(latents[0], *network(ours.p1, latents[1])) + math.log(step)
        log_p = log_z1 + log_p[:, None]
    log_px = [log_bernoulli(image, plain_decode(ours, *latents)) for image in x]
    exact = torch.stack([(one + log_p).flatten().logsumexp(0) for one in log_px])
    assert ((bound - exact).abs() <= 4 * error + 1e-4).all()


@each_cell
@pytest.mark.parametrize("level", [0.0, 1.0, 0.5])      # all black, all white, constant grey
def test_extremes_give_finite_losses_and_gradients_in_float32(model, prior, level):
    ours = small(model, prior)
    ours.output.bias.data.copy_(torch.tensor([200.0, -200.0] * 3))
    ours.encoder.head.linear.bias.data[:2] = 500.0      # the latents' means
    if prior != "standard":
        ours.prior.weight_logits.data.copy_(torch.tensor([0.0, -200.0, 200.0]))
    log_w = ours.log_weights(torch.full((3, 6), level), 2, seeded(0))
    for t in (log_w, *gradients(log_w, list(ours.parameters()))):
        assert torch.isfinite(t).all()


def levels(*shape):
    """All 256 grey levels along the first axis."""
    return (torch.arange(256.0).double() / 255).reshape(-1, *[1] * len(shape)).expand(-1, *shape)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("logscale", [-12.0, -4.5, -2.0, 0.0, 6.0])
def test_log_logistic_sums_to_one_and_equals_the_plain_form(dtype, logscale):
    mean = torch.tensor([-3.0, 0, 1 / 512, 0.3, 0.5, 1, 40])[:, None].to(dtype)
    value = log_logistic(levels(7, 1), mean, torch.full_like(mean, logscale))
    assert value.dtype == dtype and (value.double().exp().sum(0) - 1).abs().max() <= 1e-6
    # P(level) as a difference of the cdf at the bin's ends, where that has digits left
    ends = torch.arange(257, dtype=torch.double)[:, None] / 256
    ends[0], ends[-1] = -math.inf, math.inf
    cdf = torch.sigmoid((ends - mean[:, 0].double()) / math.exp(logscale))
    plain = cdf.diff(dim=0)
    sound = plain > 1e-9
    assert sound.sum() > 7
    torch.testing.assert_close(value.double()[sound], plain[sound].log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logscale", [-30.0, -4.5, 0.0, 30.0])
@pytest.mark.parametrize("mean", [-50.0, 0.0, 0.5, 50.0])
def test_log_logistic_keeps_its_gradient_in_the_tails(mean, logscale):
    at = [torch.full((256, 1), v).requires_grad_() for v in (mean, logscale)]
    value = log_logistic(levels(1).float(), *at)
    slopes = torch.autograd.grad(value.sum(), at)
    assert all(torch.isfinite(t).all() for t in (value, *slopes))
    if abs(mean) == 50 and logscale < 30:    # towards the level; clamped probabilities have no slope
        assert (slopes[0][1:255] * mean < 0).all()


def test_pixels_of_a_decoders_outputs():
    """The mean is a sigmoid, the log scale in [-4.5, 0]; a Gaussian's is the logistic's."""
    x, outputs = levels(3), torch.tensor([0.0, 2, -3, -9, -1, 5], dtype=torch.double)
    mean, logscale = outputs[:3].sigmoid(), torch.tensor([-4.5, -1, 0], dtype=torch.double)
    torch.testing.assert_close(logistic_pixels(x, outputs), log_logistic(x, mean, logscale))
    torch.testing.assert_close(gaussian_pixels(x, outputs), normal(x, mean, 2 * logscale))
    for name in ("logistic", "gaussian"):
        log_px, image, count = models.LIKELIHOODS[name]
        assert count == 2 and torch.equal(image(outputs), mean)
        assert log_px(x.float(), outputs.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_models_use_their_likelihood(model, likelihood):
    ours, x = small(model, likelihood=likelihood), torch.randint(0, 256, (4, 6)) / 255
    latents = [z for z, _, _ in ours.latents(x, seeded(3)).values()]
    outputs = ours.decode(*latents)
    assert outputs.shape == (4, 12)
    torch.testing.assert_close(ours.reconstruct(x, seeded(3)), outputs[:, :6].sigmoid())
    images = ours.sample(9, seeded(0))
    assert images.shape == (9, 6) and 0 <= images.min() and images.max() <= 1
    mean, spread = torch.linspace(0, 1, 6), torch.tensor([0, 0.01, 0.05, 0.1, 0.3, 0.5])
    ours.set_output_bias(mean, spread)
    ours.output.weight.zero_()
    recon, density = ours.terms(x, 2, seeded(0))["recon"], getattr(models, f"{likelihood}_pixels")
    torch.testing.assert_close(recon, density(x, ours.output.bias).expand(2, -1))
    mean_, logscale = models.mean_and_logscale(ours.output.bias)
    torch.testing.assert_close(mean_, mean.clamp(0.01, 0.99))
    torch.testing.assert_close(logscale[2:5].exp(), spread[2:5])
    assert (logscale > -4.5).all() and (logscale < 0).all()     # where the clamp lets gradients pass


def test_a_config_of_before_the_likelihoods_is_bernoulli():
    old = {"model": "vae", "prior": "vamp", "x_dim": 6, "hidden": 5, "z_dim": 2, "components": 3,
           "learned_weights": False}
    assert build(old).config.likelihood == "bernoulli" and build(old).output.bias.shape == (6,)
    assert [field.name for field in dataclasses.fields(Config)][:7] == list(old)


@pytest.mark.parametrize("field, value", [
    ("prior", "vampire"), ("prior", None), ("model", "gan"), ("components", 0), ("z_dim", -1),
    ("likelihood", "poisson"),
    ("components", "5"), ("x_dim", True), ("learned_weights", 1), ("components", 10**7 + 1)])
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"{field}|{value}"):
        Config(**{field: value})


def test_pseudo_inputs_and_shapes_that_do_not_fit():
    for shapes in [((4, 3), (4, 2)), ((4, 2), (4, 2)), ((4, 3), (4, 3), (3,)), ((3,), (3,)),
                   ((0, 3), (0, 3))]:
        with pytest.raises(ValueError, match="log_mixture"):
            log_mixture(torch.zeros(2, 3), *map(torch.zeros, shapes))
    with pytest.raises(ValueError, match=r"\(3, 5\), expected \(3, 6\)"):
        build(Config(x_dim=6, components=3), torch.zeros(3, 5))
    assert (build(Config(x_dim=6, components=3), torch.full((3, 6), 2.0)).prior.u == 1).all()


def test_auto_takes_no_apple_gpu(monkeypatch):      # it has no float64
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="cuda.*take cpu"):
        models.pick_device("cuda")
