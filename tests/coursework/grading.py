"""Grading: a student's functions for one exercise, and the solutions for all others.

Nothing of the project is imported at the start: a student's file may be no Python.
"""
import ast
import contextlib
import importlib.util
import json
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from .exercises import CHECKS, EXERCISES, FILES

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).with_name("reference.zip")  # in a student's copy: the solutions


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


# --- the student's modules, and the solutions

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
    """In a student's copy: what is no Python is imported as it was handed out.

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


# --- points

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


def lookup(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


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
