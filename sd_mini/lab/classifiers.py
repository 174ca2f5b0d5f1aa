"""What a picture shows, how well it fits its prompt, how far two sets of pictures are apart.

Classifiers score results; no attack has their gradients.
"""
import difflib
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from ..files import read_json
from ..toy import classifier as toy
from ..weights import fill


class ToyClassifier:
    """The toy's own: object and style of a picture of its world."""

    name, rule = "toy", "likeliest object and likeliest style"

    def __init__(self, device, folder):
        self.network = toy.load_classifier(device, folder)
        self.features = self.network.features  # (N, 3, H, W) -> (N, 128)
        self.known = {*toy.LABELS["object"], *toy.LABELS["style"]} - {"nothing"}

    def names(self, pictures):
        """(N, 3, H, W) in [0, 1] -> N sets of what is shown."""
        labels = self.network.labels(pictures)
        return [set(pair) for pair in zip(labels["object"], labels["style"])]

    def rest(self, erased, original, pictures):
        """What is drawn in place of the concepts `erased` (N names) -> two lists of N bools.

        clean: is it a picture, not ruined? kept: and has it what the original's picture has
        besides: the style, where an object is erased, or the object, where a style is?
        """
        before, now = self.network.labels(original), self.network.labels(pictures)
        clean = [style != "nothing" for style in now["style"]]
        others = ["object" if name in toy.LABELS["style"] else "style" for name in erased]
        same = [before[other][i] == now[other][i] for i, other in enumerate(others)]
        return clean, [all(pair) for pair in zip(clean, same)]


class HubModel:
    """A model of the hub or on disk, frozen. `name`: with the revision that was loaded."""

    def __init__(self, cls, source, device, revision):
        network = cls.from_pretrained(source, revision=revision, use_safetensors=True)
        self.network = network.to(device).eval().requires_grad_(False)
        self.prepare = preparation(source, revision)
        self.name = f"{source}@{getattr(network.config, '_commit_hash', None) or 'local'}"


class HubClassifier(HubModel):
    """An image classifier of the hub. Its label "church, church building" is two names."""

    rule = "top-1 label"

    def __init__(self, source, device, revision=None):
        from transformers import AutoModelForImageClassification

        super().__init__(AutoModelForImageClassification, source, device, revision)
        self.labels = {i: {name.strip().lower() for name in label.split(",")}
                       for i, label in self.network.config.id2label.items()}
        self.known = set().union(*self.labels.values())

    def names(self, pictures):
        likeliest = self.network(self.prepare(pictures)).logits.argmax(-1)
        return [self.labels[i] for i in likeliest.tolist()]

    def features(self, pictures):
        """The last hidden state, averaged over places or tokens."""
        out = self.network(self.prepare(pictures), output_hidden_states=True)
        hidden = out.hidden_states[-1]
        return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)


class CLIPScore(HubModel):
    """Cosine between a prompt and its picture, by a CLIP of the hub."""

    def __init__(self, source, device="cpu", revision=None):
        from transformers import AutoTokenizer, CLIPModel

        super().__init__(CLIPModel, source, device, revision)
        self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)

    def compared(self, texts, pictures):
        """What the network says of M texts and (N, 3, H, W) in [0, 1]."""
        length = self.network.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding="max_length", max_length=length,
                                truncation=True, return_tensors="pt").to(self.network.device)
        return self.network(**inputs, pixel_values=self.prepare(pictures))

    def __call__(self, prompts, pictures):
        """N prompts, (N, 3, H, W) in [0, 1] -> N cosines."""
        out = self.compared(prompts, pictures)
        return (out.text_embeds * out.image_embeds).sum(-1).tolist()


class ZeroShot(CLIPScore):
    """CLIP, told the labels of an evaluation: the likeliest of them."""

    def __init__(self, source, device, labels, revision=None):
        super().__init__(source, device, revision)
        self.known, self.choices = labels, sorted(labels)
        self.rule = f"likeliest of {len(self.choices)} texts: {', '.join(self.choices)}"

    def names(self, pictures):
        likeliest = self.compared(self.choices, pictures).logits_per_image.argmax(-1)
        return [{self.choices[i]} for i in likeliest.tolist()]

    def features(self, pictures):
        return self.compared([""], pictures).image_embeds


