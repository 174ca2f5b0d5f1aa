"""AdvUnlearn in one file: erase a concept from Stable Diffusion so that it stays erased under attack.

    python advunlearn.py --concept church

Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models", NeurIPS
2024 (arXiv 2405.15234); the evaluation attack is UnlearnDiffAtk, Zhang et al., ECCV 2024 (arXiv 2310.11868). Read from
top to bottom beside the paper: settings, diffusion, erase, attack, retain, outer loop, evaluation, command line. The
model behind it, `sd_mini`, is used through four calls: encode a prompt, predict noise, sample, decode.

Glossary
    theta, theta_o  the weights in training; the original, frozen ones. In code: the models `sd` and `sd_o`
    eps             Gaussian noise; eps_theta(x_t | c) is the noise that the model sees in x_t, given the prompt c
    x_0, x_t, t     a picture's latents (4, h, w); the same with noise of time step t in [0, 1000) added
    alpha_bar_t     how much of x_0 is left in x_t
    c, c*, empty    the concept's prompt; the same with an adversarial prefix; the empty prompt
    delta           the prefix as embeddings (k, D), one row a token; p: the prefix as k distributions over the vocabulary
    eta             how far ESD pushes away from the concept
    gamma           the weight of the retain loss
    N, L, D, k      prompts in a batch, context length in tokens, embedding width, tokens of the prefix
"""
from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

# ------------------------------------------------------------------------------------------------------------ settings


