"""Tables, from a run's recorded files alone.

    python report.py results/latest                     comparison.md, and its table printed
    python report.py results/latest --models vae vamp   the same, these models in this order
    python report.py --expect 2 --models vae vamp       how long these take, two at once
    python report.py --docs README.md RESULTS.md        their generated blocks, from assets/
"""
import files
if __name__ == "__main__":
    files.catch_signals()

import sys
from pathlib import Path

import numpy as np

import plot

# Test NLL on dynamically binarised MNIST in Tomczak & Welling (2018), Table 1.
PAPER = {("vae", "standard"): 84.50, ("vae", "vamp"): 82.38,
         ("hvae", "standard"): 82.42, ("hvae", "vamp"): 81.24}
BETTER = {"recon": max, "elbo": max, "nll": min}    # a KL by itself is neither good nor bad

# --------------------------------------------------------------------------------------- tables


def table(header, rows):
    """A Markdown table, first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in line)
                     + " |" for line in lines)


def plain(header, rows):
    """The same table for a terminal: columns aligned, nothing bold."""
    lines = [[" ".join(str(c).split()).replace("**", "") for c in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]),
                                *(c.rjust(width) for c, width in zip(line[1:], widths[1:]))])
                     for line in lines)


def stat(m, key):
    """Mean ± standard error of one quantity in metrics m; "-" where it was not measured."""
    if not m or key not in m:
        return "-"
    return f"{m[key]['mean']:.2f}" + (f" ± {m[key]['se']:.2f}" if m["images"] > 1 else "")


def stats(key, metrics):
    """The column of one quantity; the best is bold where all were measured alike.

    What is printed is compared, so that equal figures are all bold. None in `metrics`: not run.
    """
    known = [m for m in metrics if m]
    means = [round(m[key]["mean"], 2) for m in known]
    best = BETTER[key](means) if key in BETTER and len(known) > 1 and len(
        set(map(plot.measured, known))) == 1 else None
    return [f"**{stat(m, key)}**" if m and round(m[key]["mean"], 2) == best else stat(m, key)
            for m in metrics]


def paper(m):
    """The paper's test NLL of this model, "-" for other data than the paper's."""
    alike = m and (m["dataset"], m["binarize"]) == ("mnist", "dynamic")
    return f"{PAPER[m['model'], m['prior']]:.2f}" if alike and (
        m["model"], m["prior"]) in PAPER else "-"


def minutes(m):
    """How long training took, in whole minutes."""
    return f"{m['train_seconds'] / 60:.0f}" if m else "-"


def results_columns(named):
    """{title: cells} of (folder name, metrics) pairs: the four results of each model."""
    metrics = [m for _, m in named]
    titles = {"recon": "Recon", "kl": "KL", "elbo": "ELBO", "nll": "NLL"}
    return {"Model": plot.distinct_labels(named)} | {
        title: stats(key, metrics) for key, title in titles.items()}


def data_lines(named):
    """Lines that say what the numbers of these models rest on."""
    kinds = dict.fromkeys(plot.measured(m) for _, m in named)
    lines = [f"{dataset}{f' ({note})' if note else ''}, {binarize} binarisation, {images:,} test "
             f"images, S = {samples:,}." for dataset, note, binarize, samples, images in kinds]
    return lines + ["Warning: measured on different data, numbers of images or S, so these cannot "
                    "be compared and none is bold."] * (len(kinds) > 1)


UNITS = ("Nats per image, mean ± standard error over the test images. Lower NLL is better; higher "
         "Recon and ELBO are.")


def diagnostics_table(named):
    """Markdown of what the latents carry: active units, KL per layer, components in use."""
    metrics = [m for _, m in named]
    columns = {"Model": plot.distinct_labels(named), "Active units": [
        ", ".join(f"{layer} {n} of {m['latent_dims'][layer]}"
                  for layer, n in m["active_units"].items()) for m in metrics]}
    for key in ("kl1", "kl2"):
        if any(key in m for m in metrics):
            columns[key.upper()] = [stat(m, key) for m in metrics]
    if any("components" in m for m in metrics):
        columns["Components in use"] = [
            f"{m['components_used']:.1f} of {m['components']:,} "
            f"({m['components_used'] / m['components']:.0%})" if "components" in m else "-"
            for m in metrics]
    return table(list(columns), zip(*columns.values())) + (
        f"\n\nActive units: variance of the posterior mean over the images above {plot.ACTIVE}. "
        "Components in use: perplexity of the mean responsibilities.")


def full_tables(named, columns):
    """Markdown: the results in `columns`, what they rest on, and the diagnostics below."""
    return "\n\n".join([table(list(columns), zip(*columns.values())),
                        "\n".join(f"- {line}" for line in [*data_lines(named), UNITS]),
                        diagnostics_table(named)])


# ---------------------------------------------------------------------- README.md and RESULTS.md

def read_named(folder):
    """[(folder name, metrics)] of the models recorded in a folder; empty without any."""
    found = plot.find_models(folder) if any(folder.glob("*/metrics.json")) else {}
    return [(name, plot.read_metrics(path / "metrics.json")) for name, path in found.items()]


def results_block(runs, long):
    """Markdown: one table of the short runs and the long ones, given as {folder name: metrics}."""
    names = [n for n in plot.ORDER if n in runs or n in long]
    names += sorted({*runs, *long} - set(names))
    short, full = ([part.get(name) for name in names] for part in (runs, long))
    either = [(name, a or b) for name, a, b in zip(names, short, full)]
    header = ["Model", "Recon", "KL", "ELBO", "NLL", "Training, minutes", "NLL of `make paper`",
              "Training, minutes", "Paper's NLL"]
    columns = [plot.distinct_labels(either),
               *(stats(key, short) for key in ("recon", "kl", "elbo", "nll")), map(minutes, short),
               stats("nll", full), map(minutes, full),
               [min(paper(a), paper(b), key="-".__eq__) for a, b in zip(short, full)]]
    lines = [f"{name}: {line}" for name, part in (("`make all`", runs), ("`make paper`", long))
             for line in data_lines(part.items())]
    return "\n".join([table(header, zip(*columns)), "", *(f"- {line}" for line in [*lines, UNITS])])


def record_block(named):
    """Markdown of everything recorded of these runs."""
    metrics = [m for _, m in named]
    return full_tables(named, results_columns(named) | {
        "Paper's NLL": map(paper, metrics), "Epochs": [f"{m['epochs']:,}" for m in metrics],
        "Training, minutes": map(minutes, metrics)})


def duration(seconds):
    """A time with three digits in the unit that fits it."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            break
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
        content, sections = files.read_json(path), {}
        for row in content["rows"]:
            # a ratio without a plain form compares ours with ours: it is no speed-up
            growth = row.get("ratio") is not None and row.get("plain") is None
            if row.get("expected"):     # the rest is for those who open the record
                sections.setdefault("growth" if growth else row["section"], []).append(row)
        machine = ", ".join(content["machine"].values())
        parts = [f"Measured on {machine}; torch {content['torch']}, {content['threads']} threads; "
                 f"a large matrix product reaches {content['gflops']:.0f} GFLOP/s. Medians; "
                 "the record has more cases."]
        for section in sorted(sections, key=lambda name: name == "growth"):     # that one last
            rows = sections[section]
            used = {k: form for k, form in forms.items() if any(r.get(k) is not None for r in rows)}
            titles = [title if section != "growth" or title != "Times faster" else "Growth"
                      for title, _ in used.values()]
            parts.append(table([section, *titles], [
                [r["case"], *("-" if r.get(k) is None else form(r[k])
                              for k, (_, form) in used.items())] for r in rows]))
    return "\n\n".join(parts)


