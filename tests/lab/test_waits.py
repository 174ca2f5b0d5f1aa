"""What a GPU needs and a CPU can show: half precision, compiling."""
import copy
from dataclasses import replace

import pytest
import torch

import advunlearn as au
from sd_mini import half
from sd_mini.lab import experiment, runs

from ..paper import SMALL


# --- half precision

@pytest.fixture
def of_full_size(sd):
    """gradient(dtype, weight) of a prefix: on a quarter of a loss over 4 x 32 x 32 coordinates.

    So each coordinate's is as small as at full size, 4 x 64 x 64.
    """
    ids, draws = sd.tokenize(["a church"]), torch.Generator().manual_seed(1)
    x_t, t = torch.randn(1, 4, 32, 32, generator=draws), torch.tensor([600])
    table = sd.text_encoder.embeddings.token_embedding.weight.detach()
    start = au.random_tokens(sd, (1, 3), draws)
    target = sd.predict_noise(x_t, t, sd.encode_prompt(["a boat"]))

    def gradient(dtype, weight):
        model = replace(sd, unet=copy.deepcopy(sd.unet).to(dtype), precision=dtype)
        delta = table[start].requires_grad_(True)
        loss = au.attack_loss(model, x_t, t, au.encode_with_prefix(model, ids, delta), target)
        return torch.autograd.grad(weight * loss.sum() / 4, delta)[0].flatten() / weight
    return gradient


def test_prefix_gradients_in_float16_are_those_in_float32(of_full_size, monkeypatch):
    """Without scaling those of a small loss are lost: float16 does not hold them."""
    exact = of_full_size(torch.float32, 1)
    for weight in (1, 1e-4):
        scaled = of_full_size(torch.float16, weight)
        assert scaled.dtype == torch.float32
        assert torch.cosine_similarity(exact, scaled, dim=0) >= 0.99
        assert scaled.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)
    monkeypatch.setattr(half, "scaled_gradients", lambda dtype: (
        lambda context: context.to(dtype), lambda out: out))
    assert torch.cosine_similarity(exact, of_full_size(torch.float16, 1e-4), dim=0) < 0.9


def test_rows_are_scaled_each_for_itself():
    """A row whose gradient is a million times smaller keeps all its digits."""
    enter, leave = half.scaled_gradients(torch.float16)
    context = torch.randn(2, 3, 4).requires_grad_(True)
    (leave(enter(context).float()) * torch.tensor([3e-3, 3e-9]).view(2, 1, 1)).sum().backward()
    expected = torch.tensor([3e-3, 3e-9]).view(2, 1, 1).expand(2, 3, 4)
    torch.testing.assert_close(context.grad, expected, rtol=1e-3, atol=0)


def test_a_unet_in_training_computes_in_bfloat16_where_the_model_does(sd, monkeypatch):
    seen = []
    model = replace(sd, precision=torch.bfloat16, unet=copy.deepcopy(sd.unet))
    model.unet.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    arguments = torch.randn(1, *sd.latent_shape), 500, sd.encode_prompt(["a church"])
    mixed, exact = model.predict_noise(*arguments), sd.predict_noise(*arguments)
    assert seen == [True] and mixed.dtype == torch.float32
    assert 1e-4 < (mixed - exact).norm() / exact.norm() < 0.05


# --- speed and memory

def test_the_unet_compiles_whole_and_gives_the_same_numbers_and_gradients(sd, generator):
    """Whole: without a break, where Python would take over again."""
    compiled = copy.deepcopy(sd.unet)
    compiled.compile(backend="aot_eager", fullgraph=True)
    x_t, t = torch.randn(2, *sd.latent_shape, generator=generator), torch.tensor([3, 900])
    context, answers = sd.encode_prompt(["a church", "a boat"]), []
    for unet in (sd.unet, compiled):
        inputs = x_t.clone().requires_grad_(True), context.clone().requires_grad_(True)
        eps = unet(inputs[0], t, inputs[1])
        answers.append((eps, *torch.autograd.grad(eps.square().sum(), inputs)))
    torch.testing.assert_close(*answers)


def test_a_flag_compiles_the_frozen_unet_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    assert not experiment.load_model(SMALL).unet in compiled
    sd = experiment.load_model(replace(SMALL, compile=True))
    assert compiled == [sd.unet]


def test_the_bank_is_on_the_gpu_where_it_fits(monkeypatch):
    class Column:
        nbytes = 100

        def to(self, device):
            return device

    columns, gpu = [Column(), Column()], torch.device("cuda")
    for free, expected in ((400, [gpu, gpu]), (399, columns)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
        assert runs.placed(iter(columns), gpu) == expected
