"""One run, from its settings to its results."""
import hashlib
import json
import shutil
import time
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import transformers

import sd_mini

from ..files import write_json
from ..weights import PARTS
from . import report
from .evaluation import PARTS as EVALUATED
from .evaluation import EvaluationSet, draw_all, evaluate, load_evaluation_set
from .prompts import Concept, read_concepts, training_prompts
from .runs import CHECKPOINT
from .settings import Method


class Experiment(NamedTuple):
    """What all runs on a concept share."""

    method: Method
    sd_o: object
    concepts: list[Concept]
    evaluation_set: EvaluationSet | None  # None: erase and do not evaluate
    inputs: dict  # fingerprints of what was read: {name: hash}
    scored: object = None  # the model that --task evaluate scores


def load_model(config):
    """The model of --model, on its device, in its precision, with --compile compiled."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[config.precision]
    sd = sd_mini.load(config.model, config.device, dtype, config.tokenizer)
    if config.low_memory:
        sd_mini.recompute_activations(sd.unet)
    if config.compile:
        sd.unet.compile()  # a copy, which training makes, is not compiled
    if sd.device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # the text encoder's, which stays in float32
    return sd


def with_text_encoder(sd, config):
    """The model with the text encoder of --text-encoder in place of its own."""
    if not config.text_encoder:
        return sd
    encoder = sd_mini.load_text_encoder(config.text_encoder, config.device)
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        own, wanted = encoder.config[key], sd.text_encoder.config[key]
        if own != wanted:
            raise ValueError(f"--text-encoder {config.text_encoder}: its {key} is {own}, that of "
                             f"{config.model} {wanted}: it belongs to another kind of model")
    return replace(sd, text_encoder=encoder)


def open_experiment(method, config):
    """Load what all runs share. What would go wrong after hours goes wrong here: ValueError."""
    concepts = read_concepts(config.concept)
    training_prompts(concepts, config)  # a mistake in their file is said before the model is loaded
    sd_o, evaluation_set = load_model(config), None
    erase, retain, _ = training_prompts(concepts, config, sd_o)
    if config.classifier != "none":
        room = max((method.attacks[name].room(config) for name in config.eval_attacks), default=0)
        evaluation_set = load_evaluation_set(sd_o, concepts, config, room)
    method.check(sd_o, erase, retain, config)
    scored = with_text_encoder(sd_o, config) if config.text_encoder else None
    inputs = fingerprints(sd_o, evaluation_set, scored)
    return Experiment(method, sd_o, concepts, evaluation_set, inputs, scored)


def with_pictures(experiment, config):
    """The experiment with the original's pictures, where it evaluates."""
    if evaluation_set := experiment.evaluation_set:
        drawn = draw_all(experiment.sd_o, evaluation_set, config)
        experiment = experiment._replace(evaluation_set=evaluation_set._replace(original=drawn))
    return experiment


def fingerprints(sd_o, evaluation_set, scored):
    """{what was read: a hash}: what figures depend on besides settings and code."""
    parts = [sd_mini.fingerprint(getattr(sd_o, part)) for part in PARTS]
    hashes = {"model": hash_of([*parts, sd_o.schedule.config, sd_o.tokenizer.get_vocab()])}
    if scored:
        hashes["text encoder"] = sd_mini.fingerprint(scored.text_encoder)
    if evaluation_set:
        classifier = evaluation_set.classifier
        prompts = [getattr(evaluation_set, part) for part in EVALUATED]
        hashes["evaluation prompts"] = hash_of(prompts)
        hashes["classifier"] = hash_of([classifier.rule, sd_mini.fingerprint(classifier.network)])
        if evaluation_set.clip_score:
            hashes["CLIP"] = sd_mini.fingerprint(evaluation_set.clip_score.network)
    return hashes


def hash_of(value):
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def record(experiment, config):
    """What says whether a run is this one: settings, and hashes of all that was read."""
    prompts = hash_of(training_prompts(experiment.concepts, config, experiment.sd_o))
    return {"config": asdict(config),
            "inputs": {**experiment.inputs, "prompts to erase and retain": prompts}}


def run(experiment, config, out, name, sd=None):
    """Train a model (or take the one given), evaluate it, and save weights and losses in `out`.

    -> (model, figures, pictures). What a stopped run needs is kept in OUT/partial/NAME.
    """
    folder, sd_o = out / "partial" / name, experiment.sd_o
    figures, pictures, minutes = {}, {}, {}
    if sd is None:
        began, resumed = time.time(), (folder / CHECKPOINT).is_file()
        erase, retain, notes = training_prompts(experiment.concepts, config, sd_o)
        for note in notes:
            print(note)
        sd, history = experiment.method.train(sd_o, erase, retain, config, folder)
        for part in PARTS:
            if (network := getattr(sd, part)) is not getattr(sd_o, part):
                network.requires_grad_(False).zero_grad()  # gradients would hold memory
                sd_mini.save_part(network, out / part, part)
        report.decorate(report.plot_losses, out / "losses.png", history)
        if not resumed:  # nobody measured the beginning of a run that goes on
            minutes = {"minutes": (time.time() - began) / 60}
    if evaluation_set := experiment.evaluation_set:
        drawn = evaluation_set.original if sd is sd_o else draw_all(sd, evaluation_set, config)
        attacks = experiment.method.attacks
        figures, attacked = evaluate(sd, attacks, evaluation_set, drawn, config, folder)
        pictures = {**drawn, **attacked}
    return sd, {**figures, **minutes}, pictures


def write_results(out, experiment, config, results):
    """results.json: the figures, and all that it takes to get them again. The run is finished."""
    by = experiment.evaluation_set
    classifier = by and {"name": by.classifier.name, "rule": by.classifier.rule}
    clip = by and by.clip_score and by.clip_score.name
    write_json(out / "results.json", {
        "complete": True, **record(experiment, config), "results": results,
        "classifier": classifier, "clip_score_by": clip, "commit": report.commit(),
        "torch": torch.__version__, "transformers": transformers.__version__})
    shutil.rmtree(out / "partial")
