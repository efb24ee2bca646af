"""Tests of plot.py on invented runs: what the figures' artists hold, and what is refused."""
import json
import re
import sys
import types

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import same_color
from matplotlib.text import Text

import plot
import records

NOTE = "5,000 digits, not comparable with the paper"
LABELS = {"vae": "VAE + standard prior", "vamp": "VAE + VampPrior", "hvae": "HVAE + standard prior",
          "hvamp": "HVAE + VampPrior", "mog": "VAE + mixture of Gaussians"}


def stat(mean, se):
    return {"mean": mean, "se": se}


def fake_run(folder, N=60, D=7, K=30, images=40, epochs=12, own=1.2, **changes):
    """A run folder with other random numbers in every place, pictures of 5 x 4 pixels; its Path.
    All see the same test images; what one adds to a term is alike but for a deviation of `own`."""
    folder.mkdir(parents=True)
    kind, rng = folder.name, np.random.default_rng([*folder.name.encode()])
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
    use, k = rng.dirichlet(np.ones(K)), min(K, 40)
    sizes = {"images": images, "reconstructions": images, "samples": 64, "pseudo_inputs": k,
             "pseudo_samples": k, "walks": 36, "neighbours": 16, "film": 80, "shared_z2": 72}
    shape = {"walks": (3, 12, 20), "film": (5, 16, 20), "shared_z2": (6, 12, 20)}
    plane = {"plane_box": [-2, -4, 6, 4], "plane_log_prior": rng.normal(-4, 1, (30, 30)),
             "plane_image_log_prior": rng.normal(-4, 1, (4, 4)),
             "plane_images": rng.uniform(0.1, 0.9, (4, 4, 20))} if D == 2 else {}
    np.savez(folder / "arrays.npz", image_shape=[5, 4], labels=np.arange(N) % 10,
             **{name: np.random.default_rng(i).normal(-82, 12, N) + own * rng.normal(0, 1, N)
                for i, name in enumerate(("log_px", *records.PARTS))},
             component_use=use, pseudo_use=np.sort(use)[::-1][:k], component_mu=rng.normal(3, 2, (K, D)),
             latent_means=rng.normal(3, 1, (N, D)) * np.linspace(1, 3, D),
             **{name: (np.random.default_rng(n) if name == "images" else rng).uniform(
                 0, 0.9, (n, 20)).reshape(shape.get(name, (n, 20)))     # never white
                for name, n in sizes.items() if name not in ("film", "shared_z2")
                or name == {"vamp": "film"}.get(prior) or name == "shared_z2" and model == "hvae"},
             sample_distance=rng.uniform(4, 6, 16), film_epochs=[0, 1, 2, 5, 10],
             reconstruction_distance=rng.uniform(3, 4, images), **plane,
             **{f"variance_{z}": rng.permutation(10 ** np.linspace(-4.5, 0, D)) for z in layers},
             **{f"kl_per_dim_{z}": rng.permutation(np.linspace(0.1, 3, D)) for z in layers})
    log = {"epoch": np.arange(1, epochs + 1), "clipped": [""] * epochs,
           "beta": np.minimum(1, np.arange(1, epochs + 1) / 4)}
    log |= {f"{split}_{part}": rng.normal(20, 1, epochs) for split in ("train", "val")
            for part in ("elbo", "recon", "kl", "kl1", "kl2")[:5 if model == "hvae" else 3]}
    lines = [",".join(map(str, row)) for row in (log, *zip(*log.values()))]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for i, name in enumerate(LABELS):
        fake_run(folder / name, kl=stat(25.0 + i, 0.07 + i), recon=stat(-60.0 - 3 * i, 0.2))
    return records.read_runs([*records.find_models(folder).values()])


def tiles(fig):
    """The pictures of a grid [row][column], cut at its white gaps, and the labels of its strips."""
    (ax,), cuts = fig.axes, []
    canvas = np.asarray(ax.images[0].get_array())
    for axis in (1, 0):
        edges = np.flatnonzero(np.diff((canvas < 1).any(axis), prepend=False, append=False))
        cuts.append(edges.reshape(-1, 2))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    middles = ((cuts[0].sum(1) - 1) / 2).reshape(len(labels), -1)   # an equal share of rows each
    np.testing.assert_allclose(ax.get_yticks(), middles.mean(1))
    return np.array([[canvas[a:b, c:d] for c, d in cuts[1]] for a, b in cuts[0]]), labels


