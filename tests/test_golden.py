"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.2243, 0.0, 2.778e-14, 0.05236, 0.0, 1.028e-05, 0.02774, 0.01462, 4.946e-05,
                     0.1466, 0.01901, 0.001673, 0.287, 0.0276, 9.88e-05, 0.02564, 0.05177, 0.0004875],
    "unet": [0.2243, 0.0, 2.778e-14, 0.0517, 0.0, 0.0001115, 0.02587, 0.02815, 0.0002791,
                     0.1428, 0.0284, 0.02539, 0.1853, 0.05219, 0.0009484, 0.01722, 0.1104, 0.004928],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
