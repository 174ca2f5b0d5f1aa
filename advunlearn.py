"""AdvUnlearn in one file: erase a concept from Stable Diffusion, and keep it erased under attack.

    python advunlearn.py --concept church

Paper: Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in
Diffusion Models", NeurIPS 2024 (arXiv 2405.15234). The attack that measures robustness is
UnlearnDiffAtk: Zhang et al., ECCV 2024 (arXiv 2310.11868).

Read from top to bottom beside the paper: settings, diffusion, erase, trajectories, attack, retain,
outer loop, attacks of the evaluation. The model `sd` is a dataclass of tokenizer, text encoder,
UNet, VAE and schedule. It is used mostly through these calls, N prompts or pictures at a time:

    sd.encode_prompt(prompts)           -> context (N, L, D)
    sd.predict_noise(x_t, t, context)   -> eps_theta(x_t | c), like x_t
    sd.denoise(x_T, context, ...)       the sampler: yields t, x_t, eps_c, eps_empty at each step
    sd.schedule.add_noise(x_0, eps, t)  -> x_t
    sd.encode_tokens(ids)               -> context, of ids (N, L) or embeddings (N, L, D)

Notation
    theta, theta_o  the weights in training; the original, frozen ones. In code: `sd` and `sd_o`
    c, c', c*       the concept's prompt; with a prefix in front; with the worst prefix found
    r, empty        a retain prompt, for something else; the empty prompt
    x_0             a picture's latents (4, h, w)
    t, x_t          a time step in [0, 1000); the latents with that step's noise added
    eps             Gaussian noise. eps_theta(x_t | c): the noise that the model sees in x_t when
                    told c; eps_o: what the original model sees
    eps_c           eps_o(x_t | c); likewise eps_empty and eps_r
    delta           the prefix as embeddings (k, D), a row a token
    E, p            the table of token embeddings (V, D); the prefix as k distributions over tokens
    eta, gamma      how far ESD pushes away from the concept; the weight of the retain loss
    N, L, D         rows of a batch, tokens of a context, width of an embedding
    k, V            tokens of a prefix, tokens of the vocabulary
    || . ||^2       the mean over coordinates, in all losses, so that sizes can be compared
"""
from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

from sd_mini.lab import EvalAttack, Method, Settings, answer_help, main, setting

# ------------------------------------------------------------------------------------ settings

# setting(default, help, choices) is a field that is a flag too: `--erase-batch` for `erase_batch`.
attack_setting, retain_setting = partial(setting, group="attack"), partial(setting, group="retain")
KINDS = ("embedding", "token", "fast", "none")
TRAINED = ("text_encoder", "unet", "cross_attention", "no_cross_attention")
LONGER = 3  # tokens that the attack "longer" puts in front besides eval_prefix


