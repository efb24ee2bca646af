"""Times each piece beside the plain form, as the field writes it, in one run.

    python bench.py --out bench.json                     # about ten minutes on two cores
    python bench.py --sections step likelihood           # parts of it, printed only

Both forms share weights and take turns, after a warm-up, on random images. Medians; the ratio's
range is that of neighbouring repeats. The bound is the time that the matrix products of our form
would take at the rate of a large product in float32, or in bfloat16 where that is named. "growth"
compares ours with ours; "processes" two processes of one thread with one of two.
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before torch, whose import takes seconds

import copy
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import evaluate
import parallel
import train
from models import LOG_2PI, Config, GatedDense, GaussianHead, log_mixture

KEYS = ("section case plain ours ratio ratio_low ratio_high n bound_share peak_mb plain_peak_mb "
        "predicted predicted_8 predicted_64 error expected").split()    # of a row; seconds, MB, nats
MEMORY, SECONDS = 4e9, 60       # a plain form that needs more for one call is left out
COPIES = {"forward": 2, "forward + backward": 7}    # (B, K, D) tensors that it holds at once
CELLS = [(model, prior) for model in ("vae", "hvae") for prior in ("standard", "vamp")]

# ------------------------------------------------------------------------------- the plain forms


def log_normal(x, mu, logvar):
    """log N(x; mu, exp(logvar)) in nats, summed over the last axis: (..., D) -> (...)."""
    return (-0.5 * (LOG_2PI + logvar + (x - mu) ** 2 / torch.exp(logvar))).sum(-1)


def broadcast_log_mixture(z, mu, logvar):
    """log 1/K sum_k N(z; mu_k, exp(logvar_k)), nats, by way of (B, K, D): z (B, D) -> (B,)."""
    each = log_normal(z[:, None], mu[None], logvar[None])       # (B, K)
    return torch.logsumexp(each - math.log(len(mu)), dim=1)


class Pair(nn.Module):
    """A layer of ours, which stacks two linears in one matrix, as two with the same weights."""

    def __init__(self, ours):
        super().__init__()
        self.gated = isinstance(ours, GatedDense)
        halves = [half for p in ours.linear.parameters() for half in p.detach().clone().chunk(2)]
        self.W, self.V, self.b, self.c = map(nn.Parameter, halves)

    def forward(self, x):
        a, b = F.linear(x, self.W, self.b), F.linear(x, self.V, self.c)
        return a * torch.sigmoid(b) if self.gated else (a, F.hardtanh(b, -6.0, 2.0))


def plain_form(ours):
    """A copy of our model, or of a part of it, with the same weights in plain layers."""
    if isinstance(ours, (GatedDense, GaussianHead)):
        return Pair(ours)
    form = copy.deepcopy(ours)
    for name, part in ours.named_children():
        setattr(form, name, plain_form(part))
    return form


def draw(mu, logvar):
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def plain_terms(model, x):
    """recon and kl of a plain_form in nats, each (B,), at one draw of the latents: x (B, 784)."""
    q = model.encoder(x)
    z = draw(*q)
    if model.config.prior == "standard":
        log_p = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
    else:       # kinder than the authors' code, in which u is a product with the identity
        log_p = broadcast_log_mixture(z, *model.encoder(model.prior.u.clamp(0, 1)))
    kl = log_normal(z, *q) - log_p
    if model.config.model == "hvae":
        q1 = model.q1_head(model.q1_joint(torch.cat([model.q1_x(x), model.q1_z2(z)], 1)))
        z1 = draw(*q1)
        kl = kl + log_normal(z1, *q1) - log_normal(z1, *model.p1(z))
        hidden = model.px_joint(torch.cat([model.px_z1(z1), model.px_z2(z)], 1))
    else:
        hidden = model.decoder(z)
    logits = model.output(hidden)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1), kl


def plain_epoch(model, optimizer, grey, batch):
    """The sum of the losses of one pass over grey images (N, 784) in [0, 1], drawn afresh."""
    total = 0
    for index in torch.randperm(len(grey)).split(batch):
        recon, kl = plain_terms(model, torch.bernoulli(grey[index]))
        loss = (kl - recon).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


@torch.no_grad()
def plain_log_likelihood(model, x, S):
    """log p(x) in nats of an image (784,) from S samples, by 100 at a time, each encoded anew."""
    chunks = [plain_terms(model, x.repeat(100, 1)) for _ in range(0, S, 100)]
    log_w = torch.cat([recon - kl for recon, kl in chunks])
    return log_w.logsumexp(0) - math.log(S)


# ------------------------------------------------------------------------------------- measuring


def seconds(form, calls=1):
    """Seconds of one call, the mean of several."""
    began = time.perf_counter()
    for _ in range(calls):
        form()
    return (time.perf_counter() - began) / calls


def product_rate(size, dtype=torch.float32):
    """Floating-point operations a second of the best of six (size, size) products."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(6))


