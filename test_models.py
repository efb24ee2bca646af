"""Tests of models.py: the mathematics against torch.distributions, plain forms, grids.

    pytest test_models.py

Comparisons are made in float64 unless a test says otherwise; every random number has its seed.
"""
import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import (MODELS, PRIORS, Config, MixturePrior, StandardPrior, VampPrior, build,
                    log_bernoulli, log_mixture, log_normal)

CELLS = [(model, prior) for model in MODELS for prior in PRIORS]
every_cell = pytest.mark.parametrize("model, prior", CELLS)
few = settings(deadline=None, derandomize=True, max_examples=30, database=None)
sizes = st.integers(1, 5)


@pytest.fixture(scope="module", autouse=True)
def denormals():
    """Another file's tests may have run train.py in this process, which flushes them."""
    torch.set_flush_denormal(False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.double):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def uniform(low, high, *shape, seed=0, dtype=torch.double):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed), dtype=dtype)


def gradients(value, inputs):
    """Gradients of a fixed random combination of `value`, so that no two entries can cancel."""
    weights = randn(*value.shape, seed=99).to(value.dtype)
    return torch.autograd.grad((value * weights).sum(), inputs, retain_graph=True)


def assert_same(ours, theirs, inputs, rtol=1e-9, atol=1e-10):
    """Equal values and equal gradients."""
    pairs = zip([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, inputs)])
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def small(model="vae", prior="vamp", seed=0, **changes):
    """A model that costs nothing: 6 pixels, 5 hidden units, 2 latents, 3 components."""
    shape = {"x_dim": 6, "hidden": 5, "z_dim": 2, "components": 3, "learned_weights": True}
    torch.manual_seed(seed)
    made = build(Config(model=model, prior=prior, **(shape | changes)))
    for name, p in made.prior.named_parameters():
        # pseudo-inputs start nearly equal, logvar and weights exactly so: errors would hide
        p.data.copy_(torch.rand_like(p) if name == "u" else torch.randn_like(p))
    return made


# ------------------------------------------------------------------------------------ densities


def normal(x, mu, logvar):
    return td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1, validate_args=False).log_prob(x)


def mixture(z, mu, logvar, logits=None):
    """The paper's mixture, out of torch.distributions."""
    logits = torch.zeros_like(mu[:, 0]) if logits is None else logits
    parts = td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1)
    return td.MixtureSameFamily(td.Categorical(logits=logits), parts).log_prob(z)


@pytest.mark.parametrize("of_x, of_mu", [((4, 3), (4, 3)), ((5, 4, 3), (4, 3)), ((2, 3), (3,)),
                                         ((4, 3), (5, 1, 3)), ((1,), (1,))])
def test_log_normal_and_log_bernoulli_equal_torch_distributions(of_x, of_mu):
    inputs = [randn(*of_x), randn(*of_mu, seed=1), randn(*of_mu, seed=2)]
    inputs = [t.requires_grad_() for t in inputs]
    assert_same(log_normal(*inputs), normal(*inputs), inputs)
    x, logits = (randn(*of_x) > 0).double(), (3 * randn(*of_mu, seed=3)).requires_grad_()
    theirs = td.Independent(td.Bernoulli(logits=logits), 1).log_prob(x)
    assert_same(log_bernoulli(x, logits), theirs, [logits])


def test_log_bernoulli_of_grey_pixels_and_of_large_logits():
    x, p = uniform(0, 1, 7, 3), uniform(0.1, 0.9, 7, 3, seed=1)
    cross_entropy = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(log_bernoulli(x, p.logit()), cross_entropy)
    x = torch.tensor([1.0, 0.0, 1.0, 0.0])
    logits = torch.tensor([-200.0, 200.0, 200.0, -200.0], requires_grad=True)
    value = log_bernoulli(x, logits)        # a clamped probability would stop at 11.5 per pixel
    assert value.item() == -400.0
    assert torch.autograd.grad(value, logits)[0].tolist() == [1.0, -1.0, 0.0, 0.0]


