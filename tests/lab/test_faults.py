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
from sd_mini.lab import evaluation, experiment, runs
from sd_mini.lab.runs import differences, resumable
from sd_mini.weights import TOY as WEIGHTS

from ..paper import SMALL
from . import FLAGS, ROOT, TOY, encoder, finished, main
from .test_own_method import run

KILLS = int(os.environ.get("KILLS", 1))  # KILLS=20 pytest ... -k killed


@pytest.mark.long
def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    """Each kill is after the first checkpoint."""
    flags = ["--steps", "8", "--save-every", "2", "--eval-attacks", "token", "--resume", "--out"]
    command = [sys.executable, "advunlearn.py", *TOY, *FLAGS, *flags]
    out, rng = tmp_path / "killed", random.Random(0)
    for i in range(KILLS):
        process = subprocess.Popen([*command, out], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not any(out.rglob(runs.CHECKPOINT)):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 5) if i else 0)
        process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][i % 3])
        if process.wait() == 0:  # it was faster this time: the next kill gets a new run
            shutil.rmtree(out)
    assert main(*flags, tmp_path / "whole") == 0
    assert main(*flags, out) == 0
    assert encoder(tmp_path / "whole") == encoder(out)
    assert finished(tmp_path / "whole") == finished(out) and not list(out.rglob("*.part"))


def train(folder, stop=None, instead=None):
    """Nine iterations; `instead` of the loss number `stop` -> (the parameter, history, iterations kept)."""
    p, generator = torch.nn.Parameter(torch.zeros(3)), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([p], lr=0.1)
    loop = resumable(folder, 9, [p], adam, generator, save_every=2)
    with contextlib.suppress(InterruptedError, KeyboardInterrupt), loop as (iterations, history):
        for i in iterations:
            loss = (p - torch.randn(3, generator=generator)).square().sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
            history.append({"loss": instead() if i == stop else loss.item(), "later": None})
    return p.detach(), history, len(runs.read_tensors(folder / runs.CHECKPOINT)[1])


def test_checkpoints_go_on_where_they_were(tmp_path):
    def fail():
        raise InterruptedError

    p, history, _ = train(tmp_path / "whole")
    assert train(tmp_path / "broken", 7, fail)[2] == 6
    again, history_again, kept = train(tmp_path / "broken")
    assert torch.equal(p, again) and history == history_again and len(history) == 9
    assert kept == 9


