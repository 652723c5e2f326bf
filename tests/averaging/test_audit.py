"""Checks of the inputs: each planted fault is rejected with its location; valid series pass."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import LARGE, MakeRun, model_at, write_checkpoint

from llmtrain.averaging import audit
from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.averaging.spec import Average
from llmtrain.checkpoints.series import folder_series, run_series
from llmtrain.errors import UserError

STEPS = (10, 20, 30, 40, 50)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step), shards=2)
    return tmp_path / "s"


def run(root: Path, **options: Any) -> tuple[list[Average], list[str]]:
    series = folder_series(root)
    warnings: list[str] = []
    specs = make_specs(series, AverageRequest(every=10))
    return average(series, specs, MergeOptions(**options), warn=warnings.append), warnings


def replace_tensor(root: Path, step: int, name: str, tensor: torch.Tensor) -> None:
    for path in (root / f"step{step}").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: tensor}, path, metadata={"format": "pt"})


def test_valid_series_passes_without_warnings(root: Path) -> None:
    (result,), warnings = run(root, strict=True)
    assert not result.cached
    assert warnings == []


def test_rejects_duplicate_file(root: Path) -> None:
    shutil.rmtree(root / "step40")
    shutil.copytree(root / "step20", root / "step40")
    with pytest.raises(UserError, match="is the same at steps 20, 40"):
        run(root)
    assert not Path("averages").exists()
    assert run(root, allow_duplicates=True)[0]


def test_rejects_shard_of_another_step(root: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    shutil.copyfile(root / "step50" / shard, root / "step20" / shard)
    with pytest.raises(UserError, match=rf"{shard} is the same at steps 20, 50"):
        run(root)


def test_rejects_tensor_of_another_step(root: Path) -> None:
    replace_tensor(root, 20, "embed.weight", model_at(40)["embed.weight"])
    with pytest.raises(UserError, match=r"embed\.weight is the same at steps 20, 40"):
        run(root)
    assert not list(Path("averages").rglob("*.safetensors"))
    assert run(root, allow_duplicates=True)[0]


def test_allows_equal_constant_tensors(root: Path) -> None:
    for step in STEPS:
        replace_tensor(root, step, "embed.weight", torch.ones(LARGE))
    assert run(root)[0]


def test_rejects_shard_of_finished_model(root: Path) -> None:
    shutil.copytree(root / "step20", root / "final")
    (root / "final" / "model-00002-of-00002.safetensors").unlink()
    names = load_file(root / "step20" / "model-00002-of-00002.safetensors")
    other = {name: model_at(99)[name] for name in names}
    save_file(other, root / "final" / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="of the finished model"):
        run(root)


def test_warns_about_outlier_with_step_and_tensor(root: Path) -> None:
    replace_tensor(root, 30, "embed.weight", model_at(30)["embed.weight"] + 0.2)
    _, warnings = run(root)
    assert len(warnings) == 1
    assert "step 30" in warnings[0]
    assert "embed.weight" in warnings[0]


@pytest.mark.parametrize("step", [10, 20, 40, 50])
def test_strict_rejects_outlier_at_any_position(root: Path, step: int) -> None:
    generator = torch.Generator().manual_seed(9)
    replace_tensor(root, step, "embed.weight", torch.randn(LARGE, generator=generator))
    with pytest.raises(UserError, match=f"step {step} is off the trajectory: embed"):
        run(root, strict=True)
    assert not list(Path("averages").rglob("*.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rejects_non_finite_element_with_its_index(root: Path, value: float) -> None:
    tensor = model_at(30)["embed.weight"]
    tensor[300, 5] = value
    replace_tensor(root, 30, "embed.weight", tensor)
    with pytest.raises(UserError, match=r"step30: embed\.weight contains .* at \[300, 5\]"):
        run(root)


def test_missing_step_lists_existing_steps(root: Path) -> None:
    shutil.rmtree(root / "step30")
    with pytest.raises(UserError, match="10, 20, 40, 50"):
        run(root)


def test_rejects_duplicate_snapshots_of_a_run(
    make_run: MakeRun,
) -> None:
    made = make_run([10, 20, 30])
    shutil.rmtree(made.snapshot(20))
    shutil.copytree(made.snapshot(10), made.snapshot(20))
    series = run_series(made)
    with pytest.raises(UserError, match="same at steps 10, 20"):
        average(series, make_specs(series, AverageRequest(every=10, window=3)))


def test_known_bad_revisions_are_complete() -> None:
    steps = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
    pythia = audit.known_bad("EleutherAI/pythia-2.8b", steps)
    assert len(steps) == 154
    assert (
        len(pythia) == 85
    )  # the public report counts 86, including step 143000, which correctly has the last weights
    assert {66000, 143000}.isdisjoint(pythia)
    assert sorted(audit.known_bad("EleutherAI/pythia-12b", steps)) == [50000, 58000]
    assert len(audit.known_bad("allenai/OLMo-2-1124-7B", [101000, 175000, 300000, 301000])) == 3
    assert audit.known_bad("EleutherAI/pythia-1b", steps) == {}
    assert audit.known_bad(None, steps) == {}


def test_rejects_known_bad_revision_with_its_issue() -> None:
    with pytest.raises(UserError, match=r"step 50,000 .*EleutherAI/pythia#206"):
        audit.refuse_known_bad("EleutherAI/pythia-12b", [48000, 50000])


def test_known_bad_names_ignore_case() -> None:
    assert audit.known_bad("eleutherai/Pythia-12B", [50000, 51000]).keys() == {50000}
    assert audit.known_bad(None, [50000]) == {}
