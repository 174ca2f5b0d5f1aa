"""Run the tests at both ends of the transformers range, each in a virtual environment of its own.

    python tests/versions.py                 both ends
    python tests/versions.py 4.45.0          one of them; further words go to pytest

What is erased under one version can be opened under the other. `tests/sd` saves and opens with
the version that is installed. The files are the same bytes: this script checks it last.
"""
import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENDS = {"4.45.0": "diffusers==0.31.0", "5.*": "diffusers"}  # transformers -> diffusers of its time
SAVE = """
import sys, torch, transformers, sd_mini
print("transformers", transformers.__version__, "torch", torch.__version__)
sd_mini.save_part(sd_mini.load("toy").text_encoder, sys.argv[1], "text_encoder")
"""


def main(versions, pytest_arguments):
    digests = {}
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            for arguments in (
                    ["-m", "pip", "install", "-q", "-r", "requirements.txt",
                     f"transformers=={version}", ENDS[version]],
                    ["-c", SAVE, folder], ["-m", "pytest", "-q", *pytest_arguments]):
                subprocess.run([f"{folder}/bin/python", *arguments], cwd=ROOT, check=True,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
            saved = Path(folder, "model.safetensors").read_bytes()
            digests[version] = hashlib.sha256(saved).hexdigest()
    assert len(set(digests.values())) == 1, digests
    print("all pass; the saved text encoder is the same bytes:", digests)


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word in ENDS] or list(ENDS)
    main(chosen, [word for word in sys.argv[1:] if word not in ENDS])
