"""VAE and two-layer HVAE with a standard, mixture-of-Gaussians or VampPrior (Tomczak & Welling, 2018).

    model = build(Config(model="vae", prior="vamp"))
    loss = -model.log_weights(x).mean()            # x: (B, 784) in [0, 1]; minus the ELBO, in nats

VAE    p(x, z)      = p(x | z) p(z)                 q(z | x)
HVAE   p(x, z1, z2) = p(x | z1, z2) p(z1 | z2) p(z2)   q(z1, z2 | x) = q(z1 | x, z2) q(z2 | x)
VampPrior   p(z) = sum_k w_k q(z | u_k),  w_k = 1/K unless learned       (the paper's eq. 9)
log weight  log_w = log p(x | z) + log p(z) - log q(z | x),  z ~ q(z | x)
ELBO = E[log_w];   log p(x) >= E[logsumexp_s(log_w_s) - log S]            (Burda et al., 2016, eq. 8)

B images, S samples, K components, D latent or pixel size; all densities are in nats and keep
their constants. Files hold plain tensors, numbers and strings, and a checksum.
"""
import hashlib
import io
import math
import os
import pickletools
import tempfile
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

LOG_2PI = math.log(2 * math.pi)
TILE = 1024         # rows and components of one block of the mixture: 8 MB in float64
FORMAT = 1          # version of the files; a larger one is refused

# ------------------------------------------------------------------------------------ densities


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def log_normal(x, mu, logvar):
    """log N(x; mu, exp(logvar)) in nats, summed over the last axis: (..., D) -> (...).

    Computed in float32 at least, whatever autocast made of the inputs.
    """
    x, mu, logvar = (_wide(t) for t in (x, mu, logvar))
    return -0.5 * (LOG_2PI + logvar + (x - mu).square() * torch.exp(-logvar)).sum(-1)


def log_bernoulli(x, logits):
    """log Bernoulli(x; sigmoid(logits)) in nats, summed over the last axis: (..., D) -> (...).

    x in [0, 1]; written with logits because a clamped probability has no gradient beyond its clamp.
    Computed in float32 at least, whatever autocast made of the inputs.
    """
    logits = _wide(logits)
    x = x.to(logits.dtype)
    if not torch.is_grad_enabled() and ((x == 0) | (x == 1)).all():
        # one pass of sigmoid, then one logarithm for each product of eight pixels' probabilities
        probs = torch.sigmoid_(logits * (2 * x - 1))
        for _ in range(3):
            if probs.shape[-1] % 2 == 0:
                half = probs.shape[-1] // 2
                probs = probs[..., :half] * probs[..., half:]
        if probs.min() > 1e-30:     # else a product came near underflow: the long way
            return probs.log_().sum(-1)
    x, logits = torch.broadcast_tensors(x, logits)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


