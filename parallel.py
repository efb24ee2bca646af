"""Several processes that train or evaluate one model together, as torchrun starts them.

    torchrun --standalone --nproc-per-node 4 train.py --prior vamp --out results/vamp

Without torchrun nothing here touches torch.distributed: one process, rank 0, has the whole share.
A share is a run of ceil(n / size) rows; the last processes may get fewer, or none.
"""
import contextlib
import os
import sys
import time
import uuid
from datetime import timedelta

import torch

import files

WAIT = 60           # seconds in which all processes must have come
_rank, _size = 0, 1


def restarted():
    """Whether torchrun started all processes anew after one had failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start(device):
    """Meets the other processes, each with a GPU of its own unless `device` is cpu. OSError."""
    global _rank, _size
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or _size > 1:
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous
    local, here = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if here > torch.cuda.device_count():
            if local:       # the first of this machine says it
                files.step_back(2)
            raise OSError(f"{here} processes, but {torch.cuda.device_count()} GPUs here; a lower "
                          "--nproc-per-node, or --device cpu")
        torch.cuda.set_device(local)
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=WAIT)))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=count,
            store=distributed.PrefixStore(meet(store, rank, count), store),
            timeout=timedelta(minutes=30))
    except (RuntimeError, ValueError) as error:
        raise OSError(f"the {count} processes did not meet (in {WAIT} seconds, at most); start all of "
                      f"them by torchrun ({files.one_line(error)[:100]})") from None
    _rank, _size = rank, count


def meet(store, rank, count):
    """A name for this start, the same on all processes, for the store keeps the keys of an earlier
    start that failed. (Each machine counts torchrun's restarts for itself, so a count is no name.)
    RuntimeError after WAIT seconds."""
    end = time.monotonic() + WAIT
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("start", name)
        store.wait([f"{name} {other}" for other in range(1, count)], timedelta(seconds=WAIT))
        store.set("start", "")          # a later start shall not find the name
        store.set(f"{name} go", "")
        return name
    store.wait(["start"], timedelta(seconds=WAIT))
    name = ""
    while True:
        name = store.get("start").decode() or name
        store.set(f"{name} {rank}", "")
        try:
            store.wait([f"{name} go"], timedelta(seconds=1))
            return name
        except RuntimeError:            # none yet, or that of a start that never came about
            if time.monotonic() > end:
                raise


def script(main):
    """Ends the process with main()'s exit code. One of several ends by os._exit: a thread of gloo
    that frees a tensor while Python shuts down would abort the process."""
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    if _size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def rank():
    return _rank


def size():
    return _size


def share(rows):
    """This process's part of a sequence or of a tensor's first axis."""
    n = -(-len(rows) // _size)
    return rows[_rank * n:(_rank + 1) * n]


# ------------------------------------------------------------------------------- talking together


def fail(text):
    """Ends all processes, which come here alike, with exit code 2; the first says why."""
    if _rank:
        files.step_back(2)
    raise OSError(text)


@contextlib.contextmanager
def _answers():
    """Turns the error of a call to processes that have ended into one line."""
    try:
        yield
    except RuntimeError as error:
        fail("another process has ended, or does not answer; finished epochs of a training are kept "
             f"({files.one_line(error)[:100]})")


def gather(value):
    """[the value of process 0, of process 1, ...] on all of them: plain values, small tensors."""
    found = [value] * _size
    if _size > 1:
        with _answers():
            torch.distributed.all_gather_object(found, value)
    return found


def together(function):
    """function() on every process; an expected error on any of them ends all, with one line."""
    if _size == 1:
        return function()
    result = error = None
    try:
        result = function()
    except Exception as caught:
        if not files.expected(caught):
            raise
        error = files.one_line(caught)
    for rank, said in enumerate(gather(error)):
        if said:
            fail(said if rank == 0 else f"process {rank}: {said}")
    return result


def first(function):
    """The result of function(), which process 0 alone calls, on all of them."""
    return gather(together(lambda: function() if _rank == 0 else None))[0]


def in_turn(function):
    """function() at process 0, then at the others, which find what it downloaded."""
    result = together(lambda: _rank == 0 and function())
    return together(lambda: result or function())


def total(sums):
    """The sums (a dict of floats) of all processes, added in their order."""
    parts = gather(sums)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def sum_gradients(parameters, loss):
    """Adds up gradients and losses of all processes, in one all-reduce; returns the loss."""
    if _size == 1:
        return loss
    flat = torch.cat([*(p.grad.flatten() for p in parameters), loss.detach().reshape(1)])
    with _answers():
        torch.distributed.all_reduce(flat)
    *parts, loss = flat.split([*(p.numel() for p in parameters), 1])
    for p, part in zip(parameters, parts):
        p.grad = part.view_as(p)
    return loss


def gather_rows(rows, count):
    """All rows (count, D) of the processes' shares; its gradient is the sum of all processes'."""
    return _Gather.apply(rows, count)


class _Gather(torch.autograd.Function):

    @staticmethod
    def forward(ctx, rows, count):
        n = -(-count // _size)          # all send as many rows: the collective wants equal shapes
        rows = torch.cat([rows, rows.new_zeros(n - len(rows), rows.shape[1])])
        parts = [torch.empty_like(rows) for _ in range(_size)]
        with _answers():
            torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)[:count]

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        with _answers():
            torch.distributed.all_reduce(grad)
        return share(grad), None


def encode(encoder, u):
    """mu and logvar of all of u (K, ...), of which each process encodes its share."""
    return gather_rows(torch.cat(encoder(share(u)), dim=1), len(u)).chunk(2, dim=1)
