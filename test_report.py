"""Tests of report.py on invented records: every column from its source, blocks, forecast, page."""
import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import page as pages
import plot
import records
import report
from test_plot import NOTE, fake_run, stat

ROW = {"section": "mixture", "plain": None, "n": 5}
ROWS = [ROW | {"case": "B = 9 | K = 3", "ratio": 1.5, "expected": "about 1"},
        ROW | {"case": "forward", "plain": 0.0231, "ours": 0.00151, "ratio": 15.3,
               "bound_share": 0.61, "peak_mb": 12.0, "error": 3.1e-4, "expected": ">= 10"},
        ROW | {"case": "many", "ours": 0.2, "peak_mb": 153.0, "expected": "peak < 1000 MB"},
        ROW | {"case": "nobody asked", "ours": 4.1}]
TRIES = [{"change": "base", "val_elbo": [-87.31, -87.4, -87.2], "epochs": 60, "kept": True},
         {"change": "once", "val_elbo": [-9], "epochs": 9, "kept": False, "record_only": True}]
DOCUMENT = "T\n<!-- begin {0} -->\nold\n<!-- end {0} -->\n<!-- begin {1} --><!-- end {1} -->\nend\n"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Records in which no two models' numbers are alike: short runs, long ones, speed, recipe."""
    folder = tmp_path_factory.mktemp("assets")
    for i, run in enumerate(("runs/hvamp", "runs/vae", "runs/vamp", "paper/hvae", "paper/vae",
                             "paper/hvamp", "paper/vamp", "runs-float32/vae", "plane/vae",
                             "runs-float32/vamp", "runs-float32/hvamp"), 1):
        layers = {"kl1": stat(8 + i, 0.3), "kl2": stat(17 + i, 0.4)} if "/h" in run else {}
        fake_run(folder / run, recon=stat(-60 - i, 0.1), kl=stat(20 + i, 0.2), **layers,
                 elbo=stat(-80 - 2 * i, 0.3), nll=stat(90 - i, 0.01 * i), train_seconds=600.0 * i,
                 parameters=1000,
                 samples=500 if i < 4 else 5000, trained_in="bfloat16" if i < 4 else "float32",
                 active_units={"z1": i, "z2": i - 1} if layers else {"z": i})
    (folder / "bench.json").write_text(json.dumps(
        {"machine": {"cpu": "CPU"}, "torch": "2.14", "threads": 2,
         "gflops": {"float32": 231.4}, "rows": ROWS}))
    (folder / "runs-float32/time.json").write_text('{"seconds": 3200}')
    for name in ("recipe", "recipe-more"):
        tries = {"protocol": f"Validation, {name}.", "rows": TRIES}
        (folder / f"{name}.json").write_text(json.dumps(tries))
    return folder


def rows(text):
    """The lines of Markdown tables, without standard errors."""
    return [re.sub(r" ± [\d.]+", "", line).strip("| ") for line in text.splitlines()
            if line[:1] == "|" and "---" not in line]


