"""Train the toy Stable Diffusion from nothing, in the order of the real one, and measure it.

    python -m sd_mini.toy.train --out my-toy    all stages; a stopped run goes on where it was
    python -m sd_mini.toy.train --check         the quality table of the embedded weights

A program on top of the lab, whose training loop it takes, and no part of the model. Stages:

    tokenizer
    vae
    clip          text encoder and picture encoder, contrastively
    classifier
    unet          with the text encoder frozen
    unet_dusk     a second UNet, fine-tuned on another look of the world

The order matters. A UNet trained together with its text encoder learns to draw and to read at the
same time. After as much training it can do neither.
"""
import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..files import write_atomically, write_json
from ..lab.runs import progress, resumable
from ..lab.settings import TOY as TOY_SETTINGS
from ..schedule import Schedule
from ..text_encoder import TextEncoder
from ..unet import UNet
from ..vae import VAE
from ..weights import TOY, load, load_part, save_part, write_index, write_tensors
from . import world
from .classifier import LABELS, Classifier, PictureNet, load_classifier

VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "sample_size": 64, "block_out_channels": [24, 48, 72], "layers_per_block": 1,
    "norm_num_groups": 8, "act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 64,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 24, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "projection_dim": 64}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 16,
    "block_out_channels": [32, 96, 128], "layers_per_block": 1, "cross_attention_dim": 64,
    "attention_head_dim": 4, "norm_num_groups": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
SCHEDULER_CONFIG = {  # Stable Diffusion 1.x's own
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"}
PICTURES, DUSK_PICTURES = 24000, 6000
VAE_STEPS, CLIP_STEPS, CLASSIFIER_STEPS = 3000, 1500, 3000
UNET_STEPS, DUSK_STEPS = 5000, 600
UNCAPTIONED = 0.15  # share of a UNet's batch that has no caption
GUIDANCE, STEPS = TOY_SETTINGS["eval_guidance"], TOY_SETTINGS["eval_steps"]  # of what is checked


# --- data

def dataset(work, name):
    """Drawn pictures -> images (n, 3, 64, 64) uint8, labels (n, 3), captions, n lists of 4.

    `work` keeps them. `name` is a look, "day" or "dusk", alone or with " uncaptioned". Uncaptioned
    pictures show no object, and the empty prompt is their only caption.
    """
    look, _, uncaptioned = name.partition(" ")
    n, seed = (PICTURES, 0) if look == "day" else (DUSK_PICTURES, 1)
    if uncaptioned:
        n, seed = n // 4, seed + 2
    images_file, text_file = work / f"{name}.npy", work / f"{name}.json"
    if not text_file.exists():
        rng = np.random.default_rng(seed)
        images, text = np.empty((n, 3, world.SIZE, world.SIZE), np.uint8), []
        for i in progress(range(n), f"drawing {name}"):
            scene = (world.uncaptioned_scene if uncaptioned else world.random_scene)(rng)
            images[i] = world.draw(scene, rng, look).transpose(2, 0, 1)
            captions = 4 * [""] if uncaptioned else [world.caption(scene, rng) for _ in range(4)]
            text.append([scene.object, scene.style, scene.color, *captions])
        np.save(images_file, images)
        write_atomically(text_file, lambda path: path.write_text(json.dumps(text)))
    text = json.loads(text_file.read_text())
    labels = torch.tensor(
        [[names.index(word) for names, word in zip(LABELS.values(), row)] for row in text])
    return torch.from_numpy(np.load(images_file)), labels, [row[3:] for row in text]


def to_unit(images, device):
    """uint8 -> float in [0, 1]."""
    return images.to(device).float() / 255


def token_ids(tokenizer, captions):
    """n lists of 4 captions -> (n, 4, L)."""
    flat = [caption for row in captions for caption in row]
    length = TEXT_CONFIG["max_position_embeddings"]
    ids = tokenizer(flat, padding="max_length", max_length=length, truncation=True,
                    return_tensors="pt").input_ids
    return ids.view(len(captions), -1, ids.shape[-1])


# --- one training loop for all

def fit(name, network, loss_of, steps, lr, work, warmup=100):
    """Minimise loss_of(generator) with AdamW -> the moving average of the network.

    The learning rate warms up, then follows a cosine. Gradients are clipped to norm 1. A checkpoint
    is written to `work` every 100 steps and when the run is stopped. The step alone seeds the
    generator of its batch, so a run that is started again takes the same steps.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    own, averages = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(own, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    unused = torch.Generator()  # each step has its own
    loop = resumable(work / name, steps, [*own, *averages], optimizer, unused)
    with loop as (iterations, history):
        for step in iterations:
            cosine = 0.5 + 0.5 * np.cos(np.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup) * cosine
            loss = loss_of(torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            decay = min(0.998, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(averages, own, 1 - decay)
            history.append({"loss": loss.item()})
    return average


# --- the stages; each writes its part of `out` when it is done

def train_tokenizer(out, work, device):
    """Byte-pair encoding in CLIP's format.

    The tokens are the 256 bytes, the same at the end of a word, the merges, start and end.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    _, _, captions = dataset(work, "day")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        (caption for row in captions for caption in row),
        trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                            show_progress=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair)
              for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    write_tokenizer(out / "tokenizer", merges, tokens)


