"""`llmtrain doctor` on this machine, and with deliberate problems."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from llmtrain.config.schema import RunConfig
from llmtrain.planning.doctor import Check, run_checks

Build = Callable[..., RunConfig]


def checks(config: RunConfig | None, run: Path) -> dict[str, Check]:
    return {check.name: check for check in run_checks(config, run)}


@pytest.mark.slow
def test_a_healthy_machine_has_no_problems(
    tiny: Build, tmp_path: Path, llmtrain: Callable[..., CompletedProcess[str]]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    done = llmtrain("doctor", "--config", "tiny.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    names = (
        "python,torch,device,precision,memory,compile,tokenizer,disk speed,disk space,data,network"
    )
    assert list(found) == names.split(",")
    assert found.pop("network")["state"] == "note"  # tests are offline
    assert {check["state"] for check in found.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]
    wrong = llmtrain(
        "doctor", "--config", "tiny.yaml", "--set", "model.vocab_size=100", cwd=tmp_path
    )
    assert wrong.returncode == 1
    assert "has 257 ids (byte), the model's 100" in wrong.stdout
    assert "this machine is not ready: data" in wrong.stderr


def test_problems_come_with_hints(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    huge = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50304}
    found = checks(
        tiny(model=huge, train__max_steps=10**5, train__compile=True, data__path="no data"),
        tmp_path,
    )
    assert "GB are free" in found["memory"].found
    assert found["memory"].state == "note"  # several GPUs may share the model
    assert "needs a C++ compiler" in found["compile"].found
    assert "GB are free" in found["disk space"].found
    assert (found["data"].found, found["data"].hint) == (
        "no data does not exist",
        "llmtrain prepare SOURCE --out 'no data'",
    )
    assert {found[name].state for name in ("compile", "disk space", "data")} == {"problem"}
    absent = checks(tiny(train__device="cuda:99"), tmp_path)
    assert absent["device"].state == "problem"
    assert "precision" not in absent


def test_an_unwritable_folder_is_a_problem() -> None:
    found = checks(None, Path("/proc/run"))
    assert found["disk speed"].state == "problem"
    assert found["tokenizer"].state == "ok"
