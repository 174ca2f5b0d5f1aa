"""The grader, graded: blanks fail their own exercise alone, wrong solutions lose points in it."""
import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from sd_mini.files import make_writable
from sd_mini.lab import tasks

from . import assignment
from .exercises import CHECKS, EXERCISES, FILES, PAPER, PROMPTS

ROOT = assignment.ROOT
WRONG = [  # exercise, what stands in the source, what a student might write instead
    (1, "alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
     "alpha_bar * x_0 + (1 - alpha_bar) * noise"),
    (1, "self.alpha_bar_at(t, x_0)", "self.alpha_bar[t]"),
    (2, "(sd.predict_noise(x_t, t, context), noise)", "(sd.predict_noise(x_0, t, context), noise)"),
    (2, "(sd.predict_noise(x_t, t, context), noise)",
     "(sd.predict_noise(x_t, t, context).detach(), noise)"),
    (3, "return eps_empty + guidance", "return eps_c + guidance"),
    (3, "prev.sqrt() * x_0 + (1 - prev)", "prev.sqrt() * x_0 + (1 - now)"),
    (4, "eps_empty - eta * (eps_c", "eps_empty + eta * (eps_c"),
    (5, "[tokens[:, :1], delta, tokens[:, 1 : tokens.shape[1] - k]]",
     "[delta, tokens[:, : tokens.shape[1] - k]]"),
    (5, "tokens[:, 1 : tokens.shape[1] - k]", "tokens[:, 1:]"),
    (5, "[tokens[:, :1], delta, ", "[tokens[:, :1], delta.detach(), "),
    (5, "length + k > sd.context_length", "length + k >= sd.context_length"),
    (6, "delta.grad = torch.autograd.grad(losses.sum(), delta)[0]", "losses.sum().backward()"),
    (6, "delta -= attack.lr", "delta += attack.lr"),
    (6, "(delta_0 - attack.radius, delta_0 + attack.radius)", "(-attack.radius, attack.radius)"),
    (7, "(v - taus.gather(-1, last)).clamp(min=0)", "v.softmax(-1)"),
    (7, "v.sort(dim=-1, descending", "v.sort(dim=0, descending"),
    (8, "hard + (soft - soft.detach())", "soft"),
    (8, "p.copy_(project_simplex(p))", "p.copy_(p)"),
    (8, "legal[p.argmax(-1)]", "p.argmax(-1)"),
    (8, "p.grad = torch.autograd", "p.grad = -torch.autograd"),
    (9, "context), eps_r)", "context), -eps_r)"),
    (9, "{re.escape(word)}", "{word}"),
    (9, "(?:e?s)?", ""),
    (9, "pattern.search(folded(prompt))", "pattern.search(prompt)"),
    (10, "(l_erase + config.retain_weight * l_retain).backward()", "l_erase.backward()"),
    (10, "target = esd_target(z.eps_c, z.eps_empty, config.eta)", "target = z.eps_c"),
    (10, "plain = i < config.warmup", "plain = i >= config.warmup"),
    (10, "            optimizer.zero_grad()\n", ""),
    (10, "in parameters_to_train(sd, config)", "in parameters_to_train(sd_o, config)"),
]


@pytest.fixture
def student(tmp_path):
    """student(change) -> a folder of the exercises' files, each with change(file, source) made."""
    def write(change):
        for file in FILES:
            path, source = tmp_path / file, (ROOT / file).read_text(encoding="utf-8")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(change(file, source), encoding="utf-8")
        return tmp_path
    return write


def lost(number, sd, root):
    """Grade an exercise with seed 0 -> what is wrong, check by check."""
    own = replace(sd, text_encoder=copy.deepcopy(sd.text_encoder))  # a wrong loop may train it
    for check in CHECKS[number]:
        try:
            with assignment.standing_in(number, own, root) as solution:
                check(solution, 0)
        except Exception as error:
            yield error


@pytest.mark.parametrize("number", EXERCISES)
def test_each_exercise_is_graded_by_itself(number, sd, student):
    """With all others blank it gets all points. Blank it gets none."""
    def blank(numbers):
        def change(file, source):
            for name in (name for n in numbers for name in EXERCISES[n].functions.get(file, ())):
                source = assignment.blank(source, name, "Exercise")
            return source
        return student(change)

    assert not [*lost(number, sd, blank(EXERCISES.keys() - {number}))]
    wrong = [*lost(number, sd, blank([number]))]
    assert len(wrong) == len(CHECKS[number])
    assert all(isinstance(error, NotImplementedError) for error in wrong)


