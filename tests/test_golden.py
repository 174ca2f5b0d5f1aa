"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.1557, 0.0, 2.778e-14, 0.03622, 0.0, 1.028e-05, 0.0214, 0.001344, 4.677e-05,
                     0.0888, 0.007094, 0.004142, 0.01506, 0.003043, 0.0001871, 0.04257, 0.06742, 7.246e-05],
    "unet": [0.1557, 0.0, 2.778e-14, 0.03575, 0.0, 0.0001115, 0.02097, 0.001283, 0.0002762,
                     0.07577, 0.01131, 0.07169, 0.01302, 0.007835, 0.0008084, 0.03099, 0.1603, 0.002349],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
