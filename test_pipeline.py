"""The scripts: whole runs on tiny data, resuming after every kind of accident, errors, records.

    python -m pytest -k "not slow"      # `make test`; without -k: `make test-all`
"""
import csv
import json
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
import evaluate
import models
import plot
import train

HERE = Path(__file__).parent
TINY = ["--hidden", "16", "--z-dim", "4", "--pseudo-inputs", "6", "--batch-size", "20",
        "--epochs", "4", "--warmup", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A user's npz: 120 images of 8 x 8, ten kinds of blurred bars, with labels."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 120)
    x = np.clip(np.eye(8)[y % 8] * 0.8 + rng.random((120, 8)) * 0.2, 0, 1)
    x = (x[:, :, None] * np.ones(8) * 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=x, y=y)
    return path


def fit(out, digits, *more, code=0):
    """Trains in this process; the exit code is checked."""
    words = [*TINY, "--dataset", str(digits), "--out", str(out), *map(str, more)]
    assert train.main(words) == code
    return Path(out)


def popen(out, digits, *more, **kwargs):
    words = [sys.executable, str(HERE / "train.py"), *TINY, "--dataset", str(digits),
             "--out", str(out), *map(str, more)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=out.parent,
                            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                            **kwargs)


def rows(folder):
    """log.csv without its seconds."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    """Weights and log equal, bit for bit; seconds aside."""
    assert rows(a) == rows(b)
    one, two = models.load(a / "model.pt"), models.load(b / "model.pt")
    for (name, p), (_, q) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    assert one.extra["best_epoch"] == two.extra["best_epoch"]


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


# ------------------------------------------------------------------------------ the whole chain


@pytest.fixture(scope="session")
def made(digits, tmp_path_factory):
    """A results folder made by the Makefile's rules, -j2, all three models."""
    folder = tmp_path_factory.mktemp("made") / "results" / "run"
    make(folder, digits)
    return folder


def make_words(folder, digits, *more):
    flags = " ".join(TINY).replace("--epochs 4 ", "")
    return ["make", "-C", HERE, "-j2", "run", f"RUN={folder}", f"DATASET={digits}", "EPOCHS=4",
            "SAMPLES=20", f"PYTHON={sys.executable}", f"TRAIN_FLAGS={flags}", *more]


def make_env():
    """The environment without what an outer make left there."""
    ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "RUN", "MODELS", "JOBS", "EVAL_FLAGS", "STRICT"}
    return {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1"}


def make(folder, digits):
    return subprocess.run(make_words(folder, digits, "MODELS=vae vamp hvamp"), check=True,
                          capture_output=True, text=True, env=make_env())


def test_make_trains_evaluates_and_draws_all(made):
    for name, layers in (("vae", {"z"}), ("vamp", {"z"}), ("hvamp", {"z1", "z2"})):
        found = {p.name for p in (made / name).iterdir()}
        assert {"config.json", "log.csv", "last.pt", "model.pt", "metrics.json", "arrays.npz",
                "reconstructions.png", "samples.png", "latent.png", "curves.png",
                "likelihood.png", "kl.png"} <= found
        assert ("pseudo_inputs.png" in found) == (name != "vae")
        m = json.loads((made / name / "metrics.json").read_text())
        assert m["active_units"].keys() == layers
        assert m["elbo"]["mean"] == pytest.approx(m["recon"]["mean"] - m["kl"]["mean"])
        assert m["nll"]["mean"] <= -m["elbo"]["mean"]
        assert {"samples", "seed", "images", "seconds", "device", "versions", "dataset"} <= m.keys()
        assert len(rows(made / name)) == 4
    assert {p.name for p in made.glob("*.png")} >= {
        "comparison.png", "tradeoff.png", "dynamics.png", "active_units.png", "latents.png"}
    table = (made / "comparison.md").read_text()
    assert "| Model | Recon | KL | ELBO | NLL |" in table
    assert (made.parent / "latest").resolve() == made
    assert not list(made.rglob("*.tmp"))


def test_models_made_side_by_side_are_as_if_alone(made, whole, tmp_path):
    """make -j2, in other processes: the same weights, and the same metrics in whatever order."""
    assert_same_run(made / "vamp", whole)
    shutil.copytree(whole, tmp_path / "run")
    assert evaluated(tmp_path / "run") == 0
    one, two = (json.loads((folder / "metrics.json").read_text())
                for folder in (made / "vamp", tmp_path / "run"))
    for name in ("elbo", "recon", "kl", "nll", "mutual_information", "components_used"):
        assert one[name] == two[name]


def test_make_makes_only_what_is_missing(made, digits):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.suffix in (".pt", ".json")}
    (made / "vamp" / "metrics.json").unlink()
    out = make(made, digits).stdout
    assert out.count("train.py") == 0 and out.count("evaluate.py") == 1
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p.parent.name for p in before if before[p] != after[p]} == {"vamp"}


