"""The folder in which `prepare` builds: links, and folders of other programs."""

import contextlib
import json
from pathlib import Path

import pytest
from preparations import prepare

from llmtrain.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(50)))
    return path


@pytest.mark.parametrize("name", [".tmp-out", ".tmp-out/shards", ".tmp-out/shards/x"])
@pytest.mark.parametrize("valid", [True, False])
def test_the_target_of_a_link_is_kept(source: Path, tmp_path: Path, name: str, valid: bool) -> None:
    """The target is kept even if the folder contains llmtrain's marker."""
    victim, place = tmp_path / "victim", tmp_path / "place"
    (victim / "deeper").mkdir(parents=True)
    for path in (victim / ".resumable", victim / "precious", victim / "deeper" / "precious"):
        path.touch()
    (place / name).parent.mkdir(parents=True)
    (place / name).symlink_to(victim)
    if name != ".tmp-out":
        (place / ".tmp-out" / ".resumable").touch()
    if not valid:
        source.write_text("{broken\n")
    ends_well = valid and name != ".tmp-out"
    with contextlib.nullcontext() if ends_well else pytest.raises(UserError) as caught:
        prepare(str(source), place / "out", tokenizer="byte")
    assert len(list(victim.rglob("*"))) == 4
    if name == ".tmp-out":
        assert caught is not None and "it is a link" in str(caught.value)
        assert (place / ".tmp-out").is_symlink()


def test_a_folder_of_another_program_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "mine").touch()
    with pytest.raises(UserError, match="no llmtrain command marked it as its own"):
        prepare(str(source), tmp_path / "out", tokenizer="byte")
    assert (tmp_path / ".tmp-out" / "mine").exists()
    (tmp_path / ".tmp-out" / ".resumable").touch()  # as the hint says
    prepare(str(source), tmp_path / "out", tokenizer="byte")
    assert not (tmp_path / ".tmp-out").exists()


def test_out_may_be_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    prepare(str(source), tmp_path / "out", tokenizer="byte")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "manifest.json").exists()
