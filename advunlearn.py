"""AdvUnlearn in one file: erase a concept from Stable Diffusion, and keep it erased under attack.

    python advunlearn.py --concept church

Paper: Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in
Diffusion Models", NeurIPS 2024 (arXiv 2405.15234). The attack that measures robustness is
UnlearnDiffAtk: Zhang et al., ECCV 2024 (arXiv 2310.11868).

Read from top to bottom beside the paper: settings, diffusion, erase, trajectories, attack, retain,
outer loop, attacks of the evaluation. No other file is needed. The model `sd` is used through these
calls; N prompts or pictures at a time:

    sd.encode_prompt(prompts)           -> context (N, L, D)
    sd.predict_noise(x_t, t, context)   -> eps_theta(x_t | c), like x_t
    sd.denoise(x_T, context, ...)       the sampler, one step at a time
    sd.schedule.add_noise(x_0, eps, t)  -> x_t
    sd.tokenizer, sd.text_encoder       where the attacks move tokens and their embeddings

Notation
    theta, theta_o  the weights in training; the original, frozen ones. In code: `sd` and `sd_o`
    c, c', c*       the concept's prompt; with a prefix in front; with the worst prefix found
    r, empty        a retain prompt, for something else; the empty prompt
    x_0             a picture's latents (4, h, w)
    t, x_t          a time step in [0, 1000); the latents with that step's noise added
    alpha_bar_t     the share of x_0 that is left in x_t, as variance
    eps             Gaussian noise. eps_theta(x_t | c): the noise that the model sees in x_t when
                    told c; eps_o: what the original model sees
    z               a few `Latents`: prompts, t, x_t, and what eps_o is there
    delta           the prefix as embeddings (k, D), a row a token
    p               the prefix as k distributions over the tokens
    eta             how far ESD pushes away from the concept
    gamma           the weight of the retain loss
    N, L, D         prompts, tokens of a context, width of an embedding
    k, V            tokens of a prefix, tokens of the vocabulary
    || . ||^2       the mean over coordinates, in all losses: they compare across sizes
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

from sd_mini.lab import Method, Settings, answer_help, main, setting

# ------------------------------------------------------------------------------------ settings

attack_setting, retain_setting = partial(setting, group="attack"), partial(setting, group="retain")
KINDS = ("embedding", "token", "fast", "none")
TRAINED = ("text_encoder", "unet", "cross_attention")


@dataclass
class Config(Settings):
    """The method's own settings, each a flag: `--erase-batch` for `erase_batch`.

    Defaults are the paper's for objects and styles; for nudity it has layers 0 and gamma 0.3.
    `Settings` has those of any method: model, prompts, evaluation.
    """

    train: str = setting("text_encoder", "what is trained; the paper prefers the first", TRAINED)
    layers: int = setting(1, "train the text encoder's first N layers; 0: all of it", low=0)
    steps: int = setting(1000, "iterations of the outer loop", low=1)
    warmup: int = setting(200, "iterations before the attack starts", low=0)
    lr: float = setting(1e-5, "Adam's learning rate for theta", low=1e-10, high=1)
    eta: float = setting(1.0, "eta, ESD's strength", low=0)
    erase_batch: int = setting(1, "latents x_t in the erase loss", low=1)
    plain_share: float = 0.0  # share of the iterations after warm-up that leave out the attack

    attack: str = attack_setting("embedding", "free embeddings, tokens, or one fast step", KINDS)
    attack_steps: int = attack_setting(30, "steps of the attack", low=1)
    attack_lr: float = attack_setting(1e-3, "Adam's learning rate for delta", low=1e-10, high=10)
    attack_radius: float | None = attack_setting(None, "largest move of a coordinate", low=1e-10)
    prefix: int = attack_setting(1, "k, tokens of the prefix in training", low=1)

    retain_weight: float = retain_setting(0.5, "gamma", low=0)
    retain_batch: int = retain_setting(5, "retain prompts of an iteration", low=1)

    trajectories: int = setting(32, "sampling runs in each bank, at least one a prompt", low=1)
    trajectory_steps: int = setting(50, "DDIM steps of each run", low=1, high=500)
    fresh_trajectories: bool = setting(False, "sample for every x_t, as the published code does")

    eval_attacks: tuple[str, ...] = setting(("token", "embedding"), "attacks in evaluation",
                                            ("token", "embedding", "inversion"), group="evaluation")

    def check(self, given):
        super().check(given)
        if self.steps <= self.warmup and self.attack != "none":
            raise ValueError(f"--steps {self.steps}: must be more than --warmup, {self.warmup}")
        if self.attack == "token" and {"attack_lr", "attack_radius"} & given.keys():
            raise ValueError("--attack token: --token-lr is its learning rate, it has no radius")
        if self.task == "compare" and {"attack", "train"} & given.keys():
            raise ValueError("--task compare: sets --attack and --train itself, row by row")


# The toy departs from the paper, since its text encoder is tiny and knows few words. Erasing
# "church" there does not reach "a sketch of a church": so all of the encoder is trained, on three
# phrasings, with a larger eta and gamma. Plain steps keep the prompt without attack erased. The two
# steps of the attack reach three times as far as the embeddings spread. Found on church, parachute.
TOY = dict(layers=0, steps=300, warmup=30, lr=4e-4, eta=2.0, erase_batch=8, plain_share=0.1,
           retain_weight=15.0, retain_batch=12, attack_steps=2, attack_lr=0.04, prefix=5,
           trajectories=48, trajectory_steps=20)

if __name__ == "__main__":
    answer_help(Config)  # before torch is imported, which takes seconds

import torch  # noqa: E402

from sd_mini.lab.ranks import share  # noqa: E402
from sd_mini.lab.runs import resumable  # noqa: E402

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
    """What the erased model should predict for c: the original's guidance towards c, turned round.

        eps_o(x_t | empty) - eta * (eps_o(x_t | c) - eps_o(x_t | empty))

    Any shapes that match. Source: Gandikota et al. 2023 (ESD), equation 6.
    """
    return eps_empty - eta * (eps_c - eps_empty)


def erase_loss(sd, x_t, t, context, target):
    """l_ESD(theta, c) = || eps_theta(x_t | c) - target ||^2 -> (N,).

    AdvUnlearn gives it the context of c*, not of c.
    """
    return squared_error(sd.predict_noise(x_t, t, context), target)


# -------------------------------------------------------------------------------- trajectories


class Latents(NamedTuple):
    """n noisy latents from the frozen model's sampling, and what it predicted there."""

    prompt: torch.Tensor  # (n,) index of the prompt that was sampled
    t: torch.Tensor  # (n,)
    x_t: torch.Tensor  # (n, 4, h, w)
    eps_c: torch.Tensor  # (n, 4, h, w), eps_o(x_t | c)
    eps_empty: torch.Tensor  # (n, 4, h, w), eps_o(x_t | empty)

    def take(self, rows):
        return Latents(*(column[rows] for column in self))

    def to(self, device):
        return Latents(*(column.to(device) for column in self))


