"""Paths that tests share."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
"""Real text and evaluation sets; tests that need them skip if the folder is absent."""
