"""The grader, graded: the solutions get full marks, blanks fail their own exercise alone, and plausible wrong solutions lose
points in the right one."""
import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from . import assignment
from .exercises import CHECKS, EXERCISES

ROOT = assignment.ROOT
MUTANTS = [  # exercise, what stands in the source, what a student might write
    (1, "return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise", "return alpha_bar * x_0 + (1 - alpha_bar) * noise"),
    (1, "return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise", "return (1 - alpha_bar).sqrt() * x_0 + alpha_bar.sqrt() * noise"),
    (1, "return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise", "return alpha_bar.sqrt() * x_0 + (1 - alpha_bar) * noise"),
    (1, "alpha_bar = self.alpha_bar_at(t, x_0)\n        return alpha_bar.sqrt() * x_0", "alpha_bar = self.alpha_bar[t]\n        return alpha_bar.sqrt() * x_0"),
    (2, "return squared_error(sd.predict_noise(x_t, t, context), noise)", "return squared_error(sd.predict_noise(x_0, t, context), noise)"),
    (2, "return squared_error(sd.predict_noise(x_t, t, context), noise)", "return squared_error(sd.predict_noise(x_t, t, context), x_0)"),
    (2, "return squared_error(sd.predict_noise(x_t, t, context), noise)", "return squared_error(sd.predict_noise(x_t, t, context), noise).mean()"),
    (2, "return squared_error(sd.predict_noise(x_t, t, context), noise)", "return squared_error(sd.predict_noise(x_t, t, context).detach(), noise)"),
    (3, "return eps_empty + guidance * (eps_c - eps_empty)", "return eps_c + guidance * (eps_c - eps_empty)"),
    (3, "return eps_empty + guidance * (eps_c - eps_empty)", "return eps_empty - guidance * (eps_c - eps_empty)"),
    (3, "return prev.sqrt() * x_0 + (1 - prev).sqrt() * eps", "return prev.sqrt() * x_0 + (1 - now).sqrt() * eps"),
    (3, "x_0 = (x_t - (1 - now).sqrt() * eps) / now.sqrt()", "x_0 = (x_t - (1 - now).sqrt() * eps) * now.sqrt()"),
    (4, "return eps_empty - eta * (eps_c - eps_empty)", "return eps_empty + eta * (eps_c - eps_empty)"),
    (4, "return eps_empty - eta * (eps_c - eps_empty)", "return eps_c - eta * (eps_c - eps_empty)"),
    (4, "return squared_error(sd.predict_noise(x_t, t, context), target)", "return (sd.predict_noise(x_t, t, context) - target).square().sum((1, 2, 3))"),
    (4, "return squared_error(sd.predict_noise(x_t, t, context), target)", "return squared_error(sd.predict_noise(x_t, t, context), target.detach() * 0)"),
    (5, "return torch.cat([tokens[:, :1], prefix, tokens[:, 1 : tokens.shape[1] - prefix.shape[1]]], dim=1)",
        "return torch.cat([prefix, tokens[:, : tokens.shape[1] - prefix.shape[1]]], dim=1)"),
    (5, "return torch.cat([tokens[:, :1], prefix, tokens[:, 1 : tokens.shape[1] - prefix.shape[1]]], dim=1)",
        "return torch.cat([tokens[:, :1], prefix, tokens[:, 1:]], dim=1)"),
    (5, "return torch.cat([tokens[:, :1], prefix, tokens[:, 1 : tokens.shape[1] - prefix.shape[1]]], dim=1)",
        "return torch.cat([tokens[:, :1], prefix.detach(), tokens[:, 1 : tokens.shape[1] - prefix.shape[1]]], dim=1)"),
    (5, "if length + k > sd.context_length:", "if length + k >= sd.context_length:"),
    (5, "length = len(sd.tokenizer(prompt).input_ids)", "length = len(prompt.split())"),
    (6, "delta.grad = torch.autograd.grad(losses.sum(), delta)[0]", "losses.sum().backward()"),
    (6, "delta -= attack.lr * delta.grad.sign()", "delta += attack.lr * delta.grad.sign()"),
    (6, "delta.copy_(delta_0 + (delta - delta_0).clamp(-attack.radius, attack.radius))", "delta.copy_(delta.clamp(-attack.radius, attack.radius))"),
    (6, "delta_0 = table[start].detach().float()", "delta_0 = 0 * table[start].detach().float()"),
    (7, "return (v - excess.gather(-1, last)).clamp(min=0)", "return v.clamp(min=0) / v.clamp(min=0).sum(-1, keepdim=True)"),
    (7, "return (v - excess.gather(-1, last)).clamp(min=0)", "return v.softmax(-1)"),
    (7, "last = (u > excess).sum(-1, keepdim=True) - 1", "last = (u > excess).sum(-1, keepdim=True) * 0"),
    (7, "u = v.sort(dim=-1, descending=True).values", "u = v.sort(dim=0, descending=True).values"),
    (8, "losses = loss_of(table[drawn.to(table.device)] + soft - soft.detach())", "losses = loss_of(soft)"),
    (8, "p.copy_(project_simplex(p))", "p.copy_(p)"),
    (8, "yield legal.to(table.device)[p.argmax(-1)], losses.detach()", "yield p.argmax(-1), losses.detach()"),
    (8, "p.grad = torch.autograd.grad(losses.sum(), p)[0]", "p.grad = -torch.autograd.grad(losses.sum(), p)[0]"),
    (9, "return squared_error(sd.predict_noise(x_t, t, context), eps_r)", "return squared_error(eps_r, eps_r) + 0 * sd.predict_noise(x_t, t, context).mean((1, 2, 3))"),
    (9, "return squared_error(sd.predict_noise(x_t, t, context), eps_r)", "return squared_error(sd.predict_noise(x_t, t, context), -eps_r)"),
    (9, r'(s|es)?\b", re.IGNORECASE)', '", re.IGNORECASE)'),
    (9, r'(s|es)?\b", re.IGNORECASE)', r'(s|es)?\b")'),
    (10, "(l_erase + config.retain_weight * l_retain).backward()", "l_erase.backward()"),
    (10, "target = esd_target(z.eps_c, z.eps_empty, config.eta)", "target = z.eps_c"),
    (10, "plain = i < config.warmup or config.attack", "plain = i >= config.warmup or config.attack"),
    (10, "            optimizer.zero_grad()\n", ""),
    (10, "theta = [p.requires_grad_(True) for p in parameters_to_train(sd, config)]", "theta = [p.requires_grad_(True) for p in parameters_to_train(sd_o, config)]"),
]


