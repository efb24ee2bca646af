"""VAE and two-layer HVAE with a standard, mixture-of-Gaussians or VampPrior (Tomczak & Welling, 2018).

    model = build(Config(model="vae", prior="vamp"))
    loss = -model.log_weights(x).mean()            # x: (B, 784) in [0, 1]; minus the ELBO, in nats

VAE    p(x, z)      = p(x | z) p(z)                 q(z | x)
HVAE   p(x, z1, z2) = p(x | z1, z2) p(z1 | z2) p(z2)   q(z1, z2 | x) = q(z1 | x, z2) q(z2 | x)
VampPrior   p(z) = sum_k pi_k q(z | u_k),  pi_k = 1/K unless learned     (the paper's eq. 9)
log weight  log_w = log p(x | z) + log p(z) - log q(z | x),  z ~ q(z | x)
ELBO = E[log_w];   log p(x) >= E[logsumexp_s(log_w_s) - log S]            (Burda et al., 2016, eq. 8)

B images, S samples, K components, D latent or pixel size; all densities are in nats and keep
their constants. Needs torch alone: copy this file to use a prior in your own model.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LOG_2PI = math.log(2 * math.pi)
TILE = 1024         # rows and components of one block of the mixture: 8 MB in float64
BLOCK = 8192        # pseudo-inputs that are encoded at once

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
    Computed in float32 at least, whatever autocast made of the inputs. For
    black-and-white x not twice differentiable.
    """
    logits = _wide(logits)
    x = x.to(logits.dtype)
    if not x.requires_grad and torch.equal(x, (x > 0).to(x.dtype)):
        return _LogBinary.apply(2 * x - 1, logits)
    x, logits = torch.broadcast_tensors(x, logits)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


class _LogBinary(torch.autograd.Function):
    """log_bernoulli for x in {0, 1}, given as sign = 2 x - 1: sum_d log sigmoid(sign_d logits_d).

    One logarithm for the product of eight pixels' probabilities, where that stays above underflow:
    the logarithms of single pixels would take as long as the matrix products before them.
    """

    @staticmethod
    def forward(ctx, sign, logits):
        probs = torch.sigmoid_(logits * sign)
        ctx.save_for_backward(sign, probs)
        ctx.shape = logits.shape
        product = probs
        for _ in range(3):
            if product.shape[-1] % 2 == 0:
                half = product.shape[-1] // 2
                product = product[..., :half] * product[..., half:]
        if not product.numel() or product.min() > 1e-30:        # which is false of a NaN
            return product.log().sum(-1)
        return F.logsigmoid(logits * sign).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        sign, probs = ctx.saved_tensors     # d log p / d logit = x - sigmoid(logit)
        slope = torch.addcmul(sign, sign, probs, value=-1)
        return None, slope.mul_(grad[..., None]).sum_to_size(ctx.shape)


def log_logistic(x, mean, logscale):
    """log probability of grey levels by a discretised logistic, in nats, summed: (..., D) -> (...).

    x is level / 255. Level l has the mass of Logistic(mean, exp(logscale)) on [l/256, (l+1)/256], as
    in Kingma et al. (2016, arXiv:1606.04934) and the authors' code; level 0 takes all below it, too,
    and level 255 all above, so that the 256 sum to one. With a < b the standardised ends of a bin,
        sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)),
    whose logarithm keeps its digits and its gradient however far x lies from the mean.
    Computed in float32 at least, whatever autocast made of the inputs. No gradient in x.
    """
    mean, logscale = _wide(mean), _wide(logscale)
    level, precision = torch.round(255 * x), torch.exp(-logscale)
    low = (level.to(mean.dtype) / 256 - mean) * precision
    width = precision / 256
    above, below = F.logsigmoid(low + width), F.logsigmoid(-low)
    inside = above + below + torch.log(-torch.expm1(-width))
    return torch.where(level == 0, above, torch.where(level == 255, below, inside)).sum(-1)