@dataclass
class Config(Settings):
    """The method's own settings. Defaults are the paper's for objects and styles.

    Any method has the `Settings`. Used here are seed, task, save_every, retain_set, eval_batch,
    eval_prefix (k), eval_lr, eval_attack_steps and eval_looks.
    """

    train: str = setting("text_encoder", "what is trained; the paper prefers the first", TRAINED)
    layers: int = setting(1, "the first layers; 0: all, and the final norm", low=0)
    train_embeddings: bool = setting(False, "train the embeddings too; the paper never does")
    steps: int = setting(1000, "iterations of the outer loop", low=1)
    warmup: int = setting(200, "iterations before the attack starts", low=0)
    lr: float = setting(1e-5, "Adam's learning rate for theta", low=1e-10, high=1)
    eta: float = setting(1.0, "eta, ESD's strength", low=0)
    erase_batch: int = setting(1, "latents x_t in the erase loss", low=1)
    plain_share: float = 0.0  # share of the iterations after warm-up without attack
    esd: tuple = (1e-5, 1e-5)  # Adam's learning rate of ESD-u and ESD-x in the comparison

    attack: str = attack_setting("embedding", "free embeddings, tokens, or one fast step", KINDS)
    attack_steps: int = attack_setting(30, "steps of the attack", low=1)
    attack_lr: float = attack_setting(1e-3, "Adam's learning rate for delta", low=1e-10, high=10)
    token_lr: float = attack_setting(0.01, "AdamW's, for p: the token attack", low=1e-10, high=10)
    attack_radius: float | None = attack_setting(None, "largest move of a coordinate", low=1e-10)
    prefix: int = attack_setting(1, "k, tokens of the prefix in training", low=1)

    retain_weight: float = retain_setting(0.5, "gamma", low=0)
    retain_batch: int = retain_setting(5, "retain prompts of an iteration", low=1)

    trajectories: int = setting(32, "sampling runs in each bank, at least one a prompt", low=1)
    trajectory_steps: int = setting(50, "DDIM steps of each run", low=1, high=500)
    fresh_trajectories: bool = setting(False, "sample anew for every x_t, as published")

    eval_attacks: tuple[str, ...] = setting(
        ("token", "random", "embedding"), "attacks in evaluation",
        ("token", "random", "longer", "embedding", "inversion"), group="evaluation")

    def check(self, given):
        super().check(given)  # `given`: the flags on the command line
        if self.steps <= self.warmup and self.attack != "none":
            raise ValueError(f"--steps {self.steps}: must be more than --warmup, {self.warmup}")
        if self.attack == "token" and {"attack_lr", "attack_radius"} & given.keys():
            raise ValueError("--attack token: --token-lr is its learning rate, it has no radius")
        if self.task == "compare" and {"attack", "train"} & given.keys():
            raise ValueError("--task compare: sets --attack and --train itself, row by row")


# The toy departs from the paper, since its text encoder is tiny and knows few words. Erasing
# "church" there does not reach "a sketch of a church": so all of the encoder is trained, embeddings
# too, with a larger eta and gamma, on six phrasings (these, and the evaluation's settings, are in
# sd_mini/lab/settings.py). Steps without attack keep the bare prompt erased. The attack may move
# delta by 0.08, 3.5 times the embeddings' standard deviation. Found on church and parachute.
TOY = dict(layers=0, train_embeddings=True, steps=600, warmup=30, lr=4e-4, eta=3.0, erase_batch=8,
           plain_share=0.1, retain_weight=15.0, retain_batch=12, attack_steps=2, attack_lr=0.04,
           prefix=7, trajectories=48, trajectory_steps=20, esd=(1e-4, 2e-4))

CONCEPTS = {"nudity": dict(layers=0, retain_weight=0.3)}  # the paper's; not on the toy

if __name__ == "__main__":
    answer_help(Config)  # now, since importing torch takes seconds

import torch  # noqa: E402

from tqdm import tqdm  # noqa: E402

from sd_mini.lab.runs import check_memory, placed, read, resumable  # noqa: E402

# ----------------------------------------------------------------------------------- diffusion

def squared_error(a, b):
    """(N, ...), (N, ...) -> (N,): the mean squared difference of each row, in float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def ddpm_loss(sd, x_0, t, noise, context):
    """The noise-prediction loss: how well the model, told c, finds the noise in a noised picture.

        l(theta, c) = || eps - eps_theta(x_t | c) ||^2
        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

    x_0, noise (N, 4, h, w); t (N,); context (N, L, D) -> (N,).
    Source: Ho et al. 2020, equation 14. With a target picture x_0 it is UnlearnDiffAtk's objective.
    """
    x_t = sd.schedule.add_noise(x_0, noise, t)
    return squared_error(sd.predict_noise(x_t, t, context), noise)


# --------------------------------------------------------------------------------------- erase

def esd_target(eps_c, eps_empty, eta):
    """What the erased model should predict for c: the original's guidance, away from c.

        eps_o(x_t | empty) - eta * (eps_o(x_t | c) - eps_o(x_t | empty))

    Any shapes that match. Source: Gandikota et al. 2023 (ESD), equation 6.
    """
    return eps_empty - eta * (eps_c - eps_empty)


def erase_loss(sd, x_t, t, context, target):
    """l_ESD = || eps_theta(x_t | c) - target ||^2 -> (N,). AdvUnlearn gives the context of c*."""
    return squared_error(sd.predict_noise(x_t, t, context), target)


# -------------------------------------------------------------------------------- trajectories

class Latents(NamedTuple):
    """N noisy latents from the frozen model's sampling, and what it predicted there."""

    prompt: torch.Tensor  # (N,) index of the prompt that was sampled
    t: torch.Tensor  # (N,)
    x_t: torch.Tensor  # (N, 4, h, w)
    eps_c: torch.Tensor  # (N, 4, h, w), eps_o(x_t | c)
    eps_empty: torch.Tensor  # (N, 4, h, w), eps_o(x_t | empty)


