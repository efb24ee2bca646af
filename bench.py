"""Times each piece side by side with the plain form, as the field writes it, in one run.

    python bench.py --out bench.json                     # five to ten minutes on two cores
    python bench.py --sections step likelihood           # parts of it, printed only

Both forms share weights and take turns, after a warm-up, on random images: dense products cost the
same whatever they multiply. Medians; the ratio's range is that of neighbouring repeats. The bound
is the time in which the matrix products alone, counted by formula, would run at the rate of a large
float32 product, the better of two measurements before and after the section.
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

MEMORY, SECONDS = 4e9, 60       # a plain form that needs more for one call is left out
COPIES = {"forward": 2, "forward + backward": 7}    # (B, K, D) tensors that it holds at once
NAMES = {"vae": "VAE", "hvae": "HVAE", "standard": "standard", "vamp": "Vamp"}

# ------------------------------------------------------------------------------- the plain forms


def log_normal(x, mu, logvar):
    return (-0.5 * (LOG_2PI + logvar + (x - mu) ** 2 / torch.exp(logvar))).sum(-1)


def broadcast_log_mixture(z, mu, logvar):
    """log 1/K sum_k N(z; mu_k, exp(logvar_k)), nats, by way of (B, K, D): z (B, D) -> (B,)."""
    each = log_normal(z[:, None], mu[None], logvar[None])       # (B, K)
    return torch.logsumexp(each - math.log(len(mu)), dim=1)


class Pair(nn.Module):
    """Two separate linears with the weights of a layer of ours, which stacks them in one matrix."""

    def __init__(self, ours):
        super().__init__()
        n_out, n_in = ours.linear.weight.shape
        self.a, self.b = nn.Linear(n_in, n_out // 2), nn.Linear(n_in, n_out // 2)
        for i, one in enumerate((self.a, self.b)):
            one.load_state_dict({k: v.chunk(2)[i] for k, v in ours.linear.state_dict().items()})


class Gated(Pair):
    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.b(x))


class Head(Pair):
    def forward(self, h):
        return self.a(h), F.hardtanh(self.b(h), -6.0, 2.0)


def plain_net(ours):
    return nn.Sequential(*map(Gated, ours.body), Head(ours.head))


class PlainModel(nn.Module):
    """Our VAE or HVAE with the same weights in the plain form.

    Kinder than the authors' code in one point: u is a parameter, not a product with the identity.
    """

    def __init__(self, ours):
        super().__init__()
        self.encoder, self.output = plain_net(ours.encoder), nn.Linear(*ours.output.weight.T.shape)
        self.output.load_state_dict(ours.output.state_dict())
        self.two = ours.config.model == "hvae"
        if self.two:
            for name in ("q1_x", "q1_z2", "q1_joint", "px_z1", "px_z2", "px_joint"):
                setattr(self, name, Gated(getattr(ours, name)))
            self.q1_head, self.p1 = Head(ours.q1_head), plain_net(ours.p1)
        else:
            self.decoder = nn.Sequential(*map(Gated, ours.decoder))
        self.u = None
        if ours.config.prior == "vamp":
            self.u = nn.Parameter(ours.prior.u.detach().clone())

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
    """One pass over grey images (N, 784) in [0, 1], drawn afresh; the sum of the losses."""
    total = 0.0
    for index in torch.randperm(len(grey)).split(batch):
        recon, kl = model.terms(torch.bernoulli(grey[index]))
        loss = (kl - recon).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


@torch.no_grad()
def plain_log_weights(model, x, S):
    """log p(x, z) - log q(z | x) of an image (784,): (S,), by 100 at a time, each encoded anew."""
    chunks = [model.terms(x.repeat(100, 1)) for _ in range(0, S, 100)]
    return torch.cat([recon - kl for recon, kl in chunks])


# ------------------------------------------------------------------------------------- measuring


def seconds(form, calls=1):
    """Seconds of one call, the mean of several."""
    began = time.perf_counter()
    for _ in range(calls):
        form()
    return (time.perf_counter() - began) / calls


def measured_gflops(size, repeats=6):
    """GFLOP/s of the best of several (size, size) float32 products."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def compare(plain, ours, n):
    """Seconds per call, n times each in turn: {"plain": [n], or [] without it, "ours": [n]}."""
    forms, calls, times = {"plain": plain, "ours": ours}, {}, {"plain": [], "ours": []}
    for name, form in forms.items():
        once = seconds(form) if form else math.inf      # the warm-up: threads, memory, moments
        if name == "ours" or once <= SECONDS:
            once = seconds(form) if once < 2 else once
            calls[name] = max(1, min(200, int(0.05 / once)))    # what is short is timed in bunches
    for _ in range(n):
        for name, count in calls.items():
            times[name].append(seconds(forms[name], count))
    return times


