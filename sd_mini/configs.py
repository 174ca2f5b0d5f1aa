"""What the configs of a model may say, and what it means where a key is absent.

Keys and defaults are those of diffusers' UNet2DConditionModel, AutoencoderKL and DDIMScheduler and
of transformers' CLIPTextConfig. A key that asks for what is not computed here is refused by name.
"""
import json
import math
import re

HONOURED = {  # part -> key -> the reference's default
    "scheduler": dict(
        num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=0,
        set_alpha_to_one=True),
    "text_encoder": dict(
        vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu",
        layer_norm_eps=1e-5),
    "unet": dict(
        sample_size=None, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2, norm_num_groups=32, norm_eps=1e-5, cross_attention_dim=1280,
        attention_head_dim=8, use_linear_projection=False),
    "vae": dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(64,),
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, norm_num_groups=32, scaling_factor=0.18215),
}
ONLY = {  # part -> key -> the values that are computed here; a list has one of them for each level
    "scheduler": dict(
        beta_schedule=["linear", "scaled_linear"], prediction_type=["epsilon", "v_prediction"],
        timestep_spacing=["leading", "linspace", "trailing"], timestep_type=["discrete"],
        clip_sample=[False], thresholding=[False], rescale_betas_zero_snr=[False],
        predict_epsilon=[True], use_flow_sigmas=[False], use_dynamic_shifting=[False]),
    "text_encoder": dict(
        model_type=["clip_text_model"], hidden_act=["quick_gelu", "gelu"], pruned_heads=[{}]),
    "unet": dict(
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        mid_block_type=["UNetMidBlock2DCrossAttn"], act_fn=["silu"], flip_sin_to_cos=[True],
        freq_shift=[0], center_input_sample=[False], only_cross_attention=[False],
        mid_block_only_cross_attention=[None, False], dual_cross_attention=[False],
        transformer_layers_per_block=[1], attention_type=["default"], downsample_padding=[1],
        mid_block_scale_factor=[1], conv_in_kernel=[3], conv_out_kernel=[3],
        time_embedding_type=["positional"], class_embeddings_concat=[False],
        resnet_time_scale_shift=["default"], resnet_skip_time_act=[False],
        resnet_out_scale_factor=[1]),
    "vae": dict(
        in_channels=[3], out_channels=[3], down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"], act_fn=["silu"], use_quant_conv=[True],
        use_post_quant_conv=[True], mid_block_add_attention=[True]),
}
NO_EFFECT = {  # part -> keys that change nothing here, whatever they say
    # Of other samplers, where here DDIM draws; of clip_sample and thresholding, which are off.
    "scheduler": set(
        "skip_prk_steps solver_order solver_type solver_p algorithm_type lower_order_final "
        "euler_at_final final_sigmas_type lambda_min_clipped variance_type disable_corrector "
        "predict_x0 interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
        "use_lu_lambdas sigma_min sigma_max flow_shift time_shift_type noise_sampler_seed "
        "clip_sample_range dynamic_thresholding_ratio sample_max_value tensor_format".split()),
    # How weights were initialised and stored, what a decoder would do with its logits, and the
    # projection, which Stable Diffusion does not use. Dropout: networks are in evaluation mode.
    "text_encoder": set(
        "architectures transformers_version torch_dtype dtype use_bfloat16 torchscript "
        "initializer_factor initializer_range attention_dropout dropout projection_dim "
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
        "return_dict output_hidden_states output_attentions output_scores use_cache "
        "return_dict_in_generate is_decoder is_encoder_decoder add_cross_attention "
        "cross_attention_hidden_size tie_encoder_decoder tie_word_embeddings tf_legacy_loss "
        "chunk_size_feed_forward finetuning_task id2label label2id problem_type prefix "
        "task_specific_params tokenizer_class max_length min_length do_sample early_stopping "
        "num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
        "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
        "begin_suppress_tokens erased_from".split()),
    "unet": {"dropout", "upcast_attention", "addition_embed_type_num_heads"},
    "vae": {"sample_size", "force_upcast"},
}


def complete(part, config):
    """A config with the reference's defaults for what is absent; ValueError for what cannot be.

    A key of no table may change the mathematics, unless it is null, which is as good as absent.
    """
    full = {**HONOURED[part], **config}
    for key, values in ONLY[part].items():
        value = full.get(key, values[0])
        each = value if isinstance(value, list | tuple) else [value]
        if not all(one in values for one in each):
            refuse(key, value, f"must be {' or '.join(map(json.dumps, values))}")
    known = HONOURED[part].keys() | ONLY[part].keys() | NO_EFFECT[part]
    for key, value in config.items():
        if key not in known and value is not None and not key.startswith("_"):
            refuse(key, value, "a key that is not honoured here and may change the result")
    for key, default in HONOURED[part].items():
        several = key == "attention_head_dim" and is_like(full[key], (default,))
        if not is_like(full[key], default) and not several:
            refuse(key, full[key], f"not what belongs there (the default is {json.dumps(default)})")
    for key, fits, what in dependent(part, full):
        if not fits:
            refuse(key, full[key], f"must be {what}")
    return full


def refuse(key, value, why):
    raise ValueError(f"{key} {json.dumps(value)[:60]}: {why}")


def is_like(value, default):
    """Whether a value is of its default's kind: a list of such, a number above 0, a word."""
    if isinstance(default, tuple):
        several = isinstance(value, list | tuple) and len(value) > 0
        return several and all(is_like(one, default[0]) for one in value)
    if isinstance(default, float):
        return type(value) in (int, float) and 0 < value < math.inf
    if type(default) is int:
        return type(value) is int and value >= min(default, 1)
    return default is None or type(value) is type(default)


def dependent(part, config):
    """(key, whether it fits the other keys, what it must be)"""
    if part == "scheduler":
        yield "beta_end", max(config["beta_start"], config["beta_end"]) < 1, "below 1"
    elif part == "text_encoder":
        divides = config["hidden_size"] % config["num_attention_heads"] == 0
        yield "num_attention_heads", divides, "a divisor of hidden_size"
    else:
        widths = config["block_out_channels"]
        divides = not any(width % config["norm_num_groups"] for width in widths)
        yield "norm_num_groups", divides, "a divisor of all block_out_channels"
        for key in ("down_block_types", "up_block_types"):
            yield key, len(config[key]) == len(widths), "as many as block_out_channels"
    if part == "unet":
        heads, size, smallest = heads_of(config), config["sample_size"], 2 ** (len(widths) - 1)
        divides = len(heads) == len(widths) and not any(w % n for w, n in zip(widths, heads))
        yield "attention_head_dim", divides, "divisors of block_out_channels, one or one for each"
        halves = type(size) is int and size > 0 and size % smallest == 0
        yield "sample_size", halves, f"a multiple of {smallest}, which the UNet can halve"


def heads_of(config):
    """Each level's attention heads: attention_head_dim counts heads, one for all or a list."""
    heads = config["attention_head_dim"]
    return [heads] * len(config["block_out_channels"]) if isinstance(heads, int) else heads


def corrected(part, config):
    """What diffusers' StableDiffusionPipeline corrects in old configs when it opens them."""
    if not isinstance(config, dict):
        raise ValueError("not a config, which has keys and values in braces")
    if part == "scheduler":
        return {**config, "steps_offset": 1, "clip_sample": False}
    old = re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version")))
    if part == "unet" and old and type(config.get("sample_size")) is int:
        return {**config, "sample_size": max(config["sample_size"], 64)}
    return config
