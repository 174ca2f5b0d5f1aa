"""One file in the original layout: as the reference converts it, and read back as it was."""
import copy
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import sd_mini
from sd_mini import original

from .reference import V1, V2, assert_same, made, refusal, rewrite, write_model

TEXT = "cond_stage_model.transformer."
OF_DIFFUSERS = re.compile(r"resnets|attentions|samplers|conv_shortcut|conv_norm|time_emb(edding|_p)"
                          r"|group_norm|first_stage_model.*\.to_")
EXTRA = {  # what the file of training code has besides
    name: torch.zeros(2) for name in (
        "model_ema.diffusion_modelinput_blocks00weight", "betas", "alphas_cumprod_prev",
        "sqrt_one_minus_alphas_cumprod", "posterior_variance", "first_stage_model.loss.logvar",
        f"{TEXT}text_model.embeddings.position_ids", f"{TEXT}text_projection.weight")}


@pytest.fixture
def single(v1, tmp_path):
    path = tmp_path / "a/new/tune.safetensors"
    sd_mini.save_single_file(v1, path)
    return path


@pytest.mark.parametrize("layers", [1, 2])
def test_the_reference_converts_each_tensor_to_its_place(v1, layers):
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    networks = {part: made(part, {**V1[part], "layers_per_block": layers})
                for part in ("unet", "vae")} | {"text_encoder": v1.text_encoder}
    tensors = original.tensors(networks)
    converted = {
        "unet": convert.convert_ldm_unet_checkpoint(dict(tensors), networks["unet"].config),
        "vae": convert.convert_ldm_vae_checkpoint(dict(tensors), networks["vae"].config),
        "text_encoder": convert.convert_ldm_clip_checkpoint(dict(tensors))}
    for part, found in converted.items():
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        expected = networks[part].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k].reshape(expected[k].shape), expected[k]) for k in expected)
    assert len(tensors) == sum(map(len, converted.values()))
    for n, place in ((1, 1), (2, 2), (3, 2)):  # the reference takes either; attention stands before
        block = f"model.diffusion_model.output_blocks.{n * (layers + 1) - 1}"
        assert f"{block}.{place}.conv.weight" in tensors
    assert all(t.dim() in (1, 4) for k, t in tensors.items() if ".attn_1." in k)  # 1x1 convolutions
    assert not any(map(OF_DIFFUSERS.search, tensors))  # which the reference lets through


def of_others(tensors):
    """With what training needs besides; early names, without text_model; linear attention."""
    tensors = {name.replace("text_model.", ""): tensor for name, tensor in tensors.items()} | EXTRA
    return {name: tensor[..., 0, 0] if ".attn_1." in name and tensor.dim() == 4 else tensor
            for name, tensor in tensors.items()}


@pytest.mark.parametrize("change, dtype", [
    (lambda t: t, torch.float32), (of_others, torch.bfloat16)], ids=["ours", "of others"])
def test_a_single_file_is_read_back_as_it_was(v1, hub, single, change, dtype):
    rewrite(single, change)
    sd = sd_mini.load(single, dtype=dtype, tokenizer=hub)
    assert_same(sd.text_encoder, v1.text_encoder)
    assert_same(sd.unet, copy.deepcopy(v1.unet).to(dtype))
    assert_same(sd.vae, copy.deepcopy(v1.vae).to(dtype))


@pytest.mark.parametrize("surprise, message", [
    ("lora_te_surprise", "lora_te_surprise does not belong"),
    ("conditioner.embedders.0.x", "SDXL"), ("cond_stage_model.model.ln_final.bias", "2.x")])
def test_a_single_file_is_strict(v1, single, surprise, message):
    rewrite(single, lambda tensors: tensors | {surprise: torch.zeros(1)})
    line = refusal(sd_mini.load, single, tokenizer=v1.folder)
    assert line.startswith(f"{single}: ") and message in line


def test_tokenizer_and_configs_come_from_a_folder_or_the_hub(hub, single):
    line = refusal(sd_mini.load, single)
    assert line.startswith(f"{single}: ") and "--tokenizer" in line
    line = refusal(sd_mini.load, single, tokenizer="someone/else")  # what was named is blamed alone
    assert line.startswith("someone/else: no such folder here")


def test_a_single_file_is_written_for_1_x_alone_in_the_precision_asked_for(v1, tmp_path):
    path = tmp_path / "one.safetensors"
    of_v2 = write_model(tmp_path / "v2", V2)
    for part in ("unet", "text_encoder", "schedule"):
        line = refusal(sd_mini.save_single_file, replace(v1, **{part: getattr(of_v2, part)}), path)
        assert "made like Stable Diffusion 2.x; one file in the" in line and not path.exists()
    sd_mini.save_single_file(v1, path, torch.float16)
    written, expected = load_file(path), original.tensors({"unet": v1.unet})
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in expected.items())
