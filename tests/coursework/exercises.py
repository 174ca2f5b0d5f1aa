"""The exercises: what is blanked, and the checks that grade it.

Each check takes `s` and a seed. In the namespace `s` the exercise's functions are the student's,
and all others are the reference's. A check asserts, and says in the words of the field what was
expected. A copied constant does not pass a second seed.
"""
from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch


class Exercise(NamedTuple):
    title: str
    functions: dict[str, tuple[str, ...]]  # file -> qualified names
    section: int  # of TUTORIAL.md

    def places(self):
        """(file, qualified name) of each function."""
        return [(file, name) for file, names in self.functions.items() for name in names]


PAPER, SCHEDULE = "advunlearn.py", "sd_mini/schedule.py"
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
                {PAPER: ("retain_loss",), "sd_mini/lab/prompts.py": ("one_of", "without_concept")},
                7),
    10: Exercise("outer loop", {PAPER: ("advunlearn",)}, 8),
}
FILES = sorted({file for exercise in EXERCISES.values() for file in exercise.functions})
CHECKS = {number: [] for number in EXERCISES}


def check(number):
    def register(function):
        CHECKS[number].append(function)
        return function
    return register


def close(found, expected, what, tolerance=1e-4):
    """Assert that two tensors are close.

    The message names one factor where that is all that is wrong: a sign, or a sum for a mean.
    """
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
    x_0, eps = random(seed, 3, 4, 2, 2), random(seed + 1, 3, 4, 2, 2)
    t = torch.tensor([1, 400, 980])
    a = s.schedule.alpha_bar[t].view(3, 1, 1, 1)
    close(s.schedule.add_noise(x_0, eps, t), a.sqrt() * x_0 + (1 - a).sqrt() * eps,
          "x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps")


@check(1)
def keeps_variance_one(s, seed):
    x_0, eps = random(seed, 1, 200_000), random(seed + 1, 1, 200_000)
    x_t = s.schedule.add_noise(x_0, eps, 500)
    close(x_t.var(), torch.tensor(1.0), "the variance of x_t, for x_0 and eps of variance 1", 0.02)


@check(1)
def takes_one_t_for_all(s, seed):
    x_0, eps = random(seed, 2, 4, 2, 2), random(seed + 1, 2, 4, 2, 2)
    close(s.schedule.add_noise(x_0, eps, 300),
          s.schedule.add_noise(x_0, eps, torch.tensor([300, 300])),
          "a scalar t, for all pictures")


@check(3)
def finds_the_picture_in_one_step(s, seed):
    x_0, eps = random(seed, 2, 4, 2, 2), random(seed + 1, 2, 4, 2, 2)
    clean = s.schedule.alpha_bar_at(-1, x_0)
    x_t = s.schedule.add_noise(x_0, eps, 600)
    close(s.schedule.ddim_step(x_t, eps, 600, -1),
          clean.sqrt() * x_0 + (1 - clean).sqrt() * eps,
          "a step to the end, with the true noise")


@check(3)
def goes_to_the_same_noise_at_t_prev(s, seed):
    x_0, eps = random(seed, 2, 4, 2, 2), random(seed + 1, 2, 4, 2, 2)
    x_t = s.schedule.add_noise(x_0, eps, 700)
    close(s.schedule.ddim_step(x_t, eps, 700, 300), s.schedule.add_noise(x_0, eps, 300),
          "with the true noise, x_prev is x_0 noised to t_prev")


@check(3)
def guidance_is_a_line_through_both_predictions(s, seed):
    c, empty = random(seed, 2, 4, 2, 2), random(seed + 1, 2, 4, 2, 2)
    close(s.schedule.guide(c, empty, 0.0), empty, "guidance 0: the empty prompt's prediction")
    close(s.schedule.guide(c, empty, 1.0), c, "guidance 1: the prompt's prediction")
    close(s.schedule.guide(c, empty, 7.5), empty + 7.5 * (c - empty),
          "guidance 7.5: eps_empty + 7.5 (eps_c - eps_empty)", 1e-3)


# --- 2, 4, 9: the losses, on a model whose noise prediction is a known function

