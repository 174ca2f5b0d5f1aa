import pytest

import sd_mini
from sd_mini.files import write_atomically


def test_a_broken_write_leaves_the_old_file(tmp_path):
    def half(temporary):
        temporary.write_text("{")
        raise OSError("disk full")

    sd_mini.write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file.json", half)
    assert sd_mini.read_json(tmp_path / "file.json") == {"old": 1}