def same(grid, run, name, n):
    return np.array_equal(grid.reshape(-1, 20), run.arrays[name].reshape(-1, 20)[:n])


def curves(ax):
    """{label: (colour, values over twelve epochs)} of a panel, without its upright line."""
    return {line.get_label(): (line.get_color(), *line.get_ydata()) for line in ax.lines
            if np.array_equal(line.get_xdata(), np.arange(1, 13))}


@pytest.mark.parametrize("n, shown", [(40, 32), (50, 48), (9, 9)])
def test_pictures_of_one_model(tmp_path, n, shown):
    run, = records.read_runs([fake_run(tmp_path / "vamp", images=n, K=n)])
    assert same(tiles(plot.MODEL_FIGURES["samples"](run))[0], run, "samples", 64)
    for figure, one, other, labels in (
            ("reconstructions", "images", "reconstructions", ["original", "reconstructed"]),
            ("pseudo_inputs", "pseudo_inputs", "pseudo_samples", ["pseudo-input", "generates"])):
        k = shown if one == "images" else 40
        grid, names = tiles(fig := plot.MODEL_FIGURES[figure](run))
        assert same(grid[::2], run, one, k) and same(grid[1::2], run, other, k)
        assert names == labels * (len(grid) // 2)
    use = run.arrays["pseudo_use"]
    assert (f"the {min(n, 40)} most used of {n} components, {use[0]:.2%} to {use[-1]:.2%} of the "
            f"images each; in use (perplexity): {0.8 * n:.1f} of {n} (80%)") in fig.axes[0].get_title("left")


def test_pictures_of_all_models(runs):
    grid, names = tiles(plot.COMPARISON_FIGURES["comparison"](runs))
    assert names == ["original", *LABELS.values()] and same(grid[0], runs[0], "images", 16)
    assert all(same(row, run, "reconstructions", 16) for row, run in zip(grid[1:], runs))
    other = runs[1]._replace(arrays=runs[1].arrays | {"images": runs[1].arrays["samples"][:40]})
    grid, names = tiles(plot.draw_comparison([runs[0], other]))
    assert names[::2] == ["original"] * 2 and same(grid[2], other, "images", 16)
    grid, names = tiles(plot.COMPARISON_FIGURES["samples"](runs))
    assert names == [*LABELS.values()]
    assert all(same(two, run, "samples", 32) for two, run in zip(np.split(grid, 5), runs))


def test_pictures_of_the_course_of_training_and_of_both_layers(runs):
    vamp, hvamp = (run for run in runs if run.metrics["prior"] == "vamp")
    grid, names = tiles(plot.MODEL_FIGURES["film"](vamp))
    assert same(grid, vamp, "film", 80) and names == [f"epoch {i}" for i in (0, 1, 2, 5, 10)]
    grid, names = tiles(plot.MODEL_FIGURES["shared_z2"](hvamp))
    assert same(grid, hvamp, "shared_z2", 72) and names == [f"z2, draw {i}" for i in range(1, 7)]


def test_pictures_of_walks_and_of_neighbours(runs):
    grid, names = tiles(plot.COMPARISON_FIGURES["walks"](runs))
    assert names == [*LABELS.values()] * 3
    for i, run in enumerate(runs):
        assert np.array_equal(grid[i::5].reshape(36, 20), run.arrays["walks"].reshape(36, 20))
    grid, names = tiles(plot.COMPARISON_FIGURES["neighbours"](runs))
    for i, run in enumerate(runs):
        assert same(grid[2 * i], run, "samples", 16) and same(grid[2 * i + 1], run, "neighbours", 16)
        far, usual = (np.median(run.arrays[f"{name}_distance"])
                      for name in ("sample", "reconstruction"))
        assert names[2 * i] == run.label and f"median distance of 16: {far:.1f}" in names[2 * i + 1]
        assert f"(of reconstructions {usual:.1f})" in names[2 * i + 1]


def test_two_latents_are_drawn_as_a_plane(tmp_path):
    folders = [fake_run(tmp_path / name, D=2) for name in ("vae", "vamp")]
    runs = records.read_runs(folders)
    panes = plot.COMPARISON_FIGURES["latents"](runs).axes
    shades = []
    for density, grid, run in zip(panes[:2], panes[2:4], runs):
        x0, y0, x1, y1 = run.arrays["plane_box"]
        assert density.get_title() == f"{run.label}\nELBO -85.00 ± 0.23"
        assert density.get_xlim() == grid.get_xlim() == (x0, x1)
        assert density.get_ylim() == grid.get_ylim() == (y0, y1)
        shade, lines, codes = density.collections[:3]
        shades.append(shade.levels)
        assert set(lines.levels) <= set(shade.levels)
        np.testing.assert_allclose(codes.get_offsets(), run.arrays["latent_means"])
        canvas, n = 1 - np.asarray(grid.images[0].get_array()), 4
        for row, column in ((0, 0), (1, 3)):        # row 0 is at the bottom
            weight = min(1, 64 * np.exp(run.arrays["plane_image_log_prior"][row, column]))
            tile = canvas[(n - 1 - row) * 5:(n - row) * 5, column * 4:column * 4 + 4]
            np.testing.assert_allclose(tile.ravel(), weight * run.arrays["plane_images"][row, column])
    assert np.array_equal(*shades)
    assert len(plot.MODEL_FIGURES["latent"](runs[0]).axes) == 3     # and the scale
    assert "principal" in plot.draw_latents([runs[0], *records.read_runs(
        [fake_run(tmp_path / "mog")])]).axes[0].get_xlabel()        # not all have two latents


def test_tsne_is_drawn_when_asked_for_and_its_library_is_there(tmp_path, monkeypatch, capsys):
    fake_run(tmp_path / "vamp")

    class TSNE:
        def __init__(self, **options):
            assert options["random_state"] == 0     # the same picture each time

        def fit_transform(self, z):
            return 7 * z[:, :2]
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", types.SimpleNamespace(TSNE=TSNE))
    assert plot.main([str(tmp_path), "--tsne"]) == 0 and (tmp_path / "tsne.png").exists()
    run, = records.read_runs([tmp_path / "vamp"])
    points = plot.draw_tsne([run]).axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, 7 * run.arrays["latent_means"][:, :2])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert plot.main([str(tmp_path), "--tsne"]) == 2
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_colour_is_drawn_as_colour_and_grey_beside_it(tmp_path, runs):
    folder, rng = fake_run(tmp_path / "vamp"), np.random.default_rng(0)
    with np.load(folder / "arrays.npz") as file:
        a = dict(file)
    for name in ("images", "reconstructions", "samples", "pseudo_inputs", "pseudo_samples", "walks",
                 "neighbours", "film"):
        a[name] = rng.uniform(0, 0.9, (*a[name].shape[:-1], 60))
    np.savez(folder / "arrays.npz", **a | {"image_shape": [5, 4, 3]})
    run, = records.read_runs([folder])
    for fig, name in ((plot.draw_samples([run]), "samples"), (plot.draw_pseudo_inputs(run),
                      "pseudo_inputs"), (plot.draw_reconstructions(run), "images"),
                      (plot.draw_samples([run, runs[0]]), "samples")):
        canvas = fig.axes[0].images[0].get_array()
        assert np.array_equal(canvas[:5, :4], a[name][0].reshape(5, 4, 3))
        assert np.array_equal(canvas[:5, 5:9], a[name][1].reshape(5, 4, 3))
    beside = runs[0].arrays["samples"][0].reshape(5, 4, 1).repeat(3, -1)
    assert np.array_equal(canvas[15:20, :4], beside)     # below two rows of colour and a gap of four


