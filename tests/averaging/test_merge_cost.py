"""Cost of an average: constant memory, and each input is read once."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_runs import MakeRun

from llmtrain.averaging import audit
from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.safetensors_files import SafetensorsReader, encode_header
from llmtrain.checkpoints.series import run_series
from llmtrain.checkpoints.tensors import TensorSpec
from llmtrain.errors import UserError
from llmtrain.storage import integrity
from llmtrain.storage.integrity import Algorithm, Digest, digest_of, integrity_problems

GIGABYTE = 1 << 30

MEASURE = """
import resource, sys
from pathlib import Path
from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.checkpoints import series
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
found = series.folder_series(Path("series"))
specs = make_specs(found, AverageRequest(every=10, window=len(found.steps)))
average(found, specs, MergeOptions(allow_duplicates=True))
print(peak() - before)
"""


def write_sparse(path: Path, tensors: int, mark: int) -> None:
    """Write a sparse gigabyte of float32."""
    count = GIGABYTE // 4 // tensors
    entries = {
        f"t{i}": {
            "dtype": "F32",
            "shape": [count],
            "data_offsets": [i * count * 4, (i + 1) * count * 4],
        }
        for i in range(tensors)
    }
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<f", mark))
        file.truncate(8 + len(text) + tensors * count * 4)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "tensors"), [(2, 1), (5, 2048)])
def test_memory_of_a_gigabyte_average(tmp_path: Path, inputs: int, tensors: int) -> None:
    for number in range(1, inputs + 1):
        write_sparse(
            tmp_path / "series" / f"step{10 * number}" / "model.safetensors", tensors, number
        )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 10**6
    (written,) = (tmp_path / "averages").rglob("model.safetensors")
    with written.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        assert struct.unpack("<f", file.read(4))[0] == (inputs + 1) / 2
    written.unlink()


def test_all_windows_read_each_input_once(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(list(range(10, 210, 10)))
    read = 0
    original = SafetensorsReader.read

    def counting(self, name, start, stop, buffer):  # type: ignore[no-untyped-def]  # as the original
        nonlocal read
        raw = original(self, name, start, stop, buffer)
        read += raw.nbytes
        return raw

    monkeypatch.setattr(SafetensorsReader, "read", counting)
    hashed_separately: list[Path] = []

    def hash_separately(path: Path, *algorithm: Algorithm) -> Digest:
        hashed_separately.append(path)
        return digest_of(path, *algorithm)

    for module in (audit, integrity):
        monkeypatch.setattr(module, "digest_of", hash_separately)
    series = run_series(run)
    results = average(series, make_specs(series, AverageRequest(every=10, window=5, at="all")))
    assert len(results) == 16
    total = sum(
        spec.bytes for source in series.inputs.values() for spec in source.open().tensors.values()
    )
    assert read == total
    assert hashed_separately  # configs, which an average copies
    assert not [path for path in hashed_separately if path.suffix == ".safetensors"]
    assert not [problem for result in results for problem in integrity_problems(result.spec.target)]


def test_the_command_does_not_import_torch() -> None:
    """Importing torch takes longer than averaging five checkpoints of GPT-2 small."""
    code = "import sys, llmtrain.cli.average_output as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hashes_inputs_with_another_tensor_order(make_run: MakeRun) -> None:
    run = make_run([10, 20])
    path = run.snapshot(10) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    specs = {
        name: TensorSpec("F32", tuple(tensors[name].shape))
        for name in sorted(tensors, reverse=True)
    }
    header, _ = encode_header(specs, {})
    path.write_bytes(header + b"".join(tensors[name].numpy().tobytes() for name in specs))
    integrity.write_integrity(path.parent)
    series = run_series(run)
    specs = make_specs(series, AverageRequest(every=10, window=2))
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1  # flip a bit; the element stays finite
    intact = path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="recorded BLAKE3"):
        average(series, specs)
    path.write_bytes(intact)
    (result,) = average(series, specs)
    assert not integrity_problems(result.spec.target)
