"""files.py: writes that are whole or absent, checkpoints that cannot harm, errors in one line."""
import errno
import hashlib
import io
import math
import os
import random
import re
import signal
import stat
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
STATE = build(SMALL).state_dict()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_write_reaches_the_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    seen, kinds = [], {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(
        kinds[stat.S_ISDIR(os.fstat(handle).st_mode)]))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("name"), os.rename(*names)))
    write_atomic(tmp_path / "file", "text")
    assert seen == ["file", "name", "folder"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = os.uname().nodename
    names = [f".file.{here}.{dead.pid}.tmp", f".file.{here}.{os.getppid()}.tmp",
             f".other.{here}.{dead.pid}.tmp", f".file.elsewhere.{dead.pid}.tmp",
             f".file.{here}.{10**30}.tmp", f".file.{here}.backup.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    write_atomic(tmp_path / "file", b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "file"])
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"a": 1}', b"\xff\xfe"])
def test_a_damaged_json_is_named(tmp_path, text):
    write_atomic(tmp_path / "x.json", text)
    with pytest.raises(ValueError, match="x.json is damaged"):
        files.read_json(tmp_path / "x.json", ["b"])


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


class Call:     # pickles as a call of a function: what a hostile file is made of
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def archive(content, **options):
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def ours(config=None, state=None, **changes):
    """The archive of a checkpoint that is ours but for the changes."""
    return archive({"config": asdict(SMALL) | (config or {}), "state": STATE | (state or {}),
                    "format": 1} | changes)


def sealed(data):
    """With a true checksum: it protects against damage, not against malice."""
    return data + files._SEAL + hashlib.sha256(data).hexdigest().encode() + b"\n"


def repacked(data, compression=zipfile.ZIP_STORED, pkl="pkl"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename.replace("pkl", pkl), old.read(member))
    return buffer.getvalue()


NOT_A_BIAS = [torch.full((6,), math.nan), torch.zeros(5), torch.zeros(6).double(), [0.0] * 6,
              torch.zeros(1).expand(6)]         # the last: one value in the file for all
HOSTILE = [
    b"hello", *map(archive, [{"weights": torch.zeros(3)}, [1, 2], build(SMALL),
                             {"state": {}, "format": 1}, {"config": [1], "state": {}, "format": 1},
                             {"config": asdict(SMALL), "state": [1], "format": 1}]),
    ours(format=2), ours(format="1"), ours(state={"more": torch.zeros(1)}),
    *(ours(state={"output.bias": value}) for value in NOT_A_BIAS),
    *(ours({name: value}) for name, value in [
        ("prior", "vampire"), ("depth", 3), ("hidden", torch.zeros(40, 3)), ("z_dim", 3),
        ("components", 10**7), ("hidden", 10**7)]),
    repacked(ours(x=torch.zeros(10**6)), zipfile.ZIP_DEFLATED),     # a bomb, and
    repacked(ours(), zipfile.ZIP_DEFLATED),     # one whose headers outweigh what it hides
    ours(x=Call(bytearray, 10**10)), repacked(ours(x=Call(bytearray, 10**7)), pkl="PKL"),
    # an old-style file of torch with an empty archive behind it: two readers see two contents
    archive({"config": asdict(SMALL), "state": STATE, "format": 1},
            _use_new_zipfile_serialization=False) + b"PK\5\6" + bytes(18),
]


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load_model(path, build)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_hostile_and_foreign_files_are_refused_for_their_fault_alone(tmp_path):
    for data in HOSTILE:
        refused(tmp_path / "model.pt", sealed(data))
    for data in (ours(), repacked(ours())):
        refused(tmp_path / "model.pt", data)        # it lacks the seal
        (tmp_path / "model.pt").write_bytes(sealed(data))
        assert load_model(tmp_path / "model.pt", build).config == SMALL


@pytest.mark.parametrize("wrap, checks", [(bytes, 2), (sealed, 2), (sealed, 1)])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, wrap, checks):
    marker = tmp_path / "marker"
    if checks == 1:     # torch's own refusal is a second wall behind ours, and must stand alone
        monkeypatch.setattr(files, "_check_archive", lambda data: None)
    refused(tmp_path / "model.pt", wrap(ours(x=Call(os.system, f"touch {marker}"))))
    assert not marker.exists()