@pytest.mark.parametrize("number, right, wrong", WRONG)
def test_wrong_solutions_lose_points(number, right, wrong, sd, student):
    places = [(ROOT / file).read_text(encoding="utf-8").count(right)
              for file in EXERCISES[number].functions]
    assert sum(places) == 1, f"not once in the files of exercise {number}: {right}"
    root = student(lambda file, source: source.replace(right, wrong))
    assert next(lost(number, sd, root), None), "a wrong solution got full marks"


# --- the student's copy

ONLY = (2, 4, 9)


@pytest.fixture(scope="module")
def homework(tmp_path_factory):
    """A copy of a read-only project, with some exercises."""
    project, out = (tmp_path_factory.mktemp(name) / name for name in ("project", "homework"))
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__")
    shutil.copytree(ROOT, project, ignore=ignored)
    for path in (*project.rglob("*"), project):
        path.chmod(path.stat().st_mode & 0o555)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "ROOT", project)
        assignment.make(out, ONLY)
    make_writable(project)  # so that it can be deleted
    return out


def test_the_copy_is_blank_where_it_should_be_and_can_be_written(homework):
    """A blank function keeps its docstring; no document says what is missing; no more is graded."""
    graded = (homework / "tests/coursework/test_exercises.py").read_text()
    assert "for number in [2, 4, 9] for" in graded
    assert all(path.stat().st_mode & 0o200 for path in (homework, *homework.rglob("*")))
    text = "".join(path.read_text() for path in homework.glob("*.md"))
    assert text.count("*Question:") >= 10 and "<details>" not in text and "Answer" not in text
    for file in FILES:
        source = (ROOT / file).read_text()
        before, after = (assignment.functions(ast.parse((root / file).read_text()))
                         for root in (ROOT, homework))
        names = {name for n in ONLY for name in EXERCISES[n].functions.get(file, ())}
        assert names == {name for name in before if ast.dump(before[name]) != ast.dump(after[name])}
        for name in before:
            assert ast.dump(before[name].args) == ast.dump(after[name].args)
            assert ast.get_docstring(before[name]) == ast.get_docstring(after[name])
            for statement in before[name].body[1:]:
                lines = ast.get_source_segment(source, statement).splitlines()
                assert not [line for line in lines if len(line) > 40 and line.strip() in text]


@pytest.mark.parametrize("words, why", [
    (["--out", f"{ROOT}/tests/homework"], "is inside the project"),
    (["--out", f"{ROOT}/tests"], "is there already"),
    (["--out", "homework", "--only", "2,x"], "there is no exercise x"),
    (["--score", "12"], "to be filled before: Exercise 5")])
def test_wrong_input_gets_one_line(words, why, monkeypatch, capsys):
    def run_task(method, given):
        raise NotImplementedError("Exercise 5")

    monkeypatch.setattr(tasks, "run_task", run_task)
    monkeypatch.setattr(sys, "argv", ["coursework", *words])
    with pytest.raises(SystemExit):
        assignment.main()
    assert re.fullmatch(f"error: .*{why}.*\n", capsys.readouterr().err)


@pytest.mark.long
def test_a_copy_is_graded_by_pytest(homework):
    """No other file need be Python, and no other function there."""
    (homework.parent / "pyproject.toml").write_text("[tool.pytest.ini_options]")
    wrong = "return squared_error(sd.predict_noise(x_0, t, context), noise.flip(0))"
    source = (homework / PAPER).read_text().replace("def erase_loss(", "def my_loss(")
    blank = r'raise NotImplementedError\("Exercise 2: .* ddpm_loss; see TUTORIAL.md, section 4"\)'
    (homework / PAPER).write_text(re.sub(blank, wrong, source))
    (homework / PROMPTS).write_text("(")
    graded = subprocess.run([sys.executable, "-m", "pytest", "--exercise", "2"], cwd=homework,
                            text=True, capture_output=True)
    assert "Exercise 2   noise-prediction loss            0/1" in graded.stdout, graded.stderr
    assert "|| eps - eps_theta(x_t | c) ||^2, a mean over" in graded.stdout
    assert graded.returncode == 1
    expected = {"title": "noise-prediction loss", "points": 0, "of": 1}
    assert json.loads((homework / "grade.json").read_text())["exercises"] == {"2": expected}


def test_nothing_is_graded_without_assertions():
    """Which PYTHONOPTIMIZE takes away."""
    source, names = (ROOT / "tests/conftest.py").read_text(), {"__package__": "tests"}
    exec(compile(source, "conftest.py", "exec", optimize=1), names)
    with pytest.raises(pytest.UsageError, match="unset PYTHONOPTIMIZE"):
        names["pytest_configure"](None)
