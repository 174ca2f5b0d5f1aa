"""The schedule, against closed forms and against diffusers' DDIM."""
import pytest
import torch

from sd_mini.schedule import Schedule

from .reference import SCHEDULER, close

LINEAR = dict(num_train_timesteps=500, beta_start=0.001, beta_end=0.01)
OURS = Schedule(SCHEDULER)


def pictures(generator):
    """Two batches of three small pictures."""
    return torch.randn(2, 3, 4, 2, 2, generator=generator)


@pytest.mark.parametrize("config, beta", [
    (SCHEDULER, lambda i: (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2),
    (LINEAR, lambda i: 0.001 + i / 499 * 0.009)])
def test_alpha_bar_is_the_running_product(config, beta):
    product, found = 1.0, Schedule(config).alpha_bar
    assert found.shape == (config["num_train_timesteps"],) and found.dtype == torch.float32
    for i, alpha_bar in enumerate(found.tolist()):
        product *= 1 - beta(i)
        assert abs(alpha_bar - product) < 1e-5 * product + 1e-7


def test_noise_is_added_and_taken_away_by_each_rows_t(generator):
    """A DDIM step with the true noise moves along the forward process."""
    x_0, noise = pictures(generator)
    for t, t_prev in ((torch.tensor([400, 801, 999]), torch.tensor([1, 781, 400])),
                      (torch.tensor(20), torch.tensor(0)), (801, 781)):
        a = OURS.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = OURS.add_noise(x_0, noise, t)
        close(x_t, a.sqrt() * x_0 + (1 - a).sqrt() * noise)
        close(OURS.v_to_eps(a.sqrt() * noise - (1 - a).sqrt() * x_0, x_t, t), noise)
        close(OURS.ddim_step(x_t, noise, t, t_prev), OURS.add_noise(x_0, noise, t_prev))
    assert OURS.add_noise(x_0.half(), noise.half(), 20).dtype == torch.float16


@pytest.mark.parametrize("to_one", [False, True])
def test_below_0_is_the_clean_picture(to_one, generator):
    """Its alpha_bar is 1, or alpha_bar_0 where `set_alpha_to_one` is false."""
    schedule = Schedule({**SCHEDULER, "set_alpha_to_one": to_one})
    x_0, noise = pictures(generator)
    clean = x_0 if to_one else schedule.add_noise(x_0, noise, 0)
    for t_prev in (-1, -19, torch.tensor([-1, -19, -300])):
        close(schedule.ddim_step(schedule.add_noise(x_0, noise, 1), noise, 1, t_prev), clean)


def test_timesteps_are_those_of_stable_diffusion():
    assert OURS.timesteps(50) == list(range(981, 0, -20))
    assert OURS.timesteps(1) == [1] and OURS.timesteps(3) == [667, 334, 1]
    assert OURS.timesteps(999) == list(range(999, 0, -1))
    for steps in (0, 1000):  # of 1000 steps the first would be time step 1000
        with pytest.raises(ValueError, match="steps must be from 1 to 999"):
            OURS.timesteps(steps)


def test_guidance_is_a_line_through_both_predictions(generator):
    eps_c, eps_empty = pictures(generator)
    for guidance in (7.5, torch.tensor([0.0, 1.0, 7.5]).view(3, 1, 1, 1)):
        close(OURS.guide(eps_c, eps_empty, guidance),
              guidance * eps_c + (1 - guidance) * eps_empty)


@pytest.mark.parametrize("config", [
    {},
    SCHEDULER,
    dict(LINEAR, timestep_spacing="linspace"),
    dict(LINEAR, timestep_spacing="trailing", prediction_type="v_prediction"),
])
def test_steps_are_those_of_the_reference(config, generator):
    reference = pytest.importorskip("diffusers").DDIMScheduler
    ours, theirs = Schedule(config), reference.from_config({"clip_sample": False, **config})
    x, out = pictures(generator)
    for steps in (1, 3, 7, 30, 50, 333, 500):
        theirs.set_timesteps(steps)
        timesteps, stride = ours.timesteps(steps), ours.config["num_train_timesteps"] // steps
        assert timesteps == theirs.timesteps.tolist()
        for t in timesteps[:: max(1, steps // 7)]:
            eps = ours.v_to_eps(out, x, t) if ours.predicts_v else out
            close(ours.ddim_step(x, eps, t, t - stride), theirs.step(out, t, x).prev_sample)
