"""What things cost. The tables of costs in sd_mini/lab/README.md come from here.

    python -m tests.bench              all rows, some twenty minutes on two cores
    python -m tests.bench toy          some rows

A row that compares gives a ratio; both sides are measured in one run. A UNet evaluation is one
picture through the UNet once. A backward through frozen weights is 1.07 of them. The rows at Stable
Diffusion's own size need CUDA. They need no download: random weights cost what trained ones cost.
"""
import argparse
import copy
import gc
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import advunlearn as au
import sd_mini
from sd_mini.lab.runs import progress
from sd_mini.weights import PARTS

ROOT = Path(au.__file__).parent
GPU = "cuda" if torch.cuda.is_available() else None
PAPER = au.Config(model="toy", device="cpu", layers=0)  # the paper's schedule, on the toy's weights

ERASE, RETAIN = ["church"], ["a photo of a house", "a photo of a boat"]

V1 = {  # the configs of CompVis/stable-diffusion-v1-4
    "unet": dict(
        in_channels=4,
        out_channels=4,
        sample_size=64,
        layers_per_block=2,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "vae": dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ),
    "text_encoder": dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    ),
}


# A backward in forwards, through frozen weights: counted on the UNet of v1.4, 0.88 TFLOP and 0.82.
BACKWARD = 1.07


@dataclass
class Counted(sd_mini.StableDiffusion):
    """A model that notes its UNet evaluations, in forward equivalents.

    A picture counts 1, and BACKWARD more where a backward follows. (That of weights in training,
    which is about twice as much, counts no more.)
    """

    work: list = field(default_factory=list)

    def predict_noise(self, x_t, t, context):
        eps = super().predict_noise(x_t, t, context)
        self.work.append(len(eps) * (1 + BACKWARD * eps.requires_grad))
        return eps


def counted(sd):
    return Counted(**vars(sd))


def schedule(config, prompts=(1, 243)):
    """UNet evaluations of training, in closed form.

    `prompts`: how many there are to erase and to retain. `plain_share` is taken for 0.

    Each latent in a loss costs a forward and a backward. With gamma 0 a retain latent has no
    backward. What is sampled comes on top. With the bank there are trajectories for both kinds of
    prompts. They are sampled once, as many for each prompt:

        (trajectories + trajectories) * trajectory_steps * 2

    Afresh, each latent drawn costs a guided run up to a step drawn evenly. On average that is

        2 * (trajectory_steps + 1) / 2
    """
    attacked = 0 if config.attack == "none" else config.steps - config.warmup
    attacks = attacked * config.attack_steps
    erase = (attacks + config.steps) * config.erase_batch
    retain = config.steps * config.retain_batch
    step = 1 + BACKWARD
    trained = step * erase + (step if config.retain_weight else 1) * retain
    if config.fresh_trajectories:
        return trained + (erase + retain) * (config.trajectory_steps + 1)
    return trained + 2 * config.trajectory_steps * sum(
        n * math.ceil(config.trajectories / n) for n in prompts)


def evaluation_work(config, related=20):
    """UNet evaluations of evaluating one model, in closed form, where no attack breaks anything.

    They are those of the pictures (of the concept's, the utility and the related prompts), of each
    attack's steps, forward and backward (the random one has none), and of its looks. `related`: for
    Stable Diffusion church has 8 paraphrases and 12 neighbours.
    """
    drawn = 2 * config.eval_steps * (config.eval_prompts + config.eval_utility + related)
    looks = 2 * config.eval_steps * config.eval_looks
    steps = (1 + BACKWARD) * config.eval_attack_steps
    searching = sum(kind != "random" for kind in config.eval_attacks)
    attacked = len(config.eval_attacks) * looks + searching * steps
    return drawn + config.eval_prompts * attacked


def iterations(sd, config):
    """Run the outer loop -> (seconds, UNet evaluations).

    The seconds are without the bank's sampling, since a run pays for it once. The evaluations are
    those of everything.
    """
    sd, times = counted(sd), []
    source = au.trajectory_bank

    def timed(*arguments, **keywords):
        draw = source(*arguments, **keywords)
        times.append(time.time())
        return draw

    au.trajectory_bank = timed
    begin = time.time()
    try:
        au.advunlearn(sd, ERASE, RETAIN, config)
    finally:
        au.trajectory_bank = source
    return time.time() - (times[-1] if times else begin), sum(sd.work)


def v1(dtype):
    """Stable Diffusion 1 with random weights and the toy's tokenizer; its text encoder in fp32.

    As in a run, that uses the tensor cores where the others are in half precision.
    """
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    with torch.device(GPU):
        parts = {part: PARTS[part][0](config).requires_grad_(False).to(dtype)
                 for part, config in V1.items()}
    parts["text_encoder"].float()
    return replace(sd_mini.load("toy"), **parts, precision=dtype)


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


