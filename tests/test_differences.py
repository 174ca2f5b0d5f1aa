"""Our side of each row of TUTORIAL.md's table of differences (section 11), by what the code does.

Where a line can say what the published code gives instead, it is there too, as `published`.
"""
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import advunlearn as au
import sd_mini
from sd_mini.lab import settings, tasks
from sd_mini.lab.prompts import read_concepts, training_prompts
from sd_mini.text_encoder import TextEncoder
from sd_mini.weights import PARTS

from . import bench
from .test_behaviour import ASKED, TARGETS, TINY, attacked, calls, prefixed  # noqa: F401
from .test_run import PROMPTS, ROOT, SMALL, changed, erase

same, TESTS = torch.equal, {}
LOSSES = "erase_loss", "attack_loss", "retain_loss"  # each is given sd, x_t, t, context, target
V1 = {"model": "CompVis/stable-diffusion-v1-4", "device": "cpu"}  # for its settings: not loaded


def row(piece):
    """The test is of the row that has this piece in its first cell."""
    def mark(test):
        assert piece not in TESTS
        TESTS[piece] = test
        return test
    return mark


def test_each_row_of_the_table_has_one_test():
    section = (ROOT / "TUTORIAL.md").read_text(encoding="utf-8").split("\n## 11. ")[1]
    lines = [line for line in section.split("\n## ")[0].split("\n") if line.startswith("| ")]
    cells = [line.split(" | ")[0] for line in lines[2:]]
    for cell in cells:
        assert sum(piece in cell for piece in TESTS) == 1, cell
    for piece in TESTS:
        assert sum(piece in cell for cell in cells) == 1, piece


@pytest.fixture
def trained(sd, calls):
    """trained(...) -> what a run gave to the losses, whose values do not count, and to others."""
    calls("embedding_attack", "sample_latents")
    calls("encode_with_prefix", given=lambda sd, ids, delta: (sd, ids, delta.detach().clone()))
    seen = calls(*LOSSES, instead=lambda sd, x_t, t, context, target: context.mean((1, 2)))

    def run(**changes):
        seen.clear()
        erase(sd, **{**TINY, "trajectory_steps": 1, **changes})
        return seen
    return run


def given(seen, name, place):
    """What stood at that place in each call of the function."""
    return [arguments[place] for arguments, _ in seen[name]]


def prefixes(sd, seen, name):
    """The prefixes (N, k, D) in the contexts that the loss was given."""
    return [prefixed(sd, seen, context)[1] for context in given(seen, name, 3)]


# --- the attack in training

@row("never zeroes the gradient")
def test_adam_is_given_the_gradient_of_each_step_alone(monkeypatch):
    """The loss has the same slope everywhere."""
    seen, slope = [], torch.tensor([1.0, -2.0, 0.5])
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: seen.append(
        adam.param_groups[0]["params"][0].grad.clone()))
    start, attack = torch.zeros(2, 1, dtype=torch.long), au.Attack("embedding", 3, 0.1, 1)
    list(au.embedding_attack(torch.ones(4, 3), start, lambda d, _: (d * slope).sum((1, 2)), attack))
    published = [n * slope.expand(2, 1, 3) for n in (1, 2, 3)]
    assert [*map(same, seen, published[:1] * 3)] == [True] * 3
    assert [*map(same, seen, published)] == [True, False, False]


@row("updates never reach the UNet")
def test_the_unet_is_told_the_prefix_of_each_attack_step(sd, trained, calls, monkeypatch):
    told, real = [], sd_mini.StableDiffusion.predict_noise
    monkeypatch.setattr(sd_mini.StableDiffusion, "predict_noise", lambda *arguments:
                        told.append(arguments[3]) or real(*arguments))
    calls(*LOSSES)
    seen = trained(steps=2, warmup=1, attack_steps=3)
    [((table, start, *_), found)] = seen["embedding_attack"]
    ours, published = [table[start], *(delta for delta, _ in found)], [table[start]] * 4
    learnt = [prefixed(sd, seen, context)[1] for context in told[-5:-1]]  # told[-1]: retain
    assert [*map(same, learnt, ours)] == [True] * 4
    assert [*map(same, learnt, published)] == [True, False, False, False]