GUIDANCE = 3.0  # of the trajectories, as published


@torch.no_grad()
def sample_latents(sd_o, prompts, seeds, steps, stop=None):
    """Guided DDIM runs of the frozen model, one per prompt and seed -> the latents of every step.

    Guided sampling computes both predictions anyway. With `stop` the runs end at that step, and
    only its latents are kept.
    """
    run = sd_o.denoise(sd_o.initial_noise(seeds), sd_o.encode_prompt(prompts), steps, GUIDANCE)
    rows, kept = torch.arange(len(prompts)), []
    # The range comes first: zip then stops before the UNet is asked once more.
    for _, (t, x_t, eps_c, eps_empty) in zip(range(steps if stop is None else stop + 1), run):
        kept.append(Latents(rows, torch.full_like(rows, t), x_t, eps_c, eps_empty))
    return Latents(*map(torch.cat, zip(*(kept if stop is None else kept[-1:]))))


def trajectory_bank(sd_o, prompts, config):
    """All latents of `trajectories` sampling runs -> draw(n, generator) -> Latents.

    The prompts take turns, each at least once. The published code samples anew, 1 to 50 guided
    steps, for every step of the attack and of the loop. But neither x_t nor eps_o depends on the
    text encoder in training. So the runs are made once and drawn from ever after: an attack step
    costs one forward and backward of the UNet, and nothing else. When the UNet is in training, the
    published code samples with it, and its x_t drift as the concept fades. The bank's stay where
    the original draws the concept, which is where it has to be erased.
    """
    runs = torch.arange(max(config.trajectories, len(prompts)))
    prompt_of, first_seed = runs % len(prompts), 1_000_000 * (config.seed + 1)

    def sample(rows):
        seeds = [first_seed + int(row) for row in rows]
        texts = [prompts[i] for i in prompt_of[rows]]
        z = sample_latents(sd_o, texts, seeds, config.trajectory_steps)
        return z._replace(prompt=prompt_of[rows][z.prompt]).to("cpu")  # full size, 80 runs: 0.8 GB

    sampled = share(sample, runs.split(config.eval_batch), "sampling the bank")
    bank = Latents(*map(torch.cat, zip(*sampled)))

    def draw(n, generator):
        return bank.take(torch.randint(len(bank.t), (n,), generator=generator)).to(sd_o.device)
    return draw


