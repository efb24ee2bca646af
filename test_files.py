"""files.py: writes that are whole or absent, checkpoints that cannot harm, errors in one line.

    pytest test_files.py
"""
import errno
import hashlib
import io
import math
import os
import random
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import files
from files import load_model, save_model, write_atomic
from models import MODELS, PRIORS, Config, build

SMALL = Config(x_dim=6, hidden=5, z_dim=2, components=3, learned_weights=True)


def state(config=SMALL):
    torch.manual_seed(0)
    return build(config).state_dict()


# ------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    path = tmp_path / "file"
    write_atomic(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, step, full)
        write_atomic(path, b"new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]
    write_atomic(path, b"new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]


def test_a_write_reaches_the_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("name"), replace(*names)))
    write_atomic(tmp_path / "file", "text")
    assert seen == ["file", "name", "folder"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f".file.{dead.pid}.tmp", f".file.{os.getppid()}.tmp", f".other.{dead.pid}.tmp",
             ".file.backup.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    write_atomic(tmp_path / "file", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "file"])


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"a": 1}', b"\xff\xfe"])
def test_a_damaged_json_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    write_atomic(path, text)
    with pytest.raises(ValueError, match="x.json is damaged"):
        files.read_json(path, ["b"])


# ---------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prior", PRIORS)
def test_save_and_load_are_bit_equal(tmp_path, model, prior):
    first = build(Config(model, prior, 6, 5, 2, 3, True))
    extra = {"epoch": 3, "note": "a", "best": -81.5, "parts": {"kl": [1, 2.5]}}
    save_model(tmp_path / "model.pt", first, seen=torch.arange(4), **extra)
    second = load_model(tmp_path / "model.pt", build)
    assert second.config == first.config and not second.training
    assert torch.equal(second.extra.pop("seen"), torch.arange(4))
    assert second.extra == extra | {"format": 1}
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


