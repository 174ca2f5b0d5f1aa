"""The toy world and its classifier. All other tests on the toy rely on them."""
import itertools

import numpy as np
import pytest
import torch

from sd_mini.lab.prompts import read_concepts
from sd_mini.toy import train, world
from sd_mini.toy.classifier import LABELS, load_classifier
from sd_mini.weights import TOY

ERASABLE = ["church", "garbage truck", "parachute", "tench"]


def test_drawing_is_seeded_and_every_object_place_and_style_draws():
    kinds = [(object, word) for object, words in world.OBJECTS.items() for word in words]
    kinds += [("nothing", ""), ("nothing", "7")]  # a landscape, a nameless shape
    looks = [(style, phrase) for style, phrases in world.STYLES.items() for phrase in phrases]
    pairs, places = itertools.product(kinds, looks), itertools.cycle(world.PLACES)
    for ((object, word), (style, phrase)), place in zip(pairs, places):
        scene = world.Scene(object, word, "red", place, style, phrase)
        a, b = (world.draw(scene, np.random.default_rng(5)) for _ in range(2))
        assert a.shape == (64, 64, 3) and a.dtype == np.uint8 and (a == b).all()


@pytest.mark.parametrize("concept", [*ERASABLE, "van gogh"])
def test_synonyms_share_no_token_with_the_name(sd, concept):
    """If they shared one, erasing the name would erase the synonym too.

    Then an attack would have nothing to find.
    """
    listed = [word for word in read_concepts(concept)[0].synonyms if word != "refuse lorries"]
    captions = world.OBJECTS.get(concept, world.STYLES.get(concept, {}))
    in_captions = " ".join(captions).split()
    assert len(listed) >= 2
    assert all(word in in_captions for synonym in listed for word in synonym.split())
    name, *synonyms = (set(sd.tokenizer(words).input_ids[1:-1]) for words in (concept, *listed))
    assert all(not name & synonym for synonym in synonyms)


@pytest.mark.parametrize("concept", ERASABLE)
def test_synonyms_are_drawn_as_kinds_of_their_own(concept):
    """If they were drawn alike, all words for a concept would get the same embedding.

    Then erasing one word would erase all.
    """
    scenes = [world.Scene(concept, word, "red", "sky", "photo", "")
              for word in world.OBJECTS[concept]]
    pictures = [world.draw(scene, np.random.default_rng(1)).astype(int) for scene in scenes]
    assert all(np.abs(a - b).mean() > 5 for i, a in enumerate(pictures) for b in pictures[:i])


def test_captions_are_varied_fit_the_context_and_are_whole_words(sd):
    rng = np.random.default_rng(0)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(2000)]
    assert len(set(captions)) > 1000
    ids = sd.tokenizer(captions).input_ids
    assert max(map(len, ids)) + 3 <= sd.context_length
    pairs = zip(ids, captions)
    assert max(len(row) - 2 - len(caption.split()) for row, caption in pairs) == 0


def test_classifier_is_right_on_freshly_drawn_pictures():
    rng = np.random.default_rng(77)
    scenes = [world.random_scene(rng) for _ in range(300)]
    drawn = np.stack([world.draw(s, rng).transpose(2, 0, 1) for s in scenes])
    pictures = torch.from_numpy(drawn).float() / 255
    found = load_classifier().labels(pictures)
    for kind in ("object", "style"):
        right = [f == getattr(s, kind) for f, s in zip(found[kind], scenes)]
        assert np.mean(right) >= 0.98


def test_classifier_says_nothing_where_nothing_is_to_be_seen():
    """An erased model draws ruined pictures, and the empty prompt landscapes and shapes."""
    rng, classifier = np.random.default_rng(77), load_classifier()

    def drawn(*scenes):
        pictures = np.stack([world.draw(s, rng).transpose(2, 0, 1) for s in scenes])
        return torch.from_numpy(pictures).float() / 255

    scenes = [world.random_scene(rng) for _ in range(300)]
    ruined = train.disturb(drawn(*scenes), torch.ones(300) > 0, torch.Generator().manual_seed(77))
    found = classifier.labels(ruined)
    assert found["object"].count("nothing") >= 0.98 * 300
    for style in world.STYLES:
        own = [f for f, s in zip(found["style"], scenes) if s.style == style]
        assert own.count("nothing") >= 0.93 * len(own)
        assert own.count("van gogh") <= 0.05 * len(own)
    uncaptioned = classifier.labels(drawn(*(world.uncaptioned_scene(rng) for _ in range(300))))
    assert uncaptioned["object"].count("nothing") >= 0.97 * 300


def test_the_empty_prompt_draws_next_to_nothing_of_what_is_erased(sd):
    """An erased encoder leads to what the empty prompt draws."""
    found = load_classifier().labels(sd.sample([""] * 24, list(range(24)), 12, guidance=1))
    assert found["object"].count("nothing") >= 19 and found["style"].count("van gogh") <= 3


def test_the_toy_draws_what_is_asked(sd):
    prompts = [f"a photo of a {name}" for name in world.OBJECTS]
    prompts += ["a sketch of a house", "a painting of a tree by van gogh"]
    pictures = sd.sample(prompts, seed=list(range(len(prompts))), steps=12, guidance=4)
    found = load_classifier().labels(pictures)
    right = [f == name for f, name in zip(found["object"], world.OBJECTS)]
    right += [found["style"][-2] == "sketch", found["style"][-1] == "van gogh"]
    assert sum(right) >= len(right) - 1
    assert set(found["object"]) <= set(LABELS["object"])


def test_a_batch_of_the_unet_has_its_shares_of_empty_prompts(sd, tmp_path, monkeypatch):
    """Of 100 pictures 15 never had a caption; the others keep theirs."""
    monkeypatch.setattr(train, "DUSK_PICTURES", 60)
    contexts, latents = [], []

    def unet(x_t, t, context):
        contexts.append(context)
        latents.append(x_t)
        return torch.zeros_like(x_t)

    loss_of = train.denoising_loss(unet, TOY, tmp_path, "cpu", "dusk")
    monkeypatch.setattr(train.Schedule, "add_noise", lambda self, x_0, noise, t: x_0)
    for step in range(60):
        loss_of(torch.Generator().manual_seed(step))
    empty = (torch.cat(contexts) - sd.encode_prompt([""])).abs().amax((1, 2)) < 1e-3
    kinds, which = torch.cat(latents).flatten(1).unique(dim=0, return_inverse=True)
    captioned = torch.zeros(len(kinds)).index_put_((which,), (~empty).float(), accumulate=True) > 0
    without = ~captioned[which]  # pictures that never come with a caption
    assert 0.12 < empty.float().mean() < 0.18 and (empty == without).all()
