"""Each loss against its closed form, on a model that is simple enough to solve by hand."""
import pytest
import torch
from torch.testing import assert_close

import advunlearn as au


class Linear:
    """eps(x_t | c) = 0.7 x_t + t / 1000 + mean(c)."""

    def __init__(self, schedule):
        self.schedule = schedule

    def predict_noise(self, x_t, t, context):
        return 0.7 * x_t + (t / 1000 + context.mean((1, 2))).view(-1, 1, 1, 1)


@pytest.fixture
def batch(generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator)
    return draw(3, 4, 2, 2), torch.tensor([1, 500, 999]), draw(3, 5, 6), draw(3, 4, 2, 2)


def by_hand(x_t, t, context, target):
    """One row after the other."""
    rows = zip(x_t, t, context, target)
    return torch.stack([((0.7 * x + t / 1000 + c.mean() - y) ** 2).mean() for x, t, c, y in rows])


@pytest.mark.parametrize("loss", [au.erase_loss, au.attack_loss, au.retain_loss])
def test_losses_are_mean_squares_per_row_to_what_is_given(sd, loss, batch):
    assert_close(loss(Linear(sd.schedule), *batch), by_hand(*batch))


def test_ddpm_loss_is_the_error_of_the_predicted_noise(sd, batch):
    x_0, t, context, noise = batch
    alpha_bar = sd.schedule.alpha_bar[t].view(-1, 1, 1, 1)
    x_t = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise
    loss = au.ddpm_loss(Linear(sd.schedule), x_0, t, noise, context)
    assert_close(loss, by_hand(x_t, t, context, noise))


def test_losses_are_in_float32():
    """Squares of what float16 holds are more than it holds."""
    large = torch.tensor([[300.0, 0.0]]).half()
    assert au.squared_error(large, -large).tolist() == [600.0**2 / 2]


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_esd_target_turns_the_guidance_round(eta):
    eps_c, eps_empty = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 4.0])
    assert au.esd_target(eps_c, eps_empty, eta).tolist() == [1 - eta * 2, 4 + eta * 5]