class Call:
    """Pickles as a call of `function`: what a hostile file is made of."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def sealed(data):
    """With a true checksum: it protects against damage, not against malice."""
    return data + files._SEAL + hashlib.sha256(data).hexdigest().encode() + b"\n"


def whole(**changes):
    """All that a checkpoint holds, with changes: sealed, a file like ours but for these."""
    return archive({"config": asdict(SMALL), "state": state(), "format": 1} | changes)


def with_config(**changes):
    return whole(config=asdict(SMALL) | changes)


def with_state(name, value):
    return whole(state=state() | {name: value})


def repacked(data, compression=zipfile.ZIP_STORED, rename=str):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for member in old.infolist():
            new.writestr(rename(member.filename), old.read(member))
    return buffer.getvalue()


def polyglot():
    """An old-style torch file with an archive behind it: two readers see two contents."""
    empty, content = io.BytesIO(), {"config": asdict(SMALL), "state": state(), "format": 1}
    zipfile.ZipFile(empty, "w").close()
    return archive(content, _use_new_zipfile_serialization=False) + empty.getvalue()


UNSEALED = {"empty": lambda: b"", "text": lambda: b"just a longer text\n" * 20, "unsealed": whole,
            "whole model": lambda: archive(build(SMALL))}
HOSTILE = {
    "text": lambda: b"hello",
    "foreign": lambda: archive({"weights": torch.zeros(3)}),
    "list": lambda: archive([1, 2]),
    "whole model": lambda: archive(build(SMALL)),
    "no config": lambda: archive({"state": {}, "format": 1}),
    "config a list": lambda: whole(config=[1]),
    "state a list": lambda: whole(state=[1]),
    "newer": lambda: whole(format=2),
    "format a word": lambda: whole(format="1"),
    "zip bomb": lambda: repacked(whole(x=torch.zeros(10**7)), zipfile.ZIP_DEFLATED),
    "call of 10 GB": lambda: whole(x=Call(bytearray, 10**10)),
    "call in capitals": lambda: repacked(whole(x=Call(bytearray, 10**7)),
                                         rename=lambda name: name.replace("pkl", "PKL")),
    "polyglot": polyglot,
    "unknown prior": lambda: with_config(prior="vampire"),
    "unknown field": lambda: with_config(depth=3),
    "tensor as a size": lambda: with_config(hidden=torch.zeros(40, 3)),
    "other size": lambda: with_config(z_dim=3),
    "huge components": lambda: with_config(components=10**7),
    "huge hidden": lambda: with_config(hidden=10**7),
    "NaN": lambda: with_state("output.bias", torch.full((6,), math.nan)),
    "wrong shape": lambda: with_state("output.bias", torch.zeros(5)),
    "wrong dtype": lambda: with_state("output.bias", torch.zeros(6).double()),
    "not a tensor": lambda: with_state("output.bias", [0.0] * 6),
    "one value for all": lambda: with_state("output.bias", torch.zeros(1).expand(6)),
    "one name more": lambda: with_state("more", torch.zeros(1)),
}


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load_model(path, build)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [*UNSEALED, *(f"sealed {kind}" for kind in HOSTILE)])
def test_hostile_and_foreign_files_are_refused(tmp_path, kind):
    name = kind.removeprefix("sealed ")
    refused(tmp_path / "model.pt", UNSEALED[kind]() if kind in UNSEALED else sealed(HOSTILE[name]()))


def test_the_files_above_are_refused_for_their_fault_alone(tmp_path):
    for data in (whole(), repacked(whole())):
        (tmp_path / "model.pt").write_bytes(sealed(data))
        assert load_model(tmp_path / "model.pt", build).config == SMALL


@pytest.mark.parametrize("wrap, checks", [(bytes, 2), (sealed, 2), (sealed, 1)])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, wrap, checks):
    marker = tmp_path / "marker"
    if checks == 1:     # torch's own refusal is a second wall behind ours, and must stand alone
        monkeypatch.setattr(files, "_check_archive", lambda data: None)
    refused(tmp_path / "model.pt", wrap(whole(x=Call(os.system, f"touch {marker}"))))
    assert not marker.exists()


def test_damaged_and_truncated_files_are_refused(tmp_path):
    save_model(tmp_path / "good.pt", build(SMALL))
    good, chance = (tmp_path / "good.pt").read_bytes(), random.Random(0)
    tail = range(len(good) - files._SEAL_SIZE, len(good))       # the seal itself, byte by byte
    for position in [*chance.sample(range(len(good)), 60), *tail]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << chance.randrange(8)
        refused(tmp_path / "bad.pt", bytes(damaged))
    for size in [1, len(good) - 1, *chance.sample(range(len(good)), 20)]:
        refused(tmp_path / "bad.pt", good[:size])
    refused(tmp_path / "bad.pt", good + b"\n")


# ------------------------------------------------------------------------- errors and progress


@pytest.mark.parametrize("error, line", [
    (ValueError("two\nlines"), "error: two lines\n"), (MemoryError(), "error: MemoryError\n"),
    (OSError(errno.ENOSPC, "No space left", "x"), "error: x: No space left\n")])
def test_an_expected_error_is_one_line(capsys, error, line):
    @files.command
    def main(argv):
        raise error
    assert main() == 2 and capsys.readouterr().err == line
    with pytest.raises(KeyError):       # what nobody expected keeps its traceback
        files.command(lambda argv: {}["x"])()


@pytest.mark.parametrize("script", ["data.py", "train.py", "evaluate.py", "plot.py", "report.py",
                                    "bench.py"])
def test_a_wrong_flag_is_one_line_and_ctrl_c_ends_any_script_at_once(script):
    """The signal comes while torch or numpy is being imported: no traceback, the shell's code."""
    def start(*words):
        return subprocess.Popen([sys.executable, "-X", "importtime", script, *words], text=True,
                                cwd=Path(__file__).parent, stderr=subprocess.PIPE)
    process = start("--bogus")
    lines = [x for x in process.communicate()[1].splitlines() if "import time:" not in x]
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    process = start("--help")
    while not process.stderr.readline().endswith(" files\n"):
        assert process.poll() is None
    process.stderr.readline()       # the next import is done, so the handler stands
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text, height):
    """The lines that a terminal shows, cursor movements and erasing carried out."""
    rows, row, column, i = [""] * height, height - 1, 0, 0
    while i < len(text):
        if text[i] == "\x1b":
            end = next(j for j in range(i, len(text)) if text[j].isalpha())
            n = int(text[i + 2:end] or 1)
            row += {"A": -n, "B": n}.get(text[end], 0)
            if text[end] == "K":
                rows[row] = rows[row][:column]
            i = end
        elif text[i] == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column].ljust(column) + text[i] + rows[row][column + 1:]
            column += 1
        i += 1
    return rows


def test_models_side_by_side_keep_to_their_own_line(monkeypatch):
    monkeypatch.setenv("ROWS", "vae vamp")
    monkeypatch.setattr(sys, "stderr", Terminal())
    first, second = files.Line("vae"), files.Line("vamp")
    first.write("\rvae: 10 % of a long line")
    second.write("\rvamp: 5 %")
    first.write("\rvae: 20 %")
    second.say("drawn")
    first.write("\n")           # tqdm's at its end
    assert screen(sys.stderr.getvalue(), 3) == ["vae: 20 %", "vamp: drawn", ""]


def test_a_log_file_gets_lines_and_no_control_characters(monkeypatch, capsys):
    monkeypatch.setenv("ROWS", "vae")
    line = files.Line("vae")
    with line.bar(3, "training") as bar:
        for _ in range(3):
            bar.update()
    line.say("trained")
    seen = capsys.readouterr()
    assert seen.out == "vae: trained\n" and "\r" not in seen.err and "\x1b" not in seen.err
    assert bar.mininterval == 60 and seen.err.startswith("vae: training:   0%")


def test_files_does_not_import_torch():
    code = "import sys, files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True,
                          capture_output=True)
    assert done.stdout == "False\n", done.stderr
