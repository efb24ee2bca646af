"""plot.py and report.py on invented runs: figures hold the arrays, tables the recorded numbers."""
import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import plot
import report

RECORDS = Path(__file__).parent / "assets/paper/seed0"


def stat(mean, se=0.2):
    return {"mean": mean, "se": se}


def fake_run(folder, shape=(5, 4), N=60, D=40, K=40, rows=420, **changes):
    """A recorded run with random arrays. Only a run with a VampPrior has labels, of K classes."""
    kind = folder.name if (RECORDS / folder.name).exists() else "vamp"
    m = json.loads((RECORDS / kind / "metrics.json").read_text())
    m |= {"images": N, "active_above": 0.01} | changes
    rng, n, size = np.random.default_rng(list(folder.name.encode())), min(48, N), np.prod(shape)

    def pixels(*leading):
        return rng.uniform(0, 0.9, (*leading, size))        # never white
    a = {"image_shape": np.array(shape), "images": np.arange(n * size).reshape(n, size) % 97 / 100,
         "reconstructions": pixels(n), "samples": pixels(64), "neighbours": pixels(16),
         "sample_distance": np.arange(16), "reconstruction_distance": np.full(n, 3.5),
         "log_px": rng.normal(-82, 12, N),
         "latent_means": rng.normal(3, 1, (N, D)) * np.linspace(1, 3, D)}
    a |= {f"variance_{z}": rng.permutation(np.logspace(-4, 0, D)) for z in m["latent_dims"]}
    if m["prior"] == "vamp":
        a |= {"component_mu": rng.normal(3, 2, (K, D)), "component_use": rng.dirichlet(np.ones(K)),
              "pseudo_inputs": pixels(K), "pseudo_samples": pixels(K), "labels": np.arange(N) % K}
    if D == 2:
        a |= {"plane_box": np.array([-2, -4, 6, 4]), "plane_log_prior": rng.normal(-4, 1, (9, 9)),
              "plane_images": pixels(4, 4), "plane_image_log_prior": rng.normal(-4, 1, (4, 4))}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(m))
    lines = (RECORDS / kind / "log.csv").read_text().splitlines()
    (folder / "log.csv").write_text("\n".join(lines[:rows + 1]))
    np.savez(folder / "arrays.npz", **a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The Runs of four models, of which two have one layer and two a VampPrior."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("hvamp", "hvae", "vamp", "vae"):
        fake_run(folder / name)
    return plot.read_runs(folder)


def assert_shows(fig, strips):
    """The figure holds these strips, each (label, pixels (n, 20)), one below the other."""
    (ax,), cuts = fig.axes, []
    canvas = np.asarray(ax.images[0].get_array())[..., 0]
    for axis in (1, 0):         # cut at the white gaps
        inside = np.pad((canvas < 1).any(axis), 1).astype(int)
        cuts.append(np.flatnonzero(np.diff(inside)).reshape(-1, 2))
    grid = np.array([[canvas[a:b, c:d].ravel() for c, d in cuts[1]] for a, b in cuts[0]])
    np.testing.assert_array_equal(np.concatenate(grid), np.concatenate([x for _, x in strips]))
    texts = [label.get_text() for label in ax.get_yticklabels()]
    beside = [texts[np.argmin(abs(ax.get_yticks() - (a + b - 1) / 2))] for a, b in cuts[0]]
    assert beside == [label for label, x in strips for _ in range(len(x) // grid.shape[1])]


@pytest.mark.parametrize("name, strips", [
    ("samples", lambda label, a: [(label, a["samples"][:32])]),
    ("neighbours", lambda label, a: [
        (label, a["samples"][:16]),
        ("nearest, median distance 7.5\n(of reconstructions 3.5)", a["neighbours"])]),
    ("pseudo_inputs", lambda label, a: [
        (label, a["pseudo_inputs"][:20]), ("generates", a["pseudo_samples"][:20])])])
def test_pictures_are_the_arrays_they_are_named_for(runs, name, strips):
    shown = [run for run in runs if plot.FIGURES[name][1] in run.arrays]
    assert_shows(plot.FIGURES[name][0](shown),
                 [strip for run in shown for strip in strips(run.label, run.arrays)])


def test_reconstructions_are_compared_row_by_row(runs):
    images = runs[0].arrays["images"]
    rows = [(run.label, run.arrays["reconstructions"][:16]) for run in runs]
    other = runs[2]._replace(arrays=runs[2].arrays | {"images": images[::-1]})
    assert_shows(plot.reconstructions([*runs[:2], other]), [
        ("original", images[:16]), *rows[:2], ("original", images[::-1][:16]), rows[2]])


def test_colour_is_drawn_as_colour_and_grey_beside_it(runs, tmp_path):
    fake_run(tmp_path / "vamp", shape=(7, 6, 3))
    colour, grey = plot.read_runs(tmp_path)[0], runs[0]
    canvas = plot.samples([colour, grey]).axes[0].images[0].get_array()
    assert np.array_equal(canvas[8:15, 7:13].ravel(), colour.arrays["samples"][17])
    assert np.array_equal(canvas[18:23, 7:11].ravel(), grey.arrays["samples"][1].repeat(3))


def drawn(ax):
    """{label: its x and its y} of a panel's lines."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in ax.lines}


def test_curves_hold_the_log(runs):
    alone = [plot.curves([run]).axes for run in runs]
    epochs = list(range(1, 421))        # the KL warms up in the first 29
    for part, ax, *each in zip(("elbo", "recon", "kl"), plot.curves(runs).axes, *alone):
        assert drawn(ax) == {run.label: [epochs, run.log[f"val_{part}"].tolist()] for run in runs}
        for run, ax in zip(runs, each):
            expected = {"epoch kept": [[run.metrics["best_epoch"]] * 2, [0, 1]]}
            for layer in ("", "1", "2") if part == "kl" and run.label[0] == "H" else ("",):
                for split, label in (("train", "training"), ("val", "validation")):
                    label += f", KL{layer}" if layer else ""
                    expected[label] = [epochs, run.log[f"{split}_{part}{layer}"].tolist()]
            assert drawn(ax) == expected
            assert (ax.patches[0].get_x(), ax.patches[0].get_width()) == (0.5, 29)


def test_bad_epochs_do_not_flatten_the_curves(runs):
    log = runs[0].log.copy()
    log["train_elbo"][100:130] = -1e4
    low, high = plot.curves([runs[0]._replace(log=log)]).axes[0].get_ylim()
    assert -95 < low < -90 < max(log["train_elbo"]) < high


def test_tradeoff_has_points_with_errors_and_lines_of_equal_elbo(runs):
    (ax,) = plot.tradeoff(runs).axes
    paths = [line.get_xydata().T for line in ax.lines if len(line.get_xdata()) == 420]
    for run, path, (point, _, arms) in zip(runs, paths, ax.containers, strict=True):
        assert np.array_equal(path, [run.log["val_kl"], run.log["val_recon"]])
        for axis, m in enumerate((run.metrics["kl"], run.metrics["recon"])):
            assert point.get_xydata()[0, axis] == m["mean"]
            np.testing.assert_allclose(arms[axis].get_segments()[0][:, axis],
                                       [m["mean"] - m["se"], m["mean"] + m["se"]])
    slopes = [line for line in ax.lines if hasattr(line, "get_slope")]
    assert slopes
    for line, text in zip(slopes, ax.texts, strict=True):
        x, y = text.get_position()
        assert line.get_slope() == 1 and line.get_xy1() == (x, y)
        assert y - x == pytest.approx(float(text.get_text().split()[1]))


def test_active_units_and_kl_per_layer(runs):
    left, right = plot.active_units(runs).axes
    bars = []
    for run in runs:
        for z, n in run.metrics["active_units"].items():
            v = np.sort(run.arrays[f"variance_{z}"])[::-1]
            np.testing.assert_allclose(drawn(left)[f"{run.label}, {z}: {n} of 40 active"][1],
                                       np.log10(v))
        kl, kl1, kl2 = (run.metrics.get(key, {}).get("mean") for key in ("kl", "kl1", "kl2"))
        bars += [(0, kl1), (kl1, kl2)] if kl1 else [(0, kl)]
    assert [(bar.get_x(), bar.get_width()) for bar in right.patches] == bars


def test_latents_are_drawn_on_the_principal_axes(runs, monkeypatch):
    monkeypatch.setattr(plot, "SHOWN", 25)      # of 60
    for run, ax in zip(runs, plot.latents(runs).axes):
        centre = run.arrays["latent_means"].mean(0)
        z = run.arrays["latent_means"] - centre
        points, *rings = [c for c in ax.collections if len(c.get_offsets())]
        values, vectors = np.linalg.eigh(np.cov(z.T))
        plane = vectors[:, [-1, -2]]
        shown = z[np.sort(np.random.default_rng(0).permutation(60)[:25])]
        plane *= np.sign((shown @ plane * points.get_offsets()).sum(0))
        np.testing.assert_allclose(points.get_offsets(), shown @ plane, atol=1e-9)
        assert f"({values[-1] / values.sum():.0%} of the variance)" in ax.get_xlabel()
        if run.metrics["prior"] == "vamp":
            order = np.argsort(-run.arrays["component_use"])
            use, mu = run.arrays["component_use"][order], run.arrays["component_mu"][order]
            np.testing.assert_allclose(rings[0].get_offsets(), (mu - centre) @ plane)
            np.testing.assert_allclose(rings[0].get_sizes(), 45 * use / use[0])
        else:
            assert [circle.radius for circle in ax.patches] == [1, 2] and not rings
            assert all(circle.center == pytest.approx(-centre @ plane) for circle in ax.patches)


def test_plane_shows_the_prior_and_what_it_generates(tmp_path):
    fake_run(tmp_path / "vamp", D=2, K=3)
    (run,) = plot.read_runs(tmp_path)
    density, grid, _ = plot.planes([run]).axes
    assert grid.get_xlim() == (-2, 6) and grid.get_ylim() == (-4, 4)
    assert np.array_equal(density.collections[2].get_offsets(), run.arrays["latent_means"])
    ink = 1 - np.asarray(grid.images[0].get_array())[..., 0]
    for row, column in ((0, 0), (1, 3)):        # row 0 is at the bottom
        share = min(1, 64 * np.exp(run.arrays["plane_image_log_prior"][row, column]))
        tile = ink[5 * (3 - row):5 * (4 - row), 4 * column:4 * column + 4]
        np.testing.assert_allclose(tile.ravel(), share * run.arrays["plane_images"][row, column])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names, missing, extremes", [
    (["hvamp"], {"planes"},
     dict(N=1, D=1, K=1, rows=1, recon=stat(-60, None), kl=stat(25, None), nll=stat(82, None))),
    (["K50", "K500"], set(), dict(D=2, shape=(5, 4, 3), dataset="$\\frac{$ <script>"))])
def test_extreme_runs_are_drawn_and_shown(tmp_path, monkeypatch, capsys, names, missing, extremes):
    monkeypatch.setitem(plot.matplotlib.rcParams, "savefig.dpi", 30)
    for name in names:
        fake_run(tmp_path / name, **extremes)
    plot.main([str(tmp_path)])
    assert plot.FIGURES.keys() - {path.stem for path in tmp_path.glob("*.png")} == missing
    found = plot.read_runs(tmp_path)
    assert len({run.color for run in found}) == len(names)
    plot.draw("curves", found[:1]).savefig(tmp_path / names[0] / "curves.png")
    report.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert sorted(map(base64.b64decode, inside)) == sorted(
        path.read_bytes() for path in tmp_path.rglob("*.png"))
    assert not re.search(r"<script|<link|href|url\(|https?:|± 0.00", page)
    assert ("&lt;script&gt;" in page) == ("dataset" in extremes)


def test_every_number_stands_in_its_column():
    models = report.read(RECORDS)
    m, row = models["hvamp"][0], report.results(models)[-1] | report.latents(models)[-1]
    for title in "Recon", "KL", "ELBO", "NLL", "KL1", "KL2":
        assert row[title].strip("*") == plot.plus_minus(**m[title.lower()])
    assert row["Linear probe"].startswith(f"{100 * m['probe_accuracy']:.1f} ± ")
    assert row["k-NN"].startswith(f"{100 * m['knn_accuracy']:.1f} ± ")


@pytest.mark.parametrize("change, nll, published", [
    ({}, "**82.00 ± 0.20**", "82.38"), ({"samples": 500}, "82.00 ± 0.20", "82.38"),
    ({"images": 500}, "82.00 ± 0.20", "-"), ({"dataset": "fashion"}, "82.00 ± 0.20", "227.35"),
    ({"latent_dims": {"z": 2}}, "**82.00 ± 0.20**", "-"),
    ({"likelihood": "logistic"}, "82.00 ± 0.20", "-")])
def test_only_what_was_measured_alike_is_compared(tmp_path, change, nll, published):
    fake_run(tmp_path / "vae", nll=stat(84.0), images=10_000)
    fake_run(tmp_path / "vamp", nll=stat(82.0), **{"images": 10_000} | change)
    vae, vamp = report.results(report.read(tmp_path))
    assert (vae["NLL"], vamp["NLL"], vamp["Published"]) == ("84.00 ± 0.20", nll, published)


def test_seeds_have_their_mean_and_standard_deviation(tmp_path):
    for seed, nll, log_px in ((0, 82.0, [-80, -90]), (1, 82.4, [-81, -88]), (2, 81.9, [-79, -91])):
        fake_run(tmp_path / f"seed{seed}/vamp", nll=stat(nll))
        np.savez(tmp_path / f"seed{seed}/vamp/arrays.npz", log_px=log_px)
    fake_run(tmp_path / "seed1/vae", nll=stat(84.0))
    fake_run(tmp_path / "vae", nll=stat(99.0))      # no seed
    vae, vamp = report.results(report.read(tmp_path))
    assert (vae["NLL"], vamp["NLL"]) == ("84.00 ± 0.20", "**82.10 ± 0.26**")
    first, second = (math.log(sum(map(math.exp, log_px)) / 3)
                     for log_px in ([-80, -81, -79], [-90, -88, -91]))
    assert (vae["Seeds as one"], vamp["Seeds as one"]) == ("-", f"{-(first + second) / 2:.2f}")
    fake_run(tmp_path / "seed3/vamp", samples=500)
    models = report.read(tmp_path)
    assert "**" not in str(report.results(models)) and len(report.conditions(models)) == 2


def test_gain_is_paired_and_has_its_error(tmp_path):
    for name, log_px in (("hvae", [-80, -90, -85, -95]), ("hvamp", [-78, -89, -86, -90])):
        fake_run(tmp_path / name)
        np.savez(tmp_path / name / "arrays.npz", log_px=log_px)
    models = report.read(tmp_path)
    assert report.gain(models) == [
        "The NLL of HVAE + VampPrior is 1.75 ± 1.25 nats lower than the NLL of HVAE + standard "
        "prior, image by image."]
    models["hvae"][0]["samples"] = 500
    assert report.gain(models) == []
