"""Tables and the page of a run, from its recorded files alone.

    python report.py results/latest                     comparison.md and report.html, of all models
                                                        or of --models
    python report.py --expect 2 --models vae vamp       how long these take, two at once
    python report.py --docs README.md RESULTS.md        their generated blocks, from assets/
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before matplotlib, whose import takes a second

import json
import sys
from pathlib import Path

import numpy as np

import page
from records import (ORDER, data_lines, distinct_labels, find_models, find_seeds, latent_columns,
                     latent_notes, minutes, over_seeds, read_metrics, read_runs, read_seeds, reading,
                     results, seed_columns, stat, stats, units, units_line)

# Published test NLL with dynamic binarisation, S = 5,000: Tomczak & Welling (2018), Table 1; Norouzi,
# Fleet & Norouzi (2020, arXiv:2004.04795).
PUBLISHED = {
    "mnist": ("Paper's NLL", {("vae", "standard"): 84.50, ("vae", "vamp"): 82.38,
                              ("hvae", "standard"): 82.42, ("hvae", "vamp"): 81.24}),
    "fashion": ("NLL in arXiv:2004.04795", {("vae", "standard"): 228.70, ("vae", "vamp"): 227.35,
                                            ("hvae", "standard"): 227.37, ("hvae", "vamp"): 226.72})}
# under assets/
RECORDS = "runs runs-float32 fast paper plane pseudo-inputs decay grey small fashion".split()


# those of which one line says all: its title, and what it says of each model's metrics
LINES = {"plane": ("Test ELBO in nats after {epochs} epochs in {trained_in}, one seed",
                   lambda m: stat(m, "elbo")),
         "runs-float32": ("NLL in nats at S = {samples:,}, trained in {trained_in}",
                          lambda m: stat(m, "nll")),
         "decay": ("Active units after {epochs} epochs", units)}


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


def published(metrics):
    """The column of published test NLLs, in a list; an empty one where none is of these data."""
    found = {m["dataset"] if m["binarize"] == "dynamic" else None for m in metrics if m}
    if len(found) > 1 or not found <= PUBLISHED.keys():
        return []
    title, values = PUBLISHED[found.pop()]
    cells = [values.get((m["model"], m["prior"])) if m else None for m in metrics]
    return [(title, [f"{value:.2f}" if value else "-" for value in cells])]


def tabled(runs):
    """(columns, lines beneath them, metrics) of runs {folder name: metrics}, one a training seed."""
    merged = over_seeds(runs)
    metrics, each = [*merged.values()], [m for run in runs for m in run.values()]
    return (results(merged.items(), metrics) + seed_columns(metrics),
            [units_line(metrics), *data_lines(each)], metrics)


def full_tables(runs, record=False):
    """Markdown: results (of a record, more), what they rest on, and what the latents carry. RESULTS.md
    has many, and explains the latents' columns once."""
    columns, lines, metrics = tabled(runs)
    latents = [columns[0], *latent_columns(metrics)]
    if record:
        each = [[run[name] for run in runs if name in run] for name in over_seeds(runs)]
        columns += [*published(metrics),
                    ("Epochs", [", ".join({f"{m['epochs']:,}": 0 for m in seeds}) for seeds in each]),
                    ("Training, minutes", [", ".join(map(minutes, seeds)) for seeds in each])]
    notes = "\n".join(f"- {line}" for line in lines)
    parts = [table(columns), notes, table(latents)]
    return "\n\n".join(parts if record else [*parts, latent_notes(metrics)])


def results_block(runs, seeds):
    """Markdown: one table of the short runs, {folder name: metrics}, and the long ones, one such dict
    for each training seed."""
    long = over_seeds(seeds)
    names = [n for n in ORDER if n in runs or n in long]
    names += sorted({*runs, *long} - set(names))
    short, full = ([part.get(name) for name in names] for part in (runs, long))
    columns = results([(name, a or b) for name, a, b in zip(names, short, full)], short) + [
        ("Training, minutes", map(minutes, short)), ("NLL of `make paper`", stats("nll", full)),
        *seed_columns(full)[1:], *published([b or a for a, b in zip(short, full)])]
    lines = [f"{name}: {line}" for name, part in (("`make all`", [runs]), ("`make paper`", seeds))
             for line in data_lines([m for run in part for m in run.values()])]
    return "\n".join([table(columns), "", *(f"- {line}" for line in [*lines, units_line(short + full)])])


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
             "peak_mb": ("Peak memory", "{:,.0f} MB".format), "predicted": ("By the model", duration),
             "predicted_8": ("of 8", duration), "predicted_64": ("of 64", duration),
             "error": ("Error", "{:.1e}".format),
             "expected": ("Expected", str)}
    with reading(path, "bench.py"):
        content, sections = json.loads(path.read_text(encoding="utf-8")), {}
        for row in content["rows"]:
            # a ratio without a plain form compares ours with ours: it is no speed-up
            growth = row.get("ratio") is not None and row.get("plain") is None
            if row.get("expected"):     # the rest is for those who open the record
                sections.setdefault("growth" if growth else row["section"], []).append(row)
        parts = [f"Measured on {', '.join(content['machine'].values())}; torch {content['torch']}, "
                 f"{content['threads']} threads; a large matrix product reaches " + ", ".join(
                     f"{rate:.0f} GFLOP/s in {kind}" for kind, rate in content["gflops"].items())
                 + ". Medians; the record has more cases."]
        for section, rows in sorted(sections.items(), key=lambda item: item[0] == "growth"):
            columns = [(section, [row["case"] for row in rows])]
            for key, (title, form) in forms.items():
                title = "Growth" if (section, key) == ("growth", "ratio") else title
                if any(row.get(key) is not None for row in rows):
                    columns.append((title, ["-" if row.get(key) is None else form(row[key])
                                            for row in rows]))
            parts.append(table(columns))
    return "\n\n".join(parts)


