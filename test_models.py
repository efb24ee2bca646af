"""Tests of models.py: the mathematics against torch.distributions, plain forms and grids; the files.

    pytest test_models.py

Comparisons are made in float64 unless a test says otherwise. `seeded(n)` gives every random number.
"""
import copy
import errno
import hashlib
import io
import math
import os
import random
import zipfile
from dataclasses import asdict

import pytest
import torch
import torch.distributions as td
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import (MODELS, PRIORS, Config, MixturePrior, StandardPrior, VampPrior, build, load,
                    log_bernoulli, log_mixture, log_normal, save, write_atomic)

CELLS = [(model, prior) for model in MODELS for prior in PRIORS]
MIXTURES = ["mog", "vamp"]
few = settings(deadline=None, derandomize=True, max_examples=40, database=None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.double):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def uniform(low, high, *shape, seed=0, dtype=torch.double):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed), dtype=dtype)


def gradients(value, *inputs):
    """Gradients of a fixed random combination of `value`, so that no two entries can cancel."""
    return torch.autograd.grad((value * randn(*value.shape, seed=99).to(value.dtype)).sum(), inputs)


def assert_same(a, b, rtol=1e-9, atol=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def small(model="vae", prior="vamp", seed=0, **changes):
    """A model that costs nothing: 6 pixels, 5 hidden units, 2 latents, 3 components."""
    sizes = {"x_dim": 6, "hidden": 5, "z_dim": 2, "components": 3, "learned_weights": True} | changes
    torch.manual_seed(seed)
    made = build(Config(model=model, prior=prior, **sizes))
    for name, p in made.prior.named_parameters():
        # pseudo-inputs start nearly equal, logvar and weights exactly so: errors would hide
        p.data.copy_(torch.rand_like(p) if name == "u" else torch.randn_like(p))
    return made


# ------------------------------------------------------------------------------------ densities


@pytest.mark.parametrize("shapes", [((4, 3), (4, 3)), ((5, 4, 3), (4, 3)), ((4, 3), (5, 1, 3)),
                                    ((1,), (1,)), ((2, 3), (3,))])
def test_log_normal_and_log_bernoulli_equal_torch_distributions(shapes):
    x, mu, logvar = randn(*shapes[0]), randn(*shapes[1], seed=1), randn(*shapes[1], seed=2)
    inputs = [t.requires_grad_() for t in (x, mu, logvar)]
    ours = log_normal(*inputs)
    theirs = td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1).log_prob(x)
    assert_same([ours, *gradients(ours, *inputs)], [theirs, *gradients(theirs, *inputs)])

    pixels, logits = (randn(*shapes[0]) > 0).double(), (3 * randn(*shapes[1], seed=3)).requires_grad_()
    ours = log_bernoulli(pixels, logits)
    theirs = td.Independent(td.Bernoulli(logits=logits), 1).log_prob(pixels)
    assert_same([ours, *gradients(ours, logits)], [theirs, *gradients(theirs, logits)])


def test_log_bernoulli_of_grey_pixels_is_the_cross_entropy():
    x, logits = uniform(0, 1, 7, 3), randn(7, 3, seed=1)
    p = torch.sigmoid(logits)
    assert_same([log_bernoulli(x, logits)], [(x * p.log() + (1 - x) * (1 - p).log()).sum(-1)])


def test_log_bernoulli_is_not_capped_at_a_clamp():
    x = torch.tensor([1.0, 0.0, 1.0, 0.0])
    logits = torch.tensor([-200.0, 200.0, 200.0, -200.0], requires_grad=True)
    value = log_bernoulli(x, logits)
    assert value.item() == -400.0
    assert torch.autograd.grad(value, logits)[0].tolist() == [1.0, -1.0, 0.0, 0.0]


def mixture(z, mu, logvar, log_weights):
    """The reference: the paper's mixture, out of torch.distributions."""
    parts = td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1)
    weights = td.Categorical(logits=torch.zeros_like(mu[:, 0]) if log_weights is None else log_weights)
    return td.MixtureSameFamily(weights, parts, validate_args=False).log_prob(z)


@pytest.mark.parametrize("tile", [1024, 4])
@pytest.mark.parametrize("weights", ["equal", "learned", "one-hot", "zero"])
@pytest.mark.parametrize("lead, K, D", [((7,), 5, 3), ((2, 5), 9, 4), ((1,), 1, 1), ((), 5, 2),
                                        ((3, 1), 6, 1), ((9,), 1, 3), ((6,), 4, 2)])
