"""What a run shows of its results: tables, pictures, the loss plot."""
import csv
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which would choose a notebook's backend anew

# Figure -> its title; for rates the same short. README says what each counts.
COLUMNS = {
    "pre_attack_asr": ("pre-attack ASR", "pre"),
    "paraphrase_asr": ("ASR, paraphrases", "par"),
    "clean": ("clean", "cln"),
    "kept": ("kept", "kpt"),
    "utility": ("utility", "uti"),
    "neighbours": ("neighbours", "nei"),
    "styles": ("styles", "sty"),
    "clip_score": ("CLIP score", ""),
    "frechet": ("Frechet distance", ""),
    "minutes": ("training minutes", ""),
    "seeds": ("seeds", ""),
    "commits": ("commits", ""),
}


def columns(results, attacks):
    """The columns that these results have, behind the first those of the method's attacks."""
    asr = {f"{name}_asr": (f"ASR, {name}", name[:3]) for name in attacks}
    every = {"pre_attack_asr": COLUMNS["pre_attack_asr"], **asr, **COLUMNS}
    return {key: column for key, column in every.items()
            if any(result.get(key) is not None for result in results)}


# --- tables

def text(figure, interval=True):
    """A number, a rate in % with its interval or without, a text, or nothing for None."""
    if not isinstance(figure, dict):
        return f"{figure:.2f}" if isinstance(figure, float) else figure or ""
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
    for key, (title, _) in columns(results.values(), attacks).items():
        found = [result.get(key) for result in results.values()]
        n = found[0]["n"] if isinstance(found[0], dict) else ""
        rows.append([title, *map(text, found), n])
    return aligned(rows, 24, *[20] * len(results), 6) + ruined(results)


def ruined(results):
    """A line for each model that draws too few pictures in place of the concept."""
    shares = {name: result.get("clean") for name, result in results.items()}
    return "".join(f"\n{name}: {text(share, False)} % clean; the rest is ruined, not erased"
                   for name, share in shares.items() if share and share["rate"] < 0.8)


def rates_table(figures, attacks):
    """{row: figures} -> the rates, without their intervals, in 80 columns."""
    keys = {key: short for key, (_, short) in columns(figures.values(), attacks).items() if short}
    rows = [[name, *(text(figure.get(key), interval=False) for key in keys)]
            for name, figure in figures.items()]
    return aligned([["%", *keys.values()], *rows], 30, *[4] * len(keys)) + ruined(figures)


def write_table(path, figures, attacks):
    """table.csv: a line a row, rates in % with their 95 % Wilson interval."""
    used = columns(figures.values(), attacks)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["method", *(title for title, _ in used.values())])
        for name, figure in figures.items():
            table.writerow([name, *(text(figure.get(key)) for key in used)])


def commit():
    """Of this code, where git knows it; "-dirty" says that it was edited since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def decorate(write, path, *arguments):
    """Write a picture. Where that fails, the run goes on with a warning."""
    try:
        write(path, *arguments)
    except Exception as error:  # whatever a plotting library finds: the figures are safe
        print(f"warning: {path} was not written: {error}", file=sys.stderr)


# --- pictures

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
                axis.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        line[0].set_ylabel(textwrap.fill(title, 14), fontsize=8, parse_math=False)
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title(textwrap.fill(prompt, 18), fontsize=7, parse_math=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_samples(path, evaluation_set, pictures, attacks):
    """samples.png: the same prompts and seeds in all lines; the concept's left, others right."""
    rows, utility = evaluation_set.rows[:6], evaluation_set.utility[:4]
    lines = {name: [*drawn["rows"][: len(rows)], *drawn["utility"][: len(utility)]]
             for name, drawn in pictures.items()}
    for kind in attacks:
        lines[f"{kind} attack"] = [*pictures["erased"][kind][: len(rows)], *[None] * len(utility)]
    plot_grid(path, [row.prompt for row in (*rows, *utility)], lines)


def save_images(folder, pictures):
    """Every picture as PART/NUMBER.png, in the order of results.json, for FID by another tool."""
    for part, drawn in pictures.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(drawn.permute(0, 2, 3, 1).cpu().numpy()):
            matplotlib.image.imsave(folder / part / f"{i:04}.png", picture)


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