def test_every_column_comes_from_its_source(assets):
    blocks = report.blocks(assets)
    assert rows(blocks["results"])[1:] == [
        "VAE + standard prior | -62.00 | 22.00 | -84.00 | 88.00 | 20 | 85.00 | 84.50",
        "VAE + VampPrior | -63.00 | 23.00 | -86.00 | **87.00** | 30 | **83.00** | 82.38",
        "HVAE + standard prior | - | - | - | - | - | 86.00 | 82.42",
        "HVAE + VampPrior | **-61.00** | 21.00 | **-82.00** | 89.00 | 10 | 84.00 | 81.24"]
    assert blocks["results"].splitlines()[7:9] == [
        "- `make all`: mnist, dynamic binarisation, 60 test images, S = 500, trained in bfloat16.",
        "- `make paper`: mnist, dynamic binarisation, 60 test images, S = 5,000, trained in float32."]
    assert rows(blocks["runs"])[3:] == [
        "HVAE + VampPrior | **-61.00** | 21.00 | **-82.00** | 89.00 | 81.24 | 12 | 10",
        "Model | Active units | KL1 | KL2 | Components in use",
        "VAE + standard prior | z 2 of 7 | - | - | -",
        "VAE + VampPrior | z 3 of 7 | - | - | 24.0 of 30 (80%)",
        "HVAE + VampPrior | z1 1 of 7, z2 0 of 7 | 9.00 | 18.00 | 24.0 of 30 (80%)"]
    assert rows(blocks["paper"])[1].split(" | ")[4] == "85.00"
    assert blocks["plane"] == ("Test ELBO in nats after 12 epochs in float32, one seed: VAE + standard "
                               "prior -98.00 ± 0.30.")
    assert blocks["runs-float32"] == (
        "NLL in nats at S = 5,000, trained in float32: VAE + standard prior 82.00 ± 0.08, VAE + VampPrior "
        "80.00 ± 0.10, HVAE + VampPrior 79.00 ± 0.11.")
    assert blocks["decay"] == "" and "perplexity" in blocks["latents"]
    assert blocks["recipe"].splitlines()[4:] == ["| base | -87.30 ± 0.10 | 3 | 60 | yes |"]
    assert blocks["recipe-more"].splitlines()[0] == "Validation, recipe-more."
    # of K = 500 there are 470 pseudo-inputs of 784 pixels more than of K = 30; 7 latents
    assert rows(blocks["cost"])[1] == "500 | 369,480 | 20% | 0.0 | 1 | 3 | 3"
    assert rows(blocks["speed"]) == [       # what compares ours with ours is no speed-up
        "mixture | Plain | Ours | Times faster | Repeats | Share of the bound | Peak memory | "
        "Error | Expected",
        "forward | 23.1 ms | 1.51 ms | 15.3 | 5 | 61% | 12 MB | 3.1e-04 | >= 10",
        "many | - | 200 ms | - | 5 | - | 153 MB | - | peak < 1000 MB",
        "growth | Growth | Repeats | Expected", "B = 9 \\| K = 3 | 1.5 | 5 | about 1"]
    assert blocks["time"].split("minutes", 1)[0] == "`make all` takes about 32 "
    assert blocks["time"].endswith("it took 53.")
    assert report.time_block(records.read_seeds(assets / "runs")[0], None).endswith("aside.")


def test_several_seeds_have_their_spread_and_the_error_of_the_images_once(assets, tmp_path, capsys):
    for seed, nll in (0, 82.0), (1, 82.4), (10, 81.9):
        fake_run(tmp_path / f"seed{seed}/vamp", nll=stat(nll, 0.2 + seed / 100), kl=stat(25 + seed, 0.1),
                 train_seconds=60.0 * seed, epochs=12 - (seed > 9), active_units={"z": 3 + seed},
                 samples=5000, trained_in="bfloat16" if seed else "float32")
    fake_run(tmp_path / "seed1/vae", samples=5000, nll=stat(84, 0.2))
    shutil.copytree(tmp_path / "seed0", tmp_path / "seed0-old2")        # no seed, and so no other's
    (tmp_path / "seed2").mkdir()
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == (     # sd of 82, 82.4, 81.9
        "VAE + VampPrior -60.00 ± 0.00 28.67 ± 5.51 -85.00 ± 0.00 82.10 ± 0.26 82.00, 82.40, "
        "81.90 0.24").split()
    text = report.full_tables(records.read_seeds(tmp_path), record=True)
    vamp, vae, _, units = rows(text)[1:5]
    assert vamp.split(" | ")[5:] == ["82.00, 82.40, 81.90", "0.24", "82.38", "12, 11", "<1, 1, 10"]
    assert units.split(" | ")[1] == "z 6.7 of 7" and vae.split(" | ")[4:6] == ["84.00", "84.00"]
    assert "| 84.00 | 84.00 |" in text      # one seed has no spread
    assert "S = 5,000, trained in bfloat16 and float32." in text and records.SPREAD[True] in text
    assert not (tmp_path / "report.html").exists() and (tmp_path / "comparison.md").exists()
    fake_run(tmp_path / "vae")
    assert report.main([str(tmp_path)]) == 2 and "beside the folders" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "vae")
    path = tmp_path / "seed1/vamp/metrics.json"
    path.write_text(path.read_text().replace('"samples": 5000', '"samples": 500'))
    assert report.main([str(tmp_path)]) == 2 and "its seeds differ in data" in capsys.readouterr().err


