"""The project as coursework.

    python -m tests.coursework --out ../homework              a student's copy, all exercises
    python -m tests.coursework --out ../homework --only 2,5   some exercises

In the copy the functions of the exercises are blank. A handout and the grader are there too.
`pytest --exercise 3` grades one exercise, `pytest` all. Both print a table of scores and write
grade.json. Two exercises are open. Their score is what the toy then does:
`python -m tests.coursework --score 11`, or 12.
"""
import argparse
import ast
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

# Nothing of the project is imported here: a student's file may be no Python.
from .exercises import CHECKS, EXERCISES, FILES

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).parents[1] / "reference.zip"  # in a student's copy: the solutions
SCORED = {  # the open exercises: section, title, task, flags of the run that is scored
    11: (
        10,
        "a better attack",
        "Change `token_attack` or `embedding_attack` so that it breaks ESD more often with the "
        "same number of steps (`--eval-attack-steps`); hand in a sentence on why it does.",
        ["--attack", "none", "--retain-weight", "0", "--train", "no_cross_attention",
         "--lr", "1e-4"],
    ),
    12: (
        7,
        "a better retain set",
        "Write `prompts/retain_mine.csv` (column `prompt`; the concept is filtered out) so that "
        "AdvUnlearn keeps more, styles included, and stays as robust.",
        ["--retain-set", "mine"],
    ),
}
SCORES = ("pre_attack_asr", "token_asr", "embedding_asr", "utility", "neighbours", "styles")
HANDOUT = """\
# AdvUnlearn: exercises

Replace each `raise NotImplementedError` by the body that signature and docstring ask for. The
equations are in `TUTORIAL.md`. `pytest --exercise 3` grades one exercise, `pytest` all of them.
Each is graded by itself: a wrong one costs no points in the others. You can choose the seeds,
`pytest --grade-seed 7`: a copied constant does not pass.

    pip install -r requirements.txt
    pytest --exercise 1

| exercise | what | where | TUTORIAL.md |
| --- | --- | --- | --- |
{rows}

The open exercises are scored by what the toy then does. A score takes a few minutes on a laptop:
`python -m tests.coursework --score 11`.
"""


# --- the student's copy

