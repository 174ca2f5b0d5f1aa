"""AdvUnlearn in one file: erase a concept from Stable Diffusion so that it stays erased under attack.

    python advunlearn.py --concept church

Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models", NeurIPS
2024 (arXiv 2405.15234); the evaluation attack is UnlearnDiffAtk, Zhang et al., ECCV 2024 (arXiv 2310.11868). Read from
top to bottom beside the paper: settings, diffusion, erase, attack, retain, outer loop, evaluation, command line. The
model behind it, `sd_mini`, is used through four calls: encode a prompt, predict noise, denoise step by step, sample; and
where a text becomes tokens, a picture latents, latents noisy, or a part is trained, through its parts `tokenizer`,
`text_encoder`, `vae`, `schedule` and `unet`.

Glossary
    theta, theta_o  the weights in training; the original, frozen ones. In code: the models `sd` and `sd_o`
    eps             Gaussian noise; eps_theta(x_t | c) is the noise that the model sees in x_t, given the prompt c; eps_o
                    is what the original model sees
    x_0, x_t, t     a picture's latents (4, h, w); the same with noise of time step t in [0, 1000) added
    alpha_bar_t     how much of x_0 is left in x_t, as a share of variance
    c, c', c*       the concept's prompt; the same with some prefix; with the worst prefix that the attack finds
    empty, r        the empty prompt; a retain prompt, for something else
    z               in the loop: some `Latents`, each with its prompt, t, x_t and what eps_o is there
    delta           the prefix as embeddings (k, D), one row a token; p: the prefix as k distributions over the vocabulary
    eta             how far ESD (erased Stable Diffusion), erasing without attack, pushes away from the concept
    gamma           the weight of the retain loss
    N, L, D, k, V   prompts in a batch, context length in tokens, embedding width, tokens of the prefix, of the vocabulary
    || . ||^2       in all losses the mean over coordinates, so that they compare across sizes
    ranks           what several processes share under torchrun; in one process TURN is everything, and nothing else happens
"""
from __future__ import annotations

import argparse
import copy
import csv
import difflib
import math
import os
import platform
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints
from zlib import crc32

# ------------------------------------------------------------------------------------------------------------ settings


def setting(default, help, choices=None, low=-math.inf, high=math.inf):
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


class Attack(NamedTuple):
    """An attack's kind (embedding, fast, token or inversion), steps, learning rate, prefix length, and radius or None."""

    kind: str
    steps: int
    lr: float
    k: int
    radius: float | None = None


@dataclass
class Config:
    """Every setting is a flag, `--erase-batch 4` for `erase_batch`. Training's defaults are the paper's; an evaluation
    attack takes 180 steps, where UnlearnDiffAtk's takes up to 40 at each of 50 time steps."""

    concept: str = setting("church", "what to erase, several with commas; prompts/concepts.csv has settings for some")
    task: str = setting("train", "train: erase, then evaluate; evaluate: score --text-encoder; compare: erase in the ways of "
                                 "the paper's tables, side by side; sample: draw --prompts",
                        ("train", "evaluate", "compare", "sample"))
    methods: tuple[str, ...] = setting((), "what --task compare compares, by number or name (default: everything)")
    model: str | None = setting(None, "toy, toy-dusk, a diffusers folder, a single .safetensors file or a hub id (default: "
                                      "CompVis/stable-diffusion-v1-4 with CUDA, toy without)")
    revision: str | None = setting(None, "commit, tag or branch of a hub id")
    tokenizer: str | None = setting(None, "folder or hub id with tokenizer and configs for a single file (default: v1.4's)")
    text_encoder: str | None = setting(None, "a text encoder to put in place of the model's own: a folder, or a hub id with "
                                             "a sub-folder, OPTML-Group/AdvUnlearn:church_unlearned")
    prompts: tuple[str, ...] = setting((), "what --task sample draws")
    out: str | None = setting(None, "folder for what a run leaves (default: runs/CONCEPT, runs/CONCEPT-evaluate, "
                                    "runs/CONCEPT-compare or runs/sample)")
    device: str | None = setting(None, "cpu or cuda (default: cuda where there is one)")
    precision: str | None = setting(None, "of the networks that are not trained, fp32 or bf16; what is trained stays in fp32 "
                                          "(default: bf16 on a GPU that has it)", ("fp32", "bf16"))
    low_memory: bool = setting(False, "compute the UNet's activations again in the backward pass instead of keeping them")
    seed: int = setting(0, "seed of everything random in training and attacks, and of --task sample's pictures", low=0,
                        high=2**31 - 1)
    resume: bool = setting(False, "go on with the run that was begun in the folder")
    overwrite: bool = setting(False, "start anew where the folder holds a run")
    save_every: int = setting(100, "iterations between checkpoints", low=1)
    debug: bool = setting(False, "show where an error arose")
    save_pipeline: bool = setting(False, "write the whole erased pipeline too, to OUT/pipeline, untrained parts as --precision "
                                         "rounds them")

    train: str = setting("text_encoder", "what to train: the text encoder, which the paper finds better, the UNet, or its "
                                         "cross-attention alone", ("text_encoder", "unet", "cross_attention"))
    layers: int | None = setting(None, "train the first N layers of the text encoder only; 0: all of it (default: the "
                                       "concept's, 1 for objects and styles)", low=0)
    steps: int = setting(1000, "iterations of the outer loop", low=1)
    warmup: int = setting(200, "iterations before the attack starts", low=0)
    lr: float = setting(1e-5, "Adam's learning rate for theta", low=1e-10, high=1)
    eta: float = setting(1.0, "eta, ESD's strength", low=0)
    erase_batch: int = setting(1, "noisy latents x_t for the erase loss of an iteration", low=1)
    phrasings: int = setting(1, "erase this many phrasings of the concept, from the bare name on (see PHRASINGS)", low=1, high=12)
    plain_share: float = setting(0.0, "share of iterations after warm-up that erase the prompt without attack", low=0, high=1)
    retain_weight: float | None = setting(None, "gamma (default: the concept's; 0.5 for objects and styles)", low=0)
    retain_batch: int = setting(5, "retain prompts of an iteration", low=1)
    retain_set: str = setting("coco", "prompts/retain_NAME.csv (coco, imagenet; toy, photos), or a CSV file of your own")
    retain_unfiltered: bool = setting(False, "keep the retain prompts that name the concept, as the published lists do")

    attack: str = setting("embedding", "attack in training: embedding (continuous), token (discrete), fast (one sign "
                                       "step) or none", ("embedding", "token", "fast", "none"))
    attack_steps: int = setting(30, "steps of the attack in training", low=1)
    attack_lr: float = setting(1e-3, "Adam's learning rate for the prefix; attack_steps * attack_lr is its reach, to be "
                                     "judged beside the spread of token embeddings", low=1e-10, high=10)
    attack_radius: float | None = setting(None, "keep the prefix within this distance of its start, in each coordinate",
                                           low=1e-10)
    prefix: int = setting(1, "k, tokens of the prefix in training", low=1)

    trajectories: int = setting(32, "sampling runs of the frozen model behind the bank of x_t, for the prompts to erase and "
                                    "for those to retain; at least one for each prompt", low=1)
    trajectory_steps: int = setting(50, "DDIM steps of each", low=1, high=500)
    trajectory_guidance: float = setting(3.0, "guidance of each", low=0)
    fresh_trajectories: bool = setting(False, "sample anew for every x_t, as the published code does, not from the bank")

    suite: str = setting("real", "the other evaluation prompts: prompts/suite_NAME.csv (real; toy)")
    judge: str | None = setting(None, "MODEL:LABEL, an image classifier or CLIP, a folder or on the hub, and what it calls the "
                                      "concept (default: the concept's; microsoft/resnet-50; the toy's own)")
    eval_attacks: tuple[str, ...] = setting(("token", "embedding"), "attacks in evaluation",
                                              ("token", "embedding", "inversion"))
    eval_set: str | None = setting(None, "CSV of the prompts to attack (default: prompts/CONCEPT.csv, or from templates)")
    eval_prompts: int = setting(50, "prompts of the concept to attack; at most as many of paraphrases, neighbours and styles", low=1)
    eval_utility: int = setting(60, "held-out prompts without the concept, for utility", low=2)
    eval_steps: int = setting(50, "DDIM steps of the pictures that are judged", low=1, high=500)
    eval_prefix: int = setting(3, "k, tokens of the prefix in evaluation", low=1)
    eval_attack_steps: int = setting(180, "steps of each attack in evaluation", low=1)
    eval_looks: int = setting(3, "pictures drawn per attacked prompt, evenly over these steps; the first that shows the "
                                 "concept ends the attack on its prompt", low=1)
    token_lr: float = setting(0.01, "Adam's learning rate for p in the token attack, of evaluation and of training", low=1e-10,
                              high=10)
    eval_embedding_lr: float = setting(0.01, "Adam's learning rate for delta in the embedding and the inversion attack",
                                       low=1e-10, high=10)
    eval_batch: int = setting(5, "prompts attacked, and pictures drawn, at a time; 5 takes no more memory than training", low=1)
    save_images: str | None = setting(None, "folder for every evaluation picture, prompt and seed in its name")

    @property
    def module(self):
        """The part of the pipeline that holds what is trained."""
        return "text_encoder" if self.train == "text_encoder" else "unet"

    def training_attack(self):
        if self.attack == "fast":  # one step as long as all steps of the full attack together
            return Attack("fast", 1, self.attack_steps * self.attack_lr, self.prefix, self.attack_radius)
        lr = self.token_lr if self.attack == "token" else self.attack_lr  # p and delta have scales of their own
        return Attack(self.attack, self.attack_steps, lr, self.prefix, self.attack_radius)

    def evaluation_attack(self, kind):
        """Inversion learns a single embedding, the others a prefix."""
        return Attack(kind, self.eval_attack_steps, self.token_lr if kind == "token" else self.eval_embedding_lr,
                      1 if kind == "inversion" else self.eval_prefix)