@pytest.mark.parametrize("script", (train.parse_args, evaluate.main))
def test_every_flag_has_help_with_its_default(script, capsys):
    with pytest.raises(SystemExit):
        script(["--help"])
    text = capsys.readouterr().out
    text = re.sub(r"\s+", " ", text[text.index("-h, --help"):])
    options = re.split(r" (?=--[a-z])", text)[2:]
    assert len(options) > 3
    for option in options:
        name, _, words = option.partition(" ")
        assert len(words) > 15, option
        if not any(flag in name for flag in ("learned", "strict", "resume", "out", "images", "dir")):
            assert "default" in words, option


# ------------------------------------------------------------------------------------ same bits


@pytest.mark.parametrize("model", ("vae", "hvae"))
@pytest.mark.parametrize("prior", ("standard", "mog", "vamp"))
def test_resumed_run_equals_an_uninterrupted_one(model, prior, digits, tmp_path, monkeypatch):
    flags = ["--model", model, "--prior", prior, "--learned-weights", "--patience", 1]
    fit(tmp_path / "a", digits, *flags)
    for last in (1, 2, 3):      # dies at the start of the epoch after `last`
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_epoch", die_in_epoch(last + 1, train.train_epoch))
            with pytest.raises(Killed):
                train.main([*TINY, "--dataset", str(digits), "--out", str(tmp_path / "b"),
                            "--resume", *map(str, flags)])
    fit(tmp_path / "b", digits, *flags, "--resume")
    assert_same_run(tmp_path / "a", tmp_path / "b")


class Killed(BaseException):
    """Stands for a kill: no handler of ours catches it."""


def die_in_epoch(number, real):
    def epoch(n, *args):
        if n == number:
            raise Killed
        return real(n, *args)
    return epoch


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
    def fit_until(at, folder, *more):
        steps = Steps(at)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "chmod"):
                patch.setattr(os, name, steps.wrap(getattr(os, name)))
            fit(folder, digits, *more)
        return steps.seen

    moments = fit_until(None, tmp_path / "count")
    assert moments > 40
    for at in random.Random(0).sample(range(moments), 20):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            fit_until(at, folder)
        for path in folder.glob("*.pt"):
            models.load_file(path)
        fit(folder, digits, "--resume")
        assert_same_run(whole, folder)


def test_slow_twenty_kills_at_random_moments(digits, tmp_path):
    """kill -9 from outside; make-like restarting with --resume until the run is complete."""
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


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signal_keeps_the_run_and_says_how_to_go_on(number, digits, tmp_path):
    flags = ["--epochs", 1000, "--patience", 1000]
    process = popen(tmp_path / "run", digits, *flags)
    wait_for(lambda: (tmp_path / "run" / "log.csv").exists(), process)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 128 + number
    assert f"{tmp_path / 'run'} --resume" in error.replace("--epochs 1000 --patience 1000 ", "")
    assert "Traceback" not in error
    done = models.load_file(tmp_path / "run" / "last.pt")["epoch"]
    assert 1 <= done == len(rows(tmp_path / "run")) < 1000
    assert not (tmp_path / "run" / "model.pt").exists()
    assert not list((tmp_path / "run").glob("*.tmp"))


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


def test_same_seed_same_run_and_another_seed_another(whole, digits, tmp_path):
    assert_same_run(whole, fit(tmp_path / "again", digits))
    other = fit(tmp_path / "other", digits, "--seed", 1)
    assert rows(other)[0]["train_elbo"] != rows(whole)[0]["train_elbo"]


def test_test_images_do_not_enter_training(whole, digits, tmp_path, monkeypatch):
    load = datasets.load

    def without_test(*args):
        data = load(*args)
        data.test.zero_()
        return data
    monkeypatch.setattr(datasets, "load", without_test)
    assert_same_run(whole, fit(tmp_path / "run", digits))


