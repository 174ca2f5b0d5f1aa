"""Prompts with a prefix, the projection onto the simplex, and both attacks."""
import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch
from transformers import CLIPTokenizer

import advunlearn as au


def test_insert_prefix_keeps_start_prompt_end_and_length(sd):
    ids = sd.tokenize(["a photo of a garbage truck"])
    length = int((ids != sd.tokenizer.pad_token_id).sum()) + 1  # the end token is also the padding
    prefix = torch.tensor([[5, 6, 7]])
    out = au.insert_prefix(ids, prefix)
    assert out.shape == ids.shape
    assert out[0, 0] == sd.tokenizer.bos_token_id and out[0, 1:4].tolist() == [5, 6, 7]
    assert out[0, 4 : length + 3].tolist() == ids[0, 1:length].tolist()
    assert (out[0, length + 3 :] == sd.tokenizer.pad_token_id).all()


def test_prefix_of_ids_and_of_their_embeddings_is_the_same_context(sd):
    ids = sd.tokenize(["a house", "a photo of a red boat at night"])
    prefix = torch.tensor([[300, 301], [302, 303]])
    table = sd.text_encoder.embeddings.token_embedding.weight
    of_embeddings = au.encode_with_prefix(sd, ids, table[prefix])
    of_ids = sd.text_encoder(au.insert_prefix(ids, prefix))
    torch.testing.assert_close(of_embeddings, of_ids)


def test_room_is_counted_in_tokens(sd):
    word = "zyzzyva"  # one word, but several tokens
    tokens = len(sd.tokenizer(word).input_ids)
    assert tokens > 3
    au.tokenize_with_room(sd, [word], sd.context_length - tokens)
    with pytest.raises(ValueError, match="exceeds"):
        au.tokenize_with_room(sd, [word], sd.context_length - tokens + 1)


def test_project_simplex_against_its_definition(generator):
    """The result is on the simplex, and no point of a fine grid there is nearer."""
    pairs = itertools.product(range(21), repeat=2)
    grid = torch.tensor([(a, b, 20 - a - b) for a, b in pairs if a + b <= 20]) / 20
    for v in 2 * torch.randn(50, 3, generator=generator):
        p = au.project_simplex(v)
        assert p.min() >= 0 and abs(p.sum() - 1) < 1e-5
        assert (p - v).norm() <= (grid - v).norm(dim=1).min() + 1e-5


