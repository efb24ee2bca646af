"""The tables and the page of a run, from its recorded files alone.

    python report.py results/latest             report.md and report.html
    python report.py --readme README.md         renews README's table and the reports in assets/
"""
import base64
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import jinja2
import numpy as np

import files
import plot

# Published test NLL with dynamic binarisation at S = 5,000: Tomczak & Welling (2018), Table 1, and
# Norouzi, Fleet & Norouzi (2020, arXiv:2004.04795).
PUBLISHED = {"mnist": {("vae", "standard"): 84.50, ("vae", "vamp"): 82.38,
                       ("hvae", "standard"): 82.42, ("hvae", "vamp"): 81.24},
             "caltech.npz": {("vae", "standard"): 123.43, ("vae", "vamp"): 114.55,
                             ("hvae", "standard"): 112.08, ("hvae", "vamp"): 108.28},
             "fashion": {("vae", "standard"): 228.70, ("vae", "vamp"): 227.35,
                         ("hvae", "standard"): 227.37, ("hvae", "vamp"): 226.72}}
COLUMNS = {"Recon": ("recon", max), "KL": ("kl", None), "ELBO": ("elbo", max), "NLL": ("nll", min),
           "Bits/dim": ("bits_per_dim", min)}      # title: key in metrics.json, which is best
NOTES = {
    "Recon": "Nats per image. ± is the standard error over the test images or, for several seeds, "
             "the standard deviation over seeds.",
    "NLL": "Lower NLL is better. NLL is an upper bound in expectation, tighter with larger S.",
    "Active units": "Active units: posterior mean with a variance above 0.01 over the test images "
                    "(Burda et al., 2016).",
    "Components in use": "Components in use: perplexity of the mean responsibilities.",
    "Linear probe": "Linear probe and k-NN: test accuracy of logistic regression and of 5 nearest "
                    "neighbours on the posterior means."}       # column: what it means


def read(folder):
    """{name: [metrics of each seed]} of the models in `folder`, or in its folders seed0, ..."""
    found = {}
    for path in sorted([*folder.glob("*/metrics.json"), *folder.glob("seed*/*/metrics.json")]):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    if not found:
        raise ValueError(f"no metrics.json under {folder}: run evaluate.py first")
    return {name: found[name] for name in sorted(found, key=plot.place)}


# --------------------------------------------------------------------------------------- tables


def cell(seeds, key):
    """Mean ± spread of one quantity, "-" where it was not measured."""
    values = [m[key]["mean"] for m in seeds if key in m]
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else seeds[0][key]["se"]
    return plot.plus_minus(fmean(values), spread)


def accuracy(seeds, key):
    """An accuracy in percent ± its binomial error or its spread over seeds, "-" without one."""
    values = [m[key] for m in seeds if key in m]
    if not values:
        return "-"
    p = fmean(values)
    spread = math.sqrt(p * (1 - p) / seeds[0]["images"])
    if len(values) > 1:
        spread = stdev(values)
    return f"{100 * p:.1f} ± {100 * spread:.1f}%"


def published(m):
    """The published NLL of this model on these data, or "-"."""
    if m["binarize"] != "dynamic" or m["note"]:
        return "-"
    value = PUBLISHED.get(m["dataset"], {}).get((m["model"], m["prior"]))
    return "-" if value is None else f"{value:.2f}"


def measured(m):
    """What must be equal for two models' numbers to be compared."""
    return [m[key] for key in ("dataset", "note", "binarize", "likelihood", "images", "samples")]


def results(models):
    """The results table, a dict a row. The best of models that were measured alike are bold."""
    rows = {name: {"Model": plot.full_label(name, seeds[0])} for name, seeds in models.items()}
    everything = [measured(m) for seeds in models.values() for m in seeds]
    alike = everything.count(everything[0]) == len(everything)
    for title, (key, best) in COLUMNS.items():
        means = {name: round(fmean(m[key]["mean"] for m in seeds), 2)       # as printed
                 for name, seeds in models.items() if all(key in m for m in seeds)}
        for name, seeds in models.items():
            text = cell(seeds, key)
            if alike and best and len(means) > 1 and means.get(name) == best(means.values()):
                text = f"**{text}**"
            rows[name][title] = text
    for name, seeds in models.items():
        each = [f"{m['nll']['mean']:.2f}" for m in seeds]
        rows[name] |= {
            "NLL of each seed": ", ".join(each) if len(each) > 1 else "-",
            "Published NLL": published(seeds[0]),
            "Epochs": ", ".join(dict.fromkeys(str(m["epochs"]) for m in seeds)),
            "Minutes": ", ".join(f"{m['train_seconds'] / 60:.1f}" for m in seeds)}
    return without_empty_columns(list(rows.values()))


def latents(models):
    """What the latents carry, a dict a row: means over the seeds."""
    rows = []
    for name, seeds in models.items():
        m = seeds[0]
        units, used = [], "-"
        for layer, size in m["latent_dims"].items():
            active = fmean(m["active_units"][layer] for m in seeds)
            units.append(f"{layer} {round(active, 1):g} of {size}")
        if "components" in m:
            used = f"{fmean(m['components_used'] for m in seeds):.0f} of {m['components']}"
        rows.append({"Model": plot.full_label(name, m), "Active units": ", ".join(units),
                     "KL1": cell(seeds, "kl1"), "KL2": cell(seeds, "kl2"),
                     "Components in use": used, "Linear probe": accuracy(seeds, "probe_accuracy"),
                     "k-NN": accuracy(seeds, "knn_accuracy")})
    return without_empty_columns(rows)


