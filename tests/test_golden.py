"""Pinned results: one picture and the losses of one small run. What changes them changes what everyone gets.

    python -m sd_mini "a photo of a church" --seed 3 --out tests/pictures/church.png
"""
from pathlib import Path

import matplotlib.image
import pytest
import torch

from .test_run import erase

LOSSES = {  # (erase, attack, retain) of each iteration
    "text_encoder": [0.3097, 0.0, 2.96e-14, 0.03702, 0.0, 2.746e-05, 0.0724, 0.001362, 9.876e-05,
                     0.1316, 0.005863, 0.005474, 0.02998, 0.01127, 0.0009266, 0.03569, 0.2417, 0.0003298],
    "unet": [0.3097, 0.0, 2.96e-14, 0.03692, 0.0, 0.0004567, 0.07238, 0.003574, 0.002329,
             0.1473, 0.02649, 0.2566, 0.0226, 0.009354, 0.01219, 0.06878, 0.3009, 0.007394],
}


def test_picture(sd):
    expected = torch.from_numpy(matplotlib.image.imread(Path(__file__).parent / "pictures/church.png"))[..., :3]
    drawn = sd.sample(["a photo of a church"], seed=3)[0].permute(1, 2, 0)
    assert (drawn - expected).abs().max() < 3 / 255


@pytest.mark.parametrize("train", LOSSES)
def test_losses(sd, train):
    _, history = erase(sd, train=train, plain_share=0.0)
    assert torch.tensor(history).nan_to_num().flatten().tolist() == pytest.approx(LOSSES[train], rel=0.05, abs=1e-5)
