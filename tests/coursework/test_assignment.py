"""The grader, graded.

Solutions get full marks; blanks fail their own exercise alone; plausible wrong solutions lose
points in the right one.
"""
import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from . import assignment
from .exercises import CHECKS, EXERCISES

ROOT = assignment.ROOT
MUTANTS = {  # exercise -> what stands in the source, and what a student might write instead
    1: [("return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise", [
            "return alpha_bar * x_0 + (1 - alpha_bar) * noise",
            "return alpha_bar.sqrt() * x_0 + (1 - alpha_bar) * noise"]),
        ("alpha_bar = self.alpha_bar_at(t, x_0)", ["alpha_bar = self.alpha_bar[t]"])],
    2: [("return squared_error(sd.predict_noise(x_t, t, context), noise)", [
            "return squared_error(sd.predict_noise(x_0, t, context), noise)",
            "return squared_error(sd.predict_noise(x_t, t, context), noise).mean()",
            "return squared_error(sd.predict_noise(x_t, t, context).detach(), noise)"])],
    3: [("return eps_empty + guidance * (eps_c - eps_empty)", [
            "return eps_c + guidance * (eps_c - eps_empty)",
            "return eps_empty - guidance * (eps_c - eps_empty)"]),
        ("return prev.sqrt() * x_0 + (1 - prev).sqrt() * eps", [
            "return prev.sqrt() * x_0 + (1 - now).sqrt() * eps"]),
        ("x_0 = (x_t - (1 - now).sqrt() * eps) / now.sqrt()", [
            "x_0 = (x_t - (1 - now).sqrt() * eps) * now.sqrt()"])],
    4: [("return eps_empty - eta * (eps_c - eps_empty)", [
            "return eps_empty + eta * (eps_c - eps_empty)",
            "return eps_c - eta * (eps_c - eps_empty)"]),
        ("return squared_error(sd.predict_noise(x_t, t, context), target)", [
            "return (sd.predict_noise(x_t, t, context) - target).square().sum((1, 2, 3))",
            "return squared_error(sd.predict_noise(x_t, t, context), target.detach() * 0)"])],
    5: [("torch.cat([tokens[:, :1], delta, tokens[:, 1 : tokens.shape[1] - k]], dim=1)", [
            "torch.cat([delta, tokens[:, : tokens.shape[1] - k]], dim=1)",
            "torch.cat([tokens[:, :1], delta, tokens[:, 1:]], dim=1)",
            "torch.cat([tokens[:, :1], delta.detach(), tokens[:, 1 : tokens.shape[1] - k]], 1)"]),
        ("if length + k > sd.context_length:", ["if length + k >= sd.context_length:"]),
        ("length = len(sd.tokenizer(prompt).input_ids)", ["length = len(prompt.split())"])],
    6: [("delta.grad = torch.autograd.grad(losses.sum(), delta)[0]", ["losses.sum().backward()"]),
        ("delta -= attack.lr * delta.grad.sign()", ["delta += attack.lr * delta.grad.sign()"]),
        ("delta.clamp_(delta_0 - attack.radius, delta_0 + attack.radius)", [
            "delta.clamp_(-attack.radius, attack.radius)"]),
        ("delta_0 = table[start].detach().float()", [
            "delta_0 = 0 * table[start].detach().float()"])],
    7: [("return (v - taus.gather(-1, last)).clamp(min=0)", [
            "return v.clamp(min=0) / v.clamp(min=0).sum(-1, keepdim=True)",
            "return v.softmax(-1)"]),
        ("last = (u > taus).sum(-1, keepdim=True) - 1", [
            "last = (u > taus).sum(-1, keepdim=True) * 0"]),
        ("u = v.sort(dim=-1, descending=True).values", [
            "u = v.sort(dim=0, descending=True).values"])],
    8: [("losses = loss_of(hard + (soft - soft.detach()), step)", ["losses = loss_of(soft, step)"]),
        ("p.copy_(project_simplex(p))", ["p.copy_(p)"]),
        ("yield legal[p.argmax(-1)], losses.detach()", [
            "yield p.argmax(-1), losses.detach()"]),
        ("p.grad = torch.autograd.grad(losses.sum(), p)[0]", [
            "p.grad = -torch.autograd.grad(losses.sum(), p)[0]"])],
    9: [("return squared_error(sd.predict_noise(x_t, t, context), eps_r)", [
            "return squared_error(eps_r, eps_r) + 0 * sd.predict_noise(x_t, t, context).sum()",
            "return squared_error(sd.predict_noise(x_t, t, context), -eps_r)"]),
        (r"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)", [
            "{re.escape(word)}", r"(?<!\w){word}(?:e?s)?(?!\w)",
            r"(?<!\w){re.escape(word)}(?!\w)"]),
        ("pattern.search(folded(prompt))", ["pattern.search(prompt)"])],
    10: [("(l_erase + config.retain_weight * l_retain).backward()", ["l_erase.backward()"]),
         ("target = esd_target(z.eps_c, z.eps_empty, config.eta)", ["target = z.eps_c"]),
         ("plain = i < config.warmup", ["plain = i >= config.warmup"]),
         ("            optimizer.zero_grad()\n", [""]),
         ("in parameters_to_train(sd, config)", ["in parameters_to_train(sd_o, config)"])],
}
WRONG = [(number, right, wrong) for number, lines in MUTANTS.items()
         for right, wrongs in lines for wrong in wrongs]