def functions(tree):
    """{qualified name: node} of a module's functions and methods."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {f"{node.name}.{item.name}": item for item in methods}
    return found


def blank(source, name, message):
    """The source, where one function's body is `raise NotImplementedError(message)` instead.

    Its docstring stays.
    """
    node, lines = functions(ast.parse(source))[name], source.splitlines(keepends=True)
    first = node.body[1] if ast.get_docstring(node) else node.body[0]
    indent = " " * first.col_offset
    body = f"{indent}raise NotImplementedError({json.dumps(message)})\n"
    return "".join([*lines[: first.lineno - 1], body, *lines[node.end_lineno :]])


def make(out, only=()):
    """Write the student's copy to a new folder."""
    from sd_mini.files import make_writable

    within = ROOT in out.resolve().parents  # pytest would find two of each test
    if out.exists() or within:
        why = "is inside the project; choose a folder beside it" if within else "is there already"
        print(f"error: --out {out}: {why}", file=sys.stderr)
        sys.exit(2)
    chosen = {number: exercise for number, exercise in EXERCISES.items()
              if not only or number in only}
    # Lists of wrong versions hold the right lines too.
    solved = ("mutants.py", "paper", "test_mutants.py", "test_assignment.py")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "reference.zip", *solved)
    for name in ("sd_mini", "prompts", "tests"):
        shutil.copytree(ROOT / name, out / name, ignore=ignore)
    for name in ("advunlearn.py", "requirements.txt", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, out / name)
    make_writable(out)
    for name in ("README.md", "TUTORIAL.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (out / name).write_text(without_answers(text), encoding="utf-8")
    with zipfile.ZipFile(out / "tests/reference.zip", "w") as solutions:
        for file in FILES:
            solutions.write(ROOT / file, f"reference_{Path(file).name}")
    for number, exercise in chosen.items():
        for file, names in exercise.functions.items():
            source = (out / file).read_text(encoding="utf-8")
            for name in names:
                message = (f"Exercise {number}: {exercise.title}, {name}; see TUTORIAL.md, section "
                           f"{exercise.section}")
                source = blank(source, name, message)
            (out / file).write_text(source, encoding="utf-8")
    (out / "HANDOUT.md").write_text(handout(chosen), encoding="utf-8")


def without_answers(text):
    """A document without what is folded, and without the code that it quotes from a file."""
    folded, quoted = r"^<details>.*?^</details>\n+", r"^```python \S+\n.*?^```\n+"
    return re.sub(f"{folded}|{quoted}", "", text, flags=re.M | re.S)


def handout(chosen):
    """The text of HANDOUT.md: how to work, and a table of the exercises."""
    rows = []
    for n, e in chosen.items():
        where = "; ".join(f"{', '.join(f'`{name}`' for name in names)} in `{file}`"
                          for file, names in e.functions.items())
        rows.append(f"| {n} | {e.title} | {where} | section {e.section} |")
    for n, (section, title, task, _) in SCORED.items():
        rows.append(f"| {n} | {title} (open) | {task} | section {section} |")
    return HANDOUT.format(rows="\n".join(rows))


def score(number):
    """Run an open exercise in this folder, and print the figures that count."""
    *_, flags = SCORED[number]
    out = ROOT / f"runs/exercise-{number}"
    command = [sys.executable, "advunlearn.py", "--concept", "church", *flags, "--overwrite",
               "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT)
    if run.returncode:
        sys.exit("error: that run failed, see above; the blanks of exercises 1 to 10 must be "
                 "filled before an open one is scored")
    figures = json.loads((out / "results.json").read_text())["results"]["erased"]
    rates = [f"{name} {100 * figures[name]['rate']:.0f} %" for name in SCORES]
    print(f"Exercise {number}  " + ", ".join(rates))


# --- grading

def module_name(file):
    return file.removesuffix(".py").replace("/", ".")


class StandIn(SourceFileLoader):
    """Imports a file as if another source stood in it."""

    def __init__(self, file, source):
        super().__init__(module_name(file), str(ROOT / file))
        self.source = source

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, name):
        return self.source_to_code(self.source, self.path)


def stand_in():
    """In a student's copy: what is no Python is imported with all its exercises blank.

    Files import each other. So one that is broken would cost the points of all.
    """
    for file in FILES if REFERENCE.is_file() else ():
        try:
            ast.parse((ROOT / file).read_bytes(), file)
        except SyntaxError as error:
            with zipfile.ZipFile(REFERENCE) as solutions:
                source = solutions.read(f"reference_{Path(file).name}").decode()
            for exercise in EXERCISES.values():
                for name in exercise.functions.get(file, ()):
                    source = blank(source, name, f"this file is no Python: {error}")
            sys.meta_path.insert(0, StandIn(file, source))


def load_module(name, path):
    """A file as a module of that name. A module of the file's own name is left as it is."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def students():
    """{file: module} of this folder."""
    return {file: importlib.import_module(module_name(file)) for file in FILES}


def references():
    """{file: module} with the solutions: this project's, or in a student's copy the zip's."""
    if not REFERENCE.is_file():
        return students()
    if str(REFERENCE) not in sys.path:
        sys.path.append(str(REFERENCE))
    return {file: importlib.import_module("reference_" + Path(file).stem) for file in FILES}


def lookup(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


class Solution:
    """What a check sees: the student's modules, with the reference's functions for the others."""

    def __init__(self, modules, sd):
        self.modules, self.sd, self.schedule = modules, sd, sd.schedule

    def __getattr__(self, name):
        return next(getattr(module, name) for module in self.modules.values()
                    if hasattr(module, name))

    def small(self, **changes):
        """A config for the toy, with few and small steps."""
        from sd_mini.lab.settings import TOY

        return self.Config(**{**TOY, **self.TOY, "model": "toy", "device": "cpu", "attack_steps": 2,
                              "trajectories": 4, "trajectory_steps": 4, "erase_batch": 4,
                              "retain_batch": 2, **changes})


@contextlib.contextmanager
def standing_in(number, student, reference, sd):
    """-> Solution, with the student's functions for exercise `number`, else the reference's.

    The student's modules are as before at the end.
    """
    with pytest.MonkeyPatch.context() as patch:
        for n, exercise in EXERCISES.items():
            source = student if n == number else reference
            for file, name in exercise.places():
                owner = type(sd.schedule) if name.startswith("Schedule.") else student[file]
                function = lookup(source[file], name)
                patch.setattr(owner, name.split(".")[-1], function, raising=False)
        yield Solution(student, sd)


def grade(number, student, reference, sd, seeds=(0, 1), whole=True):
    """-> {check: None where it passes on all seeds, else what was expected}.

    Without `whole`, grading ends at the first lost point.
    """
    points = {}
    with standing_in(number, student, reference, sd) as solution:
        for check in CHECKS[number]:
            points[check.__name__] = None
            for seed in seeds:
                try:
                    check(solution, seed)
                except Exception as error:  # a student's code may do anything
                    expected = isinstance(error, AssertionError)
                    message = f"{error}" if expected else f"{type(error).__name__}: {error}"
                    points[check.__name__] = message
                    break
            if points[check.__name__] and not whole:
                break
    return points


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=os.path.expanduser, help="folder for the student's copy")
    parser.add_argument("--only", default="", help="exercises, with commas")
    parser.add_argument("--score", type=int, choices=list(SCORED), help="run an open exercise")
    args = parser.parse_args()
    if args.score:
        return score(args.score)
    if not args.out:
        parser.error("give --out or --score")
    only = [int(number) for number in args.only.split(",") if number]
    if unknown := set(only) - set(EXERCISES):
        parser.error(f"--only: there is no exercise {min(unknown)}")
    make(Path(args.out), only)
    sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{args.out}: HANDOUT.md says the rest")
