"""Several processes: the same mathematics, the same numbers, and what happens when one of them dies.

    pytest test_parallel.py -k "not slow"

torchrun starts this file, too: `measure` and `die` at its end are what the processes then do.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import data as datasets
import evaluate
import files
import models
import parallel
import train
from test_evaluate import evaluated
from test_train import TINY, assert_same_run, fit, load, rows, words      # noqa: F401

HERE = Path(__file__).parent
# model, prior, K, precision, images of the last of two batches; of one image a process has none
CELLS = [*[(model, prior, 7, "float32", 11) for model in models.MODELS for prior in models.PRIORS],
         ("vae", "vamp", 7, "float32", 1), ("hvae", "vamp", 1, "float32", 11),
         ("vae", "vamp", 7, "bfloat16", 11)]


def torchrun(*words, script="train.py", count=2, flags=(), code=0):
    """What processes under torchrun did and printed; the exit code is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost",
         f"--nproc-per-node={count}",
         *flags, HERE / script, *map(str, words)], capture_output=True, text=True, cwd=HERE,
        env={k: v for k, v in os.environ.items() if k != "ROWS"} | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    # torchrun prints a traceback, but of itself
    assert not re.search(rf'File "{re.escape(str(HERE))}/\w+\.py"', done.stderr)
    done.stdout = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    return done


