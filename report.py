"""Tables and the page of a run, from its recorded files alone.

    python report.py results/latest                     comparison.md and report.html, of all models
                                                        or of --models
    python report.py --expect 2 --models vae vamp       how long these take, two at once
    python report.py --docs README.md RESULTS.md        their generated blocks, from assets/
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before matplotlib, whose import takes a second

import base64
import html
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np

import plot

# Test NLL on dynamically binarised MNIST in Tomczak & Welling (2018), Table 1.
PAPER = {("vae", "standard"): 84.50, ("vae", "vamp"): 82.38,
         ("hvae", "standard"): 82.42, ("hvae", "vamp"): 81.24}
BETTER = {"recon": max, "elbo": max, "nll": min, "bits_per_dim": min}    # a KL by itself is neither good nor bad
UNITS = ("Nats per image, mean ± standard error over the test images. Lower NLL is better; higher "
         "Recon and ELBO are.")


def table(columns):
    """A Markdown table of (title, cells) pairs, first column to the left, others to the right."""
    titles, cells = zip(*columns)
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *zip(*cells)]
    return "\n".join("| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in line)
                     + " |" for line in lines)


def plain(columns):
    """The same table for a terminal: columns aligned, nothing bold."""
    lines = [[" ".join(c.split()).replace("**", "") for c in line] for line in zip(*(
        [title, *cells] for title, cells in columns))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
                     for first, *rest in lines)


def stat(m, key):
    """Mean ± standard error of one quantity in metrics m; "-" where it was not measured."""
    se = f" ± {m[key]['se']:.2f}" if m and key in m and m["images"] > 1 else ""
    return f"{m[key]['mean']:.2f}{se}" if m and key in m else "-"


def stats(key, metrics):
    """The column of one quantity, best as printed in bold if measured alike. None: not run."""
    known = [m for m in metrics if m and key in m]
    means = [round(m[key]["mean"], 2) for m in known]
    alike = len(known) > 1 and len(set(map(plot.measured, known))) == 1
    best = BETTER[key](means) if key in BETTER and alike else None
    return [f"**{stat(m, key)}**" if m in known and round(m[key]["mean"], 2) == best else stat(m, key)
            for m in metrics]


def paper(m):
    """The paper's test NLL of this model, "-" for other data than the paper's."""
    alike = m and (m["dataset"], m["binarize"]) == ("mnist", "dynamic")
    value = PAPER.get((m["model"], m["prior"])) if alike else None
    return f"{value:.2f}" if value else "-"


def minutes(m):
    """How long training took, in whole minutes."""
    return f"{m['train_seconds'] / 60:.0f}" if m else "-"


def results(named, metrics):
    """Columns: the labels of (folder name, metrics) pairs and four results of each in `metrics`;
    bits per dimension, NLL / (D log 2), where a likelihood of grey levels has them."""
    bits = any(m and "bits_per_dim" in m for m in metrics)
    return [("Model", plot.distinct_labels(named)), *(
        (title, stats(title.lower(), metrics)) for title in ("Recon", "KL", "ELBO", "NLL"))] + [
        ("Bits/dim", stats("bits_per_dim", metrics))] * bits


def data_lines(named):
    """Lines that say what the numbers of these models rest on."""
    kinds = {}
    for _, m in named:
        kinds.setdefault(plot.measured(m), set()).add(m.get("trained_in", "float32"))
    lines = [f"{dataset}{f' ({note})' if note else ''}, {binarize} binarisation, {images:,} test "
             f"images, S = {samples:,}, trained in {' and '.join(sorted(precisions))}."
             for (dataset, note, binarize, samples, images), precisions in kinds.items()]
    return lines + ["Warning: measured on different data, numbers of images or S, so these cannot "
                    "be compared and none is bold."] * (len(kinds) > 1)


def units(m):
    """How many units of each layer are active."""
    return ", ".join(f"{layer} {n} of {m['latent_dims'][layer]}"
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
    text = (f"Active units: variance of the posterior mean over the images above {plot.ACTIVE}. "
            "Components in use: perplexity of the mean responsibilities.")
    probed = any(m.get(key) is not None for m in metrics
                 for key in ("probe_accuracy", "knn_accuracy"))
    return text + (" Linear probe, k-NN: share of images whose class is read from the latents "
                   "rightly, ± binomial standard error.") * probed


def full_tables(named, record=False):
    """Markdown: results (of a record, more), what they rest on, and what the latents carry."""
    metrics = [m for _, m in named]
    columns = results(named, metrics)
    if record:
        columns += [("Paper's NLL", map(paper, metrics)),
                    ("Epochs", [f"{m['epochs']:,}" for m in metrics]),
                    ("Training, minutes", map(minutes, metrics))]
    notes = "\n".join(f"- {line}" for line in [*data_lines(named), UNITS])
    latents = [columns[0], *latent_columns(metrics)]
    return "\n\n".join([table(columns), notes, table(latents), latent_notes(metrics)])


def read_named(folder, names=None):
    """[(folder name, metrics)] of the models under a folder."""
    return [(name, plot.read_metrics(path / "metrics.json"))
            for name, path in plot.find_models(folder, names).items()]


def results_block(runs, long):
    """Markdown: one table of the short runs and the long ones, given as {folder name: metrics}."""
    names = [n for n in plot.ORDER if n in runs or n in long]
    names += sorted({*runs, *long} - set(names))
    short, full = ([part.get(name) for name in names] for part in (runs, long))
    columns = results([(name, a or b) for name, a, b in zip(names, short, full)], short) + [
        ("Training, minutes", map(minutes, short)), ("NLL of `make paper`", stats("nll", full)),
        ("Training, minutes", map(minutes, full)),
        ("Paper's NLL", [paper(b or a) for a, b in zip(short, full)])]
    lines = [f"{name}: {line}" for name, part in (("`make all`", runs), ("`make paper`", long))
             for line in data_lines(part.items())]
    return "\n".join([table(columns), "", *(f"- {line}" for line in [*lines, UNITS])])


def duration(seconds):
    """A time with three digits in the unit that fits it."""
    unit, name = (1, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds / unit:.3g} {name}"


def speed_block(path):
    """Markdown of bench.py's timings, a table per section, without columns that nobody filled."""
    forms = {"plain": ("Plain", duration), "ours": ("Ours", duration),
             "ratio": ("Times faster", "{:.3g}".format), "ratio_low": ("from", "{:.3g}".format),
             "ratio_high": ("to", "{:.3g}".format), "n": ("Repeats", "{:.0f}".format),
             "bound_share": ("Share of the bound", "{:.0%}".format),
             "peak_mb": ("Peak memory", "{:,.0f} MB".format), "error": ("Error", "{:.1e}".format),
             "expected": ("Expected", str)}
    with plot.reading(path, "bench.py"):
        content, sections = json.loads(path.read_text(encoding="utf-8")), {}
        for row in content["rows"]:
            # a ratio without a plain form compares ours with ours: it is no speed-up
            growth = row.get("ratio") is not None and row.get("plain") is None
            if row.get("expected"):     # the rest is for those who open the record
                sections.setdefault("growth" if growth else row["section"], []).append(row)
        parts = [f"Measured on {', '.join(content['machine'].values())}; torch {content['torch']}, "
                 f"{content['threads']} threads; a large matrix product reaches "
                 f"{content['gflops']:.0f} GFLOP/s. Medians; the record has more cases."]
        for section, rows in sorted(sections.items(), key=lambda item: item[0] == "growth"):
            columns = [(section, [row["case"] for row in rows])]
            for key, (title, form) in forms.items():
                title = "Growth" if (section, key) == ("growth", "ratio") else title
                if any(row.get(key) is not None for row in rows):
                    columns.append((title, ["-" if row.get(key) is None else form(row[key])
                                            for row in rows]))
            parts.append(table(columns))
    return "\n\n".join(parts)


