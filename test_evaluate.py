"""evaluate.py: the likelihood against the plain estimate, statistics in known cases, the records.

    pytest test_evaluate.py
"""
import copy
import json
import math
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import data as datasets
import evaluate
import models
import plot
import records
from test_models import randn, seeded, uniform
from test_train import digits, faces, fit, one_line, whole       # noqa: F401  (fixtures, too)


@pytest.fixture(scope="session")
def hwhole(digits, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("hwhole") / "run", digits, "--model", "hvae")


@pytest.fixture(scope="session")
def grey(faces, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("grey") / "run", faces, "--likelihood", "logistic", "--model",
               "hvae", "--epochs", 2)


def evaluated(folder, *more, code=0):
    """The metrics and arrays that evaluate.py wrote in this folder."""
    words = [str(folder), "--samples", "20", "--device", "cpu", *map(str, more)]
    assert evaluate.main(words) == code
    if code == 0:
        with np.load(folder / "arrays.npz", allow_pickle=False) as file:
            return json.loads((folder / "metrics.json").read_text()), dict(file)


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


# ----------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("reach, low, high, bound", [(3, -6, 2, 1e-2), (2, -4, 1, 5e-4)])
def test_a_mixture_around_a_center_is_the_mixture(learned, reach, low, high, bound):
    K, D = 500, 40
    mu, logvar = uniform(-reach, reach, K, D), uniform(low, high, K, D, seed=1)
    prior = models.MixturePrior(mu, logvar, randn(K, seed=2) if learned else None)
    prior.requires_grad_(False)
    single = copy.deepcopy(prior).float()
    for k, spread in ((0, low), (1, high)):
        z = mu[k] + math.exp(spread / 2) * randn(7, 1, D, seed=3)
        near = evaluate.Around(prior, mu[k])
        torch.testing.assert_close(near.log_prob(z), prior.log_prob(z), rtol=1e-12, atol=1e-9)
        value = evaluate.Around(single, mu[k].float()).log_prob(z.float())
        assert value.dtype == torch.float32 and value.shape == (7, 1)
        assert (value - prior.log_prob(z.float().double())).abs().max() <= bound


@pytest.mark.parametrize("kind, n", [("whole", 1), ("hwhole", 1), ("grey", 1), ("hwhole", 6)])
def test_likelihood_equals_the_plain_estimate(kind, n, request, monkeypatch):
    """As the field writes it: all samples at once, float64, the same noise image by image, or by n
    images as on a GPU."""
    monkeypatch.setattr(evaluate, "images_at_once", lambda device: n)
    monkeypatch.setattr(evaluate, "WIDE", 6000)
    model, data, _ = evaluate.load_run(request.getfixturevalue(kind))
    S, x = 1500, datasets.pixels(data.test)
    ours = evaluate.importance_terms(model, data.test, S, seeded(0))
    base, double = torch.randint(2**62, (), generator=seeded(0)).item(), copy.deepcopy(model).double()
    with torch.no_grad():
        for i in range(0, len(x), n):
            noise, draw = seeded(base + i), torch.randn
            torch.randn = lambda *args, **more: draw(*args, **(more | {"dtype": torch.float32})).double()
            try:        # passes of 1,000 samples share one stream
                parts = [double.terms(x[i:i + n].double(), size, noise) for size in (1000, 500)]
            finally:
                torch.randn = draw
            parts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            log_w = parts["recon"] - parts["kl"]
            wanted = {name: value.mean(0) for name, value in parts.items()}
            top = log_w.amax(0)     # of 560 grey pixels e^-3000, which is no number
            wanted |= {"elbo": log_w.mean(0), "log_px": (log_w - top).exp().mean(0).log() + top}
            assert wanted.keys() == ours.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(ours[name][i:i + n], value, rtol=1e-7, atol=2e-4)


def test_likelihood_does_not_depend_on_blocks_or_threads(hwhole, monkeypatch):
    model, data, _ = evaluate.load_run(hwhole)
    before, found, seen, terms = torch.get_num_threads(), [], set(), model.terms

    def watched(*args):
        seen.add((torch.is_grad_enabled(), torch.get_num_threads()))
        return terms(*args)
    monkeypatch.setattr(model, "terms", watched)
    try:
        for threads, block in ((1, 100), (3, 100), (3, 5)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(evaluate, "INFER", block)
            found.append(evaluate.log_likelihood(model, data.test, 64, seeded(0)))
            with pytest.raises(RuntimeError):       # also after a failure
                evaluate.log_likelihood(model, data.test[:, 1:], 64)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found[:2]) and seen == {(False, 1)}
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-4)
    assert found[0].shape == (len(data.test),) and found[0].dtype == torch.float64
    assert not torch.equal(evaluate.log_likelihood(model, data.test, 64, seeded(1)), found[0])


