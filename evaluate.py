"""Evaluate a trained model once on the test set.

    python evaluate.py results/latest/vamp                  # S = 500 importance samples per image
    python evaluate.py results/latest/vamp --samples 5000   # the paper's protocol
    torchrun --standalone --nproc-per-node 2 evaluate.py RUN    # shared out, to the same numbers

Reads model.pt in the run folder; writes arrays.npz (all that plot.py draws) and then metrics.json.
Densities are in nats per image, sums are float64, standard errors are over the test images.
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before torch, whose import takes seconds

import hashlib
import io
import json
import math
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data as datasets
import parallel
from models import (DEVICES, PRECISIONS, PRIORS, StandardPrior, build, by_coefficients, log_mixture,
                    log_normal, mixture_coefficients, pick_device)
from records import ACTIVE

CHUNK = 1000        # samples in one pass of a thread: large enough for the matrix products
WIDE = 25_000       # samples in one pass of a GPU, over many images: 80 MB of logits
INFER = 100         # images encoded at once
NEIGHBOURS = 5      # of the k-NN classifier
CODED = 50_000      # training images whose codes the classifiers see, at most
CLASSES = 100       # of more labels than these there is no classifier: they may be names, or numbers


# ----------------------------------------------------------------------------------- likelihood


@torch.no_grad()
def importance_terms(model, x, S, generator=None, tick=lambda: None, precision="float32"):
    """Importance-sampling estimates per image, in nats: a dict of (N,) float64 tensors on the CPU.

    log_px = logsumexp_s log_w - log S, the bound on log p(x) of Burda et al. (2016, eq. 8);
    elbo, recon, kl (kl1, kl2) are means over the same S samples.
    Every image has its own noise, seeded by its place, and a thread of its own, which works on it in
    passes of CHUNK samples: memory is that of CHUNK x 784 logits a thread and of S numbers, and
    neither block sizes nor the number of threads enter the result, nor that of processes, which are
    dealt whole blocks of INFER images. A GPU takes such a block at once, with noise of its own, in
    passes of WIDE samples. `tick` is called after each image of this process. `precision` is that of
    the decoder's products; the densities' stay float32 at least.
    """
    x = _images(x)
    base = torch.randint(2**62, (), generator=generator).item()
    before = torch.get_num_threads()
    n = images_at_once(x.device)
    pool = ThreadPoolExecutor(before if n == 1 else 1)
    torch.set_num_threads(1)    # images share out better than the small products of one
    try:
        prior, result = model.prior.frozen(), {}
        for first in range(parallel.rank() * INFER, len(x), parallel.size() * INFER):
            block = datasets.pixels(x[first:first + INFER])
            inferred = model.infer(block)
            jobs = [(*_rows((block, inferred), slice(i, i + n)), base + first + i)
                    for i in range(0, len(block), n)]
            found = []
            for values in pool.map(lambda job: _image_terms(model, prior, S, precision, *job), jobs):
                found.append(values)
                for _ in values["elbo"]:
                    tick()
            result[first] = {name: torch.cat([values[name] for values in found]) for name in found[0]}
    finally:
        torch.set_num_threads(before)
        pool.shutdown(cancel_futures=True)      # a signal does not wait for the block
    blocks = {first: part for parts in parallel.gather(result) for first, part in parts.items()}
    return {name: torch.cat([blocks[first][name] for first in sorted(blocks)]) for name in blocks[0]}


def _images(x):
    """x as float32 in [0, 1], or uint8 meaning grey / 255. ValueError if it is neither, or empty."""
    x = x if x.dtype == torch.uint8 else x.float()
    low, high = (x.min().item(), x.max().item()) if x.numel() else (1, 0)
    if low > high:
        raise ValueError("there are no images")
    if x.dtype == torch.uint8 and high == 1:
        raise ValueError("uint8 means grey / 255, and these images have 0 and 1 alone: give x.float()")
    if x.dtype != torch.uint8 and not 0 <= low <= high <= 1:
        raise ValueError(f"images with values from {low:g} to {high:g}: give floats in [0, 1], or uint8")
    return x


def images_at_once(device):
    """How many images a pass of importance_terms takes on this device."""
    return 1 if device.type == "cpu" else INFER


@torch.no_grad()    # a thread has its own switch of gradients, and of autocast
def _image_terms(model, prior, S, precision, x, inferred, seed):
    """What importance_terms says of images x (n, D): a dict of (n,) float64."""
    (mu, _), *_ = inferred
    noise = torch.Generator(x.device).manual_seed(seed)
    alone, size = len(x) == 1, CHUNK if len(x) == 1 else max(1, WIDE // len(x))
    near = Around(prior, mu[0]) if alone and not isinstance(prior, StandardPrior) else prior
    with torch.autocast(x.device.type, torch.bfloat16, precision == "bfloat16"):
        passes = [model.terms(x, min(size, S - done), noise, inferred, near)
                  for done in range(0, S, size)]
    terms = {name: torch.cat([part[name] for part in passes]).cpu().double().T.contiguous()
             for name in passes[0]}
    log_w = terms["recon"] - terms["kl"]
    return {name: value.mean(1) for name, value in terms.items()} | {
        "elbo": log_w.mean(1), "log_px": log_w.logsumexp(1) - math.log(S)}


class Around:
    """A frozen mixture prior's density for z near `center` (D,), say the samples of one posterior.

    Seen from there the expanded squares of the components that count are small, so products in z's
    own precision do: with float32, half the work of `log_mixture`. The constants are prepared in
    float64. Unlike log_mixture's products they follow the caller's TF32 and "medium" precision.
    """

    def __init__(self, prior, center):
        parts = mixture_coefficients(*prior.components(), prior.log_pi(), center=center)
        self.center, (self.coef, self.bias) = center, (part.to(center.dtype) for part in parts)

    def log_prob(self, z):
        """log p(z) in nats: (..., D) -> (...)."""
        with torch.autocast(z.device.type, enabled=False):
            return by_coefficients(z - self.center, self.coef, self.bias)


def _rows(nested, rows):
    return tuple(_rows(t, rows) for t in nested) if isinstance(nested, tuple) else nested[rows]


def log_likelihood(model, x, S, generator=None):
    """log p(x) in nats by importance sampling with S samples: x (N, D) -> (N,) float64.

    A lower bound in expectation, tighter with S (Burda et al., 2016). x: float in [0, 1], or uint8
    meaning grey / 255. `generator` is a CPU torch.Generator; the same seed gives the same numbers.
    """
    return importance_terms(model, x, S, generator)["log_px"]


# ------------------------------------------------------------------------ latents and pictures


@torch.no_grad()
def latent_statistics(model, x, generator, draws=5):
    """What the latents hold, over the images x (N, D): (metrics, arrays) as dicts.

    active_units: units whose posterior mean has a variance over the data above 0.01, per layer; z1's
        is taken at the mean of z2.
    components_used: perplexity of the mean responsibility of the prior's components.
    kl_per_dim: of the top layer against the prior's one-dimensional marginals, of z1 against
        p(z1 | z2).
    """
    top = model.layers[-1]
    parts = [datasets.pixels(part) for part in x.split(1000)]
    means = _gather([model.latents(part) for part in parts])
    metrics = {"active_units": {}, "latent_dims": {}}
    arrays = {"latent_means": means[top][1][0]}
    prior = model.prior.frozen()
    kl_per_dim, z_all = {name: 0 for name in model.layers}, []
    for _ in range(draws):
        drawn = _gather([model.latents(part, generator) for part in parts])
        for name, (z, q, p) in drawn.items():
            log_q = log_normal(z[..., None], q[0][..., None], q[1][..., None])
            kl_per_dim[name] += (log_q - _log_marginals(z, p, prior)).mean(0) / draws
        z_all.append(drawn[top][0])
    for name in model.layers:
        variance = means[name][1][0].double().var(0)
        metrics["active_units"][name] = int((variance > ACTIVE).sum())
        metrics["latent_dims"][name] = len(variance)
        arrays |= {f"variance_{name}": variance, f"kl_per_dim_{name}": kl_per_dim[name]}
    if model.config.prior != "standard":
        mu, logvar = prior.components()
        log_pi = prior.log_pi()
        if log_pi is None:
            log_pi = torch.full_like(mu[:, 0], -math.log(len(mu)))
        with torch.enable_grad():       # d log p(z) / d log pi_k is the responsibility of k
            log_pi = log_pi.detach().requires_grad_()
            total = log_mixture(torch.cat(z_all), mu, logvar, log_pi).sum()
            use = torch.autograd.grad(total, log_pi)[0].double() / sum(map(len, z_all))
        metrics["components"] = len(mu)
        metrics["components_used"] = torch.exp(torch.special.entr(use).sum()).item()
        arrays |= {"component_mu": mu, "component_logvar": logvar, "component_use": use}
    return metrics, arrays


def _gather(parts):
    """{layer: (z, q, p)} of all parts of the data, concatenated."""
    def join(values):
        if values[0] is None or isinstance(values[0], torch.Tensor):
            return None if values[0] is None else torch.cat(values)
        return tuple(join(group) for group in zip(*values))
    return {name: join([part[name] for part in parts]) for name in parts[0]}


def _log_marginals(z, p, prior):
    """log p(z_d) of each dimension (N, D): of the layer's Gaussian p, or of the prior."""
    mu, logvar = p or prior.components()
    z = z[..., None]
    if p or len(mu) == 1:       # a Gaussian
        return log_normal(z, mu[..., None], logvar[..., None])
    return torch.stack([log_mixture(z[:, d], mu[:, d:d + 1], logvar[:, d:d + 1], prior.log_pi())
                        for d in range(z.shape[1])], dim=1)


