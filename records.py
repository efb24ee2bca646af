"""What a run recorded: its files read and checked, and its numbers in columns. Needs no torch."""
import collections
import contextlib
import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np

import files

ORDER = ("vae", "vamp", "hvae", "hvamp")
# Okabe and Ito's palette, for colour-blind readers; markers say it again
LOOKS = {("vae", "standard"): ("#D55E00", "o"), ("vae", "vamp"): ("#0072B2", "s"),
         ("hvae", "standard"): ("#E69F00", "^"), ("hvae", "vamp"): ("#009E73", "D"),
         ("vae", "mog"): ("#CC79A7", "v"), ("hvae", "mog"): ("#56B4E9", "P")}
SPARE = (("#000000", "X"), ("#7F3C8D", "*"), ("#8B6914", "p"))    # for a second run of a kind
PARTS = {"elbo": "ELBO", "recon": "reconstruction", "kl": "KL"}
ACTIVE = 0.01           # variance of the posterior mean over the images, Burda et al. (2016)
BETTER = {"recon": max, "elbo": max, "nll": min, "bits_per_dim": min}    # not a KL
UNITS = ("Nats per image, mean ± {}. Lower NLL, in expectation an upper bound, is better; higher Recon "
         "and ELBO are.")
SPREAD = {False: "standard error over the test images",         # of one training seed, of several
          True: "standard deviation over the training seeds"}

Run = collections.namedtuple("Run", "label metrics log arrays color marker")    # one model


@contextlib.contextmanager
def reading(path, script):
    """Inside it, what goes wrong names the file and the script that writes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run {script} first")
    try:
        yield
    except Exception as error:      # a damaged archive raises nearly anything in zipfile and numpy
        what = f"it lacks {error}" if isinstance(error, KeyError) else files.one_line(error)
        raise ValueError(f"{path} is damaged ({what}): run {script} again") from None


def read_metrics(path):
    """metrics.json of evaluate.py as a dict; a missing standard error (of one image) is 0."""
    with reading(path, "evaluate.py"):
        m = json.loads(path.read_text(encoding="utf-8"))
        layers = ["kl1", "kl2"] if m["model"] == "hvae" else []
        mixture = ["components", "components_used"] if m["prior"] != "standard" else []
        for key in ("label note binarize samples images epochs best_epoch train_seconds seconds "
                    "active_units latent_dims").split() + mixture:
            m[key]      # a KeyError now, rather than half-way
        for key in ["recon", "kl", "elbo", "nll", *layers]:
            m[key]["se"] = m[key]["se"] or 0
            if not math.isfinite(m[key]["mean"] + m[key]["se"]):
                raise ValueError(f"{key} is not finite")
        # a user's file is named without its folders, which are nobody's business in a figure
        return m | {"dataset": Path(m["dataset"]).name}


def read_arrays(path, m):
    """arrays.npz of evaluate.py as {name: array}, checked against metrics m."""
    with reading(path, "evaluate.py"):
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        N, n, size = m["images"], len(arrays["images"]), arrays["image_shape"].prod()
        p, K = len(arrays.get("pseudo_use", ())), m.get("components")
        axes = 3 if len(arrays["image_shape"]) == 3 else 2
        shapes = {"image_shape": (axes,), "images": (n, size), "reconstructions": (n, size),
                  "samples": (len(arrays["samples"]), size), **{name: (N,) for name in ("log_px", *PARTS)}}
        for layer, D in m["latent_dims"].items():
            shapes |= {f"kl_per_dim_{layer}": (D,), f"variance_{layer}": (D,)}
        shapes |= {"latent_means": (N, D)} | ({"labels": (N,)} if "labels" in arrays else {})
        if m["prior"] != "standard":
            shapes |= {"component_mu": (K, D), "component_use": (K,)}
        shapes |= {"walks": (*arrays["walks"].shape[:2], size), "sample_distance": (len(
            arrays["neighbours"]),), "neighbours": (len(arrays["sample_distance"]), size),
            "reconstruction_distance": (n,)}
        if m["model"] == "hvae":
            shapes["shared_z2"] = (*arrays["shared_z2"].shape[:2], size)
        if "film" in arrays:
            shapes |= {"film": (*(frames := arrays["film"].shape[:2]), size),
                       "film_epochs": frames[:1]}
        if D == 2:
            points, tiles = (len(arrays[f"plane_{name}"]) for name in ("log_prior", "images"))
            shapes |= {"plane_box": (4,), "plane_log_prior": (points, points),
                       "plane_images": (tiles, tiles, size), "plane_image_log_prior": (tiles, tiles)}
        if m["prior"] == "vamp":
            shapes |= {"pseudo_use": (p,), "pseudo_inputs": (p, size), "pseudo_samples": (p, size)}
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, not {shape}")
            if N > 1 and not np.isfinite(arrays[name]).all():   # the variance of one is 0 / 0
                raise ValueError(f"{name} holds NaN or infinity")
    return {name: arrays[name] for name in shapes}


def read_runs(folders):
    """The evaluated models in these folders as Runs, each with a look of its own."""
    metrics = [read_metrics(folder / "metrics.json") for folder in folders]
    labels = distinct_labels([(folder.name, m) for folder, m in zip(folders, metrics)])
    runs, looks, spare = [], dict(LOOKS), iter(SPARE * len(folders))
    for folder, m, label in zip(folders, metrics, labels):
        with reading(path := folder / "config.json", "train.py"):
            args = json.loads(path.read_text(encoding="utf-8"))["args"]
            if (args["model"], args["prior"]) != (m["model"], m["prior"]):
                raise ValueError("its model or prior is not that of metrics.json")
        with reading(path := folder / "log.csv", "train.py"), open(path, newline="") as file:
            rows = [*csv.DictReader(file)]
            log = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
            if any(not np.isfinite(log[name]).all() for name in ("epoch", "beta", *(
                    f"{split}_{part}" for split in ("train", "val") for part in PARTS))):
                raise ValueError("a cell is empty or not finite")
        look = looks.pop((m["model"], m["prior"]), None) or next(spare)
        runs.append(Run(label, m, log, read_arrays(folder / "arrays.npz", m), *look))
    return runs


def distinct_labels(named):
    """The labels of (folder name, metrics) pairs; two equal ones also get their folder's name."""
    labels = [m["label"] for _, m in named]
    return [f"{label} ({name})" if labels.count(label) > 1 else label
            for label, (name, _) in zip(labels, named)]


