"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.09967, 0.0, 2.778e-14, 0.02114, 0.0, 0.0001353, 0.0117, 0.01464, 0.0007288,
                     0.05255, 0.03112, 0.02689, 0.1006, 0.0256, 0.0006508, 0.007336, 0.06314, 0.004216],
    "unet": [0.09967, 0.0, 2.778e-14, 0.02432, 0.0, 0.001645, 0.01473, 0.09606, 0.00416,
                     0.2095, 0.06304, 0.2085, 0.05133, 0.1204, 0.006488, 0.008212, 0.1767, 0.03167],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
