"""Fixtures of all tests. Imports `kd.common` first, so that torchvision and transformers' Trainer load on a CPU.

Fixtures import what takes seconds, such as torch: pytest's main process reads this file before it starts the others.
"""

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for background jobs
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel, on models too small for several threads

import kd.common  # noqa: E402, F401, I001
import pytest  # noqa: E402
from kd_testing.paths import SHARED  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _freeze_imported_objects() -> None:
    """Excludes imported objects from garbage collection, which runs twice per training. It took 22 of 97 CPU-seconds
    in test_classifier.py and test_image_scripts.py.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _short_measurements() -> Iterator[None]:
    """Scripts measure the latency of each model with 3 forward passes instead of 30, and compute intervals from 200
    resamples instead of 1,000. The tests of the measurements call the original functions.
    """
    from kd.common.metrics import cost, verdict

    original, interleaved = cost.latency, cost.interleaved_latency

    def latency(model: Any, inputs: dict[str, Any], repeats: int = 3, warmup: int = 1) -> dict[str, Any]:
        return original(model, inputs, repeats, warmup)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "latency", latency)
        patch.setattr(verdict, "RESAMPLES", 200)
        patch.setattr(cost, "interleaved_latency", partial(interleaved, repeats=10))
        yield


@pytest.fixture(scope="session")
def narrow_bert() -> Iterator[None]:
    """The width of tiny-bert is 32 instead of 128."""
    from kd.nlp.teacher_model import teacher
    from kd_testing.tiny import NARROW_BERT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "TINY_SIZES", NARROW_BERT)
        yield


@pytest.fixture(scope="session")
def small(narrow_bert: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few of the embedded intents."""
    import numpy as np

    from kd.nlp.data.intents import load_intents

    folder = tmp_path_factory.mktemp("data") / "few_intents"
    for split, rows in load_intents().items():
        labels = np.array(rows["intent"])
        chosen = [i for c in range(41) for i in np.flatnonzero(labels == c)[: 6 if split == "train" else 2]]
        rows.select(chosen).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def digits_once() -> Iterator[None]:
    """Decodes the embedded digits once. Otherwise each script would encode and decode them: half a CPU-second."""
    from kd.image_classification.data import loading, sources
    from kd.image_classification.data.image_data import Images

    digits, decode = cache(sources.embedded_digits), loading._decode
    decoded: dict[tuple[str, bytes, int | None], Images] = {}

    @cache
    def fingerprints() -> set[str]:
        return {sources.image_files(split, raw, "image")._fingerprint for split, raw in digits().items()}

    def decode_once(split: sources.StoredImages, size: int | None) -> Images:
        if split.source._fingerprint not in fingerprints():
            return decode(split, size)
        key = split.source._fingerprint, split.indices.numpy().tobytes(), size
        if key not in decoded:
            decoded[key] = decode(split, size)
        return Images(decoded[key].pixels.clone(), split.labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.KNOWN, "digits", digits)
        patch.setattr(loading, "_decode", decode_once)
        yield


@pytest.fixture(scope="session")
def onnx_operators_once() -> Iterator[None]:
    """Torch reads its table of ONNX operators once. Otherwise it takes a fifth of the time of each export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs the real data of a development machine in ../shared")
    return SHARED


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cart_pole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A zip of a briefly trained teacher, saved by Stable-Baselines3."""
    from stable_baselines3 import PPO

    folder = tmp_path_factory.mktemp("teacher")
    PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, seed=0, device="cpu").learn(256).save(folder / "t.zip")
    return str(folder / "t.zip")