@pytest.mark.parametrize("change, nll, paper", [
    ({"nll": stat(82.004, 0.1)}, ["**82.00 ± 0.10**"] * 2, "82.38"),      # equal as printed
    ({"N": 1}, ["82.00 ± 0.10", "82.00"], "82.38"),
    ({"dataset": "fashion"}, ["82.00 ± 0.10"] * 2, "227.35"),
    ({"samples": 5000}, ["82.00 ± 0.10"] * 2, "82.38"),
    ({"dataset": "mnist5k", "note": NOTE}, ["82.00 ± 0.10"] * 2, "-"),
    ({"binarize": "static"}, ["82.00 ± 0.10"] * 2, "-")])
def test_only_what_was_measured_alike_is_compared(tmp_path, change, nll, paper):
    fake_run(tmp_path / "vamp", nll=stat(82.003, 0.1))
    fake_run(tmp_path / "mog", **{"nll": stat(82.003, 0.1), "prior": "vamp"} | change)
    named = [*records.read_seeds(tmp_path, ["vamp", "mog"])[0].items()]
    assert records.stats("nll", [m for _, m in named]) == nll
    assert [cell for _, (cell,) in report.published([named[1][1]])] == [paper] * (paper != "-")
    *lines, last = records.data_lines([m for _, m in named])
    assert last.startswith("Warning: ") == (len(lines) == 2) == ("*" not in nll[0])
    assert change.get("note", "") in "".join(lines)


def test_bits_per_dimension_have_a_column_where_a_model_has_them(tmp_path):
    for name, bits in ("vamp", {"bits_per_dim": stat(4.57, 0.02)}), ("mog", {}), (
            "vae", {"bits_per_dim": stat(4.63, 0.02)}):
        fake_run(tmp_path / name, **bits)
    assert report.main([str(tmp_path)]) == 0
    table = rows((tmp_path / "comparison.md").read_text())
    assert [line.rpartition(" | ")[2] for line in table[:4]] == ["Bits/dim", "4.63", "**4.57**", "-"]
    assert report.main([str(tmp_path), "--models", "mog"]) == 0
    assert "Bits" not in (tmp_path / "comparison.md").read_text()


def test_comparison_and_terminal(tmp_path, capsys):
    fake_run(tmp_path / "vamp")
    fake_run(tmp_path / "vae", nll=stat(101.5, 0.3), label="VAE |\nstandard")
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "Model                    Recon            KL           ELBO            NLL",
        "VAE | standard   -60.00 ± 0.21  25.00 ± 0.07  -85.00 ± 0.23  101.50 ± 0.30",
        "VAE + VampPrior  -60.00 ± 0.21  25.00 ± 0.07  -85.00 ± 0.23   82.00 ± 0.22"]
    assert rows((tmp_path / "comparison.md").read_text())[1].startswith("VAE \\| standard | **-60")
    assert report.main([str(tmp_path), "--models", "vamp", "vae"]) == 0
    assert rows((tmp_path / "comparison.md").read_text())[1].startswith("VAE + VampPrior")