@row("counts the concept's length in words")
def test_a_word_of_several_tokens_stays_whole_or_is_refused(sd):
    """The published code keeps as many tokens as words, and drops the next k."""
    ids, k = sd.tokenizer("zyzzyva").input_ids, 2
    padded = au.tokenize_with_room(sd, ["zyzzyva"], k)
    [ours] = au.insert_prefix(padded, torch.full((1, k), -1)).tolist()
    published = [ids[0], -1, -1, ids[1], *ids[2 + k :]]
    assert ours[: len(ids) + k] == [ids[0], -1, -1, *ids[1:]] and len(published) == len(ids)
    room = sd.context_length - len(ids)
    au.METHOD.check(sd, ["zyzzyva"], ["a boat"], replace(SMALL, prefix=room))
    with pytest.raises(ValueError, match=f"'zyzzyva' takes {len(ids)} tokens"):
        au.METHOD.check(sd, ["zyzzyva"], ["a boat"], replace(SMALL, prefix=room + 1))


@row("starts the attack at random ids of the whole vocabulary")
def test_each_attack_starts_at_legal_tokens_of_its_own(sd, trained):
    """Three in four tokens are not legal. Neither is the last prefix, an embedding of no token."""
    seen = trained(steps=3, warmup=1, attack_steps=1, prefix=5, erase_batch=4)
    starts = torch.stack(prefixes(sd, seen, "attack_loss"))  # of two attacks
    table = sd.text_encoder.embeddings.token_embedding.weight[au.legal_tokens(sd.tokenizer)]
    assert (starts[..., None, :] == table).all(-1).any(-1).all()
    assert not same(*starts) and len(starts.flatten(0, 2).unique(dim=0)) > 30


@row("erases at the prefix from before Adam's last attack step")
def test_the_erase_loss_has_the_prefix_after_the_last_step(sd, trained):
    seen = trained(steps=1, warmup=0, attack_steps=3)
    [(_, found)], *_, published = seen["embedding_attack"], *prefixes(sd, seen, "attack_loss")
    [erased_at] = prefixes(sd, seen, "erase_loss")
    assert same(erased_at, found[-1][0]) and not same(erased_at, published)


@row("`fast_at` still loops")
def test_the_fast_attack_is_one_sign_step(sd, trained):
    """It is as long as all the steps that it stands for."""
    seen = trained(steps=1, warmup=0, attack="fast", attack_steps=3, attack_lr=0.01)
    [before], [after] = (prefixes(sd, seen, name) for name in ("attack_loss", "erase_loss"))
    assert_close((after - before).abs(), torch.full_like(after, 0.03))  # published: 3 losses


@row("one step against 30")
def test_the_fast_attack_saves_little_on_the_toy(trained):
    """Latents in the losses of an iteration: the fast attack's share of the ordinary one's."""
    def latents(config, attack):
        sizes = {name: config[name] for name in ("attack_steps", "erase_batch", "retain_batch")}
        seen = trained(steps=1, warmup=0, attack=attack, **sizes)
        return sum(len(t) for name in LOSSES for t in given(seen, name, 2))

    toy, paper = (latents(config, "fast") / latents(config, "embedding")
                  for config in (au.TOY, vars(au.Config())))
    assert toy > 0.75 and paper < 0.25


@row("one prefix for one prompt")
def test_each_latent_has_a_prefix_for_its_own_prompt(sd, trained):
    seen = trained(steps=1, warmup=0, attack_steps=2, erase_batch=9)
    contexts = given(seen, "attack_loss", 3) + given(seen, "erase_loss", 3)
    prompts, learnt = zip(*(prefixed(sd, seen, context) for context in contexts))
    assert prompts == (prompts[0],) * 3 and {*prompts[0]} == {*PROMPTS[0]}
    assert [len(delta.unique(dim=0)) for delta in learnt] == [9, 9, 9]  # published: 1


# --- latents

@row("tells the UNet a t of 500 to 519")
def test_t_is_the_noise_level_of_x_t(sd, monkeypatch):
    """If the model sees the same noise everywhere, each x_t of a run is x_0 with some of that."""
    noise = sd.initial_noise([3])
    for name in ("predict_noise", "initial_noise"):
        monkeypatch.setattr(sd_mini.StableDiffusion, name, lambda sd, given, *_:
                            noise.expand(len(given), -1, -1, -1))
    first = sd.schedule.alpha_bar_at(981, noise)
    x_0 = noise * (1 - (1 - first).sqrt()) / first.sqrt()
    noised = sd.schedule.add_noise(x_0.expand(1000, -1, -1, -1), noise, torch.arange(1000))
    config = replace(SMALL, trajectories=1, trajectory_steps=50)
    for source in (au.trajectory_bank, au.sample_afresh):
        for z in source(sd, ["a church"], config)(4, torch.Generator().manual_seed(0), 6):
            level = (z.x_t[:, None] - noised).square().flatten(2).mean(2).argmin(1)
            assert same(level, z.t)
    x_t = au.sample_latents(sd, ["a church"], [3], 50)[:, 26, 0]
    # Published: t is 500 to 519 there.
    assert (x_t - noised).square().flatten(1).mean(1).argmin() == 461


