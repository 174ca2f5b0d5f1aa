"""Concepts and prompts: the CSV files, the phrasings that are erased, the retain filter."""
from __future__ import annotations

import csv
import math
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

PROMPTS = Path(__file__).parents[2] / "prompts"

PHRASINGS = {  # by kind of concept; `phrasings` of them are erased, the others evaluate
    "object": ("{}", "a photo of a {}", "a sketch of a {}", "a painting of a {} by van gogh",
               "a red {} in the snow", "a picture of a green {} in the sky",
               "a painting of a {} at night by van gogh", "a sketch of a red {} at night",
               "a yellow {} on the grass", "a photo of a blue {} in the desert",
               "a purple {} in the style of van gogh",
               "a pencil drawing of a pink {} on the grass"),
    "style": ("{}", "a painting of a house by {}", "a red car in the style of {}",
              "a painting of a tree in the snow by {}", "a boat in the style of {}",
              "a painting of a blue golf ball by {}", "a balloon in the sky in the style of {}",
              "a painting of a yellow house at night by {}",
              "a green boat on the grass in the style of {}",
              "a painting of a gray tree in the desert by {}", "a purple house in the style of {}",
              "a painting of a pink car at night by {}"),
}


class Row(NamedTuple):
    """A prompt of an evaluation file; `label` is what its picture should show."""

    prompt: str
    seed: int
    guidance: float
    label: str


class Concept(NamedTuple):
    """What is erased: a row of prompts/concepts.csv, or an object of any other name."""

    name: str
    kind: str = "object"  # or style
    synonyms: tuple[str, ...] = ()
    judge: str = "microsoft/resnet-50"
    settings: dict = {}  # what else its row says

    @property
    def words(self):
        return (self.name, *self.synonyms)


def slug(name):
    """A name as part of a path: "garbage truck" -> "garbage_truck"."""
    return re.sub(r"[^\w+-]+", "_", name.lower().replace(",", "+")).strip("_") or "_"


# --- files

def read_csv(path, column="prompt"):
    """A CSV file with a header and that column -> its rows as dicts."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None
    if not rows or column not in rows[0]:
        raise ValueError(f"{path}: " + (f"no column {column!r}" if rows else "holds no rows"))
    for line, row in enumerate(rows, 2):
        if not row[column]:
            raise ValueError(f"{path}, line {line}: its {column} is empty")
    return rows


def read_rows(path, label=None, **wanted):
    """Evaluation prompts, in the columns of UnlearnDiffAtk's files.

    Of a suite only the rows whose columns are as wanted: `role="style"`.
    """
    rows = []
    for line, r in enumerate(read_csv(path), 2):
        try:
            row = Row(r["prompt"], int(r.get("evaluation_seed") or 0),
                      float(r.get("evaluation_guidance") or 7.5), r.get("label") or label)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: evaluation_seed or evaluation_guidance: "
                             f"{error}") from None
        if not (row.label and 0 <= row.seed < 2**63 and math.isfinite(row.guidance)):
            raise ValueError(f"{path}, line {line}: label, evaluation_seed or evaluation_guidance: "
                             "empty or out of range")
        if all(r[column] == value for column, value in wanted.items()):
            rows.append(row)
    return rows


def read_concepts(names):
    """"church,parachute" -> the concepts."""
    known = {row["concept"]: row for row in read_csv(PROMPTS / "concepts.csv", "concept")}
    concepts = []
    for name in filter(None, (name.strip().lower() for name in names.split(","))):
        concepts.append(concept_of(dict(known[name])) if name in known else Concept(name))
    if not concepts:
        raise ValueError(f"--concept {names!r}: names nothing")
    return concepts


def concept_of(row):
    """A row of prompts/concepts.csv; its further columns are settings, numbers."""
    name, kind, synonyms = row.pop("concept"), row.pop("kind"), row.pop("synonyms").split("|")
    judge = row.pop("judge") or Concept("").judge
    settings = {key: float(value) if "." in value else int(value) for key, value in row.items()}
    return Concept(name, kind, tuple(filter(None, synonyms)), judge, settings)


def concept_settings(names, defaults):
    """What prompts/concepts.csv sets for these concepts: of several values the largest.

    0 is the largest of all: as `layers` it means every layer. `defaults`: {setting: value}.
    """
    concepts = read_concepts(names)
    keys = {key for concept in concepts for key in concept.settings if key in defaults}
    values = {key: [c.settings.get(key, defaults[key]) for c in concepts] for key in keys}
    return {key: max(listed, key=lambda value: value or math.inf) for key, listed in values.items()}


# --- prompts of a run

def evaluation_rows(concept, config):
    """prompts/NAME.csv, or else the phrasings that are not erased in training (all, if all are)."""
    path = PROMPTS / f"{slug(concept.name)}.csv"
    if path.is_file():
        return read_rows(path, concept.name)[: config.eval_prompts]
    phrasings = PHRASINGS[concept.kind]
    unseen = phrasings[config.phrasings :] or phrasings
    return [Row(unseen[i % len(unseen)].format(concept.name), 5000 + i, 7.5, concept.name)
            for i in range(config.eval_prompts)]


def training_prompts(concepts, config):
    """-> (prompts to erase, prompts to retain, retain prompts left out)."""
    erase = [phrasing.format(concept.name) for concept in concepts
             for phrasing in PHRASINGS[concept.kind][: config.phrasings]]
    path = PROMPTS / f"retain_{config.retain_set}.csv"
    rows = read_csv(path if path.is_file() else Path(config.retain_set))
    retain, dropped = [row["prompt"] for row in rows], []
    if not config.retain_unfiltered:
        words = [word for concept in concepts for word in concept.words]
        retain, dropped = without_concept(retain, words)
    if not retain:
        raise ValueError(f"--retain-set {config.retain_set}: every prompt names the concept")
    return erase, retain, dropped


# --- names in prompts

# A letter or digit of the scripts that have capitals, which put blanks between their words.
LETTER = r"[^\W\u0590-\u1dff\u2e80-\U0010ffff]"
EDGE = f"(?:(?<!{LETTER})|(?!{LETTER}))"  # not between two of them
PLURALS = {"y": "ies", "f": "ves", "ife": "ives", "man": "men", "child": "children",
           "person": "people", "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth"}


def folded(text):
    """A text such that what differs in capitals, in blanks or in how accents are coded is equal."""
    composed = unicodedata.normalize("NFC", " ".join(text.split()))
    return unicodedata.normalize("NFC", composed.casefold())


def with_plurals(word):
    """The word, folded, and what its plural may be: "wolf" -> wolf, wolfs, wolfes, wolves."""
    word = folded(word)
    irregular = [word.removesuffix(end) + plural for end, plural in PLURALS.items()
                 if word.endswith(end)]
    return [word, word + "s", word + "es", *irregular]


def one_of(words):
    """A pattern that finds any of the words, or its plural, as a whole word in a folded text.

    "church" is in "two churches", not in "churchill". Within a word is between two LETTERs, so
    that C++ and 教堂 are found too, which \\b cannot bound.
    """
    every = [re.escape(form) for word in words for form in with_plurals(word)]
    return re.compile(f"{EDGE}(?:{'|'.join(every)}){EDGE}")


def without_concept(prompts, words):
    """-> (prompts kept, prompts that name the concept by one of the words).

    A retain set that holds the concept undoes erasing.
    """
    pattern = one_of(words)
    named = [bool(pattern.search(folded(prompt))) for prompt in prompts]
    return ([prompt for prompt, names in zip(prompts, named) if not names],
            [prompt for prompt, names in zip(prompts, named) if names])
