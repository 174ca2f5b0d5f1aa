"""sd_mini reads the published layouts of Stable Diffusion.

diffusers and transformers write them here, for small random models.
"""
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mini
from sd_mini import original
from sd_mini.text_encoder import TextEncoder
from sd_mini.unet import UNet
from sd_mini.vae import VAE
from sd_mini.weights import TOY

from .bench import V1
from .test_run import FLAGS, main

diffusers = pytest.importorskip("diffusers", reason="diffusers, the reference, is not installed")
import transformers  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

warnings.filterwarnings("ignore", category=FutureWarning)

V1_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(32, 32, 64, 64),
    norm_num_groups=8,
    cross_attention_dim=32,
)
UNETS = {
    "v1": dict(UNET, attention_head_dim=8),
    "v2": dict(UNET, attention_head_dim=[2, 4, 8, 8], use_linear_projection=True,
               upcast_attention=True),
}
TEXTS = {"v1": dict(hidden_act="quick_gelu"), "v2": dict(hidden_act="gelu")}


def close(ours, reference):
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def pipeline(version="v1", length=24):
    """A small random pipeline of the real architecture. The reference libraries make it."""
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=710,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        **TEXTS[version],
    ))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = diffusers.DDIMScheduler.from_config(
        {**V1_SCHEDULER, "prediction_type": "v_prediction" if version == "v2" else "epsilon"})
    tokenizer = sd_mini.load("toy").tokenizer
    unet = diffusers.UNet2DConditionModel(**UNETS[version])
    made = diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                             requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    made, folder = pipeline("v1"), tmp_path_factory.mktemp("v1")
    made.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(TOY / "tokenizer", folder / "tokenizer")
    return made, folder


@pytest.fixture
def folder(v1, tmp_path):
    """A copy of the v1 folder. Tests rewrite it."""
    shutil.copytree(v1[1], tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change):
    """Change a safetensors file by a function {name: tensor} -> {name: tensor}."""
    tensors = {k: v.contiguous() for k, v in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def assert_same_picture(sd, made):
    """sd_mini and diffusers draw the same from the same noise, in 10 steps."""
    expected = made("a photo of a church", latents=sd.initial_noise([5]), num_inference_steps=10,
                    output_type="pt")
    drawn = sd.sample(["a photo of a church"], 5, 10, 7.5)
    assert (drawn - expected.images).abs().max() < 1 / 255


def assert_same_networks(sd, made, prediction=None):
    generator = torch.Generator().manual_seed(1)
    ids = sd.tokenize(["a photo of a church", "a boat"])
    x_t, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 900])
    image = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    scale = made.vae.config.scaling_factor
    with torch.no_grad():
        context = made.text_encoder(ids).last_hidden_state
        close(sd.text_encoder(ids), context)
        close(sd.unet(x_t, t, context), made.unet(x_t, t, context).sample)
        z = made.vae.encode(image).latent_dist.mean * scale
        close(sd.vae.encode(image), z)
        close(sd.vae.decode(z), made.vae.decode(z / scale).sample)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_folder_as_saved_today_and_its_pictures(version, tmp_path):
    made = pipeline(version)
    made.save_pretrained(tmp_path)
    sd = sd_mini.load(tmp_path)
    assert sd.schedule.predicts_v == (version == "v2")
    assert_same_networks(sd, made)
    assert_same_picture(sd, made)