@torch.no_grad()
def sample_latents(sd_o, prompts, seeds, steps, stop=None):
    """The frozen model's DDIM runs, one for each (prompt, seed) -> x_t, eps_c, eps_empty.

    Each is (N, steps, 4, h, w), or (N, stop, ...). Guidance (3, as published) computes both anyway.
    """
    run = sd_o.denoise(sd_o.initial_noise(seeds), sd_o.encode_prompt(prompts), steps, guidance=3.0)
    latents = [step[1:] for step in islice(run, stop or steps)]
    return [torch.stack(column, 1) for column in zip(*latents)]


def trajectory_bank(sd_o, prompts, config):
    """All latents of `trajectories` or more sampling runs -> draw(n, generator, times=1).

    draw gives a list of `times` Latents, of the same n prompts: one for the erase loss, the others
    for the steps of its attack. The published code samples each anew, with 1 to 50 guided steps.
    But x_t and eps_o come from the frozen model: here they are sampled once. And here t is the
    noise level of x_t: the published code tells the UNet a t that is 39 to 58 higher.
    """
    each = math.ceil(config.trajectories / len(prompts))  # runs of each prompt
    grid = torch.tensor(sd_o.schedule.timesteps(config.trajectory_steps))
    first_seed = 1_000_000 * (config.seed + 1)  # far from the evaluation's seeds

    def sample(runs):
        texts, seeds = [prompts[i // each] for i in runs], [first_seed + i for i in runs]
        columns = sample_latents(sd_o, texts, seeds, len(grid))
        return [column.flatten(0, 1).cpu() for column in columns]

    runs = range(each * len(prompts))
    parts = [runs[i : i + config.eval_batch] for i in runs[:: config.eval_batch]]
    sampled = zip(*map(sample, tqdm(parts, "sampling the bank", leave=False)))
    bank = placed(map(torch.cat, sampled), "cpu" if config.low_memory else sd_o.device)

    def draw(n, generator, times=1):
        prompt = torch.randint(len(prompts), (n,), generator=generator).expand(times, n)
        run = torch.randint(each, (times, n), generator=generator)
        step = torch.randint(len(grid), (times, n), generator=generator)
        rows = (prompt * each + run) * len(grid) + step
        columns = [prompt, grid[step], *(column[rows.to(column.device)] for column in bank)]
        return [Latents(*z) for z in zip(*(column.to(sd_o.device) for column in columns))]
    return draw


def sample_afresh(sd_o, prompts, config):
    """For comparison: like trajectory_bank, but each draw samples n runs, up to one random step."""
    grid = torch.tensor(sd_o.schedule.timesteps(config.trajectory_steps))

    def draw(n, generator, times=1):
        prompt, drawn = torch.randint(len(prompts), (n,), generator=generator), []
        for last in torch.randint(len(grid), (times,), generator=generator).tolist():
            seeds = torch.randint(2**31, (n,), generator=generator).tolist()
            run = sample_latents(sd_o, [prompts[i] for i in prompt], seeds, len(grid), last + 1)
            columns = [prompt, grid[last].expand(n), *(column[:, -1] for column in run)]
            drawn.append(Latents(*(column.to(sd_o.device) for column in columns)))
        return drawn
    return draw


# -------------------------------------------------------------------------------------- attack

class Attack(NamedTuple):
    kind: str  # embedding, fast, token or random
    steps: int
    lr: float
    k: int  # tokens of the prefix
    radius: float | None = None


def training_attack(config):
    """The config's attack in training. "fast" is one step of length steps * lr."""
    lr = config.token_lr if config.attack == "token" else config.attack_lr  # moves p, or delta
    attack = Attack(config.attack, config.attack_steps, lr, config.prefix, config.attack_radius)
    return attack._replace(steps=1, lr=attack.steps * lr) if attack.kind == "fast" else attack


def insert_prefix(tokens, delta):
    """Put k tokens behind the start token: [start, prefix, prompt, end, padding], still L long.

    tokens (N, L) and delta (N, k) ids, or (N, L, D) and (N, k, D) embeddings -> like tokens. The
    last k fall off; `tokenize_with_room` sees to it that they are padding.
    """
    k = delta.shape[1]
    return torch.cat([tokens[:, :1], delta, tokens[:, 1 : tokens.shape[1] - k]], dim=1)


def tokenize_with_room(sd, prompts, k):
    """Prompts -> ids (N, L) with room for k more tokens, or ValueError where there is none."""
    for prompt in prompts:
        length = len(sd.tokenizer(prompt).input_ids)  # in tokens: one word may be several
        if length + k > sd.context_length:
            raise ValueError(f"{prompt[:60]!r} takes {length} tokens; with {k} more it exceeds the "
                             f"{sd.context_length} that the model reads: shorten prompt or prefix")
    return sd.tokenize(prompts)


def encode_with_prefix(sd, ids, delta):
    """ids (N, L) and prefix embeddings delta (N, k, D) -> context (N, L, D)."""
    embeddings = sd.text_encoder.embeddings.token_embedding(ids)
    return sd.encode_tokens(insert_prefix(embeddings, delta))


def attack_loss(sd, x_t, t, context, eps_c):
    """l_atk(theta, c') = || eps_theta(x_t | c') - eps_o(x_t | c) ||^2 -> (N,).

    How far c' is from making the erased model do what the original did for c. No target picture is
    needed. Source: the paper's lower level.
    """
    return squared_error(sd.predict_noise(x_t, t, context), eps_c)


def embedding_attack(table, start, loss_of, attack):
    """The continuous attack: descend on prefix embeddings that need not be any token's.

        argmin over ||delta - delta_0||_inf <= radius of  loss_of(delta)

    table = E (V, D); start (N, k) ids of delta_0; loss_of(delta) -> a loss for each row still under
    attack (in training l_atk). Yields each step's new delta (N, k, D), and the losses before it.
    "fast" steps by lr * sign(gradient), "embedding" by Adam. The published code has no radius.
    """
    delta_0 = table[start].detach().float()
    delta = delta_0.clone().requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=attack.lr)
    for _ in range(attack.steps):
        losses = loss_of(delta)
        # A new gradient at each step, and none for the weights. In the published code they add up.
        delta.grad = torch.autograd.grad(losses.sum(), delta)[0]
        with torch.no_grad():
            if attack.kind == "fast":
                delta -= attack.lr * delta.grad.sign()
            else:
                adam.step()
            if attack.radius is not None:
                delta.clamp_(delta_0 - attack.radius, delta_0 + attack.radius)
        yield delta.detach().clone(), losses.detach()


def project_simplex(v):
    """The nearest point of the probability simplex: argmin over p >= 0, sum p = 1 of ||p - v||.

    (..., V) -> (..., V), each row for itself: p = max(v - tau, 0), with tau from the sorted row.
    Source: Duchi et al. 2008, figure 1.
    """
    u = v.sort(dim=-1, descending=True).values
    excess = (u.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1, device=v.device)
    last = (u > excess).sum(-1, keepdim=True) - 1  # the last sorted coordinate that stays positive
    return (v - excess.gather(-1, last)).clamp(min=0)


@lru_cache(maxsize=4)
def legal_tokens(tokenizer):
    """Ids (V',) of the tokens a user can type: printable, and themselves when tokenised again."""
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    texts = tokenizer.batch_decode([[i] for i in ids])
    again = tokenizer(texts).input_ids
    return torch.tensor([i for i, text, row in zip(ids, texts, again)
                         if text.isprintable() and row[1:-1] == [i]])


def token_attack(table, legal, n, loss_of, attack, generator):
    """The discrete attack, UnlearnDiffAtk's: descend on k distributions p over legal tokens.

        delta = E[i] + (p E - stop_gradient(p E)),  i ~ p,    p <- project_simplex(Adam step on p)

    Each step draws a token i per position. The loss sees real tokens; the gradient passes as if p
    itself had been embedded (straight-through). table (V, D): E here is its rows `legal` (V',).
    loss_of(delta) -> a loss for each row still under attack. Yields each step's likeliest ids
    (n, k), after it, and the losses of the tokens drawn. Source: UnlearnDiffAtk and its code.
    """
    table = table[legal].detach().float()
    p = torch.rand((n, attack.k, len(legal)), generator=generator).to(table.device)
    p = (p / p.sum(-1, keepdim=True)).requires_grad_(True)
    uniform = torch.rand((attack.steps, n, attack.k, 1), generator=generator).to(table.device)
    adam = torch.optim.AdamW([p], lr=attack.lr, weight_decay=0.1)  # in Adam, decay swamps gradients
    for u in uniform:
        drawn = (p.detach().cumsum(-1) < u).sum(-1)  # i ~ p, by the inverse distribution function
        hard = table[drawn.clamp(max=len(legal) - 1)]
        soft = p @ table
        losses = loss_of(hard + (soft - soft.detach()))
        p.grad = torch.autograd.grad(losses.sum(), p)[0]
        adam.step()
        with torch.no_grad():
            p.copy_(project_simplex(p))
        yield legal[p.argmax(-1)], losses.detach()


def random_tokens(sd, shape, generator):
    """Legal ids of that shape: an embedding attack starts there, the random one tries them."""
    legal = legal_tokens(sd.tokenizer)
    return legal[torch.randint(len(legal), shape, generator=generator)].to(sd.device)


def run_attack(sd, attack, n, loss_of, generator):
    """Find n prefixes at once: yields (delta (n, k, D), ids (n, k) or None, losses or None)."""
    table = sd.text_encoder.embeddings.token_embedding.weight
    if attack.kind == "random":  # the control of the token attack: trying, without searching
        for ids in random_tokens(sd, (attack.steps, n, attack.k), generator):
            yield table[ids].detach(), ids, None
    elif attack.kind == "token":
        legal = legal_tokens(sd.tokenizer).to(sd.device)
        for ids, losses in token_attack(table, legal, n, loss_of, attack, generator):
            yield table[ids].detach(), ids, losses
    else:
        start = random_tokens(sd, (n, attack.k), generator)
        for delta, losses in embedding_attack(table, start, loss_of, attack):
            yield delta, None, losses


# -------------------------------------------------------------------------------------- retain

def retain_loss(sd, x_t, t, context, eps_r):
    """|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2 -> (N,): for other prompts, predict as before."""
    return squared_error(sd.predict_noise(x_t, t, context), eps_r)


# ---------------------------------------------------------------------------------- outer loop

def parameters_to_train(sd, config):
    """theta: the UNet, its cross-attention, all but that, the text encoder or its first layers.

    Layers go by index. The published code matches names, so that layer 1 brings 10 and 11 along.
    Its whole text encoder is all layers and the final norm, never the embeddings.
    """
    if config.train != "text_encoder":  # cross-attention's published name is attn2
        wanted = {"unet": (True, False), "cross_attention": (True,), "no_cross_attention": (False,)}
        return [p for name, p in sd.unet.named_parameters()
                if (".attn2." in name) in wanted[config.train]]
    encoder, layers = sd.text_encoder, sd.text_encoder.encoder.layers
    if config.layers > len(layers):
        raise ValueError(f"--layers {config.layers}: this text encoder has {len(layers)}")
    parts = [layers[: config.layers]] if config.layers else [layers, encoder.final_layer_norm]
    parts += [encoder.embeddings] if config.train_embeddings else []
    return [p for part in parts for p in part.parameters()]


def adversarial_prefix(sd, ids, latents, attack, generator):
    """Solve the lower level -> (delta (N, k, D), mean l_atk just before its last step).

    `latents` is a list, a Latents (of N) for each step of the attack: the prefix has to work at any
    t. All are of the same N prompts, rows of `ids`: each row gets a prefix for its own prompt.
    """
    new = iter(latents)
    def loss_of(delta):
        z = next(new)
        context = encode_with_prefix(sd, ids[z.prompt], delta)
        return attack_loss(sd, z.x_t, z.t, context, z.eps_c)

    *_, (delta, _, losses) = run_attack(sd, attack, len(latents[0].t), loss_of, generator)
    return delta, losses.mean()


def advunlearn(sd_o, erase_prompts, retain_prompts, config, folder=None):
    """The paper's algorithm -> (the erased model, the losses of each iteration).

        min over theta  l_ESD(theta, c*) + gamma * E_r || eps_theta(x_t | r) - eps_o(x_t | r) ||^2
        where c* = argmin over c' = [delta, c] of l_atk(theta, c')

    With `attack` none and gamma 0 this is ESD. With gamma 0 alone it is naive AT: adversarial
    training without retain loss. `folder` keeps the state of a stopped run, which goes on from
    there. The same seed gives the same bytes: it seeds the banks and the loop's two generators.
    """
    part = "text_encoder" if config.train == "text_encoder" else "unet"
    sd = replace(sd_o, **{part: copy.deepcopy(getattr(sd_o, part)).float()})
    ids = tokenize_with_room(sd, erase_prompts, config.prefix)
    retain_ids = tokenize_with_room(sd, retain_prompts, 0)
    source = sample_afresh if config.fresh_trajectories else trajectory_bank
    draw = source(sd_o, erase_prompts, config)
    draw_retain = source(sd_o, retain_prompts, config)

    attack = training_attack(config)
    theta = [p.requires_grad_(True) for p in parameters_to_train(sd, config)]
    optimizer = torch.optim.Adam(theta, lr=config.lr)
    chance = torch.rand(config.steps, generator=torch.Generator().manual_seed(config.seed)).tolist()
    generator = torch.Generator().manual_seed(config.seed)
    loop = resumable(folder, config.steps, theta, optimizer, generator, config.save_every)
    with loop as (iterations, history):
        for i in iterations:
            # draw all latents here: a copy to the GPU inside the attack would stall it
            plain = i < config.warmup or config.attack == "none" or chance[i] < config.plain_share
            z, *others = draw(config.erase_batch, generator, 1 if plain else 1 + attack.steps)
            [z_r] = draw_retain(config.retain_batch, generator)  # its eps_c is eps_r

            # attack: c* = [delta, c]; if plain, c itself
            if plain:
                context, l_attack = sd.encode_tokens(ids[z.prompt]), None
            else:
                delta, l_attack = adversarial_prefix(sd, ids, others, attack, generator)
                context = encode_with_prefix(sd, ids[z.prompt], delta)

            # erase
            target = esd_target(z.eps_c, z.eps_empty, config.eta)
            l_erase = erase_loss(sd, z.x_t, z.t, context, target).mean()

            # retain; with gamma 0 only to be plotted
            with torch.set_grad_enabled(config.retain_weight > 0):
                context = sd.encode_tokens(retain_ids[z_r.prompt])
                l_retain = retain_loss(sd, z_r.x_t, z_r.t, context, z_r.eps_c).mean()

            # step
            optimizer.zero_grad()
            (l_erase + config.retain_weight * l_retain).backward()
            optimizer.step()
            history.append(read(erase=l_erase, attack=l_attack, retain=l_retain))
    getattr(sd, part).requires_grad_(False)
    return sd, history


# --------------------------------------------------------------------- attacks of the evaluation

def draw_noise(sd, x_0, steps, generator):
    """-> for each step of an attack t (N,) and noise (N, 4, h, w), for N latents like x_0."""
    t = torch.randint(len(sd.schedule.alpha_bar), (steps, len(x_0)), generator=generator)
    noise = torch.randn((steps, *x_0.shape), generator=generator)
    return zip(t.to(x_0.device), noise.to(x_0))


def prefix_length(config, kind):
    """k, in the evaluation."""
    return config.eval_prefix + LONGER * (kind == "longer")


def prefix_attack(sd, prompts, pictures, look, config, kind):
    """UnlearnDiffAtk: in front of each prompt, find the prefix that draws its target picture.

        argmin over delta of  E || eps - eps_theta(x_t | [delta, c]) ||^2

    pictures (N, 3, H, W) in [0, 1]: the targets, what the original model drew. `kind`: token;
    longer, by LONGER tokens; embedding, whose prefixes no user can type; random, the control.
    Up to `eval_looks` times, look(step, left, context, texts) draws the prompts with index in left,
    and says of each whether it shows the concept. Those that do are done. texts is None for
    embeddings. Tokens count by their text alone: decoded, and tokenised again with the prompt.
    """
    k = prefix_length(config, kind)
    attack = Attack("token" if kind == "longer" else kind, config.eval_attack_steps,
                    config.eval_lr, k)
    generator = torch.Generator().manual_seed(config.seed)
    ids = tokenize_with_room(sd, prompts, k)
    x_0 = sd.vae.encode(2 * pictures - 1)
    rows = torch.arange(len(prompts), device=sd.device)  # those that do not yet show the concept
    new = draw_noise(sd, x_0, attack.steps, generator)  # for done rows too: each row keeps its own
    def loss_of(delta):
        t, noise = next(new)
        context = encode_with_prefix(sd, ids[rows], delta[rows])
        return ddpm_loss(sd, x_0[rows], t[rows], noise[rows], context)

    looks = {attack.steps * (i + 1) // config.eval_looks for i in range(config.eval_looks)}
    run = run_attack(sd, attack, len(prompts), loss_of, generator)
    for step, (delta, tokens, _) in enumerate(run, 1):
        if step not in looks:
            continue
        left = rows.tolist()
        texts, context = None, encode_with_prefix(sd, ids[rows], delta[rows])
        if tokens is not None:
            prefixes = sd.tokenizer.batch_decode(tokens[rows])
            texts = [f"{prefix} {prompts[i]}" for i, prefix in zip(left, prefixes)]
            context = sd.encode_prompt(texts)
        broken = look(step, left, context, texts)
        rows = torch.tensor([i for i, shows in zip(left, broken) if not shows], device=sd.device)
        if not len(rows):
            break


def inversion_attack(sd, prompts, pictures, config):
    """Is the concept still in the model? Learn one embedding from all its target pictures.

        v* = argmin over v of  E over prompts || eps - eps_theta(x_t | c[* -> v]) ||^2

    A * in the prompts marks where v stands. -> the prompts' contexts (N, L, D) with v*.
    Source: Pham et al. 2023 (CCE, arXiv 2308.01508), with Gal et al. 2022 (textual inversion).
    """
    generator = torch.Generator().manual_seed(config.seed)
    table = sd.text_encoder.embeddings.token_embedding.weight
    star = sd.tokenizer("*").input_ids[1]
    ids = tokenize_with_room(sd, prompts, 0)
    x_0 = torch.cat([sd.vae.encode(2 * part - 1) for part in pictures.split(config.eval_batch)])

    def encode(ids, v):
        return sd.encode_tokens(torch.where((ids == star)[..., None], v, table[ids]))

    attack = Attack("embedding", config.eval_attack_steps, config.eval_lr, k=1)
    n = min(len(prompts), config.eval_batch)
    rows = torch.randint(len(prompts), (attack.steps, n), generator=generator).to(sd.device)
    new = zip(rows, draw_noise(sd, x_0[:n], attack.steps, generator))

    def loss_of(v):
        i, (t, noise) = next(new)
        return ddpm_loss(sd, x_0[i], t, noise, encode(ids[i], v)).mean(0, keepdim=True)

    start = random_tokens(sd, (1, 1), generator)
    *_, (v, _) = embedding_attack(table, start, loss_of, attack)
    return encode(ids, v)


# --------------------------------------------------------------- what sd_mini/lab is handed

def check_prompts(sd_o, erase_prompts, retain_prompts, config):
    """ValueError, before any work, for what would fail later."""
    parameters_to_train(sd_o, config)
    tokenize_with_room(sd_o, erase_prompts, config.prefix)
    tokenize_with_room(sd_o, retain_prompts, 0)
    counts = len(erase_prompts), len(retain_prompts)
    latents = config.trajectory_steps * sum(n * math.ceil(config.trajectories / n) for n in counts)
    if not config.fresh_trajectories:  # 12: x_t, eps_c and eps_empty, in float32
        check_memory("the bank", 12 * latents * math.prod(sd_o.latent_shape), "--trajectory-steps")


def comparison_rows(sd_o, concepts, config):
    """The paper's tables, and some more: {row: what it changes in the config}."""
    attacks = tuple(kind for kind in config.eval_attacks if kind != "longer")  # AdvUnlearn's alone
    no_retain = dict(retain_weight=0.0, eval_attacks=attacks)
    lr_u, lr_x = config.esd
    esd_u, esd_x = dict(train="no_cross_attention", lr=lr_u), dict(train="cross_attention", lr=lr_x)
    published = esd_x if concepts[0].kind == "style" else esd_u
    rows = {
        "original": None,
        "ESD": dict(no_retain, attack="none", **published),
        "ESD, text encoder": dict(no_retain, attack="none"),
        "naive AT": no_retain,
        "AdvUnlearn": {},
        "AdvUnlearn, UNet": dict(train="unet"),
        "AdvUnlearn, fast AT": dict(attack="fast"),
        "AdvUnlearn, token attack": dict(attack="token"),
    }
    for n in range(len(sd_o.text_encoder.encoder.layers) + 1):
        changes = dict(layers=n, train_embeddings=False)
        if changes != {key: getattr(config, key) for key in changes}:
            rows[f"AdvUnlearn, layers {n or 'all'}"] = changes
    other_set = {"coco": "imagenet", "toy": "photos"}.get(config.retain_set, "coco")
    return {**rows, "AdvUnlearn, retain unfiltered": dict(retain_unfiltered=True),
            "AdvUnlearn, other retain set": dict(retain_set=other_set)}


PREFIXES = (  # name, what its column counts, title and short title in tables
    ("token", "a prefix of tokens (UnlearnDiffAtk)", "token attack", "tok"),
    ("random", "random tokens, at as many looks: the control", "random prefix", "rnd"),
    ("longer", "the token attack with a longer prefix", "longer prefix", "lon"),
    ("embedding", "a prefix of free embeddings, one per prompt", "embedding attack", "emb"))
ATTACKS = {kind: EvalAttack(partial(prefix_attack, kind=kind), *texts,
                            room=partial(prefix_length, kind=kind)) for kind, *texts in PREFIXES}
ATTACKS["inversion"] = EvalAttack(
    inversion_attack, "one embedding in the name's place (CCE)", room=lambda config: 1,
    together=True)
METHOD = Method(config=Config, train=advunlearn, attacks=ATTACKS, toy=TOY, concepts=CONCEPTS,
                check=check_prompts, rows=comparison_rows)

if __name__ == "__main__":
    main(METHOD)
