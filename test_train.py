"""train.py: what an epoch computes, resuming after accidents, errors in one line."""
import copy
import csv
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

import data as datasets
import files
import models
import train

HERE = Path(__file__).parent
TINY = ("--hidden 16 --z-dim 4 --pseudo-inputs 6 --batch-size 20 --epochs 4 --warmup 2 --device "
        "cpu --precision float32").split()
torch.set_num_threads(1)        # sums in another order have other bits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """An .npz of 120 grey images of 8 x 8, noise on ten random patterns, with labels."""
    rng = np.random.default_rng(0)
    y, patterns = rng.integers(0, 10, 120), rng.random((10, 8, 8)) > 0.5
    x = ((patterns[y] * 0.8 + rng.random((120, 8, 8)) * 0.2) * 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=x, y=y)
    return path


def words(out, data, *more):
    """The command line of a tiny run."""
    return [*TINY, "--dataset", str(data), "--out", str(out), *map(str, more)]


def fit(out, data, *more):
    """Trains in this process; the run's folder."""
    train.main(words(out, data, *more))
    return Path(out)


def refused(call, *said):
    """call() ends with one line that has all of `said`, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        call()
    line = str(stop.value.code)
    assert line.startswith("error: ") and "\n" not in line
    for word in said:
        assert word in line


def rows(folder):
    """The rows of log.csv without their seconds."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def load(folder):
    """(model, info) of a finished run."""
    return files.load_model(folder / "model.safetensors", models.build)


def assert_same_run(a, b):
    """The log and the weights are equal, bit for bit."""
    assert rows(a) == rows(b)
    (one, info), (two, other) = (files.load(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and info["best_epoch"] == other["best_epoch"]
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="session")
def whole(digits, tmp_path_factory):
    """An unbroken run of VAE + VampPrior."""
    return fit(tmp_path_factory.mktemp("whole") / "run", digits)


# ------------------------------------------------------------------------- the plain reference

REFERENCE = {"seed": 0, "epochs": 4, "batch": 20, "lr": 0.005, "warmup": 3, "ema": 0.9,
             "decay": 0.5, "clip": 12.0, "path": True}
FLAGS = "--seed {seed} --lr {lr} --warmup {warmup} --ema {ema} --weight-decay {decay} --clip {clip}"


def plain_training(model, data, seed, epochs, batch, lr, warmup, ema, decay, clip, path):
    """The recipe without code of train.py: (log.csv's rows, each epoch's average)."""
    own, size = [*model.prior.parameters()], -(-len(data.train) // batch)
    model.output.bias.data = torch.logit((data.train / 255).mean(0).clamp(0.01, 0.99))
    average = copy.deepcopy(model)
    matrices = [p for p in model.parameters() if p.ndim > 1 and all(p is not q for q in own)]
    others = [p for p in model.parameters() if p.ndim < 2] + own
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": decay},
                              {"params": others, "weight_decay": 0}], betas=(0.9, 0.99))
    log, kept, step = [], [], 0
    for epoch in range(1, epochs + 1):
        noise = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(data.train), generator=noise)
        torch.manual_seed(torch.randint(2**32, (1,), generator=noise).item())
        row = {"beta": min(1, epoch / warmup), "train_elbo": 0, "grad_norm": 0}
        for index in order.split(batch):
            step += 1
            left = max(0.5, epochs * size - step)       # the last step, too, has a rate
            row["lr"] = lr * min(step / size, left / (epochs * size - size))
            for group in adam.param_groups:
                group["lr"] = row["lr"]
            grey = data.train[index]
            parts = model.terms(datasets.binarise(grey), path_gradient=path)
            loss = (row["beta"] * parts["kl"] - parts["recon"]).mean()
            adam.zero_grad()
            loss.backward()
            length = torch.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1, clip / length) if clip else 1
            adam.step()
            if hasattr(model.prior, "u"):
                model.prior.u.data.clamp_(0, 1)
            share = min(ema, step / (step + 9))
            for mean, p in zip(average.parameters(), model.parameters()):
                mean.data += (1 - share) * (p.data - mean.data)
            row["grad_norm"] += length.item() / size
            row["train_elbo"] += (parts["recon"] - parts["kl"]).sum().item() / len(data.train)
        with torch.no_grad():
            parts = average.terms(data.val / 255, generator=torch.Generator().manual_seed(seed))
        row |= {f"val_{name}": value.mean().item() for name, value in parts.items()}
        row["val_elbo"] = row["val_recon"] - row["val_kl"]
        log.append(row)
        kept.append(copy.deepcopy(average.state_dict()))
    return log, kept


