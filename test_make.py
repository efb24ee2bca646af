"""The Makefile by running it, main.ipynb, and what README.md and RESULTS.md say."""
import json
import os
import re
import shutil
import sys
from statistics import fmean
from subprocess import PIPE, Popen, run

import numpy as np
import pytest
import torch

import report
import train
from test_train import HERE, TINY, assert_same_run, digits, images_of, whole    # noqa: F401

FLAGS = (f"SAMPLES=20 EPOCHS=4 THREADS={torch.get_num_threads()} "
         f"TRAIN_FLAGS='{' '.join(TINY).replace('--epochs 4 ', '')}'")
ENV = {name: os.environ[name] for name in ("PATH", "HOME", "MPLCONFIGDIR") if name in os.environ}


def start(words):
    """make as from a shell: a process group of its own, and no variables of a make above."""
    return Popen(f"exec make PYTHON={sys.executable} {words}", shell=True, cwd=HERE, env=ENV,
                 text=True, stdout=PIPE, stderr=PIPE, start_new_session=True)


@pytest.fixture(scope="session")
def made(digits, tmp_path_factory):
    """The folder of a run of two models side by side, and what make printed."""
    folder = tmp_path_factory.mktemp("made") / "results" / "run"
    words = f"all RUN={folder} DATASET={digits} MODELS='vae vamp' JOBS=2 {FLAGS}"
    return folder, *start(words).communicate()


def test_make_all_makes_a_run_and_prints_its_results_alone(made, whole):
    folder, out, err = made
    assert re.search(rf"\n\| VAE \+ VampPrior .*\n{folder}/report.html\n$", out), err
    for name in ("vae", "vamp"):
        assert {"model.safetensors", "metrics.json", "curves.png"} <= {*os.listdir(folder / name)}
    assert {"tradeoff.png", "report.md", "report.html"} <= {*os.listdir(folder)}
    assert (folder.parent / "latest").resolve() == folder
    assert len(re.findall("^va(?:e|mp): (?:trained|ELBO) ", out, re.M)) == 4
    assert ".py" not in out and not {"\x1b", "\r"} & {*out, *err}
    assert_same_run(folder / "vamp", whole)         # side by side as alone