class Toy:
    """eps(x_t, t, c) = theta x_t + mean of c + t / 1000."""

    def __init__(self, s, theta=0.6):
        self.schedule, self.theta = s.schedule, torch.tensor(theta, requires_grad=True)

    def predict_noise(self, x_t, t, context):
        of_context = context.mean((1, 2)).view(-1, 1, 1, 1)
        return self.theta * x_t + of_context + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000


def loss_inputs(seed):
    """-> (x (3, 4, 2, 2), t (3,), another like x, context (3, 5, 6))."""
    x, other = random(seed, 3, 4, 2, 2), random(seed + 1, 3, 4, 2, 2)
    return x, torch.tensor([10, 500, 900]), other, random(seed + 2, 3, 5, 6)


@check(2)
def noise_loss_is_the_closed_form(s, seed):
    x_0, t, eps, c = loss_inputs(seed)
    model = Toy(s)
    a = s.schedule.alpha_bar[t].view(3, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    expected = ((model.predict_noise(x_t, t, c) - eps) ** 2).mean((1, 2, 3))
    close(s.ddpm_loss(model, x_0, t, eps, c), expected,
          "|| eps - eps_theta(x_t | c) ||^2, a mean over each picture's coordinates")


@check(2)
def noise_loss_is_zero_for_a_perfect_model(s, seed):
    x_0, t, eps, c = loss_inputs(seed)

    def true_noise(x_t, t, context):
        return eps

    perfect = Toy(s)
    perfect.predict_noise = true_noise
    close(s.ddpm_loss(perfect, x_0, t, eps, c), torch.zeros(3),
          "the loss of a model that predicts the noise")


@check(2)
def noise_loss_has_gradients(s, seed):
    x_0, t, eps, c = loss_inputs(seed)
    model = Toy(s)
    s.ddpm_loss(model, x_0, t, eps, c).sum().backward()
    assert model.theta.grad is not None and model.theta.grad.abs() > 0, "no gradient reaches theta"


@check(4)
def target_turns_the_guidance_round(s, seed):
    c, empty = random(seed, 2, 3), random(seed + 1, 2, 3)
    close(s.esd_target(c, empty, 1.5), empty - 1.5 * (c - empty),
          "eps_empty - eta (eps_c - eps_empty)")
    close(s.esd_target(c, empty, 0.0), empty, "eta 0: the empty prompt's prediction")
    close(s.esd_target(empty, empty, 2.0), empty,
          "where concept and empty prompt agree, nothing is to change")


@check(4)
def erase_loss_is_per_picture(s, seed):
    x_t, t, target, c = loss_inputs(seed)
    model = Toy(s)
    expected = ((model.predict_noise(x_t, t, c) - target) ** 2).mean((1, 2, 3))
    close(s.erase_loss(model, x_t, t, c, target), expected,
          "|| eps_theta(x_t | c) - target ||^2 for each picture")


@check(4)
def erase_loss_trains_theta(s, seed):
    x_t, t, target, c = loss_inputs(seed)
    model = Toy(s)
    s.erase_loss(model, x_t, t, c, target).sum().backward()
    assert model.theta.grad is not None and model.theta.grad.abs() > 0, "no gradient reaches theta"


@check(9)
def retain_loss_is_the_distance_to_the_original(s, seed):
    x_t, t, eps_r, c = loss_inputs(seed)
    model = Toy(s)
    expected = ((model.predict_noise(x_t, t, c) - eps_r) ** 2).mean((1, 2, 3))
    close(s.retain_loss(model, x_t, t, c, eps_r), expected,
          "|| eps_theta(x_t | r) - eps_o(x_t | r) ||^2 for each picture")


@check(9)
def retain_loss_is_zero_at_the_original(s, seed):
    x_t, t, _, c = loss_inputs(seed)
    model = Toy(s)
    loss = s.retain_loss(model, x_t, t, c, model.predict_noise(x_t, t, c).detach())
    close(loss, torch.zeros(3), "the retain loss at theta = theta_o")
    assert loss.requires_grad, "no gradient reaches theta"


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
    assert out[:, 0].tolist() == [100, 100], "the start token must stay first"
    assert out[:, 1 : 1 + k].unique().tolist() == [7], (
        "the prefix comes right behind the start token")
    assert out[0, 1 + k : 5 + k].tolist() == [1, 2, 3, 101][: 7 - k], "then the prompt and its end"


@check(5)
def prefix_may_be_embeddings(s, seed):
    tokens, prefix = random(seed, 2, 8, 5), random(seed + 1, 2, 3, 5)
    prefix.requires_grad_(True)
    out = s.insert_prefix(tokens, prefix)
    expected = torch.cat([tokens[:, :1], prefix.detach(), tokens[:, 1:5]], 1)
    close(out.detach(), expected, "start, prefix, the rest, L long")
    out.sum().backward()
    close(prefix.grad, torch.ones_like(prefix), "the gradient to the prefix")


@check(5)
def what_does_not_fit_is_refused(s, seed):
    fits = "a photo of a church"
    room = s.sd.context_length - len(s.sd.tokenizer(fits).input_ids)
    close(s.tokenize_with_room(s.sd, [fits], room), s.sd.tokenize([fits]),
          "the ids of a prompt that just fits")
    with raises("a prompt that is one token too long with its prefix"):
        s.tokenize_with_room(s.sd, [fits], room + 1)
    with raises("the second of two prompts, which is too long"):
        s.tokenize_with_room(s.sd, [fits, "church " * 30], 1)


@contextlib.contextmanager
def raises(what):
    try:
        yield
    except ValueError:
        return
    raise AssertionError(f"{what}: ValueError expected, none raised")


@check(7)
def projection_is_on_the_simplex(s, seed):
    p = s.project_simplex(3 * random(seed, 4, 2, 9))
    assert (p >= 0).all(), "a probability is negative"
    close(p.sum(-1), torch.ones(4, 2), "each row's sum")


@check(7)
def projection_leaves_the_simplex_alone(s, seed):
    p = random(seed, 5, 6).softmax(-1)
    close(s.project_simplex(p), p, "a point that is on the simplex already")


@check(7)
def projection_is_the_nearest_point(s, seed):
    """The conditions for it: v - p is the same tau wherever p > 0, and at most tau elsewhere."""
    v = 2 * random(seed, 6, 7)
    p = s.project_simplex(v)
    for row, point in zip(v, p):
        taus = (row - point)[point > 1e-6]
        assert len(taus) and taus.max() - taus.min() < 1e-4, (
            "not the nearest point: what was taken off differs among the positive coordinates")
        assert (row[point <= 1e-6] <= taus.mean() + 1e-4).all(), (
            "not the nearest point: a coordinate was set to 0 that should be positive")


# --- 6, 8: the attacks, on a loss whose minimum is known

def quadratic(goal):
    """A loss (N,) of delta (N, k, D): the squared distance of each row to the goal."""
    return lambda delta, step: (delta - goal).square().flatten(1).sum(1)


@check(6)
def attack_starts_at_the_tokens_and_descends(s, seed):
    table, start = random(seed, 11, 4), torch.tensor([[1, 2], [3, 4]])
    loss_of = quadratic(torch.zeros(2, 2, 4))
    before = loss_of(table[start], 0)
    steps = list(s.embedding_attack(table, start, loss_of, s.Attack("embedding", 40, 0.05, 2)))
    assert len(steps) == 40, f"{len(steps)} steps, expected 40"
    close(steps[0][1], before,
          "the losses before the first step: those of the start tokens' embeddings")
    assert (steps[-1][1] < 0.5 * before).all(), "the loss does not fall"


@check(6)
def attack_takes_adams_steps_with_fresh_gradients(s, seed):
    table, start = random(seed, 11, 4), torch.tensor([[5, 6]])
    loss_of = quadratic(random(seed + 1, 1, 2, 4))
    delta = table[start].clone().requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=0.03)
    for _ in range(7):
        adam.zero_grad()
        loss_of(delta, 0).sum().backward()
        adam.step()
    attack = s.Attack("embedding", 7, 0.03, 2)
    *_, (found, _) = s.embedding_attack(table, start, loss_of, attack)
    close(found, delta.detach(),
          "delta after 7 steps of Adam (do gradients pile up? is the loss a sum over rows?)")


