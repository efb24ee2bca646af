"""train.py: what an epoch computes, resuming after every kind of accident, errors in one line.

    pytest test_train.py -k "not slow"      # `make test`; without -k: `make test-all`
"""
import csv
import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data as datasets
import files
import models
import train

HERE = Path(__file__).parent
TINY = ["--hidden", "16", "--z-dim", "4", "--pseudo-inputs", "6", "--batch-size", "20",
        "--epochs", "4", "--warmup", "2", "--device", "cpu", "--precision", "float32"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A user's npz: 120 grey images of 8 x 8, ten random patterns, with labels."""
    rng = np.random.default_rng(0)
    y, patterns = rng.integers(0, 10, 120), rng.random((10, 8, 8)) > 0.5
    x = ((patterns[y] * 0.8 + rng.random((120, 8, 8)) * 0.2) * 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=x, y=y)
    return path


def words(out, digits, *more):
    return [*TINY, "--dataset", str(digits), "--out", str(out), *map(str, more)]


def fit(out, digits, *more, code=0):
    """Trains in this process; the exit code is checked."""
    assert train.main(words(out, digits, *more)) == code
    return Path(out)


def popen(out, digits, *more, **kwargs):
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *words(out, digits, *more)],
                            stderr=subprocess.PIPE, text=True, cwd=out.parent,
                            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                            **kwargs)


def rows(folder):
    """log.csv without its seconds."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def load(path):
    return files.load_model(path, models.build)


def assert_same_run(a, b):
    """Weights and log equal, bit for bit; seconds aside."""
    assert rows(a) == rows(b)
    one, two = load(a / "model.pt"), load(b / "model.pt")
    for (name, p), (_, q) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    assert one.extra["best_epoch"] == two.extra["best_epoch"]
    films = one.extra["film"], two.extra["film"]
    assert [*films[0]] == [*films[1]] and all(map(torch.equal, *(f.values() for f in films)))


@pytest.fixture(scope="session")
def whole(digits, tmp_path_factory):
    """An uninterrupted run of the VampPrior."""
    return fit(tmp_path_factory.mktemp("whole") / "run", digits)


def one_line(capsys, *words):
    """The single line of stderr, which has all of `words` and no traceback."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


# ------------------------------------------------------------------------- the plain reference


def plain_training(model, data, seed, epochs, batch, lr, warmup, ema, decay, clip, path):
    """The README's recipe, straight: (rows of what log.csv says, the averaged weights per epoch)."""
    u, size = model.prior.u, -(-len(data.train) // batch)
    with torch.no_grad():
        model.output.bias.copy_(torch.logit((data.train.double() / 255).mean(0).float().clamp(.01, .99)))
    average = {k: v.clone() for k, v in model.state_dict().items()}
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not u]
    others = [p for p in model.parameters() if p.ndim == 1] + [u]
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": decay},
                              {"params": others, "weight_decay": 0}], betas=(0.9, 0.99))
    log, kept, step = [], [], 0
    for epoch in range(1, epochs + 1):
        noise = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(data.train), generator=noise)
        row = {"beta": min(1, epoch / warmup), "train_elbo": 0.0, "grad_norm": 0.0}
        for index in order.split(batch):
            step += 1
            left = max(0.5, epochs * size - step)       # the last step, too, has a rate
            for group in adam.param_groups:
                group["lr"] = lr * min(step / size, left / (epochs * size - size))
            grey = data.train[index]
            x = (grey > torch.empty_like(grey).random_(0, 255, generator=noise)).float()
            parts = model.terms(x, generator=noise, path_gradient=path)
            loss = (row["beta"] * parts["kl"] - parts["recon"]).mean()
            adam.zero_grad()
            loss.backward()
            length = torch.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1, clip / length) if clip else 1
            adam.step()
            with torch.no_grad():
                u.copy_(u.clamp(0, 1))
                for name, value in model.state_dict().items():
                    share = min(ema, step / (step + 9))
                    average[name] += (1 - share) * (value - average[name])
            row["grad_norm"] += length.item() / size
            row["train_elbo"] += (parts["recon"] - parts["kl"]).sum().item() / len(data.train)
        live = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average)
        with torch.no_grad():
            parts = model.terms(data.val.float() / 255, generator=torch.Generator().manual_seed(seed))
        model.load_state_dict(live)
        row |= {f"val_{name}": value.mean().item() for name, value in parts.items()}
        log.append(row)
        kept.append({k: v.clone() for k, v in average.items()})
    return log, kept


