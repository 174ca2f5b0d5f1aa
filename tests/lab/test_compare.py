"""The evaluation set, the classifiers and the comparison, on a small budget.

They test the machinery, not the order of the figures.
"""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

import advunlearn as au
from sd_mini.lab import classifiers, compare, evaluation, report, settings, tasks
from sd_mini.lab.evaluation import EvaluationSet
from sd_mini.lab.prompts import (PROMPTS, Row, evaluation_rows, read_concepts, read_csv, read_rows,
                                 training_prompts, without_concept)

from .. import bench
from ..paper import SMALL
from .test_run import FLAGS, ROOT, main

CONCEPTS = ["church", "garbage truck", "parachute", "tench", "van gogh"]


def toy_set(sd, concepts, config=SMALL):
    return evaluation.load_evaluation_set(sd, read_concepts(concepts), config)


def only_rows(rows, classifier=None, original=None):
    """An evaluation set of prompts to attack alone."""
    words = ["church", "tench"]
    return EvaluationSet(rows, [], [], [], [], classifier, None, words, original or {})


# --- prompts

@pytest.mark.parametrize("suite", ["toy", "real"])
@pytest.mark.parametrize("concept", [*CONCEPTS, "nudity"])
def test_suites_never_name_the_concept_where_they_should_not(suite, concept):
    def read(**wanted):
        return [*read_rows(PROMPTS / f"suite_{suite}.csv", **wanted)]

    if suite == "toy" and concept != "nudity":
        for role in ("paraphrase", "neighbour"):
            assert len(read(role=role, concept=concept)) == 24
    for role in ("paraphrase", "neighbour"):
        assert all(concept not in r.prompt.lower() for r in read(role=role, concept=concept))
    styles = read(role="style")
    assert all(concept not in r.prompt.lower() or concept == r.label for r in styles)
    seeds = [r.seed for r in read()]
    assert len(set(seeds)) == len(seeds)


def test_retain_sets():
    def read(name):
        return [record.prompt for record in read_csv(PROMPTS / f"retain_{name}.csv")]

    assert len(set(read("coco"))) == len(set(read("imagenet"))) == 243
    assert "a photo of a church" in read("imagenet")  # as published; dropped to erase church
    assert "a photo of a church" in without_concept(read("imagenet"), ("church",))[1]


def test_concepts_with_a_file_without_and_several():
    church, parachute = read_concepts("church, Parachute")
    assert church.kind == "object" and parachute.name == "parachute"
    assert len([*evaluation_rows(church, au.Config())]) == 50
    [retriever] = read_concepts("golden retriever")
    rows = [*evaluation_rows(retriever, au.Config(eval_prompts=60))]
    assert rows[0].prompt == "a photo of a golden retriever" and len({r.seed for r in rows}) == 60


@pytest.mark.parametrize("flags, layers, gamma", [
    ([], 1, 0.5), (["--concept", "nudity"], 0, 0.3), (["--concept", "church,nudity"], 0, 0.3),
    (["--concept", "nudity", "--layers", "2"], 2, 0.3)])
def test_the_method_sets_for_a_concept_what_the_flags_do_not(flags, layers, gamma):
    config = tasks.resolve(au.METHOD, settings.parse(au.Config, ["--model", "some/model", *flags]))
    assert (config.layers, config.retain_weight) == (layers, gamma)
    toy = tasks.resolve(au.METHOD, settings.parse(au.Config, ["--model", "toy", *flags]))
    wanted = au.TOY["retain_weight"], au.TOY["steps"], settings.TOY["eval_prompts"]
    assert (toy.retain_weight, toy.steps, toy.eval_prompts) == wanted


@pytest.mark.parametrize("concept", [*CONCEPTS, "golden retriever"])
def test_the_name_alone_is_erased_and_never_a_prompt_of_the_evaluation(concept):
    """... whether these come from a file or from templates."""
    config, concepts = replace(SMALL, eval_prompts=50), read_concepts(concept)
    rows = [*evaluation_rows(concepts[0], config)]
    assert training_prompts(concepts, config)[0] == [concept] and len(rows) == 50
    assert all(concept in row.prompt.lower() != concept for row in rows)


