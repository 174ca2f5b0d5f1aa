"""The exam, the judges, the inversion attack and the comparison, on a small budget: the machinery, not the order of the
figures."""
import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

import advunlearn as au
from sd_mini import judges, report

from .test_run import FLAGS, ROOT, SMALL

CONCEPTS = ["church", "garbage truck", "parachute", "tench", "van gogh"]


@pytest.mark.parametrize("suite", ["toy", "real"])
@pytest.mark.parametrize("concept", [*CONCEPTS, "nudity"])
def test_suites_never_name_the_concept_where_they_should_not(suite, concept):
    read = lambda **wanted: au.read_rows(au.PROMPTS / f"suite_{suite}.csv", **wanted)
    if suite == "toy" and concept != "nudity":
        assert len(read(role="paraphrase", concept=concept)) == 24 == len(read(role="neighbour", concept=concept))
    for role in ("paraphrase", "neighbour"):
        assert all(concept not in row.prompt.lower() for row in read(role=role, concept=concept))
    assert all(concept not in row.prompt.lower() or concept == row.label for row in read(role="style"))
    seeds = [row.seed for row in read()]
    assert len(set(seeds)) == len(seeds)


def test_retain_sets():
    read = lambda name: [r["prompt"] for r in au.read_csv(au.PROMPTS / f"retain_{name}.csv")]
    assert len(set(read("coco"))) == 80 and len(set(read("imagenet"))) == 243
    assert "a photo of a church" in read("imagenet")  # as published; it is dropped when church is erased
    assert "a photo of a church" in au.without_concept(read("imagenet"), ("church",))[1]


def test_concepts_with_a_file_without_and_several():
    church, parachute = au.read_concepts("church, Parachute")
    assert (church.layers, church.kind, len(church.rows(au.Config()))) == (1, "object", 50) and parachute.name == "parachute"
    [retriever] = au.read_concepts("golden retriever")
    rows = retriever.rows(au.Config(eval_prompts=60))
    assert rows[0].prompt == "a photo of a golden retriever" and len({r.seed for r in rows}) == 60
    assert au.read_concepts("nudity")[0].layers == 0


@pytest.mark.parametrize("concept", [*CONCEPTS, "golden retriever"])
@pytest.mark.parametrize("phrasings", [1, 7])
def test_prompts_of_evaluation_are_not_those_of_training(concept, phrasings):
    """... whether they come from a file or from templates."""
    config, concepts = replace(SMALL, phrasings=phrasings, eval_prompts=50), au.read_concepts(concept)
    erased, rows = au.training_prompts(concepts, config)[0], concepts[0].rows(config)
    assert len({*erased}) == phrasings and len(rows) == 50 and not {*erased} & {row.prompt for row in rows}


def test_exam_leaves_out_what_names_the_concept(sd):
    exam = au.set_exam(sd, au.read_concepts("church,tench"), replace(SMALL, eval_prompts=3))
    assert {row.label for row in exam.rows} == {"church", "tench"} and len(exam.rows) == 6
    assert not {"church", "tench"} & {row.label for row in exam.utility}
    assert {row.label for row in au.set_exam(sd, au.read_concepts("van gogh"), SMALL).styles} == {"sketch"}
    assert {row.label for row in exam.neighbours} == {"house", "boat"} and len(exam.paraphrases) == 6
    boat = au.set_exam(sd, au.read_concepts("boat"), SMALL)
    assert not any("boat" in row.prompt for row in boat.styles + boat.utility + boat.neighbours)
    assert {row.label for row in au.set_exam(sd, au.read_concepts("church,tench,house"), SMALL).neighbours} == {"boat"}


def test_inversion_lowers_the_loss_and_replaces_the_name_alone(sd):
    """One embedding where the name stood; every other place keeps its token."""
    rows = [au.Row("a photo of a church", 1, 7.5, "church"), au.Row("a boat", 2, 7.5, "church")]
    targets = sd.sample(["a photo of a church"] * 2, seed=[1, 2], steps=4)
    config, seen = replace(SMALL, eval_batch=2), []

    class Spy(torch.nn.Module):
        embeddings, config = sd.text_encoder.embeddings, sd.text_encoder.config

        def forward(self, input_ids=None, embeddings=None):
            seen.append(embeddings if embeddings is not None else None)
            return sd.text_encoder(input_ids, embeddings)

    context = au.inversion_attack(replace(sd, text_encoder=Spy()), rows, targets, ["church"], au.Attack("inversion", 3, 0.05, 1), config)
    assert context.shape == (2, sd.context_length, sd.text_encoder.config["hidden_size"])
    table, start = sd.text_encoder.embeddings.token_embedding.weight, seen[-1]
    plain = table[sd.tokenize(["a photo of a church", "* a boat"])]
    differ = (start != plain).any(-1)
    assert differ.nonzero().tolist() == [[0, 5], [1, 1]] and torch.equal(start[0, 5], start[1, 1])


