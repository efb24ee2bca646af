"""Train a VAE or HVAE and keep its best weights by the validation ELBO.

    python train.py --prior vamp                    # the recipe of the README, in results/<time>/vamp
    python train.py --prior vamp --out DIR --resume # start, or go on where DIR stopped
    torchrun --standalone --nproc-per-node 2 train.py --out DIR     # shared out: see parallel.py

Writes to the run folder: config.json, log.csv (a row per epoch), last.pt (to resume) and, at the
end, model.pt. All randomness of an epoch follows from (seed, epoch) and, of several processes,
from the process's rank, so that a resumed run ends with the same bits as one that was never stopped.
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before torch, whose import takes seconds

import argparse
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch

import data as datasets
import parallel
from models import (DEVICES, LIKELIHOODS, MODELS, PRECISIONS, PRIORS, Config, build,
                    constant_parameters, pick_device)

COLUMNS = ("epoch beta lr train_elbo train_recon train_kl val_elbo val_recon val_kl train_kl1 "
           "train_kl2 val_kl1 val_kl2 clipped grad_norm seconds").split()
# settings that may change on resuming: where things are, not what is trained
WHERE = ("out", "resume", "data_dir", "device", "strict_data", "recipe", "dataset", "name",
         "processes")
FILMED = 16         # pseudo-inputs whose course over the epochs is kept for a figure
# what older runs, which do not record it, have
OLDER = {"likelihood": "bernoulli", "processes": 1}


class Diverged(Exception):
    """The loss is not finite, or far worse than that of the mean image."""


# ------------------------------------------------------------------------------------ arguments

# What these flags are when they are not given. Data sets of fewer than SMALL training images take
# the second line: few images make few batches, and overfit soon. Fewer than TINY take the third, of
# more epochs, as theirs have few steps. Fashion-MNIST in black and white has a line of its own: with the
# first line's rate the HVAE blew up on it now and then.
RECIPE_FLAGS = "epochs batch_size lr warmup ema weight_decay pseudo_inputs".split()
FEW = {"small": (40, 100, 3e-3, 10, 0.998, 0.5, 500), "tiny": (100, 100, 3e-3, 10, 0.998, 0.5, 500)}
RECIPES = {
    "default": {"large": (340, 1000, 1.2e-2, 20, 0.996, 0.08, 500), **FEW,
                "fashion": (340, 1000, 6e-3, 20, 0.996, 0.15, 500)},
    "long": {"large": (420, 1000, 1.2e-2, 30, 0.996, 0.07, 500), **FEW,
             "fashion": (420, 1000, 6e-3, 30, 0.996, 0.14, 500)},
    "quick": {"large": (2, 100, 3e-3, 1, 0.996, 0.08, 50),
              "small": (2, 100, 3e-3, 1, 0.998, 0.5, 50),
              "tiny": (2, 100, 3e-3, 1, 0.998, 0.5, 50)},
}
SMALL, TINY = 10_000, 3_000
CPUINFO = Path("/proc/cpuinfo")     # Linux alone has it; elsewhere auto is float32


def parse_args(argv=None):
    """The flags. Those of RECIPE_FLAGS are missing when they are not given: see `settle`."""
    p = files.Parser(__doc__.split("\n")[0])
    count, size = files.number(int, 1, 10**7), files.number(float, 0, 10**9)
    group = p.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, default="vae", help="one or two latent layers")
    group.add_argument("--prior", choices=PRIORS, default="vamp", help="prior of the top layer")
    group.add_argument("--learned-weights", action="store_true",
                       help="learn the mixture's weights; otherwise 1/K each")
    group.add_argument("--likelihood", choices=LIKELIHOODS, help=(
        "of the pixels. bernoulli: black and white ones. logistic: 256 grey levels, also per colour "
        "channel. gaussian: a density of floats in [0, 1] (default: bernoulli; for grey data there "
        "is none)"))
    group.add_argument("--hidden", type=count, default=300, help="units of a hidden layer")
    group.add_argument("--z-dim", type=count, default=40, help="size of each latent layer")
    group = p.add_argument_group("optimisation")
    group.add_argument("--recipe", choices=RECIPES, default="default",
                       help="values of the flags that are not given; other ones for fewer than "
                            f"{SMALL:,} or {TINY:,} training images and, in default and long, for "
                            "Fashion-MNIST in black and white")

    def by_recipe(flag, kind, text, **more):
        column = RECIPE_FLAGS.index(flag[2:].replace("-", "_"))
        large, small, tiny, _ = (values[column] for values in RECIPES["default"].values())
        more["help"] = f"{text} (default: the recipe's, {large}; {small} for small data sets" + (
            f", {tiny} for tiny ones)" if tiny != small else ")")
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, **more)

    by_recipe("--pseudo-inputs", count, "components of the vamp or mog prior", metavar="K")
    by_recipe("--epochs", count, "epochs of the whole schedule")
    by_recipe("--batch-size", count, "images per step")
    by_recipe("--lr", size, "AdamW's highest learning rate")
    by_recipe("--warmup", files.number(int, 0, 10**7), "epochs over which beta, the KL's weight, rises "
              "to 1; half of all at most, where not given")
    by_recipe("--ema", files.number(float, 0, 0.99999),
              "decay per step of the averaged weights, which are kept; 0: none")
    by_recipe("--weight-decay", size, "a step shrinks weight matrices by lr x W (AdamW); not biases, "
              "not pseudo-inputs", metavar="W")
    group.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear",
                       help="course of the learning rate after an epoch of rising: falling to 0, or constant")
    group.add_argument("--full-gradient", action="store_true",
                       help="keep the encoder's score, of mean zero, in the KL's gradient")
    group.add_argument("--clip", type=size, default=50.0, help="largest gradient norm; 0: any")
    group.add_argument("--patience", type=count, default=50,
                       help="epochs at beta = 1 without a better validation ELBO before stopping")
    group.add_argument("--seed", type=files.number(int, 0, 2**31), default=0,
                       help="seed of the first weights and of all noise in training")
    datasets.add_arguments(p)
    group = p.add_argument_group("run")
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto takes cuda, then cpu")
    group.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                       help="of training's matrix products; densities, weights and validation stay "
                            "float32 at least. auto takes bfloat16 where the hardware has it, and on "
                            "resuming what the run has")
    group.add_argument("--out", help="run folder (default: results/<time>/<name of the model>)")
    group.add_argument("--resume", action="store_true",
                       help="go on from last.pt in --out if it is there, else start")
    args = p.parse_args(argv)
    if files.launched() and not args.out:
        p.error("processes that torchrun starts need --out, the run folder that they share")
    if args.resume and not args.out:
        p.error("--resume needs --out, the run folder to go on with")
    name = {"standard": args.model}.get(args.prior, args.model[:-3] + args.prior)
    args.out = args.out or time.strftime(f"results/%Y%m%d-%H%M%S/{name}")
    return args


def settle(args, train_images, name=None):
    """(args, recipe): the flags with the recipe's values where they were not given, and a record of
    what came from where."""
    size = "tiny" if train_images < TINY else "small" if train_images < SMALL else "large"
    if name in RECIPES[args.recipe] and args.likelihood == "bernoulli":
        size = name
    values = dict(zip(RECIPE_FLAGS, RECIPES[args.recipe][size]))
    # of a run made shorter, half may rise at most, or no epoch would have the whole KL
    values["warmup"] = min(values["warmup"], getattr(args, "epochs", values["epochs"]) // 2)
    changed = {flag: value for flag, value in vars(args).items()
               if flag in values and value != values[flag]}
    return (argparse.Namespace(**(values | vars(args))),
            {"name": args.recipe, "size": size, "values": values, "changed": changed})


def settle_likelihood(args):
    """Fills in --binarize where it was not given; ValueError if it contradicts --likelihood."""
    grey = args.likelihood in ("logistic", "gaussian")
    args.binarize = args.binarize or ("none" if grey else "dynamic")
    if grey and args.binarize != "none":
        raise ValueError(f"--likelihood {args.likelihood} needs grey pixels, which --binarize "
                         f"{args.binarize} removes; use --binarize none")


def check_likelihood(name, data):
    """The likelihood's name, of those that suit the data's pixels. ValueError if `name` is none."""
    if data.binarize != "none":
        return "bernoulli"
    if datasets.is_black_and_white(data.train):
        if name in ("logistic", "gaussian"):
            raise ValueError(f"{data.name} is black and white: --likelihood {name} is for grey "
                             "pixels; use bernoulli")
        return "bernoulli"
    if name is None:
        raise ValueError(f"{data.name} with --binarize none is grey: choose --likelihood logistic "
                         "(256 levels) or gaussian (continuous); or --binarize dynamic")
    if name == "logistic" and data.train.dtype != torch.uint8:
        raise ValueError(f"{data.name} has values that are no multiple of 1/255: --likelihood "
                         "logistic needs 256 levels; use gaussian, or save it as uint8")
    if name == "bernoulli" and files.speaks():
        print(f"note: {datasets.note_of(data, name)}", file=sys.stderr)
    return name


def has_bfloat16(device):
    """Whether the hardware itself multiplies bfloat16: AVX512-BF16, AMX, Armv8.6; GPUs from Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    words = CPUINFO.read_text().split() if CPUINFO.exists() else ()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def pick_precision(name, device, out):
    """One of PRECISIONS: for auto that of the run in the folder `out`, else the hardware's."""
    if name == "auto" and (out / "config.json").exists():
        args = files.read_json(out / "config.json", ["args"])["args"]
        if isinstance(args, dict):      # else compare_settings will say that it is damaged
            name = args.get("precision", "float32")
    return ("bfloat16" if has_bfloat16(device) else "float32") if name == "auto" else name


