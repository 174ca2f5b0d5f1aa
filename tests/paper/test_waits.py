"""Nothing on the way waits for the GPU: no value is read, and no copy to the host made.

A tensor of the meta device has no values, so every read of one and every copy to the host fails.
"""
import copy
from dataclasses import replace

import pytest
import torch

import advunlearn as au

from . import ASKED, SMALL, erase


@pytest.fixture
def without_values(tiny):
    networks = {name: copy.deepcopy(getattr(tiny, name)).to("meta")
                for name in ("text_encoder", "unet", "vae")}
    return replace(tiny, **networks, schedule=copy.deepcopy(tiny.schedule))


@pytest.mark.parametrize("kind", ["embedding", "fast", "token"])
def test_training_reads_its_losses_once_an_iteration_and_nothing_else(without_values, tiny, kind,
                                                                      monkeypatch):
    real, read = au.sample_latents, []
    monkeypatch.setattr(au, "read", lambda **losses: read.append(losses) or dict.fromkeys(losses))
    monkeypatch.setattr(au, "sample_latents", lambda sd, *given: real(tiny, *given))
    erase(without_values, steps=2, warmup=1, attack=kind, attack_steps=2)
    assert [len({*map(type, losses.values())}) for losses in read] == [2, 1]  # attack: None


@pytest.mark.parametrize("kind", ["token", "longer", "embedding"])
def test_an_evaluation_attack_reads_nothing_before_it_looks(without_values, kind):
    calls, model = [], without_values
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    config = replace(SMALL, eval_prefix=2, eval_attack_steps=7, eval_looks=1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        au.METHOD.attacks[kind].search(model, ASKED, torch.empty(3, 3, 8, 8, device="meta"), None,
                                       config)
    assert len(calls) == 7
