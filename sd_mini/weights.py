"""Find, read and write weights: diffusers folders, single files, the hub. Only safetensors."""
import hashlib
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import original
from .configs import corrected
from .files import make_writable, read_json, write_atomically, write_json
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

    model       "toy", "toy-dusk" (another look), a folder in the diffusers layout, a .safetensors
                file in the original layout, or a hub id, "ID" or "ID@REVISION"
    dtype       of UNet and VAE; the text encoder, small and mostly in training, is in float32
    tokenizer   a folder or hub id with tokenizer and configs for a single file (default: v1.4's)

    ValueError names the file and the tensor or key for anything missing, extra, wrongly shaped, not
    computed here, or not fitting the rest.
    """
    path = find(model)
    folder = config_folder(path, tokenizer) if path.is_file() else path
    if path.is_dir():
        check_pipeline(folder)
    places = {part: folder / part for part in PARTS}
    places["unet"] = folder / TOY_UNETS.get(model, "unet")
    networks = {part: build(part, places[part]) for part in PARTS}
    schedule = read_config(Schedule, "scheduler", folder / "scheduler/scheduler_config.json")
    tokenizer = load_tokenizer(folder / "tokenizer")
    check_fit(networks, tokenizer, places)
    names = original_names(path, networks) if path.is_file() else NAMES
    for part, network in networks.items():
        files = [path] if path.is_file() else weight_files(places[part], part)
        exact = part == "text_encoder"  # rounded and widened again it would be another
        fill(network, files, device, torch.float32 if exact else dtype, names.get(part))
    return StableDiffusion(
        tokenizer, schedule=schedule, folder=folder, precision=dtype, **networks)


def config_folder(path, tokenizer):
    """Where tokenizer and configs of a single file come from."""
    try:
        return find_folder(tokenizer or V1, parts=())
    except ValueError as error:
        if tokenizer:
            raise
        raise ValueError(f"{path}: a single file holds no tokenizer and no configs; --tokenizer "
                         f"names what has them (the default, {error})") from None


def load_tokenizer(folder):
    from transformers import CLIPTokenizer  # here, since importing it takes seconds

    # Without these files transformers makes a tokenizer that knows no words.
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ValueError(f"{folder}: no tokenizer there: neither vocab.json nor tokenizer.json")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), clean_up_tokenization_spaces=False)
        ids = tokenizer("a photo", add_special_tokens=False).input_ids
    except Exception as error:  # a broken file is a bare Exception of the library below
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: not a whole CLIP tokenizer ({reason})") from None
    # To CLIP's no word is unknown; BERT's or T5's files open too, and make every word so.
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"{folder}: no CLIP tokenizer: to it the words of \"a photo\" are unknown")
    return tokenizer


def check_fit(networks, tokenizer, places):
    """ValueError for parts of different models, which would fail in the middle of a run."""
    text, unet, vae = (networks[part].config for part in ("text_encoder", "unet", "vae"))
    tokens = 1 + max(tokenizer.get_vocab().values())
    if tokens > text["vocab_size"]:
        raise ValueError(f"{places['text_encoder']}/config.json: vocab_size {text['vocab_size']}: "
                         f"the tokenizer beside it has {tokens} tokens; resize the text encoder, "
                         "or take the tokenizer that it was trained with")
    for key, other, wanted in (
        ("cross_attention_dim", "the text encoder's hidden_size", text["hidden_size"]),
        ("in_channels", "the VAE's latent_channels", vae["latent_channels"]),
        ("out_channels", "the VAE's latent_channels", vae["latent_channels"]),
    ):
        if unet[key] != wanted:
            raise ValueError(f"{places['unet']}/config.json: {key} {unet[key]}: {other} is "
                             f"{wanted}, so these are parts of different models")


def load_text_encoder(source, device="cpu"):
    """A folder, also one that holds `text_encoder/`, or a hub id, ID@REVISION:SUBFOLDER."""
    folder = find_folder(source, parts=("text_encoder",))
    inner = folder / "text_encoder"
    return load_part(inner if inner.is_dir() else folder, "text_encoder", device)


def load_part(folder, part, device="cpu", dtype=torch.float32):
    """One network from its folder, frozen: every tensor in its place and none besides."""
    network = build(part, Path(folder))
    fill(network, weight_files(Path(folder), part), device, dtype, NAMES.get(part))
    return network


def build(part, folder):
    """The network on the `meta` device: no memory, no random numbers."""
    with torch.device("meta"):
        return read_config(PARTS[part][0], part, folder / "config.json")


def read_config(cls, part, path):
    config = read_json(path)
    try:
        return cls(corrected(part, config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --- where the files are

def find(source, parts=tuple(PARTS)):
    """Source -> a folder or file on this disk; a hub id's files are downloaded where need be."""
    if source in TOY_UNETS:
        return TOY
    path = Path(os.path.expanduser(source))
    if path.suffix in PICKLES and not path.is_dir():
        raise ValueError(f"{path}: a pickle, which can run code when it is opened; ask for, or "
                         "convert to, safetensors")
    if path.exists():
        return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?", str(source))
    if not hub:
        raise ValueError(f"{source}: no such folder or file; give toy, toy-dusk, a folder, a "
                         f".safetensors file, or a hub id like {V1}")
    return download(*hub.groups(), parts)


def find_folder(source, parts):
    path = find(source, parts)
    if path.is_file():
        raise ValueError(f"{path}: a file, where a folder with the configs is wanted, or a hub id")
    return path


def download(hub_id, revision, subfolder, parts):
    """The files needed, and only them, into the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

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
        why = ("the hub cannot be reached (or HF_HUB_OFFLINE is set) while its files are not in "
               "the cache; connect once, or give a folder")
    except (HfHubHTTPError, HFValidationError) as error:
        why = (f"the hub says: {str(error).splitlines()[0]}; check the name, or log in where it "
               "asks for consent")
    raise ValueError(f"{hub_id}: no such folder here, and {why}")


def weight_files(folder, part):
    """The safetensors files of a part: one, a half-precision one, or the shards of an index."""
    stem = PARTS[part][1]
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    for index in sorted(folder.glob(f"{stem}*.safetensors.index*.json")):
        shards = set(read_json(index)["weight_map"].values())
        return [folder / Path(name).name for name in sorted(shards)]
    if pickles := [path.name for path in sorted(folder.glob("*"))
                  if path.suffix in PICKLES and path.is_file()]:
        raise ValueError(f"{folder}: holds {pickles[0]} alone, a pickle, which can run code when "
                         "it is opened; convert it with diffusers or transformers: "
                         "from_pretrained(...), then save_pretrained(...)")
    raise ValueError(f"{folder / stem}.safetensors: no such file")


def check_pipeline(folder):
    """Refuse by name what is not Stable Diffusion 1.x or 2.x."""
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder}: a {kind}; only Stable Diffusion 1.x and 2.x "
                         "(StableDiffusionPipeline) can be opened")


# --- reading

def read_tensors(files, device, dtype, rename):
    """safetensors files -> {name: tensor}; those that `rename` gives no name are left out."""
    device = str(torch.empty(0, device=device).device)  # a bare "cuda" would be the first GPU
    tensors = {}
    for path in files:
        for name in tensor_names(path):
            new = rename(name) if rename else name
            if new is not None:
                with safe_open(path, "pt", device=device) as file:  # anew: its pages pile up
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
    """Without `text_model.`; None for position_ids and CLIP's projection, which are not needed."""
    name = name.removeprefix("text_model.")
    return None if name in ("embeddings.position_ids", "text_projection.weight") else name


def vae_name(name):
    """Attention as it was called in 2022."""
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(rf"(?<=attentions\.0\.)({'|'.join(new)})\b", lambda old: new[old[0]], name)


NAMES = {"text_encoder": text_encoder_name, "vae": vae_name}  # diffusers' -> those here


def fill(network, files, device, dtype=torch.float32, rename=None):
    """Read files into a network on the `meta` device, every tensor in its place, and freeze it."""
    tensors, source = read_tensors(files, device, dtype, rename), files[0]
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


def original_names(path, networks):
    """{part: a function, original name -> name here or None} for a file in the original layout."""
    there = tensor_names(path)
    if any(name.startswith(("conditioner.", "cond_stage_model.model.")) for name in there):
        raise ValueError(f"{path}: of Stable Diffusion 2.x or SDXL; single files are opened for 1.x "
                         "only; of 2.x take the diffusers folder")
    names = {part: original.names(part, network) for part, network in networks.items()}
    known = set().union(*names.values())
    if extra := [name for name in there
                 if original.current(name) not in known and not original.IGNORED.match(name)]:
        raise ValueError(f"{path}: tensor {min(extra)} does not belong there ({len(extra)} such)")
    return {part: lambda name, table=table: table.get(original.current(name))
            for part, table in names.items()}


# --- writing

def save_part(network, folder, part, dtype=torch.float32):
    """Write one network as diffusers and transformers read it: a config and a safetensors file."""
    _, stem, prefix = PARTS[part]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in network.config.items() if k not in ("dtype", "torch_dtype")}
    write_json(folder / "config.json", config)
    tensors = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    write_tensors(folder / f"{stem}.safetensors", tensors, dtype)


def write_tensors(path, tensors, dtype):
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in tensors.items()}
    write_atomically(path, lambda place: save_file(tensors, place, {"format": "pt"}))


def fingerprint(network):
    """A hash of all weights in half precision: the same for a model however it was stored."""
    digest = hashlib.sha256()
    for _, tensor in sorted(network.state_dict().items()):
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_pipeline(sd, folder):
    """Write a whole pipeline in the diffusers layout; tokenizer and scheduler are copied."""
    folder = Path(folder)
    for part in PARTS:
        save_part(getattr(sd, part), folder / part, part)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(sd.folder / part, folder / part, dirs_exist_ok=True)
        make_writable(folder / part)
    write_index(folder)


def save_single_file(sd, path, dtype=torch.float32):
    """Write one .safetensors in the original layout, as web interfaces open it: 1.x only."""
    if (sd.schedule.predicts_v or sd.unet.config["use_linear_projection"]
            or sd.text_encoder.config["hidden_act"] != "quick_gelu"):
        raise ValueError(f"{sd.folder}: made like Stable Diffusion 2.x; one file in the original "
                         "layout is written for 1.x only; save_pipeline writes a folder")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, original.tensors({part: getattr(sd, part) for part in PARTS}), dtype)


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
