"""Pinned results: one picture and the losses of one small run.

A change of these results is a change for every user.
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

# (erase, attack, retain) of each iteration. One thread and two give losses of the text encoder that
# differ, the smallest by 4e-5; these lie between.
LOSSES = {
    "text_encoder": [
        1.6706, 0.0, 4.16e-14, 0.04078, 0.0, 0.00692, 0.1089, 0.03252, 0.000101,
        0.06999, 0.02819, 0.002298, 0.1714, 0.0374, 0.001584, 0.08703, 0.03823, 0.0002627],
    "unet": [
        1.6706, 0.0, 4.16e-14, 0.03863, 0.0, 0.1224, 0.07711, 0.1561, 0.003724,
        0.05982, 0.02338, 0.0339, 0.1859, 0.03243, 0.03342, 0.09311, 0.05509, 0.01475],
}


def test_picture(sd):
    pinned = matplotlib.image.imread(Path(__file__).parent / "pictures/church.png")
    expected = torch.from_numpy(pinned)[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train)
    losses = [loss or 0.0 for losses in history for loss in losses.values()]
    assert losses == pytest.approx(LOSSES[train], rel=0.05, abs=3e-5)