def test_make_makes_only_what_is_missing_or_measured_otherwise(made, digits):
    vae, words = made[0] / "vae", f"models RUN={made[0]} DATASET={digits} MODELS=vae {FLAGS}"
    weights, metrics = [(vae / name).read_bytes() for name in ("model.safetensors", "metrics.json")]
    (vae / "curves.png").unlink()
    err = start(words).communicate()[1]
    assert (vae / "curves.png").exists() and (vae / "metrics.json").read_bytes() == metrics, err
    err = start(f"{words} SAMPLES=21").communicate()[1]
    assert json.loads((vae / "metrics.json").read_text())["samples"] == 21, err
    assert (vae / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("words, said", [
    ("models SEED=1", "error: .*vamp was trained with seed = 0, not 1: .*\nmake"),
    ("all DATASET=none.mat", "error: unknown data set 'none.mat': .*RESULTS.md.*\nmake: "),
    ("all MODELS=vqvae", ".* MODELS has vqvae; .*\n$"),
    *((f"all RUN={name}", ".* RUN must .*\n$") for name in ("'a b'", "a:b", '"a\'b"', "'a$b'"))])
def test_make_refuses_in_one_line_and_leaves_files_as_they_were(made, digits, words, said):
    before = {path: path.read_bytes() for path in made[0].rglob("*.*") if path.is_file()}
    process = start(f"RUN={made[0]} DATASET={digits} MODELS=vamp {FLAGS} {words}")
    assert re.match(said, process.communicate()[1])
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("words, said", [
    ("hmog RUN=a/b/ SEED=3 EPOCHS=7", "hvae --prior mog .* --seed 3 --epochs 7 .*--out a/b/hmog "),
    ("quick", r"--epochs 2 --batch-size 100 .*--out results/\d{8}-\d{6}-quick/vae "),
    ("plane EPOCHS=9", r"--epochs 9 --z-dim 2 .*--out results/\d{8}-\d{6}-plane/mog "),
    ("paper SEEDS=1 SAMPLES=9 MODELS=vamp", "evaluate.py .*-paper/seed1/vamp .*--samples 9 "),
    ("vae PROCS=2 DATA_DIR=d", r"run .* 2 train.py .*--data-dir d .* results/\d{8}-\d{6}/vae "),
    ("paper SEEDS=1 MODEL=my.py:Net", "(?s)^(?!.*hvae).*-paper/seed1/fit "),
    ("vamp MODEL=my.py:Net", r"(?s)train.py --model my.py:Net +--prior vamp .*--out (results/.*?) "
                             r".*evaluate.py \1 --model my.py:Net "),
    ("fit DATASET=d.npz", r"(?s)evaluate.py (results/[\d-]+)/vae --fit-prior \1/fit +--dataset "
                          r"d.npz .*evaluate.py \1/fit +--dataset d.npz "),
    ("models RUN=a MODELS=fit", "(?s)train.py .* --out a/vae .*--fit-prior a/fit .*plot.py a/fit"),
    ("all RUN=a/latest", r"\[ latest = latest \] \|\| ln")])
def test_the_commands_of_make(words, said):
    out = start(f"-n {words}").communicate()[0]
    assert re.search(said, out.replace('"', "").replace("\\\n ", ""))


def test_help_names_every_target():
    targets = re.search(r"^\.PHONY: (.*) FORCE", (HERE / "Makefile").read_text(), re.M)[1]
    named = " ".join(re.findall("^(.*?)  ", start("help").communicate()[0], re.M))
    assert {*targets.split(), "vamp", "hmog"} - {"models"} <= {*named.split()}


def test_files_plot_and_report_do_not_import_torch():
    code = "import files, plot, report, sys; sys.exit('torch' in sys.modules)"
    run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_the_notebook_was_run_from_top_to_bottom_and_uses_what_the_scripts_have():
    text, modules = (HERE / "main.ipynb").read_text(), {}
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not re.search('"output_type": "error"|/(home|root|tmp|work|Users)/', text)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    exec("\n".join(re.findall("^import .*", code, re.M)), modules)
    for name, attribute in re.findall(r"\b(\w+)\.(\w+)", code):
        assert name not in modules or hasattr(modules[name], attribute), (name, attribute)


def test_readme_example_trains_a_vae_of_your_own():
    example = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    elbo = {}
    for steps in (1, 100):
        names = {}
        exec(re.sub(r"range\(\d+\)", f"range({steps})", example), names)
        elbo[steps] = names["elbo"].mean()
    assert elbo[100] > elbo[1]


def test_recipes_with_a_trained_model(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "results/latest/vamp")
    text = (HERE / "RESULTS.md").read_text()
    text = text[text.index("## With a trained"):text.index("## Your own data")]
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, names)
    assert np.array_equal(np.load("codes.npz")["codes"], names["codes"]) and len(names["y"]) == 12
    ends = names["model"].generate(names["codes"][[3, 8]])
    torch.testing.assert_close(names["walk"][[0, 8]], ends)
    assert names["sevens"].shape == names["samples"].shape == (16, 64)
    assert names["elbo"].shape == (64,) and names["elbo"].isfinite().all()