@torch.no_grad()
def pictures(model, data, generator, n=48):
    """Arrays for the figures: images with reconstructions, samples beside the nearest training
    images, walks between test images, and what one z2 alone leaves open."""
    images = datasets.pixels(data.test[:n])
    arrays = {"images": images, "reconstructions": model.reconstruct(images),
              "samples": model.sample(64, generator), "walks": walks(model, images)}
    arrays["neighbours"], arrays["sample_distance"] = nearest(arrays["samples"][:16], data.train)
    _, arrays["reconstruction_distance"] = nearest(arrays["reconstructions"], data.train)
    if model.layers == ("z1", "z2"):
        z2 = model.prior.sample(6, generator).repeat_interleave(12, 0)
        arrays["shared_z2"] = model.generate(z2, generator).view(6, 12, -1)
    return arrays


def walks(model, images, pairs=3, steps=12):
    """(pairs, steps, D) images along straight lines between the latent means of neighbouring pairs
    of images (N, D), in all layers at once."""
    way = torch.linspace(0, 1, steps, device=images.device)[:, None]
    found = []
    for i in range(0, min(2 * pairs, len(images) - 1), 2):
        means = [z for z, _, _ in model.latents(images[i:i + 2]).values()]
        found.append(model.mean_image(model.decode(*(torch.lerp(*z.split(1), way) for z in means))))
    return torch.stack(found) if found else images.new_zeros(0, steps, images.shape[1])


