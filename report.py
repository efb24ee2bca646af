"""The tables and the page of a run, from its recorded files alone.

    python report.py results/latest             report.md and report.html
    python report.py --readme README.md         renews README's table and the reports in assets/
"""
import base64
import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import jinja2
import numpy as np

import files
import plot

# Published test NLL of these models at S = 5,000, for grey levels in bits per dimension: Tomczak &
# Welling (2018), Table 1, and Norouzi, Fleet & Norouzi (2020, arXiv:2004.04795) for Fashion-MNIST.
CELLS = ("vae", "standard"), ("vae", "vamp"), ("hvae", "standard"), ("hvae", "vamp")
PUBLISHED = {("mnist", "bernoulli", 10_000): (84.50, 82.38, 82.42, 81.24),
             ("static.npz", "bernoulli", 10_000): (88.56, 85.57, 86.05, 83.19),
             ("caltech.npz", "bernoulli", 2_307): (123.43, 114.55, 112.08, 108.28),
             ("frey.npz", "logistic", 200): (4.63, 4.57, 4.61, 4.51),
             ("fashion", "bernoulli", 10_000): (228.70, 227.35, 227.37, 226.72)}
RECORDS = {"paper": "Dynamic MNIST", "fashion": "Fashion-MNIST", "caltech": "Caltech 101",
           "static": "Static MNIST", "frey": "Frey faces"}
COLUMNS = {"Recon": ("recon", max), "KL": ("kl", None), "ELBO": ("elbo", max), "NLL": ("nll", min),
           "Bits/dim": ("bits_per_dim", min)}      # title: key in metrics.json, which is best
NOTES = {
    "Recon": "Nats per image. ± is the standard error over the test images or, for several seeds, "
             "the standard deviation over seeds.",
    "NLL": "Lower NLL is better. NLL is an upper bound in expectation, tighter with larger S.",
    "Published": "Published: test NLL of the papers' model of 300 hidden units a layer, at "
                 "S = 5,000; of grey levels in bits per dimension.",
    "Active units": "Active units: posterior mean with a variance above 0.01 over the test images "
                    "(Burda et al., 2016).",
    "Seeds as one": "Seeds as one: NLL of the mean of the seeds' likelihoods, image by image.",
    "Components in use": "Components in use: perplexity of the mean responsibilities.",
    "Linear probe": "Linear probe and k-NN: test accuracy of logistic regression and of 5 nearest "
                    "neighbours on the posterior means."}       # column: what it means


def read(folder):
    """{name: [metrics of each seed]} of the models in `folder`, or in its folders seed0, ...
    Each has every image's log p(x) as "log_px" (N,), if there is an arrays.npz."""
    found = {}
    paths = [*folder.glob("seed*/*/metrics.json")] or folder.glob("*/metrics.json")
    for path in sorted(paths):
        metrics, arrays = json.loads(path.read_text()), path.with_name("arrays.npz")
        if arrays.exists():
            metrics["log_px"] = np.load(arrays)["log_px"].astype(float)
        found.setdefault(path.parent.name, []).append(metrics)
    if not found:
        raise ValueError(f"{folder} holds no evaluated models: give one such as results/latest")
    return {name: found[name] for name in sorted(found, key=plot.place)}


def cell(seeds, key):
    """Mean ± spread of one quantity, "-" where it was not measured."""
    values = [m[key]["mean"] for m in seeds if key in m]
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else seeds[0][key]["se"]
    return plot.plus_minus(fmean(values), spread, 3 if key == "bits_per_dim" else 2)


def seeds_as_one(seeds):
    """NLL of the mean of the seeds' likelihoods, "-" for one seed or different measurements."""
    log_px = [m["log_px"] for m in seeds if "log_px" in m and measured(m) == measured(seeds[0])]
    if len(log_px) < max(2, len(seeds)):
        return "-"
    return f"{math.log(len(log_px)) - np.logaddexp.reduce(log_px).mean():.2f}"


def accuracy(seeds, key):
    """An accuracy in percent ± its binomial error or its spread over seeds, "-" without one."""
    values = [m[key] for m in seeds if key in m]
    if not values:
        return "-"
    p = fmean(values)
    spread = stdev(values) if len(values) > 1 else math.sqrt(p * (1 - p) / seeds[0]["images"])
    return f"{100 * p:.1f} ± {100 * spread:.1f}%"


def published(m):
    """The published NLL of this model on these data, or "-"."""
    key = m["dataset"], m["likelihood"], m["images"]
    values = dict(zip(CELLS, PUBLISHED.get(key, ())))
    sizes = {*m["latent_dims"].values()}, m.get("components", 500)
    value = values.get((m["model"], m["prior"])) if sizes == ({40}, 500) else None
    return "-" if value is None else f"{value:.2f}"


def measured(m):
    """What must be equal for two models' numbers to be compared."""
    return [m[key] for key in ("dataset", "binarize", "likelihood", "images", "samples")]


