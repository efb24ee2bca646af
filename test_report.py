"""Tests of report.py on invented records: every column from its source, blocks, forecast."""
import json
import re

import pytest

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
                             "paper/hvamp", "paper/vamp", "runs-5000/vae"), 1):
        layers = {"kl1": stat(8 + i, 0.3), "kl2": stat(17 + i, 0.4)} if "/h" in run else {}
        fake_run(folder / run, recon=stat(-60 - i, 0.1), kl=stat(20 + i, 0.2), **layers,
                 elbo=stat(-80 - 2 * i, 0.3), nll=stat(90 - i, 0.01 * i), train_seconds=600.0 * i,
                 **({"samples": 500, "trained_in": "bfloat16"} if i < 4 else {"samples": 5000}),
                 active_units={"z1": i, "z2": i - 1} if layers else {"z": i})
    (folder / "bench.json").write_text(json.dumps(
        {"machine": {"cpu": "CPU"}, "torch": "2.14", "threads": 2, "gflops": 231.4, "rows": ROWS}))
    (folder / "recipe.json").write_text(json.dumps({"protocol": "Validation.", "rows": TRIES}))
    return folder


def rows(text):
    """The lines of Markdown tables, without standard errors."""
    return [re.sub(r" ± [\d.]+", "", line).strip("| ") for line in text.splitlines()
            if line[:1] == "|" and "---" not in line]


def test_every_column_comes_from_its_source(assets):
    blocks = report.blocks(assets)
    assert rows(blocks["results"])[1:] == [
        "VAE + standard prior | -62.00 | 22.00 | -84.00 | 88.00 | 20 | 85.00 | 50 | 84.50",
        "VAE + VampPrior | -63.00 | 23.00 | -86.00 | **87.00** | 30 | **83.00** | 70 | 82.38",
        "HVAE + standard prior | - | - | - | - | - | 86.00 | 40 | 82.42",
        "HVAE + VampPrior | **-61.00** | 21.00 | **-82.00** | 89.00 | 10 | 84.00 | 60 | 81.24"]
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
    assert rows(blocks["runs-5000"])[1].split(" | ")[4] == "82.00"
    assert blocks["recipe"].splitlines()[4:] == ["| base | -87.30 ± 0.10 | 3 | 60 | yes |"]
    assert rows(blocks["speed"]) == [       # what compares ours with ours is no speed-up
        "mixture | Plain | Ours | Times faster | Repeats | Share of the bound | Peak memory | "
        "Error | Expected",
        "forward | 23.1 ms | 1.51 ms | 15.3 | 5 | 61% | 12 MB | 3.1e-04 | >= 10",
        "many | - | 200 ms | - | 5 | - | 153 MB | - | peak < 1000 MB",
        "growth | Growth | Repeats | Expected", "B = 9 \\| K = 3 | 1.5 | 5 | about 1"]
    assert blocks["time"].startswith("`make all` takes about 32 minutes on the two cores")
    assert blocks["collapse"].startswith("- VAE: fewer units of z active under N(0, I), 2 of 7")


@pytest.mark.parametrize("change, nll, paper", [
    ({"nll": stat(82.004, 0.1)}, ["**82.00 ± 0.10**"] * 2, "82.38"),      # equal as printed
    ({"N": 1}, ["82.00 ± 0.10", "82.00"], "82.38"),
    ({"samples": 5000}, ["82.00 ± 0.10"] * 2, "82.38"),
    ({"dataset": "mnist5k", "note": NOTE}, ["82.00 ± 0.10"] * 2, "-"),
    ({"binarize": "static"}, ["82.00 ± 0.10"] * 2, "-")])
def test_only_what_was_measured_alike_is_compared(tmp_path, change, nll, paper):
    fake_run(tmp_path / "vamp", nll=stat(82.003, 0.1))
    fake_run(tmp_path / "mog", **{"nll": stat(82.003, 0.1), "prior": "vamp"} | change)
    named = report.read_named(tmp_path, ["vamp", "mog"])
    assert report.stats("nll", [m for _, m in named]) == nll and report.paper(named[1][1]) == paper
    *lines, last = report.data_lines(named)
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
