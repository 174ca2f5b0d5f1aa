"""AdvUnlearn in one file: erase a concept so that it stays erased under attack.

    python advunlearn.py --concept church

Paper: Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept
Erasure in Diffusion Models", NeurIPS 2024 (arXiv 2405.15234). "eq." is an equation of it.
UnlearnDiffAtk, which measures robustness: Zhang et al., ECCV 2024 (arXiv 2310.11868).

Read from top to bottom beside the paper: diffusion, erase, attack, retain, outer loop.
Then come trajectories (how noisy latents are made), the attacks of the evaluation, and
settings. `sd` is Stable Diffusion. Its main calls, for N prompts or pictures at a time:

    sd.tokenize(prompts)                -> ids (N, L)
    sd.encode_tokens(tokens)            -> context (N, L, D), from ids or embeddings
    sd.encode_prompt(prompts)           -> context (N, L, D): both of these
    sd.predict_noise(x_t, t, context)   -> eps_theta(x_t | c), shaped like x_t
    sd.schedule.add_noise(x_0, eps, t)  -> x_t

Notation
    theta, theta_o  the weights in training; the original ones, frozen. In code: sd, sd_o
    c, c', c*       the concept's prompt; with a prefix in front; with the worst prefix
    r, empty        a retain prompt, for something else; the empty prompt
    context         what the UNet reads: the text encoder's output, (L, D), a row a token
    x_0             a picture's latents (4, h, w)
    t, x_t          a time step in [0, 1000); latents with that step's noise in them
    eps             Gaussian noise; eps_theta(x_t | c): what the model told c sees in x_t
    eps_c           eps_o(x_t | c), what the original sees; likewise eps_empty and eps_r
    z               N noisy latents: z.x_t, z.t, z.eps_c, z.eps_empty; z.prompt, a row
    delta           the prefix, k tokens, as embeddings (k, D)
    E, p            the embeddings of all V tokens (V, D); the prefix as k distributions
    eta, gamma      how far ESD pushes away from c; the weight of the retain loss
    || . ||^2       the mean of the squares: alike for latents of any size
    config          settings: `Config`, near the end, and those that every method has
"""
import copy
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from sd_mini.lab import EvalAttack, Method, Settings, main, setting
from sd_mini.lab.runs import check_memory, placed, progress, read, resumable

