"""Figures of a run, drawn from its files alone (no torch): metrics.json, log.csv and arrays.npz.

    python plot.py results/latest/vamp          one model
    python plot.py results/latest               all models of a run, side by side

Every figure is a function of a list of runs and stands in the table FIGURES. The first sentence of
its docstring is its title, the others are its caption in report.html.
"""
import collections
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

import files

matplotlib.rcParams.update({
    "text.parse_math": False, "font.size": 8.5, "axes.titlesize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": 7.5, "legend.title_fontsize": 9.5,
    "legend.frameon": False, "lines.markersize": 3, "savefig.dpi": 150, "savefig.bbox": "tight",
    "savefig.format": "png"})
# Okabe and Ito's palette, for colour-blind readers; the markers say it again
LOOKS = {"vae": ("#D55E00", "o"), "fit": ("#000000", "X"), "vamp": ("#0072B2", "s"),
         "mog": ("#CC79A7", "v"), "hvae": ("#E69F00", "^"),
         "hvamp": ("#009E73", "D"), "hmog": ("#56B4E9", "P")}
PARTS = {"elbo": "ELBO", "recon": "reconstruction", "kl": "KL"}
NATS = "nats per image"
SHOWN = 5000        # points in a latent space, at most; more hide each other
Run = collections.namedtuple("Run", "label metrics log arrays color marker")


def place(name):
    """Sorting key of a model's folder: the order of LOOKS, then other names by alphabet."""
    return (list(LOOKS).index(name) if name in LOOKS else len(LOOKS), name)


def full_label(name, metrics):
    """A model's label, with the name of its folder where that is one of the user's own."""
    return metrics["label"] if name in LOOKS else f"{metrics['label']} ({name})"


def plus_minus(mean, se, digits=2):
    """Such as 82.10 ± 0.26, or the mean alone for a single image, which has no error."""
    return f"{mean:.{digits}f}" if se is None else f"{mean:.{digits}f} ± {se:.{digits}f}"


def read_runs(folder):
    """The evaluated models in a run's folder, or the one model whose folder it is."""
    paths = {path.parent.name: path.parent for path in folder.glob("*/metrics.json")}
    if (folder / "metrics.json").exists():
        paths = {folder.resolve().name: folder}
    if not paths:
        raise ValueError(f"no metrics.json in {folder}: run evaluate.py first")
    runs = []
    for name in sorted(paths, key=place):
        metrics = json.loads((paths[name] / "metrics.json").read_text())
        log = np.genfromtxt(paths[name] / "log.csv", delimiter=",", names=True, ndmin=1)
        color, marker = LOOKS.get(name, (f"C{len(runs)}", "X"))
        runs.append(Run(full_label(name, metrics), metrics, log,
                        dict(np.load(paths[name] / "arrays.npz")), color, marker))
    return runs


def title_and_caption(function):
    """A figure's title and caption, from its function's docstring."""
    title, _, caption = " ".join(function.__doc__.split()).partition(". ")
    return title, caption


def source(runs, of_test):
    """The line beneath a figure: the data that it shows."""
    lines = []
    for m in (run.metrics for run in runs):
        tested = f", {m['images']:,} test images" if of_test else ""
        lines.append(f"{m['dataset']}, binarisation: {m['binarize']}{tested}")
    return "   |   ".join(dict.fromkeys(lines))