def test_each_concept_is_inverted_by_an_embedding_of_its_own(sd, monkeypatch):
    """The pictures of the rows asked for come from their own concept's context, learnt on all its rows and targets."""
    rows = [au.Row(f"a {label}", seed, 1.0, label) for seed, label in enumerate(["church", "tench", "church"])]
    lab = au.Lab(au.read_concepts("church,tench"), sd, au.Exam(rows, [], [], [], [], None, None),
                 {"rows": torch.arange(3.0)}, [0], 0.0)
    learnt, drawn = [], []
    monkeypatch.setattr(au, "inversion_attack", lambda sd, own, targets, *_: (
        learnt.append(([row.prompt for row in own], targets.tolist())), torch.full((len(own), 2), targets[0]))[1])
    monkeypatch.setattr(au, "draw_rows", lambda sd, rows, config, context: drawn.append(context[:, 0].tolist()))
    monkeypatch.setattr(au, "shown", lambda judge, pictures, rows: [True] * len(rows))
    records, _ = au.invert_rows(sd, lab, [1, 2], au.Attack("inversion", 1, 0.1, 1), SMALL)
    assert learnt == [(["a church", "a church"], [0.0, 2.0]), (["a tench"], [1.0])]
    assert drawn == [[1.0, 0.0]] and len(records) == 2


@pytest.mark.parametrize("kind", ["token", "embedding"])
def test_broken_rows_are_attacked_no_more(sd, kind):
    """A judge that sees the concept in all but the last picture: after the first of two looks one row is left."""
    class Judge:
        def names(self, pictures):
            return [{"church"}] * (len(pictures) - 1) + [set()]

    rows = [au.Row("a church", seed, 1.0, "church") for seed in range(3)]
    exam = au.Exam(rows, [], [], [], [], Judge(), None)
    lab = au.Lab([], sd, exam, {"rows": torch.rand(3, 3, 64, 64)}, [0], 0.0)
    config = replace(SMALL, eval_looks=2, eval_steps=1)
    spied = replace(sd, unet=copy.deepcopy(sd.unet))
    counted = au.count_evaluations(spied)
    records, pictures = au.attack_rows(spied, lab, [0, 1, 2], au.Attack(kind, 4, 0.01, 2), config)
    assert [r["broken"] for r in records] == [True, True, False] and [r["step"] for r in records] == [2, 2, 4] and len(pictures) == 3
    assert counted[0] == 3 * (2 * 3 + 2 * 1) + 2 * (3 + 1)  # steps, forward and backward; looks, guided


def test_a_judge_that_knows_the_concept_alone_leaves_utility_open(sd, tmp_path):
    class Judge:
        known, names, features = {"church"}, lambda self, p: [{"church"}] * len(p), lambda self, p: p.flatten(1)[:, :2]

    rows = {"rows": [au.Row("a church", 1, 7.5, "church")], "utility": [au.Row("a boat", seed, 7.5, "boat") for seed in (2, 3)]}
    exam = au.Exam(rows["rows"], [], [], [], rows["utility"], Judge(), lambda prompts, pictures: [0.3] * len(prompts))
    drawn = {"rows": torch.rand(1, 3, 8, 8), "paraphrases": torch.empty(0), "neighbours": torch.empty(0), "styles": torch.empty(0),
             "utility": torch.rand(2, 3, 8, 8)}
    figures, _ = au.mark(au.Lab([], sd, exam, drawn, [0], 0.0), drawn)
    assert figures["utility"] is None and figures["clip_score"] == pytest.approx(0.3) and figures["pre_attack_asr"]["rate"] == 1
    report.plot_tradeoff(tmp_path / "t.png", {"ESD": report.pooled([figures])}, {"ESD": 2}, "church")
    assert "ESD" in report.text_table({"ESD": figures}, "x") and "utility" not in report.table({"original": figures})