def test_project_simplex_works_on_rows_and_leaves_the_simplex_alone():
    on = torch.tensor([[[0.2, 0.8], [1.0, 0.0]]])
    torch.testing.assert_close(au.project_simplex(on), on)
    rows = torch.tensor([[5.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    projected = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(au.project_simplex(rows), projected)


@pytest.fixture
def attacked(sd, generator):
    """A fixed attack loss on the toy. It is low where "a house" denoises like "a church"."""
    ids = sd.tokenize(["a photo of a house"] * 4)
    x_t = torch.randn(4, *sd.latent_shape, generator=generator)
    t = torch.tensor([300, 500, 700, 900])
    eps_c = sd.predict_noise(x_t, t, sd.encode_prompt(["a photo of a church"] * 4))
    table = sd.text_encoder.embeddings.token_embedding.weight

    def loss_of(delta, step=0):
        return au.attack_loss(sd, x_t, t, au.encode_with_prefix(sd, ids, delta), eps_c)

    return table, au.legal_tokens(sd.tokenizer), loss_of


@pytest.mark.parametrize("kind, radius", [("embedding", None), ("fast", None), ("embedding", 0.03)])
def test_embedding_attack_lowers_its_loss(attacked, kind, radius):
    table, legal, loss_of = attacked
    start = legal[torch.arange(8).view(4, 2) * 7]
    attack = au.Attack(kind, 15, 0.01, 2, radius)
    steps = list(au.embedding_attack(table, start, loss_of, attack))
    assert len(steps) == 15 and not steps[-1][0].requires_grad
    assert (loss_of(steps[-1][0]) < loss_of(table[start])).all()


def test_embedding_attack_stays_within_its_radius(attacked):
    table, legal, loss_of = attacked
    start = legal[torch.arange(8).view(4, 2)]
    attack = au.Attack("embedding", 10, 0.05, 2, radius=0.02)
    for delta, _ in au.embedding_attack(table, start, loss_of, attack):
        assert (delta - table[start]).abs().max() <= 0.02 + 1e-6


def test_one_sign_step_is_fast_at(attacked):
    table, legal, loss_of = attacked
    start = legal[torch.zeros(4, 2, dtype=torch.long)]
    (delta, _), = au.embedding_attack(table, start, loss_of, au.Attack("fast", 1, 0.05, 2))
    torch.testing.assert_close((delta - table[start]).abs(), torch.full_like(delta, 0.05))


def test_embedding_attack_does_not_pile_up_gradients():
    """Each step must see a new gradient alone, without those of the steps before.

    Here the third sign step turns round, where the sum of the gradients would go on.
    """
    seen = []

    def loss_of(delta, step):
        seen.append(delta.detach().clone())
        return delta.square().flatten(1).sum(1)

    table, start = torch.ones(3, 2), torch.zeros(1, 1, dtype=torch.long)
    list(au.embedding_attack(table, start, loss_of, au.Attack("fast", 4, 0.6, 1)))
    values = torch.stack(seen).flatten()[::2]
    torch.testing.assert_close(values, torch.tensor([1.0, 0.4, -0.2, 0.4]))


def test_token_attack_lowers_its_loss_with_legal_tokens(attacked, generator):
    table, legal, loss_of = attacked
    attack = au.Attack("token", 30, 0.05, 2)
    steps = list(au.token_attack(table, legal, 4, loss_of, attack, generator))
    ids = torch.stack([ids for ids, _ in steps])
    assert ids.shape == (30, 4, 2) and torch.isin(ids, legal).all()

    def random_loss():
        tokens = legal[torch.randint(len(legal), (4, 2), generator=generator)]
        return loss_of(table[tokens])

    random = torch.stack([random_loss() for _ in range(20)])
    assert loss_of(table[ids[-1]]).mean() < random.mean()


def test_token_attack_follows_its_gradient_to_the_legal_token_that_lowers_the_loss(generator):
    cost = torch.tensor([-9.0, 2.0, -1.0, 1.0, 3.0, -9.0])  # the first and the last are not legal
    attack = au.Attack("token", 40, 0.05, 3)
    *_, (ids, _) = au.token_attack(torch.eye(6), torch.arange(1, 5), 8,
                                   lambda delta, step: (delta @ cost).sum(1), attack, generator)
    assert (ids == 2).all()


def test_token_attack_draws_each_token_as_often_as_its_distribution_says(generator):
    """With a rate of nearly 0 p stays what it was: the frequencies of many draws are p."""
    drawn = []
    run = au.token_attack(torch.eye(5), torch.arange(5), 2, lambda delta, step: drawn.append(
        delta.detach().round()) or delta.sum((1, 2)), au.Attack("token", 4000, 1e-12, 1), generator)
    list(run)
    p = torch.rand((2, 1, 5), generator=torch.Generator().manual_seed(0))
    p = au.project_simplex(p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(torch.stack(drawn).mean(0), p, atol=0.03, rtol=0)


def test_token_attack_keeps_its_distributions_on_the_simplex(attacked, generator, monkeypatch):
    table, legal, loss_of = attacked
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda adam: seen.append(
        adam.param_groups[0]["params"][0].detach().clone()) or step(adam))
    list(au.token_attack(table, legal, 4, loss_of, au.Attack("token", 4, 0.1, 2), generator))
    for p in seen:
        torch.testing.assert_close(p.sum(-1), torch.ones(4, 2))
        assert p.min() >= 0
    assert not torch.equal(seen[0], seen[-1])


def test_legal_tokens_are_their_own_text(sd):
    legal = au.legal_tokens(sd.tokenizer)
    assert len(legal) > 100 and not set(legal.tolist()) & set(sd.tokenizer.all_special_ids)
    for i in legal[::17].tolist():
        assert sd.tokenizer(sd.tokenizer.decode([i])).input_ids[1:-1] == [i]


def test_attacks_leave_the_model_alone(sd, attacked, generator):
    before = [p.clone() for p in sd.text_encoder.parameters()]
    table, legal, loss_of = attacked
    list(au.embedding_attack(table, legal[:4, None], loss_of, au.Attack("embedding", 2, 0.1, 1)))
    list(au.token_attack(table, legal, 4, loss_of, au.Attack("token", 2, 0.1, 1), generator))
    pairs = zip(sd.text_encoder.parameters(), before)
    assert all(torch.equal(a, b) and a.grad is None for a, b in pairs)


@pytest.fixture(scope="session")
def other_tokenizer(sd):
    """The toy with a padding token of its own, "!" as in Stable Diffusion 2; context 17."""
    folder = sd.folder / "tokenizer"
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!")
    encoder = replace(sd, tokenizer=tokenizer, text_encoder=copy.copy(sd.text_encoder))
    encoder.text_encoder.config = {**sd.text_encoder.config, "max_position_embeddings": 17}
    return encoder


@pytest.mark.parametrize("model", ["sd", "other_tokenizer"])
@pytest.mark.parametrize("seed", range(30))
def test_any_prompt_and_prefix_keep_start_end_and_length(request, model, seed):
    """The start stays first; the prefix follows, then the prompt as it was, with its end.

    This holds for prompts of any characters. What does not fit is refused, never cut.
    """
    sd, rng = request.getfixturevalue(model), random.Random(seed)
    alphabet = ["church", "a", " ", "é", "⛪", "中", "ש", "<|endoftext|>", "\u200d", "'s", "12", "*"]
    prompt = "".join(rng.choices(alphabet, k=rng.randrange(0, 12)))
    k = rng.randrange(1, 9)
    ids = sd.tokenizer(prompt).input_ids
    if len(ids) + k > sd.context_length:
        with pytest.raises(ValueError, match="exceeds"):
            au.tokenize_with_room(sd, [prompt], k)
        return
    padded = au.tokenize_with_room(sd, [prompt], k)
    [row] = au.insert_prefix(padded, torch.full((1, k), -1)).tolist()
    assert len(row) == sd.context_length and row[0] == sd.tokenizer.bos_token_id
    assert row[1 : 1 + k] == [-1] * k and row[1 + k : k + len(ids)] == ids[1:]
    assert set(row[k + len(ids) :]) <= {sd.tokenizer.pad_token_id}


# --- the attacks of the evaluation, by what they show to `look`

@pytest.fixture
def looked(sd):
    """attack(kind, flags) -> what each look was shown; a prompt shows the concept where told."""
    def attack(kind, breaks=(), **changes):
        config = replace(au.Config(), eval_prefix=2, eval_attack_steps=6, eval_looks=3, **changes)
        looks = []

        def look(step, left, context, texts):
            looks.append((step, list(left), texts))
            return [(step, i) in breaks for i in left]

        pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        au.METHOD.attacks[kind].search(sd, ["a church", "a boat", "a tree"], pictures, look, config)
        return looks
    return attack


@pytest.mark.parametrize("kind, k", [("token", 2), ("random", 2), ("longer", 5)])
def test_tokens_in_front_are_legal_text_as_long_as_asked(sd, looked, kind, k):
    legal = set(au.legal_tokens(sd.tokenizer).tolist())
    looks = looked(kind)
    assert [step for step, _, _ in looks] == [2, 4, 6]
    for _, _, texts in looks:
        for text, prompt in zip(texts, ["a church", "a boat", "a tree"]):
            prefix = text.removesuffix(" " + prompt)
            ids = sd.tokenizer(prefix).input_ids[1:-1]
            assert text.endswith(" " + prompt) and len(ids) <= k and set(ids) <= legal


def test_the_control_tries_new_tokens_at_each_look_and_searches_nothing(sd, looked, monkeypatch):
    def searched(*arguments):
        raise AssertionError("a loss was computed")

    monkeypatch.setattr(au, "ddpm_loss", searched)
    texts = [text for _, _, texts in looked("random") for text in texts]
    assert len(set(texts)) == 9 and looked("random") == looked("random")
    assert looked("random") != looked("random", seed=1)


@pytest.mark.parametrize("kind", ["token", "random", "embedding"])
def test_who_shows_the_concept_is_attacked_no_more(looked, kind):
    looks = looked(kind, breaks={(2, 1), (4, 0)})
    assert [left for _, left, _ in looks] == [[0, 1, 2], [0, 2], [2]]
    assert len(looked(kind, breaks={(2, 0), (2, 1), (2, 2)})) == 1


def test_each_row_of_the_inner_attack_keeps_its_prompt(sd, generator, monkeypatch):
    """c* belongs to one c: new latents at each step, but of the row's own prompt, with its ids."""
    config = replace(au.Config(), trajectories=4, trajectory_steps=4, attack_steps=5, prefix=2)
    prompts, real, seen = ["a church", "a photo of a church", "a boat"], au.encode_with_prefix, []
    monkeypatch.setattr(au, "encode_with_prefix", lambda sd, ids, delta: seen.append(
        sd.tokenizer.batch_decode(ids, skip_special_tokens=True)) or real(sd, ids, delta))
    z, *others = au.trajectory_bank(sd, prompts, config)(4, generator, 6)
    delta, loss = au.adversarial_prefix(
        sd, sd.tokenize(prompts), others, au.training_attack(config), generator)
    assert seen == [[prompts[i] for i in z.prompt]] * 5 and len({*seen[0]}) > 1
    assert len({tuple(z.t.tolist()) for z in others}) > 1  # new latents
    assert delta.shape == (4, 2, sd.text_encoder.config["hidden_size"]) and loss > 0


@pytest.mark.parametrize("source", ["trajectory_bank", "sample_afresh"])
def test_the_draws_of_an_iteration_are_of_the_same_prompts_and_of_all_time_steps(sd, source):
    config = replace(au.Config(), trajectories=4, trajectory_steps=2)
    draw = getattr(au, source)(sd, ["a church", "a boat"], config)
    drawn = [draw(2, torch.Generator().manual_seed(seed), 3) for seed in range(6)]
    assert all(len(latents) == 3 for latents in drawn)
    assert all(torch.equal(z.prompt, latents[0].prompt) for latents in drawn for z in latents)
    assert {t for latents in drawn for z in latents for t in z.t.tolist()} == {501, 1}
    assert {i for latents in drawn for i in latents[0].prompt.tolist()} == {0, 1}
