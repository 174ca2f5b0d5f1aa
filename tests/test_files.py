"""Files of others are read as the reference reads them, or refused in one line; ours suit others.

diffusers and transformers are the reference. The models are small and random.
"""
import inspect
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import sd_mini
from sd_mini import configs, original
from sd_mini.files import write_atomically
from sd_mini.schedule import Schedule
from sd_mini.text_encoder import TextEncoder
from sd_mini.unet import UNet
from sd_mini.vae import VAE
from sd_mini.weights import PARTS, TOY

from .bench import V1
from .test_published import (UNETS, V1_SCHEDULER, assert_same_networks, assert_same_picture, close,
                             diffusers, folder, hub, pipeline, rewrite, to_original, v1)

from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,  # noqa: E402
                          CLIPTokenizer)

__all__ = ["folder", "hub", "v1"]  # fixtures of test_published
CLASSES = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder, "scheduler": Schedule}
PLACES = {part: f"{part}/config.json" for part in PARTS} | {
    "scheduler": "scheduler/scheduler_config.json"}


def built(part, config):
    """The part from a config, without memory for weights."""
    with torch.device("cpu" if part == "scheduler" else "meta"):
        return CLASSES[part](config)


def change(folder, part, **keys):
    """Change keys of a config in a model folder; `...` takes a key away."""
    path = folder / PLACES[part]
    config = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refusal(call, *arguments, **keywords):
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **keywords)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700
    return line


# --- configs: every key is honoured, changes nothing, or is refused

OLD = {"_diffusers_version": "0.6.0"}
UNET_V1 = dict(
    OLD, _class_name="UNet2DConditionModel", act_fn="silu", attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280], center_input_sample=False, cross_attention_dim=768,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], downsample_padding=1,
    flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1,
    norm_eps=1e-05, norm_num_groups=32, out_channels=4, sample_size=64,
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
UNET_V2 = dict(
    UNET_V1, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
    dual_cross_attention=False, only_cross_attention=False, num_class_embeds=None,
    use_linear_projection=True, upcast_attention=True)
VAE_V1 = dict(
    OLD, _class_name="AutoencoderKL", act_fn="silu", block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4, in_channels=3, latent_channels=4,
    layers_per_block=2, norm_num_groups=32, out_channels=3, sample_size=512,
    up_block_types=["UpDecoderBlock2D"] * 4)
TEXT_V1 = dict(
    _name_or_path="openai/clip-vit-large-patch14", architectures=["CLIPTextModel"],
    attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act="quick_gelu",
    hidden_size=768, initializer_factor=1.0, initializer_range=0.02, intermediate_size=3072,
    layer_norm_eps=1e-05, max_position_embeddings=77, model_type="clip_text_model",
    num_attention_heads=12, num_hidden_layers=12, pad_token_id=1, projection_dim=768,
    torch_dtype="float32", transformers_version="4.22.0.dev0", vocab_size=49408)
TEXT_V2 = dict(
    TEXT_V1, hidden_act="gelu", hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
    num_hidden_layers=23, projection_dim=512)