def panels(n, width, height, columns=4):
    """A figure of n panels of `width` by `height` inches in rows of `columns`, and their axes."""
    columns = min(n, columns)
    rows = -(-n // columns)
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.remove()
    return fig, axes[:n]


def images_of(run, name):
    """An array of pixels (..., D) as images (..., h, w, 3); a grey one has three equal colours."""
    pixels, shape = run.arrays[name].astype(float), run.arrays["image_shape"]
    images = pixels.reshape(*pixels.shape[:-1], *shape)
    return images if len(shape) == 3 else images[..., None].repeat(3, -1)


def strips(blocks, columns=16):
    """A figure of blocks of strips, each (label, images (n, h, w, 3)) and wrapped at `columns`."""
    everything = [images for block in blocks for _, images in block]
    columns = min(columns, max(map(len, everything)))
    h, w = (max(images.shape[axis] for images in everything) for axis in (1, 2))
    gap = max(1, h // 14)
    parts, labels = [], {}
    for block in blocks:
        for label, images in block:
            n, own_h, own_w, _ = images.shape
            white = [(0, -n % columns), (0, h - own_h + gap), (0, w - own_w + gap), (0, 0)]
            images = np.pad(images, white, constant_values=1)
            # (rows, columns, h, w, 3) -> (rows * h, columns * w, 3)
            images = images.reshape(-1, columns, h + gap, w + gap, 3).swapaxes(1, 2)
            images = images.reshape(-1, columns * (w + gap), 3)
            labels[sum(map(len, parts)) + (len(images) - gap - 1) / 2] = label
            parts.append(images)
        parts.append(np.ones((2 * gap, columns * (w + gap), 3)))
    canvas = np.concatenate(parts[:-1])[:-gap, :-gap]
    width = min(8.6, 0.75 * columns * max(1, w / h))
    fig = Figure(figsize=(width, max(0.3, width * canvas.shape[0] / canvas.shape[1])))
    ax = fig.add_axes((0, 0, 1, 1), frameon=False, xticks=[])
    ax.imshow(canvas, interpolation="nearest", aspect="auto")
    ax.set_yticks(list(labels), labels.values())
    ax.tick_params(length=0)
    return fig


def scatter(ax, run, points, legend):
    """Points (N, 2) of test images, coloured by class; adds the classes to `legend`, if 2 to 20."""
    shown = np.sort(np.random.default_rng(0).permutation(len(points))[:SHOWN])
    labels = run.arrays.get("labels", np.zeros(len(points), int))[shown]
    classes, index = np.unique(labels, return_inverse=True)
    colors = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    ax.scatter(*points[shown].T, s=3, lw=0, alpha=0.75, color=colors(index % colors.N))
    if 1 < len(classes) <= 20:
        for i, name in enumerate(classes):
            legend[str(name)] = ax.scatter([], [], s=22, color=colors(i))


def reconstructions(runs):
    """Test images and their reconstructions. Binarised originals are one draw of their
    pixels. Reconstructions are the pixels' means, and smooth for that reason."""
    n = 48 if len(runs) == 1 else 16
    blocks = []
    for i in range(0, min(n, max(len(run.arrays["images"]) for run in runs)), 16):
        block, last = [], None
        for run in runs:
            originals = images_of(run, "images")[i:i + 16]
            if not np.array_equal(originals, last):     # the first, or a model of other data
                block.append(("original", originals))
            block.append((run.label, images_of(run, "reconstructions")[i:i + 16]))
            last = originals
        blocks.append(block)
    return strips(blocks)


def samples(runs):
    """Samples from the prior. Each is shown as the means of its pixels."""
    n = 64 if len(runs) == 1 else 32
    return strips([[(run.label, images_of(run, "samples")[:n])] for run in runs])


def pseudo_inputs(runs):
    """Pseudo-inputs, and below each an image that it generates. The most used ones come first. An
    image is decoded from a draw of the encoder's posterior at the pseudo-input."""
    n = 40 if len(runs) == 1 else 20
    blocks = []
    for run in runs:
        u, x = images_of(run, "pseudo_inputs")[:n], images_of(run, "pseudo_samples")[:n]
        for i in range(0, len(u), 20):
            blocks.append([(run.label, u[i:i + 20]), ("generates", x[i:i + 20])])
    return strips(blocks, 20)


def neighbours(runs):
    """Samples, and below each the nearest training image. A memorised image would be equal to its
    neighbour. Distances are Euclidean. For comparison: of reconstructed test images."""
    blocks = []
    for run in runs:
        far = np.median(run.arrays["sample_distance"])
        usual = np.median(run.arrays["reconstruction_distance"])
        below = f"nearest, median distance {far:.1f}\n(of reconstructions {usual:.1f})"
        blocks.append([(run.label, images_of(run, "samples")[:16]),
                       (below, images_of(run, "neighbours"))])
    return strips(blocks)


def usual_limits(lines):
    """Limits for an axis without each line's first epochs and outliers, which lie far away."""
    usual = []
    for line in lines:
        late = line.get_ydata()[len(line.get_ydata()) // 5:]
        low, high = np.percentile(late, [25, 75])
        usual.extend(late[abs(late - (low + high) / 2) <= 2 * (high - low)])    # Tukey's fences
    pad = 0.1 * np.ptp(usual) + 0.05
    return min(usual) - pad, max(usual) + pad


def curves(runs):
    """ELBO, reconstruction and KL in the course of training. Validation uses the averaged weights.
    A fitted mixture has the curves of its VAE. A single model's figure adds training (grey), each
    layer's KL and the epoch that is kept."""
    alone = len(runs) == 1
    lines = [("val", run.label, run.color, run) for run in runs]
    if alone:
        lines = [("train", "training", "0.55", runs[0]),
                 ("val", "validation", runs[0].color, runs[0])]
    fig, axes = panels(3, 3.2, 3)
    for ax, (part, title) in zip(axes, PARTS.items()):
        for split, name, color, run in lines:
            layers = {"": "-"}
            if alone and part == "kl" and run.metrics["model"] == "hvae":
                layers = {"": "-", "1": "--", "2": ":"}
            for layer, style in layers.items():
                ax.plot(run.log["epoch"], run.log[f"{split}_{part}{layer}"], style, color=color,
                        marker=run.marker if len(run.log) < 10 else "",
                        label=f"{name}, KL{layer}" if layer else name)
        ax.set(title=title if alone else f"validation {title}", xlabel="epoch", ylabel=NATS,
               ylim=usual_limits(ax.lines))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        warm_up = max(np.sum(run.log["beta"] < 1) for run in runs)      # epochs
        if warm_up:
            ax.axvspan(0.5, warm_up + 0.5, color="0.94", label="KL warm-up")
        if alone:
            ax.axvline(runs[0].metrics["best_epoch"], color="black", lw=0.7, label="epoch kept")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


def tradeoff(runs):
    """Reconstruction against KL. Points: test images, with standard errors. Thin lines: validation
    over the epochs (a fitted mixture has its VAE's). Along a grey line the ELBO is the same; up and
    to the left is better."""
    fig, (ax,) = panels(1, 6.4, 4.8)
    seen = []       # what the limits must hold: (KL, reconstruction)
    for run in runs:
        log, kl, recon = run.log, run.metrics["kl"], run.metrics["recon"]
        ax.plot(log["val_kl"], log["val_recon"], color=run.color, lw=0.8, alpha=0.6)
        ax.errorbar(kl["mean"], recon["mean"], recon["se"], kl["se"], fmt=run.marker,
                    color=run.color, ms=5, capsize=3, elinewidth=1,
                    label=f"{run.label}, ELBO {run.metrics['elbo']['mean']:.2f}")
        for sign in (-1, 1):
            seen.append([m["mean"] + sign * (m["se"] or 0) for m in (kl, recon)])
        near = log["val_elbo"] > log["val_elbo"].max() - 6      # the first epochs lie far away
        seen.extend(np.column_stack([log["val_kl"], log["val_recon"]])[near])
    pad = np.maximum(0.5, 0.1 * np.ptp(seen, axis=0))
    (x0, y0), (x1, y1) = np.min(seen, axis=0) - pad, np.max(seen, axis=0) + pad
    for elbo in MaxNLocator(9).tick_values(y0 - x1, y1 - x0):
        x = min(x1, y1 - elbo)      # where the line recon = KL + ELBO leaves the panel
        if x > x0 and x + elbo > y0:
            ax.axline((x, x + elbo), slope=1, color="0.85", lw=0.7, zorder=0)
            ax.text(x, x + elbo, f" ELBO {elbo:g}", fontsize=6.5, color="0.4")
    ax.set(xlim=(x0, x1), ylim=(y0, y1), xlabel=f"KL ({NATS})", ylabel=f"reconstruction ({NATS})")
    fig.legend(loc="outside upper center", ncols=2)
    return fig


def active_units(runs):
    """Which latent units carry information. Left: variance of each unit's posterior mean over the
    test images. A unit below the dashed line hardly depends on the image. The line was made for
    N(0, I); under a learned prior the scale of z is free. Right: the KL of each layer, light for
    z1."""
    fig, (left, right) = panels(2, 4.5, 4)
    for i, run in enumerate(runs):
        end, texts = 0, []
        for layer, n in run.metrics["active_units"].items():
            v = np.sort(run.arrays[f"variance_{layer}"])[::-1]
            style, alpha = (":", 0.5) if layer == "z1" else ("-", 1)
            left.plot(np.arange(1, len(v) + 1), np.log10(v.clip(1e-7)), style, color=run.color,
                      marker=run.marker, label=f"{run.label}, {layer}: {n} of {len(v)} active")
            kl = run.metrics[layer.replace("z", "kl")]["mean"]
            right.barh(i, kl, left=end, color=run.color, alpha=alpha)
            texts.append(f"{layer} {kl:.1f}")
            end += kl
        right.text(end, i, "  " + " + ".join(texts), va="center")
    line = runs[0].metrics["active_above"]
    left.axhline(np.log10(line), color="black", lw=0.8, ls="--", label=f"active above {line}")
    left.set(xlabel="latent unit, sorted", ylabel="log10 variance of the posterior mean")
    right.set(yticks=range(len(runs)), yticklabels=[run.label for run in runs],
              xlabel=f"KL of each layer ({NATS})")
    right.invert_yaxis()
    right.margins(x=0.5)        # room for the numbers
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def latents(runs):
    """Latent spaces. Points are posterior means of test images, 5,000 at most, coloured by class,
    on the two directions in which they vary most. A ring is a component of the prior, and its area
    is the component's use. Circles are N(0, I) at one and two standard deviations."""
    size = 5 if len(runs) == 1 else 3.2
    fig, axes = panels(len(runs), size, size + 0.6)
    legend, ring = {}, {"facecolors": "none", "edgecolors": "black", "lw": 0.6}
    for ax, run in zip(axes, runs):
        z = run.arrays["latent_means"].astype(float)                # (N, D)
        centre = z.mean(0)
        _, s, directions = np.linalg.svd(z - centre, full_matrices=False)
        plane = np.zeros((z.shape[1], 2))                           # one latent makes a line
        plane[:, :len(directions)] = directions[:2].T
        share = np.append(s**2, 0) / max((s**2).sum(), 1e-12)
        scatter(ax, run, (z - centre) @ plane, legend)
        if "component_mu" in run.arrays:
            most = np.argsort(-run.arrays["component_use"])[:1000]
            use, mu = run.arrays["component_use"][most], run.arrays["component_mu"][most]
            ax.scatter(*((mu - centre) @ plane).T, s=45 * use / use.max(), **ring)
            legend["prior component,\narea: its use"] = ax.scatter([], [], s=28, **ring)
        else:
            for radius, style in ((1, "-"), (2, "--")):
                ax.add_patch(Circle(-centre @ plane, radius, fill=False, ls=style))
                legend[f"prior, {radius} sigma"] = ax.plot([], [], "k", ls=style, lw=1)[0]
        end = np.abs([ax.get_xlim(), ax.get_ylim()]).max()
        ax.set(xlim=(-end, end), ylim=(-end, end), aspect="equal", title=run.label,
               xlabel=f"principal axis 1 ({share[0]:.0%} of the variance)",
               ylabel=f"principal axis 2 ({share[1]:.0%})")
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=5 + len(runs))
    return fig


def planes(runs):
    """The prior of two latents. Above: the prior's log density, with the same levels for all, and
    the posterior means of test images, 5,000 at most, coloured by class. Below: what the points of
    the plane generate, fainter where the prior is thin."""
    n = len(runs)
    fig, axes = panels(2 * n, 4.4 if n == 1 else 3.5, 3.7, n)
    top = max(run.arrays["plane_log_prior"].max() for run in runs)
    levels, legend = np.ceil(top) - np.arange(12, -0.5, -1), {}
    for ax, grid, run in zip(axes, axes[n:], runs):
        x0, y0, x1, y1 = run.arrays["plane_box"]
        values = run.arrays["plane_log_prior"]                      # (points, points)
        at = np.linspace(x0, x1, len(values)), np.linspace(y0, y1, len(values))
        shade = ax.contourf(*at, values, levels, cmap="Greys", extend="min", alpha=0.7)
        ax.contour(*at, values, levels[::2], colors="0.35", linewidths=0.35, linestyles="-")
        scatter(ax, run, run.arrays["latent_means"], legend)
        ax.set(title=f"{run.label}\nELBO {plus_minus(**run.metrics['elbo'])}")
        tiles = images_of(run, "plane_images")                      # (m, m, h, w, 3)
        if len(run.arrays["image_shape"]) == 2:     # black on white
            tiles = 1 - tiles
        # whole where the prior is denser than an even spread over the square, else fainter
        share = np.exp(run.arrays["plane_image_log_prior"]) * (x1 - x0) * (y1 - y0)
        tiles = 1 - share.clip(0, 1)[..., None, None, None] * (1 - tiles)
        m, _, h, w, _ = tiles.shape
        canvas = tiles[::-1].swapaxes(1, 2).reshape(m * h, m * w, 3)    # row 0 is at the bottom
        grid.imshow(canvas, extent=(x0, x1, y0, y1))
        for part in (ax, grid):
            part.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal", xlabel="dimension 1",
                     ylabel="dimension 2")
    fig.colorbar(shade, ax=axes, shrink=0.45, anchor=(0, 1), label="log p(z), nats")
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=10)
    return fig


