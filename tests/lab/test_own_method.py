"""Somebody's own method, settings and a function that trains, gets all that the lab has."""
import copy
import json
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from sd_mini import lab
from sd_mini.lab import settings, tasks
from sd_mini.lab.runs import resumable


@dataclass
class Config(lab.Settings):
    steps: int = lab.setting(40, "iterations", low=1)
    lr: float = lab.setting(1e-3, "Adam's learning rate", low=0)
    strength: float = 1.0  # no flag


def forget(sd_o, erase_prompts, retain_prompts, config, folder=None):
    """Train the text encoder until the concept's context is that of the empty prompt."""
    sd = replace(sd_o, text_encoder=copy.deepcopy(sd_o.text_encoder))
    theta = [p.requires_grad_(True) for p in sd.text_encoder.parameters()]
    adam, generator = torch.optim.Adam(theta, lr=config.lr), torch.Generator()
    empty = sd_o.encode_prompt([""])
    loop = resumable(folder, config.steps, theta, adam, generator, config.save_every)
    with loop as (iterations, history):
        for _ in iterations:
            loss = config.strength * (sd.encode_prompt(erase_prompts) - empty).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            history.append({"distance": loss.item()})
    return sd, history


def random_prefix(sd, prompts, pictures, look, config):
    """An attack of one's own: look once at random words in front."""
    ids = torch.randint(400, 700, (len(prompts), 2), generator=torch.Generator().manual_seed(0))
    texts = [f"{words} {p}" for words, p in zip(sd.tokenizer.batch_decode(ids), prompts)]
    look(1, list(range(len(prompts))), sd.encode_prompt(texts), texts)


def last_prompt(sd, prompts, pictures, config):
    """One that looks at all prompts of a concept: each gets the last one's context."""
    return sd.encode_prompt([prompts[-1]] * len(prompts))


METHOD = lab.Method(
    Config, forget, attacks={
        "mine": lab.EvalAttack(random_prefix, "two words", "two words in front", "2in",
                               room=lambda config: 2),
        "all": lab.EvalAttack(last_prompt, together=True)},
    rows=lambda sd_o, concepts, config: {"original": None, "mine": {},
                                         "mine, weak": dict(strength=0.1)})
FLAGS = ["--model", "toy", "--device", "cpu", "--retain-set", "photos", "--eval-prompts", "3",
         "--eval-utility", "3", "--eval-steps", "3", "--eval-attack-steps", "2",
         "--eval-looks", "1"]


def run(*arguments):
    words = [*FLAGS, *map(str, arguments)]
    return tasks.run_task(METHOD, settings.parse(METHOD.config, words))


def test_it_gets_a_command_line(capsys):
    with pytest.raises(SystemExit):
        settings.parse(Config, ["--help"])
    shown = capsys.readouterr().out
    assert "--lr FLOAT" in shown and "--eval-set" in shown and "--strength" not in shown
    with pytest.raises(SystemExit):
        settings.parse(Config, ["--lr", "-1"])
    assert capsys.readouterr().err == "error: argument --lr: -1: must be a number, at least 0\n"
    assert settings.parse(Config, ["--lr", "0.1"]) == {"lr": 0.1}


def test_it_is_trained_evaluated_and_drawn(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out) == 0
    shown = capsys.readouterr().out
    assert "ASR, two words in front" in shown and "ASR, all attack" in shown
    names = {"text_encoder", "results.json", "samples.png", "losses.png", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["lr"] == 1e-3
    erased = results["results"]["erased"]
    assert erased["pre_attack_asr"]["n"] == 3 and erased["utility"]["n"] == 3
    assert {"mine", "all"} <= erased["details"].keys() and "token" not in erased["details"]


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--steps", "6", "--save-every", "2", "--eval-attacks", "mine"]
    assert run(*flags, "--out", whole) == 0

    class Stopping(torch.optim.Adam):
        steps = 0

        def step(self):
            Stopping.steps += 1
            if Stopping.steps == 5:
                raise OSError("the disk is full")
            super().step()

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Stopping)
        assert run(*flags, "--out", stopped) == 1
    assert run(*flags, "--out", stopped) == 2  # it is not begun anew in silence
    assert run(*flags, "--out", stopped, "--resume") == 0
    a, b = ((folder / "text_encoder/model.safetensors").read_bytes() for folder in (whole, stopped))
    assert a == b


def test_it_gets_rows_of_a_comparison(tmp_path, capsys):
    flags = ["--task", "compare", "--steps", "3", "--out", tmp_path]
    assert run(*flags) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("%"))
    assert lines[head].split()[:4] == ["%", "pre", "2in", "all"]
    assert "the same or broken by two words" in (tmp_path / "table.md").read_text()
    first = [line.split("  ")[0] for line in lines[head + 1 : head + 4]]
    assert first == ["original", "mine", "mine, weak"]
    configs = [json.loads((tmp_path / row / "seed-0/results.json").read_text())["config"]
               for row in ("mine", "mine+_weak")]
    assert [config["strength"] for config in configs] == [1.0, 0.1]
    assert all((tmp_path / name).is_file() for name in ("table.md", "compare.png", "tradeoff.png"))


def test_it_may_have_no_attack(tmp_path):
    method = lab.Method(Config, forget)
    words = [*FLAGS, "--steps", "2", "--out", str(tmp_path / "run")]
    assert tasks.run_task(method, settings.parse(Config, words)) == 0
    shutil.rmtree(tmp_path / "run")
    assert tasks.run_task(method, settings.parse(Config, [*words, "--task", "compare"])) == 0
    assert (tmp_path / "run/table.md").is_file()
