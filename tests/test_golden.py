"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.2243, 0.0, 2.778e-14, 0.0515, 0.0, 3.072e-05, 0.02634, 0.01099, 0.0001604,
                     0.1386, 0.005288, 0.005542, 0.2859, 0.02789, 0.0001941, 0.01704, 0.04787, 0.0009095],
    "unet": [0.2243, 0.0, 2.778e-14, 0.05041, 0.0, 0.0004298, 0.02799, 0.03894, 0.001157,
                     0.1682, 0.04462, 0.09022, 0.1361, 0.06048, 0.003281, 0.01445, 0.1117, 0.01573],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor([[loss or 0.0 for loss in row] for row in history]).flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
