"""Wrong versions of the code: do the tests catch them?

    python -m tests.mutants                      those listed here
    python -m tests.mutants inversion            those whose description has this word
    python -m tests.mutants --draw 30 --seed 1   30 drawn at random, which nobody listed

Each is made in a copy of the project, and the tests of its room are run. One that is drawn changes
one node of the syntax tree: a sign, a comparison, a constant, swapped arguments, a dropped
statement, a result cut off from its gradient. What passes computes the same, or no test is about
it. Minutes to hours; exit status 1 if any passed.
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
A, E = "advunlearn.py", "sd_mini/lab/evaluation.py"
DRAWN = [A, E, *(f"sd_mini/{path.name}" for path in sorted((ROOT / "sd_mini").glob("*.py")))]
OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
            ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
            ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot}

MUTANTS = [  # what is wrong, in which file, what stands there once, the wrong text
    ("ddpm loss: without noise in the picture", A,
     "x_t = sd.schedule.add_noise(x_0, noise, t)", "x_t = x_0"),
    ("erase loss: the target is the concept itself", A,
     "esd_target(z.eps_c, z.eps_empty, config.eta)", "z.eps_c"),
    ("erase loss: the prefix found is not used", A,
     "context = encode_with_prefix(sd, ids[z.prompt], delta)\n\n",
     "context = sd.encode_tokens(ids[z.prompt])\n\n"),
    ("inner attack: gives the first prefix, not the last", A,
     "            pass\n    return delta, losses", "            break\n    return delta, losses"),
    ("inner attack: the radius has no effect", A,
     "config.prefix, config.attack_radius)", "config.prefix)"),
    ("inner attack: starts at tokens that are not legal", A,
     "start = random_tokens(sd, (n, attack.k), generator)",
     "start = torch.full((n, attack.k), sd.tokenizer.eos_token_id)"),
    ("inner attack: gradients pile up", A,
     "delta.grad = torch.autograd.grad(losses.sum(), delta)[0]", "losses.sum().backward()"),
    ("token attack: the loss sees the soft mixture", A,
     "loss_of(hard + (soft - soft.detach()), step)", "loss_of(soft, step)"),
    ("token attack: the likeliest token instead of a draw", A,
     "(p.detach().cumsum(-1) < u).sum(-1)", "p.detach().argmax(-1)"),
    ("token attack: gives the tokens drawn, not the likeliest", A,
     "yield legal[p.argmax(-1)]", "yield legal[drawn]"),
    ("token attack: the decay is added to the gradient", A,
     "torch.optim.AdamW([p], lr=", "torch.optim.Adam([p], lr="),
    ("bank: drawn from without replacement", A,
     "prompt = torch.randint(len(prompts), (n,), generator=generator)\n        run",
     "prompt = torch.randperm(len(prompts), generator=generator)[:n]\n        run"),
    ("fresh trajectories: of the model in training", A,
     "draw_erase = source(sd_o, erase", "draw_erase = source(sd, erase"),
    ("layers: the last instead of the first", A,
     "layers[: config.layers or None]", "layers[-config.layers :]"),
    ("training: changes the original model", A,
     "copy.deepcopy(getattr(sd_o, part)).float()", "getattr(sd_o, part)"),
    ("evaluation attack: pictures of the first rows once some drop out", A,
     "ddpm_loss(sd, x_0[left]", "ddpm_loss(sd, x_0[: len(left)]"),
    ("evaluation attack: its text lacks the prompt", A,
     "texts = [f\"{front} {prompts[i]}\" for front", "texts = [front for front"),
    ("ASR: over the attacked prompts alone", E,
     "for d in details[kind]]\n        figures[",
     "for d in details[kind] if not d[\"without_attack\"]]\n        figures["),
    ("rates: any row's label counts", E,
     "return [row.label in names for names, row in",
     "return [any(r.label in names for r in rows) for names, row in"),
    ("Frechet distance: of the model to itself", E,
     "features(evaluation_set.original[\"utility\"])", "features(drawn[\"utility\"])"),
    ("pictures: one seed for a batch", E,
     "seed=[row.seed for row in batch]", "seed=[batch[0].seed for row in batch]"),
    ("toy CLIP score: of the prompt's start, not its end", "sd_mini/lab/classifiers.py",
     "end = ids.argmax(-1)  #", "end = ids.argmin(-1)  #"),
    ("comparison: pooled rates are the mean of percentages, over too few", "sd_mini/lab/compare.py",
     "n = sum(cell[\"n\"] for cell in cells)", "n = cells[0][\"n\"]"),
    ("prompts: the retain set keeps the concept", "sd_mini/lab/prompts.py",
     "zip(prompts, named) if not names]", "zip(prompts, named)]"),
    ("schedule: beta is linear, not the square of a line", "sd_mini/schedule.py",
     "torch.linspace(lo**0.5, hi**0.5, steps, dtype=torch.float32) ** 2",
     "torch.linspace(lo, hi, steps, dtype=torch.float32)"),
    ("schedule: DDIM keeps the noise of t", "sd_mini/schedule.py",
     "(1 - prev).sqrt() * eps", "(1 - now).sqrt() * eps"),
    ("guidance: from the concept instead of the empty prompt", "sd_mini/schedule.py",
     "return eps_empty + guidance *", "return eps_c + guidance *"),
]


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


def listed(word):
    for what, file, right, wrong in MUTANTS:
        source = (ROOT / file).read_text(encoding="utf-8")
        if source.count(right) != 1:
            raise ValueError(f"{what}: its text stands {source.count(right)} times in {file}")
        if word in what:
            yield what, file, source.replace(right, wrong)


def tests_of(file):
    """Its room and the exercises', without the golden run, which is for what no test is about."""
    if "/lab/" in file:
        return ["tests/paper/test_evaluation.py", "tests/lab"]
    room = ["tests/paper", "--ignore=tests/paper/test_golden.py"] if file == A else ["tests/sd"]
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
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--draw", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mutants = [*(drawn(args.draw, args.seed) if args.draw else listed(args.word))]
    passed = 0
    with tempfile.TemporaryDirectory() as root:
        leave_out = shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache")
        folder = Path(shutil.copytree(ROOT, Path(root) / "copy", ignore=leave_out))
        for what, file, source in mutants:
            through = passes(folder, file, source)
            passed += through
            print(f"{'PASSED' if through else 'caught'}  {Path(file).name:14} {what}", flush=True)
    print(f"{len(mutants)} wrong versions, {passed} passed")
    return int(passed > 0)


if __name__ == "__main__":
    sys.exit(main())
