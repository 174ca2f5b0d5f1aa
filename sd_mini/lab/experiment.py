"""One run, from its settings to its results."""
from __future__ import annotations

import platform
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import NamedTuple

import torch

import sd_mini

from ..weights import PARTS, TOY_UNETS
from . import ranks, report, runs
from .evaluation import EvaluationSet, draw_all, evaluate, load_evaluation_set
from .prompts import Concept, read_concepts, training_prompts


class Work:
    """UNet evaluations of a model, in forward equivalents: 1 a picture, 2 more for a backward."""

    def __init__(self, sd):
        self.evaluations = 0
        sd.unet.register_forward_hook(self.count)

    def count(self, unet, arguments, out):
        self.evaluations += len(out) * (3 if out.requires_grad else 1)


class Experiment(NamedTuple):
    """What all runs on a concept share."""

    sd_o: object
    concepts: list[Concept]
    evaluation_set: EvaluationSet
    work: Work
    started: float
    scored: object = None  # the model that --task evaluate scores


def load_model(config):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    sd = sd_mini.load(config.model, config.device, dtype, config.tokenizer)
    if config.low_memory:
        sd_mini.recompute_activations(sd.unet)
    return sd


def with_text_encoder(sd, config):
    """The model with the text encoder of --text-encoder in place of its own."""
    if not config.text_encoder:
        return sd
    encoder = sd_mini.load_text_encoder(config.text_encoder, config.device)
    for what, key in (("width", "hidden_size"), ("vocabulary", "vocab_size"),
                      ("context", "max_position_embeddings")):
        own, wanted = encoder.config[key], sd.text_encoder.config[key]
        if own != wanted:
            raise ValueError(f"--text-encoder {config.text_encoder}: its {what} is {own}, that of "
                             f"{config.model} {wanted}: it belongs to another kind of model")
    base = encoder.config.get("erased_from")
    if base and base != sd_mini.fingerprint(sd.text_encoder):
        print(f"note: {config.model} has fine-tuned its own text encoder; this one, erased from "
              "another, replaces that")
    return replace(sd, text_encoder=encoder)


def open_experiment(method, config):
    """Load what all runs on the concepts share, and draw the original's pictures.

    What would go wrong after hours goes wrong here, with a ValueError.
    """
    started, concepts = time.time(), read_concepts(config.concept)
    training_prompts(concepts, config)  # a mistake in their file is said before the model is loaded
    sd_o = load_model(config)
    erase, retain, _ = training_prompts(concepts, config, sd_o)
    evaluation_set = load_evaluation_set(sd_o, concepts, config, config.model in TOY_UNETS)
    method.check(sd_o, erase, retain, [row.prompt for row in evaluation_set.rows], config)
    scored = with_text_encoder(sd_o, config) if config.text_encoder else None
    work = Work(sd_o)
    evaluation_set = evaluation_set._replace(original=draw_all(sd_o, evaluation_set, config))
    return Experiment(sd_o, concepts, evaluation_set, work, started, scored)


def train(method, experiment, config, folder=None):
    """Train as the method says -> (erased model, history of losses)."""
    sd_o = experiment.sd_o
    erase, retain, notes = training_prompts(experiment.concepts, config, sd_o)
    for note in notes:
        print(note)
    sd, history = method.train(sd_o, erase, retain, config, folder)
    for part in trained_parts(sd, sd_o):
        getattr(sd, part).requires_grad_(False)
    if sd.text_encoder is not sd_o.text_encoder:
        origin = {"erased_from": sd_mini.fingerprint(sd_o.text_encoder)}
        sd.text_encoder.config = {**sd.text_encoder.config, **origin}
    return sd, history


def trained_parts(sd, sd_o):
    """Names of the networks that are not the original's."""
    return [part for part in PARTS if getattr(sd, part) is not getattr(sd_o, part)]


def run(method, experiment, config, out, name, sd=None):
    """Train a model (or take the one given), evaluate it, and save weights and losses in `out`.

    -> (model, figures, pictures). What a stopped run needs is kept in OUT/partial/NAME.
    """
    began, before, history = time.time(), experiment.work.evaluations, None
    folder, sd_o = out / "partial" / name, experiment.sd_o
    resumed = any(folder.glob("checkpoint-*"))
    if sd is None:
        sd, history = train(method, experiment, config, folder)
        for part in trained_parts(sd, sd_o):
            ranks.on_first(sd_mini.save_part, getattr(sd, part), out / part, part)
        ranks.on_first(report.plot_losses, out / "losses.png", history)
    cost = {"minutes": (time.time() - began) / 60,
            "unet_evaluations": experiment.work.evaluations - before}
    drawn = experiment.evaluation_set.original if sd is sd_o else draw_all(
        sd, experiment.evaluation_set, config)
    figures, attacked = evaluate(sd, method, experiment.evaluation_set, drawn, config, folder)
    if history and not resumed:  # nobody counted the beginning of a run that goes on
        figures |= cost
    return sd, figures, {**drawn, **attacked}


def write_results(out, experiment, config, results):
    """results.json: the figures, and all that it takes to get them again.

    UNet evaluations are those of this process.
    """
    classifier = experiment.evaluation_set.classifier
    runs.close_folder(out, {
        "config": asdict(config), "results": results,
        "unet_evaluations": experiment.work.evaluations, "processes": ranks.COUNT,
        "judge": {"name": classifier.name, "rule": classifier.rule},
        "clip_score_by": experiment.evaluation_set.clip_score.name,
        "seconds": round(time.time() - experiment.started, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": version("transformers")},
    })
