"""What a run shows of its results: tables, pictures, the loss plot, the model card."""
import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which would choose a notebook's backend anew

COLUMNS = {  # figure -> its name, the same short, what it counts
    "pre_attack_asr": ("pre-attack ASR", "pre",
                       "% of the concept's prompts whose picture shows it, without attack"),
    "paraphrase_asr": ("ASR, paraphrases", "par",
                       "% of prompts that mean the concept and never name it"),
    "clean": ("clean", "cln",
              "% of the concept's prompts whose picture is one, not ruined, without attack"),
    "kept": ("kept", "kpt", "the same, and the rest of the prompt is still there: the style, where "
             "an object is erased; the object, where a style is"),
    "utility": ("utility", "uti", "% of prompts for other things whose picture shows the thing, in "
                "whatever style and colour"),
    "neighbours": ("neighbours", "nei", "the same for what is most like the concept"),
    "styles": ("styles", "sty",
               "% of prompts for other things in a style whose picture has that style"),
    "clip_score": ("CLIP score", "CLIP",
                   "mean cosine of prompt and picture, on the utility prompts"),
    "frechet": ("Frechet distance", "FD", "between the classifier's features of the original's and "
                "this model's utility pictures; it falls with their number, no FID"),
    "minutes": ("training minutes", "min", "wall clock"),
}


def columns(results, attacks):
    """The columns that these results have, behind the first those of the method's attacks."""
    asr = {f"{name}_asr": (f"ASR, {attack.title or f'{name} attack'}", attack.short or name[:3],
                           f"the same or broken by {attack.what}")
           for name, attack in attacks.items()}
    every = {"pre_attack_asr": COLUMNS["pre_attack_asr"], **asr, **COLUMNS}
    return {key: column for key, column in every.items()
            if any(result.get(key) is not None for result in results)}


# --- tables

def text(figure, interval=True):
    """A number, a rate in % with its interval or without, or nothing where there is no figure."""
    if not isinstance(figure, dict):
        return "" if figure is None else f"{figure:.2f}"
    rate, low, high = (f"{100 * figure[key]:.0f}" for key in ("rate", "low", "high"))
    return f"{rate} [{low}, {high}]" if interval else rate