# ---------------------------------------------------------------------------------- run folder


def open_run(out, settings, resume):
    """Owns the folder: creates it, locks it until the process ends, and compares config.json.

    Returns the lock's file. ValueError when another process holds it, when it holds a run and
    `resume` is off, or when its settings differ.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(f"{out} is in use by {lock.read().strip() or 'another process'}; wait for "
                         "it or give another --out") from None
    except OSError as error:        # some network file systems
        raise ValueError(f"{out} cannot be locked ({error.strerror}); give an --out on another disk"
                         ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    path = out / "config.json"
    if path.exists() or (out / "last.pt").exists():
        if not resume:
            raise ValueError(f"{out} holds a run already; add --resume to go on, or give another --out")
        compare_settings(path, settings)
    if not (out / "model.pt").exists():     # a finished run stays what made it
        files.write_atomic(path, json.dumps(settings, indent=2) + "\n")
    return lock


def compare_settings(path, settings):
    """ValueError unless config.json at `path` defines the same run, field by field."""
    found = files.read_json(path, settings)
    for part in ("data", "args", "model"):
        here, there = settings[part], found[part]
        if not isinstance(there, dict):
            raise ValueError(f"{path} is damaged; give another --out, or delete the folder")
        if part == "data" and here["sha256"] != there.get("sha256"):
            raise ValueError(f"{path} is of a run on other images ({there.get('name')}) than these "
                             f"({here['name']}); use the same data, or give another --out")
        for name in sorted(here.keys() | there.keys()):
            there.setdefault(name, OLDER.get(name))
            if here.get(name) != there[name] and name not in WHERE:
                raise ValueError(f"{path} has {name} = {there.get(name)!r}, this call "
                                 f"{here.get(name)!r}; use the same settings, or give another --out")
    before, now = (part["args"]["processes"] for part in (found, settings))
    if before != now and not (path.parent / "model.pt").exists():
        print(f"note: {path.parent} had processes: {before}, now it has {now}; it goes on, with other "
              "bits than an unbroken run", file=sys.stderr)


def write_log(path, history):
    """Writes log.csv whole, so that it can hold no half row and no row twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(history)
    files.write_atomic(path, text.getvalue())


