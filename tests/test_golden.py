"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.2243, 0.0, 2.778e-14, 0.0515, 0.0, 3.072e-05, 0.02633, 0.011, 0.0001628,
                     0.1454, 0.005263, 0.005699, 0.2802, 0.02754, 0.0002461, 0.0163, 0.04869, 0.001223],
    "unet": [0.2243, 0.0, 2.778e-14, 0.05041, 0.0, 0.0004298, 0.02765, 0.04513, 0.0007554,
                     0.1563, 0.05127, 0.09087, 0.1363, 0.0688, 0.00281, 0.01636, 0.1205, 0.0157],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
