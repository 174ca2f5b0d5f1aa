"""The method's settings, what is refused before any work, and the rows of the comparison."""
from dataclasses import fields, replace

import pytest

import advunlearn as au
from sd_mini.lab import settings
from sd_mini.lab.prompts import read_concepts

from . import SMALL

FULL = au.Config(model="some/model", device="cpu")
TOY = au.Config(**{**settings.TOY, **au.TOY, "esd": (0.25, 0.5), "model": "toy", "device": "cpu"})


def test_defaults_are_the_published_ones():
    """Its authors', which the defaults of their code contradict, and those of our own."""
    ours = dict(trajectories=32, fresh_trajectories=False, token_lr=0.01,
                eval_attacks=("token", "random", "embedding"), attack_radius=None)
    own = {f.name for f in fields(au.Config)} - {f.name for f in fields(settings.Settings)}
    assert {name: getattr(au.Config(), name) for name in own | {"eval_attacks"}} == dict(
        ours, train="text_encoder", layers=1, steps=1000, warmup=200, lr=1e-5, eta=1,
        erase_batch=1, esd=(1e-5, 1e-5), attack="embedding", attack_steps=30, attack_lr=1e-3,
        prefix=1, retain_weight=0.5, retain_batch=5, trajectory_steps=50)
    assert au.CONCEPTS == {"nudity": dict(layers=0, retain_weight=0.3)}
    assert au.TOY == dict(
        layers=0, steps=600, warmup=30, lr=2e-4, erase_batch=4, retain_weight=2.0, retain_batch=12,
        attack_steps=2, attack_lr=0.04, prefix=5, trajectories=48, trajectory_steps=12,
        esd=(1e-4, 5e-4))


ALLOWED = """layers 0, steps 1, warmup 0, lr 1e-10, lr 1.0, eta 0.0, erase_batch 1, attack_steps 1,
attack_lr 1e-10, attack_lr 10.0, token_lr 1e-10, token_lr 10.0, attack_radius 1e-10, prefix 1,
retain_weight 0.0, retain_batch 1, trajectories 1, trajectory_steps 1, trajectory_steps 500,
attack embedding, attack token, attack fast, attack none, train text_encoder, train unet,
train cross_attention, train no_cross_attention, eval_attacks token, eval_attacks random,
eval_attacks longer, eval_attacks embedding, eval_attacks inversion"""
REFUSED = """layers -1, steps 0, steps 1.5, warmup -1, lr 0, lr 1.1, lr nan, eta -0.1, erase_batch 0,
attack_steps 0, attack_lr 0, attack_lr 11, token_lr 0, token_lr 11, attack_radius 0, prefix 0,
retain_weight -0.1, retain_batch 0, trajectories 0, trajectory_steps 0, trajectory_steps 501,
attack faster, train vae, eval_attacks none"""


def test_flags_are_typed_and_in_range():
    for allowed, texts in ((True, ALLOWED), (False, REFUSED)):
        for name, value in map(str.split, texts.split(",")):
            words = ["--" + name.replace("_", "-"), value]
            if allowed:
                assert str(settings.parse(au.Config, words)[name]).strip("[']") == value
            else:
                with pytest.raises(SystemExit):
                    settings.parse(au.Config, words)


@pytest.mark.parametrize("changes, given, named", [
    (dict(steps=5, warmup=5), {}, "--warmup"), (dict(attack="token"), {"attack_lr"}, "--attack"),
    (dict(attack="token"), {"attack_radius"}, "--attack"),
    (dict(task="compare"), {"attack"}, "--task"), (dict(task="compare"), {"train"}, "--task"),
    (dict(resume=True, overwrite=True), {}, "--resume"),  # as the lab says
    (dict(steps=5, warmup=4), {}, None), (dict(steps=5, warmup=5, attack="none"), {}, None),
    (dict(attack="token"), {"token_lr"}, None), ({}, {"attack_lr", "attack", "train"}, None)])
def test_settings_that_contradict_each_other_are_refused(changes, given, named):
    config, given = replace(SMALL, **changes), dict.fromkeys(given)
    if named:
        with pytest.raises(ValueError, match=named):
            config.check(given)
    else:
        config.check(given)


def test_what_would_fail_later_is_refused_before_any_work(tiny, calls):
    """Prompts with room for the prefix in training; layers; memory of both banks, in float32."""
    word = "zyzzyva"
    room = tiny.context_length - len(tiny.tokenizer(word).input_ids)
    seen = calls("check_memory", instead=lambda *given: None)
    check, short, long = au.METHOD.check, ["a boat"] * 3, ["boat " * (tiny.context_length - 1)]
    full = ["boat " * (tiny.context_length - 2)]
    check(tiny, [word], short, replace(SMALL, prefix=room, trajectories=5, trajectory_steps=7))
    [((_, size, _), _)] = seen.pop("check_memory")
    assert size == 4 * 3 * (5 + 6) * 7 * 4 * 2 * 2
    check(tiny, short, full, replace(SMALL, prefix=room + 1, fresh_trajectories=True))
    assert not seen
    for erased, retained, changes, named in (
            ([word], short, dict(prefix=room + 1), "exceeds"), (short, long, {}, "exceeds"),
            (short, short, dict(layers=4), "--layers 4: this text encoder has 3")):
        with pytest.raises(ValueError, match=named):
            check(tiny, erased, retained, replace(SMALL, **changes))


# --- the comparison

@pytest.mark.parametrize("concept, config, esd, layers, gammas, other", [
    ("church", TOY, ("no_cross_attention", 0.25), "123", (0.1, 0.3, 0.5, 0.7), "photos"),
    ("church", FULL, ("no_cross_attention", 1e-5), "023", (0.1, 0.3, 0.7), "imagenet"),
    ("van gogh", replace(FULL, esd=(0.25, 0.5), retain_set="imagenet"), ("cross_attention", 0.5),
     "023", (0.1, 0.3, 0.7), "coco"),
    ("nudity", replace(FULL, **au.CONCEPTS["nudity"], esd=(0.25, 0.5), retain_set="mine.csv"),
     ("cross_attention", 0.5), "123", (0.1, 0.5, 0.7), "coco")])
def test_each_row_of_the_comparison_changes_what_its_name_says(tiny, concept, config, esd, layers,
                                                               gammas, other):
    without = dict(retain_weight=0.0, attack="none")
    rows = au.comparison_rows(tiny, read_concepts(concept), config)
    assert rows == {
        "original": None,
        "ESD": dict(without, train=esd[0], lr=esd[1]),
        "ESD, text encoder": without,
        "naive AT": dict(retain_weight=0.0),
        "AdvUnlearn": {},
        "AdvUnlearn, UNet": dict(train="unet", lr=config.esd[0]),
        "AdvUnlearn, fast AT": dict(attack="fast"),
        "AdvUnlearn, token attack": dict(attack="token"),
        **{f"AdvUnlearn, layers {'all' if n == '0' else n}": dict(layers=int(n)) for n in layers},
        **{f"AdvUnlearn, gamma {gamma}": dict(retain_weight=gamma) for gamma in gammas},
        "AdvUnlearn, retain unfiltered": dict(retain_unfiltered=True),
        "AdvUnlearn, other retain set": dict(retain_set=other)}
    assert [*rows][:5] == ["original", "ESD", "ESD, text encoder", "naive AT", "AdvUnlearn"]
    made = [replace(config, **changes) for changes in rows.values() if changes is not None]
    assert all(a != b for i, a in enumerate(made) for b in made[:i])  # no run is done twice