def test_evaluation_set_leaves_out_what_names_the_concept(sd):
    both = toy_set(sd, "church,tench", replace(SMALL, eval_prompts=3))
    assert {row.label for row in both.rows} == {"church", "tench"} and len(both.rows) == 6
    assert not {"church", "tench"} & {row.label for row in both.utility}
    assert {row.label for row in both.neighbours} == {"house", "boat"}
    assert len(both.paraphrases) == 6
    assert {row.label for row in toy_set(sd, "van gogh").styles} == {"sketch"}
    boat = toy_set(sd, "boat")
    others = boat.styles + boat.utility + boat.neighbours
    assert not any("boat" in row.prompt for row in others)
    three = toy_set(sd, "church,tench,house")
    assert {row.label for row in three.neighbours} == {"boat"}


# --- attacks

def test_each_concept_is_inverted_by_an_embedding_of_its_own(sd, monkeypatch):
    """Pictures come from their own concept's context, learnt on all its prompts and targets."""
    rows = [Row(f"a {label} here", seed, 1.0, label)
            for seed, label in enumerate(["church", "tench", "church"])]
    rows[2] = rows[2]._replace(prompt="a minster")
    learnt, drawn = [], []

    def attack(sd, prompts, pictures, config):
        learnt.append((prompts, pictures.tolist()))
        return torch.full((len(prompts), 2), pictures[0])

    def draw_rows(sd, rows, config, context):
        drawn.append(context[:, 0].tolist())

    monkeypatch.setattr(evaluation, "draw_rows", draw_rows)
    monkeypatch.setattr(evaluation, "shown", lambda classifier, pictures, rows: [True] * len(rows))
    prompts = only_rows(rows, original={"rows": torch.arange(3.0)})
    records, _ = evaluation.invert_concepts(sd, prompts, [1, 2], attack, SMALL)
    assert learnt == [(["a  *  here", "* a minster"], [0.0, 2.0]), (["a  *  here"], [1.0])]
    assert drawn == [[1.0, 0.0]] and len(records) == 2


@pytest.mark.parametrize("kind", ["token", "embedding"])
def test_broken_rows_are_attacked_no_more(sd, kind):
    """A classifier that sees the concept in all but the last picture leaves one of three rows."""
    class Seeing:
        def names(self, pictures):
            return [{"church"}] * (len(pictures) - 1) + [set()]

    rows = [Row("a church", seed, 1.0, "church") for seed in range(3)]
    prompts = only_rows(rows, Seeing(), {"rows": torch.rand(3, 3, 64, 64)})
    config = replace(SMALL, eval_looks=2, eval_steps=1, eval_attack_steps=4)
    counted = bench.counted(sd)
    records, pictures = evaluation.attack_prompts(counted, prompts, [0, 1, 2],
                                                  au.METHOD.attacks[kind].search, config)
    assert [r["broken"] for r in records] == [True, True, False]
    assert [r["step"] for r in records] == [2, 2, 4] and len(pictures) == 3
    steps, looks = (1 + bench.BACKWARD) * (2 * 3 + 2 * 1), 2 * (3 + 1)  # guided
    assert sum(counted.work) == pytest.approx(steps + looks)


# --- scores

def test_a_classifier_that_knows_the_concept_alone_leaves_utility_open(tmp_path):
    class Narrow:
        known, features = {"church"}, lambda self, pictures: pictures.flatten(1)[:, :2]

        def names(self, pictures):
            return [{"church"}] * len(pictures)

    boats = [Row("a boat", seed, 7.5, "boat") for seed in (2, 3)]
    drawn = {"rows": torch.rand(1, 3, 8, 8), "utility": torch.rand(2, 3, 8, 8),
             "paraphrases": torch.empty(0), "neighbours": torch.empty(0), "styles": torch.empty(0)}
    prompts = EvaluationSet([Row("a church", 1, 7.5, "church")], [], [], [], boats, Narrow(),
                            lambda prompts, pictures: [0.3] * len(prompts), ["church"], drawn)
    figures, _ = evaluation.score(prompts, drawn)
    assert figures["utility"] is None and figures["clip_score"] == pytest.approx(0.3)
    assert figures["pre_attack_asr"]["rate"] == 1
    pooled = compare.pooled([{**figures, "token_asr": figures["pre_attack_asr"]}])
    compare.plot_tradeoff(tmp_path / "t.png", {"ESD": pooled}, "token", "church")
    assert not (tmp_path / "t.png").exists()
    assert "ESD" in report.rates_table({"ESD": figures}, {})
    assert "utility" not in report.table({"original": figures}, {})


