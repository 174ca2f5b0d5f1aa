"""No run is lost: a killed one goes on to the same bytes. Every bad input gets one clear line."""
import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import advunlearn as au
import sd_mini
from sd_mini.lab import classifiers, evaluation, experiment, runs
from sd_mini.lab.runs import differences, resumable
from sd_mini.weights import TOY as WEIGHTS

from ..paper import SMALL
from . import OWN, ROOT, encoder, finished, flags, main
from .test_own_method import run

KILLS = int(os.environ.get("KILLS", 1))  # KILLS=20 pytest ... -k killed


@pytest.mark.long
def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    """Each kill is after the first checkpoint."""
    words = ["--steps", "8", "--save-every", "2", "--eval-attacks", "token", "--resume", "--out"]
    command = [sys.executable, "advunlearn.py", *flags(**OWN), *words]
    out, rng = tmp_path / "killed", random.Random(0)
    for i in range(KILLS):
        process = subprocess.Popen([*command, out], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not any(out.rglob("checkpoint*.safetensors")):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 5) if i else 0)
        process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][i % 3])
        if process.wait() == 0:  # it was faster this time: the next kill gets a new run
            shutil.rmtree(out)
    assert main(*words, tmp_path / "whole") == main(*words, out) == 0
    assert encoder(tmp_path / "whole") == encoder(out)
    assert finished(tmp_path / "whole") == finished(out) and not list(out.rglob("*.part"))


def train(folder, stop=None, instead=None):
    """Nine iterations; `instead` of the loss number `stop` -> (begun at, history, parameter)."""
    p, generator = torch.nn.Parameter(torch.zeros(3)), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([p], lr=0.1)
    loop = resumable(folder, 9, [p], adam, generator, save_every=2)
    with contextlib.suppress(KeyboardInterrupt), loop as (iterations, history):
        begun = len(history)
        for i in iterations:
            loss = (p - torch.randn(3, generator=generator)).square().sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
            history.append({"loss": instead() if i == stop else loss.item(), "later": None})
    return begun, history, p.tolist()


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_kept(tmp_path):
    """It goes on from the last checkpoint, as if it had never ended."""
    for bad in (math.nan, math.inf):
        with pytest.raises(ArithmeticError, match="iteration 7"):
            train(tmp_path / "broken", 7, lambda: bad)
    whole, again = train(tmp_path / "whole"), train(tmp_path / "broken")
    assert (whole[0], again[0], len(again[1])) == (0, 6, 9) and whole[1:] == again[1:]
    assert train(tmp_path / "broken") == (9, *again[1:])


def test_interrupted_training_writes_its_last_iteration(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, 4, lambda: os.kill(os.getpid(), signal.SIGTERM) or 1.0)
    assert train(tmp_path)[0] == 5 and signal.getsignal(signal.SIGTERM) is before


def test_a_record_knows_all_that_was_read(sd):
    """Each thing that a figure depends on has its name."""
    config = replace(SMALL, eval_prompts=2, eval_utility=2)
    prompts = experiment.open_experiment(au.METHOD, config).evaluation_set

    def moved(network):
        network = copy.deepcopy(network)
        next(network.parameters()).data.view(-1)[-1] += 0.1
        return network

    def hashes(sd=sd, scored=sd, **parts):
        return experiment.fingerprints(sd, prompts._replace(**parts), scored)

    classifier, schedule = prompts.classifier, copy.copy(sd.schedule)
    ruled, other, clip = map(copy.copy, (classifier, classifier, prompts.clip_score))
    ruled.rule, other.network, clip.network = "any", moved(other.network), moved(clip.network)
    schedule.config = {**schedule.config, "beta_end": 0.1}
    encoder, *models = [replace(sd, **parts) for parts in (
        {"text_encoder": moved(sd.text_encoder)}, {"unet": moved(sd.unet)}, {"vae": moved(sd.vae)},
        {"schedule": schedule}, {"tokenizer": SimpleNamespace(get_vocab=dict)})]
    changed = [("classifier", "classifier", ruled), ("classifier", "classifier", other),
               ("CLIP", "clip_score", clip), ("text encoder", "scored", encoder),
               *[("model", "sd", model) for model in (encoder, *models)]]
    for part, field in zip(evaluation.PARTS, ("prompt", "seed", "guidance", "label", "seed")):
        first, *others = getattr(prompts, part)
        changed.append(("evaluation prompts", part, [first._replace(**{field: 9}), *others]))
    before = hashes()
    assert before == hashes() and {*before} == {name for name, _, _ in changed}
    for name, part, altered in changed:
        now = hashes(**{part: altered})
        assert {each for each in now if now[each] != before[each]} == {name}
    assert before.keys() - hashes(scored=None) == {"text encoder"}


def test_a_record_knows_every_setting_on_which_a_figure_depends():
    """... and inputs, where both are known."""
    config = asdict(au.Config())
    before = json.loads(json.dumps({"config": config, "inputs": {"model": "x"}}))
    without = {name for name in config if not differences(
        before, {"config": {**config, name: "another"}})}
    assert without == {"task", "methods", "out", "resume", "overwrite", "save_every",
                       "save_images", "save_pipeline", "save_single_file", "low_memory"}
    now = {"config": config, "inputs": {"model": "x", "text encoder": "y"}}
    assert differences(before, now) == ["other text encoder"]