def test_frechet_distance_is_the_closed_form():
    """Of two Gaussians with diagonal covariance: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=generator)
    b = a * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 0.0])
    assert judges.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert judges.frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.05)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, sd):
    """Small random judges on disk: an image classifier and a CLIP."""
    root = tmp_path_factory.mktemp("judges")
    classifier = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label={0: "church, church building", 1: "boat"}, label2id={"church, church building": 0, "boat": 1}))
    classifier.save_pretrained(root / "classifier")
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8,
                         vocab_size=len(sd.tokenizer), max_position_embeddings=24, eos_token_id=sd.tokenizer.eos_token_id),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                           patch_size=16, projection_dim=8), projection_dim=8))
    clip.save_pretrained(root / "clip")
    sd.tokenizer.save_pretrained(root / "clip")
    normal = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (root / "classifier/preprocessor_config.json").write_text(json.dumps({**normal, "size": {"shortest_edge": 28}, "crop_pct": 0.875}))
    (root / "clip/preprocessor_config.json").write_text(json.dumps({**normal, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}))
    return root


def test_preparation_resizes_crops_and_normalises(saved):
    pictures = torch.full((2, 3, 64, 64), 0.5)
    prepared = judges.preparation(str(saved / "classifier"), None)(pictures)
    assert prepared.shape == (2, 3, 28, 28)
    expected = (0.5 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(prepared, expected.view(1, 3, 1, 1).expand_as(prepared))


def test_judges_of_the_hub(saved, sd):
    pictures = sd.sample(["a photo of a church", "a boat"], steps=3)
    judge, called = judges.load_judge(str(saved / "classifier") + ":church building", ["church"], {"boat"}, "cpu")
    assert called == {"church": "church building"} and judge.features(pictures).shape == (2, 16)
    assert all(names in ({"church", "church building"}, {"boat"}) for names in judge.names(pictures))
    judge, called = judges.load_judge(str(saved / "clip"), ["church"], {"a boat"}, "cpu")
    assert judge.names(pictures)[0] < {"church", "a boat"} and "likeliest of 2 texts: a boat, church" == judge.rule
    scores = judges.CLIPScore(str(saved / "clip"))(["a church", "a boat"], pictures)
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)
    with pytest.raises(ValueError, match="has no label 'tench'; it knows boat, church"):
        judges.load_judge(str(saved / "classifier"), ["tench"], set(), "cpu")


def test_a_clip_is_told_the_labels_of_the_prompts_of_ones_own_too(saved, sd, tmp_path):
    """Else a prompt that is labelled otherwise than the concept could never count as shown."""
    (tmp_path / "mine.csv").write_text("prompt,label\na minster,a minster\n")
    config = replace(SMALL, eval_set=str(tmp_path / "mine.csv"), judge=f"{saved / 'clip'}:a church building")
    exam = au.set_exam(sd, au.read_concepts("church"), config)
    assert exam.rows[0].label in exam.judge.choices and {"a church building"} < {*exam.judge.choices}
    assert "church" not in exam.judge.choices


def test_toy_clip_score_prefers_the_right_prompt(sd):
    pictures = sd.sample(["a photo of a church", "a photo of a car"], seed=[0, 1], steps=15)
    score = judges.ToyCLIPScore(sd)
    right, wrong = (score(prompts, pictures) for prompts in (["a church", "a car"], ["a car", "a church"]))
    assert min(right) > max(wrong)


SMALLER = [*FLAGS, "--task", "compare", "--steps", "2", "--eval-steps", "2", "--eval-attack-steps", "2"]


def test_compare_from_the_command_line(tmp_path, capsys):
    """Three methods, twice: nothing is done again; a second seed joins the table; one with other settings does not."""
    flags = [*SMALLER, "--methods", "original", "1", "AdvUnlearn", "--out", str(tmp_path)]
    assert au.main(au.parse(flags)) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    table = (tmp_path / "table.md").read_text()
    assert "| ESD |" in table and "| AdvUnlearn |" in table and "| naive AT |" not in table and "commit" in table
    weights = tmp_path / "advunlearn/seed-0/text_encoder/model.safetensors"
    written = weights.stat().st_mtime_ns
    assert au.main(au.parse(flags)) == 0
    assert weights.stat().st_mtime_ns == written
    assert au.main(au.parse([*flags, "--seed", "1", "--methods", "original"])) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pooled"]["original"]["token_asr"]["n"] == 6 and set(results["seeds"]["original"]) == {"seed-0", "seed-1"}
    capsys.readouterr()
    assert au.main(au.parse([*flags, "--seed", "2", "--methods", "original", "--eval-prompts", "2"])) == 0
    assert "esd/seed-0, run with other settings: eval_prompts 3 -> 2" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "results.json").read_text())["seeds"]) == {"original"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("compare.png", "tradeoff.png"))


@pytest.mark.beside
def test_two_processes_take_turns_at_the_methods(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "advunlearn.py", *SMALLER]
    done = subprocess.run([*command, "--methods", "original", "ESD", "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("\nESD ") == 1 and done.stdout.count("\noriginal ") == 1  # the table, once
    assert set(json.loads((tmp_path / "results.json").read_text())["seeds"]) == {"original", "ESD"}


def test_methods_of_the_comparison(sd):
    lab = au.Lab([], sd, None, {}, [0], 0.0)
    methods = au.comparison(lab, SMALL)
    assert list(methods)[:5] == ["original", "ESD", "ESD, text encoder", "naive AT", "AdvUnlearn"]
    assert [methods[name]["layers"] for name in methods if "layer" in name or "whole" in name] == [1, 2, 3, 4]  # 0, all of it, is AdvUnlearn


def test_pooled_seeds_keep_the_counts():
    cell = lambda hits: {"token_asr": report.rate([True] * hits + [False] * (10 - hits)), "clip_score": hits / 10}
    both = report.pooled([cell(2), cell(4)])
    assert both["token_asr"]["rate"] == 0.3 and both["token_asr"]["n"] == 20 and both["clip_score"] == pytest.approx(0.3)


def test_saved_images_are_named_by_prompt_and_seed(tmp_path, sd):
    exam = au.Exam([au.Row("a church/at *night*", 7, 7.5, "church")], [], [], [], [], None, None)
    report.save_images(tmp_path, exam, {"rows": torch.zeros(1, 3, 8, 8), "token": torch.zeros(1, 3, 8, 8)})
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.png"))] == [
        "rows/0000_seed-7_a-church-at-night.png", "token/0000_seed-7_a-church-at-night.png"]
