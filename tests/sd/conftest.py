import shutil

import pytest

from .reference import V1, write_model


@pytest.fixture(scope="session")
def v1(tmp_path_factory):
    """A small random model like Stable Diffusion 1.x, in its folder `v1.folder`."""
    return write_model(tmp_path_factory.mktemp("v1"), V1)


@pytest.fixture
def folder(v1, tmp_path):
    """A copy of its folder. Tests rewrite it."""
    return shutil.copytree(v1.folder, tmp_path / "model")


@pytest.fixture
def hub(v1, tmp_path, monkeypatch):
    """The id of the model on the hub, offline: a cache in the layout of the hub's library."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(v1.folder, snapshot)
    shutil.copytree(v1.folder / "text_encoder", snapshot / "church_unlearned")
    return "someone/tiny"