@torch.no_grad()
@pytest.mark.parametrize("D", [1, 3, 8, 20, 784])
@pytest.mark.parametrize("spread", [1, 30, 1e4])
def test_log_bernoulli_without_gradients_takes_a_shorter_way_to_the_same_value(D, spread):
    x, logits = (randn(4, D) > 0).float(), (spread * randn(3, 4, D, seed=1)).float()
    exact = td.Independent(td.Bernoulli(logits=logits.double()), 1).log_prob(x.double())
    value = log_bernoulli(x, logits)
    assert value.shape == (3, 4) and log_bernoulli(x[:0], logits[:, :0]).shape == (3, 0)
    assert ((value - exact).abs() <= 1e-6 * exact.abs() + 2e-7 * D).all()


@pytest.mark.parametrize("tile", [1024, 4])
@pytest.mark.parametrize("weights", ["equal", "learned", "one-hot", "zero"])
@pytest.mark.parametrize("lead, K, D", [((7,), 5, 3), ((2, 5), 9, 4), ((1,), 1, 1), ((), 5, 2),
                                        ((3, 1), 6, 1), ((9,), 1, 3)])
def test_log_mixture_equals_torch_distributions(monkeypatch, tile, weights, lead, K, D):
    monkeypatch.setattr(models, "TILE", tile)
    logits = randn(K, seed=3)
    if weights == "one-hot":
        logits[1:] -= 60
    if weights == "zero":       # for K = 9 this is a whole block of components without weight
        logits[:K // 2] = -math.inf
    inputs = [2 * randn(*lead, D), 2 * randn(K, D, seed=1), uniform(-6, 2, K, D, seed=2), logits]
    inputs = [t.requires_grad_() for t in inputs[:3 if weights == "equal" else 4]]
    log_w = [logits.log_softmax(0)] if len(inputs) == 4 else []
    ours = log_mixture(*inputs[:3], *log_w)
    assert ours.shape == lead
    assert_same(ours, mixture(*inputs), inputs, 1e-8, 1e-9)


@pytest.mark.parametrize("tile", [1024, 2])
def test_log_mixture_gradcheck(monkeypatch, tile):
    monkeypatch.setattr(models, "TILE", tile)
    inputs = [randn(3, 2), randn(5, 2, seed=1), randn(5, 2, seed=2), randn(5, seed=3)]
    assert torch.autograd.gradcheck(lambda *t: log_mixture(*t[:3], t[3].log_softmax(0)),
                                    [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 2), (4, 2)), ((4, 3), (4, 3), (3,)),
                                    ((3,), (3,)), ((0, 3), (0, 3))])
def test_log_mixture_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="log_mixture"):
        log_mixture(torch.zeros(2, 3), *map(torch.zeros, shapes))


