"""What things cost. The tables of costs in sd_mini/lab/README.md come from here.

    python -m tests.bench                       all rows, some twenty minutes on two cores
    python -m tests.bench iteration sampling    some rows

A row that compares gives a ratio; both sides are measured in one run. A UNet evaluation is one
picture through the UNet once. A backward through frozen weights is 1.07 of them. The rows at Stable
Diffusion's own size need CUDA. They need no download: random weights cost what trained ones cost.
"""
import argparse
import gc
import math
import platform
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import advunlearn as au
import sd_mini
from sd_mini.lab.runs import progress
from sd_mini.weights import PARTS

ROOT = Path(au.__file__).parent
PAPER = au.Config(model="toy", device="cpu", layers=0)  # published, on the toy's weights
ITERATION = replace(PAPER, steps=1, warmup=0)  # with its attack
AT_FULL_SIZE = replace(ITERATION, layers=1, trajectories=4, eval_batch=4)
ERASE, RETAIN = ["church"], ["a photo of a house", "a photo of a boat"]

V1 = {  # CompVis/stable-diffusion-v1-4, where it departs from diffusers' and CLIP's defaults
    "unet": dict(sample_size=64, cross_attention_dim=768),
    "vae": dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
}
# A backward in forwards, through frozen weights: counted on the UNet of v1.4, 0.88 TFLOP and 0.82.
BACKWARD = 1.07


# --- UNet evaluations: a count, and the same in closed form

@dataclass
class Counted(sd_mini.StableDiffusion):
    """A model that notes its UNet evaluations, in forward equivalents.

    A picture counts 1, and BACKWARD more where a backward follows, of weights in training too.
    """

    work: list = field(default_factory=list)

    def predict_noise(self, x_t, t, context):
        eps = super().predict_noise(x_t, t, context)
        self.work.append(len(eps) * (1 + BACKWARD * eps.requires_grad))
        return eps


def counted(sd):
    return Counted(**vars(sd))


def schedule(config, prompts=(1, 243)):
    """UNet evaluations of training. `prompts`: how many there are to erase and to retain.

    Each latent in a loss costs a forward and a backward. With gamma 0 a retain latent has no
    backward. What is sampled comes on top, each step of it guided. The bank is sampled once, as
    many runs for each prompt. Afresh, each latent is a run up to a step drawn evenly.
    """
    attacked = 0 if config.attack == "none" else config.steps - config.warmup
    erase = (attacked * config.attack_steps + config.steps) * config.erase_batch
    retain = config.steps * config.retain_batch
    step = 1 + BACKWARD
    trained = step * erase + (step if config.retain_weight else 1) * retain
    if config.fresh_trajectories:
        return trained + (erase + retain) * (config.trajectory_steps + 1)
    return trained + 2 * config.trajectory_steps * sum(
        n * math.ceil(config.trajectories / n) for n in prompts)


def evaluation_work(config, related=20):
    """UNet evaluations of evaluating one model, where no attack breaks anything.

    Each attack has steps, forward and backward (the random one has none), and looks. `related`: for
    Stable Diffusion church has 8 paraphrases and 12 neighbours.
    """
    drawn = 2 * config.eval_steps * (config.eval_prompts + config.eval_utility + related)
    looks = 2 * config.eval_steps * config.eval_looks
    steps = (1 + BACKWARD) * config.eval_attack_steps
    searching = sum(kind != "random" for kind in config.eval_attacks)
    attacked = len(config.eval_attacks) * looks + searching * steps
    return drawn + config.eval_prompts * attacked


# --- times

def iterations(sd, config):
    """Run the outer loop -> (seconds, UNet evaluations).

    The seconds are without the bank's sampling, since a run pays for it once. The evaluations are
    those of everything. As in a run, an encoder in fp32 uses the tensor cores where the others are
    in half precision.
    """
    exact = sd.dtype == torch.float32
    torch.set_float32_matmul_precision("highest" if exact else "high")
    sd, source, begun = counted(sd), au.trajectory_bank, [time.time()]

    def timed(*arguments):
        draw = source(*arguments)
        begun.append(time.time())
        return draw

    au.trajectory_bank = timed
    try:
        au.advunlearn(sd, ERASE, RETAIN, config)
    finally:
        au.trajectory_bank = source
    return time.time() - begun[-1], sum(sd.work)


