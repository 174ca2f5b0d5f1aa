"""Ordinary ways of working: odd names, edited files, two runs at once, notebooks, no internet."""
import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import advunlearn as au
from sd_mini import lab, weights
from sd_mini.lab import classifiers, compare, report, runs, settings, tasks
from sd_mini.lab.prompts import slug
from sd_mini.weights import TOY

from .test_run import FLAGS, ROOT, main, read_figures

SMALLEST = [*FLAGS, "--steps", "2", "--trajectories", "1", "--trajectory-steps", "1",
            "--eval-prompts", "2", "--eval-utility", "2", "--eval-steps", "1",
            "--eval-attack-steps", "1", "--eval-looks", "1"]
SHORT = [*SMALLEST, "--eval-attacks", "token"]
COMPARE = [*SMALLEST, "--task", "compare", "--methods", "original", "ESD"]


def write_prompts(path, *prompts):
    path.write_text("prompt\n" + "".join(f'"{prompt}"\n' for prompt in prompts))
    return path


# --- 1: a user's text is no markup

ODD = ["a $_$ church", "a $$ \\x {}%s<b>"]


def test_prompts_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    prompts = write_prompts(tmp_path / "odd.csv", *ODD)
    assert main(*SHORT, "--eval-set", prompts, "--out", tmp_path / "run") == 0
    assert main(*COMPARE, "--eval-set", prompts, "--out", tmp_path / "table") == 0
    for picture in ("run/samples.png", "table/compare.png"):
        assert (tmp_path / picture).stat().st_size > 5000


def test_names_of_methods_and_losses_may_be_odd_too(tmp_path):
    rate = {"rate": 0.5, "low": 0.3, "high": 0.7, "n": 4}
    figures = {name: {"utility": rate, "token_asr": rate} for name in ("$_$ | mine", "a*b*")}
    compare.plot_tradeoff(tmp_path / "t.png", figures, "token", "$\\bad$")
    losses = [{"$_$": 1.0, "later $$": None}, {"$_$": 1.0, "later $$": 2}]
    report.plot_losses(tmp_path / "l.png", losses)
    table = report.markdown(figures, {}, "a | b", ["1234567"])
    assert "| \\$\\_\\$ \\| mine |" in table and "| a\\*b\\* |" in table


