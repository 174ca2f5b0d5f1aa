"""The noise predictor eps_theta(x_t | c): a UNet with cross-attention to the prompt."""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .blocks import Downsample, Level, ResnetBlock, Upsample
from .configs import complete, heads_of


def timestep_embedding(t, dim):
    """(B,) time steps -> (B, dim): cosines, then sines, of falling frequency.

    Source: Ho et al. 2020; Vaswani et al. 2017.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet(nn.Module):
    """Call it as `sd.unet(x_t, t, context)`. Source: Rombach et al. 2022."""

    def __init__(self, config):
        super().__init__()
        self.config = config = complete("unet", config)
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        c_time, c_context = 4 * widths[0], config["cross_attention_dim"]
        heads, linear = heads_of(config), config["use_linear_projection"]

        def resnet(c_in, c_out):
            return ResnetBlock(c_in, c_out, groups, eps, c_time)

        def attention(level):
            return SpatialTransformer(widths[level], heads[level], c_context, groups, linear)

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(widths[0], c_time)
        self.time_embedding.linear_2 = nn.Linear(c_time, c_time)

        self.down_blocks = nn.ModuleList()
        c, skips = widths[0], [widths[0]]  # `skips`: widths of the outputs that the up blocks reuse
        for level, (width, kind) in enumerate(zip(widths, config["down_block_types"])):
            last, crossing = level == len(widths) - 1, kind == "CrossAttnDownBlock2D"
            self.down_blocks.append(Level(
                resnets=[resnet(c_in, width) for c_in in [c] + [width] * (layers - 1)],
                attentions=[attention(level) for _ in range(layers) if crossing],
                downsamplers=[] if last else [Downsample(width)]))
            skips += [width] * (layers if last else layers + 1)
            c = width

        self.mid_block = Level(resnets=[resnet(c, c), resnet(c, c)], attentions=[attention(-1)])

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(len(widths))), config["up_block_types"]):
            width, crossing = widths[level], kind == "CrossAttnUpBlock2D"
            self.up_blocks.append(Level(
                resnets=[resnet(c_in + skips.pop(), width) for c_in in [c] + [width] * layers],
                attentions=[attention(level) for _ in range(layers + 1) if crossing],
                upsamplers=[Upsample(width)] if level else []))
            c = width

        self.conv_norm_out = nn.GroupNorm(groups, c, eps)
        self.conv_out = nn.Conv2d(c, config["out_channels"], 3, padding=1)

    def forward(self, x_t, t, context):
        """(B, 4, h, w) latents, (B,) or scalar t, (B, L, D) context -> (B, 4, h, w) noise."""
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])
        t_emb = timestep_embedding(t, self.conv_in.out_channels).to(x_t.dtype)
        t_emb = self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(t_emb)))

        h = self.conv_in(x_t)
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = resnet(h, t_emb)
                if hasattr(block, "attentions"):
                    h = block.attentions[i](h, context)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)

        h = self.mid_block.resnets[0](h, t_emb)
        h = self.mid_block.attentions[0](h, context)
        h = self.mid_block.resnets[1](h, t_emb)

        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                h = resnet(torch.cat([h, skips.pop()], dim=1), t_emb)
                if hasattr(block, "attentions"):
                    h = block.attentions[i](h, context)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def recompute_activations(unet):
    """Store only the tensors between blocks; the backward pass recomputes the rest.

    Same gradients, a third more time, a fraction of the memory (Chen et al. 2016).
    """
    for block in unet.modules():
        if isinstance(block, (ResnetBlock, SpatialTransformer)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=False)  # nothing in there is random


class SpatialTransformer(nn.Module):
    """Each position attends to all positions, then to the prompt, which enters nowhere else."""

    def __init__(self, channels, heads, c_context, groups, linear):
        super().__init__()
        # SD 1.x projects with 1x1 convolutions, SD 2.x with linear layers. Both compute the same.
        self.linear = linear
        projection = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, c_context)])
        self.proj_out = projection(channels, channels)

    def forward(self, x, context):
        height = x.shape[2]
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (B, h * w, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context)
        h = self.proj_out(h).transpose(1, 2) if self.linear else h.transpose(1, 2)
        h = h.unflatten(2, (height, -1))  # (B, C, h, w)
        return x + (h if self.linear else self.proj_out(h))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, gated perceptron: each after a norm, added to its input."""

    def __init__(self, channels, heads, c_context):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads, channels)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, c_context)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, h, context):
        n = self.norm1(h)
        h = h + self.attn1(n, n)
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff(self.norm3(h))


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V: queries from the picture, keys and values from `context`."""

    def __init__(self, channels, heads, c_context):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(c_context, channels, bias=False)
        self.to_v = nn.Linear(c_context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # published as `to_out.0`

    def forward(self, h, context):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x in (self.to_q(h), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, h * w, C / heads)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020). The published names leave `net.1` for a dropout."""

    def __init__(self, channels):
        super().__init__()
        gate = nn.Module()
        gate.proj = nn.Linear(channels, 8 * channels)
        self.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, h):
        h, gate = self.net[0].proj(h).chunk(2, dim=-1)
        return self.net[2](h * F.gelu(gate))