def test_slow_make_interrupted_leaves_no_half_target(digits, tmp_path):
    """Ctrl-C goes to make and all it runs; the same command goes on and ends with the same run."""
    def start(folder):
        return subprocess.Popen(make_words(folder, digits, "MODELS=vamp", "EPOCHS=40"), text=True,
                                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                env=make_env(), start_new_session=True)
    folder = tmp_path / "often"
    process = start(folder)
    wait_for(lambda: (folder / "vamp" / "log.csv").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert "--resume" in process.communicate()[1]
    assert process.returncode != 0
    assert not (folder / "vamp" / "model.pt").exists() and (folder / "vamp" / "last.pt").exists()
    for one in (folder, tmp_path / "whole"):
        assert start(one).wait() == 0
    assert_same_run(folder / "vamp", tmp_path / "whole" / "vamp")
    one, two = (json.loads((f / "vamp" / "metrics.json").read_text())
                for f in (folder, tmp_path / "whole"))
    for name in ("elbo", "recon", "kl", "nll", "active_units", "components_used"):
        assert one[name] == two[name]


def test_slow_load(digits, tmp_path):
    """A million binary images; K = 20,000 with S = 50,000. Memory: N D bytes of data (784 MB, and
    once more while it is split), K D floats for u, its gradient, two moments, average and best, and
    blocks of fixed size. Time is N K; hence two runs."""
    block = np.random.default_rng(0).integers(0, 2, (10_000, 784), dtype=np.uint8)
    np.savez(tmp_path / "million.npz", x=np.tile(block, (100, 1)))
    flags = [*TINY, "--epochs", "1", "--warmup", "0"]
    many, large = tmp_path / "many", tmp_path / "large"
    for words in (
            ["train.py", *flags, "--dataset", str(tmp_path / "million.npz"), "--out", str(many),
             "--batch-size", "20000"],
            ["evaluate.py", str(many), "--samples", "5", "--images", "20000"],
            ["train.py", *flags, "--dataset", str(digits), "--out", str(large),
             "--pseudo-inputs", "20000"],
            ["evaluate.py", str(large), "--samples", "50000", "--images", "2"]):
        done = subprocess.run([sys.executable, *words], cwd=HERE, text=True, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert "%|" in done.stderr      # progress
    assert json.loads((large / "metrics.json").read_text())["components"] == 20_000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4_000_000     # kB


# -------------------------------------------------------------------------------------- trouble


def test_full_disk_keeps_the_last_checkpoint(digits, tmp_path, capsys, monkeypatch):
    fit_epochs = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", die_in_epoch(3, fit_epochs))
    with pytest.raises(Killed):
        fit(tmp_path / "run", digits)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    process = popen(tmp_path / "run", digits, "--resume", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)))
    error = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in error
    assert "File too large" in [x for x in error.splitlines() if "error: " in x][-1]
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_folder_deleted_under_the_run(digits, tmp_path, capsys, monkeypatch):
    real = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: (
        shutil.rmtree(tmp_path / "run", ignore_errors=True), real(*args))[1])
    fit(tmp_path / "run", digits, code=2)
    one_line(capsys, "last.pt", "No such file or directory")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(digits, tmp_path, capsys):
    tmp_path.chmod(0o500)
    fit(tmp_path / "run", digits, code=2)
    tmp_path.chmod(0o700)
    one_line(capsys, "Permission denied")