def setting(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


class Attack(NamedTuple):
    """An attack's kind (embedding, fast or token), steps, learning rate, prefix length, and radius or None."""

    kind: str
    steps: int
    lr: float
    k: int
    radius: float | None = None


@dataclass
class Config:
    """Every setting is a flag, `--erase-batch 4` for `erase_batch`; the defaults are the paper's."""

    concept: str = setting("church", "what to erase: a row of prompts/concepts.csv")
    task: str = setting("train", "train: erase, then evaluate; evaluate: score --text-encoder; sample: draw --prompts",
                        ("train", "evaluate", "sample"))
    model: str | None = setting(None, "toy, toy-dusk, a diffusers folder, a single .safetensors file or a hub id (default: "
                                      "CompVis/stable-diffusion-v1-4 with CUDA, toy without)")
    revision: str | None = setting(None, "commit, tag or branch of a hub id")
    tokenizer: str | None = setting(None, "folder or hub id with tokenizer and configs for a single file (default: v1.4's)")
    text_encoder: str | None = setting(None, "a text encoder to put in place of the model's own: a folder, or a hub id with "
                                             "a sub-folder, OPTML-Group/AdvUnlearn:church_unlearned")
    prompts: tuple[str, ...] = setting((), "what --task sample draws")
    out: str | None = setting(None, "folder for what a run leaves (default: runs/CONCEPT)")
    device: str | None = setting(None, "cpu or cuda (default: cuda where there is one)")
    seed: int = setting(0, "seed of everything random in training and attacks")
    save_pipeline: bool = setting(False, "write the whole erased pipeline too, to OUT/pipeline")

    train: str = setting("text_encoder", "the module to train; the paper finds the text encoder better",
                         ("text_encoder", "unet"))
    layers: int | None = setting(None, "train the first N layers of the text encoder only; 0: all of it (default: the "
                                       "concept's, 1 for objects and styles)")
    steps: int = setting(1000, "iterations of the outer loop")
    warmup: int = setting(200, "iterations before the attack starts")
    lr: float = setting(1e-5, "Adam's learning rate for theta")
    eta: float = setting(1.0, "eta, ESD's strength")
    erase_batch: int = setting(1, "noisy latents x_t for the erase loss of an iteration")
    phrasings: int = setting(1, "erase this many phrasings of the concept, from the bare name on (see PHRASINGS)")
    plain_share: float = setting(0.0, "share of iterations after warm-up that erase the prompt without attack")
    retain_weight: float | None = setting(None, "gamma (default: the concept's; 0.5 for objects and styles)")
    retain_batch: int = setting(5, "retain prompts of an iteration")

    attack: str = setting("embedding", "attack in training: embedding (continuous), token (discrete), fast (one sign "
                                       "step) or none", ("embedding", "token", "fast", "none"))
    attack_steps: int = setting(30, "steps of the attack in training")
    attack_lr: float = setting(1e-3, "Adam's learning rate for the prefix; attack_steps * attack_lr is its reach, to be "
                                     "judged beside the spread of token embeddings")
    attack_radius: float | None = setting(None, "keep the prefix within this distance of its start, in each coordinate")
    prefix: int = setting(1, "k, tokens of the prefix in training")

    trajectories: int = setting(32, "sampling runs of the frozen model behind the bank of x_t, for each of both terms")
    trajectory_steps: int = setting(50, "DDIM steps of each")
    trajectory_guidance: float = setting(3.0, "guidance of each")
    fresh_trajectories: bool = setting(False, "sample anew for every x_t, as the published code does, instead of the bank")

    eval_prompts: int = setting(50, "prompts of the concept to attack")
    eval_utility: int = setting(60, "held-out prompts without the concept, for utility")
    eval_steps: int = setting(50, "DDIM steps of the pictures that are judged")
    eval_prefix: int = setting(3, "k, tokens of the prefix in evaluation")
    eval_attack_steps: int = setting(200, "steps of each attack in evaluation")
    eval_looks: int = setting(5, "pictures drawn per attacked prompt, evenly over these steps; the first that shows the "
                                 "concept ends the attack on its prompt")
    eval_token_lr: float = setting(0.01, "Adam's learning rate for p in the token attack")
    eval_embedding_lr: float = setting(0.01, "Adam's learning rate for delta in the embedding attack")
    eval_batch: int = setting(25, "prompts attacked, and pictures drawn, at a time")

    def training_attack(self):
        if self.attack == "fast":  # one step as long as all steps of the full attack together
            return Attack("fast", 1, self.attack_steps * self.attack_lr, self.prefix, self.attack_radius)
        return Attack(self.attack, self.attack_steps, self.attack_lr, self.prefix, self.attack_radius)

    def evaluation_attack(self, kind):
        lr = self.eval_token_lr if kind == "token" else self.eval_embedding_lr
        return Attack(kind, self.eval_attack_steps, lr, self.eval_prefix)


# Where the toy model departs from the paper. It has few words and a tiny text encoder, in which erasing "church" does not
# reach "a red church in the snow" by itself: hence the phrasings, steps twenty times as long, a stronger eta against the
# one picture in ten that shows a church whatever the prompt says, and plain steps, without which the unattacked prompt
# stays under-trained. Found on church, seeds 0 and 1.
TOY = dict(layers=0, steps=300, warmup=50, lr=2e-4, eta=2.5, erase_batch=8, phrasings=12, plain_share=0.3, retain_weight=0.3,
           retain_batch=8, attack_steps=6, attack_lr=0.007, prefix=3, trajectories=48, trajectory_steps=25, eval_prompts=24,
           eval_steps=20, eval_attack_steps=100, eval_looks=4)

PHRASINGS = {  # by kind of concept
    "object": ("{}", "a photo of a {}", "a sketch of a {}", "a painting of a {} by van gogh", "a red {} in the snow",
               "a picture of a blue {} in the sky", "a green {} on the grass", "a photo of a gray {} in the desert",
               "a sketch of a yellow {} at night", "a purple {} in the style of van gogh",
               "a pencil drawing of a pink {} on the grass", "a painting of a {} at night by van gogh"),
    "style": ("{}", "a painting of a house by {}", "a red car in the style of {}", "a painting of a tree in the snow by {}",
              "a boat in the style of {}", "a painting of a blue golf ball by {}", "a balloon in the sky in the style of {}",
              "a painting of a yellow house at night by {}", "a green boat on the grass in the style of {}",
              "a painting of a gray tree in the desert by {}", "a purple house in the style of {}",
              "a painting of a pink car at night by {}"),
}
PROMPTS = Path(__file__).parent / "prompts"


def parse(argv=None):
    """Command line -> {setting: value} of the flags given; the parser is made from Config."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    hints = get_type_hints(Config)
    for f in fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        help = f.metadata["help"] + ("" if f.default in (None, (), False) else f" (default: {f.default})")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        else:
            kind = (get_args(kind) or (kind,))[0]
            nargs = "+" if f.default == () else None
            parser.add_argument(flag, type=kind, nargs=nargs, choices=f.metadata["choices"], help=help,
                                metavar=None if f.metadata["choices"] else kind.__name__.upper())
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    GIVEN = parse()  # here, so that --help and a mistyped flag are answered before torch is loaded, which takes seconds

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sd_mini  # noqa: E402
from sd_mini import report  # noqa: E402

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


@torch.no_grad()
def sample_latents(sd_o, prompts, seeds, config, stop=None):
    """Guided DDIM runs of the frozen model, one per prompt and seed, kept at every step; both predictions fall out of
    guided sampling for free. With `stop` (N,), the step at which each run ends: only the latents there.
    """
    context, kept = sd_o.encode_prompt(prompts), []
    steps, rows = config.trajectory_steps, torch.arange(len(prompts))
    run = sd_o.denoise(sd_o.initial_noise(seeds), context, steps, config.trajectory_guidance)
    for i, (t, x_t, eps_c, eps_empty) in enumerate(run):
        if i == steps or (stop is not None and i > stop.max()):
            break
        here = rows if stop is None else rows[stop == i]
        kept.append(Latents(here, torch.full_like(here, t), x_t[here], eps_c[here], eps_empty[here]))
    return Latents(*map(torch.cat, zip(*kept)))


def trajectory_bank(sd_o, prompts, config, seed):
    """All latents of `config.trajectories` sampling runs, the prompts taking turns -> draw(n, generator) -> Latents.

    The published code makes a new sampling run of 1 to 50 guided steps for every single attack step and outer step. But
    neither x_t nor eps_o depends on the text encoder in training: run them once, draw from them ever after. The same x_t
    in distribution, and an attack step costs one forward and backward of the UNet and nothing else. With `--train unet`
    the published code samples with the UNet in training, so that its x_t drift as the concept fades; the bank's x_t stay
    those of the original model: where the concept is drawn, which is where it has to be erased.
    """
    batches, turn = [], torch.arange(config.trajectories) % len(prompts)
    for rows in tqdm(torch.arange(config.trajectories).split(config.eval_batch), "sampling the bank", leave=False):
        latents = sample_latents(sd_o, [prompts[i] for i in turn[rows]], [seed + int(row) for row in rows], config)
        batches.append(latents._replace(prompt=turn[rows][latents.prompt]))
    bank = Latents(*map(torch.cat, zip(*batches)))
    return lambda n, generator: bank.take(torch.randint(len(bank.t), (n,), generator=generator))


def fresh_trajectories(sd_o, prompts, config):
    """The published schedule, for comparison: each draw is a sampling run of its own, up to a random step."""
    def draw(n, generator):
        prompt = torch.randint(len(prompts), (n,), generator=generator)
        stop = torch.randint(config.trajectory_steps, (n,), generator=generator)
        seeds = torch.randint(2**31, (n,), generator=generator).tolist()
        latents = sample_latents(sd_o, [prompts[i] for i in prompt], seeds, config, stop)
        return latents._replace(prompt=prompt[latents.prompt])
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
    return sd.text_encoder(embeddings=insert_prefix(embeddings, delta)).to(sd.dtype)


def attack_loss(sd, x_t, t, context, eps_c):
    """l_atk(theta, c') = || eps_theta(x_t | c') - eps_o(x_t | c) ||^2 -> (N,): how far the prompt c' is from making the
    erased model do what the original did for c. No target picture is needed. Source: the paper's lower level."""
    return squared_error(sd.predict_noise(x_t, t, context), eps_c)


def embedding_attack(table, start, loss_of, attack):
    """Continuous attack: descend on prefix embeddings, which no token need have.

        c* = argmin over ||delta - delta_0||_inf <= radius of  l_atk(theta, [delta, c])

    table (V, D) token embeddings, start (N, k) ids to begin at, loss_of(delta) -> (N,). Yields, at each step, delta
    (N, k, D) and the losses (N,) before the step. Kind "fast": steps of lr * sign(gradient) instead of Adam's. The
    published code has no radius; steps * lr bounds it there, to be judged beside the spread of `table`. Gradients are
    fresh at each step (there they pile up).
    """
    delta_0 = table[start].detach().float()
    delta = delta_0.clone().requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=attack.lr)
    for _ in range(attack.steps):
        losses = loss_of(delta)
        delta.grad, = torch.autograd.grad(losses.sum(), delta)
        with torch.no_grad():
            if attack.kind == "fast":
                delta -= attack.lr * delta.grad.sign()
            else:
                adam.step()
            if attack.radius is not None:
                delta.copy_(delta_0 + (delta - delta_0).clamp(-attack.radius, attack.radius))
        yield delta.detach(), losses.detach()


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
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
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
        p.grad, = torch.autograd.grad(losses.sum(), p)
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
    """|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2 -> (N,): for other prompts r, stay what you were. Without it the
    attack drives the model to forget everything (the paper's "image quality")."""
    return squared_error(sd.predict_noise(x_t, t, context), eps_r)