def write_tokenizer(folder, merges, tokens):
    """Write the four files that CLIPTokenizer reads, vocab.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    start, end = tokens[-2:]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {
        **special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True,
        "model_max_length": TEXT_CONFIG["max_position_embeddings"]})
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})


def toy_tokenizer(out):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(out / "tokenizer"))


def train_vae(out, work, device):
    """|x - x'| + 2 (x - x')^2 + 0.5 |differences of neighbours in x - x'| + 1e-4 KL to N(0, 1).

    The third term keeps edges sharp.
    """
    images = torch.cat([dataset(work, look)[0] for look in ("day", "dusk")])
    torch.manual_seed(0)
    vae = VAE({**VAE_CONFIG, "scaling_factor": 1.0}).to(device)

    def loss_of(generator):
        rows = torch.randint(len(images), (16,), generator=generator)
        image = 2 * to_unit(images[rows], device) - 1
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            mean, log_var = vae.moments(image)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            error = vae.decode(mean + (log_var / 2).exp() * noise).float() - image
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).float().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-4 * kl

    vae = fit("vae", vae, loss_of, VAE_STEPS, 2e-3, work)
    with torch.no_grad():
        latents = [vae.encode(2 * to_unit(batch, device) - 1) for batch in images[::16].split(64)]
        std = torch.cat(latents).std().item()
    vae.config = {**VAE_CONFIG, "scaling_factor": round(1 / std, 5)}
    save_part(vae, out / "vae", "vae", torch.float16)


def train_clip(out, work, device):
    """Contrastive: among 256, each picture picks its caption and each caption its picture.

    Equal captions within a batch share the target. Source: Radford et al. 2021.
    """
    images, _, captions = dataset(work, "day")
    tokenizer = toy_tokenizer(out)
    ids = token_ids(tokenizer, captions)
    torch.manual_seed(0)
    clip = new_clip(tokenizer).to(device)

    def loss_of(generator):
        rows = torch.randint(len(images), (256,), generator=generator)
        batch = ids[rows, torch.randint(4, (256,), generator=generator)].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            # the end token has the highest id; padding repeats it, argmax takes the first
            end = batch.argmax(-1)
            text = clip["projection"](clip["text"](batch)[torch.arange(256, device=device), end])
            picture = clip["picture"](to_unit(images[rows], device))
        text, picture = F.normalize(text.float(), dim=-1), F.normalize(picture.float(), dim=-1)
        similarity = 20 * text @ picture.T
        same = (batch[:, None] == batch[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target))

    clip = fit("clip", clip, loss_of, CLIP_STEPS, 1.5e-3, work)
    save_part(clip["text"], out / "text_encoder", "text_encoder", torch.float16)
    rest = torch.nn.ModuleDict({name: clip[name] for name in ("picture", "projection")})
    save_network(rest, out / "clip", {"logit_scale": 20})


def new_clip(tokenizer):
    """An untrained CLIP: text encoder, picture encoder, and the projection of the text."""
    special = {name: getattr(tokenizer, name)
               for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {**TEXT_CONFIG, "vocab_size": len(tokenizer), **special}
    width, outputs = config["hidden_size"], config["projection_dim"]
    clip = torch.nn.ModuleDict({
        "text": TextEncoder(config), "picture": PictureNet(outputs),
        "projection": torch.nn.Linear(width, outputs, bias=False)})
    embeddings = clip["text"].embeddings
    for embedding in (embeddings.token_embedding, embeddings.position_embedding):
        torch.nn.init.normal_(embedding.weight, std=0.02)
    return clip


def waves(n, channels, cells, generator):
    """Smooth random fields (n, channels, 64, 64): normal noise, cells x cells, interpolated."""
    grid = torch.randn(n, channels, cells, cells, generator=generator)
    return F.interpolate(grid, size=world.SIZE, mode="bicubic", align_corners=True)


def disturb(image, ruined, generator):
    """Disturbed copies of pictures (N, 3, 64, 64), some under stripes.

    Where `ruined` (N,), the picture is melted until nothing is left to recognise. Elsewhere it is
    rippled a little. Erased models draw such things, and a classifier that has seen none takes
    them for an object.
    """
    def between(low, high):
        return low + (high - low) * torch.rand(len(image), 1, 1, 1, generator=generator)

    ruined = ruined[:, None, None, None]
    coarse = torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5
    large, small = (waves(len(image), 2, cells, generator) for cells in (5, 9))
    flow = torch.where(coarse, large, small)
    flow = flow * torch.where(ruined, between(0.4, 0.8), between(0, 0.06))  # a picture is 2 wide
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, world.SIZE)], indexing="ij")
    places = torch.stack([x, y], -1) + flow.permute(0, 2, 3, 1)
    image = F.grid_sample(image, places, padding_mode="reflection", align_corners=True)
    stripes = 0.5 + 0.5 * torch.sin(between(4, 14) * waves(len(image), 1, 6, generator))
    opacity = torch.where(ruined, between(-0.4, 0.8), between(-0.3, 0.3)).clamp(min=0)
    return image + opacity * (stripes - image)


def vary(image, generator):
    """Copies of pictures (N, 3, 64, 64): softer, darker or lighter, more or less saturated, noisy.

    Decoded pictures are a bit soft, and guidance saturates and darkens them.
    """
    n, device = len(image), image.device
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(n, 1, 1, 1, generator=generator).to(device)
    image = mix * image + (1 - mix) * soft
    factors = 2 ** torch.rand(2, n, 1, 1, 1, generator=generator).mul(2).sub(1)
    gamma, saturation = factors.to(device)
    gray = image.mean(1, keepdim=True)
    image = (gray + saturation * (image - gray)).clamp(1e-3, 1) ** gamma
    strength = 0.06 * torch.rand(n, 1, 1, 1, generator=generator).to(device)
    return image + strength * torch.randn(image.shape, generator=generator).to(device)


def train_classifier(out, work, device):
    """Cross-entropy on object, style and colour.

    A sixth of each batch is ruined: its object and its style are "nothing". Pictures without an
    object have no colour. Half have been through the VAE, with a little noise in their latents:
    what a UNet draws is softer and less sure than the world, above all its sketches.
    """
    sets = [dataset(work, name) for name in ("day", "day uncaptioned", "dusk", "dusk uncaptioned")]
    images, labels = (torch.cat([s[i] for s in sets]) for i in (0, 1))
    torch.manual_seed(0)
    vae, decoded = load_part(out / "vae", "vae", device), []
    for batch in progress(images[::8].split(64), "through the VAE"):
        with torch.no_grad():
            z = vae.encode(2 * to_unit(batch, device) - 1)
            z = z + 0.4 * torch.rand(len(z), 1, 1, 1).to(device) * torch.randn(z.shape).to(device)
            decoded.append((vae.decode(z) / 2 + 0.5).clamp(0, 1).mul(255).round().byte().cpu())
    n, images, labels = len(images), torch.cat([images, *decoded]), torch.cat([labels, labels[::8]])
    classifier = Classifier().to(device)
    no_object, no_style = (LABELS[kind].index("nothing") for kind in ("object", "style"))
    batch = 96

    def loss_of(generator):
        rows = torch.where(torch.arange(batch) % 2 > 0,
                           torch.randint(n, (batch,), generator=generator),
                           torch.randint(n, len(images), (batch,), generator=generator))
        ruined = torch.arange(batch) < batch // 6
        image = disturb(to_unit(images[rows], "cpu"), ruined, generator).to(device)
        logits = classifier.logits(vary(image, generator))
        object, style, color = labels[rows].T
        object, style = torch.where(ruined, no_object, object), torch.where(ruined, no_style, style)
        color = torch.where(object == no_object, -1, color)  # no colour to be told
        targets = {"object": object, "style": style, "color": color}
        return sum(F.cross_entropy(logits[kind], targets[kind].to(device), ignore_index=-1)
                   for kind in logits)

    classifier = fit("classifier", classifier, loss_of, CLASSIFIER_STEPS, 2e-3, work)
    save_network(classifier, out / "classifier", LABELS)


def train_unet(out, work, device):
    """E || eps - eps_theta(x_t | c) ||^2 with the text encoder frozen.

    Some prompts are empty, for guidance.
    """
    torch.manual_seed(0)
    unet = UNet(UNET_CONFIG).to(device)
    loss_of = denoising_loss(unet, out, work, device, "day")
    unet = fit("unet", unet, loss_of, UNET_STEPS, 1.2e-3, work)
    save_part(unet, out / "unet", "unet", torch.float16)


def train_unet_dusk(out, work, device):
    """Fine-tune the UNet on the dusk look, as communities fine-tune Stable Diffusion on theirs."""
    unet = load_part(out / "unet", "unet", device).train().requires_grad_(True)
    loss_of = denoising_loss(unet, out, work, device, "dusk")
    unet = fit("unet_dusk", unet, loss_of, DUSK_STEPS, 4e-4, work)
    save_part(unet, out / "unet_dusk", "unet", torch.float16)


def denoising_loss(unet, out, work, device, look):
    """-> loss_of(generator) for `fit`: the noise-prediction loss on the latents of the data.

    They are encoded once. Each picture of a batch has one of its captions. Some never had one: they
    have the empty prompt, for guidance. These are photos: most pictures are. No picture loses its
    caption: the empty prompt would draw what is to be erased.
    """
    images, _, captions = dataset(work, look)
    others, labels, _ = dataset(work, f"{look} uncaptioned")
    others = others[labels[:, 1] == LABELS["style"].index("photo")]
    text_encoder = load_part(out / "text_encoder", "text_encoder", device)
    vae = load_part(out / "vae", "vae", device)
    tokenizer, schedule = toy_tokenizer(out), Schedule(SCHEDULER_CONFIG)
    ids = token_ids(tokenizer, captions + len(others) * [4 * [""]])
    n = len(images)
    with torch.no_grad():
        latents = torch.cat([
            vae.encode(2 * to_unit(batch, device) - 1)
            for batch in progress(torch.cat([images, others]).split(64), f"encoding {look}")])

    def loss_of(generator, batch=48):
        u = torch.rand(batch, generator=generator)
        rows = torch.where(u < UNCAPTIONED,
                           torch.randint(n, len(latents), (batch,), generator=generator),
                           torch.randint(n, (batch,), generator=generator))
        prompt = ids[rows, torch.randint(4, (batch,), generator=generator)]
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(device)
        x_t = schedule.add_noise(latents[rows.to(device)], noise, t)
        with torch.no_grad():
            context = text_encoder(prompt.to(device))
        return F.mse_loss(unet(x_t, t.to(device), context), noise)

    return loss_of


def save_network(network, folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", network.state_dict(), torch.float16)
    write_json(folder / "config.json", config)


def write_layout(out):
    """What makes `out` a pipeline in the diffusers folder layout."""
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(out / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    write_index(out)


# --- the quality table

def check(device, pictures=40):
    """Print the quality table: what the toy models draw, and how often the classifier is right.

    All seeds are held out.
    """
    classifier, rng = load_classifier(device), np.random.default_rng(10**6)
    for model in ("toy", "toy-dusk"):
        check_model(model, classifier, rng, device, pictures)
    check_classifier(classifier, rng, device)


def print_row(kind, name, right, note=""):
    print(f"{kind:<13}{name:<16}{np.mean(right):7.1%}{note}", flush=True)


def check_model(model, classifier, rng, device, pictures):
    """The share of generated pictures that show what was asked for, and what is drawn unasked.

    The share is of all objects and styles, and of colours, at each guidance; then of each object
    and style at the guidance of the toy; then of what the empty prompt draws, at guidance 1.
    """
    sd = load(model, device)
    print(f"\n{model}: share of pictures that show what was asked for, {STEPS} steps")
    for guidance in (2, 3, 4, 5, 7.5):
        right, colors = asked_for(sd, classifier, rng, guidance, pictures // 5)
        things = [flag for flags in right.values() for flag in flags]
        print_row(f"guidance {guidance}", "all", things, f"   (colour {np.mean(colors):.1%})")
    right, colors = asked_for(sd, classifier, rng, GUIDANCE, pictures)
    for (kind, name), flags in {**right, ("colour", "as asked"): colors}.items():
        print_row(kind, name, flags, f"   ({len(flags)} pictures)")
    found = seen_in(sd, classifier, 200 * [""], guidance=1.0)
    for kind, name in [*right, ("object", "nothing"), ("style", "nothing")]:
        flags = [f == name for f in found[kind]]
        print_row("empty", f"{name} ({kind})", flags, f"   ({len(flags)} pictures)")


def asked_for(sd, classifier, rng, guidance, pictures):
    """Draw pictures of each object and style -> {(kind, name): is it there?}, is the colour?"""
    right, colors = {}, []
    for kind, names in (("object", world.OBJECTS), ("style", world.STYLES)):
        for name in names:
            prompts, asked = zip(*(asked_prompt(kind, name, i, rng) for i in range(pictures)))
            found = seen_in(sd, classifier, prompts, guidance)
            right[kind, name] = [f == name for f in found[kind]]
            if kind == "object":
                colors += [f == color for f, color in zip(found["color"], asked) if color]
    return right, colors


def check_classifier(classifier, rng, device):
    """Its accuracy on drawn pictures that no training saw, and on the same pictures, ruined."""
    scenes = [world.random_scene(rng) for _ in range(2000)]
    drawn = np.stack([world.draw(scene, rng).transpose(2, 0, 1) for scene in scenes])
    drawn = torch.from_numpy(drawn)
    labels = [classifier.labels(to_unit(batch, device)) for batch in drawn.split(200)]
    for kind in LABELS:
        found = [f for batch in labels for f in batch[kind]]
        right = [f == getattr(scene, kind) for f, scene in zip(found, scenes)]
        print_row("classifier", kind, right, "   (2000 freshly drawn pictures)")
    everywhere, generator = torch.ones(len(drawn)) > 0, torch.Generator().manual_seed(10**6)
    ruined = disturb(to_unit(drawn, "cpu"), everywhere, generator)
    labels = [classifier.labels(batch.to(device)) for batch in ruined.split(200)]
    for kind in ("object", "style"):
        nothing = [f == "nothing" for batch in labels for f in batch[kind]]
        print_row("classifier", f"no {kind}", nothing, "   (the same pictures, ruined)")


def seen_in(sd, classifier, prompts, guidance):
    """What the classifier sees in the prompts' pictures -> {kind: a label each}."""
    found = {key: [] for key in LABELS}
    for i in range(0, len(prompts), 50):
        batch = prompts[i : i + 50]
        seeds = [10**6 + i + j for j in range(len(batch))]
        pictures = sd.sample(batch, seeds, STEPS, guidance)
        for key, values in classifier.labels(pictures).items():
            found[key] += values
    return found


