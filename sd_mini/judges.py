"""Judges: what a picture shows, how well it fits its prompt, how far two sets of pictures are apart. They score results;
no attack has their gradients."""
from __future__ import annotations

import difflib

import torch
import torch.nn.functional as F

from .checkpoint import read_json
from .toy import judge as toy
from .weights import TOY, fill, read_tensors

CLIP = "openai/clip-vit-base-patch16"  # whose cosines the literature reports as "CLIP score"


class ToyJudge:
    """The toy's own: object and style of a picture of its world."""

    name, rule = "toy", "likeliest object and likeliest style"

    def __init__(self, device):
        self.network = toy.load_judge(device)
        self.known = {*toy.LABELS["object"], *toy.LABELS["style"]} - {"nothing"}

    def names(self, pictures):
        """(N, 3, H, W) in [0, 1] -> N sets of what is shown."""
        found = self.network.labels(pictures)
        return [set(pair) for pair in zip(found["object"], found["style"])]

    @torch.no_grad()
    def features(self, pictures):
        """(N, 3, H, W) -> (N, 128)."""
        return self.network.features(pictures)


class Classifier:
    """An image classifier of the hub: the names of its likeliest label ("church, church building" is two)."""

    rule = "top-1 label"

    def __init__(self, source, device, revision=None):
        from transformers import AutoModelForImageClassification

        self.network = load_frozen(AutoModelForImageClassification, source, device, revision)
        self.labels = {i: {name.strip().lower() for name in label.split(",")}
                       for i, label in self.network.config.id2label.items()}
        self.known, self.prepare = set().union(*self.labels.values()), preparation(source, revision)
        self.name = f"{source}@{getattr(self.network.config, '_commit_hash', None) or 'local'}"

    @torch.no_grad()
    def names(self, pictures):
        return [self.labels[i] for i in self.network(self.prepare(pictures)).logits.argmax(-1).tolist()]

    @torch.no_grad()
    def features(self, pictures):
        """The last hidden state, averaged over places or tokens."""
        hidden = self.network(self.prepare(pictures), output_hidden_states=True).hidden_states[-1]
        return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)


class ZeroShot:
    """CLIP, told the labels of an evaluation: the likeliest of them. For what no classifier knows."""

    known = None  # any

    def __init__(self, source, device, labels, revision=None):
        self.clip, self.choices = CLIPScore(source, device, revision), sorted(labels)
        self.name, self.rule = self.clip.name, f"likeliest of {len(self.choices)} texts: {', '.join(self.choices)}"
        self.texts = self.clip.text_features(self.choices)

    def names(self, pictures):
        return [{self.choices[i]} for i in (self.features(pictures) @ self.texts.T).argmax(-1).tolist()]

    def features(self, pictures):
        return self.clip.picture_features(pictures)


class CLIPScore:
    """Cosine between a prompt and its picture, by a CLIP of the hub."""

    def __init__(self, source=CLIP, device="cpu", revision=None):
        from transformers import AutoTokenizer, CLIPModel

        self.network = load_frozen(CLIPModel, source, device, revision)
        self.tokenizer, self.prepare = AutoTokenizer.from_pretrained(source, revision=revision), preparation(source, revision)
        self.name = f"{source}@{getattr(self.network.config, '_commit_hash', None) or 'local'}"

    @torch.no_grad()
    def text_features(self, texts):
        length = self.network.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.network.device)
        hidden = self.network.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
        return F.normalize(self.network.text_projection(hidden), dim=-1)

    @torch.no_grad()
    def picture_features(self, pictures):
        hidden = self.network.vision_model(pixel_values=self.prepare(pictures)).pooler_output
        return F.normalize(self.network.visual_projection(hidden), dim=-1)

    def __call__(self, prompts, pictures):
        """N prompts, (N, 3, H, W) in [0, 1] -> N cosines."""
        return (self.text_features(prompts) * self.picture_features(pictures)).sum(-1).tolist()