def mean_and_logscale(parameters):
    """A decoder's outputs (..., 2D) as mean in [0, 1] and log scale in [-4.5, 0], each (..., D).

    The bounds are the authors'. The lower one matters: without it the density of a pixel that
    never changes has no limit.
    """
    mean, logscale = _wide(parameters).chunk(2, dim=-1)
    return torch.sigmoid(mean), logscale.clamp(-4.5, 0.0)


def logistic_pixels(x, parameters):
    """log_logistic of grey levels x (..., D) by a decoder's outputs (..., 2D): (...)."""
    return log_logistic(x, *mean_and_logscale(parameters))


def mean_pixels(parameters):
    """The mean image (..., D) of a decoder's outputs (..., 2D)."""
    return mean_and_logscale(parameters)[0]


def gaussian_pixels(x, parameters):
    """log N(x; mean, scale^2), a density, of x (..., D) by a decoder's outputs (..., 2D): (...)."""
    mean, logscale = mean_and_logscale(parameters)
    return log_normal(x, mean, 2 * logscale)


class _LogMixture(torch.autograd.Function):
    """logsumexp_k([z^2, z] . coef_k + bias_k) for z (N, D), coef (K, 2D), bias (K): (N,).

    Works in blocks of TILE x TILE with a running maximum and sum, so that memory beyond the result
    does not grow with K; one block's responsibilities are kept for backward, more are recomputed.
    """

    @staticmethod
    def forward(ctx, z, coef, bias):
        out, kept, components = z.new_empty(len(z)), None, _blocks(len(coef))
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
            out[rows] = top + total.log()
            if len(z) <= TILE and len(components) == 1 and any(ctx.needs_input_grad):
                kept = terms.div_(total[:, None])
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


def log_mixture(z, mu, logvar, log_pi=None):
    """log sum_k pi_k N(z; mu_k, exp(logvar_k)) in nats: z (..., D), mu and logvar (K, D) -> (...).

    `log_pi` (K,) are normalised log mixture weights; None means 1/K each. The squares are expanded
    into one matrix product per block, [z^2, z] . [-1/(2 var), mu/var], never a (B, K, D) tensor:
    memory is a block of at most 1024 x 1024, and the (K, 2D) coefficients with their gradient.
    The products are float64, which neither TF32, "medium" precision nor autocast touches, because
    the expansion cancels digits. Result: float32 for float32 (or narrower) z; its error against
    float64 is the rounding of the result, at most 6e-8 of its size, for |mu| of a few and logvar
    from -14 on. Narrower components lose digits, at -30 whole nats: clamp the encoder's logvar.
    On a device without float64 (mps) the products are float32: errors up to 0.1 nats for |z|, |mu|
    up to 5 and logvar from -6 to 2 at D = 40.
    Not twice differentiable. ValueError on shapes that do not fit.
    """
    if mu.ndim != 2 or mu.shape != logvar.shape or z.shape[-1:] != mu.shape[1:] or not len(mu):
        raise ValueError(f"log_mixture: z {tuple(z.shape)}, mu {tuple(mu.shape)} and logvar "
                         f"{tuple(logvar.shape)} do not fit; expected (..., D), (K, D), (K, D)")
    if log_pi is not None and log_pi.shape != mu.shape[:1]:
        raise ValueError(f"log_mixture: log_pi {tuple(log_pi.shape)}, expected ({len(mu)},)")
    coef, bias = mixture_coefficients(mu, logvar, log_pi, products_dtype(mu.device))
    return by_coefficients(z, coef, bias).to(torch.promote_types(z.dtype, torch.float32))


def products_dtype(device):
    """The dtype of log_mixture's products: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def mixture_coefficients(mu, logvar, log_pi=None, dtype=torch.float64, center=0.0):
    """coef (K, 2D) and bias (K,): a mixture's log density at z is, with y = z - center,
    logsumexp_k([y^2, y] . coef_k + bias_k)."""
    mu, logvar = mu.to(dtype) - center, logvar.to(dtype)
    log_pi = -math.log(len(mu)) if log_pi is None else log_pi.to(dtype)
    precision = torch.exp(-logvar)
    coef = torch.cat([-0.5 * precision, mu * precision], dim=1)
    return coef, log_pi - 0.5 * (mu.square() * precision + logvar + LOG_2PI).sum(1)


def by_coefficients(y, coef, bias):
    """The log density (...) at y (..., D), computed in the coefficients' dtype."""
    flat = y.reshape(-1, y.shape[-1]).to(coef.dtype)
    return _LogMixture.apply(flat, coef, bias).reshape(y.shape[:-1])


