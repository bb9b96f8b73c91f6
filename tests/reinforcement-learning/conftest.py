"""Fixtures of the tests of policies."""

from pathlib import Path

import pytest


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
