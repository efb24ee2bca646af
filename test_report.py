"""Tests of report.py on invented records: every column from its source, blocks, forecast."""
import json

import pytest

import report
from test_plot import NOTE, fake_run, stat

ROW = {"section": "mixture", "plain": None, "n": 5}
ROWS = [ROW | {"case": "B = 9 | K = 3", "ratio": 1.5, "ratio_low": 1.4, "expected": "about 1"},
        ROW | {"case": "forward", "plain": 0.0231, "ours": 0.00151, "ratio": 15.3,
               "ratio_low": 14.8, "ratio_high": 15.9, "bound_share": 0.61, "peak_mb": 12.0,
               "error": 3.1e-4, "expected": ">= 10"},
        ROW | {"case": "many", "ours": 0.2, "peak_mb": 153.0, "expected": "peak < 1000 MB"},
        ROW | {"section": "growth", "case": "epoch", "ours": 4.1, "ratio": 1.02, "expected": "1.1"},
        ROW | {"case": "nobody asked", "ours": 4.1}]
TRIES = [{"change": "base", "val_elbo": [-87.31, -87.4, -87.2], "epochs": 60, "kept": True},
         {"change": "once", "val_elbo": [-9], "epochs": 9, "kept": False, "record_only": True},
         {"change": "other", "val_elbo": [-88.0], "epochs": 61, "kept": False}]
DOCUMENT = "T\n<!-- begin {0} -->\nold\n<!-- end {0} -->\n<!-- begin {1} --><!-- end {1} -->\nend\n"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Records in which no two models' numbers are alike: short runs, long ones, speed, recipe."""
    folder = tmp_path_factory.mktemp("assets")
    for i, run in enumerate(("runs/hvamp", "runs/vae", "runs/vamp", "paper/hvae", "paper/vae",
                             "paper/hvamp", "paper/vamp"), 1):
        layers = {"kl1": stat(8 + i, 0.3), "kl2": stat(17 + i, 0.4)} if "/h" in run else {}
        fake_run(folder / run, recon=stat(-60 - i, 0.1), kl=stat(20 + i, 0.2), **layers,
                 elbo=stat(-80 - 2 * i, 0.3), nll=stat(90 - i, 0.01 * i), train_seconds=600.0 * i,
                 samples=500 if i < 4 else 5000,
                 active_units={"z1": i, "z2": i - 1} if layers else {"z": i})
    (folder / "bench.json").write_text(json.dumps({
        "machine": {"cpu": "CPU", "os": "Linux"}, "torch": "2.14", "threads": 2, "gflops": 231.4,
        "rows": ROWS}))
    (folder / "recipe.json").write_text(json.dumps({"protocol": "Validation.", "rows": TRIES}))
    return folder


def rows(text):
    return [line.strip("| ") for line in text.splitlines() if line[:1] == "|" and "---" not in line]


def test_results_block_takes_every_column_from_its_source(assets):
    text = report.blocks(assets)["results"]
    assert rows(text) == [
        "Model | Recon | KL | ELBO | NLL | Training, minutes | NLL of `make paper` | "
        "Training, minutes | Paper's NLL",
        "VAE + standard prior | -62.00 ± 0.10 | 22.00 ± 0.20 | -84.00 ± 0.30 | 88.00 ± 0.02 | 20 | "
        "85.00 ± 0.05 | 50 | 84.50",
        "VAE + VampPrior | -63.00 ± 0.10 | 23.00 ± 0.20 | -86.00 ± 0.30 | **87.00 ± 0.03** | 30 | "
        "**83.00 ± 0.07** | 70 | 82.38",
        "HVAE + standard prior | - | - | - | - | - | 86.00 ± 0.04 | 40 | 82.42",
        "HVAE + VampPrior | **-61.00 ± 0.10** | 21.00 ± 0.20 | **-82.00 ± 0.30** | 89.00 ± 0.01 | "
        "10 | 84.00 ± 0.06 | 60 | 81.24"]
    assert text.splitlines()[7:] == [
        "- `make all`: mnist, dynamic binarisation, 60 test images, S = 500.",
        "- `make paper`: mnist, dynamic binarisation, 60 test images, S = 5,000.",
        "- Nats per image, mean ± standard error over the test images. Lower NLL is better; higher "
        "Recon and ELBO are."]