# --------------------------------------------------------------------------------------- priors


class _Prior(nn.Module):
    """What every prior has: `log_prob`, `sample`, `components`, and, for those that are learned by
    gradient steps, what follows a step."""

    def project_(self):
        """Moves parameters that have bounds back into them, in place; call it after each step."""

    def clipped(self):
        """Share of bounded parameters at or beyond a bound, 0 to 1; None without bounds."""
        return None

    def frozen(self):
        """The same density without gradients, for many calls: the work they share is done once."""
        return self


class StandardPrior(_Prior):
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

    def components(self):
        """mu, logvar (1, D): it is a mixture of one."""
        return self.mean[None], torch.zeros_like(self.mean)[None]


class _Mixture(_Prior):
    """What the mixture priors share; a subclass gives `components() -> mu, logvar`, both (K, D)."""

    def log_pi(self):
        """Normalised log weights (K,) of the components, or None when all are 1/K."""
        return None if self.weight_logits is None else torch.log_softmax(_wide(self.weight_logits), 0)

    def log_prob(self, z):
        """log p(z) in nats: (..., D) -> (...)."""
        return log_mixture(z, *self.components(), self.log_pi())

    def sample(self, n, generator=None):
        """n draws, (n, D): a component from the weights, then its Gaussian."""
        mu, logvar = self.components()
        weights = torch.ones_like(mu[:, 0]) if self.weight_logits is None else self.log_pi().exp()
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        return _normal(mu[k], logvar[k], generator)

    @torch.no_grad()
    def frozen(self):
        """The same density as a MixturePrior of constants: the encoder runs once, not per call."""
        mu, logvar = self.components()
        return MixturePrior(mu, logvar, self.weight_logits).requires_grad_(False)


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
        """mu, logvar (K, D)."""
        return self.mu, self.logvar


class VampPrior(_Mixture):
    """Mixture of the encoder's posteriors at K learned pseudo-inputs, sum_k pi_k q(z | u_k).

    encoder: any callable from n images (n, ...) to (mu, logvar), each (n, D). It may get them in
    blocks, so no image's result may depend on the others (as BatchNorm's do in training). It is
    shared with the VAE, so it is not registered here: the model's state_dict holds it once. Give an
    nn.Module, not a lambda, if the model will be copied: `copy.deepcopy` copies no function, so the
    copy would call this encoder. nn.DataParallel is not supported: its copies would call it too.
    pseudo_inputs (K, ...): first values of u, for instance training images.
    learned_weights: learn pi_k; otherwise 1/K.
    bounds: (low, high) of your data, to keep u inside: the encoder never sees a value beyond. None
    for data without bounds. Call `project_()` after each optimiser step, or u drifts beyond, unseen
    by the encoder.

    More than BLOCK pseudo-inputs are encoded in blocks, and again in the backward pass: memory is
    that of one block's layers, beside u with its gradient and the (K, D) of mu and logvar.
    `encode_all`, a function (encode, u) -> encode(u), may share u out among processes.
    """

    encode_all = None

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
        return self._bounded(self.u)

    def _bounded(self, u):
        return u if self.bounds is None else u + (u.clamp(*self.bounds) - u).detach()

    def components(self):
        """mu, logvar (K, D) of q(z | u_k)."""
        if self.encode_all:
            return self.encode_all(self._encode, self.u)
        return self._encode(self.u)

    def _encode(self, u):
        def encode(part):
            return self._encoder[0](self._bounded(part))
        if len(u) <= BLOCK:
            return encode(u)
        parts = [checkpoint(encode, part, use_reentrant=False) for part in u.split(BLOCK)]
        return tuple(map(torch.cat, zip(*parts)))

    @torch.no_grad()
    def project_(self):
        if self.bounds is not None:
            self.u.clamp_(*self.bounds)

    @torch.no_grad()
    def clipped(self):
        if self.bounds is None:
            return None
        low, high = self.bounds
        return ((self.u <= low) | (self.u >= high)).float().mean().item()


