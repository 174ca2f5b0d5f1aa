from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import advunlearn as au
from sd_mini.text_encoder import TextEncoder

from . import WIDTH, TinyUNet, TinyVAE


@pytest.fixture(scope="session")
def tiny(sd):
    """The toy's tokenizer and schedule; small random networks whose weights no two are equal."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = TextEncoder(dict(
            vocab_size=len(sd.tokenizer), hidden_size=WIDTH, intermediate_size=8,
            num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=24))
        for table in encoder.embeddings.children():
            table.weight.data.normal_()
        networks = dict(text_encoder=encoder, unet=TinyUNet(), vae=TinyVAE())
    return replace(sd, **{name: part.requires_grad_(False) for name, part in networks.items()})


@pytest.fixture
def calls(monkeypatch):
    """calls("f") -> {"f": [(what f was given, what it gave)]}, of functions of advunlearn."""
    seen = defaultdict(list)

    def spy(*names, instead=None):
        for name in names:
            def wrapped(*arguments, name=name, real=instead or getattr(au, name)):
                out = real(*arguments)
                seen[name].append((arguments, out))
                return out
            monkeypatch.setattr(au, name, wrapped)
        return seen
    return spy


@pytest.fixture
def stepped(monkeypatch):
    """(parameters, gradients) at each step of any AdamW, before it."""
    seen = []

    def step(adam, real=torch.optim.AdamW.step):
        [p] = adam.param_groups[0]["params"]
        seen.append((p.detach().clone(), p.grad.clone()))
        return real(adam)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen
