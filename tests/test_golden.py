"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.2243, 0.0, 2.778e-14, 0.05236, 0.0, 1.028e-05, 0.02775, 0.009771, 4.894e-05,
                     0.1371, 0.01785, 0.00166, 0.3068, 0.02127, 8.047e-05, 0.02881, 0.03194, 0.0003943],
    "unet": [0.2243, 0.0, 2.778e-14, 0.0517, 0.0, 0.0001115, 0.02734, 0.0172, 0.0002346,
                     0.1521, 0.03053, 0.02523, 0.2068, 0.03339, 0.001127, 0.01675, 0.06648, 0.005805],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