@contextlib.contextmanager
def one_thread():
    """As torchrun gives each process: sums in another order have other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def own_errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """A user's npz of 2,600 grey images of 6 x 6: 260 test images make three blocks."""
    x = np.random.default_rng(0).integers(0, 256, (2600, 6, 6), dtype=np.uint8)
    path = tmp_path_factory.mktemp("many") / "many.npz"
    np.savez(path, x=x // 255 * 255 + x // 2)
    return path


FEW = ["--epochs", "3", "--batch-size", "300", "--warmup", "1"]


@pytest.fixture(scope="session")
def both(many, tmp_path_factory):
    """An unbroken run of two processes, and what they printed."""
    out = tmp_path_factory.mktemp("both") / "run"
    return out, torchrun(*words(out, many, *FEW))


# ------------------------------------------------------------------------------ the mathematics


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """What `measure` finds of one process and of two."""
    path = tmp_path_factory.mktemp("measured") / "found.pt"
    torchrun("measure", path, script="test_parallel.py")
    with one_thread():
        return ([step(*cell) for cell in CELLS], validation()), torch.load(path)


@pytest.mark.parametrize("i", range(len(CELLS)), ids=lambda i: "-".join(map(str, CELLS[i])))
def test_two_processes_give_loss_and_gradients_of_one(measured, i):
    (one, _), two = measured
    tolerance = 1e-5 if CELLS[i][3] == "float32" else 2e-2
    assert one[i]["row"] == pytest.approx(two["steps"][i]["row"], rel=tolerance)
    for a, b in zip(one[i]["gradients"], two["steps"][i]["gradients"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * a.abs().max().item() + 1e-12)
    assert any(g.abs().max() > 0 for g in one[i]["gradients"])


def test_each_process_encodes_its_share_of_the_pseudo_inputs(measured):
    seen = [found["encoded"] for found in measured[1]["steps"]]
    assert seen[CELLS.index(("vae", "vamp", 7, "float32", 11))] == [[4, 4], [3, 3]]
    assert seen[CELLS.index(("hvae", "vamp", 1, "float32", 11))] == [[1, 1], [0, 0]]


def test_validation_is_shared_out_and_does_not_depend_on_it(measured):
    (_, (row, batches)), two = measured
    assert batches == [1000, 1000, 500] and two["validation"][1] == [[1000, 500], [1000]]
    assert row == pytest.approx(two["validation"][0], rel=1e-12)
    assert len({*two["first noise of a batch"], *two["noise"]}) == 3 + 2 * 2    # none twice


def test_the_likelihood_is_shared_out_to_the_same_bits(measured):
    with one_thread():
        one = likelihood()
    two = measured[1]["likelihood"]
    assert torch.equal(one[0], two[0]) and one[1] == [250] and two[1] == [150, 100]


def test_all_processes_see_that_one_diverges(measured):
    assert measured[1]["diverged"] == ["the loss or its gradient is not finite in epoch 1, step 1"] * 2


def test_a_fallback_to_other_data_is_that_of_all(measured):
    assert measured[1]["fallback"] == [[("mnist", False)], [("mnist5k", True)]]
    assert measured[1]["other"] == ["process 1: mnist5k holds other images here than at process 0", "2"]


def test_one_process_has_all_and_meets_nobody(both, many, tmp_path):
    fit(tmp_path / "run", many, *FEW)
    assert not torch.distributed.is_initialized() and parallel.size() == 1
    assert parallel.share(range(5)) == range(5) and parallel.gather(3) == [3]
    a, b = ([float(row["val_elbo"]) for row in rows(out)] for out in (tmp_path / "run", both[0]))
    assert a == pytest.approx(b, rel=0.02) and a != b       # other noise, the same training


# ---------------------------------------------------------------------------------- whole scripts


def test_the_first_process_alone_prints(both):
    out, done = both
    assert len(done.stdout) == 1 and "trained 3 epochs" in done.stdout[0]
    assert not own_errors(done) and len(rows(out)) == 3
    assert json.loads((out / "config.json").read_text())["args"]["processes"] == 2


def test_evaluation_by_two_processes_writes_the_same_numbers(both, tmp_path):
    found = []
    for count in (1, 2):
        shutil.copytree(both[0], out := tmp_path / str(count))
        if count == 2:
            done = torchrun(out, "--samples", 20, "--device", "cpu", script="evaluate.py")
            assert len(done.stdout) == 1 and "evaluated on" in done.stdout[0]
        else:
            with one_thread():
                evaluated(out)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics.pop("processes") == count and metrics["images"] == 260
        assert metrics.pop("seconds") and metrics.pop("date")
        with np.load(out / "arrays.npz") as arrays:
            found.append((metrics, {name: arrays[name].tobytes() for name in arrays.files}))
    assert found[0] == found[1]


def test_a_killed_process_ends_all_and_the_run_goes_on(both, many, tmp_path, capsys):
    out = tmp_path / "run"
    torchrun("die", *words(out, many, *FEW), script="test_parallel.py", code=1)
    assert files.load(out / "last.pt")["epoch"] == 1 and not (out / "model.pt").exists()
    shutil.copytree(out, tmp_path / "alone")
    torchrun(*words(out, many, *FEW), "--resume")
    assert_same_run(both[0], out)
    fit(tmp_path / "alone", many, *FEW, "--resume")
    assert "had processes: 2, now it has 1; it goes on, with other bits" in capsys.readouterr().err
    assert load(tmp_path / "alone" / "model.pt").extra["run"]["args"]["processes"] == 1


def test_slow_torchrun_starts_all_anew_by_itself(both, many, tmp_path):
    torchrun("die", *words(tmp_path / "run", many, *FEW), script="test_parallel.py",
             flags=["--max-restarts=1"])
    assert_same_run(both[0], tmp_path / "run")


@pytest.mark.parametrize("flags, said", [
    (["--batch-size", "1"], "2 processes share out batches of 1"),
    (["--dataset", "missing.npz"], "missing.npz: No such file"), (["--out"], "need --out")])
def test_bad_input_is_one_line(flags, said, many, tmp_path):
    given = words(tmp_path / "run", many, *flags) if len(flags) > 1 else ["--epochs", 1]
    done = torchrun(*given, code=1)
    assert len(own_errors(done)) == 1 and said in own_errors(done)[0], done.stderr
    assert "exitcode  : 2" in done.stderr and not (tmp_path / "run").exists()


def test_processes_meet_whatever_an_earlier_start_left(monkeypatch):
    store = torch.distributed.HashStore()
    store.set("start", "left by a start that never came about")
    found = []
    late = threading.Thread(target=lambda: found.append(parallel.meet(store, 1, 2)))
    late.start()
    while not store.check(["left by a start that never came about 1"]):
        time.sleep(0.01)
    name = parallel.meet(store, 0, 2)
    late.join()
    assert found == [name]
    monkeypatch.setattr(parallel, "WAIT", 1)
    for rank in (1, 0):     # neither finds the other, nor what the first start left
        with pytest.raises(RuntimeError):
            parallel.meet(store, rank, 2)


def test_a_process_that_looks_too_early_finds_the_others_later():
    class Early(torch.distributed.HashStore):
        def wait(self, keys, timeout):
            if keys[0].endswith(" go") and not found:
                first.join()
                raise RuntimeError
            super().wait(keys, timeout)
    store, found = Early(), []
    first = threading.Thread(target=lambda: found.append(parallel.meet(store, 0, 2)))
    first.start()
    assert [parallel.meet(store, 1, 2)] == found


def test_a_process_that_never_comes_is_one_line(many, tmp_path):
    code = "import sys, parallel, train; parallel.WAIT = 1; sys.exit(train.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words(tmp_path / "run", many)], capture_output=True, text=True,
        cwd=HERE, env=os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                                    "MASTER_PORT": "0"})
    assert done.returncode == 2 and len(own_errors(done)) == 1, done.stderr
    assert "the 2 processes did not meet (in 1 seconds, at most)" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------- what torchrun starts here


def prepared(model, prior, K, precision, last):
    """(run, args, data) of grey images that need no drawing, in two batches; the rate is zero."""
    args = train.parse_args([*TINY, "--pseudo-inputs", str(K), "--lr", "0", "--learned-weights",
                             "--precision", precision, "--clip", "0", "--out", "none"])
    args, _ = train.settle(args, 100)
    x = torch.rand(20 + last, 9, generator=torch.Generator().manual_seed(3))
    val = torch.rand(2500, 9, generator=torch.Generator().manual_seed(4))
    data = datasets.Data("", "", (3, 3), x, val, val, None, None, None, "none")
    config = models.Config(model, prior, 9, 16, 4, K, True)
    run = train.start(args, config, data, torch.device("cpu"))
    for p in run.model.prior.parameters():      # first values are too equal to show errors
        p.data = torch.rand(p.shape, generator=torch.Generator().manual_seed(5))
    return run, args, data