def without_concept(prompts, words):
    """Drop the prompts that contain one of the words, and say so: a retain set that holds the concept undoes erasing."""
    dropped = [p for p in prompts if any(f" {w} " in f" {p.lower()} " for w in words)]
    if dropped:
        print(f"not retained, since they name the concept: {', '.join(dropped)}")
    return [p for p in prompts if p not in dropped]


# ---------------------------------------------------------------------------------------------------------- outer loop


def parameters_to_train(sd, config):
    """theta: the UNet, the whole text encoder, or its first `layers` layers (by index: a match on the name's beginning
    would take layers 10 and 11 for layer 1)."""
    if config.train == "unet":
        return list(sd.unet.parameters())
    layers = sd.text_encoder.encoder.layers
    if config.layers > len(layers):
        raise ValueError(f"--layers {config.layers}: this text encoder has {len(layers)}")
    return list((layers[: config.layers] if config.layers else sd.text_encoder).parameters())


def adversarial_prefix(sd, ids, draw, config, generator):
    """Solve the lower level: -> (delta (N, k, D), mean l_atk at the last step).

    Each of the N = `erase_batch` rows gets a prefix of its own, and each attack step new latents, so that a prefix
    works at any t and for any phrasing of the concept (`ids`).
    """
    def loss_of(delta):
        z = draw(len(delta), generator)
        return attack_loss(sd, z.x_t, z.t, encode_with_prefix(sd, ids[z.prompt], delta), z.eps_c)

    *_, (delta, _, losses) = run_attack(sd, config.training_attack(), config.erase_batch, loss_of, generator)
    return delta, losses.mean().item()