# ----------------------------------------------------------------------------------------- a run


@dataclasses.dataclass
class Run:
    """What training changes. last.pt keeps all of it."""
    model: torch.nn.Module
    average: torch.nn.Module        # mean of the model's weights over its last steps: what is kept
    optimizer: torch.optim.Optimizer
    epoch: int = 0                  # epochs done
    history: list = dataclasses.field(default_factory=list)     # rows of log.csv
    best: dict = dataclasses.field(default_factory=dict)        # the average's weights at its best
    best_epoch: int = 0
    best_elbo: float = -math.inf
    film: dict = dataclasses.field(default_factory=dict)        # epoch: some pseudo-inputs, uint8

    def progress(self):
        """What a resumed run needs besides weights and moments."""
        return {name: getattr(self, name) for name in
                ("epoch", "history", "best", "best_epoch", "best_elbo", "film")}

    def save(self, path):
        files.save(path, self.progress() | {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimizer": [self.optimizer.state[p] for p in self.model.parameters()]})

    def shoot(self, last):
        """Keeps a frame of the film at epochs 0, 1, 2, 5, 10, 20, 50, ... and the schedule's last."""
        if self.model.config.prior == "vamp" and (
                self.epoch in (0, last) or str(self.epoch).rstrip("0") in ("1", "2", "5")):
            u = self.average.prior.pseudo_inputs()[:FILMED].detach()
            self.film[self.epoch] = (255 * u).round().to(torch.uint8).cpu()

    def restore(self, path, device):
        """Goes back to the end of the epoch that last.pt holds. ValueError if it does not fit."""
        content = files.load(path, device)
        try:
            files.load_state(self.model, content["model"])
            files.load_state(self.average, content["average"])
            for p, saved in zip(self.model.parameters(), content["optimizer"], strict=True):
                if list(saved) != ["step", "exp_avg", "exp_avg_sq"] or any(
                        saved[name].shape != p.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("its optimiser's state is another model's")
                self.optimizer.state[p] = {k: v.clone() for k, v in saved.items()}
            for name in self.progress():
                setattr(self, name, content[name])
            if self.best:
                with torch.device("meta"):
                    files.load_state(build(self.model.config), self.best)
            if not self.epoch == len(self.history) or not all(
                    isinstance(row, dict) and row.keys() <= set(COLUMNS) for row in self.history):
                raise ValueError("its history does not fit its epoch")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold this run: {files.one_line(error)}; delete it to "
                             "start again") from None


def start(args, config, data, device):
    """A Run before its first epoch."""
    torch.manual_seed(args.seed)        # the first weights are drawn by torch's own generator
    pick = torch.randperm(len(data.train))[:config.components]
    u = None
    if config.prior == "vamp":          # training images as a batch has them, repeated if few
        u = data.batch(pick.repeat(-(-config.components // len(pick)))
                       [:config.components].to(device)).cpu()
        u[len(pick):] += 0.01 * torch.randn_like(u[len(pick):])     # equal ones would stay equal
    model = build(config, u)
    model.set_output_bias(*(part.cpu() for part in mean_and_spread(data.train)))
    model.to(device)
    if config.prior == "vamp" and parallel.size() > 1:
        model.prior.encode_all = parallel.encode
    average = build(config).to(device)
    average.load_state_dict(model.state_dict())
    groups = {True: [], False: []}
    for p in model.parameters():
        decays = p.ndim > 1 and all(p is not own for own in model.prior.parameters())
        groups[decays].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": args.weight_decay},
         {"params": groups[False], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.99), fused=True)
    return Run(model, average, optimizer)


def mean_and_spread(x):
    """Mean and standard deviation of the pixels, each (D,), over a split, in blocks, so that a large
    one is never all floats."""
    def mean_of(function):
        return sum(function(datasets.pixels(part)).sum(0, dtype=torch.float64)
                   for part in x.split(10_000)).div(len(x))
    mean = mean_of(lambda part: part).float()
    return mean, mean_of(lambda part: (part - mean).square()).sqrt().float()


def mean_image_elbo(data, likelihood="bernoulli"):
    """Validation log-likelihood of independent pixels with the training images' mean and spread.
    A model far below it has failed."""
    parameters = constant_parameters(likelihood, *mean_and_spread(data.train))
    log_prob = LIKELIHOODS[likelihood][0]
    return sum(log_prob(datasets.pixels(part), parameters).sum().item()
               for part in data.val.split(1000)) / len(data.val)


# --------------------------------------------------------------------------------------- epochs


def lr_factor(schedule, progress, rise):
    """The learning rate as a share of the highest; progress and rise as shares of all steps."""
    if progress < rise:
        return progress / rise
    progress = (progress - rise) / (1 - rise)
    return {"linear": 1 - progress, "constant": 1.0,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}[schedule]


def columns(split, sums, count):
    """log.csv's columns of a split from its terms' sums: means, nats per image."""
    means = {name: value / count for name, value in sums.items()}
    means["elbo"] = means["recon"] - means["kl"]
    return {f"{split}_{name}": value for name, value in means.items()}


@torch.no_grad()
def validate(model, x, seed, batch=1000):
    """The val_ columns over x at beta = 1, one sample each, with noise fixed by seed and place."""
    generator = torch.Generator(x.device)
    sums, prior = {}, model.prior.frozen()
    for i, part in enumerate(x.split(batch)):
        if i % parallel.size() != parallel.rank():
            continue
        generator.manual_seed(seed + i * 1_000_003)
        part = datasets.pixels(part)
        terms = model.terms(part, generator=generator, inferred=model.infer(part), prior=prior)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.double().sum().item()
    return columns("val", parallel.total(sums), len(x))


def move(run, args, step):
    """Clips the gradients, steps, keeps pseudo-inputs in bounds and averages the weights; `step` is
    how many came before. Returns the gradients' norm, a float; where it is not finite, nothing has moved."""
    parameters = list(run.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf).item()
    if math.isfinite(norm):
        run.optimizer.step()
        run.model.prior.project_()
        with torch.no_grad():       # early on, an average of few steps; later args.ema
            weight = 1 - min(args.ema, (1 + step) / (10 + step)) if args.ema else 1.0
            torch._foreach_lerp_(list(run.average.parameters()), parameters, weight)
    return norm


def train_epoch(run, args, data, tick=lambda: None):
    """One pass over the training set, the epoch after run.epoch: log.csv's columns of it.

    `tick` is called after each step.
    """
    epoch, model = run.epoch + 1, run.model
    beta = min(1.0, epoch / args.warmup) if args.warmup else 1.0
    generator = torch.Generator(data.train.device).manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.train), generator=generator, device=data.train.device)
    if parallel.size() > 1:     # the order is that of all, the noise each process's own
        seeds = torch.randint(2**32, (parallel.size(),), generator=generator, device=order.device)
        generator.manual_seed(seeds[parallel.rank()].item())
    parameters, batches = list(model.parameters()), order.split(args.batch_size)
    sums, norms = {}, 0.0
    for step, index in enumerate(batches):
        # the last step stops half a step short of the end, where a rate of 0 would waste it
        now = min(epoch - 1 + (step + 1) / len(batches), args.epochs - 0.5 / len(batches))
        lr = args.lr * lr_factor(args.schedule, now / args.epochs,
                                 min(1, args.epochs / 2) / args.epochs)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(data.train.device.type, torch.bfloat16, args.precision == "bfloat16"):
            terms = model.terms(data.batch(parallel.share(index), generator), generator=generator,
                                path_gradient=not args.full_gradient)
        loss = (beta * terms["kl"] - terms["recon"]).sum() / len(index)
        run.optimizer.zero_grad()
        loss.backward()
        loss = parallel.sum_gradients(parameters, loss)
        norm = move(run, args, (epoch - 1) * len(batches) + step) if loss.isfinite() else math.nan
        if not math.isfinite(norm):
            raise Diverged(f"the loss or its gradient is not finite in epoch {epoch}, step {step + 1}")
        norms += norm
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().double().sum().item()
        tick()
    return {"beta": beta, "lr": lr, "grad_norm": norms / len(batches),
            "clipped": model.prior.clipped(),
            **columns("train", parallel.total(sums), len(order))}


def fit(run, args, data, out):
    """Trains to the end of the schedule or of the patience; last.pt and log.csv follow each epoch."""
    likelihood = run.model.config.likelihood
    level, bits = mean_image_elbo(data, likelihood), 1 if likelihood == "bernoulli" else 8
    # the level of a density may be positive; first epochs cost a nat per bit of a pixel, or less
    floor = level - abs(level) - bits * data.train.shape[1]
    steps = -(-len(data.train) // args.batch_size)
    if not run.epoch:
        run.shoot(args.epochs)
    bar = files.Line(out.name).bar(args.epochs * steps, "training", initial=run.epoch * steps,
                                   disable=parallel.rank() > 0)
    with bar:
        while run.epoch < args.epochs and (
                not run.best or run.epoch - run.best_epoch < args.patience):
            began = time.perf_counter()
            row = {"epoch": run.epoch + 1, **train_epoch(run, args, data, bar.update)}
            row |= validate(run.average, data.val, args.seed)
            if not row["val_elbo"] > floor:
                raise Diverged(f"the validation ELBO is {row['val_elbo']:.1f} after epoch "
                               f"{row['epoch']}, far below that of the mean image")
            run.epoch = row["epoch"]
            if row["beta"] == 1 and row["val_elbo"] > run.best_elbo:
                run.best_elbo, run.best_epoch = row["val_elbo"], run.epoch
                run.best = {k: v.clone() for k, v in run.average.state_dict().items()}
            row["seconds"] = time.perf_counter() - began
            run.history.append(row)
            run.shoot(args.epochs)
            if parallel.rank() == 0:
                run.save(out / "last.pt")
                write_log(out / "log.csv", run.history)
            bar.set_postfix_str(f"epoch {run.epoch}/{args.epochs}, val ELBO {row['val_elbo']:.2f}",
                                refresh=False)
    if parallel.rank() == 0:
        write_log(out / "log.csv", run.history)
    if not run.best:        # shorter than the warm-up: the last weights are all there is
        run.best, run.best_epoch = run.average.state_dict(), run.epoch


def load(args):
    """(data, device), and the flags that the data settle. Process 0 loads first: it alone downloads,
    and the others take the set that it took."""
    def load_here(name, strict):
        device = pick_device(args.device)
        settle_likelihood(args)
        data = datasets.load(name, args.data_dir, args.binarize, args.split_seed, strict, device)
        args.likelihood = check_likelihood(args.likelihood, data)
        return data, device

    def follow():
        found = load_here(name, True)
        if found[0].sha256 != sha256:
            raise ValueError(f"{name} holds other images here than at process 0")
        return found
    found = parallel.together(
        lambda: parallel.rank() == 0 and load_here(args.dataset, args.strict_data))
    name, sha256 = parallel.gather(found and (found[0].name, found[0].sha256))[0]
    return parallel.together(lambda: found or follow())


def train(args):
    """The whole run: what there is to say of it, in a sentence."""
    parallel.start(args.device)
    args.resume = args.resume or any(parallel.gather(parallel.restarted()))
    (data, device), out = load(args), Path(args.out)
    args, recipe = settle(args, len(data.train), data.name)
    if args.batch_size < parallel.size():
        parallel.fail(f"{parallel.size()} processes share out batches of {args.batch_size}: a larger "
                      "--batch-size, or fewer processes")
    args.processes = parallel.size()
    args.precision = parallel.first(lambda: pick_precision(args.precision, device, out))
    config = Config(args.model, args.prior, data.train.shape[1], args.hidden, args.z_dim,
                    args.pseudo_inputs, args.learned_weights, args.likelihood)
    settings = {"args": vars(args) | {"dataset": data.name}, "recipe": recipe,
                "data": {"name": data.name, "note": data.note, "train": len(data.train),
                         "image_shape": list(data.image_shape), "sha256": data.sha256},
                "model": vars(config)}
    lock = parallel.together(
        lambda: open_run(out, settings, args.resume) if parallel.rank() == 0 else None)
    if parallel.first((out / "model.pt").exists):
        return f"{out}/model.pt is there already: nothing to train"
    run = start(args, config, data, device)
    if parallel.first((out / "last.pt").exists):
        parallel.together(lambda: run.restore(out / "last.pt", device))

    def keep(path):
        if parallel.rank() == 0:
            files.save_model(path, run.model, run.best, run=settings, epochs=run.epoch,
                             best_epoch=run.best_epoch, train_seconds=seconds(run), film=run.film)
    try:
        fit(run, args, data, out)
    except Diverged as error:
        kept = "no sound epoch at beta = 1 came before, so no weights are kept"
        if run.best:
            keep(out / "best.pt")
            kept = f"the best weights, of epoch {run.best_epoch}, are in {out / 'best.pt'}"
        raise Diverged(f"{error}; {kept}. Try a lower --lr (now {args.lr:g}), a lower --clip or a "
                       "longer --warmup, with another --out") from None
    keep(out / "model.pt")
    if lock:
        lock.close()
    return (f"trained {run.epoch} epochs in {seconds(run) / 60:.1f} minutes, the best is epoch "
            f"{run.best_epoch}: {out / 'model.pt'}")


def seconds(run):
    """Time that the epochs took, validation included."""
    return sum(row["seconds"] for row in run.history)


@files.command
def main(argv=None):
    torch.set_flush_denormal(True)      # before any worker thread exists; they inherit it
    args = parse_args(argv)
    try:
        said = train(args)
        if parallel.rank() == 0:
            files.Line(Path(args.out).name).say(said)
    except files.Stopped:
        words = [w for w in (argv if argv is not None else sys.argv[1:]) if w != "--resume"]
        again = shlex.join(["python", "train.py", *words, *([] if "--out" in words else
                                                            ["--out", args.out]), "--resume"])
        if os.environ.get("ROWS"):      # make called
            again = f"the same make command and RUN={Path(args.out).parent}"
        elif files.launched():
            again = "the same torchrun command and --resume"
        if files.speaks():
            print(f"stopped; the finished epochs are kept. Go on with: {again}", file=sys.stderr)
        raise
    except Diverged as error:
        files.step_back(1)
        files.fail(error)
        return 1


if __name__ == "__main__":
    parallel.script(main)