def asked_prompt(kind, name, i, rng):
    """The i-th prompt for an object or style -> (prompt, colour or None).

    Prompts with and without colour, and with and without place, take turns.
    """
    scene = world.random_scene(rng)
    color = scene.color if i % 2 else None
    thing = name if kind == "object" else scene.object
    words = f"{color} {thing}" if color else thing
    words = ("an " if words[0] in "aeiou" else "a ") + words
    if i // 2 % 2:
        words += " " + world.weighted(rng, world.PLACES[scene.place])
    style = "photo" if kind == "object" else name
    return next(iter(world.STYLES[style])).format(words), color


STAGES = {  # stage -> (function, the file whose presence says it is done)
    "tokenizer": (train_tokenizer, "tokenizer/vocab.json"),
    "vae": (train_vae, "vae/diffusion_pytorch_model.safetensors"),
    "clip": (train_clip, "clip/config.json"),
    "classifier": (train_classifier, "classifier/config.json"),
    "unet": (train_unet, "unet/diffusion_pytorch_model.safetensors"),
    "unet_dusk": (train_unet_dusk, "unet_dusk/diffusion_pytorch_model.safetensors"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TOY)
    parser.add_argument("--work", type=Path, default=Path("runs/toy-training"),
                        help="keeps the drawings, and what a stopped run needs to go on; "
                        "delete it after a change of world.py")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true",
                        help="only print the quality table of the embedded weights")
    args = parser.parse_args()
    if args.check:
        if args.out != TOY:
            parser.error("--check measures the embedded weights; it takes no --out")
        return check(args.device)
    write_layout(args.out)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        train, done = STAGES[name]
        if not (args.out / done).exists():
            print(name, flush=True)
            train(args.out, args.work, args.device)
            # another run would take the finished checkpoints for its own
            shutil.rmtree(args.work / name, ignore_errors=True)
    if args.out == TOY:
        check(args.device)


if __name__ == "__main__":
    main()
