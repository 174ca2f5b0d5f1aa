"""The outer loop: each iteration against the algorithm by hand."""
import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import advunlearn as au
import sd_mini
from sd_mini.text_encoder import TextEncoder

from .. import bench
from . import PROMPTS, SMALL, changed, told

same = torch.equal


# --- what is trained

def test_layers_are_the_first_by_index():
    """The published code goes by the beginning of their names: layer 1 brings 10 and 11 along."""
    encoder = TextEncoder({**bench.V1["text_encoder"], "vocab_size": 1, "hidden_size": 12})
    model, layers = sd_mini.StableDiffusion(None, encoder, None, None, None), encoder.encoder.layers
    for n in (1, 2, 12):
        theta = au.parameters_to_train(model, replace(SMALL, layers=n))
        assert {*map(id, theta)} == {id(p) for layer in layers[:n] for p in layer.parameters()}


@pytest.mark.parametrize("part", ["unet", "cross_attention", "no_cross_attention"])
def test_esd_x_is_the_cross_attention_and_esd_u_all_else(sd, part):
    """The published ESD-u leaves out the time embedding and the output layers too."""
    theta = {id(p) for p in au.parameters_to_train(sd, replace(SMALL, train=part))}
    assert {name for name, p in sd.unet.named_parameters() if id(p) in theta} == {
        name for name in sd.unet.state_dict()
        if part == "unet" or (".attn2." in name) == (part == "cross_attention")}


@pytest.mark.parametrize("train, layers, trained", [
    ("text_encoder", 0, ("encoder.", "final_layer_norm.")),  # the published "whole"
    ("text_encoder", 2, ("encoder.layers.0.", "encoder.layers.1.")),
    ("unet", 1, ""), ("cross_attention", 1, "mid.attn2.")])
def test_that_is_trained_in_float32_and_nothing_else(tiny, train, layers, trained):
    part = "text_encoder" if train == "text_encoder" else "unet"
    tiny = replace(tiny, unet=copy.deepcopy(tiny.unet).bfloat16(), precision=torch.bfloat16)
    before = copy.deepcopy({name: getattr(tiny, name) for name in ("text_encoder", "unet")})
    erased, _ = au.advunlearn(tiny, PROMPTS[0], ["boat " * 22],  # which fill the context
                              replace(SMALL, train=train, layers=layers, attack="none", steps=3))
    assert changed(before[part], getattr(erased, part)) == {
        name for name in before[part].state_dict() if name.startswith(trained)}
    for name, original in before.items():
        assert not changed(getattr(tiny, name), original)
        assert (getattr(erased, name) is getattr(tiny, name)) == (name != part)
        assert all(p.grad is None for p in getattr(tiny, name).parameters())
        for model in (tiny, erased):
            assert not any(p.requires_grad for p in getattr(model, name).parameters())
    assert {p.dtype for p in getattr(erased, part).parameters()} == {torch.float32}


# --- an iteration

def by_hand(sd, z, z_r, delta, eta):
    """The erase and the retain loss of an iteration."""
    prompts, retained = ([texts[i] for i in each.prompt]
                         for texts, each in zip(PROMPTS, (z, z_r)))
    eps = sd.predict_noise(z.x_t, z.t, told(sd, prompts, delta))
    eps_r = sd.predict_noise(z_r.x_t, z_r.t, told(sd, retained))
    target = z.eps_empty - eta * (z.eps_c - z.eps_empty)
    return (eps - target).square().mean(), (eps_r - z_r.eps_c).square().mean()


@pytest.mark.parametrize("changes", [
    dict(retain_weight=0.3, layers=0), dict(retain_weight=0.5, attack="token", eta=2.5, layers=2),
    dict(retain_weight=1.0, train="unet", attack="fast", fresh_trajectories=True),
    dict(retain_weight=0.0, attack="none", eta=0.5), dict(retain_weight=3.0, layers=0, warmup=0)])
