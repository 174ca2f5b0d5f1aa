"""Wrong versions of the code, drawn at random: do the tests catch them?

    python -m tests.mutants 30 --seed 1

Each changes one node of the syntax tree, in a copy of the project. The tests of its room are run.
What passes computes the same, or no test is about it. A minute each.
"""
import argparse
import ast
import random
import subprocess
import sys
from difflib import unified_diff
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory

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
    """Puts something wrong in the place where `at`, counted down, reaches zero."""
    at = 0

    def visit(self, node):
        self.generic_visit(node)
        new = wrong(node)
        self.at -= new is not None
        return node if new is None or self.at else new


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args, places, passed = parser.parse_args(), [], 0
    sources = {f: ast.unparse(ast.parse((ROOT / f).read_text("utf-8"))) for f in sorted(ROOMS)}
    for file, source in sources.items():
        (mutant := Mutant()).visit(ast.parse(source))
        places += [(file, at + 1) for at in range(-mutant.at)]
    for file, mutant.at in random.Random(args.seed).sample(places, args.n):
        new = ast.unparse(mutant.visit(ast.parse(sources[file])))
        with TemporaryDirectory() as copy:
            copytree(ROOT, copy, ignore=ignore_patterns(".git", "runs"), dirs_exist_ok=True)
            Path(copy, file).write_text(new, "utf-8")
            tests = [sys.executable, "-Bm", "pytest", "-qx", *ROOMS[file]]
            failed = subprocess.run(tests, cwd=copy, capture_output=True).returncode
        passed += not failed
        diff = unified_diff(sources[file].split("\n"), new.split("\n"), file, file, "", "", 0, "")
        print("caught" if failed else "PASSED", *diff, sep="\n    ", flush=True)
    print(f"{args.n} wrong versions, {passed} passed")


if __name__ == "__main__":
    main()
