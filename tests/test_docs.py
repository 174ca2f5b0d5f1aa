"""The documents cannot drift: what they name exists, and their commands and Python run."""
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields

import pytest

import advunlearn as au
import sd_mini
from sd_mini import files, lab, pipeline, schedule, weights
from sd_mini.lab import (classifiers, compare, evaluation, experiment, prompts, report, runs,
                         settings, tasks)
from sd_mini.toy import classifier, train, world

from . import bench
from .coursework import assignment
from .lab.test_run import FLAGS, ROOT

NAMES = ("README.md", "TUTORIAL.md", "sd_mini/README.md", "sd_mini/toy/README.md",
         "sd_mini/lab/README.md")
DOCS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
COMMANDS = list(dict.fromkeys(
    part for text in DOCS.values()
    for line in re.findall(r"^    ((?:python|pip|pytest|KILLS).*)$", text, re.M)
    for part in line.split(" && ")))
METHOD = [command for command in COMMANDS if command.startswith("python advunlearn.py")]
SMALL = ["--eval-prompts", "1", "--eval-utility", "2", "--eval-steps", "2",
         "--eval-attack-steps", "2", "--eval-looks", "1"]


def python(folder, *arguments):
    """Run Python on the project there, well -> what it prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed(command):
    """A documented command's flags as settings."""
    return settings.parse(au.Config, shlex.split(command)[2:])


# --- what is run

@pytest.mark.parametrize("command", METHOD)
def test_commands_of_the_method_parse(command):
    if "--help" not in command:
        parsed(command)


RUN = """
import json, sys, advunlearn
from sd_mini.lab import tasks
for given in json.loads(sys.argv[1]):
    assert tasks.run_task(advunlearn.METHOD, given) == 0, given
"""


@pytest.mark.long
def test_commands_of_the_method_run(tmp_path):
    """All that need no download, in the documents' order, in one folder; each on a small budget."""
    different = {}
    for command in METHOD:
        if not re.search(r"--help|stable-diffusion|--classifier", command):
            # One of those that differ in folder, seed and rows alone.
            key = re.sub(r" --(out|seed) \S+| --methods .*?(?= --|$)", "", command)
            different.setdefault(key, command)
    given_to, done = [], set()
    for given in map(parsed, different.values()):
        task = given.get("task", "train")
        small = settings.parse(au.Config, [*FLAGS, *SMALL, "--steps", "2",
                                           "--trajectory-steps", "1"])
        small = {"eval_steps": 2} if task == "sample" else small
        small |= {"methods": ["ESD"]} if task == "compare" else {}
        out = given.get("out") or ("runs/church" if task == "train" else "")
        given_to.append({**given, **small, "overwrite": out in done})
        done.add(out)
    assert len(given_to) >= 8
    python(tmp_path, "-c", RUN, json.dumps(given_to))


# What else is documented, and how to make it short. None: an hour of training, or this suite.
OTHERS = {
    "python -m tests.bench": " evaluations", "python -m tests.coursework --out ../homework": "",
    "pip install -r requirements.txt": None, "pytest": None, "python tests/versions.py": None,
    "KILLS=20 pytest tests/lab/test_faults.py -k killed": None,
    "python -m sd_mini.toy.train --out my-toy": None, "python -m sd_mini.toy.train --check": None}


@pytest.mark.long
def test_other_commands_run(tmp_path):
    others = [command for command in COMMANDS if not command.startswith("python advunlearn.py")]
    assert set(others) == set(OTHERS)
    here = tmp_path / "here"
    here.mkdir()
    for command in others:
        if OTHERS[command] is not None:
            python(here, *shlex.split(command + OTHERS[command])[1:])
    assert (tmp_path / "homework/HANDOUT.md").is_file()


