"""Prompt to picture: tokenise, encode, denoise under guidance, decode."""
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from . import half
from .schedule import Schedule
from .text_encoder import TextEncoder
from .unet import UNet
from .vae import VAE


@dataclass
class StableDiffusion:
    """The five parts of the model, and the calls that the rest of the project makes."""

    tokenizer: object
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    schedule: Schedule
    folder: Path | None = None  # the tokenizer and the configs came from here
    precision: torch.dtype = torch.float32  # of what is not trained

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        """The precision of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def context_length(self):
        """L, the tokens of a prompt with start, end and padding (77 in the published models)."""
        return min(self.text_encoder.config["max_position_embeddings"],
                   self.tokenizer.model_max_length)

    @property
    def latent_shape(self):
        return (self.unet.config["in_channels"], *[self.unet.config["sample_size"]] * 2)

    def tokenize(self, prompts):
        """N prompts -> (N, L) ids: start, prompt, end, padding. A longer prompt is cut."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True,
                                max_length=self.context_length, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    def encode_prompt(self, prompts):
        """N prompts -> context (N, L, D)."""
        return self.encode_tokens(self.tokenize(prompts))

    def encode_tokens(self, tokens):
        """Ids (N, L) or embeddings (N, L, D) -> context (N, L, D)."""
        return self.text_encoder(tokens)

    def predict_noise(self, x_t, t, context):
        """eps_theta(x_t | c): (B, 4, h, w), (B,) or scalar, (B, L, D) -> (B, 4, h, w) float32.

        A UNet in training has float32 weights. It computes in bfloat16 where the others do.
        """
        if not torch.is_tensor(t):
            t = torch.full((), t, device=x_t.device)
        t = t.to(x_t.device).expand(len(x_t))
        enter, leave = half.scaled_gradients(self.dtype)
        mixed = self.dtype != self.precision == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext():
            eps = self.unet(enter(x_t), t, enter(context))
        out = leave(eps.float())
        return self.schedule.v_to_eps(out, x_t, t) if self.schedule.predicts_v else out

    def initial_noise(self, seeds):
        """N seeds -> x_T (N, 4, h, w). The CPU draws it: alike on each device, in each batch."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.randn(self.latent_shape, generator=each) for each in generators]
        return torch.stack(noise).to(self.device)

    def denoise(self, x_t, context, steps, guidance):
        """Guided DDIM -> (t, x_t, eps_c, eps_empty) before each step, then (0, x_0, None, None)."""
        guidance = torch.as_tensor(guidance, device=x_t.device, dtype=x_t.dtype).view(-1, 1, 1, 1)
        timesteps = self.schedule.timesteps(steps)
        stride = self.schedule.config["num_train_timesteps"] // steps
        both = torch.cat([context, self.encode_prompt([""]).expand_as(context)])
        for t in timesteps:
            eps_c, eps_empty = self.predict_noise(torch.cat([x_t, x_t]), t, both).chunk(2)
            yield t, x_t, eps_c, eps_empty
            eps = self.schedule.guide(eps_c, eps_empty, guidance)
            x_t = self.schedule.ddim_step(x_t, eps, t, t - stride)
        yield 0, x_t, None, None

    @torch.no_grad()
    def sample(self, prompts=None, seed=0, steps=50, guidance=7.5, context=None):
        """Prompts, or their context (N, L, D) -> pictures (N, 3, H, W) in [0, 1].

        `seed` and `guidance` are one value for all prompts, or a list with one per prompt.
        """
        context = self.encode_prompt(prompts) if context is None else context
        seeds = [seed] * len(context) if isinstance(seed, int) else list(seed)
        for _, x_0, _, _ in self.denoise(self.initial_noise(seeds), context, steps, guidance):
            pass
        return self.decode(x_0)

    @torch.no_grad()
    def decode(self, z):
        """Latents (N, 4, h, w) -> pictures (N, 3, H, W) in [0, 1], float32."""
        return (self.vae.decode(z) / 2 + 0.5).clamp(0, 1)
