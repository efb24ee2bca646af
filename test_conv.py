"""conv.py, and models of the user's own: `--model FILE.py:CLASS`."""
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

import data as datasets
import evaluate
import models
import plot
import train
from conv import ConvVAE
from test_train import (HERE, assert_same_run, digits, fit, killed_at, load, refused,   # noqa: F401
                        rows)

CONV = ["--model", f"{HERE}/conv.py:ConvVAE"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """An .npz of 200 crops of two photographs, 32 x 32 in colour."""
    rng, photos = np.random.default_rng(0), load_sample_images().images
    corners = rng.integers(0, [[photos[0].shape[0] - 32, photos[0].shape[1] - 32]], (200, 2))
    path = tmp_path_factory.mktemp("data") / "crops.npz"
    np.savez(path, x=[photos[i % 2][a:a + 32, b:b + 32] for i, (a, b) in enumerate(corners)])
    return path


def test_colour_images_go_through_the_whole_pipeline(crops, tmp_path):
    folder, flags = tmp_path / "run", ["--likelihood", "logistic", "--lr", "3e-3", *CONV]
    fit(folder / "vamp", crops, *flags, "--epochs", 8, "--warmup", 1)
    evaluate.main([str(folder / "vamp"), "--samples", "9", "--device", "cpu", *CONV])
    (run,) = plot.read_runs(folder)
    assert run.label == "ConvVAE + VampPrior" and run.arrays["pseudo_samples"].shape == (6, 3072)
    elbo = [float(row["val_elbo"]) for row in rows(folder / "vamp")]
    assert elbo[-1] > elbo[0] + 1000
    models.MODELS.pop("conv.py:ConvVAE")    # a new process runs only a file that is named
    refused(lambda: evaluate.main([f"{folder}/vamp"]), "conv.py:ConvVAE", "not one of vae, hvae",
            "--model")


def test_encoder_and_decoder_have_each_channel_where_the_pixels_have_it(monkeypatch):
    monkeypatch.setitem(models.MODELS, "own", ConvVAE)
    model = models.build(models.Config("own", x_dim=8 * 12 * 3, components=5, height=8, channels=3,
                                       likelihood="logistic"))
    z = torch.randn(9, 40)
    before = model.decode(z)
    model.output.body[-1].bias.data[-1] += 1        # the last channel of the second parameter
    moved = (model.decode(z) - before).view(9, 2, 96, 3)
    torch.testing.assert_close(moved[:, 1, :, 2], torch.ones(9, 96))
    assert moved.sum().item() == pytest.approx(9 * 96, rel=1e-4)
    model.encoder.body = model.encoder.head = torch.nn.Identity()
    x = torch.rand(2, 8, 12, 3)
    assert torch.equal(model.encode(x.flatten(1)), x.movedim(3, 1))


def test_an_own_model_may_have_dropout_constants_buffers_and_lists(digits, tmp_path, monkeypatch):
    """Validation and the weights that are kept are without dropout; a resumed run has its draws."""
    (tmp_path / "own.py").write_text("""import models, torch
class Own(models.VAE):
    def make_layers(self, config, n_out):
        super().make_layers(config, n_out)
        self.drop, self.scale = torch.nn.Dropout(), torch.tensor(2.0)
        self.gain = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mask", torch.tensor(-torch.inf))
        self.trunk = self.decoder[0]        # a second name
    def infer(self, x):
        return [[self.scale * part for part in self.encode(x)]]
    def decode(self, z):
        self.steps += self.training
        return self.output(self.gain * self.drop(self.decoder(z)))
""")
    flags = ["--model", f"{tmp_path}/own.py:Own"]
    whole = fit(tmp_path / "whole", digits, *flags)
    killed_at(3 + 8 * 2, tmp_path / "run", digits, monkeypatch, *flags)
    assert_same_run(whole, fit(tmp_path / "run", digits, *flags, "--resume"))
    (model, info), data = load(whole), datasets.load(str(digits))
    assert model.gain != 1 and model.steps > 0
    kept = rows(whole)[info["best_epoch"] - 1]["val_elbo"]
    assert train.validate(model, data.val, 0)["val_elbo"] == pytest.approx(float(kept))
    evaluate.main([str(whole), "--samples", "9", *flags])
    evaluate.main([str(whole), "--fit-prior", str(tmp_path / "fit"), *flags])


@pytest.mark.parametrize("code, said", [
    ("", "no class Own"), ("class Own: pass", "takes no arguments"),
    ("class Own(models.VAE):\n def infer(self, x): return x", "see models.Model: "),
    ("class Own(models.VAE):\n def terms(self, x, S, generator, inferred): pass", "arguments"),
    ("class Own(models.VAE):\n def generate(self, z, generator): return z", "have the shapes"),
    ("class Own(models.VAE):\n def make_layers(self, c, n):\n  super().make_layers(c, n)\n"
     "  self.output = models.nn.Sequential(self.output)", "no attribute 'bias'"),
    ("class Own(models.VAE):\n def make_layers(self, c, n): models.torch.ones(1).item()", "meta")])
def test_a_class_that_does_not_fit_is_one_line(code, said, crops, tmp_path):
    (tmp_path / "own.py").write_text(f"import models\n{code}\n")
    flags = ["--likelihood", "logistic", "--model", f"{tmp_path}/own.py:Own"]
    refused(lambda: fit(tmp_path / "run", crops, *flags), said)
    assert not (tmp_path / "run").exists()


def test_names_of_no_model_are_one_line(crops, tmp_path):
    refused(lambda: fit(tmp_path / "run", crops, "--model", "vqvae"), "vae, hvae", "FILE.py:CLASS")
    refused(lambda: fit(tmp_path / "run", crops, "--model", "none.py:Own"), "none.py")
    np.save(tmp_path / "odd.npy", np.ones((20, 6, 8), np.uint8))
    refused(lambda: fit(tmp_path / "run", tmp_path / "odd.npy", *CONV), "divisible by 4")