def student_with(tmp_path, number, change):
    """The project's modules, with change(source, names) made in the files of one exercise."""
    modules = dict(assignment.references())
    for file, names in EXERCISES[number].functions.items():
        path = tmp_path / Path(file).name
        source = (ROOT / file).read_text(encoding="utf-8")
        path.write_text(change(source, names), encoding="utf-8")
        modules[file] = assignment.load_module(f"student_{path.stem}", path)
    return modules


@pytest.mark.parametrize("number", EXERCISES)
def test_blanks_fail_their_own_exercise_and_only_that(number, sd, tmp_path):
    def change(source, names):
        for name in names:
            source = assignment.blank(source, name, "Exercise")
        return source

    student, reference = student_with(tmp_path, number, change), assignment.references()
    points = assignment.grade(number, student, reference, sd, seeds=(0,))
    assert points and all("NotImplementedError" in str(message) for message in points.values())
    for other in set(EXERCISES) - {number, 10}:  # 10 takes seconds, and has the reference's others
        assert not any(assignment.grade(other, student, reference, sd, seeds=(0,)).values())


@pytest.mark.parametrize("number, right, wrong", WRONG)
def test_wrong_solutions_lose_points(number, right, wrong, sd, tmp_path):
    changed = []

    def change(source, names):
        """Once, inside the exercise's own functions."""
        tree, lines = assignment.functions(ast.parse(source)), source.splitlines(keepends=True)
        for name in names:
            start, end = tree[name].lineno - 1, tree[name].end_lineno
            body = "".join(lines[start:end])
            if right in body and not changed:
                changed.append(name)
                return "".join([*lines[:start], body.replace(right, wrong), *lines[end:]])
        return source

    student = student_with(tmp_path, number, change)
    assert changed, f"not in exercise {number}: {right}"
    own = replace(sd, text_encoder=copy.deepcopy(sd.text_encoder))  # a wrong loop may train it
    points = assignment.grade(number, student, assignment.references(), own, (0,), whole=False)
    assert any(points.values()), "a wrong solution got full marks"


def test_a_renamed_function_costs_its_own_exercise_alone(sd, tmp_path):
    def change(source, names):
        return source.replace("def erase_loss(", "def renamed(")

    student, reference = student_with(tmp_path, 4, change), assignment.references()
    with pytest.raises(AttributeError, match="erase_loss"):
        assignment.grade(4, student, reference, sd, seeds=(0,))
    assert not any(assignment.grade(2, student, reference, sd, seeds=(0,)).values())


def test_a_copy_of_a_read_only_checkout_can_be_written(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".git", "runs", "weights", "pictures")
    shutil.copytree(ROOT, root, ignore=ignore)
    for path in (*root.rglob("*"), root):
        path.chmod(path.stat().st_mode & 0o555)
    monkeypatch.setattr(assignment, "ROOT", root)
    assignment.make(tmp_path / "homework", [2])
    copied = [tmp_path / "homework", *(tmp_path / "homework").rglob("*")]
    assert len(copied) > 50 and all(path.stat().st_mode & 0o200 for path in copied)
    for path in (root, *root.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)  # so that it can be deleted


