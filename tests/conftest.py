"""Shared by all tests. `common` comes first: it lets torchvision, and so transformers' Trainer, load on a CPU."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import common  # noqa: E402, F401, I001
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # helpers of the tests: tiny.py

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"  # real data and a real encoder, on development machines only


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs the real data of a development machine in ../shared")
    return SHARED
