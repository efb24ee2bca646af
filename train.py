"""Train a VAE or HVAE and keep its best weights by the validation ELBO.

    python train.py --prior vamp                    # the recipe of the README, in results/<time>/vamp
    python train.py --prior vamp --out DIR --resume # start, or go on where DIR stopped

Writes to the run folder: config.json, log.csv (a row per epoch), last.pt (to resume) and, at the
end, model.pt. All randomness of an epoch follows from (seed, epoch), so that a resumed run ends
with the same bits as one that was never stopped.
"""
import argparse
import csv
import fcntl
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data as datasets
from models import (DEVICES, MODELS, PRIORS, Config, build, load_file, load_state, log_bernoulli,
                    pick_device, save, save_file, write_atomic)

COLUMNS = ("epoch beta lr train_elbo train_recon train_kl val_elbo val_recon val_kl train_kl1 "
           "train_kl2 val_kl1 val_kl2 clipped grad_norm seconds").split()
WHERE = ("out", "resume", "data_dir", "device", "strict_data")   # flags that may change on resuming


class Stopped(Exception):
    """SIGINT or SIGTERM arrived."""


class Diverged(Exception):
    """The loss is not finite, or far worse than that of the mean image."""


# ------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = p.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, default="vae", help="one or two latent layers")
    group.add_argument("--prior", choices=PRIORS, default="vamp", help="prior of the top layer")
    group.add_argument("--pseudo-inputs", type=_int(1), default=500, metavar="K",
                       help="components of the vamp or mog prior")
    group.add_argument("--learned-weights", action="store_true",
                       help="learn the mixture's weights; otherwise 1/K each")
    group.add_argument("--hidden", type=_int(1), default=300, help="units of a hidden layer")
    group.add_argument("--z-dim", type=_int(1), default=40, help="size of each latent layer")
    group = p.add_argument_group("optimisation")
    group.add_argument("--epochs", type=_int(1), default=100, help="epochs of the whole schedule")
    group.add_argument("--batch-size", type=_int(1), default=1000, help="images per step")
    group.add_argument("--lr", type=_float(0), default=1.2e-2, help="AdamW's highest learning rate")
    group.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear",
                       help="course of the learning rate to 0, after one epoch of rising")
    group.add_argument("--warmup", type=_int(0), default=10,
                       help="epochs over which beta, the KL's weight, rises to 1")
    group.add_argument("--ema", type=_float(0, 0.99999), default=0.996,
                       help="decay per step of the averaged weights, which are kept; 0: none")
    group.add_argument("--weight-decay", type=_float(0), default=0.15, metavar="W",
                       help="a step shrinks weight matrices by lr x W (AdamW); not biases, not u")
    group.add_argument("--full-gradient", action="store_true",
                       help="keep the encoder's score, of mean zero, in the KL's gradient")
    group.add_argument("--clip", type=_float(0), default=50.0, help="largest gradient norm")
    group.add_argument("--patience", type=_int(1), default=50,
                       help="epochs at beta = 1 without a better validation ELBO before stopping")
    group.add_argument("--seed", type=_int(0, 2**31), default=0, help="seed of all randomness")
    datasets.add_arguments(p)
    group = p.add_argument_group("run")
    group.add_argument("--device", choices=DEVICES, default="auto",
                       help="auto takes cuda, then mps, then cpu")
    group.add_argument("--out", help="run folder (default: results/<time>/<name of the model>)")
    group.add_argument("--resume", action="store_true",
                       help="go on from last.pt in --out if it is there, else start")
    args = p.parse_args(argv)
    if args.resume and not args.out:
        p.error("--resume needs --out, the run folder to go on with")
    return args