def recipe_block(path):
    """Markdown of the recipe's changes: validation ELBO, with its spread over seeds."""
    with plot.reading(path, "the tries"):
        content, rows = json.loads(path.read_text(encoding="utf-8")), []
        for row in content["rows"]:
            elbo = row["val_elbo"]
            spread = f" ± {np.std(elbo, ddof=1):.2f}" if len(elbo) > 1 else ""
            if not row.get("record_only"):      # the table is short; the rest is in the record
                rows.append((row["change"], f"{np.mean(elbo):.2f}{spread}", len(elbo),
                             row["epochs"], "yes" if row["kept"] else "no"))
        titles = "Change", "Validation ELBO (± standard deviation)", "Seeds", "Epochs", "Kept"
        return content["protocol"] + "\n\n" + table(zip(titles, zip(*rows)))


def plane_block(named):
    """A line of Markdown: the ELBOs of the models with two latents."""
    elbos = ", ".join(f"{m['label']} {stat(m, 'elbo')}" for _, m in named)
    return f"Test ELBO after {named[0][1]['epochs']} epochs, one seed: {elbos} nats per image."


def blocks(assets):
    """{name: Markdown} of every block; "" where nothing is recorded under `assets`."""
    runs, more, long = (read_named(folder) if any(folder.glob("*/metrics.json")) else []
                        for folder in (assets / "runs", assets / "runs-5000", assets / "paper"))
    bench, recipe = assets / "bench.json", assets / "recipe.json"
    return {"time": f"`make all` takes about {expected_minutes(dict(runs), dict(runs), 2)} minutes "
                    "on the two cores of the recorded runs." if runs else "",
            "results": results_block(dict(runs), dict(long)) if runs or long else "",
            "plane": plane_block(read_named(assets / "plane")) if (assets / "plane").exists() else "",
            "collapse": "\n".join(f"- {line}" for line in plot.collapse_message(
                [m for _, m in runs]).splitlines()),
            "runs": full_tables(runs, record=True) if runs else "",
            "runs-5000": full_tables(more, record=True) if more else "",
            "paper": full_tables(long, record=True) if long else "",
            "speed": speed_block(bench) if bench.exists() else "",
            "recipe": recipe_block(recipe) if recipe.exists() else ""}


