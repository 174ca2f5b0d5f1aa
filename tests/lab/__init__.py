"""Tests of the lab. Here is what they share: its command line, in this process, made small."""
import json
from pathlib import Path

import advunlearn as au
from sd_mini.lab import settings, tasks

ROOT = Path(au.__file__).parent
TOY = dict(model="toy", device="cpu", retain_set="photos")
LAB = dict(eval_prompts=2, eval_utility=2, eval_steps=1, eval_attack_steps=1, eval_looks=1)
OWN = dict(steps=2, warmup=1, erase_batch=1, retain_batch=1, attack_steps=1, trajectories=1,
           trajectory_steps=1)


def flags(**given):
    """Small settings, and those given, as words of the command line."""
    pairs = {**TOY, **LAB, **given}.items()
    return [word for name, value in pairs for word in (settings.flag_of(name), str(value))]


def main(*arguments, method=au.METHOD):
    """The command line -> its exit status."""
    words = [*flags(**OWN if method is au.METHOD else {}), *map(str, arguments)]
    try:
        return tasks.run_task(method, settings.parse(method.config, words))
    except SystemExit as stop:
        return stop.code


def finished(folder, name="erased"):
    """The figures of a finished run, without the minutes that it took."""
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and not (folder / "partial").exists()
    return {key: figure for key, figure in results["results"][name].items() if key != "minutes"}


def encoder(folder):
    return (folder / "text_encoder/model.safetensors").read_bytes()
