"""evaluate.py: the likelihood against its plain form, statistics in known cases, a run's files."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

import data as datasets
import evaluate
import models
import plot
from test_models import seeded, uniform
from test_train import digits, fit, load, refused, whole  # noqa: F401  (fixtures, too)


@pytest.fixture(scope="session")
def hwhole(digits, tmp_path_factory):
    """A run of HVAE + VampPrior with two latents a layer."""
    return fit(tmp_path_factory.mktemp("hwhole") / "run", digits, "--model", "hvae", "--z-dim", 2,
               "--pseudo-inputs", 5, "--epochs", 12)


@pytest.fixture(scope="session")
def grey(digits, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("grey") / "run", digits, "--likelihood", "logistic")


def evaluated(folder, *more):
    """The metrics and arrays that evaluate.py writes in this folder."""
    evaluate.main([str(folder), "--samples", "20", "--device", "cpu", *map(str, more)])
    return json.loads((folder / "metrics.json").read_text()), dict(np.load(folder / "arrays.npz"))


@pytest.fixture(scope="session")
def record(hwhole):
    return evaluated(hwhole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])      # of the encoder's output
def test_the_centered_mixture_of_training_errs_by_less_than_a_thousandth(dtype):
    """For draws of 500 components, whose means lie within 3 and whose variances above e^-4."""
    mu, logvar = uniform(-3, 3, 500, 25).to(dtype), uniform(-4, 0, 500, 25, seed=1).to(dtype)
    prior, z = models.MixturePrior(mu, logvar), models.draw_normal(mu.float(), logvar, seeded(2))
    exact = models.log_mixture(z.double(), mu.double(), logvar.double())
    with torch.autocast("cpu", torch.bfloat16):     # which must not reach the products
        value = prior.centered().log_prob(z)
    assert value.dtype == torch.float32 and (value - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("kind, n", [("whole", 1), ("hwhole", 1), ("grey", 1), ("hwhole", 4)])
def test_likelihood_equals_the_plain_estimate(kind, n, request, monkeypatch):
    """Both use the same noise for each image. With n = 4, images come in blocks, as on a GPU."""
    monkeypatch.setattr(evaluate, "AT_ONCE", {"cpu": n})
    monkeypatch.setattr(evaluate, "WIDE", 1000 * n)
    monkeypatch.setattr(evaluate, "BLOCK", 4)
    model, _, data, _ = evaluate.load_run(request.getfixturevalue(kind))
    x, draw = datasets.pixels(data.test[:8]).double(), torch.randn
    ours = evaluate.importance_terms(model, data.test[:8], 1500, seeded(0))
    base, model = torch.randint(2**62, (), generator=seeded(0)).item(), model.double()
    monkeypatch.setattr(torch, "randn", lambda *size, **options: draw(
        *size, **options | {"dtype": torch.float32}).double())
    for i in range(0, len(x), n):
        noise = seeded(base + i)        # passes of 1,000 samples share one stream
        parts = [model.terms(x[i:i + n], S, noise) for S in (1000, 500)]
        terms = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        log_w = terms["recon"] - terms["kl"]                            # (1500, n)
        top = log_w.amax(0)             # exp(log_w) itself may be too small for a number
        wanted = {name: value.mean(0) for name, value in terms.items()} | {
            "elbo": log_w.mean(0), "log_px": (log_w - top).exp().mean(0).log() + top}
        assert wanted.keys() == ours.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(ours[name][i:i + n], value, rtol=1e-7, atol=2e-4)


def test_likelihood_does_not_depend_on_threads_and_is_in_the_record(hwhole, record):
    (model, _, data, _), found = evaluate.load_run(hwhole), []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        found.append(evaluate.log_likelihood(model, data.test, 20, seeded(0)))
        assert torch.get_num_threads() == threads
    assert torch.equal(*found) and np.array_equal(record[1]["log_px"], found[0].float())


def test_images_of_other_types_mean_the_same_or_are_refused(whole):
    model, _, data, _ = evaluate.load_run(whole)
    white = data.test > 0
    types = white.float(), white, white.double(), white.long(), 255 * white.byte()
    found = [evaluate.log_likelihood(model, x, 8, seeded(0)) for x in types]
    assert all(torch.equal(x, found[0]) for x in found)
    for x, said in ((255 * white.float(), "0 to 255"), (white.float() - 1, "-1 to 0"),
                    (white / 0, "nan"), (white.byte(), "hold 0 and 1"), (white[:0], "no images"),
                    (white / 2, "data.binarise"), (100 * white.byte(), "--likelihood logistic")):
        with pytest.raises(ValueError, match=said):
            evaluate.log_likelihood(model, x, 8)


WHITE = torch.eye(9).mul(255).byte()        # nine images of one white pixel each


def known_model(table, logvar=-2.0):
    """A VAE whose posterior means of the images WHITE are the rows of `table` (9, D)."""
    model = models.build(models.Config(x_dim=9, hidden=4, z_dim=table.shape[1], components=3))
    model.encode = lambda x: (x @ table, torch.full((len(x), table.shape[1]), logvar))
    return model


def test_units_are_active_by_the_variance_of_their_mean():
    """By the standard deviation one unit more would be active."""
    table, variance = torch.zeros(9, 4), [0.02, 0.005, 25, 0]
    table[1] = 2 * torch.tensor(variance).sqrt()
    x = WHITE[torch.arange(4000) % 2]
    m, a = evaluate.latent_statistics(known_model(table), x, seeded(0))
    assert m["active_units"] == {"z": 2} and m["latent_dims"] == {"z": 4}
    assert a["variance_z"].tolist() == pytest.approx(variance, rel=1e-3)
    assert torch.equal(a["latent_means"], datasets.pixels(x) @ table)


@pytest.mark.parametrize("logits", [None, torch.tensor([2.0, 0, 1])])
def test_components_used_is_the_perplexity_of_their_use(logits):
    """Two components overlap, a third is far away. The posteriors are narrow: z is their mean."""
    table = torch.linspace(-1, 2, 9)[:, None]
    mu, logvar = torch.tensor([[0.0], [1], [90]]), torch.tensor([[0.0], [-1], [0]])
    model = known_model(table, logvar=-60.0)
    model.prior = models.MixturePrior(mu, logvar, logits)
    m, a = evaluate.latent_statistics(model, WHITE, seeded(0))
    log_pi = Categorical(logits=torch.zeros(3) if logits is None else logits).logits
    joint = log_pi + Normal(mu.T, (logvar.T / 2).exp()).log_prob(table)         # (9, 3)
    use = joint.softmax(1).mean(0)
    torch.testing.assert_close(a["component_use"].float(), use)
    assert m["components_used"] == pytest.approx(Categorical(use).perplexity().item(), rel=1e-4)


@torch.no_grad()
def test_pictures_show_what_they_are_named_for(hwhole):
    model, _, data, _ = evaluate.load_run(hwhole)
    got, noise = evaluate.pictures(model, data, seeded(1), n=5), seeded(1)
    assert torch.equal(got["images"], datasets.pixels(data.test[evaluate.some(12, 5)]))
    assert torch.equal(got["reconstructions"], model.reconstruct(got["images"]))
    assert torch.equal(got["samples"], model.sample(64, noise))
    _, arrays = evaluate.latent_statistics(model, data.test, noise)
    assert torch.equal(arrays["latent_means"], model.encode(datasets.pixels(data.test))[0])
    train, samples = datasets.pixels(data.train), got["samples"][:16]
    for name, images in (("reconstruction", got["reconstructions"]), ("sample", samples)):
        distance, index = (images[:, None] - train).square().sum(-1).sqrt().min(1)
        np.testing.assert_allclose(got[f"{name}_distance"], distance, rtol=1e-5)
    np.testing.assert_array_equal(got["neighbours"], train[index])


@torch.no_grad()
def test_pseudo_pictures_begin_with_the_most_used(whole):
    model, _ = load(whole)
    use = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2, 0.0])
    got = evaluate.pseudo_pictures(model, use, seeded(2), n=3)
    assert torch.equal(got["pseudo_inputs"], model.prior.u[[1, 3, 4]])
    mu, logvar = model.encode(model.prior.u[[1, 3, 4]])
    z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=seeded(2))
    torch.testing.assert_close(got["pseudo_samples"], model.generate(z))


def test_the_plane_is_the_priors_density_and_its_images():
    """The prior is one Gaussian; the image of a point is the point itself."""
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[-2.0, -4.0]])
    model = SimpleNamespace(prior=models.MixturePrior(mu, logvar), generate=lambda z, generator: z)
    means = uniform(0, 1, 500, 2).float() * torch.tensor([2.0, 6.0]) - torch.tensor([0.0, 5.0])
    a = evaluate.plane(model, means, fine=101, coarse=8)
    x0, y0, x1, y1 = a["plane_box"].tolist()
    inside = ((means >= a["plane_box"][:2]) & (means <= a["plane_box"][2:])).all(1)
    assert x1 - x0 == pytest.approx(y1 - y0) and inside.float().mean() > 0.97
    xs, ys = torch.linspace(x0, x1, 101), torch.linspace(y0, y1, 101)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)       # row 0 is at the bottom
    z, cell = a["plane_images"], (x1 - x0) / 8      # at the middles of 8 x 8 cells
    torch.testing.assert_close(z[2, 5], torch.tensor([x0 + 5.5 * cell, y0 + 2.5 * cell]))
    for name, at in (("plane_log_prior", grid), ("plane_image_log_prior", z)):
        wanted = Normal(mu[0], (logvar[0] / 2).exp()).log_prob(at).sum(-1)
        torch.testing.assert_close(a[name], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind, shift, probe, knn", [
    ("all", 0, 1, 1), ("all", 1, 0, 0), ("ring", 0, 1 / 2, 1), ("none", 0, 1 / 3, 1 / 3)])
def test_accuracies_of_codes_that_hold_the_label_and_of_codes_that_do_not(kind, shift, probe, knn):
    """Classes are points, rings, which no line cuts out, or noise. A shift makes labels wrong."""
    labels, noise = torch.arange(1800) % 3, uniform(-0.5, 0.5, 1800, 2).float()
    angle = 2 * math.pi * noise[:, 0]
    codes = {"all": torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 0.9]])[labels],
             "ring": torch.stack([angle.cos(), angle.sin()], 1) * labels[:, None],
             "none": torch.zeros(1800, 2)}[kind] + 0.02 * noise
    model = SimpleNamespace(latents=lambda x: {i: (x[:, [i]], None) for i in (0, 1)})
    data = datasets.Data("", (1, 2), codes[:1200], codes[:0], codes[1200:],
                         {"train": labels[:1200], "test": labels[1200:].roll(shift)}, "none", "")
    found = evaluate.classify(model, data, seeded(1))
    assert found["probe_accuracy"] == pytest.approx(probe, abs=0.2)
    assert found["knn_accuracy"] == pytest.approx(knn, abs=0.09)


def test_the_fitted_prior_is_the_density_of_draws_from_the_posteriors():
    """Codes are eight clusters of variance 1/4, and the posteriors add the variance 2."""
    centers = 9 * torch.cartesian_prod(torch.arange(4), torch.arange(2)).float()
    weights = torch.arange(1.0, 9).softmax(0) + 0.05
    labels = torch.multinomial(weights, 6000, replacement=True, generator=seeded(0))
    codes = models.draw_normal(centers[labels], torch.full((2,), 0.25).log(), seeded(1))
    model = SimpleNamespace(config=models.Config("vae", "standard"), encode=lambda x: (
        x, torch.full_like(x, 2.0).log()))
    data = datasets.Data("", (1, 2), codes[:4000], codes[4000:5000], 9 * codes, {}, "none", "")
    evaluate.fit_prior(model, data, seeded(2))
    z = models.draw_normal(codes[5000:], torch.full((2,), 2.0).log(), seeded(3))
    exact = models.log_mixture(z, centers, torch.full_like(centers, 2.25).log(),
                               (weights / weights.sum()).log())
    assert (model.prior.log_prob(z) - exact).mean().item() == pytest.approx(0, abs=0.03)
    assert model.config.components == 10 == len(model.prior.weight_logits)


def test_a_fitted_prior_makes_a_run_of_its_own(record, hwhole, tmp_path):
    evaluate.main([str(hwhole), "--fit-prior", str(tmp_path / "fit")])
    found, _ = evaluated(tmp_path / "fit")
    assert found["label"] == "HVAE + fitted mixture" and found["epochs"] == record[0]["epochs"]
    assert found["recon"] == record[0]["recon"] and found["kl2"] != record[0]["kl2"]
    shutil.copytree(hwhole, tmp_path / "begun")
    (tmp_path / "begun/model.safetensors").unlink()
    for name in "fit", "begun":
        refused(lambda: evaluate.main([f"{hwhole}", f"--fit-prior={tmp_path}/{name}"]), "holds a")


@pytest.mark.parametrize("name", ["nll", "elbo", "recon", "kl", "kl1", "kl2"])
def test_metrics_are_means_over_images_with_standard_errors(name, record):
    m, a = record
    values = -a["log_px"] if name == "nll" else a[name]
    assert m[name]["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert m[name]["se"] == pytest.approx(values.std(ddof=1) / len(values)**0.5, rel=1e-4)


def test_every_figure_can_be_drawn_from_the_arrays(record, hwhole):
    plot.main([str(hwhole)])
    assert plot.FIGURES.keys() == {path.stem for path in hwhole.glob("*.png")}


@pytest.mark.filterwarnings("error")
def test_fewer_images_are_random_and_have_their_own_labels(record, hwhole, tmp_path):
    m, a = evaluated(shutil.copytree(hwhole, tmp_path / "run"), "--images", 5)
    data, keep = evaluate.load_run(hwhole)[2], evaluate.some(12, 5)
    assert m["images"] == len(keep.unique()) == 5 and keep[-1] > 5
    assert np.array_equal(a["images"], datasets.pixels(data.test[keep]))
    assert np.array_equal(a["labels"], data.labels["test"][keep])
    assert evaluated(tmp_path / "run", "--images", 99)[0]["nll"] == record[0]["nll"]
    assert evaluated(tmp_path / "run", "--images", 1)[0]["nll"]["se"] is None


def test_bits_per_dimension_are_of_the_logistic_alone(grey, digits, tmp_path):
    m, a = evaluated(grey)
    assert m["bits_per_dim"]["mean"] == pytest.approx(-a["log_px"].mean() / 64 / math.log(2))
    m, _ = evaluated(fit(tmp_path / "run", digits, "--likelihood", "gaussian", "--epochs", 1))
    assert "bits_per_dim" not in m


def test_a_data_file_that_moved_is_named_and_one_that_changed_refused(hwhole, digits, tmp_path):
    run, moved = shutil.copytree(hwhole, tmp_path / "run"), tmp_path / "moved.npz"
    arrays = dict(np.load(digits))
    np.savez(moved, **arrays)
    assert evaluated(run, "--dataset", moved)[0]["images"] == 12
    np.savez(moved, **arrays | {"x": arrays["x"] ^ 1})
    refused(lambda: evaluated(run, "--dataset", moved), "other images", "--dataset")