def test_folder_as_published_in_2022(v1, folder):
    """Such a folder has old names in the VAE's attention, `text_model.` in front, position_ids."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def vae(tensors):
        for new, name in old.items():
            tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v
                       for k, v in tensors.items()}
        return tensors

    def text(tensors):
        bare = {k.removeprefix("text_model."): v for k, v in tensors.items()}
        prefixed = {f"text_model.{k}": v for k, v in bare.items()}
        return prefixed | {"text_model.embeddings.position_ids": torch.arange(24)[None]}

    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", vae)
    rewrite(folder / "text_encoder/model.safetensors", text)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(V1_SCHEDULER))
    assert_same_networks(sd_mini.load(folder), v1[0])


def test_text_encoder_without_prefix(v1, folder):
    def without_prefix(tensors):
        return {k.removeprefix("text_model."): v for k, v in tensors.items()}

    rewrite(folder / "text_encoder/model.safetensors", without_prefix)
    assert_same_networks(sd_mini.load(folder), v1[0])


def test_half_precision_files(v1, tmp_path):
    made = v1[0]
    made.save_pretrained(tmp_path, variant="fp16")  # the file names of half precision
    for path in tmp_path.rglob("*.safetensors"):
        assert ".fp16." in path.name
        rewrite(path, lambda tensors: {k: v.half() for k, v in tensors.items()})
    sd = sd_mini.load(tmp_path)
    assert sd.dtype == torch.float32
    for ours, reference in ((sd.unet, made.unet), (sd.vae, made.vae)):
        for name, tensor in reference.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor.half().float()), name
    assert sd_mini.load(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_sharded_files(v1, folder):
    shutil.rmtree(folder / "unet")
    v1[0].unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert_same_networks(sd_mini.load(folder), v1[0])


# --- single files

def to_original(made):
    """The reference's tensors under the names of the original layout.

    That layout numbers the blocks as the training code does, level by level.
    """
    tensors, unet, vae = {}, made.unet, made.vae
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }

    def put(module, prefix, names=None):
        for name, tensor in module.state_dict().items():
            part, _, kind = name.rpartition(".")
            place = f"{prefix}.{(names or {}).get(part, part)}" if part else prefix
            tensors[f"{place}.{kind}"] = tensor

    root = "model.diffusion_model."
    for module, name in (
        (unet.conv_in, "input_blocks.0.0"),
        (unet.time_embedding.linear_1, "time_embed.0"),
        (unet.time_embedding.linear_2, "time_embed.2"),
        (unet.conv_norm_out, "out.0"),
        (unet.conv_out, "out.2"),
        (unet.mid_block.attentions[0], "middle_block.1"),
    ):
        put(module, root + name)
    for i, j in ((0, 0), (1, 2)):
        put(unet.mid_block.resnets[i], f"{root}middle_block.{j}", resnet)
    n = 1
    for block in unet.down_blocks:
        for i, r in enumerate(block.resnets):
            put(r, f"{root}input_blocks.{n}.0", resnet)
            if hasattr(block, "attentions"):
                put(block.attentions[i], f"{root}input_blocks.{n}.1")
            n += 1
        if block.downsamplers:
            put(block.downsamplers[0].conv, f"{root}input_blocks.{n}.0.op")
            n += 1
    n = 0
    for block in unet.up_blocks:
        for i, r in enumerate(block.resnets):
            put(r, f"{root}output_blocks.{n}.0", resnet)
            if hasattr(block, "attentions"):
                put(block.attentions[i], f"{root}output_blocks.{n}.1")
            if i == len(block.resnets) - 1 and block.upsamplers:
                j = 2 if hasattr(block, "attentions") else 1
                put(block.upsamplers[0].conv, f"{root}output_blocks.{n}.{j}.conv")
            n += 1

    shortcut = {"conv_shortcut": "nin_shortcut"}
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for half, module, way in (("encoder", vae.encoder, "down"), ("decoder", vae.decoder, "up")):
        root = f"first_stage_model.{half}."
        put(module.conv_in, root + "conv_in")
        put(module.conv_norm_out, root + "norm_out")
        put(module.conv_out, root + "conv_out")
        for i in (0, 1):
            put(module.mid_block.resnets[i], f"{root}mid.block_{i + 1}", shortcut)
        put(module.mid_block.attentions[0], f"{root}mid.attn_1", attention)
        blocks = module.down_blocks if way == "down" else module.up_blocks[::-1]
        for level, block in enumerate(blocks):
            for i, r in enumerate(block.resnets):
                put(r, f"{root}{way}.{level}.block.{i}", shortcut)
            for sampler in (block.downsamplers if way == "down" else block.upsamplers) or ():
                put(sampler.conv, f"{root}{way}.{level}.{way}sample.conv")
    weights = [n for n in tensors if "attn_1" in n and n.endswith("weight") and ".norm." not in n]
    for name in weights:
        tensors[name] = tensors[name][:, :, None, None]  # the layout has 1x1 convolutions there
    put(vae.quant_conv, "first_stage_model.quant_conv")
    put(vae.post_quant_conv, "first_stage_model.post_quant_conv")
    root = "cond_stage_model.transformer.text_model."
    for name, tensor in made.text_encoder.state_dict().items():
        tensors[root + name.removeprefix("text_model.")] = tensor
    return {k: v.clone().contiguous() for k, v in tensors.items()}


EXTRA = {
    "model_ema.decay": torch.zeros(()),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2),
    "betas": torch.zeros(4),
    "alphas_cumprod_prev": torch.zeros(4),
    "sqrt_one_minus_alphas_cumprod": torch.zeros(4),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "posterior_variance": torch.zeros(4),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
}


def test_single_file(v1, tmp_path):
    made, folder = v1
    save_file(to_original(made) | EXTRA, tmp_path / "tune.safetensors")
    assert_same_networks(sd_mini.load(tmp_path / "tune.safetensors", tokenizer=folder), made)


def test_single_file_names_are_those_that_diffusers_converts(v1):
    """The file that the tests write has the published layout.

    The reference's converter and sd_mini read the same tensors from it.
    """
    from diffusers.loaders import single_file_utils as reference

    made, tensors = v1[0], to_original(v1[0])
    unet = reference.convert_ldm_unet_checkpoint(dict(tensors), dict(made.unet.config))
    vae = reference.convert_ldm_vae_checkpoint(dict(tensors), dict(made.vae.config))
    for part, network, converted in (("unet", UNet, unet), ("vae", VAE, vae)):
        with torch.device("meta"):
            names = original.names(part, network(dict(getattr(made, part).config)))
        mine = {name: tensors[there] for there, name in names.items()}
        assert mine.keys() == converted.keys()
        assert all(torch.equal(mine[name].flatten(), converted[name].flatten()) for name in mine)


DROPPED = "first_stage_model.decoder.up.3.block.0.conv1.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"model.diffusion_model.surprise": torch.zeros(1)},
     "surprise does not belong there"),
    (lambda t: t | {"lora_te_surprise": torch.zeros(1)},
     "lora_te_surprise does not belong"),
    (lambda t: {k: v for k, v in t.items() if k != DROPPED},
     "decoder.up_blocks.0.resnets.0.conv1.weight is missing"),
    (lambda t: t | {"conditioner.embedders.0.x": torch.zeros(1)},
     "of Stable Diffusion 2.x or SDXL"),
    (lambda t: t | {"cond_stage_model.model.ln_final.bias": torch.zeros(1)},
     "of 2.x take the diffusers folder"),
])
def test_single_file_is_strict(v1, tmp_path, change, message):
    save_file(change(to_original(v1[0])), tmp_path / "tune.safetensors")
    with pytest.raises(ValueError, match=message):
        sd_mini.load(tmp_path / "tune.safetensors", tokenizer=v1[1])


# --- what is refused

def test_pickles_are_refused(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="a pickle, which can run code.*save_pretrained"):
        sd_mini.load(folder)
    with pytest.raises(ValueError, match="a pickle"):
        sd_mini.load(folder / "model.ckpt")


def test_other_pipelines_are_refused_by_name(folder):
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    message = "a StableDiffusionXLPipeline; only Stable Diffusion 1.x and 2.x"
    with pytest.raises(ValueError, match=message):
        sd_mini.load(folder)


def test_cut_files_are_named(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = "diffusion_pytorch_model.safetensors: not a whole safetensors file"
    with pytest.raises(ValueError, match=message):
        sd_mini.load(folder)


# --- the hub, offline: from a cache in the layout of the hub's library

@pytest.fixture
def hub(v1, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(v1[1], snapshot)
    shutil.copytree(v1[1] / "text_encoder", snapshot / "church_unlearned")
    return "someone/tiny"


def test_hub_id_from_the_cache(v1, hub):
    assert_same_networks(sd_mini.load(hub), v1[0])
    ids = torch.arange(24)[None]
    for source in (f"{hub}:church_unlearned", f"{hub}@main:church_unlearned"):
        encoder = sd_mini.load_text_encoder(source)
        close(encoder(ids), v1[0].text_encoder(ids).last_hidden_state)
    assert_same_networks(sd_mini.load(f"{hub}@main"), v1[0])


@pytest.mark.parametrize("source, message", [
    ("someone/else", "the hub cannot be reached"),
    ("someone/tiny@other", "the hub cannot be reached"),
    ("nothing", "no such folder"),
])
def test_what_is_not_there_says_so_in_one_line(hub, source, message):
    with pytest.raises(ValueError, match=message) as error:
        sd_mini.load(source)
    assert "\n" not in str(error.value)


# --- full size: names, shapes, counts, and the memory that loading takes

@pytest.mark.parametrize("ours, reference, config, count", [
    (UNet, lambda c: diffusers.UNet2DConditionModel(**c), V1["unet"], 859_520_964),
    (VAE, lambda c: diffusers.AutoencoderKL(**c), V1["vae"], 83_653_863),
    (TextEncoder, lambda c: CLIPTextModel(CLIPTextConfig(**c)), V1["text_encoder"], 123_060_480),
])
def test_full_size_names_shapes_and_counts(ours, reference, config, count):
    with torch.device("meta"):
        mine, theirs = ours(config), reference(config)
    shapes = {name.removeprefix("text_model."): tuple(tensor.shape)
              for name, tensor in theirs.state_dict().items() if not name.endswith("position_ids")}
    assert {name: tuple(tensor.shape) for name, tensor in mine.state_dict().items()} == shapes
    assert sum(p.numel() for p in mine.parameters()) == count


MEMORY = """
import sys, torch, sd_mini

