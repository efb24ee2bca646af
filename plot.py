"""Figures, drawn from a run's recorded files alone: config.json, log.csv, metrics.json, arrays.npz.

    python plot.py results/latest/vamp                  the figures of one model, in its folder
    python plot.py results/latest                       all models of a run against each other
    python plot.py results/latest --models vae vamp     the same, these models in this order

Torch is not needed: a run can be redrawn anywhere.
"""
import files
if __name__ == "__main__":
    files.catch_signals()

import collections
import contextlib
import csv
import io
import itertools
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

# Labels come from files, and a dollar sign in one must not start a formula.
matplotlib.rcParams.update({
    "text.parse_math": False, "font.size": 8.5, "axes.titlesize": 9, "legend.fontsize": 7.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

ORDER = ("vae", "vamp", "hvae", "hvamp")
# Okabe and Ito's palette, which stays apart for colour-blind readers; markers say it again.
LOOKS = {("vae", "standard"): ("#D55E00", "o"), ("vae", "vamp"): ("#0072B2", "s"),
         ("hvae", "standard"): ("#E69F00", "^"), ("hvae", "vamp"): ("#009E73", "D"),
         ("vae", "mog"): ("#CC79A7", "v"), ("hvae", "mog"): ("#56B4E9", "P")}
SPARE = (("#000000", "X"), ("#7F3C8D", "*"), ("#8B6914", "p"))    # for a second run of a kind
PARTS = {"elbo": "ELBO", "recon": "reconstruction", "kl": "KL"}
ACTIVE = 0.01           # variance of the posterior mean over the images, Burda et al. (2016)
SHOWN = 6000            # points in a latent space; more hide each other
MARGIN = {"fontsize": 6.5, "color": "0.4"}

# -------------------------------------------------------------------------------------- reading

# One evaluated model: its folder's name, its files, and how it looks in every figure.
Run = collections.namedtuple("Run", "name label metrics log arrays color marker")


@contextlib.contextmanager
def reading(path, script):
    """Inside it, what goes wrong names the file and the script that writes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run {script} first")
    try:
        yield
    except OSError:
        raise
    except Exception as error:      # a damaged archive raises nearly anything in zipfile and numpy
        what = f"it lacks {error}" if isinstance(error, KeyError) else files.one_line(error)
        what = what if str(path) in what else f"{path} is damaged ({what})"
        raise ValueError(f"{what}: run {script} again") from None


def read_metrics(path):
    """metrics.json of evaluate.py as a dict; a missing standard error (of one image) is 0."""
    with reading(path, "evaluate.py"):
        m = files.read_json(path, (
            "model", "prior", "label", "dataset", "note", "binarize", "samples", "images", "epochs",
            "train_seconds", "seconds", "active_units", "latent_dims"))
        layers = ["kl1", "kl2"] if m["model"] == "hvae" else []
        for key in ["recon", "kl", "elbo", "nll", *layers]:
            m[key] = {"mean": float(m[key]["mean"]), "se": float(m[key]["se"] or 0)}
            if not math.isfinite(m[key]["mean"] + m[key]["se"]):
                raise ValueError(f"{key} is not finite")
        # A user's file is named without its folders, which are nobody's business in a figure.
        return m | {"dataset": Path(m["dataset"]).name}


def read_log(path):
    """log.csv of train.py as {column: (epochs,) float64}; an empty cell is NaN."""
    with reading(path, "train.py"), open(path, newline="") as file:
        head, *rows = csv.reader(file)
        if any(len(row) != len(head) for row in rows) or not rows:
            raise ValueError(f"expected {len(head)} cells in each line, and one epoch at least")
        log = dict(zip(head, np.array([[float(cell or "nan") for cell in row] for row in rows]).T))
        for column in ("epoch", "beta", *(f"{split}_{part}" for split in ("train", "val")
                                          for part in PARTS)):
            log[column]
        return log


def read_arrays(path, m):
    """arrays.npz of evaluate.py as {name: array}, checked against metrics.json `m`.

    Every axis has a name, a layer's its own; axes of one name must have one size.
    """
    *_, top = m["latent_dims"]
    axes = {"image_shape": "two", "images": "n D", "reconstructions": "n D", "samples": "m D",
            "log_px": "N", "latent_means": f"N {top}"}
    for layer in m["latent_dims"]:
        axes |= {f"kl_per_dim_{layer}": layer, f"variance_{layer}": layer}
    if m["prior"] != "standard":
        axes |= {"component_mu": f"K {top}", "component_use": "K"}
    if m["prior"] == "vamp":
        axes |= {"pseudo_inputs": "p D", "pseudo_samples": "p D", "pseudo_use": "p"}
    with reading(path, "evaluate.py"):
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in axes if name not in file]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            axes |= {"labels": "N"} if "labels" in file else {}
            arrays = {name: file[name] for name in axes}
        sizes = {"N": m["images"], "two": 2, "D": arrays["image_shape"].prod(), **m["latent_dims"]}
        for name, array in arrays.items():
            own = axes[name].split()
            if len(own) != array.ndim or any(
                    sizes.setdefault(axis, n) != n for axis, n in zip(own, array.shape)):
                raise ValueError(f"{name} has shape {array.shape}, which does not fit the other "
                                 "arrays or metrics.json")
            if m["images"] == 1 and name.startswith("variance"):
                arrays[name] = np.zeros(array.shape)        # over one image it is 0 / 0
            elif not np.isfinite(array).all():
                raise ValueError(f"{name} holds NaN or infinity")
    return arrays


def read_runs(folders):
    """The evaluated models in these folders as Runs, each with a look of its own."""
    metrics = [read_metrics(folder / "metrics.json") for folder in folders]
    labels = distinct_labels([(folder.name, m) for folder, m in zip(folders, metrics)])
    runs, looks, spare = [], dict(LOOKS), itertools.cycle(SPARE)
    for folder, m, label in zip(folders, metrics, labels):
        with reading(folder / "config.json", "train.py"):
            args = files.read_json(folder / "config.json", ["args"])["args"]
            if any(args[key] != m[key] for key in ("model", "prior")):
                raise ValueError(f"{args['model']} with prior {args['prior']}, where metrics.json "
                                 f"has {m['model']} with {m['prior']}: files of different runs")
        look = looks.pop((m["model"], m["prior"]), None) or next(spare)
        runs.append(Run(folder.name, label, m, read_log(folder / "log.csv"),
                        read_arrays(folder / "arrays.npz", m), *look))
    return runs


def distinct_labels(named):
    """The labels of (folder name, metrics) pairs; two equal ones also get their folder's name."""
    labels = [m["label"] for _, m in named]
    return [f"{label} ({name})" if labels.count(label) > 1 else label
            for label, (name, _) in zip(labels, named)]


def find_models(folder, names=None):
    """The evaluated models under a folder: {name: Path}, the paper's four first, or as named."""
    found = {path.parent.name: path.parent for path in folder.glob("*/metrics.json")}
    missing = [str(folder / name) for name in names or () if name not in found]
    if missing or not found:
        raise ValueError(f"no metrics.json in {', '.join(missing) or f'the subfolders of {folder}'}"
                         ": run evaluate.py on the model first")
    names = names or [n for n in ORDER if n in found] + sorted(set(found) - set(ORDER))
    return {name: found[name] for name in names}


def measured(m):
    """What two models must have in common for their numbers to be compared."""
    return tuple(m[key] for key in ("dataset", "note", "binarize", "samples", "images"))


# ------------------------------------------------------------------------ what figures have alike

def source(runs):
    """The line beneath a figure: the data it shows, with the data set's note if there is one."""
    lines = [f"{m['dataset']}, {m['binarize']} binarisation, {m['images']:,} test images"
             + (f": {m['note']}" if m["note"] else "") for m in (run.metrics for run in runs)]
    return "   |   ".join(dict.fromkeys(lines))


def panels(rows, columns, width, height, runs, title=None):
    """(Figure, (rows * columns,) array of axes) with the source line beneath, inches."""
    fig = Figure(figsize=(width, height), layout="constrained")
    # below the figure's own area, which the panels fill; saving widens the cut to it
    fig.text(0.006, -0.012, source(runs), va="top", **MARGIN)
    if title:
        fig.suptitle(title, fontsize=9.5)
    return fig, fig.subplots(rows, columns, squeeze=False).ravel()


def pictures(run, name, limit, columns):
    """(n, h, w) images of an array, `limit` at most; of several rows only full ones are kept."""
    images = run.arrays[name][:limit].astype(float).reshape(-1, *run.arrays["image_shape"])
    return images[:max(columns, len(images) - len(images) % columns)]


def image_grid(blocks, title, runs, columns=16):
    """Figure of blocks of strips, each (label, images (n, h, w) in [0, 1]), wrapped at `columns`.

    A strip's label stands at its middle; a wider gap parts the blocks.
    """
    strips = [strip for block in blocks for _, strip in block]
    h, w = (max(strip.shape[axis] for strip in strips) for axis in (1, 2))
    columns, gap = min(columns, max(map(len, strips))), max(1, h // 14)
    y, ticks, placed = 0, {}, []
    for block in blocks:
        for label, strip in block:
            top = y
            for first in range(0, len(strip), columns):
                placed += [(y, x * (w + gap), image)
                           for x, image in enumerate(strip[first:first + columns])]
                y += h + gap
            ticks[(top + y - gap - 1) / 2] = label
        y += 3 * gap
    canvas = np.ones((y - 4 * gap, columns * (w + gap) - gap))
    for y, x, image in placed:
        canvas[y:y + image.shape[0], x:x + image.shape[1]] = image
    width = min(8.6, 0.75 * columns * max(1.0, w / h))
    fig = Figure(figsize=(width, max(0.3, width * canvas.shape[0] / canvas.shape[1])))
    ax = fig.add_axes((0, 0, 1, 1), frameon=False, xticks=[])
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_yticks(list(ticks), ticks.values())
    ax.tick_params(length=0)
    ax.set_title(title, loc="left")
    ax.annotate(source(runs), (0, 0), (0, -4), xycoords="axes fraction", va="top",
                textcoords="offset points", **MARGIN)
    return fig


# ---------------------------------------------------------------------------- figures of one model

def draw_reconstructions(run):
    """Test images above what the model makes of them, 48 in rows of 16."""
    a, b = (pictures(run, name, 48, 16) for name in ("images", "reconstructions"))
    return image_grid([[("original", a[i:i + 16]), ("reconstructed", b[i:i + 16])]
                       for i in range(0, len(a), 16)],
                      f"{run.label}: test images and their reconstructions", [run])


def draw_pseudo_inputs(run):
    """Learned pseudo-inputs above what each of them generates, most used first, in rows of 20."""
    a, b = (pictures(run, f"pseudo_{name}", 40, 20) for name in ("inputs", "samples"))
    m, use = run.metrics, run.arrays["pseudo_use"][:len(a)]
    title = (f"{run.label}: the {len(a)} most used of {m['components']:,} components, "
             f"{use[0]:.2%} to {use[-1]:.2%} of the images each; "
             f"{m['components_used'] / m['components']:.0%} of all in use")
    return image_grid([[("pseudo-input", a[i:i + 20]), ("generates", b[i:i + 20])]
                       for i in range(0, len(a), 20)], title, [run], 20)


def latent_panel(ax, run):
    """Draws posterior means on their two main axes and the prior; {text: artist} for a legend.

    Components go through the same map; the standard normal stays round, the map being orthonormal.
    """
    z, (*_, top) = run.arrays["latent_means"].astype(float), run.metrics["latent_dims"]
    centre, scatter = z.mean(0), np.atleast_2d(np.cov(z.T, bias=True))
    _, s, axes = np.linalg.svd(scatter)
    # a latent space of one dimension is drawn on a line
    plane = np.pad(axes[:2], ((0, 2 - len(axes[:2])), (0, 0))).T
    classes, color = np.unique(run.arrays.get("labels", np.zeros(len(z), int)), return_inverse=True)
    tab10, legend, points = matplotlib.colormaps["tab10"], {}, (z[:SHOWN] - centre) @ plane
    ax.scatter(*points.T, s=3, lw=0, alpha=0.75, c=tab10(color[:SHOWN] % 10))
    if 1 < len(classes) <= 20:
        legend = {str(c): ax.scatter([], [], s=22, color=tab10(i % 10))
                  for i, c in enumerate(classes)}
    if "component_mu" in run.arrays:
        use = run.arrays["component_use"]
        most = np.argsort(-use)[:1000]
        ring = {"facecolors": "none", "edgecolors": "black", "lw": 0.6}
        ax.scatter(*((run.arrays["component_mu"][most] - centre) @ plane).T,
                   s=45 * use[most] / max(use.max(), 1e-12), **ring)
        legend["prior component,\narea: its use"] = ax.scatter([], [], s=28, **ring)
    else:
        for radius, style in ((1, "-"), (2, "--")):
            ax.add_patch(Circle(-centre @ plane, radius, fill=False, ls=style))
            legend[f"prior, {radius} sigma"] = ax.plot([], [], "k", ls=style, lw=1)[0]
    ax.autoscale_view()
    ax.set_aspect("equal", adjustable="datalim")
    first, second = s[0] / max(s.sum(), 1e-12), s[1:2].sum() / max(s.sum(), 1e-12)
    ax.set_xlabel(f"principal axis 1 of {top} ({first:.0%} of the variance)", fontsize=7.5)
    ax.set_ylabel(f"principal axis 2 ({second:.0%})", fontsize=7.5)
    return legend


def finish_curves(ax, title, part, curves):
    """Names the axes, and limits y: first epochs plunge, and one bad epoch may lie far away."""
    late = np.concatenate([v[len(v) // (10 if part == "kl" else 5):] for v in curves])
    late = np.sort(late[np.isfinite(late)])
    if len(late):
        low, high = late[len(late) // 50], late[-1 - len(late) // 50]      # all but 2 % at each end
        margin = max(0.08 * (high - low), 0.05)
        ax.set_ylim(low - margin, high + margin)
    ax.set(title=title, xlabel="epoch", ylabel="nats per image")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def draw_curves(run):
    """ELBO, reconstruction and KL over the epochs, training and validation."""
    log, epochs = run.log, run.log["epoch"]
    fig, axes = panels(1, 3, 9.6, 2.9, [run], f"{run.label}: training")
    warm = epochs[log["beta"] < 1]
    for ax, part in zip(axes, PARTS):
        curves = []
        layers = {"kl1": "--", "kl2": ":"} if part == "kl" else {}
        for split, name, color in (("train", "training", "0.55"), ("val", "validation", run.color)):
            for p, style in {part: "-", **layers}.items():
                values = log.get(f"{split}_{p}", epochs * np.nan)
                if np.isfinite(values).any():
                    curves.append(values)
                    ax.plot(epochs, values, style, color=color, lw=1.3, ms=3,
                            marker="o" if len(epochs) < 10 else "",
                            label=name if p == part else f"{name}, {p.upper()}")
        if len(warm):
            ax.axvspan(warm[0] - 0.5, warm[-1] + 0.5, color="0.93", lw=0, zorder=0,
                       label="KL warm-up")
        if "best_epoch" in run.metrics:
            ax.axvline(run.metrics["best_epoch"], color="black", lw=0.7, label="epoch kept")
        finish_curves(ax, PARTS[part], part, curves or [epochs * np.nan])
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig


def draw_likelihood(run):
    """Histogram of the images' log-likelihoods with their mean and its standard error."""
    values, m = run.arrays["log_px"], run.metrics
    fig, (ax,) = panels(1, 1, 6, 3, [run])
    ax.hist(values, bins=min(80, max(8, len(values) // 25)), color=run.color, alpha=0.75)
    mean, se = -m["nll"]["mean"], m["nll"]["se"]
    ax.axvspan(mean - se, mean + se, color="black", alpha=0.25, lw=0)
    ax.axvline(mean, color="black", lw=1, label=f"mean {mean:.2f}\n± {se:.2f} standard error")
    ax.set(title=f"{run.label}: log-likelihood, importance sampling with S = {m['samples']:,}",
           xlabel="log p(x) (nats per image)", ylabel="test images")
    ax.legend(loc="upper left")
    return fig


def draw_kl(run):
    """KL of every latent dimension, largest first, the active ones in colour."""
    layers = list(run.metrics["latent_dims"])
    fig, axes = panels(1, len(layers), 6.2 if len(layers) == 1 else 9, 2.9, [run],
                       f"{run.label}: KL per latent dimension")
    for ax, layer in zip(axes, layers):
        kl = run.arrays[f"kl_per_dim_{layer}"]
        order, rank = np.argsort(-kl), np.arange(1, len(kl) + 1)
        active = run.arrays[f"variance_{layer}"][order] > ACTIVE
        for on, color, name in ((active, run.color, "active"), (~active, "0.6", "inactive")):
            # an empty set of bars would forget its colour: these have no height instead
            ax.bar(rank, np.where(on, kl[order], 0), color=color, label=f"{name}: {on.sum()}")
        ax.set(xlabel=f"dimension of {layer}, sorted", ylabel="KL (nats per image)")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        ax.legend(title=f"variance of the posterior mean > {ACTIVE}", title_fontsize=7.5)
    return fig


# --------------------------------------------------------------------- models against each other

def draw_comparison(runs):
    """Originals in the first row, then one row of reconstructions per model."""
    strips, last = [], None
    for run in runs:
        original = pictures(run, "images", 16, 16)
        # models evaluated on other images get originals of their own
        if last is None or not np.array_equal(original, last):
            strips, last = strips + [("original", original)], original
        strips.append((run.label, pictures(run, "reconstructions", 16, 16)))
    return image_grid([strips], "Test images and every model's reconstruction", runs)


def draw_samples(runs):
    """Samples from the prior, as pixel probabilities, 16 in a row: 64 of one model, 32 of each."""
    shown = 64 if len(runs) == 1 else 32
    return image_grid([[(run.label, pictures(run, "samples", shown, 16))] for run in runs],
                      "Samples from the prior", runs)


def draw_tradeoff(runs):
    """Test KL against reconstruction with lines of equal ELBO, and the way there."""
    fig, (ax,) = panels(1, 1, 6.4, 4.8, runs)
    x, y = [], []
    for run in runs:
        log, m = run.log, run.metrics
        # the way from far below would leave the ends, which matter, in one corner
        near = log["val_elbo"] > np.nan_to_num(log["val_elbo"], nan=-np.inf).max() - 6
        ax.plot(log["val_kl"], log["val_recon"], color=run.color, lw=0.8, alpha=0.6)
        ax.errorbar(m["kl"]["mean"], m["recon"]["mean"], m["recon"]["se"], m["kl"]["se"],
                    fmt=run.marker, color=run.color, ms=5, capsize=3, elinewidth=1, zorder=5,
                    label=f"{run.label}, ELBO {m['elbo']['mean']:.2f}")
        for seen, part in ((x, "kl"), (y, "recon")):
            mean, se = m[part]["mean"], m[part]["se"]
            seen += [mean - se, mean + se, *log[f"val_{part}"][near]]
    limits = []
    for values in (x, y):
        margin = max(0.5, 0.07 * np.ptp(values))
        limits.append((min(values) - margin, max(values) + margin))
    ax.set(xlim=limits[0], ylim=limits[1], xlabel="KL (nats per image)",
           ylabel="reconstruction (nats per image)",
           title="Points: test, with standard errors. Thin lines: validation, epoch by epoch.\n"
                 "Grey lines: equal ELBO; up and to the left is better.")
    kl, recon = np.meshgrid(*(np.linspace(*pair, 50) for pair in limits))
    lines = ax.contour(kl, recon, recon - kl, 9, colors="0.85", linewidths=0.7, linestyles="-",
                       zorder=0)
    ax.clabel(lines, fmt="ELBO %g", fontsize=6.5, colors="0.4")
    fig.legend(loc="outside upper center", ncols=2)
    return fig


def draw_dynamics(runs):
    """Validation ELBO, reconstruction and KL of all models over the epochs."""
    fig, axes = panels(1, 3, 9, 3, runs)
    for ax, part in zip(axes, PARTS):
        for run in runs:
            ax.plot(run.log["epoch"], run.log[f"val_{part}"], color=run.color, lw=1.3, ms=3,
                    marker=run.marker if len(run.log["epoch"]) < 10 else "", label=run.label)
        finish_curves(ax, f"validation {PARTS[part]}", part, [r.log[f"val_{part}"] for r in runs])
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def collapse_message(runs):
    """What these numbers say of N(0, I) against the VampPrior, pair by pair; "" without a pair.

    A conclusion follows only where every pair supports it, means by more than two standard errors
    of their difference (taken as if on other images; on the same ones it varies less).
    """
    kinds = {(run.metrics["model"], run.metrics["prior"]): run.metrics for run in runs}
    lines, always = [], {"active": True, "kl": True, "recon": True}
    for model in ("vae", "hvae"):
        plain, vamp = (kinds.get((model, prior)) for prior in ("standard", "vamp"))
        if not plain or not vamp or measured(plain) != measured(vamp):
            continue
        *_, top = plain["latent_dims"]
        a, b = (m["active_units"][top] for m in (plain, vamp))
        (x, one, m), (y, other, n) = sorted(
            [(a, "N(0, I)", plain), (b, "the VampPrior", vamp)], key=lambda side: side[0])
        how, than = ("as many", "as") if a == b else ("fewer", "than")
        lines.append(f"{model.upper()}: {how} units of {top} active under {one}, {x} of "
                     f"{plain['latent_dims'][top]}, {than} under {other}, {y}; KL "
                     f"{m['kl']['mean']:.2f} and {n['kl']['mean']:.2f}, reconstruction "
                     f"{m['recon']['mean']:.2f} and {n['recon']['mean']:.2f} nats per image.")
        always["active"] &= a < b
        for part, sign in (("kl", 1), ("recon", -1)):
            gap = sign * (plain[part]["mean"] - vamp[part]["mean"])
            always[part] &= gap > 2 * math.hypot(plain[part]["se"], vamp[part]["se"])
    clauses = {(True, True): ", yet the KL is higher and the reconstruction worse",
               (True, False): ", yet the KL is higher",
               (False, True): " and the reconstruction is worse"}
    if lines and always["active"] and (end := clauses.get((always["kl"], always["recon"]))):
        lines.append(f"Under N(0, I) fewer units are active{end}.")
    return "\n".join(lines)


def draw_active_units(runs):
    """Variance of the posterior mean per latent dimension, and the KL of each layer."""
    fig, (left, right) = panels(1, 2, 9, 4.2, runs)
    fig.supxlabel(collapse_message(runs), x=0.006, ha="left", fontsize=7.5)
    for i, run in enumerate(runs):
        for layer, n in run.metrics["active_units"].items():
            v = np.sort(run.arrays[f"variance_{layer}"])[::-1]
            left.plot(np.arange(1, len(v) + 1), np.log10(np.maximum(v, 1e-7)), color=run.color,
                      ls=":" if layer == "z1" else "-", lw=1.2, marker=run.marker, ms=2.5,
                      label=f"{run.label}, {layer}: {n} of {len(v)} active")
        end, texts = 0, []
        for layer in run.metrics["latent_dims"]:
            kl = run.metrics[layer.replace("z", "kl")]["mean"]
            right.barh(i, kl, left=end, color=run.color, alpha=0.5 if layer == "z1" else 1)
            texts.append(f"{layer} {kl:.1f}")
            end += kl
        right.text(end, i, "  " + " + ".join(texts), va="center")
    left.axhline(math.log10(ACTIVE), color="black", lw=0.8, ls="--",
                 label=f"active: variance above {ACTIVE}")
    left.set(xlabel="latent dimension, sorted", title="Which latent dimensions carry information",
             ylabel="log10 variance of the posterior mean")
    right.set(yticks=range(len(runs)), yticklabels=[run.label for run in runs],
              xlabel="KL (nats per image)", title="KL per layer")
    right.invert_yaxis()
    right.margins(x=0.45)      # room for the numbers
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def draw_latents(runs):
    """The latent spaces of the models side by side, posterior means coloured by class."""
    columns = min(len(runs), 4 if len(runs) % 3 else 3)
    rows, size = -(-len(runs) // columns), 5 if len(runs) == 1 else 3
    fig, axes = panels(rows, columns, size * columns, size * rows + 0.9, runs)
    legend = {}
    for ax, run in zip(axes, runs):
        legend |= latent_panel(ax, run)
        shown = min(SHOWN, run.metrics["images"])
        ax.set_title(f"{run.label}\nposterior means of {shown:,} test images")
    for ax in axes[len(runs):]:
        ax.remove()
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=5 + len(runs))
    return fig


# ----------------------------------------------------------------------------------- what is drawn
# The last of each is what make waits for: when it stands, all stand.

MODEL_FIGURES = {
    "reconstructions": draw_reconstructions, "samples": lambda run: draw_samples([run]),
    "pseudo_inputs": draw_pseudo_inputs, "latent": lambda run: draw_latents([run]),
    "likelihood": draw_likelihood, "kl": draw_kl, "curves": draw_curves}
COMPARISON_FIGURES = {"comparison": draw_comparison, "tradeoff": draw_tradeoff,
                      "dynamics": draw_dynamics, "active_units": draw_active_units,
                      "latents": draw_latents, "samples": draw_samples}


def save_figures(figures, subject, folder):
    """Draws {name: function} of a run or of runs and writes each as NAME.png into the folder."""
    for name, draw in figures.items():
        buffer = io.BytesIO()
        draw(subject).savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.06)
        files.write_atomic(folder / f"{name}.png", buffer.getvalue())


@files.command
def main(argv=None):
    parser = files.Parser(__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of one evaluated model, or of several")
    parser.add_argument("--models", nargs="+", metavar="NAME",
                        help="which subfolders to compare, in this order; None means all")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise FileNotFoundError(f"{args.run} is not a folder: give one with results")
    if (args.run / "metrics.json").exists() and not args.models:
        run, = read_runs([args.run])
        m = run.metrics
        figures = {name: draw for name, draw in MODEL_FIGURES.items()
                   if name != "pseudo_inputs" or "pseudo_inputs" in run.arrays}
        save_figures(figures, run, args.run)
        files.Line(args.run.absolute().name).say(
            f"trained, evaluated and drawn: NLL {m['nll']['mean']:.2f} ± {m['nll']['se']:.2f} "
            f"(S = {m['samples']:,}), {len(figures)} figures in {args.run}")
    else:
        save_figures(COMPARISON_FIGURES,
                     read_runs([*find_models(args.run, args.models).values()]), args.run)
        files.Line().say(f"wrote {len(COMPARISON_FIGURES)} figures to {args.run}")


if __name__ == "__main__":
    sys.exit(main())
