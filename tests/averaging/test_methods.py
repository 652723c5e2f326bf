"""Every method in every dtype equals a float64 sum; properties of the merge."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import average_of, ulps
from safetensors.torch import load_file, save_file
from tiny_runs import load_all, model_at, write_checkpoint
from torch import Tensor

from llmtrain.averaging import coefficients
from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.merge import WeightedSum, merge
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.averaging.spec import Average
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.series import folder_series
from llmtrain.checkpoints.tensors import round_to, to_float64
from llmtrain.errors import UserError
from llmtrain.storage.integrity import write_integrity

STEPS = (100, 200, 300, 400, 500, 600)


@pytest.fixture(autouse=True)
def _change_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_series(
    root: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, steps: Sequence[int] = STEPS
) -> Path:
    for step in steps:
        write_checkpoint(root / f"step{step}", model_at(step, dtype), shards=shards)
    return root


def run(root: Path, options: MergeOptions | None = None, **request: Any) -> list[Average]:
    series = folder_series(root)
    return average(series, make_specs(series, AverageRequest(**request)), options)


REQUESTS: list[tuple[dict[str, Any], list[int], list[float]]] = [
    ({"every": 100}, [200, 300, 400, 500, 600], coefficients.uniform(5)),
    ({"every": 200, "window": 2, "at": "500"}, [300, 500], coefficients.uniform(2)),
    ({"every": 100, "window": 3, "disjoint": True}, [400, 500, 600], coefficients.uniform(3)),
    ({"method": "linear", "every": 100, "window": 4}, [300, 400, 500, 600], coefficients.linear(4)),
    (
        {"method": "decay", "every": 100, "window": 4},
        [300, 400, 500, 600],
        coefficients.decay(4, "1-sqrt"),
    ),
    (
        {"method": "decay", "shape": "cosine", "every": 100, "window": 3},
        [400, 500, 600],
        coefficients.decay(3, "cosine"),
    ),
    ({"method": "swa", "every": 200, "start": 200}, [200, 400, 600], coefficients.uniform(3)),
    ({"method": "ema", "every": 100, "decay": 0.7}, list(STEPS), coefficients.exponential(6, 0.7)),
    (
        {"method": "ema", "every": 100, "half_life": 150.0, "window": 3},
        [400, 500, 600],
        coefficients.exponential(3, 2 ** (-100 / 150)),
    ),
    (
        {"every": 100, "window": 3, "blend": 0.25},
        [400, 500, 600],
        coefficients.blend([1 / 3] * 3, 0.25),
    ),
]


@pytest.mark.parametrize(
    ("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 1)]
)
@pytest.mark.parametrize(("request_", "steps", "weights"), REQUESTS)
def test_within_one_unit_in_the_last_place(
    tmp_path: Path,
    request_: dict[str, Any],
    steps: list[int],
    weights: list[float],
    dtype: torch.dtype,
    shards: int,
) -> None:
    root = make_series(tmp_path / "series", dtype=dtype, shards=shards)
    (result,) = run(root, **request_)
    assert [source.step for source in result.spec.inputs] == steps
    assert result.spec.weights == pytest.approx(weights)
    exact = average_of([model_at(step, dtype) for step in steps], weights)
    got = load_all(result.spec.target)
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        if tensor.is_floating_point():
            assert tensor.dtype == dtype
            assert ulps(tensor, exact[name]) <= 1, name
        else:
            assert torch.equal(tensor, exact[name])


def test_float64_stays_float64(tmp_path: Path) -> None:
    root = make_series(tmp_path / "series", dtype=torch.float64)
    (result,) = run(root, every=100)
    exact = average_of([model_at(s, torch.float64) for s in STEPS[1:]], [0.2] * 5)
    for name, tensor in load_all(result.spec.target).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, exact[name], rtol=1e-14, atol=1e-15)


def test_output_dtype(tmp_path: Path) -> None:
    root = make_series(tmp_path / "series")
    (result,) = run(root, MergeOptions(dtype="BF16"), every=100)
    exact = average_of([model_at(s) for s in STEPS[1:]], [0.2] * 5)
    got = load_all(result.spec.target)
    assert got["embed.weight"].dtype == torch.bfloat16
    assert ulps(got["embed.weight"], exact["embed.weight"]) == 0
    assert '"dtype": "bfloat16"' in (result.spec.target / "config.json").read_text()
    reopened = open_checkpoint(result.spec.target, step=600)
    assert reopened.tensors.keys() == got.keys()


def test_output_is_sharded_as_the_newest_input(tmp_path: Path) -> None:
    root = make_series(tmp_path / "series", shards=3)
    (result,) = run(root, every=100)
    names = {path.name for path in result.spec.target.glob("*.safetensors")}
    assert names == {path.name for path in (root / "step600").glob("*.safetensors")}
    for name in names:
        assert (
            load_file(result.spec.target / name).keys() == load_file(root / "step600" / name).keys()
        )


def test_custom_weights_by_step_and_by_position(tmp_path: Path) -> None:
    root = make_series(tmp_path / "series")
    (tmp_path / "w.json").write_text('{"600": 1.5, "200": -0.5}')
    (result,) = run(root, method="custom", weights=tmp_path / "w.json")
    assert [i.step for i in result.spec.inputs] == [200, 600]
    exact = average_of([model_at(200), model_at(600)], [-0.5, 1.5])
    got = load_all(result.spec.target)
    assert max(ulps(got[name], exact[name]) for name in ("embed.weight", "norm.weight")) <= 1
    (tmp_path / "list.json").write_text("[0.25, 0.75]")
    results = run(
        root, method="custom", weights=tmp_path / "list.json", every=300, at="all", label="two"
    )
    assert [[i.step for i in r.spec.inputs] for r in results] == [
        [100, 400],
        [200, 500],
        [300, 600],
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"200": 0.5}', "sum to 0.5"),
        ('{"200": 0.5, "0200": 0.5}', "a step appears twice"),
        ('{"200": 0.5, "200": 0.5}', "a step appears twice"),
        ('{"250": 1.0}', "missing steps: 250"),
        ('{"x": 1.0}', "does not contain weights"),
        ('{"200": "a"}', "does not contain weights"),
        ("[NaN]", "does not contain weights"),
        ("{", "cannot read"),
        ("[]", "does not contain weights"),
    ],
)
def test_rejects_invalid_weights(tmp_path: Path, content: str, said: str) -> None:
    root = make_series(tmp_path / "series")
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(UserError, match=said):
        run(root, method="custom", weights=tmp_path / "w.json")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"method": "other"}, "unknown"),
        ({"every": 0}, "--every is not between"),
        ({"every": 100, "window": 0}, "--window is not between"),
        ({"every": 100, "label": "raw"}, "--label raw"),
        (
            {"method": "ema", "every": 100, "decay": 0.9, "window": 3, "start": 200},
            "--from and --window",
        ),
        ({"method": "swa", "every": 100}, "needs --from"),
        ({"method": "swa", "every": 150, "start": 100}, "no checkpoints at"),
        ({"method": "swa", "every": 100, "start": 700}, "no checkpoint from step 700 on"),
        ({"method": "ema", "every": 100}, "either --decay D"),
        ({"method": "ema", "every": 100, "decay": 0.9, "half_life": 3.0}, "either --decay D"),
        ({"method": "ema", "every": 100, "decay": 1.0}, r"not in \[0, 1\)"),
        ({"method": "ema", "every": 100, "half_life": -1.0}, "not a positive number"),
        ({"method": "decay", "shape": "square", "every": 100}, "--shape"),
        ({"method": "lawa", "every": 100, "decay": 0.9}, "does not take --decay"),
        ({"method": "custom"}, "needs --weights"),
        ({"method": "dense", "start": 200, "at": "100"}, "A before --at B"),
        ({"method": "dense", "start": 100, "at": "200"}, "did not store a running mean"),
        ({"method": "posthoc-ema"}, "needs --sigma-rel"),
        ({"method": "posthoc-ema", "sigma_rel": 0.1}, "did not store a power-function EMA"),
        ({"every": 100, "blend": 1.5}, "not a share"),
        ({"every": 100, "label": "a/b"}, "not a folder name"),
    ],
)
def test_rejects_invalid_requests(tmp_path: Path, request_: dict[str, Any], said: str) -> None:
    root = make_series(tmp_path / "series")
    with pytest.raises(UserError, match=said):
        run(root, **request_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lawa", "linear"])
def test_one_input_at_a_time_gives_the_same_bytes(
    tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    root = make_series(tmp_path / "series", dtype=dtype, shards=2)
    (whole,) = run(root, every=100, method=method, label="whole")
    (folded,) = run(
        root, MergeOptions(discard_inputs=True), every=100, method=method, label="folded"
    )
    names = sorted(path.name for path in whole.spec.target.iterdir())
    assert names == sorted(path.name for path in folded.spec.target.iterdir())
    for path in whole.spec.target.glob("model*"):
        assert path.read_bytes() == (folded.spec.target / path.name).read_bytes()


def test_swa_at_all_grows_by_one_checkpoint(tmp_path: Path) -> None:
    root = make_series(tmp_path / "series")
    results = run(root, method="swa", every=100, start=400, at="all")
    assert [[i.step for i in r.spec.inputs] for r in results] == [
        [400],
        [400, 500],
        [400, 500, 600],
    ]


def test_ema_without_start_stops_at_a_gap(tmp_path: Path) -> None:
    root = make_series(tmp_path / "series", steps=(100, 200, 400, 500, 600))
    (result,) = run(root, method="ema", every=100, decay=0.5)
    assert [i.step for i in result.spec.inputs] == [400, 500, 600]


# --- properties of the merge itself -------------------------------------------------------------

FLOATS = hnp.arrays(np.float32, 9, elements=st.floats(-(2.0**10), 2.0**10, width=32))


def mean_of(folder: Path, arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Merge one-tensor checkpoints through files."""
    checkpoints = []
    for number, array in enumerate(arrays):
        path = folder / str(number)
        path.mkdir(exist_ok=True)
        save_file({"w": torch.from_numpy(array.copy())}, path / "model.safetensors")
        checkpoints.append(open_checkpoint(path, step=number))
    out = np.zeros_like(arrays[0])

    def write(name: str, start: int, raw: np.ndarray) -> None:
        out[start : start + len(raw)] = raw

    merge(checkpoints, [WeightedSum(tuple(range(len(arrays))), tuple(weights))], [write])
    return out


QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(FLOATS)
def test_average_of_one_checkpoint_is_itself(tmp_path: Path, array: np.ndarray) -> None:
    np.testing.assert_array_equal(mean_of(tmp_path, [array], [1.0]), array)


@QUICK
@given(FLOATS, st.integers(2, 7), st.booleans())
def test_average_of_equal_inputs_is_the_input(
    tmp_path: Path, array: np.ndarray, count: int, linear: bool
) -> None:
    weights = coefficients.linear(count) if linear else coefficients.uniform(count)
    np.testing.assert_array_equal(mean_of(tmp_path, [array] * count, weights), array)


@QUICK
@given(st.lists(FLOATS, min_size=2, max_size=5), st.randoms())
def test_order_of_a_uniform_window_does_not_matter(
    tmp_path: Path, arrays: list[np.ndarray], random: Any
) -> None:
    shuffled = list(arrays)
    random.shuffle(shuffled)
    weights = coefficients.uniform(len(arrays))
    np.testing.assert_array_equal(
        mean_of(tmp_path, arrays, weights), mean_of(tmp_path, shuffled, weights)
    )


@QUICK
@given(st.lists(FLOATS, min_size=6, max_size=6))
def test_merge_of_merges_equals_the_merge(tmp_path: Path, arrays: list[np.ndarray]) -> None:
    whole = mean_of(tmp_path, arrays, [1 / 6] * 6)
    halves = [mean_of(tmp_path, part, [1 / 3] * 3) for part in (arrays[:3], arrays[3:])]
    largest = max(float(np.abs(array).max()) for array in arrays)
    np.testing.assert_allclose(
        mean_of(tmp_path, halves, [0.5, 0.5]), whole, rtol=2e-7, atol=largest * 2e-7
    )