@pytest.mark.parametrize("flags, changed", [
    ("--model vae --prior mog", {}), ("--model hvae --prior vamp", {}),
    ("--model vae --prior vamp", {"clip": 5.0, "seed": 5, "ema": 0.7, "decay": 0.0}),
    ("--model vae --prior vamp --full-gradient", {"path": False, "clip": 0, "warmup": 1})])
def test_training_equals_a_plain_reference(flags, changed, digits, tmp_path):
    settings, data = REFERENCE | changed, datasets.load(str(digits))
    out = fit(tmp_path / "run", digits, *flags.split(), *FLAGS.format(**settings).split())
    torch.manual_seed(settings["seed"])
    torch.randperm(len(data.train))
    plain = models.build(models.Config(*flags.split()[1:4:2], 64, 16, 4, 6))
    log, kept = plain_training(plain, data, **settings)
    for wanted, row in zip(log, rows(out), strict=True):
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5, abs=2e-5), name
    best = max((row["val_elbo"], i) for i, row in enumerate(log) if row["beta"] == 1)[1]
    found, info = load(out)
    assert info["best_epoch"] == best + 1
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, kept[best][name], rtol=1e-4, atol=1e-5)


def images_of(name, n=50_000, n_pixels=784):
    """A Data with such training images, without values."""
    x = torch.empty(n, n_pixels, dtype=torch.uint8, device="meta")
    binarize = "none" if name == "static" else "dynamic"
    return datasets.Data(name, (1, n_pixels), x, x, x, {}, binarize, "")


@pytest.mark.parametrize("flags, n_train, name, n_pixels, own", [
    ("", 50_000, "mnist", 784, {"compile": "on"}), ("--recipe long", 10_000, "mnist", 784, {}),
    ("--model hvae", 50_000, "a", 784, {"lr": 0.006}), ("", 9_999, "a", 784, train.SMALL),
    ("--model hvae", 3_000, "a", 9, train.SMALL | {"compile": "off"}),
    ("", 2_999, "mnist", 784, train.TINY), ("--recipe long", 50_000, "static", 784, train.STATIC),
    ("--model hvae", 50_000, "static", 784, train.STATIC | {"lr": 0.003}),
    ("--model hvae", 2_999, "mnist", 560, train.TINY | {"lr": 0.0015}),
    ("", 50_000, "fashion", 784, {"lr": 0.006, "weight_decay": 0.16}),
    ("--model hvae", 50_000, "fashion", 784, {"lr": 0.006, "weight_decay": 0.16}),
    ("--likelihood logistic", 50_000, "fashion", 784, {}), ("", 10, "a", 2 * 784, train.TINY),
    ("", 50_000, "a", 8 * 784, {"lr": 0.0015}), ("", 10, "a", 8 * 784, train.TINY | {"lr": 0.0015}),
    ("--epochs 7", 50_000, "mnist", 784, {"epochs": 7, "warmup": 3, "compile": "off"})])
def test_the_recipe_depends_on_the_data_and_flags_override_it(flags, n_train, name, n_pixels, own):
    args = train.parse_args([*flags.split(), "--ema", "0.5"])
    wanted = train.RECIPES[args.recipe] | own | {"ema": 0.5}
    found = train.apply_recipe(args, images_of(name, n_train, n_pixels))
    assert wanted.items() <= vars(found).items()