V2_SCHEDULER = {**V1_SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": (UNET_V1, VAE_V1, TEXT_V1, V1_SCHEDULER),
    "runwayml/stable-diffusion-v1-5": (UNET_V1, VAE_V1, TEXT_V1, V1_SCHEDULER),
    "stabilityai/stable-diffusion-2": (
        dict(UNET_V2, sample_size=96), dict(VAE_V1, sample_size=768), TEXT_V2, V2_SCHEDULER),
    "stabilityai/stable-diffusion-2-1": (
        dict(UNET_V2, sample_size=96), dict(VAE_V1, sample_size=768, scaling_factor=0.18215),
        TEXT_V2, V2_SCHEDULER),
    "stabilityai/stable-diffusion-2-base": (
        UNET_V2, VAE_V1, TEXT_V2, dict(V1_SCHEDULER, prediction_type="epsilon")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_open(name):
    unet, vae, text, scheduler = PUBLISHED[name]
    parts = {part: built(part, configs.corrected(part, config)) for part, config in zip(
        ("unet", "vae", "text_encoder", "scheduler"), (unet, vae, text, scheduler))}
    assert parts["unet"].config["sample_size"] == unet["sample_size"]
    assert parts["unet"].config["cross_attention_dim"] == text["hidden_size"]
    assert parts["scheduler"].predicts_v == (scheduler.get("prediction_type") == "v_prediction")
    assert parts["scheduler"].timesteps(50)[-1] == 1


GENERATION = {  # what transformers 4.45 may write into any config
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "suppress_tokens": None,
    "exponential_decay_length_penalty": None, "begin_suppress_tokens": None}
REST_OF_4_45 = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False,
    "torchscript": False, "torch_dtype": "float16", "use_bfloat16": False, "tf_legacy_loss": False,
    "pruned_heads": {}, "tie_word_embeddings": True, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "finetuning_task": None,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tokenizer_class": None,
    "prefix": None, "sep_token_id": None, "decoder_start_token_id": None, "problem_type": None,
    "task_specific_params": None, "_attn_implementation_autoset": True}
SCHEDULERS = ("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete",
              "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
              "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")


def signature(cls):
    """{key: default}. A class that needs a package which is not installed here has none."""
    return {key: p.default for key, p in inspect.signature(cls).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD}


def reference_configs():
    """(name, part, config) with every key of the reference's classes, at its default."""
    yield "UNet", "unet", {**signature(diffusers.UNet2DConditionModel), "sample_size": 64}
    yield "VAE", "vae", signature(diffusers.AutoencoderKL)
    yield "text encoder", "text_encoder", CLIPTextConfig().to_dict()
    yield "text encoder of 4.45", "text_encoder", {**TEXT_V1, **GENERATION, **REST_OF_4_45}
    for name in SCHEDULERS:
        keys = signature(getattr(diffusers, f"{name}Scheduler"))
        yield name, "scheduler", {**keys, "clip_sample": False}


@pytest.mark.parametrize("name, part, config", reference_configs())
def test_every_key_of_the_reference_is_known(name, part, config):
    """With its default it opens. With another value it opens where the value counts or changes
    nothing. Else the line names both.
    """
    built(part, config)
    free = configs.HONOURED[part].keys() | configs.NO_EFFECT[part]
    for key in config.keys() - free:
        if not key.startswith("_"):
            line = refusal(configs.complete, part, {**config, key: "other"})
            assert line.startswith(f'{key} "other": '), line


@pytest.mark.parametrize("part, reference", [
    ("unet", signature(diffusers.UNet2DConditionModel)),
    ("vae", signature(diffusers.AutoencoderKL)),
    ("scheduler", signature(diffusers.DDIMScheduler)),
    ("text_encoder", CLIPTextConfig().to_dict()),
])
def test_absent_keys_have_the_defaults_of_the_reference(part, reference):
    assert {key: reference[key] for key in configs.HONOURED[part]} == configs.HONOURED[part]


@pytest.mark.parametrize("part, key, value", [
    # the issue's
    ("scheduler", "rescale_betas_zero_snr", True),
    ("scheduler", "trained_betas", [0.1] * 1000),
    ("scheduler", "prediction_type", "sample"),
    ("scheduler", "timestep_spacing", "log"),
    ("unet", "flip_sin_to_cos", False),
    # more of the kind
    ("scheduler", "thresholding", True),
    ("scheduler", "beta_schedule", "squaredcos_cap_v2"),
    ("scheduler", "beta_start", "0.00085"),
    ("scheduler", "beta_end", 12),
    ("scheduler", "use_flow_sigmas", True),
    ("scheduler", "timestep_type", "continuous"),
    ("scheduler", "a_key_of_2027", 1),
    ("unet", "freq_shift", 1),
    ("unet", "act_fn", "gelu"),
    ("unet", "act_fn", None),
    ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "class_embed_type", "timestep"),
    ("unet", "addition_embed_type", "text_time"),
    ("unet", "num_attention_heads", 8),
    ("unet", "attention_head_dim", [2, 4, 8]),
    ("unet", "attention_head_dim", 7),
    ("unet", "attention_head_dim", None),
    ("unet", "transformer_layers_per_block", [1, 2, 10, 10]),
    ("unet", "layers_per_block", [2, 2, 2, 2]),
    ("unet", "down_block_types", ["DownBlock2D"] * 3),
    ("unet", "up_block_types", ["AttnUpBlock2D"] * 4),
    ("unet", "mid_block_type", None),
    ("unet", "norm_num_groups", 5),
    ("unet", "cross_attention_dim", [32, 32, 64, 64]),
    ("vae", "act_fn", "relu"),
    ("vae", "use_quant_conv", False),
    ("vae", "mid_block_add_attention", False),
    ("vae", "shift_factor", 0.1),
    ("vae", "latents_mean", [0.1]),
    ("vae", "scaling_factor", 0),
    ("vae", "in_channels", 4),
    ("text_encoder", "hidden_act", "gelu_new"),
    ("text_encoder", "model_type", "clip"),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "num_hidden_layers", "12"),
    ("text_encoder", "quantization_config", {"load_in_8bit": True}),
])
def test_a_value_that_is_not_computed_here_is_refused_by_name(folder, part, key, value):
    change(folder, part, **{key: value})
    line = refusal(sd_mini.load, folder)
    assert line.startswith(f"{folder / PLACES[part]}: {key} {json.dumps(value)[:50]}"), line


