"""Figures, comparison tables and README tables, drawn from recorded files alone (json, csv, npz).

    python plot.py results/latest/vamp                      figures of one model, in its folder
    python plot.py results/latest                           all models of a run against each other
    python plot.py results/latest --models vae vamp         the same, these models in this order
    python plot.py --readme README.md --assets assets       the generated blocks of README.md

Neither torch nor any other file of this project is needed: a run can be redrawn anywhere.
"""
import argparse
import io
import json
import math
import os
import signal
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

# Figure, unlike pyplot, keeps no window and no global state: saving always draws with Agg.
# Labels come from files, and a dollar sign in one must not start a formula.
matplotlib.rcParams.update({
    "text.parse_math": False, "font.size": 8.5, "axes.titlesize": 9, "legend.fontsize": 7.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

ORDER = ("vae", "vamp", "hvae", "hvamp")
# Okabe and Ito's palette, which stays apart for colour-blind readers; markers say it again.
LOOKS = {("vae", "standard"): ("#D55E00", "o"), ("vae", "vamp"): ("#0072B2", "s"),
         ("hvae", "standard"): ("#E69F00", "^"), ("hvae", "vamp"): ("#009E73", "D")}
SPARE = (("#CC79A7", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*"))
# Test NLL on dynamically binarised MNIST in Tomczak & Welling (2018), Table 1.
PAPER = {("vae", "standard", "mnist", "dynamic"): 84.50,
         ("vae", "vamp", "mnist", "dynamic"): 82.38,
         ("hvae", "standard", "mnist", "dynamic"): 82.42,
         ("hvae", "vamp", "mnist", "dynamic"): 81.24}
LOG_COLUMNS = {"epoch", "beta", "seconds", *(f"{split}_{part}" for split in ("train", "val")
                                             for part in ("elbo", "recon", "kl"))}
PARTS = {"elbo": "ELBO", "recon": "reconstruction", "kl": "KL"}
ACTIVE = 0.01             # variance of the posterior mean over the data, Burda et al. (2016)
LIMIT = 2 * 2 ** 30       # bytes of one arrays.npz, once unpacked
MARGIN = {"fontsize": 6.5, "color": "0.4"}


# ---------------------------------------------------------------- reading, nothing trusted

@dataclass
class Run:
    """One evaluated model: its checked files, and how it looks in every figure."""
    name: str
    label: str
    metrics: dict
    log: dict
    arrays: dict
    color: str
    marker: str


def read_text(path):
    """str: the file's text. ValueError when it is too large or not text, OSError when missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train and evaluate this model first")
    if path.stat().st_size > 2 ** 26:
        raise ValueError(f"{path} is larger than 64 MB: not a file of this project")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file: write it again") from None


def read_json(path, keys=()):
    """dict: the object in a JSON file. ValueError when it is damaged or lacks one of the keys."""
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as problem:
        raise ValueError(f"{path} is not valid JSON ({problem}): write it again") from None
    missing = set(keys) - set(content) if isinstance(content, dict) else {"a JSON object"}
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: write it again")
    return content


def number(value, where):
    """float: the value. ValueError unless it is a finite number of sane size."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15:
        return float(value)
    raise ValueError(f"{where} is not a finite number")


def words(value, where, limit=300):
    """str: the value on one line, at most `limit` characters. ValueError when it is not a string."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is not a string")
    return " ".join(value.split())[:limit]


def read_metrics(path):
    """dict: metrics.json of evaluate.py, every field that is drawn or printed checked."""
    texts = {"model", "prior", "label", "dataset", "note", "binarize"}
    counts, stats = {"samples", "images", "epochs"}, {"recon", "kl", "elbo", "nll"}
    layers = ("active_units", "latent_dims")
    m = read_json(path, texts | counts | stats | set(layers))
    counts |= {"components"} & set(m)
    stats |= {"kl1", "kl2", "mutual_information", "marginal_kl"} & set(m)
    m |= {key: words(m[key], f"{path}: {key}") for key in texts}
    # Only the name of a user's file: the folders above it are nobody's business in a figure.
    m["dataset"] = m["dataset"].replace("\\", "/").rstrip("/").split("/")[-1]
    for key in counts | {"components_used", "best_epoch"} & set(m):
        m[key] = number(m[key], f"{path}: {key}")
        if key in counts:
            if m[key] < 1 or m[key] % 1:
                raise ValueError(f"{path}: {key} is {m[key]}, not a positive whole number")
            m[key] = int(m[key])
    for key in stats:
        if not isinstance(m[key], dict) or not {"mean", "se"} <= set(m[key]):
            raise ValueError(f"{path}: {key} has no mean and se")
        # a single image has no standard error: evaluate.py then writes null
        m[key] = {part: number(m[key][part] if m[key][part] is not None or part == "mean" else 0,
                               f"{path}: {key}.{part}") for part in ("mean", "se")}
    for key in layers:
        if not isinstance(m[key], dict) or set(m[key]) not in ({"z"}, {"z1", "z2"}) \
                or set(m[key]) != set(m["active_units"]):
            raise ValueError(f"{path}: {key} must have z, or z1 and z2")
        m[key] = {layer: int(number(n, f"{path}: {key}")) for layer, n in sorted(m[key].items())}
    return m


def read_log(path):
    """dict of column -> (epochs,) float64 array; an empty cell is NaN. Nats per image."""
    head, *lines = read_text(path).splitlines() or [""]
    columns, table = head.split(","), []
    if not lines or LOG_COLUMNS - set(columns):
        raise ValueError(f"{path} is not a log of train.py: it needs one epoch at least and "
                         f"the columns {', '.join(sorted(LOG_COLUMNS))}")
    for i, line in enumerate(lines, 2):
        try:
            row = [float(value) if value else math.nan for value in line.split(",")]
        except ValueError:
            row = []
        if len(row) != len(columns) or any(abs(v) > 1e15 for v in row) \
                or math.isnan(row[columns.index("epoch")]):
            raise ValueError(f"{path} is damaged in line {i}: expected {len(columns)} numbers")
        table.append(row)
    return dict(zip(columns, np.array(table).T))


def read_member(file, name, allowed):
    """Array of one member of an open npz file, its size compared before memory is taken."""
    info = file.getinfo(f"{name}.npy")
    with file.open(info) as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
        needed = member.tell() + math.prod(shape) * dtype.itemsize
    if dtype.kind not in "fiub":
        raise ValueError(f"'{name}' holds {dtype}, not numbers")
    if needed != info.file_size or needed > allowed:
        raise ValueError(f"'{name}' of shape {shape} needs {needed:,} bytes, its member has "
                         f"{info.file_size:,} and {allowed:,} are allowed")
    with file.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def read_arrays(path, m):
    """dict of name -> array: what is drawn of arrays.npz, each array fitting the others.

    `m` is metrics.json. One letter per axis: equal letters must mean equal sizes. Errors:
    ValueError that names the array."""
    sizes, top = {"N": m["images"], "2": 2}, list(m["latent_dims"])[-1]
    needed = {"image_shape": "2", "images": "nD", "reconstructions": "nD", "samples": "mD",
              "latent_means": "NZ", "elbo": "N", "recon": "N", "kl": "N", "log_px": "N"}
    for layer, size in m["latent_dims"].items():
        symbol = "Z" if layer == top else "Y"
        sizes[symbol] = size
        needed |= {f"kl_per_dim_{layer}": symbol, f"variance_{layer}": symbol}
    mixture = {"component_mu": "KZ", "component_logvar": "KZ", "component_use": "K"}
    pseudo = {"pseudo_inputs": "pD", "pseudo_samples": "pD", "pseudo_use": "p"}
    if m["prior"] != "standard":
        needed |= mixture | (pseudo if m["prior"] == "vamp" else {})
    known, arrays = {"labels": "N", **mixture, **pseudo, **needed}, {}
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run evaluate.py on this folder first")
    try:
        with zipfile.ZipFile(path) as file:
            for name in (n for n in known if f"{n}.npy" in file.namelist()):
                taken = sum(a.nbytes for a in arrays.values())
                arrays[name] = read_member(file, name, LIMIT - taken)
    except PermissionError:
        raise
    except Exception as problem:  # a damaged archive can raise nearly anything in zipfile, numpy
        raise ValueError(f"{path} is damaged or not an arrays.npz ({problem}): "
                         "run evaluate.py again") from None
    if set(needed) - set(arrays):
        raise ValueError(f"{path} lacks {', '.join(sorted(set(needed) - set(arrays)))}: "
                         "run evaluate.py again")
    sizes["D"] = math.prod(arrays["image_shape"].ravel().tolist())
    for name, a in arrays.items():
        if m["images"] == 1 and name.startswith("variance"):
            a = arrays[name] = np.nan_to_num(a)  # the variance over one image is 0 / 0
        if a.ndim != len(known[name]) or not all(
                n > 0 and sizes.setdefault(s, n) == n for s, n in zip(known[name], a.shape)):
            raise ValueError(f"{path}: '{name}' has shape {a.shape}, which does not fit the other "
                             "arrays and metrics.json: run evaluate.py again")
        if name in ("labels", "image_shape") and a.dtype.kind not in "iu":
            raise ValueError(f"{path}: '{name}' must hold whole numbers")
        if not np.isfinite(a).all():
            raise ValueError(f"{path}: '{name}' holds NaN or infinity")
    return arrays


def read_runs(folders):
    """list of Run: the folders' models in the order given, each with a colour of its own."""
    runs, free = [], dict(LOOKS)
    for folder in folders:
        m = read_metrics(folder / "metrics.json")
        args = read_json(folder / "config.json", ["args"])["args"]
        for key in ("model", "prior"):
            if not isinstance(args, dict) or args.get(key) != m[key]:
                raise ValueError(f"{folder / 'config.json'} does not have the {key} {m[key]} that "
                                 "metrics.json has: files of different runs")
        look = free.pop((m["model"], m["prior"]), None) or SPARE[len(runs) % len(SPARE)]
        runs.append(Run(folder.name, m["label"], m, read_log(folder / "log.csv"),
                        read_arrays(folder / "arrays.npz", m), *look))
    for run, label in zip(runs, distinct_labels([(r.name, r.metrics) for r in runs])):
        run.label = label
    return runs


def distinct_labels(named):
    """list of str: the labels of (folder name, metrics) pairs, with the name if two are equal."""
    labels = [m["label"] for _, m in named]
    return [f"{label} ({name})" if labels.count(label) > 1 else label
            for label, (name, _) in zip(labels, named)]


def model_folders(folder):
    """dict of name -> Path: the subfolders that hold metrics.json, the paper's four first."""
    found = {path.parent.name: path.parent for path in folder.glob("*/metrics.json")}
    return {name: found[name] for name in (*(n for n in ORDER if n in found),
                                           *sorted(set(found) - set(ORDER)))}


# ---------------------------------------------------------------- writing, whole or not at all

def write(path, content):
    """None. Writes bytes so that the file appears whole or keeps what it held before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(fig, path):
    """None. Writes a figure as PNG, cut to its contents."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.06)
    write(path, buffer.getvalue())


def source(runs):
    """str: what the figure was measured on, with the data set's note when there is one."""
    parts = [runs[0].label] if len(runs) == 1 else []
    for m in (run.metrics for run in runs):
        parts.append(f"{m['dataset']}, {m['binarize']} binarisation, {m['images']:,} test images"
                     + (f": {m['note']}" if m["note"] else ""))
    return "   |   ".join(dict.fromkeys(parts))


def panels(rows, columns, width, height, runs, title=""):
    """(Figure, (rows * columns,) array of axes) with the source line beneath."""
    fig = Figure(figsize=(width, height), layout="constrained")
    # below the figure's own area, which the panels fill; save() widens the cut to it
    fig.text(0.006, -0.012, source(runs), va="top", **MARGIN)
    if title:
        fig.suptitle(title, fontsize=9.5)
    return fig, fig.subplots(rows, columns, squeeze=False).ravel()


# ---------------------------------------------------------------- figures of one model

def image_rows(run, name, limit, columns):
    """list of (columns, h, w) arrays: the first images of one member of arrays.npz, row by row."""
    images = run.arrays[name][:limit].astype(float).reshape(-1, *run.arrays["image_shape"])
    return [images[i:i + columns] for i in range(0, len(images), columns)]


def image_grid(blocks, labels, title, runs, path):
    """None. Draws blocks of rows of images, each row (columns, h, w) in [0, 1], under a title.

    `labels` names the rows of a block; between blocks stands a wider gap."""
    rows = [row for block in blocks for row in block]
    columns = max(len(row) for row in rows)
    h, w = (max(row.shape[axis] for row in rows) for axis in (1, 2))
    gap = max(1, h // 14)
    top = [i * (h + gap) + (i // len(blocks[0])) * 3 * gap for i in range(len(rows))]
    canvas = np.ones((top[-1] + h, columns * (w + gap) - gap))
    for y, row in zip(top, rows):
        for x, image in zip(range(0, columns * (w + gap), w + gap), row):
            canvas[y:y + image.shape[0], x:x + image.shape[1]] = image
    width = min(8.6, 0.75 * columns * max(1.0, w / h))
    fig = Figure(figsize=(width, max(0.3, width * canvas.shape[0] / canvas.shape[1])))
    ax = fig.add_axes((0, 0, 1, 1), frameon=False, xticks=[])
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_yticks([y + (h - 1) / 2 for y in top] if labels else [], labels * len(blocks))
    ax.tick_params(length=0)
    ax.set_title(title, loc="left")
    ax.annotate(source(runs), (0, 0), (0, -4), xycoords="axes fraction", va="top",
                textcoords="offset points", **MARGIN)
    save(fig, path)


def draw_reconstructions(run, path):
    """None. Test images above what the model makes of them."""
    blocks = list(zip(*(image_rows(run, name, 48, 16) for name in ("images", "reconstructions"))))
    image_grid(blocks, ["original", "reconstructed"],
               f"{run.label}: test images and their reconstructions", [run], path)


def draw_samples(run, path):
    """None. Samples from the prior, decoded to pixel probabilities."""
    image_grid([image_rows(run, "samples", 96, 16)], [], f"{run.label}: samples from the prior",
               [run], path)


def draw_pseudo_inputs(run, path):
    """None. Learned pseudo-inputs above what each of them generates, most used first.

    A free mixture has no pseudo-inputs: then only what its components generate is drawn."""
    m, use, k = run.metrics, run.arrays["pseudo_use"][:40], len(run.arrays["component_use"])
    rows = {"pseudo_inputs": "pseudo-input", "pseudo_samples": "generates"}
    rows = {name: label for name, label in rows.items() if name in run.arrays}
    title = (f"{run.label}: the {len(use)} most used of {k:,} components, "
             f"{use[0]:.2%} to {use[-1]:.2%} of the images each")
    if "components_used" in m:
        title += f"; {m['components_used'] / k:.0%} of all in use ({m['components_used']:.0f})"
    image_grid(list(zip(*(image_rows(run, name, 40, 20) for name in rows))), list(rows.values()),
               title, [run], path)


def latent_panel(ax, run):
    """dict of text -> artist for a legend. Posterior means on their two main axes, prior over them.

    Components go through the same map; the standard normal stays round, the map being orthonormal.
    """
    z = run.arrays["latent_means"].astype(float)
    centre, scatter = z.mean(0), np.atleast_2d(np.cov(z.T, bias=True))
    _, s, axes = np.linalg.svd(scatter)
    # a latent space of one dimension is drawn on a line
    plane = np.pad(axes[:2], ((0, 2 - len(axes[:2])), (0, 0))).T
    classes, color = np.unique(run.arrays.get("labels", np.zeros(len(z), int)), return_inverse=True)
    tab10, legend = matplotlib.colormaps["tab10"], {}
    ax.scatter(*((z[:6000] - centre) @ plane).T, s=3, lw=0, alpha=0.75, c=tab10(color[:6000] % 10))
    if 1 < len(classes) <= 20:
        legend = {str(c): ax.scatter([], [], s=22, color=tab10(i % 10))
                  for i, c in enumerate(classes)}
    if "component_mu" in run.arrays:
        use = run.arrays["component_use"]
        most = np.argsort(-use)[:1000]
        ring = {"facecolors": "none", "edgecolors": "black", "lw": 0.6}
        ax.scatter(*((run.arrays["component_mu"][most] - centre) @ plane).T,
                   s=1 + 45 * use[most] / max(use.max(), 1e-12), **ring)
        legend["prior component,\narea: its use"] = ax.scatter([], [], s=28, **ring)
    else:
        for radius, style in ((1, "-"), (2, "--")):
            ax.add_patch(Circle(-centre @ plane, radius, fill=False, ls=style))
            legend[f"prior, {radius} sigma"] = ax.plot([], [], "k", ls=style, lw=1)[0]
    ax.autoscale_view()
    ax.set_aspect("equal", adjustable="datalim")
    first, second = s[0] / max(s.sum(), 1e-12), s[1:2].sum() / max(s.sum(), 1e-12)
    ax.set_xlabel(f"principal axis 1 ({first:.0%} of the variance)", fontsize=7.5)
    ax.set_ylabel(f"principal axis 2 ({second:.0%})", fontsize=7.5)
    return legend


def draw_latent(run, path):
    """None. The latent space of one model, coloured by class."""
    fig, (ax,) = panels(1, 1, 6.6, 5, [run])
    legend, n = latent_panel(ax, run), run.metrics["images"]
    ax.set_title(f"{run.label}: posterior means of {min(n, 6000):,} of the {n:,} test images")
    fig.legend(legend.values(), legend, loc="outside right center")
    save(fig, path)


def finish_curves(ax, part, curves):
    """None. Names the axes, and limits y to what follows the first epochs, where curves plunge."""
    late = np.concatenate([v[len(v) // (10 if part == "kl" else 5):] for v in curves])
    late = late[np.isfinite(late)]
    if len(late):
        margin = max(0.06 * np.ptp(late), 0.05)
        ax.set_ylim(late.min() - margin, late.max() + margin)
    ax.set(title=PARTS[part], xlabel="epoch", ylabel="nats per image")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def draw_curves(run, path):
    """None. ELBO, reconstruction and KL over the epochs, training and validation."""
    log, epochs = run.log, run.log["epoch"]
    fig, axes = panels(1, 3, 9.6, 2.9, [run], f"{run.label}: training")
    warm = epochs[log["beta"] < 1]
    for ax, part in zip(axes, PARTS):
        curves = []
        for split, name, color in (("train", "training", "0.55"), ("val", "validation", run.color)):
            for p, style in ((part, "-"), *((("kl1", "--"), ("kl2", ":")) if part == "kl" else ())):
                values = log.get(f"{split}_{p}", epochs * np.nan)
                if np.isfinite(values).any():
                    curves.append(values)
                    ax.plot(epochs, values, style, color=color, lw=1.3, ms=3,
                            marker="o" if len(epochs) < 10 else "",
                            label=name if p == part else f"{name}, {p.upper()}")
        if len(warm):
            ax.axvspan(epochs[0], warm[-1], color="0.93", lw=0, zorder=0, label="KL warm-up")
        if "best_epoch" in run.metrics:
            ax.axvline(run.metrics["best_epoch"], color="black", lw=0.7, label="epoch kept")
        finish_curves(ax, part, curves or [epochs * np.nan])
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    save(fig, path)


def draw_likelihood(run, path):
    """None. Histogram of the per-image log-likelihood with its mean and standard error."""
    values, m = run.arrays["log_px"], run.metrics
    fig, (ax,) = panels(1, 1, 6, 3, [run])
    ax.hist(values, bins=min(80, max(8, len(values) // 25)), color=run.color, alpha=0.75)
    mean, se = -m["nll"]["mean"], m["nll"]["se"]
    ax.axvspan(mean - se, mean + se, color="black", alpha=0.25, lw=0)
    ax.axvline(mean, color="black", lw=1, label=f"mean {mean:.2f}\n± {se:.2f} standard error")
    ax.set(title=f"{run.label}: log-likelihood, importance sampling with S = {m['samples']:,}",
           xlabel="log p(x) (nats per image)", ylabel="test images")
    ax.legend(loc="upper left")
    save(fig, path)


def draw_kl(run, path):
    """None. KL of every latent dimension, largest first, the active ones in colour."""
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
    save(fig, path)


def plot_model(folder):
    """list of Path: the figures of one model, written into its folder."""
    run, = read_runs([folder])
    figures = {"reconstructions": draw_reconstructions, "samples": draw_samples,
               "latent": draw_latent, "likelihood": draw_likelihood, "kl": draw_kl}
    if {"pseudo_use", "pseudo_samples", "component_use"} <= set(run.arrays):
        figures["pseudo_inputs"] = draw_pseudo_inputs
    figures["curves"] = draw_curves     # what make waits for: when it stands, all stand
    for name, draw in figures.items():
        draw(run, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


# ---------------------------------------------------------------- models against each other

def draw_comparison(runs, path):
    """None. Originals in the first row, then one row of reconstructions per model."""
    rows, labels, last = [], [], None
    for run in runs:
        original = image_rows(run, "images", 16, 16)[0]
        # models evaluated on other images get originals of their own
        if last is None or not np.array_equal(original, last):
            rows, labels, last = rows + [original], labels + ["original"], original
        rows += image_rows(run, "reconstructions", 16, 16)
        labels = labels + [run.label]
    image_grid([rows], labels, "Test images and every model's reconstruction", runs, path)


def draw_tradeoff(runs, path):
    """None. Test KL against reconstruction with lines of equal ELBO, and the way there."""
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
        limits += [min(values) - margin, max(values) + margin]
    left, right, low, high = limits
    for level in MaxNLocator(9).tick_values(low - right, high - left):
        ax.plot([left, right], [level + left, level + right], color="0.85", lw=0.7, zorder=0)
        end = min(right, high - level)
        # a label at the very corner would hang out of the frame
        if end > left + 0.1 * (right - left) and level + end > low + 0.05 * (high - low):
            ax.text(end, level + end, f"ELBO {level:g} ", **MARGIN, ha="right", va="top")
    ax.set(xlim=(left, right), ylim=(low, high), xlabel="KL (nats per image)",
           ylabel="reconstruction (nats per image)",
           title="Points: test, with standard errors. Thin lines: validation, epoch by epoch.\n"
                 "Grey lines: equal ELBO; up and to the left is better.")
    fig.legend(loc="outside upper center", ncols=2)
    save(fig, path)


def draw_dynamics(runs, path):
    """None. Validation ELBO, reconstruction and KL of all models over the epochs."""
    fig, axes = panels(1, 3, 9, 3, runs)
    for ax, part in zip(axes, PARTS):
        for run in runs:
            ax.plot(run.log["epoch"], run.log[f"val_{part}"], color=run.color, lw=1.3, ms=3,
                    marker=run.marker if len(run.log["epoch"]) < 10 else "", label=run.label)
        finish_curves(ax, part, [run.log[f"val_{part}"] for run in runs])
        ax.set_title(f"validation {PARTS[part]}")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save(fig, path)


def collapse_message(runs):
    """str: what the recorded numbers say about prior and collapse; the reason only if they do."""
    kinds = {(run.metrics["model"], run.metrics["prior"]): run.metrics for run in runs}
    counts, reasons = [], []
    for model in ("vae", "hvae"):
        plain, vamp = (kinds.get((model, prior)) for prior in ("standard", "vamp"))
        if not plain or not vamp:
            continue
        top = list(plain["latent_dims"])[-1]
        fewer, more = (m["active_units"].get(top, 0) for m in (plain, vamp))
        low, high = ((m.get("marginal_kl") or {"mean": 0})["mean"] for m in (vamp, plain))
        counts.append(f"{fewer} and {more} of {plain['latent_dims'][top]} ({model.upper()}, {top})")
        if fewer < more and 0 < low < high:
            reasons.append(f"{high:.1f} against {low:.1f} nats")
    text = "Active under N(0, I) and under the VampPrior: " + ", ".join(counts) if counts else ""
    if reasons and len(reasons) == len(counts):
        text += (
            "\nThe codes of all images together are not normal, and N(0, I) charges for it "
            f"(marginal KL: {', '.join(reasons)};\nthe VampPrior is a mixture of posteriors). Only "
            "a dimension that tells more than it is charged stays active: under N(0, I) fewer do.")
    return text


def draw_active_units(runs, path):
    """None. Variance of the posterior means per dimension, and what the KL is spent on."""
    fig, (left, right) = panels(1, 2, 9, 4.2, runs)
    fig.supxlabel(collapse_message(runs), x=0.006, ha="left", fontsize=8.5)
    for run in runs:
        for layer, n in run.metrics["active_units"].items():
            v = np.sort(run.arrays[f"variance_{layer}"])[::-1]
            left.plot(np.arange(1, len(v) + 1), np.log10(np.maximum(v, 1e-7)), color=run.color,
                      ls=":" if layer == "z1" else "-", lw=1.2, marker=run.marker, ms=2.5,
                      label=f"{run.label}, {layer}: {n} of {len(v)} active")
    left.axhline(math.log10(ACTIVE), color="black", lw=0.8, ls="--")
    left.text(1, math.log10(ACTIVE), f"active: variance above {ACTIVE}", fontsize=7, va="bottom")
    left.set(xlabel="latent dimension, sorted", title="Which latent dimensions\ncarry information",
             ylabel="log10 variance of the posterior mean")
    split = [r for r in runs if {"mutual_information", "marginal_kl"} <= set(r.metrics)]
    for i, run in enumerate(split):
        info, rest = (run.metrics[key]["mean"] for key in ("mutual_information", "marginal_kl"))
        right.barh(i, info, color=run.color)
        right.barh(i, rest, left=info, color=run.color, alpha=0.35, hatch="///", ec="white")
        right.text(max(info, info + rest), i, f"  {info:.1f} + {rest:.1f}", va="center")
    right.set(yticks=range(len(split)), yticklabels=[run.label for run in split],
              xlabel="nats per image",
              title="KL of the top layer = mutual information\n+ marginal KL (hatched)")
    right.invert_yaxis()
    right.margins(x=0.18)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(fig, path)


def draw_latents(runs, path):
    """None. The latent spaces of all models side by side."""
    columns = min(len(runs), 4 if len(runs) % 3 else 3)
    rows = -(-len(runs) // columns)
    fig, axes = panels(rows, columns, 3 * columns, 3 * rows + 0.9, runs)
    legend = {}
    for ax, run in zip(axes, runs):
        legend |= latent_panel(ax, run)
        ax.set_title(run.label)
    for ax in axes[len(runs):]:
        ax.remove()
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=5 + len(runs))
    save(fig, path)


# ---------------------------------------------------------------- tables

def table(header, rows):
    """str: a Markdown table, first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in line)
                     + " |" for line in lines)


def stat(metrics, key):
    """str: mean and standard error, as in "-81.93 ± 0.24", or "-" when not measured."""
    if key not in metrics:
        return "-"
    form = "{mean:.2f} ± {se:.2f}" if metrics["images"] > 1 else "{mean:.2f}"
    return form.format(**metrics[key])


def results_table(named, extra=()):
    """str: Markdown of (folder name, metrics) pairs, best in bold, what they rest on below.

    `extra` holds more columns as (title, list of str). The bold compares what is printed, so that
    equal figures are all bold; models measured differently are not compared at all."""
    metrics = [m for _, m in named]
    measured = sorted({tuple(m[k] for k in ("dataset", "note", "binarize", "samples", "images"))
                       for m in metrics})
    columns = {"Model": distinct_labels(named)}
    for key, title, best in (("recon", "Recon", max), ("kl", "KL", None), ("elbo", "ELBO", max),
                             ("nll", "NLL", min)):
        means = [round(m[key]["mean"], 2) for m in metrics]
        compare = best and len(measured) == 1 < len(named)
        form = [("**{}**" if compare and mean == best(means) else "{}") for mean in means]
        columns[title] = [f.format(stat(m, key)) for f, m in zip(form, metrics)]
    columns |= dict(extra)
    lines = [table(list(columns), zip(*columns.values())), "",
             "Nats per image, mean ± standard error over images. Recon and ELBO: higher is "
             "better; NLL: lower is better. KL is a cost that buys reconstruction and has no best "
             "by itself, so it is never bold.", ""]
    for dataset, note, binarize, samples, images in measured:
        name = f"{dataset} ({note})" if note else dataset
        lines.append(f"Data: {name}, {binarize} binarisation, {images:,} test images, "
                     f"S = {samples:,}.")
    if len(measured) > 1:
        lines += ["", "**Warning:** these models were evaluated on different data, image counts or "
                  "sample counts S: their figures cannot be compared, so none is bold."]
    return "\n".join(lines)


def diagnostics_table(named):
    """str: Markdown of what the latents carry: active units, KL per layer, split of the KL."""
    metrics = [m for _, m in named]
    columns = {"Model": distinct_labels(named), "Active units": [
        ", ".join(f"{layer} {n} of {m['latent_dims'][layer]}"
                  for layer, n in m["active_units"].items()) for m in metrics]}
    for key, title in (("kl1", "KL1"), ("kl2", "KL2"), ("mutual_information", "Mutual information"),
                       ("marginal_kl", "Marginal KL")):
        if any(key in m for m in metrics):
            columns[title] = [stat(m, key) for m in metrics]
    if any("components_used" in m for m in metrics):
        columns["Components in use"] = [
            f"{m['components_used']:.1f} of {m['components']:,} "
            f"({m['components_used'] / m['components']:.0%})"
            if {"components", "components_used"} <= set(m) else "-" for m in metrics]
    return table(list(columns), zip(*columns.values())) + (
        f"\n\nActive units: variance of the posterior mean over the images above {ACTIVE}. "
        "Mutual information + marginal KL = KL of the top layer; the former is estimated over these "
        "images, so at most the log of their number. Components in use: perplexity of the mean "
        "responsibilities.")


def plot_comparison(folder, models):
    """list of Path: the comparison figures and, last of all, comparison.md."""
    found = model_folders(folder)
    missing = [str(folder / name) for name in models or [] if name not in found]
    if missing or not found:
        where = ", ".join(missing) or f"{folder} and its subfolders"
        raise ValueError(f"no metrics.json in {where}: run evaluate.py on the model first")
    runs = read_runs([found[name] for name in models or found])
    figures = {"comparison": draw_comparison, "tradeoff": draw_tradeoff, "dynamics": draw_dynamics,
               "active_units": draw_active_units, "latents": draw_latents}
    for name, draw in figures.items():
        draw(runs, folder / f"{name}.png")
    named = [(run.name, run.metrics) for run in runs]
    # The table is what make waits for: when it stands, the figures stand.
    text = f"# Comparison\n\n{results_table(named)}\n\n{diagnostics_table(named)}\n"
    write(folder / "comparison.md", text.encode())
    return [folder / f"{name}.png" for name in figures] + [folder / "comparison.md"]


# ---------------------------------------------------------------- README.md

def results_block(folder):
    """str: the results of the recorded runs beside the paper's likelihoods, "" without any."""
    found = model_folders(folder)
    named = [(name, read_metrics(path / "metrics.json")) for name, path in found.items()]
    paper = [PAPER.get((m["model"], m["prior"], m["dataset"], m["binarize"])) for _, m in named]
    minutes = [np.nansum(read_log(path / "log.csv")["seconds"]) / 60 for path in found.values()]
    extra = [("Paper's NLL", [f"{nll:.2f}" if nll else "-" for nll in paper]),
             ("Epochs", [f"{m['epochs']:,}" for _, m in named]),
             ("Training, minutes", [f"{spent:.0f}" for spent in minutes])]
    return f"{results_table(named, extra)}\n\n{diagnostics_table(named)}" if named else ""


def duration(seconds):
    """str: a time with three digits in the unit that fits it."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            break
    return f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds / unit:.3g} {name}"


def speed_block(path):
    """str: the timings of bench.py, one table per section, columns that nobody filled left out."""
    content = read_json(path, ["machine", "torch", "threads", "gflops", "rows"])
    forms = {"plain": ("Plain", duration), "ours": ("Ours", duration),
             "ratio": ("Times faster", "{:.3g}".format), "ratio_low": ("from", "{:.3g}".format),
             "ratio_high": ("to", "{:.3g}".format), "n": ("Repeats", "{:.0f}".format),
             "bound_share": ("Share of the bound", "{:.0%}".format),
             "peak_mb": ("Peak memory", "{:,.0f} MB".format), "error": ("Error", "{:.1e}".format),
             "expected": ("Expected", str)}
    sections = {}
    for row in check_rows(content, path, ("section", "case")):
        for key in forms:
            if row.get(key) is not None and key != "expected":
                number(row[key], f"{path}: {key} of {row['case']!r}")
        if row.get("expected"):     # the rest is for those who open the record
            sections.setdefault(str(row["section"]), []).append(row)
    machine = content["machine"].values() if isinstance(content["machine"], dict) else []
    lines = [f"Measured on {', '.join(map(str, machine))}; torch {content['torch']}, "
             f"{content['threads']} threads; a large matrix product reaches "
             f"{number(content['gflops'], f'{path}: gflops'):.0f} GFLOP/s. "
             "Medians; the record has more cases."]
    for section, rows in sections.items():
        used = {k: form for k, form in forms.items() if any(r.get(k) is not None for r in rows)}
        body = [[r["case"], *("-" if r.get(k) is None else form(r[k])
                              for k, (_, form) in used.items())] for r in rows]
        lines += ["", table([section, *(title for title, _ in used.values())], body)]
    return "\n".join(lines)


def recipe_block(path):
    """str: the recipe's changes with their validation ELBO, spread over seeds where there are."""
    content, body = read_json(path, ["protocol", "rows"]), []
    for row in check_rows(content, path, ("change", "val_elbo", "epochs", "kept")):
        where, values = f"{path}: val_elbo of {row['change']!r}", row["val_elbo"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where} is not a list of numbers")
        elbo = [number(value, where) for value in values]
        spread = f" ± {np.std(elbo, ddof=1):.2f}" if len(elbo) > 1 else ""
        if not row.get("record_only"):      # the table is short; the rest is in the record
            body.append([row["change"], f"{np.mean(elbo):.2f}{spread}", len(elbo), row["epochs"],
                         "yes" if row["kept"] else "no"])
    header = ["Change", "Validation ELBO (± standard deviation)", "Seeds", "Epochs", "Kept"]
    return f"{words(content['protocol'], f'{path}: protocol', 1000)}\n\n{table(header, body)}"


def check_rows(content, path, keys):
    """list of dict: the rows of a recorded file. ValueError unless each has these keys."""
    rows = content["rows"]
    if not isinstance(rows, list) or not rows or any(
            not isinstance(row, dict) or set(keys) - set(row) for row in rows):
        raise ValueError(f"{path} needs rows, each with {', '.join(keys)}")
    return rows


def readme_blocks(assets):
    """dict of block name -> Markdown, for the blocks whose record exists under `assets`."""
    assets = Path(assets)
    blocks = {"results": results_block(assets / "runs"), "paper": results_block(assets / "paper")}
    for name, file, block in (("speed", "bench.json", speed_block),
                              ("recipe", "recipe.json", recipe_block)):
        blocks[name] = block(assets / file) if (assets / file).exists() else ""
    return {name: text for name, text in blocks.items() if text}


def update_readme(path, assets):
    """list of Path: the README, its generated blocks renewed; one without a record is emptied."""
    if not assets.is_dir():
        raise FileNotFoundError(f"{assets} is not a folder: give the records by --assets")
    text, blocks = read_text(path), readme_blocks(assets)
    for name in ("results", "paper", "speed", "recipe"):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != text.count(end) or text.count(begin) > 1 \
                or text.find(end) < text.find(begin):
            raise ValueError(f"{path} needs one '{begin}' and one '{end}' after it, or neither")
        if begin in text:
            head, _, tail = text.partition(begin)
            body = f"\n{blocks[name]}\n" if name in blocks else "\n"
            text = head + begin + body + end + tail.partition(end)[2]
    write(path, text.encode())
    return [path]


# ---------------------------------------------------------------- how long it will take

def expectation(assets, models, jobs, epochs=None, samples=None):
    """str: the time that `models` will need, `jobs` at once, judged by the recorded runs."""
    spans, found = [0.0] * jobs, model_folders(assets / "runs") if assets.is_dir() else {}
    metrics = {name: read_metrics(path / "metrics.json") for name, path in found.items()}
    if missing := [name for name in models if name not in metrics]:
        return f"no recorded run of {', '.join(missing)} tells how long this will take"
    for m in sorted((metrics[name] for name in models), key=lambda m: -m["train_seconds"]):
        span = m["train_seconds"] * (epochs or m["epochs"]) / m["epochs"]
        spans[spans.index(min(spans))] += span + (
            m["seconds"]["all"] * (samples or m["samples"]) / m["samples"])
    return (f"expected: about {max(1, round(max(spans) / 60))} minutes, as on the two cores of "
            "the recorded runs; the progress bars know better")


# ---------------------------------------------------------------- command line

def fail(problem):
    """Never returns: one line on stderr, exit code 2."""
    if isinstance(problem, OSError) and problem.strerror:
        problem = f"{problem.filename or 'writing'}: {problem.strerror}"
    print("error:", " ".join(str(problem).split()) or "out of memory", file=sys.stderr)
    sys.exit(2)


def main():
    """None. Reads the arguments, draws, and prints what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path,
                        help="folder of one evaluated model, or of several")
    parser.add_argument("--models", nargs="+", metavar="NAME",
                        help="which subfolders to compare, in this order (default: all)")
    parser.add_argument("--expect", type=int, metavar="JOBS",
                        help="only say how long --models will take, so many at once")
    parser.add_argument("--epochs", type=int, help="for --expect (default: as recorded)")
    parser.add_argument("--samples", type=int, help="for --expect (default: as recorded)")
    parser.add_argument("--readme", type=Path, help="renew the generated blocks of this file")
    parser.add_argument("--assets", type=Path, default=Path("assets"),
                        help="the recorded runs, for --readme and --expect (default: %(default)s)")
    parser.error = fail
    args = parser.parse_args()
    # SIGTERM then unwinds like Ctrl-C, and no partial file stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.expect:
            print(expectation(args.assets, args.models or [], args.expect, args.epochs,
                              args.samples))
            return
        if (args.folder is None) == (args.readme is None):
            raise ValueError("give either a folder of results or --readme README.md")
        if args.readme:
            paths = update_readme(args.readme, args.assets)
        elif not args.folder.is_dir():
            raise FileNotFoundError(f"{args.folder} is not a folder: give one with results")
        elif (args.folder / "metrics.json").exists() and not args.models:
            paths = plot_model(args.folder)
        else:
            paths = plot_comparison(args.folder, args.models)
    except (ValueError, OSError, MemoryError) as problem:
        fail(problem)
    except KeyboardInterrupt:
        sys.exit(130)
    print("wrote", ", ".join(str(path) for path in paths))


if __name__ == "__main__":
    main()