# Where the toy model departs from the paper. It has few words and a tiny text encoder, in which erasing "church" does not
# reach "a sketch of a church" by itself: hence the whole of it is trained, token embeddings too, as in the paper's runs for
# nudity; three phrasings, fewer and longer steps, an eta and gamma that pull harder both ways, and some plain steps, without
# which the unattacked prompt stays under-trained. The attack's prefix is five tokens long, in training as in evaluation; its
# two steps are as long together as the embeddings' spread three times over. Found on church and parachute.
TOY = dict(layers=0, steps=300, warmup=30, lr=4e-4, eta=2.0, erase_batch=8, phrasings=3, plain_share=0.1, retain_weight=15.0,
           retain_batch=12, attack_steps=2, attack_lr=0.04, prefix=5, trajectories=48, trajectory_steps=20,
           retain_set="toy", suite="toy", eval_prompts=24, eval_steps=20, eval_attack_steps=100, eval_looks=4,
           eval_prefix=5, eval_batch=25)

PHRASINGS = {  # by kind of concept
    "object": ("{}", "a photo of a {}", "a sketch of a {}", "a painting of a {} by van gogh", "a red {} in the snow",
               "a picture of a green {} in the sky", "a painting of a {} at night by van gogh", "a sketch of a red {} at night",
               "a yellow {} on the grass", "a photo of a blue {} in the desert", "a purple {} in the style of van gogh",
               "a pencil drawing of a pink {} on the grass"),
    "style": ("{}", "a painting of a house by {}", "a red car in the style of {}", "a painting of a tree in the snow by {}",
              "a boat in the style of {}", "a painting of a blue golf ball by {}", "a balloon in the sky in the style of {}",
              "a painting of a yellow house at night by {}", "a green boat on the grass in the style of {}",
              "a painting of a gray tree in the desert by {}", "a purple house in the style of {}",
              "a painting of a pink car at night by {}"),
}
PROMPTS = Path(__file__).parent / "prompts"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and exit status 2."""
        self.exit(2, f"error: {message}\n")


def parse(argv=None):
    """Command line -> {setting: value} of the flags given; the parser is made from Config, and values are checked here,
    before anything is loaded."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False)
    hints, flags = get_type_hints(Config), {}
    for f in fields(Config):
        flag, kind, choices = "--" + f.name.replace("_", "-"), hints[f.name], f.metadata["choices"]
        help = f.metadata["help"] + ("" if f.default in (None, ()) or f.default is False else f" (default: {f.default})")
        flags[flag] = f
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        else:
            kind = next(k for k in (get_args(kind) or (kind,)) if k in (int, float, str))
            parser.add_argument(flag, type=kind, nargs="+" if isinstance(f.default, tuple) else None, help=help,
                                metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper())
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], flags, 1, 0.5)
        parser.error(f"unknown flag {word!r}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    for flag, f in flags.items():
        if hasattr(given, f.name):
            check_value(flag, getattr(given, f.name), f.metadata, parser.error)
    return vars(given)


def check_value(flag, value, allowed, refuse):
    """Refuse what is not among the choices, out of range, or not text."""
    if isinstance(value, (list, tuple)):
        for each in value:
            check_value(flag, each, allowed, refuse)
    elif isinstance(value, str):
        choices = allowed["choices"]
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, 1, 0.5)
            refuse(f"{flag} {value!r}: choose from {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))
        if not value.strip():
            refuse(f"{flag}: is empty")
        if not value.isprintable():
            refuse(f"{flag} {value[:40]!r}: holds control characters")
        if len(value) > 1000:
            refuse(f"{flag} {value[:40]!r}...: {len(value):,} characters, more than any prompt's or path's 1,000")
    elif not isinstance(value, bool) and not (allowed["low"] <= value <= allowed["high"] and math.isfinite(value)):
        refuse(f"{flag} {value}: must be between {allowed['low']} and {allowed['high']}" if allowed["high"] < math.inf
               else f"{flag} {value}: must be a number, at least {allowed['low']}")


if __name__ == "__main__":
    GIVEN = parse()  # here, so that --help and a mistyped flag are answered before torch is loaded, which takes seconds
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on the CPU takes huge pages: a little faster, the same bytes

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sd_mini  # noqa: E402
from sd_mini import checkpoint, judges, ranks, report  # noqa: E402

# ----------------------------------------------------------------------------------------------------------- diffusion


def squared_error(a, b):
    """(N, ...), (N, ...) -> (N,): the mean squared difference of each row, in float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def ddpm_loss(sd, x_0, t, noise, context):
    """The noise-prediction loss: how well the model, told c, finds the noise in a noised picture.

        l(theta, c) = || eps - eps_theta(x_t | c) ||^2,    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

    x_0, noise (N, 4, h, w); t (N,); context (N, L, D) -> (N,), a mean over the latent's coordinates.
    Source: Ho et al. 2020, equation 14; with a target picture x_0 it is UnlearnDiffAtk's attack objective.
    """
    x_t = sd.schedule.add_noise(x_0, noise, t)
    return squared_error(sd.predict_noise(x_t, t, context), noise)


# --------------------------------------------------------------------------------------------------------------- erase


def esd_target(eps_c, eps_empty, eta):
    """What the erased model should predict for c: the original's guidance towards c, turned round.

        eps_o(x_t | empty) - eta * (eps_o(x_t | c) - eps_o(x_t | empty))

    Any shapes that match. Source: Gandikota et al. 2023 (ESD), equation 6; eta = 1 in the paper.
    """
    return eps_empty - eta * (eps_c - eps_empty)


def erase_loss(sd, x_t, t, context, target):
    """l_ESD(theta, c) = || eps_theta(x_t | c) - target ||^2 -> (N,). In AdvUnlearn the context is that of c*."""
    return squared_error(sd.predict_noise(x_t, t, context), target)


class Latents(NamedTuple):
    """n noisy latents on the way of the frozen model's sampling, with what it predicted there."""

    prompt: torch.Tensor  # (n,) which of the prompts was sampled
    t: torch.Tensor  # (n,)
    x_t: torch.Tensor  # (n, 4, h, w)
    eps_c: torch.Tensor  # (n, 4, h, w), eps_o(x_t | c)
    eps_empty: torch.Tensor  # (n, 4, h, w), eps_o(x_t | empty)

    def take(self, rows):
        return Latents(*(column[rows] for column in self))

    def to(self, device):
        return Latents(*(column.to(device) for column in self))


@torch.no_grad()
def sample_latents(sd_o, prompts, seeds, config, stop=None):
    """Guided DDIM runs of the frozen model, one per prompt and seed, kept at every step; both predictions fall out of
    guided sampling for free. With `stop` the runs end at that step, and only the latents there are kept.
    """
    run = sd_o.denoise(sd_o.initial_noise(seeds), sd_o.encode_prompt(prompts), config.trajectory_steps, config.trajectory_guidance)
    rows, kept = torch.arange(len(prompts)), []
    # The range comes first: zip then stops before the UNet is asked once more.
    for _, (t, x_t, eps_c, eps_empty) in zip(range(config.trajectory_steps if stop is None else stop + 1), run):
        kept.append(Latents(rows, torch.full_like(rows, t), x_t, eps_c, eps_empty))
    return Latents(*map(torch.cat, zip(*(kept if stop is None else kept[-1:]))))


def trajectory_bank(sd_o, prompts, config):
    """All latents of `config.trajectories` sampling runs, the prompts taking turns, each at least once -> draw(n,
    generator) -> Latents.

    The published code makes a new sampling run of 1 to 50 guided steps for every single attack step and outer step. But
    neither x_t nor eps_o depends on the text encoder in training: run them once, draw from them ever after. The same x_t
    in distribution, and an attack step costs one forward and backward of the UNet and nothing else. With `--train unet`
    the published code samples with the UNet in training, so that its x_t drift as the concept fades; the bank's x_t stay
    those of the original model: where the concept is drawn, which is where it has to be erased.
    """
    runs = torch.arange(max(config.trajectories, len(prompts)))
    sampled, which, batches = [], runs % len(prompts), runs.split(config.eval_batch)
    seed = 1_000_000 * (config.seed + 1)  # of the first run
    for rows in tqdm(batches[ranks.TURN], "sampling the bank", leave=False):
        latents = sample_latents(sd_o, [prompts[i] for i in which[rows]], [seed + int(row) for row in rows], config)
        sampled.append(latents._replace(prompt=which[rows][latents.prompt]).to("cpu"))  # 80 prompts at full size: 0.8 GB
    bank = Latents(*map(torch.cat, zip(*ranks.exchange(sampled, len(batches), sd_o.device))))
    return lambda n, generator: bank.take(torch.randint(len(bank.t), (n,), generator=generator)).to(sd_o.device)


def fresh_trajectories(sd_o, prompts, config):
    """The published schedule, for comparison: each draw is n sampling runs of its own, up to a random step."""
    def draw(n, generator):
        prompt = torch.randint(len(prompts), (n,), generator=generator)
        stop = int(torch.randint(config.trajectory_steps, (), generator=generator))
        seeds = torch.randint(2**31, (n,), generator=generator).tolist()
        return sample_latents(sd_o, [prompts[i] for i in prompt], seeds, config, stop)._replace(prompt=prompt)
    return draw


# -------------------------------------------------------------------------------------------------------------- attack


def insert_prefix(tokens, prefix):
    """Put k tokens behind the start token: [start, prefix, prompt, end, padding], still L long.

    tokens (N, L) ids or (N, L, D) embeddings, prefix (N, k) or (N, k, D) -> like tokens. The last k, which must be
    padding (see `check_room`), fall off.
    """
    return torch.cat([tokens[:, :1], prefix, tokens[:, 1 : tokens.shape[1] - prefix.shape[1]]], dim=1)


def check_room(sd, prompts, k):
    """Prompts -> ids (N, L), or ValueError where start, k prefix tokens, a prompt and the end exceed the context."""
    for prompt in prompts:
        length = len(sd.tokenizer(prompt).input_ids)  # in tokens: one word may be several
        if length + k > sd.context_length:
            raise ValueError(f"{prompt[:60]!r} takes {length} tokens; with {k} more it exceeds the {sd.context_length} "
                             "that the model reads: shorten the prompt or the prefix")
    return sd.tokenize(prompts)


def encode_with_prefix(sd, ids, delta):
    """ids (N, L) and prefix embeddings delta (N, k, D) -> context (N, L, D), with gradients to delta."""
    embeddings = sd.text_encoder.embeddings.token_embedding(ids)
    return sd.text_encoder(embeddings=insert_prefix(embeddings, delta))


def attack_loss(sd, x_t, t, context, eps_c):
    """l_atk(theta, c') = || eps_theta(x_t | c') - eps_o(x_t | c) ||^2 -> (N,): how far the prompt c' is from making the
    erased model do what the original did for c. No target picture is needed. Source: the paper's lower level."""
    return squared_error(sd.predict_noise(x_t, t, context), eps_c)


def embedding_attack(table, start, loss_of, attack):
    """Continuous attack: descend on prefix embeddings, which no token need have.

        c* = argmin over ||delta - delta_0||_inf <= radius of  l_atk(theta, [delta, c])

    table (V, D) token embeddings, start (N, k) ids to begin at, loss_of(delta) -> (N,). Yields, at each step, delta
    (N, k, D) and the losses (N,) before the step. Kind "fast": steps of lr * sign(gradient) instead of Adam's. The
    published code has no radius; steps * lr is about how far Adam can go, to be judged beside the spread of `table`.
    Gradients are fresh at each step (there they pile up).
    """
    delta_0 = table[start].detach().float()
    delta = delta_0.clone().requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=attack.lr)
    for _ in range(attack.steps):
        losses = loss_of(delta)
        delta.grad = torch.autograd.grad(losses.sum(), delta)[0]
        with torch.no_grad():
            if attack.kind == "fast":
                delta -= attack.lr * delta.grad.sign()
            else:
                adam.step()
            if attack.radius is not None:
                delta.copy_(delta_0 + (delta - delta_0).clamp(-attack.radius, attack.radius))
        yield delta.detach().clone(), losses.detach()


