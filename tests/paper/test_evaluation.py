"""The attacks of the evaluation, where the search tries what it is told to, or each is random."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import advunlearn as au
from sd_mini.lab import evaluation, tasks
from sd_mini.lab.prompts import read_concepts

from .. import bench
from . import ASKED, SMALL, WIDTH, assert_independent, told

same = torch.equal
STARRED = ["a photo of a *", "* a boat", "a *" + 20 * " boat"]  # the last fills the context
TARGETS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attacked(tiny, calls, monkeypatch):
    """attacked(kind, breaks) -> what was seen; a prompt shows the concept where `breaks` has it.

    The search tries, at each step, a random delta and yields another, or tokens.
    """
    losses = calls("ddpm_loss")["ddpm_loss"]

    def run(kind, breaks=(), **changes):
        seen = SimpleNamespace(tried=[], looks=[], decoded=[])
        draws = torch.Generator().manual_seed(5)
        losses.clear()

        def searched(table, n, loss_of, attack):
            assert same(table, tiny.text_encoder.embeddings.token_embedding.weight)
            seen.attack = attack
            for step in range(attack.steps):
                delta, found = torch.randn(2, n, attack.k, WIDTH, generator=draws)
                loss = loss_of(delta.requires_grad_(), step)
                assert loss.requires_grad
                if attack.kind == "token":  # of any tokens: as text many are others
                    found = torch.randint(len(tiny.tokenizer), (n, attack.k), generator=draws)
                seen.tried.append((delta, found))
                yield found, loss

        def embedding_attack(table, start, loss_of, attack):
            seen.start = start
            return searched(table, len(start), loss_of, attack)

        def token_attack(table, those, n, loss_of, attack, generator):
            assert same(those, legal) and isinstance(generator, torch.Generator)
            return searched(table, n, loss_of, attack)

        def look(step, left, context, texts):
            seen.looks.append((step, [*left], context, texts))
            return [(step, i) in breaks for i in left]

        def batch_decode(rows, real=tiny.tokenizer.batch_decode):
            seen.decoded.append(rows)
            return real(rows)

        legal = au.legal_tokens(tiny.tokenizer)
        config = au.Config(**{"eval_prefix": 2, "eval_attack_steps": 7, **changes})
        with monkeypatch.context() as patch:
            patch.setattr(au, "embedding_attack", embedding_attack)
            patch.setattr(au, "token_attack", token_attack)
            patch.setattr(tiny.tokenizer, "batch_decode", batch_decode)
            search, *_, together = au.METHOD.attacks[kind]
            given = (tiny, STARRED, TARGETS) if together else (tiny, ASKED, TARGETS, look)
            seen.contexts = search(*given, config)
        seen.losses = [given for given, _ in losses]
        return seen
    return run


@pytest.mark.parametrize("kind, k", [("token", 2), ("longer", 5), ("embedding", 2)])
def test_prompt_picture_noise_and_prefix_stay_together_when_rows_drop_out(tiny, attacked, kind, k):
    """What is looked at: tokens by their text, which may be other tokens; embeddings as they are.

    The last step is looked at too. Steps without a look have a loss, and no more than that.
    """
    x_0, whole = tiny.vae.encode(2 * TARGETS - 1), attacked(kind).losses
    seen = attacked(kind, breaks={(2, 0), (4, 1)}, eval_lr=0.07)
    assert seen.attack == au.Attack("embedding" if kind == "embedding" else "token", 7, 0.07, k)
    if kind == "embedding":
        assert torch.isin(seen.start, au.legal_tokens(tiny.tokenizer)).all()
        assert seen.start.shape == (3, k) and len(seen.start.unique()) > 3
    lefts = [[0, 1, 2]] * 2 + [[1, 2]] * 2 + [[2]] * 3
    assert len(seen.losses) == 7
    for left, (delta, _), (model, x, t, noise, context), (*_, all_t, all_noise, _) in zip(
            lefts, seen.tried, seen.losses, whole):
        assert model is tiny and same(x, x_0[left])
        assert same(t, all_t[left]) and same(noise, all_noise[left])
        assert_close(context, told(tiny, [ASKED[i] for i in left], delta[left]))
    assert [step for step, *_ in seen.looks] == [2, 4, 7]
    for step, left, context, texts in seen.looks:
        assert left == lefts[step - 1]
        prompts, found = [ASKED[i] for i in left], seen.tried[step - 1][1][left]
        if kind == "embedding":
            assert texts is None and same(context, told(tiny, prompts, found))
        else:
            assert texts == [f"{tiny.tokenizer.decode(row)} {prompt}"
                             for row, prompt in zip(found, prompts)]
            assert same(context, tiny.encode_prompt(texts))
    assert len(attacked(kind, breaks={(2, 0), (2, 1), (2, 2)}).looks) == 1


@pytest.mark.parametrize("kind", ["embedding", "inversion"])
def test_each_row_and_step_has_a_t_and_a_noise_of_its_own_by_the_seed(attacked, kind):
    def draws(seed):
        given = attacked(kind, eval_attack_steps=150, seed=seed).losses
        return (torch.stack([each[i] for each in given]) for i in (2, 3))

    (t, noise), (again, _), (other, other_noise) = draws(0), draws(0), draws(1)
    assert t.dtype == torch.long and t.min() >= 0 and t.max() > 970 and t.min() < 30
    assert_independent(t.T.unflatten(1, (10, 15)) / 1000)
    assert_independent(torch.special.ndtr(noise).flatten(2).movedim(0, 2))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.03
    assert same(t, again) and not same(t, other) and not same(noise, other_noise)


def test_the_control_searches_nothing_and_tries_any_tokens_anew(tiny, attacked):
    """At each look, for each prompt, at each place, any legal ones."""
    seen = attacked("random", eval_prefix=3, eval_attack_steps=200, eval_looks=200)
    assert not seen.losses and len(seen.looks) == 200
    legal, drawn = au.legal_tokens(tiny.tokenizer), torch.stack(seen.decoded)
    assert drawn.shape == (200, 3, 3) and same(drawn.unique(), legal)
    places = torch.searchsorted(legal, drawn) / len(legal)
    assert_independent(places.unflatten(0, (10, 20)))
    for tokens, (_, left, context, texts) in zip(seen.decoded, seen.looks):
        assert texts == [f"{tiny.tokenizer.decode(row)} {ASKED[i]}" for row, i in zip(tokens, left)]
        assert same(context, tiny.encode_prompt(texts))
    looks = [attacked("random", breaks={(2, 1)}, seed=seed).looks for seed in (0, 0, 1)]
    first, again, other = ([texts for *_, texts in each] for each in looks)
    assert first == again != other and [left for _, left, *_ in looks[0]][1:] == [[0, 2]] * 2


@pytest.mark.parametrize("flags, k", [
    ({"concept": "church"}, 3), ({"concept": "nudity"}, 3), ({"model": "toy"}, 5),
    ({"concept": "nudity", "eval_prefix": 5}, 5)])
def test_three_tokens_stand_in_front_five_on_the_toy_or_when_asked(flags, k):
    model = {"model": "CompVis/stable-diffusion-v1-4", "device": "cpu"}  # not loaded
    config = tasks.resolve(au.METHOD, {**model, **flags})
    assert {name: attack.room(config) for name, attack in au.METHOD.attacks.items()} == dict(
        token=k, random=k, longer=k + 3, embedding=k, inversion=1)


@pytest.mark.parametrize("eval_batch, n", [(2, 2), (5, 3)])
def test_the_inversion_learns_one_embedding_from_each_prompts_picture(tiny, attacked, eval_batch,
                                                                      n):
    """It stands at the * alone. Each loss pairs a prompt with its picture; the last v is shown."""
    seen = attacked("inversion", eval_attack_steps=120, eval_lr=0.07, eval_batch=eval_batch)
    table, ids = tiny.text_encoder.embeddings.token_embedding.weight, tiny.tokenize(STARRED)
    star, x_0 = tiny.tokenizer("*").input_ids[1], tiny.vae.encode(2 * TARGETS - 1)
    assert seen.attack == au.Attack("embedding", 120, 0.07, 1) and seen.start.shape == (1, 1)
    assert torch.isin(seen.start, au.legal_tokens(tiny.tokenizer)).all()

    def with_v(rows, v):
        embeddings = table[ids].clone()
        embeddings[ids == star] = v.flatten()
        return tiny.text_encoder(embeddings[rows])

    chosen = []
    for (v, _), (model, x, t, noise, context) in zip(seen.tried, seen.losses, strict=True):
        rows = (x[:, None] - x_0).abs().flatten(2).sum(2).argmin(1)
        chosen.append(rows)
        assert model is tiny and x.shape == noise.shape == (n, 4, 2, 2) and t.shape == (n,)
        assert same(x, x_0[rows])
        assert_close(context, with_v(rows, v))
    assert_independent(torch.stack(chosen).T.unflatten(1, (6, 20)) / 2)
    assert_close(seen.contexts, with_v([0, 1, 2], seen.tried[-1][1]))


def test_an_evaluation_takes_the_unet_evaluations_of_the_formula(sd, monkeypatch, tmp_path):
    """To a classifier that sees nothing no attack succeeds: the bench's worst case."""
    monkeypatch.setattr(evaluation, "shown", lambda classifier, pictures, rows: [False] * len(rows))
    config = replace(SMALL, concept="church", eval_prompts=2, eval_utility=3, eval_steps=3,
                     eval_attack_steps=4, eval_looks=2)
    prompts = evaluation.load_evaluation_set(sd, read_concepts("church"), config)
    counted = bench.counted(sd)
    drawn = evaluation.draw_all(counted, prompts, config)
    prompts = prompts._replace(original=drawn)
    evaluation.evaluate(counted, au.METHOD.attacks, prompts, drawn, config, tmp_path)
    related = len(prompts.paraphrases + prompts.neighbours + prompts.styles)
    assert sum(counted.work) == pytest.approx(bench.evaluation_work(config, related))