class _LogMixture(torch.autograd.Function):
    """logsumexp_k([z^2, z] . coef_k + bias_k) for z (N, D), coef (K, 2D), bias (K): (N,).

    Works in blocks of TILE x TILE with a running maximum and sum, so that memory beyond the result
    does not grow with K; one block's responsibilities are kept for backward, more are recomputed.
    """

    @staticmethod
    def forward(ctx, z, coef, bias):
        out = z.new_empty(len(z))
        kept = None
        for rows, top, total, one_block in _row_blocks(z, coef, bias):
            out[rows] = top + total.log()
            if one_block is not None and any(ctx.needs_input_grad):
                kept = one_block.div_(total[:, None])
        ctx.save_for_backward(z, coef, bias, out, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, coef, bias, out, kept = ctx.saved_tensors
        d_z, d_coef, d_bias = torch.empty_like(z), torch.zeros_like(coef), torch.zeros_like(bias)
        for rows in _blocks(len(z)):
            features, through = _features(z[rows]), 0
            for ks in _blocks(len(coef)):
                if kept is not None:
                    weight = kept
                else:
                    joint = torch.addmm(bias[ks], features, coef[ks].T)
                    weight = joint.sub_(out[rows, None]).exp_()
                weight = weight * grad[rows, None]
                through = through + weight @ coef[ks]
                d_coef[ks] += weight.T @ features
                d_bias[ks] += weight.sum(0)
            by_square, by_value = through.chunk(2, dim=1)
            d_z[rows] = 2 * z[rows] * by_square + by_value
        return d_z, d_coef, d_bias


def _blocks(n):
    return [slice(i, min(i + TILE, n)) for i in range(0, n, TILE)]


def _features(z):
    return torch.cat([z.square(), z], dim=1)


def _row_blocks(z, coef, bias):
    """For each block of rows: its slice, max_k, sum_k exp(joint - max), and the latter's terms when
    a single block holds all of z and the mixture."""
    components = _blocks(len(coef))
    for rows in _blocks(len(z)):
        features = _features(z[rows])
        # not -inf: a block of components whose weights are all zero would give inf - inf
        top = torch.full_like(features[:, 0], torch.finfo(z.dtype).min)
        total = torch.zeros_like(top)
        for ks in components:
            joint = torch.addmm(bias[ks], features, coef[ks].T)
            old, top = top, torch.maximum(top, joint.amax(1))
            terms = joint.sub_(top[:, None]).exp_()
            total = total * (old - top).exp() + terms.sum(1)
        yield rows, top, total, terms if len(z) <= TILE and len(components) == 1 else None


def log_mixture(z, mu, logvar, log_weights=None):
    """log sum_k w_k N(z; mu_k, exp(logvar_k)) in nats: z (..., D), mu and logvar (K, D) -> (...).

    `log_weights` (K,) are normalised log mixture weights; None means 1/K each. The squares are
    expanded into one matrix product per block, [z^2, z] . [-1/(2 var), mu/var], never a (B, K, D)
    tensor: memory O(B K) up to a block of 1024 x 1024, and constant in K beyond. The products are
    float64, which neither TF32, "medium" precision nor autocast touches, because the expansion
    cancels digits. Result: float32 for float32 (or narrower) z; its error against float64 is the
    rounding of the result, at most 6e-8 of its size: 1e-3 nats at 10,000 nats.
    Devices without float64 (mps) use float32, with errors up to 0.1 nats for |z|, |mu| near 5 and
    logvar near -6 at D = 40.
    Not twice differentiable. ValueError on shapes that do not fit.
    """
    if mu.ndim != 2 or mu.shape != logvar.shape or z.shape[-1:] != mu.shape[1:] or not len(mu):
        raise ValueError(f"log_mixture: z {tuple(z.shape)}, mu {tuple(mu.shape)} and logvar "
                         f"{tuple(logvar.shape)} do not fit; expected (..., D), (K, D), (K, D)")
    if log_weights is not None and log_weights.shape != mu.shape[:1]:
        raise ValueError(f"log_mixture: log_weights {tuple(log_weights.shape)}, expected ({len(mu)},)")
    coef, bias = _expanded(mu, logvar, log_weights)
    flat = z.reshape(-1, z.shape[-1]).to(coef.dtype)
    result = _LogMixture.apply(flat, coef, bias).reshape(z.shape[:-1])
    return result.to(torch.promote_types(z.dtype, torch.float32))


def _expanded(mu, logvar, log_weights, center=0.0):
    """coef (K, 2D), bias (K) of `_LogMixture` for z - center, in float64 where the device has it."""
    exact = torch.float32 if mu.device.type == "mps" else torch.float64
    mu, logvar = mu.to(exact) - center, logvar.to(exact)
    log_weights = -math.log(len(mu)) if log_weights is None else log_weights.to(exact)
    precision = torch.exp(-logvar)
    coef = torch.cat([-0.5 * precision, mu * precision], dim=1)
    return coef, log_weights - 0.5 * (mu.square() * precision + logvar + LOG_2PI).sum(1)


# --------------------------------------------------------------------------------------- priors


class StandardPrior(nn.Module):
    """N(0, I) in D dimensions."""

    def __init__(self, n_dims):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_dims), persistent=False)

    def log_prob(self, z):
        """log p(z) in nats: (..., D) -> (...)."""
        return log_normal(z, self.mean, torch.zeros_like(self.mean))

    def sample(self, n, generator=None):
        """n draws, (n, D)."""
        return _normal(self.mean.expand(n, -1), generator=generator)

    def frozen(self):
        """A copy for evaluation, without further work per call: this prior itself."""
        return self

    def around(self, center):
        """The same density for z near `center`, see MixturePrior: this prior itself."""
        return self


