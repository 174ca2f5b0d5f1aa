"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.2243, 0.0, 2.778e-14, 0.0515, 0.0, 3.072e-05, 0.02689, 0.01075, 0.0001628,
                     0.1204, 0.008613, 0.005757, 0.2776, 0.02011, 0.0002544, 0.02199, 0.06182, 0.001353],
    "unet": [0.2243, 0.0, 2.778e-14, 0.05041, 0.0, 0.0004298, 0.0277, 0.0423, 0.0007554,
                     0.1726, 0.03521, 0.09094, 0.13, 0.07176, 0.00335, 0.01303, 0.1287, 0.01783],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
