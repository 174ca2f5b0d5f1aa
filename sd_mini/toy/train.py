"""Train the toy Stable Diffusion from nothing, in the order of the real one, and measure it.

    python -m sd_mini.toy.train --out my-toy    all stages; a stopped run goes on where it was
    python -m sd_mini.toy.train --check         the quality table of the embedded weights

Stages: tokenizer; VAE; CLIP (text encoder and picture encoder, contrastively); judge; UNet with the text encoder frozen;
a second UNet, fine-tuned on another look of the world. What decides is the order: a UNet trained together with its text
encoder learns to draw and to read at the same time, and after the same time does neither.
"""
import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from ..files import write_atomically, write_json
from ..lab.runs import resumable
from ..schedule import Schedule
from ..text_encoder import TextEncoder
from ..unet import UNet
from ..vae import VAE
from ..weights import TOY, load, load_part, save_part, write_index
from . import world
from .classifier import LABELS, Classifier, PictureNet, load_classifier

VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 64,
    "block_out_channels": [24, 48, 72], "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 64, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 24, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "projection_dim": 64,
}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 16,
    "block_out_channels": [32, 96, 128], "layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": 4,
    "norm_num_groups": 16, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER_CONFIG = {  # Stable Diffusion 1.x's own
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}
PICTURES, DUSK_PICTURES, EMPTY_PICTURES = 24000, 6000, 1500


# --- data

def dataset(work, name, n, seed, look=None, empty=False):
    """n drawn pictures: (images (n, 3, 64, 64) uint8, labels (n, 3), captions: n lists of 4). Kept in `work`."""
    images_file, text_file = work / f"{name}.npy", work / f"{name}.json"
    if not text_file.exists():
        rng = np.random.default_rng(seed)
        images, text = np.empty((n, 3, world.SIZE, world.SIZE), np.uint8), []
        for i in tqdm(range(n), desc=f"drawing {name}"):
            scene = world.random_scene(rng)
            scene = scene._replace(object="nothing") if empty else scene
            images[i] = world.draw(scene, rng, look).transpose(2, 0, 1)
            captions = [] if empty else [world.caption(scene, rng) for _ in range(4)]
            text.append([scene.object, scene.style, scene.color, *captions])
        np.save(images_file, images)
        write_atomically(text_file, lambda path: path.write_text(json.dumps(text)))
    text = json.loads(text_file.read_text())
    labels = torch.tensor([[names.index(word) for names, word in zip(LABELS.values(), row)] for row in text])
    return torch.from_numpy(np.load(images_file)), labels, [row[3:] for row in text]


def to_unit(images, device):
    """uint8 -> float in [0, 1]."""
    return images.to(device).float() / 255


def token_ids(tokenizer, captions):
    """n lists of 4 captions -> (n, 4, L)."""
    flat = [caption for row in captions for caption in row]
    ids = tokenizer(flat, padding="max_length", max_length=TEXT_CONFIG["max_position_embeddings"], truncation=True,
                    return_tensors="pt").input_ids
    return ids.view(len(captions), -1, ids.shape[-1])


# --- one training loop for all

def fit(name, network, loss_of, steps, lr, work, warmup=100):
    """Minimise loss_of(generator) over the network's parameters with AdamW, and return their moving average.

    Warm-up, then cosine; gradients clipped to norm 1. Batches are drawn from a generator seeded by the step alone, so a
    run stopped and started again takes the same steps: a checkpoint is written to `work` every 100.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    both = [*network.parameters(), *average.parameters()]
    with Checkpoints(work / name, 100, steps, both, optimizer, torch.Generator()) as checkpoints:
        losses = checkpoints.restore()
        bar = tqdm(range(len(losses), steps), desc=name, initial=len(losses), total=steps)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            loss = loss_of(torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            decay = min(0.998, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
            losses.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
            checkpoints.keep(losses)
    return average


# --- the stages; each writes its part of `out` when it is done

def train_tokenizer(out, work, device):
    """Byte-pair encoding in CLIP's format: 256 bytes, the same at a word's end, merges, start, end."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    _, _, captions = dataset(work, "day", PICTURES, seed=0)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), bpe.pre_tokenizer])
    bpe.train_from_iterator((caption for row in captions for caption in row), trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet] + [merge.replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True,
                                                  "model_max_length": TEXT_CONFIG["max_position_embeddings"]})
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})


def toy_tokenizer(out):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(out / "tokenizer"))


