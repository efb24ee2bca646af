"""Train a VAE or a two-layer HVAE, and keep the weights with the best validation ELBO.

    python train.py --prior vamp                        the default recipe, in results/<time>/vamp
    python train.py --prior vamp --out DIR --resume     start, or continue where DIR stopped
    torchrun --standalone --nproc-per-node 2 train.py --prior vamp --out DIR

Writes config.json, log.csv (a row per epoch), last.pt (to resume) and, at the end,
model.safetensors. The noise of an epoch depends on seed, epoch, device and number of processes. If
these, --compile and the threads stay the same, a resumed run on the same machine ends with the bits
of an unbroken one.
"""
import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel

import data as datasets
import files
import parallel
from models import LIKELIHOODS, MODELS, PRIORS, Config, build, constant_parameters

# Defaults of the recipe's flags. STATIC, for black-and-white images, and SMALL and TINY, for few
# images, replace some of them.
DEFAULT = dict(epochs=280, batch_size=1000, lr=1.2e-2, warmup=5, ema=0.996, weight_decay=0.08,
               pseudo_inputs=500)
RECIPES = {"default": DEFAULT, "long": DEFAULT | dict(epochs=420, warmup=30, weight_decay=0.07)}
STATIC = dict(epochs=100, batch_size=250, lr=6e-3, warmup=5, weight_decay=0.24)
SMALL = dict(epochs=90, batch_size=100, lr=1e-3, warmup=30, ema=0.998, weight_decay=0.5)
TINY = dict(epochs=300, batch_size=100, lr=3e-3, warmup=30, ema=0.998, weight_decay=0.02)
# settings that may differ on resuming; device, number of processes and compile change the bits
MAY_CHANGE = {"out", "resume", "data_dir", "dataset", "device", "recipe", "processes", "compile"}
LOWEST = {"epochs": 1, "batch_size": 1, "lr": 0, "warmup": 0, "ema": 0, "weight_decay": 0,
          "clip": 0, "patience": 1, "seed": 0}
STATEFUL = "model", "average", "optimizer"      # parts of a Run that have a state_dict
FEW, MANY = 3_000, 10_000       # below these numbers of images TINY, or SMALL, is the recipe
COMPILE_FROM = 5_000            # steps of a training; in fewer, compiling costs more than it saves
COMPILED = dict(dynamic=False, options={"fallback_random": True})   # the noise of eager code