def test_images_of_other_types_mean_the_same_or_are_refused(whole):
    model, data, _ = evaluate.load_run(whole)
    black = data.test > 0
    found = [evaluate.log_likelihood(model, x, 8, seeded(0)) for x in (
        black.float(), black, black.double(), 255 * black.to(torch.uint8), black.long())]
    assert all(torch.equal(x, found[0]) for x in found)
    for x, said in ((255 * black.float(), "from 0 to 255"), (black.float() - 1, "from -1 to 0"),
                    (black / 0, "nan"), (black.to(torch.uint8), "0 and 1 alone"), (black[:0], "no images")):
        with pytest.raises(ValueError, match=said):
            evaluate.log_likelihood(model, x, 8)


def test_a_likelihood_in_bfloat16_is_close_and_marked(hwhole, tmp_path, monkeypatch):
    shutil.copytree(hwhole, tmp_path / "hvamp")
    products, seen = evaluate.by_coefficients, set()

    def watched(z, coef, bias):
        seen.add((z.dtype, torch.is_autocast_enabled("cpu")))
        return products(z, coef, bias)
    monkeypatch.setattr(evaluate, "by_coefficients", watched)
    found = [evaluated(tmp_path / "hvamp", "--precision", name) for name in models.PRECISIONS]
    single, half = (arrays["log_px"] for _, arrays in found)
    assert 0 < np.abs(half - single).max() < 0.5 and seen == {(torch.float32, False)}
    metrics = found[1][0]
    assert metrics["precision"] == "bfloat16" and "S = 20 in bfloat16," in records.data_lines([metrics])[0]
    assert records.measured(found[0][0]) != records.measured(metrics)


def test_likelihood_stops_without_waiting_for_the_block(whole, monkeypatch):
    model, data, _ = evaluate.load_run(whole)
    terms, begun, over = evaluate._image_terms, [], threading.Event()

    class Two(evaluate.ThreadPoolExecutor):
        def __init__(self, count):
            super().__init__(2)

        def shutdown(self, wait=True, **more):
            super().shutdown(False, **more)
            over.set()
            super().shutdown(wait)

    def counted(*args):
        begun.append(1)
        if len(begun) > 1:      # the second waits until the pool is shut down
            over.wait()
        return terms(*args)

    def stop():
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "ThreadPoolExecutor", Two)
    monkeypatch.setattr(evaluate, "_image_terms", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.importance_terms(model, data.test[:9], 20, tick=stop)
    assert 0 < len(begun) < 9


# ------------------------------------------------------------------------ latents and pictures


def known_model(encoder, components=2):
    """A VAE of four latents with this encoder and a VampPrior of pseudo-inputs of one hot pixel."""
    model = models.build(models.Config(x_dim=9, hidden=4, z_dim=4, components=components))
    model.encode = encoder
    model.prior = models.VampPrior(encoder, torch.eye(9)[:components])
    return model


def test_units_are_active_by_the_variance_of_their_mean():
    """Variances 0.02, 0.005, 25 and 0: by the standard deviations one unit more would count."""
    def encoder(x):
        return x[:, :1] * torch.tensor([0.02**.5, 0.005**.5, 5.0, 0]) * 2, torch.full((len(x), 4), -2.0)
    x = (torch.arange(4000) % 2)[:, None].repeat(1, 9).mul(255).to(torch.uint8)
    m, a = evaluate.latent_statistics(known_model(encoder), x, seeded(0))
    assert m["active_units"] == {"z": 2} and m["latent_dims"] == {"z": 4}
    assert a["variance_z"].tolist() == pytest.approx([0.02, 0.005, 25, 0], rel=1e-3)
    torch.testing.assert_close(a["latent_means"], encoder(datasets.pixels(x))[0])


@pytest.mark.parametrize("components", [2, 4])
def test_components_used_is_the_perplexity_of_their_use(components):
    """Components 0 and 1 lie where three and one quarter of the images are, the others far away."""
    def encoder(x):
        mu = torch.zeros(len(x), 4)
        mu[:, 2] = 100 * x[:, 0] + 900 * x[:, 2] + 1800 * x[:, 3]
        return mu, torch.full((len(x), 4), -2.0)
    x = torch.eye(9)[(torch.arange(400) % 4 == 0).long()].mul(255).to(torch.uint8)
    m, a = evaluate.latent_statistics(known_model(encoder, components), x, seeded(0))
    assert m["components"] == components
    assert a["component_use"].tolist() == pytest.approx([0.75, 0.25, 0, 0][:components])
    assert m["components_used"] == pytest.approx(0.75**-0.75 * 0.25**-0.25, abs=1e-3)


@pytest.mark.parametrize("prior", models.PRIORS)
@torch.no_grad()
def test_kl_per_dimension_of_a_factorised_prior_adds_up(prior):
    """With one component the marginals are the prior, so the sum is the closed-form KL."""
    torch.manual_seed(0)
    model = models.build(models.Config("vae", prior, 9, 4, 3, 1))
    model.encoder.head.linear.bias[3:] -= 2     # narrow: a KL at the mean alone would be far off
    x = torch.randint(0, 2, (500, 9)).mul(255).to(torch.uint8)
    _, a = evaluate.latent_statistics(model, x, seeded(0), draws=100)
    q, p = model.encode(datasets.pixels(x)), model.prior.components()
    q, p = (torch.distributions.Normal(mu, (0.5 * logvar).exp()) for mu, logvar in (q, p))
    exact = torch.distributions.kl_divergence(q, p).mean(0)
    torch.testing.assert_close(a["kl_per_dim_z"], exact, rtol=0.05, atol=0.05)


def test_marginals_are_those_of_the_mixture_or_of_the_layers_gaussian():
    z, mu, logvar, logits = randn(6, 2), randn(3, 2, seed=1), randn(3, 2, seed=2), randn(3, seed=3)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits.expand(2, 3)),
        torch.distributions.Normal(mu.T, (0.5 * logvar).exp().T))
    prior = models.MixturePrior(mu, logvar, logits)
    torch.testing.assert_close(evaluate._log_marginals(z, None, prior), mixture.log_prob(z))
    p = randn(6, 2, seed=4), randn(6, 2, seed=5)
    gaussian = torch.distributions.Normal(p[0], (0.5 * p[1]).exp())
    torch.testing.assert_close(evaluate._log_marginals(z, p, prior), gaussian.log_prob(z))