def test_a_failing_compiler_changes_nothing(whole, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    assert_same_run(whole, fit(tmp_path / "run", digits, "--compile", "on"))
    assert capsys.readouterr().out.count("going on without --compile") == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("model", models.MODELS)
def test_slow_compiled_training_has_the_same_numbers(model, digits, tmp_path):
    logs = [rows(fit(tmp_path / flag, digits, "--model", model, "--compile", flag))
            for flag in ("off", "on")]
    for plain, compiled in zip(*logs, strict=True):
        assert plain != compiled
        for name in "val_elbo", "train_elbo", "grad_norm":
            assert float(compiled[name]) == pytest.approx(float(plain[name]), rel=1e-4)


@pytest.mark.parametrize("cpuinfo, found", [
    ("fpu avx512_bf16", "bfloat16"), ("asimd bf16", "bfloat16"), ("fpu avx512f", "float32")])
def test_auto_precision_is_what_the_processor_has(cpuinfo, found, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags : {cpuinfo}")
    monkeypatch.setattr(train, "Path", lambda name: tmp_path / "cpuinfo")
    assert train.parse_args(["--device", "cpu"]).precision == found


def test_bfloat16_changes_digits_but_not_the_training(digits, whole, tmp_path):
    half = rows(fit(tmp_path / "run", digits, "--precision", "bfloat16"))
    a, b = ([float(row["train_elbo"]) for row in log] for log in (rows(whole), half))
    assert a != b and a == pytest.approx(b, rel=5e-3)


def test_the_best_epoch_is_kept_and_patience_counts_from_it(digits, tmp_path, monkeypatch):
    elbo, averages = iter([-1, -1, -1, -9, -5, -4, -6, -6, -6, -6]), []

    def validate(model, x, seed):
        averages.append(copy.deepcopy(model.state_dict()))
        with pytest.raises(Timeout):        # no other process may write this folder
            FileLock(tmp_path / "run/.lock").acquire(timeout=0)
        return {"val_elbo": next(elbo)}
    monkeypatch.setattr(train, "validate", validate)
    flags = ["--epochs", 20, "--warmup", 4, "--patience", 3]        # killed after epoch 7
    killed_at(3 + 8 * 7, tmp_path / "run", digits, monkeypatch, *flags)
    out = fit(tmp_path / "run", digits, *flags, "--resume")
    model, info = load(out)
    assert info["best_epoch"] == 6 and info["epochs"] == len(rows(out)) == 9
    assert all(torch.equal(p, averages[5][name]) for name, p in model.state_dict().items())


def test_pseudo_inputs_and_bias_start_at_the_grey_images(digits, monkeypatch):
    data = datasets.load(str(digits), binarize="none")
    args = train.parse_args(["--likelihood", "logistic", "--device", "cpu"])
    config = models.Config(x_dim=64, components=80, likelihood="logistic")
    monkeypatch.setattr(train, "MANY", 90)
    run = train.start(train.apply_recipe(args, data), config, data)
    torch.manual_seed(0)
    assert torch.equal(run.model.prior.u, data.train[torch.randperm(96)[:80]] / 255)
    std = (data.train.double() / 255).std(0, correction=0)
    found = run.model.output.bias[64:].double().exp()
    torch.testing.assert_close(found, std.clamp_min(np.exp(-4)), rtol=1e-4, atol=0)


def test_a_run_can_start_from_trained_weights(whole, digits, tmp_path):
    kept, found = (load(out)[0].state_dict() for out in (
        whole, fit(tmp_path / "run", digits, "--init-from", whole, "--lr", 0, "--warmup", 0)))
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    refused(lambda: fit(tmp_path / "other", digits, "--init-from", whole, "--hidden", 8),
            "another hidden")
    assert not (tmp_path / "other").exists()


def test_a_model_below_the_mean_image_is_told_so(digits, tmp_path, capsys):
    data = datasets.load(str(digits))
    p = (data.train / 255).mean(0).clamp(0.01, 0.99)
    floor = torch.distributions.Bernoulli(p).log_prob(data.val / 255).sum(1).mean().item()
    fit(tmp_path / "run", digits, "--lr", 0)
    assert f"below the {floor:.2f} of the mean image" in capsys.readouterr().out


def killed_at(moment, out, data, monkeypatch, *flags):
    """A run that dies before or after an fsync or a rename. Epoch n ends with moment 3 + 8 n."""
    moments = itertools.count()

    def wrap(real):
        def call(*args):
            if next(moments) == moment:
                raise KeyboardInterrupt
            real(*args)
            if next(moments) == moment:
                raise KeyboardInterrupt
        return call
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("fsync", "replace"):
            patch.setattr(os, name, wrap(getattr(os, name)))
        fit(out, data, *flags)


@pytest.mark.parametrize("moment", range(0, 40, 3))
def test_a_run_killed_at_any_step_of_a_write_resumes(moment, digits, tmp_path, monkeypatch):
    model, prior = [*itertools.product(models.MODELS, models.PRIORS)][moment // 3 % 6]
    flags = ["--model", model, "--prior", prior, "--learned-weights"]
    killed_at(moment, tmp_path / "run", digits, monkeypatch, *flags)
    fit(tmp_path / "run", digits, *flags, "--resume")
    assert_same_run(fit(tmp_path / "whole", digits, *flags), tmp_path / "run")
    assert prior == "standard" or load(tmp_path / "run")[0].prior.weight_logits.std() > 0


def test_ctrl_c_ends_at_once_without_a_traceback(digits, tmp_path):
    code = ("import os, signal, sys, train\n"
            "train.validate = lambda *args: os.kill(os.getpid(), signal.SIGINT)\n"
            "train.main()")
    command = [sys.executable, "-c", code, *words(tmp_path / "run", digits)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr


def test_the_folder_of_another_run(whole, digits, tmp_path):
    """It is refused with other settings or images; the images may lie elsewhere."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    with FileLock(out / ".lock"):
        refused(lambda: fit(out, digits, "--resume"), "in use")
    refused(lambda: fit(out, digits), "--resume", "--out")
    for name, value in ("lr", 0.5), ("precision", "bfloat16"), ("seed", 1):
        refused(lambda: fit(out, digits, f"--{name}", value, "--resume"), f"{name} = ")
    x = np.load(digits)["x"]
    np.save(tmp_path / "moved.npy", x)
    x[-1, -1, -1] ^= 1
    np.save(tmp_path / "changed.npy", x)
    refused(lambda: fit(out, tmp_path / "changed.npy", "--resume"), "sha256")
    assert_same_run(whole, fit(out, tmp_path / "moved.npy", "--resume"))


def rewrite(path, function=lambda t: t, **config):
    """Writes the model in `path` again, with function(t) for each tensor t and another config."""
    tensors, info = files.load(path)
    files.save(path, {name: function(t) for name, t in tensors.items()},
               info | {"config": info["config"] | config})


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"text" * 100),
    lambda path: torch.save({"weight": torch.zeros(3)}, path),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes().replace(b":[8]", b":[9]")),
    lambda path: rewrite(path, lambda t: t.double() + 1e300),
    lambda path: rewrite(path, hidden=10**7, x_dim=10**7), lambda path: rewrite(path, prior="mog")])
def test_a_file_that_holds_no_model_is_refused(damage, whole, tmp_path):
    path = Path(shutil.copy(whole / "model.safetensors", tmp_path))
    damage(path)
    with pytest.raises(ValueError, match=str(path)) as error:
        files.load_model(path, models.build)
    assert "\n" not in str(error.value) and "allocate" not in str(error.value)     # no memory taken


def test_a_run_that_diverges_ends_with_a_line(digits, tmp_path):
    refused(lambda: fit(tmp_path / "run", digits, "--lr", 1e30), "not finite in epoch 1", "--lr")


@pytest.mark.parametrize("kind, flags, said", [
    ("grey", "--epochs 0", "--epochs"), ("grey", "--lr nan", "--lr"),
    ("grey", "--pseudo-inputs 0", "components"), ("black", "--likelihood gaussian", "bernoulli"),
    ("grey", "--device cuda --precision auto", "no GPU"),
    ("colour", "", "--likelihood logistic"), ("floats", "--likelihood logistic", "gaussian")])
def test_bad_flags_are_refused_and_nothing_is_written(kind, flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    x = np.random.default_rng(0).random((20, 4, 4, 3))
    np.save(tmp_path / "x.npy", {"grey": np.uint8(255 * x[..., 0]), "black": x[..., 0] > 0.5,
                                 "floats": x[..., 0], "colour": np.uint8(255 * x)}[kind])
    before = signal.getsignal(signal.SIGINT)
    refused(lambda: fit(tmp_path / "run", tmp_path / "x.npy", *flags.split()), said)
    assert signal.getsignal(signal.SIGINT) is before        # a notebook keeps its Ctrl-C
    assert not (tmp_path / "run").exists()