class _Mixture(nn.Module):
    """What the mixture priors share; a subclass gives `components() -> mu, logvar`, both (K, D)."""

    def log_weights(self):
        """Normalised log mixture weights (K,), or None when all are 1/K."""
        return None if self.weight_logits is None else torch.log_softmax(self.weight_logits, 0)

    def log_prob(self, z):
        """log p(z) in nats: (..., D) -> (...)."""
        return log_mixture(z, *self.components(), self.log_weights())

    def sample(self, n, generator=None):
        """n draws, (n, D): a component from the weights, then its Gaussian."""
        mu, logvar = self.components()
        log_w = self.log_weights()
        weights = torch.ones_like(mu[:, 0]) if log_w is None else log_w.exp()
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        return _normal(mu[k], logvar[k], generator)

    @torch.no_grad()
    def frozen(self):
        """The same density as a MixturePrior of constants: the encoder runs once, not per call."""
        mu, logvar = self.components()
        return MixturePrior(mu.clone(), logvar.clone(), self.weight_logits).requires_grad_(False)


class MixturePrior(_Mixture):
    """Mixture of K free diagonal Gaussians: mu and logvar (K, D) are the parameters' first values.

    Weights are equal, or learned from `weight_logits` (K,). The paper's "MoG" prior.
    """

    def __init__(self, mu, logvar, weight_logits=None):
        super().__init__()
        self.mu = nn.Parameter(mu.detach().clone())
        self.logvar = nn.Parameter(logvar.detach().clone())
        learned = weight_logits is not None
        self.weight_logits = nn.Parameter(weight_logits.detach().clone()) if learned else None

    def components(self):
        return self.mu, self.logvar

    @torch.no_grad()
    def around(self, center):
        """The same density for z near `center` (D,), say samples of one posterior: an object with
        `log_prob`, without gradients.

        Seen from there the expanded squares of the components that count are small, so products in
        z's own precision do: with float32, half the work of `log_mixture`. Unlike its products they
        follow the caller's TF32, "medium" precision and autocast.
        """
        return _Around(self, center)


class _Around:
    """See MixturePrior.around: sum_k w_k N(z; mu_k, var_k) by z - center, with constants prepared
    once in float64."""

    def __init__(self, prior, center):
        self.center = center
        coef, bias = _expanded(prior.mu, prior.logvar, prior.log_weights(), center)
        self.coef, self.bias = coef.to(center.dtype), bias.to(center.dtype)

    def log_prob(self, z):
        """log p(z) in nats: (..., D) -> (...)."""
        flat = (z - self.center).reshape(-1, z.shape[-1])
        return _LogMixture.apply(flat, self.coef, self.bias).reshape(z.shape[:-1])


class VampPrior(_Mixture):
    """Mixture of the encoder's posteriors at K learned pseudo-inputs, sum_k w_k q(z | u_k).

    encoder: any callable x -> (mu, logvar), each (K, D). It is shared with the VAE, so it is not
    registered here: the model's state_dict holds it once.
    pseudo_inputs (K, ...): first values of u, for instance training images.
    learned_weights: learn w_k; otherwise 1/K.
    bounds: (low, high) to keep u inside, or None for data without bounds. Call `project_()` after
    each optimiser step, or u drifts away behind the bound.
    """

    def __init__(self, encoder, pseudo_inputs, learned_weights=False, bounds=(0.0, 1.0)):
        super().__init__()
        self._encoder = (encoder,)      # a tuple hides it from nn.Module's registration
        self.bounds = bounds
        self.u = nn.Parameter(pseudo_inputs.detach().clone())
        zeros = self.u.new_zeros(len(pseudo_inputs))
        self.weight_logits = nn.Parameter(zeros) if learned_weights else None

    def pseudo_inputs(self):
        """u (K, ...), inside the bounds; its gradient passes through, also at a bound.

        torch.clamp's own gradient is zero there, and a pixel that starts at 0 or 1 would stay.
        """
        if self.bounds is None:
            return self.u
        return self.u + (self.u.clamp(*self.bounds) - self.u).detach()

    def components(self):
        """mu, logvar (K, D) of q(z | u_k)."""
        return self._encoder[0](self.pseudo_inputs())

    @torch.no_grad()
    def project_(self):
        """Moves u back into the bounds, in place."""
        if self.bounds is not None:
            self.u.clamp_(*self.bounds)

    @torch.no_grad()
    def clipped(self):
        """Share of pseudo-input pixels at or beyond a bound, 0 to 1."""
        low, high = self.bounds or (-math.inf, math.inf)
        return ((self.u <= low) | (self.u >= high)).float().mean().item()


