"""Wrong versions of the code, and the test that must catch each.

    python -m tests.mutants             all of them, which takes minutes
    python -m tests.mutants inversion   those whose description has this word

Each is made in a copy of the project, one at a time. A line says whether its test failed, as it
must. Exit status 1 if more than 2 pass.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE, MAY_PASS = 2, 2
A, E, P = "advunlearn.py", "sd_mini/lab/evaluation.py", "sd_mini/lab/prompts.py"
C, J = "sd_mini/lab/compare.py", "sd_mini/lab/classifiers.py"  # J: the judges
S, D = "sd_mini/schedule.py", "sd_mini/pipeline.py"  # D: Stable Diffusion itself
H = "sd_mini/half.py"

# Tests, as in "paper/loop::test_name" or a file alone.
LOSSES = GAMMA = "paper/loop::test_each_iteration_is_the_algorithms"
TOGETHER = LOOKS = ("paper/evaluation::"
                    "test_prompt_picture_noise_and_prefix_stay_together_when_rows_drop_out")
RANDOM = "paper/evaluation::test_each_row_and_step_has_a_t_and_a_noise_of_its_own_by_the_seed"
DRAWN = CLIPS = (
    "paper/attack::test_p_descends_by_adamw_and_projection_on_the_gradient_at_tokens_drawn")
INNER = "paper/attack::test_each_row_is_attacked_at_its_own_prompt_and_at_each_steps_latents"
DESCENDS = "paper/attack::test_embeddings_descend_by_each_steps_gradient_alone"
HANDED = "paper/attack::test_the_attack_of_the_config"
BANK = "paper/latents::test_the_bank_has_as_many_runs_of_each_prompt_and_draws_any_of_them"
INVERTED = "paper/evaluation::test_the_inversion_learns_one_embedding_from_each_prompts_picture"
ROWS = "paper/settings::test_each_row_of_the_comparison_changes_what_its_name_says"
RATES, OWN = (f"figures::{name}" for name in (
    "test_rates_count_what_they_say", "test_each_picture_has_its_own_seed_guidance_and_context"))

MUTANTS = [  # (what is wrong, file, text that stands there once, wrong text, test)
    # --- training
    ("ddpm loss: squares the sum instead of the difference", A,
     "(a.float() - b.float()).square()", "(a.float() + b.float()).square()", "paper/losses"),
    ("ddpm loss: without noise in the picture", A,
     "    x_t = sd.schedule.add_noise(x_0, noise, t)\n", "    x_t = x_0\n", "paper/losses"),
    ("erase loss: pulls towards the concept", A,
     "return eps_empty - eta * (eps_c - eps_empty)", "return eps_empty + eta * (eps_c - eps_empty)",
     "paper/losses"),
    ("erase loss: the target is the concept itself", A,
     "target = esd_target(z.eps_c, z.eps_empty, config.eta)", "target = z.eps_c", LOSSES),
    ("erase loss: the target is the empty prompt alone", A,
     "target = esd_target(z.eps_c, z.eps_empty, config.eta)", "target = z.eps_empty", LOSSES),
    ("erase loss: eta has no effect", A,
     "target = esd_target(z.eps_c, z.eps_empty, config.eta)",
     "target = esd_target(z.eps_c, z.eps_empty, 1.0)", LOSSES),
    ("erase loss: the prefix found is not used", A,
     "                context = encode_with_prefix(sd, ids[z.prompt], delta)\n\n",
     "                context = sd.encode(ids[z.prompt])\n\n", LOSSES),
    ("erase loss: the prefix is in front of another prompt", A,
     "                context = encode_with_prefix(sd, ids[z.prompt], delta)\n\n",
     "                context = encode_with_prefix(sd, ids[1 - z.prompt], delta)\n\n", LOSSES),
    ("inner attack: aims at the empty prompt", A,
     "return attack_loss(sd, z.x_t, z.t, context, z.eps_c)",
     "return attack_loss(sd, z.x_t, z.t, context, z.eps_empty)", INNER),
    ("inner attack: runs from the target", A,
     "return attack_loss(sd, z.x_t, z.t, context, z.eps_c)",
     "return -attack_loss(sd, z.x_t, z.t, context, z.eps_c)", INNER),
    ("inner attack: latents of any prompt", A,
     "sampled = bank[prompt, run, step]",
     "sampled = bank[prompt[torch.randint(n, (times, n))], run, step]", BANK),
    ("inner attack: gives the first prefix, not the last", A,
     "loss_of, attack):\n            pass\n    return delta, losses",
     "loss_of, attack):\n            break\n    return delta, losses", INNER),
    ("inner attack: a prefix one token longer", A,
     "lr, config.prefix, config.attack_radius)", "lr, config.prefix + 1, None)", HANDED),
    ("inner attack: the radius has no effect", A,
     "lr, config.prefix, config.attack_radius)", "lr, config.prefix)", HANDED),
    ("inner attack: the radius bounds the value, not the move", A,
     "delta.clamp_(delta_0 - attack.radius, delta_0 + attack.radius)",
     "delta.clamp_(-attack.radius, attack.radius)", DESCENDS),
    ("inner attack: starts at tokens that are not legal", A,
     "start = random_tokens(sd, (n, attack.k), generator)",
     "start = torch.full((n, attack.k), sd.tokenizer.eos_token_id)", INNER),
    ("inner attack: one token for the whole prefix to start from", A,
     "start = random_tokens(sd, (n, attack.k), generator)",
     "start = random_tokens(sd, (n, 1), generator).expand(n, attack.k)", INNER),
    ("inner attack: gradients pile up", A,
     "delta.grad = torch.autograd.grad(losses.sum(), delta)[0]", "losses.sum().backward()",
     DESCENDS),
    ("inner attack: the fast step climbs", A,
     "delta -= attack.lr * delta.grad.sign()", "delta += attack.lr * delta.grad.sign()", DESCENDS),
    ("inner attack: the fast step forgets the number of steps", A,
     "steps, lr = 1, steps * lr", "steps = 1", HANDED),
    ("inner attack: the fast one loops", A,
     "steps, lr = 1, steps * lr", "lr = steps * lr", HANDED),
    ("inner attack: gives the prefix from before its last step", A,
     "for delta, losses in embedding_attack(table, start, loss_of, attack):",
     "for delta, losses in [*embedding_attack(table, start, loss_of, attack)][:-1]:", INNER),
    ("inner attack: of tokens with the rate of embeddings", A,
     "lr = config.token_lr  #", "lr = config.attack_lr  #", HANDED),
    ("token attack: the loss sees the soft mixture", A,
     "loss_of(hard + (soft - soft.detach()), step)", "loss_of(soft, step)", DRAWN),
    ("token attack: the likeliest token instead of a draw", A,
     "drawn = (p.detach().cumsum(-1) < u).sum(-1)",
     "drawn = p.detach().argmax(-1)", "paper/attack"),
    ("token attack: gives the tokens drawn, not the likeliest", A,
     "yield legal[p.argmax(-1)], losses.detach()",
     "yield legal[drawn], losses.detach()", DRAWN),
    ("token attack: no gradient passes", A,
     "loss_of(hard + (soft - soft.detach()), step)", "loss_of(hard + 0 * soft, step)", DRAWN),
    ("token attack: clips the gradient", A, "p.grad = torch.autograd.grad(losses.sum(), p)[0]",
     "p.grad = torch.autograd.grad(losses.sum(), p)[0].clamp(-1, 1)", CLIPS),
    ("token attack: starts with p uniform", A,
     "p = torch.rand((n, attack.k, len(legal)), generator=generator)",
     "p = torch.ones((n, attack.k, len(legal)))", CLIPS),
    ("token attack: the decay is added to the gradient", A,
     "torch.optim.AdamW([p], lr=", "torch.optim.Adam([p], lr=", DRAWN),
    ("token attack: does not project onto the simplex", A,
     "            p.copy_(project_simplex(p))\n", "            p.clamp_(min=0)\n", DRAWN),
    ("projection onto the simplex: one coordinate too many", A,
     "(u > taus).sum(-1, keepdim=True) - 1", "(u > taus).sum(-1, keepdim=True)",
     "paper/attack"),
    ("prefix: behind the prompt's first token", A,
     "cat([tokens[:, :1], delta, tokens[:, 1 :", "cat([tokens[:, :2], delta, tokens[:, 2 :",
     "paper/attack"),
    ("legal tokens: all of them", A,
     "if text.isprintable() and tokens == [i]])", "if text.isprintable()])", "paper/attack"),
    ("room for the prefix: one token too many", A,
     "if length + k > sd.context_length:", "if length + k > sd.context_length + 1:",
     "paper/attack"),
    ("bank: the seed has no effect", A,
     "first_seed = 1_000_000 * (config.seed + 1)", "first_seed = 1_000_000", BANK),
    ("bank: the evaluation's seeds", A,
     "first_seed = 1_000_000 * (config.seed + 1)", "first_seed = 100 * config.seed", BANK),
    ("bank: without guidance", A, "steps, guidance=3.0)", "steps, guidance=1.0)",
     "paper/latents"),
    ("bank: guidance of pictures", A, "steps, guidance=3.0)", "steps, guidance=7.5)",
     "paper/latents"),
    ("bank: eps_c and eps_empty are swapped", A,
     "sampled = bank[prompt, run, step]", "sampled = bank[prompt, run, step][:, :, [0, 2, 1]]",
     BANK),
    ("bank: only the first half of each run", A,
     "step = torch.randint(len(grid), (times, n)",
     "step = torch.randint(len(grid) // 2, (times, n)",
     BANK),
    ("bank: t is above the noise level", A, "grid[step].to(", "(39 + grid[step]).to(",
     BANK),
    ("bank: drawn from without replacement", A,
     "prompt = torch.randint(len(prompts), (n,), generator=generator)\n        run",
     "prompt = torch.randperm(len(prompts), generator=generator)[:n]\n        run",
     BANK),
    ("fresh trajectories: of the model in training", A,
     "draw_erase = source(sd_o, erase", "draw_erase = source(sd, erase",
     LOSSES),
    ("training: gamma has no effect", A, "(l_erase + config.retain_weight * l_retain).backward()",
     "(l_erase + l_retain).backward()", GAMMA),
    ("training: without the retain loss", A,
     "(l_erase + config.retain_weight * l_retain).backward()", "l_erase.backward()", GAMMA),
    ("retain loss: keeps what the empty prompt gives", A,
     "context_r, z_r.eps_c).mean()", "context_r, z_r.eps_empty).mean()", LOSSES),
    ("layers: the last instead of the first", A,
     "list(layers[: config.layers or None].parameters())",
     "list(layers[-config.layers :].parameters())",
     "paper/loop::test_layers_are_the_first_by_index"),
    ("layers: by the beginning of their names", A,
     "list(layers[: config.layers or None].parameters())",
     "[p for i, layer in enumerate(layers) if str(i).startswith(tuple(map(str, range("
     "config.layers or 99)))) for p in layer.parameters()]",
     "paper/loop::test_layers_are_the_first_by_index"),
    ("training: a copy of the whole model", A,
     "sd = replace(sd_o, **{part: copy.deepcopy(getattr(sd_o, part)).float()})",
     "sd = replace(sd_o, **{name: copy.deepcopy(getattr(sd_o, name)) for name in "
     "('text_encoder', 'unet', 'vae')})",
     "paper/loop::test_that_is_trained_in_float32_and_nothing_else"),
    ("training: changes the original model", A,
     "copy.deepcopy(getattr(sd_o, part)).float()", "getattr(sd_o, part)",
     "paper/loop::test_that_is_trained_in_float32_and_nothing_else"),
    # --- attacks of the evaluation
    ("evaluation attack: aims at the next row's picture", A,
     "    x_0 = sd.vae.encode(2 * pictures - 1)\n",
     "    x_0 = sd.vae.encode(2 * pictures - 1).roll(1, 0)\n", TOGETHER),
    ("evaluation attack: pictures are not brought to [-1, 1]", A,
     "x_0 = sd.vae.encode(2 * pictures - 1)", "x_0 = sd.vae.encode(pictures)", TOGETHER),
    ("evaluation attack: pictures of the first rows once some drop out", A,
     "ddpm_loss(sd, x_0[left]", "ddpm_loss(sd, x_0[: len(left)]", TOGETHER),
    ("evaluation attack: noise of the first rows once some drop out", A,
     "noise[step, left], context)", "noise[step, : len(left)], context)", TOGETHER),
    ("evaluation attack: prefixes of the first rows once some drop out", A,
     "ids[left], delta[left])", "ids[left], delta[: len(left)])", TOGETHER),
    ("evaluation attack: prompts of the first rows once some drop out", A,
     "ids[left], delta[left])", "ids[: len(left)], delta[left])", TOGETHER),
    ("evaluation attack: t below 500 only", A,
     "t = torch.randint(len(sd.schedule.alpha_bar), (steps, len(x_0)), generator=generator)",
     "t = torch.randint(500, (steps, len(x_0)), generator=generator)", RANDOM),
    ("evaluation attack: its seed has no effect", A,
     "    generator = torch.Generator().manual_seed(config.seed)\n    ids = tokenize_with_room",
     "    generator = torch.Generator().manual_seed(0)\n    ids = tokenize_with_room", RANDOM),
    ("evaluation attack: the token attack shows embeddings", A,
     "            context = sd.encode_prompt(texts)\n",
     "            table = sd.text_encoder.embeddings.token_embedding.weight\n"
     "            context = encode_with_prefix(sd, ids[left], table[prefix[left]])\n", LOOKS),
    ("evaluation attack: its text lacks the prompt", A,
     'texts = [f"{front} {prompts[i]}" for front', "texts = [front for front", LOOKS),
    ("evaluation attack: texts of other prompts once some drop out", A,
     "for front, i in zip(words, indices)]", "for i, front in enumerate(words)]", LOOKS),
    ("evaluation attack: those that show the concept are kept, the others dropped", A,
     "left = left[~shows]", "left = left[shows]",
     TOGETHER),
    ("inversion: v one place too far left", A, 'input_ids[1])[..., None]',
     'input_ids[1])[..., None].roll(-1, 1)', INVERTED),
    ("inversion: another prompt's picture", A,
     "ddpm_loss(sd, x_0[now]", "ddpm_loss(sd, x_0[now - 1]", INVERTED),
    ("inversion: learns from the first pictures alone", A,
     "chosen = torch.randint(len(prompts), (steps, n), generator=generator)",
     "chosen = torch.arange(n).expand(steps, n)", INVERTED),
    ("inversion: learnt from every concept's first pictures", E,
     'evaluation_set.original["rows"][own], config)',
     'evaluation_set.original["rows"][: len(own)], config)',
     "compare::test_each_concept_is_inverted_by_an_embedding_of_its_own"),
    # --- figures
    ("targets of an attack: the first rows'", E, 'targets = evaluation_set.original["rows"][which]',
     'targets = evaluation_set.original["rows"][: len(which)]', RATES),
    ("an attack's record is its first look", E,
     '            records[i] = {"broken": flag,',
     '            records[i] = records[i] or {"broken": flag,', RATES),
    ("ASR: without prompts that show the concept anyway", E,
     'flags = [d["without_attack"] or d["broken"] for', 'flags = [d.get("broken", False) for',
     RATES),
    ("ASR: over the attacked prompts alone", E, 'for d in details[kind]]\n        figures[',
     'for d in details[kind] if not d["without_attack"]]\n        figures[', RATES),
    ("ASR: attacks prompts that show the concept", E,
     'enumerate(details["rows"]) if not detail["shown"]]',
     'enumerate(details["rows"]) if detail["shown"]]', RATES),
    ("rates: counts labels that the judge does not know", E,
     'for d in details[part] if known is None or d["label"] in known]', "for d in details[part]]",
     RATES),
    ("rates: any row's label counts", E, "return [row.label in names for names, row in",
     "return [any(r.label in names for r in rows) for names, row in", RATES),
    ("rates: another row's picture", E, "(evaluation_set.classifier, pictures, rows))",
     "(evaluation_set.classifier, pictures.flip(0), rows))", RATES),
    ("parts: pictures of one part count for another", E, "for part in PARTS]\n    return",
     "for part in sorted(PARTS)]\n    return", RATES),
    ("Wilson interval: without the term of n", E, "z2 / (4 * n * n))", "0)", "figures"),
    ("CLIP score: of other prompts", E, "prompts = [row.prompt for row in evaluation_set.utility]",
     "prompts = [row.prompt for row in evaluation_set.rows]", RATES),
    ("CLIP score: of other pictures", E, 'evaluation_set.clip_score(prompts, drawn["utility"])',
     'evaluation_set.clip_score(prompts, evaluation_set.original["utility"])', RATES),
    ("Frechet distance: of the model to itself", E,
     'features(evaluation_set.original["utility"])', 'features(drawn["utility"])', RATES),
    ("Frechet distance: of the concept's pictures", E, 'features(drawn["utility"]))',
     'features(drawn["rows"]))', RATES),
    ("pictures: one seed for a batch", E, "seed=[row.seed for row in batch]",
     "seed=[batch[0].seed for row in batch]", OWN),
    ("pictures: each batch has the first contexts", E,
     "c = context[i : i + config.eval_batch]", "c = context[: len(batch)]", OWN),
    # --- judges
    ("Frechet distance: adds the product of covariances", J, "s_b.trace() - 2 * product)",
     "s_b.trace() + 2 * product)", "compare::test_frechet_distance_is_the_closed_form"),
    ("Frechet distance: without the means", J, "(mean + s_a.trace()", "(0 * mean + s_a.trace()",
     "compare::test_frechet_distance_is_the_closed_form"),
    ("judge: pictures are not normalised", J, "return (x - mean.to(x)) / std.to(x)",
     "return x", "compare::test_preparation_resizes_crops_and_normalises"),
    ("judge: the least likely text", J,
     "likeliest = (self.features(pictures) @ self.texts.T).argmax(-1)",
     "likeliest = (self.features(pictures) @ self.texts.T).argmin(-1)",
     "compare::test_classifiers_of_the_hub"),
    ("judge: a comma does not part two names", J, 'for name in label.split(",")}',
     'for name in [label]}', "compare::test_classifiers_of_the_hub"),
    ("toy CLIP score: of the prompt's start, not its end", J, "end = ids.argmax(-1)  #",
     "end = ids.argmin(-1)  #", "compare::test_toy_clip_score_prefers_the_right_prompt"),
    # --- comparison
    ("comparison: pooled rates are the mean of percentages, over too few", C,
     'n = sum(cell["n"] for cell in cells)', 'n = cells[0]["n"]',
     "compare::test_pooled_seeds_keep_the_counts"),
    ("comparison: shows prompts that need no attack", C,
     'if not d["without_attack"] and d["broken"]]', 'if d["without_attack"] or d["broken"]]',
     "compare::test_the_comparisons_picture_shows_what_the_attack_breaks_in_the_first_row"),
    ("comparison: naive AT has a retain loss", A,
     '"naive AT": dict(retain_weight=0.0),', '"naive AT": {},', ROWS),
    ("comparison: fast AT is the ordinary one", A,
     '"AdvUnlearn, fast AT": dict(attack="fast")', '"AdvUnlearn, fast AT": {}', ROWS),
    ("comparison: ESD with the learning rate of AdvUnlearn", A,
     '"no_cross_attention", lr=config.esd[0])', '"no_cross_attention", lr=config.lr)', ROWS),
    # --- prompts
    ("prompts: the retain set keeps the concept", P, "zip(prompts, named) if not names]",
     "zip(prompts, named)]", "run::test_retain_set_loses_prompts_that_name_the_concept"),
    ("prompts: a prompt that does not fit is kept", P, "if length > room:", "if length > room + 1:",
     "prompts::test_room_for_the_prefix_is_counted_to_the_token"),
    ("prompts: guidance is taken from the seed", P,
     'record.text("guidance") or "7.5"', 'record.text("seed") or "7.5"',
     "prompts::test_columns_go_by_all_their_names"),
    # --- diffusion
    ("schedule: beta is linear, not the square of a line", S,
     "torch.linspace(lo**0.5, hi**0.5, steps, dtype=torch.float32) ** 2",
     "torch.linspace(lo, hi, steps, dtype=torch.float32)",
     "sd/schedule::test_alpha_bar_is_the_running_product"),
    ("schedule: noise without its square root", S, "(1 - alpha_bar).sqrt() * noise",
     "(1 - alpha_bar) * noise", "sd/schedule::test_each_row_has_the_noise_of_its_own_t"),
    ("schedule: DDIM keeps the noise of t", S, "prev.sqrt() * x_0 + (1 - prev).sqrt() * eps",
     "prev.sqrt() * x_0 + (1 - now).sqrt() * eps",
     "sd/schedule::test_ddim_step_with_the_true_noise_moves_along_the_forward_process"),
    ("schedule: ends at alpha_bar 1", S,
     'torch.ones(1) if config["set_alpha_to_one"] else self.alpha_bar[:1]',
     "torch.ones(1)", "sd/schedule::test_below_0_is_the_clean_picture"),
    ("schedule: time steps without their offset", S,
     "[i * (total // steps) + offset for i", "[i * (total // steps) for i",
     "sd/schedule::test_timesteps_are_those_of_stable_diffusion"),
    ("schedule: v is taken with the wrong sign", S,
     "alpha_bar.sqrt() * v + (1 - alpha_bar)", "alpha_bar.sqrt() * -v + (1 - alpha_bar)",
     "sd/schedule::test_each_row_has_the_noise_of_its_own_t"),
    ("guidance: from the concept instead of the empty prompt", S,
     "return eps_empty + guidance * (eps_c - eps_empty)",
     "return eps_c + guidance * (eps_c - eps_empty)",
     "sd/pipeline::test_each_step_is_a_guided_ddim_step"),
    ("pipeline: eps_c and eps_empty are swapped", D,
     "both = torch.cat([context, self.encode_prompt([\"\"]).expand_as(context)])",
     "both = torch.cat([self.encode_prompt([\"\"]).expand_as(context), context])",
     "paper/latents::test_a_run_is_ddim_under_guidance_3"),
    ("pipeline: pictures are not brought to [0, 1]", D, "(self.vae.decode(z) / 2 + 0.5)",
     "self.vae.decode(z)", "sd/pipeline::test_the_vaes_range_from_minus_1_to_1_becomes_0_to_1"),
    # --- half precision and CUDA graphs
    ("inner attack: reads its loss at each step", A, "        losses = loss_of(delta, step)\n",
     "        losses = loss_of(delta, step)\n        losses.sum().item()\n",
     "paper/waits"),
    ("training: reads each loss by itself", A, "history.append(read(erase=l_erase,",
     "l_erase.item(), history.append(read(erase=l_erase,",
     "paper/waits"),
]


def node(test):
    file, _, function = test.partition("::")
    room, _, name = file.rpartition("/")
    return str(Path("tests", room, f"test_{name}.py")) + (f"::{function}" if function else "")


def caught(folder, file, text, wrong, test):
    """Does the test fail in the copy `folder`, with that one change? It is taken back after."""
    path = folder / file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(text, wrong), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", node(test)],
            cwd=folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"})
    finally:
        path.write_text(right, encoding="utf-8")
    if done.returncode not in (0, 1):  # no test ran: not caught, but mistaken
        raise RuntimeError(f"{node(test)} did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main(word=""):
    """-> the exit status."""
    chosen = [mutant for mutant in MUTANTS if word in mutant[0]]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(AT_ONCE) as threads:
        folders = Queue()
        for i in range(AT_ONCE):
            leave_out = shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache")
            folders.put(shutil.copytree(ROOT, Path(root) / str(i), ignore=leave_out))

        def try_one(mutant):
            folder = folders.get()
            try:
                return caught(folder, *mutant[1:])
            finally:
                folders.put(folder)

        passed = []
        for mutant, found in zip(chosen, threads.map(try_one, chosen)):
            print(f"{'caught' if found else 'PASSED'}  {Path(mutant[1]).name:14} {mutant[0]}",
                  flush=True)
            passed += [] if found else [mutant[0]]
    print(f"{len(chosen)} wrong versions, {len(chosen) - len(passed)} caught, {len(passed)} passed")
    return int(len(passed) > MAY_PASS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
