"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.7563, 0.0, 3.111e-14, 0.126, 0.0, 5.964e-05, 0.03239, 0.1061, 0.0004146,
                     0.1509, 0.05985, 0.01266, 0.07495, 0.02372, 0.0003426, 0.02319, 0.07189, 0.001686],
    "unet": [0.7563, 0.0, 3.111e-14, 0.08886, 0.0, 0.002287, 0.03775, 0.2951, 0.01329,
             0.24, 0.06067, 0.204, 0.3025, 0.3068, 0.05723, 0.02775, 0.1927, 0.03385],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