def test_latents_are_drawn_on_the_principal_axes(runs):
    for run, ax in zip(runs, plot.COMPARISON_FIGURES["latents"](runs).axes, strict=True):
        z = run.arrays["latent_means"] - (centre := run.arrays["latent_means"].mean(0))
        points, *rings = [c for c in ax.collections if len(c.get_offsets())]
        shown, (values, vectors) = points.get_offsets().data, np.linalg.eigh(np.cov(z.T))
        plane = vectors[:, :-3:-1] * np.sign((z @ vectors[:, :-3:-1] * shown).sum(0))
        np.testing.assert_allclose(shown, z @ plane, atol=1e-6)
        colors = colormaps["tab10"](run.arrays["labels"])
        np.testing.assert_allclose(points.get_facecolors()[:, :3], colors[:, :3])
        assert f"({values[-1] / values.sum():.0%} of the variance)" in ax.get_xlabel()
        if run.metrics["prior"] == "standard":
            assert [circle.radius for circle in ax.patches] == [1, 2]
            np.testing.assert_allclose(ax.patches[0].center, -centre @ plane)
        else:
            order = np.argsort(-run.arrays["component_use"])
            mu, use = (run.arrays[f"component_{name}"][order] for name in ("mu", "use"))
            np.testing.assert_allclose(rings[0].get_offsets(), (mu - centre) @ plane, atol=1e-6)
            np.testing.assert_allclose(rings[0].get_sizes(), 45 * use / use[0])
    assert "principal" in plot.MODEL_FIGURES["latent"](runs[0]).axes[0].get_xlabel()


