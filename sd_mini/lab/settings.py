"""The settings of every run, the command line made of them, and what a method hands over."""
import argparse
import math
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, get_args, get_type_hints

GROUPS = ("first", "method", "attack", "retain", "evaluation", "run")  # of --help


def setting(default, help, choices=None, low=-math.inf, high=math.inf, group="method"):
    """A field of the settings that is a flag too. A field without it is no flag."""
    allowed = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"help": help, "group": group, **allowed})


first, retain, evaluation, run = (
    partial(setting, group=group) for group in ("first", "retain", "evaluation", "run"))


@dataclass
class Settings:
    """The settings of every run. A method's own settings are a dataclass derived from this one."""

    concept: str = first("church", "what to erase; several with commas")
    task: str = first("train", "train: erase, then evaluate; evaluate: score --text-encoder; "
                      "compare: the rows of a comparison; sample: draw --prompts",
                      ("train", "evaluate", "compare", "sample"))
    model: str | None = first(None, "toy, toy-dusk, folder, .safetensors file, or ID@REVISION "
                              "(default: CompVis/stable-diffusion-v1-4 with CUDA, else toy)")
    text_encoder: str | None = first(None, "folder or ID@REVISION:SUBFOLDER (default: the model's)")
    prompts: tuple[str, ...] = first((), "what --task sample draws (default: none)")
    methods: tuple[str, ...] = first((), "rows of --task compare, by name (default: all)")
    out: str | None = first(None, "folder for what a run leaves (default: runs/CONCEPT or similar)")
    resume: bool = first(False, "go on with the run that was begun in the folder")
    overwrite: bool = first(False, "start anew where the folder holds a run")
    seed: int = first(0, "seed of everything random", low=0, high=2**31 - 1)
    device: str | None = first(None, "cpu or cuda (default: cuda where there is one)")
    classifier: str | None = first(None, "MODEL:LABEL: an image classifier or CLIP, a folder or "
                                   "MODEL@REVISION of the hub, and its name for the concept; none: "
                                   "evaluate nothing (default: the concept's; the toy's own)")

    retain_set: str = retain("coco", "coco, imagenet, photos, toy, or a CSV file of your own")
    retain_unfiltered: bool = False  # keep the retain prompts that name the concept

    eval_attacks: tuple[str, ...] = evaluation((), "attacks in evaluation (default: all)")
    eval_set: str | None = evaluation(None, "prompts to attack (default: prompts/CONCEPT.csv)")
    eval_prompts: int = evaluation(50, "prompts of the concept to attack; at most as many of "
                                   "paraphrases, neighbours and styles", low=1)
    eval_utility: int = evaluation(60, "held-out prompts without the concept, for utility", low=2)
    eval_steps: int = evaluation(50, "DDIM steps of the pictures", low=1, high=500)
    eval_guidance: float | None = evaluation(None, "guidance of the pictures (default: what their "
                                             "prompt's file says, else 7.5)", low=1, high=100)
    eval_batch: int = evaluation(5, "prompts attacked, and pictures drawn, at a time", low=1)
    eval_prefix: int = evaluation(3, "k, tokens of the prefix in evaluation", low=1)
    eval_attack_steps: int = evaluation(180, "steps of each attack in evaluation", low=1)
    eval_looks: int = evaluation(3, "pictures that an attack draws, evenly over its steps", low=1)
    eval_lr: float = evaluation(0.01, "Adam's (AdamW's) rate in these attacks", low=1e-10, high=10)
    clip_score: str | None = evaluation(None, "the CLIP of the score, a folder or hub id; or none "
                                        "(default: openai/clip-vit-base-patch32; the toy's own)")
    save_images: str | None = evaluation(None, "folder for every picture (default: none)")

    tokenizer: str | None = run(None, "where a single file's tokenizer is (default: v1.4's)")
    precision: str | None = run(None, "of the networks that are not trained (default: bf16 on a "
                                "GPU that has it, fp16 on others)", ("fp32", "bf16", "fp16"))
    compile: bool = run(False, "compile the frozen UNet, which takes minutes at first")
    low_memory: bool = run(False, "compute the UNet's activations again in the backward pass")
    save_every: int = run(100, "iterations between checkpoints", low=1)
    save_pipeline: bool = run(False, "write the whole erased model too, as OUT/pipeline")
    save_single_file: bool = run(False, "write it as one file, OUT/model.safetensors")

    def check(self, given):
        """ValueError where settings do not go together. given: {setting: value} of the flags."""
        for name, tasks in ONLY_FOR.items():
            if name in given and self.task not in tasks:
                raise ValueError(f"{flag_of(name)}: is for --task {' and '.join(tasks)}")
        needed = {"evaluate": "text_encoder", "sample": "prompts"}.get(self.task)
        if needed and not getattr(self, needed):
            raise ValueError(f"--task {self.task}: give {flag_of(needed)}")
        if self.task != "train" and self.classifier == "none":
            raise ValueError("--classifier none: is for --task train")
        if self.resume and self.overwrite:
            raise ValueError("--resume --overwrite: the one goes on with a run, the other starts "
                             "anew")


