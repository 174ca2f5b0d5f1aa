"""The outer loop and the command line, end to end on a small budget."""
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
from sd_mini.text_encoder import TextEncoder
from sd_mini.weights import TOY

from . import bench
from .sd.reference import V1, write_model

ROOT = Path(au.__file__).parent
SMALL = au.Config(**{**settings.TOY, **au.TOY, "steps": 6, "warmup": 2,
                     "attack_steps": 2, "trajectories": 4, "trajectory_steps": 4,
                     "erase_batch": 2, "retain_batch": 2, "retain_set": "photos",
                     "device": "cpu", "model": "toy", "precision": "fp32"})
FLAGS = ["--steps", "4", "--warmup", "1", "--erase-batch", "2",
         "--retain-batch", "2", "--attack-steps", "2", "--trajectories", "4",
         "--trajectory-steps", "3", "--retain-set", "photos", "--eval-prompts", "3",
         "--eval-utility", "3", "--eval-steps", "4", "--eval-attack-steps", "4",
         "--eval-looks", "2"]
PROMPTS = ["church", "a photo of a church"], ["a photo of a house", "a boat"]


def erase(sd, **changes):
    """A small run -> (erased model, history of losses)."""
    return au.advunlearn(sd, *PROMPTS, replace(SMALL, **changes))


def main(*arguments):
    """The command line in this process -> exit status."""
    return tasks.run_task(au.METHOD, settings.parse(au.Config, [str(word) for word in arguments]))


def changed(a, b):
    """Names of the tensors in which two modules differ."""
    pairs = zip(a.state_dict().items(), b.state_dict().items())
    return {name for (name, x), (_, y) in pairs if not torch.equal(x, y)}


# --- what is trained

def test_whole_text_encoder_is_trained_and_nothing_else(sd):
    before = copy.deepcopy((sd.text_encoder, sd.unet, sd.vae))
    erased, _ = erase(sd, layers=0)
    assert changed(sd.text_encoder, erased.text_encoder) == {
        name for name in sd.text_encoder.state_dict() if not name.startswith("embeddings.")}
    assert erased.unet is sd.unet and erased.vae is sd.vae
    for module, original in zip((sd.text_encoder, sd.unet, sd.vae), before):
        assert not changed(module, original)  # the frozen model's bytes
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert not any(p.requires_grad for p in erased.text_encoder.parameters())


@pytest.mark.parametrize("changes, trained", [
    (dict(layers=0), ("encoder.layers.", "final_layer_norm.")),  # the published "whole"
    (dict(layers=1), ("encoder.layers.0.",)),
])
def test_layers_are_trained_as_asked(sd, changes, trained):
    erased, _ = erase(sd, **changes)
    assert changed(sd.text_encoder, erased.text_encoder) == {
        name for name in sd.text_encoder.state_dict() if name.startswith(trained)}


def test_layers_are_chosen_by_index_not_by_name():
    encoder = TextEncoder({"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4,
                           "num_hidden_layers": 12, "num_attention_heads": 1,
                           "max_position_embeddings": 4})
    model = sd_mini.StableDiffusion(None, encoder, None, None, None)
    theta = au.parameters_to_train(model, replace(SMALL, layers=2))
    first_two = [p for layer in encoder.encoder.layers[:2] for p in layer.parameters()]
    assert {id(p) for p in theta} == {id(p) for p in first_two}
    with pytest.raises(ValueError, match="--layers 13: this text encoder has 12"):
        au.parameters_to_train(model, replace(SMALL, layers=13))


def test_unet_is_trained_when_asked(sd):
    erased, _ = erase(sd, train="unet", steps=3)
    assert changed(sd.unet, erased.unet) == set(sd.unet.state_dict())
    assert erased.text_encoder is sd.text_encoder


@pytest.mark.parametrize("train, kept", [("cross_attention", True), ("no_cross_attention", False)])
def test_cross_attention_alone_is_trained_or_left_out(sd, train, kept):
    """ESD-x and ESD-u."""
    erased, _ = erase(sd, train=train, steps=3)
    wanted = {name for name in sd.unet.state_dict() if (".attn2." in name) == kept}
    assert changed(sd.unet, erased.unet) == wanted != set()


@pytest.mark.parametrize("attack", ["embedding", "token", "fast", "none"])
def test_every_attack_trains(sd, attack):
    _, history = erase(sd, attack=attack, steps=3, warmup=1)
    assert len(history) == 3 and history[0]["attack"] is None  # no attack in warm-up
    assert (attack == "none") == (history[-1]["attack"] is None)
    assert all(losses["erase"] > 0 and losses["retain"] >= 0 for losses in history)


def test_first_step_loss_is_the_closed_form(sd):
    """At theta = theta_o, without attack:

    ||eps_c - (eps_e - eta (eps_c - eps_e))||^2 = (1 + eta)^2 ||eps_c - eps_e||^2; retain loss 0.
    """
    config = replace(SMALL, steps=1, attack="none", eta=2.0)
    draw = au.trajectory_bank(sd, PROMPTS[0], config)
    [z] = draw(config.erase_batch, torch.Generator().manual_seed(0))
    expected = 9 * au.squared_error(z.eps_c, z.eps_empty).mean()
    _, [losses] = erase(sd, steps=1, attack="none", eta=2.0)
    assert losses["erase"] == pytest.approx(expected.item(), rel=1e-3)
    assert losses["retain"] < 1e-9


