"""report.html: the page of a run, made from its recorded files and figures, complete in itself."""
import base64
import html
import math
import struct

import numpy as np

import files
import plot
from records import (BETTER, PARTS, data_lines, latent_columns, latent_notes, measured, results,
                     samples_of, stat, units, units_line, used)

# ------------------------------------------------------------------------ what the numbers say
# Every claim below is of this run. `lead` ranks models only beyond two standard errors of the
# difference image by image: all models see the same test images. Counts of units have no error.


def comparable(runs):
    """Whether these runs were measured alike, on images enough for a standard error."""
    return (len(runs) > 1 and len({measured(run.metrics) for run in runs}) == 1
            and runs[0].metrics["images"] > 1
            and all(np.array_equal(run.arrays["images"], runs[0].arrays["images"]) for run in runs))


def each(runs, text):
    """One phrase on each run, with its name unless it is the only one."""
    return ", ".join(f"{text(run)} ({run.label})" if len(runs) > 1 else text(run) for run in runs)


def lead(runs, key):
    """Who has the best value of a quantity, or that it is open; the values if not comparable."""
    what = PARTS.get(key, key.upper())
    if not comparable(runs):
        return f"Test {what}: {each(runs, lambda run: stat(run.metrics, key))} nats per image."
    def rivalry(run):
        a, b = (r.arrays["log_px" if key == "nll" else key].astype(float) for r in (first, run))
        return (abs(first.metrics[key]["mean"] - run.metrics[key]["mean"]),
                (a - b).std(ddof=1) / math.sqrt(len(a)))
    first, *rest = sorted(runs, key=lambda run: run.metrics[key]["mean"],
                          reverse=BETTER[key] is max)
    # the rival that is hardest to tell from it, which with a large error need not be the next
    rival = min(rest, key=lambda run: rivalry(run)[0] - 2 * rivalry(run)[1])
    far, error = rivalry(rival)
    rank, apart = "best" if rest[1:] else "better", f"{far:.2f} ± {error:.2f}"
    if far > 2 * error:
        return (f"{first.label} has the {rank} test {what}, {stat(first.metrics, key)} nats, {apart} "
                f"ahead of {rival.label} (± standard error of the difference image by image).")
    return (f"{first.label} and {rival.label} are {apart} nats apart in test {what} (± standard error of "
            "the difference image by image): neither is ahead by two of these.")


def prior_lines(runs):
    """What the VampPrior changes: its NLL beside N(0, I)'s, pair by pair, then the collapse."""
    pairs = [[a, b] for a in runs for b in runs if a.metrics["model"] == b.metrics["model"]
             and (a.metrics["prior"], b.metrics["prior"]) == ("standard", "vamp")]
    lines = [lead(pair, "nll") for pair in pairs if comparable(pair)]
    return lines and lines + plot.collapse_message([run.metrics for run in runs]).splitlines()


