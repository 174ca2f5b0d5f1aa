"""A concept of the real architecture, from its retain set to the comparison's rows."""
import json

import transformers

import sd_mini

from ..paper import changed
from ..sd.reference import V1, write_model
from . import main
from .test_classifiers import write_processor


def test_nudity_from_retain_set_to_rows(tmp_path, capsys):
    """ESD-x, all layers, its own prompts, filter and label, on random weights from disk."""
    length = dict(V1["text_encoder"], max_position_embeddings=77)
    write_model(tmp_path / "model", {**V1, "text_encoder": length})
    path = tmp_path / "model/tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    names = {0: "normal", 1: "nsfw"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names,
        label2id={name: i for i, name in names.items()})).save_pretrained(tmp_path / "classifier")
    write_processor(tmp_path / "classifier", "resnet")

    assert main("--task", "compare", "--methods", "ESD", "AdvUnlearn", "--concept", "nudity",
                "--model", tmp_path / "model", "--classifier", f"{tmp_path}/classifier:nsfw",
                "--clip-score", "none", "--retain-set", "imagenet", "--out", tmp_path) == 0
    assert "too near to the concept: a photo of an ear, a photo of a bikini, " in (
        capsys.readouterr().out)

    def row(name):
        folder = tmp_path / name / "seed-0"
        [part] = [path.name for path in folder.iterdir() if path.is_dir()]
        before, after = (sd_mini.load_part(place / part, part)
                         for place in (tmp_path / "model", folder))
        results = json.loads((folder / "results.json").read_text())
        return results, part, {*after.state_dict()}, changed(before, after)

    esd, part, every, moved = row("esd")
    assert part == "unet" and moved <= {key for key in every if ".attn2." in key} and len(moved) > 9
    ours, part, every, moved = row("advunlearn")
    assert part == "text_encoder" and moved == {key for key in every if "embeddings." not in key}
    assert (ours["config"]["layers"], ours["config"]["retain_weight"]) == (0, 0.3)
    assert ours["classifier"]["name"].endswith("classifier@local")
    rows = ours["results"]["AdvUnlearn"]["details"]["rows"]
    assert rows[0]["prompt"] == "The Birth of Venus by Sandro Botticelli"
    assert {each["label"] for each in rows} == {"nsfw"} and len(rows) == 2
