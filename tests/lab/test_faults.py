"""No run is lost: a killed one goes on to the same bytes. Every bad input gets one clear line.

    KILLS=20 pytest tests/test_faults.py -k killed        many kills
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import advunlearn as au
import sd_mini
from sd_mini.files import write_atomically
from sd_mini.lab import experiment, prompts
from sd_mini.lab.runs import cached, close_folder, is_finished, open_folder, resumable
from sd_mini.weights import TOY

from .test_run import FLAGS, ROOT, main

KILLS = int(os.environ.get("KILLS", 3))


# --- runs survive

def start(out, *flags):
    small = [*FLAGS, "--steps", "12", "--save-every", "2", "--eval-prompts", "2",
             "--eval-utility", "2", "--eval-steps", "2"]
    command = [sys.executable, "advunlearn.py", "--concept", "church", *small, "--resume",
               "--out", str(out), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def figures(out):
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] and not (out / "partial").exists()
    return {key: value for key, value in results["results"]["erased"].items()
            if key != "minutes"}


@pytest.mark.long
def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    began = time.time()
    assert start(tmp_path / "whole").wait() == 0
    took, rng = time.time() - began, random.Random(0)
    kill = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130, signal.SIGINT: 130}
    for i in range(KILLS):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.4, 0.95) * took)
        number = list(kill)[i % 3]
        process.send_signal(number)
        status = process.wait()
        if status == 0:  # it was faster this time: the next kill gets a new run
            shutil.rmtree(tmp_path / "killed")
        else:  # -number: the signal came before Python had its handlers
            assert status in (kill[number], -number), process.stderr.read()
    assert start(tmp_path / "killed").wait() == 0
    weights = [(tmp_path / name / "text_encoder/model.safetensors").read_bytes()
               for name in ("whole", "killed")]
    assert weights[0] == weights[1] and figures(tmp_path / "whole") == figures(tmp_path / "killed")
    assert not list(tmp_path.rglob("*.part"))


def test_checkpoints_keep_two_and_go_on_where_they_were(tmp_path):
    def train(folder, stop=None):
        p, generator = torch.nn.Parameter(torch.zeros(3)), torch.Generator().manual_seed(0)
        adam = torch.optim.Adam([p], lr=0.1)
        loop = resumable(folder, 9, [p], adam, generator, save_every=2)
        with contextlib.suppress(InterruptedError), loop as (iterations, history):
            for i in iterations:
                if i == stop:
                    raise InterruptedError
                loss = (p - torch.randn(3, generator=generator)).square().sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
                history.append({"loss": loss.item()})
        return p.detach(), history

    whole, history = train(tmp_path / "whole")
    train(tmp_path / "broken", stop=5)  # its last checkpoint is that of step 4
    assert [p.name for p in sorted((tmp_path / "broken").iterdir())] == [
        "checkpoint-000002.safetensors",
        "checkpoint-000004.safetensors",
    ]
    again, history_again = train(tmp_path / "broken")
    assert torch.equal(whole, again) and history == history_again
    assert len(list((tmp_path / "broken").iterdir())) == 2


def test_interrupted_training_writes_its_last_iteration(tmp_path):
    p, generator = torch.nn.Parameter(torch.zeros(1)), torch.Generator()
    adam = torch.optim.Adam([p])
    loop = resumable(tmp_path, 9, [p], adam, generator)
    with pytest.raises(KeyboardInterrupt), loop as (iterations, history):
        for _ in iterations:
            os.kill(os.getpid(), signal.SIGTERM)
            history.append({"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001.safetensors"]


def test_broken_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    sd_mini.write_json(path, {"old": 1})

    def half(temporary):
        temporary.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, half)
    assert sd_mini.read_json(path) == {"old": 1}


def test_attacks_are_kept(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return [{"broken": True}], torch.ones(2, 3)

    first, again = (cached(tmp_path / "kept/token-0.safetensors", compute) for _ in range(2))
    assert len(calls) == 1
    assert first[0] == again[0] == [{"broken": True}] and torch.equal(first[1], again[1])


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    status, line, _ = cli(*FLAGS, "--lr", "1", "--steps", "12", "--eta", "1e38",
                          "--out", str(tmp_path / "run"))
    assert status == 1 and "a loss is not finite" in line and "iteration" in line
    assert not (tmp_path / "run/results.json").exists()


# --- bad input

def cli(*arguments):
    """The command line in this process -> (exit status, standard error, standard output)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(*arguments)
        except SystemExit as stop:
            status = stop.code
    lines = [line for line in err.getvalue().split("\n") if line.startswith("error:")]
    return status, lines[0] if len(lines) == 1 else err.getvalue(), out.getvalue()


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of bad files and folders. {name} in an argument below is the one of that name."""
    root = tmp_path_factory.mktemp("bad")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    files = {
        "empty.csv": b"",
        "header.csv": b"prompt\n",
        "column.csv": b"text,seed\na,1\n",
        "latin.csv": b"prompt\ncaf\xe9\n",
        "seed.csv": b"prompt,evaluation_seed\na church,seven\n",
        "minus.csv": b"prompt,evaluation_seed\na church,-7\n",
        "guidance.csv": b"prompt,evaluation_guidance\na church,inf\n",
        "quotes.csv": b'prompt\n"a church\n',
        "long.csv": b"prompt\n" + b"church " * 21 + b"\n",
        "short.csv": b"other,prompt\na,b\nc\n",
        "all.csv": b"prompt\na church\na chapel\n",
        "two.csv": b"prompt\na boat\na tree\n",
        "pickle.ckpt": b"x",
        "half.safetensors": b"x" * 20,
    }
    for name, text in files.items():
        (root / name).write_bytes(text)

    def model(name, part="text_encoder", change=None, **files):
        """A copy of the toy with one part damaged: `change` its tensors, or replace its files."""
        folder = root / name
        folder.mkdir()
        for path in TOY.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / part).unlink()
        shutil.copytree(TOY / part, folder / part)
        weights = next((folder / part).glob("*.safetensors"))
        if change:
            tensors = load_file(weights)
            change(tensors)
            save_file(tensors, weights)
        for path, content in files.items():
            if callable(content):
                content = content(weights.read_bytes())
            (folder / part / path.replace("__", ".")).write_bytes(content)
        return folder

    first = "text_model.embeddings.token_embedding.weight"
    model("nan", change=lambda t: t.update({first: t[first].clone().fill_(float("nan"))}))
    model("missing", change=lambda t: t.pop(first))
    model("extra", change=lambda t: t.update(extra=torch.zeros(1)))
    model("shape", change=lambda t: t.update({first: t[first][:5].clone()}))
    model("truncated", model__safetensors=lambda data: data[:1000])
    model("flipped", model__safetensors=lambda data: data[:3] + b"\xff" + data[4:])
    model("config", config__json=b"{")
    shutil.rmtree(model("lacking") / "text_encoder")
    index = json.loads((TOY / "model_index.json").read_text())
    for name, kind in (("sdxl", "StableDiffusionXLPipeline"), ("other", None)):
        folder = model(name)
        (folder / "model_index.json").unlink()
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    config = json.loads((TOY / "text_encoder/config.json").read_text())
    wide = sd_mini.pipeline.TextEncoder({**config, "hidden_size": 32, "intermediate_size": 8})
    sd_mini.save_part(wide, root / "wide", "text_encoder")
    (root / "plain").mkdir()
    (root / "plain/config.json").write_text('{"model_type": "gpt2", "n_embd": 8}')
    shutil.copyfile(TOY / "text_encoder/model.safetensors", root / "plain/model.safetensors")
    return root


BAD = [  # arguments -> what the line says
    ("--stesp 3", "unrecognized arguments: --stesp 3"),
    ("extra", "unrecognized arguments: extra"),
    ("--task trian", "argument --task: invalid choice: 'trian'"),
    ("--eval-attacks token words", "--eval-attacks: invalid choice: 'words'"),
    ("--steps", "argument --steps: expected one argument"),
    ("--steps ten", "argument --steps: invalid int value: 'ten'"),
    ("--steps 0", "--steps: 0: must be a number, at least 1"),
    ("--warmup -1", "--warmup: -1: must be"),
    ("--lr 0", "--lr: 0: must be between"),
    ("--lr nan", "--lr: nan: must be between"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--eval-steps 501", "--eval-steps: 501: must be between 1 and 500"),
    ("--task evaluate", "--task evaluate: give --text-encoder"),
    ("--text-encoder {wide} --out {new}", "--text-encoder: is for --task evaluate"),
    ("--task evaluate --text-encoder {missing}/text_encoder --out {missing} --overwrite",
     "--overwrite: would delete"),
    ("--task evaluate --text-encoder {missing} --out {missing} --overwrite",
     "--overwrite: would delete"),
    ("--resume --overwrite", "--resume --overwrite: the one goes on"),
    ("--concept church,tench --eval-set {two.csv} --out {new}", "two.csv, line 2: no label"),
    ("--eval-set {long.csv} --out {new}", "every prompt takes more than 19 tokens (24 that"),
    ("--seed -1", "--seed: -1: must be between 0 and 2147483647"),
    ("--eval-utility 1", "--eval-utility: 1: must be a number, at least 2"),
    ("--layers 5 --out {new}", "--layers 5: this text encoder has 4"),
    ("--prefix 30 --out {new}", "with 30 more it exceeds the 24 that the model reads"),
    ("--concept=", "--concept '': names nothing"),
    ("--concept unicorn --out {new}", "the classifier toy has no label 'unicorn'; it knows"),
    ("--concept ../x --out {new}", "has no label '../x'"),
    ("--task sample --prompts ARABIC --out {new}", "every prompt takes more than 24 tokens"),
    ("--task sample --out {new}", "give --prompts"),
    ("--prompts church --out {new}", "--prompts: is for --task sample"),
    ("--methods ESD --out {new}", "--methods: is for --task compare"),
    ("--task compare --save-pipeline --out {new}", "--save-pipeline: is for --task train and"),
    ("--attack-radius inf", "--attack-radius: inf: must be a number"),
    ("--out {sdxl}", "sdxl: holds files and no run"),
    ("--task compare --methods ESB --out {new}", "--methods ESB: there are 0 original"),
    ("--eval-set {nowhere.csv} --out {new}", "nowhere.csv: cannot be read: No such file"),
    ("--eval-set {empty.csv} --out {new}", "empty.csv, line 1: no column 'prompt'"),
    ("--eval-set {header.csv} --out {new}", "header.csv: holds no rows"),
    ("--eval-set {column.csv} --out {new}", "column.csv, line 1: no column 'prompt'"),
    ("--eval-set {latin.csv} --out {new}", "latin.csv: what follows is no CSV in UTF-8"),
    ("--eval-set {quotes.csv} --out {new}", "quotes.csv: what follows is no CSV in UTF-8"),
    ("--eval-set {seed.csv} --out {new}", "seed.csv, line 2: seed 'seven'"),
    ("--eval-set {minus.csv} --out {new}", "minus.csv, line 2"),
    ("--eval-set {guidance.csv} --out {new}", "guidance.csv, line 2"),
    ("--eval-set {empty} --out {new}", "empty: cannot be read: Is a directory"),
    ("--retain-set {all.csv} --out {new}", "all.csv: every prompt names the concept"),
    ("--retain-set {short.csv} --out {new}", "short.csv, line 3: fields: 1, in the header: 2"),
    ("--retain-set cocoa --out {new}", "cocoa: cannot be read: No such file"),
    ("--model {nowhere} --out {new}", "nowhere: no such folder or file"),
    ("--model {empty} --out {new}", "empty/model_index.json: no such file"),
    ("--model {lacking} --out {new}", "lacking/text_encoder/config.json: no such file"),
    ("--model {config} --out {new}", "config/text_encoder/config.json: not valid JSON"),
    ("--model {truncated} --out {new}", "not a whole safetensors file"),
    ("--model {flipped} --out {new}", "not a whole safetensors file"),
    ("--model {half.safetensors} --tokenizer {truncated} --out {new}",
     "half.safetensors: not a whole safetensors file"),
    ("--model {nan} --out {new}",
     "tensor embeddings.token_embedding.weight holds values that are not finite"),
    ("--model {missing} --out {new}", "tensor embeddings.token_embedding.weight is missing"),
    ("--model {extra} --out {new}", "tensor extra does not belong there"),
    ("--model {shape} --out {new}", "tensor embeddings.token_embedding.weight has another shape"),
    ("--model {sdxl} --out {new}",
     "a StableDiffusionXLPipeline; only Stable Diffusion 1.x and 2.x"),
    ("--model {pickle.ckpt} --out {new}", "a pickle, which can run code"),
    ("--model some/misspelt-model --out {new}", "some/misspelt-model: no such folder here"),
    ("--task evaluate --text-encoder {wide} --out {new}", "its hidden_size is 32"),
    ("--task evaluate --text-encoder {plain} --out {new}",
     'plain/config.json: model_type "gpt2": must be "clip_text_model"'),
    ("--task evaluate --text-encoder {empty} --out {new}", "empty/config.json: no such file"),
    ("--model some/model@main --out {new}", "some/model: no such folder here"),
    ("--task sample --prompts church --out {file}", "file is not a folder that can be written to"),
    ("--precision fp8", "--precision: invalid choice: 'fp8'"),
    ("--out {file}", "file is not a folder that can be written to"),
    ("--out /dev/null/x", "/dev/null is not a folder that can be written to"),
    *([] if torch.cuda.is_available() else [
        ("--device cuda --out {new}", "--device cuda: choose from cpu")]),
    ("--device gpu --out {new}", "--device gpu: choose from cpu"),
    ("--classifier {nowhere}:church --out {new}", "nowhere"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(bad, tmp_path, arguments, message):
    words = {
        "ARABIC": "صورة كنيسة في الصحراء",
    }
    out = tmp_path / "new"

    def fill(word):
        word = word.replace("|", " ").replace("{new}", str(out))
        return word.replace("{", f"{bad}/").replace("}", "")

    filled = [words.get(word, fill(word)) for word in arguments.split()]
    start = list(bad.iterdir())
    status, line, _ = cli(*FLAGS, *filled)
    assert (status, line.count("\n")) == (2, 0), line
    assert line.startswith("error: ") and message in line and len(line) < 700, line
    assert list(bad.iterdir()) == start
    assert not out.exists()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    out, config = tmp_path / "run", asdict(au.Config(model="toy"))
    record = {"config": config, "inputs": {"model": "a"}}
    assert not is_finished(out, record)
    open_folder(out, record)
    with pytest.raises(ValueError, match="holds a run: --resume goes on with it"):
        is_finished(out, record)
    for other, message in (
        ({"config": {**config, "lr": 0.5}}, "lr 1e-05 -> 0.5: --resume cannot go on"),
        ({"config": config, "inputs": {"model": "b"}}, "run with other model: --resume cannot"),
    ):
        with pytest.raises(ValueError, match=message):
            is_finished(out, other, resume=True)
    sd_mini.write_json(out / "results.json", record)
    assert not is_finished(out, record, resume=True)  # its pictures may be missing
    close_folder(out)
    with pytest.raises(ValueError, match="holds a run"):
        is_finished(out, record)
    assert is_finished(out, record, resume=True)
    assert not is_finished(out, record, overwrite=True)
    open_folder(out, record, overwrite=True)
    assert not (out / "results.json").exists()


def test_a_picture_is_not_overwritten(tmp_path):
    arguments = ["--task", "sample", "--prompts", "a church", "--eval-steps", "1",
                 "--out", str(tmp_path)]
    assert cli(*arguments)[0] == 0
    status, line, _ = cli(*arguments, "--seed", "1")
    assert status == 2 and "is there already; --overwrite replaces it" in line
    assert cli(*arguments, "--overwrite")[0] == 0


def test_out_of_gpu_memory_says_what_lowers_it(monkeypatch, tmp_path):
    def load_model(config):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(experiment, "load_model", load_model)
    status, line, _ = cli("--out", str(tmp_path / "new"))
    assert status == 1 and "out of GPU memory" in line and "--low-memory" in line


def test_compiling_without_a_compiler_is_one_line(monkeypatch, tmp_path):
    def load_model(config):
        raise RuntimeError("backend='inductor' raised:\nNo working C++ compiler found")

    monkeypatch.setattr(experiment, "load_model", load_model)
    status, line, _ = cli("--compile", "--out", str(tmp_path / "new"))
    assert status == 1 and line.endswith("No working C++ compiler found")
    with pytest.raises(RuntimeError):
        cli("--out", str(tmp_path / "new"))


def test_concept_names_stay_inside_the_output_folder():
    for name in ("../x", "/etc/passwd", "..", "a/../../b", "C:\\x"):
        assert Path("runs", prompts.slug(name)).resolve().parent == Path("runs").resolve()


def test_no_pickle_and_no_eval_anywhere():
    folders = [ROOT / "sd_mini", ROOT / "tests"]
    ours = [ROOT / "advunlearn.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    words = ["torch." + "load", "import " + "pickle", "ev" + "al(", "ex" + "ec("]
    found = [(path.name, word) for path in ours for word in words
             if word in path.read_text().replace(".ev" + "al()", "")]
    assert len(ours) > 50 and not found
