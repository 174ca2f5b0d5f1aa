from dataclasses import replace

import pytest

import sd_mini
from sd_mini.lab import evaluation, settings
from sd_mini.lab.prompts import Row


@pytest.fixture
def write(tmp_path):
    """write(text or bytes) -> the path of a file."""
    def to(text, name="mine.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path
    return to


@pytest.fixture
def drawn(sd):
    """drawn(folder, details, front="") -> what the text encoder saved there draws of its rows."""
    config = settings.Settings(**{**settings.TOY, "eval_steps": 1})

    def draw(folder, details, front=""):
        part = folder / "text_encoder"
        encoder = sd_mini.load_text_encoder(part) if part.is_dir() else sd.text_encoder
        rows = [Row(front + d["prompt"], d["seed"], 7.5, "") for d in details]
        return evaluation.draw_rows(replace(sd, text_encoder=encoder), rows, config)
    return draw
