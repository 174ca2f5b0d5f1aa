"""The settings of every run, the command line made of them, and what a method hands over."""
from __future__ import annotations

import argparse
import difflib
import math
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, get_args, get_type_hints

GROUPS = {  # of --help: title -> purpose
    "first": "what most people need",
    "method": "what is trained, and how it erases",
    "attack": "the attack in training",
    "retain": "what holds the rest of the model where it was",
    "evaluation": "what is drawn, attacked and counted",
    "run": "where and how a run computes",
}


def setting(default, help, choices=None, low=-math.inf, high=math.inf, group="method"):
    """A field of the settings that is a flag too. A field without it is no flag."""
    allowed = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"help": help, "group": group, **allowed})


first, retain, evaluation, run = (
    partial(setting, group=group) for group in ("first", "retain", "evaluation", "run"))


@dataclass
class Settings:
    """The settings of every run. A method's own settings are a dataclass derived from this one.

    A field made by `setting` is a flag: `--eval-set` for `eval_set`. Values are checked before
    anything is loaded.
    """

    concept: str = first("church", "what to erase; several with commas")
    task: str = first("train", "train: erase, then evaluate; evaluate: score --text-encoder; "
                      "compare: the rows of the paper's tables; sample: draw --prompts",
                      ("train", "evaluate", "compare", "sample"))
    model: str | None = first(None, "toy, toy-dusk, a diffusers folder, a .safetensors file or a "
                              "hub id, ID@REVISION (default: CompVis/stable-diffusion-v1-4 with "
                              "CUDA, toy without)")
    text_encoder: str | None = first(None, "a folder, or ID@REVISION:SUBFOLDER of the hub "
                                     "(default: the model's own)")
    prompts: tuple[str, ...] = first((), "what --task sample draws")
    methods: tuple[str, ...] = first((), "rows of --task compare, by number or name (default: all)")
    out: str | None = first(None, "folder for what a run leaves (default: runs/CONCEPT or similar)")
    resume: bool = first(False, "go on with the run that was begun in the folder")
    overwrite: bool = first(False, "start anew where the folder holds a run")
    seed: int = first(0, "seed of everything random", low=0, high=2**31 - 1)
    device: str | None = first(None, "cpu or cuda (default: cuda where there is one)")
    classifier: str | None = first(None, "MODEL:LABEL: what says what a picture shows (an image "
                                   "classifier or CLIP, a folder or MODEL@REVISION of the hub), "
                                   "and its name for the concept; none: erase, and evaluate "
                                   "nothing (default: the concept's; the toy's own)")

    retain_set: str = retain("coco", "prompts/retain_NAME.csv (coco, imagenet, photos, toy), or a "
                             "CSV file of your own")
    retain_unfiltered: bool = False  # keep the retain prompts that name the concept

    eval_attacks: tuple[str, ...] = evaluation((), "attacks in evaluation (default: all)")
    eval_set: str | None = evaluation(None, "CSV of the prompts to attack (default: "
                                      "prompts/CONCEPT.csv, or from templates)")
    eval_prompts: int = evaluation(50, "prompts of the concept to attack; at most as many of "
                                   "paraphrases, neighbours and styles", low=1)
    eval_utility: int = evaluation(60, "held-out prompts without the concept, for utility", low=2)
    eval_steps: int = evaluation(50, "DDIM steps of the pictures", low=1, high=500)
    eval_guidance: float | None = evaluation(None, "guidance of the pictures (default: what their "
                                             "prompt's file says, else 7.5)", low=1, high=100)
    eval_batch: int = evaluation(5, "prompts attacked, and pictures drawn, at a time", low=1)
    eval_prefix: int = evaluation(3, "k, tokens of the prefix in evaluation", low=1)
    eval_attack_steps: int = evaluation(180, "steps of each attack in evaluation", low=1)
    eval_looks: int = evaluation(3, "pictures drawn per attacked prompt, evenly over these steps; "
                                 "the first that shows the concept ends the attack", low=1)
    eval_lr: float = evaluation(0.01, "Adam's learning rate of these attacks", low=1e-10, high=10)
    clip_score: str | None = evaluation(None, "the CLIP of the score, a folder or hub id; or none "
                                        "(default: openai/clip-vit-base-patch32; the toy's own)")
    save_images: str | None = evaluation(None, "folder for every picture, its prompt and seed in "
                                         "the name")

    tokenizer: str | None = run(None, "folder or hub id with tokenizer and configs for a single "
                                "file (default: v1.4's)")
    precision: str | None = run(None, "of the networks that are not trained; what is trained stays "
                                "in fp32 (default: bf16 on a GPU that has it, fp16 on others)",
                                ("fp32", "bf16", "fp16"))
    compile: bool = run(False, "compile the frozen UNet with torch.compile: minutes at first, "
                        "then fewer and larger kernels")
    low_memory: bool = run(False, "compute the UNet's activations again in the backward pass")
    save_every: int = run(100, "iterations between checkpoints", low=1)
    save_pipeline: bool = run(False, "write the whole erased model too, as OUT/pipeline")
    save_single_file: bool = run(False, "write it as one file of the original layout, "
                                 "OUT/model.safetensors, for web interfaces")

    def check(self, given):
        """ValueError where settings do not go together. given: {setting: value} of the flags."""
        task = self.task
        for wrong, message in (
                (self.eval_looks > self.eval_attack_steps,
                 f"--eval-looks {self.eval_looks}: must be at most --eval-attack-steps, "
                 f"{self.eval_attack_steps}"),
                (self.resume and self.overwrite,
                 "--resume --overwrite: the one goes on with a run, the other starts anew"),
                (task == "evaluate" and not self.text_encoder,
                 "--task evaluate: give --text-encoder"),
                (task in ("train", "compare") and self.text_encoder,
                 "--text-encoder: is for --task evaluate and sample"),
                (task in ("compare", "sample")
                 and (self.save_images or self.save_pipeline or self.save_single_file),
                 "--save-images, --save-pipeline, --save-single-file: are for --task train and "
                 "evaluate"),
                (task == "sample" and not self.prompts, "--task sample: give --prompts"),
                (task != "sample" and self.prompts, "--prompts: is for --task sample"),
                (task != "compare" and self.methods, "--methods: is for --task compare"),
                (task != "train" and self.classifier == "none",
                 "--classifier none: is for --task train"),
                (task == "compare" and "eval_attacks" in given,
                 "--task compare: sets --eval-attacks itself: all that there are")):
            if wrong:
                raise ValueError(message)