@pytest.mark.parametrize("model, flags", [
    ("vae", {}), ("hvae", {}), ("vae", {"clip": 5.0, "seed": 5, "ema": 0.7, "decay": 0.0}),
    ("vae", {"path": False, "clip": 0, "warmup": 1})])
def test_training_equals_a_plain_reference(model, flags, digits, tmp_path):
    """Weights, log and best epoch of four epochs, by torch's own AdamW and no code of train.py."""
    f = {"seed": 0, "epochs": 4, "batch": 20, "lr": 0.005, "warmup": 3, "ema": 0.9, "decay": 0.5,
         "clip": 12.0, "path": True} | flags
    out = fit(tmp_path / "run", digits, "--model", model, "--seed", f["seed"], "--lr", f["lr"],
              "--warmup", f["warmup"], "--ema", f["ema"], "--weight-decay", f["decay"],
              "--clip", f["clip"], *["--full-gradient"] * (not f["path"]))
    data = datasets.load(str(digits))
    torch.manual_seed(f["seed"])
    first = data.train[torch.randperm(len(data.train))[:6]]
    u = (first > torch.empty_like(first).random_(0, 255)).float()
    plain = models.build(models.Config(model, "vamp", 64, 16, 4, 6), u)
    log, kept = plain_training(plain, data, **f)
    for wanted, row in zip(log, rows(out), strict=True):
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5, abs=2e-5), name
    best = max((row["val_recon"] - row["val_kl"], i) for i, row in enumerate(log)
               if row["beta"] == 1)[1]
    found = load(out / "model.pt")
    assert found.extra["best_epoch"] == best + 1
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, kept[best][name], rtol=1e-4, atol=1e-5)


def test_the_reference_case_leaves_nothing_out(digits, tmp_path):
    """In it gradients are clipped, pixels are projected and moved, beta matters, the average lags."""
    out = fit(tmp_path / "run", digits, "--lr", 0.005, "--warmup", 3, "--ema", 0.9)
    log, last = rows(out), files.load(out / "last.pt")
    assert float(log[0]["grad_norm"]) > 12 and 0 < float(log[-1]["clipped"]) < 1
    assert float(log[-1]["val_kl"]) > 0.1
    assert not torch.equal(last["model"]["output.bias"], last["average"]["output.bias"])


@pytest.mark.parametrize("schedule, quarter, middle, end", [
    ("linear", 0.75, 0.5, 0), ("cosine", 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0),
    ("constant", 1, 1, 1)])
def test_schedules(schedule, quarter, middle, end):
    found = [train.lr_factor(schedule, p, 0.2) for p in (0.05, 0.2, 0.4, 0.6, 1.0)]
    assert found == pytest.approx([0.25, 1, quarter, middle, end])


def test_the_epoch_kept_is_the_best_at_beta_1_and_patience_counts_from_it(digits, tmp_path,
                                                                          monkeypatch):
    elbo = iter([-1, -9, -5, -4, -6, -6, -6, -6])       # beta is 1 from the second epoch on
    monkeypatch.setattr(train, "validate", lambda *args: {"val_elbo": next(elbo)})
    out = fit(tmp_path / "run", digits, "--epochs", 20, "--patience", 3)
    extra = load(out / "model.pt").extra
    assert extra["best_epoch"] == 4 and extra["epochs"] == len(rows(out)) == 7
    with open(out / "log.csv", newline="") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    assert extra["train_seconds"] == pytest.approx(seconds) and seconds > 0


@pytest.mark.parametrize("data, count", [("large", 10_000), ("small", 9_999), ("small", 3_000),
                                         ("tiny", 2_999)])
