"""Paths of the repository and of shared data."""

from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
SHARED = REPO.parent / "shared"  # real data and models, only on development machines