def cost_block(m, B=1000, image=784):
    """Markdown: what N processes share and send in a step of m's model, by its pseudo-inputs."""
    rows = []
    for K in (500, 5_000, 50_000):
        P, D = m["parameters"] + (K - m["components"]) * image, m["latent_dims"]["z"]
        rows.append((f"{K:,}", f"{P:,}", f"{K / (K + 2 * B):.0%}", f"{8 * K * D / 1e6:.1f}", *(
            f"{4 * P * 2 * (N - 1) / N / 1e6:,.0f}" for N in (2, 8, 64))))
    titles = ("K", "Parameters, P", "Share of products that encode u", "Gathered, MB",
              *(f"All-reduce of {N}, MB" for N in (2, 8, 64)))
    return table(zip(titles, zip(*rows)))


def recipe_block(path):
    """Markdown of the recipe's changes: validation ELBO, with its spread over seeds."""
    with reading(path, "the tries"):
        content, rows = json.loads(path.read_text(encoding="utf-8")), []
        for row in content["rows"]:
            elbo = row["val_elbo"]
            spread = f" ± {np.std(elbo, ddof=1):.2f}" if len(elbo) > 1 else ""
            if not row.get("record_only"):      # the table is short; the rest is in the record
                rows.append((row["change"], f"{np.mean(elbo):.2f}{spread}", len(elbo),
                             row["epochs"], "yes" if row["kept"] else "no"))
        titles = "Change", "Validation ELBO (± standard deviation)", "Seeds", "Epochs", "Kept"
        return content["protocol"] + "\n\n" + table(zip(titles, zip(*rows)))


def time_block(runs, whole):
    """A sentence or two of Markdown: how long the runs, {folder name: metrics}, take, and in how many
    seconds the same command went through in float32, if that is recorded."""
    text = (f"`make all` takes about {expected_minutes(runs, runs, 2)} minutes on the two cores of the "
            "recorded runs, environment aside.")
    return text + (f" In float32, on two cores without bfloat16, it took {whole / 60:.0f}." if whole else "")


def line_block(runs, title, text):
    """A line of Markdown: text(metrics) of each of the runs {folder name: metrics}, and the title with
    what they share."""
    each = [f"{label} {text(m)}" for label, m in zip(distinct_labels([*runs.items()]), runs.values())]
    return f"{title.format(**next(iter(runs.values())))}: {', '.join(each)}." if runs else ""


def blocks(assets):
    """{name: Markdown} of every block; "" where nothing is recorded under `assets`."""
    found = {name: read_seeds(assets / name) if any((assets / name).rglob("metrics.json")) else [{}]
             for name in RECORDS}
    runs, seeds, bench = found["runs"][0], found["paper"], assets / "bench.json"
    clock = assets / "runs-float32/time.json"
    whole = files.read_json(clock, ["seconds"])["seconds"] if clock.exists() else None
    texts = {path.stem: recipe_block(path) for path in assets.glob("recipe*.json")}
    for name, part in found.items():
        texts[name] = (line_block(part[0], *LINES[name]) if name in LINES else
                       full_tables(part, record=True) if part[0] else "")
    return texts | {
        "time": time_block(runs, whole) if runs else "",
        "results": results_block(runs, seeds) if runs or seeds[0] else "",
        "latents": latent_notes([*runs.values()]) if runs else "",
        "cost": cost_block(runs["vamp"]) if "vamp" in runs else "",
        "speed": speed_block(bench) if bench.exists() else ""}


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
    recorded = {path.parent.name: read_metrics(path)
                for path in (assets / "runs").glob("*/metrics.json")}
    if missing := [name for name in models if name not in recorded]:
        return f"no recorded run of {', '.join(missing)} tells how long this will take"
    return (f"expected: about {expected_minutes(recorded, models, jobs, epochs, samples)} minutes, "
            "as recorded on two cores with one thread a model, about twice that without bfloat16; the "
            "progress bars know better")


@files.command
def main(argv=None):
    parser = files.Parser(__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of evaluated models, or of seed0 and so on")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument("--expect", type=int, metavar="JOBS", help="only say how long they take")
    parser.add_argument("--epochs", type=int, help="for --expect (default: as recorded)")
    parser.add_argument("--samples", type=int, help="for --expect (default: as recorded)")
    parser.add_argument("--docs", nargs="+", type=Path, metavar="FILE", help="renew their blocks")
    parser.add_argument("--assets", type=Path, default="assets",
                        help="the records that --expect and --docs read")
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
        runs = read_seeds(args.run, args.models)
        if alone := not find_seeds(args.run):       # each seed has a page of its own
            folders = [*find_models(args.run, args.models).values()]
            text = page.page(args.run, folders, read_runs(folders))
            files.write_atomic(args.run / "report.html", text)
        files.write_atomic(args.run / "comparison.md", f"# Comparison\n\n{full_tables(runs)}\n")
        columns, lines, _ = tabled(runs)
        print(plain(columns), *lines, sep="\n")
        print(f"{args.run / 'report.html'}: the figures, the tables and how to read them" if alone else
              f"{args.run / 'comparison.md'}: the tables; a report.html of each seed is in its folder")


if __name__ == "__main__":
    sys.exit(main())
