"""A run from the command line, in ordinary ways of working: odd names, notebooks, no internet."""
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import load_file, save_file

import advunlearn as au
import sd_mini
from sd_mini import lab
from sd_mini.lab import experiment, report, runs, tasks
from sd_mini.lab.prompts import slug
from sd_mini.weights import TOY

from ..paper import SMALL
from . import ROOT
from .test_own_method import run


@pytest.mark.parametrize("given, gpus, bf16, wanted", [
    ({}, 0, False, ("toy", "cpu", "fp32")),
    ({}, 1, True, ("CompVis/stable-diffusion-v1-4", "cuda", "bf16")),
    ({"model": "mine", "device": "cuda"}, 1, False, ("mine", "cuda", "fp16"))])
def test_without_a_gpu_it_is_the_toy(monkeypatch, given, gpus, bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    config = tasks.resolve(au.METHOD, given)
    assert (config.model, config.device, config.precision) == wanted


def test_flags_say_how_the_frozen_networks_compute(sd, monkeypatch):
    compiled, frugal, loaded = [], [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda unet: compiled.append(unet))
    monkeypatch.setattr(sd_mini, "recompute_activations", frugal.append)
    monkeypatch.setattr(sd_mini, "load", lambda *given: loaded.append(given) or sd)
    assert experiment.load_model(SMALL) is sd and not compiled and not frugal
    experiment.load_model(replace(SMALL, compile=True, low_memory=True, precision="bf16"))
    assert compiled == frugal == [sd.unet]
    assert loaded == [("toy", "cpu", dtype, None) for dtype in (torch.float32, torch.bfloat16)]


def test_the_bank_is_on_the_gpu_where_it_fits(monkeypatch):
    gpu = torch.device("cuda")
    bank = SimpleNamespace(nbytes=200, to=lambda device: device)
    for free, expected in ((400, gpu), (399, bank)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
        assert runs.placed(bank, gpu) == expected


def test_a_toy_in_its_own_folder_is_a_toy_with_its_own_classifier(tmp_path):
    shutil.copytree(TOY, tmp_path / "mine")
    path = tmp_path / "mine/classifier/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "head.weight": tensors["head.weight"] + 1}, path)
    config = tasks.resolve(au.METHOD, {"model": str(tmp_path / "mine"), "device": "cpu"})
    assert replace(config, model="toy") == tasks.resolve(au.METHOD, {"model": "toy"})
    network = experiment.open_experiment(au.METHOD, config).evaluation_set.classifier.network
    assert torch.equal(network.head.weight, tensors["head.weight"] + 1)


def test_a_flag_comes_before_the_toys_setting_and_this_before_the_concepts(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")  # for a tilde
    method = au.METHOD._replace(concepts={"church": dict(eta=2.0, lr=0.1, layers=9)})
    config = tasks.resolve(method, {"model": "toy", "out": "~/x", "eval_set": "~/y", "lr": 0.2})
    assert (config.out, config.eval_set) == ("/home/me/x", "/home/me/y")
    assert (config.lr, config.layers, config.eta) == (0.2, au.TOY["layers"], 2)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "C:\\x", "大教堂," * 40, "Somebody," * 99])
def test_a_concepts_folder_is_in_the_folder_of_runs_and_its_own(tmp_path, name):
    (tmp_path / f"{slug(name)}-compare").mkdir()
    assert len([*tmp_path.iterdir()]) == 1 and slug(name) not in ("..", slug(name + "x"))


def test_a_picture_that_cannot_be_drawn_is_a_warning(capsys):
    report.decorate(lambda path: 1 / 0, "x.png")
    assert capsys.readouterr().err.startswith("warning: x.png")


def test_a_loss_stands_at_its_iteration_as_does_the_mean_of_it_and_19_before(monkeypatch):
    axes = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    report.plot_losses("x.png", [{"a": i if i > 4 else None, "b": None} for i in range(60)])
    [(x, losses), (at, means)] = (line.get_data() for axis in axes for line in axis.lines)
    assert (x[-1], at[0], at[-1]) == (59, 19, 59)
    assert (losses[5:] == x[5:]).all() and means[5:] == pytest.approx(at[5:] - 9.5)


def test_a_log_file_has_a_line_a_minute(monkeypatch, capsys):
    """Of bars in one another: steps of five seconds for twenty minutes."""
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in runs.progress(range(2), "outer", leave=False):
        for now[0] in runs.progress(range(now[0], now[0] + 600, 5), "inner", leave=False):
            pass
    lines = capsys.readouterr().err.split("\n")
    assert 22 <= len(lines) <= 28 and not any({"\r", "\x1b"} & {*line} for line in lines)


def test_a_log_need_not_hold_every_sign_and_may_be_closed(tmp_path, monkeypatch):
    """As by `| head`: what is said from then on is lost, and that is all."""
    log = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(log, encoding="ascii"))
    with pytest.raises(SystemExit, match="2"):
        lab.main(au.METHOD, ["--model", str(tmp_path / "教堂"), "--device", "cpu"])
    assert b"\\u6559\\u5802" in log.getvalue()
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stream:
        for _ in range(3):
            print("a line", file=lab.Output(stream))


HOST = """
import sys, advunlearn
assert not {"matplotlib", "transformers"} & sys.modules.keys()
import matplotlib.pyplot as plt
plt.switch_backend("svg")
import sd_mini.lab.tasks
assert plt.get_backend() == "svg"
"""


def test_an_import_loads_what_it_uses_and_keeps_a_notebooks_plots():
    subprocess.run([sys.executable, "-c", HOST], check=True, cwd=ROOT)


def test_a_run_in_a_thread_keeps_plots_environment_and_signals(tmp_path, monkeypatch):
    """As in a notebook."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else torch sets it

    def state():
        signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return plt.get_fignums(), plt.get_backend(), dict(os.environ), signals

    before, done, words = state(), [], ("--classifier", "none", "--out", tmp_path)
    thread = threading.Thread(target=lambda: done.append(run(*words)))
    thread.start()
    thread.join()
    assert state() == before and done == [0]
