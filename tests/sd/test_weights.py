"""What is written is read back bit for bit; what is broken is one line that names it."""
import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import sd_mini
from sd_mini.files import write_atomically
from sd_mini.weights import PARTS, TOY

from .reference import (V1, V2, WEIGHTS, assert_same, assert_same_picture, made, opened,
                        refusal, rewrite, write_model)

# --- what is saved


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_read_back_bit_for_bit(part, tmp_path):
    network = made(part, V1[part], seed=1)
    network.config["torch_dtype"] = "float16"  # as the file was that it came from
    sd_mini.save_part(network, tmp_path, part)
    again, path = sd_mini.load_part(tmp_path, part), tmp_path / Path(WEIGHTS[part]).name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    prefix = "text_model." * (part == "text_encoder")
    assert load_file(path).keys() == {prefix + name for name in network.state_dict()}
    assert "torch_dtype" not in json.loads((tmp_path / "config.json").read_text())
    with open(path, "r+b") as file:  # what was read is no window on the file
        file.write(bytes(path.stat().st_size))
    assert_same(again, network)
    sd_mini.save_part(network, tmp_path, part, torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    half = sd_mini.load_part(tmp_path, part, dtype=torch.float16)
    assert_same(half, copy.deepcopy(network).half())


@pytest.mark.parametrize("configs", [V1, V2], ids=["1.x", "2.x"])
def test_a_saved_model_opens_in_the_reference_and_draws_the_same_and_back(configs, tmp_path):
    """From a read-only folder; with networks that are others than the folder's."""
    first = write_model(tmp_path / "first", configs)
    for path in (*first.folder.rglob("*"), first.folder):
        path.chmod(path.stat().st_mode & 0o555)
    sd = replace(first, **{part: made(part, configs[part], seed=1) for part in PARTS})
    for _ in range(2):
        sd_mini.save_pipeline(sd, tmp_path / "saved")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "saved").rglob("*"))
    reference = opened(tmp_path / "saved")
    assert_same_picture(sd, reference)
    reference.save_pretrained(tmp_path / "theirs")
    for folder in ("saved", "theirs"):
        again = sd_mini.load(tmp_path / folder)
        assert_same(again, sd)
        assert again.schedule.predicts_v == (configs is V2)
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False


def test_a_fingerprint_knows_weights_however_they_are_stored(v1):
    found = sd_mini.fingerprint(v1.text_encoder)
    assert sd_mini.fingerprint(copy.deepcopy(v1.text_encoder).half()) == found and len(found) == 16
    for name, parameter in v1.text_encoder.named_parameters():
        other = copy.deepcopy(v1.text_encoder)
        other.get_parameter(name)[-1] += 0.01
        assert sd_mini.fingerprint(other) != found


@pytest.mark.skipif(os.name == "nt", reason="there is no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_reads_what_is_written_and_flushed(v1, tmp_path, umask, monkeypatch):
    flushed, before = set(), os.umask(umask)
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino))
    try:
        sd_mini.save_pipeline(v1, tmp_path)
        sd_mini.save_single_file(v1, tmp_path / "one.safetensors")
        for left in ("old.json", "old.json.part"):  # by an earlier, killed run
            (tmp_path / left).touch(0o600)
        sd_mini.write_json(tmp_path / "old.json", {})
    finally:
        os.umask(before)
    written = [path.stat() for path in tmp_path.rglob("*") if path.is_file()
               and path.parent.name not in ("tokenizer", "scheduler")]  # which are copied
    assert [each.st_mode & 0o777 for each in written] == [0o666 & ~umask] * 9
    assert flushed >= {each.st_ino for each in written}


def test_a_broken_write_leaves_the_old_file(tmp_path):
    def half(temporary):
        temporary.write_text("{")
        raise OSError("disk full")

    sd_mini.write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file.json", half)
    assert sd_mini.read_json(tmp_path / "file.json") == {"old": 1}


# --- what is loaded

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_frozen_and_in_the_precision_asked_for(v1, dtype):
    """The text encoder, mostly in training, is float32 at any; rounded it would be another."""
    sd = sd_mini.load(v1.folder, dtype=dtype)
    assert_same(sd.text_encoder, v1.text_encoder)
    assert_same(sd.unet, copy.deepcopy(v1.unet).to(dtype))
    assert_same(sd.vae, copy.deepcopy(v1.vae).to(dtype))
    for network in (sd.text_encoder, sd.unet, sd.vae):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert sd.dtype == sd.precision == dtype
    out = sd.predict_noise(torch.ones(1, 4, 8, 8), 500, sd.encode_prompt(["a boat"]))
    z = sd.vae.encode(torch.ones(1, 3, 64, 64))
    assert {out.dtype, z.dtype, sd.decode(z).dtype} == {torch.float32}


