"""What the data tests share: real text where the checkout has it, and a cache that leaks nothing."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from preparations import OPTIONS, write_source

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """752 documents (2.3 MB) of real English, in order."""
    path = SHARED / "webmix-val.jsonl.zst"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with pa.input_stream(str(path), compression="zstd") as stream:
        return [json.loads(line)["text"] for line in io.BufferedReader(stream)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that `datasets` keeps may land in the home folder, or come from it."""
    import datasets

    cache = tmp_path / "hf-cache"
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    return cache


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and the folder that an undisturbed preparation of it writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    from preparations import prepare

    source = write_source(folder)
    prepare(str(source), folder / "out", **OPTIONS)
    assert len(list((folder / "out").glob("train-*.bin"))) > 20
    return source, folder / "out"