def test_make_docs_would_change_nothing(tmp_path):
    """README's table and the reports in assets/ are made from the records."""
    pictures = shutil.ignore_patterns("*.png")
    assets = shutil.copytree(HERE / "assets", tmp_path / "assets", ignore=pictures)
    text = (HERE / "README.md").read_text()
    (tmp_path / "README.md").write_text(re.sub(r"\| Dynamic .*", "old", text))
    reports = {path: path.read_text() for path in assets.glob("*/report.md")}
    for path in reports:
        path.write_text("old")
    report.main(["--readme", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == text, "make docs renews it"
    assert {path: path.read_text() for path in reports} == reports


def test_claims_of_results_are_those_of_the_records():
    text = (HERE / "RESULTS.md").read_text()
    lines = [f"| {row['section']}: {row['case']} | {1000 * row['plain']:.1f} | "
             f"{1000 * row['ours']:.1f} | {row['ratio']:.1f} | {row['ratio_low']:.1f} to "
             f"{row['ratio_high']:.1f} | {row['n']} | {row['bound_share']:.0%} |"
             for row in json.loads((HERE / "assets/bench.json").read_text())["rows"]]
    found = re.findall(r"^\| \w+: .*", text, re.M)
    assert len(found) == 7 and {*found} <= {*lines}
    times = re.findall(r"^\| `make .*?(\d+).* \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    for epochs, precision, minutes, nll in times:
        folder = {"420": "paper/seed0", "240": "fast-240", "180": "fast"}[epochs]
        seeds = report.read(HERE / "assets" / folder)["vamp"]
        assert minutes == f"{fmean(m['train_seconds'] for m in seeds) / 60:.1f}"
        assert nll == f"{fmean(m['nll']['mean'] for m in seeds):.2f}"
        assert {(m["trained_in"], m["samples"]) for m in seeds} == {(precision, 5000)}
    seconds = json.loads((HERE / "assets/runs/time.json").read_text())["seconds"]
    assert len(times) == 3 and seconds < 20.5 * 60      # README: 20 minutes
    pairs = [("static", "vamp", "fit", 0.8), ("paper", "vamp", "fit", 0.8),
             ("caltech", "fit", "vamp", 1), ("frey", "fit", "vamp", 1), ("conv", "vamp", "vae", 0),
             ("pseudo-inputs", "K500", "K50", 0), ("pseudo-inputs", "K500", "K5000", 0)]
    pairs += [(f, h + "vamp", h + "vae", 0) for f in report.RECORDS for h in ("", "h")]
    for folder, low, high, nats in pairs:
        # with every seed, the first model's NLL is lower than the second's, by more than `nats`
        models = report.read(HERE / "assets" / folder)
        one, two = ([m["nll"]["mean"] for m in models[name]] for name in (low, high))
        assert max(one) < min(two) - nats
    models = report.read(HERE / "assets/paper")
    assert all(m["nll"]["mean"] < float(report.published(m))
               for name, seeds in models.items() for m in seeds if name != "fit")
    for path in (HERE / "assets/paper").glob("seed*/*/log.csv"):        # all overfit
        last = np.genfromtxt(path, delimiter=",", names=True)[-1]
        assert last["train_elbo"] > last["val_elbo"] + 2
    # with a VampPrior more units of the top layer stay active
    for m, vamp in zip(models["vae"] + models["hvae"], models["vamp"] + models["hvamp"]):
        top = [*m["active_units"]][-1]
        assert vamp["active_units"][top] > m["active_units"][top]


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_documents_link_what_exists(name):
    for path in re.findall(r"\]\(([^):#]+)[)#]", (HERE / name).read_text()):
        assert (HERE / path).exists(), path


def test_recorded_runs_are_those_that_make_makes():
    text = start("-n all DATASET=mnist").communicate()[0].replace('"', "").replace("\\\n", "")
    for path in (HERE / "assets" / "runs").glob("*/config.json"):
        (flags,) = re.findall(rf" train\.py (.*/{path.parent.name}) --resume", text)
        args = vars(train.apply_recipe(train.parse_args(flags.split()), images_of("mnist")))
        recorded = json.loads(path.read_text())
        for key in (args.keys() & recorded.keys()) - train.MAY_CHANGE - {"precision"}:
            assert args[key] == recorded[key], (path, key)
