"""Where things are."""

from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
SHARED = REPO.parent / "shared"  # real data and a real encoder, on development machines only
