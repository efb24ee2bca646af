"""Files of a run: weights without code, whole writes, friendly errors. Does not import torch."""
import argparse
import importlib.util
import io
import json
import os
import signal
import sys
from pathlib import Path

from tqdm import tqdm


def write_atomic(path, data):
    """Writes bytes, text, or what data(file) writes. Whenever the process dies, `path` holds the
    old content or the new."""
    path = Path(path)
    new = path.with_name(f".{path.name}.tmp")       # a killed process's leftover is overwritten
    if callable(data):
        buffer = io.BytesIO()
        data(buffer)
        data = buffer.getbuffer()
    with open(new, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def save(path, tensors, info):
    """Writes named tensors and a dict of plain values to one safetensors file."""
    from safetensors.torch import save as to_bytes
    # a copy, because safetensors refuses tensors that share memory
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomic(path, to_bytes(tensors, {"info": json.dumps(info)}))


def load(path, device="cpu"):
    """(tensors, info) that `save` wrote. ValueError if the file is anything else. Safe with a
    stranger's file: it holds no code, and no more numbers than its size says."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, json.loads(file.metadata()["info"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not a file of this project ({error})") from None


def load_model(path, build, device="cpu"):
    """(model, info): the model in eval mode, and what was saved beside its weights.
    `build` is models.build."""
    import torch
    tensors, info = load(path, device)
    try:
        with torch.device("meta"):      # takes no memory, whatever sizes the config claims
            build(info["config"]).load_state_dict(tensors, assign=True)
        model = build(info["config"]).to(device)
        model.load_state_dict(tensors)
        if not all(p.isfinite().all() for p in model.parameters()):     # a mask may be infinite
            raise ValueError("it holds numbers that are not finite")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold a model of this project: {reason}") from None
    return model.eval(), info


def add_own_model(name, known):
    """Adds the class that "FILE.py:CLASS" names to `known`, which is models.MODELS, and returns its
    name there, which has no folder. This runs the file: call it for a name that the user gave,
    never for one that a weights file holds."""
    path, _, word = name.rpartition(":")
    if name in known:
        return name
    if not path.endswith(".py") or not word:
        raise ValueError(f"--model {name}: take {', '.join(known)}, or FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(f"own {Path(path).stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, word):
        raise ValueError(f"{path} has no class {word}")
    name = f"{Path(path).name}:{word}"
    known[name] = getattr(module, word)
    return name


def parser(doc):
    """An ArgumentParser for a script with this docstring."""
    # without a usage, which is long, an error is one line
    return argparse.ArgumentParser(description=doc.split("\n")[0], usage=argparse.SUPPRESS,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def progress(show, **options):
    """A bar, if `show` and if this is a terminal. make gives models side by side a line each."""
    return tqdm(disable=None if show else True, mininterval=0.5, leave=False, **options)


def say(text):
    """Prints a line in place of the bars, which processes that are not done draw again."""
    if sys.stderr.isatty():
        print("\r\x1b[J", end="", file=sys.stderr, flush=True)
    print(text, flush=True)


def friendly(main):
    """Makes an error that the user can mend one line on standard error, without a traceback.
    Ctrl-C ends a script at once and without a word, which is safe: files are whole or absent."""
    def wrapped(*args):
        if not args:        # a notebook, which gives arguments, keeps its own Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return main(*args)
        except (ValueError, OSError) as error:
            sys.exit("error: " + " ".join(str(error).split()))
    return wrapped