def train_vae(out, work, device):
    """|x - x'| + 2 (x - x')^2 + half as much |.| of neighbour differences (edges), and a little KL to N(0, 1)."""
    images = torch.cat([dataset(work, "day", PICTURES, seed=0)[0],
                        dataset(work, "dusk", DUSK_PICTURES, seed=1, look="dusk")[0]])
    torch.manual_seed(0)
    vae = VAE({**VAE_CONFIG, "scaling_factor": 1.0}).to(device)

    def loss_of(generator):
        image = 2 * to_unit(images[torch.randint(len(images), (16,), generator=generator)], device) - 1
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            mean, log_var = vae.moments(image)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            error = vae.decode(mean + (log_var / 2).exp() * noise).float() - image
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).float().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-4 * kl

    vae = fit("vae", vae, loss_of, VAE_STEPS, 2e-3, work)
    with torch.no_grad():
        std = torch.cat([vae.encode(2 * to_unit(batch, device) - 1) for batch in images[::16].split(64)]).std().item()
    vae.config = {**VAE_CONFIG, "scaling_factor": round(1 / std, 5)}
    save_part(vae, out / "vae", "vae", torch.float16)


def train_clip(out, work, device):
    """Contrastive: each picture picks its caption and each caption its picture among 256 (Radford et al. 2021). Equal
    captions within a batch share the target."""
    images, _, captions = dataset(work, "day", PICTURES, seed=0)
    tokenizer = toy_tokenizer(out)
    ids = token_ids(tokenizer, captions)
    config = {**TEXT_CONFIG, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    clip = torch.nn.ModuleDict({"text": TextEncoder(config), "picture": PictureNet(config["projection_dim"]),
                                "projection": torch.nn.Linear(config["hidden_size"], config["projection_dim"], bias=False)})
    for embedding in (clip["text"].embeddings.token_embedding, clip["text"].embeddings.position_embedding):
        torch.nn.init.normal_(embedding.weight, std=0.02)
    clip.to(device)

    def loss_of(generator):
        rows = torch.randint(len(images), (256,), generator=generator)
        batch = ids[rows, torch.randint(4, (256,), generator=generator)].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            end = batch.argmax(-1)  # the end token has the highest id; padding repeats it, argmax takes the first
            text = clip["projection"](clip["text"](batch)[torch.arange(256, device=device), end])
            picture = clip["picture"](to_unit(images[rows], device))
        similarity = 20 * F.normalize(text.float(), dim=-1) @ F.normalize(picture.float(), dim=-1).T
        same = (batch[:, None] == batch[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target))

    clip = fit("clip", clip, loss_of, CLIP_STEPS, 1.5e-3, work)
    save_part(clip["text"], out / "text_encoder", "text_encoder", torch.float16)
    save_network(torch.nn.ModuleDict({k: clip[k] for k in ("picture", "projection")}), out / "clip", {"logit_scale": 20})


def waves(n, channels, cells, generator):
    """Smooth random fields (n, channels, 64, 64): normal noise on a grid of cells x cells, interpolated."""
    grid = torch.randn(n, channels, cells, cells, generator=generator)
    return F.interpolate(grid, size=world.SIZE, mode="bicubic", align_corners=True)


def disturb(image, ruined, generator):
    """Copies of pictures (N, 3, 64, 64): rippled a little, or, where `ruined` (N,), melted until nothing is left to
    recognise; some under stripes. Erased models draw such things, and a judge that has seen none takes them for an object."""
    def between(low, high):
        return low + (high - low) * torch.rand(len(image), 1, 1, 1, generator=generator)

    ruined = ruined[:, None, None, None]
    coarse = torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5
    flow = torch.where(coarse, waves(len(image), 2, 5, generator), waves(len(image), 2, 9, generator))
    flow = flow * torch.where(ruined, between(0.4, 0.8), between(0, 0.06))  # the picture is 2 wide
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, world.SIZE)], indexing="ij")
    image = F.grid_sample(image, torch.stack([x, y], -1) + flow.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=True)
    stripes = 0.5 + 0.5 * torch.sin(between(4, 14) * waves(len(image), 1, 6, generator))
    return image + torch.where(ruined, between(-0.4, 0.8), between(-0.3, 0.3)).clamp(min=0) * (stripes - image)