# ------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    """The flags. Recipe flags that the user omits are absent: `apply_recipe` adds them."""
    p = files.parser(__doc__)
    add = p.add_argument
    add("--model", default="vae", metavar="{vae,hvae,FILE.py:CLASS}",
        help="one latent layer, two, or a model of your own, see conv.py")
    add("--prior", choices=PRIORS, default="vamp", help="prior of the top layer")
    add("--learned-weights", action="store_true", help="learn the mixture's weights; else 1/K each")
    add("--likelihood", choices=LIKELIHOODS, default="bernoulli",
        help="bernoulli: black-and-white pixels; logistic: 256 grey levels, also per colour "
             "channel; gaussian: a density of floats in [0, 1]")
    add("--hidden", type=int, default=300, help="units of a hidden layer")
    add("--z-dim", type=int, default=40, help="size of each latent layer")
    add("--recipe", choices=RECIPES, default="default",
        help="values of the next seven flags; for small and static data long equals default")
    recipe = {"pseudo_inputs": "components K of the vamp or mog prior",
              "epochs": "epochs of the whole schedule",
              "batch_size": "images per step",
              "lr": "highest learning rate of AdamW",
              "warmup": "epochs over which beta, the weight of the KL, rises to 1",
              "ema": "decay per step of the averaged weights, which are kept; 0: no average",
              "weight_decay": "of weight matrices; not of biases and pseudo-inputs"}
    for name, text in recipe.items():
        value = RECIPES["default"][name]
        add("--" + name.replace("_", "-"), type=type(value), default=argparse.SUPPRESS,
            help=f"{text} (default: the recipe's; {value} for a VAE of MNIST in the default one)")
    add("--full-gradient", action="store_true",
        help="keep the encoder's score in the gradient of the KL; its mean is zero, it adds noise")
    add("--clip", type=float, default=50.0, help="largest gradient norm; 0: no clipping")
    add("--patience", type=int, default=50,
        help="epochs at beta = 1 without a better validation ELBO before stopping")
    add("--seed", type=int, default=0, help="of the first weights and of all noise in training")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the matrix products; auto: bfloat16 where Linux says that the processor has it")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="compile the model's terms, if there is a compiler; auto: in long trainings")
    add("--device", choices=("cpu", "cuda"), help="where to train",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--init-from", metavar="RUN", help="start from the weights of a finished run")
    add("--out", help="run folder; if none is given, results/<time>/<name of the model>")
    add("--resume", action="store_true", help="continue a run that is in --out, else start one")
    datasets.add_arguments(p)
    args = p.parse_args(argv)
    args.model = files.add_own_model(args.model, MODELS)
    if args.out is None:
        name = args.model.rpartition(":")[2].lower()
        if args.prior != "standard":
            name = name.replace("vae", args.prior)
        args.out = time.strftime(f"results/%Y%m%d-%H%M%S/{name}")
    args.binarize = "dynamic" if args.likelihood == "bernoulli" else "none"
    if args.precision == "auto":
        args.precision = "bfloat16" if has_bfloat16(args.device) else "float32"
    return args


def apply_recipe(args, data):
    """The flags, with the recipe's values where none was given. ValueError if one is too low."""
    values, (n_train, n_pixels) = dict(RECIPES[args.recipe]), data.train.shape
    halved = args.model == "hvae"       # the full rate is too high for two layers
    if n_train < FEW:
        values |= TINY
    elif n_train < MANY:
        values |= SMALL
        halved = False              # it is low enough
    elif data.binarize == "none" and args.likelihood == "bernoulli":    # black-and-white images
        values |= STATIC
    elif data.name == "fashion" and args.likelihood == "bernoulli":
        values["weight_decay"] *= 2
        halved = True               # a precaution: both rates gave the HVAE the same ELBO
    values["lr"] /= 2 if halved else 1
    # a step changes the first layer's sums in proportion to the rate and to the number of pixels
    values["lr"] = min(values["lr"], RECIPES["default"]["lr"] * (784 / n_pixels))
    given = vars(args)
    # warm up over at most half of the epochs: the others use the full KL
    values["warmup"] = min(values["warmup"], given.get("epochs", values["epochs"]) // 2)
    args = argparse.Namespace(**values | given)
    if args.compile == "auto":
        pays = args.epochs * n_train >= COMPILE_FROM * args.batch_size
        args.compile = "on" if pays else "off"
    for name, low in LOWEST.items():
        if not getattr(args, name) >= low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}")
    return args


def check_own_model(config):
    """ValueError if a model of the user's own lacks a method, or if its shapes do not fit."""
    x = torch.zeros(2, config.x_dim)
    try:
        with torch.device("meta"):      # as files.load_model does
            build(config)
        model = build(config)
        terms = model.terms(x, 3, None, model.infer(x), model.prior.frozen(), True).values()
        found = [tuple(t.shape) for t in (*terms, model.sample(3), model.reconstruct(x))]
        if found != [(3, 2)] * len(terms) + [(3, config.x_dim), (2, config.x_dim)]:
            raise RuntimeError(f"terms, sample and reconstruct have the shapes {found}")
        model.set_output_bias(*torch.full((2, config.x_dim), 0.5))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{config.model} does not fit, see models.Model: {error}") from None


def can_compile(device):
    """Whether torch.compile works here. If not, the main process says so."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
        return True
    except Exception as error:      # it wraps whatever the compiler says
        if parallel.is_main_process():
            files.say(f"going on without --compile, which fails here: {type(error).__name__}")
        return False


def has_bfloat16(device):
    """Whether bfloat16 products are fast: on GPUs from Ampere, on a CPU that says so to Linux."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


# ---------------------------------------------------------------------------------------- a run


def open_run(out, config, resume):
    """Locks the run folder, writes config.json, returns the lock. ValueError if it is unusable."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", is_singleton=True)   # so a notebook can retry after an error
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{out} is in use by another process") from None
    path = out / "config.json"
    if not path.exists():
        files.write_atomic(path, json.dumps(config, indent=2) + "\n")
        return lock
    if not resume:
        raise ValueError(f"{out} holds a run already: add --resume, or give another --out")
    old = json.loads(path.read_text())
    for key in sorted(config.keys() - MAY_CHANGE):
        if old.get(key) != config[key]:
            raise ValueError(f"{out} was trained with {key} = {old.get(key)!r}, not "
                             f"{config[key]!r}: use the same settings, or give another --out")
    return lock


@dataclasses.dataclass
class Run:
    """What training changes."""
    model: torch.nn.Module
    average: torch.nn.Module        # moving average of the model's weights: validated and kept
    optimizer: torch.optim.Optimizer
    history: list = dataclasses.field(default_factory=list)     # rows of log.csv
    best: dict = dataclasses.field(default_factory=dict)        # weights of the average at its best
    best_epoch: int = 0
    best_elbo: float = -math.inf

    @property
    def epoch(self):
        return len(self.history)

    def state(self):
        return vars(self) | {part: getattr(self, part).state_dict() for part in STATEFUL}

    def restore(self, state):
        """Goes back to the end of the epoch that has this state."""
        for part in STATEFUL:
            getattr(self, part).load_state_dict(state.pop(part))
        vars(self).update(state)


def start(args, config, data):
    """A Run before its first epoch. The output bias starts at the mean of the training images,
    pseudo-inputs at some of them. With few images the prior would memorise these, so they start
    nearly black, as the authors' do for MNIST."""
    torch.manual_seed(args.seed)        # the first weights are drawn by torch's own generator
    pick = torch.randperm(len(data.train))[:config.components].to(data.train.device)
    u = None
    if config.prior == "vamp" and max(MANY, config.components) <= len(data.train):
        u = data.batch(pick).cpu()
    model = build(config, u)
    model.set_output_bias(*(t.cpu() for t in mean_and_spread(data.train)))
    if args.init_from:
        trained, _ = files.load_model(Path(args.init_from) / "model.safetensors", build)
        other = [key for key, value in vars(config).items() if vars(trained.config)[key] != value]
        if other:
            raise ValueError(f"{args.init_from} was trained with another {', '.join(other)}")
        model.load_state_dict(trained.state_dict())
    model.to(args.device)
    if config.prior == "vamp" and parallel.size() > 1:
        model.prior.encode_all = parallel.encode        # each process encodes a share
    average = build(config).to(args.device).eval()
    average.load_state_dict(model.state_dict())
    own = {id(p) for p in model.prior.parameters()}     # without the encoder, which is the model's
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in own]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in own]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.99), fused=True)
    return Run(model, average, optimizer)


