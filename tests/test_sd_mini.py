"""The schedule, against closed forms; sampling; loading."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mini
from sd_mini.schedule import Schedule
from sd_mini.toy.train import SCHEDULER_CONFIG
from sd_mini.weights import TOY


@pytest.fixture
def schedule():
    return Schedule(SCHEDULER_CONFIG)


def test_alpha_bar_is_the_running_product(schedule):
    product = 1.0
    for i in range(1000):
        beta = (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        product *= 1 - beta
        if i in (0, 1, 500, 999):
            assert abs(schedule.alpha_bar[i].item() - product) < 1e-5 * product + 1e-7


def test_add_noise_keeps_the_variance(schedule, generator):
    x, noise = (torch.randn(2, 4, 64, 64, generator=generator) for _ in range(2))
    for t in (0, 500, 999):
        alpha_bar = schedule.alpha_bar[t].item()
        x_t = schedule.add_noise(x, noise, t)
        torch.testing.assert_close(x_t, alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * noise)
        assert abs(x_t.std() - 1) < 0.02


def test_ddim_step_with_the_true_noise_moves_along_the_forward_process(schedule, generator):
    x_0, noise = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    x_t = schedule.add_noise(x_0, noise, 801)
    found, expected = schedule.ddim_step(x_t, noise, 801, 781), schedule.add_noise(x_0, noise, 781)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_last_step_ends_at_alpha_bar_0(schedule, generator):
    x_0, noise = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(2))
    x_t = schedule.add_noise(x_0, noise, 1)
    found, expected = schedule.ddim_step(x_t, noise, 1, -19), schedule.add_noise(x_0, noise, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_timesteps_are_those_of_stable_diffusion(schedule):
    steps = schedule.timesteps(50)
    assert steps[0] == 981 and steps[-1] == 1 and len(steps) == 50
    assert set(a - b for a, b in zip(steps, steps[1:])) == {20}
    assert schedule.timesteps(999)[0] == 999
    for steps in (0, 1000):  # of 1000 steps the first would be time step 1000
        with pytest.raises(ValueError, match="steps must be from 1 to 999"):
            schedule.timesteps(steps)


def test_v_to_eps_inverts_the_definition_of_v(schedule, generator):
    x_0, noise = (torch.randn(2, 4, 2, 2, generator=generator) for _ in range(2))
    t = torch.tensor([10, 900])
    a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    eps = schedule.v_to_eps(v, schedule.add_noise(x_0, noise, t), t)
    torch.testing.assert_close(eps, noise, rtol=1e-4, atol=1e-5)


def test_text_encoder_takes_ids_or_embeddings(sd):
    ids = sd.tokenize(["a photo of a church"])
    embeddings = sd.text_encoder.embeddings.token_embedding(ids)
    assert torch.equal(sd.encode_tokens(ids), sd.encode_tokens(embeddings))


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(sd):
    alone = sd.sample(["a photo of a red house"], seed=7, steps=4)
    among = sd.sample(["a boat", "a photo of a red house", "a tree"], seed=[1, 7, 2], steps=4)
    torch.testing.assert_close(alone[0], among[1], rtol=0, atol=1e-4)
    assert alone.shape == (1, 3, 64, 64) and 0 <= alone.min() and alone.max() <= 1


def test_the_vaes_range_from_minus_1_to_1_becomes_0_to_1(sd):
    plain = replace(sd, vae=SimpleNamespace(decode=lambda z: z))
    decoded = plain.decode(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]))
    assert decoded.tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_guidance_one_is_the_conditional_model(sd):
    context = sd.encode_prompt(["a photo of a boat"])
    run = list(sd.denoise(sd.initial_noise([0]), context, 2, 1.0))
    t, x_t, eps_c, _ = run[0]
    torch.testing.assert_close(run[1][1], sd.schedule.ddim_step(x_t, eps_c, t, t - 500))


@pytest.fixture
def copy(tmp_path):
    """A copy of the toy's text encoder. Tests damage it."""
    folder = tmp_path / "text_encoder"
    shutil.copytree(TOY / "text_encoder", folder)
    return folder


def test_save_and_load_round_trip(sd, tmp_path):
    sd_mini.save_part(sd.text_encoder, tmp_path, "text_encoder")
    again = sd_mini.load_part(tmp_path, "text_encoder")
    for (name, a), (_, b) in zip(sd.text_encoder.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop("text_model.final_layer_norm.weight"), "final_layer_norm.weight is missing"),
    (lambda t: t.update(surprise=torch.zeros(1)), "surprise does not belong there"),
    (lambda t: t.update({"text_model.final_layer_norm.bias": torch.zeros(3)}),
     "final_layer_norm.bias has another shape"),
])
def test_loading_is_strict_and_names_the_tensor(copy, damage, message):
    tensors = load_file(copy / "model.safetensors")
    damage(tensors)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        sd_mini.load_part(copy, "text_encoder")
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_missing_parts_are_named(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no such file"):
        sd_mini.load_part(copy, "text_encoder")
    with pytest.raises(ValueError, match="model_index.json"):
        sd_mini.load(tmp_path)


def test_toy_weights_are_small_and_the_layout_is_whole():
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file()) <= 25e6
    index = json.loads((TOY / "model_index.json").read_text())
    parts = [part for part, library in index.items() if isinstance(library, list) and library[0]]
    assert all((TOY / part).is_dir() for part in parts)