def test_a_config_without_keys_is_refused(folder):
    for place in (*PLACES.values(), "model_index.json"):
        content = (folder / place).read_text()
        (folder / place).write_text("[]")
        assert str(folder) in refusal(sd_mini.load, folder)
        (folder / place).write_text(content)


SOLVER = dict(num_train_timesteps=500, beta_start=0.001, beta_end=0.01)


@pytest.mark.parametrize("config", [
    {},
    dict(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1),
    dict(SOLVER, timestep_spacing="linspace"),
    dict(SOLVER, timestep_spacing="trailing", prediction_type="v_prediction"),
])
def test_schedules_are_those_of_the_reference(config, generator):
    ours = Schedule(config)
    theirs = diffusers.DDIMScheduler(**{"clip_sample": False, **config})
    x, out = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for steps in (1, 3, 7, 30, 50, 333):
        theirs.set_timesteps(steps)
        timesteps, stride = ours.timesteps(steps), ours.config["num_train_timesteps"] // steps
        assert timesteps == theirs.timesteps.tolist()
        for t in timesteps[:: max(1, steps // 7)]:
            eps = ours.v_to_eps(out, x, t) if ours.predicts_v else out
            close(ours.ddim_step(x, eps, t, t - stride), theirs.step(out, t, x).prev_sample)


@pytest.mark.parametrize("sampler", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_a_pipeline_saved_with_another_sampler_draws_as_the_reference_with_ddim(v1, tmp_path,
                                                                               sampler):
    """Its config holds the sampler's own keys and its default spacing, linspace."""
    cls = getattr(diffusers, f"{sampler}Scheduler")
    cls.from_config(V1_SCHEDULER).save_pretrained(tmp_path / "scheduler")
    shutil.copytree(v1[1], tmp_path, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("scheduler"))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", f"{sampler}Scheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert_draws_as_the_reference(tmp_path, "linspace")


def test_old_configs_are_corrected_as_the_reference_corrects_them(folder):
    """Without an offset of the steps, with clipping; with the latent size of 2022."""
    change(folder, "scheduler", steps_offset=..., clip_sample=True)
    assert_draws_as_the_reference(folder, "leading")
    for version, size in (("0.2.2", 64), ("0.8.1", 64), ("0.9.0", 32), ("0.10.2", 32)):
        change(folder, "unet", _diffusers_version=version, sample_size=32)
        made = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        assert sd_mini.load(folder).latent_shape == (4, size, size)
        assert made.unet.config.sample_size == size


def assert_draws_as_the_reference(folder, spacing):
    made = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    if not isinstance(made.scheduler, diffusers.DDIMScheduler):
        made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
    assert made.scheduler.config.timestep_spacing == spacing
    made.set_progress_bar_config(disable=True)
    assert_same_picture(sd_mini.load(folder), made)


@pytest.mark.parametrize("changes", [
    dict(norm_eps=0.01, norm_num_groups=16),
    dict(attention_head_dim=[1, 2, 4, 8], layers_per_block=1),
    dict(cross_attention_dim=8, use_linear_projection=True),
])
def test_honoured_keys_of_the_unet_compute_as_the_reference(changes, generator):
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(**{**UNETS["v1"], **changes})
    ours = UNet(dict(reference.config))
    ours.load_state_dict(reference.state_dict())
    context = torch.randn(2, 5, reference.config.cross_attention_dim, generator=generator)
    x_t, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 900])
    with torch.no_grad():
        close(ours(x_t, t, context), reference(x_t, t, context).sample)


@pytest.mark.parametrize("changes", [dict(layer_norm_eps=0.01), dict(hidden_act="gelu")])
def test_honoured_keys_of_the_text_encoder_compute_as_the_reference(changes):
    torch.manual_seed(0)
    reference = CLIPTextModel(CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8, **changes)).eval()
    ours = TextEncoder(reference.config.to_dict())
    ours.load_state_dict({name.removeprefix("text_model."): tensor
                          for name, tensor in reference.state_dict().items()})
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        close(ours(ids), reference(ids).last_hidden_state)


