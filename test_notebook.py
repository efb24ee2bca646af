"""The committed main.ipynb as a reader finds it, and, slowly, all its cells run anew.

    pytest test_notebook.py -k "not slow"
"""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data

HERE = Path(__file__).parent
NOTEBOOK = HERE / "main.ipynb"
MODULES = {"os", "matplotlib", "IPython", "torch", "data", "evaluate", "models", "plot",
           "records"}


def cells(kind, path=NOTEBOOK):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def printed(path=NOTEBOOK):
    return "".join("".join(output["text"]) for cell in cells("code", path)
                   for output in cell["outputs"] if output["output_type"] == "stream")


def pictures(path=NOTEBOOK):
    return sum("image/png" in output.get("data", ()) for cell in cells("code", path)
               for output in cell["outputs"])


def check_results(path):
    """Whatever the numbers: every figure is there, and what is printed follows from them."""
    for output in (output for cell in cells("code", path) for output in cell["outputs"]):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    text = printed(path)
    assert pictures(path) == 6
    labels = r"(VAE \+ (?:standard prior|VampPrior))"
    assert len(re.findall(labels + r": \d+ of 40 latent units active, \d+ with a KL", text)) == 2
    assert float(re.search(r"largest difference of 200 log densities: (\S+) nats", text)[1]) < 1e-4
    course = re.search(r"training images: (\S+) nats in the first epoch, (\S+) in the last", text)
    start, end = map(float, course.groups())
    assert start < end and -180 < end < -60
    likelihood = {label: list(map(float, numbers)) for label, *numbers in re.findall(
        labels + r": +ELBO (\S+) ± \S+, bound at S = 100 (\S+) ± (\S+)", text)}
    plain, vamp = likelihood["VAE + standard prior"], likelihood["VAE + VampPrior"]
    for elbo, log_px, error in (plain, vamp):
        assert -150 < elbo < log_px < -60 and 0 < error < 3
    mean, error, verdict = re.search(r"prior: (\S+) ± (\S+) nats per image, on 500 images:\n(.*)",
                                     text).groups()
    mean, error = float(mean), float(error)
    assert mean == pytest.approx(vamp[1] - plain[1], abs=0.03)
    if abs(abs(mean) - 2 * error) > 0.03:       # or the rounding may hide which it is
        better = "VAE + VampPrior" if mean > 0 else "VAE + standard prior"
        assert verdict.startswith(better if abs(mean) > 2 * error else "Neither")


def test_the_notebook_was_run_once_from_top_to_bottom():
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert 14 <= len(code) + len(cells("markdown")) <= 18
    for cell in code:
        assert cell["outputs"] and not cell["metadata"], source(cell)
    check_results(NOTEBOOK)


def test_the_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(home|root|tmp|work|Users)/|\.venv|Warning", words)
    metadata = json.loads(text)["metadata"]
    assert metadata["language_info"] == {"name": "python"}
    assert metadata["kernelspec"]["name"] == "python3"
    for cell in cells("code") + cells("markdown"):
        assert max(map(len, source(cell).splitlines())) <= 100


def test_the_notebook_imports_what_the_project_has():
    code = "\n".join(re.sub(r"^%.*", "", source(cell), flags=re.M) for cell in cells("code"))
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names == MODULES


@pytest.fixture
def folder(tmp_path):
    """The scripts and the notebook in a folder of their own."""
    for path in (*HERE.glob("*.py"), HERE / "Makefile", NOTEBOOK):
        shutil.copy(path, tmp_path)
    return tmp_path


def make(target, folder, *more, **env):
    return subprocess.run(["make", "-C", folder, target, f"PYTHON={sys.executable}", *more],
                          env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env},
                          capture_output=True, text=True)


@pytest.mark.parametrize("target, package, run", [
    ("notebook", "nbclient ipykernel", r'-c "\$RUN_NOTEBOOK"'),
    ("lab", "jupyterlab", "-m jupyterlab main.ipynb")])
def test_make_installs_jupyter_where_it_is_missing_and_makes_no_environment(target, package, run):
    text = make(target, HERE, "-n").stdout
    assert re.search(rf"import {package.replace(' ', ', ')}'.* \|\| \S+ -m pip install .*"
                     rf"{package}\n.*{run}", text)
    assert "-m venv" not in text and "requirements" not in text
    text = make(target, HERE, "-n", "VENV=/nowhere", "PYTHON=/nowhere/bin/python").stdout
    assert "-m venv /nowhere" in text


def needs_jupyter():
    if missing := [name for name in ("nbclient", "ipykernel") if not importlib.util.find_spec(name)]:
        pytest.skip(f"{' and '.join(missing)} not installed: make notebook installs them")


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(folder):
    needs_jupyter()
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    content["cells"][1]["source"] = ["print(1)\n", "raise ValueError('on purpose')"]
    (folder / "main.ipynb").write_text(json.dumps(content))
    before = (folder / "main.ipynb").read_bytes()
    done = make("notebook", folder)
    assert done.returncode == 2 and "on purpose" in done.stderr
    assert (folder / "main.ipynb").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_slow_the_notebook_runs_from_top_to_bottom(folder):
    needs_jupyter()
    where = os.path.abspath(os.environ.get("DATA_DIR", HERE / "data"))
    try:
        data.load("mnist5k", where)
    except OSError as error:
        pytest.skip(str(error))
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    (folder / "main.ipynb").write_text(json.dumps(content))
    done = make("notebook", folder, f"DATA_DIR={where}")
    assert done.returncode == 0, done.stderr
    check_results(folder / "main.ipynb")
    assert not list(folder.glob("*.tmp"))
