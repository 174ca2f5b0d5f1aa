"""What things cost, as ratios of two sides measured in one run: these are the README's tables.

    python -m tests.bench              all rows, some twenty minutes on two cores
    python -m tests.bench help toy     some rows

A UNet evaluation is one picture through the UNet once; a backward counts as two more.
"""
import argparse
import copy
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import advunlearn as au
import sd_mini

ROOT = Path(au.__file__).parent
PAPER = au.Config(model="toy", device="cpu", layers=0, retain_weight=0.5)  # the paper's schedule, on the toy's weights


def schedule(config, prompts=(1, 80)):
    """UNet evaluations of training, in closed form, for so many prompts to erase and to retain. With the bank, trajectories
    for both are sampled once, at least one a prompt:

        (trajectories + trajectories) * trajectory_steps * 2    +    each step, 3 a latent

    Afresh, each latent drawn costs a guided run up to a step drawn evenly, 2 * (trajectory_steps + 1) / 2 on average.
    """
    attacks = 0 if config.attack == "none" else (config.steps - config.warmup) * config.attack_steps
    drawn = (attacks + config.steps) * config.erase_batch + config.steps * config.retain_batch
    if config.fresh_trajectories:
        return drawn * (3 + config.trajectory_steps + 1)
    return drawn * 3 + 2 * config.trajectory_steps * sum(max(config.trajectories, n) for n in prompts)


def examination(config, related=20):
    """UNet evaluations of scoring one model, in closed form, where no attack breaks anything: pictures of the concept's, the
    utility and the related prompts (church has 8 paraphrases and 12 neighbours); each attack's steps, 3 a prompt; its looks."""
    drawn = 2 * config.eval_steps * (config.eval_prompts + config.eval_utility + related)
    attack = config.eval_prompts * (3 * config.eval_attack_steps + 2 * config.eval_steps * config.eval_looks)
    return drawn + len(config.eval_attacks) * attack


def iterations(sd, config):
    """Run the outer loop -> seconds without the bank's sampling, which is paid once, UNet evaluations of everything."""
    erased, times = replace(sd, text_encoder=copy.deepcopy(sd.text_encoder)), []
    counted = au.count_evaluations(sd)
    source = au.trajectory_bank
    au.trajectory_bank = lambda *a, **k: (source(*a, **k), times.append(time.time()))[0]
    begin = time.time()
    try:
        au.advunlearn(erased, sd, ["church"], ["a photo of a house", "a photo of a boat"], config)
    finally:
        au.trajectory_bank = source
    return time.time() - (times[-1] if times else begin), counted[0]


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def bench_evaluations():
    """A default run, against the published schedule."""
    ours, published = schedule(PAPER), schedule(replace(PAPER, fresh_trajectories=True))
    return f"{ours:,} against {published:,.0f}: {published / ours:.1f} times fewer", "12 times fewer"


def bench_examination():
    """Evaluating one encoder, 50 prompts, both attacks, if none succeeds, against training it, UNet evaluations"""
    ours, training = examination(PAPER), schedule(PAPER)
    return f"{ours:,} against {training:,}: {ours / training:.2f} times as many", "1 times as many"


def bench_iteration(repeats=5):
    """Seconds an iteration, with the bank and afresh."""
    sd, one = sd_mini.load("toy"), replace(PAPER, steps=1, warmup=0)
    bank, fresh = zip(*((iterations(sd, one)[0], iterations(sd, replace(one, fresh_trajectories=True))[0]) for _ in tqdm(range(repeats), "iteration")))
    return (f"{spread(bank)} s against {spread(fresh)} s: {statistics.median(fresh) / statistics.median(bank):.1f} times less", "12 times less")


def bench_sampling(repeats=5, prompts=8, steps=20):
    """Drawing pictures, against diffusers."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sd, folder = sd_mini.load("toy"), sd_mini.weights.TOY
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)  # its files are in fp16
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    texts, seeds = ["a photo of a church"] * prompts, list(range(prompts))
    ours, theirs = [], []
    for _ in tqdm(range(repeats + 1), "sampling"):
        begin = time.time()
        sd.sample(texts, seed=seeds, steps=steps)
        middle = time.time()
        pipeline(texts, latents=sd.initial_noise(seeds), num_inference_steps=steps, output_type="pt")
        ours.append(middle - begin), theirs.append(time.time() - middle)
    ours, theirs = ours[1:], theirs[1:]  # the first warms up
    return f"{spread(ours)} s against {spread(theirs)} s: {statistics.median(theirs) / statistics.median(ours):.2f} times as fast", "1 times as fast"


def bench_toy():
    """The README's first command, evaluation included; and how its time is shared."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        subprocess.run([sys.executable, "advunlearn.py", "--concept", "church", "--device", "cpu", "--model", "toy", "--out", folder + "/run"],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        took, results = time.time() - begin, sd_mini.read_json(Path(folder) / "run/results.json")
    training = 60 * results["results"]["erased"]["minutes"]
    return f"{took:.0f} s, of which training {training:.0f} s", "180 s"


def bench_help(repeats=5):
    """python advunlearn.py --help"""
    def once():
        begin = time.time()
        subprocess.run([sys.executable, "advunlearn.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.time() - begin
    return f"{spread([once() for _ in range(repeats)])} s", "0.5 s"


ROWS = {name.removeprefix("bench_"): function for name, function in list(globals().items()) if name.startswith("bench_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], default=[])
    rows = parser.parse_args().rows or list(ROWS)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; "
          "median (least to most)\n\n| what | measured | goal |\n| --- | --- | --- |", flush=True)
    for name in rows:
        measured, goal = ROWS[name]()
        print(f"| {ROWS[name].__doc__.splitlines()[0].rstrip('.')} | {measured} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