def test_curves(runs):
    for run in runs:
        for ax, (part, title) in zip(plot.MODEL_FIGURES["curves"](run).axes, records.PARTS.items()):
            layers = ("", "1", "2") if part == "kl" and run.label[0] == "H" else ("",)
            assert curves(ax) == {
                f"{name}, KL{n}" if n else name: (color, *run.log[f"{split}_{part}{n}"])
                for split, name, color in (("train", "training", "0.55"),
                                           ("val", "validation", run.color)) for n in layers}
            assert (ax.get_title(), ax.lines[-1].get_xdata()[0]) == (title, 9)
            assert ax.patches[0].get_width() == 3       # beta reaches 1 in epoch 4
    for ax, part in zip(plot.COMPARISON_FIGURES["dynamics"](runs).axes, records.PARTS, strict=True):
        assert curves(ax) == {run.label: (run.color, *run.log[f"val_{part}"]) for run in runs}
        assert ax.patches[0].get_width() == 3
    log = {name: np.resize(values, 200) for name, values in runs[0].log.items()}
    values = np.concatenate([log["train_elbo"], log["val_elbo"]])
    log["train_elbo"][100:130] = -1e4       # bad epochs do not flatten the rest
    low, high = plot.draw_curves(runs[0]._replace(log=log)).axes[0].get_ylim()
    assert 0 < low < min(values) < max(values) < high
    far = runs[0]._replace(log=runs[0].log | {"val_elbo": runs[0].log["val_elbo"] - 60})
    assert plot.draw_dynamics([*runs[1:], far]).axes[0].get_ylim()[0] < -38     # no model is left out


def test_bars_and_histogram(runs):
    for run in runs:
        for ax, z in zip(plot.MODEL_FIGURES["kl"](run).axes, run.metrics["latent_dims"]):
            kl, on = run.arrays[f"kl_per_dim_{z}"], run.arrays[f"variance_{z}"] > 0.01
            active, inactive = ([bar.get_height() for bar in bars] for bars in ax.containers)
            assert list(np.add(active, inactive)) == sorted(kl, reverse=True)
            assert sorted(active)[-3:] == sorted(kl[on]) and sum(np.array(active) > 0) == 3
            for bars, color in zip(ax.containers, (run.color, "0.6")):
                assert same_color(bars[0].get_facecolor(), color)
            assert [bars.get_label() for bars in ax.containers] == ["active: 3", "inactive: 4"]
        (ax,), log_px = plot.MODEL_FIGURES["likelihood"](run).axes, run.arrays["log_px"]
        assert "bits" not in ax.get_title()
        known = run._replace(metrics=run.metrics | {"bits_per_dim": stat(4.5678, 0.02)})
        assert "4.568 bits per dim" in plot.draw_likelihood(known).axes[0].get_title()
        *bars, span = ax.patches
        edges = [bars[0].get_x() - 1e-6, *(bar.get_x() + bar.get_width() + 1e-6 for bar in bars)]
        assert [bar.get_height() for bar in bars] == list(np.histogram(log_px, edges)[0])
        assert ax.lines[0].get_xdata()[0] == -82
        assert (span.get_x(), span.get_width()) == pytest.approx((-82.22, 0.44))