# --------------------------------------------------------------------------------------- layers


def _normal(mu, logvar=None, generator=None, size=()):
    """A draw from N(mu, exp(logvar)), or N(mu, 1): (*size, *mu.shape), reparameterised."""
    eps = torch.randn((*size, *mu.shape), generator=generator, device=mu.device, dtype=mu.dtype)
    return mu + eps if logvar is None else mu + torch.exp(0.5 * logvar) * eps


def _draw(mu, logvar, generator):
    return mu if generator is None else _normal(mu, logvar, generator)


class GatedDense(nn.Module):
    """(W x + b) * sigmoid(V x + c): (..., n_in) -> (..., n_out). W and V are stacked in one matrix.

    With a tuple for n_in it takes that many inputs and acts on their concatenation, which it never
    builds: each meets its own columns, so an input without the sample axis costs its own size.
    """

    def __init__(self, n_in, n_out):
        super().__init__()
        self.n_in = (n_in,) if isinstance(n_in, int) else tuple(n_in)
        self.linear = _linear(sum(self.n_in), 2 * n_out)

    def forward(self, *inputs):
        if len(inputs) == 1:
            return F.glu(self.linear(inputs[0]))
        first, *others = self.linear.weight.split(self.n_in, dim=1)
        out = F.linear(inputs[0], first, self.linear.bias)
        for x, weight in zip(inputs[1:], others):
            out = out + F.linear(x, weight)
        return F.glu(out)


class GaussianHead(nn.Module):
    """mu and logvar, the latter clipped to [-6, 2] as in the authors' code: (..., n_in) -> (..., D)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = _linear(n_in, 2 * n_out)

    def forward(self, h):
        mu, logvar = self.linear(h).chunk(2, dim=-1)
        return mu, logvar.clamp(-6.0, 2.0)


class GaussianNet(nn.Module):
    """Two gated layers and a GaussianHead: (..., n_in) -> mu, logvar (..., n_out)."""

    def __init__(self, n_in, hidden, n_out):
        super().__init__()
        self.body = nn.Sequential(GatedDense(n_in, hidden), GatedDense(hidden, hidden))
        self.head = GaussianHead(hidden, n_out)

    def forward(self, x):
        return self.head(self.body(x))


def _linear(n_in, n_out):
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / n_in))      # the authors' initialisation
    nn.init.zeros_(layer.bias)
    return layer


# --------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Config:
    """What builds a model. `components` and `learned_weights` matter for the mixture priors."""
    model: str = "vae"
    prior: str = "vamp"
    x_dim: int = 784
    hidden: int = 300
    z_dim: int = 40
    components: int = 500
    learned_weights: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ValueError(f"{field.name} must be {field.type.__name__}, "
                                 f"got {type(value).__name__}")
            if field.type is int and not 1 <= value <= 10**7:
                raise ValueError(f"{field.name} must be from 1 to 10,000,000, got {value}")
        for value, choices in ((self.model, MODELS), (self.prior, PRIORS)):
            if value not in choices:
                raise ValueError(f"{value!r} is not one of {', '.join(choices)}")


class _Model(nn.Module):
    """What both models share. A subclass has `layers`, `infer`, `terms`, `decode`."""

    def __init__(self, config, pseudo_inputs=None):
        super().__init__()
        self.config = config
        self._build(config)
        if config.prior == "standard":
            self.prior = StandardPrior(config.z_dim)
        elif config.prior == "mog":
            mu = torch.randn(config.components, config.z_dim)
            logits = torch.zeros(config.components) if config.learned_weights else None
            self.prior = MixturePrior(mu, torch.zeros_like(mu), logits)
        else:
            if pseudo_inputs is None:       # the authors' first values for MNIST
                pseudo_inputs = torch.normal(0.05, 0.01, (config.components, config.x_dim))
            if pseudo_inputs.shape != (config.components, config.x_dim):
                raise ValueError(f"pseudo_inputs {tuple(pseudo_inputs.shape)}, expected "
                                 f"({config.components}, {config.x_dim})")
            self.prior = VampPrior(self.encoder, pseudo_inputs, config.learned_weights)
            self.prior.project_()

    def encode(self, x):
        """mu, logvar (B, D) of the top latent's posterior: q(z | x), or q(z2 | x) of the HVAE."""
        return self.encoder(x)

    def log_weights(self, x, S=1, generator=None):
        """log p(x, z) - log q(z | x) in nats for S samples of each image: x (B, D) -> (S, B).

        Its mean over S estimates the ELBO; logsumexp over S minus log S bounds log p(x).
        """
        parts = self.terms(x, S, generator)
        return parts["recon"] - parts["kl"]

    def sample(self, n, generator=None):
        """n images as probabilities, (n, 784), by ancestral sampling from the prior."""
        return self.generate(self.prior.sample(n, generator), generator)

    def set_output_bias(self, mean):
        """Starts the decoder at the data's mean image (784,), which saves the first epochs."""
        with torch.no_grad():
            self.output.bias.copy_(torch.logit(mean.clamp(0.01, 0.99)))