FIGURES = {     # file name: function, array without which there is none, whether of test images
    "reconstructions": (reconstructions, "images", True),
    "samples": (samples, "samples", False),
    "pseudo_inputs": (pseudo_inputs, "pseudo_inputs", True),
    "neighbours": (neighbours, "neighbours", False),
    "planes": (planes, "plane_box", True),
    "latents": (latents, "latent_means", True),
    "active_units": (active_units, "latent_means", True),
    "tradeoff": (tradeoff, "images", True),
    "curves": (curves, "images", False)}        # the last: make waits for it


def draw(name, runs):
    """A figure, or None if no run has what it shows."""
    function, needed, of_test = FIGURES[name]
    runs = [run for run in runs if run.arrays.get(needed, np.zeros(0)).size]
    if not runs:
        return None
    fig, (title, _) = function(runs), title_and_caption(function)
    if len(runs) == 1:
        title = f"{title}: {runs[0].label}"
    for legend in fig.legends:          # saving would move a legend onto a title above it
        legend.set_title(title)
    fig.draw_without_rendering()        # so that the layout is settled
    height, box = fig.get_figheight(), fig.get_tightbbox()      # both in inches
    if not fig.legends:
        fig.text(0, (box.y1 + 0.1) / height, title, fontsize=9.5)
    fig.text(0, (box.y0 - 0.05) / height, source(runs, of_test), size=6.5, color="0.4", va="top")
    return fig


@files.friendly
def main(argv=None):
    p = files.parser(__doc__)
    p.add_argument("run", type=Path, help="folder of one evaluated model, or of several")
    args = p.parse_args(argv)
    runs = read_runs(args.run)
    for name in FIGURES:
        fig = draw(name, runs)
        if fig:
            files.write_atomic(args.run / f"{name}.png", fig.savefig)


if __name__ == "__main__":
    main()
