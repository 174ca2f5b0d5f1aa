"""README's picture, of three finished comparisons:

    python -m tests.picture runs/church-compare runs/van_gogh-compare runs/garbage_truck-compare

Of each it has the first two prompts that the token attack breaks in ESD, with seed 0.
"""
import sys
from pathlib import Path

from safetensors.torch import load_file

from sd_mini.files import read_json
from sd_mini.lab import compare, report

OUT = Path(__file__).parent / "pictures/concepts.png"
METHODS, SEED = {"original": "original", "ESD": "esd", "AdvUnlearn": "advunlearn"}, "seed-0"


def main(folders):
    lines = {}
    for folder in map(Path, folders):
        drawn = {name: load_file(folder / slug / SEED / compare.THUMBNAILS)
                 for name, slug in METHODS.items()}
        results = read_json(folder / METHODS["ESD"] / SEED / "results.json")["results"]
        prompts = [each["prompt"] for each in results["ESD"]["details"]["token"]]
        for i in compare.shown_prompts({"ESD": {SEED: results["ESD"]}}, SEED, "token", 2):
            cells = [drawn["original"]["rows"][i]]
            for name in ("ESD", "AdvUnlearn"):
                cells += [drawn[name]["rows"][i], drawn[name]["token"][i]]
            lines[prompts[i]] = [cell / 255 for cell in cells]
    report.plot_grid(OUT, ["original", "ESD", "ESD, under attack", "AdvUnlearn",
                           "AdvUnlearn, under attack"], lines)
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1:])
