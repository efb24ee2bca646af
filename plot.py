"""Figures, drawn without torch from config.json, log.csv, metrics.json and arrays.npz of a run.

    python plot.py results/latest/vamp                  the figures of one model, in its folder
    python plot.py results/latest --models vae vamp     models of a run, or all, side by side
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before matplotlib, whose import takes a second

import io
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from records import ACTIVE, PARTS, binarisation, find_models, measured, read_runs, samples_of, used

# labels come from files, and a dollar sign in one must not start a formula
matplotlib.rcParams.update({
    "text.parse_math": False, "font.size": 8.5, "axes.titlesize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": 7.5, "legend.title_fontsize": 7.5,
    "legend.frameon": False, "lines.linewidth": 1.3, "lines.markersize": 3,
    "savefig.dpi": 150, "savefig.bbox": "tight", "savefig.pad_inches": 0.06})
NATS = "nats per image"
SHOWN = 6000            # points in a latent space; more hide each other
EMBEDDED = 3000         # of them t-SNE, whose time grows fast
MARGIN = {"fontsize": 6.5, "color": "0.4"}
NOT_OF_TEST_IMAGES = "samples shared_z2 film curves dynamics neighbours".split()      # these figures

def source(runs, test=True):
    """The line beneath a figure: the data it shows, with the data set's note if there is one."""
    lines = [f"{m['dataset']}, {binarisation(m['binarize'])}"
             + (f", {m['images']:,} test images" if test else "")
             + (f": {m['note']}" if m["note"] else "") for m in (run.metrics for run in runs)]
    return "   |   ".join(dict.fromkeys(lines))