class VAE(_Model):
    """One stochastic layer: p(x | z) p(z), q(z | x)."""

    layers = ("z",)

    def _build(self, c):
        self.encoder = GaussianNet(c.x_dim, c.hidden, c.z_dim)
        self.decoder = nn.Sequential(GatedDense(c.z_dim, c.hidden), GatedDense(c.hidden, c.hidden))
        self.output = _linear(c.hidden, c.x_dim)

    def infer(self, x):
        """What `terms` needs of x whatever the samples: ((mu, logvar) of q(z | x),)."""
        return (self.encode(x),)

    def terms(self, x, S=1, generator=None, inferred=None, prior=None, path_gradient=False):
        """Named parts of the log weight in nats, each (S, B): recon - kl is the log weight.

        recon = log p(x | z), kl = log q(z | x) - log p(z), at the same z ~ q(z | x).
        `inferred` (from `infer(x)`) and `prior` (from `prior.frozen()`, or its `around`) save
        repeated work.
        `path_gradient` leaves the score of q out of the gradient (Roeder et al., 2017): its mean is
        zero, its variance is not. The values are the same.
        """
        ((mu, logvar),) = self.infer(x) if inferred is None else inferred
        z = _normal(mu, logvar, generator, (S,))
        recon = log_bernoulli(x, self.decode(z))
        if path_gradient:
            mu, logvar = mu.detach(), logvar.detach()
        kl = log_normal(z, mu, logvar) - (prior or self.prior).log_prob(z)
        return {"recon": recon, "kl": kl}

    def decode(self, z):
        """Pixel logits (..., 784) of z (..., 40)."""
        return self.output(self.decoder(z))

    def generate(self, z, generator=None):
        """Images as probabilities (n, 784) given latents z (n, 40)."""
        return torch.sigmoid(self.decode(z))

    def reconstruct(self, x, generator=None):
        """Probabilities (B, 784) decoded from the posterior's mean; with a generator, a draw."""
        return self.generate(_draw(*self.encode(x), generator))

    def latents(self, x, generator=None):
        """{layer: (z, q, p)}: a draw (the mean without a generator), its q = (mu, logvar), each
        (B, 40), and p likewise where p is Gaussian: None for the top layer, whose p is the prior."""
        q = self.encode(x)
        return {"z": (_draw(*q, generator), q, None)}