# --------------------------------------------------------------------------------------- layers


def _normal(mu, logvar=None, generator=None, size=()):
    """A draw from N(mu, exp(logvar)), or N(mu, 1): (*size, *mu.shape), reparameterised."""
    eps = torch.randn((*size, *mu.shape), generator=generator, device=mu.device, dtype=mu.dtype)
    return mu + eps if logvar is None else mu + torch.exp(0.5 * logvar) * eps


def _mean_or_draw(mu, logvar, generator):
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
        mu, logvar = _wide(self.linear(h)).chunk(2, dim=-1)     # latents keep float32's digits
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
    likelihood: str = "bernoulli"

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ValueError(f"{field.name} must be {field.type.__name__}, "
                                 f"got {type(value).__name__}")
            if field.type is int and not 1 <= value <= 10**7:
                raise ValueError(f"{field.name} must be from 1 to 10,000,000, got {value}")
        for value, choices in ((self.model, MODELS), (self.prior, PRIORS),
                               (self.likelihood, LIKELIHOODS)):
            if value not in choices:
                raise ValueError(f"{value!r} is not one of {', '.join(choices)}")


class _Model(nn.Module):
    """What both models share. A subclass defines all that VAE does, for its own layers."""

    def __init__(self, config, pseudo_inputs=None):
        super().__init__()
        self.config = config
        self.log_px, self.mean_image, outputs = LIKELIHOODS[config.likelihood]
        self._build(config)
        self.output = _linear(config.hidden, outputs * config.x_dim)    # p(x | z)
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

    @torch.no_grad()
    def sample(self, n, generator=None):
        """n images as pixel means, (n, x_dim), without gradients, by ancestral sampling from the prior."""
        return self.generate(self.prior.sample(n, generator), generator)

    def reconstruct(self, x, generator=None):
        """Pixel means (B, x_dim) decoded from the posteriors' means; with a generator, from draws."""
        return self.mean_image(self.decode(*(z for z, _, _ in self.latents(x, generator).values())))

    def set_output_bias(self, mean, spread=None):
        """Starts the decoder at the data's mean image and standard deviations, each (x_dim,),
        which saves the first epochs. A Bernoulli needs no `spread`."""
        with torch.no_grad():
            self.output.bias.copy_(constant_parameters(self.config.likelihood, mean, spread))