def project_simplex(v):
    """The nearest point of the probability simplex for each row: argmin over p >= 0, sum p = 1 of ||p - v||.

    (..., V) -> (..., V). p = max(v - tau, 0), with tau from the sorted row. Source: Duchi et al. 2008, figure 1.
    """
    u = v.sort(dim=-1, descending=True).values
    excess = (u.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1, device=v.device)
    last = (u > excess).sum(-1, keepdim=True) - 1  # the last sorted coordinate that stays positive
    return (v - excess.gather(-1, last)).clamp(min=0)


@lru_cache(maxsize=4)
def legal_tokens(tokenizer):
    """Ids (V',) of the tokens that survive as text: printable, and, decoded and tokenised again, themselves."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in ids])
    return torch.tensor([i for i, text, row in zip(ids, texts, tokenizer(texts).input_ids)
                         if text.isprintable() and row[1:-1] == [i]])


def token_attack(table, legal, n, loss_of, attack, generator):
    """Discrete attack (UnlearnDiffAtk): descend on distributions p over tokens, one for each of k positions.

        delta = onehot(token ~ p) E + (p E - stop_gradient(p E)),    p <- project_simplex(Adam step on p)

    Each step draws one token per position and lets the gradient through as if p itself had been embedded
    (straight-through). table = E (V, D), legal (V',) the ids allowed, loss_of(delta) -> (N,). Yields, at each step, the
    likeliest ids (N, k) and the losses (N,) of the tokens drawn. Source: UnlearnDiffAtk and its code, with weight decay
    0.1; decoupled here (AdamW), since added to the gradient it drowns it.
    """
    table = table[legal].detach().float()
    p = torch.rand((n, attack.k, len(legal)), generator=generator).to(table.device)
    p = project_simplex(p / p.sum(-1, keepdim=True)).requires_grad_(True)
    adam = torch.optim.AdamW([p], lr=attack.lr, weight_decay=0.1)
    for _ in range(attack.steps):
        drawn = torch.multinomial(p.detach().flatten(0, 1).cpu(), 1, generator=generator).view(n, attack.k)
        soft = p @ table
        losses = loss_of(table[drawn.to(table.device)] + soft - soft.detach())
        p.grad = torch.autograd.grad(losses.sum(), p)[0]
        adam.step()
        with torch.no_grad():
            p.copy_(project_simplex(p))
        yield legal.to(table.device)[p.argmax(-1)], losses.detach()


def run_attack(sd, attack, n, loss_of, generator):
    """The attack asked for, on n prefixes at once: yields (delta (N, k, D), ids (N, k) or None, losses (N,))."""
    table, legal = sd.text_encoder.embeddings.token_embedding.weight, legal_tokens(sd.tokenizer)
    if attack.kind == "token":
        for ids, losses in token_attack(table, legal, n, loss_of, attack, generator):
            yield table[ids].detach(), ids, losses
    else:
        start = legal[torch.randint(len(legal), (n, attack.k), generator=generator)].to(table.device)
        for delta, losses in embedding_attack(table, start, loss_of, attack):
            yield delta, None, losses


# -------------------------------------------------------------------------------------------------------------- retain


def retain_loss(sd, x_t, t, context, eps_r):
    """|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2 -> (N,): for other prompts r, stay what you were. Without it adversarial
    training ruins the pictures of everything else (the paper's FID)."""
    return squared_error(sd.predict_noise(x_t, t, context), eps_r)


def one_of(words):
    """A pattern that finds any of the words, in capitals or with the plural's s or es too, but not within another word."""
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})(s|es)?\b", re.IGNORECASE)