def nearest(x, train):
    """The training image nearest to each of x (N, D) by its grey values, and the distance (N,)."""
    best, where = torch.full_like(x[:, 0], math.inf), torch.zeros(len(x), dtype=torch.long)
    for first in range(0, len(train), 10_000):
        distance, index = torch.cdist(x, datasets.pixels(train[first:first + 10_000])).min(1)
        where = torch.where(distance < best, first + index, where.to(index.device))
        best = torch.minimum(best, distance)
    return datasets.pixels(train[where]), best


@torch.no_grad()
def plane(model, means, points=160, images=18):
    """Of a model with two top latents: its prior's log density over the square that holds nearly
    all posterior means (N, 2), and the images that the square's points generate. Row 0 is at the
    bottom."""
    low, high = (torch.quantile(means, q, 0) for q in (0.005, 0.995))
    center, half = (low + high) / 2, 0.58 * (high - low).max().clamp(min=1e-3)

    def grid(n, inset=0.0):
        axis = torch.linspace(-1 + inset, 1 - inset, n, device=means.device) * half
        return torch.cartesian_prod(axis, axis).flip(1) + center
    at = grid(images, 1 / images)       # the middles of its cells
    generator = torch.Generator(means.device).manual_seed(0)
    return {"plane_box": torch.cat([center - half, center + half]),
            "plane_log_prior": model.prior.frozen().log_prob(grid(points)).view(points, points),
            "plane_images": model.generate(at, generator).view(images, images, -1),
            "plane_image_log_prior": model.prior.frozen().log_prob(at).view(images, images)}