class ToyCLIPScore:
    """The same by the toy's CLIP, whose text half is the original's text encoder."""

    name = "toy"

    def __init__(self, sd_o):
        if (width := sd_o.text_encoder.config["hidden_size"]) != 64:
            raise ValueError(f"--suite toy: is for the toy, whose CLIP score reads contexts of width 64; this model's have {width}")
        self.sd = sd_o
        with torch.device("meta"):
            self.network = torch.nn.ModuleDict({
                "picture": toy.PictureNet(64), "projection": torch.nn.Linear(64, 64, bias=False)})
        path = TOY / "clip/model.safetensors"
        fill(self.network, read_tensors([path], sd_o.device, torch.float32), path)

    @torch.no_grad()
    def __call__(self, prompts, pictures):
        ids = self.sd.tokenize(prompts)
        end = ids.argmax(-1)  # the end token has the highest id; padding repeats it, argmax takes the first
        text = self.network["projection"](self.sd.text_encoder(ids)[torch.arange(len(ids)), end])
        return F.cosine_similarity(text, self.network["picture"](pictures)).tolist()


def load_frozen(cls, source, device, revision):
    try:
        return cls.from_pretrained(source, revision=revision, use_safetensors=True).to(device).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be opened as a {cls.__name__}: {str(error).splitlines()[0]}") from None


def preparation(source, revision):
    """Pictures (N, 3, H, W) in [0, 1] to what the model takes: resized (bicubic, whatever it asks for), the middle
    cropped, normalised, with the sizes, mean and deviation of its preprocessor_config.json."""
    from transformers.utils import cached_file

    config = read_json(cached_file(source, "preprocessor_config.json", revision=revision))
    edge = lambda size: size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
    size = edge(config["size"])
    crop = edge(config.get("crop_size") or size)
    if config.get("crop_pct"):  # ConvNeXt and ResNet: `size` is what remains of the picture after cropping
        size, crop = round(size / config["crop_pct"]), size
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))

    def prepare(pictures):
        x = F.interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        low = (size - crop) // 2
        return (x[..., low : low + crop, low : low + crop] - mean.to(x)) / std.to(x)

    return prepare


def load_judge(spec, concepts, labels, device):
    """-> (judge, {concept: what the judge calls it}). spec: None for the toy's own, or MODEL:LABEL, where MODEL is an
    image classifier or a CLIP, of the hub (at MODEL@REVISION, where wanted) or a folder, and LABEL what it calls a single
    concept. `labels`: what else the pictures may show."""
    called = dict.fromkeys(concepts)
    if spec is None:
        judge = ToyJudge(device)
    else:
        source, _, own = spec.partition(":")
        source, _, revision = source.partition("@")
        called = {name: own if own and len(concepts) == 1 else name for name in concepts}
        clip = hub_config(source, revision or None).get("model_type") == "clip"
        judge = (ZeroShot(source, device, {*labels, *called.values()}, revision or None) if clip
                 else Classifier(source, device, revision or None))
    called = {name: label or name if judge.known is None else (label or name).lower() for name, label in called.items()}
    for label in called.values():
        if judge.known is not None and label not in judge.known:
            near = difflib.get_close_matches(label, judge.known, 10, 0.0)
            raise ValueError(f"the judge {judge.name} has no label {label!r}; it knows {', '.join(sorted(near))}"
                             f"{' and others; choose one with --judge MODEL:LABEL' if len(judge.known) > 10 else ''}")
    return judge, called


def hub_config(source, revision):
    from transformers.utils import cached_file

    try:
        return read_json(cached_file(source, "config.json", revision=revision))
    except OSError as error:
        raise ValueError(f"--judge {source}: {str(error).splitlines()[0]}") from None


def frechet_distance(a, b):
    """Between Gaussians fitted to two sets of features (N, F), (M, F):

        d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Source: Heusel et al. 2017 (FID), with the judge's features in place of Inception's.
    """
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * product).item())