def without_empty_columns(rows):
    keys = [key for key in rows[0] if any(row[key] != "-" for row in rows)]
    return [{key: row[key] for key in keys} for row in rows]


def markdown(rows):
    """A table whose columns are aligned, so that a terminal shows it too."""
    lines = [list(rows[0])] + [[text.replace("|", "/") for text in row.values()] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*lines))      # widths
    aligned = []
    for name, *numbers in lines:
        numbers = [text.rjust(width) for text, width in zip(numbers, others)]
        aligned.append([name.ljust(first), *numbers])
    aligned.insert(1, ["-" * first] + ["-" * (width - 1) + ":" for width in others])
    return "\n".join("| " + " | ".join(line) + " |" for line in aligned)


def conditions(models):
    """On which data, with which S and in which precision: a line for each that occurs."""
    lines = set()
    for m in (m for seeds in models.values() for m in seeds):
        note = f" ({m['note']})" if m["note"] else ""
        lines.add(f"{m['dataset']}{note}, binarisation: {m['binarize']}, {m['likelihood']} "
                  f"likelihood, {m['images']:,} test images, S = {m['samples']:,}, trained in "
                  f"{m['trained_in']}.")
    return sorted(lines)


def gain(folder, models):
    """How much the VampPrior gains in NLL over N(0, I), image by image: a sentence per model."""
    lines = []
    for names in (("vae", "vamp"), ("hvae", "hvamp")):
        paths = [folder / name / "arrays.npz" for name in names if name in models]
        if len(paths) < 2 or not all(path.exists() for path in paths):
            continue
        plain, vamp = (models[name][0] for name in names)
        plain_log_px, vamp_log_px = (np.load(path)["log_px"].astype(float) for path in paths)
        if measured(plain) != measured(vamp) or plain["images"] == 1:
            continue
        d = vamp_log_px - plain_log_px
        direction = "lower" if d.mean() > 0 else "higher"
        lines.append(f"The NLL of {vamp['label']} is {abs(d.mean()):.2f} ± "
                     f"{d.std(ddof=1) / math.sqrt(len(d)):.2f} nats {direction} than the NLL of "
                     f"{plain['label']}, image by image.")
    return lines


# ---------------------------------------------------------------------------------------- pages


def notes(*tables):
    """What the columns of these tables mean."""
    return [text for column, text in NOTES.items() if any(column in rows[0] for rows in tables)]


def report(folder, models):
    """report.md."""
    tables = results(models), latents(models)
    lines = conditions(models) + gain(folder, models) + notes(*tables)
    return "\n\n".join([*map(markdown, tables), "\n".join(f"- {line}" for line in lines)]) + "\n"


def html(folder, models):
    """report.html: one file, with the figures inside it."""
    found = [(folder / f"{name}.png", *plot.title_and_caption(draw))
             for name, (draw, *_) in plot.FIGURES.items()]
    configs = {}
    for name, (m, *_) in models.items():        # a single model's figure shows the training curve
        found.append((folder / name / "curves.png", f"Training of {plot.full_label(name, m)}", ""))
        if (folder / name / "config.json").exists():
            configs[name] = json.loads((folder / name / "config.json").read_text())
    pictures = [{"title": title, "caption": caption,
                 "png": base64.b64encode(path.read_bytes()).decode()}
                for path, title, caption in found if path.exists()]
    tables = results(models), latents(models)
    template = (Path(__file__).parent / "report.html.j2").read_text()
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        tables=tables, conditions=conditions(models), gain=gain(folder, models),
        notes=notes(*tables), pictures=pictures, configs=configs)


def readme(text, assets):
    """README.md's text with the table of `make paper` between its markers renewed."""
    begin, end = "<!-- begin results -->\n", "<!-- end results -->"
    if begin not in text or end not in text:
        raise ValueError(f"the file has no line {begin.strip()} and {end}")
    keys = "Model", "Recon", "KL", "ELBO", "NLL", "Published NLL"
    rows = [{key: row[key] for key in keys} for row in results(read(assets / "paper"))]
    return text.partition(begin)[0] + begin + markdown(rows) + "\n" + end + text.partition(end)[2]


@files.friendly
def main(argv=None):
    p = files.parser(__doc__)
    p.add_argument("run", nargs="?", type=Path,
                   help="folder of evaluated models, or of seed0, seed1, ...")
    p.add_argument("--readme", type=Path, help="renew this file's table and --assets' reports")
    p.add_argument("--assets", type=Path, default=Path("assets"), help="folder of recorded runs")
    args = p.parse_args(argv)
    if args.readme:
        files.write_atomic(args.readme, readme(args.readme.read_text(), args.assets))
        for folder in (path for path in args.assets.iterdir() if path.is_dir()):
            files.write_atomic(folder / "report.md", report(folder, read(folder)))
        return
    if args.run is None:
        p.error("give a run's folder, or --readme")
    models = read(args.run)
    files.write_atomic(args.run / "report.md", report(args.run, models))
    files.write_atomic(args.run / "report.html", html(args.run, models))
    print(f"{markdown(results(models))}\n{args.run / 'report.html'}")


if __name__ == "__main__":
    main()
