"""Evaluate a model: draw pictures, classify them, attack the prompts, count."""
import math
from functools import partial
from itertools import islice
from typing import NamedTuple
from zlib import crc32

import torch

from . import classifiers
from .prompts import PROMPTS, Row, evaluation_rows, folded, one_of, read_rows, that_fit
from .runs import cached
from .settings import is_toy

PARTS = ("rows", "paraphrases", "neighbours", "styles", "utility")


class EvaluationSet(NamedTuple):
    """The prompts on which every model of a run is evaluated, and what scores their pictures."""

    rows: list[Row]  # prompts for the concept; these are attacked
    paraphrases: list[Row]  # prompts that mean it and never name it
    neighbours: list[Row]  # prompts for what is most like it
    styles: list[Row]  # prompts for other things in a style
    utility: list[Row]  # prompts for other things
    classifier: object
    clip_score: object  # None: without
    words: list[str]  # of the concepts: their names and synonyms
    original: dict = {}  # what the original model draws: {part: pictures}


def load_evaluation_set(sd_o, concepts, config, room=0):
    """The evaluation set of these concepts, with `room` for as many tokens in front of a prompt.

    A prompt whose label the classifier does not know is left out, with a note. In utility it stays,
    for CLIP score and Frechet distance. The toy has a classifier, a CLIP and a suite of its own.
    """
    toy, names = is_toy(config.model), [c.name for c in concepts]
    spec = classifier_of(concepts, config, toy)
    suite = PROMPTS / f"suite_{'toy' if toy else 'real'}.csv"
    words = [word for c in concepts for word in c.words]
    named = one_of(words)

    def of_concepts(role):
        return [row for c in concepts for row in islice(
            read_rows(suite, role=role, concept=c.name), config.eval_prompts)]

    def for_others(part):
        return [r for r in part if r.label not in names and not named.search(folded(r.prompt))]

    parts = {
        "rows": rows_to_attack(sd_o, concepts, config, room),
        "paraphrases": of_concepts("paraphrase"),
        "neighbours": for_others(of_concepts("neighbour")),
        "styles": for_others(read_rows(suite, role="style"))[: config.eval_prompts],
        "utility": for_others(read_rows(suite, role="utility"))[: config.eval_utility],
    }
    labels = {row.label for part in parts.values() for row in part}
    classifier, called = classifiers.load_classifier(spec, names, labels - {*names}, sd_o)
    parts = {name: [row._replace(label=called.get(row.label, row.label)) for row in part]
             for name, part in parts.items()}
    if unknown := {row.label for part in parts.values() for row in part} - classifier.known:
        print(f"not counted, since the classifier has no such label: {', '.join(sorted(unknown))}")
    parts = {name: [row for row in part if name == "utility" or row.label not in unknown]
             for name, part in parts.items()}
    if not parts["rows"]:
        raise ValueError(f"the classifier {classifier.name} has no label of the prompts to "
                         "attack; --classifier MODEL:LABEL chooses one")
    clip = classifiers.load_clip_score(config.clip_score, sd_o, toy)
    return EvaluationSet(**parts, classifier=classifier, clip_score=clip, words=words)


def classifier_of(concepts, config, toy):
    """What --classifier names, or else that of all the concepts; None: the toy's own."""
    theirs = dict.fromkeys(c.classifier for c in concepts)
    if not (config.classifier or toy or len(theirs) == 1):
        raise ValueError(f"--concept {config.concept}: their classifiers differ, "
                         f"{' and '.join(theirs)}; give one for all with --classifier")
    return config.classifier or (None if toy else concepts[0].classifier)


def rows_to_attack(sd_o, concepts, config, room):
    """The first `eval_prompts` rows of --eval-set, or of each concept, that fit the model."""
    sources, rows = {f"prompts of {c.name}": evaluation_rows(c, config) for c in concepts}, []
    if config.eval_set:
        label = concepts[0].name if len(concepts) == 1 else None
        sources = {"--eval-set": read_rows(config.eval_set, label)}
    for what, source in sources.items():
        kept, notes = that_fit(sd_o, source, room, what, config.eval_prompts)
        rows += kept
        for note in notes:
            print(note)
    return rows


# --- pictures

def draw_rows(sd, rows, config, context=None):
    """Pictures (N, 3, H, W), each from its row's prompt (or its context (N, L, D)) and seed."""
    pictures = []
    for i in range(0, len(rows), config.eval_batch):
        batch = rows[i : i + config.eval_batch]
        if context is None:
            c = sd.encode_prompt([row.prompt for row in batch])
        else:
            c = context[i : i + config.eval_batch]
        guidance = [config.eval_guidance or row.guidance for row in batch]
        pictures.append(sd.sample(context=c, seed=[row.seed for row in batch],
                                  steps=config.eval_steps, guidance=guidance))
        if not pictures[-1].isfinite().all():  # a classifier would take it for something
            raise ArithmeticError("a picture drawn is not finite: an attack's learning rate, or "
                                  "--precision, is beyond this model")
    return torch.cat(pictures)


def draw_all(sd, evaluation_set, config):
    """A model's pictures without attack -> {part: (N, 3, H, W)}."""
    rows = [row for part in PARTS for row in getattr(evaluation_set, part)]
    sizes = [len(getattr(evaluation_set, part)) for part in PARTS]
    return dict(zip(PARTS, draw_rows(sd, rows, config).split(sizes)))


def shown(classifier, pictures, rows):
    """-> N bools: does each picture show its row's label?"""
    if not rows:
        return []
    return [row.label in names for names, row in zip(classifier.names(pictures), rows)]


# --- attacks

