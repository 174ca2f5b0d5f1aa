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


def main(folders):
    lines = {}
    for folder in map(Path, folders):
        original, esd, ours = (load_file(folder / row / "seed-0" / compare.THUMBNAILS)
                               for row in ("original", "esd", "advunlearn"))
        results = read_json(folder / "esd/seed-0/results.json")["results"]["ESD"]
        for i in compare.shown_prompts({"ESD": {"seed-0": results}}, "seed-0", "token", 2):
            cells = [original["rows"], esd["rows"], esd["token"], ours["rows"], ours["token"]]
            lines[results["details"]["rows"][i]["prompt"]] = [cell[i] / 255 for cell in cells]
    report.plot_grid(OUT, ["original", "ESD", "ESD, under attack", "AdvUnlearn",
                           "AdvUnlearn, under attack"], lines)
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1:])