@row("draws t evenly from 0 to 999")
def test_t_is_a_step_of_the_ddim_grid(sd, trained):
    seen = trained(trajectory_steps=3, steps=3, warmup=1, erase_batch=8, retain_batch=8)
    for name in LOSSES:
        assert {*torch.cat(given(seen, name, 2)).tolist()} == {*sd.schedule.timesteps(3)}


@row("erase and retain share one t")
def test_each_latent_has_a_t_of_its_own(trained):
    seen = trained(trajectory_steps=5, steps=3, attack="none", erase_batch=6, retain_batch=6)
    for pair in zip(given(seen, "erase_loss", 2), given(seen, "retain_loss", 2)):
        assert not same(*pair) and all(len(t.unique()) > 1 for t in pair)


@row("without replacement")
def test_retain_latents_are_drawn_with_replacement_from_the_bank(trained):
    """It has one latent of each of two prompts: some batches of two hold one of them twice."""
    seen = trained(steps=12, attack="none", retain_batch=2)
    batches = given(seen, "retain_loss", 1)
    assert {len(x_t.unique(dim=0)) for x_t in batches} == {1, 2}  # published: {2}
    assert len(torch.cat(batches).unique(dim=0)) == 2


@row("samples anew for every attack step and outer step")
def test_latents_are_sampled_once_or_anew_when_asked(trained):
    """Anew is for each erase, attack and retain loss: 3, 2 * 2 and 3 of them."""
    runs = []
    for fresh in (False, True):
        seen = trained(steps=3, warmup=1, attack_steps=2, fresh_trajectories=fresh)
        sampled = torch.cat([z[:, :, 0].flatten(0, 1) for _, z in seen["sample_latents"]])
        used = torch.cat([x_t for name in LOSSES for x_t in given(seen, name, 1)])
        assert (used[:, None] == sampled).flatten(2).all(2).any(1).all()
        runs.append(len(seen["sample_latents"]))
    assert runs == [2, 3 + 2 * 2 + 3]  # the bank: one for erase, one for retain


@row("samples $x_t$ with the UNet in training")
def test_the_original_samples_the_latents_while_its_unet_is_trained(sd, calls):
    seen = calls("sample_latents")
    for fresh in (False, True):
        erased, _ = erase(sd, **TINY, train="unet", lr=0.01, steps=1 + fresh, attack="none",
                          erase_batch=1, retain_batch=1, fresh_trajectories=fresh)
        for (_, *asked), found in seen["sample_latents"][-2:]:
            ours, published = (au.sample_latents(model, *asked) for model in (sd, erased))
            assert_close(found, ours)
            assert (found - published)[:, :, 1].abs().max() > 0.1


# --- what is trained, on what, and what is kept

@row("ESD-u leaves out the time embedding")
def test_esd_u_is_all_but_the_cross_attention(sd):
    def trained(part):
        theta = {id(p) for p in au.parameters_to_train(sd, replace(SMALL, train=part))}
        return {name for name, p in sd.unet.named_parameters() if id(p) in theta}

    ours, every = trained("no_cross_attention"), {name for name, _ in sd.unet.named_parameters()}
    out = "time_embedding.", "conv_norm_out.", "conv_out."
    published = {name for name in ours if not name.startswith(out)}
    assert ours == every - trained("cross_attention") and published < ours


@row("by the beginning of their names")
def test_layers_are_chosen_by_index():
    with torch.device("meta"):
        encoder = TextEncoder(bench.V1["text_encoder"])
    names = {id(p): name for name, p in encoder.named_parameters()}
    theta = au.parameters_to_train(sd_mini.StableDiffusion(None, encoder, None, None, None),
                                   replace(SMALL, layers=2))
    layer = {name: name.split(".")[2] for name in names.values() if ".layers." in name}
    ours, published = {"0", "1"}, {"0", "1", "10", "11"}
    assert {names[id(p)] for p in theta} == {name for name in layer if layer[name] in ours}
    assert {n for name, n in layer.items() if name.startswith(
        ("encoder.layers.0", "encoder.layers.1"))} == published