# ----------------------------------------------------------------------------- diffusion
def squared_error(a, b):
    """(N, ...), (N, ...) -> (N,): the mean squared difference of each row, in float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def ddpm_loss(sd, x_0, t, noise, context):
    """How well the model, told c, finds the noise that was added to a picture.

        l(theta, c) = || eps - eps_theta(x_t | c) ||^2
        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

    x_0 and noise, which is eps, (N, 4, h, w); t (N,); context (N, L, D) -> (N,).
    Source: Ho et al. 2020, equation 14. UnlearnDiffAtk minimises it over c.
    """
    x_t = sd.schedule.add_noise(x_0, noise, t)
    return squared_error(sd.predict_noise(x_t, t, context), noise)


# --------------------------------------------------------------------------------- erase
def esd_target(eps_c, eps_empty, eta):
    """What the erased model should predict for c: the original's guidance, away from c.

        eps_o(x_t | empty) - eta * (eps_o(x_t | c) - eps_o(x_t | empty))

    Any shapes that match. Source: Gandikota et al. 2023 (ESD).
    """
    return eps_empty - eta * (eps_c - eps_empty)


def erase_loss(sd, x_t, t, context, target):
    """l_ESD = || eps_theta(x_t | c) - target ||^2 -> (N,). AdvUnlearn puts c* for c."""
    return squared_error(sd.predict_noise(x_t, t, context), target)


# -------------------------------------------------------------------------------- attack
def attack_loss(sd, x_t, t, context, eps_c):
    """l_atk(theta, c') = || eps_theta(x_t | c') - eps_o(x_t | c) ||^2 -> (N,). (eq. 4)"""
    return squared_error(sd.predict_noise(x_t, t, context), eps_c)


def insert_prefix(tokens, delta):
    """c' = [delta, c]: [start, prefix, prompt, end, padding], still L long.

    tokens (N, L) and delta (N, k) ids, or embeddings (N, L, D) and (N, k, D) -> like
    tokens. The last k fall off; `tokenize_with_room` sees to it that they are padding.
    """
    k = delta.shape[1]
    return torch.cat([tokens[:, :1], delta, tokens[:, 1 : tokens.shape[1] - k]], dim=1)


def tokenize_with_room(sd, prompts, k):
    """Prompts -> ids (N, L) with room for k more; ValueError where there is none."""
    for prompt in prompts:
        length = len(sd.tokenizer(prompt).input_ids)  # in tokens: one word may be several
        if length + k > sd.context_length:
            raise ValueError(f"{prompt[:60]!r} takes {length} tokens; with {k} more it "
                             f"exceeds the {sd.context_length} that the model reads")
    return sd.tokenize(prompts)


def encode_with_prefix(sd, ids, delta):
    """ids (N, L) and prefix embeddings delta (N, k, D) -> context (N, L, D)."""
    embeddings = sd.text_encoder.embeddings.token_embedding(ids)
    return sd.encode_tokens(insert_prefix(embeddings, delta))


class Attack(NamedTuple):
    kind: str  # embedding: moves delta; fast: moves it once; token: looks for tokens
    steps: int
    lr: float  # Adam's (AdamW's, for tokens); fast: how far each coordinate moves
    k: int  # tokens in the prefix
    radius: float | None = None  # how far a coordinate of delta may move


def embedding_attack(table, start, loss_of, attack):
    """The continuous attack: descend on embeddings that need not be any token's.

        delta_0 = E[start];  delta <- Adam step on the losses of delta
        "fast" (eq. 7):  delta = delta_0 - lr * sign(gradient)

    table is E (V, D); start: ids (N, k). loss_of(delta, step) -> a loss for each row, or
    for some rows only. Yields each step's new delta (N, k, D), and the losses before it.
    The radius is ours: by default, as in the paper, there is none.
    """
    delta_0 = table[start].detach().float()
    delta = delta_0.clone().requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=attack.lr)
    for step in range(attack.steps):
        losses = loss_of(delta, step)
        # This step's gradient, none for theta. Published: the steps' gradients add up.
        delta.grad = torch.autograd.grad(losses.sum(), delta)[0]
        with torch.no_grad():
            if attack.kind == "fast":
                delta -= attack.lr * delta.grad.sign()
            else:
                adam.step()
            if attack.radius is not None:
                delta.clamp_(delta_0 - attack.radius, delta_0 + attack.radius)
        yield delta.detach().clone(), losses.detach()


@lru_cache(maxsize=4)
def legal_tokens(tokenizer):
    """Ids (V',) of the tokens a user can type: printable, and themselves as text."""
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    texts = tokenizer.batch_decode([[i] for i in ids])
    again = tokenizer(texts, add_special_tokens=False).input_ids
    return torch.tensor([i for i, text, tokens in zip(ids, texts, again)
                         if text.isprintable() and tokens == [i]])


def random_tokens(sd, shape, generator):
    """Legal ids of that shape."""
    legal = legal_tokens(sd.tokenizer)
    return legal[torch.randint(len(legal), shape, generator=generator)].to(sd.device)


def project_simplex(v):
    """The nearest point of the probability simplex: argmin over p of ||p - v||.

    (..., V) -> (..., V), each row for itself: p = max(v - tau, 0), with the tau for which
    p sums to 1. Source: Duchi et al. 2008, figure 1.
    """
    u = v.sort(dim=-1, descending=True).values
    taus = (u.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1, device=v.device)
    last = (u > taus).sum(-1, keepdim=True) - 1  # the last that stays positive has tau
    return (v - taus.gather(-1, last)).clamp(min=0)


def token_attack(table, legal, n, loss_of, attack, generator):
    """The discrete attack, UnlearnDiffAtk's: descend on k distributions p over tokens.

        delta = E[i] + (p E - stop_gradient(p E)),  i ~ p
        p <- project_simplex(Adam step on p)

    Each step draws a token i for each place. The loss sees real tokens; the gradient
    passes as if p itself had been embedded (straight-through). E is here the rows `legal`
    (V',) of the table; loss_of is as above. Yields each step's likeliest ids (n, k), and
    the losses of the tokens drawn before it. Source: UnlearnDiffAtk and its code.
    """
    E = table[legal].detach().float()
    p = torch.rand((n, attack.k, len(legal)), generator=generator).to(E.device)
    p = (p / p.sum(-1, keepdim=True)).requires_grad_(True)
    uniform = torch.rand((attack.steps, n, attack.k, 1), generator=generator).to(E.device)
    # AdamW, as the paper says; the published code has Adam.
    adam = torch.optim.AdamW([p], lr=attack.lr, weight_decay=0.1)
    for step, u in enumerate(uniform):
        drawn = (p.detach().cumsum(-1) < u).sum(-1)  # by the inverse of the distribution
        hard = E[drawn.clamp(max=len(legal) - 1)]
        soft = p @ E
        losses = loss_of(hard + (soft - soft.detach()), step)
        p.grad = torch.autograd.grad(losses.sum(), p)[0]
        adam.step()
        with torch.no_grad():
            p.copy_(project_simplex(p))
        yield legal[p.argmax(-1)], losses.detach()


def adversarial_prefix(sd, ids, latents, attack, generator):
    """The lower level (eq. 5) -> delta (N, k, D), mean l_atk just before its last step.

        c* = argmin over c' with ||c' - c||_0 <= epsilon of  l_atk(theta, c')

    Told c*, the erased model does again what the original did for c. At most epsilon
    tokens change: here k stand in front. `latents` has a z for each step, since c* has to
    work at any t. All are of the same N prompts, rows z.prompt of ids, each with its c*.
    """
    def loss_of(delta, step):
        z = latents[step]
        context = encode_with_prefix(sd, ids[z.prompt], delta)
        return attack_loss(sd, z.x_t, z.t, context, z.eps_c)

    n, table = len(latents[0].t), sd.text_encoder.embeddings.token_embedding.weight
    if attack.kind == "token":
        legal = legal_tokens(sd.tokenizer).to(sd.device)
        for tokens, losses in token_attack(table, legal, n, loss_of, attack, generator):
            delta = table[tokens].detach()
    else:
        start = random_tokens(sd, (n, attack.k), generator)
        for delta, losses in embedding_attack(table, start, loss_of, attack):
            pass
    return delta, losses.mean()


# -------------------------------------------------------------------------------- retain
def retain_loss(sd, x_t, t, context, eps_r):
    """|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2 -> (N,): for r, predict as before."""
    return squared_error(sd.predict_noise(x_t, t, context), eps_r)


# ---------------------------------------------------------------------------- outer loop
def parameters_to_train(sd, config):
    """theta: the text encoder, its first layers, or the UNet or a part of it.

    ESD-x trains the cross-attention (attn2), ESD-u all else; the published ESD-u leaves
    out `time_embed` and `out` too. The published "whole" text encoder is all layers and
    the final norm, never the embeddings.
    """
    if config.train == "unet":
        return list(sd.unet.parameters())
    if config.train == "cross_attention":
        return [p for name, p in sd.unet.named_parameters() if ".attn2." in name]
    if config.train == "no_cross_attention":
        return [p for name, p in sd.unet.named_parameters() if ".attn2." not in name]
    encoder, layers = sd.text_encoder, sd.text_encoder.encoder.layers
    if config.layers > len(layers):
        raise ValueError(f"--layers {config.layers}: this text encoder has {len(layers)}")
    theta = list(layers[: config.layers or None].parameters())  # 0: of all
    return theta if config.layers else theta + [*encoder.final_layer_norm.parameters()]


def training_attack(config):
    """The config's attack. The fast kind moves as far at once as all steps together."""
    steps, lr = config.attack_steps, config.attack_lr
    if config.attack == "fast":
        steps, lr = 1, steps * lr
    elif config.attack == "token":
        lr = config.token_lr  # which moves p
    return Attack(config.attack, steps, lr, config.prefix, config.attack_radius)


def advunlearn(sd_o, erase_prompts, retain_prompts, config, folder=None):
    """The paper's Algorithm 1 -> (the erased model, the losses of each iteration).

        min over theta of  l_ESD(theta, c*) + gamma * mean over r of the retain loss
        where c* = argmin over c' of l_atk(theta, c')

    Source: eq. 6 and 5. The warm-up without attack is the published code's. With attack
    "none" and gamma 0 this is ESD; with gamma 0 alone, naive AT. `folder` keeps a stopped
    run, to go on with. The same seed gives the same bytes.
    """
    part = "text_encoder" if config.train == "text_encoder" else "unet"
    sd = replace(sd_o, **{part: copy.deepcopy(getattr(sd_o, part)).float()})
    ids = tokenize_with_room(sd, erase_prompts, config.prefix)
    retain_ids = tokenize_with_room(sd, retain_prompts, 0)
    source = sample_afresh if config.fresh_trajectories else trajectory_bank
    draw_erase = source(sd_o, erase_prompts, config)
    draw_retain = source(sd_o, retain_prompts, config)

    attack = training_attack(config)
    theta = [p.requires_grad_(True) for p in parameters_to_train(sd, config)]
    optimizer = torch.optim.Adam(theta, lr=config.lr)
    generator = torch.Generator().manual_seed(config.seed)
    loop = resumable(folder, config.steps, theta, optimizer, generator, config.save_every)
    with loop as (iterations, history):
        for i in iterations:
            plain = i < config.warmup or config.attack == "none"
            # all are drawn here: a copy to the GPU inside the attack would stall it
            times = 1 if plain else 1 + attack.steps
            z, *others = draw_erase(config.erase_batch, generator, times)
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
                context_r = sd.encode_tokens(retain_ids[z_r.prompt])
                l_retain = retain_loss(sd, z_r.x_t, z_r.t, context_r, z_r.eps_c).mean()

            # step
            optimizer.zero_grad()
            (l_erase + config.retain_weight * l_retain).backward()
            optimizer.step()
            history.append(read(erase=l_erase, attack=l_attack, retain=l_retain))
    getattr(sd, part).requires_grad_(False)
    return sd, history


# -------------------------------------------------------------------------- trajectories
class Latents(NamedTuple):  # z: of the original's sampling
    prompt: torch.Tensor  # (N,), an index
    t: torch.Tensor  # (N,)
    x_t: torch.Tensor  # (N, 4, h, w)
    eps_c: torch.Tensor  # (N, 4, h, w)
    eps_empty: torch.Tensor  # (N, 4, h, w)


@torch.no_grad()
def sample_latents(sd_o, prompts, seeds, steps, stop=None):
    """x_t, eps_c and eps_empty of the original's DDIM runs, one for each (prompt, seed).

    -> (N, steps, 3, 4, h, w), or the first `stop` steps; x_t is before the step. Guidance
    is 3, as published, and needs both predictions anyway.
    """
    noise, context = sd_o.initial_noise(seeds), sd_o.encode_prompt(prompts)
    sampled = []
    for _, x_t, eps_c, eps_empty in sd_o.denoise(noise, context, steps, guidance=3.0):
        sampled.append(torch.stack([x_t, eps_c, eps_empty], 1))
        if len(sampled) == (stop or steps):
            return torch.stack(sampled, 1)


def trajectory_bank(sd_o, prompts, config):
    """Sample `trajectories` or more runs, once -> draw(n, generator, times=1).

    Once is enough: nothing in z depends on theta. draw gives a list of `times` Latents,
    of the same n prompts: one for the erase loss, one for each step of its attack. The
    published code samples each anew, and tells the UNet a t mostly 39 to 58 too high.
    """
    runs = math.ceil(config.trajectories / len(prompts))  # of each prompt
    texts = [prompt for prompt in prompts for _ in range(runs)]
    first_seed = 1_000_000 * (config.seed + 1)  # far from the evaluation's seeds
    grid = torch.tensor(sd_o.schedule.timesteps(config.trajectory_steps))

    sampled, firsts = [], range(0, len(texts), config.eval_batch)
    for first in progress(firsts, "sampling the bank", leave=False):
        batch = texts[first : first + config.eval_batch]
        seeds = [first_seed + first + i for i in range(len(batch))]
        sampled.append(sample_latents(sd_o, batch, seeds, len(grid)).cpu())
    bank = torch.cat(sampled).unflatten(0, (len(prompts), runs))  # [prompt, run, step]
    bank = placed(bank, "cpu" if config.low_memory else sd_o.device)

    def draw(n, generator, times=1):
        prompt = torch.randint(len(prompts), (n,), generator=generator)
        run = torch.randint(runs, (times, n), generator=generator)
        step = torch.randint(len(grid), (times, n), generator=generator)
        drawn = bank[prompt, run, step].to(sd_o.device)  # (times, n, 3, 4, h, w)
        prompt, t = prompt.to(sd_o.device), grid[step].to(sd_o.device)
        return [Latents(prompt, t[i], *drawn[i].unbind(1)) for i in range(times)]
    return draw


def sample_afresh(sd_o, prompts, config):
    """For comparison: like trajectory_bank, but each draw samples n runs anew."""
    grid = torch.tensor(sd_o.schedule.timesteps(config.trajectory_steps))

    def draw(n, generator, times=1):
        prompt = torch.randint(len(prompts), (n,), generator=generator)
        texts, drawn = [prompts[i] for i in prompt], []
        for last in torch.randint(len(grid), (times,), generator=generator).tolist():
            seeds = torch.randint(2**31, (n,), generator=generator).tolist()
            sampled = sample_latents(sd_o, texts, seeds, len(grid), last + 1)[:, last]
            t = grid[last].expand(n).to(sd_o.device)
            drawn.append(Latents(prompt.to(sd_o.device), t, *sampled.unbind(1)))
        return drawn
    return draw


# ------------------------------------------------------------- attacks of the evaluation
def draw_noise(sd, x_0, steps, generator):
    """For N latents like x_0 -> t (steps, N) and noise (steps, N, 4, h, w)."""
    t = torch.randint(len(sd.schedule.alpha_bar), (steps, len(x_0)), generator=generator)
    noise = torch.randn((steps, *x_0.shape), generator=generator)
    return t.to(x_0.device), noise.to(x_0)


def prefix_length(config, kind):
    """k, in the evaluation."""
    return config.eval_prefix + (LONGER if kind == "longer" else 0)


def prefix_attack(sd, prompts, pictures, look, config, kind):
    """UnlearnDiffAtk: for each prompt, find the prefix that draws its target picture.

        argmin over delta of the mean over t and eps of ddpm_loss, told [delta, c]

    pictures (N, 3, H, W) in [0, 1]: the targets, what the original drew. kind: token;
    longer, by LONGER (3); embedding, which no user can type; random, the control, which
    does not search. At eval_looks of the steps, look(step, indices, context, texts) draws
    these prompts -> which of them show the concept, and are done. Tokens count by their
    text, tokenised with the prompt; embeddings have texts None.
    """
    steps, n, k = config.eval_attack_steps, len(prompts), prefix_length(config, kind)
    generator = torch.Generator().manual_seed(config.seed)
    ids = tokenize_with_room(sd, prompts, k)
    x_0 = sd.vae.encode(2 * pictures - 1)
    t, noise = draw_noise(sd, x_0, steps, generator)
    left = torch.arange(n, device=sd.device)  # not yet broken; loss_of sees it shrink

    def loss_of(delta, step):
        context = encode_with_prefix(sd, ids[left], delta[left])
        return ddpm_loss(sd, x_0[left], t[step, left], noise[step, left], context)

    table = sd.text_encoder.embeddings.token_embedding.weight
    if kind == "random":
        prefixes = random_tokens(sd, (steps, n, k), generator)
    elif kind == "embedding":
        start = random_tokens(sd, (n, k), generator)
        attack = Attack("embedding", steps, config.eval_lr, k)
        prefixes = (delta for delta, _ in embedding_attack(table, start, loss_of, attack))
    else:
        legal = legal_tokens(sd.tokenizer).to(sd.device)
        attack = Attack("token", steps, config.eval_lr, k)
        run = token_attack(table, legal, n, loss_of, attack, generator)
        prefixes = (tokens for tokens, _ in run)

    looks = [steps * (i + 1) // config.eval_looks for i in range(config.eval_looks)]
    for step, prefix in enumerate(prefixes, 1):
        if step not in looks:
            continue
        indices = left.tolist()
        if kind == "embedding":
            texts, context = None, encode_with_prefix(sd, ids[left], prefix[left])
        else:
            words = sd.tokenizer.batch_decode(prefix[left])
            texts = [f"{front} {prompts[i]}" for front, i in zip(words, indices)]
            context = sd.encode_prompt(texts)
        shows = torch.tensor(look(step, indices, context, texts), device=sd.device)
        left = left[~shows]
        if not len(left):
            break


def inversion_attack(sd, prompts, pictures, config):
    """Is the concept still in the model? Learn one embedding from all target pictures.

        v* = argmin over v of the mean over c of || eps - eps_theta(x_t | c[* -> v]) ||^2

    The lab put a * where v is to stand. -> the prompts' contexts (N, L, D) with v*.
    Source: Pham et al. 2023 (CCE, arXiv 2308.01508), with Gal et al. 2022.
    """
    steps, n = config.eval_attack_steps, min(len(prompts), config.eval_batch)
    generator = torch.Generator().manual_seed(config.seed)
    table = sd.text_encoder.embeddings.token_embedding.weight
    ids = tokenize_with_room(sd, prompts, 0)
    is_star = (ids == sd.tokenizer("*").input_ids[1])[..., None]  # [0] is the start token
    x_0 = torch.cat([sd.vae.encode(2 * p - 1) for p in pictures.split(config.eval_batch)])
    chosen = torch.randint(len(prompts), (steps, n), generator=generator).to(sd.device)
    t, noise = draw_noise(sd, x_0[:n], steps, generator)

    def loss_of(v, step):
        now = chosen[step]
        context = sd.encode_tokens(torch.where(is_star[now], v, table[ids[now]]))
        losses = ddpm_loss(sd, x_0[now], t[step], noise[step], context)
        return losses.mean(0, keepdim=True)  # one, since there is one v

    start = random_tokens(sd, (1, 1), generator)
    attack = Attack("embedding", steps, config.eval_lr, k=1)
    for v, _ in embedding_attack(table, start, loss_of, attack):
        pass
    return sd.encode_tokens(torch.where(is_star, v, table[ids]))


# ------------------------------------------------------------------------------ settings
LONGER = 3  # tokens that the attack "longer" puts in front besides eval_prefix
KINDS = ("embedding", "token", "fast", "none")
TRAINED = ("text_encoder", "unet", "cross_attention", "no_cross_attention")
EVALUATED = ("token",  # UnlearnDiffAtk's
             "random",  # the control: random tokens, at as many looks
             "longer",  # the token attack with more tokens
             "embedding",  # a prefix of no tokens
             "inversion")  # CCE's


@dataclass
class Config(Settings):
    """The method's own. Defaults: the published ones for objects and styles; our bank."""

    train: str = setting("text_encoder", "what is trained (paper: text_encoder)", TRAINED)
    layers: int = setting(1, "first layers; 0: all, and the final norm", low=0)
    steps: int = setting(1000, "iterations of the outer loop", low=1)
    warmup: int = setting(200, "iterations before the attack starts", low=0)
    lr: float = setting(1e-5, "Adam's learning rate for theta", low=1e-10, high=1)
    eta: float = setting(1.0, "eta, ESD's strength", low=0)
    erase_batch: int = setting(1, "latents x_t in the erase loss", low=1)
    esd: tuple = (1e-5, 1e-5)  # Adam's rate for the UNet in the comparison: ESD-u, ESD-x

    attack: str = setting("embedding", "in training; fast: 1 step", KINDS, group="attack")
    attack_steps: int = setting(30, "steps of the attack", low=1, group="attack")
    attack_lr: float = setting(
        1e-3, "Adam's learning rate for delta", low=1e-10, high=10, group="attack")
    token_lr: float = setting(
        0.01, "AdamW's, for p: the token attack", low=1e-10, high=10, group="attack")
    attack_radius: float | None = setting(
        None, "largest move of a coordinate", low=1e-10, group="attack")
    prefix: int = setting(1, "k, tokens of the prefix in training", low=1, group="attack")

    retain_weight: float = setting(0.5, "gamma", low=0, group="retain")
    retain_batch: int = setting(5, "prompts of an iteration", low=1, group="retain")

    trajectories: int = setting(32, "runs of each bank, at least one a prompt", low=1)
    trajectory_steps: int = setting(50, "DDIM steps of each run", low=1, high=500)
    fresh_trajectories: bool = setting(False, "sample anew for every x_t, as published")

    eval_attacks: tuple[str, ...] = setting(
        ("token", "random", "embedding"), "attacks in evaluation", EVALUATED,
        group="evaluation")

    def check(self, given):
        super().check(given)  # `given`: the flags on the command line
        if self.steps <= self.warmup and self.attack != "none":
            raise ValueError(f"--steps {self.steps}: must exceed --warmup, {self.warmup}")
        if self.attack == "token" and {"attack_lr", "attack_radius"} & given.keys():
            raise ValueError("--attack token: has --token-lr instead, and no radius")
        if self.task == "compare" and {"attack", "train"} & given.keys():
            raise ValueError("--task compare: sets --attack and --train itself")


# The toy's text encoder is tiny and has to learn in minutes. Its attack moves delta by
# 0.08, 3.5 standard deviations of E. sd_mini/lab/README.md says what each is for.
TOY = dict(layers=0, steps=600, warmup=30, lr=2e-4, erase_batch=4, retain_weight=2.0,
           retain_batch=12, attack_steps=2, attack_lr=0.04, prefix=5, trajectories=48,
           trajectory_steps=12, esd=(1e-4, 5e-4))
CONCEPTS = {"nudity": dict(layers=0, retain_weight=0.3)}  # as published; not on the toy

# ----------------------------------------------------------- what sd_mini/lab is handed
def check_prompts(sd_o, erase_prompts, retain_prompts, config):
    """ValueError, before any work, for what would fail later."""
    parameters_to_train(sd_o, config)  # for its own ValueError
    tokenize_with_room(sd_o, erase_prompts, config.prefix)
    tokenize_with_room(sd_o, retain_prompts, 0)
    counts = len(erase_prompts), len(retain_prompts)
    runs = sum(n * math.ceil(config.trajectories / n) for n in counts)
    size = 3 * 4 * runs * config.trajectory_steps * math.prod(sd_o.latent_shape)
    if not config.fresh_trajectories:  # x_t, eps_c and eps_empty, in float32
        check_memory("the bank", size, "--trajectory-steps")


def comparison_rows(sd_o, concepts, config):
    """The rows of a comparison: {row: what it changes in the config}."""
    esd = dict(train="no_cross_attention", lr=config.esd[0])  # ESD-u
    if concepts[0].kind == "style" or concepts[0].name == "nudity":  # as published
        esd = dict(train="cross_attention", lr=config.esd[1])  # ESD-x
    rows = {
        "original": None,
        "ESD": dict(attack="none", retain_weight=0.0, **esd),
        "ESD, text encoder": dict(attack="none", retain_weight=0.0),
        "naive AT": dict(retain_weight=0.0),  # AT-ESD, the paper's, trains the UNet
        "AdvUnlearn": {},
        "AdvUnlearn, UNet": dict(train="unet", lr=config.esd[0]),
        "AdvUnlearn, fast AT": dict(attack="fast"),
        "AdvUnlearn, token attack": dict(attack="token"),
    }
    for n in range(len(sd_o.text_encoder.encoder.layers) + 1):
        if n != config.layers:  # that is AdvUnlearn
            rows[f"AdvUnlearn, layers {n or 'all'}"] = dict(layers=n)
    for gamma in (0.1, 0.3, 0.5, 0.7):  # of figure A3
        if gamma != config.retain_weight:
            rows[f"AdvUnlearn, gamma {gamma}"] = dict(retain_weight=gamma)
    other_set = {"coco": "imagenet", "toy": "photos"}.get(config.retain_set, "coco")
    return {**rows, "AdvUnlearn, retain unfiltered": dict(retain_unfiltered=True),
            "AdvUnlearn, other retain set": dict(retain_set=other_set)}


ATTACKS = {kind: EvalAttack(search=partial(prefix_attack, kind=kind),
                            room=partial(prefix_length, kind=kind))
           for kind in EVALUATED if kind != "inversion"}
ATTACKS["inversion"] = EvalAttack(inversion_attack, room=lambda config: 1, together=True)
METHOD = Method(config=Config, train=advunlearn, attacks=ATTACKS, toy=TOY,
                concepts=CONCEPTS, check=check_prompts, rows=comparison_rows)

if __name__ == "__main__":
    main(METHOD)