@check(6)
def attack_asks_for_the_loss_of_each_step(s, seed):
    table, start, asked = random(seed, 11, 4), torch.tensor([[1]]), []

    def loss_of(delta, step):
        asked.append(step)
        return delta.sum((1, 2))

    list(s.embedding_attack(table, start, loss_of, s.Attack("embedding", 3, 0.1, 1)))
    assert asked == [0, 1, 2], f"steps {asked}: the loss is asked for each, from 0 on"


@check(6)
def attack_stays_within_the_radius(s, seed):
    table, start = random(seed, 11, 4), torch.tensor([[1], [2], [3]])
    loss_of, attack = quadratic(100 + torch.zeros(3, 1, 4)), s.Attack("embedding", 20, 0.1, 1, 0.25)
    for delta, _ in s.embedding_attack(table, start, loss_of, attack):
        assert (delta - table[start]).abs().max() <= 0.25 + 1e-5, (
            "a coordinate is further than the radius from its start")
    close(delta, table[start] + 0.25, "the corner of the ball towards a far minimum")


@check(6)
def fast_attack_is_one_sign_step(s, seed):
    table, start, goal = random(seed, 11, 4), torch.tensor([[7, 8]]), random(seed + 1, 1, 2, 4)
    attack = s.Attack("fast", 1, 0.2, 2)
    [(delta, _)] = s.embedding_attack(table, start, quadratic(goal), attack)
    close(delta, table[start] - 0.2 * (table[start] - goal).sign(), "start - lr * sign(gradient)")


