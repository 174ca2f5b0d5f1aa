"""Find, read and write weights: the diffusers folder layout, single-file checkpoints, the hub. Only safetensors."""
import hashlib
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import original
from .checkpoint import read_json, write_atomically, write_json
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


def load(model="toy", device="cpu", dtype=torch.float32, revision=None, tokenizer=None):
    """Open a Stable Diffusion 1.x or 2.x, frozen, in one line:

    "toy", "toy-dusk" (the same, fine-tuned on another look), a folder in the diffusers layout, a single .safetensors
    file in the original layout, or a hub id such as "CompVis/stable-diffusion-v1-4", at `revision`. A single file takes
    its tokenizer and configs from `tokenizer`, a folder or hub id (default: v1.4's). `dtype` is the precision of UNet and
    VAE; the text encoder, small and the part that is trained, stays in float32.
    Raises ValueError, in one line that names file and tensor, for anything missing, extra or wrongly shaped.
    """
    from transformers import CLIPTokenizer  # here, since importing it takes seconds

    path = find(model, revision)
    if path.is_file():
        folder = find(tokenizer or V1, parts=())
        parts = load_single_file(path, folder, device, dtype)
    else:
        folder, places = path, {"unet": TOY_UNETS.get(str(model), "unet")}
        check_pipeline(folder)
        parts = {part: load_part(folder / places.get(part, part), part, device, precision(part, dtype)) for part in PARTS}
    schedule = Schedule(read_json(folder / "scheduler/scheduler_config.json"))
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), clean_up_tokenization_spaces=False)
    return StableDiffusion(tokenizer, schedule=schedule, folder=folder, **parts)


def precision(part, dtype):
    """The text encoder is read in float32, not widened to it afterwards: rounded it would be another."""
    return torch.float32 if part == "text_encoder" else dtype


def load_text_encoder(source, device="cpu", revision=None):
    """Anyone's text encoder: a folder (also one that holds `text_encoder/`), or a hub id, where a sub-folder follows a
    colon: "OPTML-Group/AdvUnlearn:church_unlearned"."""
    folder = find(source, revision, parts=("text_encoder",))
    return load_part(folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder, "text_encoder", device)


def load_part(folder, part, device="cpu", dtype=torch.float32):
    """One network from its folder, frozen, strictly: every tensor in its place and none besides."""
    cls, stem, _ = PARTS[part]
    folder = Path(folder)
    network = build(cls, read_json(folder / "config.json"), folder / "config.json")
    fill(network, read_tensors(weight_files(folder, stem), device, dtype, DIFFUSERS_NAMES.get(part)),
         folder / f"{stem}.safetensors")
    return network


def build(cls, config, path):
    """The network on the `meta` device: no memory, no random numbers; the tensors read are put in place as they are."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config of a {cls.__name__}: {error} is missing or unknown") from None


# --- where the files are

def find(source, revision=None, parts=tuple(PARTS)):
    """Source -> a folder or file on this disk, downloaded from the hub where need be."""
    if str(source) in TOY_UNETS:
        return TOY
    path = Path(source)
    if path.suffix in PICKLES:
        raise ValueError(f"{path}: a pickle, which can run code when it is opened; ask for, or convert to, safetensors")
    if path.exists():
        return path
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", str(source))
    if not found:
        raise ValueError(f"{source}: no such folder or file; give toy, toy-dusk, a folder, a .safetensors file, or a hub "
                         f"id like {V1}")
    return download(found[1], found[2], revision, parts)


def download(hub_id, subfolder, revision, parts):
    """The files needed, and only them, into the hub's cache; what is there is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))

    try:
        if subfolder:
            return fetch(f"{subfolder}/*.json", f"{subfolder}/*.safetensors") / subfolder
        folder = fetch("model_index.json", "scheduler/*", "tokenizer/*", *(f"{part}/*.json" for part in PARTS))
        for part in parts:  # the first kind of file that is there
            for pattern in (".safetensors", ".fp16.safetensors", "-*.safetensors"):
                fetch(f"{part}/{PARTS[part][1]}{pattern}")
                if any((folder / part).glob(f"{PARTS[part][1]}*.safetensors")):
                    break
        return folder
    except LocalEntryNotFoundError:
        raise ValueError(f"{hub_id}: no such folder here, and the hub cannot be reached (or HF_HUB_OFFLINE is set) while "
                         "its files are not in the cache; connect once, or give a folder") from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{hub_id}: no such folder here, and the hub says: {str(error).splitlines()[0]}; check the name, "
                         "or log in where it asks for consent") from None