@pytest.mark.slow
@settings(max_examples=300)
@given(hnp.arrays(np.float64, 20, elements=st.floats(-1e39, 1e39)))
def test_bfloat16_is_rounded_once(values: np.ndarray) -> None:
    """Compare with exact arithmetic: nearest bfloat16, ties to even."""
    from fractions import Fraction

    raw = round_to(values, "BF16")
    for value, bits in zip(values, raw.tolist(), strict=True):
        if (bits & 0x7F80) == 0x7F80:
            assert abs(value) >= (2 - 2**-8) * 2.0**127
            continue
        around = np.array([bits], np.uint16)
        back = np.empty(1)
        to_float64(around, "BF16", back)
        distance = abs(Fraction(float(back[0])) - Fraction(float(value)))
        for other in (bits - 1, bits + 1):
            if (
                0 <= (int(other) & 0x7FFF) < 0x7F80
                and 0 <= other <= 0xFFFF
                and (other ^ bits) < 0x8000
            ):
                to_float64(np.array([other], np.uint16), "BF16", back)
                neighbour = abs(Fraction(float(back[0])) - Fraction(float(value)))
                assert distance < neighbour or (distance == neighbour and bits % 2 == 0)


def test_bfloat16_avoids_double_rounding() -> None:
    """1 + 2^-8 + 2^-40 is above the midpoint; rounding to float32 first would make it a tie."""
    assert round_to(np.array([1 + 2**-8 + 2**-40]), "BF16")[0] == 0x3F81
    assert round_to(np.array([1 + 2**-8]), "BF16")[0] == 0x3F80