def test_run_folder_below_a_file(digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fit(tmp_path / "file" / "run", digits, code=2)
    one_line(capsys, "Not a directory")


@pytest.mark.parametrize("prior", models.PRIORS)
def test_weight_decay_takes_weight_matrices_alone(digits, prior):
    args = train.parse_args([*TINY, "--prior", prior, "--weight-decay", "0.3"])
    data, device = datasets.load(str(digits)), torch.device("cpu")
    config = models.Config("vae", prior, 64, 16, 4, 6, True)
    model, _, optimizer, _ = train.start(args, config, data, device)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[p] == (0.3 if name.endswith(".weight") else 0), name


def test_training_takes_path_gradients_unless_told(digits, tmp_path, monkeypatch):
    seen, terms = [], models.VAE.terms
    monkeypatch.setattr(models.VAE, "terms", lambda *args, path_gradient=None, **more: (
        seen.append(path_gradient), terms(*args, path_gradient=bool(path_gradient), **more))[1])
    fit(tmp_path / "path", digits, "--epochs", 1)
    assert True in seen and False not in seen       # None: validation
    seen.clear()
    fit(tmp_path / "full", digits, "--epochs", 1, "--full-gradient")
    assert False in seen and True not in seen


def test_learning_rate_of_one_stops_with_advice(digits, tmp_path, capsys):
    fit(tmp_path / "run", digits, "--lr", 1e4, "--warmup", 0, "--clip", 1e9, "--epochs", 50, code=1)
    one_line(capsys, "epoch", "--lr")
    assert not (tmp_path / "run" / "model.pt").exists()


def test_divergence_keeps_the_best_weights(digits, tmp_path, capsys, monkeypatch):
    real = models.VAE.terms
    seen = []

    def terms(self, *args, **kwargs):
        parts = real(self, *args, **kwargs)
        seen.append(len(seen))      # an epoch has 5 training steps and 1 of validation
        return parts | {"recon": parts["recon"] * (float("nan") if len(seen) > 14 else 1.0)}
    monkeypatch.setattr(models.VAE, "terms", terms)
    fit(tmp_path / "run", digits, code=1)
    line = one_line(capsys, "not finite in epoch 3, step 3", "best.pt", "--lr")
    assert "epoch 2" in line
    assert models.load(tmp_path / "run" / "best.pt").extra["best_epoch"] == 2


@pytest.mark.parametrize("words, said", [
    (["--prior", "vampire"], "vampire"),
    (["--model", "vqvae"], "vqvae"),
    (["--pseudo-inputs", "0"], "0 is not from 1"),
    (["--epochs", "many"], "many"),
    (["--lr", "nan"], "nan"),
    (["--lr", "-1"], "-1"),
    (["--resume"], "--out"),
    (["--bogus"], "--bogus"),
])
def test_bad_flags(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and said in error


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


def evaluated(folder, *more):
    words = [str(folder), "--samples", "20", "--device", "cpu", *map(str, more)]
    return evaluate.main(words)


@pytest.mark.parametrize("damage", ("cut", "flip", "empty", "text", "pickle", "gone"))
def test_evaluate_refuses_what_is_no_checkpoint(damage, whole, tmp_path, capsys):
    data = bytearray((whole / "model.pt").read_bytes())
    data = {"cut": data[:-1], "empty": b"", "text": b"weights\n" * 99, "pickle": b"\x80\x04N.",
            "flip": data[:999] + bytes([data[999] ^ 1]) + data[1000:]}.get(damage)
    if data is not None:
        (tmp_path / "model.pt").write_bytes(data)
    assert evaluated(tmp_path) == 2
    one_line(capsys, "model.pt")
    assert {p.name for p in tmp_path.iterdir()} <= {"model.pt"}


@pytest.mark.parametrize("name", ("last.pt", "config.json"))
def test_fuzzed_run_folder_is_refused_or_unchanged(name, digits, tmp_path, monkeypatch, capsys):
    """Flips a byte or cuts, many times: an error in one line, or the same run as before."""
    monkeypatch.setattr(train, "train_epoch", die_in_epoch(4, train.train_epoch))
    with pytest.raises(Killed):
        fit(tmp_path / "run", digits)
    path = tmp_path / "run" / name
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(60):
        place = rng.randrange(len(good))
        bad = bytearray(good[:place] if trial % 3 == 0 else good)
        if trial % 3:
            bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            fit(tmp_path / "run", digits, "--resume", code=2)
            one_line(capsys)
            refused += 1
        except Killed:      # accepted: then it was another spelling of the same settings
            assert name == "config.json"
        assert not (tmp_path / "run" / "model.pt").exists()
    assert refused == 60 if name == "last.pt" else refused > 40


def test_log_csv_of_a_damaged_history(digits, tmp_path, monkeypatch, capsys):
    """A sealed file with a foreign history or optimiser does not fit the run."""
    monkeypatch.setattr(train, "train_epoch", die_in_epoch(3, train.train_epoch))
    with pytest.raises(Killed):
        fit(tmp_path / "run", digits)
    path = tmp_path / "run" / "last.pt"
    good = models.load_file(path)
    for key, value in (("history", []), ("epoch", 9), ("optimizer", good["optimizer"][1:]),
                       ("model", {}), ("best", {"x": torch.zeros(1)}), ("average", 3)):
        models.save_file(path, good | {key: value})
        fit(tmp_path / "run", digits, "--resume", code=2)
        one_line(capsys, "last.pt", "delete it")


# ----------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="session")
def hwhole(digits, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("hwhole") / "run", digits, "--model", "hvae")


def test_likelihood_does_not_depend_on_blocks(whole, hwhole, digits, monkeypatch):
    for folder in (whole, hwhole):
        model, data, _ = evaluate.load_run(folder, None, "cpu")

        def likelihood(x, seed=3):
            return evaluate.log_likelihood(model, x, 64, torch.Generator().manual_seed(seed))
        first = likelihood(data.test)
        monkeypatch.setattr(evaluate, "INFER", 5)
        torch.testing.assert_close(likelihood(data.test), first, rtol=0, atol=1e-4)
        assert first.shape == (len(data.test),) and first.dtype == torch.float64
        assert not torch.equal(likelihood(data.test, 4), first)


def test_likelihood_does_not_depend_on_threads(hwhole, monkeypatch):
    model, data, _ = evaluate.load_run(hwhole, None, "cpu")
    before, found, seen, terms = torch.get_num_threads(), [], set(), model.terms

    def watched(*args):
        seen.add((torch.is_grad_enabled(), torch.get_num_threads()))
        return terms(*args)
    monkeypatch.setattr(model, "terms", watched)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(evaluate.log_likelihood(model, data.test, 64, torch.Generator().manual_seed(0)))
            with pytest.raises(RuntimeError):       # also after a failure
                evaluate.log_likelihood(model, data.test[:, 1:], 64)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found) and seen == {(False, 1)}


def test_likelihood_stops_without_waiting_for_the_block(whole, monkeypatch):
    model, data, _ = evaluate.load_run(whole, None, "cpu")
    terms, done = evaluate._image_terms, []

    def counted(*args):
        done.append(1)
        return terms(*args)

    class Bar(evaluate.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "_image_terms", counted)
    monkeypatch.setattr(evaluate, "tqdm", Bar)
    x = data.test[:1].expand(evaluate.INFER, -1)
    with pytest.raises(KeyboardInterrupt):
        evaluate.log_likelihood(model, x, 2000)
    assert 0 < len(done) < len(x)


def test_likelihood_equals_the_plain_estimate(whole, digits):
    """As the field writes it: all samples at once, weights by hand, float64."""
    model, data, _ = evaluate.load_run(whole, None, "cpu")
    x = datasets.pixels(data.test)
    ours = evaluate.log_likelihood(model, data.test, 3000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        mu, logvar = (t.double() for t in model.encode(x))
        z = mu + (logvar / 2).exp() * torch.randn(3000, *mu.shape, dtype=torch.float64)
        logits = model.decode(z.float()).double()
        log_px = torch.distributions.Bernoulli(logits=logits).log_prob(x.double()).sum(-1)
        mu_k, logvar_k = (t.double() for t in model.encode(model.prior.u))
        normal = torch.distributions.Normal
        log_pz = normal(mu_k, (logvar_k / 2).exp()).log_prob(z[..., None, :]).sum(-1)
        log_pz = log_pz.logsumexp(-1) - np.log(len(mu_k))
        log_qz = normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)
        log_w = log_px + log_pz - log_qz
        plain = log_w.logsumexp(0) - np.log(3000)
        spread = (log_w - plain).exp().std(0) / np.sqrt(3000)       # of either estimate
    assert ((ours - plain).abs() < 6 * spread * 2**0.5 + 1e-4).all()


def test_metrics_are_means_over_images(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert evaluated(tmp_path / "run") == 0
    m = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with np.load(tmp_path / "run" / "arrays.npz", allow_pickle=False) as file:
        a = {name: file[name] for name in file.files}
    assert m["nll"]["mean"] == pytest.approx(-a["log_px"].mean(), rel=1e-5)
    assert m["nll"]["se"] == pytest.approx(a["log_px"].std(ddof=1) / len(a["log_px"])**0.5, rel=1e-4)
    both = m["mutual_information"]["mean"] + m["marginal_kl"]["mean"]
    assert both == pytest.approx(m["kl"]["mean"], abs=4 * m["kl"]["se"] + 0.5)
    assert m["mutual_information"]["mean"] <= np.log(m["images"]) + 1e-6
    assert 1 <= m["components_used"] <= m["components"] == 6
    assert a["component_use"].sum() == pytest.approx(1, abs=1e-5)
    before = m
    assert evaluated(tmp_path / "run") == 0
    m = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {k: v for k, v in m.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"}


def test_active_units_and_components_in_a_known_case():
    """A posterior that varies in one unit of four, and a prior of two equal, distant components."""
    model = models.build(models.Config(x_dim=9, hidden=4, z_dim=4, components=2))

    def encoder(x):
        mu = torch.zeros(len(x), 4)
        mu[:, 2] = 10 * x[:, 0]
        return mu, torch.full((len(x), 4), -2.0)
    model.encode = encoder
    model.prior = models.VampPrior(encoder, torch.eye(9)[:2])
    x = (torch.arange(40) % 2)[:, None].repeat(1, 9).mul(255).to(torch.uint8)
    m, a = evaluate.latent_statistics(model, x, torch.Generator().manual_seed(0))
    assert m["active_units"] == {"z": 1} and m["latent_dims"] == {"z": 4}
    assert m["components_used"] == pytest.approx(2, abs=1e-3)
    assert m["mutual_information"]["mean"] == pytest.approx(np.log(2), abs=0.01)
    assert m["marginal_kl"]["mean"] == pytest.approx(0, abs=0.01)
    assert a["kl_per_dim_z"].shape == (4,)


# --------------------------------------------------------------------------- README and Makefile


def test_readme_example_trains_a_foreign_vae():
    example = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    assert len(example.splitlines()) <= 20
    torch.manual_seed(0)
    names = {}
    exec(example.replace("range(100)", "range(1)"), names)
    before = names["elbo"].mean().item()
    torch.manual_seed(0)
    exec(example, names)
    assert names["elbo"].mean().item() > before + 20
    assert names["samples"].shape == (16, 784)
    u = names["prior"].u
    assert 0 <= u.min() and u.max() <= 1 and ((u > 0) & (u < 1)).any()     # they were learned


def test_readme_numbers_are_those_of_the_records():
    text = (HERE / "README.md").read_text()
    blocks = plot.readme_blocks(HERE / "assets")
    assert blocks.keys() <= {"results", "paper", "speed", "recipe"}
    for name in ("results", "paper", "speed", "recipe"):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        body = text.partition(begin)[2].partition(end)[0].strip()
        assert body == blocks.get(name, "").strip(), f"make readme renews the block {name}"
    for picture in re.findall(r"\]\((assets/[^)]+)\)", text):
        assert (HERE / picture).exists(), picture


def test_readme_claims_of_the_long_runs():
    found = {p.name: p for p in (HERE / "assets/paper").iterdir()}
    metrics = {name: json.loads((p / "metrics.json").read_text()) for name, p in found.items()}
    assert found.keys() == {"vae", "vamp", "hvae", "hvamp"}
    for name, m in metrics.items():
        below = plot.PAPER[m["model"], m["prior"], "mnist", "dynamic"] - m["nll"]["mean"]
        assert below > m["nll"]["se"], name
        assert (m["samples"], m["images"]) == (5000, 10_000)
    assert metrics["vamp"]["train_seconds"] < 30 * 60


@pytest.mark.parametrize("target, folder", [("run", "runs"), ("paper", "paper")])
def test_recorded_runs_are_those_that_make_makes(target, folder):
    plan = subprocess.run(["make", "-n", "-C", HERE, target, "RUN=never", "PYTHON=python3"],
                          env={"PATH": os.environ["PATH"]},      # without what a make above exports
                          check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
    commands = re.findall(r"train\.py (.*)", plan)
    for command in commands:
        words = [w for w in command.replace('"', "").split() if w != "$flags"]     # of mnist5k alone
        args = vars(train.parse_args(words))
        name = Path(args["out"]).name
        recorded = json.loads((HERE / "assets" / folder / name / "config.json").read_text())["args"]
        free = (*train.WHERE, "dataset")
        assert {k: v for k, v in args.items() if k not in free} == {
            k: v for k, v in recorded.items() if k not in free}, name
    assert len(commands) == len(list((HERE / "assets" / folder).iterdir()))


def test_make_help_names_every_target():
    text = subprocess.run(["make", "-C", HERE, "help"], check=True, capture_output=True,
                          text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)", (HERE / "Makefile").read_text(), re.M)[1].split()
    for target in [*phony[:-1], "vae", "vamp", "hvae", "hvamp"]:
        assert re.search(rf"\b{target}\b", text) or target == "run", target


def test_make_refuses_an_unknown_model():
    done = subprocess.run(["make", "-C", HERE, "all", "MODELS=vqvae"], capture_output=True, text=True)
    assert done.returncode == 2 and "vqvae" in done.stderr
