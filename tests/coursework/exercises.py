"""The exercises: what is blanked, and the checks that grade it.

Each check takes `s` and a seed. In the namespace `s` the exercise's functions are the student's,
and all others are the solution's. A check asserts, and says in the words of the field what was
expected. A copied constant does not pass a second seed.
"""
from __future__ import annotations

import math
from typing import NamedTuple
from unittest import mock

import torch


class Exercise(NamedTuple):
    title: str
    functions: dict[str, tuple[str, ...]]  # file -> qualified names
    section: int  # of TUTORIAL.md

    def places(self):
        """(file, qualified name) of each function."""
        return [(file, name) for file, names in self.functions.items() for name in names]


PAPER, SCHEDULE, PROMPTS = "advunlearn.py", "sd_mini/schedule.py", "sd_mini/lab/prompts.py"
FILES = (PAPER, SCHEDULE, PROMPTS)
EXERCISES = {
    1: Exercise("adding noise", {SCHEDULE: ("Schedule.add_noise",)}, 4),
    2: Exercise("noise-prediction loss", {PAPER: ("ddpm_loss",)}, 4),
    3: Exercise("guidance and the DDIM step",
                {SCHEDULE: ("Schedule.guide", "Schedule.ddim_step")}, 1),
    4: Exercise("ESD target and loss", {PAPER: ("esd_target", "erase_loss")}, 5),
    5: Exercise("prompt with a prefix", {PAPER: ("insert_prefix", "tokenize_with_room")}, 6),
    6: Exercise("embedding attack", {PAPER: ("embedding_attack",)}, 6),
    7: Exercise("projection onto the simplex", {PAPER: ("project_simplex",)}, 6),
    8: Exercise("token attack", {PAPER: ("token_attack",)}, 6),
    9: Exercise("retain loss and set",
                {PAPER: ("retain_loss",), PROMPTS: ("one_of", "without_concept")}, 7),
    10: Exercise("outer loop", {PAPER: ("advunlearn",)}, 8),
}
CHECKS = {number: [] for number in EXERCISES}


def check(number):
    def register(function):
        CHECKS[number].append(function)
        return function
    return register