def fresh_trajectories(sd_o, prompts, config):
    """The published schedule, for comparison: a draw is n sampling runs up to a random step."""
    def draw(n, generator):
        prompt = torch.randint(len(prompts), (n,), generator=generator)
        stop = int(torch.randint(config.trajectory_steps, (), generator=generator))
        seeds = torch.randint(2**31, (n,), generator=generator).tolist()
        texts = [prompts[i] for i in prompt]
        z = sample_latents(sd_o, texts, seeds, config.trajectory_steps, stop)
        return z._replace(prompt=prompt)
    return draw


# -------------------------------------------------------------------------------------- attack


class Attack(NamedTuple):
    kind: str  # embedding, fast or token
    steps: int
    lr: float
    k: int  # tokens of the prefix
    radius: float | None = None


def training_attack(config):
    """The config's attack in training. A fast one takes one step, as long as all steps together."""
    if config.attack == "fast":
        reach = config.attack_steps * config.attack_lr
        return Attack("fast", 1, reach, config.prefix, config.attack_radius)
    lr = config.token_lr if config.attack == "token" else config.attack_lr  # for p, for delta
    return Attack(config.attack, config.attack_steps, lr, config.prefix, config.attack_radius)


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
                             f"{sd.context_length} that the model reads: shorten the prompt or the "
                             "prefix")
    return sd.tokenize(prompts)


def encode_with_prefix(sd, ids, delta):
    """ids (N, L) and prefix embeddings delta (N, k, D) -> context (N, L, D)."""
    embeddings = sd.text_encoder.embeddings.token_embedding(ids)
    return sd.text_encoder(embeddings=insert_prefix(embeddings, delta))


def attack_loss(sd, x_t, t, context, eps_c):
    """l_atk(theta, c') = || eps_theta(x_t | c') - eps_o(x_t | c) ||^2 -> (N,).

    How far c' is from making the erased model do what the original did for c. No target picture is
    needed. Source: the paper's lower level.
    """
    return squared_error(sd.predict_noise(x_t, t, context), eps_c)