def without_concept(prompts, words):
    """-> (prompts kept, prompts that name the concept by one of the words): a retain set that holds it undoes erasing."""
    pattern = one_of(words)
    return [p for p in prompts if not pattern.search(p)], [p for p in prompts if pattern.search(p)]


# ---------------------------------------------------------------------------------------------------------- outer loop


def parameters_to_train(sd, config):
    """theta: the UNet, its cross-attention, the whole text encoder, or its first `layers` layers (by index: a match on the
    name's beginning would take layers 10 and 11 for layer 1)."""
    if config.train == "unet":
        return list(sd.unet.parameters())
    if config.train == "cross_attention":  # ESD-x of Gandikota et al.; "attn2" is its published name
        return [p for name, p in sd.unet.named_parameters() if ".attn2." in name]
    layers = sd.text_encoder.encoder.layers
    if config.layers > len(layers):
        raise ValueError(f"--layers {config.layers}: this text encoder has {len(layers)}")
    return list((layers[: config.layers] if config.layers else sd.text_encoder).parameters())


def adversarial_prefix(sd, ids, draw, config, generator):
    """Solve the lower level: -> (delta (N, k, D), mean l_atk just before its last step).

    Each of the N = `erase_batch` rows gets a prefix of its own, and each attack step new latents, so that a prefix
    works at any t and for any phrasing of the concept (`ids`).
    """
    def loss_of(delta):
        z = draw(len(delta), generator)
        return attack_loss(sd, z.x_t, z.t, encode_with_prefix(sd, ids[z.prompt], delta), z.eps_c)

    *_, (delta, _, losses) = run_attack(sd, config.training_attack(), config.erase_batch, loss_of, generator)
    return delta, losses.mean().item()


LOSSES = ("erase", "attack", "retain")


def check_finite(history):
    """A loss that is not finite ends the run: it is never averaged away."""
    if not all(math.isfinite(loss) for loss in history[-1] if loss is not None):
        losses = ", ".join(f"{name} {loss}" for name, loss in zip(LOSSES, history[-1]))
        raise ArithmeticError(f"iteration {len(history) - 1}: a loss is not finite ({losses}); the last checkpoint is whole; "
                              "--overwrite starts anew, with a smaller --lr or --attack-lr")


def advunlearn(sd, sd_o, erase_prompts, retain_prompts, config, folder=None):
    """The paper's algorithm: trains `sd` in place, returns the losses [(erase, attack, retain), ...]; keeps its state in
    `folder`, and goes on from there.

        min over theta  l_ESD(theta, c*) + gamma * E_r || eps_theta(x_t | r) - eps_o(x_t | r) ||^2,   c* = argmin l_atk

    With `attack` none and gamma 0 this is ESD; with gamma 0 alone it is plain adversarial training. The banks' seed is
    1,000,000 * (seed + 1); one generator, of seed `seed`, draws all else, in this order: after warm-up and with an attack,
    whether the iteration is a plain one; the erase latents; the prefix; the retain latents. In the end theta is frozen again.
    """
    generator = torch.Generator().manual_seed(config.seed)
    source = fresh_trajectories if config.fresh_trajectories else trajectory_bank
    ids, retain_ids = check_room(sd, erase_prompts, config.prefix), check_room(sd, retain_prompts, 0)
    draw, draw_retain = source(sd_o, erase_prompts, config), source(sd_o, retain_prompts, config)
    theta = [p.requires_grad_(True) for p in parameters_to_train(sd, config)]
    optimizer = torch.optim.Adam(theta, lr=config.lr)

    with checkpoint.Checkpoints(folder, config.save_every, config.steps, theta, optimizer, generator) as checkpoints:
        history = checkpoints.restore()
        bar = tqdm(range(len(history), config.steps), "erasing", initial=len(history), total=config.steps)
        for i in bar:
            plain = i < config.warmup or config.attack == "none" or torch.rand((), generator=generator) < config.plain_share
            z = draw(config.erase_batch, generator)
            if plain:
                context, l_attack = sd.text_encoder(ids[z.prompt]), None
            else:
                delta, l_attack = adversarial_prefix(sd, ids, draw, config, generator)
                context = encode_with_prefix(sd, ids[z.prompt], delta)
            target = esd_target(z.eps_c, z.eps_empty, config.eta)
            l_erase = erase_loss(sd, z.x_t, z.t, context, target).mean()
            r = draw_retain(config.retain_batch, generator).take(ranks.TURN)  # all of them; under torchrun this process's share
            with torch.set_grad_enabled(config.retain_weight > 0):  # with gamma 0 for the plot alone
                losses = retain_loss(sd, r.x_t, r.t, sd.text_encoder(retain_ids[r.prompt]), r.eps_c)  # whose c is r
            l_retain = ranks.mean(losses, config.retain_batch)

            optimizer.zero_grad()
            (l_erase + config.retain_weight * l_retain).backward()
            ranks.average([l_retain.detach(), *(p.grad for p in theta)])  # in place, l_retain too
            history.append((l_erase.item(), l_attack, l_retain.item()))
            check_finite(history)
            optimizer.step()
            bar.set_postfix({name: f"{loss:.3g}" for name, loss in zip(LOSSES, history[-1]) if loss is not None})
            checkpoints.keep(history)
    for p in theta:
        p.requires_grad_(False).grad = None
    return history