def weight_files(folder, stem):
    """The safetensors files of a part: one, a half-precision one, or the shards of an index."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    for index in sorted(folder.glob(f"{stem}*.index*.json")):
        if "safetensors" in index.name:
            return [folder / Path(name).name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if pickles := [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]:
        raise ValueError(f"{folder}: holds {pickles[0]} alone, a pickle, which can run code when it is opened; convert it with "
                         "diffusers or transformers: from_pretrained(...), then save_pretrained(...)")
    raise ValueError(f"{folder / stem}.safetensors: no such file")


def check_pipeline(folder):
    """Refuse by name what is not Stable Diffusion 1.x or 2.x."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json there, so not a folder in the diffusers layout")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder}: a {kind}; only Stable Diffusion 1.x and 2.x (StableDiffusionPipeline) can be opened")


# --- reading

def read_tensors(files, device, dtype, rename=None):
    """safetensors files -> {name: tensor}, each tensor copied out by itself.

    The file is opened anew for each, so that neither a second copy nor the file's own pages pile up while loading.
    """
    device = str(torch.empty(0, device=device).device)  # safetensors takes a bare "cuda" for the first GPU
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
    """With and without `text_model.` in front; the table of positions 0, 1, 2, ... that old files carry is dropped."""
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else name


def vae_name(name):
    """Attention as it was called in 2022."""
    return re.sub(r"(attentions\.0)\.(query|key|value|proj_attn)\b", lambda m: f"{m[1]}." + {
        "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[m[2]], name)


DIFFUSERS_NAMES = {"text_encoder": text_encoder_name, "vae": vae_name}


def fill(network, tensors, source):
    """Put tensors into a network built on the `meta` device, and freeze it. `source` is named in errors."""
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name in expected.keys() & tensors.keys():  # a 1x1 convolution (out, in, 1, 1) where a linear layer stands here
        if tensors[name].shape == (*expected[name], 1, 1):
            tensors[name] = tensors[name].flatten(1)
    for problem, names in (("is missing", expected.keys() - tensors.keys()),
                           ("does not belong there", tensors.keys() - expected.keys()),
                           ("has another shape than the config says",
                            [n for n in expected.keys() & tensors.keys() if expected[n] != tensors[n].shape])):
        if names:
            raise ValueError(f"{source}: tensor {min(names)} {problem} ({len(names)} such)")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source}: tensor {min(broken)} holds values that are not finite ({len(broken)} such tensors)")
    network.load_state_dict(tensors, strict=True, assign=True)
    network.requires_grad_(False).eval()


def load_single_file(path, folder, device, dtype):
    """A checkpoint in the original layout; the configs come from `folder`."""
    configs = {part: read_json(folder / part / "config.json") for part in PARTS}
    parts = {}
    for start, what in (("conditioner.", "an SDXL checkpoint"), ("cond_stage_model.model.", "a Stable Diffusion 2.x single "
                        "file; take the diffusers folder of it")):
        if any(name.startswith(start) for name in tensor_names(path)):
            raise ValueError(f"{path}: {what}; single files are opened for Stable Diffusion 1.x only")

    def rename(part, name):
        try:
            found = original.rename(name, configs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if found and found[0] == part:
            return DIFFUSERS_NAMES[part](found[1]) if part in DIFFUSERS_NAMES else found[1]

    for part in PARTS:
        parts[part] = build(PARTS[part][0], configs[part], folder / part / "config.json")
        fill(parts[part], read_tensors([path], device, precision(part, dtype), partial(rename, part)), path)
    return parts


# --- writing

def save_part(network, folder, part, dtype=torch.float32):
    """Write one network as diffusers and transformers read it: `config.json` and one safetensors file."""
    _, stem, prefix = PARTS[part]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {k: v for k, v in network.config.items() if k not in ("dtype", "torch_dtype")})
    tensors = {prefix + name: tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in network.state_dict().items()}
    write_atomically(folder / f"{stem}.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def fingerprint(network):
    """A hash of all weights, in half precision: the same for the same model however it was stored."""
    digest = hashlib.sha256()
    for _, tensor in sorted(network.state_dict().items()):
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_pipeline(sd, folder):
    """Write a whole pipeline in the diffusers layout; tokenizer and scheduler are copied from where `sd` came from. Its
    index names only what is there: the published ones have a safety checker too."""
    folder = Path(folder)
    for part in PARTS:
        save_part(getattr(sd, part), folder / part, part)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(sd.folder / part, folder / part, dirs_exist_ok=True)
    write_index(folder)


def write_index(folder):
    """model_index.json of a folder that holds all parts."""
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", read_json(folder / "scheduler/scheduler_config.json").get("_class_name", "DDIMScheduler")]})