def embedding_attack(table, start, loss_of, attack):
    """The continuous attack: descend on prefix embeddings, which no token need have.

        argmin over ||delta - delta_0||_inf <= radius of  l_atk(theta, [delta, c])

    table (V, D) token embeddings; start (N, k) ids, whose embeddings are delta_0; loss_of(delta)
    -> (N,). Yields at each step delta (N, k, D) and the losses (N,) before the step. Kind "fast"
    steps by lr * sign(gradient), the others by Adam. The published code has no radius: there
    steps * lr bounds the attack, to be compared with the spread of `table`.
    """
    delta_0 = table[start].detach().float()
    delta = delta_0.clone().requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=attack.lr)
    for _ in range(attack.steps):
        losses = loss_of(delta)
        # A new gradient at each step. In the published code they add up.
        delta.grad = torch.autograd.grad(losses.sum(), delta)[0]
        with torch.no_grad():
            if attack.kind == "fast":
                delta -= attack.lr * delta.grad.sign()
            else:
                adam.step()
            if attack.radius is not None:
                move = (delta - delta_0).clamp(-attack.radius, attack.radius)
                delta.copy_(delta_0 + move)
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
    """Ids (V',) of the tokens that survive as text.

    They are printable, and decoded and tokenised again they are themselves.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in ids])
    again = tokenizer(texts).input_ids
    return torch.tensor([i for i, text, row in zip(ids, texts, again)
                         if text.isprintable() and row[1:-1] == [i]])


def token_attack(table, legal, n, loss_of, attack, generator):
    """The discrete attack, UnlearnDiffAtk's: descend on k distributions p over tokens.

        delta = onehot(token ~ p) E + (p E - stop_gradient(p E)),    p <- project(Adam step on p)

    Each step draws a token per position. The loss sees real tokens; the gradient goes through as if
    p itself had been embedded (straight-through). table = E (V, D); legal (V',) ids allowed;
    loss_of(delta) -> (N,). Yields at each step the likeliest ids (N, k) and the losses (N,) of the
    tokens drawn. Source: UnlearnDiffAtk and its code. Its weight decay of 0.1 is decoupled here
    (AdamW): added to the gradient, which is far smaller, it would drown it.
    """
    table = table[legal].detach().float()
    p = torch.rand((n, attack.k, len(legal)), generator=generator).to(table.device)
    p = project_simplex(p / p.sum(-1, keepdim=True)).requires_grad_(True)
    adam = torch.optim.AdamW([p], lr=attack.lr, weight_decay=0.1)
    for _ in range(attack.steps):
        drawn = torch.multinomial(p.detach().flatten(0, 1).cpu(), 1, generator=generator)
        hard = table[drawn.view(n, attack.k).to(table.device)]
        soft = p @ table
        losses = loss_of(hard + soft - soft.detach())
        p.grad = torch.autograd.grad(losses.sum(), p)[0]
        adam.step()
        with torch.no_grad():
            p.copy_(project_simplex(p))
        yield legal.to(table.device)[p.argmax(-1)], losses.detach()


def run_attack(sd, attack, n, loss_of, generator):
    """Attack with n prefixes at once: yields (delta (n, k, D), ids (n, k) or None, losses (n,))."""
    table, legal = sd.text_encoder.embeddings.token_embedding.weight, legal_tokens(sd.tokenizer)
    if attack.kind == "token":
        for ids, losses in token_attack(table, legal, n, loss_of, attack, generator):
            yield table[ids].detach(), ids, losses
    else:
        start = legal[torch.randint(len(legal), (n, attack.k), generator=generator)]
        for delta, losses in embedding_attack(table, start.to(table.device), loss_of, attack):
            yield delta, None, losses


# -------------------------------------------------------------------------------------- retain


def retain_loss(sd, x_t, t, context, eps_r):
    """|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2 -> (N,): for other prompts, stay what you were.

    Without it adversarial training ruins the pictures of everything else.
    """
    return squared_error(sd.predict_noise(x_t, t, context), eps_r)


# ---------------------------------------------------------------------------------- outer loop


def copy_to_train(sd_o, config):
    """The model in training: a copy of the part that is trained, the original's other parts."""
    part = "text_encoder" if config.train == "text_encoder" else "unet"
    return replace(sd_o, **{part: copy.deepcopy(getattr(sd_o, part)).float()})


def parameters_to_train(sd, config):
    """theta: the UNet, its cross-attention, the text encoder, or the first of its layers.

    Layers are counted. In the published code a match on the name takes 10 and 11 for layer 1.
    """
    if config.train == "unet":
        return list(sd.unet.parameters())
    if config.train == "cross_attention":  # ESD-x of Gandikota et al.; its published name is attn2
        return [p for name, p in sd.unet.named_parameters() if ".attn2." in name]
    layers = sd.text_encoder.encoder.layers
    if config.layers > len(layers):
        raise ValueError(f"--layers {config.layers}: this text encoder has {len(layers)}")
    chosen = layers[: config.layers] if config.layers else sd.text_encoder
    return list(chosen.parameters())


def adversarial_prefix(sd, ids, draw, config, generator):
    """Solve the lower level -> (delta (N, k, D), mean l_atk just before its last step).

    Each of the N = `erase_batch` rows gets a prefix of its own. Each attack step draws new latents,
    with their prompts, so that a prefix works at any t and for any phrasing (`ids`).
    """
    def loss_of(delta):
        z = draw(len(delta), generator)
        context = encode_with_prefix(sd, ids[z.prompt], delta)
        return attack_loss(sd, z.x_t, z.t, context, z.eps_c)

    attack = training_attack(config)
    *_, (delta, _, losses) = run_attack(sd, attack, config.erase_batch, loss_of, generator)
    return delta, losses.mean().item()


def advunlearn(sd_o, erase_prompts, retain_prompts, config, folder=None):
    """The paper's algorithm -> (the erased model, the losses of each iteration).

        min over theta  l_ESD(theta, c*) + gamma * E_r || eps_theta(x_t | r) - eps_o(x_t | r) ||^2
        where c* = argmin l_atk

    With `attack` none and gamma 0 this is ESD; with gamma 0 alone, plain adversarial training.
    `folder` keeps the state of a stopped run, which goes on from there. The same seed gives the
    same bytes: banks have seeds of their own, and one generator draws all else, in the order of the
    code.
    """
    sd = copy_to_train(sd_o, config)
    ids = tokenize_with_room(sd, erase_prompts, config.prefix)
    retain_ids = tokenize_with_room(sd, retain_prompts, 0)
    source = fresh_trajectories if config.fresh_trajectories else trajectory_bank
    draw, draw_retain = source(sd_o, erase_prompts, config), source(sd_o, retain_prompts, config)

    theta = [p.requires_grad_(True) for p in parameters_to_train(sd, config)]
    optimizer = torch.optim.Adam(theta, lr=config.lr)
    generator = torch.Generator().manual_seed(config.seed)
    loop = resumable(folder, config.steps, theta, optimizer, generator, config.save_every)
    with loop as (iterations, history):
        for i in iterations:
            # attack: c* = [delta, c], or c itself in warm-up and in plain steps
            plain = (i < config.warmup or config.attack == "none"
                     or torch.rand((), generator=generator) < config.plain_share)
            z = draw(config.erase_batch, generator)
            if plain:
                context, l_attack = sd.text_encoder(ids[z.prompt]), None
            else:
                delta, l_attack = adversarial_prefix(sd, ids, draw, config, generator)
                context = encode_with_prefix(sd, ids[z.prompt], delta)

            # erase
            target = esd_target(z.eps_c, z.eps_empty, config.eta)
            l_erase = erase_loss(sd, z.x_t, z.t, context, target).mean()

            # retain; with gamma 0 only to be plotted
            r = draw_retain(config.retain_batch, generator)
            with torch.set_grad_enabled(config.retain_weight > 0):
                context = sd.text_encoder(retain_ids[r.prompt])
                l_retain = retain_loss(sd, r.x_t, r.t, context, r.eps_c).mean()

            # step
            optimizer.zero_grad()
            (l_erase + config.retain_weight * l_retain).backward()
            optimizer.step()
            history.append(dict(erase=l_erase.item(), attack=l_attack, retain=l_retain.item()))
    for p in theta:
        p.requires_grad_(False).grad = None
    return sd, history


# --------------------------------------------------------------------- attacks of the evaluation


def random_noising(sd, x_0, generator):
    """A time step and noise for each of the latents x_0, the same on every device."""
    t = torch.randint(sd.schedule.config["num_train_timesteps"], (len(x_0),), generator=generator)
    return t, torch.randn(x_0.shape, generator=generator).to(x_0)


def prefix_attack(sd, prompts, pictures, look, config, kind):
    """UnlearnDiffAtk: in front of each prompt, find the prefix that draws its target picture.

        argmin over delta of  E || eps - eps_theta(x_t | [delta, c]) ||^2

    pictures (N, 3, H, W) are the targets x_0: what the original model drew. `kind`: token, or
    embedding, whose prefixes no user can type. At `eval_looks` of the steps, evenly,
    look(step, rows, context, texts) draws the prompts that are left and says which show the
    concept; these are attacked no more. A token attack counts by its text alone: its tokens are
    decoded and tokenised again with the prompt.
    """
    lr = config.token_lr if kind == "token" else 0.01
    attack = Attack(kind, config.eval_attack_steps, lr, config.eval_prefix)
    generator, left = torch.Generator().manual_seed(config.seed), list(range(len(prompts)))
    ids, x_0 = tokenize_with_room(sd, prompts, attack.k), sd.vae.encode(2 * pictures - 1)

    def loss_of(delta):  # of the prompts left; t and noise for all, so that none changes another's
        t, noise = random_noising(sd, x_0, generator)
        context = encode_with_prefix(sd, ids[left], delta[left])
        return ddpm_loss(sd, x_0[left], t[left], noise[left], context)

    looks = {attack.steps * (i + 1) // config.eval_looks for i in range(config.eval_looks)}
    run = run_attack(sd, attack, len(prompts), loss_of, generator)
    for step, (delta, tokens, _) in enumerate(run, 1):
        if step not in looks:
            continue
        if kind == "token":
            prefixes = sd.tokenizer.batch_decode(tokens[left])
            texts = [f"{prefix} {prompts[i]}" for i, prefix in zip(left, prefixes)]
            context = sd.encode_prompt(texts)
        else:
            texts, context = None, encode_with_prefix(sd, ids[left], delta[left])
        broken = look(step, left, context, texts)
        left = [i for i, shows in zip(left, broken) if not shows]
        if not left:
            break


def inversion_attack(sd, prompts, pictures, config):
    """CCE: is the concept still in the model? Learn one embedding from all its target pictures.

        v* = argmin over v of  E over prompts || eps - eps_theta(x_t | c[* -> v]) ||^2

    A * in the prompts marks where v stands. -> the prompts' contexts (N, L, D) with v*.
    Source: Pham et al. 2023 (arXiv 2308.01508), with Gal et al. 2022 (textual inversion).
    """
    generator, star = torch.Generator().manual_seed(config.seed), sd.tokenizer("*").input_ids[1]
    table, legal = sd.text_encoder.embeddings.token_embedding.weight, legal_tokens(sd.tokenizer)
    ids = tokenize_with_room(sd, prompts, 0)
    x_0 = torch.cat([sd.vae.encode(2 * part - 1) for part in pictures.split(config.eval_batch)])

    def encode(ids, v):
        return sd.text_encoder(embeddings=torch.where((ids == star)[..., None], v, table[ids]))

    def loss_of(v):
        n = min(len(prompts), config.eval_batch)
        i = torch.randint(len(prompts), (n,), generator=generator)
        t, noise = random_noising(sd, x_0[i], generator)
        return ddpm_loss(sd, x_0[i], t, noise, encode(ids[i], v)).mean(0, keepdim=True)

    start = legal[torch.randint(len(legal), (1, 1), generator=generator)].to(table.device)
    attack = Attack("embedding", config.eval_attack_steps, 0.01, 1)
    *_, (v, _) = embedding_attack(table, start, loss_of, attack)
    return encode(ids, v)


# ---------------------------------------------------------------------- what the lab is handed


def check(sd_o, erase_prompts, retain_prompts, attacked_prompts, config):
    """ValueError, before any work, for what would fail later.

    Of the prompts to retain and to attack the lab has left out what is too long.
    """
    parameters_to_train(sd_o, config)
    tokenize_with_room(sd_o, erase_prompts, config.prefix)


def table_rows(sd_o, config):
    """The rows of the paper's tables: {name: what it changes in the config}."""
    esd, other = dict(attack="none", retain_weight=0.0), {"coco": "imagenet", "toy": "photos"}
    counts = [n for n in range(len(sd_o.text_encoder.encoder.layers) + 1) if n != config.layers]
    return {
        "original": None,
        "ESD": dict(esd, train="cross_attention"),  # as published; breaks under attack
        "ESD, text encoder": esd,
        "naive AT": dict(retain_weight=0.0),  # robust, but utility is lost
        "AdvUnlearn": {},
        "AdvUnlearn, UNet": dict(train="unet"),
        "AdvUnlearn, fast AT": dict(attack="fast"),  # one step of attack: cheaper
        "AdvUnlearn, token attack": dict(attack="token"),
        **{f"AdvUnlearn, {layers_in_words(n)}": dict(layers=n) for n in counts},
        "AdvUnlearn, retain unfiltered": dict(retain_unfiltered=True),
        "AdvUnlearn, other retain set": dict(retain_set=other.get(config.retain_set, "coco")),
    }


def layers_in_words(n):
    return f"{n} layer{'s' * (n > 1)}" if n else "whole encoder"


def describe(config):
    """How the model card says that a model was trained."""
    if config.attack == "none":
        return "ESD (arXiv 2303.07345): no attack in training, and not robust, see the figures"
    if not config.retain_weight:
        return "adversarial training without the retain loss: it draws ever less of anything"
    return (f'AdvUnlearn (arXiv 2405.15234), so that "{config.concept}" stays erased under '
            "adversarial prompts")


METHOD = Method(
    config=Config, train=advunlearn, toy=TOY, rows=table_rows, check=check, describe=describe,
    attacks={"token": partial(prefix_attack, kind="token"),
             "embedding": partial(prefix_attack, kind="embedding")},
    inversions={"inversion": inversion_attack})

if __name__ == "__main__":
    main(METHOD)