def panels(rows, columns, width, height, runs, title=None, test=True):
    """(Figure, (rows * columns,) array of axes), inches, with the source line beneath."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.text(0.006, -0.012, source(runs, test), va="top", **MARGIN)   # saving widens the cut to it
    if title:
        fig.suptitle(title, fontsize=9.5)
    return fig, fig.subplots(rows, columns, squeeze=False).ravel()


def images_of(run, rows):
    """(n, h, w) or (n, h, w, 3) images of rows of pixels."""
    return rows.astype(float).reshape(-1, *run.arrays["image_shape"])


def pictures(run, name, limit, columns):
    """(n, h, w) or (n, h, w, 3) images of an array, `limit` at most; of several rows only full
    ones are kept."""
    images = images_of(run, run.arrays[name][:limit])
    return images[:max(columns, len(images) - len(images) % columns)]


def image_grid(blocks, title, runs, columns=16, test=True):
    """Figure of blocks of strips, each (label, images in [0, 1]) wrapped at `columns`; the
    images are (n, h, w) or, in colour, (n, h, w, 3). `test`: whether they are of test images."""
    strips = [strip for block in blocks for _, strip in block]
    if any(strip.ndim == 4 for strip in strips):    # grey ones beside colour: three equal channels
        blocks = [[(label, strip if strip.ndim == 4 else strip[..., None].repeat(3, -1))
                   for label, strip in block] for block in blocks]
        strips = [strip for block in blocks for _, strip in block]
    h, w = (max(strip.shape[axis] for strip in strips) for axis in (1, 2))
    columns, gap = min(columns, max(map(len, strips))), max(1, h // 14)
    rows = sum(-(-len(strip) // columns) for strip in strips)
    canvas = np.ones((rows * (h + gap) + 3 * gap * (len(blocks) - 1) - gap,
                      columns * (w + gap) - gap, *strips[0].shape[3:]))
    top, ticks = 0, {}
    for block in blocks:
        for label, strip in block:
            for i, image in enumerate(strip):
                y, x = top + i // columns * (h + gap), i % columns * (w + gap)
                canvas[y:y + image.shape[0], x:x + image.shape[1]] = image
            ticks[(top + y + h - 1) / 2] = label
            top = y + h + gap
        top += 3 * gap
    width = min(8.6, 0.75 * columns * max(1.0, w / h))
    fig = Figure(figsize=(width, max(0.3, width * canvas.shape[0] / canvas.shape[1])))
    ax = fig.add_axes((0, 0, 1, 1), frameon=False, xticks=[])
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_yticks(list(ticks), ticks.values())
    ax.tick_params(length=0)
    ax.set_title(title, loc="left")
    ax.annotate(source(runs, test), (0, 0), (0, -4), "axes fraction", "offset points", va="top", **MARGIN)
    return fig


def finish_curves(ax, title, part):
    """Names the axes, and limits y to what is usual in each line: first epochs plunge, and bad epochs
    may lie far away."""
    ends = []
    for values in (line.get_ydata() for line in ax.lines):
        late = values[len(values) // (10 if part == "kl" else 5):]
        quarter, three = np.percentile(late, [25, 75])
        ends += late[abs(late - (quarter + three) / 2) <= 2 * (three - quarter)].tolist()   # Tukey's fences
    low, high = min(ends), max(ends)
    margin = max(0.08 * (high - low), 0.05)
    ax.set(title=title, xlabel="epoch", ylabel=NATS, ylim=(low - margin, high + margin))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def mark_warm_up(ax, runs):
    warm = [epoch for run in runs for epoch in run.log["epoch"][run.log["beta"] < 1]]
    if warm:
        ax.axvspan(min(warm) - 0.5, max(warm) + 0.5, color="0.93", lw=0, label="KL warm-up")


def draw_reconstructions(run):
    """Test images above what the model makes of them, 48 in rows of 16."""
    a, b = (pictures(run, name, 48, 16) for name in ("images", "reconstructions"))
    blocks = [[("original", a[i:i + 16]), ("reconstructed", b[i:i + 16])]
              for i in range(0, len(a), 16)]
    return image_grid(blocks, f"{run.label}: test images and their reconstructions", [run])


def draw_pseudo_inputs(run):
    """Learned pseudo-inputs above what each of them generates, most used first, in rows of 20."""
    a, b = (pictures(run, f"pseudo_{name}", 40, 20) for name in ("inputs", "samples"))
    m, use = run.metrics, run.arrays["pseudo_use"][:len(a)]
    title = (f"{run.label}: the {len(a)} most used of {m['components']:,} components, "
             f"{use[0]:.2%} to {use[-1]:.2%} of the images each; "
             f"in use (perplexity): {used(m)}")
    return image_grid([[("pseudo-input", a[i:i + 20]), ("generates", b[i:i + 20])]
                       for i in range(0, len(a), 20)], title, [run], 20)


def draw_film(run):
    """The same pseudo-inputs in the course of training, a row per recorded epoch."""
    strips = [(f"epoch {epoch}", images_of(run, frame))
              for epoch, frame in zip(run.arrays["film_epochs"], run.arrays["film"])]
    return image_grid([strips], f"{run.label}: pseudo-inputs in the course of training", [run], test=False)


def draw_shared_z2(run):
    """Samples in rows that share one draw of z2: what varies in a row is z1's."""
    strips = [(f"z2, draw {i}", images_of(run, row))
              for i, row in enumerate(run.arrays["shared_z2"], 1)]
    return image_grid([strips], f"{run.label}: each row has one z2 from the prior and draws of z1 "
                      "from p(z1 | z2)", [run], test=False)


def draw_curves(run):
    """ELBO, reconstruction and KL over the epochs, training and validation."""
    fig, axes = panels(1, 3, 9.6, 2.9, [run], f"{run.label}: training", test=False)
    log, epochs = run.log, run.log["epoch"]
    for ax, part in zip(axes, PARTS):
        layers = ("", "1", "2") if part == "kl" and run.metrics["model"] == "hvae" else ("",)
        for split, name, color in (("train", "training", "0.55"), ("val", "validation", run.color)):
            for layer, style in zip(layers, ("-", "--", ":")):
                ax.plot(epochs, log[f"{split}_{part}{layer}"], style, color=color,
                        marker="o" if len(epochs) < 10 else "",
                        label=f"{name}, KL{layer}" if layer else name)
        finish_curves(ax, PARTS[part], part)
        mark_warm_up(ax, [run])
        ax.axvline(run.metrics["best_epoch"], color="black", lw=0.7, label="epoch kept")
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
    bits = f"\n{m['bits_per_dim']['mean']:.3f} bits per dimension" if "bits_per_dim" in m else ""
    ax.set(title=f"{run.label}: log-likelihood, importance sampling with S = {samples_of(m)}{bits}",
           xlabel=f"estimated log p(x) ({NATS})", ylabel="test images")
    ax.legend(loc="upper left")
    return fig