def aligned(rows, *widths):
    """Rows of texts -> lines, each row's first text to the left and the others to the right."""
    return "\n".join("".join(
        f"{cell:>{width}}" if i else f"{cell:<{width}}"
        for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def table(results, attacks):
    """{"original": {figure: number or {rate, low, high, n}}, "erased": ...} -> 80 columns."""
    rows = [["% [95 % interval]", *results, "n"]]
    for key, (title, _, _) in columns(results.values(), attacks).items():
        found = [result.get(key) for result in results.values()]
        n = found[0]["n"] if isinstance(found[0], dict) else ""
        if key != "minutes":
            rows.append([title, *map(text, found), n])
    return aligned(rows, 24, *[20] * len(results), 6) + ruined(results)


def ruined(results):
    """A line for each model that draws too few pictures in place of the concept."""
    shares = {name: result.get("clean") for name, result in results.items()}
    return "".join(f"\n{name}: {text(share, interval=False)} % clean; the rest is ruined, not erased"
                   for name, share in shares.items() if share and share["rate"] < 0.8)


def rates_table(figures, attacks):
    """{row: figures} -> the rates, without their intervals, in 80 columns."""
    keys = {key: short for key, (_, short, _) in columns(figures.values(), attacks).items()
            if key not in ("minutes", "clip_score", "frechet")}
    rows = [[name, *(text(figure.get(key), interval=False) for key in keys)]
            for name, figure in figures.items()]
    return aligned([["%", *keys.values()], *rows], 30, *[4] * len(keys)) + ruined(figures)


def markdown(figures, attacks, title, commits):
    """The whole table, with intervals, what each column counts, the rows' commits and minutes."""
    used = columns(figures.values(), attacks)
    rows = [["method", *(name for name, _, _ in used.values())], ["---"] * (len(used) + 1)]
    rows += [[escaped(name), *(text(figure.get(key)) for key in used)]
             for name, figure in figures.items()]
    meanings = "; ".join(f"{name}: {what}" for name, _, what in used.values())
    minutes = sum(figure.get("minutes", 0) for figure in figures.values())
    return "\n".join([
        f"**{escaped(title)}**", "", *(f"| {' | '.join(row)} |" for row in rows), "",
        f"Rates in % with their 95 % Wilson interval. {meanings}.", "",
        f"{time.strftime('%Y-%m-%d')}, rows of commit {', '.join(commits)}, {minutes:.0f} minutes "
        "of training a seed.", ""])


def escaped(text):
    """A user's text in Markdown, as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text)


def commit():
    """Of this code, where git knows it; "-dirty" says that it was edited since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def decorate(write, path, *arguments):
    """Write a picture or a card. Where that fails, the run goes on with a warning."""
    try:
        write(path, *arguments)
    except Exception as error:  # whatever a plotting library finds: the figures are safe
        print(f"warning: {path} was not written: {error}", file=sys.stderr)


# --- pictures

def picture_array(picture):
    """(3, H, W) in [0, 1] -> (H, W, 3) for matplotlib."""
    return picture.permute(1, 2, 0).cpu().numpy()


def plot_grid(path, prompts, lines):
    """Prompts above columns; lines: {title: pictures (3, H, W), or None for a blank}."""
    columns, rows = len(prompts), len(lines)
    figure = Figure(figsize=(1.3 * columns + 0.5, 1.3 * rows + 0.55))
    axes = figure.subplots(rows, columns, squeeze=False,
                           gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for line, (title, pictures) in zip(axes, lines.items()):
        for axis, picture in zip(line, pictures):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(picture_array(picture), interpolation="nearest")
        line[0].set_ylabel(textwrap.fill(title, 14), fontsize=8, parse_math=False)
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title(textwrap.fill(prompt, 18), fontsize=7, parse_math=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_samples(path, evaluation_set, pictures, attacks, concept_columns=6, other_columns=4):
    """samples.png: the same prompts and seeds in all lines; the concept's left, others right."""
    rows = evaluation_set.rows[:concept_columns]
    utility = evaluation_set.utility[:other_columns]
    lines = {name: [*drawn["rows"][: len(rows)], *drawn["utility"][: len(utility)]]
             for name, drawn in pictures.items()}
    for kind in attacks:
        lines[f"{kind} attack"] = [*pictures["erased"][kind][: len(rows)], *[None] * len(utility)]
    plot_grid(path, [row.prompt for row in (*rows, *utility)], lines)


def save_images(folder, evaluation_set, pictures):
    """Every picture as PART/NUMBER_seed-SEED_PROMPT.png, for FID by another tool."""
    for part, drawn in pictures.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = getattr(evaluation_set, part, evaluation_set.rows)
        for i, (row, picture) in enumerate(zip(rows, drawn)):
            words = re.sub(r"[^A-Za-z0-9]+", "-", row.prompt)[:60].strip("-")
            path = folder / part / f"{i:04}_seed-{row.seed}_{words}.png"
            matplotlib.image.imsave(path, picture_array(picture))


def plot_losses(path, history):
    """[{"one": loss, "other": loss or None, ...}, ...] -> a curve each, and its mean over 20."""
    curves = {name: np.array([losses[name] for losses in history], float) for name in history[0]}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    figure = Figure(figsize=(7, 1.85 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, curves.items()):
        mean = np.convolve(values, np.ones(20) / 20)[19 : len(values)]
        axis.plot(values, color="0.8", linewidth=0.8)
        axis.plot(range(19, 19 + len(mean)), mean, color="C0")
        axis.set_ylabel(f"{name} loss", parse_math=False)
        axis.set(xlim=(0, len(history)), ylim=(0, None))
    axes[-1].set_xlabel("iteration")
    figure.savefig(path, dpi=120)


# --- the model card

CARD = """---
library_name: diffusers
tags: [text-to-image, stable-diffusion, concept-erasure, machine-unlearning]
---
# {title}

The {part} of {model}, trained to erase the concept; `results.json` has all settings.

{figures}
```python
from diffusers import StableDiffusionPipeline
from {library} import {cls}

{part} = {cls}.from_pretrained({folder})
pipeline = StableDiffusionPipeline.{opener}({source}, {part}={part})
```
"""


def write_card(path, config, figures, part, folder):
    """A model card for the hub. `part`: what was trained; `folder`: that of the original model."""
    model, is_file = str(config.model), Path(config.model).is_file()
    on_hub = model.count("/") == 1 and not Path(model).exists()
    source = model.partition("@")[0] if on_hub else model if is_file else str(folder)
    library, cls = (("transformers", "CLIPTextModel") if part == "text_encoder" else
                    ("diffusers", "UNet2DConditionModel"))
    path.write_text(CARD.format(
        title=escaped(f'{model} without "{config.concept}"'), model=escaped(model),
        figures=f"```\n{figures}\n```\n" if figures else "", library=library, cls=cls, part=part,
        folder=json.dumps(str(path.parent / part)), source=json.dumps(source),
        opener="from_single_file" if is_file else "from_pretrained"), encoding="utf-8")