@check(6)
def attack_leaves_the_table_alone(s, seed):
    table, start = random(seed, 11, 4), torch.tensor([[1]])
    before = table.clone()
    loss_of, attack = quadratic(torch.zeros(1, 1, 4)), s.Attack("embedding", 3, 0.1, 1)
    list(s.embedding_attack(table, start, loss_of, attack))
    close(table, before, "the table of token embeddings, which is not the attack's to change")


LEGAL = torch.tensor([1, 3, 4, 6, 9, 10])


def run_token_attack(s, seed, loss_of, steps=60, n=2, k=2):
    """The token attack on a random table, with loss_of(table) as its loss -> its steps."""
    table, attack = random(seed, 12, 5), s.Attack("token", steps, 0.1, k)
    generator = torch.Generator().manual_seed(seed)
    return list(s.token_attack(table, LEGAL.clone(), n, loss_of(table), attack, generator))


@check(8)
def tokens_are_legal(s, seed):
    steps = run_token_attack(s, seed, lambda table: quadratic(torch.zeros(2, 2, 5)), 5)
    assert len(steps) == 5 and steps[0][0].shape == (2, 2), "each step yields ids (N, k)"
    legal = set(LEGAL.tolist())
    assert all(set(ids.flatten().tolist()) <= legal for ids, _ in steps), "an id that is not legal"


@check(8)
def the_model_sees_real_tokens(s, seed):
    seen, numbers = [], []

    def spy(table):
        def loss_of(delta, step):
            numbers.append(step)
            distances = (delta.detach()[:, :, None] - table[LEGAL]).abs().amax(-1)
            to_nearest = distances.min(-1).values
            seen.append(to_nearest.max().item())
            return delta.square().flatten(1).sum(1)
        return loss_of

    run_token_attack(s, seed, spy, 6)
    assert max(seen) < 1e-5, (
        "the loss must be taken at embeddings of real, legal tokens (straight-through), not at "
        "mixtures")
    assert numbers == [0, 1, 2, 3, 4, 5], f"steps {numbers}: the loss is asked for each, from 0 on"


@check(8)
def the_gradient_is_straight_through(s, seed):
    """The attack finds the one token that lowers a linear loss.

    For that p's gradient has to be E times the embedding's.
    """
    table, legal = random(seed, 12, 5).abs(), LEGAL.clone()
    best = legal[seed % 6].item()
    table[best] *= -1

    def loss_of(delta, step):
        return delta.sum((1, 2))

    attack, generator = s.Attack("token", 40, 0.1, 2), torch.Generator().manual_seed(seed)
    *_, (ids, _) = s.token_attack(table, legal, 2, loss_of, attack, generator)
    assert ids.unique().tolist() == [best], (
        f"tokens {ids.tolist()}, expected {best}, the only one that lowers the loss, everywhere")


@check(8)
def rows_are_attacked_each_for_itself(s, seed):
    goals = random(seed, 12, 5)[torch.tensor([3, 9])][:, None].expand(2, 2, 5)
    steps = run_token_attack(s, seed, lambda table: quadratic(goals))
    found = steps[-1][0].tolist()
    assert found == [[3, 3], [9, 9]], (
        f"tokens {found}: each row should find its own goal, 3 and 9")


