"""What every script needs: atomic writes, sealed checkpoints, one line for an expected error.

Trust: a stranger may hand you a checkpoint or a data array; neither runs code. A checkpoint that is
damaged, or would take more memory than its file holds, is refused here. data.py refuses arrays that
do not fit in memory and damaged .npz; an .npy has no checksum, so its header and length alone. A run's
own json, csv and npz get a clear line when they are damaged or of another run, and no more defence.

Importing this does not import torch.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickletools
import shutil
import signal
import sys
import time
import zipfile

FORMAT = 1          # version of the checkpoints; a larger one is refused

# -------------------------------------------------------------------------------------- writing


def write_atomic(path, data):
    """Writes bytes or text so that `path` holds either its old content or all of the new one.

    What a killed process left of an earlier try is removed.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    new = temporary(folder, name)
    try:
        with open(new, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        if os.path.exists(new):
            os.unlink(new)
        raise
    handle = os.open(folder, os.O_RDONLY)       # the new name, too, must survive a power cut
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(folder, name):
    """This process's own path in `folder` for a file or folder that will be `name`. Those that ended
    processes left are removed: of this machine alone, which others may share the folder with."""
    prefix = f".{name}.{os.uname().nodename}."
    for other in os.listdir(folder):
        process = other[len(prefix):-len(".tmp")]
        if other.startswith(prefix) and other.endswith(".tmp") and process.isdigit():
            try:
                os.kill(int(process), 0)        # asks only: is it alive?
            except ProcessLookupError:
                path = os.path.join(folder, other)
                with contextlib.suppress(OSError):      # another process was quicker, or has the right
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            except (PermissionError, OverflowError):    # alive, and another user's; no process's number
                pass
    return os.path.join(folder, f"{prefix}{os.getpid()}.tmp")


def read_json(path, keys=()):
    """The object (dict) in a JSON file. ValueError when it is damaged or lacks one of the keys."""
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
            missing = [key for key in keys if key not in content]
            if missing or not isinstance(content, dict):
                raise ValueError(f"it lacks {', '.join(missing) or 'a JSON object'}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({one_line(error)}); write it again") from None
    return content


# ---------------------------------------------------------------------------------- checkpoints
# A checkpoint is torch.save's archive followed by a line with the SHA-256 of all before it.

_SEAL = b"\nvampprior sha256 "
_SEAL_SIZE = len(_SEAL) + 64 + 1
_PICKLE_NAMES = ("torch._utils _rebuild_tensor_v2", "collections OrderedDict") + tuple(
    f"torch {kind}Storage" for kind in ("Float", "Double", "Long", "Int", "Short", "Byte",
                                        "Bool", "Half", "BFloat16"))


def save(path, content):
    """Writes a dict of tensors, numbers, strings, lists and dicts, sealed with a checksum."""
    import torch
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    data = buffer.getvalue()
    write_atomic(path, data + _SEAL + hashlib.sha256(data).hexdigest().encode() + b"\n")


def load(path, device="cpu"):
    """The dict that `save` wrote. ValueError on any other or damaged file; runs no code of it.

    Memory is bounded by the file's size: nothing compressed or lazily sized is accepted.
    """
    import torch
    with open(path, "rb") as file:
        data = file.read()
    data, seal = data[:-_SEAL_SIZE], data[-_SEAL_SIZE:]
    if not seal.startswith(_SEAL):
        raise ValueError(f"{path} is not a checkpoint of this project, or it was cut short; "
                         "use another or train again")
    if seal[len(_SEAL):-1] != hashlib.sha256(data).hexdigest().encode() or seal[-1:] != b"\n":
        raise ValueError(f"{path} is damaged (its checksum differs); use another or train again")
    try:
        _check_archive(data)
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        version = content["format"]
    except Exception as error:      # whatever a crafted archive provokes, it is not ours
        kind = type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of this project ({kind})") from None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"{path} has a format other than 1 to {FORMAT}; update this code to read it")
    return content


def _check_archive(data):
    """Refuses what weights_only=True still allows: compressed members, calls that allocate."""
    if not data.startswith(b"PK\x03\x04"):     # torch would take its older, unchecked reader
        raise ValueError("no archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = {m.filename.partition("/")[2].lower() for m in members}     # torch ignores case
        if len(names) < len(members) or any(m.filename != m.orig_filename for m in members):
            raise ValueError("members with two names or one name twice")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("compressed members")
        if sum(m.file_size for m in members) > len(data):
            raise ValueError("members larger than the file")
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                for code, argument, _ in pickletools.genops(archive.read(member)):
                    if code.name in ("GLOBAL", "INST") and argument not in _PICKLE_NAMES:
                        raise ValueError("unexpected name")
                    if code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                        raise ValueError("unexpected opcode")


def load_state(module, state):
    """Copies a state_dict into a module after comparing names, shapes and dtypes. ValueError.

    On a module built on torch's meta device it compares only, which costs no memory.
    """
    import torch
    own = module.state_dict()
    if not isinstance(state, dict) or own.keys() != state.keys():
        raise ValueError("its parameters are not those of the model it names")
    for name, value in own.items():
        got = state[name]
        if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (value.shape, value.dtype):
            raise ValueError(f"{name} is not a {value.dtype} tensor of shape {tuple(value.shape)}")
        if got.untyped_storage().nbytes() < got.numel() * got.element_size():
            raise ValueError(f"{name} holds fewer values than its shape says")
        if not torch.isfinite(got).all():
            raise ValueError(f"{name} holds values that are not finite")
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(state)


def save_model(path, model, state=None, **extra):
    """Writes a model, and further plain values, to one file that `load_model` reads.

    `state` (a state_dict) takes the place of the model's own weights.
    """
    config = dataclasses.asdict(model.config)
    save(path, {"config": config, "state": state or model.state_dict(), **extra})


def load_model(path, build, device="cpu"):
    """The model saved at `path`, in eval mode, with what was saved beside it as `model.extra`.

    `build` makes a model of its config (a dict), as models.build does. ValueError, in one line, on a
    file that is damaged, foreign, newer or does not fit its config.
    """
    import torch
    content = load(path, device)
    try:
        config, state = content.pop("config"), content.pop("state")
        with torch.device("meta"):      # a config that promises more than the file holds costs nothing
            load_state(build(config), state)
        model = build(config).to(device)
        load_state(model, state)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a model of this project: {one_line(error)}") from None
    model.extra = content
    return model.eval()


# ----------------------------------------------------------------------- errors, stops, progress


def one_line(error):
    """An error's message on one line of at most 500 characters; an OSError names its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split())[:500] or type(error).__name__


def command(main):
    """main(argv) as a command: returns an exit code, after one line for an expected error."""
    @functools.wraps(main)
    def wrapped(argv=None):
        _handle(_exit, _stop)
        try:
            return main(argv) or 0
        except Exception as error:
            if not expected(error):
                raise
            fail(one_line(error))
            return 2
    return wrapped


def expected(error):
    """Whether an error is to be said in one line. A torch without memory raises RuntimeError."""
    return isinstance(error, (ValueError, OSError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate" in str(error))


def fail(text):
    """Says what ends this process, on stderr, over the progress that may stand there.

    A signal has nothing more to end: raised while Python tidies up, it would leave a traceback.
    """
    _handle(_stop, signal.SIG_IGN)
    print("\r\x1b[K" * sys.stderr.isatty() + f"error: {text}", file=sys.stderr, flush=True)


def launched():
    """Whether torchrun, or whoever sets its variables, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def speaks():
    """Whether this process speaks for all that torchrun started: the first, or the only one."""
    return not launched() or int(os.environ.get("RANK", 0)) == 0


def step_back(code):
    """Ends a process that does not speak, late: torchrun stops all when one ends, and the first must
    have said why, or written what it keeps."""
    if not speaks():
        time.sleep(30)
        sys.exit(code)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, but no None where the text says what is done then."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows the defaults in its help; an error is one line, without the usage."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message):
        step_back(2)
        fail(f"{one_line(message)}; see {self.prog} --help")
        sys.exit(2)


def number(kind, low, high):
    """A flag's type: a number from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = "number"       # argparse names it when `text` is none
    return parse


class Stopped(SystemExit):
    """SIGINT or SIGTERM arrived; its code is 128 + the signal's number, the process's own."""


def catch_signals():
    """From now on Ctrl-C and SIGTERM end the process without a traceback: at once while it imports, for
    an exception may be lost there; by raising Stopped, which unwinds, as soon as a `command` runs.

    Scripts call it before they import torch, which takes seconds.
    """
    for number in _STOPS:
        signal.signal(number, _exit)


_STOPS = signal.SIGINT, signal.SIGTERM


def _exit(number, frame):
    os._exit(128 + number)


def _stop(number, frame):
    raise Stopped(128 + number)


def _handle(old, new):
    """Signals that `old` handles are handled by `new`."""
    for number in _STOPS:
        if signal.getsignal(number) is old:
            signal.signal(number, new)


class Line:
    """Where a script says how far it is: the file of tqdm's bars, and `say` for whole sentences.

    On a terminal: one line that is written over. `make` lists the models in ROWS and leaves a line
    for each above the cursor; a process then writes to its own model's line, whole at a time, so
    that models side by side do not write into each other. In a log file: a line each.
    """

    def __init__(self, name=""):
        rows = os.environ.get("ROWS", "").split()
        self.live = sys.stderr.isatty()
        self.up = len(rows) - rows.index(name) if self.live and name in rows else 0
        self.name = f"{name}: " if name else ""

    def write(self, text):
        text = text.strip("\r\n").rstrip()
        if text and self.live:
            up, down = (f"\x1b[{self.up}A", f"\x1b[{self.up}B") if self.up else ("", "")
            sys.stderr.write(f"{up}\r{text}\x1b[K\r{down}")
        elif text:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def flush(self):
        """Nothing is held back; tqdm asks for this method."""

    def fileno(self):
        return sys.stderr.fileno()

    def say(self, text):
        """One sentence: in this model's line if `make` gave it one, else printed on stdout."""
        text = self.name + text
        if self.up:
            self.write(text[:shutil.get_terminal_size().columns - 1])
        else:
            if self.live:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            print(text, flush=True)

    def bar(self, total, what, **more):
        """A tqdm bar in this line: twice a second on a terminal, once a minute in a log file."""
        from tqdm import tqdm
        return tqdm(total=total, desc=self.name + what, file=self, dynamic_ncols=True, leave=False,
                    mininterval=0.5 if self.live else 60, miniters=1, **more)