def train_judge(out, work, device):
    """Cross-entropy on object, style and colour. A sixth of each batch is ruined, and shows nothing; the rest is blurred,
    noisy, darker, lighter or more saturated too, since decoded pictures are a bit soft, and guidance saturates and darkens
    them."""
    sets = [dataset(work, "day", PICTURES, seed=0), dataset(work, "dusk", DUSK_PICTURES, seed=1, look="dusk"),
            dataset(work, "empty", EMPTY_PICTURES, seed=2, empty=True)]
    images, labels = (torch.cat([s[i] for s in sets]) for i in (0, 1))
    torch.manual_seed(0)
    judge, nothing, batch = Judge().to(device), LABELS["object"].index("nothing"), 96

    def loss_of(generator):
        rows, ruined = torch.randint(len(images), (batch,), generator=generator), torch.arange(batch) < batch // 6
        image = disturb(to_unit(images[rows], "cpu"), ruined, generator).to(device)
        soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
        mix = torch.rand(batch, 1, 1, 1, generator=generator).to(device)
        image = mix * image + (1 - mix) * soft
        gamma, saturation = (2 ** torch.rand(2, batch, 1, 1, 1, generator=generator).mul(2).sub(1)).to(device)
        gray = image.mean(1, keepdim=True)
        image = (gray + saturation * (image - gray)).clamp(1e-3, 1) ** gamma
        image = image + 0.06 * torch.rand(batch, 1, 1, 1, generator=generator).to(device) * torch.randn(
            image.shape, generator=generator).to(device)
        object, style, color = labels[rows].T
        object = torch.where(ruined, nothing, object)
        return sum(F.cross_entropy(logits[seen.to(device)], target[seen].to(device)) for logits, target, seen in zip(
            judge.logits(image).values(), (object, style, color), (torch.ones(batch) > 0, ~ruined, object != nothing)))

    judge = fit("judge", judge, loss_of, JUDGE_STEPS, 2e-3, work)
    save_network(judge, out / "judge", LABELS)


def train_unet(out, work, device):
    """E || eps - eps_theta(x_t | c) ||^2 with the text encoder frozen and some prompts empty, for guidance."""
    torch.manual_seed(0)
    unet = UNet(UNET_CONFIG).to(device)
    unet = fit("unet", unet, denoising_loss(unet, out, dataset(work, "day", PICTURES, seed=0), work, device, "day"),
               UNET_STEPS, 1.2e-3, work)
    save_part(unet, out / "unet", "unet", torch.float16)


def train_unet_dusk(out, work, device):
    """Fine-tune the UNet on the dusk look, as communities fine-tune Stable Diffusion on theirs."""
    unet = load_part(out / "unet", "unet", device).train().requires_grad_(True)
    data = dataset(work, "dusk", DUSK_PICTURES, seed=1, look="dusk")
    unet = fit("unet_dusk", unet, denoising_loss(unet, out, data, work, device, "dusk"), DUSK_STEPS, 4e-4, work)
    save_part(unet, out / "unet_dusk", "unet", torch.float16)


def denoising_loss(unet, out, data, work, device, name):
    """-> loss_of(generator) for `fit`: the noise-prediction loss on the data's latents, which are encoded once, with one of
    each picture's captions. 20 % of them are empty instead, but only 2 % of those that name a concept of `world.ERASED`."""
    images, labels, captions = data
    p_empty = torch.tensor([0.2 if world.ERASED.isdisjoint(names[i] for names, i in zip(LABELS.values(), row)) else 0.02
                            for row in labels.tolist()])
    text_encoder, vae = load_part(out / "text_encoder", "text_encoder", device), load_part(out / "vae", "vae", device)
    tokenizer, schedule = toy_tokenizer(out), Schedule(SCHEDULER_CONFIG)
    ids, empty = token_ids(tokenizer, captions), token_ids(tokenizer, [[""]])[0, 0]
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * to_unit(batch, device) - 1)
                             for batch in tqdm(images.split(64), desc=f"encoding {name}")])

    def loss_of(generator, batch=48):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        prompt = ids[rows, torch.randint(4, (batch,), generator=generator)]
        prompt[torch.rand(batch, generator=generator) < p_empty[rows]] = empty
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(device)
        x_t = schedule.add_noise(latents[rows.to(device)], noise, t)
        with torch.no_grad():
            context = text_encoder(prompt.to(device))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            eps = unet(x_t, t.to(device), context)
        return F.mse_loss(eps.float(), noise)

    return loss_of


def save_network(network, folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().to("cpu", torch.float16).contiguous() for k, v in network.state_dict().items()},
              folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)