def close(found, expected, what, tolerance=1e-4):
    """Assert it, and name the factor where that is all that is wrong: a sign, a sum for a mean."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape, (
        f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    found, expected = found.detach().double(), expected.detach().double()
    worst, ratio = (found - expected).abs().max().item(), (found / expected).flatten()
    everywhere = ratio[0].isfinite() and (ratio - ratio[0]).abs().max() < 1e-3 * ratio[0].abs()
    factor = f", {ratio[0]:.3g} times what it should be" if everywhere else ""
    assert worst <= tolerance, f"{what}: off by {worst:.3g}{factor}"


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 1, 3: the schedule

@check(1)
def is_the_closed_form(s, seed):
    x_0, eps = random(seed, 2, 3, 4, 2, 2)
    for t, what in [(torch.tensor([1, 400, 980]), "a t each"), (300, "one t for all pictures")]:
        a = s.schedule.alpha_bar[t].view(-1, 1, 1, 1)
        close(s.schedule.add_noise(x_0, eps, t), a.sqrt() * x_0 + (1 - a).sqrt() * eps,
              f"x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, {what}")


@check(3)
def goes_to_the_same_noise_at_t_prev(s, seed):
    x_0, eps = random(seed, 2, 2, 4, 2, 2)
    x_t = s.schedule.add_noise(x_0, eps, 700)
    for t_prev, what in [(300, "x_0 noised to t_prev"), (-1, "x_0, at the last step")]:
        close(s.schedule.ddim_step(x_t, eps, 700, t_prev), s.schedule.add_noise(x_0, eps, t_prev),
              f"with the true noise, x_prev is {what}")


@check(3)
def guidance_is_a_line_through_both_predictions(s, seed):
    c, empty = random(seed, 2, 2, 4, 2, 2)
    close(s.schedule.guide(c, empty, 7.5), empty + 7.5 * (c - empty),
          "guidance 7.5: eps_empty + 7.5 (eps_c - eps_empty)", 1e-3)


# --- 2, 4, 9: the losses, on a model whose noise prediction is a known function

class Toy:
    """eps(x_t, t, c) = theta x_t + mean of c + t / 1000."""

    def __init__(self, s):
        self.schedule, self.theta = s.schedule, torch.tensor(0.6, requires_grad=True)

    def predict_noise(self, x_t, t, context):
        of_context = context.mean((1, 2)).view(-1, 1, 1, 1)
        return self.theta * x_t + of_context + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000


def loss_inputs(s, seed):
    """-> model, x (3, 4, 2, 2), t (3,), context (3, 5, 6), another like x."""
    x, other = random(seed, 2, 3, 4, 2, 2)
    return Toy(s), x, torch.tensor([10, 500, 900]), random(seed + 2, 3, 5, 6), other


def close_loss(found, model, predicted, target, what):
    """The loss of each picture is || predicted - target ||^2, and theta learns from it."""
    expected = ((predicted - target) ** 2).mean((1, 2, 3))
    close(found, expected, f"{what}, a mean over each picture's coordinates")
    assert found.requires_grad, f"{what}: no gradient reaches theta"
    close(*(torch.autograd.grad(loss.sum(), model.theta)[0] for loss in (found, expected)),
          f"the gradient of {what}", 1e-3)


@check(2)
def noise_loss_is_the_closed_form(s, seed):
    model, x_0, t, c, eps = loss_inputs(s, seed)
    x_t = s.schedule.add_noise(x_0, eps, t)
    close_loss(s.ddpm_loss(model, x_0, t, eps, c), model, model.predict_noise(x_t, t, c), eps,
               "|| eps - eps_theta(x_t | c) ||^2")


@check(4)
def target_turns_the_guidance_round(s, seed):
    c, empty = random(seed, 2, 2, 3)
    close(s.esd_target(c, empty, 1.5), empty - 1.5 * (c - empty),
          "eps_empty - eta (eps_c - eps_empty)")


@check(4)
def erase_loss_is_the_distance_to_the_target(s, seed):
    model, x_t, t, c, target = loss_inputs(s, seed)
    close_loss(s.erase_loss(model, x_t, t, c, target), model, model.predict_noise(x_t, t, c),
               target, "|| eps_theta(x_t | c) - target ||^2")


@check(9)
def retain_loss_is_the_distance_to_the_original(s, seed):
    model, x_t, t, c, eps_r = loss_inputs(s, seed)
    close_loss(s.retain_loss(model, x_t, t, c, eps_r), model, model.predict_noise(x_t, t, c),
               eps_r, "|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2")


@check(9)
def retain_set_loses_the_concept_as_whole_words(s, seed):
    prompts = ["a photo of a Church", "a churchill", "a garbage truck", "a truck", "the letter c",
               "chapels, at night", "three buses and C++", "three buses", "C++, in chalk"]
    to_keep = ["a churchill", "a truck", "the letter c"]
    to_drop = [prompt for prompt in prompts if prompt not in to_keep]
    words = ("church", "chapel", "garbage truck", "bus", "C++")
    kept, dropped = s.without_concept(prompts, words)
    assert (kept, dropped) == (to_keep, to_drop), (
        f"kept {kept}: prompts that hold a word of the concept, in capitals, plural or before a "
        "comma, are dropped; parts of words are not")


# --- 5, 7: prompts, and the simplex

@check(5)
def prefix_stands_behind_the_start(s, seed):
    ids = torch.tensor([[100, 1, 2, 3] + [101] * 4, [100, 4] + [101] * 6])
    k = 1 + seed % 3
    out = s.insert_prefix(ids, torch.full((2, k), 7))
    assert out.shape == ids.shape, f"shape {tuple(out.shape)}: the length must stay {ids.shape[1]}"
    assert out[0].tolist() == [100] + [7] * k + [1, 2, 3] + [101] * (4 - k), (
        f"{out[0].tolist()}: expected the start token, the prefix, the prompt, its end")


@check(5)
def prefix_may_be_embeddings(s, seed):
    tokens, prefix = random(seed, 2, 8, 5), random(seed + 1, 2, 3, 5).requires_grad_(True)
    out = s.insert_prefix(tokens, prefix)
    close(out, torch.cat([tokens[:, :1], prefix, tokens[:, 1:5]], 1),
          "start, prefix, the rest, L long")
    assert out.requires_grad, "no gradient reaches the prefix"


@check(5)
def what_does_not_fit_is_refused(s, seed):
    fits = "a photo of a church"
    room = s.sd.context_length - len(s.sd.tokenizer(fits).input_ids)
    close(s.tokenize_with_room(s.sd, [fits], room), s.sd.tokenize([fits]),
          "the ids of a prompt that just fits")
    for prompts, k, what in [([fits], room + 1, "one token too long with its prefix"),
                             ([fits, "church " * 30], 1, "too long, the second of two")]:
        try:
            s.tokenize_with_room(s.sd, prompts, k)
        except ValueError:
            continue
        raise AssertionError(f"a prompt {what}: ValueError expected, none raised")


@check(7)
def projection_is_the_nearest_point_of_the_simplex(s, seed):
    """The conditions for it: v - p is the same tau wherever p > 0, and at most tau elsewhere."""
    v = 2 * random(seed, 3, 2, 7)
    p = s.project_simplex(v)
    assert (p >= 0).all(), "a probability is negative"
    close(p.sum(-1), torch.ones(3, 2), "each row's sum")
    for row, point in zip(v.flatten(0, 1), p.flatten(0, 1)):
        taus = (row - point)[point > 1e-6]
        assert len(taus) and taus.max() - taus.min() < 1e-4, (
            "not the nearest point: what was taken off differs among the positive coordinates")
        assert (row[point <= 1e-6] <= taus.mean() + 1e-4).all(), (
            "not the nearest point: a coordinate was set to 0 that should be positive")


# --- 6, 8: the attacks, on a loss whose minimum is known

def quadratic(goal):
    """A loss (N,) of delta (N, k, D): the squared distance of each row to the goal."""
    return lambda delta, step: (delta - goal).square().flatten(1).sum(1)


def run_embedding_attack(s, seed, loss_of, *attack):
    """The embedding attack at two rows of two tokens -> (its steps, where it started)."""
    table, start = random(seed, 11, 4), torch.tensor([[1, 2], [3, 4]])
    steps = list(s.embedding_attack(table, start, loss_of, s.Attack(*attack)))
    close(table, random(seed, 11, 4), "the table of embeddings, which no attack changes")
    return steps, table[start]


@check(6)
def attack_takes_adams_steps_from_the_start_tokens(s, seed):
    goals = random(seed + 1, 7, 2, 2, 4)

    def loss_of(delta, step):
        return (delta - goals[step]).square().sum((1, 2))

    steps, start = run_embedding_attack(s, seed, loss_of, "embedding", 7, 0.03, 2)
    assert len(steps) == 7, f"{len(steps)} steps, expected 7"
    delta = start.requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=0.03)
    for step, (found, losses) in enumerate(steps):
        expected = loss_of(delta, step)
        close(losses, expected, "the losses of each row before a step, at first those of the start "
                                "tokens' embeddings")
        adam.zero_grad()
        expected.sum().backward()
        adam.step()
        close(found, delta, "delta after a step of Adam (do gradients pile up? is the loss a sum "
                            "over rows, of that step, counted from 0?)")


@check(6)
def attack_stays_within_the_radius(s, seed):
    far = quadratic(100 + torch.zeros(2, 2, 4))
    steps, start = run_embedding_attack(s, seed, far, "embedding", 20, 0.1, 2, 0.25)
    assert all((delta - start).abs().max() <= 0.25 + 1e-5 for delta, _ in steps), (
        "a coordinate is further than the radius from its start")
    close(steps[-1][0], start + 0.25, "the corner of the ball towards a far minimum")


@check(6)
def fast_attack_is_one_sign_step(s, seed):
    goal = random(seed + 1, 2, 2, 4)
    [(delta, _)], start = run_embedding_attack(s, seed, quadratic(goal), "fast", 1, 0.2, 2)
    close(delta, start - 0.2 * (start - goal).sign(), "start - lr * sign(gradient)")


LEGAL = torch.tensor([1, 3, 4, 6, 9, 10])


def run_token_attack(s, seed, table, loss_of, steps):
    """The token attack on two rows of two tokens -> [(ids, losses)] of its steps."""
    attack, generator = s.Attack("token", steps, 0.1, 2), torch.Generator().manual_seed(seed)
    return list(s.token_attack(table, LEGAL.clone(), 2, loss_of, attack, generator))


@check(8)
def tokens_are_legal_and_the_model_sees_them(s, seed):
    table, off, asked = random(seed, 12, 5), [], []

    def loss_of(delta, step):
        asked.append(step)
        distances = (delta.detach()[:, :, None] - table[LEGAL]).abs().amax(-1)
        off.append(distances.amin(-1).max())  # from the nearest
        return delta.square().flatten(1).sum(1)

    steps = run_token_attack(s, seed, table, loss_of, 6)
    assert len(steps) == 6 and steps[0][0].shape == (2, 2), "each step yields ids (N, k)"
    assert all(torch.isin(ids, LEGAL).all() for ids, _ in steps), "an id that is not legal"
    assert max(off) < 1e-5, ("the loss must be taken at embeddings of real, legal tokens "
                             "(straight-through), not at mixtures")
    assert asked == [0, 1, 2, 3, 4, 5], f"steps {asked}: the loss is asked for each, from 0 on"


@check(8)
def the_gradient_passes_straight_through_for_each_row(s, seed):
    """The attack finds the goal of each: p's gradient has to be E times the embedding's."""
    table = random(seed, 12, 5)
    goals = table[torch.tensor([3, 9])][:, None].expand(2, 2, 5)
    found = run_token_attack(s, seed, table, quadratic(goals), 60)[-1][0].tolist()
    assert found == [[3, 3], [9, 9]], (
        f"tokens {found}: each row should find its own goal, 3 and 9")


# --- 10: the outer loop, with the real functions around it

TO_ERASE, TO_RETAIN = ["church", "a photo of a church"], ["a photo of a house", "a boat"]


def outer(s, seed, erase=TO_ERASE, **changes):
    """Run the outer loop -> (erased model, losses of each iteration)."""
    return s.advunlearn(s.sd, erase, TO_RETAIN, s.small(seed=seed, **changes))


@check(10)
def loop_starts_at_the_closed_form(s, seed):
    """At theta_o, not attacked: (1 + eta)^2 ||eps_c - eps_empty||^2, and 0 for the retain loss."""
    config = s.small(seed=seed, steps=1, warmup=0, attack="none", eta=2.0)
    _, history = s.advunlearn(s.sd, TO_ERASE, TO_RETAIN, config)
    draw = s.trajectory_bank(s.sd, TO_ERASE, config)
    [z] = draw(config.erase_batch, torch.Generator().manual_seed(seed))
    expected, found = 9 * (z.eps_c - z.eps_empty).square().mean().item(), history[0]["erase"]
    assert math.isclose(found, expected, rel_tol=1e-3), (
        f"the first erase loss is {found:.4g}, expected {expected:.4g}")
    assert history[0]["retain"] < 1e-8, (
        f"the first retain loss is {history[0]['retain']:.3g}, expected 0")


ONE_LATENT = dict(warmup=0, attack="none", trajectories=1, trajectory_steps=1, erase_batch=1)


@check(10)
def loop_takes_fresh_gradients(s, seed):
    """Every step must see the same gradient: there is one latent to draw, and theta stays."""
    seen = []

    def stay(adam, *arguments):
        gradients = [p.grad for group in adam.param_groups for p in group["params"]]
        seen.append(sum(g.abs().sum().item() for g in gradients if g is not None))

    with mock.patch.object(torch.optim.Adam, "step", stay):
        outer(s, seed, ["church"], steps=3, retain_weight=0.0, **ONE_LATENT)
    assert len(seen) == 3 and seen[2] < 1.5 * seen[0], (
        "gradients pile up from one iteration to the next")


@check(10)
def loop_warms_up_then_attacks(s, seed):
    histories = [outer(s, seed, steps=3, warmup=1)[1] for _ in range(2)]
    attacked = [losses["attack"] is not None for losses in histories[0]]
    assert attacked == [False, True, True], (
        f"attacked: {attacked}; expected none in warm-up, then always")
    assert histories[0] == histories[1], "the same seed gives other losses"


@check(10)
def loop_trains_theta_alone_and_moves_it(s, seed):
    before = {name: value.clone() for name, value in s.sd.text_encoder.state_dict().items()}
    model, _ = outer(s, seed, steps=2, warmup=1, layers=0)
    after, original = model.text_encoder.state_dict(), s.sd.text_encoder.state_dict()
    assert all(torch.equal(before[name], value) for name, value in original.items()), (
        "the original model changed")
    moved = [name for name, value in after.items() if not torch.equal(before[name], value)]
    theta = [name for name in before if not name.startswith("embeddings.")]
    assert moved == theta, f"{len(moved)} tensors moved, {len(theta)} of theta"
    assert not any(p.requires_grad for p in model.text_encoder.parameters()), (
        "theta is left requiring gradients")


@check(10)
def loop_lowers_the_erase_loss_and_by_gamma_the_retain_loss(s, seed):
    free, held = (outer(s, seed, ["church"], steps=6, lr=2e-4, retain_weight=gamma, **ONE_LATENT)[1]
                  for gamma in (0.0, 50.0))
    assert free[-1]["erase"] < free[0]["erase"], "the erase loss does not fall"
    assert held[-1]["retain"] < free[-1]["retain"], "gamma 50 keeps no more than gamma 0"
