"""Tests of plot.py by subprocess, on invented runs: every command, every file, the errors.

    pytest test_plot.py
"""
import csv
import io
import json
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import plot

HERE = Path(__file__).parent
NOTE = "5,000 digits, not comparable with the paper"
MODEL_FIGURES = ["reconstructions", "samples", "latent", "curves", "likelihood", "kl"]
COMPARISON_FIGURES = ["comparison", "tradeoff", "dynamics", "active_units", "latents"]


def fake_run(folder, model="vae", prior="vamp", nll=82.0, N=300, K=30, D=12, images=None,
             labels=None, active=None, label=None, epochs=40, h=8, seed=0, kl=26.5, **changes):
    """metrics dict: a run folder such as train.py and evaluate.py leave, with invented numbers."""
    rng = np.random.default_rng([seed, len(model), len(prior)])
    folder.mkdir(parents=True)
    layers = ["z"] if model == "vae" else ["z1", "z2"]
    active = active or max(1, D * 3 // 4)
    if images is None:
        y, x = np.mgrid[:h, :h]
        angle = np.random.default_rng(1).uniform(0, np.pi, 60)[:, None, None]
        images = (abs((x - h / 2) * np.cos(angle) + (y - h / 2) * np.sin(angle)) < 1.2)
        images = images.reshape(60, -1).astype(float)
    def blurred(a):
        s = a.reshape(len(a), h, h)
        return ((s + np.roll(s, 1, 1) + np.roll(s, 1, 2) + np.roll(s, -1, 1)) / 4).reshape(a.shape)
    recon = -nll + 18
    variance = {layer: np.where(np.arange(D) < active, rng.uniform(0.2, 1, D), 1e-5 * rng.random(D))
                for layer in layers}
    labels = np.arange(N) % 10 if labels is None else labels
    centres = rng.normal(0, 1.2, (10, D))
    latent = centres[labels % 10] + rng.normal(0, 0.5, (N, D))
    latent *= np.sqrt(variance[layers[-1]])
    arrays = {"image_shape": np.array([h, h]), "images": images, "reconstructions": blurred(images),
              "samples": blurred(images)[::-1], "labels": labels,
              "latent_means": latent.astype(np.float32),
              "elbo": rng.normal(recon - kl, 15, N), "recon": rng.normal(recon, 12, N),
              "kl": rng.normal(kl, 3, N), "log_px": -nll + 12 * rng.standard_gamma(4, N) / -2 + 24}
    for layer in layers:
        arrays |= {f"variance_{layer}": variance[layer] if N > 1 else np.full(D, np.nan),
                   f"kl_per_dim_{layer}": kl / D * variance[layer] * 1.5}
    if prior != "standard":
        use = rng.dirichlet(np.ones(K))
        arrays |= {"component_mu": latent[rng.integers(0, N, K)], "component_use": use,
                   "component_logvar": np.full((K, D), -2.0)}
    if prior == "vamp":
        p = min(40, K, len(images))
        arrays |= {"pseudo_inputs": np.clip(images[:p] * 0.8 + 0.1, 0, 1),
                   "pseudo_samples": blurred(images[:p]), "pseudo_use": np.sort(use)[::-1][:p]}
    np.savez(folder / "arrays.npz", **arrays)
    def stat(mean, se=0.2):
        return {"mean": mean, "se": se if N > 1 else None}
    name = {"standard": "standard prior", "mog": "mixture prior", "vamp": "VampPrior"}[prior]
    metrics = {"model": model, "prior": prior, "label": label or f"{model.upper()} + {name}",
               "dataset": "mnist", "note": "", "binarize": "dynamic", "samples": 500, "seed": 0,
               "images": N, "epochs": epochs, "best_epoch": epochs - 1, "train_seconds": 60.0,
               "elbo": stat(recon - kl, 0.25), "recon": stat(recon), "kl": stat(kl, 0.05),
               "nll": stat(nll, 0.24), "mutual_information": stat(kl - 4),
               "marginal_kl": stat({"standard": 9.1}.get(prior, 2.3)),
               "active_units": {layer: active for layer in layers},
               "latent_dims": {layer: D for layer in layers}, "seconds": {}, "device": "cpu",
               "versions": {}}
    if model == "hvae":
        metrics |= {"kl1": stat(16.0), "kl2": stat(10.5)}
    if prior != "standard":
        metrics |= {"components": K, "components_used": 0.8 * K}
    metrics |= changes
    (folder / "metrics.json").write_text(json.dumps(metrics))
    args = {"model": model, "prior": prior, "epochs": epochs, "dataset": metrics["dataset"]}
    (folder / "config.json").write_text(json.dumps(
        {"args": args, "data": {"name": metrics["dataset"], "note": metrics["note"]}, "model": {}}))
    with open(folder / "log.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow("epoch beta lr train_elbo train_recon train_kl val_elbo val_recon val_kl "
                     "train_kl1 train_kl2 val_kl1 val_kl2 clipped grad_norm seconds".split())
        for e in range(1, epochs + 1):
            t = np.exp(-e / epochs * 7)
            r, k = recon - 110 * t + rng.normal(0, .1), kl - 18 * t ** 0.5 + 60 * t ** 4
            two = [k * 0.6, k * 0.4] * 2 if model == "hvae" else [""] * 4
            out.writerow([e, min(1, e / epochs * 5), 1e-3, r - k + 1, r + .8, k - .2, r - k, r, k,
                          *two, 0.01 if prior == "vamp" else "", 50, 15.0])
    return metrics


def run_plot(*args, cwd=None):
    """CompletedProcess of plot.py with these arguments."""
    return subprocess.run([sys.executable, HERE / "plot.py", *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, timeout=600)


def call_plot(folder, capsys, monkeypatch):
    """CompletedProcess of plot.main in this process, which saves the start of an interpreter."""
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder)])
    monkeypatch.setattr(plot.signal, "signal", lambda *_: None)
    try:
        code = plot.main() or 0
    except SystemExit as stop:
        code = stop.code
    return subprocess.CompletedProcess("plot.py", code, *capsys.readouterr())