def draw_kl(run):
    """KL of every latent dimension, largest first, the active ones in colour."""
    layers = run.metrics["latent_dims"]
    fig, axes = panels(1, len(layers), 6.2 if len(layers) == 1 else 9, 2.9, [run],
                       f"{run.label}: KL per latent dimension")
    for ax, layer in zip(axes, layers):
        kl, variance = (run.arrays[f"{name}_{layer}"] for name in ("kl_per_dim", "variance"))
        kl, active = kl[order := np.argsort(-kl)], variance[order] > ACTIVE
        for on, color, name in ((active, run.color, "active"), (~active, "0.6", "inactive")):
            # an empty set of bars would forget its colour: these have no height instead
            ax.bar(range(1, len(kl) + 1), kl * on, color=color, label=f"{name}: {on.sum()}")
        ax.set(xlabel=f"dimension of {layer}, sorted", ylabel=f"KL ({NATS})")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        ax.legend(title=f"variance of the posterior mean > {ACTIVE}")
    return fig


def draw_comparison(runs):
    """Originals in the first row, then one row of reconstructions per model."""
    strips = []
    for run in runs:
        original = pictures(run, "images", 16, 16)
        if not strips or not np.array_equal(original, last):    # evaluated on other images
            strips.append(("original", last := original))
        strips.append((run.label, pictures(run, "reconstructions", 16, 16)))
    return image_grid([strips], "Test images and every model's reconstruction", runs)


def draw_samples(runs):
    """Samples from the prior, as pixel means, 16 in a row: 64 of one model, 32 of each."""
    shown = 64 if len(runs) == 1 else 32
    return image_grid([[(run.label, pictures(run, "samples", shown, 16))] for run in runs],
                      "Samples from the prior", runs, test=False)


def draw_walks(runs):
    """Straight ways between the latent means of two test images, a row per model."""
    blocks = [[(run.label, images_of(run, run.arrays["walks"][i])) for run in runs
               if i < len(run.arrays["walks"])]
              for i in range(max(len(run.arrays["walks"]) for run in runs))]
    return image_grid(blocks, "From one test image to another: what lies on the straight way "
                      "between their latent means", runs)


def draw_neighbours(runs):
    """Samples above the training images nearest to them."""
    blocks = []
    for run in runs:
        n = len(run.arrays["neighbours"])
        far, usual = (np.median(run.arrays[f"{name}_distance"])
                      for name in ("sample", "reconstruction"))
        blocks.append([(run.label, images_of(run, run.arrays["samples"][:n])),
                       (f"nearest, median distance of {n}: {far:.1f}\n(of reconstructions {usual:.1f})",
                        images_of(run, run.arrays["neighbours"]))])
    return image_grid(blocks, "Samples above the training images nearest to them (Euclidean distance "
                      "of grey values; for comparison, of reconstructed test images)", runs, test=False)


