"""Tensor names of the original single-file layout (CompVis, 2022), for reading and for writing.

The modules carry diffusers names. One table of pairs (name here, original name) serves both ways.
"""
import re

# Not needed to draw: most are of the training code, as the moving average and the VAE's losses.
IGNORED = re.compile(
    r"model_ema\.|first_stage_model\.loss\.|(alphas|betas|sqrt_|log_|posterior_|logvar|lvlb_)|"
    r"cond_stage_model\.logit_scale$|.*\.position_ids$|.*\.text_projection\.weight$"
)
TEXT = "cond_stage_model.transformer."
ROOTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
         "text_encoder": TEXT + "text_model."}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def inside(here, there, table):
    """The pairs of the layers of one module."""
    return ((f"{here}.{ours}", f"{there}.{theirs}") for ours, theirs in table.items())


def unet_pairs(config):
    """The original numbers all blocks in one row, and what a block holds: resnet 0, attention 1,
    then the resampler. Here each level has its resnets, attentions and resampler.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    yield from UNET_ENDS.items()
    for i in (0, 1):
        yield from inside(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", UNET_RESNET)
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        first = level * (layers + 1)  # the number of the level's first block; down, conv_in is 0
        for i in range(layers):
            block = f"input_blocks.{first + 1 + i}"
            yield from inside(f"{down}.resnets.{i}", f"{block}.0", UNET_RESNET)
            yield f"{down}.attentions.{i}", f"{block}.1"
        yield f"{down}.downsamplers.0.conv", f"input_blocks.{first + 1 + layers}.0.op"
        for i in range(layers + 1):
            block = f"output_blocks.{first + i}"
            yield from inside(f"{up}.resnets.{i}", f"{block}.0", UNET_RESNET)
            yield f"{up}.attentions.{i}", f"{block}.1"
        place = 2 if config["up_block_types"][level] == "CrossAttnUpBlock2D" else 1
        yield f"{up}.upsamplers.0.conv", f"output_blocks.{first + layers}.{place}.conv"


def vae_pairs(config):
    """The original counts the decoder's levels from the picture. Here it is from the latents."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    for half, way in (("encoder", "down"), ("decoder", "up")):
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        for i in (0, 1):
            yield f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}"
        yield from inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        for level in range(levels):
            here = f"{half}.{way}_blocks.{level}"
            there = f"{half}.{way}.{level if way == 'down' else levels - 1 - level}"
            for i in range(layers + 1):
                resnet, block = f"{here}.resnets.{i}", f"{there}.block.{i}"
                yield resnet, block
                yield f"{resnet}.conv_shortcut", f"{block}.nin_shortcut"
            yield f"{here}.{way}samplers.0.conv", f"{there}.{way}sample.conv"


PAIRS = {"unet": unet_pairs, "vae": vae_pairs, "text_encoder": lambda config: ()}


def names(part, network):
    """{original name: name here} of all tensors of a network."""
    table = dict(PAIRS[part](network.config))

    def original(name):
        """The name with the longest start that has a partner replaced by it."""
        steps = name.split(".")
        for n in reversed(range(len(steps))):
            if (start := ".".join(steps[:n])) in table:
                return ".".join([table[start], *steps[n:]])
        return name

    return {ROOTS[part] + original(name): name for name in network.state_dict()}


def current(name):
    """An original name as later files have it: early ones leave out `text_model.`."""
    return re.sub(rf"^({re.escape(TEXT)})(?!text_model\.)", r"\1text_model.", name)


def tensors(networks):
    """{part: network} -> {original name: tensor}. The VAE's attention is 1x1 convolutions there."""
    found = {}
    for part, network in networks.items():
        state = network.state_dict()
        for there, here in names(part, network).items():
            is_matrix = ".attn_1." in there and state[here].dim() == 2
            found[there] = state[here][:, :, None, None] if is_matrix else state[here]
    return found
