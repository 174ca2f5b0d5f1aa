"""The toy world, its classifier and its training. All other tests on the toy rely on them."""
import copy
import os
import signal
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sd_mini
from sd_mini.lab.prompts import read_concepts
from sd_mini.toy import train, world
from sd_mini.toy.classifier import LABELS, load_classifier
from sd_mini.weights import TOY

from .reference import assert_same, close


def drawn(scenes, rng):
    """-> pictures (N, 3, 64, 64) in [0, 1]"""
    return torch.tensor(np.stack([world.draw(scene, rng) for scene in scenes])).movedim(3, 1) / 255


@pytest.mark.parametrize("concept", ["church", "garbage truck", "parachute", "tench", "van gogh"])
def test_synonyms_share_no_token_with_the_name_and_are_kinds_of_their_own(sd, concept):
    """Else erasing the name would erase them too, and an attack had nothing to find."""
    listed = [word for word in read_concepts(concept)[0].synonyms if word != "refuse lorries"]
    captions = " ".join(world.OBJECTS.get(concept, world.STYLES.get(concept, {})))
    assert len(listed) >= 2 and {*" ".join(listed).split()} <= {*captions.split()}
    name, *synonyms = (set(sd.tokenizer(words).input_ids[1:-1]) for words in (concept, *listed))
    assert all(not name & synonym for synonym in synonyms)
    scenes = [world.Scene(concept, word, "red", "sky", "photo", "")
              for word in world.OBJECTS.get(concept, ())]
    pictures = [world.draw(scene, np.random.default_rng(1)).astype(int) for scene in scenes]
    assert all(np.abs(a - b).mean() > 5 for i, a in enumerate(pictures) for b in pictures[:i])


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
    assert found["style"].count("nothing") >= 0.93 * 200
    uncaptioned = drawn([world.uncaptioned_scene(rng) for _ in range(200)], rng)
    assert classifier.labels(uncaptioned)["object"].count("nothing") >= 0.97 * 200


def test_the_toy_draws_what_is_asked(sd):
    prompts = [f"a photo of a {name}" for name in world.OBJECTS]
    prompts += ["a sketch of a house", "a painting of a tree by van gogh"]
    found = load_classifier().labels(sd.sample(prompts, list(range(12)), 12, guidance=4))
    right = [f == name for f, name in zip(found["object"], world.OBJECTS)]
    right += [found["style"][-2] == "sketch", found["style"][-1] == "van gogh"]
    assert sum(right) >= len(right) - 1


# --- training, in a world of 40 pictures of day and 32 of dusk

PINNED = {  # stage: learning rate, loss, norm of its gradient
    "vae": (2e-3, 0.096432, 0.42533), "clip": (1.5e-3, 2.29099, 2.77639),
    "classifier": (2e-3, 0.13204, 6.19542), "unet": (1.2e-3, 0.062918, 0.080068),
    "unet_dusk": (4e-4, 0.12811, 0.74601)}


@pytest.fixture
def work(tmp_path, monkeypatch):
    for name, value in dict(PICTURES=40, DUSK_PICTURES=32, VAE_STEPS=3, CLIP_STEPS=2,
                            CLASSIFIER_STEPS=2, UNET_STEPS=3, DUSK_STEPS=2).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())  # bfloat16 takes a minute here
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_losses_and_gradients_at_the_embedded_weights_are_as_they_were(sd, work, monkeypatch):
    """Of a batch of each stage, with the rate at which it was trained. Wrong data, pairs, labels or
    weights of terms change them. So would another world, which asks for another training.
    """
    found, unet = {}, sd.unet.state_dict()
    text = {f"text.{name}": tensor for name, tensor in sd.text_encoder.state_dict().items()}
    trained = {"vae": sd.vae.state_dict(), "clip": text | load_file(TOY / "clip/model.safetensors"),
               "classifier": load_classifier().state_dict(), "unet": unet, "unet_dusk": unet}

    def fit(name, network, loss_of, steps, lr, work):
        network.load_state_dict(trained[name])
        loss = loss_of(torch.Generator().manual_seed(0))
        grads = torch.autograd.grad(loss, [*network.parameters()])
        found[name] = lr, loss.item(), torch.cat([grad.flatten() for grad in grads]).norm().item()
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", fit)
    for name in trained:
        with pytest.raises(KeyboardInterrupt):
            train.STAGES[name][0](TOY, work, "cpu")
    assert found == {name: pytest.approx(pinned, rel=1e-3) for name, pinned in PINNED.items()}


def test_every_stage_trains_once_and_writes_what_loads(work, tmp_path, monkeypatch):
    fits, fit = {}, train.fit

    def spy(name, network, *rest):
        before = copy.deepcopy(network.state_dict())
        fits[name] = before, fit(name, network, *rest)
        for after in (network.state_dict(), fits[name][1].state_dict()):
            moved = [not torch.equal(after[key], before[key]) for key in before]
            assert sum(moved) > 0.95 * len(moved)
        return fits[name][1]

    monkeypatch.setattr(train, "fit", spy)
    for config in (train.VAE_CONFIG, train.UNET_CONFIG):
        monkeypatch.setitem(config, "block_out_channels", [8, 8, 8])
        monkeypatch.setitem(config, "norm_num_groups", 4)
    out = tmp_path / "my-toy"
    monkeypatch.setattr(sys, "argv", [
        "train", "--out", str(out), "--work", str(work), "--device", "cpu"])
    train.main()
    assert list(fits) == ["vae", "clip", "classifier", "unet", "unet_dusk"]
    assert not any((work / name).exists() for name in fits)
    sd = sd_mini.load(out)
    written = {
        "vae": sd.vae, "clip": sd.text_encoder, "classifier": load_classifier(folder=out),
        "unet": sd.unet, "unet_dusk": sd_mini.load_part(out / "unet_dusk", "unet")}
    for name, network in written.items():
        average = fits[name][1]["text"] if name == "clip" else fits[name][1]
        assert_same(network, copy.deepcopy(average).half().float())
    start = fits["unet_dusk"][0]
    assert all(torch.equal(tensor, sd.unet.state_dict()[key]) for key, tensor in start.items())
    latents = sd.vae.encode(2 * train.to_unit(train.dataset(work, "day")[0], "cpu") - 1)
    assert 0.7 < latents.std() < 1.4 and sd.sample(["a boat"], 0, 2).isfinite().all()
    fits.clear()
    (out / "unet/diffusion_pytorch_model.safetensors").unlink()
    train.main()
    assert list(fits) == ["unet"]


def test_fit_takes_adams_steps_averages_and_goes_on_where_it_was_stopped(tmp_path):
    """Two steps down a slope, the first steep: gradients are clipped to norm 1."""
    steps = []

    def fit():
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)

        def loss_of(generator):
            steps.append(generator.initial_seed())
            if steps == [0]:
                os.kill(os.getpid(), signal.SIGINT)  # waits for the end of the step
            return network.weight.sum() * (1 if steps[-1] else 1000)

        return network, train.fit("slope", network, loss_of, 2, 1.0, tmp_path, warmup=10)

    with pytest.raises(KeyboardInterrupt):
        fit()
    network, average = fit()
    first = -0.1  # of a rate of 1 after 10 steps
    second = (1 - 0.01 * 0.1) * first - 0.2 / 2  # decayed; halfway through the cosine
    close(network.weight.data, torch.tensor([[second]]))
    close(average.weight.data, torch.tensor([[2 / 11 * 0.9 * first + 9 / 11 * second]]))
    assert steps == [0, 1]
