"""CSV files, read strictly: what is not as it seems is refused, with file and physical line."""
from __future__ import annotations

import csv
import io
import math
import re
from itertools import chain
from pathlib import Path
from typing import NamedTuple

COLUMNS = {  # what the field's files call a column; of several the first that is filled counts
    "prompt": ("prompt", "adv_prompt"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "class": ("class", "label_str"),
}


class Record(NamedTuple):
    """A row of a CSV file."""

    where: str  # "FILE, line N"
    cells: dict[str, str]  # by column

    def column(self, what):
        """The name of the column that has it, or None where there is none or it is blank."""
        names = COLUMNS.get(what, (what,))
        return next((name for name in names if self.cells.get(name, "").strip()), None)

    def text(self, what):
        return self.cells.get(self.column(what), "").strip()

    @property
    def prompt(self):
        if not self.column("prompt"):
            raise ValueError(f"{self.where}: its prompt is blank")
        return self.cells[self.column("prompt")]


def read_text(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not a CSV file in UTF-8: {error}") from None


def csv_lines(path):
    """The rows of a CSV file, one by one, without empty lines -> ("FILE, line N", its fields)."""
    lines, line = io.StringIO(read_text(path), newline=""), 0
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            line = reader.line_num  # not the row's number: a prompt in quotes may span lines
            if cells:
                yield f"{path}, line {line}", cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {line + 1}: not a row of CSV: {error}") from None


def read_header(where, cells, column):
    """Names of the columns, in small letters. ValueError where the one that is needed is absent."""
    names = [name.strip().lower() for name in cells]
    if not {*COLUMNS.get(column, (column,))} & {*names}:
        raise ValueError(f"{where}: no column {column!r} between commas in {','.join(cells)!r}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{where}: two columns {twice[0]!r}")
    return names


def read_csv(path, column="prompt"):
    """The rows of a CSV file that has this column, one by one, as Records.

    Nothing is looked at behind the last row that is asked for.
    """
    lines = csv_lines(path)
    header, first = next(lines, None), next(lines, None)
    if not first:
        raise ValueError(f"{path}: holds no rows")
    names = read_header(*header, column)
    for where, cells in chain([first], lines):
        if len(cells) != len(names):
            hint = "; a text with a comma in it needs quotes" * (len(cells) > len(names))
            count = f"{len(cells)} field{'s' * (len(cells) > 1)}"
            raise ValueError(f"{where}: {count}, but the header has {len(names)}{hint}")
        yield Record(where, dict(zip(names, cells)))


def read_number(where, column, text, kind):
    """A field as int or float, or ValueError. pandas writes a whole number with .0 at its end."""
    whole = re.fullmatch(r"(\d{1,19})(\.0*)?", text)
    if kind is int and whole and int(whole[1]) < 2**63:
        return int(whole[1])
    try:
        if kind is float and math.isfinite(float(text)):
            return float(text)
    except ValueError:
        pass
    wanted = "a whole number from 0 to 2**63 - 1" if kind is int else "a finite number"
    raise ValueError(f"{where}: {column} {text!r}: must be {wanted}")
