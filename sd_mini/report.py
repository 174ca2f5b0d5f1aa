"""What a run shows of its results: table, pictures, loss plot, model card. Nothing of the method is here."""
import math
import re
import subprocess
import textwrap
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .checkpoint import differences, read_json, write_json
from .weights import TOY_UNETS

matplotlib.use("agg")
import matplotlib.image  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = {  # figure -> its name, the same short, what it counts
    "pre_attack_asr": ("pre-attack ASR", "pre", "% of the concept's prompts whose picture shows it, without attack"),
    "token_asr": ("ASR, token attack", "tok", "the same or broken by a prefix of tokens (UnlearnDiffAtk)"),
    "embedding_asr": ("ASR, embedding attack", "emb", "the same or broken by a prefix of free embeddings, one per prompt"),
    "inversion_asr": ("ASR, inversion attack", "inv", "the same or broken by one embedding in the name's place (CCE)"),
    "paraphrase_asr": ("ASR, paraphrases", "par", "% of prompts that mean the concept and never name it"),
    "utility": ("utility", "uti", "% of prompts for other things whose picture shows the thing, in whatever style and colour"),
    "neighbours": ("neighbours", "nei", "the same for what is most like the concept"),
    "styles": ("styles", "sty", "% of prompts for other things in a style whose picture has that style"),
    "clip_score": ("CLIP score", "CLIP", "mean cosine of prompt and picture, on the utility prompts"),
    "frechet": ("Frechet distance", "FD", "between the judge's features of the original's and this model's utility pictures"),
    "minutes": ("training minutes", "min", "wall clock"),
    "unet_evaluations": ("UNet evaluations", "UNet", "of training, in forward equivalents (a backward counts two), thousands"),
}


def wilson(successes, n, z=1.96):
    """95 % Wilson score interval of a rate, as fractions. Source: Wilson 1927."""
    rate, z2 = successes / n, z * z
    centre, half = rate + z2 / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def rate(flags):
    if not flags:
        return None
    low, high = wilson(sum(flags), len(flags))
    return {"rate": sum(flags) / len(flags), "n": len(flags), "low": low, "high": high}


def slug(name):
    """A name as part of a path: "garbage truck" -> "garbage_truck"."""
    return re.sub(r"[^\w+-]+", "_", name.lower().replace(",", "+")).strip("_") or "_"


def percent(cell):
    return f"{100 * cell['rate']:.0f} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def number(key, value):
    return f"{value / 1000:.1f}" if key == "unet_evaluations" else f"{value:.{2 if key in ('clip_score', 'frechet') else 1}f}"


def table(results):
    """{"original": {figure: number or {rate, low, high, n}}, "erased": ...} -> lines under 80 columns."""
    lines = [f"{'% [95 % interval]':<24}" + "".join(f"{name:>20}" for name in results) + f"{'n':>6}"]
    for key, (title, _, _) in COLUMNS.items():
        cells = [result.get(key) for result in results.values()]
        if all(cell is None for cell in cells) or key in ("minutes", "unet_evaluations"):
            continue
        texts = [percent(c) if isinstance(c, dict) else number(key, c) for c in cells]
        n = cells[0]["n"] if isinstance(cells[0], dict) else ""
        lines.append((f"{title:<24}" + "".join(f"{text:>20}" for text in texts) + f"{n:>6}").rstrip())
    return "\n".join(lines)


