"""Each network against diffusers and transformers: rows that differ, odd shapes, all tensors."""
import pytest
import torch
from torch.nn import GroupNorm, LayerNorm
from transformers import CLIPTextConfig, CLIPTextModel

from ..bench import V1 as FULL_SIZE
from .reference import PARTS, TOY, V1, V2, assert_same_picture, close, made, opened

diffusers = pytest.importorskip("diffusers", reason="diffusers, the reference, is not installed")
IDS = torch.arange(14).view(2, 7) * 31
TOYS_UNET = dict(
    V1["unet"], block_out_channels=[16, 32, 48], norm_num_groups=16, attention_head_dim=4,
    layers_per_block=1, down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"])


def pair(part, config):
    """(ours, the reference's with the same weights); it refuses other names."""
    ours = made(part, config)
    if part == "text_encoder":
        theirs = CLIPTextModel(CLIPTextConfig.from_dict(config)).eval()
        prefix = next(iter(theirs.state_dict())).startswith("text_model.")  # not in version 5
        theirs.load_state_dict({"text_model." * prefix + name: tensor
                                for name, tensor in ours.state_dict().items()})
    else:
        cls = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
        theirs = cls.from_config(config).eval()
        theirs.load_state_dict(ours.state_dict())
    assert norms(ours) == norms(theirs)  # a wrong eps hardly shows in an output
    return ours, theirs.requires_grad_(False)


def norms(network):
    return {name.removeprefix("text_model."): (norm.eps, getattr(norm, "num_groups", None))
            for name, norm in network.named_modules() if isinstance(norm, (GroupNorm, LayerNorm))}


@pytest.mark.parametrize("config", [
    V1["unet"], V2["unet"], TOYS_UNET,
    dict(V1["unet"], norm_eps=0.01, norm_num_groups=16, in_channels=5, out_channels=3,
         layers_per_block=2),
    dict(V1["unet"], attention_head_dim=[1, 2, 4, 8], cross_attention_dim=8),
], ids=["1.x", "2.x", "toy", "norms and channels", "heads and context"])
def test_unet(config, generator):
    ours, theirs = pair("unet", config)
    x_t = torch.randn(3, config["in_channels"], 8, 16, generator=generator)  # wider than high
    context = torch.randn(3, 5, config["cross_attention_dim"], generator=generator)
    for t in (torch.tensor([0, 500, 999]), torch.tensor(7), 7):
        close(ours(x_t, t, context), theirs(x_t, t, context).sample)


@pytest.mark.parametrize("changes", [
    dict(hidden_act="gelu"), dict(hidden_act="quick_gelu", layer_norm_eps=0.01),
    dict(num_attention_heads=8, num_hidden_layers=1)])
def test_text_encoder(changes):
    """Of fewer tokens than there are positions; from embeddings too, as the attacks need it."""
    ours, theirs = pair("text_encoder", {**V1["text_encoder"], **changes})
    expected = theirs(IDS).last_hidden_state
    close(ours(IDS), expected)
    close(ours(ours.embeddings.token_embedding(IDS)), expected)


@pytest.mark.parametrize("changes", [
    {}, dict(layers_per_block=2, scaling_factor=0.5, norm_num_groups=16, latent_channels=3)])
def test_vae(changes, generator):
    ours, theirs = pair("vae", {**V1["vae"], **changes})
    scale = theirs.config.scaling_factor
    image = torch.rand(2, 3, 24, 40, generator=generator) * 2 - 1
    for network in (ours, theirs):
        network.quant_conv.weight.mul_(1000)  # beyond -30 and 20, where the log-variance ends
    expected = theirs.encode(image).latent_dist
    for found, wanted in zip(ours.moments(image), (expected.mean, expected.logvar)):
        close(found, wanted)
    assert expected.logvar.min() == -30 and expected.logvar.max() == 20
    close(ours.encode(image), expected.mean * scale)
    z = torch.randn(2, ours.config["latent_channels"], 3, 5, generator=generator)
    close(ours.decode(z), theirs.decode(z / scale).sample)


@pytest.mark.parametrize("part, reference, count", [
    ("unet", diffusers.UNet2DConditionModel, 859_520_964),
    ("vae", diffusers.AutoencoderKL, 83_653_863),
    ("text_encoder", lambda **c: CLIPTextModel(CLIPTextConfig(**c)), 123_060_480),
])
def test_full_size_names_shapes_and_counts(part, reference, count):
    with torch.device("meta"):
        ours, theirs = PARTS[part][0](FULL_SIZE[part]), reference(**FULL_SIZE[part])
    shapes = {name.removeprefix("text_model."): tensor.shape
              for name, tensor in theirs.state_dict().items() if not name.endswith("position_ids")}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert sum(p.numel() for p in ours.parameters()) == count


def test_the_toy_draws_as_the_reference_does(sd):
    reference = opened(TOY)
    assert_same_picture(sd, reference, "a painting of a red boat by van gogh", 10, 7.5)
    prompts = ["A photo of a  Garbage Truck, at night!", "", "zyzzyva é 42", "tree " * 40]
    expected = reference.tokenizer(prompts, padding="max_length", truncation=True,
                                   return_tensors="pt").input_ids
    assert torch.equal(sd.tokenize(prompts), expected)
