"""Translate tensor names of the original single-file layout (CompVis, 2022) to diffusers names.

Community fine-tunes are published in the original layout. The modules carry diffusers names.
"""
import re

# Drawing a picture does not need these tensors. Most belong to the training code: the moving
# average, the tables of the schedule, the loss networks of the VAE.
IGNORED = re.compile(
    r"model_ema\.|first_stage_model\.loss\.|(alphas|betas|sqrt_|log_|posterior_|logvar|lvlb_)|"
    r"cond_stage_model\.logit_scale$|.*\.position_ids$"
)
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
VAE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    "norm_out": "conv_norm_out",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def rename(name, configs):
    """A tensor's original name -> (part, its name there), or None for a tensor to ignore.

    configs: {"unet": ..., "vae": ...}, for the numbers of layers and levels.
    Raises ValueError for a name of no known part.
    """
    if IGNORED.match(name):
        return None
    for prefix, part, turn in (
        ("model.diffusion_model.", "unet", unet_name),
        ("first_stage_model.", "vae", vae_name),
        ("cond_stage_model.transformer.", "text_encoder", lambda name, config: name),
    ):
        if name.startswith(prefix):
            return part, turn(name.removeprefix(prefix), configs.get(part))
    raise ValueError(f"tensor {name} does not belong to Stable Diffusion 1.x")


def replace_start(name, table):
    """Replace the start of `name` by its entry in the table, if it has one."""
    for old, new in table.items():
        if name.startswith(old + "."):
            return new + name[len(old):]
    return name


def unet_name(name, config):
    """A UNet tensor's original name -> its name here.

    The original numbers all blocks in one row. Here each level has its resnets, attentions and
    resampler.
    """
    layers = config["layers_per_block"]
    found = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name)
    if not found or name.startswith("input_blocks.0."):
        start = replace_start(name, UNET_ENDS)
        mid, _, rest = start.partition("mid_block.resnets.")
        return f"mid_block.resnets.{rest[:2]}{replace_start(rest[2:], RESNET)}" if rest else mid
    way, n, j, rest = found[1], int(found[2]), int(found[3]), found[4]
    level, i = divmod(n - 1 if way == "input" else n, layers + 1)
    side = "down_blocks" if way == "input" else "up_blocks"
    if rest.startswith("op."):
        return f"{side}.{level}.downsamplers.0.conv.{rest[3:]}"
    if j and rest.startswith("conv."):
        return f"{side}.{level}.upsamplers.0.{rest}"
    return (
        f"{side}.{level}.attentions.{i}.{rest}"
        if j
        else f"{side}.{level}.resnets.{i}.{replace_start(rest, RESNET)}"
    )


def vae_name(name, config):
    """A VAE tensor's original name -> its name here.

    The original counts the decoder's levels from the picture. Here they count from the latents.
    """
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest, last = replace_start(rest, VAE), len(config["block_out_channels"]) - 1
    if rest.startswith("mid_block.attentions.0."):
        return (
            f"{half}.mid_block.attentions.0."
            f"{replace_start(rest[len('mid_block.attentions.0.'):], ATTENTION)}"
        )
    rest = re.sub(r"^down\.(\d+)\.block\.", r"down_blocks.\1.resnets.", rest)
    rest = re.sub(r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", rest)
    rest = re.sub(
        r"^up\.(\d+)\.block\.",
        lambda m: f"up_blocks.{last - int(m[1])}.resnets.",
        rest,
    )
    rest = re.sub(
        r"^up\.(\d+)\.upsample\.",
        lambda m: f"up_blocks.{last - int(m[1])}.upsamplers.0.",
        rest,
    )
    return f"{half}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