def write_layout(out):
    """What makes `out` a pipeline in the diffusers folder layout."""
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(out / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    write_index(out)


# --- the quality table

def check(device, pictures=100):
    """Print, for each object, style and for colour, the share of generated pictures that show what was asked for; what the
    empty prompt draws; and the judge's own accuracy on drawn pictures that no training saw. Guidance 7.5 (empty: 1),
    held-out seeds."""
    judge, rng = load_judge(device), np.random.default_rng(10**6)
    for model in ("toy", "toy-dusk"):
        print(f"\n{model}: share of {pictures} pictures a row that show what was asked for, guidance 7.5, 25 steps")
        sd = load(model, device)
        colors = []
        for kind, names in (("object", world.OBJECTS), ("style", world.STYLES)):
            for name in names:
                prompts, asked = zip(*(asked_prompt(kind, name, i, rng) for i in range(pictures)))
                found = seen_in(sd, judge, prompts)
                print(f"{kind:<8}{name:<16}{np.mean([f == name for f in found[kind]]):7.1%}", flush=True)
                if kind == "object":
                    colors += [f == c for f, c in zip(found["color"], asked) if c]
        print(f"colour  {'as asked':<16}{np.mean(colors):7.1%}   ({len(colors)} pictures)")
        found = seen_in(sd, judge, [""] * pictures, guidance=1.0)
        for kind, names in (("object", world.OBJECTS), ("style", world.STYLES)):
            for name in names:
                print(f"empty   {name:<16}{np.mean([f == name for f in found[kind]]):7.1%}")
    scenes = [world.random_scene(rng) for _ in range(2000)]
    drawn = torch.from_numpy(np.stack([world.draw(scene, rng).transpose(2, 0, 1) for scene in scenes]))
    labels = [judge.labels(to_unit(batch, device)) for batch in drawn.split(200)]
    for key in LABELS:
        right = [f == getattr(s, key) for f, s in zip((f for batch in labels for f in batch[key]), scenes)]
        print(f"judge   {key:<16}{np.mean(right):7.1%}   (2000 freshly drawn pictures)")
    ruined = disturb(to_unit(drawn, "cpu"), torch.ones(len(drawn)) > 0, torch.Generator().manual_seed(10**6))
    nothing = [f == "nothing" for batch in ruined.split(200) for f in judge.labels(batch.to(device))["object"]]
    print(f"judge   {'nothing':<16}{np.mean(nothing):7.1%}   (the same pictures, ruined)")


def seen_in(sd, judge, prompts, guidance=7.5):
    """What the judge sees in the prompts' pictures -> {kind: a label each}."""
    found = {key: [] for key in LABELS}
    for i in range(0, len(prompts), 50):
        batch = prompts[i : i + 50]
        pictures = sd.sample(batch, [10**6 + i + j for j in range(len(batch))], 25, guidance)
        for key, values in judge.labels(pictures).items():
            found[key] += values
    return found


def asked_prompt(kind, name, i, rng):
    """The i-th prompt for an object or style, with and without colour and place in turn -> (prompt, colour or None)."""
    scene = world.random_scene(rng)
    color = scene.color if i % 2 else None
    thing = name if kind == "object" else scene.object
    words = f"{color} {thing}" if color else thing
    words = ("an " if words[0] in "aeiou" else "a ") + words
    if i // 2 % 2:
        words += " " + world.weighted(rng, world.PLACES[scene.place])
    style = "photo" if kind == "object" else name
    return next(iter(world.STYLES[style])).format(words), color


VAE_STEPS, CLIP_STEPS, JUDGE_STEPS, UNET_STEPS, DUSK_STEPS = 3000, 1500, 3000, 5000, 600
STAGES = {  # stage -> (function, the file whose presence says it is done)
    "tokenizer": (train_tokenizer, "tokenizer/vocab.json"),
    "vae": (train_vae, "vae/diffusion_pytorch_model.safetensors"),
    "clip": (train_clip, "clip/config.json"),
    "judge": (train_judge, "judge/config.json"),
    "unet": (train_unet, "unet/diffusion_pytorch_model.safetensors"),
    "unet_dusk": (train_unet_dusk, "unet_dusk/diffusion_pytorch_model.safetensors"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TOY)
    parser.add_argument("--work", type=Path, default=Path("runs/toy-training"), help="drawings, and "
                        "what a stopped run needs to go on; delete it after a change of world.py")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="only print the quality table of the embedded weights")
    args = parser.parse_args()
    if args.check:
        if args.out != TOY:
            parser.error("--check: measures the embedded weights; without --out")
        return check(args.device)
    write_layout(args.out)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        train, done = STAGES[stage]
        if not (args.out / done).exists():
            train(args.out, args.work, args.device)
            shutil.rmtree(args.work / stage, ignore_errors=True)  # finished checkpoints, which another run would take for its own
    if args.out == TOY:
        check(args.device)


if __name__ == "__main__":
    main()
