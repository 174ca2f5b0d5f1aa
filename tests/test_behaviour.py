"""What losses and attacks are given, by spies and closed forms; test_figures.py has the figures.

`python -m tests.mutants` runs these tests on wrong versions of the code."""
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import advunlearn as au

from .mutants import MUTANTS, ROOT
from .test_run import PROMPTS, SMALL, erase

CLOSE, same = {"rtol": 1e-3, "atol": 1e-3}, torch.equal
TINY = dict(trajectories=2, trajectory_steps=2)


@pytest.fixture
def calls(monkeypatch):
    """calls("f") -> {"f": [(what f was given, what it gave)]}, of functions of advunlearn."""
    seen, own = defaultdict(list), {**vars(au)}

    def spy(*names, given=lambda *arguments: arguments, instead=None):
        for name in names:
            def wrapped(*arguments, name=name, real=instead or own[name]):
                out = real(*arguments)
                out = list(out) if name == "embedding_attack" else out
                seen[name].append((given(*arguments), out))
                return out
            monkeypatch.setattr(au, name, wrapped)
        return seen
    return spy


def prefixed(sd, seen, context):
    """The prompts and the prefix of which a context was made."""
    [(_, ids, delta)] = [given for given, out in seen["encode_with_prefix"] if out is context]
    return [sd.tokenizer.decode(row, skip_special_tokens=True) for row in ids], delta.detach()


def predicted(sd, x_t, t, prompts):
    return sd.predict_noise(x_t, t, sd.encode_prompt(prompts))


# --- training

def with_plain(model, *given):
    """A loss's arguments, and whose context, by the theta of then, each row's is, if anyone's."""
    every = [*PROMPTS[0], *PROMPTS[1]]
    apart = (model.encode_prompt(every) - given[2][:, None]).abs().amax((2, 3))
    return *given, [every[int(row.argmin())] if row.min() < 1e-5 else None for row in apart]


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_each_loss_has_the_context_and_the_target_of_its_prompts(sd, calls, eta):
    """Erase: the bare prompt in warm-up, then the last prefix of the inner attack in front of it.

    The inner attack aims at eps_o(x_t | c), from legal tokens, with k, steps and rate as asked.
    """
    calls("encode_with_prefix", "embedding_attack", "attack_loss")
    seen = calls("erase_loss", "retain_loss", given=with_plain)
    erase(sd, **TINY, eta=eta, steps=5, warmup=2, prefix=3, attack_steps=3)
    for i, ((x_t, t, context, target, own), _) in enumerate(seen["erase_loss"]):
        if i >= 2:
            own, delta = prefixed(sd, seen, context)
            assert same(delta, seen["embedding_attack"][i - 2][1][-1][0])
        assert len(own) == 2 and {*own} <= {*PROMPTS[0]}
        eps_c, eps_empty = predicted(sd, x_t, t, own), predicted(sd, x_t, t, [""] * 2)
        assert_close(target, eps_empty - eta * (eps_c - eps_empty), **CLOSE)
    for (_, x_t, t, context, target), _ in seen["attack_loss"]:
        own, delta = prefixed(sd, seen, context)
        assert_close(target, predicted(sd, x_t, t, own), **CLOSE)
    for (_, start, _, attack), _ in seen["embedding_attack"]:
        assert attack == au.Attack("embedding", 3, SMALL.attack_lr, 3, None)
        assert start.shape == (2, 3) and torch.isin(start, au.legal_tokens(sd.tokenizer)).all()
        assert len(start.unique()) > 3
    for (x_t, t, _, eps_r, own), _ in seen["retain_loss"]:
        assert len(own) == 2 and {*own} <= {*PROMPTS[1]}
        assert_close(eps_r, predicted(sd, x_t, t, own), **CLOSE)
    assert [len(seen[name]) for name in ("erase_loss", "attack_loss", "retain_loss")] == [5, 9, 5]


@pytest.mark.parametrize("radius, least, most", [(0.001, 9e-4, 1.001e-3), (None, 0.03, 0.2)])
def test_the_radius_bounds_the_prefix_in_training(sd, calls, radius, least, most):
    seen = calls("embedding_attack")
    erase(sd, **TINY, steps=2, warmup=1, attack_radius=radius)
    (table, start, _, _), steps = seen["embedding_attack"][0]
    assert least <= (steps[-1][0] - table[start]).abs().max() <= most


