"""Pinned results: one picture and the losses of one small run.

A change of these results is a change for every user. This command drew the picture:

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

# (erase, attack, retain) of each iteration, one a line. One thread and two give losses of the text
# encoder that differ by 3 %; these lie between.
LOSSES = {
    "text_encoder": [
        0.7563, 0.0, 3.129e-14,
        0.124, 0.0, 8.236e-05,
        0.03351, 0.147, 0.0006098,
        0.1538, 0.05996, 0.01631,
        0.07689, 0.03714, 0.0004222,
        0.02323, 0.07715, 0.002062,
    ],
    "unet": [
        0.7563, 0.0, 3.111e-14,
        0.08886, 0.0, 0.002287,
        0.03775, 0.2951, 0.01329,
        0.24, 0.06067, 0.204,
        0.3025, 0.3068, 0.05723,
        0.02775, 0.1927, 0.03385,
    ],
}


def test_picture(sd):
    pinned = matplotlib.image.imread(Path(__file__).parent / "pictures/church.png")
    expected = torch.from_numpy(pinned)[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    losses = [loss or 0.0 for losses in history for loss in losses.values()]
    assert losses == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