@pytest.mark.slow
def test_no_drift_over_a_thousand_windows(tmp_path: Path) -> None:
    """Each window is a new sum, so the last one is as exact as the first."""
    generator = np.random.default_rng(0)
    walk = np.cumsum(
        generator.normal(size=(1004, 8)).astype(np.float32) * 1e-3, axis=0, dtype=np.float32
    )
    for step, weights in enumerate(walk, start=1):
        path = tmp_path / "walk" / f"step{step}"
        path.mkdir(parents=True)
        save_file({"w": torch.from_numpy(weights.copy())}, path / "model.safetensors")
    results = run(tmp_path / "walk", every=1, at="all", window=5)
    assert len(results) == 1000
    for result in (results[0], results[-1]):
        last = result.spec.step
        exact: Tensor = torch.from_numpy(walk[last - 5 : last].astype(np.float64).mean(0))
        assert ulps(load_file(result.spec.target / "model.safetensors")["w"], exact) == 0
    assert math.isfinite(float(walk.sum()))


def test_an_average_of_an_earlier_version_is_recognized(tmp_path: Path) -> None:
    """Earlier versions computed SHA-256 of inputs without a record."""
    root = make_series(tmp_path / "series")
    (first,) = run(root, every=100)
    path = first.spec.target / "provenance.json"
    document = json.loads(path.read_text())
    for source in document["inputs"]:
        del source["blake3"], source["blake3_source"]
        weights = Path(source["path"]) / "model.safetensors"
        source["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        source["sha256_source"] = "computed"
    path.write_text(json.dumps(document))
    write_integrity(first.spec.target)
    assert run(root, every=100)[0].cached
    document["inputs"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    write_integrity(first.spec.target)
    with pytest.raises(UserError, match="is not the average of these checkpoints"):
        run(root, every=100)