def test_damaged_and_truncated_files_are_refused(tmp_path):
    good, chance = sealed(ours()), random.Random(0)
    tail = range(len(good) - files._SEAL_SIZE, len(good))       # the seal itself, byte by byte
    for position in [*chance.sample(range(len(good)), 60), *tail]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << chance.randrange(8)
        refused(tmp_path / "bad.pt", bytes(damaged))
    for size in [0, 1, len(good) - 1, *chance.sample(range(len(good)), 20)]:
        refused(tmp_path / "bad.pt", good[:size])
    refused(tmp_path / "bad.pt", good + b"\n")


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


@pytest.mark.parametrize("script", "data train evaluate plot report bench".split())
def test_a_wrong_flag_is_one_line_and_ctrl_c_ends_any_script_at_once(script):
    """The signal comes as numpy is looked for, where an exception might be lost: no word, the shell's
    code."""
    code = """if True:
        import os, runpy, signal, sys, weakref
        class Finder:
            def find_spec(name, path, target=None):
                if name == "numpy":
                    weakref.finalize(Finder(), os.kill, os.getpid(), signal.SIGINT)
        sys.argv = sys.argv[1:]
        if sys.argv[1] == "--help":
            sys.meta_path.insert(0, Finder)
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    for flag, exit_code, said in ("--bogus", 2, "error: .*\n"), ("--help", 130, ""):
        done = subprocess.run([sys.executable, "-c", code, script + ".py", flag], text=True,
                              cwd=Path(__file__).parent, capture_output=True)
        assert done.returncode == exit_code and re.fullmatch(said, done.stderr), done.stderr


def test_rank_alone_is_no_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert files.speaks()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not files.speaks()


def test_a_signal_after_the_error_adds_no_traceback():
    """torchrun sends SIGTERM to processes that are just ending, too."""
    code = """if True:
        import os, signal, files
        files.catch_signals()
        class Late:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(9))       # the handler runs between two instructions
        @files.command
        def main(argv):
            late = Late()
            raise ValueError("this")
        raise SystemExit(main())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    assert (done.returncode, done.stderr) == (2, "error: this\n")


def test_models_side_by_side_keep_to_their_own_line(monkeypatch):
    monkeypatch.setenv("ROWS", "vae vamp")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: True
    files.Line("vae").write("\rvae: 20 %")
    files.Line("vamp").say("drawn")
    files.Line("vamp").write("\n")       # tqdm's at its end
    assert sys.stderr.getvalue() == (           # up, the text, the rest erased, down again
        "\x1b[2A\rvae: 20 %\x1b[K\r\x1b[2B" "\x1b[1A\rvamp: drawn\x1b[K\r\x1b[1B")


def test_a_log_file_gets_lines_and_no_control_characters(monkeypatch, capsys):
    monkeypatch.setenv("ROWS", "vae")       # which stands for a terminal's rows only
    line = files.Line("vae")
    with line.bar(3, "training") as bar:
        bar.update(3)
    line.say("trained")
    seen = capsys.readouterr()
    assert seen.out == "vae: trained\n" and "\r" not in seen.err and "\x1b" not in seen.err
    assert bar.mininterval == 60 and seen.err.startswith("vae: training:   0%")


def test_a_torch_without_memory_is_one_line_and_other_errors_of_its_are_not(capsys):
    assert files.command(lambda argv: torch.empty(2**60))() == 2
    assert "can't allocate memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        files.command(lambda argv: torch.ones(2) @ torch.ones(3))()


@pytest.mark.parametrize("module, others", [("files", "torch"), ("models", "files data"),
                                            ("report", "torch models data train")])
def test_a_module_does_not_import(module, others):
    code = f"import sys, {module}; print(set({others.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True,
                          capture_output=True)
    assert done.stdout == "set()\n", done.stderr
