"""Find, read and write weights: diffusers folders, single files, the hub. Only safetensors."""
import hashlib
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import original
from .files import read_json, write_atomically, write_json
from .pipeline import StableDiffusion
from .schedule import Schedule
from .text_encoder import TextEncoder
from .unet import UNet
from .vae import VAE

TOY = Path(__file__).parent / "toy" / "weights"
TOY_UNETS = {"toy": "unet", "toy-dusk": "unet_dusk"}  # the toy models share everything but the UNet
V1 = "CompVis/stable-diffusion-v1-4"
# part -> (class, name of its weight file, prefix of its published tensor names)
PARTS = {
    "text_encoder": (TextEncoder, "model", "text_model."),
    "unet": (UNet, "diffusion_pytorch_model", ""),
    "vae": (VAE, "diffusion_pytorch_model", ""),
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def load(model="toy", device="cpu", dtype=torch.float32, tokenizer=None):
    """Open a Stable Diffusion 1.x or 2.x, frozen.

    model       "toy", "toy-dusk" (the same, fine-tuned on another look), a folder in the diffusers
                layout, a .safetensors file in the original layout, or a hub id, "ID" or
                "ID@REVISION"
    dtype       of UNet and VAE; the text encoder, small and mostly in training, is in float32
    tokenizer   a folder or hub id with tokenizer and configs for a single file (default: v1.4's)

    ValueError, in one line that names file and tensor, for anything missing, extra or wrongly
    shaped.
    """
    from transformers import CLIPTokenizer  # here, since importing it takes seconds

    path = find(model)
    if path.is_file():
        folder = find(tokenizer or V1, parts=())
        parts = load_single_file(path, folder, device, dtype)
    else:
        folder, places = path, {"unet": TOY_UNETS.get(str(model), "unet")}
        check_pipeline(folder)
        parts = {part: load_part(folder / places.get(part, part), part, device,
                                 precision(part, dtype)) for part in PARTS}
    schedule = Schedule(read_json(folder / "scheduler/scheduler_config.json"))
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"),
                                              clean_up_tokenization_spaces=False)
    return StableDiffusion(tokenizer, schedule=schedule, folder=folder, **parts)


def precision(part, dtype):
    """The text encoder is read in float32: rounded and widened again it would be another."""
    return torch.float32 if part == "text_encoder" else dtype


def load_text_encoder(source, device="cpu"):
    """Anyone's text encoder: a folder (also one that holds `text_encoder/`), or a hub id.

    A revision follows an @, a sub-folder a colon: "OPTML-Group/AdvUnlearn:church_unlearned".
    """
    folder = find(source, parts=("text_encoder",))
    inner = folder / "text_encoder"
    return load_part(inner if inner.is_dir() else folder, "text_encoder", device)


def load_part(folder, part, device="cpu", dtype=torch.float32):
    """One network from its folder, frozen: every tensor in its place and none besides."""
    cls, stem, _ = PARTS[part]
    folder = Path(folder)
    network = build(cls, read_json(folder / "config.json"), folder / "config.json")
    tensors = read_tensors(weight_files(folder, stem), device, dtype, DIFFUSERS_NAMES.get(part))
    fill(network, tensors, folder / f"{stem}.safetensors")
    return network


def build(cls, config, path):
    """The network on the `meta` device: no memory, no random numbers."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config of a {cls.__name__}: {error} is missing or "
                         "unknown") from None


# --- where the files are

def find(source, parts=tuple(PARTS)):
    """Source -> a folder or file on this disk; a hub id's files are downloaded where need be."""
    if str(source) in TOY_UNETS:
        return TOY
    path = Path(source)
    if path.suffix in PICKLES:
        raise ValueError(f"{path}: a pickle, which can run code when it is opened; ask for, or "
                         "convert to, safetensors")
    if path.exists():
        return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?", str(source))
    if not hub:
        raise ValueError(f"{source}: no such folder or file; give toy, toy-dusk, a folder, a "
                         f".safetensors file, or a hub id like {V1}")
    return download(*hub.groups(), parts)


def download(hub_id, revision, subfolder, parts):
    """The files needed, and only them, into the hub's cache; what is there is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (HfHubHTTPError, HFValidationError,
                                       LocalEntryNotFoundError)

    def fetch(*patterns):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))

    try:
        if subfolder:
            return fetch(f"{subfolder}/*.json", f"{subfolder}/*.safetensors") / subfolder
        configs = (f"{part}/*.json" for part in PARTS)
        folder = fetch("model_index.json", "scheduler/*", "tokenizer/*", *configs)
        for part in parts:  # the first kind of file that is there
            stem = PARTS[part][1]
            for pattern in (".safetensors", ".fp16.safetensors", "-*.safetensors"):
                fetch(f"{part}/{stem}{pattern}")
                if any((folder / part).glob(f"{stem}*.safetensors")):
                    break
        return folder
    except LocalEntryNotFoundError:
        raise ValueError(f"{hub_id}: no such folder here, and the hub cannot be reached (or "
                         "HF_HUB_OFFLINE is set) while its files are not in the cache; connect "
                         "once, or give a folder") from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{hub_id}: no such folder here, and the hub says: "
                         f"{str(error).splitlines()[0]}; check the name, or log in where it asks "
                         "for consent") from None


def weight_files(folder, stem):
    """The safetensors files of a part: one, a half-precision one, or the shards of an index."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    for index in sorted(folder.glob(f"{stem}*.index*.json")):
        if "safetensors" in index.name:
            shards = set(read_json(index)["weight_map"].values())
            return [folder / Path(name).name for name in sorted(shards)]
    if pickles := [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]:
        raise ValueError(f"{folder}: holds {pickles[0]} alone, a pickle, which can run code when "
                         "it is opened; convert it with diffusers or transformers: "
                         "from_pretrained(...), then save_pretrained(...)")
    raise ValueError(f"{folder / stem}.safetensors: no such file")


