"""What a run shows of its results: table, pictures, loss plot, model card. Nothing of the method is here."""
import textwrap

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

TITLES = {"pre_attack_asr": "pre-attack ASR", "token_attack_asr": "ASR, token attack",
          "embedding_attack_asr": "ASR, embedding attack", "utility": "utility"}


def table(results):
    """{"original": {figure: {rate, low, high, n}}, "erased": ...} -> lines under 80 columns."""
    lines = [f"{'% [95 % interval]':<24}" + "".join(f"{name:>20}" for name in results) + f"{'n':>6}"]
    for key, title in TITLES.items():
        cells = [result[key] for result in results.values()]
        texts = [f"{100 * c['rate']:.0f} [{100 * c['low']:.0f}, {100 * c['high']:.0f}]" for c in cells]
        lines.append(f"{title:<24}" + "".join(f"{text:>20}" for text in texts) + f"{cells[0]['n']:>6}")
    return "\n".join(lines)


def plot_samples(path, prompts, lines):
    """{line's title: pictures (3, H, W), or None for a blank} -> a grid, with the prompts above its columns."""
    columns, aspect = len(prompts), len(lines)
    figure, axes = plt.subplots(aspect, columns, figsize=(1.3 * columns + 0.5, 1.3 * aspect + 0.55), squeeze=False,
                                gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for line, (title, pictures) in zip(axes, lines.items()):
        for axis, picture in zip(line, pictures):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        line[0].set_ylabel(title, fontsize=8)
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title(textwrap.fill(prompt, 18), fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_losses(path, history, warmup):
    """[(erase, attack, retain), ...] -> three curves, each with its running mean over 20 values."""
    figure, axes = plt.subplots(3, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    for axis, name, values in zip(axes, ("erase", "attack", "retain"), np.array(history).T):
        at = np.flatnonzero(np.isfinite(values))
        axis.plot(at, values[at], color="0.8", linewidth=0.8)
        if len(at) > 20:
            axis.plot(at[19:], np.convolve(values[at], np.ones(20) / 20, "valid"), color="C0")
        axis.axvline(warmup, color="0.6", linestyle=":", linewidth=1)
        axis.set(ylabel=f"{name} loss", xlim=(0, len(history)), ylim=(0, None))
    axes[-1].set_xlabel("iteration (dotted: end of warm-up, where the attack starts)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


CARD = """---
{base}license: {license}
library_name: diffusers
tags: [text-to-image, stable-diffusion, concept-erasure, machine-unlearning]
---
# {model} without "{concept}"

The {part} of `{model}`, trained with AdvUnlearn (arXiv 2405.15234) so that "{concept}" stays erased under adversarial
prompts. Settings: {settings}.

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
pipeline = StableDiffusionPipeline.from_pretrained("{source}", {part}={part})
pipeline("a photo of a {concept}").images[0].save("picture.png")
```
"""


def model_card(config, concept, results, source, folder):
    """A Hugging Face model card of a run: what was erased, how, the figures, and how to load it."""
    hub, toy = str(config.model).count("/") == 1, str(config.model).startswith("toy")
    settings = ("steps", "warmup", "lr", "layers", "attack", "attack_steps", "attack_lr", "prefix", "retain_weight",
                "retain_batch", "seed")
    text = config.train == "text_encoder"
    return CARD.format(
        base=f"base_model: {config.model}\n" if hub else "", model=config.model, concept=concept, part=config.train,
        license="mit" if toy else "creativeml-openrail-m" if "stable-diffusion-v1" in str(config.model) else "other",
        settings=", ".join(f"{name} {getattr(config, name)}" for name in settings), table=table(results),
        k=config.eval_prefix, steps=config.eval_attack_steps, source=source, folder=folder,
        library="transformers" if text else "diffusers", cls="CLIPTextModel" if text else "UNet2DConditionModel")