def test_blocks_of_results(assets):
    blocks = report.blocks(assets)
    runs, paper = rows(blocks["runs"]), rows(blocks["paper"])
    assert runs[0].endswith("NLL | Paper's NLL | Epochs | Training, minutes")
    assert runs[3] == ("HVAE + VampPrior | **-61.00 ± 0.10** | 21.00 ± 0.20 | **-82.00 ± 0.30** | "
                       "89.00 ± 0.01 | 81.24 | 12 | 10")
    assert runs[4:] == [
        "Model | Active units | KL1 | KL2 | Components in use",
        "VAE + standard prior | z 2 of 7 | - | - | -",
        "VAE + VampPrior | z 3 of 7 | - | - | 24.0 of 30 (80%)",
        "HVAE + VampPrior | z1 1 of 7, z2 0 of 7 | 9.00 ± 0.30 | 18.00 ± 0.40 | 24.0 of 30 (80%)"]
    assert "S = 500." in blocks["runs"] and "S = 5,000." in blocks["paper"]
    assert paper[1].split(" | ")[4] == "85.00 ± 0.05" and len(paper) == 10
    assert rows(blocks["recipe"])[1:] == ["base | -87.30 ± 0.10 | 3 | 60 | yes",
                                          "other | -88.00 | 1 | 61 | no"]
    assert blocks["recipe"].startswith("Validation.\n")
    assert "CPU, Linux; torch 2.14, 2 threads; a" in blocks["speed"] and "231 G" in blocks["speed"]
    assert rows(blocks["speed"]) == [       # what compares ours with ours is no speed-up
        "mixture | Plain | Ours | Times faster | from | to | Repeats | Share of the bound | "
        "Peak memory | Error | Expected",
        "forward | 23.1 ms | 1.51 ms | 15.3 | 14.8 | 15.9 | 5 | 61% | 12 MB | 3.1e-04 | >= 10",
        "many | - | 200 ms | - | - | - | 5 | - | 153 MB | - | peak < 1000 MB",
        "growth | Ours | Growth | from | Repeats | Expected",
        "B = 9 \\| K = 3 | - | 1.5 | 1.4 | 5 | about 1", "epoch | 4.1 s | 1.02 | - | 5 | 1.1"]


def named(*changes):
    base = {"label": "m", "dataset": "mnist", "note": "", "binarize": "dynamic", "samples": 500,
            "images": 100, "model": "vae", "prior": "vamp", "recon": stat(-60.0, 0.1),
            "kl": stat(25.0, 0.1), "elbo": stat(-85.0, 0.1), "nll": stat(82.0, 0.1)}
    return [(f"r{i}", base | change) for i, change in enumerate(changes)]


def test_bold():
    columns = report.results_columns(named(
        {"nll": stat(82.003, 0.1)}, {"nll": stat(82.004, 0.1), "elbo": stat(-84, 0.1)},
        {"nll": stat(82.4, 0.1), "kl": stat(2, 0)}))
    assert columns["NLL"] == ["**82.00 ± 0.10**"] * 2 + ["82.40 ± 0.10"]    # equal as printed
    assert columns["ELBO"] == ["-85.00 ± 0.10", "**-84.00 ± 0.10**", "-85.00 ± 0.10"]
    assert "*" not in "".join(columns["KL"]) and columns["Model"] == ["m (r0)", "m (r1)", "m (r2)"]
    assert report.results_columns(named({"images": 1}))["NLL"] == ["82.00"]     # alone, no error


@pytest.mark.parametrize("change", [{"dataset": "mnist5k", "note": NOTE}, {"samples": 5000},
                                    {"images": 1000}, {"binarize": "static"}])
def test_what_was_measured_differently_is_not_compared(change):
    pair = named({}, change)
    lines = report.data_lines(pair)
    assert "*" not in "".join(report.results_columns(pair)["NLL"]) and len(lines) == 3
    assert lines[2].startswith("Warning: ") and change.get("note", "") in lines[1]
    assert report.paper(pair[0][1]) == "82.38" and len(report.data_lines(pair[:1])) == 1
    assert report.paper(pair[1][1]) == ("-" if {"dataset", "binarize"} & set(change) else "82.38")