def draw_tradeoff(runs):
    """Test KL against reconstruction with lines of equal ELBO, and the way there."""
    fig, (ax,) = panels(1, 1, 6.4, 4.8, runs)
    seen = {"kl": [], "recon": []}
    for run in runs:
        log, m = run.log, run.metrics
        ax.plot(log["val_kl"], log["val_recon"], color=run.color, lw=0.8, alpha=0.6)
        ax.errorbar(m["kl"]["mean"], m["recon"]["mean"], m["recon"]["se"], m["kl"]["se"],
                    fmt=run.marker, color=run.color, ms=5, capsize=3, elinewidth=1, zorder=5,
                    label=f"{run.label}, ELBO {m['elbo']['mean']:.2f}")
        # the way from far below would leave the ends, which matter, in one corner
        near = log["val_elbo"] > log["val_elbo"].max() - 6
        for part, values in seen.items():
            mean, se = m[part]["mean"], m[part]["se"]
            values += [mean - se, mean + se, *log[f"val_{part}"][near]]
    pads = [max(0.5, 0.07 * np.ptp(values)) for values in seen.values()]
    limits = [(min(values) - pad, max(values) + pad) for values, pad in zip(seen.values(), pads)]
    ax.set(xlim=limits[0], ylim=limits[1], xlabel=f"KL ({NATS})", ylabel=f"reconstruction ({NATS})",
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
    fig, axes = panels(1, 3, 9, 3, runs, test=False)
    for ax, part in zip(axes, PARTS):
        for run in runs:
            ax.plot(run.log["epoch"], run.log[f"val_{part}"], color=run.color, label=run.label,
                    marker=run.marker if len(run.log["epoch"]) < 10 else "")
        finish_curves(ax, f"validation {PARTS[part]}", part)
        mark_warm_up(ax, runs)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


def collapse_message(metrics):
    """A line on N(0, I) against the VampPrior per pair, then what all pairs support: fewer units,
    which have no error, and KL and reconstruction beyond two errors. These are those of different
    images, a cautious choice, as metrics hold no image's values. Units
    and KL are those of the layer that has the prior. Nothing where two models are of one kind."""
    kinds, lines, claims = {(m["model"], m["prior"]): m for m in metrics}, [], []
    if len(kinds) < len(metrics):
        return ""
    for model in ("vae", "hvae"):
        plain, vamp = (kinds.get((model, prior)) for prior in ("standard", "vamp"))
        if plain and vamp and measured(plain) == measured(vamp):
            *_, (top, D) = plain["latent_dims"].items()
            a, b = (m["active_units"][top] for m in (plain, vamp))
            how = "as many" if a == b else "fewer" if a < b else "more"
            lines.append(f"{model.upper()}: {how} units of {top} active under N(0, I), {a} of {D}, "
                         f"{'as' if a == b else 'than'} under the VampPrior, {b};")
            claims.append([a < b])
            for part, what, sign, end in ((kl := top.replace("z", "kl"), kl.upper(), 1, ","),
                                          ("recon", PARTS["recon"], -1, f" {NATS}.")):
                x, y = plain[part], vamp[part]
                lines[-1] += f" {what} {x['mean']:.2f} and {y['mean']:.2f}{end}"
                claims[-1].append(sign * (x["mean"] - y["mean"]) > 2 * math.hypot(x["se"], y["se"]))
    ends = {(True, True, True): ", yet its KL is higher and the reconstruction worse",
            (True, True, False): ", yet its KL is higher",
            (True, False, True): " and the reconstruction is worse"}
    if end := ends.get(tuple(map(all, zip(*claims)))):
        lines.append(f"Under N(0, I) fewer units of the top layer are active{end}.")
    return "\n".join(lines)


def draw_active_units(runs):
    """Variance of the posterior mean per latent dimension, and the KL of each layer."""
    fig, (left, right) = panels(1, 2, 9, 4.2, runs)
    fig.supxlabel(collapse_message([run.metrics for run in runs]), x=0.006, ha="left", fontsize=7.5)
    for i, run in enumerate(runs):
        end, texts = 0, []
        for layer, n in run.metrics["active_units"].items():
            v = np.sort(run.arrays[f"variance_{layer}"])[::-1]
            left.plot(np.arange(1, len(v) + 1), np.log10(np.maximum(v, 1e-7)), color=run.color,
                      ls=":" if layer == "z1" else "-", lw=1.2, marker=run.marker, ms=2.5,
                      label=f"{run.label}, {layer}: {n} of {len(v)} active")
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
              xlabel=f"KL ({NATS})", title="KL per layer")
    right.invert_yaxis()
    right.margins(x=0.5)       # room for the numbers
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def scatter_codes(ax, run, points, legend):
    """The codes (N, 2) of the first test images, coloured by class; fills {class: handle}."""
    labels = run.arrays.get("labels", np.zeros(len(points)))
    classes, color = np.unique(labels, return_inverse=True)
    points, color = points[:SHOWN], color[:min(SHOWN, len(points))]
    tab10 = matplotlib.colormaps["tab10"]
    ax.scatter(*points.T, s=3, lw=0, alpha=0.75, c=tab10(color % 10))
    if 1 < len(classes) <= 20:
        legend |= {str(c): ax.scatter([], [], s=22, color=tab10(i % 10))
                   for i, c in enumerate(classes)}


