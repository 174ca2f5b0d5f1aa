"""The prefix, and the attacks that look for one."""
import copy
import random
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPTokenizer

import advunlearn as au

from . import PROMPTS, WIDTH, assert_independent, told

same = torch.equal


@pytest.fixture(scope="session")
def other_tokenizer(sd):
    """The toy with a padding token of its own, "!" as in Stable Diffusion 2; context 17."""
    folder = sd.folder / "tokenizer"
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!")
    encoder = replace(sd, tokenizer=tokenizer, text_encoder=copy.copy(sd.text_encoder))
    encoder.text_encoder.config = {**sd.text_encoder.config, "max_position_embeddings": 17}
    return encoder


@pytest.mark.parametrize("model", ["sd", "other_tokenizer"])
def test_any_prompt_and_prefix_keep_start_end_and_length(request, model):
    """The start stays first; the prefix follows, then the prompt as it was, with its end.

    This holds for prompts of any characters. What does not fit is refused, never cut: to the token,
    of which a word may have several.
    """
    sd, rng = request.getfixturevalue(model), random.Random(0)
    words = ["church", "a", " ", "é", "⛪", "中", "ש", "<|endoftext|>", "\u200d", "'s", "12", "*"]
    for length in range(40):
        prompt = "".join(rng.choices(words, k=length % 13))
        ids = sd.tokenizer(prompt).input_ids
        room = sd.context_length - len(ids)
        with pytest.raises(ValueError, match="exceeds"):
            au.tokenize_with_room(sd, ["", prompt], room + 1)
        for k in {1, room} if room > 0 else ():
            padded = au.tokenize_with_room(sd, ["", prompt], k)
            row = au.insert_prefix(padded, -torch.arange(1, 2 * k + 1).view(2, k))[1].tolist()
            assert len(row) == sd.context_length and row[0] == sd.tokenizer.bos_token_id
            assert row[1 : 1 + k] == [*range(-k - 1, -2 * k - 1, -1)]
            assert row[1 + k : k + len(ids)] == ids[1:]
            assert {*row[k + len(ids) :]} <= {sd.tokenizer.pad_token_id}


@pytest.mark.parametrize("kind", ["embedding", "fast"])
def test_embeddings_become_float32_and_gradients_go_nowhere_else(kind, generator):
    """A fast step ends at the radius too. In tests/coursework are the steps themselves."""
    table, theta = torch.randn(6, 3, generator=generator).half(), torch.ones(1, requires_grad=True)
    start, first = torch.tensor([[0, 5], [4, 1]]), table.float()
    [(delta, losses)] = au.embedding_attack(
        table.requires_grad_(), start, lambda delta, step: theta * delta.sum((1, 2)),
        au.Attack(kind, 1, 0.1, 2, radius=0.05))
    assert_close(delta, first[start] - 0.05)
    assert theta.grad is table.grad is None
    assert not delta.requires_grad and not losses.requires_grad


# --- tokens

class Stub:
    """A tokenizer of six tokens. Only two are printable and, typed, themselves."""

    all_special_ids = [0]
    again = {"<end>": [0], "church": [1], "\n": [2], "chur": [1], "boat": [4], "x y": [5, 1]}

    def __len__(self):
        return len(self.again)

    def __call__(self, texts, add_special_tokens=True):
        self.input_ids = [[9] * add_special_tokens + self.again[text] for text in texts]
        return self

    def batch_decode(self, rows):
        return [[*self.again][i] for [i] in rows]


def test_legal_tokens_are_those_that_survive_as_text(sd):
    assert au.legal_tokens(Stub()).tolist() == [1, 4]
    for i in au.legal_tokens(sd.tokenizer).tolist():
        assert sd.tokenizer(sd.tokenizer.decode([i])).input_ids[1:-1] == [i]


def test_p_descends_by_adamw_and_projection_on_the_gradient_at_tokens_drawn(stepped, monkeypatch,
                                                                           generator):
    """The gradient is that of p E, unclipped; what is yielded is likeliest after the step."""
    table, tried = torch.randn(9, 5, generator=generator), []
    legal, costs = torch.tensor([7, 2, 3, 8, 4, 0]), 5 * torch.randn(3, 5, generator=generator)
    theta = torch.ones(1, requires_grad=True)

    def loss_of(delta, step):
        tried.append(delta.detach())
        return theta * (delta @ costs[step]).sum(1)

    attack = au.Attack("token", 3, 0.01, 2)
    found = [*au.token_attack(table.half(), legal, 4, loss_of, attack, generator)]
    monkeypatch.undo()
    E = table[legal].half().float()
    p = stepped[0][0].clone().requires_grad_()
    assert_close(p.sum(-1), torch.ones(4, 2))
    assert p.min() >= 0 and p.std() > 0.05 and len(p.flatten(0, 1).unique(dim=0)) == 8
    adamw = torch.optim.AdamW([p], lr=0.01, weight_decay=0.1)
    for step, ((before, grad), (ids, losses)) in enumerate(zip(stepped, found, strict=True)):
        assert_close(before, p.detach())
        assert_close(grad, (E @ costs[step]).expand_as(p))
        assert (tried[step][..., None, :] == E).all(-1).any(-1).all()  # real tokens
        assert_close(losses, (tried[step] @ costs[step]).sum(1))
        p.grad = grad
        adamw.step()
        p.data = au.project_simplex(p.data)
        assert same(ids, legal[p.argmax(-1)])
    assert len(found) == 3 and theta.grad is None