def test_pictures_show_what_they_are_named_for(whole):
    model, data, _ = evaluate.load_run(whole)
    x, use = data.test[:7], torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2, 0.0])
    got = evaluate.pictures(model, replace(data, test=x), seeded(1), n=5)
    got |= evaluate.pseudo_pictures(model, use, seeded(2), n=3)
    assert torch.equal(got["images"], datasets.pixels(x[:5]))
    with torch.no_grad():
        assert torch.equal(got["reconstructions"], model.reconstruct(got["images"]))
        assert torch.equal(got["samples"], model.sample(64, seeded(1)))
        assert got["pseudo_use"].tolist() == pytest.approx([0.4, 0.3, 0.2])
        assert torch.equal(got["pseudo_inputs"], model.prior.u[[1, 3, 4]])
        mu, logvar = (part[[1, 3, 4]] for part in model.prior.components())
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=seeded(2))
        assert torch.equal(got["pseudo_samples"], model.generate(z))
    for name in ("samples", "reconstructions"):     # distances to all training images, plainly
        far = (got[name][:16, None] - datasets.pixels(data.train)).square().sum(-1).sqrt().min(1)
        torch.testing.assert_close(got[f"{name[:-1]}_distance"], far[0])
        if name == "samples":
            assert torch.equal(got["neighbours"], datasets.pixels(data.train)[far[1]])


def test_the_nearest_of_many_images_may_lie_in_any_block():
    train = torch.randint(0, 256, (23_000, 6), generator=seeded(0)).to(torch.uint8)
    where = [7, 10_001, 22_999]
    images, far = evaluate.nearest(datasets.pixels(train[where]), train)
    assert torch.equal(images, datasets.pixels(train[where])) and far.max() < 5e-3     # it expands squares


@pytest.mark.parametrize("kind", ["whole", "hwhole"])
def test_a_walk_leads_from_one_reconstruction_to_the_other(kind, request):
    model, data, _ = evaluate.load_run(request.getfixturevalue(kind))
    images = datasets.pixels(data.test[:7])
    with torch.no_grad():
        got, ends = evaluate.walks(model, images), model.reconstruct(images)
    assert got.shape == (3, 12, images.shape[1]) and len(evaluate.walks(model, images[:1])) == 0
    torch.testing.assert_close(got[:, [0, -1]].flatten(0, 1), ends[:6])
    assert (got[:, 1:] - got[:, :-1]).abs().amax((1, 2)).min() > 0