def test_a_run_is_resumed_with_the_same_inputs_alone_or_begun_anew(tmp_path, write, monkeypatch,
                                                                   capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    out, retain = tmp_path / "run", "prompt\na tree\na boat\n"
    words = ["--retain-set", write(retain), "--out", out]

    def refused(message, *more):
        assert run(*words, *more) == 2 and message in capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", stop)
        assert run(*words) == 130
        refused("--resume goes on with it, --overwrite starts anew")
        refused("eval_steps 1 -> 2", "--resume", "--eval-steps", "2")
        write(retain + "a house\n")
        refused("other prompts to erase and retain", "--resume")
    write(retain)
    assert run(*words, "--resume") == 0 and finished(out)
    assert run(*words, "--resume") == 0 and "is finished" in capsys.readouterr().out
    refused("--resume goes on with it")
    (out / "unet").mkdir()
    assert run(*words, "--overwrite", "--classifier", "none") == 0
    assert finished(out) == {} and not (out / "unet").exists()


def test_erasing_alone_needs_weights_and_a_folder_that_nobody_uses(tmp_path, monkeypatch):
    """A killed run leaves the file .lock, which locks nothing."""
    monkeypatch.setattr(classifiers, "load_classifier", None)
    monkeypatch.setattr(classifiers, "load_clip_score", None)
    words = ["--classifier", "none", "--out", tmp_path]
    with runs.locked(tmp_path):
        assert run(*words) == run(*words, "--overwrite") == 2
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (tmp_path / ".lock").touch()
    assert run(*words) == 0 and finished(tmp_path) == {}
    assert {path.name for path in tmp_path.iterdir()} == {
        "text_encoder", "results.json", "losses.png"}


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.FileLock, "acquire", lambda *_, **__: os.listdir("/no/locks"))
    with runs.locked(tmp_path):
        assert f"note: {tmp_path}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of bad files and folders. {name} in an argument below is the one of that name."""
    root = tmp_path_factory.mktemp("bad")
    (root / "long.csv").write_text(f"prompt\n{'church ' * 30}\n")
    config = json.loads((WEIGHTS / "text_encoder/config.json").read_text())
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        other = sd_mini.pipeline.TextEncoder({**config, "intermediate_size": 8, key: 32})
        sd_mini.save_part(other, root / key, "text_encoder")
    return root


BAD = [  # arguments -> what the line names
    ("--step 3", "--step"), ("--eval-steps 501", "--eval-steps"), ("--eval-lr 11", "--eval-lr"),
    ("--eval-utility 1", "--eval-utility"), ("--seed -1", "--seed"), ("--device gpu", "cpu"),
    ("--task evaluate", "--text-encoder"), ("--task sample", "--prompts"),
    ("--task compare --save-pipeline", "--save-pipeline: is for"),
    ("--task compare --classifier none", "--classifier none: is for --task train"),
    ("--task evaluate --text-encoder {hidden_size} --out {bad} --overwrite", "would delete"),
    ("--model {vocab_size} --out {bad} --overwrite", "would delete"), ("--concept=", "--concept"),
    ("--concept church,tench --eval-set {long.csv}", "long.csv, line 2: no label"),
    ("--eval-set {nowhere.csv}", "nowhere.csv: cannot be read"),
    ("--task sample --prompts صورة_كنيسة_في_الصحراء_صورة_كنيسة", "--prompts: "),
    ("--prefix 30", "with 30 more"), ("--model {nowhere}", "nowhere: no such folder"),
    ("--task evaluate --text-encoder {hidden_size}", "its hidden_size is 32"),
    ("--task evaluate --text-encoder {vocab_size}", "its vocab_size is 32"),
    ("--task evaluate --text-encoder {max_position_embeddings}", "_embeddings is 32"),
    ("--out {bad}", "{bad}: holds files and no run"), ("--out /dev/null/x", "/dev/null is"),
    ("--task sample --prompts a --out {long.csv}", "long.csv is not a folder"),
    ("--save-images {long.csv}/below", "--save-images"), ("--task compare --methods ESB", "ESB"),
    ("--classifier {nowhere}:church", "none: then nothing is evaluated"),
    ("--clip-score some/absent", "none: then there is no CLIP score")]


@pytest.mark.parametrize("arguments, named", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(bad, tmp_path, capsys, arguments, named):
    def fill(word):
        return word.replace("{bad}", str(bad)).replace("{", f"{bad}/").replace("}", "")

    out = ["--out", tmp_path / "new"] * ("--out" not in arguments)
    words, before = [fill(word) for word in arguments.split()], {*bad.iterdir()}
    assert main(*words, *out) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 700, line
    assert fill(named) in line, line
    assert {*bad.iterdir()} == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("error, named", [
    (torch.cuda.OutOfMemoryError(), "--low-memory"), (OSError("disk full"), "disk full"),
    (RuntimeError("raised:\nNo C++ compiler"), "--compile: raised: No C++ compiler")])
def test_what_breaks_off_is_one_line(monkeypatch, capsys, tmp_path, error, named):
    def load_model(config):
        raise error

    monkeypatch.setattr(experiment, "load_model", load_model)
    assert main("--out", tmp_path / "new", "--compile") == 1
    assert named in capsys.readouterr().err


def test_what_half_of_the_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(runs.os, "sysconf", lambda name: 4e9**0.5)
    runs.check_memory("the bank", 1.9e9, "--trajectory-steps")
    with pytest.raises(ValueError, match="2.1 GB.*--trajectory-steps"):
        runs.check_memory("the bank", 2.1e9, "--trajectory-steps")