def draw_latents(runs):
    """Posterior means, coloured by class, and the prior: its density if all models have two latents,
    else its components on the two main axes of the means."""
    if all("plane_box" in run.arrays for run in runs):
        return draw_planes(runs)
    columns = min(len(runs), 4 if len(runs) % 3 else 3)
    rows, size = -(-len(runs) // columns), 5 if len(runs) == 1 else 3
    fig, panes = panels(rows, columns, size * columns, size * rows + 0.9, runs)
    legend, ring = {}, {"facecolors": "none", "edgecolors": "black", "lw": 0.6}
    for ax, run in zip(panes, runs):
        z, (*_, top) = run.arrays["latent_means"].astype(float), run.metrics["latent_dims"]
        centre = z.mean(0)
        _, s, axes = np.linalg.svd(np.atleast_2d(np.cov(z.T, bias=True)))
        share = np.append(s, 0) / max(s.sum(), 1e-12)
        # orthonormal, so N(0, I) stays round; a latent space of one dimension becomes a line
        plane = np.pad(axes[:2], ((0, 2 - len(axes[:2])), (0, 0))).T
        scatter_codes(ax, run, (z - centre) @ plane, legend)
        if "component_mu" in run.arrays:
            use = run.arrays["component_use"]
            most = np.argsort(-use)[:1000]
            ax.scatter(*((run.arrays["component_mu"][most] - centre) @ plane).T,
                       s=45 * use[most] / use.max(), **ring)
            legend["prior component,\narea: its use"] = ax.scatter([], [], s=28, **ring)
        else:
            for radius, style in ((1, "-"), (2, "--")):
                ax.add_patch(Circle(-centre @ plane, radius, fill=False, ls=style))
                legend[f"prior, {radius} sigma"] = ax.plot([], [], "k", ls=style, lw=1)[0]
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel(f"principal axis 1 of {top} ({share[0]:.0%} of the variance)", fontsize=7.5)
        ax.set_ylabel(f"principal axis 2 ({share[1]:.0%})", fontsize=7.5)
        ax.set_title(f"{run.label}\nposterior means of {min(SHOWN, len(z)):,} test images")
    for ax in panes[len(runs):]:
        ax.remove()
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=5 + len(runs))
    return fig