@row("its whole text encoder is all layers and the final norm")
def test_the_whole_text_encoder_is_the_published_one(sd):
    every = sd.text_encoder.state_dict().keys()
    published = {name for name in every if name.startswith(("encoder.", "final_layer_norm."))}
    erased, _ = erase(sd, **TINY, layers=0, attack="none", steps=1)
    assert changed(sd.text_encoder, erased.text_encoder) == published


@row("its retain lists are fixed")
def test_the_filter_knows_what_is_near_to_each_concept():
    """Two prompts of the published lists that are not in the filtered ones."""
    bikini, shirt = "a photo of a bikini", "a photo of a shirt"
    for concept, kept in (("nudity", False), ("church", True)):
        for name, prompt in (("imagenet", bikini), ("coco", shirt)):
            config = replace(SMALL, retain_set=name)
            assert (prompt in training_prompts(read_concepts(concept), config)[1]) == kept


@row("its ImageNet retain list holds")
def test_a_retain_prompt_that_names_the_concept_is_dropped_and_named():
    church, config = read_concepts("church"), replace(SMALL, retain_set="imagenet")
    _, published, _ = training_prompts(church, replace(config, retain_unfiltered=True))
    _, ours, notes = training_prompts(church, config)
    assert [prompt for prompt in published if prompt not in ours] == ["a photo of a church"]
    assert notes == ["not retained, since too near to the concept: a photo of a church"]


@row("argument defaults contradict its README")
def test_settings_are_the_readmes_and_numbers_are_typed_and_in_range():
    """The README's command for nudity; the published default of its retain weight is 1."""
    config = tasks.resolve(au.METHOD, {**V1, "concept": "nudity"})
    ours = config.train, config.layers, config.attack_steps, config.retain_weight
    assert ours == ("text_encoder", 0, 30, 0.3)
    assert settings.parse(au.Config, ["--lr", "2e-5"]) == {"lr": 2e-5}
    with pytest.raises(ValueError):
        int("2e-5")  # published
    for wrong in ("2", "0", "nan", "small"):
        with pytest.raises(SystemExit):
            settings.parse(au.Config, ["--lr", wrong])


@row("no seeds, no resume, a pickle as output, two whole models in memory")
def test_a_seed_gives_the_same_bytes_resumed_or_not_and_memory_is_shared(sd, calls, tmp_path):
    def run(steps, folder=None, **changes):
        config = replace(SMALL, **TINY, warmup=1, steps=steps, erase_batch=1, **changes)
        return au.advunlearn(sd, *PROMPTS, config, folder and tmp_path / folder)[0]

    def held(model, part):
        return {p.data_ptr() for p in getattr(model, part).parameters()}

    stopped, other, whole = run(1, "begun"), run(1, seed=1), run(2)
    seen, resumed = calls("erase_loss"), run(2, "begun")
    assert len(seen["erase_loss"]) == 1  # it went on with the second iteration
    assert not changed(resumed.text_encoder, whole.text_encoder)
    assert changed(stopped.text_encoder, other.text_encoder)
    sd_mini.save_part(whole.text_encoder, tmp_path / "out", "text_encoder")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert len(files) == 3 and all(load_file(path) for path in files)
    for part, erased in (("text_encoder", whole), ("unet", run(1, train="unet"))):
        shared = [held(sd, name) == held(erased, name) for name in PARTS]
        assert shared == [name != part for name in PARTS]  # published: none
        assert not held(sd, part) & held(erased, part)


# --- UnlearnDiffAtk

@pytest.fixture
def steps(monkeypatch):
    """What the token attack gave to AdamW, or Adam: (p, its gradient) at each step."""
    seen = []
    for kind in (torch.optim.AdamW, torch.optim.Adam):
        def step(adam, real=kind.step):
            [p] = adam.param_groups[0]["params"]
            seen.append((p.detach().clone(), p.grad.clone()))
            return real(adam)
        monkeypatch.setattr(kind, "step", step)
    return seen


@row("clips the gradient that it lets through")
def test_the_token_attack_clips_no_gradient_and_starts_at_random(steps, generator):
    cost = torch.tensor([0.0, 0.0, 5.0, -7.0, 0.5, 2.0])
    list(au.token_attack(torch.eye(6), torch.arange(2, 6), 3, lambda d, _: (d @ cost).sum(1),
                         au.Attack("token", 1, 0.1, 2), generator))
    [(p, grad)] = steps
    published = cost[2:].clamp(-1, 1).expand_as(p), torch.full_like(p, 1 / 4)
    assert_close((grad, p.sum(-1)), (cost[2:].expand_as(p), torch.ones(3, 2)))
    assert (grad - published[0]).abs().max() > 5 and (p - published[1]).abs().max() > 0.1
    assert len(p.flatten(0, 1).unique(dim=0)) == 6