def find_models(folder, names=None):
    """The evaluated models under a folder: {name: Path}, the paper's four first, or as named."""
    found = {path.parent.name: path.parent for path in folder.glob("*/metrics.json")}
    names = names or [n for n in ORDER if n in found] + sorted(set(found) - set(ORDER)) or ["*"]
    if missing := [str(folder / name) for name in names if name not in found]:
        raise ValueError(f"no metrics.json in {', '.join(missing)}: run evaluate.py first")
    return {name: found[name] for name in names}


def measured(m):
    """What two models must have in common for their numbers to be compared."""
    return (*(m[key] for key in ("dataset", "note", "binarize", "samples", "images")),
            m.get("precision", "float32"))


def binarisation(name):
    """One of dynamic, static and none, in words."""
    return "not binarised" if name == "none" else f"{name} binarisation"


def samples_of(m):
    """S of the likelihood, and its precision where that is not float32."""
    own = m.get("precision", "float32")
    return f"{m['samples']:,}{'' if own == 'float32' else f' in {own}'}"


# ------------------------------------------------------------------------------------ columns


def find_seeds(folder):
    """The folders seed0, seed1, ... of models that `make paper` leaves in one; none in another run's."""
    found = [path for path in folder.glob("seed*")
             if path.name[4:].isdecimal() and any(path.glob("*/metrics.json"))]
    if found and any(folder.glob("*/metrics.json")):
        raise ValueError(f"{folder} has models beside the folders of its seeds: move one of the two away")
    return sorted(found, key=lambda path: int(path.name[4:]))


def read_seeds(folder, names=None):
    """[{folder name: metrics}], a dict for each training seed; one dict where there is but one."""
    return [{name: read_metrics(path / "metrics.json")
             for name, path in find_models(part, names).items()} for part in find_seeds(folder) or [folder]]


def over_seeds(runs):
    """The dicts of read_seeds as one: each number's mean over the seeds that have the model. A
    quantity's "se" is the mean of its standard errors over the images, "sd" its standard deviation
    over the seeds (n - 1), "each" its values. ValueError if seeds were not measured alike."""
    if len(runs) == 1:
        return runs[0]
    found = {name: [run[name] for run in runs if name in run] for run in runs for name in run}
    for name, values in found.items():
        if len(set(map(measured, values))) > 1:
            raise ValueError(f"{name}: its seeds differ in data, images, S or precision: evaluate "
                             "them alike")
    return {name: _mean(values) for name, values in found.items()}


def _mean(values):
    """The mean of numbers, and of those in dicts; of anything else, the first."""
    first = values[0]
    if isinstance(first, dict):
        merged = {key: _mean([v[key] for v in values]) for key in first if all(key in v for v in values)}
        if "se" in merged:
            each = [v["mean"] for v in values]
            merged |= {"each": each, "sd": statistics.stdev(each) if len(each) > 1 else None}
        return merged
    same = values.count(first) == len(values)
    return statistics.fmean(values) if not same and isinstance(first, (int, float)) else first


def stat(m, key):
    """Mean ± standard error of one quantity in metrics m, over seeds ± standard deviation; "-"
    where it was not measured."""
    if not m or key not in m:
        return "-"
    spread = m[key].get("sd", m[key]["se"] if m["images"] > 1 else None)
    return f"{m[key]['mean']:.2f}{'' if spread is None else f' ± {spread:.2f}'}"