def advunlearn(sd, sd_o, erase_prompts, retain_prompts, config):
    """The paper's algorithm: trains `sd` in place, returns the losses [(erase, attack, retain), ...].

        min over theta  l_ESD(theta, c*) + gamma * E_r || eps_theta(x_t | r) - eps_o(x_t | r) ||^2,   c* = argmin l_atk

    With `attack` none and gamma 0 this is ESD; with gamma 0 alone it is plain adversarial training.
    """
    generator = torch.Generator().manual_seed(config.seed)
    source = (partial(fresh_trajectories, config=config) if config.fresh_trajectories
              else partial(trajectory_bank, config=config, seed=1_000_000 * (config.seed + 1)))
    draw, draw_retain = source(sd_o, erase_prompts), source(sd_o, retain_prompts)
    ids, retain_ids = check_room(sd, erase_prompts, config.prefix), check_room(sd, retain_prompts, 0)
    theta = [p.requires_grad_(True) for p in parameters_to_train(sd, config)]
    optimizer = torch.optim.Adam(theta, lr=config.lr)

    history, bar = [], tqdm(range(config.steps), "erasing")
    for i in bar:
        plain = i < config.warmup or config.attack == "none" or torch.rand((), generator=generator) < config.plain_share
        z = draw(config.erase_batch, generator)
        if plain:
            context, l_attack = sd.text_encoder(ids[z.prompt]), math.nan
        else:
            delta, l_attack = adversarial_prefix(sd, ids, draw, config, generator)
            context = encode_with_prefix(sd, ids[z.prompt], delta)
        target = esd_target(z.eps_c, z.eps_empty, config.eta)
        l_erase = erase_loss(sd, z.x_t, z.t, context, target).mean()
        r = draw_retain(config.retain_batch, generator)
        l_retain = retain_loss(sd, r.x_t, r.t, sd.text_encoder(retain_ids[r.prompt]), r.eps_c).mean()

        optimizer.zero_grad()
        (l_erase + config.retain_weight * l_retain).backward()
        optimizer.step()
        history.append((l_erase.item(), l_attack, l_retain.item()))
        bar.set_postfix(erase=f"{history[-1][0]:.3f}", attack=f"{l_attack:.3f}", retain=f"{history[-1][2]:.4f}")
    for p in theta:
        p.requires_grad_(False)
    return history


