"""The outer loop and the command line, end to end on a small budget."""
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
from safetensors.torch import load_file

import advunlearn as au
from sd_mini import read_json
from sd_mini.weights import TOY

from . import bench

ROOT = Path(au.__file__).parent
SMALL = au.Config(**{**au.TOY, "steps": 6, "warmup": 2, "phrasings": 2, "attack_steps": 2, "trajectories": 4, "trajectory_steps": 4,
                     "erase_batch": 2, "retain_batch": 2, "retain_set": "photos", "device": "cpu", "model": "toy"})
FLAGS = ["--steps", "4", "--warmup", "1", "--phrasings", "2", "--erase-batch", "2", "--retain-batch", "2", "--attack-steps", "2",
         "--trajectories", "4", "--trajectory-steps", "3", "--retain-set", "photos", "--eval-prompts", "3", "--eval-utility", "3",
         "--eval-steps", "4", "--eval-attack-steps", "4", "--eval-looks", "2"]


def erase(sd, **changes):
    """A small run on a copy of the part that is trained -> (erased model, losses)."""
    config = replace(SMALL, **changes)
    erased = replace(sd, **{config.module: copy.deepcopy(getattr(sd, config.module))})
    return erased, au.advunlearn(erased, sd, ["church", "a photo of a church"], ["a photo of a house", "a boat"], config)


def changed(a, b):
    """Names of the tensors in which two modules differ."""
    return {name for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items()) if not torch.equal(x, y)}


def test_whole_text_encoder_is_trained_and_nothing_else(sd):
    before = copy.deepcopy((sd.text_encoder, sd.unet, sd.vae))
    erased, _ = erase(sd, layers=0)
    assert changed(sd.text_encoder, erased.text_encoder) == set(sd.text_encoder.state_dict())
    for module, original in zip((sd.text_encoder, sd.unet, sd.vae), before):  # the frozen model's bytes
        assert not changed(module, original)
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_first_layer_only(sd):
    erased, _ = erase(sd, layers=1)
    names = changed(sd.text_encoder, erased.text_encoder)
    assert names == {name for name in sd.text_encoder.state_dict() if name.startswith("encoder.layers.0.")}


def test_layers_are_chosen_by_index_not_by_name():
    encoder = au.sd_mini.pipeline.TextEncoder({"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 12,
                                               "num_attention_heads": 1, "max_position_embeddings": 4})
    model = au.sd_mini.StableDiffusion(None, encoder, None, None, None)
    theta = au.parameters_to_train(model, replace(SMALL, layers=2))
    assert {id(p) for p in theta} == {id(p) for layer in encoder.encoder.layers[:2] for p in layer.parameters()}
    with pytest.raises(ValueError, match="--layers 13: this text encoder has 12"):
        au.parameters_to_train(model, replace(SMALL, layers=13))


def test_unet_is_trained_when_asked(sd):
    erased, _ = erase(sd, train="unet", steps=3)
    assert changed(sd.unet, erased.unet) == set(sd.unet.state_dict()) and erased.text_encoder is sd.text_encoder


def test_cross_attention_alone_is_trained_when_asked(sd):
    erased, _ = erase(sd, train="cross_attention", steps=3)
    assert changed(sd.unet, erased.unet) == {name for name in sd.unet.state_dict() if ".attn2." in name} != set()


@pytest.mark.parametrize("attack", ["embedding", "token", "fast", "none"])
def test_every_attack_trains(sd, attack):
    _, history = erase(sd, attack=attack, steps=3, warmup=1, plain_share=0.0)
    assert len(history) == 3 and history[0][1] is None  # no attack in warm-up
    assert (attack == "none") == (history[-1][1] is None)
    assert all(erase_loss > 0 and retain >= 0 for erase_loss, _, retain in history)


def test_first_step_loss_is_the_closed_form(sd):
    """At theta = theta_o without attack: ||eps_c - (eps_e - eta (eps_c - eps_e))||^2 = (1 + eta)^2 ||eps_c - eps_e||^2,
    and the retain loss is 0."""
    config = replace(SMALL, steps=1, attack="none", eta=2.0)
    draw = au.trajectory_bank(sd, ["church", "a photo of a church"], config)
    z = draw(config.erase_batch, torch.Generator().manual_seed(0))
    expected = 9 * au.squared_error(z.eps_c, z.eps_empty).mean()
    _, [(l_erase, _, l_retain)] = erase(sd, steps=1, attack="none", eta=2.0)
    assert l_erase == pytest.approx(expected.item(), rel=1e-3) and l_retain < 1e-9


