"""The comparison: each row is its own, rows that are there are not done again, one table of all."""
import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from sd_mini.lab import compare, experiment, report, runs
from sd_mini.lab.evaluation import rate_of

from . import ROOT, flags
from .test_own_method import METHOD, run

COMPARE = ["--task", "compare", "--out"]


def read(path):
    return json.loads(path.read_text())


def table(out):
    """{row: {column: cell}} of a comparison's table."""
    with open(out / "table.csv", newline="") as file:
        return {row.pop("method"): row for row in csv.DictReader(file)}


def test_each_row_is_trained_drawn_and_attacked_as_itself_and_done_once(
        drawn, tmp_path, monkeypatch, capsys):
    """A row that another process is at work on joins the table later. Each names its commit.

    In compare.png pictures are below their prompts. A second seed joins; other settings do not.
    """
    trained, grids, plot, out = [], [], report.plot_grid, tmp_path / "table"

    def train(sd_o, erase, retain, config, folder):
        trained.append(config)
        return METHOD.train(sd_o, erase, retain, config, folder)

    method, words = METHOD._replace(train=train), [*COMPARE, out]
    monkeypatch.setattr(report, "commit", lambda: f"commit {len(trained)}")
    monkeypatch.setattr(experiment, "time", SimpleNamespace(time=lambda: 90 * len(trained)))
    monkeypatch.setattr(report, "plot_grid", lambda *given: grids.append(given) or plot(*given))
    monkeypatch.setattr(compare, "shown_prompts", lambda *_: [1, 0])
    with runs.locked(out / "mine+_weak/seed-0"):
        assert run(*words, method=method) == 0
    assert "mine, weak: left to the process" in capsys.readouterr().out
    assert [*table(out)] == ["original", "mine"]
    assert run(*words, method=method) == 0
    assert {name: row["commits"] for name, row in table(out).items()} == {
        "original": "commit 0", "mine": "commit 1", "mine, weak": "commit 2"}
    assert [row["training minutes"] for row in table(out).values()] == ["", "1.50", "1.50"]
    assert [(c.lr, c.seed, c.eval_attacks) for c in trained] == [
        (1e-3, 0, ("mine", "all")), (1e-4, 0, ("mine", "all"))]
    lines = capsys.readouterr().out.replace(str(tmp_path), "").splitlines()
    [head] = [i for i, line in enumerate(lines) if line.split()[:4] == ["%", "pre", "min", "all"]]
    assert [line.split("  ")[0] for line in lines[head + 1 :]][:3] == [
        "original", "mine", "mine, weak"] and all(len(line) <= 80 for line in lines)
    assert (out / "compare.png").stat().st_size > 5000

    _, titles, lines = grids[-1]
    for name, folder in (("original", "original"), ("mine", "mine"), ("mine, weak", "mine+_weak")):
        at = out / folder / "seed-0"
        kept, results = load_file(at / "pictures.safetensors"), read(at / "results.json")
        details = results["results"][name]["details"]
        for part, front in (("rows", ""), ("mine", "red boat "), ("utility", "")):
            pictures = 255 * drawn(at, details[part], front)
            assert (kept[part] - pictures.round()).abs().max() <= 1, (name, part)
        shown = [*kept["rows"].flip(0), *kept["mine"].flip(0), *kept["utility"]]
        assert all((255 * a - b).abs().max() < 1 for a, b in zip(lines[name], shown, strict=True))
    first, second, *others = (d["prompt"] for part in ("rows", "utility") for d in details[part])
    assert titles == [second, first, f"attacked: {second}", f"attacked: {first}", *others]

    assert run(*words, method=method) == 0 and len(trained) == 2
    text = (at / "results.json").read_text()  # as if "mine, weak" had been run with 9 steps
    (at / "results.json").write_text(text.replace('"eval_steps": 1,', '"eval_steps": 9,'))
    assert run(*words, "--seed", "1", "--methods", "mine", "original", method=method) == 0
    assert [c.seed for c in trained] == [0, 0, 1] and trained[2].lr == 1e-3
    assert f"{at}, run with eval_steps 9 -> 1" in capsys.readouterr().out
    rows = table(out)
    assert {name: row["seeds"] for name, row in rows.items()} == {"original": "0 1", "mine": "0 1"}
    mine = [read(out / f"mine/seed-{seed}/results.json")["results"]["mine"] for seed in (0, 1)]
    assert rows["mine"]["ASR, mine"] == report.text(compare.pooled(mine)["mine_asr"])


def test_pooled_rates_and_their_intervals_are_of_all_prompts_of_all_seeds():
    both = compare.pooled([
        {"a_asr": rate_of(2, 10), "frechet": 0.2, "utility": None, "details": {}},
        {"a_asr": rate_of(15, 20), "frechet": 0.5, "utility": rate_of(1, 3)},
        {"a_asr": rate_of(1, 3), "frechet": 0.8, "utility": rate_of(2, 3)}])
    assert both == {"a_asr": rate_of(18, 33), "frechet": pytest.approx(0.5),
                    "utility": rate_of(3, 6)}


@pytest.mark.long
def test_two_processes_fill_one_table(tmp_path):
    """The same command twice at once, one as if by a launcher."""
    code = "from tests.lab.test_own_method import METHOD, lab; lab.main(METHOD)"
    words = ["--steps", "4", "--methods", "original", "mine", *COMPARE, tmp_path]
    other = subprocess.Popen([sys.executable, "-c", code, *flags(), *words], cwd=ROOT, text=True,
                             env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
                             stdout=subprocess.PIPE)
    assert other.stdout.readline().startswith("model: toy")
    assert run(*words) == 0
    assert "\noriginal " in other.communicate()[0] and other.returncode == 0  # it speaks, too
    assert [*table(tmp_path)] == ["original", "mine"]


@pytest.mark.parametrize("esd, other, wanted", [
    ("sb-bb", "b----", [1, 3, 4]), ("--b--", "b----", [2, 0, 1]), ("-----", "-b---", [1, 0, 2])])
def test_the_picture_shows_what_is_broken_in_the_first_row_that_is(esd, other, wanted):
    found = {name: {"seed-0": {"details": {"mine": [
        {"without_attack": True} if each == "s" else
        {"without_attack": False, "broken": each == "b"} for each in broken]}}}
        for name, broken in (("original", "ssssb"), ("ESD", esd), ("other", other))}
    assert compare.shown_prompts(found, "seed-0", "mine") == wanted
