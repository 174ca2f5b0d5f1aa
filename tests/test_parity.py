"""sd_mini against transformers and diffusers, on the toy weights.

`.ci/run` installs diffusers, so it skips none of these tests.
"""
import pytest
import torch
from transformers import CLIPTextModel

from sd_mini.weights import TOY

diffusers = pytest.importorskip("diffusers", reason="diffusers, the reference, is not installed")
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def reference():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(TOY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_text_encoder(sd):
    ids = sd.tokenize(["a photo of a red church in the snow", "", "a tench by van gogh"])
    expected = CLIPTextModel.from_pretrained(TOY / "text_encoder").float()(ids).last_hidden_state
    torch.testing.assert_close(sd.text_encoder(ids), expected, **CLOSE)


def test_tokenizer(sd, reference):
    prompts = ["A photo of a  Garbage Truck, at night!", "", "zyzzyva é 42"]
    expected = reference.tokenizer(prompts, padding="max_length", truncation=True,
                                   return_tensors="pt")
    assert torch.equal(sd.tokenize(prompts), expected.input_ids)


@pytest.mark.parametrize("t", [1, 400, 999])
def test_unet(sd, reference, generator, t):
    x_t = torch.randn(2, *sd.latent_shape, generator=generator)
    context = sd.encode_prompt(["a photo of a house", "a boat at night"])
    expected = reference.unet(x_t, t, context).sample
    torch.testing.assert_close(sd.unet(x_t, t, context), expected, **CLOSE)


def test_vae(sd, reference):
    image = 2 * sd.sample(["a photo of a car"], seed=1, steps=5) - 1
    vae = reference.vae
    z = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(sd.vae.encode(image), z, **CLOSE)
    decoded = vae.decode(z / vae.config.scaling_factor).sample
    torch.testing.assert_close(sd.vae.decode(z), decoded, **CLOSE)


def test_ddim_steps_and_noise(sd, reference, generator):
    scheduler = reference.scheduler
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == sd.schedule.timesteps(50)
    x, eps = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    for t in scheduler.timesteps.tolist():
        noised = scheduler.add_noise(x, eps, torch.tensor([t]))
        torch.testing.assert_close(sd.schedule.add_noise(x, eps, t), noised, **CLOSE)
        stepped = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(sd.schedule.ddim_step(x, eps, t, t - 20), stepped, **CLOSE)


@pytest.mark.parametrize("prompt, seed", [
    ("a photo of a church on the grass", 3),
    ("a painting of a red boat by van gogh", 11),
])
def test_a_whole_picture(sd, reference, prompt, seed):
    expected = reference(prompt, latents=sd.initial_noise([seed]), num_inference_steps=20,
                         guidance_scale=7.5, output_type="pt")
    torch.testing.assert_close(sd.sample([prompt], seed, 20, 7.5), expected.images, **CLOSE)