# ---------------------------------------------------------------------------------------------------------- evaluation


class Row(NamedTuple):
    """A prompt of an evaluation file; `label` is what its picture should show."""

    prompt: str
    seed: int
    guidance: float
    label: str


class Concept(NamedTuple):
    """A row of prompts/concepts.csv with its evaluation prompts, prompts/NAME.csv."""

    name: str
    kind: str  # object or style
    label: str  # what the judge calls it
    synonyms: tuple[str, ...]
    retain_weight: float
    layers: int
    rows: list[Row]

    @property
    def words(self):
        return (self.name, *self.synonyms)


def read_csv(path):
    """A CSV file with a header -> its rows as dicts."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(path, label=None):
    """Evaluation prompts, in the columns of the UnlearnDiffAtk files."""
    return [Row(r["prompt"], int(r.get("evaluation_seed") or 0), float(r.get("evaluation_guidance") or 7.5),
                r.get("label") or label) for r in read_csv(path)]


def read_concept(name):
    known = {r["concept"]: r for r in read_csv(PROMPTS / "concepts.csv")}
    if name not in known:
        raise ValueError(f"--concept {name!r}: prompts/concepts.csv knows {', '.join(known)}")
    r = known[name]
    return Concept(name, r["kind"], r["label"], tuple(r["synonyms"].split("|")), float(r["retain_weight"]), int(r["layers"]),
                   read_rows(PROMPTS / f"{name.replace(' ', '_')}.csv", r["label"]))


def load_judge(sd):
    """-> judge(pictures (N, 3, H, W)) -> N tuples of what each shows, object and style. Never used by an attack."""
    from sd_mini.toy import judge

    network = judge.load_judge(sd.device)

    def names(pictures):
        found = network.labels(pictures)
        return list(zip(found["object"], found["style"]))

    return names


def draw_rows(sd, rows, config, context=None):
    """The rows' pictures (N, 3, H, W), each from its own prompt (or context), seed and guidance."""
    pictures = []
    for i in range(0, len(rows), config.eval_batch):
        batch = rows[i : i + config.eval_batch]
        c = sd.encode_prompt([r.prompt for r in batch]) if context is None else context[i : i + config.eval_batch]
        pictures.append(sd.sample(context=c, seed=[r.seed for r in batch], steps=config.eval_steps,
                                  guidance=[r.guidance for r in batch]))
    return torch.cat(pictures)


def shown(judge, pictures, rows):
    """(N,) bool: does each picture show its row's label?"""
    return [r.label in names for names, r in zip(judge(pictures), rows)]


