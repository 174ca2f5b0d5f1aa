"""Files that are whole or absent, at every moment."""
import json
import os
import stat
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path, write):
    """Call write(temporary path), flush to the disk, rename: `path` is the old file or the new."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode  # what the umask says; safetensors gives its files 600
    try:
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # safetensors says this when the disk is full
        raise OSError(f"{path}: cannot be written: {error}") from None
    os.replace(temporary, path)


def make_writable(folder):
    """For its owner: the copy of a read-only folder is read-only too."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def read_json(path):
    """A JSON file's value, or ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