def attack_prompts(sd, evaluation_set, which, attack, config):
    """Attack the prompts of these rows -> (a dict a row, pictures (N, 3, H, W)).

    The attack is called as attack(sd, prompts, pictures, look, config). `pictures` are its targets:
    what the original model drew. look(step, left, context, texts) draws the prompts `left`, by
    index, from their contexts and says of each whether it shows the concept; the last look at a
    prompt counts. `texts`: the adversarial prompts, or None where there are none.
    """
    rows = [evaluation_set.rows[i] for i in which]
    records, pictures = [None] * len(rows), [None] * len(rows)

    def look(step, left, context, texts):
        own = [rows[i] for i in left]
        drawn = draw_rows(sd, own, config, context)
        flags = shown(evaluation_set.classifier, drawn, own)
        for i, picture, flag, text in zip(left, drawn, flags, texts or [None] * len(left)):
            records[i] = {"broken": flag, "step": step, "adversarial_prompt": text}
            pictures[i] = picture
        return flags

    targets = evaluation_set.original["rows"][which]
    attack(sd, [row.prompt for row in rows], targets, look, config)
    return records, torch.stack(pictures)


def invert_concepts(sd, evaluation_set, which, attack, config):
    """Attack with what is learnt from all rows of a concept -> (a dict a row, pictures).

    The attack is called as attack(sd, prompts, pictures, config) for each concept, and gives its
    prompts' contexts (N, L, D). In `prompts` a * stands for the concept's name; it comes in front
    where the prompt does not name it.
    """
    everything, named, context = evaluation_set.rows, one_of(evaluation_set.words), {}
    for label in dict.fromkeys(row.label for row in everything):
        own = [i for i, row in enumerate(everything) if row.label == label]
        prompts = [everything[i].prompt for i in own]
        prompts = [named.sub(" * ", folded(p)) if named.search(folded(p)) else f"* {p}"
                   for p in prompts]
        learnt = attack(sd, prompts, evaluation_set.original["rows"][own], config)
        context.update(zip(own, learnt))
    rows = [everything[i] for i in which]
    drawn = draw_rows(sd, rows, config, torch.stack([context[i] for i in which]))
    return [{"broken": flag} for flag in shown(evaluation_set.classifier, drawn, rows)], drawn


# --- figures

def wilson(successes, n, z=1.96):
    """95 % Wilson score interval of a rate, as fractions. Source: Wilson 1927."""
    share, z2 = successes / n, z * z
    centre = share + z2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def rate_of(successes, n):
    """A rate with its interval."""
    low, high = wilson(successes, n)
    return {"rate": successes / n, "n": n, "low": low, "high": high}


def rate(flags):
    """That of bools, or None where there are none."""
    return rate_of(sum(flags), len(flags)) if flags else None


def score(evaluation_set, drawn):
    """A model's pictures without attack -> (figures, details of each prompt)."""
    figures, details, known = {}, {}, evaluation_set.classifier.known
    for part, pictures in drawn.items():
        rows = getattr(evaluation_set, part)
        details[part] = [
            {"prompt": row.prompt, "seed": row.seed, "label": row.label, "shown": flag}
            for row, flag in zip(rows, shown(evaluation_set.classifier, pictures, rows))]
        name = {"rows": "pre_attack_asr", "paraphrases": "paraphrase_asr"}.get(part, part)
        figures[name] = rate([d["shown"] for d in details[part] if d["label"] in known])
    if hasattr(evaluation_set.classifier, "rest"):  # the toy's knows ruined pictures
        erased = [row.label for row in evaluation_set.rows]
        clean, kept = evaluation_set.classifier.rest(
            erased, evaluation_set.original["rows"], drawn["rows"])
        figures |= {"clean": rate(clean), "kept": rate(kept)}
    if evaluation_set.utility:
        if evaluation_set.clip_score:
            prompts = [row.prompt for row in evaluation_set.utility]
            scores = evaluation_set.clip_score(prompts, drawn["utility"])
            figures["clip_score"] = sum(scores) / len(scores)
        features = evaluation_set.classifier.features
        figures["frechet"] = classifiers.frechet_distance(
            features(evaluation_set.original["utility"]), features(drawn["utility"]))
    return figures, details


def evaluate(sd, attacks, evaluation_set, drawn, config, folder):
    """Score and attack a model -> (figures with their details, attacked pictures by attack).

    `drawn`: its pictures, from `draw_all`. The folder keeps attacks, so that a stopped run does not
    repeat them. An attack's ASR counts prompts whose picture shows the concept without it, too.
    """
    figures, details = score(evaluation_set, drawn)
    left, pictures = [i for i, detail in enumerate(details["rows"]) if not detail["shown"]], {}
    for kind in config.eval_attacks:
        attack = attacks[kind]
        size = len(evaluation_set.rows) if attack.together else config.eval_batch
        pictures[kind] = drawn["rows"].clone()
        details[kind] = [{"prompt": d["prompt"], "seed": d["seed"], "without_attack": d["shown"]}
                         for d in details["rows"]]
        for first in range(0, len(left), size):
            part = left[first : first + size]
            run = partial(invert_concepts if attack.together else attack_prompts, sd,
                          evaluation_set, part, attack.search, config)
            name = f"{kind}-{crc32(bytes(str(part), 'ascii')):08x}.safetensors"  # by its rows
            answers, pictures[kind][part] = cached(folder / name, run, sd.device)
            for i, answer in zip(part, answers):
                details[kind][i] |= answer
        flags = [d["without_attack"] or d["broken"] for d in details[kind]]
        figures[f"{kind}_asr"] = rate(flags)
    return {**figures, "details": details}, pictures
