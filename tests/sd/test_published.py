"""Folders as they are published, on disk and on the hub: each gives the same tensors."""
import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mini
from sd_mini.weights import PARTS, TOY

from .reference import WEIGHTS, assert_same, refusal, rewrite

KINDS = [".safetensors", ".fp16.safetensors", "-*.safetensors"]
FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def of_2022(tensors):
    """The VAE's attention under its former names, as 1x1 convolutions."""
    return {re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda new: FORMER[new[0]], name):
            tensor[:, :, None, None] if tensor.dim() == 2 else tensor
            for name, tensor in tensors.items()}


@pytest.mark.parametrize("part, change", [
    ("vae", of_2022),
    ("text_encoder", lambda t: {name.removeprefix("text_model."): t[name] for name in t} | {
        "embeddings.position_ids": torch.zeros(1, 24), "text_projection.weight": torch.zeros(2)}),
])
def test_names_of_any_year(v1, folder, part, change):
    rewrite(folder / WEIGHTS[part], change)
    assert_same(sd_mini.load_part(folder / part, part), getattr(v1, part))


def test_half_precision_files_count_where_there_are_no_others(v1, folder):
    for part in PARTS:
        path, network = folder / WEIGHTS[part], getattr(v1, part)
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"))
        assert_same(sd_mini.load_part(folder / part, part), network)
        path.unlink()
        rounded = copy.deepcopy(network).half().float()
        assert_same(sd_mini.load_part(folder / part, part), rounded)


# --- the hub, offline

def test_a_hub_id_is_found_in_the_cache_or_said_not_to_be(v1, hub):
    assert_same(sd_mini.load(hub), v1)
    for source in (hub, f"{hub}@main", f"{hub}@{40 * '0'}"):
        assert_same(sd_mini.load_text_encoder(source), v1.text_encoder)
        assert_same(sd_mini.load_text_encoder(f"{source}:church_unlearned"), v1.text_encoder)
    for source in ("someone/else", f"{hub}@other"):
        assert "the hub cannot be reached" in refusal(sd_mini.load, source)
    assert "the hub says" in refusal(sd_mini.load, "someone/no--name")
    assert "no such folder" in refusal(sd_mini.load, "nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_needed_and_only_they_are_asked_for(v1, folder, tmp_path, monkeypatch, kind):
    """Of each part the first kind of file that is there. Of two shards the index names both."""
    asked, cache = [], tmp_path / "cache"

    def snapshot_download(hub_id, revision, allow_patterns):
        assert (hub_id, revision) == ("some/model", "v1")
        asked.extend(allow_patterns)
        for path in (path for pattern in allow_patterns for path in folder.glob(pattern)):
            place = cache / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        return cache

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    path, stem = folder / WEIGHTS["unet"], "diffusion_pytorch_model"
    tensors = load_file(path)
    path.unlink()
    places = {name: stem + kind.replace("*", str(i % 2)) for i, name in enumerate(tensors)}
    for place in {*places.values()}:
        own = {name: tensors[name] for name in tensors if places[name] == place}
        save_file(own, path.with_name(place))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(sd_mini.load("some/model@v1"), v1)
    assert [pattern for pattern in asked if pattern.startswith("unet/diff")] == [
        f"unet/{stem}{each}" for each in KINDS[: 1 + KINDS.index(kind)]]
    assert not any(".bin" in pattern or pattern.startswith("*") for pattern in asked)


# --- a path is never taken for something else

def test_a_folder_comes_before_the_hub_and_before_the_toy(v1, hub, tmp_path, monkeypatch):
    """A relative folder is named as a hub id is; a Path says what a word does not."""
    folder = shutil.copytree(v1.folder, tmp_path / "someone/tiny@main:church")
    assert_same(sd_mini.load_text_encoder(str(folder)), v1.text_encoder)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, "someone/tiny")
    assert sd_mini.load(hub).latent_shape == (4, 16, 16)
    shutil.copytree(v1.folder, "toy")
    for path in ((tmp_path / "toy").relative_to(tmp_path), "./toy"):
        assert sd_mini.load(path).latent_shape == (4, 8, 8)
    path = v1.folder / WEIGHTS["text_encoder"]
    line = refusal(sd_mini.load_text_encoder, path)
    assert line == f"{path}: a file, where a folder with the configs is wanted, or a hub id"