# --- parts that do not fit together

def test_a_tokenizer_with_more_tokens_than_the_text_encoder(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<sks>", "<style>"])
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    line = refusal(sd_mini.load, folder)
    assert "text_encoder/config.json: vocab_size 710" in line
    assert "the tokenizer beside it has 712 tokens" in line


@pytest.mark.parametrize("part, keys, message", [
    ("unet", {"sample_size": 12}, "unet/config.json: sample_size 12: must be a multiple of 8"),
    ("unet", {"sample_size": [8, 8]}, "sample_size [8, 8]: must be a multiple of 8"),
    ("unet", {"sample_size": ...}, "sample_size null: must be a multiple of 8"),
    ("unet", {"cross_attention_dim": 48},
     "unet/config.json: cross_attention_dim 48: the text encoder's hidden_size is 32"),
    ("unet", {"in_channels": 9}, "in_channels 9: the VAE's latent_channels is 4"),
    ("vae", {"latent_channels": 16}, "in_channels 4: the VAE's latent_channels is 16"),
    ("unet", {"out_channels": 8}, "out_channels 8: the VAE's latent_channels is 4"),
])
def test_parts_of_different_models_are_refused(folder, part, keys, message):
    change(folder, part, **keys)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")  # it is said before any weights are read
    assert message in refusal(sd_mini.load, folder)


def test_a_text_encoder_with_clips_projection_opens(v1, folder):
    """CLIPTextModelWithProjection saves one tensor more."""
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    model.save_pretrained(folder / "text_encoder")
    path = folder / "text_encoder/model.safetensors"
    assert "text_projection.weight" in load_file(path)
    sd, ids = sd_mini.load(folder), torch.arange(24)[None]
    reference = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    close(sd.text_encoder(ids), reference(ids).last_hidden_state)
    rewrite(path, lambda tensors: tensors | {"text_model.text_projection.bias": torch.zeros(1)})
    assert "text_projection.bias does not belong there" in refusal(sd_mini.load, folder)


# --- a path is never taken for something else

def test_names_with_the_hubs_signs_open_where_they_exist(v1, tmp_path):
    for name in ("C:me@host", "someone/tiny@main:church"):
        folder = tmp_path / name
        shutil.copytree(v1[1], folder)
        assert_same_networks(sd_mini.load(folder), v1[0])
        encoder, ids = sd_mini.load_text_encoder(str(folder)), torch.arange(24)[None]
        close(encoder(ids), v1[0].text_encoder(ids).last_hidden_state)


def test_a_folder_before_the_hub_and_before_the_toy(v1, hub, tmp_path, monkeypatch):
    """A relative folder is named as a hub id is; a Path says what a word does not."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, "someone/tiny")
    assert sd_mini.load(hub).latent_shape == (4, 16, 16)
    shutil.copytree(v1[1], "toy")
    for path in (tmp_path / "toy", (tmp_path / "toy").relative_to(tmp_path), "./toy"):
        assert sd_mini.load(path).latent_shape == (4, 8, 8)


def test_only_files_are_pickles(v1, tmp_path):
    for name in ("model.pt", "fine.tuned.ckpt"):
        shutil.copytree(v1[1], tmp_path / name)
        assert_same_networks(sd_mini.load(tmp_path / name), v1[0])
    (tmp_path / "file.pt").write_bytes(b"x")
    assert "file.pt: a pickle" in refusal(sd_mini.load, tmp_path / "file.pt")
    unet = tmp_path / "model.pt/unet"
    next(unet.glob("*.safetensors")).unlink()
    (unet / "old.pt").mkdir()
    line = refusal(sd_mini.load, tmp_path / "model.pt")
    assert "unet/diffusion_pytorch_model.safetensors: no such file" in line


def test_a_file_where_a_folder_is_wanted(v1, tmp_path):
    path = v1[1] / "text_encoder/model.safetensors"
    line = refusal(sd_mini.load_text_encoder, path)
    assert line == f"{path}: a file, where a folder with the configs is wanted, or a hub id"
    save_file(to_original(v1[0]), tmp_path / "tune.safetensors")
    vocabulary = v1[1] / "tokenizer/vocab.json"
    line = refusal(sd_mini.load, tmp_path / "tune.safetensors", tokenizer=str(vocabulary))
    assert line.startswith(f"{vocabulary}: a file, where a folder")


@pytest.mark.parametrize("missing, message", [
    ("tokenizer", "tokenizer: no tokenizer there"),
    ("scheduler", "scheduler/scheduler_config.json: no such file"),
    ("vae", "vae/config.json: no such file"),
    ("tokenizer/vocab.json", "tokenizer: no tokenizer there: neither vocab.json"),
    ("tokenizer/merges.txt", "tokenizer: not a whole CLIP tokenizer"),
])
def test_a_model_folder_that_lacks_a_part_says_which(folder, missing, message):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert message in refusal(sd_mini.load, folder)


@pytest.mark.parametrize("model, config", [
    (models.WordPiece({"[UNK]": 0, "photo": 1}, unk_token="[UNK]"), {"unk_token": "[UNK]"}),
    (models.Unigram([("<unk>", 0.0), ("photo", -1.0)], unk_id=0), {"unk_token": "<unk>"}),
    (models.BPE({"a": 0, "photo": 1}, []), {}),  # as GPT-2's, whose words do not end in </w>
])
def test_a_tokenizer_of_another_kind_is_refused(folder, model, config):
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer(model).save(str(folder / "tokenizer/tokenizer.json"))
    assert "/tokenizer: no" in refusal(sd_mini.load, folder)  # no CLIP tokenizer, or no whole one


@pytest.mark.parametrize("length, context", [(20, 20), (40, 24)])
def test_of_tokenizer_and_text_encoder_the_shorter_counts(v1, folder, monkeypatch, length, context):
    path = folder / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))
    sd = sd_mini.load(folder)
    monkeypatch.setattr(v1[0].tokenizer, "model_max_length", context)
    assert sd.tokenize(["a church"]).shape == (1, context)
    assert_same_picture(sd, v1[0])


def test_a_broken_tokenizer_is_one_line(folder):
    (folder / "tokenizer/vocab.json").write_text('{"a": ')
    line = refusal(sd_mini.load, folder)
    assert line.startswith(f"{folder}/tokenizer: not a whole CLIP tokenizer")


def test_a_single_file_offline_says_what_it_needs(v1, hub, tmp_path):
    path = tmp_path / "tune.safetensors"
    save_file(to_original(v1[0]), path)
    line = refusal(sd_mini.load, path)
    assert line.startswith(f"{path}: a single file holds no tokenizer and no configs")
    assert "--tokenizer" in line
    line = refusal(sd_mini.load, path, tokenizer="someone/else")  # what was named is blamed alone
    assert line.startswith("someone/else: no such folder here")
    assert_same_networks(sd_mini.load(path, tokenizer=hub), v1[0])


# --- what is written: the umask decides who may read

@pytest.mark.skipif(os.name == "nt", reason="there is no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_reads_what_is_written(sd, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        sd_mini.save_pipeline(sd, tmp_path / "model")
        sd_mini.save_single_file(sd, tmp_path / "model/one.safetensors")
        write_atomically(tmp_path / "model/text", lambda path: path.write_text("x"))
        for left in ("old.json", "old.json.part"):  # by an earlier, killed run
            (tmp_path / "model" / left).touch(0o600)
        sd_mini.write_json(tmp_path / "model/old.json", {})
    finally:
        os.umask(before)
    copied = {"tokenizer", "scheduler"}  # these keep the modes that they have
    written = [path for path in (tmp_path / "model").rglob("*")
               if path.is_file() and path.parent.name not in copied]
    assert len(written) == 10
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in written} == dict.fromkeys(
        written, mode)


# --- one file in the original layout

@pytest.fixture(scope="module")
def single(v1, tmp_path_factory):
    """A small pipeline -> sd_mini -> one file."""
    sd, path = sd_mini.load(v1[1]), tmp_path_factory.mktemp("single") / "new/tune.safetensors"
    sd_mini.save_single_file(sd, path)
    return sd, path


def test_a_single_file_is_read_back_as_it_was(v1, single):
    sd, path = single
    again = sd_mini.load(path, tokenizer=v1[1])
    for part in PARTS:
        ours, theirs = getattr(sd, part).state_dict(), getattr(again, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_single_file_has_the_names_and_shapes_of_the_layout(v1, single):
    written, expected = load_file(single[1]), to_original(v1[0])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    with safe_open(single[1], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_reference_opens_a_single_file_and_draws_the_same(v1, single):
    """Its converters give the networks' tensors, equal; a pipeline of these draws our picture."""
    from diffusers.loaders import single_file_utils as convert

    (made, _), (sd, path) = v1, single
    again, tensors = pipeline("v1"), load_file(path)
    for parameter in (*again.unet.parameters(), *again.vae.parameters(),
                      *again.text_encoder.parameters()):
        parameter.data.zero_()
    unet = convert.convert_ldm_unet_checkpoint(dict(tensors), dict(made.unet.config))
    vae = convert.convert_ldm_vae_checkpoint(dict(tensors), dict(made.vae.config))
    text = convert.convert_ldm_clip_checkpoint(dict(tensors))
    prefix = next(iter(made.text_encoder.state_dict())).startswith("text_model.")
    text = text if prefix else {k.removeprefix("text_model."): v for k, v in text.items()}
    for part, converted in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        expected = {name: tensor for name, tensor in getattr(made, part).state_dict().items()
                    if not name.endswith("position_ids")}
        assert converted.keys() == expected.keys()
        shaped = {name: tensor.reshape(expected[name].shape) for name, tensor in converted.items()}
        assert all(torch.equal(shaped[name], expected[name]) for name in expected)
        getattr(again, part).load_state_dict(shaped, strict=part != "text_encoder")
    picture = again("a photo of a church", latents=sd.initial_noise([5]), num_inference_steps=10,
                    output_type="pt").images
    assert (sd.sample(["a photo of a church"], 5, 10, 7.5) - picture).abs().max() < 1e-4


def test_a_single_file_at_full_size():
    """Names and shapes of a v1 checkpoint: counts, and some of each part."""
    networks = {part: built(part, config) for part, config in V1.items()}
    found = {name: tuple(tensor.shape) for name, tensor in original.tensors(networks).items()}
    counts = {root: sum(name.startswith(root) for name in found)
              for root in ("model.diffusion_model.", "first_stage_model.",
                           "cond_stage_model.transformer.text_model.")}
    assert list(counts.values()) == [686, 248, 196] and len(found) == 686 + 248 + 196
    expected = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.8.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.2.emb_layers.1.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.bias": (320,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.mid.attn_1.norm.weight": (512,),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.norm_out.weight": (128,),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    }
    assert {name: found.get(name) for name in expected} == expected


def test_the_full_size_names_are_those_that_the_reference_asks_for():
    """Its converters, given our names on the meta device, find all tensors of its networks."""
    from diffusers.loaders import single_file_utils as convert

    networks = {part: built(part, config) for part, config in V1.items()}
    tensors = original.tensors(networks)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**V1["unet"])
        vae = diffusers.AutoencoderKL(**V1["vae"])
    converted = convert.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))
    assert ({name: tensor.shape for name, tensor in converted.items()}
            == {name: tensor.shape for name, tensor in unet.state_dict().items()})
    converted = convert.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))
    assert converted.keys() == vae.state_dict().keys()


def test_a_single_file_without_text_model_in_its_names_opens(v1, tmp_path):
    """As early merges have it; and with CLIP's projection."""
    start = "cond_stage_model.transformer."
    tensors = {name.replace(start + "text_model.", start): tensor
               for name, tensor in to_original(v1[0]).items()}
    tensors[start + "text_projection.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "tune.safetensors")
    assert_same_networks(sd_mini.load(tmp_path / "tune.safetensors", tokenizer=v1[1]), v1[0])


def test_a_single_file_is_written_for_1_x_alone(tmp_path):
    pipeline("v2").save_pretrained(tmp_path / "v2")
    sd = sd_mini.load(tmp_path / "v2")
    line = refusal(sd_mini.save_single_file, sd, tmp_path / "one.safetensors")
    assert line.startswith(f"{tmp_path}/v2: made like Stable Diffusion 2.x; one file in the")
    assert not (tmp_path / "one.safetensors").exists()
