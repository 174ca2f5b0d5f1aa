"""The toy's picture networks: the classifier that scores results, and the picture half of CLIP."""
import torch
import torch.nn.functional as F
from torch import nn

from ..files import read_json
from ..weights import TOY, fill
from .world import COLORS, OBJECTS, STYLES

LABELS = {"object": [*OBJECTS, "nothing"], "style": [*STYLES, "nothing"], "color": [*COLORS]}


class PictureNet(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> (B, outputs): five convolutions, a norm each, an average."""

    def __init__(self, outputs):
        super().__init__()
        widths, strides = [3, 32, 64, 96, 128, 128], [2, 2, 2, 1, 2]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in zip(widths, widths[1:], strides))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], outputs)

    def features(self, image):
        """(B, 3, 64, 64) -> (B, 128)."""
        h = 2 * image - 1
        for conv, norm in zip(self.convs, self.norms):
            h = F.relu(norm(conv(h)))
        return h.mean((2, 3))

    def forward(self, image):
        return self.head(self.features(image))


class Classifier(PictureNet):
    """Which object, style and colour a picture shows. No attack has its gradients."""

    def __init__(self):
        super().__init__(sum(map(len, LABELS.values())))

    def logits(self, image):
        """(B, 3, 64, 64) in [0, 1] -> {"object": (B, 11), "style": (B, 4), "color": (B, 8)}."""
        sizes = [len(names) for names in LABELS.values()]
        return dict(zip(LABELS, self(image).split(sizes, dim=1)))

    @torch.no_grad()
    def labels(self, image):
        """(B, 3, 64, 64) in [0, 1] -> {"object": [B names], "style": [...], "color": [...]}."""
        return {kind: [LABELS[kind][i] for i in logits.argmax(1)]
                for kind, logits in self.logits(image).items()}


def load_classifier(device="cpu", folder=TOY):
    """The classifier of a toy's folder."""
    with torch.device("meta"):
        classifier = Classifier()
    if read_json(folder / "classifier/config.json") != LABELS:
        raise ValueError(f"{folder}/classifier/config.json: other labels than this world's; train "
                         "again")
    fill(classifier, [folder / "classifier/model.safetensors"], device)
    return classifier