# ---------------------------------------------------------------------------------------------------------- evaluation


class Row(NamedTuple):
    """A prompt of an evaluation file; `label` is what its picture should show."""

    prompt: str
    seed: int
    guidance: float
    label: str


class Concept(NamedTuple):
    """What is erased, with its settings: a row of prompts/concepts.csv, or the defaults for any other name."""

    name: str
    kind: str = "object"  # or style
    synonyms: tuple[str, ...] = ()
    retain_weight: float = 0.5
    layers: int = 1
    judge: str = "microsoft/resnet-50"

    @property
    def words(self):
        return (self.name, *self.synonyms)

    def rows(self, config):
        """Evaluation prompts: prompts/NAME.csv, or else the phrasings that are not erased in training (all, where all are)."""
        path = PROMPTS / f"{report.slug(self.name)}.csv"
        if path.is_file():
            return read_rows(path, self.name)[: config.eval_prompts]
        unseen = PHRASINGS[self.kind][config.phrasings :] or PHRASINGS[self.kind]
        return [Row(unseen[i % len(unseen)].format(self.name), 5000 + i, 7.5, self.name) for i in range(config.eval_prompts)]


def read_csv(path, column="prompt"):
    """A CSV file with a header and that column -> its rows as dicts."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None
    if not rows or column not in rows[0]:
        raise ValueError(f"{path}: " + (f"no column {column!r}" if rows else "holds no rows"))
    for line, row in enumerate(rows, 2):
        if not row[column]:
            raise ValueError(f"{path}, line {line}: its {column} is empty")
    return rows


def read_rows(path, label=None, **wanted):
    """Evaluation prompts, in the columns of the UnlearnDiffAtk files; of a suite, those whose columns are as wanted."""
    rows = []
    for line, r in enumerate(read_csv(path), 2):
        try:
            row = Row(r["prompt"], int(r.get("evaluation_seed") or 0), float(r.get("evaluation_guidance") or 7.5),
                      r.get("label") or label)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: evaluation_seed or evaluation_guidance: {error}") from None
        if not (row.label and 0 <= row.seed < 2**63 and math.isfinite(row.guidance)):
            raise ValueError(f"{path}, line {line}: label, evaluation_seed or evaluation_guidance: empty or out of range")
        if all(r[column] == value for column, value in wanted.items()):
            rows.append(row)
    return rows


def read_concepts(names):
    """"church,parachute" -> the concepts."""
    known = {r["concept"]: r for r in read_csv(PROMPTS / "concepts.csv", "concept")}
    concepts = []
    for name in filter(None, (name.strip().lower() for name in names.split(","))):
        r = known.get(name)
        concepts.append(Concept(name) if r is None else Concept(
            name, r["kind"], tuple(filter(None, r["synonyms"].split("|"))), float(r["retain_weight"]), int(r["layers"]),
            r["judge"] or Concept(name).judge))
    if not concepts:
        raise ValueError(f"--concept {names!r}: names nothing")
    return concepts


class Exam(NamedTuple):
    """What every model of a run is asked, and who marks it."""

    rows: list[Row]  # prompts for the concept; these are attacked
    paraphrases: list[Row]  # prompts that mean it and never name it
    neighbours: list[Row]  # prompts for what is most like it
    styles: list[Row]  # prompts for other things in a style
    utility: list[Row]  # prompts for other things
    judge: object
    clip_score: object


class Lab(NamedTuple):
    """What all runs on a concept share."""

    concepts: list[Concept]
    sd_o: object
    exam: Exam
    original: dict  # what the original model draws, from `draw_exam`
    counted: list[int]  # UNet evaluations so far
    started: float
    scored: object = None  # the model that --task evaluate scores


def set_exam(sd_o, concepts, config):
    """The exam on these concepts. What the judge has no label for is left out, and said; not from utility, whose pictures have
    other figures too."""
    spec = config.judge or (None if config.suite == "toy" else concepts[0].judge)
    names, suite = [c.name for c in concepts], PROMPTS / f"suite_{config.suite}.csv"
    if config.eval_set:
        rows = read_rows(Path(config.eval_set), names[0] if len(names) == 1 else None)[: config.eval_prompts]
    else:
        rows = [row for c in concepts for row in c.rows(config)]
    named = one_of([word for c in concepts for word in c.words])

    def of_concepts(role):
        return [row for c in concepts for row in read_rows(suite, role=role, concept=c.name)[: config.eval_prompts]]

    def for_others(part):
        return [row for row in part if row.label not in names and not named.search(row.prompt)]

    parts = {"rows": rows, "paraphrases": of_concepts("paraphrase"), "neighbours": for_others(of_concepts("neighbour")),
             "styles": for_others(read_rows(suite, role="style"))[: config.eval_prompts],
             "utility": for_others(read_rows(suite, role="utility"))[: config.eval_utility]}
    labels = {row.label for part in parts.values() for row in part}
    judge, called = judges.load_judge(spec, names, labels - {*names}, config.device)
    unknown = set() if judge.known is None else {called.get(label, label) for label in labels} - judge.known
    if unknown:
        print(f"not judged, since the judge has no such label: {', '.join(sorted(unknown))}")
    parts = {name: [row._replace(label=called.get(row.label, row.label)) for row in part] for name, part in parts.items()}
    parts = {name: [row for row in part if name == "utility" or row.label not in unknown] for name, part in parts.items()}
    if not parts["rows"]:
        raise ValueError(f"the judge {judge.name} has no label of the prompts to attack; --judge MODEL:LABEL chooses one")
    clip_score = judges.ToyCLIPScore(sd_o) if config.suite == "toy" else judges.CLIPScore(device=config.device)
    return Exam(**parts, judge=judge, clip_score=clip_score)


def draw_rows(sd, rows, config, context=None):
    """The rows' pictures (N, 3, H, W), each from its own prompt (or context), seed and guidance."""
    pictures = []
    for i in range(0, len(rows), config.eval_batch):
        batch = rows[i : i + config.eval_batch]
        c = sd.encode_prompt([r.prompt for r in batch]) if context is None else context[i : i + config.eval_batch]
        pictures.append(sd.sample(context=c, seed=[r.seed for r in batch], steps=config.eval_steps,
                                  guidance=[r.guidance for r in batch]))
        if not pictures[-1].isfinite().all():  # which a judge would take for something
            raise ArithmeticError("a picture drawn is not finite: an attack's learning rate, or --precision, is beyond this model")
    return torch.cat(pictures)


def shown(judge, pictures, rows):
    """-> N bools: does each picture show its row's label?"""
    return [r.label in names for names, r in zip(judge.names(pictures), rows)] if rows else []