def test_log_mixture_equals_torch_distributions(monkeypatch, tile, weights, lead, K, D):
    monkeypatch.setattr(models, "TILE", tile)
    z, mu = 2 * randn(*lead, D), 2 * randn(K, D, seed=1)
    logvar, logits = uniform(-6, 2, K, D, seed=2), randn(K, seed=3)
    if weights == "one-hot":
        logits = torch.cat([torch.zeros(1), torch.full((K - 1,), -60.0)]).double()
    if weights == "zero":       # for K = 9 this is a whole block of components without weight
        logits[:K // 2] = -math.inf
    inputs = [t.requires_grad_() for t in (z, mu, logvar, logits)]
    if weights == "equal":
        inputs.pop()
    log_w = None if weights == "equal" else torch.log_softmax(logits, 0)
    ours, theirs = log_mixture(z, mu, logvar, log_w), mixture(z, mu, logvar, log_w)
    assert ours.shape == lead
    assert_same([ours, *gradients(ours, *inputs)], [theirs, *gradients(theirs, *inputs)], 1e-8, 1e-9)


def test_a_product_of_one_dimensional_mixtures_is_another_density():
    # logsumexp before the sum over D also integrates to 1; only the comparison above tells them apart
    z, mu, logvar = randn(7, 3), 2 * randn(5, 3, seed=1), randn(5, 3, seed=2)
    each = td.Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    product = (each.logsumexp(1) - math.log(5)).sum(-1)
    assert ((log_mixture(z, mu, logvar) - product).abs() > 0.1).all()


@pytest.mark.parametrize("tile", [1024, 2])
def test_log_mixture_gradcheck(monkeypatch, tile):
    monkeypatch.setattr(models, "TILE", tile)
    inputs = [randn(3, 2), randn(5, 2, seed=1), randn(5, 2, seed=2), randn(5, seed=3)]
    assert torch.autograd.gradcheck(lambda z, m, v, w: log_mixture(z, m, v, w.log_softmax(0)),
                                    [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("mu, logvar, weights", [((4, 3), (4, 2), None), ((4, 2), (4, 2), None),
                                                 ((4, 3), (4, 3), (3,)), ((3,), (3,), None),
                                                 ((0, 3), (0, 3), None)])
def test_log_mixture_refuses_shapes_that_do_not_fit(mu, logvar, weights):
    weights = None if weights is None else torch.zeros(weights)
    with pytest.raises(ValueError, match="log_mixture"):
        log_mixture(torch.zeros(2, 3), torch.zeros(mu), torch.zeros(logvar), weights)


@pytest.fixture(params=["highest", "medium", "autocast"])
def precision(request):
    """The caller's own settings, which must not reach the expanded squares."""
    before = torch.get_float32_matmul_precision()
    if request.param != "autocast":
        torch.set_float32_matmul_precision(request.param)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=request.param == "autocast"):
        yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("reach, low, high, bound", [(5, -6, 2, 2e-2), (2, -4, 1, 1e-3)])
def test_float32_error_of_log_mixture(precision, reach, low, high, bound):
    K, D = 500, 40
    z = uniform(-reach, reach, 64, D, dtype=torch.float)
    mu = uniform(-reach, reach, K, D, seed=1, dtype=torch.float)
    # half of the components share one logvar, the lowest among them: there cancellation is worst
    logvar = uniform(low, high, K, D, seed=2, dtype=torch.float)
    logvar[:K // 2] = torch.linspace(low, high, K // 2)[:, None]
    z[:16] = mu[:16]                                    # at a narrow component's centre
    z[16:32] = -reach * mu[0].sign()
    inputs = [t.requires_grad_() for t in (z, mu, logvar)]
    value = log_mixture(*inputs)
    with torch.autocast("cpu", enabled=False):
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        exact = mixture(*doubles, None)
        expected = gradients(exact, *doubles)
    error = (value.double() - exact).abs()
    assert value.dtype == torch.float32
    assert error.max() <= bound
    # the docstring's claim: nothing but the result's own rounding
    assert (error <= 6e-8 * exact.abs() + 1e-9).all()
    for ours, theirs in zip(gradients(value, *inputs), expected):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor made while it is on."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("B, K, D", [(300, 2000, 40), (300, 20_000, 2), (2000, 1500, 40)])
def test_log_mixture_never_makes_a_large_tensor(B, K, D):
    inputs = [randn(B, D), randn(K, D, seed=1), randn(K, D, seed=2)]
    with Largest() as seen:
        log_mixture(*(t.requires_grad_() for t in inputs)).sum().backward()
    assert seen.numel <= max(models.TILE * min(B, models.TILE), 2 * K * D)
    assert seen.numel < B * K


# --------------------------------------------------------------------------------------- priors


class ConvEncoder(nn.Module):
    """A stranger's encoder, of images (K, 1, 8, 8)."""

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
    prior = VampPrior(ConvEncoder(), (torch.rand(K, 1, 8, 8) > 0.5).float(), learned)
    if learned:
        prior.weight_logits.data.copy_(logits)
    return prior


KINDS = [("standard", False)] + [(kind, learned) for kind in MIXTURES for learned in (False, True)]


@pytest.mark.parametrize("kind, learned", KINDS)
def test_prior_density_and_samples_are_those_of_the_same_distribution(kind, learned):
    prior, n = make_prior(kind, learned), 20_000
    mu, logvar = (torch.zeros(1, 3),) * 2 if kind == "standard" else prior.components()
    mu, logvar = mu.detach().double(), logvar.detach().double()
    logits = prior.weight_logits.detach().double() if learned else None
    z = randn(4, 5, 3)
    torch.testing.assert_close(prior.log_prob(z.float()).double().detach(), mixture(z, mu, logvar, logits),
                               rtol=1e-5, atol=1e-4)

    w = torch.ones(len(mu)).double() / len(mu) if logits is None else logits.softmax(0)
    mean = w @ mu
    covariance = (mu.T * w) @ mu + torch.diag(w @ logvar.exp()) - torch.outer(mean, mean)
    draws = prior.sample(n, seeded(5)).detach().double()
    assert draws.shape == (n, 3)
    centred = draws - mean
    assert ((draws.mean(0) - mean).abs() <= 5 * covariance.diag().sqrt() / math.sqrt(n)).all()
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / math.sqrt(n)).all()


def test_components_are_drawn_from_the_weights():
    w = torch.tensor([0.0, 0.1, 0.2, 0.7])
    prior = MixturePrior(torch.arange(4.0)[:, None] * 100, torch.full((4, 1), -6.0), w.log())
    k = (prior.sample(5000, seeded(0)) / 100).round().long().flatten()
    share = k.bincount(minlength=4) / 5000
    assert ((share - w).abs() <= 5 * (w * (1 - w) / 5000).sqrt()).all()
    many = MixturePrior(torch.arange(1000.0)[:, None], torch.full((1000, 1), -6.0))
    assert many.sample(20, seeded(0)).mean() > 200      # not the first twenty


def test_identical_pseudo_inputs_give_one_gaussian():
    prior = make_prior("vamp", learned=True)
    prior.u.data.copy_(prior.u.data[:1].expand_as(prior.u))
    mu, logvar = prior.components()
    z = randn(9, 3, dtype=torch.float)
    torch.testing.assert_close(prior.log_prob(z), log_normal(z, mu[0], logvar[0]))


def test_vamp_prior_trains_a_foreign_encoder_and_pixels_at_the_bounds():
    prior = make_prior("vamp", learned=True)
    assert set(prior.u.unique().tolist()) == {0.0, 1.0}
    encoder = prior._encoder[0]
    prior.log_prob(randn(50, 3, dtype=torch.float)).sum().backward()
    for p in [prior.weight_logits, *encoder.parameters()]:
        assert p.grad.abs().max() > 0
    # a stride of 2 leaves the last row and column unread; all other pixels sit at a bound
    assert (prior.u.grad[:, :, :7, :7] != 0).all()
    assert {name for name, _ in prior.named_parameters()} == {"u", "weight_logits"}


def test_pseudo_inputs_stay_inside_their_bounds():
    prior = VampPrior(None, torch.tensor([[-1.0, 0.5, 0.0], [1.0, 2.0, 0.25]]))
    assert prior.clipped() == pytest.approx(4 / 6)
    assert prior.pseudo_inputs().tolist() == [[0.0, 0.5, 0.0], [1.0, 1.0, 0.25]]
    prior.project_()
    assert prior.u.tolist() == [[0.0, 0.5, 0.0], [1.0, 1.0, 0.25]]
    free = VampPrior(None, torch.tensor([[-1.0, 2.0]]), bounds=None)
    free.project_()
    assert free.u.tolist() == free.pseudo_inputs().tolist() == [[-1.0, 2.0]] and free.clipped() == 0.0


@pytest.mark.parametrize("kind, learned", KINDS)
def test_frozen_prior_equals_the_live_one(kind, learned):
    prior, z = make_prior(kind, learned), randn(8, 3, dtype=torch.float)
    frozen = prior.frozen()
    torch.testing.assert_close(frozen.log_prob(z), prior.log_prob(z).detach(), rtol=0, atol=0)
    assert torch.equal(frozen.sample(9, seeded(1)), prior.sample(9, seeded(1)))
    assert not frozen.log_prob(z).requires_grad
    if kind != "standard":      # a copy: training goes on without moving it
        before = frozen.log_prob(z)
        for p in prior.parameters():
            p.data.add_(0.3)
        assert torch.equal(frozen.log_prob(z), before)


def test_frozen_keeps_the_precision_of_learned_weights():
    prior = VampPrior(lambda u: (u, -u), uniform(0, 1, 4, 2), learned_weights=True).double()
    prior.weight_logits.data.copy_(randn(4))
    assert torch.equal(prior.frozen().log_prob(randn(5, 2)), prior.log_prob(randn(5, 2)))


@pytest.mark.parametrize("model", MODELS)
def test_the_encoder_is_held_once_and_copied_with_its_model(model):
    first, z = small(model), randn(4, 2, dtype=torch.float)
    assert {n for n in first.state_dict() if n.startswith("prior")} == {"prior.u", "prior.weight_logits"}
    second = copy.deepcopy(first)
    assert second.prior._encoder[0] is second.encoder is not first.encoder
    before = first.prior.log_prob(z)
    second.encoder.head.linear.bias.data.add_(1)
    assert torch.equal(first.prior.log_prob(z), before)
    assert not torch.equal(second.prior.log_prob(z), before)


# --------------------------------------------------------------------------------------- models


def gated(layer, *inputs):
    """The plain form: a concatenation, and W and V as two matrices."""
    (W, V), (b, c), h = layer.linear.weight.chunk(2), layer.linear.bias.chunk(2), torch.cat(inputs, -1)
    return (h @ W.T + b) * torch.sigmoid(h @ V.T + c)


def head(layer, h):
    (W, V), (b, c) = layer.linear.weight.chunk(2), layer.linear.bias.chunk(2)
    return h @ W.T + b, torch.clip(h @ V.T + c, -6, 2)


def network(net, x):
    return head(net.head, gated(net.body[1], gated(net.body[0], x)))


def normal(x, mu, logvar):
    return td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1).log_prob(x)


def plain_prior(model, z):
    """log p(z) by broadcasting: (..., K, D) tensors."""
    p = model.prior
    if model.config.prior == "standard":
        return normal(z, torch.zeros_like(z), torch.zeros_like(z))
    mu, logvar = network(model.encoder, p.u) if model.config.prior == "vamp" else (p.mu, p.logvar)
    logits = torch.zeros_like(mu[:, 0]) if p.weight_logits is None else p.weight_logits
    return torch.logsumexp(normal(z[..., None, :], mu, logvar) + logits.log_softmax(0), -1)


def plain_decode(model, *latents):
    if len(latents) == 1:
        h = gated(model.decoder[1], gated(model.decoder[0], latents[0]))
    else:
        h = gated(model.px_joint, gated(model.px_z1, latents[0]), gated(model.px_z2, latents[1]))
    return h @ model.output.weight.T + model.output.bias


def plain_terms(model, x, S, generator):
    """The terms as the papers write them; the noise is drawn in the same order, as float32."""
    mu, logvar = network(model.encoder, x)
    draw = lambda: torch.randn(S, *mu.shape, generator=generator).double()
    z = mu + (0.5 * logvar).exp() * draw()
    kl = normal(z, mu, logvar) - plain_prior(model, z)
    if model.config.model == "vae":
        logits, parts = plain_decode(model, z), {"kl": kl}
    else:
        h = gated(model.q1_joint, gated(model.q1_x, x).expand(S, -1, -1), gated(model.q1_z2, z))
        mu1, logvar1 = head(model.q1_head, h)
        z1 = mu1 + (0.5 * logvar1).exp() * draw()
        kl1 = normal(z1, mu1, logvar1) - normal(z1, *network(model.p1, z))
        logits, parts = plain_decode(model, z1, z), {"kl": kl1 + kl, "kl1": kl1, "kl2": kl}
    return parts | {"recon": td.Independent(td.Bernoulli(logits=logits), 1).log_prob(x)}


@pytest.mark.parametrize("model, prior", CELLS)
def test_terms_equal_the_plain_form(model, prior):
    torch.manual_seed(1)
    ours, x, S = build(Config(model=model, prior=prior)), torch.rand(6, 784).round(), 3
    with torch.no_grad():
        parts = ours.terms(x, S, seeded(7))
        log_w = ours.log_weights(x, S, generator=seeded(7))
        plain = plain_terms(copy.deepcopy(ours).double(), x.double(), S, seeded(7))
        cached = ours.terms(x, S, seeded(7), ours.infer(x), ours.prior.frozen())
    assert log_w.shape == (S, 6)
    assert torch.equal(log_w, parts["recon"] - parts["kl"])
    assert parts.keys() == plain.keys() == cached.keys()
    for name in parts:
        torch.testing.assert_close(parts[name].double(), plain[name], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(cached[name], parts[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model, prior", CELLS)
def test_terms_and_gradients_of_small_models(model, prior):
    ours, x = small(model, prior).double(), uniform(0, 1, 4, 6).round()
    one, two = seeded(7), seeded(7)
    if prior != "standard":
        ours.prior.double()
    torch.set_default_dtype(torch.double)       # the noise of a double model is double
    try:
        parts = ours.terms(x, 2, one)
        mine = torch.autograd.grad(ours.log_weights(x, 2, seeded(7)).mean(), list(ours.parameters()))
        plain = plain_terms(ours, x, 2, two)
    finally:
        torch.set_default_dtype(torch.float)
    theirs = torch.autograd.grad((plain["recon"] - plain["kl"]).mean(), list(ours.parameters()))
    assert torch.equal(one.get_state(), two.get_state())        # each latent is drawn exactly once
    assert_same([parts[k] for k in plain], list(plain.values()))
    assert_same(mine, theirs)
    assert all(g.abs().max() > 0 for g in mine)


@pytest.mark.parametrize("model, count", [("vae", 1_116_864), ("hvae", 2_431_024)])
def test_parameter_counts_are_the_papers(model, count):
    for prior, more in [("standard", 0), ("vamp", 500 * 784), ("mog", 2 * 500 * 40)]:
        parameters = build(Config(model=model, prior=prior)).parameters()
        assert sum(p.numel() for p in parameters) == count + more


@pytest.mark.parametrize("model", MODELS)
def test_logvar_is_clipped(model):
    ours = small(model)
    for name, p in ours.named_parameters():
        if "head" in name:
            p.data.mul_(1e3).add_(1)
    x = uniform(0, 1, 200, 6, dtype=torch.float)
    found = dict(ours.posteriors(x))
    if model == "hvae":
        found["p1"] = ours.p1(3 * randn(200, 2, dtype=torch.float))
    for _, logvar in found.values():
        assert logvar.min() == -6 and logvar.max() == 2


@pytest.mark.parametrize("model, prior", CELLS)
def test_ancestral_samples_and_reconstructions(model, prior):
    ours, n = small(model, prior), 9
    with torch.no_grad():
        got, generator = ours.sample(n, seeded(3)), seeded(3)
        latents = [ours.prior.sample(n, generator)]
        if model == "hvae":         # z1 from p(z1 | z2), not from N(0, I)
            mu1, logvar1 = network(ours.p1, latents[0])
            latents.insert(0, mu1 + (0.5 * logvar1).exp() * torch.randn(mu1.shape, generator=generator))
        torch.testing.assert_close(got, torch.sigmoid(plain_decode(ours, *latents)))
        x = uniform(0, 1, 4, 6, dtype=torch.float)
        means = [mu for mu, _ in ours.posteriors(x).values()]
        assert torch.allclose(ours.reconstruct(x), torch.sigmoid(plain_decode(ours, *means)), atol=1e-6)
        assert ours.reconstruct(x, seeded(0)).shape == x.shape
        assert list(ours.posteriors(x)) == list(ours.layers) and ours.encode(x)[0].shape == (4, 2)


def test_output_bias_starts_at_the_mean_image():
    ours, mean = small(), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ours.set_output_bias(mean)
    torch.testing.assert_close(torch.sigmoid(ours.output.bias.data), mean.clamp(0.01, 0.99))


# --------------------------------------------------------------------------------------- bounds


def on_grid(model, x, step=0.04, reach=14.0):
    """log p(x) of a model with one-dimensional latents by the rectangle rule, (B,)."""
    z = torch.arange(-reach, reach, step, dtype=torch.double)[:, None]
    log_z = plain_prior(model, z) + math.log(step)
    if model.config.model == "vae":
        return torch.logsumexp(log_bernoulli(x[:, None], plain_decode(model, z)) + log_z, 1)
    mu1, logvar1 = network(model.p1, z)
    each = [torch.logsumexp(log_bernoulli(x[:, None], plain_decode(model, z, z2.expand_as(z)))
                            + normal(z, m, v) + math.log(step), 1) + p
            for z2, m, v, p in zip(z, mu1, logvar1, log_z)]
    return torch.logsumexp(torch.stack(each), 0)


@pytest.mark.parametrize("model, prior", CELLS)
@torch.no_grad()
def test_bound_approaches_the_integral(model, prior):
    ours, S = small(model, prior, z_dim=1, x_dim=3, seed=2), 20_000
    # broad posteriors, so that the weights have a variance; narrow ones would need more samples
    for layer in [ours.encoder.head] + ([ours.q1_head] if model == "hvae" else []):
        layer.linear.weight.data.mul_(0.3)
        layer.linear.bias.data[1] = 1.5
    x = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    log_w = ours.log_weights(x, S, seeded(0)).double()
    exact = on_grid(copy.deepcopy(ours).double(), x.double(), *((0.1, 12.0) if model == "hvae" else ()))
    bound = torch.logsumexp(log_w, 0) - math.log(S)
    share = (log_w - bound).exp()       # the weights over their mean: standard error on the log scale
    error = share.std(0) / math.sqrt(S)
    assert (error < 0.03).all()         # otherwise the next line would prove nothing
    assert ((bound - exact).abs() <= 4 * error + 1e-4).all()
    # and the bounds are in order: ELBO < 10 samples < log p(x)
    tens = (torch.logsumexp(log_w.reshape(10, -1, 2), 0) - math.log(10)).mean(0)
    assert (log_w.mean(0) < tens).all() and (tens < exact + 2 * error).all()
    assert (bound >= log_w.mean(0)).all()


# --------------------------------------------------------------------------------------- stress


@pytest.mark.parametrize("model, prior", CELLS)
@pytest.mark.parametrize("push", ["logits", "latents", "weights"])
def test_extremes_give_finite_losses_and_gradients(model, prior, push):
    ours = small(model, prior)
    if push == "logits":
        ours.output.bias.data.copy_(torch.tensor([200.0, -200.0] * 3))
    elif push == "latents":
        ours.encoder.head.linear.bias.data[:2] = 500.0
    elif prior in MIXTURES:
        ours.prior.weight_logits.data.copy_(torch.tensor([0.0, -200.0, 200.0]))
    for level in (0.0, 1.0, 0.5):       # all black, all white, constant grey
        ours.zero_grad()
        loss = -ours.log_weights(torch.full((3, 6), level), 2, seeded(0)).mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


sizes = st.integers(1, 5)
floats = lambda reach: st.floats(-reach, reach, width=32)


@few
@given(st.lists(st.tuples(floats(1e4), st.floats(0, 1, width=32)), min_size=1, max_size=8))
def test_log_bernoulli_of_anything(pairs):
    logits, x = (torch.tensor(column) for column in zip(*pairs))
    value = log_bernoulli(x, logits.requires_grad_())
    exact = log_bernoulli(x.double(), logits.detach().double())
    (slope,) = torch.autograd.grad(value, logits)
    assert abs(value.item() - exact.item()) <= 1e-6 * (logits.abs().sum().item() + 1)
    torch.testing.assert_close(slope, x - torch.sigmoid(logits.detach()), rtol=1e-5, atol=1e-6)


@few
@given(S=sizes, B=sizes, K=sizes, D=sizes, seed=st.integers(0, 999),
       reach=st.sampled_from([0.0, 1.0, 50.0]), peak=st.sampled_from([0.0, 1.0, 1e3]))
def test_log_mixture_and_log_normal_of_anything(S, B, K, D, seed, reach, peak):
    z = uniform(-reach, reach, S, B, D, seed=seed, dtype=torch.float)
    mu = uniform(-reach, reach, K, D, seed=seed + 1, dtype=torch.float)
    logvar = uniform(-6, 2, K, D, seed=seed + 2, dtype=torch.float)
    logits = peak * randn(K, seed=seed + 3, dtype=torch.float)
    inputs = [t.requires_grad_() for t in (z, mu, logvar, logits)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    for ours, exact in [
            (log_mixture(*inputs[:3], logits.log_softmax(0)), mixture(*doubles)),
            (log_normal(z, mu[0], logvar[0]), normal(doubles[0], doubles[1][0], doubles[2][0]))]:
        # the log-softmax itself is rounded to float32: a part in 1e7 of `peak`
        assert ((ours - exact).abs() <= 1e-6 * (exact.abs() + peak * 5) + 1e-5).all()
        for g, e in zip(gradients(ours, *inputs[:3]), gradients(exact, *doubles[:3])):
            assert torch.isfinite(g).all()
            assert (g - e).abs().max() <= 1e-4 * (1 + e.abs().max()) * (1 + peak / 100)


@few
@given(cell=st.sampled_from(CELLS), S=sizes, B=sizes, K=sizes, D=sizes, seed=st.integers(0, 999),
       scale=st.sampled_from([1.0, 30.0]))
def test_models_of_any_size(cell, S, B, K, D, seed, scale):
    ours = small(*cell, seed=seed, x_dim=4, hidden=3, z_dim=D, components=K)
    for p in ours.parameters():
        p.data.mul_(scale)
    x = uniform(0, 1, B, 4, seed=seed, dtype=torch.float).round()
    log_w = ours.log_weights(x, S, seeded(seed))
    assert log_w.shape == (S, B) and torch.isfinite(log_w).all()
    log_w.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    plain = plain_terms(copy.deepcopy(ours).double(), x.double(), S, seeded(seed))
    size = sum(v.abs() for v in plain.values()) + scale**2
    assert ((log_w - plain["recon"] + plain["kl"]).abs() <= 1e-4 * size).all()


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("model, prior", CELLS)
def test_save_and_load_are_bit_equal(tmp_path, model, prior):
    first, path = small(model, prior), tmp_path / "model.pt"
    extra = {"epoch": 3, "note": "a", "best": -81.5, "seen": torch.arange(4), "parts": {"kl": [1, 2.5]}}
    save(path, first, **extra)
    second = load(path)
    assert second.config == first.config and not second.training
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert torch.equal(second.extra.pop("seen"), extra.pop("seen"))
    assert extra.items() <= second.extra.items()
    x = torch.rand(3, 6).round()
    assert torch.equal(first.log_weights(x, 2, seeded(0)), second.log_weights(x, 2, seeded(0)))


@pytest.mark.parametrize("values, word", [
    ({"prior": "vampire"}, "vampire"), ({"model": "gan"}, "gan"), ({"components": 0}, "components"),
    ({"z_dim": -1}, "z_dim"), ({"components": "5"}, "components"), ({"hidden": 2.0}, "hidden"),
    ({"x_dim": True}, "x_dim"), ({"learned_weights": 1}, "learned_weights"),
    ({"components": 10**8}, "components"), ({"prior": None}, "prior")])
def test_config_names_the_offending_value(values, word):
    with pytest.raises(ValueError, match=word) as caught:
        Config(**values)
    assert "\n" not in str(caught.value)


def test_pseudo_inputs_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(3, 5\), expected \(3, 6\)"):
        build(Config(x_dim=6, components=3), torch.zeros(3, 5))


class Call:
    """Pickles as a call of `function`: what a hostile file is made of."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def sealed(data):
    """With a checksum, which protects against damage and not against malice."""
    return data + models._SEAL + hashlib.sha256(data).hexdigest().encode() + b"\n"


def content(**changes):
    ours = small()
    return {"config": asdict(ours.config), "state": ours.state_dict(), "format": 1} | changes


def repacked(data, compression=zipfile.ZIP_STORED, rename=str):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for member in old.infolist():
            new.writestr(rename(member.filename), old.read(member))
    return buffer.getvalue()


def with_config(**changes):
    return sealed(archive(content(config=content()["config"] | changes)))


def with_state(**changes):
    return sealed(archive(content(state=content()["state"] | changes)))


def polyglot():
    """An old-style torch file with an archive behind it: two readers see two files."""
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    old = archive(content(x=Call(bytearray, 10**7)), _use_new_zipfile_serialization=False)
    return sealed(old + empty.getvalue())


HOSTILE = {
    "empty": lambda: b"",
    "text": lambda: b"this is not a checkpoint, just a longer text\n" * 20,
    "seal only": lambda: sealed(b""),
    "sealed text": lambda: sealed(b"hello"),
    "foreign": lambda: archive({"weights": torch.zeros(3)}),
    "sealed foreign": lambda: sealed(archive({"weights": torch.zeros(3)})),
    "sealed list": lambda: sealed(archive([1, 2])),
    "whole model": lambda: archive(small()),
    "sealed whole model": lambda: sealed(archive(small())),
    "no config": lambda: sealed(archive({"state": {}, "format": 1})),
    "config a list": lambda: sealed(archive(content(config=[1]))),
    "state a list": lambda: sealed(archive(content(state=[1]))),
    "newer": lambda: sealed(archive(content(format=2))),
    "format a word": lambda: sealed(archive(content(format="1"))),
    "compressed": lambda: sealed(repacked(archive(content(x=torch.zeros(10**7))), zipfile.ZIP_DEFLATED)),
    "allocating call": lambda: sealed(archive(content(x=Call(bytearray, 10**7)))),
    "allocating call of 10 GB": lambda: sealed(archive(content(x=Call(bytearray, 10**10)))),
    "unknown prior": lambda: with_config(prior="vampire"),
    "unknown field": lambda: with_config(depth=3),
    "other size": lambda: with_config(z_dim=3),
    "huge components": lambda: with_config(components=10**7),
    "NaN": lambda: with_state(**{"output.bias": torch.full((6,), math.nan)}),
    "infinite": lambda: with_state(**{"prior.u": torch.full((3, 6), math.inf)}),
    "wrong shape": lambda: with_state(**{"output.bias": torch.zeros(5)}),
    "wrong dtype": lambda: with_state(**{"output.bias": torch.zeros(6).double()}),
    "not a tensor": lambda: with_state(**{"output.bias": [0.0] * 6}),
    "one name more": lambda: with_state(more=torch.zeros(1)),
    "capitals": lambda: sealed(repacked(archive(content(x=Call(bytearray, 10**7))),
                                        rename=lambda name: name.replace(".pkl", ".PKL"))),
    "polyglot": polyglot,
    "huge hidden": lambda: with_config(hidden=10**7),
    "tensor as a size": lambda: with_config(hidden=torch.zeros(40, 3)),
    "line break in a name": lambda: with_config(**{"hid\nden": 3}),
    "format zero": lambda: sealed(archive(content(format=0))),
}


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_and_foreign_files_are_refused(tmp_path, kind):
    refused(tmp_path / "model.pt", HOSTILE[kind]())


def test_the_files_above_are_refused_for_their_fault_alone(tmp_path):
    path = tmp_path / "model.pt"
    for data in (archive(content()), repacked(archive(content()))):
        path.write_bytes(sealed(data))
        assert load(path).config == small().config


@pytest.mark.parametrize("wrap", [bytes, sealed])
def test_no_code_of_a_file_is_run(tmp_path, wrap):
    marker = tmp_path / "marker"
    bomb = wrap(archive(content(x=Call(os.system, f"touch {marker}"))))
    refused(tmp_path / "model.pt", bomb)
    assert not marker.exists()


def test_damaged_and_truncated_files_are_refused(tmp_path):
    save(tmp_path / "good.pt", small())
    good, chance = (tmp_path / "good.pt").read_bytes(), random.Random(0)
    tail = range(len(good) - models._SEAL_SIZE, len(good))      # the seal itself, byte by byte
    for position in [*chance.sample(range(len(good)), 150), *tail]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << chance.randrange(8)
        refused(tmp_path / "bad.pt", bytes(damaged))
    for size in [1, len(good) - 1, *chance.sample(range(len(good)), 50)]:
        refused(tmp_path / "bad.pt", good[:size])
    refused(tmp_path / "bad.pt", good + b"\n")


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(models.os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomic(path, b"new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
