"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.7563, 0.0, 3.146e-14, 0.1305, 0.0, 1.323e-05, 0.0331, 0.03761, 9.145e-05,
                     0.1368, 0.05929, 0.002556, 0.07487, 0.01074, 0.0001271, 0.02916, 0.05981, 0.0006743],
    "unet": [0.7563, 0.0, 3.146e-14, 0.1112, 0.0, 0.000573, 0.03282, 0.1487, 0.004165,
                     0.1856, 0.06203, 0.07829, 0.103, 0.1011, 0.01304, 0.06021, 0.1461, 0.007956],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