def assert_figure(path):
    """None. The file is a PNG that can be read, of a useful size, in more than one colour."""
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 40 and picture.shape[1] > 300, path
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 1, path


def assert_refused(result, *expected):
    """None. One line that starts with error: and names the trouble, exit code 2."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in expected:
        assert part in result.stderr, result.stderr


def left_over(folder):
    """list of hidden names: what an unfinished write would have left."""
    return [p for p in Path(folder).rglob(".*")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Path of a results folder with the four cells and a mixture prior."""
    folder = tmp_path_factory.mktemp("results")
    fake_run(folder / "hvamp", "hvae", "vamp", nll=81.10)
    fake_run(folder / "mog", "vae", "mog", nll=83.20)
    fake_run(folder / "vae", "vae", "standard", nll=84.50, active=7)
    fake_run(folder / "vamp", "vae", "vamp", nll=82.30)
    fake_run(folder / "hvae", "hvae", "standard", nll=82.40, active=6)
    return folder


@pytest.mark.parametrize("name", ["vae", "vamp", "mog", "hvamp"])
def test_every_figure_of_a_model(results, capsys, monkeypatch, name):
    result = run_plot(results / name) if name == "vamp" else \
        call_plot(results / name, capsys, monkeypatch)
    assert result.returncode == 0 and not result.stderr, result.stderr
    figures = MODEL_FIGURES + ["pseudo_inputs"] * ("vamp" in name)
    assert sorted(p.stem for p in (results / name).glob("*.png")) == sorted(figures)
    for figure in figures:
        assert_figure(results / name / f"{figure}.png")
    assert not left_over(results)


