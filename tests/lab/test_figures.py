"""What the figures of an evaluation are made of: on models and rows made by hand."""
import math
from dataclasses import replace

import pytest
import torch

from sd_mini.lab import classifiers, evaluation, report
from sd_mini.lab.evaluation import EvaluationSet, rate, rate_of, wilson
from sd_mini.lab.prompts import Row
from sd_mini.lab.settings import EvalAttack

from ..paper import SMALL

SHOWS = ["nothing", "church", "boat", "house"]  # a picture of one number shows this


class Numbers:
    """A model and a classifier whose pictures are one number each: the context itself."""

    known, device = {"church", "boat", "house"}, "cpu"

    def __init__(self):
        self.calls = []

    def encode_prompt(self, prompts):
        return torch.tensor([[float(prompt.split()[-1])] for prompt in prompts])

    def sample(self, context, seed, steps, guidance):
        self.calls.append((context.flatten().tolist(), seed, steps, guidance))
        return context.view(-1, 1, 1, 1)

    def names(self, pictures):
        return [{SHOWS[int(i)]} for i in pictures.flatten()]

    def features(self, pictures):
        return pictures.flatten(1)


def rows(*pairs, first=0):
    """("church 1", ...): prompts for the first word, of which the picture is the number."""
    return [Row(pair, first + i, 2.0 + i, pair.split()[0]) for i, pair in enumerate(pairs)]


@pytest.fixture
def made(monkeypatch):
    """Of rows 1 of 4 shows the concept, paraphrases 2 of 3, and so on; whales do not count."""
    numbers, asked = Numbers(), []

    def clip_score(prompts, pictures):
        asked.append((prompts, pictures.flatten().tolist()))
        return [0.25, 0.5, 0.5, 0.75]

    def frechet_distance(a, b):
        asked.append((a.flatten().tolist(), b.flatten().tolist()))
        return 8.0

    monkeypatch.setattr(classifiers, "frechet_distance", frechet_distance)
    return numbers, EvaluationSet(
        rows("church 0", "church 1", "church 0", "church 2"),
        rows("church 1", "church 0", "church 1", first=10), rows("boat 2", "boat 3", first=20),
        rows("house 3", first=30), rows("boat 2", "house 2", "house 3", "whale 0", first=40),
        numbers, clip_score, ["church"],
        {"rows": torch.arange(4.0).view(4, 1, 1, 1) + 100,
         "utility": torch.tensor([5.0, 6, 7, 9]).view(4, 1, 1, 1)}), asked


CONFIG = replace(SMALL, eval_attacks=("one",), eval_batch=2, eval_steps=7)


def test_each_picture_has_its_own_seed_guidance_and_context(made):
    numbers, prompts, _ = made
    own, contexts = replace(CONFIG, eval_guidance=None), torch.tensor([[7.0], [8], [9]])
    evaluation.draw_rows(numbers, prompts.utility[:3], own)
    evaluation.draw_rows(numbers, prompts.utility[:3], own, contexts)
    evaluation.draw_rows(numbers, prompts.utility[:3], replace(own, eval_guidance=5.0))
    assert numbers.calls == [
        ([2, 2], [40, 41], 7, [2, 3]), ([3], [42], 7, [4]),
        ([7, 8], [40, 41], 7, [2, 3]), ([9], [42], 7, [4]),
        ([2, 2], [40, 41], 7, [5, 5]), ([3], [42], 7, [5])]


def test_a_picture_that_is_not_finite_ends_the_run(made):
    """A classifier would take it for something."""
    with pytest.raises(ArithmeticError):
        evaluation.draw_rows(made[0], rows("church 1", "church nan"), CONFIG)


