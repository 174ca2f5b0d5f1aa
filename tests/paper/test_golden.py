"""Pinned results: one picture and the losses of one small run.

A change of these results is a change for every user.
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from . import erase

LOSSES = [  # erase, attack, retain of each iteration
    0.06986, 0.0, 7.3e-14, 0.01343, 0.0, 0.0007882, 0.02864, 0.03758, 0.0002747,
    0.1932, 0.02041, 0.0002316, 0.1557, 0.1059, 0.003727, 0.107, 0.005575, 0.0007472]


def test_picture(sd):
    pinned = matplotlib.image.imread(Path(__file__).parent.parent / "pictures/church.png")
    expected = torch.from_numpy(pinned)[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3, guidance=4)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


def test_losses(sd):
    _, history = erase(sd)
    losses = [loss or 0.0 for losses in history for loss in losses.values()]
    assert losses == pytest.approx(LOSSES, rel=0.05, abs=3e-5)
