"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from preparations import OPTIONS, prepare, write_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give `datasets` an empty cache instead of the one in the home folder."""
    import datasets

    cache = tmp_path / "hf-cache"
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    return cache


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its data, prepared without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_source(folder)
    prepare(str(source), folder / "out", **OPTIONS)
    assert len(list((folder / "out").glob("train-*.bin"))) > 20
    return source, folder / "out"
