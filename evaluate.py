"""Evaluate a trained model on the test images.

    python evaluate.py results/latest/vamp                      S = 500 importance samples an image
    python evaluate.py results/latest/vamp --samples 5000       the paper's protocol
    torchrun --standalone --nproc-per-node 2 evaluate.py RUN    two processes, the same numbers
    python evaluate.py results/latest/vae --fit-prior DIR       a run with another prior, in DIR

Writes arrays.npz (the arrays that plot.py draws) and metrics.json. Numbers are in nats per image.
"""
import dataclasses
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map

import data as datasets
import files
import parallel
from models import MODELS, PRIORS, MixturePrior, build, draw_normal, log_mixture

CHUNK = 1000        # samples in one pass of a thread
WIDE = 25_000       # samples times images in one pass of a GPU
BLOCK = 100         # images encoded at once, and the unit that is dealt out to processes
AT_ONCE = {"cpu": 1, "cuda": BLOCK}     # images that a thread works on
CODED = 50_000      # training images whose codes the classifiers see, at most
ACTIVE = 0.01       # a unit with a larger variance of its posterior mean is active (Burda et al.)
CLASSES = 100       # with more classes there is no classifier
FITTED = 1, 10, 50, 100, 200, 500       # numbers of components to choose from


# ----------------------------------------------------------------------------------- likelihood


@torch.no_grad()
def importance_terms(model, x, S, generator=None, tick=lambda n: None):
    """Importance-sampling estimates in nats, one per image: {name: (N,) float64 on the CPU}.

    log_px = logsumexp_s log_w - log S, in expectation below log p(x) (Burda et al., 2016, eq. 8);
    elbo, recon and kl (kl1, kl2) are means over the same S samples. The noise of an image depends
    on `generator`, S, its index and, on a GPU, its block's size: never on threads or processes.
    `tick(n)` is called after each n images of this process.
    """
    x = checked(x, model.config.likelihood)
    base = torch.randint(2**62, (), generator=generator).item()
    threads, at_once = torch.get_num_threads(), AT_ONCE[x.device.type]
    torch.set_num_threads(1)        # small products: a thread per image beats sharing each
    try:
        prior, result = model.prior.frozen(), {}
        with ThreadPoolExecutor(threads if at_once == 1 else 1) as pool:
            for first in range(parallel.rank() * BLOCK, len(x), parallel.size() * BLOCK):
                block = datasets.pixels(x[first:first + BLOCK])         # (n, D)
                inferred = model.infer(block)                           # nested tuples of (n, ...)
                jobs = []
                for i in range(0, len(block), at_once):
                    part = tree_map(lambda t: t[i:i + at_once], (block, inferred))
                    jobs.append((*part, base + first + i))
                found = []
                for values in pool.map(lambda job: image_terms(model, prior, S, *job), jobs):
                    found.append(values)
                    tick(len(values["elbo"]))
                result[first] = {name: torch.cat([part[name] for part in found])
                                 for name in found[0]}                  # (n,) each
    finally:
        torch.set_num_threads(threads)
    blocks = {}
    for part in parallel.gather(result):
        blocks |= part
    return {name: torch.cat([blocks[first][name] for first in sorted(blocks)])
            for name in blocks[0]}                                      # (N,) each


def checked(x, likelihood):
    """Images as float32 in [0, 1], or as uint8 that means grey / 255. ValueError for others."""
    if not x.numel():
        raise ValueError("there are no images")
    white = 255 if x.dtype == torch.uint8 else 1
    x = x if white == 255 else x.float()
    low, high = x.min().item(), x.max().item()
    if white == 255 and high == 1:
        raise ValueError("uint8 means grey / 255, but these images hold 0 and 1: pass x.float()")
    if not 0 <= low <= high <= white:
        raise ValueError(f"images from {low:g} to {high:g}: pass floats in [0, 1], or uint8")
    if likelihood == "bernoulli" and not ((x == 0) | (x == white)).all():
        raise ValueError("grey pixels have no probability under a Bernoulli: pass images that "
                         "data.binarise has drawn, or train with --likelihood logistic or gaussian")
    return x


@torch.no_grad()        # needed again: a new thread starts with gradients on
def image_terms(model, prior, S, x, inferred, seed):
    """importance_terms of images x (n, D), with n = 1 on a CPU, and the noise of `seed`."""
    noise = torch.Generator(x.device).manual_seed(seed)
    size = CHUNK if len(x) == 1 else WIDE // len(x)
    if len(x) == 1:
        prior = prior.centered(inferred[0][0][0])       # at the mean of q(z | x), (z_dim,)
    passes = [model.terms(x, min(size, S - done), noise, inferred, prior)
              for done in range(0, S, size)]                            # (size, n) each
    terms = {name: torch.cat([part[name] for part in passes]).cpu().double().T.contiguous()
             for name in passes[0]}                                     # (n, S) each
    log_w = terms["recon"] - terms["kl"]                                # (n, S)
    return {name: value.mean(1) for name, value in terms.items()} | {
        "elbo": log_w.mean(1), "log_px": log_w.logsumexp(1) - math.log(S)}