def results(models):
    """The results table, a dict a row. The best of models that were measured alike are bold."""
    rows = {name: {"Model": plot.full_label(name, seeds[0])} for name, seeds in models.items()}
    everything = [measured(m) for seeds in models.values() for m in seeds]
    alike = everything.count(everything[0]) == len(everything)
    for title, (key, best) in COLUMNS.items():
        texts = {name: cell(seeds, key) for name, seeds in models.items()}
        means = {name: float(text.split()[0]) for name, text in texts.items() if text != "-"}
        for name, text in texts.items():
            if alike and best and len(means) > 1 and means.get(name) == best(means.values()):
                text = f"**{text}**"
            rows[name][title] = text
    for name, seeds in models.items():
        each = [f"{m['nll']['mean']:.2f}" for m in seeds]
        rows[name] |= {
            "NLL of each seed": ", ".join(each) if len(each) > 1 else "-",
            "Seeds as one": seeds_as_one(seeds),
            "Published": published(seeds[0]),
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
            sizes = " or ".join(dict.fromkeys(str(m["components"]) for m in seeds))
            used = f"{fmean(m['components_used'] for m in seeds):.0f} of {sizes}"
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
    columns = []
    for i, name in enumerate(rows[0]):
        column = [name, *(row[name].replace("|", "/") for row in rows)]
        width = max(map(len, column))
        column = [text.rjust(width) if i else text.ljust(width) for text in column]
        columns.append([column[0], "-" * (width - 1) + (":" if i else "-"), *column[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns))


def conditions(models):
    """On which data, with which S and in which precision: a line for each that occurs."""
    return sorted({f"{m['dataset']}, binarisation: {m['binarize']}, {m['likelihood']} likelihood, "
                   f"{m['images']:,} test images, S = {m['samples']:,}, trained in "
                   f"{m['trained_in']}." for seeds in models.values() for m in seeds})


def gain(models):
    """What the VampPrior gains in NLL over another prior, image by image; ± as in the tables."""
    lines = []
    for names in (("vae", "vamp"), ("fit", "vamp"), ("hvae", "hvamp")):
        plain, vamp = (models.get(name, []) for name in names)
        found = [m for m in plain + vamp if "log_px" in m and m["images"] > 1]
        alike = all(measured(m) == measured(found[0]) for m in found)
        if not alike or not 0 < 2 * len(plain) == 2 * len(vamp) == len(found):
            continue
        d = np.array([two["log_px"] - one["log_px"] for one, two in zip(plain, vamp)])
        values = d.mean(1) if len(d) > 1 else d[0] / math.sqrt(d.size)      # (seeds,) or (N,)
        lines.append(f"The NLL of {found[-1]['label']} is {abs(d.mean()):.2f} ± "
                     f"{values.std(ddof=1):.2f} nats {'lower' if d.mean() > 0 else 'higher'} than "
                     f"the NLL of {found[0]['label']}, image by image.")
    return lines


def notes(*tables):
    """What the columns of these tables mean."""
    return [text for column, text in NOTES.items() if any(column in rows[0] for rows in tables)]


def report(models):
    """report.md."""
    tables = results(models), latents(models)
    lines = conditions(models) + gain(models) + notes(*tables)
    return "\n\n".join([*map(markdown, tables), "\n".join(f"- {line}" for line in lines)]) + "\n"


def html(folder, models):
    """report.html: one file, with the figures inside it."""
    found = [(folder / f"{name}.png", *plot.title_and_caption(draw))
             for name, (draw, *_) in plot.FIGURES.items()]
    for name, (m, *_) in models.items():        # a single model's figure shows the training curve
        found.append((folder / name / "curves.png", f"Training of {plot.full_label(name, m)}", ""))
    pictures = [{"title": title, "caption": caption,
                 "png": base64.b64encode(path.read_bytes()).decode()}
                for path, title, caption in found if path.exists()]
    tables = results(models), latents(models)
    template = (Path(__file__).parent / "report.html.j2").read_text()
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        tables=tables, conditions=conditions(models), gain=gain(models),
        notes=notes(*tables), pictures=pictures)


def by_data(assets):
    """README's table, a dict a row: our NLL and, in brackets, the published one."""
    rows = []
    for folder, title in RECORDS.items():
        found = read(assets / folder)
        models = [found[name] for name in ("vae", "vamp", "hvae", "hvamp")]
        n = " or ".join(map(str, sorted({len(seeds) for seeds in models})))
        samples = models[0][0]["samples"]
        row = {"Data": f"{title} ({n} seed{'s' if n != '1' else ''}, S = {samples:,})"}
        for seeds in models:
            key = "bits_per_dim" if "bits_per_dim" in seeds[0] else "nll"
            row[seeds[0]["label"]] = f"{cell(seeds, key)} ({published(seeds[0])})"
        rows.append(row)
    return rows


@files.friendly
def main(argv=None):
    p = files.parser(__doc__)
    p.add_argument("run", nargs="?", type=Path,
                   help="folder of evaluated models, or of seed0, seed1, ...")
    p.add_argument("--readme", type=Path, help="renew its table and the reports in assets/")
    args = p.parse_args(argv)
    if args.readme:
        assets = args.readme.parent / "assets"
        between = "(?<=<!-- begin results -->\n).*(?=<!-- end results -->)"
        text = re.sub(between, markdown(by_data(assets)) + "\n", args.readme.read_text(),
                      flags=re.DOTALL)
        files.write_atomic(args.readme, text)
        for folder in (path for path in assets.iterdir() if path.is_dir()):
            files.write_atomic(folder / "report.md", report(read(folder)))
        return
    if args.run is None:
        p.error("give a run's folder, or --readme")
    models = read(args.run)
    files.write_atomic(args.run / "report.md", report(models))
    files.write_atomic(args.run / "report.html", html(args.run, models))
    print(f"{markdown(results(models))}\n{args.run / 'report.html'}")


if __name__ == "__main__":
    main()