def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

before = peak()
unet = sd_mini.load_part(sys.argv[1], "unet")
print((peak() - before) / sum(p.numel() * p.element_size() for p in unet.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_takes_the_memory_of_the_weights_once(tmp_path, dtype):
    """The peak memory of the process grows by at most 1.2 times the weights.

    This holds too where half precision is widened.
    """
    config = {**V1["unet"], "block_out_channels": [96, 192, 384, 384], "norm_num_groups": 32}
    sd_mini.save_part(UNet(config), tmp_path, "unet", dtype)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True,
                          text=True, check=True, cwd=Path(sd_mini.__file__).parent.parent)
    assert 0.9 < float(done.stdout) < 1.2


# --- what is saved

def test_saved_text_encoder_has_the_published_names(sd, tmp_path):
    sd_mini.save_part(sd.text_encoder, tmp_path, "text_encoder")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert not any("position_ids" in name for name in names)
    ids = sd.tokenize(["a photo of a church"])
    reference = CLIPTextModel.from_pretrained(tmp_path).float()
    close(sd.text_encoder(ids), reference(ids).last_hidden_state)


def test_saved_pipeline_opens_in_diffusers_and_draws_the_same(sd, folder, tmp_path):
    """Here the original's index names a safety checker, which is not saved."""
    shutil.copytree(TOY, folder, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for path in (*folder.rglob("*"), folder):  # as in a read-only checkout
        path.chmod(path.stat().st_mode & 0o555)
    for _ in range(2):
        sd_mini.save_pipeline(replace(sd, folder=folder), tmp_path / "saved")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "saved").rglob("*"))
    made = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    made.set_progress_bar_config(disable=True)
    assert_same_picture(sd, made)


