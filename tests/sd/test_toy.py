"""The toy world, its classifier and its training. All other tests on the toy rely on them."""
import copy
import itertools
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd_mini
from sd_mini.lab.prompts import read_concepts
from sd_mini.toy import train, world
from sd_mini.toy.classifier import LABELS, load_classifier
from sd_mini.weights import TOY

from .reference import assert_same, close

ERASABLE = ["church", "garbage truck", "parachute", "tench"]


def drawn(scenes, rng):
    """-> pictures (N, 3, 64, 64) in [0, 1]"""
    pictures = np.stack([world.draw(scene, rng).transpose(2, 0, 1) for scene in scenes])
    return torch.from_numpy(pictures).float() / 255


def test_drawing_is_seeded_and_every_object_place_and_style_draws():
    kinds = [(object, word) for object, words in world.OBJECTS.items() for word in words]
    kinds += [("nothing", ""), ("nothing", "7")]  # a landscape, a nameless shape
    looks = [(style, phrase) for style, phrases in world.STYLES.items() for phrase in phrases]
    pairs = itertools.product(kinds, looks)
    for (kind, look), place in zip(pairs, itertools.cycle(world.PLACES)):
        scene = world.Scene(*kind, "red", place, *look)
        a, b = (world.draw(scene, np.random.default_rng(5)) for _ in range(2))
        assert a.shape == (64, 64, 3) and a.dtype == np.uint8 and (a == b).all()


@pytest.mark.parametrize("concept", [*ERASABLE, "van gogh"])
def test_synonyms_share_no_token_with_the_name_and_are_kinds_of_their_own(sd, concept):
    """If they shared a token, erasing the name would erase the synonym too. If they were drawn
    alike, all words would get the same embedding. Then an attack would have nothing to find.
    """
    listed = [word for word in read_concepts(concept)[0].synonyms if word != "refuse lorries"]
    captions = " ".join(world.OBJECTS.get(concept, world.STYLES.get(concept, {})))
    assert len(listed) >= 2 and {*" ".join(listed).split()} <= {*captions.split()}
    name, *synonyms = (set(sd.tokenizer(words).input_ids[1:-1]) for words in (concept, *listed))
    assert all(not name & synonym for synonym in synonyms)
    scenes = [world.Scene(concept, word, "red", "sky", "photo", "")
              for word in world.OBJECTS.get(concept, ())]
    pictures = [world.draw(scene, np.random.default_rng(1)).astype(int) for scene in scenes]
    assert all(np.abs(a - b).mean() > 5 for i, a in enumerate(pictures) for b in pictures[:i])


def test_captions_are_varied_fit_the_context_and_are_whole_words(sd):
    rng = np.random.default_rng(0)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(1000)]
    assert len(set(captions)) > 500
    ids = sd.tokenizer(captions).input_ids
    assert max(map(len, ids)) + 3 <= sd.context_length
    assert all(len(row) - 2 <= len(caption.split()) for row, caption in zip(ids, captions))


def test_classifier_is_right_and_says_nothing_where_nothing_is_to_be_seen():
    """An erased model draws ruined pictures, and the empty prompt landscapes and shapes."""
    rng, classifier = np.random.default_rng(77), load_classifier()
    scenes = [world.random_scene(rng) for _ in range(200)]
    pictures = drawn(scenes, rng)
    found = classifier.labels(pictures)
    for kind in LABELS:
        right = [f == getattr(s, kind) for f, s in zip(found[kind], scenes)]
        assert np.mean(right) >= 0.98
    found = classifier.labels(train.disturb(
        pictures, torch.ones(200) > 0, torch.Generator().manual_seed(77)))
    assert found["object"].count("nothing") >= 0.98 * 200
    for style in world.STYLES:
        own = [f for f, s in zip(found["style"], scenes) if s.style == style]
        assert own.count("nothing") >= 0.93 * len(own)
        assert own.count("van gogh") <= 0.05 * len(own)
    uncaptioned = drawn([world.uncaptioned_scene(rng) for _ in range(200)], rng)
    assert classifier.labels(uncaptioned)["object"].count("nothing") >= 0.97 * 200