def test_rates_count_what_they_say(made, tmp_path):
    """ASR: what shows without attack and what it breaks, of all. Attacks are kept by prompts."""
    numbers, prompts, asked = made
    given = []

    def attack(sd, texts, targets, look, config):
        assert sd is numbers
        given.append((texts, targets.flatten().tolist()))
        look(3, [*range(len(texts))], torch.zeros(len(texts), 1), [f"y {t}" for t in texts])
        found = texts[-1] == "church 2"  # breaks the last row alone
        context = torch.tensor([[float(found)]])
        assert look(6, [len(texts) - 1], context, [f"x {texts[-1]}"]) == [found]

    drawn = evaluation.draw_all(numbers, prompts, CONFIG)
    assert drawn["utility"].flatten().tolist() == [2, 2, 3, 0]
    attacks = {"one": EvalAttack(attack), "two": EvalAttack(attack)}
    figures, pictures = evaluation.evaluate(numbers, attacks, prompts, drawn, CONFIG, tmp_path)
    details = figures.pop("details")["one"]
    assert figures == {
        "pre_attack_asr": rate_of(1, 4), "one_asr": rate_of(2, 4), "paraphrase_asr": rate_of(2, 3),
        "neighbours": rate_of(1, 2), "styles": rate_of(1, 1), "utility": rate_of(2, 3),
        "clip_score": 0.5, "frechet": 8}
    assert given == [(["church 0", "church 0"], [100, 102]), (["church 2"], [103])]
    assert pictures["one"].flatten().tolist() == [0, 1, 0, 1]  # row 1 as it was without attack
    assert [(d["without_attack"], d.get("broken"), d.get("step"), d.get("adversarial_prompt"))
            for d in details] == [
        (False, False, 3, "y church 0"), (True, None, None, None), (False, False, 6, "x church 0"),
        (False, True, 6, "x church 2")]
    assert asked == [(["boat 2", "house 2", "house 3", "whale 0"], [2, 2, 3, 0]),
                     ([5, 6, 7, 9], [2, 2, 3, 0])]

    again, kept = evaluation.evaluate(numbers, attacks, prompts, drawn, CONFIG, tmp_path)
    assert again["details"]["one"] == details and torch.equal(kept["one"], pictures["one"])
    assert len(given) == 2
    others = replace(CONFIG, eval_attacks=("two", "one"))
    drawn["rows"] = drawn["rows"] * 0  # now row 1 does not show it either
    evaluation.evaluate(numbers, attacks, prompts, drawn, others, tmp_path)
    assert given[2:] == 2 * [(["church 0", "church 1"], [100, 101]),
                             (["church 0", "church 2"], [102, 103])]


def test_what_the_classifier_cannot_know_is_left_open(made):
    numbers, prompts, _ = made
    numbers.known, labels = {"church", "tench"}, ["church", "tench", "church", "church"]
    mixed = [row._replace(label=label) for row, label in zip(prompts.rows, labels)]
    prompts = prompts._replace(rows=mixed, styles=[], clip_score=None)
    numbers.rest = lambda erased, before, now: (
        [erased == labels and int(x) < 2 for x in now], [*map(torch.equal, now, before - 100)])
    figures, _ = evaluation.score(prompts, evaluation.draw_all(numbers, prompts, CONFIG))
    assert figures["utility"] is figures["neighbours"] is figures["styles"] is None
    assert "clip_score" not in figures and figures["pre_attack_asr"]["n"] == 4
    assert [figures[name]["rate"] for name in ("clean", "kept")] == [0.75, 0.5]
    table = report.table({"original": figures, "erased": figures}, {})
    assert "erased: 75 % clean" in table and "utility" not in table
    assert "erased" in report.rates_table({"erased": figures}, {})


def test_each_concept_is_inverted_by_an_embedding_of_its_own(made):
    """Learnt on all its prompts and targets. A * stands where it is named, else in front."""
    numbers, learnt = made[0], []
    words = [("a church here", "church"), ("Two Tench", "tench"), ("a minster", "church"),
             ("一座教堂", "church")]
    prompts = made[1]._replace(rows=[Row(text, i, 1.0, label) for i, (text, label)
                                     in enumerate(words)], words=["church", "tench", "教堂"])

    def attack(sd, prompts, pictures, config):
        assert sd is numbers
        learnt.append(([" ".join(p.split()) for p in prompts], pictures.flatten().tolist()))
        return pictures.flatten(1) - 100

    records, drawn = evaluation.invert_concepts(numbers, prompts, [1, 2], attack, CONFIG)
    assert learnt == [(["a * here", "* a minster", "一座 *"], [100, 102, 103]),
                      (["two *"], [101])]
    assert drawn.flatten().tolist() == [1, 2] and numbers.calls[0][1] == [1, 2]
    assert records == [{"broken": False}, {"broken": False}]


@pytest.mark.parametrize("successes, n", [(0, 24), (3, 12), (12, 24), (7, 50), (24, 24)])
def test_an_interval_ends_where_the_rate_is_1_96_deviations_away(successes, n):
    """Wilson's definition: |rate - p| = 1.96 sqrt(p (1 - p) / n)."""
    low, high = wilson(successes, n)
    share = successes / n
    for p in (low, high):
        assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert 0 <= low <= share <= high <= 1 and low < high
    assert rate_of(successes, n) == {"rate": share, "n": n, "low": low, "high": high}
    assert rate([True] * successes + [False] * (n - successes)) == rate_of(successes, n)
