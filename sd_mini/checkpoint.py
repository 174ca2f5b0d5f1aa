"""Nothing is lost: files that are whole or absent, training that goes on where it was, answers that are kept."""
from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import ranks


def write_atomically(path, write):
    """write(temporary path), flush it to the disk, then rename: at every moment the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # a full disk, by safetensors
        raise OSError(f"{path}: cannot be written: {error}") from None
    os.replace(temporary, path)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path, tensors, metadata):
    """Safetensors, with a dict as its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p, {"json": json.dumps(metadata)}))


def read_metadata_and_tensors(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["json"]), {name: file.get_tensor(name) for name in file.keys()}


class Checkpoints:
    """The state of a training loop in a folder, the last two of them kept; with folder None, nothing happens.

        with Checkpoints(...) as checkpoints:
            history = checkpoints.restore()
            for i in range(len(history), steps):
                ...; history.append(losses); checkpoints.keep(history)

    While it is open, Ctrl-C and SIGTERM wait for the end of the iteration, whose state is then written.
    """

    def __init__(self, folder, every, steps, parameters, optimizer, generator):
        self.folder, self.every, self.steps = folder and Path(folder), every, steps
        self.parameters, self.optimizer, self.generator = parameters, optimizer, generator
        self.stop = None
        if folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        def ask_to_stop(number, frame):
            self.stop = number

        self.handlers = {}
        if self.folder:
            self.handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def paths(self):
        return sorted(self.folder.glob("checkpoint-*.safetensors")) if self.folder else []

    def restore(self):
        """-> the history so far, with everything else put back as it was then."""
        if not self.paths():
            return []
        metadata, tensors = read_metadata_and_tensors(self.paths()[-1])
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(tensors[f"parameter.{i}"])
        state = self.optimizer.state_dict()
        for name in tensors:
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state["state"].setdefault(int(i), {})[key] = tensors[name]
        self.optimizer.load_state_dict(state)
        self.generator.set_state(tensors["generator"])
        return metadata["history"]

    def keep(self, history):
        """Write the state when it is due, at the end, or when asked to stop."""
        done, stop = len(history), ranks.anyone(self.stop is not None, self.parameters[0].device)
        if self.folder and (done % self.every == 0 or done == self.steps or stop):
            ranks.first(self.write, history)
        if stop:
            raise KeyboardInterrupt

    def write(self, history):
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.parameters)} | {"generator": self.generator.get_state()}
        for j, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{j}.{key}": torch.as_tensor(value) for key, value in state.items()}
        write_tensors(self.folder / f"checkpoint-{len(history):06}.safetensors", tensors, {"history": history})
        for old in self.paths()[:-2]:
            old.unlink()


def remember(folder, jobs):
    """{name: compute}, compute() -> (JSON, tensor)  ->  {name: the same}, kept in the folder and not computed again; with
    folder None, always computed. Several processes share the jobs, and the folder."""
    if folder is None:
        return {name: compute() for name, compute in jobs.items()}
    paths = {name: Path(folder) / f"{name}.safetensors" for name in jobs}
    for name in list(jobs)[ranks.TURN]:
        if not paths[name].is_file():
            value, tensor = jobs[name]()
            write_tensors(paths[name], {"tensor": tensor}, value)
    ranks.meet()
    found = {name: read_metadata_and_tensors(path) for name, path in paths.items()}
    return {name: (value, tensors["tensor"]) for name, (value, tensors) in found.items()}


# --- the folder of a run: config and state in OUT/partial until it is finished, then OUT/results.json

APART = ("task", "methods", "out", "resume", "overwrite", "save_every", "save_images", "low_memory", "debug")  # figures do not depend on these


def differences(old, new):
    """Where two configs, as dicts, differ -> ["lr 1e-05 -> 0.0002", ...]."""
    new = json.loads(json.dumps(new))
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted(old.keys() | new.keys())
            if key not in APART and old.get(key) != new.get(key)]


def found(out):
    """The file that says which run a folder holds, finished or begun, or None."""
    return next((path for path in (out / "results.json", out / "partial/config.json") if path.is_file()), None)


def is_finished(out, config):
    """Look at the folder of a run: refuse to overwrite one or what is not one, or to go on with one of other settings ->
    True where there is nothing left to do."""
    path = found(out)
    if path is None and out.is_dir() and {entry.name for entry in out.iterdir()} - {"partial"}:
        raise ValueError(f"{out}: holds files and no run; --out takes another folder")
    finished = path is not None and path.name == "results.json"
    if path and not config["overwrite"]:
        if not config["resume"]:
            raise ValueError(f"{out}: holds a {'finished run:' if finished else 'begun run: --resume goes on with it,'} "
                             "--overwrite starts anew, --out takes another folder")
        if "config" not in (old := read_json(path)):
            raise ValueError(f"{out}: holds a comparison; --out takes another folder")
        if changes := differences(old["config"], config):
            raise ValueError(f"{out}: was run with other settings, so --resume cannot go on: {'; '.join(changes)}")
    check_writable(out)
    return finished and not config["overwrite"]


def check_writable(out):
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--out {out}: {there} is not a folder that can be written to")


def open_folder(out, config):
    """Begin a run there, or go on with one."""
    if found(out):  # else these names may be anyone's
        for name in ("partial", "text_encoder", "unet", "pipeline") if config["overwrite"] else ():
            shutil.rmtree(out / name, ignore_errors=True)
        if config["overwrite"]:
            (out / "results.json").unlink(missing_ok=True)
        for leftover in out.rglob("*.part"):
            leftover.unlink()
    (out / "partial").mkdir(parents=True, exist_ok=True)
    write_json(out / "partial/config.json", {"config": config})


def close_folder(out, results):
    """results.json comes last; what only a stopped run needs goes."""
    write_json(out / "results.json", {"complete": True, **results})
    shutil.rmtree(out / "partial")