def stats(key, metrics):
    """The column of one quantity, best as printed in bold if measured alike. None: not run."""
    known = [m for m in metrics if m and key in m]
    means = [round(m[key]["mean"], 2) for m in known]
    alike = len(known) > 1 and len(set(map(measured, known))) == 1
    best = BETTER[key](means) if key in BETTER and alike else None
    return [f"**{stat(m, key)}**" if m in known and round(m[key]["mean"], 2) == best else stat(m, key)
            for m in metrics]


def minutes(m):
    """How long training took, in whole minutes."""
    spent = m["train_seconds"] / 60 if m else None
    return "-" if spent is None else "<1" if spent < 0.5 else f"{spent:.0f}"


def results(named, metrics):
    """Columns: the labels of (folder name, metrics) pairs and four results of each in `metrics`;
    bits per dimension, NLL / (D log 2), where a likelihood of grey levels has them."""
    bits = any(m and "bits_per_dim" in m for m in metrics)
    return [("Model", distinct_labels(named)), *(
        (title, stats(title.lower(), metrics)) for title in ("Recon", "KL", "ELBO", "NLL"))] + [
        ("Bits/dim", stats("bits_per_dim", metrics))] * bits


def seed_columns(metrics):
    """Columns of what over_seeds knows of the NLL beside its mean and spread; none for one seed."""
    nll = [m["nll"] if m else {} for m in metrics]
    return [("NLL of each seed", [", ".join(f"{v:.2f}" for v in q.get("each", [])) or "-" for q in nll]),
            ("Standard error of NLL over images", [f"{q['se']:.2f}" if "each" in q else "-" for q in nll])
            ] if any("each" in q for q in nll) else []


def units_line(metrics):
    """What the numbers in a table of these are."""
    kinds = sorted({"each" in m["nll"] for m in metrics if m})
    return UNITS.format(" or, of several seeds, ".join(SPREAD[kind] for kind in kinds))


def data_lines(metrics):
    """Lines that say what the numbers of these models rest on."""
    kinds = {}
    for m in metrics:
        kinds.setdefault((*measured(m)[:3], m["images"], samples_of(m)), set()).add(
            m.get("trained_in", "float32"))
    lines = [f"{dataset}{f' ({note})' if note else ''}, {binarisation(binarize)}, {images:,} test "
             f"images, S = {samples}, trained in {' and '.join(sorted(precisions))}."
             for (dataset, note, binarize, images, samples), precisions in kinds.items()]
    return lines + ["Warning: measured on different data, numbers of images or S, so these cannot "
                    "be compared and none is bold."] * (len(kinds) > 1)


def units(m):
    """How many units of each layer are active."""
    return ", ".join(f"{layer} {round(n, 1):g} of {m['latent_dims'][layer]}"
                     for layer, n in m["active_units"].items())


def used(m):
    """How many of the prior's components are in use, "-" for a prior without."""
    return (f"{m['components_used']:.1f} of {m['components']:,} "
            f"({m['components_used'] / m['components']:.0%})" if "components" in m else "-")


def accuracy(m, key):
    """A share of test images in percent ± binomial standard error; "-" if not measured."""
    p = m.get(key)
    return "-" if p is None else (
        f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / m['images']):.1f}%")


def latent_columns(metrics):
    """Columns on what the latents carry, each only if one of the models has it."""
    columns = [("Active units", map(units, metrics))]
    if any("kl1" in m for m in metrics):
        columns += [(key.upper(), [stat(m, key) for m in metrics]) for key in ("kl1", "kl2")]
    if any("components" in m for m in metrics):
        columns.append(("Components in use", map(used, metrics)))
    k = " or ".join(sorted({str(m["knn_k"]) for m in metrics if m.get("knn_k")}))
    return columns + [(title, [accuracy(m, key) for m in metrics]) for title, key in (
        ("Linear probe", "probe_accuracy"), (f"k-NN, k = {k}" if k else "k-NN", "knn_accuracy"))
        if any(m.get(key) is not None for m in metrics)]


def latent_notes(metrics):
    """What the titles of latent_columns mean."""
    text = (f"Active units: those whose posterior mean has a variance over the images above {ACTIVE}, a "
            "threshold made for N(0, I); under a learned prior the scale of z is free. ")
    text += ("KL1: of q(z1 | x, z2) from p(z1 | z2), KL2: of q(z2 | x) from the prior; they add up to the "
             "KL. ") * any("kl1" in m for m in metrics)
    text += "Components in use: perplexity of the mean responsibilities."
    probed = any(m.get(key) is not None for m in metrics
                 for key in ("probe_accuracy", "knn_accuracy"))
    return text + (" Linear probe, k-NN: share of images classified rightly from the posterior means of all "
                   "layers (an HVAE has two), ± binomial standard error."
                   ) * probed
