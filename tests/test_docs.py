"""The documents cannot drift: what they name exists, and their commands and Python run."""
import csv
import re
import runpy
import shlex
import sys
import textwrap
from dataclasses import fields

import pytest

import advunlearn as au
import sd_mini
from sd_mini.lab import compare, experiment, settings, tasks

from . import bench
from .lab import LAB, OWN, TOY, flags

ROOT = bench.ROOT
NAMES = ("README.md", "TUTORIAL.md", "sd_mini/README.md", "sd_mini/toy/README.md",
         "sd_mini/lab/README.md")
DOCS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
TEXT = "\n".join(DOCS.values())
METHOD = list(dict.fromkeys(re.findall(r"python advunlearn\.py -[^`\n]*", TEXT)))


# --- what is run

@pytest.mark.long
def test_commands_of_the_method_run(tmp_path, monkeypatch):
    """Of all that need no download what draws, or leaves what another reads; the others load."""
    monkeypatch.chdir(tmp_path)
    for command in METHOD:
        given = settings.parse(au.Config, shlex.split(command)[2:])
        if re.search(r"stable-diffusion|--classifier|OPTML", command):
            continue
        given = {**TOY, **given, **LAB, **OWN}
        config = tasks.resolve(au.METHOD, given)
        out = config.out or f"runs/{config.concept}"
        is_read = config.task == "train" and any(f" {out}/" in other for other in METHOD)
        if config.task == "sample" or is_read:
            assert tasks.run_task(au.METHOD, given) == 0, command
            continue
        loaded = experiment.open_experiment(au.METHOD, config)
        rows = au.comparison_rows(loaded.sd_o, loaded.concepts, config)
        compare.wanted_rows([*rows], config.methods)
    assert {"church", "church-esd", "sample"} <= {path.name for path in tmp_path.glob("runs/*")}


# What else is documented, and how to make it short. None: an hour of training, or this suite.
OTHERS = {
    "python -m tests.bench": " evaluations", "python -m tests.coursework --out ../homework": "",
    "pip install -r requirements.txt": None, "pytest -n 2": None,
    "KILLS=20 pytest tests/lab/test_faults.py -k killed": None,
    "python -m sd_mini.toy.train --out my-toy": None, "python -m sd_mini.toy.train --check": None}


@pytest.mark.filterwarnings("ignore:'tests.bench' found in sys.modules")
def test_other_commands_run(tmp_path, monkeypatch):
    lines = re.findall(r"^    ((?:python|pip|pytest|KILLS).*)$", TEXT, re.M)
    parts = {part for line in lines for part in line.split(" && ")}
    assert parts - {*METHOD} == {*OTHERS}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command, more in OTHERS.items():
        if more is not None:
            _, _, module, *words = shlex.split(command + more)
            monkeypatch.setattr(sys, "argv", [module, *words])
            runpy.run_module(module, run_name="__main__")
    assert (tmp_path / "homework/HANDOUT.md").is_file()


@pytest.mark.long
def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    """... and print what stands below. One attacks an erased model: here it is the original."""
    monkeypatch.chdir(tmp_path)
    sd_mini.save_pipeline(sd_mini.load("toy"), "runs/church-esd/pipeline")
    monkeypatch.setattr(sys, "argv", ["forget.py", *flags(steps=2)])
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    blocks = re.findall(pattern, TEXT, re.M | re.S)
    for block, printed in blocks:
        block = block if printed else re.sub(r"steps=\d+", "steps=2", block)
        try:
            exec(block, {"__name__": "__main__"})
        except SystemExit as end:  # of the method of one's own
            assert end.code == 0
        out, number = capsys.readouterr().out, r"\d+\.\d+"
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
    quotes = re.findall(r"^```python (\S+)\n(.*?)\n```", TEXT, re.M | re.S)
    assert len(quotes) >= 12
    for path, quote in quotes:
        code, n = (ROOT / path).read_text(encoding="utf-8").splitlines(), len(quote.splitlines())
        parts = ["\n".join(code[i : i + n]) for i in range(len(code))]
        assert n <= 15 and quote in map(textwrap.dedent, parts), f"{path}: {quote}"


def test_pictures_are_there_and_small():
    pictures = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT))
    assert len(pictures) >= 5
    assert sum((ROOT / path).stat().st_size for path in pictures) <= 1.5e6


CODE = "\n".join(path.read_text(encoding="utf-8") for path in (
    ROOT / "advunlearn.py", *ROOT.glob("sd_mini/**/*.py"), *ROOT.glob("tests/**/*.py"))
    if path.name != "test_docs.py")
FLAGS = {"--" + f.name.replace("_", "-") for f in fields(au.Config) if f.metadata}
# What is in no code of ours.
ELSEWHERE = {"HF_HOME", "attack_init", "condition_embd", "fast_at", "hardtanh", "forget.py",
             "--index-url"}


@pytest.mark.parametrize("name", DOCS)
def test_what_is_named_exists(name):
    """Files, links, flags, and what is in code type, as a word of the code."""
    here = (ROOT / name).parent
    text = re.sub(r"^```.*?^```", "", DOCS[name], flags=re.M | re.S)
    words = {*re.findall(r"`([A-Za-z_][\w.]*)`", text), *re.findall(r"--[a-z][\w-]*", text)}
    known = {*re.findall(r"--[a-z][\w-]*|[\w.]+", CODE)} | FLAGS | ELSEWHERE
    assert not {word for word in words - known if not any(
        (folder / word).exists() for folder in (ROOT, here))}
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert all((here / path).exists() for path in links)


def test_every_flag_is_in_a_document():
    assert not FLAGS - {*re.findall(r"--[a-z][\w-]*", TEXT)}


def test_links_to_sections_lead_somewhere():
    for name, text in DOCS.items():
        for path, section in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert section in anchors, f"{name}: #{section}"


def tables(text, head):
    """Rows of cells of the table whose first cell begins like this."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        if rows[0][0].startswith(head):
            return rows[0], rows[2:]


def test_figures_are_those_of_the_results():
    """README: a row each figure of church. The lab: a row each concept, with two methods a cell."""
    results = {}
    for path in (ROOT / "sd_mini/lab/results").glob("*.csv"):
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        results[path.stem] = {row["method"]: row for row in rows}
    (about, *methods), rows = tables(DOCS["README.md"], "church, seed")
    for title, *cells in rows:
        assert cells == [results["church"][method][title] for method in methods], title
    assert {*re.findall(r"\d+", about)} == {*results["church"]["AdvUnlearn"]["seeds"].split()}
    (_, *columns), rows = tables(DOCS["sd_mini/lab/README.md"], "%: ESD, AdvUnlearn")
    for concept, *cells in rows:
        rows = [results[concept.replace(" ", "_")][method] for method in ("ESD", "AdvUnlearn")]
        for column, cell in zip(columns, cells, strict=True):
            figures = [next(row[title] for title in row if column in title) for row in rows]
            assert cell == ", ".join(figure.split(" ")[0] for figure in figures), (concept, column)
