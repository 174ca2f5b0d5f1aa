"""Wrong versions of the code, drawn at random: do the tests catch them?

    python -m tests.mutants 30 --seed 1

Each is made in a copy of the project, and the tests of its room are run. It changes one node of the
syntax tree: a sign, a comparison, a constant, swapped arguments, a dropped statement, a result cut
off from its gradient. What passes computes the same, or no test is about it. A minute each; exit
status 1 if any passed. Wrong versions that students write are in tests/coursework.
"""
import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAPER, EVALUATION = "advunlearn.py", "sd_mini/lab/evaluation.py"
DRAWN = [PAPER, EVALUATION, *(f"sd_mini/{each.name}" for each in sorted(ROOT.glob("sd_mini/*.py")))]
OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
            ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
            ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot}


def wrong(node):
    """What may stand in the place of a node of the syntax tree; itself if nothing is tried."""
    new = copy.deepcopy(node)
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPPOSITE:
        new.op = OPPOSITE[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
        new.ops[0] = OPPOSITE[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp):
        return node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        new.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        new.args[:2] = reversed(new.args[:2])
    elif isinstance(node, (ast.AugAssign, ast.If)) or (
            isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)):
        return ast.Pass()
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
        new.value = ast.Call(ast.Attribute(new.value, "detach", ast.Load()), [], [])
    return new


def places(file):
    """(file, tree, parent, field, i, node, what may stand there) for each of its nodes."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(node, ast.AST) and ast.dump(new := wrong(node)) != ast.dump(node):
                    yield file, tree, parent, field, i, node, new


def drawn(n, seed):
    """n wrong versions at random -> (description, file, source)."""
    everywhere = [place for file in DRAWN for place in places(file)]
    for file, tree, parent, field, i, node, new in random.Random(seed).sample(everywhere, n):
        right = getattr(parent, field)
        wrong = [*right[:i], new, *right[i + 1 :]] if isinstance(right, list) else new
        what = f"{node.lineno}: {ast.unparse(node)}  ->  {ast.unparse(new)}"
        setattr(parent, field, wrong)
        yield what, file, ast.unparse(ast.fix_missing_locations(tree))
        setattr(parent, field, right)


def tests_of(file):
    """Its room and the exercises', without the golden run, which is for what no test is about."""
    if file == EVALUATION:
        return ["tests/paper/test_evaluation.py", "tests/lab"]
    room = ["tests/paper", "--ignore=tests/paper/test_golden.py"] if file == PAPER else ["tests/sd"]
    return [*room, "tests/coursework/test_exercises.py"]


def passes(folder, file, source):
    """Do its tests pass in the copy `folder`, with this source?"""
    right = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               *tests_of(file)]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return not subprocess.run(command, cwd=folder, capture_output=True, timeout=1200,
                                  env=environment).returncode
    except subprocess.TimeoutExpired:  # it hangs, as nobody can overlook
        return False
    finally:
        (folder / file).write_text(right, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    passed = 0
    with tempfile.TemporaryDirectory() as root:
        leave_out = shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache")
        folder = Path(shutil.copytree(ROOT, Path(root) / "copy", ignore=leave_out))
        for what, file, source in drawn(args.n, args.seed):
            through = passes(folder, file, source)
            passed += through
            print(f"{'PASSED' if through else 'caught'}  {Path(file).name:14} {what}", flush=True)
    print(f"{args.n} wrong versions, {passed} passed")
    return int(passed > 0)


if __name__ == "__main__":
    sys.exit(main())
