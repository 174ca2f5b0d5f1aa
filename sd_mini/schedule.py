"""The forward process and the DDIM step, both written in terms of alpha_bar."""
import numpy as np
import torch

from sd_mini.configs import complete  # by its full name: the exercises import this file alone


class Schedule:
    """alpha_bar_t = prod over s <= t of (1 - beta_s), from a published `scheduler_config.json`.

    `alpha_bar` is (T,) float32.
    Source: Ho et al. 2020 (DDPM), equations 2-4; Song et al. 2021 (DDIM), equation 12.
    """

    def __init__(self, config):
        self.config = config = complete("scheduler", config)
        steps = config["num_train_timesteps"]
        lo, hi = config["beta_start"], config["beta_end"]
        if config["beta_schedule"] == "scaled_linear":
            beta = torch.linspace(lo**0.5, hi**0.5, steps, dtype=torch.float32) ** 2
        else:
            beta = torch.linspace(lo, hi, steps, dtype=torch.float32)
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)
        self.predicts_v = config["prediction_type"] == "v_prediction"
        final = torch.ones(1) if config["set_alpha_to_one"] else self.alpha_bar[:1]
        self.table = torch.cat([self.alpha_bar, final])  # the last is the clean picture's
        self.tables = {}  # the same, on each device that asked

    def alpha_bar_at(self, t, like):
        """alpha_bar at time steps `t` ((B,) or scalar), shaped to multiply `like`.

        A t below 0 is the clean picture: 1, or alpha_bar_0 where `set_alpha_to_one` is false.
        """
        if like.device not in self.tables:
            self.tables[like.device] = self.table.to(like.device)
        t = t.to(like.device).clamp(min=-1) if torch.is_tensor(t) else max(t, -1)
        alpha_bar = self.tables[like.device][t].to(like.dtype)
        return alpha_bar.view(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x_0, noise, t):
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM, equation 4).

        (B, ...), (B, ...), (B,) or scalar -> (B, ...).
        """
        alpha_bar = self.alpha_bar_at(t, x_0)
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise

    def timesteps(self, steps):
        """The `steps` time steps of a sampling run, from noisy to clean.

        They are evenly spaced. In the published models the last is `steps_offset`; configs of other
        samplers ask for other spacings (Lin et al. 2023, table 2).
        """
        total, offset = self.config["num_train_timesteps"], self.config["steps_offset"]
        if not 1 <= steps <= total - offset:
            raise ValueError(f"steps must be from 1 to {total - offset}, not {steps}")
        if self.config["timestep_spacing"] == "linspace":
            return np.linspace(0, total - 1, steps).round()[::-1].astype(int).tolist()
        if self.config["timestep_spacing"] == "trailing":
            return (np.arange(total, 0, -total / steps).round() - 1).astype(int).tolist()[:steps]
        return [i * (total // steps) + offset for i in reversed(range(steps))]

    def guide(self, eps_c, eps_empty, guidance):
        """Classifier-free guidance: eps_empty + guidance * (eps_c - eps_empty).

        Ho & Salimans 2022, equation 6, with w = guidance - 1.
        """
        return eps_empty + guidance * (eps_c - eps_empty)

    def ddim_step(self, x_t, eps, t, t_prev):
        """One deterministic step from t to t_prev < t (DDIM, equation 12 with sigma = 0):

        x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
        x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps
        """
        now, prev = self.alpha_bar_at(t, x_t), self.alpha_bar_at(t_prev, x_t)
        x_0 = (x_t - (1 - now).sqrt() * eps) / now.sqrt()
        return prev.sqrt() * x_0 + (1 - prev).sqrt() * eps

    def v_to_eps(self, v, x_t, t):
        """eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t, for models that predict v.

        Source: Salimans & Ho 2022.
        """
        alpha_bar = self.alpha_bar_at(t, x_t)
        return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t