class HVAE(_Model):
    """Two stochastic layers: p(x | z1, z2) p(z1 | z2) p(z2), q(z1 | x, z2) q(z2 | x); prior on z2."""

    layers = ("z1", "z2")

    def _build(self, c):
        self.encoder = GaussianNet(c.x_dim, c.hidden, c.z_dim)              # q(z2 | x)
        self.q1_x = GatedDense(c.x_dim, c.hidden)                           # q(z1 | x, z2)
        self.q1_z2 = GatedDense(c.z_dim, c.hidden)
        self.q1_joint = GatedDense((c.hidden, c.hidden), c.hidden)
        self.q1_head = GaussianHead(c.hidden, c.z_dim)
        self.p1 = GaussianNet(c.z_dim, c.hidden, c.z_dim)                   # p(z1 | z2)
        self.px_z1 = GatedDense(c.z_dim, c.hidden)                          # p(x | z1, z2)
        self.px_z2 = GatedDense(c.z_dim, c.hidden)
        self.px_joint = GatedDense((c.hidden, c.hidden), c.hidden)
        self.output = _linear(c.hidden, c.x_dim)

    def infer(self, x):
        """What `terms` needs of x whatever the samples: (mu, logvar) of q(z2 | x), features of x."""
        return self.encode(x), self.q1_x(x)

    def _q1(self, features, z2):
        return self.q1_head(self.q1_joint(features, self.q1_z2(z2)))

    def terms(self, x, S=1, generator=None, inferred=None, prior=None, path_gradient=False):
        """Named parts of the log weight in nats, each (S, B): recon - kl is the log weight.

        recon = log p(x | z1, z2), kl1 = log q(z1 | x, z2) - log p(z1 | z2),
        kl2 = log q(z2 | x) - log p(z2), kl = kl1 + kl2; all at the same z2, z1 ~ q.
        `inferred`, `prior` and `path_gradient` as in VAE.terms.
        """
        (mu2, logvar2), features = self.infer(x) if inferred is None else inferred
        z2 = _normal(mu2, logvar2, generator, (S,))
        mu1, logvar1 = self._q1(features, z2)
        z1 = _normal(mu1, logvar1, generator)
        recon = log_bernoulli(x, self.decode(z1, z2))
        if path_gradient:       # z1's score given z2 has mean zero too, also through z2
            mu1, logvar1, mu2, logvar2 = (t.detach() for t in (mu1, logvar1, mu2, logvar2))
        kl1 = log_normal(z1, mu1, logvar1) - log_normal(z1, *self.p1(z2))
        kl2 = log_normal(z2, mu2, logvar2) - (prior or self.prior).log_prob(z2)
        return {"recon": recon, "kl": kl1 + kl2, "kl1": kl1, "kl2": kl2}

    def decode(self, z1, z2):
        """Pixel logits (..., 784) of z1 and z2 (..., 40)."""
        return self.output(self.px_joint(self.px_z1(z1), self.px_z2(z2)))

    def generate(self, z2, generator=None):
        """Images as probabilities (n, 784) given z2 (n, 40); z1 is drawn from p(z1 | z2)."""
        mu1, logvar1 = self.p1(z2)
        return torch.sigmoid(self.decode(_normal(mu1, logvar1, generator), z2))

    def reconstruct(self, x, generator=None):
        """Probabilities (B, 784) decoded from the posteriors' means; with a generator, draws."""
        latents = self.latents(x, generator)
        return torch.sigmoid(self.decode(latents["z1"][0], latents["z2"][0]))

    def latents(self, x, generator=None):
        """{layer: (z, q, p)}: a draw (the mean without a generator), its q = (mu, logvar), each
        (B, 40), and p likewise where p is Gaussian: None for the top layer, whose p is the prior."""
        q2, features = self.infer(x)
        z2 = _draw(*q2, generator)
        q1 = self._q1(features, z2)
        return {"z1": (_draw(*q1, generator), q1, self.p1(z2)), "z2": (z2, q2, None)}


MODELS = {"vae": VAE, "hvae": HVAE}
PRIORS = {"standard": "standard prior", "mog": "mixture of Gaussians", "vamp": "VampPrior"}


