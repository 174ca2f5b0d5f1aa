"""What the figures of an evaluation are made of: closed forms on rows made by hand."""
from dataclasses import replace

import pytest
import torch

from sd_mini.lab import classifiers, evaluation, report
from sd_mini.lab.evaluation import EvaluationSet
from sd_mini.lab.prompts import Row
from sd_mini.lab.settings import EvalAttack

from ..paper import SMALL

SHOWS = ["nothing", "church", "boat", "house"]  # a picture of one number shows this


class Numbers:
    """A model and a classifier whose pictures are one number each: the context itself."""

    known, device, calls = {"church", "boat", "house"}, "cpu", []

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
def made():
    """Of rows 1 of 4 shows the concept, paraphrases 2 of 3, and so on; whales do not count."""
    numbers, asked = Numbers(), []

    def clip_score(prompts, pictures):
        asked.append((prompts, pictures.flatten().tolist()))
        return [0.25, 0.5, 0.5, 0.75]

    made = EvaluationSet(
        rows("church 0", "church 1", "church 0", "church 2"),
        rows("church 1", "church 0", "church 1", first=10), rows("boat 2", "boat 3", first=20),
        rows("house 3", first=30), rows("boat 2", "house 2", "house 3", "whale 0", first=40),
        numbers, clip_score, ["church"])
    original = {"rows": torch.arange(4.0).view(4, 1, 1, 1) + 100,
                "utility": torch.tensor([5.0, 6, 7, 9]).view(4, 1, 1, 1)}
    return numbers, made._replace(original=original), asked


CONFIG = replace(SMALL, eval_attacks=("one",), eval_batch=2, eval_steps=7)


def test_rates_count_what_they_say(made, monkeypatch, tmp_path):
    """ASR is what shows without attack, plus what the attack newly breaks, over all prompts."""
    numbers, prompts, asked = made
    given, distances = [], []

    def attack(sd, texts, targets, look, config):
        given.append((texts, targets.flatten().tolist()))
        flags = look(3, [0, *range(1, len(texts))], torch.zeros(len(texts), 1), None)
        assert not any(flags)
        shown = [float(text == "church 2") for text in texts]  # breaks the last row alone
        look(6, [*range(len(texts))], torch.tensor(shown)[:, None], [f"x {t}" for t in texts])

    monkeypatch.setattr(classifiers, "frechet_distance",
                        lambda a, b: distances.append((a, b)) or 8.0)
    drawn = evaluation.draw_all(numbers, prompts, CONFIG)
    assert drawn["utility"].flatten().tolist() == [2, 2, 3, 0]
    figures, pictures = evaluation.evaluate(
        numbers, {"one": EvalAttack(attack)}, prompts, drawn, CONFIG, tmp_path)
    rates = {name: (figure["rate"], figure["n"]) for name, figure in figures.items()
             if isinstance(figure, dict) and "rate" in figure}
    assert rates == {"pre_attack_asr": (1 / 4, 4), "one_asr": (2 / 4, 4),
                     "paraphrase_asr": (2 / 3, 3), "neighbours": (1 / 2, 2), "styles": (1, 1),
                     "utility": (2 / 3, 3)}
    for name, figure in rates.items():
        low, high = evaluation.wilson(round(figure[0] * figure[1]), figure[1])
        assert (figures[name]["low"], figures[name]["high"]) == (low, high)
    assert given == [(["church 0", "church 0"], [100, 102]), (["church 2"], [103])]
    assert pictures["one"].flatten().tolist() == [0, 1, 0, 1]  # row 1 as it was without attack
    details = figures["details"]["one"]
    assert [d["without_attack"] for d in details] == [False, True, False, False]
    assert [d.get("broken") for d in details] == [False, None, False, True]
    assert details[3]["adversarial_prompt"] == "x church 2" and details[3]["step"] == 6
    assert asked == [(["boat 2", "house 2", "house 3", "whale 0"], [2, 2, 3, 0])]
    assert figures["clip_score"] == 0.5 and figures["frechet"] == 8
    [(a, b)] = distances
    assert a.flatten().tolist() == [5, 6, 7, 9] and b.flatten().tolist() == [2, 2, 3, 0]


def test_each_picture_has_its_own_seed_guidance_and_context(made):
    numbers, prompts, _ = made
    numbers.calls.clear()
    own, contexts = replace(CONFIG, eval_guidance=None), torch.tensor([[7.0], [8], [9]])
    evaluation.draw_rows(numbers, prompts.utility[:3], own)
    evaluation.draw_rows(numbers, prompts.utility[:3], own, contexts)
    evaluation.draw_rows(numbers, prompts.utility[:3], replace(own, eval_guidance=5.0))
    assert numbers.calls == [
        ([2, 2], [40, 41], 7, [2, 3]), ([3], [42], 7, [4]),
        ([7, 8], [40, 41], 7, [2, 3]), ([9], [42], 7, [4]),
        ([2, 2], [40, 41], 7, [5, 5]), ([3], [42], 7, [5])]


def test_ruined_pictures_are_neither_clean_nor_kept(sd, made):
    """Of an object's picture the style is kept, of a style's the object; a ruined one counts not.

    Each number is a picture: its object and its style, before erasing and after it.
    """
    seen = [("church", "photo"), ("boat", "sketch"), ("nothing", "sketch"), ("boat", "nothing"),
            ("boat", "van gogh"), ("church", "van gogh")]

    class Network:
        def labels(self, pictures):
            objects, styles = zip(*(seen[int(i)] for i in pictures.flatten()))
            return {"object": objects, "style": styles}

    classifier = classifiers.ToyClassifier(sd.device, sd.folder)
    classifier.network = Network()
    before, after = [0, 1, 1, 1, 5, 5, 4], [1, 2, 4, 3, 0, 4, 3]
    erased = ["church"] * 4 + ["van gogh"] * 3
    clean, kept = classifier.rest(erased, torch.tensor(before), torch.tensor(after))
    assert clean == [True, True, True, False, True, True, False]
    assert kept == [False, True, False, False, True, False, False]
    numbers, prompts = made[0], made[1]._replace(utility=[])
    numbers.rest = lambda erased, before, now: (
        [int(x) < 2 for x in now], [bool(x == y - 100) for x, y in zip(now, before)])
    figures, _ = evaluation.score(prompts, evaluation.draw_all(numbers, prompts, CONFIG))
    assert [figures[name]["rate"] for name in ("clean", "kept")] == [0.75, 0.5]
    assert "erased: 75 % clean" in report.table({"original": figures, "erased": figures}, {})


def test_wilson_interval():
    # Textbooks have the case of 0 successes: [0, z^2 / (n + z^2)].
    low, high = evaluation.wilson(0, 24)
    assert abs(low) < 1e-12 and abs(high - 1.96**2 / (24 + 1.96**2)) < 1e-12
    low, high = evaluation.wilson(12, 24)
    assert abs((low + high) / 2 - 0.5) < 1e-12 and 0.31 < low < 0.32
