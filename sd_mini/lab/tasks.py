"""The tasks of the command line, from their flags to an exit status."""
import os
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import torch

import sd_mini

from . import report, runs
from .compare import compare
from .evaluation import draw_rows
from .experiment import (load_model, open_experiment, record, run, with_pictures,
                         with_text_encoder, write_results)
from .prompts import Row, read_concepts, slug, that_fit
from .settings import TOY, is_toy


def erase_or_score(method, config):
    """--task train and --task evaluate: one model, before and after."""
    suffix = "-evaluate" if config.task == "evaluate" else ""
    out = Path(config.out or Path("runs") / (slug(config.concept) + suffix))
    begun = {"resume": config.resume, "overwrite": config.overwrite}
    for source in (config.text_encoder, config.model):
        if config.overwrite and source and Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--overwrite: would delete {source}; --out takes another folder")
    if config.save_images:
        runs.check_writable(Path(config.save_images), "--save-images")
    runs.is_finished(out, {"config": asdict(config)}, **begun)  # before anything is loaded
    experiment = open_experiment(method, config)
    own = record(experiment, config)
    with runs.locked(out):
        if runs.is_finished(out, own, **begun):
            print(f"{out}: is finished; --overwrite starts anew")
            return
        runs.open_folder(out, own, config.overwrite)
        erase_and_score(out, with_pictures(experiment, config), config)


def erase_and_score(out, experiment, config):
    """The run itself: the original's figures, training, the erased model's, and what is left."""
    models, results, pictures = {"erased": experiment.scored}, {}, {}
    if evaluation_set := experiment.evaluation_set:
        models = {"original": experiment.sd_o, **models}
        print(f"{len(evaluation_set.rows)} prompts, attacked in {config.eval_attack_steps} steps, "
              "in the original and the erased model")
    for name, model in models.items():
        sd, results[name], pictures[name] = run(experiment, config, out, name, model)
    if evaluation_set:
        print(report.table(results, experiment.method.attacks))
        report.decorate(report.plot_samples, out / "samples.png", evaluation_set, pictures,
                        config.eval_attacks)
    if config.save_pipeline:
        sd_mini.save_pipeline(sd, out / "pipeline")
    if config.save_single_file:
        sd_mini.save_single_file(sd, out / "model.safetensors")
    for name in pictures if config.save_images else ():
        report.save_images(Path(config.save_images) / name, pictures[name])
    write_results(out, experiment, config, results)
    print(f"{out}: {', '.join(sorted(path.name for path in out.glob('[!.]*')))}")
    if config.device != "cpu":
        print(f"at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB on the GPU")


def sample(method, config):
    """--task sample: a row of pictures for the prompts given."""
    path = Path(config.out or "runs/sample") / "samples.png"
    runs.check_writable(path.parent)
    if path.exists() and not config.overwrite:
        raise ValueError(f"{path}: is there already; --overwrite replaces it, --out takes another "
                         "folder")
    sd = with_text_encoder(load_model(config), config)
    rows = [Row(prompt, config.seed, 7.5, "") for prompt in config.prompts]
    rows, notes = that_fit(sd, rows, 0, "--prompts")
    for note in notes:
        print(note)
    pictures = draw_rows(sd, rows, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    report.plot_grid(path, [row.prompt for row in rows], {"": pictures})
    print(path)


# --- from flags to settings, and to an exit status

def resolve(method, given):
    """Flags -> the method's config, whole.

    A setting is taken from the flags, else the toy's, else the concept's, else the defaults.
    """
    given = {name: os.path.expanduser(v) if isinstance(v, str) else v for name, v in given.items()}
    cuda = torch.cuda.is_available()
    model = given.get("model") or ("CompVis/stable-diffusion-v1-4" if cuda else "toy")
    device = check_device(given.get("device") or ("cuda" if cuda else "cpu"))
    half = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = given.get("precision") or ("fp32" if device == "cpu" else half)
    why = "" if cuda or given.get("model") else ", since there is no GPU; --model chooses another"
    print(f"model: {model}{why}; on {device} in {precision}")

    given |= {"model": model, "device": device, "precision": precision}
    own = {}
    for concept in read_concepts(given.get("concept", method.config.concept)):
        own |= method.concepts.get(concept.name, {})
    toy = {**TOY, **method.toy} if is_toy(model) else {}
    config = method.config(**{**own, **toy, **given})
    if unknown := set(config.eval_attacks) - method.attacks.keys():
        raise ValueError(f"--eval-attacks {min(unknown)}: choose from {', '.join(method.attacks)}")
    config.check(given)
    return replace(config, eval_attacks=config.eval_attacks or tuple(method.attacks))


def check_device(device):
    """The device, from now on the one that "cuda" means; or ValueError."""
    numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu", "cuda", *numbered] if numbered else ["cpu"]
    if device not in there:
        raise ValueError(f"--device {device}: choose from {', '.join(there)}")
    if device in numbered:
        torch.cuda.set_device(device)
    return device


def run_task(method, given):
    """Flags -> exit status: 0; 1: it broke off; 2: the input is at fault; 130: it was stopped."""
    tasks = {"train": erase_or_score, "evaluate": erase_or_score, "compare": compare,
             "sample": sample}
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = resolve(method, given)
        tasks[config.task](method, config)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; runs go on with --resume, without --overwrite"
    except ValueError as error:
        status, message = 2, error
    except torch.cuda.OutOfMemoryError:
        status, message = 1, ("out of GPU memory: smaller batches (flags with -batch), or "
                              "--low-memory, need less")
    except RuntimeError as error:  # torch.compile's, where there is no C++ compiler
        if not given.get("compile"):
            raise
        status, message = 1, f"--compile: {error}"
    except (ArithmeticError, OSError) as error:
        status, message = 1, error
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return status
