"""From prompt to picture, on the toy: each row has its own prompt, seed, guidance and t."""
import copy
import inspect
from dataclasses import replace

import pytest
import torch

from sd_mini.schedule import Schedule

from .reference import SCHEDULER, V2, close

PROMPTS = ["a boat", "a red house", "a tree in the snow"]
SEEDS, GUIDANCE = [1, 7, 2], [1.0, 4.0, 7.5]


def test_a_picture_depends_on_its_own_prompt_seed_and_guidance_alone(sd):
    pictures = sd.sample(PROMPTS, SEEDS, 3, GUIDANCE)
    assert pictures.shape == (3, 3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
    assert len(pictures.unique(dim=0)) == 3
    for picture, prompt, seed, guidance in zip(pictures, PROMPTS, SEEDS, GUIDANCE):
        alone = sd.sample(context=sd.encode_prompt([prompt]), seed=seed, steps=3, guidance=guidance)
        torch.testing.assert_close(alone[0], picture, rtol=0, atol=1e-4)
    one_for_all = sd.sample(PROMPTS[:2], 7, 3, 4.0)
    torch.testing.assert_close(one_for_all[1], pictures[1], rtol=0, atol=1e-4)
    defaults = inspect.signature(sd.sample).parameters
    assert [defaults[name].default for name in ("seed", "steps", "guidance")] == [0, 50, 7.5]


def test_each_step_is_a_guided_ddim_step_from_noise_by_each_rows_seed(sd):
    """Of two rows with guidance 1, where the empty prompt has no say, and 5; of 500 time steps."""
    sd = replace(sd, schedule=Schedule({**SCHEDULER, "num_train_timesteps": 500}))
    context, x_T = sd.encode_prompt(PROMPTS[:2]), sd.initial_noise(SEEDS[:2])
    own = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in SEEDS[:2]]
    assert torch.equal(x_T, torch.stack(own))
    run = list(sd.denoise(x_T, context, 3, [1.0, 5.0]))
    assert [t for t, *_ in run] == [333, 167, 1, 0] and run[-1][2:] == (None, None)
    assert torch.equal(run[0][1], x_T)
    for (t, x_t, eps_c, eps_empty), (_, following, _, _) in zip(run, run[1:]):
        close(eps_c, sd.predict_noise(x_t, t, context))
        close(eps_empty, sd.predict_noise(x_t, t, sd.encode_prompt(["", ""])))
        for row, guidance in enumerate((1, 5)):
            eps = eps_empty[row] + guidance * (eps_c[row] - eps_empty[row])
            close(following[row], sd.schedule.ddim_step(x_t[row], eps, t, t - 166))


def test_rows_are_predicted_at_their_own_t_and_v_becomes_eps(sd, generator):
    x_t, t = torch.randn(3, *sd.latent_shape, generator=generator), torch.tensor([10, 500, 900])
    context, a = sd.encode_prompt(PROMPTS), sd.schedule.alpha_bar[t].view(3, 1, 1, 1)
    out = sd.predict_noise(x_t, t, context)
    for row in range(3):
        for one in (int(t[row]), t[row]):
            close(out[row:][:1], sd.predict_noise(x_t[row:][:1], one, context[row:][:1]))
    of_v = replace(sd, schedule=Schedule(V2["scheduler"]))
    close(of_v.predict_noise(x_t, t, context), a.sqrt() * out + (1 - a).sqrt() * x_t)


@pytest.mark.parametrize("length, context", [(20, 20), (40, 24)])
def test_of_tokenizer_and_text_encoder_the_shorter_counts(sd, length, context):
    tokenizer = copy.deepcopy(sd.tokenizer)
    tokenizer.model_max_length = length
    short = replace(sd, tokenizer=tokenizer)
    ids = short.tokenize(["a church", "church " * 40])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    church = tokenizer("church").input_ids[1]
    assert ids[0].tolist() == [start, *tokenizer("a church").input_ids[1:3]] + [end] * (context - 3)
    assert ids[1].tolist() == [start] + [church] * (context - 2) + [end]
    assert torch.equal(short.encode_prompt(["a church"]), short.encode_tokens(ids[:1]))