def product_work(form):
    """Floating-point operations of the matrix products in one call, whatever their precision."""
    # torch's counter sees its own thread only, so the likelihood's images are done in this one
    here = SimpleNamespace(map=map, shutdown=lambda **flags: None)
    with (mock.patch.object(evaluate, "ThreadPoolExecutor", lambda threads: here),
          FlopCounterMode(display=False) as counter):
        form()
    return counter.get_total_flops()


def compare(plain, ours, n, units=(1, 1)):
    """Seconds of plain (n) and of ours (n), which take turns, and our work in matrix products.

    All are for one of the `units`, steps or images, that a call of plain and a call of ours do.
    Plain's list is empty where plain is None or too slow.
    """
    calls, times = {}, ([], [])
    for i, form in enumerate((plain, ours)):
        once = seconds(form) if form else math.inf      # the warm-up: threads, memory, moments
        if form is ours or once <= SECONDS:
            once = seconds(form) if once < 2 else once
            calls[i] = max(1, min(200, int(0.05 / once)))       # what is short is timed in bunches
    for _ in range(n):
        for i, count in calls.items():
            times[i].append(seconds((plain, ours)[i], count) / units[i])
    return *times, product_work(ours) / units[1]


def new_row(section, case, times=([], [], None), ratios=(), **more):
    """A row as the JSON holds it, None for what was not measured; one of `ratios` per repeat.

    `times` are what `compare` returned; bound_share is work per second until `record` divides it.
    """
    print(f"  {section}: {case}", file=sys.stderr, flush=True)
    plain, ours, work = times
    ratios = ratios or [p / o for p, o in zip(plain, ours)]
    row = dict.fromkeys(KEYS) | {"section": section, "case": case, "n": len(ours or ratios)}
    if ratios:
        row |= {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    if ours:
        row |= {"ours": median(ours), "bound_share": work and work / median(ours)}
    if plain:       # the ratio is that of the two times which stand beside it
        row |= {"plain": median(plain), "ratio": median(plain) / median(ours)}
    return row | more


def peak_mb(*call, make=None):
    """MB that make(*call)(), of mixture_call by default, needs beyond its inputs, in a process of its
    own; None off Linux."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, files.catch_signals) as process:
        return process.submit(own_peak_mb, make or mixture_call, call).result()


def own_peak_mb(make, call):
    """The same of this process: its largest size in the call, less its size before it."""
    def size(key):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{key}:\s*(\d+) kB", status)[1]) / 1024

    make(*call[:-2], 10, 10)()      # loads libraries, starts threads
    call = make(*call)
    Path("/proc/self/clear_refs").write_text("5")       # resets the maximum, VmHWM
    before = size("VmRSS")
    call()
    return size("VmHWM") - before


# -------------------------------------------------------------------------------------- sections
# Each takes `quick`, whether tiny sizes do, and returns its rows.


def mixture_inputs(B, K, D=40):
    """z (B, D), mu and logvar (K, D)."""
    generator = torch.Generator().manual_seed(B + K)
    z, mu = (torch.randn(n, D, generator=generator) for n in (B, K))
    return z, mu, torch.rand(K, D, generator=generator) * 4 - 4


def mixture_call(form, task, B, K):
    """A function without arguments: one form's density of mixture_inputs, or also its gradients."""
    function = {"plain": broadcast_log_mixture, "ours": log_mixture}[form]
    inputs = [t.requires_grad_(task != "forward") for t in mixture_inputs(B, K)]
    if task == "forward":
        return lambda: function(*inputs)
    return lambda: torch.autograd.grad(function(*inputs).sum(), inputs)


def mixture(quick):
    """Rows of the mixture's log density: our products are float64, the bound's rate float32."""
    B_all, K_all, n = ((20,), (30, 300), 2) if quick else ((100, 500, 5000), (500, 5000, 50000), 5)
    sizes = [(B, K) for K in K_all for B in B_all] + ([] if quick else [(1000, K_all[-1])])
    memory = min(MEMORY, datasets.available_memory() / 2)
    rows, ours = [], {}
    for task, (B, K) in itertools.product(COPIES, sizes):
        z, *components = mixture_inputs(B, K)
        fits = COPIES[task] * 4 * K * z.numel() <= memory
        plain, call = (mixture_call(form, task, B, K) for form in ("plain", "ours"))
        times = compare(plain if fits else None, call, n)
        ours[task, B, K] = times[1]
        row = new_row("mixture", f"{task}, B = {B}, K = {K:,}", times, expected=(
            "ratio >= 10" if B >= 500 and K == 500 else
            "peak < 1000 MB" if (B, K) == (1000, 50000) else None))
        if task == "forward":       # ten of z do: float64 by broadcasting takes much memory
            exact = broadcast_log_mixture(*(t.double() for t in (z[:10], *components)))
            row["error"] = (call()[:10] - exact).abs().max().item()
        if not quick or (task, K) == ("forward + backward", K_all[-1]):
            row["peak_mb"] = peak_mb("ours", task, B, K)
            row["plain_peak_mb"] = peak_mb("plain", task, B, K) if row["plain"] else None
        rows.append(row)
    low, high = K_all[-2:]
    for task, B in itertools.product(COPIES, B_all):
        growth = [b / high / (a / low) for a, b in zip(ours[task, B, low], ours[task, B, high])]
        case = f"mixture, {task}, B = {B}, time per component: K = {high:,} over {low:,}"
        rows.append(new_row("growth", case, ratios=growth, expected="ratio about 1"))
    return rows


def prepare(model, prior, n, *flags, quick=False):
    """(run, args, data) as train.py makes them of these flags and n random images.

    The images have a black frame as MNIST's do: pixels whose weights get no gradient. The first
    weights are made small, or no estimate of the likelihood would settle.
    """
    small = "--hidden 8 --z-dim 4 --pseudo-inputs 12".split() if quick else []
    args = train.parse_args(["--out", "none", "--model", model, "--prior", prior,
                             *map(str, flags), *small])
    args, _ = train.settle(args, 50_000)        # the recipe for MNIST, however few images these are
    x = torch.zeros(n, 28, 28, dtype=torch.uint8)
    x[:, 4:24, 4:24].random_(0, 256, generator=torch.Generator().manual_seed(0))
    x = x.flatten(1)
    data = datasets.Data("random", "", (28, 28), x, x[:1], x[:1], None, None, None, "dynamic")
    config = Config(args.model, args.prior, 784, args.hidden, args.z_dim, args.pseudo_inputs)
    run = train.start(args, config, data, torch.device("cpu"))
    for name, p in run.model.named_parameters():
        p.data.mul_(0.1 if "head" in name or "output" in name else 1)
    return run, args, data


def step(quick):
    """Rows of a training step by train.py's own loop and recipe: images drawn, forward, backward,
    clipping, AdamW, weights averaged. The plain form has standard Adam, no clipping, no average, and
    float32 products; ours at the recipe's batch is in bfloat16, too, where the hardware has it."""
    recipe = train.settle(train.parse_args([]), 50_000)[0].batch_size
    batches, steps, n = ((10,), 2, 2) if quick else (sorted({100, 250, 500, recipe}), 5, 7)
    cases = [(batch, "float32") for batch in batches]
    if train.has_bfloat16(torch.device("cpu")):
        cases.append((batches[-1], "bfloat16"))
    rows = []
    for cell, (batch, precision) in itertools.product(CELLS, cases):
        run, args, data = prepare(*cell, steps * batch, "--batch-size", batch, "--precision", precision,
                                  quick=quick)
        plain, grey = plain_form(run.model), data.train / 255
        adam = torch.optim.Adam(plain.parameters(), lr=1e-4)
        times = compare(lambda: plain_epoch(plain, adam, grey, batch),
                        lambda: train.train_epoch(run, args, data), n, (steps, steps))
        expected = (f"bound >= {85 if precision == 'float32' else 65} %" if batch == recipe else
                    "ratio >= 3" if (cell[1], batch) == ("vamp", 100) else None)
        case = (f"{evaluate.label(plain.config)}, batch {batch}"
                f"{', bfloat16' * (precision == 'bfloat16')}")
        rows.append(new_row("step", case, times, expected=expected))
    B, K = (10, 30) if quick else (1000, 50_000)
    case = f"VAE + VampPrior, batch {B}, K = {K:,}"
    rows.append(new_row("step", case, compare(None, step_call(B, K), 2 if quick else 3),
                        peak_mb=peak_mb(B, K, make=step_call), expected="peak < 400 MB"))
    return rows


def step_call(B, K):
    """A function without arguments: a training step of VAE + VampPrior, which has been done once, so
    that the optimiser's moments exist; K may be large."""
    run, args, data = prepare("vae", "vamp", B, "--batch-size", B, "--pseudo-inputs", K)
    train.train_epoch(run, args, data)
    return lambda: train.train_epoch(run, args, data)


def likelihood(quick):
    """Rows of log p(x) by importance sampling, per image: ours takes two images a thread, and
    encodes u for these alone. The error, of the repeats' mean in nats, is chance."""
    S, n, rows = 200 if quick else 5000, 2 if quick else 5, []
    images = 2 * torch.get_num_threads()
    for model, prior in CELLS:
        ours = prepare(model, prior, 500, quick=quick)[0].model
        x, plain, found = (torch.rand(images, 784) < 0.2).float(), plain_form(ours), ([], [])
        times = compare(
            lambda: found[0].append(plain_log_likelihood(plain, x[0], S)),
            lambda: found[1].append(evaluate.log_likelihood(ours, x, S)[0]), n, (1, images))
        error = (torch.stack(found[0]).mean() - torch.stack(found[1]).mean()).abs().item()
        case = f"{evaluate.label(ours.config)}, one image, S = {S:,}"
        expected = "ratio >= 12, bound >= 50 %" if prior == "vamp" else "bound >= 50 %"
        rows.append(new_row("likelihood", case, times, error=error, expected=expected))
    return rows


def epochs(quick):
    """A row of how an epoch's time grows in a long run of a small model, as denormal numbers would
    make it. The run ends after two minutes; the case says how many epochs it was."""
    count, n, times = 8 if quick else 100, 100 if quick else 2000, []
    flags = ["--hidden", 100, "--pseudo-inputs", 100, "--batch-size", 50, "--epochs", count]
    run, args, data = prepare("vae", "vamp", n, *flags)
    while run.epoch < count and (sum(times) < 120 or run.epoch < 12):
        times.append(seconds(lambda: train.train_epoch(run, args, data)))
        run.epoch += 1
    case = (f"{evaluate.label(run.model.config)}, hidden 100, K = 100, time of an epoch: "
            f"{run.epoch - 4}-{run.epoch} over 2-6")
    growth = [t / median(times[1:6]) for t in times[-5:]]
    return [new_row("growth", case, ratios=growth, expected="ratio <= 1.1")]


def processes(quick):
    """Rows of two processes of one thread each, "ours", beside one of two threads, "plain": a step of
    VAE + VampPrior, batch 1000. "predicted" is the step of 2, 8 and 64 processes by RESULTS.md's
    model of the cost, from one process of one thread and what two spend on passes and on talking."""
    B, rows = 10 if quick else 1000, []
    for K, n in ((12, 2),) if quick else ((500, 9), (5000, 5), (50_000, 2)):
        kinds = ((1, 2), (2, 1), (1, 1))        # processes, threads of each
        found = {kind: {"step": [], "passes": [], "talk": []} for kind in kinds}
        for _ in range(1 if quick else 3):
            for count, threads in kinds:        # in turn
                words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                         "--local-addr=localhost", f"--nproc-per-node={count}", __file__, "--steps",
                         str(B), str(K), str(n)]
                done = subprocess.run(words, check=True, capture_output=True,
                                      env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                # the last line: some versions of gloo print, too
                for name, times in json.loads(done.stdout.splitlines()[-1]).items():
                    found[count, threads][name] += times
        plain, two, one = (found[kind] for kind in kinds)
        passes, talk = median(two["passes"]), median(two["talk"])
        shared = median(one["step"]) - median(one["passes"])
        predicted = {"predicted" + name * (N > 2): shared / N + passes + talk * 2 * (N - 1) / N
                     for N, name in ((2, ""), (8, "_8"), (64, "_64"))}
        case = f"VAE + VampPrior, batch {B}, K = {K:,}: two processes of one thread, one of two"
        rows.append(new_row("processes", case, (plain["step"], two["step"], None),
                            expected="ratio >= 0.8", **predicted))
    return rows


def own_steps(B, K, n):
    """Prints what the first of the processes that `processes` starts sees: seconds of n steps, and in
    these of passes over all parameters, and of talking to the others, each process having come."""
    parallel.start("cpu")
    run, args, data = prepare("vae", "vamp", B, "--batch-size", B, "--pseudo-inputs", K)
    train.train_epoch(run, args, data)      # the optimiser's moments are made

    def passes():
        train.move(run, args, 1)

    def talk():
        rows = torch.zeros(len(parallel.share(range(K))), 2 * args.z_dim, requires_grad=True)
        parallel.gather_rows(rows, K).sum().backward()
        parallel.sum_gradients(list(run.model.parameters()), torch.zeros(()))

    found = {"step": [seconds(lambda: train.train_epoch(run, args, data)) for _ in range(n)]}
    for name, part in (("passes", passes), ("talk", talk)):
        found[name] = []
        for _ in range(n):
            parallel.gather(None)
            found[name].append(seconds(part) if parallel.size() > 1 or name == "passes" else 0.0)
    if parallel.rank() == 0:
        print(json.dumps(found))


SECTIONS = {"mixture": mixture, "step": step, "likelihood": likelihood, "epochs": epochs,
            "processes": processes}


def record(sections, quick):
    """The record (a dict) of the sections, which it times and prints, a line per row."""
    size, rows, cpus = 256 if quick else 2048, [], Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpus.read_text() if cpus.exists() else "")
    machine = {"processor": named[1] if named else platform.processor() or platform.machine(),
               "cores": f"{os.cpu_count()} cores",
               "os": f"{platform.system()} {platform.release()}"}
    kinds = {"float32": torch.float32}
    if train.has_bfloat16(torch.device("cpu")):
        kinds["bfloat16"] = torch.bfloat16
    rates = [{name: product_rate(size, kind) for name, kind in kinds.items()}]
    for name in sections:
        found = SECTIONS[name](quick)
        rates.append({name: product_rate(size, kind) for name, kind in kinds.items()})
        for row in found:
            if row["bound_share"] is not None:
                kind = "bfloat16" if row["case"].endswith("bfloat16") else "float32"
                row["bound_share"] /= max(rate[kind] for rate in rates[-2:])
            words = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in list(row.items())[2:] if value is not None]
            print(f"{row['section']}: {row['case']}: {', '.join(words)}", flush=True)
        rows += found
    gflops = {kind: max(rate[kind] for rate in rates) / 1e9 for kind in kinds}
    print(f"GFLOP/s in products of size {size}: {gflops}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; seconds, MB, nats")
    return {"machine": machine, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"), "gflops": gflops, "rows": rows}


@files.command
def main(argv=None):
    torch.set_flush_denormal(True)      # as train.py and evaluate.py do, for both forms
    p = files.Parser(__doc__.split("\n")[0])
    p.add_argument("--out", metavar="FILE.json", help="where the record goes, besides the terminal")
    p.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS),
                   help="what to time")
    p.add_argument("--steps", nargs=3, type=int, metavar=("B", "K", "N"),
                   help="only print the seconds of N training steps, under torchrun or alone")
    args = p.parse_args(argv)
    if args.steps:
        return own_steps(*args.steps)
    folder = os.path.join(os.path.dirname(args.out or "") or ".", "")   # the last / wants a folder
    # before ten minutes of work, not after
    if args.out and (os.path.isdir(args.out) or not os.access(folder, os.W_OK)):
        raise ValueError(f"{args.out} cannot be written; give --out a file in a folder that can")
    torch.manual_seed(0)
    content = record(args.sections, args.quick)
    if args.out:
        files.write_atomic(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    parallel.script(main)