def test_interrupted_training_writes_its_last_iteration(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    _, history, kept = train(tmp_path, 4, lambda: os.kill(os.getpid(), signal.SIGTERM) or 1.0)
    assert kept == 5 and signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_kept(tmp_path):
    for bad in (math.nan, math.inf):
        with pytest.raises(ArithmeticError, match="iteration 5"):
            train(tmp_path, 5, lambda: bad)
    assert len(train(tmp_path)[1]) == 9


def as_read(record):
    return json.loads(json.dumps(record))


def test_a_record_knows_all_that_was_read_and_no_code(sd, write):
    """Each thing that a figure depends on has its name. Who edits a comment goes on."""
    retain = str(write("prompt\na tree\na boat\n"))
    config = replace(SMALL, eval_prompts=2, eval_utility=2, retain_set=retain)
    opened = experiment.open_experiment(au.METHOD, config)
    before, prompts = as_read(experiment.record(opened, config)), opened.evaluation_set

    def moved(network):
        network = copy.deepcopy(network)
        next(network.parameters()).data.view(-1)[-1] += 0.1
        return network

    def record(sd=sd, scored=None, **parts):
        inputs = experiment.fingerprints(sd, prompts._replace(**parts), scored)
        return experiment.record(opened._replace(inputs=inputs), config)

    assert differences(before, record()) == [] and before["inputs"].keys() == {
        "model", "evaluation prompts", "classifier", "CLIP", "prompts to erase and retain"}
    classifier = prompts.classifier
    ruled, other, clip = map(copy.copy, (classifier, classifier, prompts.clip_score))
    ruled.rule, other.network, clip.network = "any", moved(other.network), moved(clip.network)
    changed = [("classifier", "classifier", ruled), ("classifier", "classifier", other),
               ("CLIP", "clip_score", clip)]
    for part in ("text_encoder", "unet", "vae"):
        changed.append(("model", "sd", replace(sd, **{part: moved(getattr(sd, part))})))
    schedule = copy.copy(sd.schedule)
    schedule.config = {**schedule.config, "beta_end": 0.1}
    changed += [("model", "sd", replace(sd, schedule=schedule)),
                ("model", "sd", replace(sd, tokenizer=SimpleNamespace(get_vocab=dict)))]
    for part in evaluation.PARTS:
        first, *others = getattr(prompts, part)
        for field, value in dict(prompt="x", seed=3, guidance=2.0, label="x").items():
            rows = [first._replace(**{field: value}), *others]
            changed.append(("evaluation prompts", part, rows))
    for name, part, altered in changed:
        assert differences(before, record(**{part: altered})) == [f"other {name}"]
    scored, other = (record(scored=replace(sd, text_encoder=encoder))
                     for encoder in (sd.text_encoder, moved(sd.text_encoder)))
    for old, new in ((before, scored), (as_read(scored), other)):
        assert differences(old, new) == ["other text encoder"]
    write("prompt\na tree\na house\n")
    assert differences(before, record()) == ["other prompts to erase and retain"]


def test_a_record_knows_every_setting_on_which_a_figure_depends():
    config = asdict(au.Config())
    without = {name for name in config if not differences(
        as_read({"config": config}), {"config": {**config, name: "another"}})}
    assert without == {"task", "methods", "out", "resume", "overwrite", "save_every",
                       "save_images", "save_pipeline", "save_single_file", "low_memory"}


def test_a_run_is_resumed_with_the_same_inputs_alone_or_begun_anew(tmp_path, write, monkeypatch,
                                                                   capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    out, retain = tmp_path / "run", "prompt\na tree\na boat\n"
    flags = ["--retain-set", write(retain), "--out", out]

    def refused(message, *more):
        assert run(*flags, *more) == 2 and message in capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", stop)
        assert run(*flags) == 130
        refused("--resume goes on with it, --overwrite starts anew")
        refused("eval_steps 1 -> 2", "--resume", "--eval-steps", "2")
        write(retain + "a house\n")
        refused("other prompts to erase and retain", "--resume")
    write(retain)
    assert run(*flags, "--resume") == 0 and finished(out)
    assert run(*flags, "--resume") == 0 and "is finished" in capsys.readouterr().out
    refused("--resume goes on with it")
    (out / "unet").mkdir()
    assert run(*flags, "--overwrite", "--classifier", "none") == 0
    assert finished(out) == {} and not (out / "unet").exists()


def test_a_folder_in_use_is_refused_and_a_killed_run_leaves_no_lock(tmp_path):
    code = ("import sys, time, filelock\n"
            "with filelock.FileLock(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], text=True,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    flags = ["--classifier", "none", "--out", tmp_path]
    assert run(*flags) == run(*flags, "--overwrite") == 2
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    assert run(*flags) == 0 and not (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.FileLock, "acquire", lambda *_, **__: os.listdir("/no/locks"))
    with runs.locked(tmp_path):
        assert f"note: {tmp_path}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of bad files and folders. {name} in an argument below is the one of that name."""
    root = tmp_path_factory.mktemp("bad")
    (root / "long.csv").write_text(f"prompt\n{'church ' * 30}\n")
    shutil.copytree(WEIGHTS, root / "model")
    path = root / "model/text_encoder/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    config = json.loads((WEIGHTS / "text_encoder/config.json").read_text())
    wide = sd_mini.pipeline.TextEncoder({**config, "hidden_size": 32, "intermediate_size": 8})
    sd_mini.save_part(wide, root / "wide", "text_encoder")
    return root


BAD = [  # arguments -> what the line names
    ("--stesp 3", "--stesp"), ("--task trian", "'trian'"), ("--eval-prompts", "--eval-prompts"),
    ("--eval-steps ten", "--eval-steps: "), ("--eval-steps 501", "between 1 and 500"),
    ("--eval-utility 1", "between 2 and inf"), ("--eval-lr nan", "nan"), ("--seed -1", "--seed: -1"),
    ("--device gpu", "--device gpu: choose from cpu"), ("--resume --overwrite", "--resume --over"),
    ("--task evaluate", "--text-encoder"), ("--task sample", "--prompts"),
    ("--text-encoder {wide}", "--text-encoder: is for --task evaluate and sample"),
    ("--task compare --save-pipeline", "--save-pipeline: is for"),
    ("--task compare --classifier none", "--classifier none: is for --task train"),
    ("--task compare --methods ESB", "--methods 'ESB': choose from 'original'"),
    ("--task evaluate --text-encoder {wide} --out {bad} --overwrite", "would delete"),
    ("--model {model} --out {bad} --overwrite", "would delete"),
    ("--concept=", "--concept"), ("--concept ../x", "'../x'"),
    ("--concept church,tench --eval-set {long.csv}", "long.csv, line 2: no label"),
    ("--eval-set {nowhere.csv}", "nowhere.csv: cannot be read"),
    ("--retain-set {long.csv} --concept boat", "--retain-set {long.csv}: 1 of 1 prompts"),
    ("--task sample --prompts صورة_كنيسة_في_الصحراء_صورة_كنيسة", "--prompts: 1 of 1 prompts"),
    ("--prefix 30", "with 30 more"), ("--layers 5", "--layers 5"),
    ("--model {nowhere}", "nowhere: no such folder"), ("--model {model}", "model.safetensors"),
    ("--task evaluate --text-encoder {wide}", "its hidden_size is 32"),
    ("--out {bad}", "{bad}: holds files and no run"), ("--out /dev/null/x", "/dev/null is"),
    ("--task sample --prompts a --out {long.csv}", "long.csv is not a folder"),
    ("--save-images {long.csv}/below", "--save-images"),
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