def test_the_configs_attack_is_handed_on():
    config = replace(SMALL, attack_steps=7, attack_lr=0.1, token_lr=0.3)
    for kind, expected in dict(fast=(1, 7 * 0.1), token=(7, 0.3), embedding=(7, 0.1)).items():
        assert au.training_attack(replace(config, attack=kind))[1:3] == expected


def test_gamma_weighs_the_retain_loss_in_the_gradient(sd, calls, monkeypatch):
    """Without erase loss the gradient is gamma times that of the retain loss."""
    grads = []
    calls("erase_loss", instead=lambda sd, x_t, t, context, target: 0 * context.mean((1, 2)))
    calls("retain_loss", instead=lambda sd, x_t, t, context, eps: context.square().mean((1, 2)))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: grads.append(torch.cat(
        [p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None])))
    for gamma in (0.0, 2.0, 6.0):
        erase(sd, **TINY, steps=1, attack="none", retain_weight=gamma)
    assert not grads[0].any() and grads[1].norm() > 0.01
    assert_close(grads[2], 3 * grads[1])


def test_iterations_of_the_warm_up_have_no_attack(sd):
    _, history = erase(sd, **TINY, warmup=4)
    assert [losses["attack"] is None for losses in history] == [True] * 4 + [False] * 2


def test_the_bank_and_the_loop_are_seeded_by_the_config(sd, calls, monkeypatch):
    """Other seeds, other noise, far from the evaluation's; with one bank, other draws from it."""
    bank, seen = au.trajectory_bank, calls("sample_latents", "erase_loss")
    draws = [bank(sd, PROMPTS[0], replace(SMALL, seed=seed)) for seed in (0, 1)]
    seeds = [seed for given, _ in seen["sample_latents"] for seed in given[2]]
    assert len({*seeds}) == 8 and min(seeds) >= 1_000_000
    monkeypatch.setattr(au, "trajectory_bank", lambda *given: draws[0])
    for seed in (0, 0, 1):
        erase(sd, steps=3, attack="none", seed=seed)
    x_t = [given[1] for given, _ in seen["erase_loss"]]
    assert same(x_t[0], x_t[3]) and not any(map(same, x_t[:3], x_t[6:]))


def test_the_bank_is_sampled_under_guidance_3(sd):
    x_t, eps_c, eps_empty = au.sample_latents(sd, ["a church"], [5], 4).unbind(2)
    assert same(x_t[:, 0], sd.initial_noise([5])) and x_t.shape == (1, 4, *sd.latent_shape)
    guided = eps_empty[:, 0] + 3 * (eps_c[:, 0] - eps_empty[:, 0])
    assert_close(x_t[:, 1], sd.schedule.ddim_step(x_t[:, 0], guided, 751, 501))
    assert same(au.sample_latents(sd, ["a church"], [5], 4, 2)[:, :, 1], eps_c[:, :2])


def test_the_token_attack_tries_tokens_drawn_and_gives_the_likeliest():
    """With a rate of nearly 0 p stays: of 6 nearly even tokens most draws are not the likeliest."""
    tried, generator = [], torch.Generator().manual_seed(0)
    run = au.token_attack(torch.eye(8), torch.arange(2, 8), 50, lambda delta, step: tried.append(
        delta.detach()) or delta.sum((1, 2)), au.Attack("token", 3, 1e-9, 4), generator)
    p = torch.rand((50, 4, 6), generator=torch.Generator().manual_seed(0))
    likeliest = p.argmax(-1) + 2
    for (ids, _), delta in zip(run, tried):  # whole tokens
        assert same(ids, likeliest)
        assert_close(delta.max(-1).values, torch.ones(50, 4))
        assert 0.5 < (delta.argmax(-1) != likeliest).float().mean() < 0.9


# --- the attacks of the evaluation

TARGETS = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ASKED = ["a church", "a boat", "a photo of a tree"]