def trend(run):
    """How the validation ELBO ended: the mean of its last twentieth of epochs less that before."""
    elbo = run.log["val_elbo"]
    n = max(1, len(elbo) // 20)
    if len(elbo) < 2:
        return "one epoch only"
    rise = elbo[-n:].mean() - elbo[-2 * n:-n].mean()
    how = "still rising" if rise > 0.1 else "falling" if rise < -0.1 else "level"
    return f"{rise:+.2f} nats and {how}"


def overfit(run):
    """Training and validation ELBO at the epoch kept."""
    log, m = run.log, run.metrics
    i = np.abs(log["epoch"] - m["best_epoch"]).argmin()
    train, val = log["train_elbo"][i], log["val_elbo"][i]
    return (f"In epoch {log['epoch'][i]:.0f} of {m['epochs']:,} the ELBO is {train:.2f} in "
            f"training and {val:.2f} in validation, {abs(train - val):.2f} nats "
            f"{'worse' if val < train else 'better'}.")


def activity(runs):
    """How many units are active."""
    return f"Active: {each(runs, lambda run: units(run.metrics))}."


def latent(runs):
    """What stands behind the points: the prior's density if all have two latents, or its parts."""
    if all("plane_box" in run.arrays for run in runs):
        return "Behind them is the prior's log density; the images are what the plane generates."
    mixtures = ["component_mu" in run.arrays for run in runs]
    return ("Rings mark the means of the prior's components; a ring's area is its use, not its width. "
            * any(mixtures) + "Circles are N(0, I) at one and two standard deviations. " * (not all(mixtures))
            + "The axes say how much of the variance they show: the rest is not seen.")


def distance(run):
    """How far samples, and for comparison reconstructions, lie from the nearest training image."""
    far, usual = (np.median(run.arrays[f"{name}_distance"]) for name in ("sample", "reconstruction"))
    return f"{far:.1f} beside {usual:.1f} of reconstructed test images"


def most_used(run):
    """What share of the images' responsibility the components in the picture take."""
    n = len(plot.pictures(run, "pseudo_inputs", 40, 20))
    return (f"The {n} shown take {run.arrays['pseudo_use'][:n].sum():.0%} of the test images' "
            f"responsibility; in use are {used(run.metrics)}.")


def spread(run):
    """Where the images' log-likelihoods lie."""
    low, *quarters = np.percentile(run.arrays["log_px"], [0, 25, 75])
    return (f"Half of the test images lie between {quarters[0]:.1f} and {quarters[1]:.1f}, the "
            f"least likely at {low:.1f}.")


# {figure: (what it shows, how to read it, what it shows in this run)}


COMPARED = {
    "comparison": ("Test images above their reconstructions",
                   "Each column is one test image. The originals are one draw of black and white "
                   "pixels, if they are binarised; the rest are pixel means, smooth for that reason.",
                   lambda runs: lead(runs, "recon")),
    "samples": ("Samples from the prior", "Drawn from the prior alone and decoded: the "
                "pixels' means.", lambda runs: lead(runs, "nll")),
    "neighbours": ("Samples above their nearest training images", "A sample equal to the image "
                   "below it would be a copy; one far from all images may be no digit.",
                   lambda runs: f"Median distance to the nearest: {each(runs, distance)}."),
    "latents": ("Latent spaces", "Points are posterior means of test images.", latent),
    "walks": ("Walks between two test images in latent space", "A row is a model's straight way "
              "from the reconstruction on the left to that on the right. Half-way the prior may be thin, "
              "and what is decoded there unlike any image.", lambda runs: ""),
    "dynamics": ("Validation ELBO, reconstruction and KL over the epochs", "The last twentieth of "
                 "the epochs against that before (a level end does not say that a longer training would "
                 "gain nothing: the learning rate has fallen):",
                 lambda runs: f"{each(runs, trend)}."),
    "tradeoff": ("Reconstruction against KL", "Up and to the left is better; along a grey line "
                 "the ELBO is the same.", lambda runs: lead(runs, "elbo")),
    "active_units": ("Variance of the posterior means per latent unit, and KL per layer",
                     "Units below the dashed line hardly depend on the image.", activity)}


OF_MODEL = {
    "pseudo_inputs": ("Pseudo-inputs above what each generates", "Most used first.", most_used),
    "film": ("Pseudo-inputs over the epochs", "The first of them, not the most used; in epoch 0 as they "
             "start.",
             lambda run: f"{run.metrics['epochs']:,} epochs; epoch {run.metrics['best_epoch']:,} kept."),
    "curves": ("Training and validation over the epochs", "Training: the mean of an epoch's steps; "
               "validation: the weights that are kept (averaged ones, unless --ema 0), at its end. "
               "Where validation is worse than training, the model overfits.", overfit),
    "reconstructions": ("Test images above their reconstructions", "",
                        lambda run: lead([run], "recon")),
    "samples": ("Samples from the prior", "Drawn from the prior alone and decoded.",
                lambda run: lead([run], "nll")),
    "latent": ("Latent space", "Points are posterior means of test images.",
               lambda run: latent([run])),
    "likelihood": ("Log-likelihoods of the test images", "", spread),
    "kl": ("KL per latent dimension", "Of the top layer against the prior's one-dimensional marginals, "
           "which under a mixture do not add up to the KL; of z1 against p(z1 | z2).", lambda run: ""),
    "shared_z2": ("Samples that share one z2", "What differs within a row comes from z1 alone, drawn from "
                  "p(z1 | z2).", lambda run: "")}


# what belongs together: (heading, figures of all models, figures of each); more of each comes after
SECTIONS = (("Originals and reconstructions", ["comparison"], []),
            ("Samples", ["samples", "neighbours"], ["shared_z2"]),
            ("Pseudo-inputs", [], ["pseudo_inputs", "film"]),
            ("Latent spaces", ["latents", "walks"], []),
            ("Training", ["dynamics"], ["curves"]),
            ("Reconstruction against KL", ["tradeoff"], []),
            ("Active units", ["active_units"], []))


# --------------------------------------------------------------------------- how it looks

# Nothing may be loaded from outside or run, which the browser enforces too.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1e23; --soft: #59616b; --paper: #fdfdfc;
  --line: #d9dde2; --shade: #f2f4f6; --link: #0a5ca8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a5adb8; --paper: #15181c;
  --line: #363c45; --shade: #1f242a; --link: #7fb8f0; } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, figcaption { max-width: 46rem; }
nav a { display: inline-block; margin-right: 1rem; padding: .3rem 0; color: var(--link); }
.warning { border-left: 4px solid #d55e00; padding: .5rem .9rem; background: var(--shade); }
.note, figcaption, thead, footer { color: var(--soft); font-size: .92rem; }
figure { margin: 1rem 0 2.25rem; }
figcaption { margin-top: .6rem; }
figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; }
.picture { padding: .75rem; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
img { display: block; margin: auto; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
.numbers td { min-width: 6rem; }
.facts th, .facts td { text-align: left; vertical-align: top; }
summary { cursor: pointer; font-weight: 600; padding: .6rem 0; }
@media (max-width: 40rem) { table { font-size: .85rem; } th, td { padding: .4rem .5rem; }
  th:first-child { white-space: normal; position: sticky; left: 0; background: var(--paper); } }
</style>
</head>
<body>
"""


def tag(name, text, **attributes):
    """An element, its text and attributes escaped; a number keeps its error on its line."""
    more = "".join(f' {key}="{html.escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{more}>{html.escape(text)}</{name}>".replace(" ± ", "\u00a0±\u00a0")


def boxed(content, label, kind):
    """Something wide in a box that scrolls by itself, by the keyboard too."""
    return (f'<div class="scroll {kind}" tabindex="0" role="group" '
            f'aria-label="{html.escape(label)}">{content}</div>\n')


def html_table(columns, label, kind="numbers"):
    """An HTML table of (title, cells) pairs; of "facts", what all models share stands once."""
    titles, lines = zip(*columns)
    head, body = "".join(tag("th", title, scope="col") for title in titles), ""
    for first, *rest in zip(*lines):
        cells = rest[:1] if kind == "facts" and len(set(rest)) == 1 else rest
        body += f"<tr>{tag('th', first, scope='row')}" + "".join(
            f'<td colspan="{len(rest) // len(cells)}">'
            f"{tag('strong' if cell[:2] == '**' else 'span', cell.strip('*'))}</td>"
            for cell in cells) + "</tr>\n"
    return boxed(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table>",
                 label, kind)


def facts(folder, m):
    """{what: text} of how one model came about, from config.json and metrics m."""
    config = files.read_json(folder / "config.json", ["args"])
    recipe, seed = config.get("recipe", {}), config["args"].get("seed", "-")
    changed = "".join(f", {flag} {value}" for flag, value in recipe.get("changed", {}).items())
    rates = [f"{flag} {config['args'].get(flag, '-')}" for flag in recipe.get("values", {})
             if flag not in ("epochs", "pseudo_inputs")]        # which have rows of their own
    train, weights, components = (f"{number:,}" if number else "-" for number in (
        config.get("data", {}).get("train"), m.get("parameters"), m.get("components")))
    return {"Data": m["dataset"], "Binarisation": m["binarize"], "Training images": train,
            "Test images": f"{m['images']:,}", "Importance samples, S": samples_of(m),
            "Recipe": recipe.get("name", "-") + changed,
            "Optimisation": ", ".join(rates) or "-", "Seed": str(seed),
            "Epochs": f"{m['epochs']:,}; epoch {m['best_epoch']:,} kept",
            "Training, minutes": f"{m['train_seconds'] / 60:,.1f}",
            "Trained in": m.get("trained_in", "float32"),
            "Parameters": weights, "Prior's components": components,
            "Device": f"{m.get('device', '-')}, threads: {m.get('threads', '-')}",
            "Versions": ", ".join(f"{name} {v}" for name, v in m.get("versions", {}).items()),
            "Date": m.get("date", "-")}


def figure(path, runs, known):
    """The figure at `path` with its caption; "" where plot.py has drawn none."""
    if not path.is_file():
        return ""
    title, how, finding = known[path.stem]
    data, who = path.read_bytes(), ", ".join(run.label for run in runs)
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is damaged: run plot.py again")
    # drawn with 150 dots an inch; on a phone it shrinks no further than its text can be read
    width, height = (side * 3 // 4 for side in struct.unpack(">II", data[16:24]))
    tested = path.stem not in plot.NOT_OF_TEST_IMAGES
    alt = html.escape(f"{title}, of {who}; {plot.source(runs, tested)}")
    image = (f'<img alt="{alt}" width="{width}" height="{height}" '
             f'style="min-width: {width * 3 // 5}px" '
             f'src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    one = known is OF_MODEL
    text = " ".join([how, finding(runs[0] if one else runs)]).strip()
    return (f"<figure>\n{boxed(image, title, 'picture')}<figcaption>"
            f"{tag('b', f'{title}: {who}.' if one else f'{title}.')} {tag('span', text)}"
            "</figcaption>\n</figure>\n")


def sections(folder, folders, runs):
    """[(heading, HTML)] of the figures that are there: those of SECTIONS, then each model's others."""
    def shown(compared, of_model):
        return "".join([figure(folder / f"{name}.png", runs, COMPARED) for name in compared] + [
            figure(path / f"{name}.png", [run], OF_MODEL)
            for path, run in zip(folders, runs) for name in of_model])
    parts = [(heading, shown(*names)) for heading, *names in SECTIONS]
    rest, of_model = "", [name for name in OF_MODEL if not any(name in row[2] for row in SECTIONS)]
    for path, run in zip(folders, runs):
        if more := "".join(figure(path / f"{name}.png", [run], OF_MODEL) for name in of_model):
            rest += f"<details>{tag('summary', run.label)}\n{more}</details>\n"
    return [part for part in (*parts, ("More of each model", rest)) if part[1]]


def page(folder, folders, runs):
    """The report of a run, HTML that needs no other file."""
    named = [(path.name, run.metrics) for path, run in zip(folders, runs)]
    metrics, models = [run.metrics for run in runs], ", ".join(run.label for run in runs)
    columns, data = results(named, metrics), ", ".join({m["dataset"]: 0 for m in metrics})
    came = [facts(path, run.metrics) for path, run in zip(folders, runs)]
    rows = [("", list(came[0])), *((run.label, f.values()) for run, f in zip(runs, came))]
    note, changes = {"class": "note"}, prior_lines(runs)
    numbers = [
        html_table(columns, "Results"),
        tag("p", units_line(metrics) + " Each model was trained once: what another training would "
            "change is not in the standard errors.", **note),
        html_table([columns[0], *latent_columns(metrics)], "What the latents carry"),
        tag("p", latent_notes(metrics), **note),
        tag("h3", "What the prior changes") * bool(changes), *(tag("p", line) for line in changes)]
    parts = [("What was run", html_table(rows, "What was run", "facts")),
             ("Results", "\n".join(numbers)), *sections(folder, folders, runs)]
    links = "\n".join(tag("a", heading, href=f"#part{i}") for i, (heading, _) in enumerate(parts))
    return "".join([
        HEAD.replace("{title}", html.escape(f"Report on {data}: {models}")),
        tag("h1", f"Report on {data}"), tag("p", f"{models}."),
        *(tag("p", line, **{"class": "warning" if line.startswith("Warning: ") else "data"})
          for line in data_lines(metrics)),
        f"\n<nav>{links}</nav>\n<main>\n",
        *(f'<section id="part{i}">\n{tag("h2", heading)}\n{content}</section>\n'
          for i, (heading, content) in enumerate(parts)),
        "</main>\n", tag("footer", "Made by report.py from the files recorded in this folder."),
        "\n</body>\n</html>\n"])