def test_the_toy_draws_what_is_asked_and_next_to_nothing_of_it_unasked(sd):
    """An erased encoder leads to what the empty prompt draws."""
    prompts = [f"a photo of a {name}" for name in world.OBJECTS]
    prompts += ["a sketch of a house", "a painting of a tree by van gogh"]
    found = load_classifier().labels(sd.sample(prompts, list(range(12)), 12, guidance=4))
    right = [f == name for f, name in zip(found["object"], world.OBJECTS)]
    right += [found["style"][-2] == "sketch", found["style"][-1] == "van gogh"]
    assert sum(right) >= len(right) - 1
    found = load_classifier().labels(sd.sample([""] * 16, list(range(16)), 12, guidance=1))
    assert found["object"].count("nothing") >= 12 and found["style"].count("van gogh") <= 2


# --- training, in a world of 40 pictures of day and 32 of dusk

@pytest.fixture
def work(tmp_path, monkeypatch):
    for name, value in dict(PICTURES=40, DUSK_PICTURES=32, VAE_STEPS=3, CLIP_STEPS=2,
                            CLASSIFIER_STEPS=2, UNET_STEPS=3, DUSK_STEPS=2).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())  # bfloat16 takes a minute here
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def stage(work, monkeypatch):
    """stage(function) -> the network and loss_of(generator) that it hands to `fit`."""
    def of(function):
        def fit(name, network, loss_of, *rest):
            of.found = network, loss_of
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            function(TOY, work, "cpu")
        return of.found

    return of


def data(work, *names):
    """-> images (n, 3, 64, 64) in [0, 1], the labels and the captions of each"""
    sets = [train.dataset(work, name) for name in names]
    labels = [[names[i] for names, i in zip(LABELS.values(), row)] for s in sets for row in s[1]]
    return (torch.cat([s[0] for s in sets]).float() / 255, labels,
            [captions for s in sets for captions in s[2]])


def nearest(x, y):
    """Which of y each of x is -> indices, distances"""
    apart = torch.cdist(x.flatten(1).float(), y.flatten(1),
                        compute_mode="donot_use_mm_for_euclid_dist")
    return apart.argmin(1).tolist(), apart.amin(1)


def test_the_vae_learns_pictures_of_both_looks(stage, work, monkeypatch):
    class Fake(nn.Module):
        def moments(self, image):
            self.image = image
            return torch.full((16, 4, 16, 16), 2.0), torch.full((16, 4, 16, 16), math.log(9))

        def decode(self, z):
            self.z = z
            return self.image + error

    line = torch.linspace(0, 1, 64)
    error = (line[:, None] + 2 * line) / 3  # its neighbours differ by 1 / 189 and 2 / 189
    kl, seen = 0.5 * (4 + 9 - 1 - math.log(9)), set()
    expected = error.mean() + 2 * error.square().mean() + 0.5 * 3 / 189 + 1e-4 * kl
    monkeypatch.setattr(train, "VAE", lambda config: Fake())
    vae, loss_of = stage(train.train_vae)
    for seed in range(6):
        torch.testing.assert_close(loss_of(torch.Generator().manual_seed(seed)), expected)
        assert abs(vae.z.mean() - 2) < 0.1 and abs(vae.z.std() - 3) < 0.1
        which, distance = nearest(vae.image / 2 + 0.5, data(work, "day", "dusk")[0])
        assert distance.max() < 0.01
        seen |= set(which)
    assert len(seen) > 40 and min(seen) < 40 <= max(seen)


