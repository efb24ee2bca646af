"""Time each piece beside its plain form, the tests' reference: `python bench.py --out FILE.json`.

Both forms take turns on random images. A row has the medians in seconds, the ratio plain / ours
with its range over n pairs, and the error in nats. bound_share is the time of our matrix products
at the rate of a large one in float32, or in bfloat16 where the case says so, over our time.
"""
import itertools
import json
import math
import os
import platform
from statistics import median
from timeit import timeit

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import evaluate
import files
import train
from models import LOG_2PI, Config, GatedDense, GaussianHead, build, log_mixture

CELLS = list(itertools.product(("vae", "hvae"), ("standard", "vamp")))
SMALL = {"hidden": 8, "z_dim": 4, "components": 12}     # with --quick


def plain_normal(x, mu, logvar):
    """log N(x; mu, exp(logvar)) in nats, summed over the last axis: (..., D) -> (...)."""
    return (-0.5 * (LOG_2PI + logvar + (x - mu) ** 2 / torch.exp(logvar))).sum(-1)


def plain_mixture(z, mu, logvar, logits=None):
    """log sum_k pi_k N(z; mu_k, exp(logvar_k)) by way of (..., K, D): z (..., D) -> (...)."""
    log_pi = -math.log(len(mu)) if logits is None else logits.log_softmax(0)
    return torch.logsumexp(log_pi + plain_normal(z[..., None, :], mu, logvar), -1)


def plain(layer, x):
    """Our layer or network applied to x, with two products where ours stacks two matrices."""
    if isinstance(layer, (GatedDense, GaussianHead)):
        (W, V), (b, c) = (p.chunk(2) for p in layer.linear.parameters())
        first, second = F.linear(x, W, b), F.linear(x, V, c)
        gated = isinstance(layer, GatedDense)
        return first * torch.sigmoid(second) if gated else (first, F.hardtanh(second, -6.0, 2.0))
    for part in layer.children():
        x = plain(part, x)
    return x


def plain_decode(model, *latents):
    """The decoder's outputs for z, or for z1 and z2."""
    if model.config.model == "vae":
        return model.output(plain(model.decoder, *latents))
    h = torch.cat([plain(model.px_z1, latents[0]), plain(model.px_z2, latents[1])], -1)
    return model.output(plain(model.px_joint, h))


def plain_log_prior(model, z):
    """log p(z) of the top layer in nats: (..., D) -> (...)."""
    prior = model.prior
    if model.config.prior == "standard":
        return plain_normal(z, torch.zeros_like(z), torch.zeros_like(z))
    if model.config.prior == "mog":
        components = prior.mu, prior.logvar
    else:       # kinder than the authors' code, in which u is a product with the identity
        components = plain(model.encoder, prior.u.clamp(0, 1))
    return plain_mixture(z, *components, prior.weight_logits)


def plain_draw(mu, logvar, generator=None):
    noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype)
    return mu + torch.exp(0.5 * logvar) * noise


def plain_terms(model, x, S=1, generator=None):
    """model.terms(x, S, generator) for black-and-white x (B, X), with the same noise."""
    x = x.repeat(S, 1, 1)                                   # (S, B, X)
    q = plain(model.encoder, x)                             # (S, B, D) each
    z = plain_draw(*q, generator)                           # (S, B, D)
    kl = plain_normal(z, *q) - plain_log_prior(model, z)    # (S, B)
    latents, parts = (z,), {"kl": kl}
    if model.config.model == "hvae":
        h = torch.cat([plain(model.q1_x, x), plain(model.q1_z2, z)], -1)
        q1 = plain(model.q1_head, plain(model.q1_joint, h))     # (S, B, D) each
        z1 = plain_draw(*q1, generator)
        kl1 = plain_normal(z1, *q1) - plain_normal(z1, *plain(model.p1, z))
        latents, parts = (z1, z), {"kl": kl1 + kl, "kl1": kl1, "kl2": kl}
    logits = plain_decode(model, *latents)
    recon = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    return {"recon": recon, **parts}                        # (S, B) each


@torch.no_grad()
def plain_log_likelihood(model, x, S):
    """log p(x) in nats of one image (1, X): (1,). Each 100 of the S samples encode it anew."""
    parts = [plain_terms(model, x, 100) for _ in range(0, S, 100)]
    log_w = torch.cat([terms["recon"] - terms["kl"] for terms in parts])    # (S, 1)
    return log_w.logsumexp(0) - math.log(S)


# -------------------------------------------------------------------------------------- sections
# Each takes `quick`, for tiny sizes, and {precision: rate of a large product}. It yields rows.