# --- the rows: a docstring says what is measured, and is printed

def bench_evaluations():
    """A default run, against the published schedule."""
    ours, published = schedule(PAPER), schedule(replace(PAPER, fresh_trajectories=True))
    measured = f"{ours:,.0f} against {published:,.0f}: {published / ours:.1f} times fewer"
    return measured, "12 times fewer"


def bench_evaluation():
    """Evaluating an encoder, 50 prompts, default attacks, if none succeeds, against training it,
    UNet evaluations
    """
    ours, training = evaluation_work(PAPER), schedule(PAPER)
    ratio = f"{ours / training:.2f} times as many"
    return f"{ours:,.0f} against {training:,.0f}: {ratio}", "1 times as many"


def bank_against_fresh(ours, published, config, repeats):
    """Time an iteration, of `ours` with the bank and of `published` afresh -> the row's text."""
    anew, bank, fresh = replace(config, fresh_trajectories=True), [], []
    for _ in progress(range(repeats), "iteration"):
        bank.append(iterations(ours, config)[0])
        fresh.append(iterations(published, anew)[0])
    ratio = statistics.median(fresh) / statistics.median(bank)
    return f"{spread(bank)} s against {spread(fresh)} s: {ratio:.1f} times less"


def bench_iteration(repeats=5):
    """Seconds an iteration, with the bank and afresh."""
    sd = sd_mini.load("toy")
    return bank_against_fresh(sd, sd, replace(PAPER, steps=1, warmup=0), repeats), "12 times less"


def bench_limit(repeats=5):
    """Seconds an iteration (toy, the paper's schedule), against those that its FLOPs would take at
    the speed of a matrix product in the same precision
    """
    return against_limit(sd_mini.load("toy"), replace(PAPER, steps=1, warmup=0), repeats, 1024)


def against_limit(sd, config, repeats, width):
    """Time an iteration and its FLOPs' worth of matrix products -> the row's text and goal."""
    small = replace(config, trajectories=1, trajectory_steps=1)
    with FlopCounterMode(display=False) as everything:
        iterations(sd, small)
    with FlopCounterMode(display=False) as banks:
        for prompts in (ERASE, RETAIN):
            au.trajectory_bank(sd, prompts, small)
    a = torch.randn(width, width, device=sd.device, dtype=sd.dtype)
    took, products = [], []
    for _ in progress(range(repeats), "iteration"):
        took.append(iterations(sd, config)[0])
        synchronize()
        begin = time.time()
        for _ in range(20):
            a @ a
        synchronize()
        products.append((time.time() - begin) / 20)
    flops = everything.get_total_flops() - banks.get_total_flops()
    limit = flops / (2 * width**3) * statistics.median(products)
    ratio = statistics.median(took) / limit
    text = f"{spread(took)} s against {limit:.3g} s for {flops / 1e12:.3g} TFLOP: {ratio:.1f} times"
    return text, "3 times, on a GPU"


def emptied():
    """Give back the memory of dropped models."""
    gc.collect()
    if GPU == "cuda":
        torch.cuda.empty_cache()


def synchronize():
    """Wait until the GPU has done what was launched."""
    if GPU == "cuda":
        torch.cuda.synchronize()


def full_size():
    return replace(PAPER, steps=1, warmup=0, layers=1, trajectories=4, eval_batch=4)


def bench_v1_iteration(repeats=5):
    """Seconds an iteration at full size on the GPU in bf16, with the bank and afresh."""
    if not GPU:
        return "no GPU here", "20 times less"
    sd = v1(torch.bfloat16)
    return bank_against_fresh(sd, sd, full_size(), repeats), "20 times less"


def bench_v1_limit(repeats=5):
    """Seconds an iteration at full size on the GPU in bf16, against its FLOPs' worth of matrix
    products
    """
    if not GPU:
        return "no GPU here", "3 times"
    return against_limit(v1(torch.bfloat16), full_size(), repeats, 8192 if GPU == "cuda" else 256)


def bench_v1_compile(repeats=5):
    """Seconds an iteration at full size on the GPU in bf16, with --compile and without."""
    if not GPU:
        return "no GPU here", "faster"
    sd = v1(torch.bfloat16)
    compiled = replace(sd, unet=copy.deepcopy(sd.unet))
    compiled.unet.compile()
    return side_by_side(compiled, sd, repeats), "faster"


def bench_v1_fp16(repeats=5):
    """Seconds an iteration at full size on the GPU, in fp16 and in fp32."""
    if not GPU:
        return "no GPU here", "faster"
    return side_by_side(v1(torch.float16), v1(torch.float32), repeats), "faster"