def mean_image_elbo(data, likelihood):
    """The validation images' mean log probability if all latents are ignored."""
    parameters = constant_parameters(likelihood, *mean_and_spread(data.train))
    log_px = LIKELIHOODS[likelihood][0]
    return sum(log_px(datasets.pixels(part), parameters).double().sum().item()
               for part in data.val.split(1000)) / len(data.val)


def mean_and_spread(x):
    """Mean and standard deviation of the pixels, each (D,)."""
    spread, mean = torch.std_mean(datasets.pixels(x), 0, correction=0)
    return mean, spread


# --------------------------------------------------------------------------------------- epochs


def learning_rate(args, progress):
    """Rises over the first epoch, half of it if it is the only one, then falls linearly to zero."""
    rise = min(1, args.epochs / 2) / args.epochs
    if progress < rise:
        return args.lr * (progress / rise)
    return args.lr * (1 - (progress - rise) / (1 - rise))


def precision(args):
    """Where the products of a step and of validation have --precision."""
    return torch.autocast(args.device, torch.bfloat16, args.precision == "bfloat16")


def add_up(sums, terms):
    """Adds each term's sum to `sums` under the term's name. No step waits for a GPU's numbers."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0) + value.detach().double().sum()


def columns(split, sums, count):
    """Turns a split's sums over `count` images into log.csv's columns: means in nats per image."""
    parts = parallel.gather({name: value.item() for name, value in sums.items()})
    # a process without images has no sums; the main process always has some
    means = {name: sum(part.get(name, 0.0) for part in parts) / count for name in parts[0]}
    means["elbo"] = means["recon"] - means["kl"]
    return {f"{split}_{name}": value for name, value in means.items()}


@torch.no_grad()
def validate(model, x, seed):
    """The val_ columns at beta = 1, one sample an image; its noise depends on seed and place."""
    sums, prior, generator = {}, model.prior.centered(), torch.Generator(x.device)
    for i, part in enumerate(x.split(1000)):
        if i % parallel.size() == parallel.rank():
            generator.manual_seed(seed + i * 1_000_003)
            add_up(sums, model.terms(datasets.pixels(part), generator=generator, prior=prior))
    return columns("val", sums, len(x))


def optimizer_step(run, args, step):
    """Clips, steps, projects pseudo-inputs, averages the weights. Returns the unclipped norm."""
    parameters = list(run.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
    run.optimizer.step()
    run.model.prior.project_()
    with torch.no_grad():       # the decay grows to args.ema, to forget the first weights soon
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(run.average.parameters()), parameters, 1 - decay)
    return norm


def train_epoch(run, net, args, data, tick=lambda: None):
    """One pass over the training images. Returns its columns of log.csv. `net` is run.model or its
    DistributedDataParallel; `tick` is called after each step."""
    epoch, device = run.epoch + 1, data.train.device
    beta = min(1.0, epoch / args.warmup) if args.warmup else 1.0
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.train), generator=generator, device=device)
    # the noise, each process's own, is of torch's generator: at others a compiled graph breaks
    seeds = torch.randint(2**32, (parallel.size(),), generator=generator, device=device)
    torch.manual_seed(seeds[parallel.rank()].item())
    batches = order.split(args.batch_size)
    sums, norms = {}, 0
    for step, index in enumerate(batches):
        # the last step takes the rate of half a step earlier: its own would be zero
        now = min(epoch - 1 + (step + 1) / len(batches), args.epochs - 0.5 / len(batches))
        lr = learning_rate(args, now / args.epochs)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        with precision(args):
            terms = net(data.batch(parallel.share(index)),
                        path_gradient=not args.full_gradient)       # {name: (1, B)}
        loss = (beta * terms["kl"] - terms["recon"]).sum() / len(index)
        run.optimizer.zero_grad()
        (loss * parallel.size()).backward()     # DistributedDataParallel takes the mean
        norms += optimizer_step(run, args, (epoch - 1) * len(batches) + step).double()
        add_up(sums, terms)
        tick()
    for kept, buffer in zip(run.average.buffers(), run.model.buffers()):
        kept.copy_(buffer)      # of a model of your own; a buffer has no average
    norm = norms.item() / len(batches)
    if not math.isfinite(norm):
        raise ValueError(f"a gradient is not finite in epoch {epoch}: try a lower --lr or --clip, "
                         "or a longer --warmup, with another --out")
    return {"beta": beta, "lr": lr, "grad_norm": norm, **columns("train", sums, len(order))}


def train(run, args, data, out):
    """Trains until the schedule or the patience ends, and writes the files after each epoch."""
    steps = -(-len(data.train) // args.batch_size)
    with files.progress(parallel.is_main_process(), desc=f"{out.name}: training",
                        total=args.epochs * steps, initial=run.epoch * steps) as bar:
        while run.epoch < args.epochs:
            if run.best and run.epoch - run.best_epoch >= args.patience:
                break
            # rebuilt each epoch, as --resume does: DDP's gradient buckets set the order of sums
            net = DistributedDataParallel(run.model) if parallel.size() > 1 else run.model
            began = time.perf_counter()
            row = {"epoch": run.epoch + 1, **train_epoch(run, net, args, data, bar.update)}
            with precision(args):
                row |= validate(run.average, data.val, args.seed)
            row["seconds"] = time.perf_counter() - began
            run.history.append(row)
            if row["beta"] == 1 and row["val_elbo"] > run.best_elbo:
                run.best_elbo, run.best_epoch = row["val_elbo"], run.epoch
                run.best = {name: t.clone() for name, t in run.average.state_dict().items()}
            if parallel.is_main_process():
                lines = [row, *(old.values() for old in run.history)]       # names, then numbers
                text = "".join(",".join(map(str, line)) + "\n" for line in lines)
                files.write_atomic(out / "log.csv", text)   # first, or a kill could lose a row
                files.write_atomic(out / "last.pt", lambda file: torch.save(run.state(), file))
            bar.set_postfix_str(f"epoch {run.epoch}, val ELBO {row['val_elbo']:.2f}", refresh=False)
    if not run.best:        # shorter than the warm-up: the last weights are all there is
        run.best, run.best_epoch = run.average.state_dict(), run.epoch


@files.friendly
def main(argv=None):
    torch.set_flush_denormal(True)      # denormal numbers would slow the late epochs
    args = parse_args(argv)
    parallel.start(args.device)
    data = parallel.main_first(lambda: datasets.load(
        args.dataset, args.data_dir, args.binarize, args.device))
    if args.likelihood != "bernoulli" and datasets.is_binary(data.train):
        raise ValueError(f"{data.name} is black and white: use --likelihood bernoulli")
    if args.likelihood == "logistic" and data.train.dtype != torch.uint8:
        raise ValueError(f"{data.name} has more than 256 levels: use --likelihood gaussian")
    args, out = apply_recipe(args, data), Path(args.out)
    done = (out / "model.safetensors").exists()
    if args.compile == "on" and not done and not can_compile(args.device):
        args.compile = "off"
    model_config = Config(args.model, args.prior, data.train.shape[1], args.hidden, args.z_dim,
                          args.pseudo_inputs, args.learned_weights, args.likelihood,
                          data.image_shape[0], (*data.image_shape, 1)[2])
    config = vars(args) | {"binarize": data.binarize, "sha256": data.sha256,
                           "n_train": len(data.train), "processes": parallel.size()}
    check_own_model(model_config)
    run = start(args, model_config, data)
    if parallel.is_main_process():
        lock = open_run(out, config, args.resume)       # held until the end
        files.say(f"{out.name}: trained already" if done else f"{out.name}: {data}")
    if done:
        return
    if args.compile == "on":
        run.model.compile(**COMPILED)
    if (out / "last.pt").exists():
        run.restore(torch.load(out / "last.pt", args.device, weights_only=True))
    train(run, args, data, out)
    if parallel.is_main_process():
        info = {"config": vars(model_config), "epochs": run.epoch, "best_epoch": run.best_epoch,
                "train_seconds": sum(row["seconds"] for row in run.history)}
        files.save(out / "model.safetensors", run.best, info)
        files.say(f"{out.name}: trained {run.epoch} epochs in {info['train_seconds'] / 60:.1f} "
                  f"minutes; epoch {run.best_epoch} is kept")
        elbo = run.history[run.best_epoch - 1]["val_elbo"]
        floor = mean_image_elbo(data, args.likelihood)
        if elbo < floor:
            files.say(f"{out.name}: its validation ELBO {elbo:.2f} is below the {floor:.2f} of the "
                      "mean image alone: try a lower --lr, or more --epochs, with another --out")


if __name__ == "__main__":
    main()
