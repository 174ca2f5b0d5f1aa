"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.7563, 0.0, 3.111e-14, 0.126, 0.0, 5.964e-05, 0.03239, 0.1064, 0.0004192,
                     0.1528, 0.05989, 0.01307, 0.0754, 0.02618, 0.00037, 0.02291, 0.07333, 0.001843],
    "unet": [0.7563, 0.0, 3.111e-14, 0.08886, 0.0, 0.002287, 0.03727, 0.3027, 0.01247,
                     0.244, 0.061, 0.2067, 0.3077, 0.3191, 0.05631, 0.02826, 0.1949, 0.03455],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
