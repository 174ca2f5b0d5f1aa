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
import importlib.util
import json
import os
import re
import shutil
import sys
import zipfile
import zipimport
from pathlib import Path

import pytest

# Nothing of the project is imported here: a student's file may be no Python.
from .exercises import EXERCISES, FILES

ROOT = Path(__file__).parents[2]
SOLUTIONS = Path(__file__).parents[1] / "reference.zip"  # in a student's copy
COPIED = ("sd_mini", "prompts", "tests/coursework", "tests/pictures", "tests/__init__.py",
          "tests/conftest.py", "advunlearn.py", "requirements.txt", "LICENSE", ".gitignore",
          "README.md", "TUTORIAL.md")
SCORED = {  # the open exercises: section, title, task, settings of the run that is scored
    11: (10, "a better attack",
         "Change `token_attack` or `embedding_attack` so that it breaks ESD more often with the "
         "same number of steps (`--eval-attack-steps`); hand in a sentence on why it does.",
         dict(attack="none", retain_weight=0.0, train="no_cross_attention", lr=1e-4)),
    12: (7, "a better retain set",
         "Write `prompts/retain_mine.csv` (column `prompt`; the concept is filtered out) so that "
         "AdvUnlearn keeps more, styles included, and stays as robust.", dict(retain_set="mine")),
}
SCORES = ("pre_attack_asr", "token_asr", "embedding_asr", "utility", "neighbours", "styles")
HANDOUT = """\
# AdvUnlearn: exercises

    pip install -r requirements.txt
    pytest --exercise {first}

Replace each `raise NotImplementedError` by the body that signature and docstring ask for. The
equations are in `TUTORIAL.md`. Plain `pytest` grades all exercises, each by itself: a wrong one
costs no points in the others. A copied constant does not pass, since the teacher chooses other
inputs (`--grade-seed 7`). `--tb short` shows where in your code it broke. Hand in the files that
you changed.

| exercise | what | where | TUTORIAL.md |
| --- | --- | --- | --- |
{rows}

The open exercises are scored by what the toy then does. A score takes a few minutes on a laptop:
`python -m tests.coursework --score 11`.
"""


# --- the student's copy

def functions(tree, prefix=""):
    """{qualified name: node} of a module's functions and methods."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= functions(node, f"{node.name}.")
    return found


def blank(source, name, message):
    """The source, where one function raises NotImplementedError; its docstring stays."""
    node, lines = functions(ast.parse(source))[name], source.splitlines(keepends=True)
    first = node.body[1] if ast.get_docstring(node) else node.body[0]
    indent = " " * first.col_offset
    body = f"{indent}raise NotImplementedError({json.dumps(message)})\n"
    return "".join([*lines[: first.lineno - 1], body, *lines[node.end_lineno :]])


def make(out, numbers=(*EXERCISES,)):
    """Write the student's copy to a new folder, with these exercises."""
    from sd_mini.files import make_writable

    chosen = {n: exercise for n, exercise in EXERCISES.items() if n in numbers}
    ignored = shutil.ignore_patterns("__pycache__", "test_assignment.py")  # it has right lines
    for name in COPIED:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, out / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, out / name)
    make_writable(out)  # the project may be read-only
    with zipfile.ZipFile(out / "tests" / SOLUTIONS.name, "w") as solutions:
        for file in FILES:
            solutions.writestr(file, (ROOT / file).read_bytes())
    for name in ("README.md", "TUTORIAL.md"):
        rewrite(out / name, without_answers)
    graded = out / "tests/coursework/test_exercises.py"
    rewrite(graded, str.replace, "in EXERCISES", f"in {[*chosen]}")
    for number, exercise in chosen.items():
        for file, name in exercise.places():
            message = (f"Exercise {number}: {exercise.title}, {name}; see TUTORIAL.md, section "
                       f"{exercise.section}")
            rewrite(out / file, blank, name, message)
    (out / "HANDOUT.md").write_text(handout(chosen), encoding="utf-8")


