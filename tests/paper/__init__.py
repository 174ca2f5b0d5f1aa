"""Tests of the paper's file, advunlearn.py, in its order. Here is what they share.

Losses and the projection onto the simplex are tested as exercises are graded: tests/coursework.
Most run on `tiny`, a model that takes a millisecond where the toy takes fifty.
"""
from dataclasses import replace

import torch
from torch import nn

import advunlearn as au
from sd_mini.lab import settings
from sd_mini.unet import UNet

SMALL = au.Config(**{**settings.TOY, **au.TOY, "steps": 6, "warmup": 2,
                     "attack_steps": 2, "trajectories": 4, "trajectory_steps": 4,
                     "erase_batch": 2, "retain_batch": 2, "retain_set": "photos",
                     "device": "cpu", "model": "toy", "precision": "fp32"})
PROMPTS = ["church", "a photo of a church"], ["a photo of a house", "a boat"]
ASKED = ["a church", "a boat", "a photo of a tree"]  # to be attacked
WIDTH = 8  # D


def erase(sd, **changes):
    """A small run -> (erased model, history of losses)."""
    return au.advunlearn(sd, *PROMPTS, replace(SMALL, **changes))


def changed(a, b):
    """Names of the tensors in which two modules differ."""
    pairs = zip(a.state_dict().items(), b.state_dict().items())
    return {name for (name, x), (_, y) in pairs if not torch.equal(x, y)}


class TinyUNet(UNet):
    """x_t, t and every token of the context change the answer."""

    config = {"in_channels": 4, "sample_size": 2}

    def __init__(self):
        nn.Module.__init__(self)
        self.conv_in = nn.Conv2d(4, 4, 1)
        self.mid = nn.ModuleDict({"attn2": nn.Linear(WIDTH, 4)})

    def forward(self, x_t, t, context):
        told = self.mid["attn2"](context).tanh().sum(1) / 5
        return self.conv_in(x_t) * (1 + t / 1000).view(-1, 1, 1, 1) + told[:, :, None, None]


class TinyVAE(nn.Module):
    def encode(self, pictures):
        return nn.functional.adaptive_avg_pool2d(pictures, 2)[:, [0, 1, 2, 0]]


def told(sd, prompts, delta=None):
    """The context of [delta, prompt], put together by hand."""
    embeddings = sd.text_encoder.embeddings.token_embedding.weight[sd.tokenize(prompts)]
    if delta is not None:
        rest = embeddings[:, 1 : -delta.shape[1]]
        embeddings = torch.cat([embeddings[:, :1], delta, rest], 1)
    return sd.text_encoder(embeddings)


def assert_independent(draws):
    """Numbers from 0 to 1 are spread evenly, and no two slices, along any dimension, are alike.

    Of two independent slices the mean distance is 1/3, of shared draws it is 0. Slices of less than
    40 numbers are not looked at.
    """
    assert draws.min() < 0.1 and draws.max() > 0.9
    for dim in range(draws.dim()):
        rows = draws.movedim(dim, 0).flatten(1)
        if rows.shape[1] >= 40:
            apart = (rows[:, None] - rows).abs().mean(-1).fill_diagonal_(1)
            assert apart.min() > 0.18, f"dimension {dim}: draws are shared"
            assert (rows.mean(1) - 0.5).abs().max() < 0.2