def test_each_iteration_is_the_algorithms(tiny, calls, monkeypatch, changes):
    """Erase at c* by the last prefix found, plus gamma times retain, each the mean of its batch.

    The optimizer is Adam with the config's rate: a twin of it makes the same moves.
    """
    config = replace(SMALL, lr=0.02, erase_batch=3, seed=7, **changes)
    losses, draws, twin, real_step = [], [], [], torch.optim.Adam.step
    own = "sample_afresh" if config.fresh_trajectories else "trajectory_bank"

    def source(sd_o, prompts, config, real=getattr(au, own)):
        assert sd_o is tiny  # also while the UNet is trained

        def draw(n, generator, times=1, real=real(sd_o, prompts, config)):
            assert generator.initial_seed() == config.seed == 7
            draws.append((prompts, n, real(n, generator, times)))
            return draws[-1][2]
        return draw

    def step(adam):
        theta = adam.param_groups[0]["params"]
        if len(theta) == 1:  # an attack's
            return real_step(adam)
        [((sd, _), _)], (delta, l_attack) = seen["parameters_to_train"], (None, None)
        (*erased, [z, *others]), (*retained, [z_r]) = draws[-2:]
        assert (erased, retained) == ([PROMPTS[0], 3], [PROMPTS[1], 2])
        plain = len(losses) < config.warmup or config.attack == "none"
        assert len(others) == (0 if plain else au.training_attack(config).steps)
        if not plain:
            (model, ids, latents, attack, _), (delta, l_attack) = seen["adversarial_prefix"][-1]
            assert model is sd and same(ids, sd.tokenize(PROMPTS[0]))
            assert attack == au.training_attack(config)
            assert all(a is b for a, b in zip(latents, others, strict=True))
        l_erase, l_retain = by_hand(sd, z, z_r, delta, config.eta)
        losses.append(dict(erase=l_erase, attack=l_attack, retain=l_retain))
        expected = torch.autograd.grad(l_erase + config.retain_weight * l_retain, theta)
        size = torch.cat([g.flatten() for g in expected]).norm().item()
        for p, grad in zip(theta, expected):
            assert_close(p.grad, grad, rtol=1e-3, atol=1e-4 * size)
        if not twin:
            copies = [p.detach().clone().requires_grad_() for p in theta]
            twin.extend([torch.optim.Adam(copies, lr=config.lr), copies])
        for p, other in zip(theta, twin[1]):
            other.grad = p.grad.clone()
        real_step(adam), real_step(twin[0])
        assert all(map(same, theta, twin[1]))

    calls(own, instead=source)
    seen = calls("parameters_to_train", "adversarial_prefix")
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    _, history = au.advunlearn(tiny, *PROMPTS, config)
    assert len(losses) == len(history) == 6 and len(draws) == 12
    for expected, recorded in zip(losses, history):
        assert recorded == {name: loss if loss is None else pytest.approx(
            loss.item(), rel=1e-3, abs=1e-6) for name, loss in expected.items()}
    plain = 6 if config.attack == "none" else config.warmup
    assert len(seen["adversarial_prefix"]) == 6 - plain
    assert len({z.x_t.sum().item() for _, _, [z, *_] in draws}) > 6


# --- going on

def test_a_seed_gives_the_same_bytes_resumed_or_not(tiny, calls, tmp_path):
    def run(steps, folder=None, **changes):
        config = replace(SMALL, warmup=1, steps=steps, save_every=3, **changes)
        return au.advunlearn(tiny, *PROMPTS, config, folder and tmp_path / folder)[0].text_encoder

    stopped, other, whole = run(4, "begun"), run(4, seed=1), run(6)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 1 and load_file(files[0])
    seen, resumed = calls("erase_loss"), run(6, "begun")
    assert len(seen["erase_loss"]) == 2  # it went on with the fifth iteration
    assert not changed(resumed, whole) and changed(stopped, other)


# --- work

@pytest.mark.parametrize("changes", [
    {"attack": "none", "retain_weight": 0.0}, {"erase_batch": 3, "retain_batch": 4}])
def test_unet_evaluations_are_those_of_the_formula(tiny, changes):
    """The bench's closed form against a count; afresh, against the mean of drawn runs."""
    config = replace(SMALL, warmup=1, steps=30, **changes)
    bank, fresh = (bench.iterations(replace(tiny), each)[1]
                   for each in (config, replace(config, fresh_trajectories=True)))
    assert bank == pytest.approx(bench.schedule(config, (1, 2)))
    assert fresh == pytest.approx(bench.schedule(replace(config, fresh_trajectories=True)),
                                  rel=0.15)
    assert bank < fresh
