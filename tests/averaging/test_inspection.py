"""`inspect`: facts about checkpoints match numpy; damage is reported, not raised."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import MakeRun, model_at, weights_at, write_checkpoint

from llmtrain.averaging.average import average
from llmtrain.averaging.inspection import inspect_path
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.series import run_series
from llmtrain.errors import UserError
from llmtrain.storage.integrity import digest_of


def test_facts_of_a_series(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
    first, second, _ = inspect_path(tmp_path / "s")
    assert [first.step, second.step] == [10, 20]
    a, b = model_at(10), model_at(20)
    assert first.parameters == sum(tensor.numel() for tensor in a.values())
    assert first.dtypes == {"F32": 5, "I64": 1, "BOOL": 1}
    assert first.blake3 == digest_of(tmp_path / "s" / "step10" / "model.safetensors").hex
    assert first.sha256 is None
    floats = [name for name, tensor in a.items() if tensor.is_floating_point()]
    assert first.norm == pytest.approx(
        math.sqrt(sum(a[n].double().square().sum().item() for n in floats))
    )
    assert first.distance is None
    assert second.distance == pytest.approx(
        math.sqrt(sum((a[n].double() - b[n].double()).square().sum().item() for n in floats))
    )
    facts = {tensor.name: tensor for tensor in second.tensors}
    assert facts["embed.weight"].norm == pytest.approx(b["embed.weight"].double().norm().item())
    assert facts["position_ids"].norm is None
    assert second.problems == []


def test_zero_biases_of_the_layout_are_not_parameters(make_run: MakeRun) -> None:
    for facts in inspect_path(make_run([10]).path):
        expected = sum(tensor.numel() for tensor in weights_at(10).values())
        assert facts.parameters == expected
        stored = sum(math.prod(tensor.shape) for tensor in facts.tensors)
        assert stored == expected + facts.zero_biases > expected


def test_average_has_provenance(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30])
    series = run_series(run)
    (result,) = average(series, make_specs(series, AverageRequest(every=10, window=3)))
    (facts,) = inspect_path(result.spec.target)
    assert facts.step == 30
    assert facts.tokens == 30 * 64
    assert facts.hash_source == "computed"
    assert facts.provenance is not None
    assert [entry["step"] for entry in facts.provenance["inputs"]] == [10, 20, 30]
    assert [facts.step for facts in inspect_path(run.path)] == [10, 20, 30]


def test_reports_damage_and_duplicates(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path / "s" / f"step{step}", model_at(20 if step == 40 else step))
    path = tmp_path / "s" / "step30" / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"][2] = float("nan")
    save_file(tensors, path)
    found = {facts.step: facts for facts in inspect_path(tmp_path / "s")}
    assert found[30].norm is None
    assert "norm.weight contains nan" in found[30].problems[0]
    assert found[10].norm is not None
    assert "the same at steps 20, 40" in found[40].problems[0]


def test_different_models_are_inspected_one_by_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "s" / "step10", model_at(10))
    write_checkpoint(tmp_path / "s" / "step20", {"other": torch.ones(3)})
    first, second = inspect_path(tmp_path / "s")
    assert second.norm == pytest.approx(math.sqrt(3))
    assert first.norm is not None
    assert second.distance is None
    assert "contain different tensors" in second.problems[0]


def test_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        inspect_path(tmp_path / "nowhere")


def test_a_file_without_a_step_and_extreme_distances(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "alone").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "alone" / "model.safetensors")
    (facts,) = inspect_path(tmp_path / "alone" / "model.safetensors")
    assert facts.step is None
    for step, value in ((1, 1.7e308), (2, -1.7e308)):
        (tmp_path / f"step{step}").mkdir()
        tensor = torch.full((9,), value, dtype=torch.float64)
        save_file({"w": tensor}, tmp_path / f"step{step}" / "model.safetensors")
    assert inspect_path(tmp_path)[1].tensors[0].distance == float("inf")
    assert not [each for each in recwarn if each.category is RuntimeWarning]
