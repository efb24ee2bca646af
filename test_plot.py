"""Tests of plot.py on invented runs: what the figures' artists hold, and what is refused."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import same_color
from matplotlib.text import Text

import plot

NOTE = "5,000 digits, not comparable with the paper"
NATS = "nats per image"
LABELS = {"vae": "VAE + standard prior", "vamp": "VAE + VampPrior", "hvae": "HVAE + standard prior",
          "hvamp": "HVAE + VampPrior", "mog": "VAE + mixture of Gaussians"}


def stat(mean, se):
    return {"mean": mean, "se": se}


def fake_run(folder, kind=None, N=60, D=7, K=30, images=40, epochs=12, **changes):
    """A run folder with other random numbers in every place, pictures of 5 x 4 pixels; its Path."""
    folder.mkdir(parents=True)
    kind, rng = kind or folder.name, np.random.default_rng([*folder.name.encode()])
    model, layers = ("hvae", ["z1", "z2"]) if kind[0] == "h" else ("vae", ["z"])
    prior = {"amp": "vamp", "mog": "mog", "vae": "standard"}[kind[-3:]]
    m = {"model": model, "prior": prior, "label": LABELS[kind], "dataset": "mnist", "note": "",
         "binarize": "dynamic", "samples": 500, "images": N, "epochs": epochs, "best_epoch": 9,
         "train_seconds": 600.0, "seconds": {"all": 60.0}, "recon": stat(-60.0, 0.21),
         "kl": stat(25.0, 0.07), "elbo": stat(-85.0, 0.23), "nll": stat(82.0, 0.22),
         "active_units": dict.fromkeys(layers, 3), "latent_dims": dict.fromkeys(layers, D)}
    m |= {"kl1": stat(8.0, 0.03), "kl2": stat(17.0, 0.04)} if model == "hvae" else {}
    m |= {"components": K, "components_used": 0.8 * K} if prior != "standard" else {}
    (folder / "metrics.json").write_text(json.dumps(m | changes))
    (folder / "config.json").write_text(json.dumps({"args": {"model": model, "prior": prior}}))
    use = rng.dirichlet(np.ones(K))
    pixels = {name: rng.uniform(0, 0.9, (n, 20)) for name, n in (   # white is only in the gaps
        ("images", images), ("reconstructions", images), ("samples", 64),
        ("pseudo_inputs", min(K, 40)), ("pseudo_samples", min(K, 40)))}
    np.savez(folder / "arrays.npz", **pixels, image_shape=[5, 4], labels=np.arange(N) % 10,
             log_px=rng.normal(-82, 12, N), component_use=use, pseudo_use=np.sort(use)[::-1][:40],
             component_mu=rng.normal(3, 2, (K, D)),
             latent_means=rng.normal(3, 1, (N, D)) * np.linspace(1, 3, D),
             **{f"variance_{z}": rng.permutation(10 ** np.linspace(-4.5, 0, D)) for z in layers},
             **{f"kl_per_dim_{z}": rng.permutation(np.linspace(0.1, 3, D)) for z in layers})
    log = {"epoch": np.arange(1, epochs + 1), "beta": np.minimum(1, np.arange(1, epochs + 1) / 4)}
    log |= {f"{split}_{part}": [""] * epochs if part[-1] in "12" and model == "vae" else
            rng.normal(20, 1, epochs) for split in ("train", "val")
            for part in ("elbo", "recon", "kl", "kl1", "kl2")}
    lines = [",".join(map(str, row)) for row in (log, *zip(*log.values()))]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for i, name in enumerate(LABELS):
        fake_run(folder / name, kl=stat(25.0 + i, 0.07 + i), recon=stat(-60.0 - 3 * i, 0.2))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return plot.read_runs([*plot.find_models(folder).values()])


def tiles(fig):
    """The pictures of a grid [row][column], cut at its white gaps, and the labels of its strips."""
    (ax,), cuts = fig.axes, []
    canvas = np.asarray(ax.images[0].get_array())
    for axis in (1, 0):
        inked = np.concatenate([[False], (canvas < 1).any(axis), [False]])
        cuts.append(np.flatnonzero(inked[1:] != inked[:-1]).reshape(-1, 2))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    middles = ((cuts[0].sum(1) - 1) / 2).reshape(len(labels), -1)   # an equal share of rows each
    np.testing.assert_allclose(ax.get_yticks(), middles.mean(1))
    return np.array([[canvas[a:b, c:d] for c, d in cuts[1]] for a, b in cuts[0]]), labels


def same(grid, run, name, n):
    return np.array_equal(grid.reshape(-1, 20), run.arrays[name][:n])


def assert_curves(ax, title, expected):
    """The lines of a panel are {label: (values, colour)} over twelve epochs; its axes are named."""
    drawn = {line.get_label(): line for line in ax.lines if line.get_label() != "epoch kept"}
    assert set(drawn) == set(expected)
    for label, (values, color) in expected.items():
        assert np.array_equal(drawn[label].get_xydata().T, [np.arange(1, 13), values])
        assert same_color(drawn[label].get_color(), color)
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (title, "epoch", NATS)


@pytest.mark.parametrize("n, shown", [(40, 32), (48, 48), (50, 48), (9, 9)])
def test_pictures_of_one_model(tmp_path, n, shown):
    run, = plot.read_runs([fake_run(tmp_path / "vamp", images=n, K=n)])
    grid, labels = tiles(plot.MODEL_FIGURES["reconstructions"](run))
    assert same(grid[::2], run, "images", shown) and same(grid[1::2], run, "reconstructions", shown)
    assert labels == ["original", "reconstructed"] * (len(grid) // 2)
    assert grid.shape[1] == min(n, 16)
    grid, _ = tiles(plot.MODEL_FIGURES["samples"](run))
    assert same(grid, run, "samples", 64) and grid.shape[1] == 16
    grid, labels = tiles(fig := plot.MODEL_FIGURES["pseudo_inputs"](run))
    assert same(grid[::2], run, "pseudo_inputs", 40) and same(grid[1::2], run, "pseudo_samples", 40)
    assert labels == ["pseudo-input", "generates"] * (len(grid) // 2)
    use, k = run.arrays["pseudo_use"], min(n, 40)
    assert (f"the {k} most used of {n} components, {use[0]:.2%} to {use[-1]:.2%} of the images "
            "each; 80% of all in use") in fig.axes[0].get_title("left")


def test_latents_are_drawn_on_the_principal_axes(runs):
    figures = plot.COMPARISON_FIGURES["latents"](runs), plot.MODEL_FIGURES["latent"](runs[0])
    for run, ax in zip(runs + runs[:1], figures[0].axes + figures[1].axes, strict=True):
        z = run.arrays["latent_means"] - (centre := run.arrays["latent_means"].mean(0))
        values, vectors = np.linalg.eigh(np.cov(z.T))
        points, *rings = [c for c in ax.collections if len(c.get_offsets())]
        shown = np.asarray(points.get_offsets())
        plane = vectors[:, :-3:-1] * np.sign((z @ vectors[:, :-3:-1] * shown).sum(0))
        np.testing.assert_allclose(shown, z @ plane, atol=1e-6)
        colors = colormaps["tab10"](run.arrays["labels"] % 10)
        np.testing.assert_allclose(points.get_facecolors()[:, :3], colors[:, :3])
        for label, value in ((ax.get_xlabel(), values[-1]), (ax.get_ylabel(), values[-2])):
            assert f"({value / values.sum():.0%}" in label
        assert ax.get_title() == f"{run.label}\nposterior means of 60 test images"
        if run.metrics["prior"] == "standard":
            assert [circle.radius for circle in ax.patches] == [1, 2]
            np.testing.assert_allclose(ax.patches[0].center, -centre @ plane)
        else:
            order = np.argsort(-run.arrays["component_use"])
            mu, use = (run.arrays[f"component_{name}"][order] for name in ("mu", "use"))
            np.testing.assert_allclose(rings[0].get_offsets(), (mu - centre) @ plane, atol=1e-6)
            np.testing.assert_allclose(rings[0].get_sizes() / use, rings[0].get_sizes()[0] / use[0])


def test_curves(runs):
    for run in runs:
        looks = (("train", "training", "0.55"), ("val", "validation", run.color))
        for ax, (part, title) in zip(plot.MODEL_FIGURES["curves"](run).axes, plot.PARTS.items()):
            parts = {"": part, ", KL1": "kl1", ", KL2": "kl2"}
            parts = parts if part == "kl" and run.name[0] == "h" else {"": part}
            assert_curves(ax, title, {f"{name}{end}": (run.log[f"{split}_{p}"], color)
                                      for end, p in parts.items() for split, name, color in looks})
            assert [x.get_xdata()[0] for x in ax.lines if x.get_label() == "epoch kept"] == [9]
            span, = ax.patches      # beta reaches 1 in epoch 4
            assert (span.get_x(), span.get_width()) == (0.5, 3)
    for ax, part in zip(plot.COMPARISON_FIGURES["dynamics"](runs).axes, plot.PARTS):
        assert_curves(ax, f"validation {plot.PARTS[part]}",
                      {run.label: (run.log[f"val_{part}"], run.color) for run in runs})


def test_one_bad_epoch_does_not_flatten_the_curves(runs):
    log = {name: np.resize(values, 200) for name, values in runs[0].log.items()}
    values = np.concatenate([log["train_elbo"], log["val_elbo"]])
    log["train_elbo"][100] = -1e4
    low, high = plot.draw_curves(runs[0]._replace(log=log)).axes[0].get_ylim()
    assert 0 < low < min(values) < max(values) < high


def test_bars_and_histogram(runs):
    for run in runs:
        axes = plot.MODEL_FIGURES["kl"](run).axes
        for ax, layer in zip(axes, run.metrics["latent_dims"], strict=True):
            kl, on = run.arrays[f"kl_per_dim_{layer}"], run.arrays[f"variance_{layer}"] > 0.01
            heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
            assert list(heights.sum(0)) == sorted(kl, reverse=True)
            for bars, own, row, color, name in zip(ax.containers, (on, ~on), heights, (
                    run.color, "0.6"), ("active: 3", "inactive: 4")):
                assert sorted(row[row > 0]) == sorted(kl[own]) and bars.get_label() == name
                assert same_color(bars[0].get_facecolor(), color)
            assert layer in ax.get_xlabel() and ax.get_ylabel() == f"KL ({NATS})"
        (ax,), log_px = plot.MODEL_FIGURES["likelihood"](run).axes, run.arrays["log_px"]
        *bars, span = ax.patches
        edges = [bars[0].get_x() - 1e-6, *(bar.get_x() + bar.get_width() + 1e-6 for bar in bars)]
        counts = [bar.get_height() for bar in bars]
        assert counts == list(np.histogram(log_px, edges)[0]) and sum(counts) == 60
        assert ax.lines[0].get_xdata()[0] == -82 and "± 0.22" in ax.lines[0].get_label()
        assert (span.get_x(), span.get_width()) == pytest.approx((-82.22, 0.44))
        assert (ax.get_xlabel(), ax.get_ylabel()) == (f"log p(x) ({NATS})", "test images")


def test_pictures_of_all_models(runs):
    labels = [run.label for run in runs]
    assert labels == list(LABELS.values())
    shown = {"images": runs[0].arrays["images"]}
    grid, names = tiles(plot.COMPARISON_FIGURES["comparison"](
        [run._replace(arrays=run.arrays | shown) for run in runs]))
    assert names == ["original", *labels] and same(grid[0], runs[0], "images", 16)
    assert all(same(row, run, "reconstructions", 16) for row, run in zip(grid[1:], runs))
    grid, names = tiles(plot.draw_comparison(runs[:2]))         # of different images
    assert names == ["original", labels[0], "original", labels[1]]
    assert same(grid[2], runs[1], "images", 16)
    grid, names = tiles(plot.COMPARISON_FIGURES["samples"](runs))
    assert names == labels and grid.shape[:2] == (10, 16)
    assert all(same(two, run, "samples", 32) for two, run in zip(np.split(grid, 5), runs))


def test_tradeoff(runs):
    ax, = plot.COMPARISON_FIGURES["tradeoff"](runs).axes
    paths = [line for line in ax.lines if len(line.get_xdata()) == 12]
    for run, bar, path in zip(runs, ax.containers, paths, strict=True):
        (kl, recon), (point, _, arms) = (run.metrics[key] for key in ("kl", "recon")), bar
        assert point.get_xydata().tolist() == [[kl["mean"], recon["mean"]]]
        for axis, (arm, m) in enumerate(zip(arms, (kl, recon), strict=True)):
            ends = [m["mean"] - m["se"], m["mean"] + m["se"]]
            np.testing.assert_allclose(arm.get_segments()[0][:, axis], ends)
        assert same_color(point.get_color(), run.color)
        assert bar.get_label() == f"{run.label}, ELBO -85.00"
        assert np.array_equal(path.get_xydata().T, [run.log["val_kl"], run.log["val_recon"]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"KL ({NATS})", f"reconstruction ({NATS})")
    levels, = [c for c in ax.collections if hasattr(c, "levels")]
    for level, segments in zip(levels.levels, levels.allsegs):
        assert all(y - x == pytest.approx(level) for part in segments for x, y in part)


def test_active_units_and_kl_per_layer(runs):
    left, right = plot.COMPARISON_FIGURES["active_units"](runs).axes
    drawn, bars, texts = {line.get_label(): line for line in left.lines}, [], []
    for y, run in enumerate(runs):
        for layer in run.metrics["latent_dims"]:
            line = drawn[f"{run.label}, {layer}: 3 of 7 active"]
            v = sorted(run.arrays[f"variance_{layer}"], reverse=True)
            np.testing.assert_allclose(line.get_ydata(), np.log10(v))
            assert same_color(line.get_color(), run.color)
            assert line.get_linestyle() == (":" if layer == "z1" else "-")
        kl, two = run.metrics["kl"]["mean"], run.name[0] == "h"
        bars += [(0, 8, y, 0.5), (8, 17, y, 1)] if two else [(0, kl, y, 1)]
        texts.append("  z1 8.0 + z2 17.0" if two else f"  z {kl:.1f}")
    np.testing.assert_allclose([(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2,
                                 bar.get_facecolor()[3]) for bar in right.patches], bars)
    assert [text.get_text() for text in right.texts] == texts
    assert [text.get_text() for text in right.get_yticklabels()] == [run.label for run in runs]
    assert (right.get_xlabel(), right.get_title()) == (f"KL ({NATS})", "KL per layer")
    assert left.get_ylabel() == "log10 variance of the posterior mean"
    assert drawn["active: variance above 0.01"].get_ydata()[0] == -2


def pair(active=(2, 5), kl=(26, 25), recon=(-62, -60), layers=("z",), **changes):
    """Runs of the standard prior and of the VampPrior, each with its numbers, errors of 0.1."""
    alike = dict.fromkeys(("dataset", "note", "binarize", "samples", "images")) | {
        "model": "vae" if len(layers) == 1 else "hvae", "latent_dims": dict.fromkeys(layers, 9)}
    metrics = [alike | {"prior": prior, "active_units": {"z1": 9} | {layers[-1]: a},
                        "kl": stat(k, 0.1), "recon": stat(r, 0.1)}
               for prior, a, k, r in zip(("standard", "vamp"), active, kl, recon)]
    metrics[1] |= changes
    return [plot.Run("", "", m, None, None, "", "") for m in metrics]


@pytest.mark.parametrize("numbers, start, end", [
    ({}, "fewer units of z active under N(0, I), 2 of 9, than under the VampPrior, 5; KL 26.00 "
     "and 25.00, reconstruction -62.00 and -60.00 nats",
     ", yet the KL is higher and the reconstruction worse"),
    ({"recon": (-60, -60)}, "fewer", ", yet the KL is higher"),
    ({"kl": (25, 25)}, "fewer", " and the reconstruction is worse"),
    ({"kl": (25.28, 25), "recon": (-60.28, -60)}, "fewer", None),       # within two errors
    ({"kl": (25.29, 25), "recon": (-60.28, -60)}, "fewer", ", yet the KL is higher"),
    ({"kl": (24, 25), "recon": (-59, -60)}, "fewer units of z active under N(0, I)", None),
    ({"active": (5, 2)}, "fewer units of z active under the VampPrior, 2 of 9, than under N(0, I), "
     "5; KL 25.00 and 26.00, reconstruction -60.00 and -62.00", None),
    ({"active": (3, 3)}, "as many units of z active under N(0, I), 3 of 9, as under the VampPrior, "
     "3; KL 26.00 and 25.00", None)])
def test_the_message_says_only_what_the_numbers_say(numbers, start, end):
    for runs in (pair(**numbers), pair(**numbers)[::-1]):
        first, *more = plot.collapse_message(runs).split("\n")
        assert first.startswith(f"VAE: {start}")
        assert more == ([f"Under N(0, I) fewer units are active{end}."] if end else [])


def test_the_message_concludes_only_where_all_pairs_agree():
    two = ("z1", "z2")
    assert "yet" in plot.collapse_message(pair() + pair(layers=two)).split("\n")[2]
    for other in ({"active": (5, 2)}, {"kl": (25, 25)}):
        for runs in (pair() + pair(layers=two, **other), pair(**other) + pair(layers=two)):
            assert "HVAE: " in (text := plot.collapse_message(runs)) and "KL is" not in text
    assert plot.collapse_message(pair(samples=7)) == plot.collapse_message(pair()[:1]) == ""


def test_every_figure_is_written(folder, capsys):
    for name, drawn in (("vae", 6), ("hvamp", 7), ("", 6)):
        assert plot.main([str(path := folder / name)]) == 0
        figures = set(plot.MODEL_FIGURES if name else plot.COMPARISON_FIGURES)
        found = sorted(path.glob("*.png"), key=lambda p: p.stat().st_mtime_ns)
        assert {p.stem for p in found} == figures - {"pseudo_inputs" if name == "vae" else ""}
        assert found[-1].stem == ("curves" if name else "samples")     # what make waits for
        assert all(matplotlib.image.imread(p).shape[1] > 300 for p in found)
        assert capsys.readouterr().out == (
            f"{name}: trained, evaluated and drawn: NLL 82.00 ± 0.22 (S = 500), {drawn} figures in "
            f"{path}\n" if name else f"wrote 6 figures to {path}\n")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extremes", [
    dict(N=1, D=1, K=1, epochs=1, images=1, recon=stat(-60, None)),
    dict(label="$\\frac{$ | VAE |\n<b>", dataset="/private/folder/mine.npz", note=NOTE)])
def test_extreme_runs_are_drawn_with_their_note(tmp_path, extremes):
    fake_run(tmp_path / "hvae", **extremes)
    run, = plot.read_runs([fake_run(tmp_path / "vamp", **extremes)])
    assert plot.main([str(tmp_path / "vamp")]) == plot.main([str(tmp_path)]) == 0
    for fig in [draw(run) for draw in plot.MODEL_FIGURES.values()] + [
            draw([run]) for draw in plot.COMPARISON_FIGURES.values()]:
        texts = "\n".join(text.get_text() for text in fig.findobj(Text))
        assert "/private" not in texts and extremes.get("note", "test images") in texts


def test_models_are_found_in_order_and_look_different(folder):
    assert list(plot.find_models(folder)) == list(LABELS)
    assert list(plot.find_models(folder, ["mog", "vae"])) == ["mog", "vae"]
    again = plot.read_runs([folder / "vamp"] * 3)
    assert len({run.color for run in again}) == 3 and again[0].label == "VAE + VampPrior (vamp)"


def array(name, *value):
    """A function that replaces an array of a run, or removes it."""
    def change(folder):
        arrays = {k: v for k, v in np.load(folder / "arrays.npz").items() if k != name}
        np.savez(folder / "arrays.npz", **arrays, **dict(zip([name], value)))
    return change


def text(name, old, new):
    return lambda f: (f / name).write_text((f / name).read_text().replace(old, new))


@pytest.mark.parametrize("harm, expected", [
    (lambda f: (f / "config.json").unlink(), "config.json is missing: run train.py first"),
    (lambda f: (f / "arrays.npz").unlink(), "arrays.npz is missing: run evaluate.py first"),
    (text("metrics.json", "}", ""), "metrics.json is damaged"),
    (text("metrics.json", '"nll"', '"n"'), "is damaged (it lacks 'nll'): run evaluate.py again"),
    (text("metrics.json", "-85.0", "NaN"), "elbo is not finite"),
    (text("metrics.json", '"prior": "vamp"', '"prior": "mog"'), "files of different runs"),
    (text("log.csv", "12,1.0,", "12,"), "log.csv is damaged (expected 12 cells"),
    (text("log.csv", "val_kl,", "x,"), "it lacks 'val_kl'): run train.py again"),
    (lambda f: (f / "arrays.npz").write_bytes((f / "arrays.npz").read_bytes()[:3000]),
     "arrays.npz is damaged (File is not a zip file): run evaluate.py again"),
    (array("images", np.array([None])), "Object arrays cannot be loaded"),
    (array("samples"), "it lacks samples"),
    (array("log_px", np.zeros(59)), "log_px has shape (59,)"),
    (array("images", np.zeros((40, 19))), "images has shape (40, 19)"),
    (array("log_px", np.full(60, np.nan)), "log_px holds NaN"),
    (lambda f: (f / "metrics.json").unlink(), "no metrics.json in the subfolders of")])
def test_damage_is_one_line(tmp_path, capsys, harm, expected):
    harm(fake_run(tmp_path / "vamp"))
    assert plot.main([str(tmp_path / "vamp")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not list(tmp_path.rglob("*.png"))


def test_torch_is_not_imported():
    code = "import sys, report; print({'torch', 'models', 'data', 'train'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent,
                            capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