# --- trajectories

def test_bank_holds_what_the_frozen_model_predicts(sd):
    prompts = ["a church", "a photo of a church"]
    draw = au.trajectory_bank(sd, prompts, SMALL)
    [z] = draw(8, torch.Generator().manual_seed(0))
    for eps, texts in ((z.eps_c, [prompts[i] for i in z.prompt]), (z.eps_empty, [""] * 8)):
        predicted = sd.predict_noise(z.x_t, z.t, sd.encode_prompt(texts))
        torch.testing.assert_close(predicted, eps, rtol=1e-3, atol=1e-4)


def test_bank_holds_every_prompt(sd):
    config = replace(SMALL, trajectories=1, trajectory_steps=2)
    draw = au.trajectory_bank(sd, ["a church", "a boat", "a house"], config)
    assert set(draw(60, torch.Generator().manual_seed(0))[0].prompt.tolist()) == {0, 1, 2}


def test_fresh_trajectories_draw_the_same_kind_of_latents(sd):
    prompts = ["a church", "a photo of a church"]
    draw = au.sample_afresh(sd, prompts, SMALL)
    [z] = draw(6, torch.Generator().manual_seed(0))
    drawn = {t for seed in range(20)
             for t in draw(1, torch.Generator().manual_seed(seed))[0].t.tolist()}
    assert drawn == set(sd.schedule.timesteps(SMALL.trajectory_steps))  # any step, also the last
    context = sd.encode_prompt([prompts[i] for i in z.prompt])
    predicted = sd.predict_noise(z.x_t, z.t, context)
    assert len(z.t) == 6
    torch.testing.assert_close(predicted, z.eps_c, rtol=1e-3, atol=1e-4)


def test_bank_saves_unet_evaluations(sd):
    bank, fresh = bench.counted(sd), bench.counted(sd)
    erase(bank, steps=4)
    erase(fresh, steps=4, fresh_trajectories=True)
    assert 0 < sum(bank.work) < sum(fresh.work)


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

@pytest.mark.parametrize("changes", [
    {}, {"attack": "none", "retain_weight": 0.0}, {"erase_batch": 3, "retain_batch": 4}])
def test_unet_evaluations_are_those_of_the_formula(sd, changes):
    """The bench's closed form against the hook's count; afresh, against the mean of drawn runs."""
    config = replace(SMALL, warmup=1, steps=3, **changes)
    counted = bench.iterations(sd, config)[1]
    assert counted == pytest.approx(bench.schedule(config, (1, 2)))
    fresh = replace(config, fresh_trajectories=True)
    assert bench.iterations(sd, fresh)[1] == pytest.approx(bench.schedule(fresh), rel=0.35)


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
    """... and with one are filled; here small networks on the CPU stand in for it."""
    monkeypatch.setattr(bench, "GPU", None)
    rows = [row for name, row in bench.ROWS.items() if name.startswith("v1")]
    assert len(rows) == 6 and {row()[0] for row in rows} == {"no GPU here"}
    monkeypatch.setattr(bench, "GPU", "cpu")
    monkeypatch.setattr(bench, "PAPER", replace(bench.PAPER, attack_steps=1, trajectory_steps=2))
    configs = {part: sd_mini.read_json(TOY / part / "config.json") for part in bench.V1}
    monkeypatch.setattr(bench, "V1", configs)
    pattern = r"[\d.]+ \(.*\) s against [\d.]+ \(.*\) s: [\d.]+ times less"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: None)  # takes minutes
    for row in (bench.bench_v1_iteration, bench.bench_v1_compile):
        assert re.fullmatch(pattern, row(repeats=1)[0])
    assert re.fullmatch(pattern.replace("times less", "times").replace(r"\(.*\) s:", r"s for .*:"),
                        bench.bench_v1_limit(repeats=1)[0])
    flags = ["--steps", "2", "--warmup", "1", "--attack-steps", "1", "--trajectory-steps", "1",
             "--trajectories", "1", "--eval-prompts", "1", "--eval-utility", "2", "--eval-steps",
             "1", "--eval-attack-steps", "1", "--eval-looks", "1"]
    monkeypatch.setattr(bench, "RUN_FLAGS", flags)
    assert re.match(r"[\d.]+ minutes, ", bench.bench_v1_run()[0])


def test_low_memory_gives_the_same_losses_and_weights(sd):
    frugal = replace(sd, unet=copy.deepcopy(sd.unet))
    sd_mini.recompute_activations(frugal.unet)
    (a, losses_a), (b, losses_b) = erase(sd, steps=3), erase(frugal, steps=3)
    assert losses_a == losses_b and not changed(a.text_encoder, b.text_encoder)


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
        config = replace(SMALL, train=train, steps=3, warmup=1, retain_weight=1.0)
        trained, history = au.advunlearn(half, *PROMPTS, config)
        assert all(p.dtype == torch.float32 for p in getattr(trained, train).parameters())
        assert len(history) == 3 and trained.sample(["a church"], steps=2).isfinite().all()


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