def draw_tsne(runs):
    """Posterior means laid out by t-SNE (van der Maaten and Hinton, 2008), coloured by class."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ValueError("--tsne needs scikit-learn, which is not in requirements.txt: python -m pip "
                         "install scikit-learn") from None
    fig, panes = panels(1, len(runs), 3 * len(runs), 3.8, runs)
    legend = {}
    for ax, run in zip(panes, runs):
        z = run.arrays["latent_means"][:EMBEDDED]
        perplexity = min(30, max(1, len(z) // 4))
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(z)
        scatter_codes(ax, run, points, legend)
        ax.set(title=f"{run.label}\nt-SNE of {len(z):,} posterior means", xticks=[], yticks=[])
    fig.supxlabel("axes have no unit, distances between groups no meaning", fontsize=7.5)
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=10)
    return fig


def draw_planes(runs):
    """Of models with two latents: the prior's log density with the codes on it, the same levels for
    all; beneath or beside it what the points of that plane generate."""
    side, n = len(runs) == 1, len(runs)
    fig, panes = panels(*((1, 2, 9, 4.4) if side else (2, n, 3.2 * n + 0.8, 7.4)), runs)
    top = max(run.arrays["plane_log_prior"].max() for run in runs)
    levels, legend = math.ceil(top) - np.arange(12, -0.5, -1), {}
    for density, grid, run in zip(panes, panes[n:], runs):
        x0, y0, x1, y1 = box = run.arrays["plane_box"].astype(float)
        values = run.arrays["plane_log_prior"].astype(float)
        at = [np.linspace(*ends, len(values)) for ends in ((x0, x1), (y0, y1))]
        shade = density.contourf(*at, values, levels, cmap="Greys", extend="min", alpha=0.7)
        density.contour(*at, values, levels[::2], colors="0.35", linewidths=0.35, linestyles="-")
        scatter_codes(density, run, run.arrays["latent_means"], legend)
        elbo = run.metrics["elbo"]
        density.set_title(f"{run.label}\nELBO {elbo['mean']:.2f} ± {elbo['se']:.2f}")
        tiles, shape = run.arrays["plane_images"].astype(float), run.arrays["image_shape"]
        # whole where the prior is denser than an even spread over the square, else fainter
        share = np.exp(run.arrays["plane_image_log_prior"]) * (x1 - x0) * (y1 - y0)
        tiles = (tiles if len(shape) == 3 else 1 - tiles).reshape(*tiles.shape[:2], *shape)
        share = np.minimum(1, share).reshape(*share.shape, *[1] * len(shape))
        canvas = (1 - share * (1 - tiles))[::-1].swapaxes(1, 2)     # on white
        canvas = canvas.reshape(len(tiles) * shape[0], -1, *shape[2:])
        grid.imshow(canvas, cmap="gray", vmin=0, vmax=1, extent=box[[0, 2, 1, 3]])
        grid.set_title("what the plane generates,\nfainter where the prior is thin")
        for ax in (density, grid):
            ax.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal", xlabel="dimension 1", ylabel="dimension 2")
    fig.colorbar(shade, ax=[*panes] if side else [*panes[:n]], shrink=0.8,
                 label="log p(z), nats" + "; the same levels for all" * (not side))
    fig.legend(legend.values(), legend, loc="outside upper center", ncols=10,
               title="points: posterior means of test images, coloured by class")
    return fig


# The last of each is what make waits for: when it stands, all stand.
MODEL_FIGURES = {
    "reconstructions": draw_reconstructions, "samples": lambda run: draw_samples([run]),
    "pseudo_inputs": draw_pseudo_inputs, "film": draw_film, "shared_z2": draw_shared_z2,
    "latent": lambda run: draw_latents([run]), "likelihood": draw_likelihood, "kl": draw_kl,
    "curves": draw_curves}
COMPARISON_FIGURES = {
    "comparison": draw_comparison, "tradeoff": draw_tradeoff, "dynamics": draw_dynamics,
    "active_units": draw_active_units, "latents": draw_latents,
    "walks": draw_walks, "neighbours": draw_neighbours, "samples": draw_samples}


@files.command
def main(argv=None):
    parser = files.Parser(__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of one evaluated model, or of several")
    parser.add_argument("--tsne", action="store_true",
                        help="draw t-SNE of the latent means too; needs scikit-learn")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these, in this order")
    args = parser.parse_args(argv)
    one = (args.run / "metrics.json").exists() and not args.models
    runs = read_runs([args.run] if one else [*find_models(args.run, args.models).values()])
    figures = {name: draw for name, draw in (MODEL_FIGURES if one else COMPARISON_FIGURES).items()
               if name not in ("pseudo_inputs", "film", "shared_z2") or name in runs[0].arrays}
    if args.tsne:
        figures = {"tsne": (lambda run: draw_tsne([run])) if one else draw_tsne} | figures
    for name, draw in figures.items():
        buffer = io.BytesIO()
        draw(runs[0] if one else runs).savefig(buffer, format="png")
        files.write_atomic(args.run / f"{name}.png", buffer.getvalue())
    m, done = runs[0].metrics, f"{len(figures)} figures"
    files.Line(args.run.absolute().name if one else "").say(
        f"trained, evaluated and drawn: NLL {m['nll']['mean']:.2f} ± {m['nll']['se']:.2f} "
        f"(S = {samples_of(m)}), {done} in {args.run}" if one else f"wrote {done} to {args.run}")


if __name__ == "__main__":
    sys.exit(main())
