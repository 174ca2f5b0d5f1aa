import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import pytest  # noqa: E402
import torch  # noqa: E402

import sd_mini  # noqa: E402


@pytest.fixture(scope="session")
def sd():
    """The toy model; tests that train copy what they train."""
    return sd_mini.load("toy")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