def new_row(section, case, times, per=(1, 1), **more):
    """A row as the JSON holds it; `per`: steps or images in one call of plain and of ours.

    `flops`, the matrix products' work in what `ours` times, becomes a share of the bound in `run`.
    """
    plain, ours = ([t / count for t in times[name]] for name, count in zip(("plain", "ours"), per))
    ratios = [p / o for p, o in zip(plain, ours)]
    row = dict.fromkeys("section case plain ours ratio ratio_low ratio_high n bound_share peak_mb "
                        "plain_peak_mb error expected flops".split())
    row |= {"section": section, "case": case, "ours": statistics.median(ours), "n": len(ours)}
    if plain:
        row |= {"plain": statistics.median(plain), "ratio_low": min(ratios),
                "ratio_high": max(ratios), "ratio": statistics.median(plain) / row["ours"]}
    print(f"  {section}: {case}", file=sys.stderr, flush=True)
    return row | more


def growth_row(section, case, growth, **more):
    """A row that compares ours with ours: its ratio is a growth, not a gain."""
    return new_row(section, case, {"plain": [], "ours": growth}) | {
        "ours": None, "ratio": statistics.median(growth), "ratio_low": min(growth),
        "ratio_high": max(growth), **more}


def peak_mb(form, task, B, K):
    """MB that one call needs beyond its inputs, in a process of its own; None where unknown."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    command = [sys.executable, __file__, "--peak", form, task, str(B), str(K)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command[2:])} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def own_peak_mb(form, task, B, K):
    """The same of this process: its largest size in the call, less its size before it."""
    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    mixture_call(form, task, *mixture_inputs(10, 10))()     # loads libraries, starts threads
    call = mixture_call(form, task, *mixture_inputs(B, K))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")         # resets the maximum; getrusage's would be the parent's
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


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
    """The log density of a mixture. Ours has float64 products; the bound is the float32 rate."""
    B_all, K_all, n = ((20,), (30, 300), 2) if quick else ((100, 500, 5000), (500, 5000, 50000), 5)
    sizes = [(B, K) for K in K_all for B in B_all] + ([] if quick else [(1000, K_all[-1])])
    memory = min(MEMORY, datasets.available_memory() / 2)
    rows, ours = [], {}
    for task in COPIES:
        for B, K in sizes:
            z, mu, logvar = inputs = mixture_inputs(B, K)
            more = {"flops": 2 * B * K * 2 * mu.shape[1] * (1 if task == "forward" else 3)}
            if task == "forward":       # the error of ten rows: float64 by broadcasting is slow
                exact = [broadcast_log_mixture(one[None].double(), mu.double(), logvar.double())
                         for one in z[:10]]
                gap = log_mixture(z, mu, logvar)[:10].double() - torch.cat(exact)
                more["error"] = gap.abs().max().item()
            fits = COPIES[task] * 4 * B * mu.numel() <= memory
            times = compare(mixture_call("plain", task, *inputs) if fits else None,
                            mixture_call("ours", task, *inputs), n)
            if not quick or (task, K) == ("forward + backward", K_all[-1]):
                more["peak_mb"] = peak_mb("ours", task, B, K)
                more["plain_peak_mb"] = peak_mb("plain", task, B, K) if times["plain"] else None
            more["expected"] = ("ratio >= 10" if B >= 500 and K == 500 else
                                "peak < 1000 MB" if (B, K) == (1000, 50000) else None)
            rows.append(new_row("mixture", f"{task}, B = {B}, K = {K:,}", times, **more))
            ours[B, K] = times["ours"]
        for B in B_all:
            low, high = K_all[-2:]
            growth = [b / high / (a / low) for a, b in zip(ours[B, low], ours[B, high])]
            rows.append(growth_row("mixture", f"{task}, B = {B}, time per component: K = {high:,} "
                                   f"over {low:,}", growth, expected="ratio about 1"))
    return rows


def prepare(model, prior, n, *flags, quick=False):
    """What train.py makes of these flags and n random images: (args, model, average, optimizer,
    data). The images have a black frame as MNIST's: pixels whose weights get no gradient."""
    small = "--hidden 8 --z-dim 4 --pseudo-inputs 12".split() if quick else []
    args = train.parse_args(["--model", model, "--prior", prior, *map(str, flags), *small])
    x = torch.zeros(n, 28, 28, dtype=torch.uint8)
    x[:, 4:24, 4:24].random_(0, 256, generator=torch.Generator().manual_seed(0))
    x = x.flatten(1)
    data = datasets.Data("random", "", (28, 28), x, x[:1], x[:1], None, None, None, "dynamic")
    config = Config(args.model, args.prior, 784, args.hidden, args.z_dim, args.pseudo_inputs)
    return args, *train.start(args, config, data, torch.device("cpu"))[:3], data


