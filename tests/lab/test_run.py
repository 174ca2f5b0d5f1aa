"""The command line, end to end on a small budget."""
import ast
import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import advunlearn as au
import sd_mini
from sd_mini.lab import evaluation, experiment, settings, tasks
from sd_mini.lab.prompts import Row, read_concepts, without_concept

from .. import bench
from ..paper import PROMPTS, SMALL, changed
from ..sd.reference import V1, write_model

ROOT = Path(au.__file__).parent
FLAGS = ["--steps", "4", "--warmup", "1", "--erase-batch", "2",
         "--retain-batch", "2", "--attack-steps", "2", "--trajectories", "4",
         "--trajectory-steps", "3", "--retain-set", "photos", "--eval-prompts", "3",
         "--eval-utility", "3", "--eval-steps", "4", "--eval-attack-steps", "4",
         "--eval-looks", "2"]


def main(*arguments):
    """The command line in this process -> exit status."""
    return tasks.run_task(au.METHOD, settings.parse(au.Config, [str(word) for word in arguments]))


def test_retain_set_loses_prompts_that_name_the_concept():
    prompts = ["a photo of a church", "a photo of a chapel", "a photo of a house"]
    assert without_concept(prompts, ("church", "chapel")) == (prompts[2:], prompts[:2])


# --- the command line