def classify(model, data, generator):
    """Accuracies on the test images of two classifiers that see the latent means of all layers:
    multinomial logistic regression ("linear probe"), and the majority of the NEIGHBOURS nearest
    training codes. Training images are binarised as in training. Empty without classes.
    """
    some = torch.arange(min(CODED, len(data.train)), device=data.train.device)
    if data.test_labels is None or len(data.train_labels[some].unique()) > CLASSES:
        return {}
    train = _codes(model, (data.batch(part, generator) for part in some.split(1000)))
    test = _codes(model, (datasets.pixels(part) for part in data.test.split(1000)))
    classes, labels = data.train_labels[some].unique(return_inverse=True)
    near = torch.cat([torch.cdist(part, train).topk(min(NEIGHBOURS, len(train)), largest=False)[1]
                      for part in test.split(500)])
    guesses = {"knn": labels[near].mode(1)[0], "probe": _probe(train, labels, len(classes))(test)}
    return {"knn_k": near.shape[1]} | {
        f"{name}_accuracy": (classes[guess] == data.test_labels).double().mean().item()
        for name, guess in guesses.items()}


@torch.no_grad()
def _codes(model, batches):
    return torch.cat([torch.cat([z for z, _, _ in model.latents(x).values()], 1) for x in batches])


def _probe(codes, labels, classes):
    """The function codes (N, D) -> labels (N,) of a logistic regression fitted to these."""
    center, scale = codes.mean(0), codes.std(0).clamp(min=1e-6)
    z, layer = (codes - center) / scale, torch.nn.Linear(codes.shape[1], classes).to(codes.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(layer(z), labels)
        value = value + 1e-4 * layer.weight.square().sum()      # or separable classes never end
        value.backward()
        return value
    optimizer.step(loss)
    return lambda new: layer((new - center) / scale).argmax(1)


@torch.no_grad()
def pseudo_pictures(model, use, generator, n=40):
    """The n most used pseudo-inputs, an image that each generates, and their use."""
    top = use.argsort(descending=True)[:n]
    mu, logvar = (part[top] for part in model.prior.components())
    z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator, device=mu.device)
    return {"pseudo_inputs": model.prior.pseudo_inputs()[top],
            "pseudo_samples": model.generate(z, generator), "pseudo_use": use[top]}


def film(model, path):
    """Arrays of the pseudo-inputs that training kept at some epochs, if any. ValueError."""
    try:
        if not (kept := model.extra.get("film")):
            return {}
        frames = torch.stack([*kept.values()]).cpu().numpy().astype("float32") / 255
        return {"film": frames, "film_epochs": np.array([*kept], int)}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path}: its film of pseudo-inputs is damaged; train it anew") from None


def mean_se(values):
    """{"mean", "se"} of per-image values (N,); se is the standard error over the images."""
    values = values.double()
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": values.mean().item(), "se": se}


def label(config):
    """The model's name in tables and figures."""
    return f"{config.model.upper()} + {PRIORS[config.prior]}"


# ---------------------------------------------------------------------------------- the record


def evaluate(model, data, S, seed=0, tick=lambda: None, precision="float32"):
    """(metrics, arrays) of a model on data.test, as metrics.json and arrays.npz hold them. Of
    several processes all compute the likelihood, the first the rest; the others return None."""
    x, began = data.test, time.perf_counter()
    terms = importance_terms(model, x, S, torch.Generator().manual_seed(seed), tick, precision)
    if parallel.rank() > 0:
        return None
    seconds = {"likelihood": time.perf_counter() - began}
    generator = torch.Generator(x.device).manual_seed(seed)
    statistics, arrays = latent_statistics(model, x, generator)
    arrays |= pictures(model, data, generator)
    if model.config.prior == "vamp":
        arrays |= pseudo_pictures(model, arrays["component_use"], generator)
    if arrays["latent_means"].shape[1] == 2:
        arrays |= plane(model, arrays["latent_means"])
    statistics |= classify(model, data, generator)
    seconds["all"] = time.perf_counter() - began
    metrics = {"model": model.config.model, "prior": model.config.prior, "label": label(model.config),
               "dataset": data.name, "note": datasets.note_of(data, model.config.likelihood),
               "binarize": data.binarize, "samples": S, "precision": precision,
               "seed": seed, "images": len(x), "nll": mean_se(-terms["log_px"])}
    metrics |= {name: mean_se(value) for name, value in terms.items() if name != "log_px"}
    if model.config.likelihood == "logistic":
        unit = x.shape[1] * math.log(2)     # bits per dimension: a probability of levels has them
        metrics["bits_per_dim"] = mean_se(-terms["log_px"] / unit)
    metrics |= statistics
    metrics |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds,
                "device": x.device.type, "threads": torch.get_num_threads(),
                "processes": parallel.size(),
                "date": time.strftime("%Y-%m-%d"),
                "versions": {"python": platform.python_version(), "torch": torch.__version__,
                             "numpy": np.__version__}}
    arrays = {name: value.detach().cpu().numpy() for name, value in (arrays | terms).items()}
    arrays = {name: value.astype("float32") for name, value in arrays.items()}
    arrays["image_shape"] = np.array(data.image_shape)
    if data.test_labels is not None:
        arrays["labels"] = data.test_labels.cpu().numpy()
    return metrics, arrays


