"""Each loss against its closed form, on a model that is simple enough to solve by hand."""
from dataclasses import dataclass, field

import pytest
import torch

import advunlearn as au
from sd_mini.lab.evaluation import wilson
from sd_mini.schedule import Schedule

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass
class Linear:
    """eps(x_t | c) = a x_t + mean(c)."""

    a: float
    schedule: Schedule = field(default_factory=lambda: Schedule(SCHEDULE))

    def predict_noise(self, x_t, t, context):
        return self.a * x_t + context.mean((1, 2))[:, None, None, None]


@pytest.fixture
def batch(generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(3, 4, 2, 2),
        "noise": draw(3, 4, 2, 2),
        "other": draw(3, 4, 2, 2),
        "context": draw(3, 5, 6),
        "t": torch.tensor([1, 500, 999]),
    }


def test_ddpm_loss_is_the_error_of_the_predicted_noise(batch):
    model = Linear(0.3)
    noise, context = batch["noise"], batch["context"]
    alpha_bar = torch.tensor([float(model.schedule.alpha_bar[t]) for t in batch["t"]])
    alpha_bar = alpha_bar[:, None, None, None]
    x_t = alpha_bar**0.5 * batch["x"] + (1 - alpha_bar) ** 0.5 * noise
    expected = [((noise[i] - 0.3 * x_t[i] - context[i].mean()) ** 2).mean() for i in range(3)]
    loss = au.ddpm_loss(model, batch["x"], batch["t"], noise, context)
    torch.testing.assert_close(loss, torch.stack(expected))


def test_ddpm_loss_of_a_perfect_predictor_is_zero(batch):
    model = Linear(0.0)
    noise = batch["context"].mean((1, 2))[:, None, None, None].expand_as(batch["x"])
    assert au.ddpm_loss(model, batch["x"], batch["t"], noise, batch["context"]).max() < 1e-12


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_esd_target_turns_the_guidance_round(eta):
    eps_c, eps_empty = torch.tensor([3.0]), torch.tensor([1.0])
    assert au.esd_target(eps_c, eps_empty, eta).item() == 1 - eta * 2


@pytest.mark.parametrize("loss", [au.erase_loss, au.attack_loss, au.retain_loss])
def test_losses_are_mean_squares_per_row_to_what_is_given(loss, batch):
    x, context, other = batch["x"], batch["context"], batch["other"]
    values = loss(Linear(0.7), x, batch["t"], context, other)
    expected = [((0.7 * x[i] + context[i].mean() - other[i]) ** 2).mean() for i in range(3)]
    torch.testing.assert_close(values, torch.stack(expected))


def test_retain_loss_is_exactly_zero_where_theta_is_theta_o(sd, generator):
    x_t, t = torch.randn(2, *sd.latent_shape, generator=generator), torch.tensor([100, 900])
    context = sd.encode_prompt(["a photo of a house", "a boat"])
    eps_r = sd.predict_noise(x_t, t, context)
    assert au.retain_loss(sd, x_t, t, context, eps_r).tolist() == [0.0, 0.0]


def test_wilson_interval():
    # Textbooks have the case of 0 successes: [0, z^2 / (n + z^2)].
    low, high = wilson(0, 24)
    assert abs(low) < 1e-12 and abs(high - 1.96**2 / (24 + 1.96**2)) < 1e-12
    low, high = wilson(12, 24)
    assert abs((low + high) / 2 - 0.5) < 1e-12 and 0.31 < low < 0.32