def with_source(tmp_path, number, change):
    """The project's modules, with one file's source changed."""
    modules, file = dict(assignment.references()), EXERCISES[number].file
    path = tmp_path / Path(file).name
    path.write_text(change((ROOT / file).read_text(encoding="utf-8")), encoding="utf-8")
    modules[file] = assignment.load_module(f"student_{path.stem}", path)
    return modules


@pytest.mark.parametrize("number", EXERCISES)
def test_blanks_fail_their_own_exercise_and_only_that(number, sd, tmp_path):
    def change(source):
        for name in EXERCISES[number].functions:
            source = assignment.blank(source, name, "Exercise")
        return source

    student, reference = with_source(tmp_path, number, change), assignment.references()
    points = assignment.grade(number, student, reference, sd, seeds=(0,))
    assert points and all("NotImplementedError" in str(message) for message in points.values())
    for other in set(EXERCISES) - {number, 10}:  # 10 takes seconds; what it needs of the others is the reference's all the same
        assert not any(assignment.grade(other, student, reference, sd, seeds=(0,)).values())


@pytest.mark.parametrize("number, right, wrong", MUTANTS)
def test_wrong_solutions_lose_points(number, right, wrong, sd, tmp_path):
    def change(source):
        assert right in source
        names, tree = EXERCISES[number].functions, assignment.functions(assignment.ast.parse(source))
        lines = source.splitlines(keepends=True)
        for name in names:  # inside the exercise's own functions
            start, end = tree[name].lineno - 1, tree[name].end_lineno
            body = "".join(lines[start:end])
            if right in body:
                return "".join([*lines[:start], body.replace(right, wrong), *lines[end:]])
        raise AssertionError(f"not in {names}")

    own = replace(sd, text_encoder=copy.deepcopy(sd.text_encoder))  # a wrong loop may train the original
    points = assignment.grade(number, with_source(tmp_path, number, change), assignment.references(), own, seeds=(0,), whole=False)
    assert any(points.values()), "a wrong solution got full marks"


def test_blanking_keeps_signature_docstring_and_everything_else():
    source = (ROOT / "advunlearn.py").read_text()
    out = assignment.blank(source, "project_simplex", 'Exercise 7: "..."')
    before, after = assignment.functions(assignment.ast.parse(source)), assignment.functions(assignment.ast.parse(out))
    assert assignment.ast.get_docstring(before["project_simplex"]) == assignment.ast.get_docstring(after["project_simplex"])
    assert [name for name in before if assignment.ast.dump(before[name]) != assignment.ast.dump(after[name])] == ["project_simplex"]
    assert all(line in source for line in out.splitlines() if "NotImplementedError" not in line)


@pytest.mark.beside
def test_students_copy_is_graded_by_pytest(tmp_path):
    out = tmp_path / "homework"
    run = lambda *arguments, cwd=out: subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True)
    assert run("tests.assignment", "--out", str(out), "--only", "2,7", cwd=ROOT).returncode == 0
    assert "Exercise 7: projection onto the simplex" in (out / "advunlearn.py").read_text()
    assert "| 2 | noise-prediction loss |" in (out / "HANDOUT.md").read_text() and (out / "tests/pictures").is_dir()
    source = (out / "advunlearn.py").read_text()
    (out / "advunlearn.py").write_text(source.replace(  # a student solves exercise 2, by half
        '    raise NotImplementedError("Exercise 2: noise-prediction loss, ddpm_loss; see TUTORIAL.md, section 2")',
        "    return squared_error(sd.predict_noise(sd.schedule.add_noise(x_0, noise, t), t, context), noise.flip(0))"))
    graded = run("pytest", "-q", "--exercise", "2")
    points = json.loads((out / "grade.json").read_text())["exercises"]
    assert graded.returncode == 1 and points == {"2": {"title": "noise-prediction loss", "points": 1, "of": len(CHECKS[2])}}, graded.stdout
    assert "Exercise 2   noise-prediction loss            1/3" in graded.stdout
    assert "|| eps - eps_theta(x_t | c) ||^2, a mean over each picture's coordinates: off by" in graded.stdout