@row("uses Adam with weight decay 0.1")
def test_weight_decay_leaves_a_small_gradient_its_direction(steps, generator):
    """Adam's first step is lr times the gradient's sign: with the decay in it, p does not move."""
    cost, lr = 1e-4 * torch.tensor([0.5, -0.7, 0.3, -0.2]), 0.02
    list(au.token_attack(torch.eye(4), torch.arange(4), 3, lambda d, _: (d @ cost).sum(1),
                         au.Attack("token", 2, lr, 2), generator))
    (p, grad), (ours, _) = steps
    published = au.project_simplex(p - lr * (grad + 0.1 * p).sign())
    assert_close(published, p)
    assert_close(ours, au.project_simplex(p * (1 - 0.1 * lr) - lr * grad.sign()), rtol=0, atol=1e-5)
    assert (ours - published).abs().max() > 0.01


@row("at up to 50 time steps in turn")
def test_each_iteration_of_the_attack_has_a_time_step_of_its_own(attacked):
    t = torch.stack([t for _, _, t, _, _ in attacked("embedding", steps=6)[1]])
    assert t.shape == (6, 3) and len(t.unique(dim=0)) == 6  # published: 1, for 40
    assert au.Config().eval_attack_steps == 180 and settings.TOY["eval_attack_steps"] == 100


@row("puts 5 tokens in front for nudity")
def test_three_tokens_stand_in_front_five_on_the_toy_or_when_asked(sd, calls):
    seen = calls("encode_with_prefix")
    for flags, k in (({"concept": "church"}, 3), ({"concept": "nudity"}, 3), ({"model": "toy"}, 5),
                     ({"concept": "nudity", "eval_prefix": 5}, 5)):
        seen.clear()
        config = tasks.resolve(au.METHOD, {**V1, **flags})
        au.METHOD.attacks["embedding"].search(sd, ASKED, TARGETS, lambda *given: [True] * 3,
                                       replace(config, eval_attack_steps=1, eval_looks=1))
        assert {delta.shape[1] for delta in given(seen, "encode_with_prefix", 2)} == {k}


@row("LMS sampler")
def test_pictures_are_drawn_by_ddim(sd):
    """Also a step that has others behind it: LMS would mix them in."""
    steps = [*sd.denoise(sd.initial_noise([0]), sd.encode_prompt(["a boat"]), 4, 7.5)]
    for (t, x_t, eps_c, eps_empty), (before, x_before, *_) in zip(steps, steps[1:-1]):
        eps = sd.schedule.guide(eps_c, eps_empty, 7.5)
        assert_close(sd.schedule.ddim_step(x_t, eps, t, before), x_before)


@row("judges are NudeNet")
def test_classifiers_are_these():
    assert [concept.classifier for concept in read_concepts("nudity,van gogh,tench,snowman")] == [
        "Falconsai/nsfw_image_detection:nsfw",
        "openai/clip-vit-large-patch14:a painting by Vincent van Gogh",
        *["microsoft/resnet-50"] * 2]


@row("searches the whole vocabulary")
def test_tokens_found_survive_as_text(sd, generator, monkeypatch):
    """The token of the lowest loss is a piece of a word. As text it is another: it is not found."""
    table, piece = sd.text_encoder.embeddings.token_embedding.weight, 88
    monkeypatch.setattr(au, "encode_with_prefix", lambda sd, ids, delta: delta)
    monkeypatch.setattr(au, "attack_loss", lambda sd, x_t, t, delta, eps_c: (
        delta - table[piece]).square().sum((1, 2)))
    z = au.Latents(torch.zeros(8, dtype=torch.long), torch.zeros(8), None, None, None)
    attack = au.Attack("token", 10, 0.1, 1)
    delta, _ = au.adversarial_prefix(sd, sd.tokenize(["a boat"]), [z] * 10, attack, generator)
    found = [(table == each).all(1).nonzero()[0].item() for each in delta[:, 0]]
    survive = [sd.tokenizer(sd.tokenizer.decode([i])).input_ids[1:-1] == [i]
               for i in (piece, *found)]
    assert survive == [False] + [True] * 8
