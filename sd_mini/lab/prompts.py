"""Concepts and prompts: their CSV files, templates, the retain filter."""
import csv
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

PROMPTS = Path(__file__).parents[2] / "prompts"
CONCEPTS = PROMPTS / "concepts.csv"
COLUMNS = {  # what the field's files call a column; of several the first that is filled counts
    "prompt": ("prompt", "adv_prompt"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
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


# --- CSV files

def read_csv(path, column="prompt"):
    """The rows of a CSV file that has this column, one by one: {column: text}.

    A column goes by the first of its names; "where" is "FILE, line N". Nothing is looked at behind
    the last row that is asked for. ValueError for what is no CSV, or blank in this column.
    """
    where = path
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            names = [name.strip().lower() for name in next(reader, ())]
            if not {*COLUMNS.get(column, (column,))} & {*names}:
                raise ValueError(f"{path}, line 1: no column {column!r} among {','.join(names)!r}")
            for cells in filter(None, reader):
                where = f"{path}, line {reader.line_num}"  # a prompt in quotes may span lines
                if len(cells) != len(names):
                    raise ValueError(f"{where}: fields: {len(cells)}, in the header: {len(names)}; "
                                     "a text with a comma in it needs quotes")
                cells = dict(zip(names, map(str.strip, cells)))
                for name, others in COLUMNS.items():
                    cells[name] = next(filter(None, map(cells.get, others)), "")
                if not cells[column]:
                    raise ValueError(f"{where}: its {column} is blank")
                yield {**cells, "where": where}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: what follows is no CSV in UTF-8: {error}") from None
    if where is path:
        raise ValueError(f"{path}: holds no rows")


def read_rows(path, label=None, **wanted):
    """Evaluation prompts one by one, in the columns of UnlearnDiffAtk's files or of I2P.

    Of a suite only the rows whose columns are as wanted: `role="style"`.
    """
    for cells in read_csv(path):
        if any(cells[column] != value for column, value in wanted.items()):
            continue
        where, own = cells["where"], cells.get("label") or label
        seed, guidance = cells["seed"] or "0", cells["guidance"] or "7.5"
        if not own:
            raise ValueError(f"{where}: no label, which it needs: there are several concepts")
        if not re.fullmatch(r"\d{1,18}(\.0*)?", seed):  # pandas writes a whole number with .0
            raise ValueError(f"{where}: seed {seed!r}: must be a whole number from 0 on")
        if not re.fullmatch(r"\d+(\.\d*)?", guidance):
            raise ValueError(f"{where}: guidance {guidance!r}: must be a number from 0 on")
        yield Row(cells["prompt"], int(seed.partition(".")[0]), float(guidance), own)


# --- concepts

def read_concepts(names):
    """"church,parachute" -> the concepts, each once."""
    known = {folded(cells["concept"]): cells for cells in read_csv(CONCEPTS, "concept")}
    wanted = {folded(name): name.strip().lower() for name in names.split(",") if name.strip()}
    if not wanted:
        raise ValueError(f"--concept {names!r}: names nothing")
    return [concept_of(known[key]) if key in known else Concept(name)
            for key, name in wanted.items()]


def concept_of(cells):
    """A row of prompts/concepts.csv."""
    if unknown := cells.keys() - {"where", "concept", *COLUMNS, *Concept._fields}:
        raise ValueError(f"{cells['where']}: column {min(unknown)!r}: settings are flags")
    kind = cells.get("kind", "").lower() or "object"
    if kind not in ("object", "style"):
        raise ValueError(f"{cells['where']}: kind {kind!r}: choose from object, style")
    synonyms, not_retained = (
        tuple(filter(None, map(str.strip, cells.get(column, "").split("|"))))
        for column in ("synonyms", "not_retained"))
    return Concept(cells["concept"].lower(), kind, synonyms,
                   cells.get("classifier") or Concept("").classifier, not_retained)


# --- prompts of a run

def evaluation_rows(concept, config):
    """prompts/NAME.csv, or else from prompts/templates.csv."""
    path = PROMPTS / f"{slug(concept.name)}.csv"
    if path.is_file():
        return read_rows(path, concept.name)
    templates = [cells["prompt"] for cells in read_csv(PROMPTS / "templates.csv")
                 if cells["kind"] == concept.kind]
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
    note = (f"{what}: {len(long)} of {len(long) + len(kept)} prompts are left out: they take more "
            f"than {room} tokens ({sd.context_length} that the model reads, less a prefix of {k}); "
            f"the first, {long[0]}")
    if not kept:
        raise ValueError(note)
    return kept, [f"note: {note}"]


def training_prompts(concepts, config, sd=None):
    """-> (prompts to erase, prompts to retain, notes on retain prompts left out).

    Those that do not fit the model are left out too, once there is one, sd.
    """
    erase = [concept.name for concept in concepts]
    path = PROMPTS / f"retain_{config.retain_set}.csv"
    rows = read_csv(path if path.is_file() else config.retain_set)
    retain, notes = [cells["prompt"] for cells in rows], []
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

    A retain set that holds the concept weakens erasing.
    """
    pattern = one_of(words)
    named = [bool(pattern.search(folded(prompt))) for prompt in prompts]
    return ([prompt for prompt, names in zip(prompts, named) if not names],
            [prompt for prompt, names in zip(prompts, named) if names])