def test_comparison_figures_and_table(results):
    result = run_plot(results)
    assert result.returncode == 0 and not result.stderr, result.stderr
    for figure in COMPARISON_FIGURES:
        assert_figure(results / f"{figure}.png")
    text = (results / "comparison.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "| Model | Recon | KL | ELBO | NLL |"
    assert [row.split(" | ")[0] for row in rows[2:7]] == [
        "| VAE + standard prior", "| VAE + VampPrior", "| HVAE + standard prior",
        "| HVAE + VampPrior", "| VAE + mixture prior"]
    assert rows[5] == ("| HVAE + VampPrior | **-63.10 ± 0.20** | 26.50 ± 0.05 | "
                       "**-89.60 ± 0.25** | **81.10 ± 0.24** |")
    assert "never bold" in text and text.count("**") == 6
    assert "z1 6 of 12, z2 6 of 12" in text and "24.0 of 30 (80%)" in text
    assert "S = 500" in text and "300 test images" in text and "Warning" not in text
    # comparison.md is what make waits for, so it must be the newest file
    newest = max(results.iterdir(), key=lambda p: p.stat().st_mtime_ns if p.is_file() else 0)
    assert newest.name == "comparison.md" and not left_over(results)


def test_models_are_compared_in_the_order_given(results, tmp_path):
    for name in ("vae", "hvamp"):
        (tmp_path / name).symlink_to(results / name)
    assert run_plot(tmp_path, "--models", "hvamp", "vae").returncode == 0
    rows = [r for r in (tmp_path / "comparison.md").read_text().splitlines() if r.startswith("| ")]
    assert "HVAE + VampPrior" in rows[2] and "VAE + standard prior" in rows[3]
    assert_refused(run_plot(tmp_path, "--models", "vae", "vamp"), "vamp", "evaluate.py")


def named(*changes):
    """list of (name, metrics) with the four results, changed as told."""
    base = {"label": "m", "dataset": "mnist", "note": "", "binarize": "dynamic", "samples": 500,
            "images": 100, **{k: {"mean": v, "se": 0.1} for k, v in
                              (("recon", -60.0), ("kl", 25.0), ("elbo", -85.0), ("nll", 82.0))}}
    return [(f"r{i}", {**base, "label": f"m{i}", **change}) for i, change in enumerate(changes)]


def stat(mean):
    return {"mean": mean, "se": 0.1}


def test_bold_ties_and_directions():
    text = plot.results_table(named({}, {"nll": stat(82.004), "elbo": stat(-84.0)},
                                    {"nll": stat(82.4), "recon": stat(-61.0), "kl": stat(20.0)}))
    rows = [line for line in text.splitlines() if line.startswith("| m")]
    assert rows[0] == ("| m0 | **-60.00 ± 0.10** | 25.00 ± 0.10 | -85.00 ± 0.10 | "
                       "**82.00 ± 0.10** |")
    assert rows[1].count("**") == 6 and "| **82.00 ± 0.10** |" in rows[1]
    assert rows[2] == "| m2 | -61.00 ± 0.10 | 20.00 ± 0.10 | -85.00 ± 0.10 | 82.40 ± 0.10 |"


@pytest.mark.parametrize("change", [{"dataset": "mnist5k", "note": NOTE}, {"samples": 5000},
                                    {"images": 1000}, {"binarize": "static"}])
def test_mixed_measurements_are_not_compared(change):
    text = plot.results_table(named({}, change))
    assert "**Warning:**" in text and text.replace("**Warning:**", "").count("**") == 0
    assert NOTE in text or "note" not in change


def test_mixed_data_are_drawn(tmp_path, capsys, monkeypatch):
    fake_run(tmp_path / "vae", prior="standard")
    fake_run(tmp_path / "vamp", h=10, dataset="mnist5k", note=NOTE, N=200)
    result = call_plot(tmp_path, capsys, monkeypatch)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "comparison.md").read_text()
    assert "**Warning:**" in text and NOTE in text
    assert_figure(tmp_path / "comparison.png")