def test_the_copy_has_the_questions_and_no_answers(tmp_path):
    assignment.make(tmp_path / "homework")
    text = "".join(path.read_text() for path in (tmp_path / "homework").glob("*.md"))
    assert text.count("*Question:") >= 10 and "<details>" not in text and "Answer" not in text
    for file, name in (place for exercise in EXERCISES.values() for place in exercise.places()):
        source = (ROOT / file).read_text()
        node = assignment.functions(ast.parse(source))[name]
        for statement in node.body[1:]:
            lines = ast.get_source_segment(source, statement).splitlines()
            assert not [line for line in lines if len(line) > 40 and line.strip() in text], name


@pytest.mark.parametrize("name", ["homework", "tests/homework"])
def test_a_copy_stands_outside_the_project(name, capsys):
    with pytest.raises(SystemExit):
        assignment.make(ROOT / name)
    assert "is inside the project" in capsys.readouterr().err


def test_nothing_is_graded_without_assertions():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--exercise", "2"], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONOPTIMIZE": "1"})
    assert done.returncode == 4 and "unset PYTHONOPTIMIZE" in done.stderr


def test_blanking_keeps_signature_docstring_and_everything_else():
    source = (ROOT / "advunlearn.py").read_text()
    out = assignment.blank(source, "project_simplex", 'Exercise 7: "..."')
    before, after = (assignment.functions(ast.parse(text)) for text in (source, out))
    doc = ast.get_docstring(before["project_simplex"])
    assert doc == ast.get_docstring(after["project_simplex"])
    differ = [name for name in before if ast.dump(before[name]) != ast.dump(after[name])]
    assert differ == ["project_simplex"]
    assert all(line in source for line in out.splitlines() if "NotImplementedError" not in line)


BLANK = ('    raise NotImplementedError("Exercise 2: noise-prediction loss, ddpm_loss; see '
         'TUTORIAL.md, section 4")')
BY_HALF = """    x_t = sd.schedule.add_noise(x_0, noise, t)
    return squared_error(sd.predict_noise(x_t, t, context), noise.flip(0))"""


@pytest.mark.long
def test_students_copy_is_graded_by_pytest(tmp_path):
    """A wrong loss costs its own points; a file that is no Python, those of its own functions."""
    out = tmp_path / "homework"
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]")  # grade.json stays below

    def run(*arguments, cwd=out):
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

    made = run("tests.coursework", "--out", str(out), "--only", "2,7", cwd=ROOT)
    assert made.returncode == 0, made.stderr
    source, handout = ((out / name).read_text() for name in ("advunlearn.py", "HANDOUT.md"))
    assert "Exercise 7: projection onto the simplex" in source
    assert "| 2 | noise-prediction loss |" in handout and (out / "tests/pictures").is_dir()
    assert BLANK in source
    (out / "advunlearn.py").write_text(source.replace(BLANK, BY_HALF))
    with open(out / "sd_mini/lab/prompts.py", "a") as file:
        file.write("def one_of(words:\n")
    graded = run("pytest", "-q", "-k", "exercise and (2- or 9-)")
    points = json.loads((out / "grade.json").read_text())["exercises"]
    assert {n: (each["points"], each["of"]) for n, each in points.items()} == {
        "2": (1, len(CHECKS[2])), "9": (len(CHECKS[9]) - 1, len(CHECKS[9]))}, graded.stdout
    assert graded.returncode == 1
    assert "Exercise 2   noise-prediction loss            1/3" in graded.stdout
    equation = "|| eps - eps_theta(x_t | c) ||^2, a mean over each picture's coordinates"
    assert f"{equation}: off by" in graded.stdout
    assert "this file is no Python" in graded.stdout and "prompts.py, line" in graded.stdout
    graded = run("pytest", "-q", "--exercise", "7")
    assert list(json.loads((out / "grade.json").read_text())["exercises"]) == ["7"], graded.stdout
    assert "Exercise 7" in graded.stdout and "0/3" in graded.stdout