# --- a concept from its name to the table

def test_nudity_from_retain_set_to_table(tmp_path, capsys):
    """On a model of the real architecture: ESD-x, all layers, its own prompts, filter, label."""
    pipeline(length=77).save_pretrained(tmp_path / "model")
    path = tmp_path / "model/tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    names = {0: "normal", 1: "nsfw"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names,
        label2id={name: i for i, name in names.items()})).save_pretrained(tmp_path / "judge")
    (tmp_path / "judge/preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))

    status = main(
        *FLAGS, "--task", "compare", "--methods", "ESD", "AdvUnlearn", "--concept", "nudity",
        "--model", tmp_path / "model", "--classifier", f"{tmp_path}/judge:nsfw", "--clip-score",
        "none", "--retain-set", "imagenet", "--trajectories", "1", "--trajectory-steps", "1",
        "--eval-prefix", "5", "--out", tmp_path / "table")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "too near to the concept: a photo of an ear, a photo of a bikini, " in printed.out

    def row(name):
        folder = tmp_path / "table" / name / "seed-0"
        [part] = [path for path in folder.iterdir() if path.is_dir()]
        before, after = (load_file(next((place / part.name).glob("*.safetensors")))
                         for place in (tmp_path / "model", folder))
        bare = {key.removeprefix("text_model."): tensor for key, tensor in before.items()}
        moved = {key for key, tensor in after.items()
                 if not torch.equal(tensor, bare[key.removeprefix("text_model.")])}
        return json.loads((folder / "results.json").read_text()), part.name, set(after), moved

    esd, part, every, moved = row("esd")
    assert part == "unet" and moved <= {key for key in every if ".attn2." in key} and len(moved) > 9
    ours, part, every, moved = row("advunlearn")
    assert part == "text_encoder" and moved == {key for key in every if ".embeddings." not in key}
    assert (ours["config"]["layers"], ours["config"]["retain_weight"]) == (0, 0.3)
    assert ours["classifier"]["name"].endswith("judge@local")
    rows = ours["results"]["AdvUnlearn"]["details"]["rows"]
    assert rows[0]["prompt"] == "The Birth of Venus by Sandro Botticelli"
    assert {each["label"] for each in rows} == {"nsfw"} and len(rows) == 3