def test_frechet_distance_is_the_closed_form():
    """Of two Gaussians with diagonal covariance: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    a = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    b = a * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 0.0])
    assert classifiers.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert classifiers.frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.05)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, sd):
    """Small random classifiers on disk: an image classifier and a CLIP."""
    root = tmp_path_factory.mktemp("classifiers")
    classifier = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label={0: "church, church building", 1: "boat"},
        label2id={"church, church building": 0, "boat": 1}))
    classifier.save_pretrained(root / "classifier")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 projection_dim=8)
    text = dict(small, vocab_size=len(sd.tokenizer), max_position_embeddings=24,
                eos_token_id=sd.tokenizer.eos_token_id)
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=dict(small, image_size=32, patch_size=16),
        projection_dim=8))
    clip.save_pretrained(root / "clip")
    sd.tokenizer.save_pretrained(root / "clip")
    normal = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    for name, sizes in (("classifier", {"size": {"shortest_edge": 28}, "crop_pct": 0.875}),
                        ("clip", {"size": {"shortest_edge": 32},
                                  "crop_size": {"height": 32, "width": 32}})):
        text = json.dumps({**normal, **sizes})
        (root / name / "preprocessor_config.json").write_text(text)
    return root


def test_preparation_resizes_crops_and_normalises(saved):
    pictures = torch.full((2, 3, 64, 64), 0.5)
    prepared = classifiers.preparation(str(saved / "classifier"), None)(pictures)
    assert prepared.shape == (2, 3, 28, 28)
    expected = (0.5 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(prepared, expected.view(1, 3, 1, 1).expand_as(prepared))


def test_classifiers_of_the_hub(saved, sd):
    def load(spec, concept, labels):
        return classifiers.load_classifier(str(saved / spec), [concept], labels, sd)

    pictures = sd.sample(["a photo of a church", "a boat"], steps=3)
    classifier, called = load("classifier:church building", "church", {"boat"})
    assert called == {"church": "church building"}
    assert classifier.features(pictures).shape == (2, 16)
    possible = ({"church", "church building"}, {"boat"})
    assert all(names in possible for names in classifier.names(pictures))
    classifier, _ = load("clip", "church", {"a boat"})
    assert classifier.names(pictures)[0] < {"church", "a boat"}
    assert classifier.rule == "likeliest of 2 texts: a boat, church"
    scores = classifiers.CLIPScore(str(saved / "clip"))(["a church", "a boat"], pictures)
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)
    both = classifier(["church", "a boat"], pictures[[0, 0]])
    assert classifier.names(pictures)[0] == {["church", "a boat"][both.index(max(both))]}
    with pytest.raises(ValueError, match="has no label 'tench'; it knows boat, church"):
        load("classifier", "tench", set())


def test_a_clip_is_told_the_labels_of_the_prompts_of_ones_own_too(saved, sd, tmp_path):
    """Else a prompt that is labelled otherwise than the concept could never count as shown."""
    (tmp_path / "mine.csv").write_text("prompt,label\na minster,a minster\n")
    config = replace(SMALL, eval_set=str(tmp_path / "mine.csv"),
                     classifier=f"{saved / 'clip'}:a church building")
    prompts = toy_set(sd, "church", config)
    choices = prompts.classifier.choices
    assert prompts.rows[0].label in choices and {"a church building"} < {*choices}
    assert "church" not in choices


@pytest.mark.parametrize("source, wanted", [
    (None, "openai/clip-vit-base-patch32"), ("some/clip@v1", "some/clip")])
def test_the_clip_score_is_by_the_published_clip(sd, monkeypatch, source, wanted):
    monkeypatch.setattr(classifiers, "CLIPScore", lambda name, device, revision: name)
    assert classifiers.load_clip_score(source, sd, toy=False) == wanted


def test_toy_clip_score_prefers_the_right_prompt(sd):
    pictures = sd.sample(["a photo of a church", "a photo of a car"], seed=[0, 1], steps=15)
    score = classifiers.ToyCLIPScore(sd)
    assert min(score(["a church", "a car"], pictures)) > max(score(["a car", "a church"], pictures))


# --- the comparison

SMALLER = [*FLAGS, "--task", "compare", "--steps", "2", "--eval-steps", "2",
           "--eval-attack-steps", "2"]


def test_compare_from_the_command_line(tmp_path, capsys):
    """Twice: nothing is done again. A second seed joins the table; other settings do not."""
    flags = [*SMALLER, "--methods", "original", "1", "AdvUnlearn", "--out", tmp_path]
    assert main(*flags) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    table = (tmp_path / "table.md").read_text()
    assert "| ESD |" in table and "| AdvUnlearn |" in table and "commit" in table
    assert "| naive AT |" not in table
    weights = tmp_path / "advunlearn/seed-0/text_encoder/model.safetensors"
    written = weights.stat().st_mtime_ns
    assert main(*flags) == 0
    assert weights.stat().st_mtime_ns == written
    assert main(*flags, "--seed", "1", "--methods", "original") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pooled"]["original"]["token_asr"]["n"] == 6
    assert set(results["seeds"]["original"]) == {"seed-0", "seed-1"}
    capsys.readouterr()
    assert main(*flags, "--seed", "2", "--methods", "original", "--eval-prompts", "2") == 0
    assert "esd/seed-0, run with eval_prompts 3 -> 2" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "results.json").read_text())["seeds"]) == {"original"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("compare.png", "tradeoff.png"))


@pytest.mark.long
def test_two_processes_fill_one_table(tmp_path):
    """The same command twice at once, as if by a launcher, gives the table of one process."""
    flags = [*SMALLER, "--methods", "original", "ESD", "AdvUnlearn", "--out"]
    two = [subprocess.Popen(
        [sys.executable, "advunlearn.py", *flags, tmp_path / "two"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"})
        for rank in ("0", "1")]
    printed = [process.communicate()[0] for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert all("model: toy" in each and "\noriginal " in each for each in printed)  # each speaks
    assert main(*flags, tmp_path / "one") == 0
    assert pooled(tmp_path / "two") == pooled(tmp_path / "one")


def pooled(folder):
    """The table's figures, without what the machine makes of them."""
    rows = json.loads((folder / "results.json").read_text())["pooled"]
    return {name: {key: value for key, value in row.items()
                   if key != "minutes"} for name, row in rows.items()}


