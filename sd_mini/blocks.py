"""The convolutional blocks that the UNet and the VAE share."""
import torch.nn.functional as F
from torch import nn


class ResnetBlock(nn.Module):
    """norm -> silu -> conv, twice, plus a shortcut from the input.

    (B, c_in, h, w), (B, c_time) -> (B, c_out, h, w). The VAE has no time embedding to add.
    """

    def __init__(self, c_in, c_out, groups, eps, c_time=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if c_time:
            self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, t_emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if t_emb is not None:
            h = h + self.time_emb_proj(F.silu(t_emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nn.Module):
    """Halve the resolution. The UNet pads all four sides, the VAE only right and bottom."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: repeat each pixel, then convolve."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution of a network: lists `resnets`, `attentions`, `downsamplers`, `upsamplers`."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            if part:
                setattr(self, name, nn.ModuleList(part))