def test_samples_share_a_z2_and_not_their_z1(hwhole, monkeypatch):
    model, data, _ = evaluate.load_run(hwhole)
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda z2, g: seen.append(z2) or generate(z2, g))
    images = evaluate.pictures(model, data, seeded(1))["shared_z2"]
    z2 = seen[-1].view(6, 12, -1)
    assert (z2 == z2[:, :1]).all() and len(z2[:, 0].unique(dim=0)) == 6
    assert all(len(row.unique(dim=0)) == 12 for row in images)


def test_the_plane_is_the_priors_density_and_its_images():
    """A prior of one narrow Gaussian at (1, -2), and a decoder whose first pixel shows z's first."""
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[-2.0, -4.0]])
    model = models.build(models.Config("vae", "standard", 9, 4, 2))
    model.prior = models.MixturePrior(mu, logvar)
    model.generate = lambda z, generator: z.repeat(1, 4)[:, :9] if len(z) else z
    means = torch.rand(500, 2, generator=seeded(0)) * torch.tensor([2.0, 6.0]) - torch.tensor([0., 5])
    a = evaluate.plane(model, means, points=101, images=8)
    x0, y0, x1, y1 = a["plane_box"].tolist()
    inside = ((means >= a["plane_box"][:2]) & (means <= a["plane_box"][2:])).all(1)
    assert x1 - x0 == pytest.approx(y1 - y0) and inside.float().mean() > 0.97
    xs, ys = torch.linspace(x0, x1, 101), torch.linspace(y0, y1, 101)
    exact = torch.distributions.Normal(mu[0], (logvar[0] / 2).exp())
    wanted = exact.log_prob(torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)).sum(-1)
    torch.testing.assert_close(a["plane_log_prior"], wanted, rtol=1e-4, atol=1e-3)
    z = a["plane_images"][..., :2]      # the middles of 8 x 8 cells, row 0 at the bottom
    cell = (x1 - x0) / 8
    torch.testing.assert_close(z[2, 5], torch.tensor([x0 + 5.5 * cell, y0 + 2.5 * cell]))
    torch.testing.assert_close(a["plane_image_log_prior"], exact.log_prob(z).sum(-1),
                               rtol=1e-4, atol=1e-3)


def test_accuracies_of_codes_that_hold_the_label_and_of_codes_that_do_not():
    """Three classes with the names 5, 7 and 9. The means hold: all; one of three; a ring around the
    others, which no straight line cuts out; nothing."""
    x = torch.eye(9)[torch.arange(900) % 3].mul(255).to(torch.uint8)
    noise = torch.rand(len(x), 4, generator=seeded(0)) - 0.5
    angle = 2 * math.pi * noise[:, 0]
    place = {"all": torch.tensor([[0.0, 0], [90, 0], [0, 0.9]])[torch.arange(900) % 3],
             "one": torch.tensor([[0.0, 0], [0, 0], [9, 0]])[torch.arange(900) % 3],
             "ring": torch.stack([angle.cos(), angle.sin()], 1) * (torch.arange(900) % 3)[:, None],
             "nothing": torch.zeros(900, 2)}
    found = {}
    for name, mean in place.items():
        mean = torch.cat([mean, torch.zeros(900, 2)], 1) + 0.02 * noise
        model = known_model(lambda x: (mean, mean))
        model.latents = lambda part, mean=mean: {"z": (mean[:600] if len(part) == 600
                                                       else mean[600:], None, None)}
        labels = 5 + 2 * (torch.arange(900) % 3)
        data = datasets.Data("", "", (3, 3), x[:600], x[:0], x[600:], labels[:600], None,
                             labels[600:], "dynamic")
        found[name] = evaluate.classify(model, data, seeded(1))
    assert found["all"] == {"knn_accuracy": 1, "probe_accuracy": 1, "knn_k": 5}
    for name, knn, probe in (("one", 2 / 3, 2 / 3), ("ring", 1, 0.5), ("nothing", 1 / 3, 1 / 3)):
        assert found[name]["knn_accuracy"] == pytest.approx(knn, abs=0.09), name
        assert found[name]["probe_accuracy"] == pytest.approx(probe, abs=0.2), name
    assert evaluate.classify(model, replace(data, test_labels=None), seeded(1)) == {}
    names = replace(data, train_labels=torch.arange(600))       # each image's own
    assert evaluate.classify(model, names, seeded(1)) == {}