def plot_grid(path, prompts, lines):
    """{line's title: pictures (3, H, W), or None for a blank} -> a grid, with the prompts above its columns."""
    columns, rows = len(prompts), len(lines)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns + 0.5, 1.3 * rows + 0.55), squeeze=False,
                                gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for line, (title, pictures) in zip(axes, lines.items()):
        for axis, picture in zip(line, pictures):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        line[0].set_ylabel(textwrap.fill(title, 14), fontsize=8)
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title(textwrap.fill(prompt, 18), fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_samples(path, exam, pictures, attacks, concept_columns=6, other_columns=4):
    """samples.png: the same prompts and seeds for all lines; the concept's left, others right."""
    rows, utility = exam.rows[:concept_columns], exam.utility[:other_columns]
    lines = {name: [*model["rows"][: len(rows)], *model["utility"][: len(utility)]] for name, model in pictures.items()}
    for kind in attacks:
        lines[f"{kind} attack"] = [*pictures["erased"][kind][: len(rows)], *[None] * len(utility)]
    plot_grid(path, [r.prompt for r in (*rows, *utility)], lines)


def save_images(folder, exam, pictures):
    """Every picture of an evaluation as PART/NUMBER_seed-SEED_PROMPT.png, for FID by a tool of one's choice."""
    for part, drawn in pictures.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for i, (row, picture) in enumerate(zip(getattr(exam, part, exam.rows), drawn)):
            name = f"{i:04}_seed-{row.seed}_{re.sub(r'[^A-Za-z0-9]+', '-', row.prompt)[:60].strip('-')}.png"
            matplotlib.image.imsave(folder / part / name, picture.permute(1, 2, 0).cpu().numpy())


# --- the comparison

THUMBNAILS = {"rows": 3, "token": 3, "utility": 3}  # how many of each are kept


def save_thumbnails(folder, pictures):
    tensors = {part: (255 * pictures[part][:n]).round().to(torch.uint8).cpu() for part, n in THUMBNAILS.items()}
    save_file(tensors, folder / "pictures.safetensors")


def pooled(results):
    """Figures of several seeds -> one: rates over all prompts of all seeds, means of the rest."""
    from_all = {}
    for key in COLUMNS:
        cells = [result[key] for result in results if result.get(key) is not None]
        if cells and isinstance(cells[0], dict):
            n = sum(c["n"] for c in cells)
            successes = sum(round(c["rate"] * c["n"]) for c in cells)
            from_all[key] = {"rate": successes / n, "n": n, **dict(zip(("low", "high"), wilson(successes, n)))}
        elif cells:
            from_all[key] = sum(cells) / len(cells)
    return from_all


def write_comparison(out, methods, exam, config):
    """OUT/METHOD/seed-N/ -> table.md, results.json, compare.png and tradeoff.png in OUT, and the table as text. `methods`:
    {name: its config}; a run with other settings than that, the seed excepted, is left out."""
    found = {}
    for name, wanted in methods.items():
        for path in sorted(out.glob(f"{slug(name)}/seed-*/results.json")):
            run = read_json(path)
            if changes := differences(run["config"], {**wanted, "seed": run["config"]["seed"]}):
                print(f"not in the table: {path.parent}, run with other settings: {'; '.join(changes)}")
            else:
                found.setdefault(name, {})[path.parent.name] = run["results"][name]
    figures = {name: pooled(list(results.values())) for name, results in found.items()}
    for result in (result for results in found.values() for result in results.values()):
        del result["details"]  # each method's own results.json has them
    write_json(out / "results.json", {"pooled": figures, "seeds": found})
    seeds = sorted({seed.removeprefix("seed-") for results in found.values() for seed in results})
    title = (f"{config.concept}, {config.model}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}; {len(exam.rows)} prompts, "
             f"attacks of {config.eval_attack_steps} steps")
    (out / "table.md").write_text(markdown(figures, title), encoding="utf-8")
    plot_comparison(out, {name: f"seed-{config.seed}" for name in found}, exam)
    plot_tradeoff(out / "tradeoff.png", figures, {name: i for i, name in enumerate(methods)}, config.concept)
    return text_table(figures, title)


def text_table(figures, title):
    """Rates without their intervals, in 80 columns."""
    def brief(cell):
        if isinstance(cell, dict):
            return f"{100 * cell['rate']:.0f}"
        return "" if cell is None else f"{cell:.{max(0, 3 - len(str(int(cell))))}f}"  # three digits

    keys = [key for key in COLUMNS if key not in ("minutes", "unet_evaluations")]
    lines = [title, f"{'%':<30}" + "".join(f"{COLUMNS[key][1]:>5}" for key in keys)]
    for name, figure in figures.items():
        lines.append(f"{name:<30}" + "".join(f"{brief(figure.get(key)):>5}" for key in keys))
    return "\n".join(lines)


def markdown(figures, title):
    """The whole table, with intervals, what each column counts, date, commit and minutes."""
    names = [name for name, _, _ in COLUMNS.values()]
    lines = [f"**{title}**", "", f"| method | {' | '.join(names)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, figure in figures.items():
        cells = [figure.get(key) for key in COLUMNS]
        texts = ["" if c is None else percent(c) if isinstance(c, dict) else number(key, c) for key, c in zip(COLUMNS, cells)]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    meanings = "; ".join(f"{name}: {what}" for name, _, what in COLUMNS.values())
    lines += ["", f"Rates in % with their 95 % Wilson interval. {meanings}."]
    minutes = sum(figure.get("minutes", 0) for figure in figures.values())
    lines += ["", f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {minutes:.0f} minutes of training a "
                  "seed."]
    return "\n".join(lines) + "\n"


def commit():
    """Of this code, where git knows it."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def plot_comparison(out, seeds, exam):
    """compare.png: a line per method; the concept's prompts plain and under the token attack left, others right."""
    lines = {}
    for name, seed in seeds.items():
        path = out / slug(name) / seed / "pictures.safetensors"
        if path.is_file():
            p = {part: pictures.float() / 255 for part, pictures in load_file(path).items()}
            lines[name] = [*p["rows"], *p["token"], *p["utility"]]
    if lines:
        prompts = [r.prompt for r in exam.rows[:3]]
        plot_grid(out / "compare.png", [*prompts, *(f"attacked: {p}" for p in prompts), *(r.prompt for r in exam.utility[:3])], lines)


def plot_tradeoff(path, figures, numbers, concept):
    """tradeoff.png: robustness against utility, a point per method, named by its number; up and right is better."""
    points = {}  # those at the same place share one label
    for name, f in figures.items():
        if "utility" in f:  # a judge may know the concept alone
            points.setdefault((100 * f["utility"]["rate"], 100 * (1 - f["token_asr"]["rate"])), []).append(name)
    figure, (axis, key) = plt.subplots(1, 2, figsize=(9, 6), width_ratios=(3, 1), layout="constrained")
    for (x, y), names in points.items():
        axis.plot(x, y, "o", color="C0")
        axis.annotate(", ".join(str(numbers[name]) for name in names), (x, y), (3, 3), textcoords="offset points", fontsize=8)
    listed = sorted(sum(points.values(), []), key=numbers.get)
    key.text(0, 1, "\n".join(f"{numbers[name]:>2} {name}" for name in listed), va="top", linespacing=1.5, family="monospace", fontsize=8)
    key.axis("off")
    axis.set(xlabel="utility, %", ylabel="robustness: 100 - ASR under the token attack, %", title=f"erasing {concept}",
             xlim=(min([40, *(x - 5 for x, _ in points)]), 105), ylim=(-6, 103))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_losses(path, history, warmup):
    """[(erase, attack or None, retain), ...] -> a curve each, with its running mean over 20 values."""
    curves = dict(zip(("erase", "attack", "retain"), np.array(history, float).T))
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    figure, axes = plt.subplots(len(curves), 1, figsize=(7, 1.85 * len(curves)), sharex=True, layout="constrained")
    for axis, (name, values) in zip(axes, curves.items()):
        at = np.flatnonzero(np.isfinite(values))
        axis.plot(at, values[at], color="0.8", linewidth=0.8)
        if len(at) > 20:
            axis.plot(at[19:], np.convolve(values[at], np.ones(20) / 20, "valid"), color="C0")
        if "attack" in curves:
            axis.axvline(warmup, color="0.6", linestyle=":", linewidth=1)
        axis.set(ylabel=f"{name} loss", xlim=(0, len(history)), ylim=(0, None))
    axes[-1].set_xlabel("iteration" + " (dotted: end of warm-up, where the attack starts)" * ("attack" in curves))
    figure.savefig(path, dpi=120)
    plt.close(figure)


CARD = """---
{base}license: {license}
library_name: diffusers
tags: [text-to-image, stable-diffusion, concept-erasure, machine-unlearning]
---
# {model} without "{concept}"

The {part} of `{model}`, trained with {method}. Settings: {settings}.

```
{table}
```

ASR: share of prompts for the concept whose picture shows it, without attack or under the attack (a prefix of {k} tokens,
or of {k} free embeddings, found in {steps} steps). Utility: share of prompts for other things whose picture is right.
Embedding attacks reach what no text can: they measure what is left in the model, not what a user can type.

```python
from diffusers import StableDiffusionPipeline
from {library} import {cls}

{part} = {cls}.from_pretrained("{folder}")
pipeline = StableDiffusionPipeline.{opener}("{source}", {part}={part})
pipeline("a photo of a {concept}").images[0].save("picture.png")
```
"""


def model_card(config, results, source, folder):
    """A Hugging Face model card of a run: what was erased, how, the figures, and how to load it."""
    hub, toy = str(config.model).count("/") == 1 and not Path(config.model).exists(), config.model in TOY_UNETS
    single_file = Path(config.model).is_file()
    settings = ("steps", "warmup", "lr", "layers", "attack", "attack_steps", "attack_lr", "prefix", "retain_weight",
                "retain_batch", "seed")
    text = config.module == "text_encoder"
    method = ("ESD (arXiv 2303.07345): erased without an attack in the loop, and not robust, see the figures" if config.attack == "none"
              else "adversarial training without the retain loss: it draws ever less of anything" if not config.retain_weight
              else f'AdvUnlearn (arXiv 2405.15234), so that "{config.concept}" stays erased under adversarial prompts')
    return CARD.format(
        method=method,
        base=f"base_model: {config.model}\n" if hub else "", model=config.model, concept=config.concept, part=config.module,
        license="mit" if toy else "creativeml-openrail-m" if "stable-diffusion-v1" in str(config.model) else "other",
        settings=", ".join(f"{name} {getattr(config, name)}" for name in settings), table=table(results),
        k=config.eval_prefix, steps=config.eval_attack_steps, folder=folder,
        opener="from_single_file" if single_file else "from_pretrained", source=config.model if hub or single_file else source,
        library="transformers" if text else "diffusers", cls="CLIPTextModel" if text else "UNet2DConditionModel")