def load_run(path, device="cpu", data_dir=None, dataset=None):
    """(model, data, path of model.pt) of a run folder or of a model.pt. ValueError in one line.

    `data_dir` and `dataset` say where its data lie now, if not where training found them.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder that train.py has finished")
    model = files.load_model(path, build, device)
    try:
        args, images = model.extra["run"]["args"], model.extra["run"]["data"]["sha256"]
        where = dataset or args["dataset"], data_dir or args["data_dir"]
        drawn = args["binarize"], args["split_seed"]
        if [type(value) for value in (*where, *drawn)] != [str, str, str, int]:
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not say which data it was trained on; train it anew") from None
    data = datasets.load(*where, *drawn, True, device)
    if data.sha256 != images:
        raise ValueError(f"{path} was trained on other images than {where[0]} holds; give the file "
                         "that it was trained on by --dataset")
    return model, data, path


@files.command
def main(argv=None):
    torch.set_flush_denormal(True)
    p, count = files.Parser(__doc__.split("\n")[0]), files.number(int, 1, 10**9)
    p.add_argument("run", help="run folder that holds model.pt")
    p.add_argument("--samples", type=count, default=500, metavar="S",
                   help="importance samples per image; the paper's tables have 5000")
    p.add_argument("--images", type=count, help="only the first of the test images")
    p.add_argument("--seed", type=files.number(int, 0, 2**31), default=0, help="seed of the samples")
    p.add_argument("--data-dir", help="where the data lie, if not where training found them")
    p.add_argument("--dataset", help="where your own array lies, if it has moved since training")
    p.add_argument("--precision", choices=PRECISIONS, default="float32",
                   help="of the decoder's products in the likelihood; bfloat16 is faster, and noted "
                        "in every table: it moves the likelihood a little")
    p.add_argument("--device", choices=DEVICES, default="auto", help="auto takes cuda, then cpu")
    args = p.parse_args(argv)
    parallel.start(args.device)
    model, data, path = parallel.in_turn(lambda: load_run(
        args.run, pick_device(args.device), args.data_dir, args.dataset))
    if args.images:
        labels = data.test_labels
        data = replace(data, test=data.test[:args.images],
                       test_labels=None if labels is None else labels[:args.images])
    line = files.Line(path.parent.name)
    own = len(range(0, len(data.test), INFER)[::parallel.size()]) * INFER     # of the first process
    with line.bar(min(own, len(data.test)), f"likelihood, S = {args.samples:,}",
                  disable=parallel.rank() > 0) as bar:
        found = evaluate(model, data, args.samples, args.seed, bar.update, args.precision)
    if not found:
        return
    metrics, arrays = found
    metrics |= {name: model.extra[name] for name in ("epochs", "best_epoch", "train_seconds")
                if name in model.extra}
    metrics["trained_in"] = model.extra["run"]["args"].get("precision", "float32")
    arrays |= film(model, path)
    metrics["model_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_atomic(path.parent / "arrays.npz", buffer.getvalue())
    files.write_atomic(path.parent / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    line.say(f"evaluated on {data.name}: ELBO {metrics['elbo']['mean']:.2f}, NLL "
             f"{metrics['nll']['mean']:.2f} (S = {args.samples:,}, {metrics['images']:,} images)"
             + (f", {metrics['bits_per_dim']['mean']:.3f} bits per dimension"
                if "bits_per_dim" in metrics else ""))


if __name__ == "__main__":
    parallel.script(main)
