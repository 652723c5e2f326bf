"""Hostile configs, JSON files and token shards: refused with a message and a hint."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke, refused

from llmtrain.data.manifest import Manifest

AVERAGE_RUN = ("average", "runs/run", "--every", "2", "--window", "2")

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "name: !!python/object/apply:os.system ['touch pwned']",
            "could not determine a constructor",
        ),
        ("!!python/object/new:os.system ['touch pwned']", "could not determine a constructor"),
        ("name: !!python/name:os.system", "could not determine a constructor"),
        (LAUGHS + "name: *i", "aliases expand to too many values"),
        (LAUGHS + "averages: *i", "aliases expand to too many values"),
        (LAUGHS + "? *i\n: 1", "aliases expand to too many values"),
        (MERGES, "aliases expand to too many values"),
        ("a: &a [*a]", "aliases expand to too many values"),
        ("a: " + "[" * 50_000, "not valid YAML"),
        ("- " * 20_000, "not valid YAML"),
        ("seed: " + "9" * 5_000, "not valid YAML"),
        ("{" * 5_000, "not valid YAML"),
        ("name: \x00", "not valid YAML"),
    ],
)
def test_configs(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused("pretrain", "--config", "c.yaml", cwd=tmp_path, expected=expected)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("name", ["training.json", "config.json", "integrity.json"])
@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"a":' * 200_000, "9" * 5_000, '{"step": 1e999}', "\ud800", ""]
)
def test_json_of_a_run(workplace: Path, name: str, content: str) -> None:
    path = workplace / "runs/run/snapshots/step-00000008" / name
    path.write_text(content, errors="surrogatepass")
    refused(*AVERAGE_RUN, "--out", "out", cwd=workplace, expected=name)
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    "name", ["../../../../../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b"]
)
def test_a_record_that_names_other_files(workplace: Path, name: str) -> None:
    path = workplace / "runs/run/snapshots/step-00000008/integrity.json"
    document = json.loads(path.read_text())
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(document))
    expected = "a file name points outside the folder"
    assert expected in invoke("verify", path.parent, cwd=workplace).stdout
    refused(*AVERAGE_RUN, cwd=workplace, expected=expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"step": 1, "loss": ' + "9" * 5_000 + "}", "line 1: not a JSON object"),
        ("[" * 200_000, "line 1: not a JSON object"),
        ("17", "line 1: not a JSON object"),
        ('["step"]', "line 1: not a JSON object"),
        ("\ud800", "line 1: not a JSON object"),
        ("{}", "line 1: invalid training event: step is None"),
        ('{"step": "1"}', "step is '1'"),
        ('{"step": -1}', "step is -1"),
        (f'{{"step": {10**30}}}', "step is 1000"),
        ('{"step": true}', "step is True"),
        ('{"step": 1, "val/loss": [1]}', "val/loss is [1]"),
        ('{"step": 1, "val/loss": "' + "x" * 10_000_000 + '"}', "val/loss is 'xxx"),
    ],
)
def test_lines_of_metrics(workplace: Path, line: str, expected: str) -> None:
    path = workplace / "runs/run/metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}", errors="surrogatepass")
    refused("report", "runs/run", cwd=workplace, expected=expected)


def lie(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its hash with it."""
    path = data / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    document.pop("sha256", None)
    try:
        document["sha256"] = Manifest.model_validate_json(json.dumps(document)).sha256
    except ValueError:
        document["sha256"] = "0" * 64
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda d: d["train"]["shards"][0].update(name="../x.bin"),
            "shard 0 of train is named '../x.bin'",
        ),
        (
            lambda d: d["train"]["shards"][0].update(name="/etc/passwd"),
            "shard 0 of train is named",
        ),
        (
            lambda d: [d["train"].update(tokens=9), d["train"]["shards"][0].update(tokens=9)],
            "bytes instead of 1,042",
        ),
        (
            lambda d: [d["val"].update(tokens=2**70), d["val"]["shards"][0].update(tokens=2**70)],
            "bytes instead of",
        ),
        (
            lambda d: d["train"].update(tokens=-1),
            "train.tokens: Input should be greater than or equal to 0",
        ),
        (lambda d: d["tokenizer"].update(vocab_size=65536), "a different byte tokenizer"),
        (lambda d: d["tokenizer"].update(vocab_size=10**9), "tokenizer.vocab_size"),
        (lambda d: d["tokenizer"].update(eot=0), "a different byte tokenizer"),
        (lambda d: d["tokenizer"].update(name="../../x"), "unknown tokenizer '../../x'"),
        (lambda d: d.update(dtype="uint32"), "dtype: Extra inputs are not permitted"),
        (lambda d: d.update(train=None), "train: Input should be"),
    ],
)
def test_manifests_that_lie(
    workplace: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    lie(workplace / "data", change)
    refused(
        "pretrain",
        "--config",
        "config.yaml",
        "--run-dir",
        "other",
        cwd=workplace,
        expected=expected,
    )
    refused("eval", "runs/run", cwd=workplace, expected=expected)
    assert not (workplace / "other").exists()


def test_evaluation_names_the_place_of_an_id_beyond_the_vocabulary(workplace: Path) -> None:
    shard = workplace / "data" / "val-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1024 + 2 * 20 : 1024 + 2 * 22] = struct.pack(
        "<2H", 263, 300
    )  # 263: a row that only pads the model's
    shard.write_bytes(content)
    expected = "val-00000.bin contains id 263 at token 20, beyond the vocabulary of 257"
    refused(
        "eval",
        "runs/run/snapshots/step-00000008",
        "--tokens",
        "64",
        cwd=workplace,
        expected=expected,
    )


def test_training_names_an_id_beyond_the_vocabulary(workplace: Path) -> None:
    shard = workplace / "data" / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:1024] + struct.pack("<H", 40_000) * (len(content) // 2 - 512))
    outcome = invoke("pretrain", "--config", "config.yaml", "--run-dir", "other", cwd=workplace)
    assert outcome.code == 2
    expected = (
        r"error: data/train-00000.bin contains id 40000 at token [\d,]+, "
        r"beyond the vocabulary of 257\nhint: .*\n"
    )
    assert re.fullmatch(expected, outcome.stderr)