@pytest.fixture
def attacked(sd, calls, monkeypatch):
    """attack(kind, breaks) -> what was called, what the losses were given, looks, prefixes."""
    def run(kind, breaks=(), steps=6, **changes):
        looks, deltas = [], []
        seen = calls("ddpm_loss", instead=lambda sd, x, t, noise, context: context.mean((1, 2)))
        seen["ddpm_loss"].clear()

        def searching(real):
            def search(*arguments):
                at = [callable(argument) for argument in arguments].index(True)
                seen["attack"] += [each for each in arguments if isinstance(each, au.Attack)]
                return real(*arguments[:at], lambda delta, step: deltas.append(
                    delta.detach().clone()) or arguments[at](delta, step), *arguments[at + 1 :])
            return search

        def look(step, left, context, texts):
            looks.append((step, [*left], context, texts))
            return [(step, i) in breaks for i in left]

        calls("encode_with_prefix")
        config = replace(SMALL, eval_prefix=2, eval_attack_steps=steps, eval_looks=3, **changes)
        with monkeypatch.context() as patch:
            for name in ("token_attack", "embedding_attack"):
                patch.setattr(au, name, searching(getattr(au, name)))
            au.METHOD.attacks[kind].search(sd, ASKED, TARGETS, look, config)
        return seen, [given for given, _ in seen["ddpm_loss"]], looks, deltas
    return run


@pytest.mark.parametrize("kind", ["token", "embedding"])
def test_prompt_picture_noise_and_prefix_stay_together_when_rows_drop_out(sd, attacked, kind):
    x_0, (_, whole, _, _) = sd.vae.encode(2 * TARGETS - 1), attacked(kind)
    seen, given, looks, deltas = attacked(kind, breaks={(2, 0), (4, 1)})
    lefts = [[0, 1, 2]] * 2 + [[1, 2]] * 2 + [[2]] * 2
    assert [left for _, left, _, _ in looks] == lefts[1::2]
    for left, delta, (_, *three, context), (_, _, *all_two, _) in zip(lefts, deltas, given, whole):
        own, prefix = prefixed(sd, seen, context)
        assert own == [ASKED[i] for i in left] and same(prefix, delta[left])
        assert all(same(a, b[left]) for a, b in zip(three, (x_0, *all_two)))


def test_time_steps_are_any_and_the_seed_counts(attacked):
    def noises(seed):
        given = attacked("embedding", steps=40, seed=seed)[1]
        return torch.cat([t for _, _, t, _, _ in given]), torch.cat([n for _, _, _, n, _ in given])

    (t, noise), (again, _), (other, other_noise) = noises(0), noises(0), noises(1)
    assert t.min() < 50 and t.max() > 950 and abs(noise.std() - 1) < 0.02
    assert same(t, again) and not same(t, other) and not same(noise, other_noise)


@pytest.mark.parametrize("kind, lr, k", [
    ("token", 0.07, 2), ("longer", 0.07, 5), ("embedding", 0.07, 2)])
def test_each_attack_has_the_learning_rate_and_its_own_length(attacked, kind, lr, k):
    [attack] = attacked(kind, eval_lr=0.07)[0]["attack"]
    assert attack[1:] == (6, lr, k, None)


def test_the_classifier_looks_at_text_or_at_embeddings_without_text(sd, attacked, monkeypatch):
    """Here the prefix is two pieces of a word, which as text are tokenised in another way."""
    pieces = torch.tensor([sd.tokenizer("zyzzyva").input_ids[1:3]] * 3)
    prefix, ids = sd.tokenizer.decode(pieces[0]), sd.tokenize(ASKED)
    delta = sd.text_encoder.embeddings.token_embedding.weight[pieces]
    monkeypatch.setattr(au, "token_attack", lambda *given: [(pieces, None)] * 6)
    monkeypatch.setattr(au, "embedding_attack", lambda *given: [(delta, None)] * 6)
    for kind in ("token", "embedding"):
        for _, left, context, shown in attacked(kind, breaks={(2, 0)})[2]:
            as_text = [f"{prefix} {ASKED[i]}" for i in left] if kind == "token" else None
            free = au.encode_with_prefix(sd, ids[left], delta[left])
            assert shown == as_text
            assert same(context, sd.encode_prompt(as_text) if as_text else free)
            assert (kind == "token") == ((context - free).abs().max() > 0.01)


def test_every_wrong_version_can_still_be_made():
    """Its text stands exactly once in its file, the wrong text is another, and it is Python."""
    for what, file, text, wrong, _ in MUTANTS:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(text) == 1 and wrong != text, what
        compile(source.replace(text, wrong), what, "exec")