def rewrite(path, change, *arguments):
    path.write_text(change(path.read_text(encoding="utf-8"), *arguments), encoding="utf-8")


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
    return HANDOUT.format(first=min(chosen), rows="\n".join(rows))


def score(number):
    """Run an open exercise in this folder, and print the figures that count."""
    import advunlearn
    from sd_mini.lab.tasks import run_task

    *_, settings = SCORED[number]
    out = ROOT / f"runs/exercise-{number}"
    settings = {**settings, "model": "toy", "overwrite": True, "out": str(out)}
    if status := run_task(advunlearn.METHOD, settings):
        sys.exit(status)
    figures = json.loads((out / "results.json").read_text())["results"]["erased"]
    rates = [f"{name} {100 * figures[name]['rate']:.0f} %" for name in SCORES]
    print(f"Exercise {number}  " + ", ".join(rates))


# --- grading

class Solved:
    """In a student's copy `import advunlearn` gives the solution, and so for all of FILES.

    The student's own are loaded beside them, for one exercise at a time, by `standing_in`.
    """

    files = {file.removesuffix(".py").replace("/", "."): file for file in FILES}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in cls.files:
            folder = (SOLUTIONS / cls.files[name]).parent
            return zipimport.zipimporter(str(folder)).find_spec(name)


def load(file, root):
    """A student's file, as a module of another name than the solution's."""
    name = f"student_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, root / file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Solution:
    """What a check sees: the names of all modules, the model, a schedule."""

    def __init__(self, modules, sd):
        self.modules, self.sd = list(modules.values()), sd
        self.schedule = self.Schedule(sd.schedule.config)

    def __getattr__(self, name):
        return next(getattr(module, name) for module in self.modules if hasattr(module, name))

    def small(self, **changes):
        """A config for the toy, with few and small steps."""
        from sd_mini.lab.settings import TOY

        return self.Config(**{**TOY, **self.TOY, "model": "toy", "device": "cpu", "attack_steps": 2,
                              "trajectories": 2, "trajectory_steps": 3, "erase_batch": 2,
                              "retain_batch": 2, **changes})


@contextlib.contextmanager
def standing_in(number, sd, root=ROOT):
    """-> Solution, with the functions of that exercise from the folder root, a student's."""
    solved = {file: importlib.import_module(name) for name, file in Solved.files.items()}
    modules = {**solved, **{file: load(file, root) for file in EXERCISES[number].functions}}
    with pytest.MonkeyPatch.context() as patch:
        for n, exercise in EXERCISES.items():
            for file, name in exercise.places():
                owner, _, attribute = name.rpartition(".")
                function = lookup((modules if n == number else solved)[file], name)
                patch.setattr(lookup(modules[file], owner), attribute, function, raising=False)
        yield Solution(modules, sd)


def lookup(module, name):
    for part in filter(None, name.split(".")):
        module = getattr(module, part)
    return module


def main():
    from sd_mini.lab.settings import Parser

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=os.path.expanduser, help="folder for the student's copy")
    parser.add_argument("--only", default=",".join(map(str, EXERCISES)),
                        help="exercises, with commas")
    parser.add_argument("--score", type=int, choices=list(SCORED), help="run an open exercise")
    args = parser.parse_args()
    if args.score:
        try:
            return score(args.score)
        except NotImplementedError as blank:
            parser.error(f"--score {args.score}: to be filled before: {blank}")
    if not args.out:
        parser.error("give --out or --score")
    out, only = Path(args.out), args.only.split(",")
    if unknown := set(only) - set(map(str, EXERCISES)):
        parser.error(f"--only: there is no exercise {min(unknown)} to be blanked")
    if out.exists():
        parser.error(f"--out {out}: is there already")
    if ROOT in out.resolve().parents:  # pytest would find two of each test
        parser.error(f"--out {out}: is inside the project; choose a folder beside it")
    make(out, [*map(int, only)])
    sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{out}: HANDOUT.md says the rest")
