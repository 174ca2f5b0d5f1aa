"""README.md and TUTORIAL.md cannot drift: what they name exists, and their commands and Python run (on a small budget)."""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import advunlearn as au
import sd_mini.checkpoint
import sd_mini.judges
import sd_mini.report
import sd_mini.toy.train
import sd_mini.weights

from . import assignment, bench
from .test_faults import cli
from .test_run import FLAGS, ROOT

DOCS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "TUTORIAL.md")}
COMMANDS = list(dict.fromkeys(line.replace("torchrun --nproc-per-node=2", "python")  # two processes: see test_run and test_compare
                              for text in DOCS.values() for line in re.findall(r"^    ((?:python|pip|pytest|torchrun|KILLS).*)$", text, re.M)))
METHOD = [part for command in COMMANDS for part in command.split(" && ") if part.startswith("python advunlearn.py")]
MODULES = [au, sd_mini, sd_mini.checkpoint, sd_mini.judges, sd_mini.report, sd_mini.weights, sd_mini.pipeline.Schedule, sd_mini.toy.train,
           sd_mini.StableDiffusion, au.Config, assignment, bench]


def parsed(command):
    """A documented command's flags as settings."""
    return au.parse(shlex.split(command)[2:])


def python(folder, *arguments):
    """Run Python on the project there, well -> what it prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", METHOD)
def test_commands_of_the_method_parse(command):
    if "--help" not in command:
        parsed(command)


RUN = "import json, sys, advunlearn\nfor given in json.loads(sys.argv[1]): assert advunlearn.main(given) == 0, given"


@pytest.mark.beside
def test_commands_of_the_method_run(tmp_path):
    """All that need no download, in the documents' order, in one folder, as a reader would; each on a small budget."""
    here = {}
    for command in METHOD:
        if not re.search(r"--help|stable-diffusion|--judge", command):
            here.setdefault(re.sub(r" --(out|seed) \S+| --methods .*?(?= --|$)", "", command), command)  # one of those that differ in these alone
    runs, done = [], set()
    for given in map(parsed, here.values()):
        small = au.parse([*FLAGS, "--steps", "2", "--trajectory-steps", "1", "--eval-prompts", "1", "--eval-utility", "2", "--eval-steps", "2",
                          "--eval-attack-steps", "2", "--eval-looks", "1"])
        small = {"eval_steps": 2} if given.get("task") == "sample" else small
        small |= {"methods": ["ESD"]} if given.get("task") == "compare" else {}
        out = given.get("out") or ("runs/church" if given.get("task", "train") == "train" else "")
        runs.append({**given, **small, "overwrite": out in done})
        done.add(out)
    assert len(runs) >= 8
    python(tmp_path, "-c", RUN, json.dumps(runs))


MODULE_COMMANDS = {  # what else is documented: how to make it short; None for an hour of training and for this suite itself
    'python -m sd_mini "a photo of a church" --model toy --seed 3 --out church.png': "",
    "python -m tests.bench": " help", "python -m tests.assignment --out ../homework": "", "pip install -r requirements.txt": None,
    "pytest": None, "python -m sd_mini.toy.train --out my-toy": None, "python -m sd_mini.toy.train --check": None}


@pytest.mark.beside
def test_other_commands_run(tmp_path):
    others = [part for command in COMMANDS for part in command.split(" && ") if not part.startswith("python advunlearn.py")]
    assert set(others) <= set(MODULE_COMMANDS)
    (tmp_path / "here").mkdir()
    for command in others:
        if MODULE_COMMANDS[command] is not None:
            python(tmp_path / "here", *shlex.split(command + MODULE_COMMANDS[command])[1:])
    assert (tmp_path / "here/church.png").stat().st_size > 3000 and (tmp_path / "homework/HANDOUT.md").is_file()


@pytest.mark.beside
def test_python_blocks_run(tmp_path):
    """... and print, up to the last digits, what stands below them."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    blocks = [block for text in DOCS.values() for block in re.findall(pattern, text, re.M | re.S)]
    number = r"\d+\.\d+"
    for block, printed in blocks:
        out = python(ROOT, "-c", block)
        if printed:
            assert re.sub(number, "#", out) == re.sub(number, "#", printed)
            found, stated = ([float(n) for n in re.findall(number, text)] for text in (out, printed))
            assert found == pytest.approx(stated, rel=0.05)
    assert any(printed for _, printed in blocks)


def test_pictures_are_there_and_small():
    pictures = {path for text in DOCS.values() for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    assert len(pictures) >= 5 and sum((ROOT / path).stat().st_size for path in pictures) <= 1.5e6


@pytest.mark.parametrize("name", DOCS)
def test_what_is_named_exists(name):
    text = re.sub(r"^```.*?^```", "", DOCS[name], flags=re.M | re.S)
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", text))
    flags = {"--" + f.name.replace("_", "-") for f in au.fields(au.Config)} | {"--help", "--check", "--out", "--exercise", "--grade-seed",
                                                                                "--only", "--score", "--nproc-per-node", "--index-url", "--model", "--seed"}
    unknown_flags = set(re.findall(r"(--[a-z][\w-]*)", text)) - flags
    assert not unknown_flags
    literal = {"config", "input_ids", "embeddings", "main", "toy", "church", "t", "E", "p", "eta", "gamma", "alpha_bar", "noise", "guidance",
               "eps_empty", "details", "results", "erased", "token", "prompt", "label", "evaluation_seed", "evaluation_guidance", "diffusers", "huggingface_hub", "HF_HOME",
               "HF_HUB_OFFLINE", "position_ids", "text_model.", "condition_embd", "fast_at", "cross_attention", "pytest", "original", "matplotlib", "tqdm", "KILLS", "torchrun", "python", "complete", "imagenet"}
    settings = {f.name for f in au.fields(au.Config)}
    exists = lambda word: (word in literal | settings or any(hasattr_path(module, word) for module in MODULES) or (ROOT / word).exists()
                           or any(ROOT.glob(f"*/{word}")) or any(ROOT.glob(f"sd_mini/toy/{word}")) or word in RUN_FILES)
    assert not {word for word in names if not exists(word)}
    paths = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert all((ROOT / path).exists() for path in paths)


RUN_FILES = {"samples.png", "losses.png", "results.json", "table.md", "compare.png", "tradeoff.png", "grade.json", "HANDOUT.md"}


def hasattr_path(module, path):
    for part in path.removeprefix("sd.").split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True