@pytest.mark.parametrize("setting", ["highest", "medium", "autocast", "no float64"])
@pytest.mark.parametrize("reach, low, high", [(5, -6, 2), (2, -4, 1)])
def test_float32_error_of_log_mixture(monkeypatch, setting, reach, low, high):
    K, D = 500, 40
    z, mu, logvar = (uniform(a, b, n, D, seed=n, dtype=torch.float) for a, b, n in
                     [(-reach, reach, 64), (-reach, reach, K), (low, high, K)])
    # half of the components are equally wide in all dimensions, and some z sit at their centres:
    # in the narrow ones the expanded squares cancel worst
    logvar[::2] = torch.linspace(low, high, K // 2)[:, None]
    z[:16] = mu[:32:2]
    inputs = [t.requires_grad_() for t in (z, mu, logvar)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = mixture(*doubles)
    if setting == "no float64":
        monkeypatch.setattr(models, "products_dtype", lambda device: torch.float32)
    before = torch.get_float32_matmul_precision()
    try:        # the caller's settings must not reach the matrix product
        torch.set_float32_matmul_precision("medium" if setting == "medium" else "highest")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            value = log_mixture(*inputs)
            slopes = gradients(value, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    error = (value.double() - exact).abs()
    assert value.dtype == torch.float32
    if setting == "no float64":         # as on Apple's GPUs
        assert 1e-4 < error.max() <= 0.1
        return
    assert (error <= 6e-8 * exact.abs() + 1e-9).all()   # no more than the result's own rounding
    for ours, theirs in zip(slopes, gradients(exact, doubles)):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor made while it is on."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)]
        self.numel = max([self.numel, *(t.numel() for t in made)])
        return out


@pytest.mark.parametrize("B, K, D", [(300, 2000, 40), (300, 20_000, 2), (1500, 1100, 10)])
def test_log_mixture_never_makes_a_large_tensor(B, K, D):
    inputs = [t.requires_grad_() for t in (randn(B, D), randn(K, D, seed=1), randn(K, D, seed=2))]
    with Largest() as seen:
        log_mixture(*inputs).sum().backward()
    assert seen.numel <= max(models.TILE * min(B, models.TILE), 2 * K * D) < B * K


# --------------------------------------------------------------------------------------- priors


class ConvEncoder(nn.Module):
    """A stranger's encoder, of images (K, 1, 7, 7), not of vectors."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 6)

    def forward(self, x):
        mu, logvar = self.out(torch.tanh(self.conv(x)).flatten(1)).chunk(2, -1)
        return 4 * mu, logvar - 1


def make_prior(kind, learned=False, K=6):
    torch.manual_seed(3)
    logits = torch.linspace(-2, 2, K) if learned else None
    if kind == "standard":
        return StandardPrior(3)
    if kind == "mog":
        return MixturePrior(3 * torch.randn(K, 3), torch.randn(K, 3), logits)
    prior = VampPrior(ConvEncoder(), (torch.rand(K, 1, 7, 7) > 0.5).float(), learned)
    if learned:
        prior.weight_logits.data.copy_(logits)
    return prior


every_prior = pytest.mark.parametrize("kind, learned", [("standard", False), ("mog", False),
                                                        ("mog", True), ("vamp", False),
                                                        ("vamp", True)])


@every_prior
@torch.no_grad()
def test_prior_density_and_samples_belong_together(kind, learned):
    prior, n, z = make_prior(kind, learned), 20_000, randn(4, 5, 3)
    mu, logvar = [torch.zeros(1, 3)] * 2 if kind == "standard" else prior.components()
    mu, logvar = mu.double(), logvar.double()
    logits = prior.weight_logits.double() if learned else torch.zeros(len(mu)).double()
    exact = mixture(z, mu, logvar, logits)
    torch.testing.assert_close(prior.log_prob(z.float()).double(), exact, rtol=1e-5, atol=1e-5)
    # mean and covariance of the samples against those of the mixture, in standard errors
    w = logits.softmax(0)
    mean = w @ mu
    covariance = (mu.T * w) @ mu + torch.diag(w @ logvar.exp()) - torch.outer(mean, mean)
    draws = prior.sample(n, seeded(5)).double()
    assert draws.shape == (n, 3)
    assert ((draws.mean(0) - mean).abs() <= 5 * (covariance.diag() / n).sqrt()).all()
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / math.sqrt(n)).all()


def test_components_are_drawn_from_the_weights():
    w = torch.tensor([0.0, 0.1, 0.2, 0.7])
    prior = MixturePrior(torch.arange(4.0)[:, None] * 100, torch.full((4, 1), -6.0), w.log())
    k = (prior.sample(5000, seeded(0)) / 100).round().long().flatten()
    assert ((k.bincount(minlength=4) / 5000 - w).abs() <= 5 * (w * (1 - w) / 5000).sqrt()).all()
    many = MixturePrior(torch.arange(1000.0)[:, None], torch.full((1000, 1), -6.0))
    assert many.sample(20, seeded(0)).mean() > 200      # not the first twenty


def test_vamp_prior_of_a_foreign_encoder_and_pixels_at_the_bounds():
    prior, z = make_prior("vamp", learned=True), randn(50, 3, dtype=torch.float)
    assert {name for name, _ in prior.named_parameters()} == {"u", "weight_logits"}
    assert set(prior.u.unique().tolist()) == {0.0, 1.0}
    prior.log_prob(z).sum().backward()
    assert (prior.u.grad != 0).all()        # torch.clamp would let none of these pixels move
    for p in [prior.weight_logits, *prior._encoder[0].parameters()]:
        assert p.grad.abs().max() > 0
    prior.u.data.copy_(prior.u.data[:1].expand_as(prior.u))
    mu, logvar = prior.components()         # identical pseudo-inputs: one Gaussian
    torch.testing.assert_close(prior.log_prob(z), log_normal(z, mu[0], logvar[0]))


def test_pseudo_inputs_stay_inside_their_bounds():
    prior = VampPrior(None, torch.tensor([[-1.0, 0.5, 0.0], [1.0, 2.0, 0.25]]))
    inside = [[0.0, 0.5, 0.0], [1.0, 1.0, 0.25]]
    assert prior.clipped() == pytest.approx(4 / 6) and prior.pseudo_inputs().tolist() == inside
    prior.project_()
    assert prior.u.tolist() == inside
    free = VampPrior(None, torch.tensor([[-1.0, 2.0]]), bounds=None)
    free.project_()
    assert free.u.tolist() == free.pseudo_inputs().tolist() == [[-1, 2]] and free.clipped() is None


@every_prior
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_frozen_prior_equals_the_live_one(kind, learned, dtype):
    prior, z = make_prior(kind, learned).to(dtype), randn(8, 3, dtype=dtype)
    if kind == "vamp":
        prior._encoder[0].to(dtype)
    if learned:     # not representable in float32, which a careless copy would round to
        prior.weight_logits.data.copy_(randn(6))
    frozen = prior.frozen()
    before = frozen.log_prob(z)
    assert torch.equal(before, prior.log_prob(z)) and not before.requires_grad
    assert torch.equal(frozen.sample(9, seeded(1)), prior.sample(9, seeded(1)))
    for p in prior.parameters():        # training goes on without moving the copy
        p.data.add_(0.3)
    assert torch.equal(frozen.log_prob(z), before)


@pytest.mark.parametrize("model", MODELS)
def test_the_encoder_is_held_once_and_copied_with_its_model(model):
    first, z = small(model), randn(4, 2, dtype=torch.float)
    held = {name for name in first.state_dict() if name.startswith("prior")}
    assert held == {"prior.u", "prior.weight_logits"}
    second, before = copy.deepcopy(first), first.prior.log_prob(z)
    second.encoder.head.linear.bias.data.add_(1)
    assert torch.equal(first.prior.log_prob(z), before)
    assert not torch.equal(second.prior.log_prob(z), before)


# --------------------------------------------------------------------------------------- models


def split(layer):
    return [(W, b) for W, b in zip(layer.weight.chunk(2), layer.bias.chunk(2))]


def gated(layer, *inputs):
    """The plain form: a concatenation, and W and V as two matrices."""
    (W, b), (V, c) = split(layer.linear)
    h = torch.cat(inputs, -1)
    return (h @ W.T + b) * torch.sigmoid(h @ V.T + c)


def head(layer, h):
    (W, b), (V, c) = split(layer.linear)
    return h @ W.T + b, torch.clip(h @ V.T + c, -6, 2)


def network(net, x):
    return head(net.head, gated(net.body[1], gated(net.body[0], x)))


def plain_prior(model, z):
    """log p(z) by broadcasting: (..., K, D) tensors."""
    p = model.prior
    if model.config.prior == "standard":
        return normal(z, torch.zeros_like(z), torch.zeros_like(z))
    mu, logvar = (p.mu, p.logvar) if model.config.prior == "mog" else network(model.encoder, p.u)
    logits = torch.zeros_like(mu[:, 0]) if p.weight_logits is None else p.weight_logits
    return torch.logsumexp(normal(z[..., None, :], mu, logvar) + logits.log_softmax(0), -1)


def plain_decode(model, *latents):
    if len(latents) == 1:
        h = gated(model.decoder[1], gated(model.decoder[0], *latents))
    else:
        h = gated(model.px_joint, gated(model.px_z1, latents[0]), gated(model.px_z2, latents[1]))
    return h @ model.output.weight.T + model.output.bias


def plain_terms(model, x, S, generator, dtype=torch.float):
    """The terms as the papers write them, z1 and z2 drawn once each; noise drawn as `dtype`."""
    def draw(mu, logvar):
        shape = (S, *mu.shape[-2:])
        return mu + (0.5 * logvar).exp() * torch.randn(shape, generator=generator, dtype=dtype)
    mu, logvar = network(model.encoder, x)
    z = draw(mu, logvar)
    kl = normal(z, mu, logvar) - plain_prior(model, z)
    if model.config.model == "vae":
        logits, parts = plain_decode(model, z), {"kl": kl}
    else:
        h = gated(model.q1_joint, gated(model.q1_x, x).expand(S, -1, -1), gated(model.q1_z2, z))
        mu1, logvar1 = head(model.q1_head, h)
        z1 = draw(mu1, logvar1)
        kl1 = normal(z1, mu1, logvar1) - normal(z1, *network(model.p1, z))
        logits, parts = plain_decode(model, z1, z), {"kl": kl1 + kl, "kl1": kl1, "kl2": kl}
    return parts | {"recon": td.Independent(td.Bernoulli(logits=logits), 1).log_prob(x)}


@every_cell
@torch.no_grad()
def test_terms_equal_the_plain_form(model, prior):
    torch.manual_seed(1)
    ours, x, S = build(Config(model=model, prior=prior)), torch.rand(4, 784).round(), 3
    one, two = seeded(7), seeded(7)
    parts, log_w = ours.terms(x, S, one), ours.log_weights(x, S, seeded(7))
    plain = plain_terms(copy.deepcopy(ours).double(), x.double(), S, two)
    cached = ours.terms(x, S, seeded(7), ours.infer(x), ours.prior.frozen())
    assert log_w.shape == (S, 4) and torch.equal(log_w, parts["recon"] - parts["kl"])
    assert torch.equal(one.get_state(), two.get_state())        # no latent is drawn twice
    assert parts.keys() == plain.keys() == cached.keys()
    for name in parts:
        torch.testing.assert_close(parts[name].double(), plain[name], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(cached[name], parts[name], rtol=1e-5, atol=1e-4)


@every_cell
def test_path_gradient_is_the_gradient_less_the_score(model, prior):
    ours, S = small(model, prior).double(), 3
    x, weights = uniform(0, 1, 4, 6).round(), randn(S, 4, seed=5)
    full, path = (ours.terms(x, S, seeded(3), path_gradient=on) for on in (False, True))
    for name in full:
        assert torch.equal(full[name], path[name])
    noise = seeded(3)

    def log_q(mu, logvar):      # of a fixed latent, and that latent
        eps = torch.randn((S, 4, 2), generator=noise, dtype=torch.double)
        z = mu + (0.5 * logvar).exp() * eps
        return normal(z.detach(), mu, logvar), z

    score, z = log_q(*network(ours.encoder, x))
    if model == "hvae":
        h = gated(ours.q1_joint, gated(ours.q1_x, x).expand(S, -1, -1), gated(ours.q1_z2, z))
        score = score + log_q(*head(ours.q1_head, h))[0]
    of_full, of_path, of_score = (torch.autograd.grad(
        (value * weights).sum(), list(ours.parameters()), allow_unused=True, materialize_grads=True)
        for value in (full["kl"], path["kl"], score))
    assert any(g.abs().max() > 1e-3 for g in of_score)
    for a, b, c in zip(of_full, of_path, of_score):
        torch.testing.assert_close(a, b + c)


@few
@given(cell=st.sampled_from(CELLS), S=sizes, B=sizes, K=sizes, D=sizes, seed=st.integers(0, 999),
       scale=st.sampled_from([1.0, 30.0]))
def test_models_of_any_size_equal_the_plain_form_with_gradients(cell, S, B, K, D, seed, scale):
    ours = small(*cell, seed=seed, x_dim=4, hidden=3, z_dim=D, components=K)
    for name, p in ours.named_parameters():
        p.data.mul_(1 if name == "prior.u" else scale)
    x = uniform(0, 1, B, 4, seed=seed, dtype=torch.float).round()
    log_w = ours.log_weights(x, S, seeded(seed))
    assert log_w.shape == (S, B) and torch.isfinite(log_w).all()
    assert all(torch.isfinite(g).all() for g in gradients(log_w, list(ours.parameters())))
    ours, x = ours.double(), x.double()
    log_w = ours.log_weights(x, S, seeded(seed))
    plain = plain_terms(ours, x, S, seeded(seed), torch.double)
    size = max(1.0, *(v.abs().max().item() for v in plain.values()))
    slopes = [gradients(v, list(ours.parameters())) for v in (log_w, plain["recon"] - plain["kl"])]
    torch.testing.assert_close(log_w, plain["recon"] - plain["kl"], rtol=1e-8, atol=1e-9 * size)
    for a, b in zip(*slopes):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * max(size, b.abs().max().item()))


@pytest.mark.parametrize("model, count", [("vae", 1_116_864), ("hvae", 2_431_024)])
def test_parameter_counts_are_the_papers(model, count):
    with torch.device("meta"):
        for prior, more in [("standard", 0), ("vamp", 500 * 784), ("mog", 2 * 500 * 40)]:
            parameters = build(Config(model=model, prior=prior)).parameters()
            assert sum(p.numel() for p in parameters) == count + more


@pytest.mark.parametrize("model", MODELS)
def test_logvar_is_clipped(model):
    ours = small(model)
    for name, p in ours.named_parameters():
        if "head" in name:
            p.data.mul_(1e3).add_(1)
    latents = ours.latents(uniform(0, 1, 200, 6, dtype=torch.float)).values()
    for _, logvar in [q for _, q, _ in latents] + [p for _, _, p in latents if p is not None]:
        assert logvar.min() >= -6 and logvar.max() <= 2 and logvar.unique().numel() > 1


@every_cell
@torch.no_grad()
def test_ancestral_samples_and_reconstructions(model, prior):
    ours, x, generator = small(model, prior), uniform(0, 1, 4, 6, dtype=torch.float), seeded(3)
    got, latents = ours.sample(9, seeded(3)), [ours.prior.sample(9, generator)]
    if model == "hvae":         # z1 from p(z1 | z2), not from N(0, I)
        mu1, logvar1 = network(ours.p1, latents[0])
        eps = torch.randn(mu1.shape, generator=generator)
        latents.insert(0, mu1 + (0.5 * logvar1).exp() * eps)
    torch.testing.assert_close(got, torch.sigmoid(plain_decode(ours, *latents)))
    for seed in (None, 4):      # the posteriors' means, then draws
        generators = [None if seed is None else seeded(seed) for _ in range(2)]
        found = ours.latents(x, generators[0])
        assert tuple(found) == ours.layers and found[ours.layers[-1]][2] is None
        pixels = torch.sigmoid(plain_decode(ours, *(z for z, _, _ in found.values())))
        torch.testing.assert_close(ours.reconstruct(x, generators[1]), pixels)
        assert all(torch.equal(z, q[0]) == (seed is None) for z, q, _ in found.values())


# ------------------------------------------------------------------------------ bounds and stress


def integral(model, x, step, reach=12.0):
    """log p(x) of a model with one-dimensional latents by the rectangle rule, (B,)."""
    z = torch.arange(-reach, reach, step, dtype=torch.double)[:, None]
    log_z = plain_prior(model, z) + math.log(step)
    if model.config.model == "vae":
        return torch.logsumexp(log_bernoulli(x[:, None], plain_decode(model, z)) + log_z, 1)
    z1, z2 = z.expand(len(z), -1, 1), z[:, None].expand(-1, len(z), 1)
    log_z1 = normal(z1, *network(model.p1, z2)) + math.log(step)
    log_x = log_bernoulli(x[:, None, None], plain_decode(model, z1, z2))
    return torch.logsumexp(log_x + log_z1 + log_z[:, None], (1, 2))


@every_cell
@torch.no_grad()
def test_bound_approaches_the_integral(model, prior):
    ours, S = small(model, prior, z_dim=1, x_dim=3, seed=2), 20_000
    # broad posteriors, so that the weights have a variance; narrow ones would need more samples
    for layer in [ours.encoder.head] + ([ours.q1_head] if model == "hvae" else []):
        layer.linear.weight.data.mul_(0.3)
        layer.linear.bias.data[1] = 1.5
    x = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    log_w = ours.log_weights(x, S, seeded(0)).double()
    exact = integral(copy.deepcopy(ours).double(), x.double(), 0.02 if model == "vae" else 0.1)
    bound = torch.logsumexp(log_w, 0) - math.log(S)
    error = (log_w - bound).exp().std(0) / math.sqrt(S)     # standard error of the logarithm
    assert (error < 0.03).all()         # otherwise the next line would prove nothing
    assert ((bound - exact).abs() <= 4 * error + 1e-4).all()
    tens = (torch.logsumexp(log_w.reshape(10, -1, 2), 0) - math.log(10)).mean(0)
    assert (log_w.mean(0) < tens).all() and (tens < bound).all()    # one sample, ten, all


@every_cell
@pytest.mark.parametrize("push", ["logits", "latents", "weights"])
def test_extremes_give_finite_losses_and_gradients(model, prior, push):
    ours = small(model, prior)
    if push == "logits":
        ours.output.bias.data.copy_(torch.tensor([200.0, -200.0] * 3))
    elif push == "latents":
        ours.encoder.head.linear.bias.data[:2] = 500.0
    elif prior != "standard":
        ours.prior.weight_logits.data.copy_(torch.tensor([0.0, -200.0, 200.0]))
    for level in (0.0, 1.0, 0.5):       # all black, all white, constant grey
        log_w = ours.log_weights(torch.full((3, 6), level), 2, seeded(0))
        assert torch.isfinite(log_w).all()
        assert all(torch.isfinite(g).all() for g in gradients(log_w, list(ours.parameters())))


@few
@given(st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(0, 1, width=32)), min_size=1,
                max_size=8))
def test_log_bernoulli_of_anything(pairs):
    logits, x = (torch.tensor(column) for column in zip(*pairs))
    value = log_bernoulli(x, logits.requires_grad_())
    exact = log_bernoulli(x.double(), logits.detach().double())
    assert abs(value.item() - exact.item()) <= 1e-6 * (logits.abs().sum().item() + 1)
    slope = torch.autograd.grad(value, logits)[0]
    torch.testing.assert_close(slope, x - logits.detach().sigmoid(), rtol=1e-5, atol=1e-6)


@few
@given(S=sizes, B=sizes, K=sizes, D=sizes, seed=st.integers(0, 999),
       reach=st.sampled_from([0.0, 1.0, 50.0]), peak=st.sampled_from([0.0, 1.0, 1e3]))
def test_log_mixture_and_log_normal_of_anything(S, B, K, D, seed, reach, peak):
    inputs = [uniform(-reach, reach, S, B, D, seed=seed), uniform(-reach, reach, K, D, seed=-seed),
              uniform(-6, 2, K, D, seed=seed + 2), peak * randn(K, seed=seed + 3)]
    inputs = [t.float().requires_grad_() for t in inputs]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    # the log-softmax is float32, with an error of 1e-7 of `peak`, before the mixture begins
    for ours, exact in [
            (log_mixture(*inputs[:3], inputs[3].log_softmax(0)), mixture(*doubles)),
            (log_normal(inputs[0], *(t[0] for t in inputs[1:3])),
             normal(doubles[0], *(t[0] for t in doubles[1:3])))]:
        assert ((ours - exact).abs() <= 1e-6 * (exact.abs() + 5 * peak) + 1e-5).all()
        for a, b in zip(gradients(ours, inputs[:3]), gradients(exact, doubles[:3])):
            assert torch.isfinite(a).all()
            assert (a - b).abs().max() <= 1e-4 * (1 + b.abs().max()) * (1 + peak / 100)


# --------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("field, value", [
    ("prior", "vampire"), ("prior", None), ("model", "gan"), ("components", 0), ("z_dim", -1),
    ("components", "5"), ("hidden", 2.0), ("x_dim", True), ("learned_weights", 1),
    ("components", 10**8)])
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(ValueError) as caught:
        Config(**{field: value})
    text = str(caught.value)
    assert (field in text or str(value) in text) and "\n" not in text


def test_pseudo_inputs_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(3, 5\), expected \(3, 6\)"):
        build(Config(x_dim=6, components=3), torch.zeros(3, 5))


def test_auto_takes_no_apple_gpu(monkeypatch):
    """It has no float64, which training's and evaluation's sums take."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="cuda.*take cpu"):
        models.pick_device("cuda")


def test_models_needs_torch_alone():
    code = "import sys, models; print({'files', 'data'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(models.__file__).parent, text=True,
                          capture_output=True)
    assert done.stdout == "set()\n", done.stderr