def recipe_block(path):
    """Markdown of the recipe's changes: validation ELBO, with its spread over seeds."""
    with plot.reading(path, "the tries"):
        content, body = files.read_json(path), []
        for row in content["rows"]:
            elbo = row["val_elbo"]
            spread = f" ± {np.std(elbo, ddof=1):.2f}" if len(elbo) > 1 else ""
            if not row.get("record_only"):      # the table is short; the rest is in the record
                body.append([row["change"], f"{np.mean(elbo):.2f}{spread}", len(elbo),
                             row["epochs"], "yes" if row["kept"] else "no"])
        return content["protocol"] + "\n\n" + table(
            ["Change", "Validation ELBO (± standard deviation)", "Seeds", "Epochs", "Kept"], body)


def collapse_block(named):
    """Markdown list of what the runs say of the standard prior against the VampPrior."""
    runs = [plot.Run(name, m["label"], m, None, None, "", "") for name, m in named]
    return "\n".join(f"- {line}" for line in plot.collapse_message(runs).splitlines())


def blocks(assets):
    """{name: Markdown} of every block; "" where nothing is recorded under `assets`."""
    runs, long = read_named(assets / "runs"), read_named(assets / "paper")
    bench, recipe = assets / "bench.json", assets / "recipe.json"
    return {"time": f"`make all` takes about {expected_minutes(dict(runs), dict(runs), 2)} minutes "
                    "on the two cores of the recorded runs." if runs else "",
            "results": results_block(dict(runs), dict(long)) if runs or long else "",
            "collapse": collapse_block(runs),
            "runs": record_block(runs) if runs else "", "paper": record_block(long) if long else "",
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
            content = f"{head}{begin}\n{text}{bool(text) * chr(10)}{end}{tail}"
    return content


# --------------------------------------------------------------------------------- command line

def expected_minutes(recorded, models, jobs, epochs=None, samples=None):
    """Whole minutes that `models` need, `jobs` at once, judged by {folder name: metrics}."""
    spans = [0.0] * jobs
    for m in sorted((recorded[name] for name in models), key=lambda m: -m["train_seconds"]):
        spans[spans.index(min(spans))] += (
            m["train_seconds"] * (epochs or m["epochs"]) / m["epochs"]
            + m["seconds"]["all"] * (samples or m["samples"]) / m["samples"])
    return max(1, round(max(spans) / 60))


def expectation(assets, models, jobs, epochs=None, samples=None):
    """One line: the time that `models` will need, judged by the recorded runs."""
    recorded = dict(read_named(assets / "runs"))
    if missing := [name for name in models if name not in recorded]:
        return f"no recorded run of {', '.join(missing)} tells how long this will take"
    expected = expected_minutes(recorded, models, jobs, epochs, samples)
    return (f"expected: about {expected} minutes, as on the two cores of the recorded runs; "
            "the progress bars know better")


@files.command
def main(argv=None):
    parser = files.Parser(__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of several evaluated models")
    parser.add_argument("--models", nargs="+", metavar="NAME",
                        help="which subfolders, in this order; None means all")
    parser.add_argument("--expect", type=int, metavar="JOBS",
                        help="only say how long --models will take, so many at once")
    parser.add_argument("--epochs", type=int, help="for --expect; None means as recorded")
    parser.add_argument("--samples", type=int, help="for --expect; None means as recorded")
    parser.add_argument("--docs", nargs="+", type=Path, metavar="FILE",
                        help="renew the generated blocks of these files")
    parser.add_argument("--assets", type=Path, default="assets",
                        help="the records, for --docs and --expect")
    args = parser.parse_args(argv)
    if sum(part is not None for part in (args.run, args.expect, args.docs)) != 1:
        raise ValueError("give a folder of results, --docs or --expect, one of them")
    if args.expect is not None:
        if args.expect < 1 or not args.models:
            raise ValueError("--expect needs a number of 1 or more, and --models")
        print(expectation(args.assets, args.models, args.expect, args.epochs, args.samples))
    elif args.docs:
        if not args.assets.is_dir():
            raise FileNotFoundError(f"{args.assets} is not a folder: give the records by --assets")
        texts = blocks(args.assets)
        # all are checked before the first is written
        for path, text in [(path, renewed(path, texts)) for path in args.docs]:
            files.write_atomic(path, text)
        print("renewed", *args.docs)
    else:
        found = plot.find_models(args.run, args.models)
        named = [(name, plot.read_metrics(path / "metrics.json")) for name, path in found.items()]
        columns = results_columns(named)
        files.write_atomic(args.run / "comparison.md",
                           f"# Comparison\n\n{full_tables(named, columns)}\n")
        print(plain(list(columns), zip(*columns.values())), UNITS, *data_lines(named), sep="\n")
        print(f"{args.run}: comparison.md, the comparison figures, and a folder for each model")


if __name__ == "__main__":
    sys.exit(main())