def details(*broken, attack="token"):
    """Results of a seed: prompt by prompt, shown without attack ("s"), broken ("b"), or neither."""
    record = {"s": {"without_attack": True}, "b": {"without_attack": False, "broken": True},
              "-": {"without_attack": False, "broken": False}}
    return {"seed-0": {"details": {attack: [record[each] for each in broken]}}}


def test_the_comparisons_picture_shows_what_the_attack_breaks_in_the_first_row():
    """The first three prompts broken in ESD; never those that show the concept without attack."""
    found = {"original": details(*"ssssb"), "ESD": details(*"sb-bb"),
             "AdvUnlearn": details(*"b----")}
    assert compare.shown_prompts(found, "seed-0", "token") == [1, 3, 4]
    found["ESD"] = details(*"--b--")
    assert compare.shown_prompts(found, "seed-0", "token") == [2, 0, 1]  # then the first ones
    found["ESD"] = details(*"-----")
    assert compare.shown_prompts(found, "seed-0", "token") == [0, 1, 2]
    assert compare.shown_prompts({"original": details()}, "seed-0", "token") == [0, 1, 2]


def test_pooled_seeds_keep_the_counts():
    def figures(hits):
        flags = [True] * hits + [False] * (10 - hits)
        return {"token_asr": evaluation.rate(flags), "clip_score": hits / 10}

    both = compare.pooled([figures(2), figures(4)])
    assert both["token_asr"]["rate"] == 0.3 and both["token_asr"]["n"] == 20
    assert both["clip_score"] == pytest.approx(0.3)


def test_saved_images_are_named_by_prompt_and_seed(tmp_path):
    prompts = only_rows([Row("a church/at *night*", 7, 7.5, "church")])
    picture = torch.zeros(1, 3, 8, 8)
    report.save_images(tmp_path, prompts, {"rows": picture, "token": picture})
    paths = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.png"))]
    assert paths == ["rows/0000_seed-7_a-church-at-night.png",
                     "token/0000_seed-7_a-church-at-night.png"]