def build(config, pseudo_inputs=None):
    """A new model for a Config; pseudo_inputs (K, 784) are the VampPrior's first values."""
    return MODELS[config.model](config, pseudo_inputs)


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name):
    """A torch.device for one of DEVICES; auto takes the fastest. ValueError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name):
        raise ValueError(f"device {name!r} is not on this machine or not usable by this torch; "
                         "take cpu")
    return torch.device(name)


# ---------------------------------------------------------------------------------------- files
# A file is torch.save's archive followed by a line with the SHA-256 of all before it.

_SEAL = b"\nvampprior sha256 "
_SEAL_SIZE = len(_SEAL) + 64 + 1
_PICKLE_NAMES = ("torch._utils _rebuild_tensor_v2", "collections OrderedDict") + tuple(
    f"torch {kind}Storage" for kind in ("Float", "Double", "Long", "Int", "Short", "Byte",
                                          "Bool", "Half", "BFloat16"))


def write_atomic(path, data):
    """Writes bytes or text so that `path` holds either its old content or all of the new one."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    data = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)      # mkstemp's 0600 would hide results from others
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def save_file(path, content):
    """Writes a dict of tensors, numbers, strings, lists and dicts, sealed with a checksum."""
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    data = buffer.getvalue()
    write_atomic(path, data + _SEAL + hashlib.sha256(data).hexdigest().encode() + b"\n")


def load_file(path, device="cpu"):
    """The dict that `save_file` wrote. ValueError on any other or damaged file; runs no code of it.

    Memory is bounded by the file's size: nothing compressed or lazily sized is accepted.
    """
    with open(path, "rb") as file:
        data = file.read()
    data, seal = data[:-_SEAL_SIZE], data[-_SEAL_SIZE:]
    if not seal.startswith(_SEAL):
        raise ValueError(f"{path} is not a checkpoint of this project, or it was cut short; "
                         "use another or train again")
    if seal[len(_SEAL):-1] != hashlib.sha256(data).hexdigest().encode() or seal[-1:] != b"\n":
        raise ValueError(f"{path} is damaged (its checksum differs); use another or train again")
    try:
        _check_archive(data)
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        version = content["format"]
    except Exception as error:      # whatever a crafted archive provokes, it is not ours
        kind = type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of this project ({kind})") from None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"{path} has a format other than 1 to {FORMAT}; update this code to read it")
    return content


def _check_archive(data):
    """Refuses what weights_only=True still allows: compressed members, calls that allocate."""
    if not data.startswith(b"PK\x03\x04"):     # torch would take its older, unchecked reader
        raise ValueError("no archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = {m.filename.partition("/")[2].lower() for m in members}     # torch ignores case
        if len(names) < len(members) or any(m.filename != m.orig_filename for m in members):
            raise ValueError("members with two names or one name twice")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("compressed members")
        if sum(m.file_size for m in members) > len(data):
            raise ValueError("members larger than the file")
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                for code, argument, _ in pickletools.genops(archive.read(member)):
                    if code.name in ("GLOBAL", "INST") and argument not in _PICKLE_NAMES:
                        raise ValueError("unexpected name")
                    if code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                        raise ValueError("unexpected opcode")


def load_state(module, state):
    """Copies a state_dict into a module after comparing names, shapes and dtypes. ValueError."""
    own = module.state_dict()
    if not isinstance(state, dict) or own.keys() != state.keys():
        raise ValueError("its parameters are not those of the model it names")
    for name, value in own.items():
        got = state[name]
        if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (value.shape, value.dtype):
            raise ValueError(f"{name} is not a {value.dtype} tensor of shape {tuple(value.shape)}")
        if got.untyped_storage().nbytes() < got.numel() * got.element_size():
            raise ValueError(f"{name} holds fewer values than its shape says")
        if value.is_meta:
            continue
        if not torch.isfinite(got).all():
            raise ValueError(f"{name} holds values that are not finite")
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(state)


def save(path, model, **extra):
    """Writes a model, and further plain values, to one file that `load` reads."""
    save_file(path, {"config": asdict(model.config), "state": model.state_dict(), **extra})


def load(path, device="cpu"):
    """The model saved at `path`, in eval mode, with what was saved beside it as `model.extra`.

    ValueError, in one line, on a file that is damaged, foreign, newer or does not fit its config.
    """
    content = load_file(path, device)
    try:
        config, state = content.pop("config"), content.pop("state")
        config = Config(**config)
        with torch.device("meta"):      # a config that promises more than the file holds costs nothing
            load_state(build(config), state)
        model = build(config).to(device)
        load_state(model, state)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold a model of this project: {reason}") from None
    model.extra = content
    return model.eval()