# --- 10: the outer loop, with the real functions around it

PROMPTS = ["church", "a photo of a church"], ["a photo of a house", "a boat"]


def outer(s, seed, **changes):
    """Run the outer loop -> (erased model, losses of each iteration, config)."""
    config = s.small(seed=seed, **changes)
    model, history = s.advunlearn(s.sd, *PROMPTS, config)
    return model, history, config


@check(10)
def loop_starts_at_the_closed_form(s, seed):
    """The erase loss is (1 + eta)^2 ||eps_c - eps_empty||^2, and the retain loss is 0.

    That is so at theta = theta_o, without attack.
    """
    _, history, config = outer(s, seed, steps=1, warmup=0, attack="none", eta=2.0)
    draw = s.trajectory_bank(s.sd, PROMPTS[0], config)
    [z] = draw(config.erase_batch, torch.Generator().manual_seed(seed))
    expected, found = 9 * (z.eps_c - z.eps_empty).square().mean().item(), history[0]["erase"]
    assert math.isclose(found, expected, rel_tol=1e-3), (
        f"the first erase loss is {found:.4g}, expected {expected:.4g}")
    assert history[0]["retain"] < 1e-8, (
        f"the first retain loss is {history[0]['retain']:.3g}, expected 0")


@check(10)
def loop_warms_up_then_attacks(s, seed):
    _, history, _ = outer(s, seed, steps=4, warmup=2)
    attacked = [losses["attack"] is not None for losses in history]
    assert attacked == [False, False, True, True], (
        f"attacked: {attacked}; expected none in warm-up, then always")


@check(10)
def loop_trains_theta_alone_and_moves_it(s, seed):
    before = {name: value.clone() for name, value in s.sd.text_encoder.state_dict().items()}
    model, _, _ = outer(s, seed, steps=2, warmup=1, layers=0)
    after, original = model.text_encoder.state_dict(), s.sd.text_encoder.state_dict()
    assert all(torch.equal(before[name], value) for name, value in original.items()), (
        "the original model changed")
    moved = [name for name, value in after.items() if not torch.equal(before[name], value)]
    theta = [name for name in before if not name.startswith("embeddings.")]
    assert moved == theta, f"{len(moved)} tensors moved, {len(theta)} of theta"
    assert not any(p.requires_grad for p in model.text_encoder.parameters()), (
        "theta is left requiring gradients")


@check(10)
def loop_weighs_the_retain_loss_by_gamma(s, seed):
    free, held = (outer(s, seed, steps=8, warmup=7, lr=2e-3, attack="none", retain_weight=gamma)[1]
                  for gamma in (0.0, 50.0))
    assert sum(losses["retain"] for losses in held[-3:]) < sum(
        losses["retain"] for losses in free[-3:]), "gamma 50 keeps no more than gamma 0"


@check(10)
def loop_takes_fresh_gradients(s, seed):
    """Every step must see the same gradient.

    There is one latent to draw, and theta hardly moves.
    """
    config = s.small(seed=seed, steps=3, warmup=2, lr=1e-10, attack="none", trajectories=1,
                     trajectory_steps=1, erase_batch=1, retain_batch=1)
    seen, step = [], torch.optim.Adam.step

    def spy(adam, *arguments):
        gradients = [p.grad for group in adam.param_groups for p in group["params"]]
        seen.append(sum(g.abs().sum().item() for g in gradients if g is not None))
        return step(adam, *arguments)

    torch.optim.Adam.step = spy
    try:
        s.advunlearn(s.sd, ["church"], ["a boat"], config)
    finally:
        torch.optim.Adam.step = step
    assert len(seen) == 3 and seen[2] < 1.5 * seen[0], (
        "gradients pile up from one iteration to the next")


@check(10)
def loop_is_seeded(s, seed):
    a, b = (outer(s, seed, steps=3, warmup=1)[1] for _ in range(2))
    assert a == b, "the same seed gives other losses"


@check(10)
def loop_lowers_the_erase_loss(s, seed):
    _, history, _ = outer(s, seed, steps=24, warmup=23, lr=1e-3, attack="none")
    assert len(history) == 24, f"{len(history)} iterations recorded, expected 24"
    first, last = (sum(losses["erase"] for losses in part) for part in (history[:6], history[-6:]))
    assert last < first, "the erase loss does not fall"