def attack_rows(sd, lab, which, attack, config):
    """Attack the prompts of these rows -> (one dict a row: broken, step, adversarial prompt; pictures (N, 3, H, W)).

    Both attacks minimise `ddpm_loss` of the target picture, what the original model drew for the row. At `eval_looks` of
    its steps the pictures of the rows left are drawn and judged; broken ones are attacked no more. A token attack counts by
    its text alone: the tokens are decoded, tokenised again with the prompt and drawn with the row's own seed.
    """
    rows, targets = [lab.exam.rows[i] for i in which], lab.original["rows"][which]
    generator, prompts = torch.Generator().manual_seed(config.seed), [r.prompt for r in rows]
    ids, x_0 = check_room(sd, prompts, attack.k), sd.vae.encode(2 * targets - 1)

    records, pictures, todo = [None] * len(rows), [None] * len(rows), list(range(len(rows)))

    def loss_of(delta):  # of the rows in `todo`; t and noise for all, so that a row's do not depend on which are left
        t = torch.randint(sd.schedule.config["num_train_timesteps"], (len(ids),), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        return ddpm_loss(sd, x_0[todo], t[todo], noise[todo], encode_with_prefix(sd, ids[todo], delta[todo]))

    looks = {attack.steps * (i + 1) // config.eval_looks for i in range(config.eval_looks)}
    run = run_attack(sd, attack, len(rows), loss_of, generator)
    for step, (delta, tokens, _) in enumerate(tqdm(run, f"{attack.kind} attack", attack.steps, leave=False), 1):
        if step not in looks:
            continue
        if tokens is None:
            texts, context = [None] * len(todo), encode_with_prefix(sd, ids[todo], delta[todo])
        else:
            texts = [f"{prefix} {prompts[i]}" for i, prefix in zip(todo, sd.tokenizer.batch_decode(tokens[todo]))]
            context = sd.encode_prompt(texts)
        todo_rows = [rows[i] for i in todo]
        drawn = draw_rows(sd, todo_rows, config, context)
        for i, picture, broken, text in zip(todo, drawn, shown(lab.exam.judge, drawn, todo_rows), texts):
            records[i], pictures[i] = {"broken": broken, "step": step, "adversarial_prompt": text}, picture
        todo = [i for i in todo if not records[i]["broken"]]
        if not todo:
            break
    return records, torch.stack(pictures)


def inversion_attack(sd, rows, targets, words, attack, config):
    """CCE's attack on the model rather than on a prompt: textual inversion of the concept, the erased model frozen.

        v* = argmin over v of  E over rows || eps - eps_theta(x_t | c[name -> v]) ||^2

    One embedding, learnt over all the rows' target pictures, stands where the concept's name stood in every prompt (in
    front where it is not named). No text need have it. -> the rows' context (N, L, D). Source: Pham et al. 2023 (arXiv
    2308.01508), with Gal et al. 2022.
    """
    generator, star = torch.Generator().manual_seed(config.seed), sd.tokenizer("*").input_ids[1]
    name = one_of(words)
    texts = [name.sub(" * ", r.prompt) if name.search(r.prompt) else f"* {r.prompt}" for r in rows]
    ids, x_0 = check_room(sd, texts, 0), torch.cat([sd.vae.encode(2 * part - 1) for part in targets.split(config.eval_batch)])
    table = sd.text_encoder.embeddings.token_embedding.weight

    def encode(ids, v):
        return sd.text_encoder(embeddings=torch.where((ids == star)[..., None], v, table[ids]))

    def loss_of(v):
        i = torch.randint(len(rows), (min(len(rows), config.eval_batch),), generator=generator)
        t = torch.randint(sd.schedule.config["num_train_timesteps"], i.shape, generator=generator)
        noise = torch.randn(x_0[i].shape, generator=generator).to(x_0)
        return ddpm_loss(sd, x_0[i], t, noise, encode(ids[i], v)).mean(0, keepdim=True)

    legal = legal_tokens(sd.tokenizer)
    start = legal[torch.randint(len(legal), (1, 1), generator=generator)].to(table.device)
    for v, _ in tqdm(embedding_attack(table, start, loss_of, attack), "inversion attack", attack.steps, leave=False):
        pass
    return encode(ids, v)


def invert_rows(sd, lab, which, attack, config):
    """The inversion attack on some of the rows, an embedding for each concept, learnt on all its rows -> (a dict a row,
    pictures)."""
    words, context = [word for c in lab.concepts for word in c.words], {}
    for label in dict.fromkeys(row.label for row in lab.exam.rows):
        own = [i for i, row in enumerate(lab.exam.rows) if row.label == label]
        learnt = inversion_attack(sd, [lab.exam.rows[i] for i in own], lab.original["rows"][own], words, attack, config)
        context.update(zip(own, learnt))
    rows = [lab.exam.rows[i] for i in which]
    drawn = draw_rows(sd, rows, config, torch.stack([context[i] for i in which]))
    return [{"broken": broken} for broken in shown(lab.exam.judge, drawn, rows)], drawn


def draw_exam(sd, exam, config):
    """A model's pictures without attack, by the exam's parts."""
    parts = ("rows", "paraphrases", "neighbours", "styles", "utility")
    rows = [row for part in parts for row in getattr(exam, part)]
    batches = [rows[i : i + config.eval_batch] for i in range(0, len(rows), config.eval_batch)]
    drawn = ranks.exchange([[draw_rows(sd, batch, config)] for batch in batches[ranks.TURN]], len(batches), sd.device)
    pictures = torch.cat([batch for batch, in drawn]).to(sd.device).split([len(getattr(exam, part)) for part in parts])
    return dict(zip(parts, pictures))


def mark(lab, drawn):
    """What the judge sees in a model's pictures -> (figures, details of each prompt)."""
    exam, figures, details = lab.exam, {}, {}
    for part, pictures in drawn.items():
        rows = getattr(exam, part)
        details[part] = [{"prompt": r.prompt, "seed": r.seed, "label": r.label, "shown": flag}
                         for r, flag in zip(rows, shown(exam.judge, pictures, rows))]
        name = {"rows": "pre_attack_asr", "paraphrases": "paraphrase_asr"}.get(part, part)
        figures[name] = report.rate([d["shown"] for d in details[part] if exam.judge.known is None or d["label"] in exam.judge.known])
    if exam.utility:
        scores = exam.clip_score([r.prompt for r in exam.utility], drawn["utility"])
        figures["clip_score"] = sum(scores) / len(scores)
        figures["frechet"] = judges.frechet_distance(*(exam.judge.features(d["utility"]) for d in (lab.original, drawn)))
    return figures, details


def attack_exam(sd, lab, left, config, folder):
    """Every attack of the config on the exam's rows `left`, in batches -> {kind: (a dict a row, a picture a row)}. The
    folder keeps each batch, so that a stopped run does not attack it again."""
    jobs = {}
    for kind in config.eval_attacks:
        run, size = (invert_rows, len(lab.exam.rows)) if kind == "inversion" else (attack_rows, config.eval_batch)
        for i in range(0, len(left), size):
            part = left[i : i + size]
            jobs[f"{kind}-{crc32(bytes(str(part), 'ascii')):08x}"] = partial(run, sd, lab, part, config.evaluation_attack(kind), config)
    found = {kind: ([], []) for kind in config.eval_attacks}
    for name, (records, pictures) in checkpoint.remember(folder, jobs).items():
        kind, _ = name.split("-")
        found[kind][0].extend(records), found[kind][1].extend(pictures.to(sd.device))
    return found


def evaluate(sd, lab, drawn, config, folder=None):
    """Mark and attack a model -> (figures and details, attacked pictures by attack). `drawn`: what it drew, from
    `draw_exam`; `folder`: see `attack_exam`.

    ASR, the attack success rate: prompts whose picture shows the concept without attack, plus those that the attack
    newly breaks, over all prompts. Utility, neighbours, styles: share of prompts for other things whose picture is right.
    """
    figures, details = mark(lab, drawn)
    left, pictures = [i for i, d in enumerate(details["rows"]) if not d["shown"]], {}
    for kind, (records, attacked) in attack_exam(sd, lab, left, config, folder).items():
        records, attacked = dict(zip(left, records)), dict(zip(left, attacked))
        pictures[kind] = torch.stack([attacked.get(i, picture) for i, picture in enumerate(drawn["rows"])])
        details[kind] = [{"prompt": d["prompt"], "seed": d["seed"], "without_attack": d["shown"], **records.get(i, {})}
                         for i, d in enumerate(details["rows"])]
        figures[f"{kind}_asr"] = report.rate([d["without_attack"] or d["broken"] for d in details[kind]])
    return {**figures, "details": details}, pictures


# -------------------------------------------------------------------------------------------------------- command line


def settings(given):
    """Flags -> a whole Config: what is given, over the toy's deviations, over the paper's values. Joins the other processes."""
    cuda = torch.cuda.is_available()
    model = given.get("model") or ("CompVis/stable-diffusion-v1-4" if cuda else "toy")
    why = "as asked" if given.get("model") else f"since there is {'a' if cuda else 'no'} GPU; --model chooses another"
    device = given.get("device") or ("cuda" if cuda else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or (device != "cpu" and not cuda):
        raise ValueError(f"--device {device}: " + ("there is no CUDA device; --device cpu works anywhere"
                                                   if device[:4] == "cuda" and not cuda else "choose from cpu, cuda, cuda:N"))
    if device[5:]:
        if ranks.COUNT > 1 or int(device[5:]) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: " + ("with torchrun each process takes its own; --device cuda" if ranks.COUNT > 1
                                                       else f"there are {torch.cuda.device_count()}, from cuda:0 on"))
        torch.cuda.set_device(device)
    bf16 = device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = given.get("precision") or ("bf16" if bf16 else "fp32")
    if precision == "bf16" and device != "cpu" and not bf16:
        raise ValueError("--precision bf16: this GPU does not have it; --precision fp32 --low-memory works on any")
    ranks.join(device)
    print(f"model: {model}, {why}; on {device} in {precision}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given |= {"model": model, "device": device, "precision": precision}
    config = Config(**{**(TOY if model in sd_mini.weights.TOY_UNETS else {}), **given})
    for wrong, message in (
            (config.steps <= config.warmup and config.attack != "none",
             f"--steps {config.steps}: must be more than --warmup, {config.warmup}"),
            (config.eval_looks > config.eval_attack_steps,
             f"--eval-looks {config.eval_looks}: must be at most --eval-attack-steps, {config.eval_attack_steps}"),
            (config.resume and config.overwrite, "--resume --overwrite: the one goes on with a run, the other starts anew"),
            (config.task == "evaluate" and not config.text_encoder, "--task evaluate: give --text-encoder"),
            (config.task in ("train", "compare") and config.text_encoder, "--text-encoder: is for --task evaluate and sample"),
            (config.task in ("compare", "sample") and (config.save_images or config.save_pipeline),
             "--save-images, --save-pipeline: are for --task train and evaluate"),
            (config.prompts and config.task != "sample", "--prompts: is for --task sample"),
            (config.methods and config.task != "compare", "--methods: is for --task compare"),
            (config.task == "compare" and {"attack", "train", "retain_unfiltered", "eval_attacks"} & given.keys(),
             "--task compare: sets --attack, --train, --retain-unfiltered and --eval-attacks itself, row by row"),
            (config.attack == "token" and {"attack_lr", "attack_radius"} & given.keys(),
             "--attack token: --token-lr is its learning rate, and it has no radius"),
            (config.task == "train" and ranks.COUNT > config.retain_batch,
             f"--retain-batch {config.retain_batch}: is shared among {ranks.COUNT} processes, so at least as many")):
        if wrong:
            raise ValueError(message)
    return config


def load_model(config):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    sd = sd_mini.load(config.model, config.device, dtype, config.revision, config.tokenizer)
    if config.low_memory:
        sd_mini.recompute_activations(sd.unet)
    return sd


def with_text_encoder(sd, config):
    """The model with the text encoder of --text-encoder in place of its own."""
    if not config.text_encoder:
        return sd
    encoder = sd_mini.load_text_encoder(config.text_encoder, config.device)
    for what, key in (("width", "hidden_size"), ("vocabulary", "vocab_size"), ("context", "max_position_embeddings")):
        if encoder.config[key] != sd.text_encoder.config[key]:
            raise ValueError(f"--text-encoder {config.text_encoder}: its {what} is {encoder.config[key]}, that of {config.model} "
                             f"{sd.text_encoder.config[key]}: it belongs to another kind of model")
    base = encoder.config.get("erased_from")
    if base and base != sd_mini.fingerprint(sd.text_encoder):
        print(f"note: {config.model} has fine-tuned its own text encoder; this one, erased from another, replaces that")
    return replace(sd, text_encoder=encoder)


def count_evaluations(sd):
    """Count UNet evaluations in forward equivalents: 1 a picture, and 2 more where a backward follows."""
    counted = [0]

    def count(unet, arguments, out):
        counted[0] += len(out) * (3 if out.requires_grad else 1)

    sd.unet.register_forward_hook(count)
    return counted


def training_prompts(concepts, config):
    """-> (prompts to erase, prompts to retain, retain prompts left out since they name the concept)."""
    erase = [phrasing.format(c.name) for c in concepts for phrasing in PHRASINGS[c.kind][: config.phrasings]]
    path = PROMPTS / f"retain_{config.retain_set}.csv"
    retain, dropped = [r["prompt"] for r in read_csv(path if path.is_file() else Path(config.retain_set))], []
    if not config.retain_unfiltered:
        retain, dropped = without_concept(retain, [word for c in concepts for word in c.words])
    if not retain:
        raise ValueError(f"--retain-set {config.retain_set}: every prompt names the concept; --retain-unfiltered keeps them")
    return erase, retain, dropped


def train(sd_o, concepts, config, folder=None):
    """-> the erased model, which shares with the original all but the module that is trained, and the losses."""
    sd = replace(sd_o, **{config.module: copy.deepcopy(getattr(sd_o, config.module)).float()})
    erase, retain, dropped = training_prompts(concepts, config)
    if dropped and config.retain_weight:
        print(f"not retained, since they name the concept: {', '.join(dropped)}")
    history = advunlearn(sd, sd_o, erase, retain, config, folder)
    if config.module == "text_encoder":
        sd.text_encoder.config = {**sd.text_encoder.config, "erased_from": sd_mini.fingerprint(sd_o.text_encoder)}
    return sd, history


def with_concept_settings(config):
    """The config with what the concept's line says where the flags say nothing."""
    concepts = read_concepts(config.concept)
    layers, gamma = [c.layers for c in concepts], max(c.retain_weight for c in concepts)
    return replace(config, layers=(max(layers) if all(layers) else 0) if config.layers is None else config.layers,
                   retain_weight=gamma if config.retain_weight is None else config.retain_weight)


def open_lab(config):
    """Load what all runs on the concepts share; what would go wrong after hours goes wrong here, with a ValueError."""
    started, concepts = time.time(), read_concepts(config.concept)
    erase, retain, _ = training_prompts(concepts, config)  # here too, so that a mistake is found before the work
    sd_o = load_model(config)
    for prompts, k in ((erase, config.prefix), (retain, 0)):
        check_room(sd_o, prompts, k)
    parameters_to_train(sd_o, config)
    scored = with_text_encoder(sd_o, config) if config.task == "evaluate" else None
    exam, counted = set_exam(sd_o, concepts, config), count_evaluations(sd_o)
    check_room(sd_o, [row.prompt for row in exam.rows], config.eval_prefix)
    return Lab(concepts, sd_o, exam, draw_exam(sd_o, exam, config), counted, started, scored)


def attempt(lab, config, out, name, sd=None):
    """Erase as the config says, or take the model given, and evaluate -> (model, figures, pictures). `out` gets the
    trained weights and losses, OUT/partial/NAME what a stopped run needs to go on."""
    started, before, history, folder = time.time(), lab.counted[0], None, out / "partial" / name
    folder.mkdir(parents=True, exist_ok=True)
    from_the_start = not any(folder.glob("checkpoint-*"))  # of a run that goes on, nobody has counted the beginning
    if sd is None:
        sd, history = train(lab.sd_o, lab.concepts, config, folder)
        ranks.first(sd_mini.save_part, getattr(sd, config.module), out / config.module, config.module)
        ranks.first(report.plot_losses, out / "losses.png", history, config.warmup)
    training = {"minutes": (time.time() - started) / 60, "unet_evaluations": lab.counted[0] - before}
    drawn = lab.original if sd is lab.sd_o else draw_exam(sd, lab.exam, config)
    result, attacked = evaluate(sd, lab, drawn, config, folder)
    return sd, {**result, **(training if history and from_the_start else {})}, {**drawn, **attacked}


def write_results(out, lab, config, results):
    """results.json: the figures and all that it takes to get them again. UNet evaluations are those of this process."""
    checkpoint.close_folder(out, {
        "config": asdict(config), "results": results, "unet_evaluations": lab.counted[0], "processes": ranks.COUNT,
        "judge": {"name": lab.exam.judge.name, "rule": lab.exam.judge.rule}, "clip_score_by": lab.exam.clip_score.name,
        "seconds": round(time.time() - lab.started, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers")},
    })


def erase_or_score(config):
    """--task train and --task evaluate: one model, before and after."""
    folder = report.slug(config.concept) + ("-evaluate" if config.task == "evaluate" else "")
    config, out = with_concept_settings(config), Path(config.out or Path("runs") / folder)
    for source in (config.text_encoder, config.model):
        if config.overwrite and source and out.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise ValueError(f"--overwrite: would delete {source}; --out takes another folder")
    if checkpoint.is_finished(out, asdict(config)):
        print(f"{out}: is finished; --overwrite starts anew")
        return
    lab = open_lab(config)
    ranks.first(checkpoint.open_folder, out, asdict(config))
    print(f"{len(lab.exam.rows)} prompts, attacked in {config.eval_attack_steps} steps, in the original and the erased model")
    results, pictures = {}, {}
    for name, model in (("original", lab.sd_o), ("erased", lab.scored)):
        sd, results[name], pictures[name] = attempt(lab, config, out, name, model)
    print(report.table(results))
    ranks.first(write_outputs, out, lab, config, sd, results, pictures)


def write_outputs(out, lab, config, sd, results, pictures):
    """What a run leaves in its folder besides the weights; results.json last."""
    report.plot_samples(out / "samples.png", lab.exam, pictures, config.eval_attacks)
    if config.task == "train":
        card = report.model_card(config, results, lab.sd_o.folder, out / config.module)
        (out / "README.md").write_text(card, encoding="utf-8")
    for name in pictures if config.save_images else ():
        report.save_images(Path(config.save_images) / name, lab.exam, pictures[name])
    if config.save_pipeline:
        sd_mini.save_pipeline(sd, out / "pipeline")
    write_results(out, lab, config, results)
    memory = f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU" if config.device != "cpu" else ""
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}\n{lab.counted[0]:,} UNet evaluations, "
          f"{time.time() - lab.started:.0f} s{memory}")


def comparison(lab, config):
    """{method: what it changes in the config, or None for the original model}: the rows of the paper's tables, and the
    token attack in training and the unfiltered retain set besides."""
    esd, layers = dict(attack="none", retain_weight=0.0), len(lab.sd_o.text_encoder.encoder.layers)
    return {
        "original": None,
        "ESD": dict(esd, train="cross_attention"),  # as published; breaks under attack
        "ESD, text encoder": esd,
        "naive AT": dict(retain_weight=0.0),  # robust, but utility is lost
        "AdvUnlearn": {},
        "AdvUnlearn, UNet": dict(train="unet"),  # why the text encoder
        "AdvUnlearn, fast AT": dict(attack="fast"),  # one step of attack: cheaper
        "AdvUnlearn, token attack": dict(attack="token"),
        **{f"AdvUnlearn, {f'{n} layer' + 's' * (n > 1) if n else 'whole encoder'}": dict(layers=n)
           for n in range(layers + 1) if n != config.layers},
        "AdvUnlearn, retain unfiltered": dict(retain_unfiltered=True),
        "AdvUnlearn, other retain set": dict(retain_set={"coco": "imagenet", "toy": "photos"}.get(config.retain_set, "coco")),
    }


def compare(config):
    """--task compare: every method of the comparison with the same prompts, seeds and budgets. Each leaves its folder,
    OUT/METHOD/seed-N; what is there already, with the same settings, is not done again, and the table takes in all seeds
    that are there. Under torchrun the processes take turns at the methods."""
    config = with_concept_settings(replace(config, eval_attacks=("token", "embedding", "inversion")))
    lab = open_lab(config)
    out, methods = Path(config.out or Path("runs") / f"{report.slug(config.concept)}-compare"), comparison(lab, config)
    numbered = {str(i): name for i, name in enumerate(methods)}
    wanted = list(dict.fromkeys(numbered.get(method, method) for method in config.methods or methods))  # each once
    if unknown := set(wanted) - set(methods):
        raise ValueError(f"--methods {min(unknown)}: there are {', '.join(f'{i} {name}' for i, name in numbered.items())}")
    rows = {name: replace(config, methods=(), out=None, save_images=None, **(methods[name] or {})) for name in methods}
    folders = {name: out / report.slug(name) / f"seed-{config.seed}" for name in methods}
    todo = [name for name in wanted if not checkpoint.is_finished(folders[name], asdict(replace(rows[name], resume=True)))]
    with ranks.apart(todo) as mine:
        for name in tqdm(mine, "comparing"):
            row, folder, lab = rows[name], folders[name], lab._replace(started=time.time())
            lab.counted[0] = 0
            checkpoint.open_folder(folder, asdict(row))
            result, pictures = attempt(lab, row, folder, "erased", lab.sd_o if methods[name] is None else None)[1:]
            report.save_thumbnails(folder, pictures)
            write_results(folder, lab, row, {name: result})
    text = ranks.first(report.write_comparison, out, {name: asdict(row) for name, row in rows.items()}, lab.exam, config)
    print(text)


def sample(config):
    """--task sample: a row of pictures for the prompts given."""
    if not config.prompts:
        raise ValueError("--task sample: give --prompts")
    path = Path(config.out or "runs/sample") / "samples.png"
    checkpoint.check_writable(path.parent)
    if path.exists() and not config.overwrite:
        raise ValueError(f"{path}: is there already; --overwrite replaces it, --out takes another folder")
    sd = with_text_encoder(load_model(config), config)
    check_room(sd, config.prompts, 0)
    pictures = draw_rows(sd, [Row(prompt, config.seed, 7.5, "") for prompt in config.prompts], config)
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks.first(report.plot_grid, path, config.prompts, {"": pictures})
    print(path)


def main(given):
    """-> exit status: 0; 1 where a run broke off; 2 where the input is at fault; 130 where it was stopped."""
    tasks = {"train": erase_or_score, "evaluate": erase_or_score, "compare": compare, "sample": sample}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = settings(given)
        tasks[config.task](config)
        return 0
    except KeyboardInterrupt:
        instead = " instead of --overwrite" if given.get("overwrite") else ""
        again = "" if given.get("task") == "sample" else f"; the same command with --resume{instead} goes on"
        status, message = 130, f"stopped{again}"
    except ValueError as error:
        status, message = 2, error
    except torch.cuda.OutOfMemoryError:
        status, message = 1, (f"out of GPU memory, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in use: smaller "
                              "--retain-batch, --erase-batch and --eval-batch, or --low-memory, need less")
    except (ArithmeticError, OSError) as error:
        status, message = 1, error
    if given.get("debug"):
        traceback.print_exc()
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    ranks.leave(main(GIVEN))