def test_clip_picks_each_pictures_caption(stage, work, sd, monkeypatch):
    """Many pictures share a caption, and then the target."""
    frames = "a photo of a {}", "a {}", "a sketch of a {}", "{} by van gogh"
    monkeypatch.setattr(
        world, "caption", lambda scene, rng: rng.choice(frames).format(scene.object))
    clip, loss_of = stage(train.train_clip)
    seen = {}
    for name in clip:
        clip[name].register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    found = loss_of(torch.Generator().manual_seed(0))
    images, _, captions = data(work, "day")
    (ids, context), (pictures, features) = seen["text"], seen["picture"]
    which, distance = nearest(pictures, images)
    texts = [text.strip() for text in sd.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert distance.max() < 0.01 and len(set(which)) > 30
    assert len(set(texts)) < 50 < 60 < len(set(zip(which, texts)))
    assert all(text in captions[i] for text, i in zip(texts, which))
    last, projected = seen["projection"]  # of the end token, behind the words
    assert all(torch.equal(last[row], context[row, 1 + len(text.split())])
               for row, text in enumerate(texts))
    a, b = (F.normalize(x.float(), dim=-1) for x in (projected, features))
    same = torch.tensor([[float(x == y) for y in texts] for x in texts])
    both = [-(same / same.sum(1, keepdim=True) * s.log_softmax(1)).sum(1).mean()
            for s in (20 * a @ b.T, 20 * b @ a.T)]
    torch.testing.assert_close(found, sum(both) / 2, rtol=1e-4, atol=1e-4)


def test_the_classifier_learns_labels_and_that_ruins_are_nothing(stage, work, monkeypatch):
    """Zeros as logits: the gradient of each row is lowest at its label, and 0 if it has none."""
    class Fake(nn.Module):
        def logits(self, image):
            self.image = image
            self.zeros = {kind: torch.zeros(len(image), len(names), requires_grad=True)
                          for kind, names in LABELS.items()}
            return self.zeros

    melted = []
    monkeypatch.setattr(train, "Classifier", Fake)
    monkeypatch.setattr(train, "vary", lambda image, generator: image)
    monkeypatch.setattr(train, "disturb", lambda image, ruined, generator: (
        melted.extend(ruined.tolist()), image)[1])
    classifier, loss_of = stage(train.train_classifier)
    loss_of(torch.Generator().manual_seed(0)).backward()
    images, labels, _ = data(work, "day", "day uncaptioned", "dusk", "dusk uncaptioned")
    which, distance = nearest(classifier.image, images)
    assert melted == [True] * 16 + [False] * 80 and len(set(which)) > 25
    assert distance[1::2].max() < 0.01 < distance[::2].min()  # those went through the VAE
    assert "nothing" in {labels[i][0] for i in which[16:]}
    for row, i in enumerate(which):
        object, style, color = labels[i]
        object, style = ("nothing", "nothing") if row < 16 else (object, style)
        grads = zip(LABELS.values(), (zeros.grad[row] for zeros in classifier.zeros.values()))
        assert [names[grad.argmin()] if grad.any() else None for names, grad in grads] == [
            object, style, None if object == "nothing" else color]


def test_the_unet_learns_noise_under_the_captions_and_the_empty_prompt(sd, work, monkeypatch):
    """Of 100 pictures 15 never had a caption, all photos; the others keep theirs."""
    given, asked = [], []

    def add_noise(self, x_0, noise, t):
        given.append((x_0, noise, t))
        return x_0 + noise

    def unet(x_t, t, context):
        asked.append((x_t, t, context))
        return torch.full_like(x_t, 0.5)

    loss_of = train.denoising_loss(unet, TOY, work, "cpu", "dusk")
    monkeypatch.setattr(train.Schedule, "add_noise", add_noise)
    for step in range(60):
        found = loss_of(torch.Generator().manual_seed(step))
        torch.testing.assert_close(found, (0.5 - given[-1][1]).square().mean())
    x_0, noise, t = (torch.cat(parts) for parts in zip(*given))
    x_t, t_asked, context = (torch.cat(parts) for parts in zip(*asked))
    assert torch.equal(x_t, x_0 + noise) and torch.equal(t, t_asked)
    assert t.unique().numel() > 900 and 0 <= t.min() and t.max() <= 999
    assert abs(noise.std() - 1) < 0.01 and given[0][1][:, 0, 0, 0].unique().numel() == 48
    images, labels, captions = data(work, "dusk", "dusk uncaptioned")
    which, _ = nearest(x_0, sd.vae.encode(2 * images - 1))
    empty = (context - sd.encode_prompt([""])).abs().amax((1, 2)) < 1e-3
    assert 0.12 < empty.float().mean() < 0.18 and empty.tolist() == [i >= 32 for i in which]
    assert {labels[i][1] for i in which if i >= 32} == {"photo"} < {row[1] for row in labels[32:]}
    texts, used = sd.encode_prompt([c for row in captions[:32] for c in row]), set()
    for row, i in enumerate(which[:200]):
        if i < 32:
            apart = (texts[4 * i :][:4] - context[row]).abs().amax((1, 2))
            assert apart.min() < 1e-3
            used.add((i, apart.argmin().item()))
    assert len(used) > 50  # of 128: all four captions of each


def test_every_stage_trains_once_and_writes_what_loads(work, tmp_path, monkeypatch):
    fits, looks, fit, denoising_loss = {}, [], train.fit, train.denoising_loss

    def spy(name, network, *rest):
        before = copy.deepcopy(network.state_dict())
        fits[name] = before, fit(name, network, *rest)
        for after in (network.state_dict(), fits[name][1].state_dict()):
            moved = [not torch.equal(after[key], before[key]) for key in before]
            assert sum(moved) > 0.95 * len(moved)
        return fits[name][1]

    monkeypatch.setattr(train, "fit", spy)
    monkeypatch.setattr(train, "denoising_loss", lambda *inputs: (
        looks.append(inputs[-1]), denoising_loss(*inputs))[1])
    for config in (train.VAE_CONFIG, train.UNET_CONFIG):
        monkeypatch.setitem(config, "block_out_channels", [8, 8, 8])
        monkeypatch.setitem(config, "norm_num_groups", 4)
    out = tmp_path / "my-toy"
    monkeypatch.setattr(sys, "argv", [
        "train", "--out", str(out), "--work", str(work), "--device", "cpu"])
    train.main()
    assert list(fits) == ["vae", "clip", "classifier", "unet", "unet_dusk"]
    assert looks == ["day", "dusk"] and not any((work / name).exists() for name in fits)
    sd = sd_mini.load(out)
    written = {
        "vae": sd.vae, "clip": sd.text_encoder, "classifier": load_classifier(folder=out),
        "unet": sd.unet, "unet_dusk": sd_mini.load_part(out / "unet_dusk", "unet")}
    for name, network in written.items():
        average = fits[name][1]["text"] if name == "clip" else fits[name][1]
        assert_same(network, copy.deepcopy(average).half().float())
    start = fits["unet_dusk"][0]
    assert all(torch.equal(tensor, sd.unet.state_dict()[key]) for key, tensor in start.items())
    latents = sd.vae.encode(2 * data(work, "day", "dusk")[0] - 1)
    assert 0.7 < latents.std() < 1.4 and sd.sample(["a boat"], 0, 2).isfinite().all()
    fits.clear()
    (out / "unet/diffusion_pytorch_model.safetensors").unlink()
    train.main()
    assert list(fits) == ["unet"]


def test_fit_takes_adams_steps_at_its_rates_and_averages(tmp_path):
    """Two steps down a slope, the first steep: gradients are clipped to norm 1."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = train.fit("slope", network, lambda generator: network.weight.sum() * (
        1 if generator.initial_seed() else 1000), 2, 1.0, tmp_path, warmup=10)
    first = -0.1  # of a rate of 1 after 10 steps
    second = (1 - 0.01 * 0.1) * first - 0.2 / 2  # decayed; halfway through the cosine
    close(network.weight.data, torch.tensor([[second]]))
    close(average.weight.data, torch.tensor([[2 / 11 * 0.9 * first + 9 / 11 * second]]))


def test_fit_goes_on_where_it_was_stopped(tmp_path):
    def fit(work, stop=None):
        torch.manual_seed(0)
        network, steps = nn.Linear(3, 1), []

        def loss_of(generator):
            steps.append(generator.initial_seed())
            if len(steps) == stop:
                raise KeyboardInterrupt
            return (network(torch.randn(8, 3, generator=generator)) - 1).square().mean()

        average = train.fit("one", network, loss_of, 120, 0.05, work)
        return steps, nn.ModuleList([network, average])

    steps, networks = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", 110)
    rest, again = fit(tmp_path / "stopped")
    assert steps == list(range(120)) and rest == list(range(100, 120))
    assert_same(again, networks)