def test_tradeoff(runs):
    ax, = plot.COMPARISON_FIGURES["tradeoff"](runs).axes
    paths = [line for line in ax.lines if len(line.get_xdata()) == 12]
    for run, bar, path in zip(runs, ax.containers, paths, strict=True):
        (kl, recon), (point, _, arms) = (run.metrics[key] for key in ("kl", "recon")), bar
        assert point.get_xydata().tolist() == [[kl["mean"], recon["mean"]]]
        for axis, (arm, m) in enumerate(zip(arms, (kl, recon), strict=True)):
            ends = [m["mean"] - m["se"], m["mean"] + m["se"]]
            np.testing.assert_allclose(arm.get_segments()[0][:, axis], ends)
        assert (point.get_color(), bar.get_label()) == (run.color, f"{run.label}, ELBO -85.00")
        assert np.array_equal(path.get_xydata().T, [run.log["val_kl"], run.log["val_recon"]])
    levels, = [c for c in ax.collections if hasattr(c, "levels")]
    for level, segments in zip(levels.levels, levels.allsegs):
        assert all(y - x == pytest.approx(level) for part in segments for x, y in part)


def test_active_units_and_kl_per_layer(runs):
    left, right = plot.COMPARISON_FIGURES["active_units"](runs).axes
    drawn, bars = {line.get_label(): line for line in left.lines}, []
    for y, run in enumerate(runs):
        for z in run.metrics["latent_dims"]:
            line = drawn[f"{run.label}, {z}: 3 of 7 active"]
            v = sorted(run.arrays[f"variance_{z}"], reverse=True)
            np.testing.assert_allclose(line.get_ydata(), np.log10(v))
            assert line.get_color() == run.color and (line.get_linestyle() == ":") == (z == "z1")
        two = run.label[0] == "H"
        bars += [(0, 8, y, 0.5), (8, 17, y, 1)] if two else [(0, 25 + y, y, 1)]
        assert right.texts[y].get_text() == "  z1 8.0 + z2 17.0" if two else f"  z {25 + y:.1f}"
    np.testing.assert_allclose([(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2,
                                 bar.get_facecolor()[3]) for bar in right.patches], bars)


def pair(layers=("z",), active=(2, 5), kl=(26, 25), recon=(-62, -60), **changes):
    """Metrics of the standard prior and of the VampPrior, each with its numbers, errors of 0.1."""
    alike = dict.fromkeys(("dataset", "note", "binarize", "samples", "images")) | {
        "model": "vae" if len(layers) == 1 else "hvae", "latent_dims": dict.fromkeys(layers, 9)}
    one, two = [alike | {"prior": prior, "active_units": {"z1": 9} | {layers[-1]: active[i]},
                         "kl": stat(99 - kl[i], 0.1), "recon": stat(recon[i], 0.1),
                         layers[-1].replace("z", "kl"): stat(kl[i], 0.1)}
                for i, prior in enumerate(("standard", "vamp"))]
    return [two | changes, one]


@pytest.mark.parametrize("numbers, start, end", [
    ({}, "fewer units of z active under N(0, I), 2 of 9, than under the VampPrior, 5; KL 26.00 and "
     "25.00, reconstruction -62.00", ", yet its KL is higher and the reconstruction worse"),
    ({"recon": (-60, -60)}, "fewer", ", yet its KL is higher"),
    ({"kl": (25.28, 25)}, "fewer", " and the reconstruction is worse"),       # within two errors
    ({"kl": (25, 25), "recon": (-60.28, -60)}, "fewer", None),
    ({"active": (5, 2)}, "more units of z active under N(0, I), 5 of 9, than", None),
    ({"active": (3, 3)}, "as many units of z active under N(0, I), 3 of 9, as under", None)])