def log_likelihood(model, x, S, generator=None):
    """log p(x) in nats by S importance samples, in expectation below it: x (N, D) -> (N,) float64.
    ValueError if x does not suit the model's likelihood. `generator` must be on the CPU."""
    return importance_terms(model, x, S, generator)["log_px"]


# ------------------------------------------------------------------------ latents and pictures


@torch.no_grad()
def latent_statistics(model, x, generator, draws=5):
    """What the latents hold over the images x (N, D): (metrics, arrays).

    active_units: units whose posterior mean has a variance above ACTIVE; for z1, at the mean of z2.
    components_used: perplexity of the mean responsibility of the prior's components.
    """
    parts = [datasets.pixels(part) for part in x.split(1000)]
    means = [model.latents(part) for part in parts]
    metrics, arrays = {"active_above": ACTIVE, "active_units": {}, "latent_dims": {}}, {}
    for layer in model.layers:
        mu = torch.cat([latents[layer][0] for latents in means])     # (N, D)
        variance = mu.double().var(0, correction=min(1, len(mu) - 1))   # (D,), 0 for one image
        metrics["active_units"][layer] = int((variance > ACTIVE).sum())
        metrics["latent_dims"][layer] = len(variance)
        arrays[f"variance_{layer}"] = variance
    arrays["latent_means"] = mu         # of the top layer, which is the last
    if model.config.prior != "standard":
        mu, logvar = model.prior.components()                           # (K, D) each
        log_pi = model.prior.log_pi()
        if log_pi is None:
            log_pi = torch.full_like(mu[:, 0], -math.log(len(mu)))
        z = torch.cat([model.latents(part, generator)[model.layers[-1]][0]
                       for _ in range(draws) for part in parts])        # (draws * N, D)
        with torch.enable_grad():       # d log p(z) / d log pi_k is the responsibility of k
            log_pi = log_pi.detach().requires_grad_()
            total = log_mixture(z, mu, logvar, log_pi).sum()
            use = torch.autograd.grad(total, log_pi)[0].double() / len(z)
        metrics["components"] = len(mu)
        metrics["components_used"] = torch.special.entr(use).sum().exp().item()
        arrays |= {"component_mu": mu, "component_use": use}
    return metrics, arrays


def some(n, count):
    """At most `count` of n indices, the same each time; random, as files may be sorted by class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count].sort().values


@torch.no_grad()
def pictures(model, data, generator, n=48):
    """Images for the figures, and the training images that are nearest to the first samples."""
    from sklearn.metrics import pairwise_distances_argmin_min as nearest    # takes seconds
    images = datasets.pixels(data.test[some(len(data.test), n)])
    arrays = {"images": images, "reconstructions": model.reconstruct(images),
              "samples": model.sample(64, generator)}
    train = datasets.pixels(data.train).cpu().numpy()
    index, arrays["sample_distance"] = nearest(arrays["samples"][:16].cpu().numpy(), train)
    arrays["neighbours"] = train[index]
    _, arrays["reconstruction_distance"] = nearest(arrays["reconstructions"].cpu().numpy(), train)
    return arrays


@torch.no_grad()
def pseudo_pictures(model, use, generator, n=40):
    """The n most used pseudo-inputs, and an image that each generates."""
    top = use.argsort(descending=True)[:n]
    mu, logvar = (part[top] for part in model.prior.components())
    return {"pseudo_inputs": model.prior.u[top],
            "pseudo_samples": model.generate(draw_normal(mu, logvar, generator), generator)}


@torch.no_grad()
def plane(model, means, fine=160, coarse=18):
    """The prior's log density over the square that holds nearly all posterior means (N, 2), and
    the images that the square's points generate. Row 0 is at the bottom."""
    low, high = (torch.quantile(means, q, 0) for q in (0.005, 0.995))
    center, half = (low + high) / 2, 0.58 * (high - low).max().clamp(min=1e-3)

    def grid(n, inset=0.0):
        axis = torch.linspace(-1 + inset, 1 - inset, n, device=means.device) * half
        return torch.cartesian_prod(axis, axis).flip(1) + center        # (n * n, 2)
    at, prior = grid(coarse, 1 / coarse), model.prior.frozen()
    generator = torch.Generator(means.device).manual_seed(0)
    return {"plane_box": torch.cat([center - half, center + half]),
            "plane_log_prior": prior.log_prob(grid(fine)).view(fine, fine),
            "plane_images": model.generate(at, generator).view(coarse, coarse, -1),
            "plane_image_log_prior": prior.log_prob(at).view(coarse, coarse)}