@pytest.mark.parametrize("extremes", [
    dict(N=1, D=1, K=1, epochs=1), dict(N=5, D=2, K=1, h=1, epochs=2),
    dict(images=np.zeros((3, 64)), labels=np.arange(300) % 37,
         label="$\\frac{ | VAE |\n<b>", dataset="/private/folder/mine.npz")])
@pytest.mark.filterwarnings("error")
def test_extreme_runs_are_drawn(tmp_path, capsys, monkeypatch, extremes):
    fake_run(tmp_path / "vamp", **extremes)
    fake_run(tmp_path / "hvamp", "hvae", **extremes)
    for folder in (tmp_path / "vamp", tmp_path):
        result = call_plot(folder, capsys, monkeypatch)
        assert result.returncode == 0 and not result.stderr, result.stderr
    assert "/private" not in (tmp_path / "comparison.md").read_text()


def test_data_without_labels(tmp_path, capsys, monkeypatch):
    fake_run(tmp_path / "vamp")
    arrays = dict(np.load(tmp_path / "vamp" / "arrays.npz"))
    del arrays["labels"]
    np.savez(tmp_path / "vamp" / "arrays.npz", **arrays)
    assert call_plot(tmp_path / "vamp", capsys, monkeypatch).returncode == 0
    assert_figure(tmp_path / "vamp" / "latent.png")


# ---------------------------------------------------------------- bad input

def test_missing_folder_and_arguments(tmp_path):
    assert_refused(run_plot(tmp_path / "none"), "none is not a folder")
    assert_refused(run_plot(tmp_path), "no metrics.json")
    assert_refused(run_plot(), "--readme")
    assert_refused(run_plot("--bogus"), "bogus")


def change_array(name, value):
    """function of a run folder that replaces one array (None: removes it)."""
    def change(folder):
        arrays = dict(np.load(folder / "arrays.npz"))
        arrays.pop(name, None)
        np.savez(folder / "arrays.npz", **arrays, **({} if value is None else {name: value}))
    return change


def change_metrics(key, value):
    """function of a run folder that replaces one field of metrics.json (None: removes it)."""
    def change(folder):
        path = folder / "metrics.json"
        metrics = {k: v for k, v in json.loads(path.read_text()).items() if k != key}
        path.write_text(json.dumps(metrics | ({} if value is None else {key: value})))
    return change