def _int(low, high=10**7):
    def integer(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not from {low} to {high}")
        return value
    return integer


def _float(low, high=math.inf):
    def number(text):
        value = float(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    return number


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
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    path = out / "config.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{out} holds a run already; add --resume to go on, or give another --out")
        compare_settings(path, settings)
    write_atomic(path, json.dumps(settings, indent=2) + "\n")
    return lock


def compare_settings(path, settings):
    """ValueError unless config.json at `path` defines the same run, field by field."""
    try:
        found = json.loads(path.read_text())
        parts = {part: dict(found[part]) for part in settings}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; give another --out, or delete the folder") from None
    for part, wanted in settings.items():
        for name in sorted(wanted.keys() | parts[part].keys()):
            here, there = wanted.get(name), parts[part].get(name)
            if here != there and name not in WHERE:
                raise ValueError(f"{path} has {name} = {there!r}, this call {here!r}; use the same "
                                 "settings, or give another --out")


def write_log(path, history):
    """Writes log.csv whole, so that it can hold no half row and no row twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(path, text.getvalue())


# --------------------------------------------------------------------------------------- epochs


def epoch_generator(seed, epoch, device):
    """The generator of everything random in one epoch; epoch 0 is the model's first weights."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def lr_factor(schedule, progress, rise):
    """The learning rate as a share of the highest; progress and rise as shares of all steps."""
    if progress < rise:
        return progress / rise
    progress = (progress - rise) / (1 - rise)
    return {"linear": 1 - progress, "constant": 1.0,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}[schedule]


@torch.no_grad()
def validate(model, x, seed, batch=1000):
    """Means of the ELBO's terms over x at beta = 1, one sample each, with noise fixed by seed."""
    generator = torch.Generator(x.device).manual_seed(seed)
    sums, prior = {}, model.prior.frozen()
    for part in x.split(batch):
        part = datasets.pixels(part)
        terms = model.terms(part, generator=generator, inferred=model.infer(part), prior=prior)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.double().sum().item()
    return {name: value / len(x) for name, value in sums.items()}


def train_epoch(epoch, args, model, average, optimizer, data, beta, tick):
    """One pass over the training set: means of the terms, the gradient's norm, the last rate."""
    generator = epoch_generator(args.seed, epoch, data.train.device)
    order = torch.randperm(len(data.train), generator=generator, device=data.train.device)
    parameters = list(model.parameters())
    averaged = list(average.parameters())
    batches = order.split(args.batch_size)
    sums, norms = {}, 0.0
    for step, index in enumerate(batches):
        progress = (epoch - 1 + (step + 1) / len(batches)) / args.epochs
        lr = args.lr * lr_factor(args.schedule, progress, min(1, args.epochs / 2) / args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms = model.terms(data.batch(index, generator), generator=generator,
                            path_gradient=not args.full_gradient)
        loss = (beta * terms["kl"] - terms["recon"]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise Diverged(f"the loss or its gradient is not finite in epoch {epoch}, step {step + 1}")
        optimizer.step()
        if hasattr(model.prior, "project_"):
            model.prior.project_()
        with torch.no_grad():       # early on, an average of few steps; later args.ema
            seen = (epoch - 1) * len(batches) + step
            weight = 1 - min(args.ema, (1 + seen) / (10 + seen)) if args.ema else 1.0
            torch._foreach_lerp_(averaged, parameters, weight)
        norms += norm.item()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().double().sum().item()
        tick()
    means = {name: value / len(order) for name, value in sums.items()}
    return means, norms / len(batches), lr


def start(args, config, data, device):
    """The model, its average, the optimiser and the state of a run before its first epoch."""
    torch.manual_seed(args.seed)        # the first weights are drawn by torch's own generator
    pick = torch.randperm(len(data.train))[:config.components]
    u = None
    if config.prior == "vamp":          # training images, binarised, repeated if there are few
        u = datasets.binarise(data.train[pick.repeat(-(-config.components // len(pick)))
                                         [:config.components].to(device)]).cpu()
    model = build(config, u)
    model.set_output_bias(mean_image(data.train).cpu())
    model.to(device)
    average = build(config).to(device)
    average.load_state_dict(model.state_dict())
    groups = {True: [], False: []}
    for p in model.parameters():
        decays = p.ndim > 1 and all(p is not own for own in model.prior.parameters())
        groups[decays].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": args.weight_decay},
         {"params": groups[False], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.99), fused=device.type != "mps")
    state = {"epoch": 0, "best_elbo": -math.inf, "best_epoch": 0, "history": []}
    return model, average, optimizer, state


def mean_image(x):
    """Mean of the pixels (D,) over a split, in blocks, so that a large one is never all floats."""
    return sum(datasets.pixels(part).sum(0, dtype=torch.float64)
               for part in x.split(10_000)).div(len(x)).float()


def restore(path, model, average, optimizer, state, device):
    """Brings a run back to the end of the epoch that last.pt holds. ValueError if it does not fit."""
    content = load_file(path, device)
    try:
        load_state(model, content["model"])
        load_state(average, content["average"])
        if [list(s) for s in content["optimizer"]] != [list(OPTIMIZER_STATE)] * len(list(
                model.parameters())):
            raise ValueError("its optimiser is another")
        for p, saved in zip(model.parameters(), content["optimizer"]):
            if saved["exp_avg"].shape != p.shape or saved["exp_avg_sq"].shape != p.shape:
                raise ValueError("its optimiser's state is another model's")
            optimizer.state[p] = {k: v.clone() for k, v in saved.items()}
        state.update({k: content[k] for k in state}, best=content["best"])
        if state["best"]:
            load_state(build(model.config), {k: v.cpu() for k, v in state["best"].items()})
        if not state["epoch"] == len(state["history"]) or not all(
                isinstance(row, dict) and row.keys() <= set(COLUMNS) for row in state["history"]):
            raise ValueError("its history does not fit its epoch")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold this run: {error}; delete it to start again") from None


OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def run(args, stop):
    """The whole run; `stop()` raises when a signal came. Returns the path of model.pt."""
    device = pick_device(args.device)
    data = datasets.load(args.dataset, args.data_dir, args.binarize, args.seed, args.strict_data, device)
    config = Config(args.model, args.prior, data.train.shape[1], args.hidden, args.z_dim,
                    args.pseudo_inputs, args.learned_weights)
    name = {"standard": args.model}.get(args.prior, args.model[:-3] + args.prior)
    out = Path(args.out or time.strftime(f"results/%Y%m%d-%H%M%S/{name}"))
    settings = {"args": vars(args) | {"dataset": data.name, "out": str(out)},
                "data": {"name": data.name, "note": data.note, "train": len(data.train),
                         "image_shape": list(data.image_shape)},
                "model": vars(config)}
    lock = open_run(out, settings, args.resume)
    if (out / "model.pt").exists():
        print(f"{out}/model.pt is there already: nothing to train")
        return out / "model.pt"
    model, average, optimizer, state = start(args, config, data, device)
    state["best"] = {}
    if (out / "last.pt").exists():
        restore(out / "last.pt", model, average, optimizer, state, device)
    floor = 2 * mean_image_elbo(data) - data.train.shape[1]
    history = state["history"]
    steps = -(-len(data.train) // args.batch_size)
    bar = tqdm(total=args.epochs * steps, initial=state["epoch"] * steps, desc=name, unit="step",
               mininterval=0.5 if sys.stderr.isatty() else 60, dynamic_ncols=True)

    def tick():
        stop()
        bar.update()

    try:
        while state["epoch"] < args.epochs and not exhausted(state, args):
            began = time.perf_counter()
            epoch = state["epoch"] + 1
            beta = min(1.0, epoch / args.warmup) if args.warmup else 1.0
            train, norm, lr = train_epoch(epoch, args, model, average, optimizer, data, beta, tick)
            val = validate(average, data.val, args.seed)
            row = {"epoch": epoch, "beta": beta, "lr": lr, "grad_norm": norm}
            for split, means in (("train", train), ("val", val)):
                row[f"{split}_elbo"] = means["recon"] - means["kl"]
                row |= {f"{split}_{key}": value for key, value in means.items()}
            if not row["val_elbo"] > floor:
                raise Diverged(f"the validation ELBO is {row['val_elbo']:.1f} after epoch {epoch}, "
                               "far below that of the mean image")
            if hasattr(model.prior, "clipped"):
                row["clipped"] = model.prior.clipped()
            if beta == 1 and row["val_elbo"] > state["best_elbo"]:
                state |= {"best_elbo": row["val_elbo"], "best_epoch": epoch,
                          "best": {k: v.clone() for k, v in average.state_dict().items()}}
            row["seconds"] = time.perf_counter() - began
            history.append(row)
            state["epoch"] = epoch
            save_file(out / "last.pt", state | {
                "model": model.state_dict(), "average": average.state_dict(),
                "optimizer": [optimizer.state[p] for p in model.parameters()]})
            write_log(out / "log.csv", history)
            bar.set_postfix_str(f"val ELBO {row['val_elbo']:.2f} recon {row['val_recon']:.2f} "
                                f"KL {row['val_kl']:.2f} beta {beta:.2f}")
            stop()
    except Diverged as error:
        kept = keep_best(out / "best.pt", average, state, settings)
        raise Diverged(f"{error}; {kept}. Try a lower --lr (now {args.lr:g}), a lower --clip or a "
                       "longer --warmup, with another --out") from None
    finally:
        bar.close()
    write_log(out / "log.csv", history)
    if not state["best"]:       # shorter than the warm-up: the last weights are all there is
        state |= {"best": average.state_dict(), "best_epoch": state["epoch"]}
    keep_best(out / "model.pt", average, state, settings)
    lock.close()
    return out / "model.pt"


def exhausted(state, args):
    return state["best"] and state["epoch"] - state["best_epoch"] >= args.patience


def mean_image_elbo(data):
    """Validation log-likelihood of independent pixels at the training mean: what no model may miss."""
    logits = torch.logit(mean_image(data.train).clamp(0.01, 0.99))
    return log_bernoulli(mean_image(data.val), logits).item()


def keep_best(path, average, state, settings):
    """Writes the best weights to `path` and says so."""
    if not state["best"]:
        return "no sound epoch at beta = 1 came before, so no weights are kept"
    average.load_state_dict(state["best"])
    save(path, average, run=settings, epochs=state["epoch"], best_epoch=state["best_epoch"],
         train_seconds=sum(row["seconds"] for row in state["history"]))
    return f"the best weights, of epoch {state['best_epoch']}, are in {path}"


def main(argv=None):
    torch.set_flush_denormal(True)      # before any worker thread exists; they inherit it
    args = parse_args(argv)
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))

    def stop():
        if received:
            raise Stopped

    try:
        print(run(args, stop))
    except Stopped:
        words = [w for w in (argv if argv is not None else sys.argv[1:]) if w != "--resume"]
        hint = " ".join(words + ["--resume"]) if args.out else "--out FOLDER --resume, as above"
        print(f"stopped; the finished epochs are kept. Go on with: python train.py {hint}",
              file=sys.stderr)
        return 128 + received[0]
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def describe(error):
    """One line for the user; an OSError names the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}; finished epochs stay in last.pt"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
