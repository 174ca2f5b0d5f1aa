"""Tests of the lab. Here is what they share: its command line, in this process, made small."""
import json
from pathlib import Path

import advunlearn as au
from sd_mini.lab import settings, tasks

ROOT = Path(au.__file__).parent
TOY = ["--model", "toy", "--device", "cpu"]
LAB = ["--retain-set", "photos", "--eval-prompts", "2", "--eval-utility", "2", "--eval-steps", "1",
       "--eval-attack-steps", "1", "--eval-looks", "1"]
FLAGS = ["--steps", "2", "--warmup", "1", "--erase-batch", "1", "--retain-batch", "1",
         "--attack-steps", "1", "--trajectories", "1", "--trajectory-steps", "1", *LAB]


def main(*arguments, method=au.METHOD):
    """The command line -> its exit status."""
    words = [*TOY, *(FLAGS if method is au.METHOD else LAB), *map(str, arguments)]
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
