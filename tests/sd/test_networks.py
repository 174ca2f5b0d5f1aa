"""Each network against diffusers and transformers: rows that differ, odd shapes, all gradients."""
import pytest
import torch
from torch.nn import GroupNorm, LayerNorm
from transformers import CLIPTextConfig, CLIPTextModel

from sd_mini.toy.train import UNET_CONFIG

from .reference import TOY, V1, V2, assert_same_picture, close, made, opened

diffusers = pytest.importorskip("diffusers", reason="diffusers, the reference, is not installed")
IDS = torch.arange(14).view(2, 7) * 31


def bare(named):
    """Names and values, sorted, without the prefix that version 5 of transformers leaves out."""
    return {name.removeprefix("text_model."): value for name, value in sorted(dict(named).items())}


def pair(part, config):
    """(ours, the reference's with the same weights); it refuses other names."""
    ours = made(part, config).requires_grad_(True)
    if part == "text_encoder":
        theirs = CLIPTextModel(CLIPTextConfig.from_dict(config)).eval()
        prefix = next(iter(theirs.state_dict())).startswith("text_model.")
        theirs.load_state_dict({"text_model." * prefix + name: tensor
                                for name, tensor in ours.state_dict().items()})
    else:
        cls = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
        theirs = cls.from_config(config).eval()
        theirs.load_state_dict(ours.state_dict())
    assert norms(ours) == norms(theirs)  # a wrong eps hardly shows in an output
    return ours, theirs


def norms(network):
    return {name: (norm.eps, getattr(norm, "num_groups", None))
            for name, norm in bare(network.named_modules()).items()
            if isinstance(norm, (GroupNorm, LayerNorm))}


def assert_alike(networks, outputs, *inputs):
    """Ours and theirs: the outputs, and the gradients of the inputs and of every weight."""
    close(*outputs)
    ours, theirs = (torch.autograd.grad(
        out.square().sum(), [*inputs, *bare(network.named_parameters()).values()],
        retain_graph=True) for network, out in zip(networks, outputs))
    scale = max(grad.abs().max() for grad in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * scale.item())


@pytest.mark.parametrize("config", [
    V1["unet"], V2["unet"], UNET_CONFIG,
    dict(V1["unet"], norm_eps=0.01, norm_num_groups=16, in_channels=5, out_channels=3,
         layers_per_block=2, attention_head_dim=[1, 2, 4, 8], cross_attention_dim=8),
], ids=["1.x", "2.x", "toy", "others"])
def test_unet(config, generator):
    networks = pair("unet", config)
    x_t = torch.randn(3, config["in_channels"], 8, 16, generator=generator, requires_grad=True)
    context = torch.randn(3, 5, config["cross_attention_dim"], generator=generator,
                          requires_grad=True)
    for t in (torch.tensor(7), 7, torch.tensor([0, 500, 999])):
        ours, theirs = (network(x_t, t, context) for network in networks)
        close(ours, theirs.sample)
    assert_alike(networks, (ours, theirs.sample), x_t, context)


@pytest.mark.parametrize("changes", [
    dict(hidden_act="gelu"),
    dict(hidden_act="quick_gelu", layer_norm_eps=0.01, num_attention_heads=8)])
def test_text_encoder(changes):
    """Of fewer tokens than there are positions; from embeddings too, as the attacks need it."""
    ours, theirs = pair("text_encoder", {**V1["text_encoder"], **changes})
    for tokens in (IDS, ours.embeddings.token_embedding(IDS)):
        assert_alike((ours, theirs), (ours(tokens), theirs(IDS).last_hidden_state))


@pytest.mark.parametrize("changes", [
    {}, dict(layers_per_block=2, scaling_factor=0.5, norm_num_groups=16, latent_channels=3)])
def test_vae(changes, generator):
    ours, theirs = pair("vae", {**V1["vae"], **changes})
    scale, latents = theirs.config.scaling_factor, theirs.config.latent_channels
    image = torch.rand(2, 3, 24, 40, generator=generator, requires_grad=True)
    z = torch.randn(2, latents, 3, 5, generator=generator, requires_grad=True)
    both = [(ours.encode(image), theirs.encode(image).latent_dist.mean * scale),
            (ours.decode(z), theirs.decode(z / scale).sample)]
    close(*both[0])
    assert_alike((ours, theirs), [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(*both)],
                 image, z)
    for network in (ours, theirs):
        network.quant_conv.weight.data.mul_(1000)  # beyond -30 and 20, where the log-variance ends
    expected = theirs.encode(image).latent_dist
    for found, wanted in zip(ours.moments(image), (expected.mean, expected.logvar)):
        close(found, wanted)
    assert expected.logvar.min() == -30 and expected.logvar.max() == 20


def test_the_toy_draws_as_the_reference_does(sd):
    reference = opened(TOY)
    assert_same_picture(sd, reference, "a painting of a red boat by van gogh", 10, 7.5)
    prompts = ["A photo of a  Garbage Truck, at night!", "", "zyzzyva é 42", "tree " * 40]
    expected = reference.tokenizer(prompts, padding="max_length", truncation=True,
                                   return_tensors="pt").input_ids
    assert torch.equal(sd.tokenize(prompts), expected)