def test_expected_minutes(assets):      # training 20, 30 and 10, and one each to evaluate
    for more, minutes in (((["vae", "vamp", "hvamp"], 2), 32), ((["vae", "vamp", "hvamp"], 1), 63),
                          ((["vamp"], 1, None, 20000), 70), ((["vamp"], 1, 6), 16)):
        assert report.expectation(assets, *more).startswith(f"expected: about {minutes} minutes")
    assert report.expectation(assets, ["vamp", "mog"], 1).startswith("no recorded run of mog")


def test_documents_are_renewed(assets, tmp_path):
    path, blocks = tmp_path / "README.md", report.blocks(assets)
    path.write_text(DOCUMENT.format("results", "speed"))
    for records, texts in ((assets, blocks), (tmp_path, dict.fromkeys(blocks, ""))):
        assert report.main(["--docs", str(path), "--assets", str(records)]) == 0
        results, speed = (texts[name] + "\n" * bool(texts[name]) for name in ("results", "speed"))
        text = DOCUMENT.format("results", "speed").replace("old\n", results)
        assert path.read_text() == text.replace("--><!", f"-->\n{speed}<!")


@pytest.mark.parametrize("args, text, expected", [
    ("--docs A B --assets .", "<!-- begin results -->", "B needs one '<!-- begin results"),
    ("--docs A B --assets .", "<!-- end speed --><!-- begin speed -->", "B needs one"),
    ("--docs A B --assets .", "<!-- begin runs --><!-- end runs -->" * 2, "B needs one"),
    ("--docs A B --assets bad", "", "damaged (it lacks 'machine'): run bench.py again"),
    ("--docs A B --assets none", "", "none is not a folder"), ("bad", "", "run evaluate.py"),
    ("", "", "give one of: a folder"), ("--expect 0 --models a", "", "1 or more")])