def side_by_side(one, other, repeats):
    """Time an iteration of two models in turns -> the row's text."""
    times = [], []
    for _ in progress(range(repeats + 1), "iteration"):
        for model, took in zip((one, other), times):
            exact = model.dtype == torch.float32
            torch.set_float32_matmul_precision("highest" if exact else "high")
            took.append(iterations(model, full_size())[0])
    times = [took[1:] for took in times]  # the first compiles
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    return f"{spread(times[0])} s against {spread(times[1])} s: {ratio:.1f} times less"


def bench_v1_run():
    """A whole run at full size on the GPU, random weights: 1,000 iterations, 50 prompts evaluated;
    and the most GPU memory held
    """
    if not GPU:
        return "no GPU here", "an hour, 12 GiB"
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        sd_mini.save_pipeline(v1(torch.bfloat16), f"{folder}/v1")
        names = dict(enumerate(["church", *(f"class {i}" for i in range(1, 1000))]))
        network = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(id2label=names, label2id={v: k for k, v in names.items()}))
        network.save_pretrained(f"{folder}/classifier")
        sd_mini.write_json(f"{folder}/classifier/preprocessor_config.json", {
            "size": {"shortest_edge": 224}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
        command = [sys.executable, "advunlearn.py", "--model", f"{folder}/v1", "--classifier",
                   f"{folder}/classifier:church", "--clip-score", "none", "--out", f"{folder}/run"]
        emptied()
        begin = time.time()
        said = subprocess.run([*command, "--device", GPU, *RUN_FLAGS], cwd=ROOT, check=True,
                              stdout=subprocess.PIPE, text=True).stdout
    memory = re.findall(r"[\d.]+ GiB", said)
    return f"{(time.time() - begin) / 60:.3g} minutes, {' '.join(memory)}", "an hour, 12 GiB"


RUN_FLAGS = []  # the defaults are the paper's


def bench_v1_memory():
    """Most GPU memory held at full size in bf16, retain batch 5, and with --low-memory; a run's
    bank of 243 retain prompts takes 2.4 GB more without it
    """
    goal, peaks = "12 and 8 GiB", []
    if not GPU:
        return "no GPU here", goal
    for low_memory in (False, True):
        sd = None
        emptied()
        sd = v1(torch.bfloat16)
        if low_memory:
            sd_mini.recompute_activations(sd.unet)
        torch.cuda.reset_peak_memory_stats()
        iterations(sd, replace(PAPER, steps=2, warmup=1, layers=1, low_memory=low_memory))
        peaks.append(torch.cuda.max_memory_reserved() / 2**30)
    return "{:.1f} and {:.1f} GiB".format(*peaks), goal


def bench_sampling(repeats=5, prompts=8, steps=20):
    """Drawing pictures, against diffusers."""
    try:
        from diffusers import DDIMScheduler, StableDiffusionPipeline
    except ImportError:
        return "diffusers is not installed", "1 times as fast"

    sd, folder = sd_mini.load("toy"), sd_mini.weights.TOY
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline = pipeline.to(torch.float32)  # its files are in fp16
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    texts, seeds = ["a photo of a church"] * prompts, list(range(prompts))
    ours, theirs = [], []
    for _ in progress(range(repeats + 1), "sampling"):
        begin = time.time()
        sd.sample(texts, seed=seeds, steps=steps)
        middle = time.time()
        pipeline(texts, latents=sd.initial_noise(seeds), num_inference_steps=steps,
                 output_type="pt")
        end = time.time()
        ours.append(middle - begin)
        theirs.append(end - middle)
    ours, theirs = ours[1:], theirs[1:]  # the first, which is slower, does not count
    ratio = statistics.median(theirs) / statistics.median(ours)
    measured = f"{spread(ours)} s against {spread(theirs)} s: {ratio:.2f} times as fast"
    return measured, "1 times as fast"


def bench_toy():
    """The README's first command, evaluation included; and how its time is shared."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "advunlearn.py", "--concept", "church", "--device", "cpu",
                   "--model", "toy", "--out", folder + "/run"]
        begin = time.time()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        took, results = time.time() - begin, sd_mini.read_json(Path(folder) / "run/results.json")
    training = 60 * results["results"]["erased"]["minutes"]
    return f"{took:.0f} s, of which training {training:.0f} s", "180 s"


ROWS = {name.removeprefix("bench_"): function
        for name, function in list(globals().items()) if name.startswith("bench_")}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], default=[])
    rows = parser.parse_args().rows or list(ROWS)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}; median (least to most)\n\n"
          "| what | measured | goal |\n| --- | --- | --- |", flush=True)
    for name in rows:
        measured, goal = ROWS[name]()
        what = " ".join(ROWS[name].__doc__.split()).rstrip(".")
        print(f"| {what} | {measured} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