def test_the_message_says_only_what_all_pairs_say(numbers, start, end):
    assert plot.collapse_message(pair(**numbers)).startswith(f"VAE: {start}")
    two, last = ("z1", "z2"), [
        f"Under N(0, I) fewer units of the top layer are active{end}."] if end else []
    for metrics in (pair(**numbers), pair(**numbers) + pair(two), pair() + pair(two, **numbers)):
        lines = plot.collapse_message(metrics).split("\n")
        assert [line for line in lines if line.startswith("Under")] == last
    for none in (pair(samples=7), pair()[:1], pair(**numbers) * 2):     # two of a kind: which of them?
        assert plot.collapse_message(none) == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extremes", [
    dict(N=1, D=1, K=1, epochs=1, images=1, recon=stat(-60, None)),
    dict(label="$\\frac{$ | VAE |\n<b>", dataset="/private/folder/mine.npz", note=NOTE)])
def test_every_figure_is_written_of_extreme_runs_too(tmp_path, extremes):
    folders = [fake_run(tmp_path / name, **extremes) for name in ("hvamp", "vae")]
    for folder, figures in zip((*folders, tmp_path), (
            plot.MODEL_FIGURES, plot.MODEL_FIGURES, plot.COMPARISON_FIGURES)):
        assert plot.main([str(folder)]) == 0
        found = [p.stem for p in sorted(folder.glob("*.png"), key=lambda p: p.stat().st_mtime_ns)]
        only = {"pseudo_inputs", "film", "shared_z2"} if folder.name == "vae" else set()
        assert found == [name for name in figures if name not in only]
        assert found[-1] in ("samples", "curves")       # what make waits for
    run = records.read_runs(folders)[0]
    for name, fig in [*((name, draw(run)) for name, draw in plot.MODEL_FIGURES.items()),
                      *((name, draw([run])) for name, draw in plot.COMPARISON_FIGURES.items())]:
        texts = "\n".join(text.get_text() for text in fig.findobj(Text))
        assert "/private" not in texts and extremes.get("note", "dynamic binarisation") in texts
        assert bool(re.search(r"\d test images", texts)) == (name not in plot.NOT_OF_TEST_IMAGES), name
    again = records.read_runs(folders[:1] * 3)
    assert len({run.color for run in again}) == 3 and again[0].label.endswith(" (hvamp)")


def text(name, old, new):
    return lambda f: (f / name).write_text((f / name).read_text().replace(old, new))


def arrays(**changes):
    return lambda f: np.savez(f / "arrays.npz", **dict(np.load(f / "arrays.npz")) | changes)


@pytest.mark.parametrize("harm, expected", [
    (lambda f: (f / "arrays.npz").unlink(), "arrays.npz is missing: run evaluate.py first"),
    (lambda f: (f / "metrics.json").unlink(), "no metrics.json in"),
    (text("metrics.json", "}", ""), "metrics.json is damaged"),
    (text("metrics.json", '"nll"', '"n"'), "is damaged (it lacks 'nll'): run evaluate.py again"),
    (text("metrics.json", "-85.0", "NaN"), "elbo is not finite"),
    (text("config.json", "vamp", "mog"), "its model or prior is not that of metrics.json"),
    (text("log.csv", "12,,1.0,", "12,,"), "a cell is empty or not finite): run train.py again"),
    (text("log.csv", "val_kl", "x"), "it lacks 'val_kl'): run train.py again"),
    (lambda f: (f / "arrays.npz").write_bytes((f / "arrays.npz").read_bytes()[:3000]),
     "arrays.npz is damaged (File is not a zip file): run evaluate.py again"),
    (lambda f: np.savez(f / "arrays.npz", image_shape=[5, 4]), "it lacks 'images'"),
    (arrays(images=np.array([None])), "Object arrays cannot be loaded"),
    (arrays(log_px=np.zeros(59)), "log_px has shape (59,), not (60,)"),
    (arrays(log_px=np.full(60, np.nan)), "log_px holds NaN")])
def test_damage_is_one_line(tmp_path, capsys, harm, expected):
    harm(fake_run(tmp_path / "vamp"))
    assert plot.main([str(tmp_path / "vamp")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