def test_refusals(tmp_path, monkeypatch, capsys, args, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bench.json").write_text('{"rows": [{"section": "a", "expected": "b"}]}')
    (tmp_path / "A").write_text(DOCUMENT.format("runs", "paper"))
    (tmp_path / "B").write_text(text)
    assert report.main(args.split()) == 2 and expected in capsys.readouterr().err
    assert (tmp_path / "B").read_text() == text and "old" in (tmp_path / "A").read_text()


# ------------------------------------------------------------------------------------- the page
DOT = base64.b64decode(        # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
    "Jggg==")
EVIL = "<script>alert(1)</script>&\"'</title><img src=http://a.b/c>"


class Page(HTMLParser):
    """A folder's page as made now: its tags [(name, attributes)] and its text, a line a block."""
    BLOCKS = "p", "tr", "h1", "h2", "h3", "title", "figcaption", "summary"

    def __init__(self, folder):
        super().__init__()
        self.tags, self.text = [], ""
        assert report.main([str(folder)]) == 0
        self.feed((folder / "report.html").read_text())
        self.text = self.text.replace("\xa0", " ")

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.text += " | " if tag in ("th", "td") else "\n" * (tag in self.BLOCKS)

    def handle_data(self, data):
        self.text += "" if self.tags[-1:] == [("style", {})] else data

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def dots(folder, *names, **changes):
    """A folder of invented models; every figure that there can be is a picture of one pixel."""
    for name in names:
        fake_run(folder / name, **changes.get(name, {}))
        unlike = {"vae": {"pseudo_inputs", "film", "shared_z2"}, "vamp": {"shared_z2"},
                  "hvae": {"pseudo_inputs", "film"}}.get(name, set())
        for figure in {*pages.OF_MODEL} - unlike:
            (folder / name / f"{figure}.png").write_bytes(DOT)
    for figure in pages.COMPARED:
        (folder / f"{figure}.png").write_bytes(DOT)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of two models with its figures, and a note too long for a phone's line."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("vae", "hvamp"):
        plot.main([str(fake_run(folder / name, note="x" * 90))])
    plot.main([str(folder)])
    return folder


def test_page_is_one_file_that_shows_every_figure(drawn):
    page = Page(drawn)
    pictures = page.all("img")
    shown = [base64.b64decode(p["src"].removeprefix("data:image/png;base64,")) for p in pictures]
    assert sorted(shown) == sorted(path.read_bytes() for path in drawn.rglob("*.png"))
    alts = [picture["alt"] for picture in pictures]
    assert len({*alts}) == len(alts) and all("VAE + " in alt and "x" * 90 in alt for alt in alts)
    assert {tag for tag, _ in page.tags}.isdisjoint(["script", "link", "iframe", "object", "base"])
    # the text, too, is without an address that something could be loaded from
    source = re.sub(r"data:image/png;base64,[\w+/=]+", "", (drawn / "report.html").read_text())
    assert not re.search(r"https?:|//|url\(|@import|" + re.escape(str(drawn)), source)
    targets = [link["href"][1:] for link in page.all("a")]
    assert targets == [s["id"] for s in page.all("section")] and len({*targets}) == len(targets)
    assert page.tags[0] == ("html", {"lang": "en"})
    viewport, = [meta for meta in page.all("meta") if meta.get("name") == "viewport"]
    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert len(page.all("h1")) == len(page.all("title")) == 1
    assert all(th["scope"] in ("row", "col") for th in page.all("th"))
    headings = re.findall(r"<h2>(.*?)</h2>", source)
    assert headings == ["What was run", "Results", *(heading for heading, *_ in pages.SECTIONS),
                        "More of each model"]


def test_page_holds_what_was_run_and_the_tables(tmp_path):
    probe = {"probe_accuracy": 0.9, "knn_accuracy": 0.96, "knn_k": 15}
    dots(tmp_path, "vae", "hvamp", hvamp=probe | {"nll": stat(80, 0.1), "train_seconds": 90.0})
    config = {"args": {"model": "hvae", "prior": "vamp", "seed": 7, "lr": 0.01, "warmup": 1},
              "recipe": {"name": "quick", "values": {"epochs": 2, "lr": 0.02, "warmup": 1},
                         "changed": {"lr": 0.01}}, "data": {"train": 50000}}
    (tmp_path / "hvamp" / "config.json").write_text(json.dumps(config))
    lines = [line.strip() for line in Page(tmp_path).text.splitlines()]
    markdown = (tmp_path / "comparison.md").read_text()
    for line in ("Training images | - | 50,000 |", "Recipe | - | quick, lr 0.01 |",
                 "Optimisation | - | lr 0.01, warmup 1 |",
                 "Seed | - | 7 |", "Training, minutes | 10.0 | 1.5 |", "Test images | 60 |",
                 "Epochs | 12; epoch 9 kept |", "Data | mnist |"):
        assert line in lines
    table = [row[2:].replace("**", "") for row in markdown.splitlines() if row[:2] == "| "
             and "---" not in row]
    assert len(table) == 6 and {*table} <= {*lines}        # the page's tables are comparison.md's
    assert table[3].endswith("Linear probe | k-NN, k = 15 |")
    assert table[5].endswith("| 90.0 ± 3.9% | 96.0 ± 2.5% |")
    assert "<strong>80.00\xa0±\xa00.10</strong>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("changes, says, never", [
    ({"vae": {"recon": stat(-57, 0.2), "elbo": stat(-80, 0.2), "nll": stat(78, 0.2),
              "active_units": {"z": 5}}},       # the standard prior is better
     ["VAE + standard prior has the better test reconstruction, -57.00 ± 0.20 nats, 3.00 ± 0.",
      "ahead of VAE + VampPrior (± standard error of the difference image by image)",
      "What the prior changes\n\nVAE + standard prior has the better test NLL, 78.00 ± 0.20 nats, 4",
      "VAE + standard prior has the better test ELBO",
      "more units of z active under N(0, I)", "Active: z 5 of 7 (VAE + standard prior), z 3 of 7 "
      "(VAE + VampPrior)."],
     "VampPrior has the be|ahead of VAE \\+ standard|Under N|neither|has the best"),
    ({"vamp": {"recon": stat(-57, 0.2), "elbo": stat(-80, 0.2), "nll": stat(78, 0.2)}},
     ["VAE + VampPrior has the better test reconstruction, -57.00",
      "What the prior changes\n\nVAE + VampPrior has the better test NLL, 78.00 ± 0.20 nats, 4.00 ± 0.",
      "ahead of VAE + standard prior (", "VAE + VampPrior has the better test ELBO"],
     "standard prior has the be|ahead of VAE \\+ Vamp|Under N|neither"),
    ({"vamp": {"nll": stat(78, 0.2)}, "hvamp": {"nll": stat(70, 0.2)}},      # better of two, best of all
     ["What the prior changes\n\nVAE + VampPrior has the better test NLL, 78.00",
      "HVAE + VampPrior has the best test NLL, 70.00"], "VAE \\+ VampPrior has the best test NLL, 78"),
    ({}, ["What the prior changes\n\nVAE + standard prior and VAE + VampPrior are 0.00 ± 0.",
          "nats apart in test NLL (± standard error of the difference image by image): neither is ahead",
          "Active: z 3 of 7 (VAE + standard prior), z 3 of 7 (VAE + VampPrior)."],
     "be(st|tter) test|ahead of"),
    ({"vamp": {"nll": stat(81.8, 0.22)}}, [" 0.20 ± 0."], "be(st|tter) test"),
    ({"vamp": {"nll": stat(81.4, 0.22)}}, ["better test NLL, 81.40 ± 0.22 nats, 0.60 ± 0."],
     "apart in test NLL"),
    ({"vamp": {"nll": stat(70, 0.2), "dataset": "mnist5k", "note": NOTE}},     # never compared
     ["Warning: measured on different data", NOTE,
      "Test NLL: 82.00 ± 0.22 (VAE + standard prior), 70.00 ± 0.20 (VAE + VampPrior) nats"],
     "be(st|tter) test|ahead|What the prior changes"),
    ({"vamp": {"images": 39, "nll": stat(70, 0.2)}}, ["Test NLL: 82.00 ± 0.22 (VAE + standard prior), "
     "70.00"], "be(st|tter) test|ahead|What the prior changes"),       # other images of the same name
    ({"vae": {"N": 1}, "vamp": {"N": 1, "nll": stat(70, None)}}, ["(VAE + VampPrior)"],
     "be(st|tter) test|ahead|What the prior changes"),
    ({"vae": {"nll": stat(99, 0.1), "own": 90}, "vamp": {"nll": stat(90, 0.1)},
      "hvae": {"nll": stat(91, 0.1)}},
     ["VAE + VampPrior and VAE + standard prior are 9.00 ± "], "be(st|tter) test NLL")])
