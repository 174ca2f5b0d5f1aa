"""The autoencoder: pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, H / f, W / f) and back."""
import torch.nn.functional as F
from torch import nn

from .blocks import Downsample, Level, ResnetBlock, Upsample
from .configs import complete

EPS = 1e-6


class VAE(nn.Module):
    """Call `sd.vae.encode(image)` and `sd.vae.decode(z)`. Source: Rombach et al. 2022, 3.1."""

    def __init__(self, config):
        super().__init__()
        self.config = config = complete("vae", config)
        latent = config["latent_channels"]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.scaling_factor = config["scaling_factor"]

    def moments(self, image):
        """(B, 3, H, W) -> mean and log-variance of q(z | image), each (B, 4, h, w), unscaled."""
        mean, log_var = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def encode(self, image):
        """(B, 3, H, W) in [-1, 1] -> z (B, 4, h, w): scaling_factor * mean of q(z | image)."""
        return self.moments(image.to(self.quant_conv.weight.dtype))[0].float() * self.scaling_factor

    def decode(self, z):
        """z (B, 4, h, w), scaled -> picture (B, 3, H, W), about [-1, 1]."""
        z = (z / self.scaling_factor).to(self.quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z)).float()


def resnets(c_in, width, groups, n):
    """n blocks in a row, (B, c_in, h, w) -> (B, width, h, w)."""
    return [ResnetBlock(c, width, groups, EPS) for c in [c_in] + [width] * (n - 1)]


def middle(channels, groups):
    """resnet -> attention -> resnet at the lowest resolution."""
    return Level(resnets=resnets(channels, channels, groups, 2),
                 attentions=[SpatialAttention(channels, groups)])


def through_middle(block, h):
    return block.resnets[1](block.attentions[0](block.resnets[0](h)))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        c = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down_blocks.append(Level(
                resnets=resnets(c, width, groups, config["layers_per_block"]),
                downsamplers=[] if last else [Downsample(width, padding=0)]))
            c = width
        self.mid_block = middle(c, groups)
        self.conv_norm_out = nn.GroupNorm(groups, c, EPS)
        self.conv_out = nn.Conv2d(c, 2 * config["latent_channels"], 3, padding=1)

    def forward(self, image):
        h = self.conv_in(image)
        for block in self.down_blocks:
            for resnet in block.resnets:
                h = resnet(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
        return self.conv_out(F.silu(self.conv_norm_out(through_middle(self.mid_block, h))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = middle(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        c = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.up_blocks.append(Level(
                resnets=resnets(c, width, groups, config["layers_per_block"] + 1),
                upsamplers=[] if last else [Upsample(width)]))
            c = width
        self.conv_norm_out = nn.GroupNorm(groups, c, EPS)
        self.conv_out = nn.Conv2d(c, config["out_channels"], 3, padding=1)

    def forward(self, z):
        h = through_middle(self.mid_block, self.conv_in(z))
        for block in self.up_blocks:
            for resnet in block.resnets:
                h = resnet(h)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class SpatialAttention(nn.Module):
    """One head of self-attention over all positions of the picture."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h * w, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])