def renewed(path, texts):
    """A document's text with {name: Markdown} between its markers; ValueError if one is broken."""
    content = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        head, found, rest = content.partition(begin)
        _, closed, tail = rest.partition(end)
        if content.count(begin) + content.count(end) != 2 * bool(closed):
            raise ValueError(f"{path} needs one '{begin}' and one '{end}' after it, or neither")
        if found:
            content = f"{head}{begin}\n{text}\n{end}{tail}" if text else f"{head}{begin}\n{end}{tail}"
    return content


def expected_minutes(recorded, models, jobs, epochs=None, samples=None):
    """Whole minutes that `models` need, `jobs` at once, judged by {folder name: metrics}."""
    spans = [0.0] * jobs
    for m in sorted((recorded[name] for name in models), key=lambda m: -m["train_seconds"]):
        train = m["train_seconds"] * (epochs or m["epochs"]) / m["epochs"]
        evaluate = m["seconds"]["all"] * (samples or m["samples"]) / m["samples"]
        spans[spans.index(min(spans))] += train + evaluate
    return max(1, round(max(spans) / 60))


def expectation(assets, models, jobs, epochs=None, samples=None):
    """One line: the time that `models` will need, judged by the recorded runs."""
    recorded = {path.parent.name: plot.read_metrics(path)
                for path in (assets / "runs").glob("*/metrics.json")}
    if missing := [name for name in models if name not in recorded]:
        return f"no recorded run of {', '.join(missing)} tells how long this will take"
    return (f"expected: about {expected_minutes(recorded, models, jobs, epochs, samples)} minutes, "
            "as on the two cores of the recorded runs; the progress bars know better")


