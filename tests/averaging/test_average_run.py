"""LAWA over the snapshots of a run: numbers, files, errors."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MakeRun, weights_at
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.averaging.spec import Average
from llmtrain.checkpoints.gpt2_folder import load_model, load_weights
from llmtrain.checkpoints.series import run_series
from llmtrain.checkpoints.writer import WeightsWriter
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.locks import locked_folder
from llmtrain.storage.run_folder import RunFolder


def lawa(run: RunFolder, every: int, **options: Any) -> list[Average]:
    verify = options.pop("verify", True)
    series = run_series(run)
    request = AverageRequest(every=every, **{"window": 3} | options)
    return average(series, make_specs(series, request), MergeOptions(verify=verify))


def test_equals_torchs_averaged_model_and_the_float64_oracle(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30, 40, 50])
    (result,) = lawa(run, 10, window=5)
    got = load_file(result.spec.target / "model.safetensors")
    snapshots = [
        load_file(run.snapshot(step) / "model.safetensors") for step in (10, 20, 30, 40, 50)
    ]
    averaged = AveragedModel(load_model(run.snapshot(10)))
    for step in (10, 20, 30, 40, 50):
        averaged.update_parameters(load_model(run.snapshot(step)))
    ours = load_weights(result.spec.target)
    for name, tensor in averaged.module.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-8)
    for name, tensor in got.items():
        oracle = sum(s[name].double() for s in snapshots) / 5
        assert torch.equal(tensor, oracle.float()), name


def test_transformers_computes_the_same_logits(make_run: MakeRun) -> None:
    (result,) = lawa(make_run([10, 20, 30]), 10)
    theirs = AutoModelForCausalLM.from_pretrained(result.spec.target).eval()
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(result.spec.target).logits(tokens),
            theirs(tokens).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_folder_is_complete_and_has_provenance(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    (result,) = lawa(run, 10)
    folder = run.path / "averages" / "lawa-3x10" / "step-00000030"
    assert result.spec.target == folder
    assert integrity_problems(folder) == []
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["method"] == "lawa"
    assert [entry["step"] for entry in provenance["inputs"]] == [10, 20, 30]
    assert [entry["tokens"] for entry in provenance["inputs"]] == [640, 1280, 1920]
    recorded = json.loads((run.snapshot(20) / "integrity.json").read_text())["files"][
        "model.safetensors"
    ]
    assert provenance["inputs"][1]["blake3"] == recorded["blake3"]
    assert provenance["inputs"][1]["blake3_source"] == "computed"
    assert json.loads((folder / "training.json").read_text())["step"] == 30


def test_excludes_warmup_and_step_0(make_run: MakeRun) -> None:
    run = make_run([5, 10, 20, 30, 40], warmup=10)
    assert run_series(run).steps == [20, 30, 40]
    with pytest.raises(UserError, match="20 to 40 every 10"):
        lawa(run, 10, window=4)
    shutil.copytree(run.snapshot(5), run.snapshot(0))
    assert 0 not in run_series(run).steps


def test_all_makes_every_window_with_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run(list(range(10, 80, 10)))
    results = lawa(run, 20, at="all")
    assert [tuple(i.step for i in result.spec.inputs) for result in results] == [
        (10, 30, 50),
        (20, 40, 60),
        (30, 50, 70),
    ]
    (single,) = lawa(run, 20, at="60", label="single")
    assert (single.spec.target / "model.safetensors").read_bytes() == (
        results[1].spec.target / "model.safetensors"
    ).read_bytes()


def test_existing_average_is_cached_or_rejected(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30, 40])
    assert not lawa(run, 10, label="mine")[0].cached
    assert lawa(run, 10, label="mine")[0].cached
    with pytest.raises(UserError, match="is not the average of these") as average:
        lawa(run, 10, window=2, label="mine")
    with pytest.raises(UserError, match="is not the average of these") as foreign:
        lawa(run, 10, out=run.path)
    for caught, disposable in ((average, True), (foreign, False)):
        assert caught.value.hint is not None and ("delete" in caught.value.hint) is disposable


def test_out_is_the_folder_or_its_parent(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([10, 20, 30])
    assert lawa(run, 10, out=tmp_path / "one")[0].spec.target == tmp_path / "one"
    assert (tmp_path / "one" / "model.safetensors").exists()
    results = lawa(run, 10, window=2, at="all", out=tmp_path / "many")
    assert [r.spec.target.name for r in results] == ["step-00000020", "step-00000030"]


def test_errors_list_existing_steps(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30, 40])
    with pytest.raises(UserError, match="it has 4: 10 to 40 every 10") as caught:
        lawa(run, 15)
    assert "--every 10" in caught.value.hint
    with pytest.raises(UserError, match="ends at step 25") as caught:
        lawa(run, 10, at="25")
    assert "30, 40" in caught.value.hint


def test_missing_file_leaves_nothing(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    (run.snapshot(20) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000020/model\.safetensors"):
        lawa(run, 10)
    assert not run.averages.exists()


def test_rejects_truncated_file(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    path = run.snapshot(20) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"step-00000020/model\.safetensors"):
        lawa(run, 10)


def test_rejects_flipped_bit(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    path = run.snapshot(20) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="recorded BLAKE3"):
        lawa(run, 10)


def test_rejects_nan_with_its_index(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    path = run.snapshot(20) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000020: .* contains nan at \[") as caught:
        lawa(run, 10, verify=False)
    assert "step 20" in caught.value.hint
    assert not list(run.averages.rglob("step-*"))


def test_rejects_other_shapes_before_reading_weights(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    from safetensors.torch import save_file

    tensors = load_file(run.snapshot(20) / "model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.zeros(33)
    del tensors["transformer.wpe.weight"]
    save_file(tensors, run.snapshot(20) / "model.safetensors")
    (run.snapshot(20) / "integrity.json").unlink()
    with pytest.raises(UserError, match="2 differences") as caught:
        lawa(run, 10)
    assert "wpe.weight: absent at step 20" in str(caught.value)
    assert "F32[33] at step 20" in str(caught.value)


def test_snapshots_differ(make_run: MakeRun) -> None:
    """Guard the other tests: an average must not equal a snapshot by accident."""
    assert not torch.equal(
        weights_at(10)["transformer.wte.weight"], weights_at(20)["transformer.wte.weight"]
    )


def test_removes_leftovers_of_a_killed_process(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    leftover = run.averages / "lawa-3x10" / ".tmp-5-step-00000020"
    earlier = run.averages / "lawa-3x10" / ".tmp-step-00000010"  # with its lock next to it
    for folder in (leftover, earlier):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    (leftover / ".building").touch()
    earlier.with_name(f"{earlier.name}.lock").touch()
    lawa(run, 10)
    assert [path.name for path in sorted((run.averages / "lawa-3x10").glob("*step*"))] == [
        "step-00000030"
    ]


def test_locks_the_folder_of_a_label(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    with (
        locked_folder(run.averages / "lawa-3x10"),
        pytest.raises(UserError, match="in use by another"),
    ):
        lawa(run, 10)


def test_full_disk_fails_before_the_merge(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_run([10, 20, 30])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunFailed, match="No space left"):
        lawa(run, 10)
    assert not list(run.averages.rglob("*.safetensors"))


def test_error_in_one_thread_stops_the_merge(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: WeightsWriter, name: str, start: int, raw: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    run = make_run([10, 20, 30])
    monkeypatch.setattr(WeightsWriter, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        lawa(run, 10)
    assert not list(run.averages.rglob("*.safetensors"))
