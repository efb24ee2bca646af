"""Times each piece side by side with the plain form, as the field writes it, in one run.

    python bench.py --out bench.json                     # ten minutes on two slow cores
    python bench.py --sections step likelihood           # parts of it, printed only
    python bench.py --quick                              # tiny sizes, seconds: does it run?

Both forms share weights and do the same work on random black and white images, for which real ones
are not needed: dense products cost the same whatever they multiply. Plain and ours alternate, after
a warm-up; medians, and the smallest and largest ratio of neighbours. The bound is the time in which
the matrix products alone, counted by formula, would run at the rate of one large float32 product,
the better of two measurements before and after the section. It ignores everything between them.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import data as datasets
import train
from evaluate import log_likelihood
from models import LOG_2PI, Config, log_mixture, write_atomic

SECTIONS = ("mixture", "step", "likelihood", "epochs")
MEMORY, SECONDS = 4e9, 60       # a plain form that needs more for one call is left out
COPIES = {"forward": 3, "forward + backward": 6}    # (B, K, D) tensors that it holds at once
NAMES = {"vae": "VAE", "hvae": "HVAE", "standard": "standard", "vamp": "Vamp"}

# ------------------------------------------------------------------------------- the plain forms


def broadcast_log_mixture(z, mu, logvar):
    """log 1/K sum_k N(z; mu_k, exp(logvar_k)), nats, by way of (B, K, D): z (B, D) -> (B,)."""
    each = log_normal(z[:, None], mu[None], logvar[None])       # (B, K)
    return torch.logsumexp(each - math.log(len(mu)), dim=1)


def log_normal(x, mu, logvar):
    return (-0.5 * (LOG_2PI + logvar + (x - mu) ** 2 / torch.exp(logvar))).sum(-1)


def halves(linear):
    """Two nn.Linear, with copies of the upper and the lower half of one's weights."""
    pair = [nn.Linear(linear.in_features, linear.out_features // 2) for _ in range(2)]
    for one, weight, bias in zip(pair, linear.weight.chunk(2), linear.bias.chunk(2)):
        one.load_state_dict({"weight": weight, "bias": bias})
    return pair


class PlainGated(nn.Module):
    """A gated layer of two separate linears, from one of ours: (B, n_in) -> (B, n_out)."""

    def __init__(self, ours):
        super().__init__()
        self.value, self.gate = halves(ours.linear)

    def forward(self, x):
        return self.value(x) * torch.sigmoid(self.gate(x))


class PlainHead(nn.Module):
    """mu and logvar by two separate linears, from one of ours: (B, n_in) -> (B, D) twice."""

    def __init__(self, ours):
        super().__init__()
        self.mu, self.logvar = halves(ours.linear)

    def forward(self, h):
        return self.mu(h), F.hardtanh(self.logvar(h), -6.0, 2.0)


class PlainModel(nn.Module):
    """Our VAE or HVAE with the same weights in the plain form.

    Kinder than the authors' code in one point: u is a parameter, not a product with the identity.
    """

    def __init__(self, ours):
        super().__init__()
        self.two = ours.config.model == "hvae"
        self.encoder = self.plain_net(ours.encoder)
        if self.two:
            for name in ("q1_x", "q1_z2", "q1_joint", "px_z1", "px_z2", "px_joint"):
                setattr(self, name, PlainGated(getattr(ours, name)))
            self.q1_head, self.p1 = PlainHead(ours.q1_head), self.plain_net(ours.p1)
        else:
            self.decoder = nn.Sequential(*map(PlainGated, ours.decoder))
        self.output = nn.Linear(ours.output.in_features, ours.output.out_features)
        self.output.load_state_dict(ours.output.state_dict())
        vamp = ours.config.prior == "vamp"
        self.u = nn.Parameter(ours.prior.u.detach().clone()) if vamp else None

    @staticmethod
    def plain_net(ours):
        return nn.Sequential(*map(PlainGated, ours.body), PlainHead(ours.head))

    def log_prior(self, z):
        if self.u is None:
            return log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
        return broadcast_log_mixture(z, *self.encoder(self.u.clamp(0, 1)))

    def terms(self, x):
        """recon and kl in nats, each (B,), at one draw of the latents: x (B, 784)."""
        mu, logvar = self.encoder(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        kl = log_normal(z, mu, logvar) - self.log_prior(z)
        if self.two:
            joint = self.q1_joint(torch.cat([self.q1_x(x), self.q1_z2(z)], dim=1))
            mu1, logvar1 = self.q1_head(joint)
            z1 = mu1 + torch.exp(0.5 * logvar1) * torch.randn_like(mu1)
            kl = kl + log_normal(z1, mu1, logvar1) - log_normal(z1, *self.p1(z))
            hidden = self.px_joint(torch.cat([self.px_z1(z1), self.px_z2(z)], dim=1))
        else:
            hidden = self.decoder(z)
        logits = self.output(hidden)
        return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1), kl


def plain_epoch(model, optimizer, grey, batch):
    """One pass over grey images (N, 784) in [0, 1], drawn afresh; the last loss."""
    for index in torch.randperm(len(grey)).split(batch):
        recon, kl = model.terms(torch.bernoulli(grey[index]))
        loss = (kl - recon).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()
    return last


@torch.no_grad()
def plain_log_weights(model, x, S):
    """log p(x, z) - log q(z | x) of one image (784,): (S,), 100 at a time, all encoded each time."""
    chunks = []
    for _ in range(0, S, 100):
        recon, kl = model.terms(x.repeat(100, 1))
        chunks.append(recon - kl)
    return torch.cat(chunks)


# ------------------------------------------------------------------------------------- measuring


def measured_gflops(size, repeats=5):
    """GFLOP/s of the best of several (size, size) float32 products."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def seconds(form, calls=1):
    """Seconds of one call, the mean of several."""
    began = time.perf_counter()
    for _ in range(calls):
        form()
    return (time.perf_counter() - began) / calls


def compare(plain, ours, n):
    """Seconds per call, n times each in turn: {"plain": [n] or [], "ours": [n]}."""
    forms, calls, times = {"plain": plain, "ours": ours}, {}, {"plain": [], "ours": []}
    for name, form in forms.items():
        if form is None:
            continue
        once = seconds(form)        # also the warm-up: threads, memory, Adam's moments
        if name == "plain" and once > SECONDS:
            continue
        once = seconds(form) if once < 2 else once
        calls[name] = max(1, min(200, int(0.05 / once)))    # what is short is timed in bunches
    for _ in range(n):
        for name, count in calls.items():
            times[name].append(seconds(forms[name], count))
    return times


def new_row(section, case, times, per=(1, 1), **more):
    """A row as the JSON holds it; `per`: steps or images in one call of plain and of ours.

    `flops` is the matrix products' work in what `ours` times; `main` makes it a share of the bound.
    """
    plain, ours = ([t / count for t in times[name]] for name, count in zip(("plain", "ours"), per))
    ratios = [p / o for p, o in zip(plain, ours)]
    row = {"section": section, "case": case, "plain": statistics.median(plain) if plain else None,
           "ours": statistics.median(ours), "ratio": None, "ratio_low": min(ratios, default=None),
           "ratio_high": max(ratios, default=None), "n": len(ours), "bound_share": None,
           "peak_mb": None, "plain_peak_mb": None, "error": None, "expected": None, "flops": None}
    if plain:
        row["ratio"] = row["plain"] / row["ours"]
    print(f"  {section}: {case}: {show_seconds(row['ours'])}", file=sys.stderr, flush=True)
    return row | more


def peak_mb(form, task, B, K):
    """MB that one call needs beyond its inputs, in a process of its own; None where unknown."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    command = [sys.executable, __file__, "--peak", form, task, str(B), str(K)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--peak {form} {task} {B} {K} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def print_peak(form, task, B, K):
    """Prints MB: the process's largest size in the call, less its size before it."""
    mixture_call(form, task, *mixture_inputs(10, 10))()     # loads libraries, starts threads
    call = mixture_call(form, task, *mixture_inputs(B, K))

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    # Not getrusage: its maximum is inherited from the process that started this one.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    call()
    print(status("VmHWM") - before)


# -------------------------------------------------------------------------------------- sections


def mixture_inputs(B, K, D=40):
    """z (B, D), mu and logvar (K, D)."""
    generator = torch.Generator().manual_seed(B + K)
    z, mu = (torch.randn(n, D, generator=generator) for n in (B, K))
    return z, mu, torch.rand(K, D, generator=generator) * 4 - 4


def mixture_call(form, task, *inputs):
    function = {"plain": broadcast_log_mixture, "ours": log_mixture}[form]
    if task == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    inputs = [t.requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(function(*inputs).sum(), inputs)


def mixture(quick):
    """The log density of a mixture; float64 products in ours, bounded at the float32 rate."""
    sizes = [(B, K) for K in (500, 5000, 50000) for B in (100, 500, 5000)] + [(1000, 50000)]
    sizes, n = ([(20, 30), (20, 300)], 2) if quick else (sizes, 5)
    rows, spent = [], {}
    limit = min(MEMORY, datasets.available_memory() / 2)
    for task in COPIES:
        for B, K in sizes:
            z, mu, logvar = inputs = mixture_inputs(B, K)
            products = 1 if task == "forward" else 3
            more = {"flops": products * 2 * B * K * 2 * mu.shape[1]}
            fits = COPIES[task] * 4 * B * mu.numel() <= limit
            if task == "forward":       # a few rows: float64 by broadcasting is slow
                exact = [broadcast_log_mixture(row[None].double(), mu.double(), logvar.double())
                         for row in z[:10]]
                gap = log_mixture(z, mu, logvar)[:10].double() - torch.cat(exact)
                more["error"] = gap.abs().max().item()
            if B >= 500 and K == 500:
                more["expected"] = "ratio >= 10"
            elif (B, K) == (1000, 50000):
                more["expected"] = "peak < 1000 MB"
            times = compare(mixture_call("plain", task, *inputs) if fits else None,
                            mixture_call("ours", task, *inputs), n)
            more["peak_mb"] = peak_mb("ours", task, B, K)
            more["plain_peak_mb"] = peak_mb("plain", task, B, K) if times["plain"] else None
            rows.append(new_row("mixture", f"{task}, B = {B}, K = {K:,}", times, **more))
            spent[B, K] = times["ours"]
        B, (low, *_, high) = sizes[-2][0], sorted({K for _, K in sizes})
        growth = [b / a * low / high for a, b in zip(spent[B, low], spent[B, high])]
        rows.append(growth_row("mixture", f"{task}, B = {B}: time per component, K = {high:,} over "
                               f"K = {low:,}", growth, "ratio about 1"))
    return rows


def growth_row(section, case, ratios, expected):
    """A row that compares ours with ours: its ratio is a growth, not a gain."""
    row = new_row(section, case, {"plain": [], "ours": ratios}, expected=expected)
    return row | {"ours": None, "ratio": row["ours"], "ratio_low": min(ratios),
                  "ratio_high": max(ratios)}


def images(n):
    """Grey images (n, 784) uint8 with a black frame as MNIST's: pixels without any gradient."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.zeros(n, 28, 28, dtype=torch.uint8)
    grey[:, 4:24, 4:24] = torch.randint(256, (n, 20, 20), generator=generator, dtype=torch.uint8)
    return grey.flatten(1)


def prepare(flags, n):
    """What train.py makes of these flags for n images: (args, model, average, optimizer, data)."""
    args = train.parse_args([str(flag) for flag in flags])
    split = images(n)
    data = datasets.Data("random", "", (28, 28), split, split[:1], split[:1], None, None, None,
                         "dynamic")
    config = Config(args.model, args.prior, 784, args.hidden, args.z_dim, args.pseudo_inputs)
    model, average, optimizer, _ = train.start(args, config, data, torch.device("cpu"))
    return args, model, average, optimizer, data


def our_epoch(args, model, average, optimizer, data, epoch=1):
    train.train_epoch(epoch, args, model, average, optimizer, data, 1.0, lambda: None)


def weight_sizes(model):
    """{name: size} of the linear layers' matrices."""
    return {name: p.numel() for name, p in model.named_parameters()
            if p.ndim == 2 and not name.startswith("prior.")}


def step_flops(model, batch):
    """The matrix products' work in a training step: forward, and as much for each gradient."""
    c, sizes = model.config, weight_sizes(model)
    first = sum(size for name, size in sizes.items()
                if name in ("encoder.body.0.linear.weight", "q1_x.linear.weight"))
    flops = 2 * batch * (3 * sum(sizes.values()) - first)       # images need no gradient
    if c.prior == "vamp":
        encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
        flops += 3 * 2 * c.components * (encoder + batch * 2 * c.z_dim)
    return flops


def likelihood_flops(model, n, S):
    """The same for n images' likelihoods with S samples: x and u are encoded once."""
    c, sizes = model.config, weight_sizes(model)
    of_x = {name: size for name, size in sizes.items() if name.startswith(("encoder.", "q1_x."))}
    flops = 2 * n * S * (sum(sizes.values()) - sum(of_x.values())) + 2 * n * sum(of_x.values())
    if c.model == "hvae":       # the columns that meet the features of x do so once an image
        flops -= 2 * n * (S - 1) * sizes["q1_joint.linear.weight"] // 2
    if c.prior == "vamp":
        encoder = sum(size for name, size in of_x.items() if name.startswith("encoder."))
        flops += 2 * c.components * (encoder + n * S * 2 * c.z_dim)
    return flops


def step(quick):
    """Whole training steps, by train.py's own loop and recipe: images drawn, forward, backward,
    clipping, Adam, averaging of the weights; the plain form has standard Adam and no averaging."""
    recipe = train.parse_args([]).batch_size
    batches, size, steps, n = (10,), (8, 4, 12), 2, 2
    if not quick:
        batches, size, steps, n = sorted({100, 250, 500, recipe}), (300, 40, 500), 5, 7
    rows = []
    for model in ("vae", "hvae"):
        for prior in ("standard", "vamp"):
            for batch in batches:
                flags = ["--model", model, "--prior", prior, "--batch-size", batch, "--hidden",
                         size[0], "--z-dim", size[1], "--pseudo-inputs", size[2]]
                run = prepare(flags, steps * batch)
                plain, grey = PlainModel(run[1]), run[-1].train / 255
                adam = torch.optim.Adam(plain.parameters(), lr=run[0].lr / 10)
                times = compare(lambda: plain_epoch(plain, adam, grey, batch),
                                lambda: our_epoch(*run), n)
                expected = ["bound >= 85 %"] if batch == recipe else []
                expected += ["ratio >= 3"] if (prior, batch) == ("vamp", 100) else []
                rows.append(new_row(
                    "step", f"{NAMES[model]}, {NAMES[prior]} prior, batch {batch}", times,
                    (steps, steps), flops=step_flops(run[1], batch),
                    expected=", ".join(expected) or None))
    return rows


def log_mean_exp(values):
    """log mean exp, and its standard error by the delta method, both in nats: (N,) -> 2 floats."""
    mean = values.logsumexp(0) - math.log(len(values))
    return mean.item(), ((values - mean).exp().std() / math.sqrt(len(values))).item()


def likelihood(quick):
    """log p(x) by importance sampling, per image: ours takes two images and encodes u for these two
    alone. The error is the difference of the mean estimates, in nats, and checked to be chance."""
    S, size, n = (200, (8, 4, 12), 2) if quick else (5000, (300, 40, 500), 5)
    rows = []
    for model_name in ("vae", "hvae"):
        for prior in ("standard", "vamp"):
            model = prepare(["--model", model_name, "--prior", prior, "--hidden", size[0],
                             "--z-dim", size[1], "--pseudo-inputs", size[2]], size[2])[1]
            with torch.no_grad():       # first weights are so wide that no estimate would settle
                for name, p in model.named_parameters():
                    p.mul_(0.1 if "head" in name or "output" in name else 1)
            x, plain = (torch.rand(2, 784) < 0.2).float(), PlainModel(model)
            log_w, ours = [], []
            times = compare(lambda: log_w.append(plain_log_weights(plain, x[0], S)),
                            lambda: ours.append(log_likelihood(model, x, S)[0]), n)
            wanted, se = log_mean_exp(torch.cat(log_w).double())
            error = abs(log_mean_exp(torch.stack(ours))[0] - wanted)
            case = f"{NAMES[model_name]}, {NAMES[prior]} prior, one image, S = {S:,}"
            if error > 8 * se * math.sqrt(1 + len(log_w) / len(ours)):
                raise ValueError(f"likelihood, {case}: the forms differ by {error:.3g} nats, their "
                                 f"noise is {se:.1g}; one of them is wrong")
            expected = "ratio >= 12, bound >= 50 %" if prior == "vamp" else "bound >= 50 %"
            rows.append(new_row("likelihood", case, times, (1, 2), error=error, expected=expected,
                                flops=likelihood_flops(model, 2, S) / 2))
    return rows


def epochs(quick):
    """A long run of a small VAE + Vamp through train.py's loop: do denormal numbers slow it down?
    Never more than two minutes; the case says how many epochs it was."""
    count, n_images = (8, 100) if quick else (100, 2000)
    run = prepare(["--hidden", 100, "--pseudo-inputs", 100, "--batch-size", 50, "--epochs", count],
                  n_images)
    times = []
    while len(times) < count and (sum(times) < 120 or len(times) < 12):
        times.append(seconds(lambda: our_epoch(*run, epoch=len(times) + 1)))
    early, late = statistics.median(times[1:6]), times[-5:]
    case = (f"VAE, Vamp prior, hidden 100, K = 100: time of epochs {len(times) - 4}-{len(times)} "
            "over epochs 2-6")
    return [growth_row("epochs", case, [t / early for t in late], "ratio <= 1.1")
            | {"ours": statistics.median(late)}]


# ------------------------------------------------------------------------------------ the record


def machine():
    """Words on what this runs on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return {"processor": name, "cores": f"{os.cpu_count()} cores",
            "os": f"{platform.system()} {platform.release()}"}


def show_seconds(value):
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def print_table(title, rows):
    """Prints a section's rows, fixed-width; a dash is what was not run or has no meaning."""
    def show(row, key, form):
        return "-" if row[key] is None else form(row[key])

    width = max(len(row["case"]) for row in rows)
    print(f"\n{title:{width}}     plain      ours   ratio   (from - to)    n  bound"
          "  plain MB   our MB    error  expected")
    for row in rows:
        spread = "-" if row["ratio"] is None else f"{row['ratio_low']:.2f} - {row['ratio_high']:.2f}"
        print(f"{row['case']:{width}} {show(row, 'plain', show_seconds):>9} "
              f"{show(row, 'ours', show_seconds):>9} {show(row, 'ratio', '{:.2f}'.format):>7} "
              f"{spread:>13} {row['n']:>4} {show(row, 'bound_share', '{:.0%}'.format):>6} "
              f"{show(row, 'plain_peak_mb', '{:.0f}'.format):>9} "
              f"{show(row, 'peak_mb', '{:.0f}'.format):>8} "
              f"{show(row, 'error', '{:.1e}'.format):>8}  {row['expected'] or '-'}")
    sys.stdout.flush()


def run(sections, quick):
    """Times the sections and prints them: the record as a dict, in seconds, MB and nats."""
    rows, size = [], 256 if quick else 2048
    measured_gflops(size)       # the first products start the threads
    rates = [measured_gflops(size)]
    for name in sections:
        found = globals()[name](quick)
        rates.append(measured_gflops(size))
        for row in found:
            flops = row.pop("flops")
            if flops:
                row["bound_share"] = flops / 1e9 / max(rates[-2:]) / row["ours"]
        print_table(name, found)
        rows += found
    print(f"\n{max(rates):.0f} GFLOP/s in float32 products of size {size}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    return {"machine": machine(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"), "gflops": max(rates), "rows": rows}


def main(argv=None):
    torch.set_flush_denormal(True)      # as train.py and evaluate.py do, for both forms
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", metavar="FILE.json", help="where to write the record (default: nowhere)")
    p.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to time")
    p.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)   # see peak_mb
    args = p.parse_args(argv)
    try:
        if args.peak:
            form, task, B, K = args.peak
            print_peak(form, task, int(B), int(K))
            return 0
        if args.out and not os.access(os.path.dirname(args.out) or ".", os.W_OK):
            raise ValueError(f"{args.out} cannot be written; give --out in a folder that is there")
        torch.manual_seed(0)
        record = run(args.sections, args.quick)
        if args.out:
            write_atomic(args.out, json.dumps(record, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
