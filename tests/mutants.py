"""Wrong versions of the code, drawn at random: do the tests catch them?

    python -m tests.mutants 30 --seed 1

Each changes one node of the syntax tree, in a copy of the project. The tests of its room are run.
What passes computes the same, or no test is about it. A minute each; exit status 1 if any passed.
"""
import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT, EXERCISES = Path(__file__).resolve().parents[1], "tests/coursework/test_exercises.py"
ROOMS = {  # file -> its tests, without the golden run, which is for what no test is about
    "advunlearn.py": ["tests/paper", "--ignore=tests/paper/test_golden.py", EXERCISES],
    "sd_mini/lab/evaluation.py": ["tests/paper/test_evaluation.py", "tests/lab"],
    **{f"sd_mini/{each.name}": ["tests/sd", EXERCISES] for each in ROOT.glob("sd_mini/*.py")}}
PAIRS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.Lt, ast.LtE),
         (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)]
OPPOSITE = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}


def wrong(node):
    """What may stand in the place of a node; None where nothing is tried."""
    match node:
        case ast.Constant(bool(x)):
            return ast.Constant(not x)
        case ast.Constant(int(x) | float(x)):
            return ast.Constant(x + 1)
        case ast.UnaryOp(_, x):
            return x
        case ast.Call(f, [a, b, *others], named):
            return ast.Call(f, [b, a, *others], named)
        case ast.Return(ast.Call() as x):
            return ast.Return(ast.Call(ast.Attribute(x, "detach", ast.Load()), [], []))
        case ast.AugAssign() | ast.If() | ast.Expr(ast.Call() | ast.Yield()):
            return ast.Pass()
    return OPPOSITE[type(node)]() if type(node) in OPPOSITE else None


class Mutant(ast.NodeTransformer):
    """Puts something wrong in place number `at`, and counts the places."""

    at, places = None, 0

    def visit(self, node):
        self.generic_visit(node)
        new = wrong(node)
        self.places += new is not None
        return new if new and self.places == self.at else node


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args, passed, everywhere = parser.parse_args(), 0, []
    sources = {f: ast.unparse(ast.parse((ROOT / f).read_text("utf-8"))) for f in sorted(ROOMS)}
    for file, source in sources.items():
        (mutant := Mutant()).visit(ast.parse(source))
        everywhere += [(file, at + 1) for at in range(mutant.places)]
    with tempfile.TemporaryDirectory() as copy:
        ignored = shutil.ignore_patterns(".git", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
        for file, mutant.at in random.Random(args.seed).sample(everywhere, args.n):
            mutant.places, right = 0, sources[file]
            new = ast.unparse(ast.fix_missing_locations(mutant.visit(ast.parse(right))))
            Path(copy, file).write_text(new, "utf-8")
            tests = [sys.executable, "-Bm", "pytest", "-qx", *ROOMS[file]]
            failed = subprocess.run(tests, cwd=copy, capture_output=True).returncode
            Path(copy, file).write_text(right, "utf-8")
            passed += not failed
            i = len(os.path.commonprefix([right, new]))
            print("caught" if failed else "PASSED", file, *(
                repr(text[max(0, i - 40) : i + 40]) for text in (right, new)), sep="\n    ",
                flush=True)
    print(f"{args.n} wrong versions, {passed} passed")
    sys.exit(passed > 0)


if __name__ == "__main__":
    main()