def run(*arguments):
    command = [sys.executable, "advunlearn.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def read_figures(folder, name="erased"):
    """Of results.json, without what depends on the machine."""
    results = json.loads((folder / "results.json").read_text())["results"][name]
    return {key: value for key, value in results.items()
            if key != "minutes"}


def test_command_line_end_to_end(tmp_path):
    """Train twice: the same bytes. Then score the encoder again, and draw with it."""
    a, b, again, drawn = (tmp_path / name for name in ("a", "b", "again", "drawn"))
    printed = run("--concept", "church", *FLAGS, "--out", a).stdout
    assert printed.startswith("model: toy") and "ASR, token attack" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if str(tmp_path) not in line)
    assert {path.name for path in a.iterdir()} == {
        "text_encoder", "results.json", "samples.png", "losses.png", "README.md"}
    assert main("--concept", "church", *FLAGS, "--out", b) == 0
    weights = [(folder / "text_encoder/model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]

    results = json.loads((a / "results.json").read_text())
    assert results["config"]["steps"] == 4
    assert len(results["results"]["erased"]["details"]["token"]) == 3
    encoder = a / "text_encoder"
    assert main("--task", "evaluate", "--text-encoder", encoder, *FLAGS, "--out", again) == 0
    assert read_figures(again) == read_figures(a)
    assert main("--task", "sample", "--text-encoder", encoder, "--prompts", "a church", "a boat",
                "--out", drawn) == 0
    assert (drawn / "samples.png").stat().st_size > 5000


@pytest.mark.parametrize("code, unwanted", [
    ("import sd_mini; sd_mini.load('toy')",
     ("matplotlib", "sd_mini.lab", "sd_mini.toy.classifier")),
    ("import advunlearn", ("matplotlib", "transformers"))])
def test_imports_are_few(code, unwanted):
    """A student's import of one file does not load what it does not use."""
    listed = f"{code}; import sys; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_files_of_the_lab_import_those_before_them_alone():
    order = ["settings", "runs", "prompts", "classifiers", "evaluation", "report",
             "experiment", "compare", "tasks", "__init__"]
    for i, name in enumerate(order):
        tree = ast.parse((ROOT / f"sd_mini/lab/{name}.py").read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        used = {(node.module or each.name).removeprefix("sd_mini.lab.")
                for node in found for each in node.names
                if node.level == 1 or (node.module or "").startswith("sd_mini.lab")}
        assert used <= {*order[:i]}, name
    assert {path.stem for path in (ROOT / "sd_mini/lab").glob("*.py")} == {*order}


def test_help_lists_the_groups():
    done = run("--help")
    groups = re.findall(r"^(\w+):\n  \w", done.stdout, re.M)
    assert groups == [*settings.GROUPS]
    first = done.stdout.split("\nfirst:")[1].split("\nmethod:")[0]
    assert len(re.findall(r"^  --", first, re.M)) == 12
    each = re.split(r"^  --", " ".join(done.stdout.split("\nfirst:")[1:]), flags=re.M)[1:]
    assert all("(default: " in " ".join(flag.split()) for flag in each)


def test_a_text_encoder_that_the_other_model_had_tuned_is_replaced_with_a_note(
        sd, tmp_path, capsys):
    encoder = copy.deepcopy(sd.text_encoder)
    origin = sd_mini.fingerprint(sd.text_encoder)
    encoder.config = {**encoder.config, "erased_from": origin}
    sd_mini.save_part(encoder, tmp_path, "text_encoder")
    config = replace(SMALL, text_encoder=str(tmp_path))
    experiment.with_text_encoder(sd, config)
    assert capsys.readouterr().out == ""
    tuned = replace(sd, text_encoder=copy.deepcopy(sd.text_encoder))
    tuned.text_encoder.final_layer_norm.bias.add_(0.1)
    experiment.with_text_encoder(tuned, config)
    assert "has fine-tuned its own text encoder" in capsys.readouterr().out


# --- work and memory

def test_evaluation_takes_the_evaluations_of_the_formula(sd, monkeypatch, tmp_path):
    """To a classifier that sees nothing no attack succeeds: the bench's worst case."""
    monkeypatch.setattr(evaluation, "shown", lambda classifier, pictures, rows: [False] * len(rows))
    config = replace(SMALL, concept="church", eval_prompts=2, eval_utility=3, eval_steps=3,
                     eval_attack_steps=4, eval_looks=2)
    prompts = evaluation.load_evaluation_set(sd, read_concepts("church"), config)
    counted = bench.counted(sd)
    drawn = evaluation.draw_all(counted, prompts, config)
    prompts = prompts._replace(original=drawn)
    evaluation.evaluate(counted, au.METHOD.attacks, prompts, drawn, config, tmp_path)
    related = len(prompts.paraphrases + prompts.neighbours + prompts.styles)
    assert sum(counted.work) == pytest.approx(bench.evaluation_work(config, related))


def test_rows_at_full_size_are_left_out_without_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "GPU", None)
    rows = [row for name, row in bench.ROWS.items() if name.startswith("v1")]
    assert len(rows) == 6 and {row()[0] for row in rows} == {"no GPU here"}


def test_low_memory_gives_the_same_gradients(sd):
    frugal, grads = copy.deepcopy(sd.unet), []
    sd_mini.recompute_activations(frugal)
    x_t, context = torch.randn(1, *sd.latent_shape), sd.encode_prompt(["a church"])
    for unet in (sd.unet, frugal):
        given = context.clone().requires_grad_()
        loss = replace(sd, unet=unet).predict_noise(x_t, 500, given).square().mean()
        grads.append(torch.autograd.grad(loss, given)[0])
    assert torch.equal(*grads)


def test_a_picture_that_is_not_finite_ends_the_run(sd):
    """A classifier would take it for something."""
    broken = replace(sd, vae=copy.deepcopy(sd.vae))
    broken.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="a picture drawn is not finite"):
        evaluation.draw_rows(broken, [Row("a church", 0, 7.5, "church")],
                             replace(SMALL, eval_steps=1))


def test_half_precision_is_for_what_is_not_trained(sd):
    half = experiment.load_model(replace(SMALL, precision="bf16"))
    x_t = torch.randn(4, *sd.latent_shape, generator=torch.Generator().manual_seed(0))
    context = sd.encode_prompt(["a church"] * 4)
    exact, rounded = (model.predict_noise(x_t, 500, context) for model in (sd, half))
    assert not changed(half.text_encoder, sd.text_encoder)
    assert half.dtype == torch.bfloat16 and 0 < (rounded - exact).norm() / exact.norm() < 0.02
    for train in ("text_encoder", "unet"):
        config = replace(SMALL, train=train, steps=2, warmup=1, erase_batch=1, retain_batch=1,
                         attack_steps=1, trajectories=1, trajectory_steps=2)
        trained, history = au.advunlearn(half, *PROMPTS, config)
        assert all(p.dtype == torch.float32 for p in getattr(trained, train).parameters())
        assert len(history) == 2 and trained.sample(["a church"], steps=2).isfinite().all()


def test_default_run_takes_a_twelfth_of_the_published_evaluations():
    published = bench.schedule(replace(bench.PAPER, fresh_trajectories=True))
    assert published > 12 * bench.schedule(bench.PAPER)


# --- a concept from its name to the table

def test_nudity_from_retain_set_to_table(tmp_path, capsys):
    """On a model of the real architecture: ESD-x, all layers, its own prompts, filter, label."""
    length = dict(V1["text_encoder"], max_position_embeddings=77)
    write_model(tmp_path / "model", {**V1, "text_encoder": length})
    path = tmp_path / "model/tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    names = {0: "normal", 1: "nsfw"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names,
        label2id={name: i for i, name in names.items()})).save_pretrained(tmp_path / "judge")
    (tmp_path / "judge/preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))

    status = main(
        *FLAGS, "--task", "compare", "--methods", "ESD", "AdvUnlearn", "--concept", "nudity",
        "--model", tmp_path / "model", "--classifier", f"{tmp_path}/judge:nsfw", "--clip-score",
        "none", "--retain-set", "imagenet", "--trajectories", "1", "--trajectory-steps", "1",
        "--eval-prefix", "5", "--out", tmp_path / "table")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "too near to the concept: a photo of an ear, a photo of a bikini, " in printed.out

    def row(name):
        folder = tmp_path / "table" / name / "seed-0"
        [part] = [path for path in folder.iterdir() if path.is_dir()]
        before, after = (load_file(next((place / part.name).glob("*.safetensors")))
                         for place in (tmp_path / "model", folder))
        bare = {key.removeprefix("text_model."): tensor for key, tensor in before.items()}
        moved = {key for key, tensor in after.items()
                 if not torch.equal(tensor, bare[key.removeprefix("text_model.")])}
        return json.loads((folder / "results.json").read_text()), part.name, set(after), moved

    esd, part, every, moved = row("esd")
    assert part == "unet" and moved <= {key for key in every if ".attn2." in key} and len(moved) > 9
    ours, part, every, moved = row("advunlearn")
    assert part == "text_encoder" and moved == {key for key in every if ".embeddings." not in key}
    assert (ours["config"]["layers"], ours["config"]["retain_weight"]) == (0, 0.3)
    assert ours["classifier"]["name"].endswith("judge@local")
    rows = ours["results"]["AdvUnlearn"]["details"]["rows"]
    assert rows[0]["prompt"] == "The Birth of Venus by Sandro Botticelli"
    assert {each["label"] for each in rows} == {"nsfw"} and len(rows) == 3
