"""Where x_t comes from: the original's sampling, drawn from a bank or made anew."""
import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import advunlearn as au

from . import SMALL, assert_independent, told

same = torch.equal
WORDS = ["red", "a boat", "a tree", "a car", "a dog", "two", "a church", "a house"]


def test_a_run_is_ddim_under_guidance_3(tiny):
    """... from the noise of each seed: x_t, eps_c and eps_empty. tests/sd has DDIM itself."""
    prompts, seeds = ["a church", "a boat"], [5, 6]
    run = tiny.denoise(tiny.initial_noise(seeds), told(tiny, prompts), 4, 3.0)
    z = au.sample_latents(tiny, prompts, seeds, 4)
    assert z.shape == (2, 4, 3, *tiny.latent_shape) and not z.requires_grad
    for i, (_, *expected) in zip(range(4), run):
        assert_close(z[:, i], torch.stack(expected, 1))
    assert same(au.sample_latents(tiny, prompts, seeds, 4, 2), z[:, :2])


@pytest.fixture
def sampled(monkeypatch):
    """What sample_latents was asked for; its latents are (prompt, seed, step, which of three)."""
    asked = []

    def sample_latents(sd, prompts, seeds, steps, stop=None):
        asked.append((sd, [*prompts], [*seeds], steps, stop))
        sd.initial_noise(seeds)  # raises where the real one does
        n, stop = len(prompts), stop or steps
        z = torch.zeros(n, stop, 3, 4, 1, 1, dtype=torch.float64)
        z[:, :, :, 0] += torch.tensor([WORDS.index(each) for each in prompts]).view(n, 1, 1, 1, 1)
        z[:, :, :, 1] += torch.tensor(seeds).view(n, 1, 1, 1, 1)
        z[:, :, :, 2] += torch.arange(stop).view(1, stop, 1, 1, 1)
        z[:, :, :, 3] += torch.arange(3).view(1, 1, 3, 1, 1)
        return z

    monkeypatch.setattr(au, "sample_latents", sample_latents)
    return asked


def drawn(draw, times, generator):
    """Of 60 draws of 3 -> prompts (60, 3), then seeds, steps and t (60, times, 3)."""
    prompts, seeds, steps, t = [], [], [], []
    for _ in range(60):
        latents = draw(3, generator, times)
        prompts.append(latents[0].prompt)
        for z in latents:
            assert isinstance(z, au.Latents) and same(z.prompt, prompts[-1])
            for i, eps in enumerate(z[2:]):  # x_t, eps_c, eps_empty of one run and step
                assert eps.shape == (3, 4, 1, 1) and (eps[:, 3] == i).all()
                assert same(eps[:, :3], z.x_t[:, :3])
            assert same(z.x_t[:, 0, 0, 0].long(), z.prompt)
            seeds.append(z.x_t[:, 1, 0, 0].long())
            steps.append(z.x_t[:, 2, 0, 0])
            t.append(z.t)
    return torch.stack(prompts), *(torch.stack(each).view(60, times, 3)
                                   for each in (seeds, steps, t))


def test_the_bank_has_as_many_runs_of_each_prompt_and_draws_any_of_them(tiny, sampled, generator):
    """A draw's rows, and its times, have a run and a step of their own; with replacement.

    Seeds of the noise are far from the evaluation's, and others for another seed of the config.
    """
    config = replace(SMALL, trajectories=33, trajectory_steps=8, eval_batch=7)
    au.trajectory_bank(tiny, WORDS, replace(config, seed=1))
    others = {seed for _, _, seeds, _, _ in sampled for seed in seeds}
    sampled.clear()
    draw = au.trajectory_bank(tiny, WORDS, config)
    runs = [(p, seed) for _, prompts, seeds, _, _ in sampled for p, seed in zip(prompts, seeds)]
    assert [p for p, _ in runs] == [p for p in WORDS for _ in range(5)]
    assert [seed for _, seed in runs] == [*range(1_000_000, 1_000_040)]
    assert {len(prompts) for _, prompts, *_ in sampled} == {7, 5}
    assert {(sd is tiny, steps, stop) for sd, _, _, steps, stop in sampled} == {(True, 8, None)}
    prompts, seeds, steps, t = drawn(draw, 4, generator)
    assert others.isdisjoint(seed for _, seed in runs)
    of = {seed: (WORDS.index(p), i % 5) for i, (p, seed) in enumerate(runs)}
    prompt, run = torch.tensor([of[seed] for seed in seeds.flatten().tolist()]).T
    assert same(prompt, prompts[:, None].expand(60, 4, 3).flatten())
    assert same(t, torch.tensor(tiny.schedule.timesteps(8))[steps.long()])
    run, every = run.view(60, 12) / 4, torch.cat([steps.view(60, 12) / 7, prompts / 7], 1)
    assert_independent(torch.cat([run, every], 1).T.unflatten(1, (6, 10)))
    assert len(of.keys() - {*seeds.flatten().tolist()}) == 0


def test_afresh_each_draw_has_its_own_runs_up_to_a_step_of_its_own(tiny, sampled, generator):
    config = replace(SMALL, trajectory_steps=8)
    prompts, seeds, steps, t = drawn(au.sample_afresh(tiny, WORDS, config), 4, generator)
    assert {(sd is tiny, steps) for sd, _, _, steps, _ in sampled} == {(True, 8)}
    assert len(seeds.unique()) == 60 * 4 * 3 and 2**30 < seeds.max() < 2**31
    assert same(steps, steps[..., :1].expand_as(steps))
    assert [stop for *_, stop in sampled] == (steps[..., 0].flatten() + 1).tolist()
    assert same(t, torch.tensor(tiny.schedule.timesteps(8))[steps.long()])
    assert_independent(torch.cat([steps[..., 0], prompts], 1).T.div(7).unflatten(1, (6, 10)))


@pytest.mark.parametrize("source", ["trajectory_bank", "sample_afresh"])
def test_the_generator_alone_decides_what_is_drawn(tiny, sampled, source):
    draw = getattr(au, source)(tiny, WORDS, replace(SMALL, trajectory_steps=8))
    a, b, c = (drawn(draw, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(map(same, a, b)) and not any(map(same, a, c))


def test_the_bank_is_on_the_unets_device_or_with_low_memory_on_the_cpu(tiny, sampled, calls):
    seen = calls("placed", instead=lambda bank, device: bank)
    gpu = replace(tiny, unet=copy.deepcopy(tiny.unet).to("meta"))
    for low_memory in (False, True):
        au.trajectory_bank(gpu, WORDS, replace(SMALL, low_memory=low_memory))
    assert [str(device) for (_, device), _ in seen["placed"]] == ["meta", "cpu"]