class ToyCLIPScore:
    """The same by the toy's CLIP, whose text half is the original's text encoder."""

    name = "toy"

    def __init__(self, sd_o):
        self.sd = sd_o
        with torch.device("meta"):
            self.network = torch.nn.ModuleDict({
                "picture": toy.PictureNet(64),
                "projection": torch.nn.Linear(64, 64, bias=False)})
        fill(self.network, [sd_o.folder / "clip/model.safetensors"], sd_o.device)

    def __call__(self, prompts, pictures):
        ids = self.sd.tokenize(prompts)
        end = ids.argmax(-1)  # the end token has the highest id; argmax takes it before its padding
        text = self.network["projection"](self.sd.text_encoder(ids)[torch.arange(len(ids)), end])
        return F.cosine_similarity(text, self.network["picture"](pictures)).tolist()


@contextmanager
def opening(flag, source, without):
    """What cannot be opened is one line, which names the flag and how to do without."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {source}: {str(error).splitlines()[0]}; {flag} takes a folder or "
                         f"hub id, or none: then {without}") from None


def load_clip_score(spec, sd_o, toy):
    """-> what scores prompts and pictures; None for spec "none". By default the published CLIP."""
    if spec == "none":
        return None
    if toy and spec is None:
        return ToyCLIPScore(sd_o)
    source, revision, _ = split_source(spec or "openai/clip-vit-base-patch32")
    with opening("--clip-score", source, "there is no CLIP score"):
        return CLIPScore(source, sd_o.device, revision)


def split_source(spec):
    """"MODEL@REVISION:LABEL" -> (MODEL, REVISION or None, LABEL or None).

    A folder may have any name, "C:\\a", "mount@host/clip"; a label has no slash.
    """
    source, label = re.fullmatch(r"(.*?)(?::([^/\\]+))?", spec).groups()
    if Path(source).exists():
        return source, None, label
    source, _, revision = source.partition("@")
    return source, revision or None, label


def preparation(source, revision):
    """-> a function from pictures (N, 3, H, W) in [0, 1] to what the model takes.

    It resizes (always bicubic), crops the middle and normalises, with the sizes, mean and deviation
    of the model's preprocessor_config.json.
    """
    from transformers.utils import cached_file

    config = read_json(cached_file(source, "preprocessor_config.json", revision=revision))

    def edge(size):
        return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]

    size = edge(config["size"])
    crop = edge(config.get("crop_size") or size)
    if config.get("crop_pct") and size < 384:  # ConvNeXt, ResNet: `size` is what cropping leaves
        size, crop = int(size / config["crop_pct"]), size
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))

    def prepare(pictures):
        x = F.interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True)
        low = (size - crop) // 2
        x = x.clamp(0, 1)[..., low : low + crop, low : low + crop]
        return (x - mean.to(x)) / std.to(x)

    return prepare


def load_classifier(spec, concepts, labels, sd_o):
    """-> (classifier, {concept: what the classifier calls it}).

    spec: None for the own of the toy `sd_o`, or MODEL:LABEL. MODEL is an image classifier or a
    CLIP, a folder or MODEL@REVISION of the hub; LABEL is what it calls a single concept. `labels`:
    what else the pictures may show.
    """
    from transformers import AutoConfig

    called = {name: name for name in concepts}
    if spec is None:
        classifier = ToyClassifier(sd_o.device, sd_o.folder)
    else:
        source, revision, own = split_source(spec)
        if own and len(concepts) == 1:
            called = {concepts[0]: own}
        labels = {*labels, *called.values()}
        with opening("--classifier", source, "nothing is evaluated"):
            if AutoConfig.from_pretrained(source, revision=revision).model_type == "clip":
                classifier = ZeroShot(source, sd_o.device, labels, revision)
            else:
                classifier = HubClassifier(source, sd_o.device, revision)
    known = classifier.known
    called = {name: label if label in known else label.lower() for name, label in called.items()}
    if unknown := {*called.values()} - known:
        near = ", ".join(sorted(difflib.get_close_matches(min(unknown), known, 13, 0.0)))
        raise ValueError(f"the classifier {classifier.name} has no label {min(unknown)!r} "
                         f"(--classifier MODEL:LABEL names one); nearest, of {len(known)}: {near}")
    return classifier, called


def frechet_distance(a, b):
    """Between Gaussians fitted to two sets of features (N, F), (M, F):

        d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Source: Heusel et al. 2017 (FID), with the classifier's features in place of Inception's. It
    falls with the number of pictures alone.
    """
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (mean + s_a.trace() + s_b.trace() - 2 * product).item())