@pytest.mark.parametrize("name", train.RECIPES)
def test_flags_override_the_recipe_of_the_data_size(name, data, count):
    args, record = train.settle(train.parse_args(["--recipe", name, "--lr", "0.5"]), count)
    values = dict(zip(train.RECIPE_FLAGS, train.RECIPES[name][data]))
    assert {flag: getattr(args, flag) for flag in values} == values | {"lr": 0.5}
    assert record == {"name": name, "size": data, "values": values, "changed": {"lr": 0.5}}
    short = train.settle(train.parse_args(["--recipe", name, "--epochs", "9"]), count)[0]
    assert short.warmup == min(4, values["warmup"])


@pytest.mark.parametrize("likelihood, size", [("bernoulli", "fashion"), ("logistic", "large")])
def test_fashion_in_black_and_white_has_its_own_recipe(likelihood, size):
    args = train.parse_args(["--likelihood", likelihood])
    assert train.settle(args, 50_000, "fashion")[1]["size"] == size


@pytest.mark.parametrize("flags, found", [("flags : fpu avx512f avx512_bf16 ssse3", "bfloat16"),
                                          ("Features : asimd bf16 i8mm", "bfloat16"),
                                          ("flags : fpu avx2 avx512f", "float32"), (None, "float32")])
def test_auto_precision_is_the_hardwares_and_a_runs_own(flags, found, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CPUINFO", tmp_path / "cpuinfo")
    if flags:
        (tmp_path / "cpuinfo").write_text(flags)
    device, other = torch.device("cpu"), {"float32": "bfloat16", "bfloat16": "float32"}[found]
    assert train.pick_precision("auto", device, tmp_path) == found
    assert train.pick_precision(other, device, tmp_path) == other
    (tmp_path / "config.json").write_text(json.dumps({"args": {"precision": other}}))
    assert train.pick_precision("auto", device, tmp_path) == other


def test_bfloat16_is_trained_recorded_and_kept(digits, tmp_path, monkeypatch, capsys):
    half, seen, terms = ["--precision", "bfloat16"], set(), models.VAE.terms
    with monkeypatch.context() as patch:        # validation, without gradients, is float32
        patch.setattr(models.VAE, "terms", lambda *args, **more: (seen.add((
            torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"))), terms(*args, **more))[1])
        whole, out = fit(tmp_path / "whole", digits, *half), tmp_path / "run"
    assert seen == {(True, True, torch.bfloat16), (False, False, torch.bfloat16)}
    die_in_epoch(3, out, digits, monkeypatch, *half)
    fit(out, digits, "--resume", code=2)
    one_line(capsys, "precision", "bfloat16")
    fit(out, digits, "--precision", "auto", "--resume")
    assert_same_run(whole, out)
    exact = fit(tmp_path / "exact", digits)
    a, b = (np.array([float(row["train_elbo"]) for row in rows(folder)]) for folder in (whole, exact))
    assert (a != b).any() and a == pytest.approx(b, rel=5e-3)
    assert json.loads((out / "config.json").read_text())["args"]["precision"] == "bfloat16"


def test_config_json_records_recipe_and_values(whole):
    config = json.loads((whole / "config.json").read_text())
    assert config["recipe"]["name"] == "default" and config["recipe"]["changed"]["epochs"] == 4
    assert config["args"]["epochs"] == 4 and config["args"]["lr"] == 3e-3     # few images


# ------------------------------------------------------------------------------------ same bits


@pytest.mark.parametrize("model", ("vae", "hvae"))
@pytest.mark.parametrize("prior", ("standard", "mog", "vamp"))
def test_resumed_run_equals_an_uninterrupted_one(model, prior, digits, tmp_path, monkeypatch):
    flags = ["--model", model, "--prior", prior, "--learned-weights", "--patience", 1]
    fit(tmp_path / "a", digits, *flags)
    for last in (1, 2, 3):      # dies at the start of the epoch after `last`
        die_in_epoch(last + 1, tmp_path / "b", digits, monkeypatch, "--resume", *flags)
    fit(tmp_path / "b", digits, *flags, "--resume")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_film_shows_pseudo_inputs_at_chosen_epochs(digits, tmp_path):
    film = load(fit(tmp_path / "a", digits, "--epochs", 11) / "model.pt").extra["film"]
    assert [*film] == [0, 1, 2, 5, 10, 11]
    last = files.load(tmp_path / "a" / "last.pt")["average"]["prior.u"][:train.FILMED]
    assert torch.equal(film[11], (255 * last).round().byte())
    assert set(film[0].unique().tolist()) == {0, 255}       # training images, binarised
    standard = fit(tmp_path / "b", digits, "--prior", "standard")
    assert load(standard / "model.pt").extra["film"] == {}


class Killed(BaseException):
    """Stands for a kill, but that a half-written file is removed."""


def die_in_epoch(number, out, digits, monkeypatch, *flags):
    """A run that is killed in this epoch."""
    real = train.train_epoch

    def epoch(run, *args):
        if run.epoch + 1 == number:
            raise Killed
        return real(run, *args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "train_epoch", epoch)
        train.main(words(out, digits, *flags))


class Steps:
    """Counts the moments before and after each wrapped call, and dies at moment `at`."""

    def __init__(self, at=None):
        self.seen, self.at = 0, at

    def moment(self):
        if self.seen == self.at:
            raise Killed
        self.seen += 1

    def wrap(self, real):
        def call(*args, **kwargs):
            self.moment()
            result = real(*args, **kwargs)
            self.moment()
            return result
        return call


def test_kill_at_any_step_of_a_write(whole, digits, tmp_path, monkeypatch):
    """Dies before and after fsyncs and renames of a run, at 20 places; then goes on."""
    def fit_until(at, folder):
        steps = Steps(at)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, steps.wrap(getattr(os, name)))
            fit(folder, digits)
        return steps.seen

    moments = fit_until(None, tmp_path / "count")
    assert moments > 40
    for at in random.Random(0).sample(range(moments), 20):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            fit_until(at, folder)
        for path in folder.glob("*.pt"):
            files.load(path)
        fit(folder, digits, "--resume")
        assert_same_run(whole, folder)


def test_slow_twenty_kills_at_random_moments(digits, tmp_path):
    """kill -9 from outside, --resume until the run is complete; nothing half is left behind."""
    flags = ["--epochs", 60]
    whole, often = tmp_path / "whole", tmp_path / "often"
    assert popen(whole, digits, *flags).wait() == 0
    moment, kills = random.Random(1), 0
    while kills < 20:
        process = popen(often, digits, *flags, "--resume")
        wait_for(lambda: (often / ".lock").exists(), process)
        time.sleep(moment.uniform(0, 6))
        process.kill()
        process.wait()
        kills += 1
        if (often / "model.pt").exists():
            assert_same_run(whole, often)
            shutil.rmtree(often)
    assert popen(often, digits, *flags, "--resume").wait() == 0
    assert_same_run(whole, often)
    assert not list(often.glob(".*.tmp"))


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            process.kill()
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_signal_keeps_the_run_and_says_how_to_go_on(digits, tmp_path, capsys):
    flags, out = ["--epochs", 1000, "--patience", 1000], tmp_path / "a run"
    process = popen(out, digits, *flags)
    wait_for(lambda: (out / "log.csv").exists(), process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 143 and "Traceback" not in error
    assert error.splitlines()[-1].endswith(f"--out '{out}' {' '.join(map(str, flags))} --resume")
    assert not (out / "model.pt").exists() and not list(out.glob(".*.tmp"))
    fit(out, digits, *flags[:1], len(rows(out)), "--resume", code=2)
    one_line(capsys, "epochs = 1000")
    (out / "config.json").unlink()      # of what settings last.pt is, nobody knows now
    for more, said in ((), "holds a run already"), (["--resume"], "config.json"):
        fit(out, digits, *more, code=2)
        one_line(capsys, said)


def test_ctrl_c_while_the_data_load(digits, tmp_path, monkeypatch, capsys):
    """Before the first step, too, it stops at once and says how to go on."""
    monkeypatch.setattr(datasets, "load", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    files.catch_signals()
    try:
        with pytest.raises(files.Stopped) as stop:
            train.main(words(tmp_path / "run", digits))
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_locked_is_one_line(digits, tmp_path, capsys, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(train.fcntl, "flock", none)
    fit(tmp_path / "run", digits, code=2)
    one_line(capsys, str(tmp_path / "run"), "cannot be locked (No locks available)", "--out")


def test_second_process_names_the_owner_and_leaves(digits, tmp_path, capsys):
    flags = ["--epochs", 1000, "--patience", 1000]
    owner = popen(tmp_path / "run", digits, *flags)
    wait_for(lambda: (tmp_path / "run" / "log.csv").exists(), owner)
    fit(tmp_path / "run", digits, *flags, "--resume", code=2)
    one_line(capsys, "in use by", str(owner.pid))
    owner.kill()
    owner.wait()        # a crashed owner leaves a lock file, but no lock
    fit(tmp_path / "run", digits, "--resume", code=2)
    one_line(capsys, "epochs")


def test_the_seed_does_not_choose_the_images(digits):
    """Runs of several seeds are tested on the same images; --split-seed chooses others."""
    def images(*flags):
        return train.load(train.parse_args(words("none", digits, *flags)))[0].sha256
    assert images("--seed", "1") == images("--seed", "2") != images("--split-seed", "1")


def test_test_images_do_not_enter_training(whole, digits, tmp_path, monkeypatch):
    load_data = datasets.load

    def without_test(*args):
        data = load_data(*args)
        data.test.zero_()
        return data
    monkeypatch.setattr(datasets, "load", without_test)
    assert_same_run(whole, fit(tmp_path / "run", digits))


def test_slow_load(digits, tmp_path):
    """A million binary images; K = 20,000 with S = 50,000. Memory: N D bytes of data (784 MB, and
    more while it is split), K D floats for u, its gradient, two moments, average and best, and
    blocks of fixed size. Time is N K; hence two runs."""
    block = np.random.default_rng(0).integers(0, 2, (10_000, 784), dtype=np.uint8)
    np.savez(tmp_path / "million.npz", x=np.tile(block, (100, 1)))
    flags = [*TINY, "--epochs", "1", "--warmup", "0"]
    many, large = tmp_path / "many", tmp_path / "large"
    for script in (
            ["train.py", *flags, "--dataset", str(tmp_path / "million.npz"), "--out", str(many),
             "--batch-size", "20000"],
            ["evaluate.py", str(many), "--samples", "5", "--images", "20000"],
            ["train.py", *flags, "--dataset", str(digits), "--out", str(large),
             "--pseudo-inputs", "20000"],
            ["evaluate.py", str(large), "--samples", "50000", "--images", "2"]):
        done = subprocess.run([sys.executable, *script], cwd=HERE, text=True, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert "%|" in done.stderr      # progress
    assert json.loads((large / "metrics.json").read_text())["components"] == 20_000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6_000_000     # kB


# ------------------------------------------------------------------- likelihoods, grey and colour


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A user's npz of 140 grey images of 28 x 20 in splits of its own: noise about five patterns."""
    rng = np.random.default_rng(1)
    x = 60 + 120 * (rng.random((5, 28, 20)) > 0.5)[rng.integers(0, 5, 140)]
    x = (x + rng.normal(0, 4, x.shape)).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "faces.npz"
    np.savez(path, x_train=x[:100], x_val=x[100:120], x_test=x[120:])
    return path


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
@pytest.mark.parametrize("prior", ["standard", "vamp"])
@pytest.mark.parametrize("model", models.MODELS)
def test_grey_images_train_in_every_cell(model, prior, likelihood, faces, tmp_path):
    out = fit(tmp_path / "run", faces, "--likelihood", likelihood, "--model", model, "--prior", prior,
              "--epochs", 2, "--warmup", 0)
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["likelihood"] == config["args"]["likelihood"] == likelihood
    assert config["args"]["binarize"] == "none"
    first, last = (float(row["val_elbo"]) for row in rows(out))
    assert last > first


def test_pseudo_inputs_and_bias_start_at_the_grey_images(faces):
    data = datasets.load(str(faces), binarize="none")
    args = train.settle(train.parse_args(["--likelihood", "logistic"]), 100)[0]
    run = train.start(args, models.Config(x_dim=560, components=250, likelihood="logistic"), data,
                      torch.device("cpu"))
    torch.manual_seed(0)
    wanted = data.train[torch.randperm(100).repeat(3)[:250]] / 255     # repeated: there are but 100
    u = run.model.prior.u.detach()
    assert torch.equal(u[:100], wanted[:100]) and (u - wanted).abs().max() < 0.06
    assert len(u.unique(dim=0)) == 250      # equal ones would stay equal
    spread = (data.train.double() / 255).std(0, correction=0)
    found = run.model.output.bias[560:].double().exp()
    torch.testing.assert_close(found, spread.clamp_min(math.exp(-4)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("likelihood", models.LIKELIHOODS)
def test_the_floor_is_of_the_training_images_mean_and_spread(likelihood, faces):
    data = datasets.load(str(faces), binarize="none")
    x, val = data.train.double() / 255, data.val.double() / 255
    mean, std = x.mean(0), x.std(0, correction=0)
    plain = {"bernoulli": lambda: (val * mean.log() + (1 - val) * (1 - mean).log()).sum(1),
             "logistic": lambda: models.log_logistic(val, mean, std.clamp_min(math.exp(-4)).log()),
             "gaussian": lambda: torch.distributions.Normal(mean, std.clamp_min(math.exp(-4)))
                         .log_prob(val).sum(1)}[likelihood]()
    assert train.mean_image_elbo(data, likelihood) == pytest.approx(plain.mean().item(), rel=1e-5)


@pytest.mark.parametrize("elbo, code", [(-2000.0, 0), (-3500.0, 1)])
def test_the_floor_of_a_density_lies_below_its_positive_level(elbo, code, tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).normal(0.5, 0.02, (50, 400))       # a density of e^1000
    np.save(tmp_path / "x.npy", x)
    assert train.mean_image_elbo(datasets.load(tmp_path / "x.npy", "", "none"), "gaussian") > 900
    monkeypatch.setattr(train, "validate", lambda *args: {"val_elbo": elbo})
    fit(tmp_path / "run", tmp_path / "x.npy", "--likelihood", "gaussian", code=code)
    assert (tmp_path / "run" / "model.pt").exists() == (not code)
    if code:
        one_line(capsys, "-3500.0 after epoch 1, far below", "--lr")


@pytest.mark.parametrize("data, flags, said", [
    ("grey", ["--binarize", "none"], ["grey", "--likelihood logistic", "gaussian"]),
    ("grey", ["--likelihood", "logistic", "--binarize", "dynamic"], ["--binarize none"]),
    ("grey", ["--likelihood", "gaussian", "--binarize", "static"], ["--binarize none"]),
    ("black", ["--likelihood", "logistic"], ["black and white", "bernoulli"]),
    ("black", ["--likelihood", "gaussian"], ["black and white", "bernoulli"]),
    ("floats", ["--likelihood", "logistic"], ["256 levels", "gaussian"]),
    ("colour", [], ["colour", "--likelihood logistic"])])
def test_contradictions_are_one_line_and_nothing_is_written(data, flags, said, tmp_path, capsys):
    x = np.random.default_rng(0).random((20, 4, 4, 3))
    x = {"grey": np.uint8(255 * x[..., 0]), "black": x[..., 0] > 0.5, "floats": x[..., 0],
         "colour": np.uint8(255 * x)}[data]
    np.save(tmp_path / "x.npy", x)
    fit(tmp_path / "run", tmp_path / "x.npy", *flags, code=2)
    one_line(capsys, *said)
    assert not (tmp_path / "run").exists()


def test_bernoulli_of_grey_pixels_is_allowed_and_marked(digits, tmp_path, capsys):
    flags = ["--epochs", 1, "--binarize", "none"]
    out = fit(tmp_path / "grey", digits, *flags, "--likelihood", "bernoulli")
    assert json.loads((out / "config.json").read_text())["args"]["binarize"] == "none"
    assert "no log-likelihood" in capsys.readouterr().err
    np.save(tmp_path / "black.npy", np.random.default_rng(0).random((50, 64)) > 0.5)
    out = fit(tmp_path / "black", tmp_path / "black.npy", *flags)       # needs no choice and no note
    config = json.loads((out / "config.json").read_text())
    assert config["args"]["likelihood"] == "bernoulli" and "note" not in capsys.readouterr().err


def test_a_run_of_before_there_were_likelihoods_goes_on(whole, digits, tmp_path):
    shutil.copytree(whole, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["args"]["likelihood"], config["model"]["likelihood"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    fit(tmp_path / "old", digits, "--resume")


# -------------------------------------------------------------------------------------- trouble


def test_full_disk_keeps_the_last_checkpoint(digits, tmp_path, monkeypatch):
    die_in_epoch(3, tmp_path / "run", digits, monkeypatch)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    process = popen(tmp_path / "run", digits, "--resume", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)))
    error = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in error
    assert "File too large" in [x for x in error.splitlines() if "error: " in x][-1]
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_folder_deleted_under_the_run(digits, tmp_path, capsys, monkeypatch):
    real = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: (
        shutil.rmtree(tmp_path / "run", ignore_errors=True), real(*args))[1])
    fit(tmp_path / "run", digits, code=2)
    one_line(capsys, "No such file or directory")
    assert not (tmp_path / "run").exists()


def test_divergence_keeps_the_best_weights(digits, tmp_path, capsys, monkeypatch):
    real, seen = models.VAE.terms, []

    def terms(self, *args, **kwargs):
        parts = real(self, *args, **kwargs)
        seen.append(len(seen))      # an epoch has 5 training steps and 1 of validation
        return parts | {"recon": parts["recon"] * (float("nan") if len(seen) > 14 else 1.0)}
    monkeypatch.setattr(models.VAE, "terms", terms)
    fit(tmp_path / "run", digits, code=1)
    assert "epoch 2" in one_line(capsys, "not finite in epoch 3, step 3", "best.pt", "--lr")
    assert load(tmp_path / "run" / "best.pt").extra["best_epoch"] == 2


@pytest.mark.parametrize("flags, said", [
    (["--prior", "vampire"], "vampire"), (["--model", "vqvae"], "vqvae"), (["--lr", "nan"], "nan"),
    (["--pseudo-inputs", "0"], "0 is not from 1"), (["--epochs", "many"], "many"),
    (["--lr", "-1"], "-1"), (["--likelihood", "poisson"], "poisson"),
    (["--resume"], "--out"), (["--recipe", "fast"], "fast")])
def test_bad_flags(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and said in one_line(capsys, "--help")


def test_every_flag_has_help_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    options = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(options) > 20
    for option in options:
        name, _, said = option.partition(" ")
        assert len(said) > 15, option
        if name not in ("--learned-weights", "--full-gradient", "--strict-data", "--resume"):
            assert "default" in said, option


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_absent_gpu(digits, tmp_path, capsys):
    fit(tmp_path / "run", digits, "--device", "cuda", code=2)
    one_line(capsys, "cuda", "cpu")
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run(whole, digits, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    fit(tmp_path / "run", digits, code=2)
    one_line(capsys, "--resume", "--out")
    fit(tmp_path / "run", digits, "--resume", "--lr", 0.5, code=2)
    one_line(capsys, "lr", "0.5")
    assert_same_run(whole, tmp_path / "run")


def test_an_array_may_move_but_not_change(digits, tmp_path, capsys, monkeypatch):
    die_in_epoch(3, tmp_path / "run", digits, monkeypatch)
    with np.load(digits) as file:
        x, y = file["x"].copy(), file["y"]
    np.savez(tmp_path / "moved.npz", x=x, y=y)
    x[-1, -1, -1] ^= 1
    np.savez(tmp_path / "changed.npz", x=x, y=y)
    fit(tmp_path / "run", tmp_path / "changed.npz", "--resume", code=2)
    one_line(capsys, "other images")
    fit(tmp_path / "run", tmp_path / "moved.npz", "--resume")


def test_a_damaged_config_is_refused(digits, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"args": [], "data": [], "model": [], "recipe": {}}')
    fit(tmp_path / "run", digits, "--resume", "--precision", "auto", code=2)
    one_line(capsys, "config.json")


def test_a_sealed_file_that_does_not_fit_the_run_is_refused(digits, tmp_path, monkeypatch, capsys):
    die_in_epoch(3, tmp_path / "run", digits, monkeypatch)
    path = tmp_path / "run" / "last.pt"
    good = files.load(path)
    for key, value in (("history", []), ("epoch", 9), ("optimizer", good["optimizer"][1:]),
                       ("model", {}), ("best", {"x": torch.zeros(1)}), ("average", 3)):
        files.save(path, good | {key: value})
        fit(tmp_path / "run", digits, "--resume", code=2)
        one_line(capsys, "last.pt", "delete it")