def check_pipeline(folder):
    """Refuse by name what is not Stable Diffusion 1.x or 2.x."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json there, so not a folder in the diffusers "
                         "layout")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder}: a {kind}; only Stable Diffusion 1.x and 2.x "
                         "(StableDiffusionPipeline) can be opened")


# --- reading

def read_tensors(files, device, dtype, rename=None):
    """safetensors files -> {name: tensor}.

    The file is opened anew for each tensor: neither a second copy nor its pages pile up.
    """
    device = str(torch.empty(0, device=device).device)  # a bare "cuda" would be the first GPU
    tensors = {}
    for path in files:
        for name in tensor_names(path):
            new = rename(name) if rename else name
            if new is not None:
                with safe_open(path, "pt", device=device) as file:
                    tensors[new] = file.get_tensor(name).to(dtype, copy=True)
    return tensors


def tensor_names(path):
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def text_encoder_name(name):
    """With and without `text_model.`. The table 0, 1, 2, ... of old files is dropped."""
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else name


def vae_name(name):
    """Attention as it was called in 2022."""
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(attentions\.0)\.(query|key|value|proj_attn)\b",
                  lambda match: f"{match[1]}.{new[match[2]]}", name)


DIFFUSERS_NAMES = {"text_encoder": text_encoder_name, "vae": vae_name}


def fill(network, tensors, source):
    """Put tensors into a network on the `meta` device, and freeze it. Errors name `source`."""
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    both = expected.keys() & tensors.keys()
    for name in both:  # a 1x1 convolution (out, in, 1, 1) where a linear layer stands here
        if tensors[name].shape == (*expected[name], 1, 1):
            tensors[name] = tensors[name].flatten(1)
    misshapen = [name for name in both if expected[name] != tensors[name].shape]
    for problem, names in (("is missing", expected.keys() - tensors.keys()),
                           ("does not belong there", tensors.keys() - expected.keys()),
                           ("has another shape than the config says", misshapen)):
        if names:
            raise ValueError(f"{source}: tensor {min(names)} {problem} ({len(names)} such)")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source}: tensor {min(broken)} holds values that are not finite "
                         f"({len(broken)} such tensors)")
    network.load_state_dict(tensors, strict=True, assign=True)
    network.requires_grad_(False).eval()


def load_single_file(path, folder, device, dtype):
    """A checkpoint in the original layout; the configs come from `folder`."""
    configs = {part: read_json(folder / part / "config.json") for part in PARTS}
    for start, what in (("conditioner.", "an SDXL checkpoint"),
                        ("cond_stage_model.model.", "a Stable Diffusion 2.x single file; take the "
                         "diffusers folder of it")):
        if any(name.startswith(start) for name in tensor_names(path)):
            raise ValueError(f"{path}: {what}; single files are opened for Stable Diffusion 1.x "
                             "only")

    def rename(part, name):
        try:
            renamed = original.rename(name, configs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if renamed and renamed[0] == part:
            return DIFFUSERS_NAMES.get(part, str)(renamed[1])

    parts = {}
    for part in PARTS:
        parts[part] = build(PARTS[part][0], configs[part], folder / part / "config.json")
        dtype_here = precision(part, dtype)
        fill(parts[part], read_tensors([path], device, dtype_here, partial(rename, part)), path)
    return parts


# --- writing

def save_part(network, folder, part, dtype=torch.float32):
    """Write one network as diffusers and transformers read it: a config and a safetensors file."""
    _, stem, prefix = PARTS[part]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in network.config.items() if k not in ("dtype", "torch_dtype")}
    write_json(folder / "config.json", config)
    tensors = {prefix + name: tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in network.state_dict().items()}
    write_atomically(folder / f"{stem}.safetensors",
                     lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def fingerprint(network):
    """A hash of all weights in half precision: the same for a model however it was stored."""
    digest = hashlib.sha256()
    for _, tensor in sorted(network.state_dict().items()):
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_pipeline(sd, folder):
    """Write a whole pipeline in the diffusers layout.

    Tokenizer and scheduler are copied from where `sd` came from.
    """
    folder = Path(folder)
    for part in PARTS:
        save_part(getattr(sd, part), folder / part, part)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(sd.folder / part, folder / part, dirs_exist_ok=True)
    write_index(folder)


def write_index(folder):
    """model_index.json of a folder with all parts, and no safety checker."""
    scheduler = read_json(folder / "scheduler/scheduler_config.json")
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]})
