"""The tutorial's own method gets all that the lab has. It is cheap: other tests take it, too."""
import json
import re

import matplotlib.image
import torch

import sd_mini
from sd_mini import lab
from sd_mini.lab import evaluation, report, settings

from . import ROOT, encoder, finished, main

TUTORIAL = (ROOT / "TUTORIAL.md").read_text(encoding="utf-8")
OWN = {"__name__": "forget"}
exec(re.search(r"^```python\n(import copy\n.*?)^```", TUTORIAL, re.M | re.S)[1], OWN)
Config, forget = OWN["Config"], OWN["forget"]  # it trains to a context like the empty prompt's


def two_words(sd, prompts, pictures, look, config):
    """An attack of one's own: look once at two words in front."""
    texts = [f"red boat {prompt}" for prompt in prompts]
    look(1, [*range(len(prompts))], sd.encode_prompt(texts), texts)


def last_prompt(sd, prompts, pictures, config):
    """One that looks at all prompts of a concept: each gets the last one's context."""
    return sd.encode_prompt([prompts[-1]] * len(prompts))


METHOD = lab.Method(
    Config, forget, attacks={
        "mine": lab.EvalAttack(two_words, room=lambda config: 2),
        "all": lab.EvalAttack(last_prompt, together=True)},
    rows=lambda sd_o, concepts, config: {"original": None, "mine": {},
                                         "mine, weak": dict(lr=1e-4)})


def run(*arguments, method=METHOD):
    return main("--steps", "4", *arguments, method=method)


def test_it_gets_a_command_line():
    given = settings.parse(Config, ["--lr", "0.1", "--eval-set", "x"])
    assert given == {"lr": 0.1, "eval_set": "x"}
    for words in (["--lr", "-1"], ["--eval-attacks", "mine", "token"]):
        assert run(*words) == 2


def test_each_model_is_drawn_attacked_and_kept_as_itself(sd, drawn, tmp_path, monkeypatch, capsys):
    """A run stopped at the erased model's attack does not attack the original again.

    How long its training took nobody knows. In samples.png pictures stand below their prompts.
    """
    asked, stop, out, images = [], [True], tmp_path / "run", tmp_path / "images"
    before, plot, shown = sd_mini.fingerprint(sd.text_encoder), report.plot_grid, {}
    singles, grids = [], []

    def attack(sd, prompts, pictures, look, config):
        erased = sd_mini.fingerprint(sd.text_encoder) != before
        if erased and stop and stop.pop():
            raise KeyboardInterrupt
        asked.append((erased, pictures))
        texts = [f"{'red' if erased else 'blue'} {prompt}" for prompt in prompts]
        look(1, [*range(len(prompts))], sd.encode_prompt(texts), texts)

    monkeypatch.setattr(evaluation, "shown", lambda classifier, pictures, rows: [False] * len(rows))
    monkeypatch.setattr(sd_mini, "save_single_file", lambda sd, path: singles.append(sd))
    monkeypatch.setattr(report, "plot_grid", lambda *given: grids.append(given) or plot(*given))
    method = METHOD._replace(attacks={"mine": lab.EvalAttack(attack)})
    flags = ["--out", out, "--resume", "--save-images", images, "--save-pipeline",
             "--save-single-file"]
    assert run(*flags, method=method) == 130 and "--resume" in capsys.readouterr().err
    assert run(*flags, method=method) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path), "")
    assert "ASR, mine" in printed and max(map(len, printed.splitlines())) <= 80
    assert {path.name for path in out.iterdir()} == {
        "text_encoder", "results.json", "samples.png", "losses.png", "pipeline"}
    assert encoder(out) == encoder(out / "pipeline")
    assert sd_mini.fingerprint(singles[0].text_encoder) == sd_mini.fingerprint(
        sd_mini.load_text_encoder(out / "text_encoder")) != before

    results = json.loads((out / "results.json").read_text())
    assert results["config"]["lr"] == 1e-3 and "minutes" not in results["results"]["erased"]
    [(_, titles, lines)] = grids
    for name, folder, word in (("original", tmp_path, "blue "), ("erased", out, "red ")):
        details = results["results"][name]["details"]
        for part, front in (("rows", ""), ("neighbours", ""), ("utility", ""), ("mine", word)):
            assert len(details[part]) == 2
            shown[part] = drawn(folder, details[part], front)
            for picture, path in zip(shown[part], sorted((images / name / part).iterdir())):
                kept = torch.tensor(matplotlib.image.imread(path)[..., :3]).permute(2, 0, 1)
                assert (kept - picture).abs().max() < 0.01, (name, part)
        assert all(d["adversarial_prompt"] == word + d["prompt"] for d in details["mine"])
        expected = torch.cat([shown["rows"], shown["utility"]])
        assert (torch.stack(lines[name]) - expected).abs().max() < 1e-3
    assert (torch.stack(lines["mine attack"][:2]) - shown["mine"]).abs().max() < 1e-3  # of erased
    assert titles == [d["prompt"] for part in ("rows", "utility") for d in details[part]]
    targets = drawn(tmp_path, details["rows"])
    assert [erased for erased, _ in asked] == [False, True]
    assert all((pictures - targets).abs().max() < 0.01 for _, pictures in asked)


def test_an_encoder_is_scored_and_draws_as_it_did_in_its_run(drawn, tmp_path, monkeypatch):
    out, again, seen = tmp_path / "run", tmp_path / "again", []
    assert run("--out", out) == 0 and finished(out)["frechet"] > 0
    flags = ["--text-encoder", out / "text_encoder", "--out"]
    assert run("--task", "evaluate", *flags, again) == 0 and finished(again) == finished(out)
    assert finished(again, "original") == finished(out, "original") != finished(out)
    monkeypatch.setattr(report, "plot_grid", lambda path, prompts, lines: seen.append(lines[""]))
    flags = ["--task", "sample", "--prompts", "a church", *flags]
    assert run(*flags, again) == 2 and run(*flags, again, "--overwrite") == 0
    assert run(*flags, tmp_path, "--seed", "7") == 0
    for pictures, seed in zip(seen, (0, 7), strict=True):
        assert torch.equal(pictures, drawn(out, [{"prompt": "a church", "seed": seed}]))
