"""What a run keeps: training that goes on where it stopped, answers, and its folder."""
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..files import read_json, write_atomically, write_json


def write_tensors(path, tensors, value):
    """Tensors, and a JSON value beside them, in one file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"json": json.dumps(value)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_tensors(path):
    """-> ({name: tensor}, the value)."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["json"])


class Lines(io.StringIO):
    """A file for tqdm, which makes lines of what would move about in a terminal."""

    def write(self, text):
        if text := text.replace("\x1b[A", "").strip():
            print(text, file=sys.stderr, flush=True)


def progress(items, what, **settings):
    """tqdm's bar. Where standard error is no terminal, a line a minute."""
    if not sys.stderr.isatty():
        settings |= {"file": Lines(), "mininterval": 60, "maxinterval": 60}
    return tqdm(items, what, **settings)


# --- a training loop

CHECKPOINT = "checkpoint.safetensors"


@contextmanager
def resumable(folder, steps, theta, optimizer, generator, save_every=100):
    """A training loop that goes on where it was stopped.

        with resumable(folder, steps, theta, optimizer, generator) as (iterations, history):
            for i in iterations:
                ...
                history.append({"loss": 0.1, "other loss": 0.2})

    Every `save_every` iterations the parameters `theta`, the state of optimizer and generator, and
    the history are written to `folder`; with folder None nothing is. Ctrl-C and SIGTERM wait for
    the end of the iteration, which is then written too. A loss that is not finite raises
    ArithmeticError.
    """
    path = folder and Path(folder) / CHECKPOINT
    history = restore(path, theta, optimizer, generator) if path and path.is_file() else []
    stop, handlers = threading.Event(), {}

    def iterations():
        bar = progress(range(len(history), steps), "training", total=steps, initial=len(history))
        for i in bar:
            yield i
            losses = present(history[-1])
            if not all(map(math.isfinite, losses.values())):
                raise ArithmeticError(f"iteration {i}: a loss is not finite ({losses}); start anew "
                                      "with a smaller learning rate")
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in losses.items()}, refresh=False)
            due = len(history) % save_every == 0 or len(history) == steps or stop.is_set()
            if path and due:
                save(path, history, theta, optimizer, generator)
            if stop.is_set():
                raise KeyboardInterrupt

    if path and threading.current_thread() is threading.main_thread():  # others catch no signals
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield iterations(), history
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def present(losses):
    """Without those that an iteration did not have, which are None."""
    return {name: loss for name, loss in losses.items() if loss is not None}


def save(path, history, theta, optimizer, generator):
    """Write a checkpoint in place of the last one."""
    tensors = {f"parameter.{i}": p for i, p in enumerate(theta)}
    tensors["generator"] = generator.get_state()
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, history)


def restore(path, theta, optimizer, generator):
    """Put the state of a checkpoint back -> its history."""
    tensors, history = read_tensors(path)
    with torch.no_grad():
        for i, p in enumerate(theta):
            p.copy_(tensors[f"parameter.{i}"])
    state = optimizer.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(state)
    generator.set_state(tensors["generator"])
    return history


def cached(path, compute, device="cpu"):
    """compute() -> (JSON value, tensor), kept in a file; what is there is not computed again."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        value, tensor = compute()
        write_tensors(path, {"tensor": tensor}, value)
    tensors, value = read_tensors(path)
    return value, tensors["tensor"].to(device)


def placed(tensor, device):
    """The tensor on the device, or as it is where half of a GPU's free memory is too small."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return tensor
    return tensor.to(device)


def read(**losses):
    """{name: a tensor of one number, or None} -> floats, in one read from the device."""
    values = torch.stack([*present(losses).values()]).tolist()
    return {**losses, **dict(zip(present(losses), values))}


def check_memory(what, size, flag):
    """ValueError where half of the machine's memory cannot hold `what`, of `size` bytes."""
    memory = math.inf
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory / 2:
        raise ValueError(f"{what} would take {size / 1e9:.1f} GB, more than half of this machine's "
                         f"{memory / 1e9:.0f} GB: fewer prompts, or a smaller {flag}, take less")


# --- the folder of a run: OUT/partial until all is written; OUT/results.json has the figures

# Settings on which no figure depends.
NO_EFFECT = ("task", "methods", "out", "resume", "overwrite", "save_every", "save_images",
             "save_pipeline", "save_single_file", "low_memory")


def differences(old, new):
    """The records of two runs -> ["lr 1e-05 -> 0.0002", "other evaluation prompts", ...].

    A record is {"config": ..., "inputs": ...}. Inputs are compared if `new` has them.
    """
    was, now = old.get("config", {}), json.loads(json.dumps(new["config"]))
    changes = [f"{key} {was.get(key)} -> {now.get(key)}" for key in sorted(was.keys() | now.keys())
               if key not in NO_EFFECT and was.get(key) != now.get(key)]
    inputs = old.get("inputs", {})
    return changes + [f"other {name}" for name, value in new.get("inputs", {}).items()
                      if inputs.get(name) != value]


def run_record(out):
    """The file that says which run a folder holds, finished or begun; None where it holds none."""
    records = (out / "results.json", out / "partial/config.json")
    return next((path for path in records if path.is_file()), None)


def is_finished(out, record, resume=False, overwrite=False):
    """Does the folder hold the run of this record, finished?

    ValueError where it holds another run (with `resume`: one of another record), or files that are
    no run, or cannot be written to. With `overwrite` no run is an obstacle.
    """
    path = run_record(out)
    if path is None and out.is_dir() and {e.name for e in out.iterdir()} - {"partial", ".lock"}:
        raise ValueError(f"{out}: holds files and no run; --out takes another folder")
    if path and not overwrite:
        if not resume:
            raise ValueError(f"{out}: holds a run: --resume goes on with it, --overwrite starts "
                             "anew, --out takes another folder")
        if changes := differences(read_json(path), record):
            raise ValueError(f"{out}: was run with {'; '.join(changes)}: --resume cannot go on, "
                             "--overwrite starts anew")
    check_writable(out)
    finished = (out / "results.json").is_file() and not (out / "partial").is_dir()
    return finished and not overwrite


def check_writable(out, flag="--out"):
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{flag} {out}: {existing} is not a folder that can be written to")


class InUse(ValueError):
    """Another process runs in the folder."""


@contextmanager
def locked(out, wait=False):
    """Nobody else runs in the folder meanwhile: InUse, or wait. A killed run leaves no lock."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise InUse(f"{out}: another run is at work there; --out takes another folder") from None
    except (OSError, NotImplementedError) as error:  # of a file system without locks
        print(f"note: {out}: cannot be locked ({error}); start no second run there")
    try:
        yield
    finally:
        (out / ".lock").unlink(missing_ok=True)
        lock.release()


def open_folder(out, record, overwrite=False):
    """Begin a run there, or go on with one."""
    if overwrite and run_record(out):  # without one, these names may be anyone's
        for name in ("partial", "text_encoder", "unet", "pipeline"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("results.json", "model.safetensors"):
            (out / name).unlink(missing_ok=True)
    (out / "partial").mkdir(parents=True, exist_ok=True)
    write_json(out / "partial/config.json", record)