def test_page_claims_only_what_the_numbers_say(tmp_path, changes, says, never):
    text = Page(dots(tmp_path, "vae", "vamp", *{*changes} - {"vae", "vamp"}, **changes)).text
    assert [line for line in says if line not in text] == []
    assert re.findall(never, text) == []


def test_page_reads_the_logs_and_arrays(tmp_path):
    folder = dots(tmp_path, "vae", "hvamp", vae={"epochs": 40})
    for name, values in (("vae", range(40)), ("hvamp", [5] * 12)):
        path = folder / name / "log.csv"
        lines = [line.split(",") for line in path.read_text().splitlines()]
        for line, value in zip(lines[1:], values):
            line[lines[0].index("val_elbo")], line[lines[0].index("train_elbo")] = str(value), "3.5"
        path.write_text("\n".join(map(",".join, lines)))
    text, (vae, hvamp) = Page(folder).text, records.read_runs([folder / "vae", folder / "hvamp"])
    assert ("+2.00 nats and still rising (VAE + standard prior), +0.00 nats and level (HVAE + "
            "VampPrior).") in text
    assert ("In epoch 9 of 40 the ELBO is 3.50 in training and 8.00 in validation, 4.50 nats "
            "better.") in text and "and 5.00 in validation, 1.50 nats better." in text
    use, n = hvamp.arrays["pseudo_use"], 20
    assert f"The {n} shown take {use[:n].sum():.0%} of the test" in text
    assert "in use are 24.0 of 30 (80%)." in text
    low, *middle = np.percentile(vae.arrays["log_px"], [0, 25, 75])
    assert (f"Half of the test images lie between {middle[0]:.1f} and {middle[1]:.1f}, the least "
            f"likely at {low:.1f}.") in text
    difference = vae.arrays["log_px"] - hvamp.arrays["log_px"]
    assert f" ± {np.std(difference, ddof=1) / 60 ** 0.5:.2f} nats apart in test NLL" in text
    for run in (vae, hvamp):
        far, usual = (np.median(run.arrays[f"{name}_distance"])
                      for name in ("sample", "reconstruction"))
        assert f"{far:.1f} beside {usual:.1f} of reconstructed test images ({run.label})" in text
    flat = Page(dots(tmp_path / "flat", "vae", vae={"D": 2})).text
    assert "the prior's log density" in flat and "Rings" not in flat and "log density" not in text
    assert "Rings" in text and "Circles are N(0, I)" in text