def our_epoch(args, model, average, optimizer, data, epoch=1):
    train.train_epoch(epoch, args, model, average, optimizer, data, 1.0, lambda: None)


def weight_sizes(model, *prefixes):
    """Sizes of the linear layers' matrices, summed over the names that begin so."""
    return sum(p.numel() for name, p in model.named_parameters()
               if p.ndim == 2 and not name.startswith("prior.") and name.startswith(prefixes or ""))


def step_flops(model, batch):
    """The matrix products' work in a step: forward, and as much for either gradient."""
    c, first = model.config, weight_sizes(model, "encoder.body.0.", "q1_x.")
    flops = 2 * batch * (3 * weight_sizes(model) - first)       # images need no gradient
    if c.prior == "vamp":
        flops += 3 * 2 * c.components * (weight_sizes(model, "encoder.") + batch * 2 * c.z_dim)
    return flops


def likelihood_flops(model, n, S):
    """The matrix products' work for the likelihoods of n images: x and u are encoded once."""
    c, of_x = model.config, weight_sizes(model, "encoder.", "q1_x.")
    # the half of q1_joint that meets the features of x does so once an image
    of_x += weight_sizes(model, "q1_joint.") // 2
    flops = 2 * n * (S * (weight_sizes(model) - of_x) + of_x)
    if c.prior == "vamp":
        flops += 2 * c.components * (weight_sizes(model, "encoder.") + n * S * 2 * c.z_dim)
    return flops


def step(quick):
    """Whole training steps by train.py's own loop and recipe: images drawn, forward, backward,
    clipping, Adam, weights averaged. The plain form has standard Adam, no clipping, no average."""
    recipe = train.parse_args([]).batch_size
    batches, steps, n = ((10,), 2, 2) if quick else (sorted({100, 250, 500, recipe}), 5, 7)
    rows = []
    for model, prior, batch in ((m, p, b) for m in ("vae", "hvae") for p in ("standard", "vamp")
                                for b in batches):
        ours = prepare(model, prior, steps * batch, "--batch-size", batch, quick=quick)
        plain, grey = PlainModel(ours[1]), ours[-1].train / 255
        adam = torch.optim.Adam(plain.parameters(), lr=1e-4)
        times = compare(lambda: plain_epoch(plain, adam, grey, batch), lambda: our_epoch(*ours), n)
        expected = ["bound >= 85 %"] * (batch == recipe) + ["ratio >= 3"] * (
            (prior, batch) == ("vamp", 100))
        rows.append(new_row("step", f"{NAMES[model]}, {NAMES[prior]} prior, batch {batch}", times,
                            (steps, steps), flops=step_flops(ours[1], batch),
                            expected=", ".join(expected) or None))
    return rows


def log_mean_exp(values):
    """log mean exp, and its standard error by the delta method, in nats: (N,) -> two floats."""
    mean = values.logsumexp(0) - math.log(len(values))
    return mean.item(), (values - mean).exp().std().item() / math.sqrt(len(values))