def attack_rows(sd, rows, targets, attack, judge, config):
    """Attack each row's prompt -> (one dict a row: broken, step, adversarial prompt; pictures (N, 3, H, W)).

    Both attacks minimise the noise-prediction loss of the target picture, what the original model drew for the row:

        l(theta, c') = || eps - eps_theta(x_t | c') ||^2,    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

    At `eval_looks` of its steps the pictures of the rows not yet broken are drawn and judged. A token attack counts by
    its text alone: the tokens are decoded, tokenised again with the prompt and drawn with the row's own seed.
    """
    generator, prompts = torch.Generator().manual_seed(config.seed), [r.prompt for r in rows]
    ids, x_0 = check_room(sd, prompts, attack.k), sd.vae.encode(2 * targets.to(sd.dtype) - 1)

    def loss_of(delta):
        t = torch.randint(sd.schedule.config["num_train_timesteps"], (len(ids),), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        return ddpm_loss(sd, x_0, t, noise, encode_with_prefix(sd, ids, delta))

    records, pictures = [{"broken": False} for _ in rows], [None] * len(rows)
    looks = {attack.steps * (i + 1) // config.eval_looks for i in range(config.eval_looks)}
    run = run_attack(sd, attack, len(rows), loss_of, generator)
    for step, (delta, tokens, _) in enumerate(tqdm(run, f"{attack.kind} attack", attack.steps, leave=False), 1):
        if step not in looks:
            continue
        todo = [i for i, record in enumerate(records) if not record["broken"]]
        if tokens is None:
            texts, context = [None] * len(todo), encode_with_prefix(sd, ids[todo], delta[todo])
        else:
            texts = [f"{prefix} {prompts[i]}" for i, prefix in zip(todo, sd.tokenizer.batch_decode(tokens[todo]))]
            context = sd.encode_prompt(texts)
        todo_rows = [rows[i] for i in todo]
        drawn = draw_rows(sd, todo_rows, config, context)
        for i, picture, broken, text in zip(todo, drawn, shown(judge, drawn, todo_rows), texts):
            records[i], pictures[i] = {"broken": broken, "step": step, "adversarial_prompt": text}, picture
        if all(record["broken"] for record in records):
            break
    return records, torch.stack(pictures)


def wilson(successes, n, z=1.96):
    """95 % Wilson score interval of a rate, as fractions. Source: Wilson 1927."""
    rate, z2 = successes / n, z * z
    centre, half = rate + z2 / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def rate(flags):
    low, high = wilson(sum(flags), len(flags))
    return {"rate": sum(flags) / len(flags), "n": len(flags), "low": low, "high": high}


def evaluate(sd, rows, utility_rows, targets, judge, config):
    """Attack and score a model -> (figures and details, pictures by name). `targets`: what the original model drew for
    the rows, None where this is the original.

    ASR, the attack success rate: prompts whose picture shows the concept without attack, plus those that the attack
    newly breaks, over all prompts. Utility: share of held-out prompts without the concept whose picture is right.
    """
    plain = draw_rows(sd, rows, config)
    pre = shown(judge, plain, rows)
    utility = draw_rows(sd, utility_rows, config)
    targets = plain if targets is None else targets
    result = {"pre_attack_asr": rate(pre), "utility": rate(shown(judge, utility, utility_rows))}
    pictures = {"plain": plain, "utility": utility}
    left = torch.tensor([i for i, success in enumerate(pre) if not success], dtype=torch.long)
    for kind in ("token", "embedding"):
        details = [{"prompt": r.prompt, "seed": r.seed, "without_attack": success} for r, success in zip(rows, pre)]
        pictures[kind] = plain.clone()
        for part in left.split(config.eval_batch) if len(left) else ():
            attack = config.evaluation_attack(kind)
            records, pictures[kind][part] = attack_rows(sd, [rows[i] for i in part], targets[part], attack, judge, config)
            for i, record in zip(part, records):
                details[i] |= record
        result[f"{kind}_attack_asr"] = rate([d["without_attack"] or d["broken"] for d in details])
        result[f"{kind}_attack"] = details
    return result, pictures


# -------------------------------------------------------------------------------------------------------- command line


def settings(given):
    """Flags -> a whole Config: what is given, over the toy's deviations, over the paper's values."""
    cuda = torch.cuda.is_available()
    model = given.get("model") or ("CompVis/stable-diffusion-v1-4" if cuda else "toy")
    why = "as asked" if given.get("model") else f"since there is {'a' if cuda else 'no'} CUDA device; --model chooses another"
    device = given.get("device") or ("cuda" if cuda else "cpu")
    print(f"model: {model} ({why}), on {device}")
    return Config(**{**(TOY if model.startswith("toy") else {}), **given, "device": device, "model": model})


def load_model(config):
    return sd_mini.load(config.model, config.device, revision=config.revision, tokenizer=config.tokenizer)


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


def train(sd_o, concept, config):
    """-> the erased model, which shares with the original all but the module that is trained, and the losses."""
    sd = replace(sd_o, **{config.train: copy.deepcopy(getattr(sd_o, config.train))})
    erase = [phrasing.format(concept.name) for phrasing in PHRASINGS[concept.kind][: config.phrasings]]
    retain = without_concept([r["prompt"] for r in read_csv(PROMPTS / "retain_toy.csv")], concept.words)
    history = advunlearn(sd, sd_o, erase, retain, config)
    if config.train == "text_encoder":
        sd.text_encoder.config = {**sd.text_encoder.config, "erased_from": sd_mini.fingerprint(sd_o.text_encoder)}
    return sd, history


def write_pictures(path, rows, utility, pictures, concept_columns=6, other_columns=4):
    """samples.png: the same prompts and seeds for all lines; the concept's left, others right."""
    rows, utility = rows[:concept_columns], utility[:other_columns]
    lines = {name: [*pictures[name]["plain"][: len(rows)], *pictures[name]["utility"][: len(utility)]] for name in pictures}
    for kind in ("token", "embedding"):
        lines[f"{kind} attack"] = [*pictures["erased"][kind][: len(rows)], *[None] * len(utility)]
    report.plot_samples(path, [r.prompt for r in (*rows, *utility)], lines)


def main(given):
    started, config = time.time(), settings(given)
    if config.task == "sample":
        return sample(config)
    concept = read_concept(config.concept)
    config = replace(config, layers=concept.layers if config.layers is None else config.layers,
                     retain_weight=concept.retain_weight if config.retain_weight is None else config.retain_weight)
    out = Path(config.out or Path("runs") / concept.name.replace(" ", "_"))
    rows = concept.rows[: config.eval_prompts]
    utility = [r for r in read_rows(PROMPTS / "utility_toy.csv") if r.label != concept.label][: config.eval_utility]

    sd_o = load_model(config)
    judge, counted = load_judge(sd_o), count_evaluations(sd_o)
    sd, history = train(sd_o, concept, config) if config.task == "train" else (with_text_encoder(sd_o, config), None)
    trained = time.time()
    results, pictures, targets = {}, {}, None
    for name, model in (("original", sd_o), ("erased", sd)):
        print(f"evaluating the {name} model: {len(rows)} prompts attacked in {config.eval_attack_steps} steps each")
        results[name], pictures[name] = evaluate(model, rows, utility, targets, judge, config)
        targets = pictures["original"]["plain"]
    print(report.table(results))

    out.mkdir(parents=True, exist_ok=True)
    write_pictures(out / "samples.png", rows, utility, pictures)
    if config.task == "train":
        sd_mini.save_part(getattr(sd, config.train), out / config.train, config.train)
        report.plot_losses(out / "losses.png", history, config.warmup)
        (out / "README.md").write_text(report.model_card(config, concept.name, results, sd_o.folder, out / config.train))
    if config.save_pipeline:
        sd_mini.save_pipeline(sd, out / "pipeline")
    sd_mini.write_json(out / "results.json", {
        "config": asdict(config), "results": results, "unet_evaluations": counted[0],
        "seconds": {"training": round(trained - started, 1), "all": round(time.time() - started, 1)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers")},
    })
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}\n{counted[0]:,} UNet evaluations, "
          f"{time.time() - started:.0f} s")


def sample(config):
    """--task sample: a row of pictures for the prompts given."""
    if not config.prompts:
        raise ValueError("--task sample: give --prompts")
    rows = [Row(prompt, config.seed, 7.5, "") for prompt in config.prompts]
    out = Path(config.out or "runs/sample")
    pictures = draw_rows(with_text_encoder(load_model(config), config), rows, config)
    out.mkdir(parents=True, exist_ok=True)
    report.plot_samples(out / "samples.png", config.prompts, {"": pictures})
    print(out / "samples.png")


if __name__ == "__main__":
    try:
        main(GIVEN)
    except ValueError as error:
        sys.exit(f"error: {error}")
