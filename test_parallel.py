"""Several processes: the same mathematics, the same numbers, and what follows when one dies. And
what happens on a GPU, without one: fake tensors have a device and a shape, but no values.

torchrun starts this file, too: `measure` and `die` at its end are what the processes then do.
"""
import builtins
import contextlib
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import evaluate
import models
import parallel
import train
from test_train import HERE, TINY, assert_same_run, fit, rows, words

FEW = ["--epochs", "3", "--batch-size", "300", "--warmup", "1"]
# model, prior, K, precision, images of the last batch: of one, two processes get none
CELLS = [*[(model, prior, 7, "float32", 11) for model in models.MODELS for prior in models.PRIORS],
         ("vae", "vamp", 7, "float32", 1), ("hvae", "vamp", 1, "float32", 11),
         ("vae", "vamp", 7, "bfloat16", 11)]


def torchrun(*words, code=0, flags=()):
    """Three processes under torchrun; the exit code is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost",
         "--nproc-per-node=3", *flags, __file__, *map(str, words)],
        capture_output=True, text=True, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An .npz of 3,200 grey images of 6 x 6. The 320 test images make four blocks."""
    path = tmp_path_factory.mktemp("many") / "many.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (3200, 6, 6), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def three(many, tmp_path_factory):
    """A folder with what three processes trained, and what they found in CELLS."""
    folder = tmp_path_factory.mktemp("three")
    torchrun("die", *words(folder / "killed", many, *FEW), code=1)
    shutil.copytree(folder / "killed", folder / "left")
    said = torchrun("measure", folder, many).stdout
    assert said.count("trained 3 epochs") == 2 and said.count("NLL") == 1   # one process prints
    return folder, torch.load(folder / "steps.pt")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_three_processes_give_loss_gradients_and_validation_of_one(cell, three):
    one, other = step(*cell), three[1][CELLS.index(cell)]
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[cell[3]]
    assert one["row"] == pytest.approx(other["row"], rel=tolerance)
    for a, b in zip(one["gradients"], other["gradients"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * a.abs().max().item() + 1e-12)
    assert max(g.abs().max() for g in one["gradients"]) > 0
    assert len({*other["seeds"]}) == 3      # each process has noise of its own
    share = [-(-cell[2] // 3)] * 2 if cell[1] == "vamp" else []     # pseudo-inputs at each step
    assert other["encoded"] == [share] * 3


def test_evaluation_by_three_processes_writes_the_same_bits(three, tmp_path):
    shutil.copytree(three[0] / "run", tmp_path / "run")
    evaluate.main([str(tmp_path / "run"), "--samples", "20", "--device", "cpu"])
    found = []
    for count, folder in (3, three[0] / "run"), (1, tmp_path / "run"):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics.pop("processes") == count
        del metrics["seconds"], metrics["date"]
        found.append((metrics, (folder / "arrays.npz").read_bytes()))
    assert found[0] == found[1]


def test_a_killed_process_ends_all_and_the_run_resumes(three, many):
    folder = three[0]
    assert len(rows(folder / "left")) == 1 and not (folder / "left/model.safetensors").exists()
    assert_same_run(folder / "run", folder / "killed")
    assert len(rows(fit(folder / "left", many, *FEW, "--resume"))) == 3     # alone, with other bits


def test_slow_torchrun_restarts_all_by_itself(three, many, tmp_path):
    torchrun("die", *words(tmp_path / "run", many, *FEW, "--resume"), flags=["--max-restarts=1"])
    assert_same_run(three[0] / "run", tmp_path / "run")


class AnyGenerator(torch.Generator):
    """A generator of a GPU needs a GPU."""
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def to(model, device):
    """nn.Module.to, but new parameters in place of changed ones."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(p.detach().to(device))
        for name, t in module.named_buffers(recurse=False):
            module._buffers[name] = t.to(device)
    return model


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("model, prior, likelihood", [
    ("vae", "standard", "bernoulli"), ("hvae", "mog", "gaussian"), ("vae", "vamp", "logistic"),
    ("vae", "vamp", "bernoulli"), ("hvae", "vamp", "bernoulli")])
def test_no_step_on_a_gpu_waits_for_its_numbers(model, prior, likelihood, monkeypatch):
    """An epoch of five steps reads as many numbers as an epoch of one. An operation on tensors of
    two devices fails, and so does a branch on a value."""
    reads, counts = [], []

    def backward(loss):         # autograd of a GPU needs a GPU
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
    for target, name, value in [
            (FakeTensor, "item", lambda t: reads.append(t) or 1),
            (torch.Tensor, "backward", backward), (evaluate, "checked", lambda x, likelihood: x),
            (torch.nn.Module, "to", to), (torch, "Generator", AnyGenerator),
            (train, "has_bfloat16", lambda device: True),
            (evaluate, "ThreadPoolExecutor", lambda n: contextlib.nullcontext(builtins))]:
        monkeypatch.setattr(target, name, value)
    flags = ["--device", "cuda", "--batch-size", "20", "--likelihood", likelihood]
    for n in 20, 100:
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.zeros(n, 36, dtype=torch.uint8, device="cuda")
            data = datasets.Data("", (6, 6), x, x, x, {}, "none", "")
            args = train.apply_recipe(train.parse_args(flags), data)
            config = models.Config(model, prior, 36, 9, 2, 7, True, likelihood)
            run = train.start(args, config, data)
            reads.clear()
            train.train_epoch(run, run.model, args, data)
            counts.append(len(reads))
            train.validate(run.average, data.val, 0)
            evaluate.importance_terms(run.average, data.test, 30)
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------- what torchrun starts here


def step(model, prior, K, precision, last):
    """An epoch's row and its last gradients, among other things. The learning rate is zero."""
    flags = f"--pseudo-inputs {K} --lr 0 --precision {precision} --clip 0".split()
    x = torch.rand(20 + last, 9, generator=torch.Generator().manual_seed(3))
    val = torch.rand(2500, 9, generator=torch.Generator().manual_seed(4))       # three batches
    data = datasets.Data("", (3, 3), x, val, val, {}, "none", "")
    args = train.apply_recipe(train.parse_args([*TINY, *flags]), data)
    run = train.start(args, models.Config(model, prior, 9, 16, 4, K, True), data)
    for p in run.model.prior.parameters():      # first values are too equal to show errors
        p.data = torch.rand(p.shape, generator=torch.Generator().manual_seed(5))
    net = DistributedDataParallel(run.model) if parallel.size() > 1 else run.model
    encode, encoded, seeds = models.VampPrior._encode, [], []

    def watched(self, u):
        encoded.append(len(u))
        return encode(self, u)

    def draw(mu, logvar, generator, size=()):       # the same for any number of processes
        seeds.append(generator.initial_seed() if generator else torch.initial_seed())
        return (mu + 0.5 * torch.exp(0.5 * logvar)).expand(*size, *mu.shape)
    with mock.patch.object(models.VampPrior, "_encode", watched), \
            mock.patch.object(models, "draw_normal", draw):
        row = train.train_epoch(run, net, args, data)
    row |= train.validate(run.average, data.val, 0)
    return {"row": row, "gradients": [p.grad.clone() for p in run.model.parameters()],
            "encoded": parallel.gather(encoded), "seeds": parallel.gather(seeds[0])}


def measure(folder, many):
    """Trains, resumes what `die` left, evaluates, and writes what the tests above compare."""
    train.main(words(f"{folder}/run", many, *FEW))
    train.main(words(f"{folder}/killed", many, *FEW, "--resume"))
    parallel.gather(None)       # until the main process has written the model
    evaluate.main([f"{folder}/run", "--samples", "20", "--device", "cpu"])
    steps = [step(*cell) for cell in CELLS]
    if parallel.is_main_process():
        torch.save(steps, f"{folder}/steps.pt")


def die(*words):
    """train.py, whose second process is killed in the second epoch, but not after a restart."""
    epoch = train.train_epoch

    def watched(run, *args):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and run.epoch == 1 and parallel.rank() == 1:
            os.kill(os.getpid(), 9)
        return epoch(run, *args)
    with mock.patch.object(train, "train_epoch", watched):
        train.main(list(words))


if __name__ == "__main__":
    {"measure": measure, "die": die}[sys.argv[1]](*sys.argv[2:])