class VAE(_Model):
    """One stochastic layer: p(x | z) p(z), q(z | x)."""

    layers = ("z",)

    def _build(self, c):
        self.encoder = GaussianNet(c.x_dim, c.hidden, c.z_dim)
        self.decoder = nn.Sequential(GatedDense(c.z_dim, c.hidden), GatedDense(c.hidden, c.hidden))

    def infer(self, x):
        """What `terms` needs of x whatever the samples: ((mu, logvar) of q(z | x),)."""
        return (self.encode(x),)

    def terms(self, x, S=1, generator=None, inferred=None, prior=None, path_gradient=False):
        """Named parts of the log weight in nats, each (S, B): recon - kl is the log weight.

        recon = log p(x | z), kl = log q(z | x) - log p(z), at the same z ~ q(z | x).
        `inferred` (from `infer(x)`) and `prior` (from `prior.frozen()`) save repeated work.
        `path_gradient` leaves the score of q out of the gradient (Roeder et al., 2017): its mean is
        zero, its variance is not. The values are the same.
        """
        ((mu, logvar),) = self.infer(x) if inferred is None else inferred
        z = _normal(mu, logvar, generator, (S,))
        recon = self.log_px(x, self.decode(z))
        if path_gradient:
            mu, logvar = mu.detach(), logvar.detach()
        kl = log_normal(z, mu, logvar) - (prior or self.prior).log_prob(z)
        return {"recon": recon, "kl": kl}

    def decode(self, z):
        """The pixels' parameters (..., x_dim or 2 x_dim), see LIKELIHOODS, of z (..., z_dim)."""
        return self.output(self.decoder(z))

    def generate(self, z, generator=None):
        """Pixel means (n, x_dim) given latents z (n, z_dim)."""
        return self.mean_image(self.decode(z))

    def latents(self, x, generator=None):
        """{layer: (z, q, p)}: a draw (the mean without a generator), its q = (mu, logvar), each
        (B, z_dim), and p likewise where p is Gaussian: None for the top layer, whose p is the prior."""
        q = self.encode(x)
        return {"z": (_mean_or_draw(*q, generator), q, None)}


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
        recon = self.log_px(x, self.decode(z1, z2))
        if path_gradient:       # q(z1 | x, z2)'s score has mean zero at every z2: drop it there, too
            mu1, logvar1, mu2, logvar2 = (t.detach() for t in (mu1, logvar1, mu2, logvar2))
        kl1 = log_normal(z1, mu1, logvar1) - log_normal(z1, *self.p1(z2))
        kl2 = log_normal(z2, mu2, logvar2) - (prior or self.prior).log_prob(z2)
        return {"recon": recon, "kl": kl1 + kl2, "kl1": kl1, "kl2": kl2}

    def decode(self, z1, z2):
        """The pixels' parameters (..., x_dim or 2 x_dim), see LIKELIHOODS, of z1 and z2 (..., z_dim)."""
        return self.output(self.px_joint(self.px_z1(z1), self.px_z2(z2)))

    def generate(self, z2, generator=None):
        """Pixel means (n, x_dim) given z2 (n, z_dim); z1 is drawn from p(z1 | z2)."""
        mu1, logvar1 = self.p1(z2)
        return self.mean_image(self.decode(_normal(mu1, logvar1, generator), z2))

    def latents(self, x, generator=None):
        """As VAE.latents, of z1 and z2."""
        q2, features = self.infer(x)
        z2 = _mean_or_draw(*q2, generator)
        q1 = self._q1(features, z2)
        return {"z1": (_mean_or_draw(*q1, generator), q1, self.p1(z2)), "z2": (z2, q2, None)}


MODELS = {"vae": VAE, "hvae": HVAE}
# log p(x | parameters), the mean image of the parameters, and how many of them a pixel has
LIKELIHOODS = {"bernoulli": (log_bernoulli, torch.sigmoid, 1),
               "logistic": (logistic_pixels, mean_pixels, 2),
               "gaussian": (gaussian_pixels, mean_pixels, 2)}
PRIORS = {"standard": "standard prior", "mog": "mixture of Gaussians", "vamp": "VampPrior"}


def constant_parameters(likelihood, mean, spread=None):
    """A decoder's outputs (D,) or, for grey pixels, (2D,) near this mean image (D,) and scale
    `spread` (D,), both clamped. A logistic's standard deviation is 1.8 times its scale: near enough
    for a start."""
    logits = torch.logit(mean.clamp(0.01, 0.99))
    if likelihood == "bernoulli":
        return logits
    return torch.cat([logits, spread.clamp_min(1e-9).log().clamp(-4.0, -0.5)])


def build(config, pseudo_inputs=None):
    """A new model for a Config, or for the dict of one; pseudo_inputs (K, x_dim) are the VampPrior's
    first values. ValueError when the Config is not sound, TypeError when a field is unknown."""
    config = Config(**config) if isinstance(config, dict) else config
    return MODELS[config.model](config, pseudo_inputs)


PRECISIONS = ("float32", "bfloat16")     # of matrix products
DEVICES = ("auto", "cpu", "cuda")


def pick_device(name):
    """A torch.device for one of DEVICES; auto is cuda where there is one, else cpu. ValueError."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device 'cuda' is not on this machine or not usable by this torch; take cpu")
    return torch.device("cuda" if name == "cuda" or name == "auto" and there else "cpu")