@torch.no_grad()
def classify(model, data, generator):
    """Test accuracies of two classifiers of the latent means of all layers: a linear probe and 5
    nearest neighbours. Training images are binarised as in training. Empty without classes."""
    from sklearn import linear_model, neighbors, pipeline, preprocessing
    n = min(len(data.train), CODED)
    if not data.labels or not 2 <= len(data.labels["train"][:n].unique()) <= CLASSES:
        return {}

    def codes(x):
        return torch.cat([z for z, _ in model.latents(x).values()], 1).cpu().numpy()
    batches = torch.arange(n, device=data.train.device).split(1000)
    train = np.concatenate([codes(data.batch(index, generator)) for index in batches])
    test = np.concatenate([codes(datasets.pixels(part)) for part in data.test.split(1000)])
    y, y_test = data.labels["train"][:n].cpu().numpy(), data.labels["test"].cpu().numpy()
    logistic = linear_model.LogisticRegression(C=5000 / n, max_iter=1000)
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), logistic)
    neighbours = neighbors.KNeighborsClassifier(min(5, n))
    return {"probe_accuracy": probe.fit(train, y).score(test, y_test),
            "knn_accuracy": neighbours.fit(train, y).score(test, y_test)}


@torch.no_grad()
def fit_prior(model, data, generator):
    """Gives a trained model a mixture of Gaussians as prior, fitted to a draw from q(z | x) of each
    training image. The number of components, of FITTED, is best for draws of validation images."""
    from sklearn.mixture import GaussianMixture

    def draws(batches):
        codes = [draw_normal(*model.encode(x), generator) for x in batches]
        return torch.cat(codes).double().cpu().numpy()
    indices = torch.arange(len(data.train), device=data.train.device).split(1000)
    z = draws(data.batch(index, generator) for index in indices)            # (N, D)
    z_val = draws(datasets.pixels(part) for part in data.val.split(1000))
    best = max((GaussianMixture(K, covariance_type="diag", random_state=0).fit(z)
                for K in FITTED if K <= len(z)), key=lambda mixture: mixture.score(z_val))
    mu, variance, weights = (torch.from_numpy(a).to(indices[0].device, torch.float32)
                             for a in (best.means_, best.covariances_, best.weights_))
    model.prior = MixturePrior(mu, variance.log(), weights.log())
    # a mixture of Gaussians to models.py; config.json and the tables call it fitted
    model.config = dataclasses.replace(model.config, prior="mog", components=len(mu),
                                       learned_weights=True)


# ---------------------------------------------------------------------------------- the record


def mean_se(values):
    """{"mean", "se"} of a number per image; se is the standard error over the images."""
    values = values.double()
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": values.mean().item(), "se": se}


def evaluate(model, data, S, tick=lambda n: None):
    """(metrics, arrays) of a model on data.test, as metrics.json and arrays.npz hold them.
    All processes compute the likelihood. Process 0 computes the rest, others get (None, None)."""
    x, began, config = data.test, time.perf_counter(), model.config
    terms = importance_terms(model, x, S, torch.Generator().manual_seed(0), tick)
    if not parallel.is_main_process():
        return None, None
    generator = torch.Generator(x.device).manual_seed(0)
    metrics = {"model": config.model, "prior": config.prior,
               "label": f"{type(model).__name__} + {PRIORS[config.prior]}",
               "dataset": data.name, "binarize": data.binarize,
               "likelihood": config.likelihood, "samples": S, "images": len(x),
               "nll": mean_se(-terms["log_px"])}
    metrics |= {name: mean_se(value) for name, value in terms.items() if name != "log_px"}
    if config.likelihood == "logistic":     # the usual unit for 256 grey levels
        metrics["bits_per_dim"] = mean_se(-terms["log_px"] / (x.shape[1] * math.log(2)))
    # arrays.npz: N images of D pixels, L latents a layer, K components (sizes are maxima)
    #   elbo, log_px, recon, kl, kl1, kl2 (N,)    labels (N,)               image_shape (2,) or (3,)
    #   variance_z, variance_z1, variance_z2 (L,)           latent_means (N, L), of the top layer
    #   component_mu (K, L)                       component_use (K,)
    #   images, reconstructions (48, D)           reconstruction_distance (48,)
    #   samples (64, D)                           neighbours (16, D)        sample_distance (16,)
    #   pseudo_inputs, pseudo_samples (40, D)     plane_box (4,)    plane_log_prior (160, 160)
    #   plane_images (18, 18, D)                  plane_image_log_prior (18, 18)
    statistics, arrays = latent_statistics(model, x, generator)
    arrays |= terms | pictures(model, data, generator)
    if config.prior == "vamp":
        arrays |= pseudo_pictures(model, arrays["component_use"], generator)
    if arrays["latent_means"].shape[1] == 2:
        arrays |= plane(model, arrays["latent_means"])
    metrics |= statistics | classify(model, data, generator)
    metrics |= {"parameters": sum(p.numel() for p in model.parameters()),
                "seconds": time.perf_counter() - began, "device": x.device.type,
                "threads": torch.get_num_threads(), "processes": parallel.size(),
                "date": time.strftime("%Y-%m-%d"), "versions": {"torch": torch.__version__}}
    arrays = {name: torch.as_tensor(a).detach().float().cpu().numpy() for name, a in arrays.items()}
    arrays["image_shape"] = np.array(data.image_shape)
    if data.labels:
        arrays["labels"] = data.labels["test"].cpu().numpy()
    return metrics, arrays


