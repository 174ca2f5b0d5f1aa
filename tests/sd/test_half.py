"""The UNet in half precision, compiled, or with less memory gives the same."""
import copy
from collections import Counter
from dataclasses import replace

import torch
from torch.testing import assert_close

import sd_mini
from sd_mini import half


def test_gradients_through_float16_are_those_through_float32(sd, generator):
    """Those of a small loss too, which float16 does not hold."""
    x_t, grads = torch.randn(1, 4, 32, 32, generator=generator), []
    for dtype in (torch.float32, torch.float16):
        model = replace(sd, unet=copy.deepcopy(sd.unet).to(dtype), precision=dtype)
        context = sd.encode_prompt(["a church"]).requires_grad_()
        loss = 1e-4 * model.predict_noise(x_t, 600, context).square().mean()
        grads.append(torch.autograd.grad(loss, context)[0].flatten())
    assert torch.cosine_similarity(*grads, dim=0) > 0.99
    assert_close(grads[1].norm(), grads[0].norm(), rtol=0.1, atol=0)


def test_rows_are_scaled_each_for_itself():
    """A row whose gradient is a million times smaller keeps all its digits."""
    enter, leave = half.scaled_gradients(torch.float16)
    context = torch.randn(2, 3, 4).requires_grad_(True)
    small = torch.tensor([3e-3, 3e-9]).view(2, 1, 1).expand(2, 3, 4)
    (leave(enter(context).float()) * small).sum().backward()
    assert_close(context.grad, small, rtol=1e-3, atol=0)


def test_a_unet_in_training_computes_in_bfloat16_where_the_model_does(sd, generator):
    seen = []
    model = replace(sd, precision=torch.bfloat16, unet=copy.deepcopy(sd.unet))
    model.unet.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    given = torch.randn(1, *sd.latent_shape, generator=generator), 500, sd.encode_prompt(["x"])
    mixed, exact = model.predict_noise(*given), sd.predict_noise(*given)
    assert seen == [True] and mixed.dtype == torch.float32
    assert 1e-4 < (mixed - exact).norm() / exact.norm() < 0.05


def test_compiled_whole_or_with_low_memory_the_unet_gives_the_same(sd, generator):
    """Numbers and gradients. Whole: without a break, where Python would take over again.

    With low memory all norms are computed twice, but for the last, which is in no block.
    """
    x_t, t = torch.randn(2, *sd.latent_shape, generator=generator), torch.tensor([3, 900])
    answers, calls = [], Counter()
    for kind in ("plain", "frugal", "compiled"):
        text_encoder, unet = (copy.deepcopy(part).requires_grad_(kind != "compiled")
                              for part in (sd.text_encoder, sd.unet))
        if kind == "compiled":
            unet.compile(backend="aot_eager", fullgraph=True)
        if kind == "frugal":
            sd_mini.recompute_activations(unet)
            for name, part in unet.named_modules():
                if isinstance(part, torch.nn.GroupNorm):
                    part.register_forward_hook(lambda *_, name=name: calls.update([name]))
        model = replace(sd, text_encoder=text_encoder, unet=unet)
        context = model.encode_prompt(["a church", "a boat"]).requires_grad_()
        eps = model.predict_noise(x_t, t, context)
        inputs = [context, *text_encoder.parameters(), *unet.parameters()]
        answers.append([eps, *torch.autograd.grad(
            eps.square().mean(), [each for each in inputs if each.requires_grad])])
    plain, frugal, compiled = answers
    assert_close(frugal, plain, rtol=0, atol=0)
    assert_close(compiled, plain[:2])
    assert calls.pop("conv_norm_out") == 1 and {*calls.values()} == {2}
