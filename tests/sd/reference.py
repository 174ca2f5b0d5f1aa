"""Small models of the real architecture, and the reference libraries that they are compared with.

No float16 holds their weights, norms and biases included: what is rounded on its way is seen.
"""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mini
from sd_mini.weights import PARTS, TOY, write_index

PLACES = {part: f"{part}/config.json" for part in PARTS} | {
    "scheduler": "scheduler/scheduler_config.json"}
WEIGHTS = {part: f"{part}/{stem}.safetensors" for part, (_, stem, _) in PARTS.items()}

SCHEDULER = {  # as CompVis/stable-diffusion-v1-4 publishes it
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
V1 = {
    "scheduler": SCHEDULER,
    "text_encoder": dict(
        architectures=["CLIPTextModel"], model_type="clip_text_model", vocab_size=710,
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, hidden_act="quick_gelu"),
    "unet": dict(
        _class_name="UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4,
        layers_per_block=1, block_out_channels=[32, 32, 64, 64], norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=8),
    "vae": dict(
        _class_name="AutoencoderKL", block_out_channels=[16, 16, 32, 32], layers_per_block=1,
        latent_channels=4, norm_num_groups=8, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4),
}
V2 = {
    "vae": V1["vae"],
    "scheduler": {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction",
                  "timestep_spacing": "linspace"},  # where a step does not end at the next one
    "text_encoder": {**V1["text_encoder"], "hidden_act": "gelu"},
    "unet": dict(V1["unet"], attention_head_dim=[2, 4, 8, 8], use_linear_projection=True)}


def made(part, config, seed=0):
    """A network with random weights in every tensor."""
    torch.manual_seed(seed)
    network = PARTS[part][0](config).requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    assert all((p != p.half()).any() for p in network.parameters())
    return network


def write_model(folder, configs):
    """A pipeline in the diffusers layout -> the same, opened."""
    shutil.copytree(TOY / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / PLACES["scheduler"]).write_text(json.dumps(configs["scheduler"]))
    for part in PARTS:
        sd_mini.save_part(made(part, configs[part]), folder / part, part)
    write_index(folder)
    return sd_mini.load(folder)


def change(folder, part, **keys):
    """Change keys of a config in a model folder; `...` takes a key away."""
    path = folder / PLACES[part]
    config = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rewrite(path, change):
    """Change a safetensors file by a function {name: tensor} -> {name: tensor}."""
    tensors = {k: v.contiguous() for k, v in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def refusal(call, *arguments, **keywords):
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **keywords)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700
    return line


def close(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def assert_same(a, b):
    """Networks, or whole models, have the same tensors, bit for bit."""
    if hasattr(a, "unet"):
        return [assert_same(getattr(a, part), getattr(b, part)) for part in PARTS]
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert not [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]


def opened(folder):
    """The reference's pipeline of a folder, with DDIM."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if not isinstance(pipeline.scheduler, diffusers.DDIMScheduler):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_picture(sd, reference, prompt="a photo of a church", steps=4, guidance=3.0):
    """Both draw the same from the same noise, and more than one colour.

    Random networks are chaotic: many steps or much guidance would enlarge the last digits.
    """
    expected = reference(prompt, latents=sd.initial_noise([5]), num_inference_steps=steps,
                         guidance_scale=guidance, output_type="pt").images
    assert expected.std() > 0.05
    assert (sd.sample([prompt], 5, steps, guidance) - expected).abs().max() < 1e-3
