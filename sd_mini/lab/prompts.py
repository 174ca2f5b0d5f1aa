"""Concepts and prompts: their files, templates, the retain filter."""
from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

# By their whole names: the grader opens this file outside its package.
from sd_mini.lab.records import COLUMNS, read_csv, read_number

PROMPTS = Path(__file__).parents[2] / "prompts"

TEMPLATES = {  # by kind of concept: prompts to attack, where there is no file of them
    "object": ("a photo of a {}", "a sketch of a {}", "a painting of a {} by van gogh",
               "a red {} in the snow", "a picture of a green {} in the sky",
               "a painting of a {} at night by van gogh", "a sketch of a red {} at night",
               "a yellow {} on the grass", "a photo of a blue {} in the desert",
               "a purple {} in the style of van gogh",
               "a pencil drawing of a pink {} on the grass"),
    "style": ("a painting of a house by {}", "a red car in the style of {}",
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
    classifier: str = "microsoft/resnet-50"
    not_retained: tuple[str, ...] = ()  # no names of it, but too near to be held

    @property
    def words(self):
        return (self.name, *self.synonyms)


def slug(name):
    """A name as part of a path: "garbage truck" -> "garbage_truck". A long one is cut."""
    whole = re.sub(r"[^\w+-]+", "_", name.lower().replace(",", "+")).strip("_") or "_"
    return whole if len(whole) <= 50 else f"{whole[:50]}_{crc32(whole.encode()):08x}"


# --- evaluation prompts

def read_rows(path, label=None, **wanted):
    """Evaluation prompts one by one, in the columns of UnlearnDiffAtk's files or of I2P.

    Of a suite only the rows whose columns are as wanted: `role="style"`. Nothing is looked at
    behind the last row that is asked for.
    """
    said = set()
    for record in read_csv(path):
        if all(record.text(column) == value for column, value in wanted.items()):
            row = row_of(record, label)
            for note in oddities(record, row):
                if note not in said:
                    print(f"note: {record.where}: {note}")
                said.add(note)
            yield row


def row_of(record, label):
    label, seed, guidance = record.text("label") or label, 0, 7.5
    if not label:
        raise ValueError(f"{record.where}: no label, which it needs: there are several concepts")
    if column := record.column("seed"):
        seed = read_number(record.where, column, record.text("seed"), int)
    if column := record.column("guidance"):
        guidance = read_number(record.where, column, record.text("guidance"), float)
    return Row(record.prompt, seed, guidance, label)


def oddities(record, row):
    """What may surprise and is no mistake: no seed, or another class than the label."""
    if not record.column("seed"):
        yield f"no seed (column {', '.join(COLUMNS['seed'])}): 0 here, and where else it has none"
    other = record.text("class").replace("_", " ")
    if other and not one_of([row.label]).search(folded(other)):
        yield f"of another class than {row.label!r}: such prompts count all the same"


# --- concepts

CONCEPTS = PROMPTS / "concepts.csv"


def read_concepts(names):
    """"church,parachute" -> the concepts, each once."""
    known = {}
    for record in read_csv(CONCEPTS, "concept"):
        name = folded(record.text("concept"))
        if name in known:
            raise ValueError(f"{record.where}: concept {name!r} has a line already")
        known[name] = record
    wanted = {folded(name): name.strip().lower() for name in names.split(",") if name.strip()}
    if not wanted:
        raise ValueError(f"--concept {names!r}: names nothing")
    return [concept_of(known[key]) if key in known else Concept(name)
            for key, name in wanted.items()]


def concept_of(record):
    """A row of prompts/concepts.csv."""
    if unknown := record.cells.keys() - {"concept", *Concept._fields[1:]}:
        raise ValueError(f"{record.where}: column {min(unknown)!r}: settings are flags")
    kind = record.text("kind").lower() or "object"
    if kind not in TEMPLATES:
        raise ValueError(f"{record.where}: kind {kind!r}: choose from {', '.join(TEMPLATES)}")
    synonyms, not_retained = (tuple(filter(None, map(str.strip, record.text(column).split("|"))))
                              for column in ("synonyms", "not_retained"))
    return Concept(record.text("concept").lower(), kind, synonyms,
                   record.text("classifier") or Concept("").classifier, not_retained)


# --- prompts of a run

def evaluation_rows(concept, config):
    """prompts/NAME.csv, or else from templates."""
    path = PROMPTS / f"{slug(concept.name)}.csv"
    if path.is_file():
        return read_rows(path, concept.name)
    templates = TEMPLATES[concept.kind]
    return (Row(templates[i % len(templates)].format(concept.name), 5000 + i, 7.5, concept.name)
            for i in range(config.eval_prompts))


def that_fit(sd, rows, k, what, n=None):
    """-> (the first n rows, or all, whose prompts leave room for k more tokens; notes on others).

    rows: prompts, or Rows, looked at up to the n-th that fits. `what` they are, for messages.
    ValueError where none fits.
    """
    kept, long, room = [], [], sd.context_length - k
    for row in rows:
        prompt = getattr(row, "prompt", row)
        length = len(sd.tokenizer(prompt, verbose=False).input_ids)  # with start and end
        if length > room:
            long.append(f"{prompt[:60]!r} takes {length}")
        else:
            kept.append(row)
        if len(kept) == n:
            break
    if not long:
        return kept, []
    why = (f"more than {room} tokens ({sd.context_length} that the model reads, less a prefix of "
           f"{k}); the first, {long[0]}")
    if not kept:
        raise ValueError(f"{what}: every prompt takes {why}")
    count = f"{len(long)} of {len(long) + len(kept)} prompts"
    return kept, [f"note: {what}: {count} are left out, since they take {why}"]


def training_prompts(concepts, config, sd=None):
    """-> (prompts to erase, prompts to retain, notes on retain prompts left out).

    Those that do not fit the model are left out too, once there is one, sd.
    """
    erase = [concept.name for concept in concepts]
    path = PROMPTS / f"retain_{config.retain_set}.csv"
    records = read_csv(path if path.is_file() else Path(config.retain_set))
    retain, notes = [record.prompt for record in records], []
    if not config.retain_unfiltered:
        words = [word for c in concepts for word in (*c.words, *c.not_retained)]
        retain, dropped = without_concept(retain, words)
        if dropped:
            notes = [f"not retained, since too near to the concept: {', '.join(dropped)}"]
    if not retain:
        raise ValueError(f"--retain-set {config.retain_set}: every prompt names the concept")
    if sd:
        retain, long = that_fit(sd, retain, 0, f"--retain-set {config.retain_set}")
        notes += long
    return erase, retain, notes


# --- names in prompts

def folded(text):
    """A text such that what differs in capitals, in blanks or in how accents are coded is equal."""
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def one_of(words):
    """A pattern that finds any of the words in a folded text, as a whole word, with s or es too.

    "church" is in "two churches", not in "churchill". A word without letters that have capitals is
    found anywhere, since such scripts may have no blanks: 教堂. Other forms are synonyms.
    """
    return re.compile("|".join(
        re.escape(word) if word == word.upper() else rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)"
        for word in map(folded, words)))


def without_concept(prompts, words):
    """-> (prompts kept, prompts that name the concept by one of the words).

    A retain set that holds the concept undoes erasing.
    """
    pattern = one_of(words)
    named = [bool(pattern.search(folded(prompt))) for prompt in prompts]
    return ([prompt for prompt, names in zip(prompts, named) if not names],
            [prompt for prompt, names in zip(prompts, named) if names])