@pytest.mark.long
def test_python_blocks_run(tmp_path):
    """... and print what stands below them, up to the last digits.

    One attacks an erased model. Here it is the original.
    """
    sd_mini.save_pipeline(sd_mini.load("toy"), tmp_path / "runs/church-esd/pipeline")
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    blocks = [block for text in DOCS.values() for block in re.findall(pattern, text, re.M | re.S)]
    number = r"\d+\.\d+"
    for block, printed in blocks:
        flags = [*SMALL, "--model", "toy", "--device", "cpu", "--steps", "2"]
        out = python(tmp_path, "-c", block, *(flags if "lab.main" in block else ()))
        if printed:
            assert re.sub(number, "#", out) == re.sub(number, "#", printed)
            found, stated = ([float(n) for n in re.findall(number, text)]
                             for text in (out, printed))
            assert found == pytest.approx(stated, rel=0.05)
    assert any(printed for _, printed in blocks)
    assert (tmp_path / "runs/church/results.json").is_file()  # of the method of one's own


# --- what is said

def test_quoted_code_stands_in_its_file():
    """Word for word, from one place, at most 15 lines: blocks that name a file."""
    quotes = re.findall(r"^```python (\S+)\n(.*?)\n```", "".join(DOCS.values()), re.M | re.S)
    assert len(quotes) >= 12
    for path, quote in quotes:
        code, n = (ROOT / path).read_text(encoding="utf-8").splitlines(), len(quote.splitlines())
        parts = ["\n".join(code[i : i + n]) for i in range(len(code))]
        assert n <= 15 and quote in map(textwrap.dedent, parts), f"{path}: {quote}"


def test_pictures_are_there_and_small():
    pictures = {path for text in DOCS.values()
                for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    assert len(pictures) >= 5
    assert sum((ROOT / path).stat().st_size for path in pictures) <= 1.5e6


MODULES = [au, au.Config, sd_mini, sd_mini.StableDiffusion, schedule.Schedule, files, pipeline,
           weights, lab, lab.Method, classifiers, compare, evaluation, experiment, prompts,
           report, runs, settings, tasks, classifier, train, world, assignment, bench]
OTHER_FLAGS = {"--help", "--check", "--out", "--exercise", "--grade-seed", "--only", "--score",
               "--index-url", "--model", "--seed", "--draw"}
# Words in code type that are no names of ours.
LITERAL = {"config", "main", "toy", "church", "eta", "alpha_bar", "noise", "guidance", "eps_empty",
           "details", "results", "erased", "token", "prompt", "evaluation_seed", "sd_mini",
           "evaluation_guidance", "sd_seed", "sd_guidance_scale", "diffusers", "huggingface_hub",
           "HF_HOME", "HF_HUB_OFFLINE", "position_ids", "text_model.", "condition_embd", "fast_at",
           "attack_init", "hardtanh", "pytest", "python", "imagenet", "coco", "unet",
           "ID", "world.ERASED", "samples.png", "losses.png", "results.json", "table.md",
           "compare.png", "tradeoff.png", "grade.json", "forget.py",
           "HANDOUT.md", "photos", "kind", "synonyms", "not_retained"}


@pytest.mark.parametrize("name", DOCS)
def test_what_is_named_exists(name):
    here = (ROOT / name).parent
    text = re.sub(r"^```.*?^```", "", DOCS[name], flags=re.M | re.S)
    options = {f.name for f in fields(au.Config)} | {*au.METHOD.attacks, *au.TRAINED, *bench.ROWS}
    flags = {"--" + option.replace("_", "-") for option in options} | OTHER_FLAGS
    assert not set(re.findall(r"(--[a-z][\w-]*)", text)) - flags

    def exists(word):
        named = any(has_path(module, word) for module in MODULES)
        is_file = (ROOT / word).exists() or (here / word).exists()
        return word in LITERAL | options or named or is_file

    assert not {word for word in re.findall(r"`([A-Za-z_][\w.]*)`", text) if not exists(word)}
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert all((here / path).exists() for path in links)


def test_every_flag_is_in_a_document():
    flags = {"--" + f.name.replace("_", "-") for f in fields(au.Config) if f.metadata}
    assert not flags - {*re.findall(r"--[a-z][\w-]*", "".join(DOCS.values()))}


def test_links_to_sections_lead_somewhere():
    for name, text in DOCS.items():
        for path, section in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert section in anchors, f"{name}: #{section}"


def has_path(module, path):
    for part in path.removeprefix("sd.").split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True
