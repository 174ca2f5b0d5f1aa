"""The schedule, against diffusers' DDIM. In tests/coursework it is compared with closed forms."""
import pytest
import torch

from sd_mini.schedule import Schedule

from .reference import SCHEDULER, close

LINEAR = dict(num_train_timesteps=500, beta_start=0.001, beta_end=0.01)


@pytest.mark.parametrize("config", [
    {},
    SCHEDULER,
    dict(LINEAR, timestep_spacing="linspace"),
    dict(LINEAR, timestep_spacing="trailing", prediction_type="v_prediction"),
])
def test_noise_and_steps_are_those_of_the_reference(config, generator):
    reference = pytest.importorskip("diffusers").DDIMScheduler
    ours, theirs = Schedule(config), reference.from_config({"clip_sample": False, **config})
    x, out = torch.randn(2, 3, 4, 2, 2, generator=generator)
    assert ours.add_noise(x.half(), out.half(), 20).dtype == torch.float16  # and nothing after it
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod)
    for t in (torch.tensor([1, 499, 20]), torch.tensor(20)):
        close(ours.add_noise(x, out, t), theirs.add_noise(x, out, t))
        velocity = theirs.get_velocity(x, out, t)
        close(ours.v_to_eps(velocity, ours.add_noise(x, out, t), t), out)
    for steps in (1, 3, 7, 30, 50, 333, 500):
        theirs.set_timesteps(steps)
        timesteps, stride = ours.timesteps(steps), ours.config["num_train_timesteps"] // steps
        assert timesteps == theirs.timesteps.tolist()
        for t in timesteps[:: max(1, steps // 7)]:
            eps = ours.v_to_eps(out, x, t) if ours.predicts_v else out
            close(ours.ddim_step(x, eps, t, t - stride), theirs.step(out, t, x).prev_sample)


@pytest.mark.parametrize("to_one", [False, True])
def test_below_0_is_the_clean_picture(to_one, generator):
    """Its alpha_bar is 1, or alpha_bar_0 where `set_alpha_to_one` is false."""
    schedule = Schedule({**SCHEDULER, "set_alpha_to_one": to_one})
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    clean = x_0 if to_one else schedule.add_noise(x_0, noise, 0)
    for t_prev in (-1, -19, torch.tensor([-1, -19, -300])):
        close(schedule.ddim_step(schedule.add_noise(x_0, noise, 1), noise, 1, t_prev), clean)


def test_steps_are_at_most_those_that_stable_diffusion_has():
    schedule = Schedule(SCHEDULER)
    assert schedule.timesteps(999) == list(range(999, 0, -1))
    for steps in (0, 1000):  # of 1000 steps the first would be time step 1000
        with pytest.raises(ValueError, match="steps must be from 1 to 999"):
            schedule.timesteps(steps)