def test_the_cards_snippet_is_python_whatever_the_names(tmp_path):
    folder = tmp_path / 'the "Mona Lisa" {back}\\slash'
    folder.mkdir()
    config = au.Config(concept="it's {here}", model="toy")
    report.write_card(folder / "README.md", config, "", "unet", TOY)
    card = (folder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    values = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert values == [f"{folder}/unet", str(TOY)] and "it's \\{here\\}" in card


def test_pictures_that_fail_are_warnings_and_the_figures_are_there_before(
        tmp_path, monkeypatch, capsys):
    figures_first = []

    def fails(path, *arguments):
        figures_first.append((path.parent / "results.json").is_file())
        raise RuntimeError("no such font")

    with monkeypatch.context() as patch:
        for decoration in ("plot_losses", "plot_samples", "write_card"):
            patch.setattr(report, decoration, fails)
        assert main(*SHORT, "--out", tmp_path / "run") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 3 and all("was not written: no such font" in w for w in warnings)
    assert figures_first[1:] == [True, True]  # the losses are drawn after training
    assert json.loads((tmp_path / "run/results.json").read_text())["complete"]


# --- 2: what was computed is reused by content

def test_an_edited_prompt_file_is_not_taken_for_the_old_one(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "mine.csv", "a church", "a red church")
    flags = [*COMPARE, "--eval-set", prompts, "--out", tmp_path / "table"]
    assert main(*flags) == 0
    written = (tmp_path / "table/esd/seed-0/results.json").stat().st_mtime_ns
    assert main(*flags) == 0  # nothing has changed: nothing is done again
    assert (tmp_path / "table/esd/seed-0/results.json").stat().st_mtime_ns == written
    write_prompts(prompts, "a church", "a blue church")
    capsys.readouterr()
    assert main(*flags) == 2
    assert "was run with other evaluation prompts" in capsys.readouterr().err
    assert main(*flags, "--overwrite") == 0
    table = json.loads((tmp_path / "table/original/seed-0/results.json").read_text())
    rows = table["results"]["original"]["details"]["rows"]
    assert [row["prompt"] for row in rows] == ["a church", "a blue church"]


def begun(out, flags):
    """A run that is stopped after its training has begun."""
    with pytest.MonkeyPatch.context() as patch:
        def stop(*arguments):
            raise KeyboardInterrupt
        patch.setattr(au, "erase_loss", stop)
        assert main(*flags, "--out", out) == 130


@pytest.mark.parametrize("changed", ["retain", "model", "classifier", "nothing"])
def test_resume_goes_on_with_the_same_inputs_alone(tmp_path, capsys, changed):
    retain = write_prompts(tmp_path / "retain.csv", "a photo of a house", "a boat")
    model = tmp_path / "model"
    shutil.copytree(TOY, model)
    flags = [*SHORT, "--retain-set", retain, "--model", model, "--attack", "none"]
    begun(tmp_path / "run", flags)
    if changed == "retain":
        write_prompts(retain, "a photo of a tree", "a boat")
    for part, name in (("text_encoder", "text_model.final_layer_norm.bias"),
                       ("classifier", "head.bias")):
        if changed == {"text_encoder": "model"}.get(part, part):  # trained once more
            tensors = load_file(model / part / "model.safetensors")
            tensors[name] = tensors[name] + 0.1
            save_file(tensors, model / part / "model.safetensors", {"format": "pt"})
    status = main(*flags, "--out", tmp_path / "run", "--resume")
    message = capsys.readouterr().err
    expected = {"retain": "other prompts to erase and retain", "model": "other model",
                "classifier": "other classifier", "nothing": ""}[changed]
    assert expected in message and status == (0 if changed == "nothing" else 2)


@pytest.mark.long
def test_who_edits_a_comment_keeps_what_is_there(tmp_path):
    """A begun run goes on, and a finished row of a comparison is not done again."""
    code = tmp_path / "code"
    shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(".*", "tests", "runs", "*.md"))
    run, table = [*SHORT, "--out", tmp_path / "run"], [*COMPARE, "--out", tmp_path / "table"]
    begun(tmp_path / "run", SHORT)
    assert main(*table) == 0
    row = tmp_path / "table/esd/seed-0/results.json"
    written = row.stat().st_mtime_ns
    for name in ("advunlearn.py", "sd_mini/pipeline.py"):
        (code / name).write_text((code / name).read_text() + "# a comment\n")
    for words in ([*run, "--resume"], table):
        done = subprocess.run([sys.executable, "advunlearn.py", *map(str, words)], cwd=code,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert row.stat().st_mtime_ns == written and (tmp_path / "run/results.json").is_file()


def test_a_row_says_which_commit_made_it(tmp_path):
    assert main(*COMPARE, "--out", tmp_path) == 0
    path = tmp_path / "esd/seed-0/results.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, "commit": "0ld0ld0"}))
    assert main(*COMPARE, "--out", tmp_path) == 0
    assert f"rows of commit 0ld0ld0, {run['commit']}" in (tmp_path / "table.md").read_text()


# --- 3: one run in a folder

def test_a_folder_in_use_is_refused_and_a_killed_run_leaves_no_lock(tmp_path):
    out = tmp_path / "run"
    code = ("import sys, time; from pathlib import Path; from sd_mini.lab import runs\n"
            "with runs.locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert main(*SHORT, "--out", out, *flags) == 2
    assert {path.name for path in out.iterdir()} == {".lock"}
    holder.kill()
    holder.wait()
    assert main(*SHORT, "--out", out, "--resume") == 0
    assert not (out / ".lock").exists()


def test_a_row_of_a_comparison_is_locked_by_itself(tmp_path, capsys):
    """What another process is at work on is left to it, and comes into the table later."""
    with runs.locked(tmp_path / "esd/seed-0"):
        assert main(*COMPARE, "--out", tmp_path) == 0
    assert "ESD: left to the process that is at work on it" in capsys.readouterr().out
    assert "| ESD |" not in (tmp_path / "table.md").read_text()
    assert main(*COMPARE, "--out", tmp_path) == 0
    assert "| ESD |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("error", [
    OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys, error):
    def acquire(*arguments, **keywords):
        raise error

    monkeypatch.setattr(runs.FileLock, "acquire", acquire)
    for wait in (False, True):
        with runs.locked(tmp_path / "run", wait):
            assert f"note: {tmp_path}/run: cannot be locked" in capsys.readouterr().out


def test_a_log_file_has_a_line_a_minute(monkeypatch, capsys):
    """600 iterations of a second each, and bars in one another."""
    now, p = [0], torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    adam = torch.optim.Adam([p])
    with runs.resumable(None, 600, [p], adam, torch.Generator()) as (iterations, history):
        for now[0] in iterations:
            history.append({"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 13 and "loss=1" in lines[5]
    for _ in runs.progress(range(2), "outer", leave=False):
        for _ in runs.progress(range(2), "inner", leave=False):
            now[0] += 61
    err = capsys.readouterr().err
    assert "\r" not in err and "\x1b" not in err and all(err.splitlines())


# --- 7: a guest in its host

HOST = """
import os, signal, threading
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
plt.plot([1, 2])
before = matplotlib.get_backend(), dict(os.environ), signal.getsignal(signal.SIGINT)
import sd_mini, advunlearn
from dataclasses import replace
from sd_mini.lab import tasks

sd = sd_mini.load("toy")
config = replace(advunlearn.Config(), steps=10, warmup=5, trajectories=2, trajectory_steps=2,
                 attack_steps=1)
done = []

def train():
    done.append(advunlearn.advunlearn(sd, ["church"], ["a boat"], config, "kept"))
    done.append(tasks.run_task(advunlearn.METHOD, {"task": "sample", "prompts": ["a church"],
                                                   "eval_steps": 1, "out": "drawn"}))

thread = threading.Thread(target=train)
thread.start(), thread.join()
erased, history = done[0]
plt.imshow(erased.sample(["a boat"], steps=2)[0].permute(1, 2, 0))
plt.savefig("plot.svg")
after = matplotlib.get_backend(), dict(os.environ), signal.getsignal(signal.SIGINT)
assert before == after, (before[0], after[0])
assert len(history) == 10 and done[1] == 0 and len(plt.get_fignums()) == 1
"""


@pytest.mark.long
def test_a_notebook_keeps_its_plots_environment_and_signals(tmp_path):
    """Plot before and after the import; train ten iterations in a thread with `Config()`."""
    done = subprocess.run([sys.executable, "-c", HOST], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_config_is_whole():
    """The paper's settings for an object."""
    config = au.Config()
    assert (config.layers, config.retain_weight, config.steps, config.eta) == (1, 0.5, 1000, 1.0)
    assert au.training_attack(config) == au.Attack("embedding", 30, 1e-3, 1, None)


# --- 8: a path is a path

@pytest.mark.parametrize("spec, expected", [
    ("some/model", ("some/model", None, None)),
    ("some/model@v1:a church", ("some/model", "v1", "a church")),
    ("some/model:a@b church", ("some/model", None, "a@b church")),
    ("C:\\classifier", ("C:\\classifier", None, None)),
    ("C:\\classifier:church: big", ("C:\\classifier", None, "church: big")),
    ("user@host:9/clip:church", ("user@host:9/clip", None, "church")),
])
def test_a_classifier_on_disk_may_have_any_name(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    for folder in ("C:\\classifier", "user@host:9/clip"):
        Path(folder).mkdir(parents=True)
    assert classifiers.split_source(spec) == expected


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_for_pictures_that_cannot_be_is_refused_at_the_start(tmp_path, capsys, place):
    (tmp_path / "file").write_text("x")
    assert main(*SHORT, "--out", tmp_path / "run", "--save-images", tmp_path / place) == 2
    assert capsys.readouterr().err.startswith("error: --save-images")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["out", "text_encoder", "eval_set", "classifier", "save_images"])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {name: "~/x", **({} if name == "out" else {"out": "x~"})}
    given |= {"text_encoder": {"task": "evaluate"}}.get(name, {})
    config = tasks.resolve(au.METHOD, given)
    assert getattr(config, name) == f"{tmp_path}/x" and config.out in ("x~", f"{tmp_path}/x")
    assert weights.find("~") == tmp_path


@pytest.mark.parametrize("names", [
    ",".join(f"Some Celebrity {i}" for i in range(100)), ",".join(["大教堂"] * 40)])
def test_a_hundred_names_are_a_concept(tmp_path, names):
    assert settings.parse(au.Config, ["--concept", names])["concept"] == names
    (tmp_path / f"{slug(names)}-compare").mkdir()
    assert slug(names) != slug(names + "x")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_log_need_not_hold_every_sign(tmp_path, encoding):
    words = ["--task", "sample", "--model", "toy", "--prompts", "a church", "--eval-steps", "1"]
    done = subprocess.run(
        [sys.executable, "advunlearn.py", *words, "--out", tmp_path / "教堂 é"], cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0 and b"\\u6559\\u5802" in done.stdout, done.stderr


def test_a_closed_pipe_ends_no_run():
    """As by `| head`: what is said from then on is lost, and that is all."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stream:
        for _ in range(3):
            print("a line", file=lab.Output(stream))


# --- 11: without internet, without a classifier

def test_erasing_alone_needs_weights_and_nothing_else(tmp_path, monkeypatch):
    """No classifier and no CLIP is opened, and the weights are those of an evaluated run."""
    def opened(*arguments):
        raise AssertionError("opened")

    with monkeypatch.context() as patch:
        patch.setattr(classifiers, "load_classifier", opened)
        patch.setattr(classifiers, "load_clip_score", opened)
        assert main(*SHORT, "--classifier", "none", "--out", tmp_path / "alone") == 0
    assert main(*SHORT, "--out", tmp_path / "scored") == 0
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {"text_encoder", "results.json", "losses.png", "README.md"}
    weights = [(tmp_path / run / "text_encoder/model.safetensors").read_bytes()
               for run in ("alone", "scored")]
    assert weights[0] == weights[1]
    results = json.loads((tmp_path / "alone/results.json").read_text())["results"]
    assert "minutes" in results["erased"]


def test_a_run_may_do_without_a_clip_score(tmp_path):
    assert main(*SHORT, "--clip-score", "none", "--out", tmp_path / "run") == 0
    figures = read_figures(tmp_path / "run")
    assert "clip_score" not in figures and figures["frechet"] >= 0


@pytest.mark.parametrize("flags, hint", [
    (["--classifier", "some/absent:church"], "or none: then nothing is evaluated"),
    (["--clip-score", "some/absent"], "or none: then there is no CLIP score")])
def test_what_is_not_there_names_the_flag_that_does_without(tmp_path, capsys, flags, hint):
    assert main(*SHORT, *flags, "--out", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "some/absent" in message and hint in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- 12: the toy elsewhere

def test_a_toy_in_its_own_folder_is_a_toy(tmp_path):
    shutil.copytree(TOY, tmp_path / "mine")
    own, embedded = (tasks.resolve(au.METHOD, {"model": model})
                     for model in (str(tmp_path / "mine"), "toy"))
    assert replace(own, model="toy") == embedded
    network = classifiers.ToyClassifier("cpu", tmp_path / "mine").network
    before = network.head.weight.clone()
    path = tmp_path / "mine/classifier/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "head.weight": tensors["head.weight"] + 1}, path)
    own = classifiers.ToyClassifier("cpu", tmp_path / "mine").network
    assert not torch.equal(own.head.weight, before)  # its own classifier, not the embedded one
    assert main(*SHORT, "--model", tmp_path / "mine", "--out", tmp_path / "run") == 0


# --- 13: large inputs

def test_a_bank_that_cannot_be_held_is_refused_before_it_is_sampled(
        sd, tmp_path, capsys, monkeypatch):
    """200 and 32 runs of 500 steps, of 3 latents of 4 KiB each: 1.4 GB."""
    prompts = [f"a photo of thing {i}" for i in range(200)]
    large = write_prompts(tmp_path / "large.csv", *prompts)
    monkeypatch.setattr(runs.os, "sysconf", lambda name: 2e9**0.5)
    assert main(*SHORT, "--retain-set", large, "--trajectory-steps", "500",
                "--out", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the bank would take 1.2 GB, more than half of this machine's")
    assert "--trajectory-steps" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(runs.os, "sysconf", lambda name: 4e9**0.5)
    au.check_prompts(sd, ["church"], prompts, au.Config(trajectory_steps=500))
    assert "the bank takes 1.4 GB" in capsys.readouterr().out
