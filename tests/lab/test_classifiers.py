"""Who says what a picture shows: compared with the reference library, on small random networks."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from sd_mini.lab import classifiers, evaluation
from sd_mini.lab.classifiers import (ToyClassifier, ToyCLIPScore, frechet_distance, load_classifier,
                                     load_clip_score, preparation, split_source)
from sd_mini.lab.prompts import read_concepts
from sd_mini.toy import world

from ..paper import SMALL

NORMAL = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
PROCESSORS = {  # as models of these kinds have it, smaller
    "resnet": ("ConvNext", {"crop_pct": 0.875, "size": {"shortest_edge": 28}}),
    "of old": ("ConvNext", {"crop_pct": 0.95, "size": 30}),
    "large": ("ConvNext", {"crop_pct": 0.875, "size": {"shortest_edge": 384}}),
    "vit": ("ViT", {"size": {"height": 24, "width": 24}}),
    "clip": ("CLIP", {"size": {"shortest_edge": 43}, "crop_size": {"height": 32, "width": 32}})}
LABELS = {0: "church, Church Building", 1: "boat", 2: "tree"}


def write_processor(folder, kind):
    name, sizes = PROCESSORS[kind]
    text = json.dumps({**NORMAL, **sizes, "image_processor_type": f"{name}ImageProcessor"})
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(text)


@pytest.fixture(scope="module")
def pictures():
    """(12, 3, 64, 64): each pixel, place and colour is another; the first has a sharp edge."""
    draws = torch.Generator().manual_seed(0)
    noise, tint = (torch.rand(12, 3, *size, generator=draws) for size in ((64, 64), (1, 1)))
    made = 0.3 * noise + 0.7 * tint
    made[0, ..., :32], made[0, ..., 32:] = 0, 1
    return (made * 255).round() / 255


@pytest.fixture(scope="module")
def saved(tmp_path_factory, sd, pictures):
    """Two image classifiers, whose labels all win somewhere, and a CLIP, on disk."""
    root, T = tmp_path_factory.mktemp("classifiers"), transformers
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    labels = dict(id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    text = dict(small, vocab_size=len(sd.tokenizer), max_position_embeddings=24,
                eos_token_id=sd.tokenizer.eos_token_id, bos_token_id=sd.tokenizer.bos_token_id)
    vision = dict(small, image_size=32, patch_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind, network in (
                ("resnet", T.ResNetForImageClassification(T.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **labels))),
                ("vit", T.ViTForImageClassification(T.ViTConfig(
                    **small, image_size=24, patch_size=8, **labels))),
                ("clip", T.CLIPModel(T.CLIPConfig(
                    text_config=text, vision_config=vision, projection_dim=8)))):
            write_processor(root / kind, kind)
            for parameter in network.eval().requires_grad_(False).parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
            if kind != "clip":
                bias = [*network.classifier.parameters()][-1]
                prepared = preparation(str(root / kind), None)(pictures)
                bias.sub_(network(prepared).logits.mean(0))
            network.save_pretrained(root / kind)
    sd.tokenizer.save_pretrained(root / "clip")
    return root


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_are_prepared_as_the_reference_prepares_them(tmp_path, pictures, kind):
    """Bicubic, without aliases, the middle of it, normalised: but for its rounding to bytes."""
    write_processor(tmp_path, kind)
    images = list((255 * pictures[:3]).round().byte().permute(0, 2, 3, 1).numpy())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = torch.as_tensor(np.stack(processor(images)["pixel_values"]))
    apart = (preparation(str(tmp_path), None)(pictures[:3]) - expected).abs()
    assert apart.mean() < 0.01 and apart.max() < 0.1


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_picture_shows_the_names_of_the_largest_logit(saved, sd, pictures, kind):
    classifier, called = load_classifier(f"{saved / kind}:church building", ["church"], {"x"}, sd)
    cls = transformers.AutoModelForImageClassification
    out = cls.from_pretrained(saved / kind)(classifier.prepare(pictures), output_hidden_states=True)
    names = [{name.strip().lower() for name in LABELS[int(i)].split(",")}
             for i in out.logits.argmax(-1)]
    assert classifier.names(pictures) == names and len({*map(str, names)}) == 3
    hidden = out.hidden_states[-1]
    expected = hidden.flatten(2).mean(2) if kind == "resnet" else hidden.mean(1)
    assert_close(classifier.features(pictures), expected)
    assert called == {"church": "church building"} and classifier.name == f"{saved / kind}@local"


def test_a_clip_scores_and_chooses_as_the_reference_does(saved, sd, pictures):
    """The score is of each picture with its own prompt; the choice is among all labels."""
    texts, folder = ["a Church", "a boat", "the sea", "tree " * 30], saved / "clip"  # one too long
    classifier, called = load_classifier(f"{folder}:a Church", ["church"], {*texts[1:]}, sd)
    clip = transformers.CLIPModel.from_pretrained(folder)
    inputs = sd.tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    out = clip(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,
               pixel_values=classifier.prepare(pictures))
    cosines = out.logits_per_image / clip.logit_scale.exp()  # [picture, text]
    score = load_clip_score(str(folder), sd, toy=True)
    assert_close(torch.tensor(score(texts, pictures[:4])), cosines[:4].diag())
    names = [{texts[i]} for i in cosines.argmax(-1)]
    assert classifier.names(pictures) == names and len({*map(str, names)}) > 1
    assert_close(classifier.features(pictures), out.image_embeds)
    assert called == {"church": "a Church"} and all(text in classifier.rule for text in texts)


def test_a_clip_is_told_all_labels_of_the_evaluation(saved, sd, write):
    """Else a prompt that is labelled otherwise than the concept could never count as shown."""
    config = replace(SMALL, model="some/model", clip_score="none",
                     eval_set=str(write("prompt,label\na minster,a minster\na church,\n")),
                     classifier=f"{saved / 'clip'}:a church building")
    found = evaluation.load_evaluation_set(sd, read_concepts("church"), config)
    assert [row.label for row in found.rows] == ["a minster", "a church building"]
    labels = {row.label for part in evaluation.PARTS for row in getattr(found, part)}
    assert found.classifier.choices == sorted(labels) and len(labels) > 9 and not found.clip_score


def test_a_label_that_is_not_known_is_refused_with_those_that_are(saved, sd):
    with pytest.raises(ValueError, match="'tench'.* boat, church, church building, tree$"):
        load_classifier(str(saved / "resnet"), ["tench"], set(), sd)
    _, called = load_classifier(f"{saved / 'resnet'}:tench", ["Boat", "tree"], set(), sd)
    assert called == {"Boat": "boat", "tree": "tree"}  # a label of one's own is for one concept


@pytest.mark.parametrize("spec, toy, wanted", [
    ("none", True, None), (None, True, "toy"), ("some/clip@v1", True, ("some/clip", "gpu", "v1")),
    (None, False, ("openai/clip-vit-base-patch32", "gpu", None))])
def test_the_clip_score_is_by_the_published_clip_or_as_asked(monkeypatch, spec, toy, wanted):
    monkeypatch.setattr(classifiers, "CLIPScore", lambda *given: given)
    monkeypatch.setattr(classifiers, "ToyCLIPScore", lambda sd: "toy")
    assert load_clip_score(spec, SimpleNamespace(device="gpu"), toy) == wanted


@pytest.mark.parametrize("spec, expected", [
    ("some/model", ("some/model", None, None)),
    ("some/model@v1:a church", ("some/model", "v1", "a church")),
    ("C:\\classifier", ("C:\\classifier", None, None)),
    ("C:\\classifier:a@b: big", ("C:\\classifier", None, "a@b: big")),
    ("user@host:9/clip:church", ("user@host:9/clip", None, "church"))])
def test_a_classifier_on_disk_may_have_any_name(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    for folder in ("C:\\classifier", "user@host:9/clip"):
        Path(folder).mkdir(parents=True)
    assert split_source(spec) == expected


def drawn(*objects):
    """Pictures of the toy's world (N, 3, 64, 64)."""
    scenes = [world.Scene(name, name, "red", "grass", "photo", "a photo of {}") for name in objects]
    made = [world.draw(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def test_the_toys_clip_score_prefers_the_right_prompt(sd):
    score, pictures = ToyCLIPScore(sd), drawn("church", "car", "boat")
    prompts = [f"a photo of a {name}" for name in ("church", "car", "boat")]
    right = score(prompts, pictures)
    for turned in (prompts[1:] + prompts[:1], prompts[2:] + prompts[:2]):
        assert min(right) > max(score(turned, pictures)) + 0.1


def test_ruined_pictures_are_neither_clean_nor_kept(sd):
    """Of an object's picture the style is kept, of a style's the object; of a ruin nothing."""
    classifier = ToyClassifier(sd.device, sd.folder)
    assert classifier.names(drawn("church", "car")) == [{"church", "photo"}, {"car", "photo"}]
    classifier.network = SimpleNamespace(
        labels=lambda pairs: dict(zip(("object", "style"), zip(*pairs))))
    cases = [  # erased, what the original's picture shows, what it shows now, clean, kept
        ("church", ("church", "photo"), ("boat", "sketch"), True, False),
        ("church", ("boat", "sketch"), ("nothing", "sketch"), True, True),
        ("church", ("boat", "sketch"), ("boat", "nothing"), False, False),
        ("van gogh", ("church", "van gogh"), ("church", "photo"), True, True),
        ("van gogh", ("church", "van gogh"), ("boat", "van gogh"), True, False),
        ("van gogh", ("boat", "van gogh"), ("boat", "nothing"), False, False)]
    *pictures, clean, kept = map(list, zip(*cases))
    assert classifier.rest(*pictures) == (clean, kept)


def test_frechet_distance_is_that_of_gaussians_with_any_covariance(generator):
    """For a symmetric positive M, x -> M x + m moves the one onto the other most cheaply."""
    mix, m = torch.randn(2, 4, 4, generator=generator, dtype=torch.double)
    x = torch.randn(50, 4, generator=generator, dtype=torch.double) @ mix
    for shift in (0, m[0]):
        y = x @ (m @ m.T / 4 + 0.1 * torch.eye(4)) + shift
        expected = (y - x).mean(0).square().sum() + torch.cov((y - x).T).trace()
        assert frechet_distance(x, y) == pytest.approx(expected.item())
        assert frechet_distance(y, x[torch.randperm(50)]) == pytest.approx(expected.item())
    assert frechet_distance(x[:3], x[:3]) == pytest.approx(0, abs=1e-6)  # fewer than features
    assert frechet_distance(x[:3], x[:3]) >= 0