def compare(section, case, theirs, ours, rate, counted=None, error=None):
    """A row of the record: two functions that take turns. `counted` has the products of ours, if
    given."""
    theirs(), ours()        # the first call of either is slow, and slower if it compiles
    with FlopCounterMode(display=False) as counter:
        (counted or ours)()
    pairs = [(timeit(theirs, number=1), timeit(ours, number=1)) for _ in range(9)]
    plain, own = (median(times) for times in zip(*pairs))
    ratios = [a / b for a, b in pairs]
    return {"section": section, "case": case, "plain": plain, "ours": own, "ratio": plain / own,
            "ratio_low": min(ratios), "ratio_high": max(ratios), "n": len(pairs),
            "bound_share": counter.get_total_flops() / rate / own, "error": error}


def mixture(quick, rates):
    """The log density with its gradients. Our products are float64."""
    for B, K in ((20, 300),) if quick else ((100, 500), (1000, 500), (100, 5000)):
        inputs = torch.randn(B, 40), torch.randn(K, 40), 4 * torch.rand(K, 40) - 4
        error = log_mixture(*inputs) - plain_mixture(*(t.double() for t in inputs))
        leaves = [t.requires_grad_() for t in inputs]
        yield compare("mixture", f"B = {B}, K = {K:,}",
                      lambda: torch.autograd.grad(plain_mixture(*leaves).sum(), leaves),
                      lambda: torch.autograd.grad(log_mixture(*leaves).sum(), leaves),
                      rates["float32"], error=error.abs().max().item())


def step(quick, rates):
    """An epoch of one step, compiled if possible. Plain: float32, torch's Adam, no clipping, no
    averaged weights."""
    compiles = not quick and train.can_compile("cpu")
    for (model, prior), (precision, rate) in itertools.product(CELLS, rates.items()):
        args = train.parse_args(["--out", "none", "--device", "cpu", "--precision", precision])
        vars(args).update(train.RECIPES["default"])
        x = torch.randint(0, 256, (10 if quick else args.batch_size, 784), dtype=torch.uint8)
        data = datasets.Data("noise", (28, 28), x, x, x, {}, "dynamic", "")
        config = Config(model, prior, **(SMALL if quick else {}))
        run, other = train.start(args, config, data), train.start(args, config, data)
        form = other.model
        if compiles:
            run.model.compile(**train.COMPILED)
        adam = torch.optim.Adam(form.parameters(), lr=1e-4)

        def plain_step():
            terms = plain_terms(form, torch.bernoulli(x / 255))
            adam.zero_grad()
            (terms["kl"] - terms["recon"]).mean().backward()
            adam.step()
        yield compare("step", f"{model}, {prior}, batch {len(x)}, {precision}", plain_step,
                      lambda: train.train_epoch(run, run.model, args, data), rate,
                      lambda: train.train_epoch(other, form, args, data))


def likelihood(quick, rates):
    """log p(x) by importance sampling, of two images a thread. The error is mostly chance."""
    S, x = 200 if quick else 5000, torch.rand(2 * torch.get_num_threads(), 784).round()
    for model, prior in CELLS:
        net = build(Config(model, prior, **(SMALL if quick else {}))).requires_grad_(False)
        torch._foreach_mul_(list(net.parameters()), 0.5)        # or no estimate would settle
        error = plain_log_likelihood(net, x[:1], S) - evaluate.log_likelihood(net, x[:1], S)
        yield compare("likelihood", f"{model}, {prior}, {len(x)} images, S = {S:,}",
                      lambda: [plain_log_likelihood(net, image, S) for image in x.split(1)],
                      lambda: evaluate.log_likelihood(net, x, S), rates["float32"],
                      lambda: net.terms(x, S), error.abs().item())      # counted in this thread


@files.friendly
def main(argv=None):
    torch.set_flush_denormal(True)      # as train.py and evaluate.py do, for both forms
    p = files.parser(__doc__)
    p.add_argument("--out", metavar="FILE.json", help="where the record goes, besides the terminal")
    p.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    rates, rows, size = {}, [], 256 if args.quick else 2048
    for kind in ("float32", "bfloat16") if train.has_bfloat16("cpu") else ("float32",):
        a = torch.randn(size, size).to(getattr(torch, kind))
        rates[kind] = 2 * size**3 / min(timeit(lambda: a @ a, number=1) for _ in range(6))
    for section in mixture, step, likelihood:
        for found in section(args.quick, rates):
            numbers = [f"{k} {v:.3g}" for k, v in found.items() if isinstance(v, (int, float))]
            files.say(f"{found['section']}: {found['case']}: {', '.join(numbers)}")
            rows.append(found)
    record = {"machine": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "flop_per_second": rates, "rows": rows}
    if args.out:
        files.write_atomic(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
