"""Paths of a run."""

from pathlib import Path

from llmtrain.storage.run_folder import RunFolder


def test_run_folders_are_equal_if_their_paths_are() -> None:
    """A run is a key of dictionaries and sets, so its identity is its path."""
    runs = {RunFolder(Path("runs/a")), RunFolder(Path("runs/a")), RunFolder(Path("runs/b"))}
    assert len(runs) == 2
    assert RunFolder(Path("runs/a")) != RunFolder(Path("runs/b"))
    assert RunFolder(Path("runs/a")) != Path("runs/a")