def test_bank_holds_what_the_frozen_model_predicts(sd):
    prompts = ["a church", "a photo of a church"]
    draw = au.trajectory_bank(sd, prompts, SMALL)
    z = draw(8, torch.Generator().manual_seed(0))
    context = sd.encode_prompt([prompts[i] for i in z.prompt])
    torch.testing.assert_close(sd.predict_noise(z.x_t, z.t, context), z.eps_c, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sd.predict_noise(z.x_t, z.t, sd.encode_prompt([""] * 8)), z.eps_empty, rtol=1e-3, atol=1e-4)


def test_bank_holds_every_prompt(sd):
    draw = au.trajectory_bank(sd, ["a church", "a boat", "a house"], replace(SMALL, trajectories=1, trajectory_steps=2))
    assert set(draw(60, torch.Generator().manual_seed(0)).prompt.tolist()) == {0, 1, 2}


def test_fresh_trajectories_draw_the_same_kind_of_latents(sd):
    prompts = ["a church", "a photo of a church"]
    draw = au.fresh_trajectories(sd, prompts, SMALL)
    z = draw(6, torch.Generator().manual_seed(0))
    drawn = {t for seed in range(20) for t in draw(1, torch.Generator().manual_seed(seed)).t.tolist()}
    assert len(z.t) == 6 and drawn == set(sd.schedule.timesteps(SMALL.trajectory_steps))  # any step, also the last
    context = sd.encode_prompt([prompts[i] for i in z.prompt])
    torch.testing.assert_close(sd.predict_noise(z.x_t, z.t, context), z.eps_c, rtol=1e-3, atol=1e-4)


def test_bank_saves_unet_evaluations(sd):
    counted = au.count_evaluations(sd)
    erase(sd, steps=4)
    with_bank = counted[0]
    erase(sd, steps=4, fresh_trajectories=True)
    assert with_bank < counted[0] - with_bank


def test_retain_set_loses_prompts_that_name_the_concept():
    prompts = ["a photo of a church", "a photo of a chapel", "a photo of a house"]
    assert au.without_concept(prompts, ("church", "chapel")) == (prompts[2:], prompts[:2])


def run(*arguments):
    done = subprocess.run([sys.executable, "advunlearn.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_command_line_end_to_end(tmp_path):
    """Train twice: the same bytes. Then score the encoder again, and draw with it."""
    a, b, again, drawn = (tmp_path / name for name in ("a", "b", "again", "drawn"))
    printed = run("--concept", "church", *FLAGS, "--out", str(a)).stdout
    assert printed.startswith("model: toy") and "ASR, token attack" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if str(tmp_path) not in line)
    assert {p.name for p in a.iterdir()} == {"text_encoder", "results.json", "samples.png", "losses.png", "README.md"}
    assert au.main(au.parse(["--concept", "church", *FLAGS, "--out", str(b)])) == 0
    weights = [(folder / "text_encoder/model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]

    results = json.loads((a / "results.json").read_text())
    assert results["config"]["steps"] == 4 and results["unet_evaluations"] > 0
    assert len(results["results"]["erased"]["details"]["token"]) == 3
    assert au.main(au.parse(["--task", "evaluate", "--text-encoder", str(a / "text_encoder"), *FLAGS, "--out", str(again)])) == 0
    scored = json.loads((again / "results.json").read_text())
    assert all(scored["results"]["erased"][key] == value for key, value in results["results"]["erased"].items()
               if key not in ("minutes", "unet_evaluations"))
    assert au.main(au.parse(["--task", "sample", "--text-encoder", str(a / "text_encoder"), "--prompts", "a church", "a boat",
                             "--out", str(drawn)])) == 0
    assert (drawn / "samples.png").stat().st_size > 5000


def test_a_text_encoder_that_the_other_model_had_tuned_is_replaced_with_a_note(sd, tmp_path, capsys):
    encoder = copy.deepcopy(sd.text_encoder)
    encoder.config = {**encoder.config, "erased_from": au.sd_mini.fingerprint(sd.text_encoder)}
    au.sd_mini.save_part(encoder, tmp_path, "text_encoder")
    config = replace(SMALL, text_encoder=str(tmp_path))
    au.with_text_encoder(sd, config)
    assert capsys.readouterr().out == ""
    tuned = replace(sd, text_encoder=copy.deepcopy(sd.text_encoder))
    tuned.text_encoder.final_layer_norm.bias.add_(0.1)
    au.with_text_encoder(tuned, config)
    assert "has fine-tuned its own text encoder" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"attack": "none", "retain_weight": 0.0}, {"erase_batch": 3, "retain_batch": 4}])
def test_unet_evaluations_are_those_of_the_formula(sd, changes):
    """The bench's closed form against the hook's count; afresh, where the runs' lengths are drawn, against their mean."""
    config = replace(SMALL, warmup=1, steps=3, plain_share=0.0, **changes)
    assert bench.iterations(sd, config)[1] == bench.schedule(config, (1, 2))
    fresh = replace(config, fresh_trajectories=True)
    assert bench.iterations(sd, fresh)[1] == pytest.approx(bench.schedule(fresh), rel=0.35)


