"""Configs: every key is honoured, changes nothing, or is refused by name."""
import inspect
import json
import shutil

import pytest
from transformers import CLIPTextConfig, CLIPTokenizer

import sd_mini
from sd_mini import configs

from .reference import PLACES, assert_same_picture, change, opened, refusal

FORMER_KEYS = """max_length do_sample num_beams temperature return_dict output_attentions torchscript
    use_bfloat16 tf_legacy_loss is_decoder id2label _attn_implementation torch_dtype dropout"""
SCHEDULERS = [f"{name}Scheduler" for name in """
    DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete DPMSolverMultistep
    DPMSolverSinglestep UniPCMultistep DEISMultistep HeunDiscrete KDPM2Discrete
    KDPM2AncestralDiscrete""".split()]


def signature(name):
    """{key: default} of a class of diffusers."""
    cls = getattr(pytest.importorskip("diffusers"), name)
    return {key: p.default for key, p in inspect.signature(cls).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD}


def reference_config(name):
    """(part, config with every key of a class of the reference, at its default)"""
    if name == "CLIPText":
        return "text_encoder", CLIPTextConfig().to_dict()
    if name == "CLIPText of former years":
        return "text_encoder", dict.fromkeys(FORMER_KEYS.split(), 1)
    if name == "AutoencoderKL":
        return "vae", signature(name)
    if name == "UNet2DConditionModel":
        return "unet", {**signature(name), "sample_size": 64}
    return "scheduler", {**signature(name), "clip_sample": False}


@pytest.mark.parametrize("name", [
    "CLIPText", "CLIPText of former years", "AutoencoderKL", "UNet2DConditionModel", *SCHEDULERS])
def test_every_key_of_the_reference_is_known(name):
    """With its default it opens. A word is named, unless the key changes nothing."""
    part, config = reference_config(name)
    configs.complete(part, config)
    for key in config.keys() - configs.NO_EFFECT[part]:
        if not key.startswith("_"):
            line = refusal(configs.complete, part, {**config, key: "other"})
            assert line.startswith(f'{key} "other": '), line


@pytest.mark.parametrize("name", [
    "CLIPText", "AutoencoderKL", "UNet2DConditionModel", "DDIMScheduler"])
def test_absent_keys_have_the_defaults_of_the_reference(name):
    part, reference = reference_config(name)
    needed = {"sample_size": 64} if part == "unet" else {}
    full = configs.complete(part, needed)
    assert len(full) >= 8 and {key: reference[key] for key in full} == full


@pytest.mark.parametrize("part, key, value", [
    ("scheduler", "beta_start", "0.00085"),  # not a number
    ("scheduler", "beta_end", 1.0),  # alpha_bar would be 0
    ("scheduler", "num_train_timesteps", 0),
    ("scheduler", "predict_epsilon", False),
    ("scheduler", "a_key_of_2027", ["x" * 70]),
    ("unet", "act_fn", None),
    ("unet", "attention_head_dim", [2, 4, 8]),  # of four levels
    ("unet", "attention_head_dim", 7),  # no divisor
    ("unet", "down_block_types", ["DownBlock2D"] * 3),
    ("unet", "up_block_types", ["UpBlock2D"] * 3 + ["AttnUpBlock2D"]),
    ("unet", "norm_num_groups", 5),
    ("unet", "sample_size", 12),
    ("unet", "sample_size", 0),
    ("unet", "sample_size", None),
    ("unet", "cross_attention_dim", [32, 32, 64, 64]),
    ("vae", "scaling_factor", 0),
    ("vae", "block_out_channels", []),
    ("vae", "in_channels", 4),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "num_hidden_layers", "12"),
    ("text_encoder", "quantization_config", {"load_in_8bit": True}),
    # parts of different models
    ("unet", "cross_attention_dim", 48),
    ("unet", "in_channels", 9),
    ("unet", "out_channels", 8),
])
def test_a_value_that_is_not_computed_here_or_does_not_fit_is_refused_by_name(
        folder, part, key, value):
    change(folder, part, **{key: value})
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")  # it is said before any weights are read
    line = refusal(sd_mini.load, folder)
    assert line.startswith(f"{folder / PLACES[part]}: {key} {json.dumps(value)[:60]}: "), line


def test_what_the_unet_and_the_tokenizer_must_fit_is_named(folder):
    change(folder, "vae", latent_channels=16)
    assert "in_channels 4: the VAE's latent_channels is 16" in refusal(sd_mini.load, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<sks>", "<style>"])
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    line = refusal(sd_mini.load, folder)
    assert "vocab_size 710" in line and "the tokenizer beside it has 712 tokens" in line


def test_old_configs_are_corrected_as_the_reference_corrects_them(folder):
    """Without an offset of the steps, with clipping; with the latent size of 2022."""
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("PNDM", "DDIM"))
    change(folder, "scheduler", _class_name="DDIMScheduler", steps_offset=..., clip_sample=True)
    assert_same_picture(sd_mini.load(folder), opened(folder))
    for version, size in (("0.2.2", 64), ("0.8.1", 64), ("0.9.0", 32), ("0.10.2", 32)):
        change(folder, "unet", _diffusers_version=version, sample_size=32)
        assert sd_mini.load(folder).latent_shape == (4, size, size)
        if version in ("0.8.1", "0.9.0"):
            assert opened(folder).unet.config.sample_size == size