# ---------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("kind", ["whole", "hwhole"])
def test_metrics_are_means_over_images_with_standard_errors(kind, request, tmp_path):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "run")
    m, a = evaluated(tmp_path / "run")
    names = ["elbo", "recon", "kl", *(["kl1", "kl2"] if kind == "hwhole" else [])]
    for name, values in {"nll": -a["log_px"], **{name: a[name] for name in names}}.items():
        assert m[name]["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert m[name]["se"] == pytest.approx(values.std(ddof=1) / len(values)**0.5, rel=1e-4)
    assert m["elbo"]["mean"] == pytest.approx(m["recon"]["mean"] - m["kl"]["mean"])
    assert m["nll"]["mean"] <= -m["elbo"]["mean"]
    assert m["images"] == len(a["labels"]) == 12 and m["samples"] == 20
    assert np.array_equal(a["labels"], evaluate.load_run(tmp_path / "run")[1].test_labels)
    assert {"seed", "seconds", "device", "versions", "model_sha256", "epochs", "best_epoch",
            "train_seconds", "components_used", "probe_accuracy", "knn_accuracy"} <= m.keys()
    assert a["film"].shape == (len(a["film_epochs"]), 6, 64) and {0, 1} <= {*a["film_epochs"]}
    assert set(np.unique(a["film"][0])) == {0, 1}       # training images, binarised
    again, _ = evaluated(tmp_path / "run")
    assert again | {"seconds": 0, "date": m["date"]} == m | {"seconds": 0}      # midnight may pass
    few, arrays = evaluated(tmp_path / "run", "--images", 5)
    assert few["images"] == len(arrays["labels"]) == 5
    assert np.array_equal(arrays["elbo"], a["elbo"][:5])


def test_bits_per_dimension_are_of_the_logistic_alone(grey, faces, digits, tmp_path, capsys):
    m, a = evaluated(shutil.copytree(grey, tmp_path / "grey"))
    assert m["bits_per_dim"]["mean"] == pytest.approx(-a["log_px"].mean() / 560 / math.log(2))
    assert m["bits_per_dim"]["se"] == pytest.approx(m["nll"]["se"] / 560 / math.log(2))
    assert f"{m['bits_per_dim']['mean']:.3f} bits per dimension" in capsys.readouterr().out
    assert "logistic" in m["note"] and m["binarize"] == "none" and len(a["images"]) == 20
    for likelihood, note in ("gaussian", "density"), ("bernoulli", "no log-likelihood"):
        m, a = evaluated(fit(tmp_path / likelihood, faces, "--likelihood", likelihood, "--binarize",
                             "none", "--epochs", 1))
        assert "bits_per_dim" not in m and note in m["note"]
        assert m["nll"]["mean"] == pytest.approx(-a["log_px"].mean(), rel=1e-5)


def test_colour_goes_through_training_evaluation_and_figures(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 6, 5, 3)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    out = fit(tmp_path / "run", tmp_path / "x.npy", "--likelihood", "logistic", "--epochs", 2)
    m, a = evaluated(out)
    assert a["image_shape"].tolist() == [6, 5, 3] and a["pseudo_inputs"].shape == (6, 90)
    order = np.random.RandomState(777).permutation(60)[54:]
    np.testing.assert_allclose(a["images"].reshape(6, 6, 5, 3), x[order] / 255, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["data"]["image_shape"] == [6, 5, 3]
    assert plot.main([str(out)]) == 0 and (out / "pseudo_inputs.png").stat().st_size > 1000


def test_no_checkpoint_is_refused(tmp_path, capsys):
    evaluated(tmp_path, code=2)
    one_line(capsys, "model.pt")
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("film", [7, {0: "x"}, {"x": torch.zeros(2, 64)}, {
    0: torch.zeros(2, 64), 1: torch.zeros(3, 64)}])
def test_a_damaged_film_is_one_line(film, whole):
    model = evaluate.load_run(whole)[0]
    model.extra["film"] = film
    with pytest.raises(ValueError, match="its film of pseudo-inputs is damaged"):
        evaluate.film(model, "model.pt")


def test_a_file_that_moved_is_named_and_one_that_changed_refused(run, digits, tmp_path, capsys):
    with np.load(digits) as file:
        x, y = file["x"].copy(), file["y"]
    wanted, _ = evaluated(run, "--dataset", digits)
    np.savez(tmp_path / "moved.npz", x=x, y=y)
    found, _ = evaluated(run, "--dataset", tmp_path / "moved.npz")
    assert found["nll"] == wanted["nll"]
    x[0] ^= 1
    np.savez(tmp_path / "changed.npz", x=x, y=y)
    evaluated(run, "--dataset", tmp_path / "changed.npz", code=2)
    one_line(capsys, "other images", "--dataset")


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--images", "-1"], ["--seed", "x"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["run", *flags])
    assert stop.value.code == 2
    one_line(capsys, flags[0], flags[1])