def seconds(run):
    begin = time.time()
    run()
    return time.time() - begin


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def in_turns(one, other, repeats=5):
    """Measure two in turns, by functions that give seconds -> the row's text."""
    times = [(one(), other()) for _ in progress(range(repeats + 1), "in turns")]
    ours, theirs = zip(*times[1:])  # the first, which may compile, does not count
    ratio = statistics.median(theirs) / statistics.median(ours)
    return f"{spread(ours)} s against {spread(theirs)} s: {ratio:.3g} times less"


def bank_against_fresh(sd, config):
    fresh = replace(config, fresh_trajectories=True)
    return in_turns(lambda: iterations(sd, config)[0], lambda: iterations(sd, fresh)[0])


def v1():
    """Stable Diffusion 1 with random weights and the toy's tokenizer; its text encoder in fp32."""
    with torch.device("cuda"):
        parts = {part: PARTS[part][0](config).requires_grad_(False).bfloat16()
                 for part, config in V1.items()}
    parts["text_encoder"].float()
    return replace(sd_mini.load("toy"), **parts, precision=torch.bfloat16)


# --- the rows: what a function's docstring says -> (what was measured, the goal)

def evaluations():
    """A default run, against the published schedule, UNet evaluations."""
    ours, published = schedule(PAPER), schedule(replace(PAPER, fresh_trajectories=True))
    text = f"{ours:,.0f} against {published:,.0f}: {published / ours:.1f} times fewer"
    return text, "12 times fewer"


def evaluation():
    """Evaluating an encoder, 50 prompts, default attacks, if none succeeds, against training it,
    UNet evaluations
    """
    ours, training = evaluation_work(PAPER), schedule(PAPER)
    text = f"{ours:,.0f} against {training:,.0f}: {ours / training:.2f} times as many"
    return text, "1 times as many"


def iteration():
    """Seconds an iteration (toy, the paper's schedule), with the bank and afresh."""
    return bank_against_fresh(sd_mini.load("toy"), ITERATION), "12 times less"


def sampling():
    """Seconds to draw 8 pictures in 20 steps, against diffusers."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sd, folder = sd_mini.load("toy"), sd_mini.weights.TOY
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline = pipeline.to(torch.float32)  # its files are in fp16
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = ["a photo of a church"] * 8, list(range(8))
    text = in_turns(
        lambda: seconds(lambda: sd.sample(prompts, seed=seeds, steps=20)),
        lambda: seconds(lambda: pipeline(prompts, latents=sd.initial_noise(seeds), output_type="pt",
                                         num_inference_steps=20)))
    return text, "1 times less"


def v1_iteration():
    """Seconds an iteration at full size on the GPU in bf16, with the bank and afresh."""
    return bank_against_fresh(v1(), AT_FULL_SIZE), "20 times less"


def v1_memory():
    """Most GPU memory held at full size in bf16, retain batch 5, and with --low-memory; a run's
    bank of 243 retain prompts takes 2.4 GB more without it
    """
    peaks = []
    for low_memory in (False, True):
        sd = None  # the one before
        gc.collect()
        torch.cuda.empty_cache()
        sd = v1()
        if low_memory:
            sd_mini.recompute_activations(sd.unet)
        torch.cuda.reset_peak_memory_stats()
        iterations(sd, replace(PAPER, steps=2, warmup=1, layers=1, low_memory=low_memory))
        peaks.append(torch.cuda.max_memory_reserved() / 2**30)
    return "{:.1f} and {:.1f} GiB".format(*peaks), "12 and 8 GiB"


ROWS = {row.__name__: row for row in (
    evaluations, evaluation, iteration, sampling, v1_iteration, v1_memory)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], default=[])
    names = parser.parse_args().rows or list(ROWS)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}; median (least to most)\n\n"
          "| what | measured | goal |\n| --- | --- | --- |", flush=True)
    for name in names:
        can = torch.cuda.is_available() or not name.startswith("v1_")
        measured, goal = ROWS[name]() if can else ("no GPU here", "")
        what = " ".join(ROWS[name].__doc__.split()).rstrip(".")
        print(f"| {what} | {measured} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