def bomb(folder):
    """None. An arrays.npz whose one member claims a terabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)})
    with zipfile.ZipFile(folder / "arrays.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", header.getvalue() + bytes(10 ** 6))


class Harm:
    def __reduce__(self):
        return print, ("code from a file was run",)


@pytest.mark.parametrize("harm, expected", [
    (lambda f: (f / "arrays.npz").unlink(), "arrays.npz is missing"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "log.csv").unlink(), "log.csv is missing"),
    (lambda f: (f / "arrays.npz").write_text("a text"), "not an arrays.npz"),
    (lambda f: (f / "arrays.npz").write_bytes((f / "arrays.npz").read_bytes()[:5000]), "damaged"),
    (lambda f: (f / "arrays.npz").write_bytes(pickle.dumps(Harm())), "not an arrays.npz"),
    (change_array("images", np.array([Harm()] * 60, dtype=object)), "'images' holds object"),
    (bomb, "needs 1,099,511,627"),
    (change_array("images", None), "lacks images"),
    (change_array("images", np.zeros((60, 63))), "'images' has shape (60, 63)"),
    (change_array("reconstructions", np.zeros((59, 64))), "'reconstructions' has shape"),
    (change_array("elbo", np.zeros(299)), "'elbo' has shape (299,)"),
    (change_array("latent_means", np.full((300, 12), np.nan)), "'latent_means' holds NaN"),
    (change_array("labels", np.zeros(300)), "'labels' must hold whole numbers"),
    (change_array("variance_z", np.zeros(11)), "'variance_z' has shape"),
    (change_array("component_use", np.zeros((30, 2))), "'component_use' has shape"),
    (lambda f: (f / "metrics.json").write_text('{"model": "vae"'), "not valid JSON"),
    (lambda f: (f / "metrics.json").write_text("[" * 10 ** 5), "not valid JSON"),
    (lambda f: (f / "metrics.json").write_text("[1]"), "a JSON object"),
    (lambda f: (f / "metrics.json").write_bytes(b"\xff\xfe\x00"), "not a text file"),
    (change_metrics("nll", None), "lacks nll"),
    (change_metrics("nll", {"mean": float("nan"), "se": 1}), "nll.mean"),
    (change_metrics("nll", 82), "nll has no mean"),
    (change_metrics("images", 10 ** 400), "images"),
    (change_metrics("label", 7), "label is not a string"),
    (change_metrics("prior", "mog"), "the prior mog"),
    (change_metrics("active_units", {"w": 3}), "active_units"),
    (lambda f: (f / "log.csv").write_text("a,b\n1,2\n"), "not a log of train.py"),
    (lambda f: (f / "log.csv").write_text((f / "log.csv").read_text()[:-30]), "line 41"),
    (lambda f: (f / "log.csv").write_text((f / "log.csv").read_text().replace("50,", "x,")),
     "line 2"),
    (lambda f: (f / "config.json").write_text("{}"), "config.json"),
])
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, harm, expected):
    fake_run(tmp_path / "vamp")
    harm(tmp_path / "vamp")
    for target in (tmp_path / "vamp", tmp_path):
        result = call_plot(target, capsys, monkeypatch)
        assert_refused(result, expected)
        assert "code from a file" not in result.stdout
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.md"))
    assert not left_over(tmp_path)


def test_damaged_bytes_are_refused_or_harmless(tmp_path):
    fake_run(tmp_path / "vamp", N=20, K=4, D=3)
    rng = random.Random(0)
    whole = dict(np.load(tmp_path / "vamp" / "arrays.npz"))
    for name in ("arrays.npz", "metrics.json", "log.csv", "config.json"):
        path, accepted = tmp_path / "vamp" / name, 0
        content = path.read_bytes()
        for i in range(150):
            damaged = bytearray(content)
            if i % 3:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            else:
                del damaged[rng.randrange(len(damaged)):]
            path.write_bytes(damaged)
            try:
                run, = plot.read_runs([tmp_path / "vamp"])
            except (ValueError, OSError):
                continue
            accepted += 1
            if name == "arrays.npz":
                for key, value in run.arrays.items():
                    assert np.array_equal(value, whole[key]), key
        path.write_bytes(content)
        assert accepted < 150, name


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "comparison.md"
    plot.write(path, b"old")
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(plot.os, "fsync", full)
    with pytest.raises(OSError):
        plot.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- README.md

BENCH = {"machine": {"cpu": "Two-core test machine", "os": "Linux"}, "torch": "2.14.0",
         "threads": 2, "gflops": 231.4, "rows": [
             {"section": "Mixture log-prior", "case": "log p | K = 500", "plain": 0.0231,
              "ours": 0.00151, "ratio": 15.3, "ratio_low": 14.8, "ratio_high": 15.9, "n": 7,
              "bound_share": 0.61, "peak_mb": 12.0, "error": 3.1e-4, "expected": "at least 10"},
             {"section": "Epoch time", "case": "epoch 100 against 2", "plain": None, "ours": 4.1,
              "ratio": 1.02, "ratio_low": None, "ratio_high": None, "n": 5, "bound_share": None,
              "peak_mb": None, "error": None, "expected": "at most 1.1"},
             {"section": "Epoch time", "case": "nobody asked", "plain": None, "ours": 4.1,
              "ratio": 1.02, "ratio_low": None, "ratio_high": None, "n": 5, "bound_share": None,
              "peak_mb": None, "error": None, "expected": None}]}
RECIPE = {"protocol": "VAE + VampPrior, validation set only.", "rows": [
    {"change": "base", "val_elbo": [-87.31, -87.4, -87.2], "epochs": 60, "kept": True},
    {"change": "no warm-up", "val_elbo": [-88.0], "epochs": 60, "kept": False},
    {"change": "tried once", "val_elbo": [-99.0], "epochs": 9, "kept": False, "record_only": True}]}
README = ("# Title\n\n<!-- begin results -->\nold\n<!-- end results -->\ntext\n<!-- begin paper -->\n"
          "<!-- end paper -->\n<!-- begin speed -->"
          "<!-- end speed -->\n<!-- begin recipe -->\nstale\n<!-- end recipe -->\nend\n")


def make_assets(folder):
    """Path of an assets folder with two runs and both other records."""
    for name, prior, nll in (("vamp", "vamp", 81.9), ("vae", "standard", 84.1)):
        fake_run(folder / "runs" / name, prior=prior, nll=nll)
        (folder / "runs" / name / "arrays.npz").unlink()
    fake_run(folder / "paper" / "hvamp", model="hvae", nll=80.7)
    (folder / "bench.json").write_text(json.dumps(BENCH))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


def test_readme_blocks_are_renewed(tmp_path):
    assets, readme = make_assets(tmp_path / "assets"), tmp_path / "README.md"
    readme.write_text(README)
    for _ in range(2):  # the second time must change nothing
        result = run_plot("--readme", readme, "--assets", assets)
        assert result.returncode == 0, result.stderr
        text = readme.read_text()
        for name, block in plot.readme_blocks(assets).items():
            assert f"<!-- begin {name} -->\n{block}\n<!-- end {name} -->" in text
        assert text.count("Title") == 1 and text.endswith("\nend\n") and "stale" not in text
    assert "| VAE + VampPrior | **-63.90 ± 0.20** | 26.50 ± 0.05 | **-90.40 ± 0.25** | " \
           "**81.90 ± 0.24** | 82.38 | 40 | 10 |" in text
    assert "| 84.50 | 40 | 10 |" in text and "| 80.70 ± 0.24 | 81.24 |" in text
    assert ("| log p \\| K = 500 | 23.1 ms | 1.51 ms | 15.3 | 14.8 | 15.9 | 7 | 61% | 12 MB | "
            "3.1e-04 | at least 10 |") in text
    assert "| epoch 100 against 2 | 4.1 s | 1.02 | 5 | at most 1.1 |" in text
    assert "231 GFLOP/s" in text and "nobody asked" not in text
    assert "| base | -87.30 ± 0.10 | 3 | 60 | yes |" in text
    assert "| no warm-up | -88.00 | 1 | 60 | no |" in text and "tried once" not in text


def test_missing_records_leave_no_numbers(tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "README.md").write_text(README)
    assert run_plot("--readme", "README.md", cwd=tmp_path).returncode == 0
    assert plot.readme_blocks(tmp_path / "assets") == {}
    assert "old" not in (tmp_path / "README.md").read_text()


def test_paper_column_only_for_its_data(tmp_path):
    assets = tmp_path / "assets"
    fake_run(assets / "runs" / "vamp", binarize="static")
    assert "82.38" not in plot.readme_blocks(assets)["results"]


def test_broken_readme_is_refused(tmp_path):
    assets, readme = make_assets(tmp_path / "assets"), tmp_path / "README.md"
    for text in ("<!-- begin results -->", "<!-- end speed --><!-- begin speed -->"):
        readme.write_text(text)
        assert_refused(run_plot("--readme", readme, "--assets", assets), "README.md")
        assert readme.read_text() == text
    assert_refused(run_plot("--readme", readme, "--assets", tmp_path / "none"), "none")
    (assets / "bench.json").write_text(json.dumps({"rows": [{"section": "a"}]}))
    readme.write_text(README)
    assert_refused(run_plot("--readme", readme, "--assets", assets), "bench.json")
    assert readme.read_text() == README


def test_neither_torch_nor_our_files_are_imported():
    code = "import sys, plot; print({'torch', 'models', 'data', 'train'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
