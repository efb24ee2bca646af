"""Several processes that train or evaluate one model, as torchrun starts them:

    torchrun --standalone --nproc-per-node 4 train.py --prior vamp --out results/vamp

Without torchrun a process is rank 0 of 1, and nothing here touches torch.distributed.
"""
import atexit
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous


def start(device):
    """Meets the other processes, if any; on "cuda" each has the GPU of its local rank. ValueError
    if there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that this torch can use: take --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"      # objects are gathered on the CPU
    store, this, count = next(rendezvous("env://"))
    # after a restart torchrun's store still has the keys of the start that failed
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), rank=this,
                            world_size=count)
    atexit.register(dist.destroy_process_group)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return rank() == 0


def share(rows):
    """This process's part of a sequence or of a tensor's first axis; the last ones may be empty."""
    n = -(-len(rows) // size())
    return rows[rank() * n:(rank() + 1) * n]


def gather(value):
    """[the value of process 0, of process 1, ...], on every process."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def main_first(function):
    """function() at process 0, then at the others, which find what it downloaded."""
    result = function() if is_main_process() else None
    gather(None)        # waits for the main process
    return result if is_main_process() else function()


class _Gather(torch.autograd.Function):
    """All processes' rows (n, D), joined. The gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return share(grad)


def encode(encoder, u):
    """mu and logvar (K, D) of all pseudo-inputs u (K, X), of which each process encodes its share.
    Gradients flow back to every process's share, so the density has all K components."""
    padded = F.pad(u, (0, 0, 0, -len(u) % size()))      # all_gather wants equal shares
    mine = torch.cat(encoder(share(padded)), dim=1)     # (K / processes, 2D)
    return _Gather.apply(mine)[:len(u)].chunk(2, dim=1)