def likelihood(quick):
    """log p(x) by importance sampling, per image: ours takes two images a thread and encodes u for
    these alone. The error is the difference of the mean estimates, in nats, and checked to be chance."""
    S, n, rows = 200 if quick else 5000, 2 if quick else 5, []
    images = 2 * torch.get_num_threads()
    for name, prior in ((m, p) for m in ("vae", "hvae") for p in ("standard", "vamp")):
        model = prepare(name, prior, 500, quick=quick)[1]
        with torch.no_grad():       # first weights are so wide that no estimate would settle
            for key, p in model.named_parameters():
                p.mul_(0.1 if "head" in key or "output" in key else 1)
        x, plain = (torch.rand(images, 784) < 0.2).float(), PlainModel(model)
        log_w, ours = [], []
        times = compare(lambda: log_w.append(plain_log_weights(plain, x[0], S)),
                        lambda: ours.append(log_likelihood(model, x, S)[0]), n)
        wanted, se = log_mean_exp(torch.cat(log_w).double())
        error = abs(log_mean_exp(torch.stack(ours))[0] - wanted)
        case = f"{NAMES[name]}, {NAMES[prior]} prior, one image, S = {S:,}"
        if error > 8 * se * math.sqrt(1 + len(log_w) / len(ours)):
            raise ValueError(f"likelihood, {case}: the forms differ by {error:.3g} nats, their "
                             f"noise is {se:.1g}; one of them is wrong")
        rows.append(new_row("likelihood", case, times, (1, images), error=error,
                            flops=likelihood_flops(model, images, S) / images,
                            expected="ratio >= 12, " * (prior == "vamp") + "bound >= 50 %"))
    return rows


def epochs(quick):
    """A long run of a small model by train.py's loop: do denormal numbers slow it down?
    It ends after two minutes; the case says how many epochs it was."""
    count, n = (8, 100) if quick else (100, 2000)
    run, times = prepare("vae", "vamp", n, "--hidden", 100, "--pseudo-inputs", 100,
                         "--batch-size", 50, "--epochs", count), []
    while len(times) < count and (sum(times) < 120 or len(times) < 12):
        times.append(seconds(lambda: our_epoch(*run, epoch=len(times) + 1)))
    early, last = statistics.median(times[1:6]), len(times)
    return [growth_row("epochs", f"VAE, Vamp prior, hidden 100, K = 100, time of an epoch: "
                       f"{last - 4}-{last} over 2-6", [t / early for t in times[-5:]],
                       ours=statistics.median(times[-5:]), expected="ratio <= 1.1")]


SECTIONS = {"mixture": mixture, "step": step, "likelihood": likelihood, "epochs": epochs}

# ------------------------------------------------------------------------------------ the record


def machine():
    """Words on what this runs on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file
                         if line.startswith("model name")), name)
    return {"processor": name, "cores": f"{os.cpu_count()} cores",
            "os": f"{platform.system()} {platform.release()}"}


def print_table(name, rows):
    """Prints a section's rows, fixed-width; a dash is what was not run or has no meaning."""
    time_form = "{:.3g} s".format if rows[0]["section"] == "epochs" else (
        lambda t: f"{t * 1e3:.4g} ms")
    forms = {"case": str, "plain": time_form, "ours": time_form, "ratio": "{:.2f}".format,
             "ratio_low": "{:.2f}".format, "ratio_high": "{:.2f}".format, "n": str,
             "bound_share": "{:.0%}".format, "plain_peak_mb": "{:.0f}".format,
             "peak_mb": "{:.0f}".format, "error": "{:.0e}".format, "expected": str}
    used = {key: form for key, form in forms.items() if any(row[key] is not None for row in rows)}
    cells = [list(used)] + [["-" if row[k] is None else form(row[k]) for k, form in used.items()]
                            for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{name}")
    for first, *others in cells:
        print(first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:])), sep="  ")
    sys.stdout.flush()


def run(sections, quick):
    """Times the sections and prints them: the record as a dict, in seconds, MB and nats."""
    rows, size = [], 256 if quick else 2048
    rates = [measured_gflops(size)]
    for name in sections:
        found = SECTIONS[name](quick)
        rates.append(measured_gflops(size))
        for row in found:
            if flops := row.pop("flops"):
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
    p.add_argument("--out", metavar="FILE.json", help="where the record goes, besides the terminal")
    p.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS),
                   help="what to time")
    p.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)   # see peak_mb
    args = p.parse_args(argv)
    try:
        if args.peak:
            form, task, B, K = args.peak
            print(own_peak_mb(form, task, int(B), int(K)))
            return 0
        # before ten minutes of work, not after
        if args.out and not os.access(os.path.dirname(args.out) or ".", os.W_OK):
            raise ValueError(f"{args.out} cannot be written; give --out in a folder that can")
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