ONLY_FOR = {  # setting -> the tasks that take it; --task compare has all attacks
    "text_encoder": ("evaluate", "sample"), "prompts": ("sample",), "methods": ("compare",),
    **dict.fromkeys(("eval_attacks", "save_images", "save_pipeline", "save_single_file"),
                    ("train", "evaluate"))}

# How every run on the toy departs from the defaults: it draws small pictures in a few steps.
TOY = dict(retain_set="toy", eval_prompts=24, eval_steps=12, eval_guidance=4.0,
           eval_attack_steps=100, eval_looks=4, eval_prefix=5, eval_batch=25)


def is_toy(model):
    """Is this the toy, embedded or trained anew? Its folder has a classifier of its own."""
    return model in ("toy", "toy-dusk") or (Path(model) / "classifier/config.json").is_file()


class EvalAttack(NamedTuple):
    """An attack of the evaluation."""

    search: Callable  # (sd, prompts, pictures, look, config): see evaluation.attack_prompts
    room: Callable = lambda config: 0  # how many tokens it puts in front of a prompt
    together: bool = False  # search learns from all prompts at once: see evaluation.invert_concepts


class Method(NamedTuple):
    """What the lab is handed. Below, `config` is one of this class `config`."""

    config: type  # a dataclass derived from `Settings`
    # (sd_o, erase prompts, retain prompts, config, folder) -> (sd, history): the erased model, with
    # the original's parts where they were not trained, and a dict of losses for each iteration
    train: Callable
    attacks: dict = {}  # {name: EvalAttack}
    # (sd_o, concepts, config) -> the rows of --task compare: {name: what it changes in the config,
    # or None for the original model}
    rows: Callable = lambda *arguments: {"original": None, "own": {}}
    toy: dict = {}  # what the method changes in its config on the toy
    concepts: dict = {}  # {name: what it changes for this concept}; the toy's settings come first
    # (sd_o, erase prompts, retain prompts, config): ValueError for what would fail after hours
    check: Callable = lambda *arguments: None


# --- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and exit status 2."""
        self.exit(2, f"error: {message}\n")


def flag_of(name):
    return "--" + name.replace("_", "-")


def parse(Config, argv=None):
    """Command line -> {setting: value} of the flags given. A wrong one ends the process."""
    parser = Parser(description="Defaults of the training are as published; the toy has its own.",
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    hints = get_type_hints(Config)
    for f in fields(Config):
        if not f.metadata:
            continue
        group, flag, help = groups[f.metadata["group"]], flag_of(f.name), f.metadata["help"]
        help += "" if "(default: " in help else f" (default: {f.default})"
        kinds = get_args(hints[f.name]) or (hints[f.name],)  # of `float | None`, tuple[str, ...]
        if bool in kinds:
            group.add_argument(flag, action="store_true", help=help)
        else:
            kind = next(kind for kind in (int, float, str) if kind in kinds)
            if kind is not str:
                kind = within(kind, f.metadata["low"], f.metadata["high"])
            many = "+" if isinstance(f.default, tuple) else None
            choices = f.metadata["choices"]
            group.add_argument(flag, type=kind, nargs=many, help=help, choices=choices)
    return vars(parser.parse_args(argv))


def within(kind, low, high):
    """int or float -> the same for argparse, which refuses what is not between low and high."""
    def number(text):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high}")
        return value
    return number