def test_page_of_extreme_runs(tmp_path):
    evil = {"label": EVIL, "note": EVIL, "dataset": f"/private/{EVIL}", "device": EVIL, "N": 1,
            "D": 1, "K": 1, "epochs": 1, "images": 1, "recon": stat(-60, None)}
    folder = dots(tmp_path, "hvamp", hvamp=evil)
    arrays = dict(np.load(folder / "hvamp" / "arrays.npz"))
    del arrays["labels"]
    np.savez(folder / "hvamp" / "arrays.npz", **arrays)
    page = Page(folder)
    source = (folder / "report.html").read_text()
    assert "<script" not in source and "<img src" not in source and "/private" not in source
    assert source.count("</title>") == 1 and f"{EVIL}\n\n\nReport on" in page.text
    assert all(p["src"][:5] == "data:" and EVIL in p["alt"] for p in page.all("img"))
    assert "one epoch only" in page.text
    (folder / "samples.png").unlink()
    assert len(Page(folder).all("img")) == len(page.all("img")) - 1
    (folder / "latents.png").write_bytes(b"no picture")
    before = (folder / "report.html").read_bytes()
    assert report.main([str(folder)]) == 2 and (folder / "report.html").read_bytes() == before


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's package chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(drawn, tmp_path, width):
    """Inside a frame of a phone's width, as a headless window may not be that narrow."""
    assert report.main([str(drawn)]) == 0
    page = (drawn / "report.html").read_text()
    (tmp_path / "frame.html").write_text(f"""<!doctype html><pre id="out"></pre>
        <iframe id="f" style="border: 0; width: {width}px" srcdoc="{html.escape(page)}"></iframe>
        <script>f.onload = () => {{
          const w = f.contentWindow, d = w.document, images = [...d.images];
          d.querySelectorAll("details").forEach(e => e.open = true);
          out.textContent = JSON.stringify({{
            width: w.innerWidth, scroll: d.documentElement.scrollWidth, images: images.length,
            missing: images.filter(i => !i.complete || !i.naturalWidth).length,
            loaded: w.performance.getEntriesByType("resource").map(e => e.name),
            wide: [...d.querySelectorAll(".picture")].filter(e => e.scrollWidth > e.clientWidth)
              .length }}) }}</script>""")
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--enable-logging=stderr", "--window-size=1400,900", "--virtual-time-budget=5000",
         f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout)[1]))
    # on a phone a figure keeps a legible width and scrolls in its box; else all fits
    assert (seen.pop("wide") > 0) == (width == 390)
    assert seen == {"width": width, "scroll": width, "images": len([*drawn.rglob("*.png")]),
                    "loaded": [], "missing": 0}
    assert "CONSOLE" not in done.stderr
