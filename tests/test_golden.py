"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.7563, 0.0, 3.111e-14, 0.1284, 0.0, 3.154e-05, 0.0328, 0.07201, 0.0002193,
                     0.1493, 0.05991, 0.006714, 0.07496, 0.01718, 0.000257, 0.02408, 0.06251, 0.001304],
    "unet": [0.7563, 0.0, 3.111e-14, 0.09802, 0.0, 0.001287, 0.03411, 0.2456, 0.007124,
                     0.2028, 0.05777, 0.1554, 0.2683, 0.2055, 0.02671, 0.03754, 0.1736, 0.01811],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
