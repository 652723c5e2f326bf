"""Series of checkpoints in folders: steps, shards, links, integers, dtypes, companion files."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from average_of_folder import run
from safetensors.torch import load_file, save_file
from tiny_runs import MakeRun, model_at, write_checkpoint

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.resolve import find_series
from llmtrain.checkpoints.series import folder_series
from llmtrain.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_steps_come_from_names_not_file_times(tmp_path: Path) -> None:
    for step in (1000, 90, 200):
        write_checkpoint(tmp_path / "s" / f"checkpoint-{step}", model_at(step))
    (tmp_path / "s" / "checkpoint-best").mkdir()
    (tmp_path / "s" / "notes-7").mkdir()
    write_checkpoint(tmp_path / "s" / "checkpoint-0", model_at(0))
    os.utime(tmp_path / "s" / "checkpoint-90", (2e9, 2e9))
    assert folder_series(tmp_path / "s").steps == [90, 200, 1000]


@pytest.mark.parametrize(
    "names",
    [
        ("step10", "checkpoint-10"),
        ("epoch=1-step=10", "epoch=1-step=10-v1"),
        ("model_000010_rank0", "model_000010_rank1"),
    ],
)
def test_two_checkpoints_of_one_step_are_rejected(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_checkpoint(tmp_path / "s" / name, model_at(10))
    with pytest.raises(UserError, match="both have step 10") as caught:
        folder_series(tmp_path / "s")
    assert "separate folder" in caught.value.hint
    assert not re.search("delete|remove|keep one", caught.value.hint)


def write_files(folder: Path, *documents: tuple[str, dict[str, object]]) -> None:
    folder.mkdir()
    for name, document in documents:
        torch.save({"model": {"w": torch.rand(3)}} | document, folder / name)


def test_an_epoch_is_preferred_to_a_metric(tmp_path: Path) -> None:
    losses = {0: 0.95, 1: 0.9, 2: 0.62, 3: 0.39}
    names = [f"epoch={epoch:02d}-val_loss={loss}.ckpt" for epoch, loss in losses.items()]
    write_files(tmp_path / "s", *((name, {}) for name in [*names, "last.ckpt", "last-v1.ckpt"]))
    inputs = folder_series(tmp_path / "s").inputs
    assert [Path(source.location).name for source in inputs.values()] == names
    assert list(inputs) == [0, 1, 2, 3]  # Lightning counts epochs from 0
    series = folder_series(tmp_path / "s")
    request = AverageRequest(method="ema", decay=0.5, every=1)
    assert [source.step for source in make_specs(series, request)[0].inputs] == [0, 1, 2, 3]


def test_optimizer_shards_next_to_a_series_are_left_out(tmp_path: Path) -> None:
    parts = ("model_{:06d}.pt", "optim_{:06d}_rank0.pt", "optim_{:06d}_rank1.pt")
    names = [part.format(step) for part in parts for step in (10, 20)]
    write_files(tmp_path / "s", *((name, {}) for name in names))
    paths = [source.location for source in folder_series(tmp_path / "s").inputs.values()]
    assert [Path(path).name for path in paths] == ["model_000010.pt", "model_000020.pt"]


@pytest.mark.parametrize(
    "names",
    [
        ("epoch=3.ckpt", "step=200.ckpt"),
        ("checkpoint2.pt", "checkpoint_1_500.pt"),
        ("stage1-step1000.pt", "stage2-step500.pt"),
    ],
)
def test_names_that_count_different_things_are_rejected(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    write_files(tmp_path / "s", *((name, {}) for name in names))
    with pytest.raises(UserError, match="several series of checkpoints: 1 like"):
        folder_series(tmp_path / "s")


STORED = {
    "global_step": [{"global_step": 100 - n, "epoch": n} for n in range(3)],
    "iter_num": [{"iter_num": 100 - n} for n in range(3)],
    "epoch and step": [{"epoch": 3 - n, "step": 100 + n} for n in range(3)],
}


@pytest.mark.parametrize("kind", STORED)
def test_stored_steps_that_contradict_the_names_are_an_error(tmp_path: Path, kind: str) -> None:
    documents = list(enumerate(STORED[kind], start=1))
    write_files(tmp_path / "s", *((f"ckpt_{n}0.pt", dict(document)) for n, document in documents))
    with pytest.raises(UserError, match=r"ckpt_10\.pt stores .*, .*ckpt_20\.pt stores"):
        run(tmp_path / "s")
    backwards = [(f"ckpt_{4 - n}0.pt", dict(document)) for n, document in documents]
    write_files(tmp_path / "t", *backwards)
    assert run(tmp_path / "t").spec.step == 30


@pytest.mark.parametrize("file", ["trainer_state.json", "training.json"])
def test_a_stored_step_next_to_the_weights_is_compared(tmp_path: Path, file: str) -> None:
    for step in (10, 20, 30):
        folder = write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
        stored = {"global_step": 1000 - step, "log_history": [{"loss": float("nan")}]}
        if file == "training.json":
            stored = {"step": 1000 - step, "tokens": 1, "lr": 0.1, "run": "x"}
        (folder / file).write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"stores step 990, .* stores step 980"):
        run(tmp_path / "s")


def test_a_step_counted_within_its_epoch_is_no_contradiction(tmp_path: Path) -> None:
    documents = [{"epoch": 1, "step": 500}, {"epoch": 2, "step": 500}, {"epoch": 3, "step": 0}]
    write_files(tmp_path / "s", *((f"ckpt_{n + 1}0.pt", d) for n, d in enumerate(documents)))
    assert run(tmp_path / "s").spec.step == 30


def test_batch_norm_counters_are_copied_from_the_newest(tmp_path: Path) -> None:
    """If other integers differ, the average still fails."""
    for step in (10, 20, 30):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        for _ in range(step):
            model(torch.randn(8, 3))
        for name, extra in (("s", {}), ("t", {"model.counter": torch.tensor(step)})):
            (tmp_path / name).mkdir(exist_ok=True)
            torch.save(model.state_dict() | extra, tmp_path / name / f"ckpt_{step}.pt")
    weights = load_file(run(tmp_path / "s").spec.target / "model.safetensors")
    assert weights["1.num_batches_tracked"] == 30
    with pytest.raises(UserError, match=r"model\.counter .* differs between"):
        run(tmp_path / "t")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "x.bin",
        "..\\x.safetensors",
        7,
        "",
    ],
)
def test_index_with_outside_path_is_rejected(tmp_path: Path, name: object) -> None:
    folder = write_checkpoint(tmp_path / "step10", model_at(10), shards=2)
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["embed.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not the name of a"):
        open_checkpoint(folder, step=10)


def test_outside_link_is_rejected_except_in_the_hub_cache(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "step10"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match="link to a file outside"):
        open_checkpoint(folder, step=10)
    cached = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "secret.safetensors").rename(blobs / "123")
    (cached / "model.safetensors").symlink_to("../../blobs/123")
    assert open_checkpoint(cached, step=10).tensors.keys() == {"w"}


def test_shard_that_contradicts_its_index_is_rejected(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step10", model_at(10), shards=2)
    save_file({"stranger": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="is not the shard its index describes"):
        open_checkpoint(folder, step=10)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint(folder, step=10)


def test_integers_must_be_equal_unless_last_is_chosen(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        model = model_at(step) | {"position_ids": torch.arange(7) + (step == 20)}
        write_checkpoint(tmp_path / "s" / f"step{step}", model)
    with pytest.raises(UserError, match=r"position_ids \(I64\[7\]\).*step 10 and step 20"):
        run(tmp_path / "s")
    result = run(tmp_path / "s", MergeOptions(integers="last"))
    assert torch.equal(
        load_file(result.spec.target / "model.safetensors")["position_ids"], torch.arange(7)
    )


def test_tensors_missing_at_some_steps_are_listed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        extra = {"inv_freq": torch.ones(3)} if step == 10 else {}
        write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step) | extra)
    with pytest.raises(UserError, match=r"inv_freq: F32\[3\] at step 10, absent at step 30"):
        run(tmp_path / "s")


def test_overflow_in_the_output_dtype_is_an_error(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / "s" / f"step{step}", {"w": torch.full((4,), 1e6 + step)})
    with pytest.raises(UserError, match="F16 cannot represent"):
        run(tmp_path / "s", MergeOptions(dtype="F16"))
    with np.errstate(all="raise"):
        run(tmp_path / "s", MergeOptions(dtype="BF16"))


def test_companion_files_are_copied_without_code(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "merges.txt",
            "vocab.json",
            "modeling_x.py",
        ):
            (folder / name).write_text(str(step))
    target = run(tmp_path / "s").spec.target
    assert (target / "tokenizer.json").read_text() == "30"
    assert (target / "merges.txt").exists()
    assert not (target / "modeling_x.py").exists()


def test_average_of_averages(tmp_path: Path, make_run: MakeRun) -> None:
    made = make_run([10, 20, 30, 40])
    series = find_series(str(made.path))
    average(series, make_specs(series, AverageRequest(every=10, window=2, at="all", label="pairs")))
    pairs = find_series(str(made.averages / "pairs"))
    (result,) = average(pairs, make_specs(pairs, AverageRequest(every=20, window=2)))
    (direct,) = average(series, make_specs(series, AverageRequest(every=10, window=4)))
    got, wanted = (load_file(r.spec.target / "model.safetensors") for r in (result, direct))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=3e-7, atol=1e-9)


def test_single_shard_with_an_index_becomes_a_single_file(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
        shard = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / shard)
        weight_map = dict.fromkeys(model_at(step), shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    target = run(tmp_path / "s").spec.target
    assert (target / "model.safetensors").is_file()
    assert not (target / "model.safetensors.index.json").exists()


def test_overflow_in_the_input_dtype_is_an_error(tmp_path: Path) -> None:
    for step, value in ((10, 60000.0), (20, 0.0), (30, -60000.0)):
        tensor = torch.full((3,), value, dtype=torch.float16)
        write_checkpoint(tmp_path / "s" / f"step{step}", {"a": tensor, "b": torch.rand(4)})
    (tmp_path / "w.json").write_text('{"10": -1, "20": 1, "30": 1}')
    series = find_series(str(tmp_path / "s"))
    with pytest.raises(UserError, match="F16 cannot represent"):
        average(
            series, make_specs(series, AverageRequest(method="custom", weights=tmp_path / "w.json"))
        )


def test_incomplete_average_is_not_reused(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
    target = run(tmp_path / "s").spec.target
    assert run(tmp_path / "s").cached
    with pytest.raises(UserError, match="is not the average"):
        run(tmp_path / "s", MergeOptions(dtype="F64"))
    (target / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged"):
        run(tmp_path / "s")


def test_companion_file_with_outside_link_is_rejected(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="link to a file outside"):
        run(tmp_path / "s")


def test_integers_are_compared_within_a_window(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        model = model_at(step) | {"mask": torch.tensor([step > 20])}
        write_checkpoint(tmp_path / "s" / f"step{step}", model)
    series = find_series(str(tmp_path / "s"))
    request = AverageRequest(every=10, window=2, at="all", disjoint=True)
    assert [a.spec.step for a in average(series, make_specs(series, request))] == [20, 40]


def test_training_json_of_another_program_is_ignored(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = write_checkpoint(tmp_path / "s" / f"step{step}", model_at(step))
        (folder / "training.json").write_text('{"learning_rate": 1, "epochs": 3}')
    assert run(tmp_path / "s").spec.step == 30


def test_names_that_differ_only_in_prefix_are_rejected(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / "s").mkdir(exist_ok=True)
        weights = {"module.x": torch.rand(3), "x": torch.rand(3)}
        torch.save({"model": weights}, tmp_path / "s" / f"step{step}.pt")
    with pytest.raises(UserError, match="contains x twice"):
        run(tmp_path / "s", window=2)


def test_invalid_model_args_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    shape = {"n_layer": "abc", "n_head": 2, "n_embd": 8, "vocab_size": None, "block_size": 8}
    for step in (10, 20):
        torch.save(
            {"model": {"x": torch.rand(3)}, "model_args": shape}, tmp_path / "s" / f"step{step}.pt"
        )
    with pytest.raises(UserError, match="not a valid GPT-2 config"):
        run(tmp_path / "s", window=2)