# How every run on the toy departs from the defaults: it draws small pictures in a few steps.
TOY = dict(retain_set="toy", eval_prompts=24, eval_steps=12, eval_guidance=4.0,
           eval_attack_steps=100, eval_looks=4, eval_prefix=5, eval_batch=25)


def is_toy(model):
    """Is this the toy, embedded or trained anew? Its folder has a classifier of its own."""
    return model in ("toy", "toy-dusk") or (Path(model) / "classifier/config.json").is_file()


class EvalAttack(NamedTuple):
    """An attack of the evaluation.

    search      (sd, prompts, pictures, look, config): searches in front of each prompt; see
                `attack_prompts`
    what        what its column counts: "the same or broken by ..."
    title       in tables (default: "NAME attack"), and `short`, three letters
    room        config -> how many tokens it puts in front of a prompt
    together    search is (sd, prompts, pictures, config): learns from all prompts of a concept at
                once -> their contexts; see `invert_concepts`
    """

    search: Callable
    what: str = "it"
    title: str = ""
    short: str = ""
    room: Callable = lambda config: 0
    together: bool = False


class Method(NamedTuple):
    """What the lab is handed.

    config      a dataclass derived from `Settings`; the arguments `config` below are one of these
    train       (sd_o, erase prompts, retain prompts, config, folder) -> (sd, history): the erased
                model, which shares with the original the parts that were not trained, and the
                losses, a dict for each iteration; see `resumable`
    attacks     {name: EvalAttack}
    rows        (sd_o, concepts, config) -> {name: what the row changes in the config, or None for
                the original model}: the rows of --task compare
    toy         what the method changes in its config on the toy
    concepts    {name: what it changes for this concept}; the toy's settings come first
    check       (sd_o, erase prompts, retain prompts, config): raises ValueError, before any work,
                for what would fail later
    """

    config: type
    train: Callable
    attacks: dict = {}
    rows: Callable = lambda *arguments: {"original": None, "own": {}}
    toy: dict = {}
    concepts: dict = {}
    check: Callable = lambda *arguments: None


# --- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and exit status 2."""
        self.exit(2, f"error: {message}\n")


def parse(Config, argv=None):
    """Command line -> {setting: value} of the flags given. Values are checked here."""
    parser = Parser(description="Defaults of the training are as published; the toy has its own.",
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name, purpose) for name, purpose in GROUPS.items()}
    hints = get_type_hints(Config)
    flags = {"--" + f.name.replace("_", "-"): f for f in fields(Config) if f.metadata}
    for flag, f in flags.items():
        kind, choices, group = hints[f.name], f.metadata["choices"], groups[f.metadata["group"]]
        help = f.metadata["help"]
        help += "" if "(default: " in help else f" (default: {shown(f.default)})"
        if kind is bool:
            group.add_argument(flag, action="store_true", help=help)
        else:
            kind = plain_type(kind)
            metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
            many = "+" if isinstance(f.default, tuple) else None
            group.add_argument(flag, type=kind, nargs=many, help=help, metavar=metavar)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], flags, 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else "; --help lists them"
        parser.error(f"unknown flag {word!r}{meant}")
    for flag, f in flags.items():
        if hasattr(given, f.name):
            check_value(flag, getattr(given, f.name), f.metadata, parser.error)
    return vars(given)


def plain_type(hint):
    """`float | None` -> float, `tuple[str, ...]` -> str."""
    return next(kind for kind in (get_args(hint) or (hint,)) if kind in (int, float, str))


def shown(default):
    text = " ".join(default) if isinstance(default, tuple) else str(default)
    return {"": "none", "None": "none", "False": "off"}.get(text, text)


def check_value(flag, value, allowed, refuse):
    """Refuse what is not among the choices, out of range, or not text."""
    if isinstance(value, (list, tuple)):
        for each in value:
            check_value(flag, each, allowed, refuse)
    elif isinstance(value, str):
        check_text(flag, value, allowed["choices"], refuse)
    elif isinstance(value, (int, float)):
        low, high = allowed["low"], allowed["high"]
        if not (low <= value <= high and math.isfinite(value)):
            refuse(f"{flag} {value}: must be between {low} and {high}" if high < math.inf
                   else f"{flag} {value}: must be a number, at least {low}")


def check_text(flag, text, choices, refuse):
    if choices and text not in choices:
        near = difflib.get_close_matches(text, choices, 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        refuse(f"{flag} {text!r}: choose from {', '.join(choices)}{meant}")
    if not text.strip():
        refuse(f"{flag}: is empty")
    if not text.isprintable():
        refuse(f"{flag} {text[:40]!r}: holds control characters")
    longest = max(map(len, text.split(",")))  # of the names of concepts, which may be many
    if longest > 1000:
        refuse(f"{flag} {text[:40]!r}...: {longest:,} characters, more than any prompt's or "
               "path's 1,000")