# ------------------------------------------------------------------- the page: what numbers say
# Every claim below is of this run, and of one model over another only beyond two standard errors.


def comparable(runs):
    """Whether these runs were measured alike, on images enough for a standard error."""
    return (len(runs) > 1 and len({plot.measured(run.metrics) for run in runs}) == 1
            and runs[0].metrics["images"] > 1)


def each(runs, text):
    """One phrase on each run, with its name unless it is the only one."""
    return ", ".join(f"{text(run)} ({run.label})" if len(runs) > 1 else text(run) for run in runs)


def lead(runs, key):
    """Who has the best value of a quantity, or that it is open; the values if not comparable."""
    what = plot.PARTS.get(key, key.upper())
    if not comparable(runs):
        return f"Test {what}: {each(runs, lambda run: stat(run.metrics, key))} nats per image."
    def rivalry(run):
        a, b = first.metrics[key], run.metrics[key]
        return abs(a["mean"] - b["mean"]), 2 * math.hypot(a["se"], b["se"])
    first, *rest = sorted(runs, key=lambda run: run.metrics[key]["mean"],
                          reverse=BETTER[key] is max)
    # the rival that is hardest to tell from it, which with a large error need not be the next
    rival = min(rest, key=lambda run: rivalry(run)[0] - rivalry(run)[1])
    far, error = rivalry(rival)
    if far > error:
        return (f"{first.label} has the best test {what}, {stat(first.metrics, key)} nats, "
                f"{far:.2f} ahead of {rival.label}: more than two standard errors of the "
                f"difference ({error:.2f}).")
    return (f"{first.label} and {rival.label} are {far:.2f} nats apart in test {what}: within two "
            f"standard errors of the difference ({error:.2f}), so neither is ahead.")


def prior_lines(runs):
    """What the VampPrior changes: its NLL beside N(0, I)'s, pair by pair, then the collapse."""
    pairs = [[a, b] for a in runs for b in runs if a.metrics["model"] == b.metrics["model"]
             and (a.metrics["prior"], b.metrics["prior"]) == ("standard", "vamp")]
    lines = [lead(pair, "nll") for pair in pairs if comparable(pair)]
    return lines and lines + plot.collapse_message([run.metrics for run in runs]).splitlines()