@contextlib.contextmanager
def replaced(owner, name, function):
    """function(real, *args) in the place of owner.name."""
    real = getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args, **more: function(real, *args, **more)):
        yield


def step(*cell):
    """An epoch's row, the gradients of its last batch and the sizes that each process encoded."""
    run, args, data = prepared(*cell)
    left, left_now, encoded = iter([20, cell[-1]]), [0], []

    def same_noise(real, mu, logvar=None, generator=None, size=()):
        """Its images' part of the noise that one process would have."""
        whole = left_now[0]
        eps = torch.randn(whole, mu.shape[-1], generator=torch.Generator().manual_seed(whole))
        return mu + (0.5 * logvar).exp() * parallel.share(eps).expand(*size, *mu.shape)

    def batch(real, self, index, generator=None):
        left_now[0] = next(left)
        return real(self, index, generator)
    if cell[1] == "vamp" and parallel.size() > 1:
        run.model.prior.encode_all = lambda encode, u: parallel.encode(
            lambda part: (encoded.append(len(part)), encode(part))[1], u)
    with replaced(models, "_normal", same_noise), replaced(datasets.Data, "batch", batch):
        row = train.train_epoch(run, args, data)
    return {"row": {k: v for k, v in row.items() if v is not None}, "encoded": parallel.gather(encoded),
            "gradients": [p.grad.clone() for p in run.model.parameters()]}


def validation():
    """The row of a validation, and the sizes of the batches that each process took."""
    run, _, data = prepared("vae", "vamp", 7, "float32", 1)
    seen = []
    with replaced(models.VAE, "infer", lambda real, self, x: (seen.append(len(x)), real(self, x))[1]):
        row = train.validate(run.average, data.val, 0)
    return row, seen


def likelihood():
    """log p(x) of 250 images, and how many each process worked on."""
    run, _, data = prepared("hvae", "vamp", 7, "float32", 1)
    seen = []
    with replaced(evaluate, "_image_terms", lambda real, *args: (seen.append(1), real(*args))[1]):
        found = evaluate.log_likelihood(run.average, data.val[:250], 5, torch.Generator().manual_seed(0))
    return found, parallel.gather(len(seen))


def fallback(digest):
    """What each process asked for when the first one got mnist5k instead, or how it ended."""
    asked = []

    def load(real, name, data_dir, binarize, split_seed, strict, device):
        asked.append((name, strict))
        x = torch.zeros(4, 9)
        return datasets.Data("mnist5k", "", (3, 3), x, x, x, None, None, None, binarize, digest())
    with replaced(datasets, "load", load), mock.patch("time.sleep"):
        try:
            train.load(train.parse_args(["--out", "none", "--dataset", "mnist"]))
        except (OSError, SystemExit) as error:
            asked = str(error)
    return parallel.gather(asked)


def measure(path):
    """All that the tests above compare, into a file."""
    parallel.start("cpu")
    found = {"steps": [step(*cell) for cell in CELLS], "likelihood": likelihood(),
             "fallback": fallback(lambda: "same"), "other": fallback(lambda: str(parallel.rank()))}
    noise, draws = [], []

    def watched(real, mu, logvar=None, generator=None, size=()):
        draws.append((real(mu, logvar, generator, size), generator.initial_seed()))
        return draws[-1][0]
    with replaced(models, "_normal", watched):
        row, seen = validation()
        found["first noise of a batch"] = sum(parallel.gather([s for _, s in draws]), [])
        for epoch in (0, 1):
            draws.clear()
            run, args, data = prepared(*CELLS[2])
            run.epoch = epoch
            train.train_epoch(run, args, data)
            noise += [s % 2**32 for s in parallel.gather(draws[0][1])]      # what a CPU takes of it
    found |= {"validation": (row, parallel.gather(seen)), "noise": noise}

    def nan(real, self, *args, **more):
        factor = float("nan") if parallel.rank() else 1
        return {k: v * factor for k, v in real(self, *args, **more).items()}
    with replaced(models.VAE, "terms", nan):
        try:
            train.train_epoch(*prepared(*CELLS[2]))
        except train.Diverged as error:
            found["diverged"] = parallel.gather(str(error))
    if parallel.rank() == 0:
        torch.save(found, path)


def die(*words):
    """train.py, whose second process is killed in the second epoch, unless this is a new start."""
    def epoch(real, run, *args):
        if run.epoch == 1 and parallel.rank() == 1 and not parallel.restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, *args)
    with replaced(train, "train_epoch", epoch):
        return train.main(list(words))


if __name__ == "__main__":
    files.catch_signals()
    parallel.script(lambda: {"measure": measure, "die": die}[sys.argv[1]](*sys.argv[2:]))