def load_run(folder, device="cpu", data_dir=None, dataset=None):
    """(model, info, data, config) of a run folder. `data_dir` and `dataset` say where the data lie
    now, if not where training found them."""
    model, info = files.load_model(folder / "model.safetensors", build, device)
    config = json.loads((folder / "config.json").read_text())
    data = datasets.load(dataset or config["dataset"], data_dir or config["data_dir"],
                         config["binarize"], device)
    if data.sha256 != config["sha256"]:
        raise ValueError(f"{folder} was trained on other images than {data.name} holds now: name "
                         "the file that it was trained on by --dataset")
    return model, info, data, config


@files.friendly
def main(argv=None):
    torch.set_flush_denormal(True)
    p = files.parser(__doc__)
    p.add_argument("run", type=Path, help="folder of a run that train.py has finished")
    p.add_argument("--model", default="vae", metavar="FILE.py:CLASS",
                   help="the model of your own that train.py was given")
    p.add_argument("--samples", type=int, default=500, metavar="S",
                   help="importance samples an image; the paper has 5000")
    p.add_argument("--fit-prior", type=Path, metavar="DIR",
                   help="only fit a mixture of Gaussians to draws of the training codes, and write "
                        "the run with this prior to DIR")
    p.add_argument("--images", type=int, help="only so many of the test images, at random")
    p.add_argument("--data-dir", help="where the data lie now")
    p.add_argument("--dataset", help="where your own array lies now")
    p.add_argument("--device", choices=("cpu", "cuda"), help="where to evaluate",
                   default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if args.samples < 1 or (args.images is not None and args.images < 1):
        p.error("--samples and --images must be at least 1")
    files.add_own_model(args.model, MODELS)
    parallel.start(args.device)
    model, info, data, config = parallel.main_first(
        lambda: load_run(args.run, args.device, args.data_dir, args.dataset))
    if args.fit_prior:
        if not parallel.is_main_process():
            return
        if any((args.fit_prior / name).exists() for name in ("model.safetensors", "last.pt")):
            raise ValueError(f"{args.fit_prior} holds a run already: give another folder")
        fit_prior(model, data, torch.Generator(args.device).manual_seed(0))
        args.fit_prior.mkdir(parents=True, exist_ok=True)
        files.write_atomic(args.fit_prior / "log.csv", (args.run / "log.csv").read_bytes())
        config |= {"prior": "fitted", "out": str(args.fit_prior)}
        files.write_atomic(args.fit_prior / "config.json", json.dumps(config, indent=2) + "\n")
        info["config"] = vars(model.config)
        return files.save(args.fit_prior / "model.safetensors", model.state_dict(), info)
    name = args.run.resolve().name
    if args.images:
        keep = some(len(data.test), args.images)
        labels = {name: y[keep] if name == "test" else y for name, y in data.labels.items()}
        data = dataclasses.replace(data, test=data.test[keep], labels=labels)
    with files.progress(parallel.is_main_process(), desc=f"{name}: likelihood",
                        total=-(-len(data.test) // parallel.size())) as bar:
        metrics, arrays = evaluate(model, data, args.samples, bar.update)
    if not parallel.is_main_process():
        return
    metrics |= {name: info[name] for name in ("epochs", "best_epoch", "train_seconds")}
    metrics["trained_in"] = config["precision"]
    if config["prior"] == "fitted":
        metrics |= {"prior": "fitted", "label": f"{type(model).__name__} + fitted mixture"}
    files.write_atomic(args.run / "arrays.npz", lambda file: np.savez(file, **arrays))
    files.write_atomic(args.run / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    files.say(f"{name}: ELBO {metrics['elbo']['mean']:.2f}, NLL {metrics['nll']['mean']:.2f} nats "
              f"an image (S = {args.samples:,})")


if __name__ == "__main__":
    main()