def test_examination_takes_the_evaluations_of_the_formula(sd, monkeypatch):
    """To a judge who sees nothing no attack succeeds: the bench's worst case."""
    monkeypatch.setattr(au, "shown", lambda judge, pictures, rows: [False] * len(rows))
    config = replace(SMALL, concept="church", eval_prompts=2, eval_utility=3, eval_steps=3, eval_attack_steps=4, eval_looks=2)
    exam, counted = au.set_exam(sd, au.read_concepts("church"), config), au.count_evaluations(sd)
    drawn = au.draw_exam(sd, exam, config)
    au.evaluate(sd, au.Lab([], sd, exam, drawn, counted, 0.0), drawn, config)
    assert counted[0] == bench.examination(config, related=len(exam.paraphrases + exam.neighbours + exam.styles))


def test_rows_at_full_size_are_left_out_without_a_gpu(monkeypatch):
    """... and with one are filled; here small networks on the CPU stand in for it."""
    monkeypatch.setattr(bench, "GPU", None)
    assert bench.bench_v1_iteration()[0] == bench.bench_v1_memory()[0] == "no GPU here"
    monkeypatch.setattr(bench, "GPU", "cpu")
    monkeypatch.setattr(bench, "PAPER", replace(bench.PAPER, attack_steps=1, trajectory_steps=2))
    monkeypatch.setattr(bench, "V1", {part: read_json(TOY / part / "config.json") for part in bench.V1})
    assert re.fullmatch(r"[\d.]+ \(.*\) s against [\d.]+ \(.*\) s: [\d.]+ times less", bench.bench_v1_iteration(repeats=1)[0])


@pytest.mark.beside
def test_two_processes_give_what_one_gives(tmp_path):
    """Without the token embeddings: the first retain loss is rounding, and so are the gradients of words that it alone
    has, of which Adam makes whole steps all the same."""
    flags = ["--concept", "church", *FLAGS, "--layers", "4", "--eval-batch", "2", "--out"]
    run(*flags, str(tmp_path / "one"))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "advunlearn.py", *flags, str(tmp_path / "two")],
                   cwd=ROOT, check=True, capture_output=True)
    one, two = ({key: value for key, value in load_file(tmp_path / name / "text_encoder/model.safetensors").items()
                 if not key.endswith("k_proj.bias")} for name in ("one", "two"))  # softmax does not see it: its gradient is rounding
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    figures, again = (json.loads((tmp_path / name / "results.json").read_text())["results"]["erased"] for name in ("one", "two"))
    for key in ("minutes", "unet_evaluations"):
        figures.pop(key), again.pop(key)
    assert again.pop("clip_score") == pytest.approx(figures.pop("clip_score")) and again.pop("frechet") == pytest.approx(figures.pop("frechet"), rel=1e-3)
    assert figures == again


def test_low_memory_gives_the_same_losses_and_weights(sd):
    frugal = replace(sd, unet=copy.deepcopy(sd.unet))
    au.sd_mini.recompute_activations(frugal.unet)
    (a, losses_a), (b, losses_b) = erase(sd, steps=3), erase(frugal, steps=3)
    assert losses_a == losses_b and not changed(a.text_encoder, b.text_encoder)


def test_a_picture_that_is_not_finite_ends_the_run(sd):
    """A judge would take it for something."""
    broken = replace(sd, vae=copy.deepcopy(sd.vae))
    broken.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="a picture drawn is not finite"):
        au.draw_rows(broken, [au.Row("a church", 0, 7.5, "church")], replace(SMALL, eval_steps=1))


def test_half_precision_is_for_what_is_not_trained(sd):
    half = au.load_model(replace(SMALL, precision="bf16"))
    x_t, context = torch.randn(4, *sd.latent_shape, generator=torch.Generator().manual_seed(0)), sd.encode_prompt(["a church"] * 4)
    exact, rounded = (model.predict_noise(x_t, 500, context) for model in (sd, half))
    assert not changed(half.text_encoder, sd.text_encoder)
    assert half.dtype == torch.bfloat16 and 0 < (rounded - exact).norm() / exact.norm() < 0.02
    for train in ("text_encoder", "unet"):
        trained, history = au.train(half, au.read_concepts("church"), replace(SMALL, train=train, steps=3, warmup=1, retain_weight=1.0))
        assert all(p.dtype == torch.float32 for p in getattr(trained, train).parameters()) and len(history) == 3
        assert trained.sample(["a church"], steps=2).isfinite().all()


def test_default_run_takes_a_twelfth_of_the_published_evaluations():
    assert bench.schedule(replace(bench.PAPER, fresh_trajectories=True)) > 12 * bench.schedule(bench.PAPER)