def trend(run):
    """How the validation ELBO ended: the mean of its last tenth of epochs less the tenth before."""
    elbo = run.log["val_elbo"]
    n = max(1, len(elbo) // 10)
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
    """How many units are active, and which models have the smallest share of theirs."""
    shares = [sum(run.metrics["active_units"].values()) / sum(run.metrics["latent_dims"].values())
              for run in runs]
    fewest = [run.label for run, share in zip(runs, shares) if share == min(shares)]
    end = f"; the smallest share: {', '.join(fewest)}" if len(fewest) < len(runs) else ""
    return f"Active: {each(runs, lambda run: units(run.metrics))}{end}."


def plane(run):
    """The share of the posterior means' variance that the two axes of the picture hold."""
    s = np.linalg.eigvalsh(np.atleast_2d(np.cov(run.arrays["latent_means"].T, bias=True)))
    return f"{s[-2:].sum() / max(s.sum(), 1e-12):.0%}"


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


def carried(run):
    """The share of each layer's KL in its active dimensions."""
    parts = []
    for layer, n in run.metrics["active_units"].items():
        kl, on = run.arrays[f"kl_per_dim_{layer}"], run.arrays[f"variance_{layer}"] > plot.ACTIVE
        parts.append(f"{kl[on].sum() / max(kl.sum(), 1e-12):.0%} of the KL of {layer}")
    return f"The active dimensions carry {' and '.join(parts)}."


# {figure: (what it shows, how to read it, what it shows in this run)}
AXES = ("Points are posterior means of test images, rings the prior's components, circles N(0, I), "
        "on the means' two main axes.")
COMPARED = {
    "comparison": ("Test images above their reconstructions",
                   "Each column is one test image; a good row differs little from the first.",
                   lambda runs: lead(runs, "recon")),
    "samples": ("Samples from the prior", "Drawn from the prior alone and decoded; grey is a "
                "pixel's probability.", lambda runs: lead(runs, "nll")),
    "neighbours": ("Samples above their nearest training images", "A sample equal to the image "
                   "below it would be a copy rather than something new.", lambda runs: ""),
    "latents": ("Latent spaces", AXES, lambda runs: "They hold "
                f"{each(runs, plane)} of the variance: what lies along the others is not seen."),
    "walks": ("Walks between two test images in latent space", "A row is a model's way from the "
              "image on the left to that on the right.", lambda runs: "Active units: "
              f"{each(runs, lambda run: units(run.metrics))}; the others change hardly anything."),
    "dynamics": ("Validation ELBO, reconstruction and KL over the epochs", "The last tenth of the "
                 "epochs against the tenth before shows whether the ELBO had settled:",
                 lambda runs: f"{each(runs, trend)}."),
    "tradeoff": ("Reconstruction against KL", "Up and to the left is better; along a grey line "
                 "the ELBO is the same.", lambda runs: lead(runs, "elbo")),
    "active_units": ("Variance of the posterior means per latent unit, and KL per layer",
                     "Units below the dashed line hardly depend on the image.", activity)}
OF_MODEL = {
    "pseudo_inputs": ("Pseudo-inputs above what each generates", "Most used first.", most_used),
    "film": ("Pseudo-inputs over the epochs", "What training makes of the same pseudo-inputs.",
             lambda run: f"{run.metrics['epochs']:,} epochs, {run.metrics['best_epoch']:,} kept."),
    "curves": ("Training and validation over the epochs", "Where validation "
               "is worse than training, the model overfits.", overfit),
    "reconstructions": ("Test images above their reconstructions", "",
                        lambda run: lead([run], "recon")),
    "samples": ("Samples from the prior", "Grey is a pixel's probability.",
                lambda run: lead([run], "nll")),
    "latent": ("Latent space", AXES, lambda run: f"They hold {plane(run)} of the variance."),
    "likelihood": ("Log-likelihoods of the test images", "", spread),
    "kl": ("KL per latent dimension", "Grey dimensions are inactive.", carried),
    "shared_z2": ("Samples that share one z2", "What differs among them comes from z1 alone.",
                  lambda run: f"KL1 is {stat(run.metrics, 'kl1')} nats, KL2 "
                  f"{stat(run.metrics, 'kl2')}.")}
# what belongs together: (heading, figures of all models, figures of each); the rest comes after
SECTIONS = (("Originals and reconstructions", ["comparison"], []),
            ("Samples", ["samples", "neighbours"], ["shared_z2"]),
            ("Pseudo-inputs", [], ["pseudo_inputs", "film"]),
            ("Latent spaces", ["latents", "walks"], []),
            ("Training", ["dynamics"], ["curves"]),
            ("Reconstruction against KL", ["tradeoff"], []),
            ("Active units", ["active_units"], []))

# ------------------------------------------------------------------------- the page: how it looks

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
    train, weights, components = (f"{number:,}" if number else "-" for number in (
        config.get("data", {}).get("train"), m.get("parameters"), m.get("components")))
    return {"Data": m["dataset"], "Binarisation": m["binarize"], "Training images": train,
            "Test images": f"{m['images']:,}", "Importance samples, S": f"{m['samples']:,}",
            "Recipe": recipe.get("name", "-") + changed, "Seed": str(seed),
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
    plain = path.stem.replace("_", " ").capitalize(), "", lambda runs: ""
    title, how, finding = known.get(path.stem, plain)
    data, who = path.read_bytes(), ", ".join(run.label for run in runs)
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is damaged: run plot.py again")
    # drawn with 150 dots an inch; on a phone it shrinks no further than its text can be read
    width, height = (side * 3 // 4 for side in struct.unpack(">II", data[16:24]))
    alt = html.escape(f"{title}, of {who}; {plot.source(runs)}")
    image = (f'<img alt="{alt}" width="{width}" height="{height}" '
             f'style="min-width: {width * 3 // 5}px" '
             f'src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    one = known is OF_MODEL
    text = " ".join([how, finding(runs[0] if one else runs)]).strip()
    return (f"<figure>\n{boxed(image, title, 'picture')}<figcaption>"
            f"{tag('b', f'{title}: {who}.' if one else f'{title}.')} {tag('span', text)}"
            "</figcaption>\n</figure>\n")


def sections(folder, folders, runs):
    """[(heading, HTML)] of the figures that are there: those of SECTIONS, then all others."""
    def shown(compared, of_model):
        return "".join([figure(folder / f"{name}.png", runs, COMPARED) for name in compared] + [
            figure(path / f"{name}.png", [run], OF_MODEL)
            for path, run in zip(folders, runs) for name in of_model])
    parts = [(heading, shown(*names)) for heading, *names in SECTIONS]
    compared, of_model = (
        [name for name in figures if not any(name in row[i] for row in SECTIONS)]
        for i, figures in enumerate((plot.COMPARISON_FIGURES, plot.MODEL_FIGURES), 1))
    rest = shown(compared, [])
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
        tag("p", UNITS + " Each model was trained once: what another training would change is "
            "not in the standard errors.", **note),
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
          for line in data_lines(named)),
        f"\n<nav>{links}</nav>\n<main>\n",
        *(f'<section id="part{i}">\n{tag("h2", heading)}\n{content}</section>\n'
          for i, (heading, content) in enumerate(parts)),
        "</main>\n", tag("footer", "Made by report.py from the files recorded in this folder."),
        "\n</body>\n</html>\n"])


@files.command
def main(argv=None):
    parser = files.Parser(__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of several evaluated models")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument("--expect", type=int, metavar="JOBS", help="only say how long they take")
    parser.add_argument("--epochs", type=int, help="for --expect; None means as recorded")
    parser.add_argument("--samples", type=int, help="for --expect; None means as recorded")
    parser.add_argument("--docs", nargs="+", type=Path, metavar="FILE", help="renew their blocks")
    parser.add_argument("--assets", type=Path, default="assets", help="records for the last four")
    args = parser.parse_args(argv)
    given = [part for part in (args.run, args.expect, args.docs) if part is not None]
    if len(given) != 1:
        raise ValueError("give one of: a folder, --expect, --docs")
    if args.expect is not None and (args.expect < 1 or not args.models):
        raise ValueError("--expect needs 1 or more, and --models")
    if args.expect is not None:
        print(expectation(args.assets, args.models, args.expect, args.epochs, args.samples))
    elif args.docs:
        if not args.assets.is_dir():
            raise FileNotFoundError(f"{args.assets} is not a folder: give the records by --assets")
        texts = blocks(args.assets)
        for path, text in [(path, renewed(path, texts)) for path in args.docs]:     # all or none
            files.write_atomic(path, text)
        print("renewed", *args.docs)
    else:
        folders = plot.find_models(args.run, args.models)
        runs = plot.read_runs([*folders.values()])
        named = [(name, run.metrics) for name, run in zip(folders, runs)]
        files.write_atomic(args.run / "comparison.md", f"# Comparison\n\n{full_tables(named)}\n")
        files.write_atomic(args.run / "report.html", page(args.run, [*folders.values()], runs))
        columns = results(named, [m for _, m in named])
        print(plain(columns), UNITS, *data_lines(named), sep="\n")
        print(f"{args.run / 'report.html'}: the figures, the tables and how to read them")


if __name__ == "__main__":
    sys.exit(main())