def test_tokens_are_drawn_as_often_as_p_says_and_anew_at_each_place(stepped, generator):
    """With a rate of nearly 0 p stays what it was."""
    tried, attack = [], au.Attack("token", 600, 1e-12, 3)
    for _ in au.token_attack(torch.eye(12), torch.arange(12), 2, lambda delta, step: tried.append(
            delta.detach()) or delta.sum((1, 2)), attack, generator):
        pass
    tried = torch.stack(tried)
    assert_close(tried.mean(0), stepped[0][0], atol=0.05, rtol=0)
    draws = tried.argmax(-1) / 11
    assert_independent(draws.flatten(1).T.unflatten(1, (20, 30)))


def test_a_draw_beyond_the_sum_of_p_is_the_last_token(monkeypatch):
    """p may sum to a little less than 1."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 2.0))
    tried, attack = [], au.Attack("token", 1, 0.1, 1)
    [*au.token_attack(torch.eye(4), torch.tensor([3, 0, 1]), 1, lambda delta, step: tried.append(
        delta.argmax().item()) or delta.sum((1, 2)), attack, None)]
    assert tried == [1]


# --- the lower level

def test_squared_errors_are_in_float32():
    """Squares of what float16 holds are more than it holds."""
    large = torch.tensor([[300.0, 0.0]]).half()
    assert au.squared_error(large, -large).tolist() == [600.0**2 / 2]


@pytest.mark.parametrize("kind, asked", [
    ("embedding", (7, 0.1, 4, 0.3)), ("fast", (1, 7 * 0.1, 4, 0.3)), ("token", (7, 0.02, 4))])
def test_the_attack_of_the_config(kind, asked):
    """The fast one moves once, as far as all the steps that it stands for."""
    config = au.Config(attack=kind, attack_steps=7, attack_lr=0.1, token_lr=0.02, prefix=4,
                       attack_radius=0.3)
    attack = au.training_attack(config)
    assert (attack[0], attack[1:][: len(asked)]) == (kind, asked)


@pytest.mark.parametrize("kind", ["embedding", "token", "fast"])
def test_each_row_is_attacked_at_its_own_prompt_and_at_each_steps_latents(tiny, calls, kind,
                                                                         generator):
    """It aims at eps_c, begins at legal tokens, and gives the prefix after the last step."""
    n, k, steps = 4, 3, 1 if kind == "fast" else 3
    prompt, ids = torch.tensor([1, 0, 0, 1]), tiny.tokenize(PROMPTS[0])
    latents = [au.Latents(prompt, torch.randint(1000, (n,), generator=generator), *torch.randn(
        3, n, *tiny.latent_shape, generator=generator)) for _ in range(steps)]
    attack = au.Attack(kind, steps, 0.05, k, 0.2)
    search = "token_attack" if kind == "token" else "embedding_attack"
    real = getattr(au, search)
    calls(search, instead=lambda *given: [*real(*given)])
    seen = calls("attack_loss", "encode_with_prefix")
    delta, loss = au.adversarial_prefix(tiny, ids, latents, attack, generator)
    [(given, found)], losses = seen[search], seen["attack_loss"]
    table = tiny.text_encoder.embeddings.token_embedding.weight
    if kind == "token":
        tried, last = [given[2] for given, _ in seen["encode_with_prefix"]], table[found[-1][0]]
    else:
        tried, last = [table[given[1]], *(delta for delta, _ in found)], found[-1][0]
    assert len(losses) == steps and given[3 + (kind == "token")] == attack
    for z, prefix, ((model, x_t, t, context, target), _) in zip(latents, tried, losses):
        assert model is tiny and same(x_t, z.x_t) and same(t, z.t) and same(target, z.eps_c)
        assert_close(context, told(tiny, [PROMPTS[0][i] for i in prompt], prefix))
    assert_close(loss, (tiny.predict_noise(x_t, t, context) - target).square().mean())
    assert same(delta, last) and delta.shape == (n, k, WIDTH) and len(delta.unique(dim=0)) == n
    begun = (tried[0][..., None, :] == table[au.legal_tokens(tiny.tokenizer)]).all(-1)
    assert begun.any(-1).all() and len(begun.float().argmax(-1).unique()) > 8