def test_comparison_and_terminal(tmp_path, capsys):
    fake_run(tmp_path / "vamp", note=NOTE)
    fake_run(tmp_path / "vae", note=NOTE, nll=stat(101.5, 0.3), label="VAE |\nstandard",
             mutual_information=stat(9.2, 0), marginal_kl=stat(2, 0))   # old records hold these
    assert report.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "Model                    Recon            KL           ELBO            NLL",
        "VAE | standard   -60.00 ± 0.21  25.00 ± 0.07  -85.00 ± 0.23  101.50 ± 0.30",
        "VAE + VampPrior  -60.00 ± 0.21  25.00 ± 0.07  -85.00 ± 0.23   82.00 ± 0.22"]
    assert NOTE in lines[4] and lines[-1].startswith(f"{tmp_path}: comparison.md")
    text = (tmp_path / "comparison.md").read_text()
    assert rows(text)[1].startswith("VAE \\| standard | **-60") and NOTE in text
    assert rows(text)[2].endswith("| **82.00 ± 0.22**") and "utual" not in text
    assert report.main([str(tmp_path), "--models", "vamp", "vae"]) == 0
    assert rows((tmp_path / "comparison.md").read_text())[1].startswith("VAE + VampPrior")


def test_expected_minutes(assets):      # training 20, 30 and 10, and one each to evaluate
    three = ["vae", "vamp", "hvamp"]
    for more, minutes in (((three, 2), 32), ((three, 1), 63), ((["vamp"], 1, None, 20000), 70),
                          ((["vamp"], 1, 6), 16)):
        assert report.expectation(assets, *more).startswith(f"expected: about {minutes} minutes")
    assert report.expectation(assets, ["vamp", "mog"], 1).startswith("no recorded run of mog")
    blocks = report.blocks(assets)
    assert blocks["time"].startswith("`make all` takes about 32 minutes on the two cores")
    assert blocks["collapse"] == (          # by the short runs alone
        "- VAE: fewer units of z active under N(0, I), 2 of 7, than under the VampPrior, 3; KL "
        "22.00 and 23.00, reconstruction -62.00 and -63.00 nats per image.")


def test_documents_are_renewed(assets, tmp_path):
    paths, blocks = [tmp_path / "README.md", tmp_path / "RESULTS.md"], report.blocks(assets)
    paths[0].write_text(DOCUMENT.format("results", "speed"))
    paths[1].write_text(DOCUMENT.format("runs", "paper"))
    for _ in range(2):      # the second time changes nothing
        assert report.main(["--docs", *map(str, paths), "--assets", str(assets)]) == 0
        for path, one, two in ((paths[0], "results", "speed"), (paths[1], "runs", "paper")):
            text = DOCUMENT.format(one, two).replace("old", blocks[one])
            assert path.read_text() == text.replace("--><!", f"-->\n{blocks[two]}\n<!")
    (tmp_path / "none").mkdir()
    assert report.main(["--docs", str(paths[0]), "--assets", str(tmp_path / "none")]) == 0
    assert paths[0].read_text() == DOCUMENT.format("results", "speed").replace(
        "old\n", "").replace("--><!", "-->\n<!")


@pytest.mark.parametrize("args, text, expected", [
    ("--docs A B --assets .", "<!-- begin results -->", "B needs one '<!-- begin results"),
    ("--docs A B --assets .", "<!-- end speed --><!-- begin speed -->", "B needs one"),
    ("--docs A B --assets .", "<!-- begin runs --><!-- end runs -->" * 2, "B needs one"),
    ("--docs A B --assets bad", "", "damaged (it lacks 'machine'): run bench.py again"),
    ("--docs A B --assets none", "", "none is not a folder"), ("bad", "", "run evaluate.py"),
    ("", "", "give a folder"), ("--expect 0 --models a", "", "1 or more")])
def test_refusals(tmp_path, monkeypatch, capsys, args, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bench.json").write_text('{"rows": [{"section": "a", "expected": "b"}]}')
    (tmp_path / "A").write_text(DOCUMENT.format("runs", "paper"))
    (tmp_path / "B").write_text(text)
    assert report.main(args.split()) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert (tmp_path / "B").read_text() == text and "old" in (tmp_path / "A").read_text()