def test_the_toys_share_all_but_the_unet():
    day, dusk = sd_mini.load(), sd_mini.load("toy-dusk")
    assert_same(dusk.text_encoder, day.text_encoder)
    assert_same(day.unet, sd_mini.load_part(TOY / "unet", "unet"))
    assert_same(dusk.unet, sd_mini.load_part(TOY / "unet_dusk", "unet"))
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file()) <= 25e6


MEMORY = """
import sys, torch, sd_mini

def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

before = peak()
unet = sd_mini.load_part(sys.argv[1], "unet")
print((peak() - before) / sum(p.numel() * p.element_size() for p in unet.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_the_memory_of_the_weights_once(tmp_path):
    """Not half more, as with the pages of the file, which is in float16."""
    config = dict(V1["unet"], block_out_channels=[96, 192, 384, 384], norm_num_groups=32)
    sd_mini.save_part(made("unet", config), tmp_path, "unet", torch.float16)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True,
                          text=True, check=True, cwd=Path(sd_mini.__file__).parent.parent)
    assert 0.9 < float(done.stdout) < 1.35


# --- what is broken

NORM = "text_model.final_layer_norm."


@pytest.mark.parametrize("part, damage, message", [
    ("text_encoder", lambda t: {name: t[name] for name in t if name != NORM + "weight"},
     "final_layer_norm.weight is missing (1 such)"),
    ("text_encoder", lambda t: t | {"text_projection.bias": torch.zeros(1)},
     "text_projection.bias does not belong there"),
    ("text_encoder", lambda t: t | {NORM + "bias": torch.zeros(3)},
     "final_layer_norm.bias has another shape"),
    ("vae", lambda t: t | {"quant_conv.bias": t["quant_conv.bias"].log(),
                           "quant_conv.weight": t["quant_conv.weight"] / 0},
     "quant_conv.bias holds values that are not finite (2 such"),
])
def test_tensors_are_strict_and_named(folder, part, damage, message):
    rewrite(folder / WEIGHTS[part], damage)
    line = refusal(sd_mini.load_part, folder / part, part)
    assert f"{folder / WEIGHTS[part]}: tensor {message}" in line, line


@pytest.mark.parametrize("place, content, message", [
    (WEIGHTS["unet"], None, "unet/diffusion_pytorch_model.safetensors: no such file"),
    (WEIGHTS["vae"], b"x" * 20, "model.safetensors: not a whole safetensors file"),
    ("vae/config.json", b"{", "vae/config.json: not valid JSON"),
    ("vae/config.json", b"[]", "vae/config.json: not a config"),
    ("scheduler/scheduler_config.json", None, "scheduler_config.json: no such file"),
    ("model_index.json", b"[]", "a None; only Stable Diffusion"),
    ("model_index.json", b'{"_class_name": "XL"}', "a XL; only Stable Diffusion"),
    ("tokenizer/vocab.json", None, "tokenizer: no tokenizer there"),
    ("tokenizer/merges.txt", None, "tokenizer: not a whole CLIP tokenizer"),
])
def test_a_file_that_is_broken_or_not_there_is_named(folder, place, content, message):
    path = folder / place
    path.unlink() if content is None else path.write_bytes(content)
    line = refusal(sd_mini.load, folder)
    assert str(folder) in line and message in line


@pytest.mark.parametrize("model, config", [
    (models.WordPiece({"[UNK]": 0, "photo": 1}, unk_token="[UNK]"), {"unk_token": "[UNK]"}),
    (models.BPE({"a": 0, "photo": 1}, []), {}),  # as GPT-2's, whose words do not end in </w>
])
def test_a_tokenizer_of_another_kind_is_refused(folder, model, config):
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer(model).save(str(folder / "tokenizer/tokenizer.json"))
    assert "/tokenizer: no" in refusal(sd_mini.load, folder)  # no CLIP tokenizer, or no whole one


def test_no_pickle_and_no_eval_anywhere():
    root = Path(sd_mini.__file__).parents[1]
    ours = [root / "advunlearn.py", *root.glob("sd_mini/**/*.py"), *root.glob("tests/**/*.py")]
    words = ["torch." + "load", "import " + "pickle", "ev" + "al("]
    assert len(ours) > 40 and not [(path.name, word) for path in ours for word in words
                                   if word in path.read_text().replace(".ev" + "al()", "")]


def test_pickles_are_refused_and_only_files_are_pickles(v1, tmp_path):
    folder = shutil.copytree(v1.folder, tmp_path / "model.pt")
    assert_same(sd_mini.load_text_encoder(folder), v1.text_encoder)
    for name in ("file.pt", "file.ckpt", "file.bin", "absent.pth"):
        line = refusal(sd_mini.load, tmp_path / name)
        assert f"{name}: a pickle" in line
    weights = folder / WEIGHTS["unet"]
    (weights.parent / "a.pt").mkdir()
    weights.rename(weights.with_suffix(".bin"))
    assert "holds diffusion_pytorch_model.bin alone" in refusal(sd_mini.load, folder)
    weights.with_suffix(".bin").unlink()
    assert f"{weights}: no such file" in refusal(sd_mini.load, folder)
