"""Configuration files: accepted values, overrides and error messages."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import REPOSITORY

from llmtrain.config.loading import dump_config, load_config
from llmtrain.config.schema import MuonConfig, RunConfig, SpamConfig, TrainConfig, flatten
from llmtrain.config.sections import (
    AverageConfig,
    BlockWarmupConfig,
    MixConfig,
    ScheduleConfig,
)
from llmtrain.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))

GOOD = """
data: {path: data/x}
optimizer:
  lr: 6e-3
train: {batch_sequences: 32, micro_batch: 16, max_steps: 100}
schedule: {name: cosine, warmup_steps: 10, min_lr: 6e-4}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def error_message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), list(overrides))
    assert caught.value.hint
    return str(caught.value)


def test_scientific_notation_and_default_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.optimizer.lr == 0.006
    assert config.name == "mine"
    assert config.tokens_per_step == 32 * 1024


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("lr: 6e-3", "learning_rate: 1"),
            "line 4: optimizer.learning_rate: unknown key; valid keys are name, lr, betas",
        ),
        (GOOD.replace("min_lr", "cycle_steps"), "unknown key for cosine, valid only for cyclic"),
        (GOOD.replace("lr: 6e-3", "lr: 1:30"), "line 4: optimizer.lr"),
        (GOOD.replace("lr: 6e-3", ""), "line 3: optimizer: must be a section with keys"),
        (GOOD + "eval: {tokens: 1}\n", "eval.tokens"),
        (GOOD + "seed: 99999999999999999999\n", "seed"),
        (
            GOOD.replace("{name: cosine, warmup_steps: 10, min_lr: 6e-4}", "{name: constant}"),
            "schedule.warmup_steps (2,000) must be smaller than train.max_steps (100)",
        ),
        (
            GOOD.replace("optimizer", "optimiser"),
            "line 3: optimiser: unknown key; did you mean optimizer?",
        ),
        (GOOD.replace("lr: 6e-3", "betas: [0.9]"), "line 4: optimizer.betas"),
        (
            GOOD.replace("lr: 6e-3", "lr: fast"),
            "line 4: optimizer.lr: Input should be a valid number (got 'fast')",
        ),
        (GOOD.replace("lr: 6e-3", "lr: .nan"), "optimizer.lr"),
        (
            GOOD.replace("lr: 6e-3", "name: muon\n  muon: {momentun: 0.9}"),
            "line 5: optimizer.muon.momentun: unknown key; did you mean momentum?",
        ),
        (
            GOOD.replace("data/x", "data/x, mix: [{path: y, weigt: 0.1}]"),
            "data.mix.0.weigt: unknown key; did you mean weight?",
        ),
        (
            GOOD.replace("warmup_steps", "warmup"),
            "schedule.warmup: unknown key; did you mean warmup_steps?",
        ),
        (GOOD.replace("cosine", "cosin"), "line 6: schedule: name 'cosin' is not one of"),
        (
            GOOD.replace("min_lr: 6e-4", "min_lr: 1"),
            "min_lr must not exceed the peak, optimizer.lr (0.006)",
        ),
        (
            GOOD.replace("warmup_steps: 10", "warmup_steps: 100"),
            "warmup_steps (100) must be smaller than train.max_steps (100)",
        ),
        (
            GOOD.replace("micro_batch: 16", "micro_batch: 12"),
            "micro_batch (12) must divide the 32 sequences of a step, for example 8",
        ),
        (
            GOOD.replace("batch_sequences: 32", "batch_tokens: 1000"),
            "must be a multiple of data.block_size (1024)",
        ),
        (
            GOOD.replace("micro_batch: 16", "compile: cuda-graphs").replace(
                "data/x", "data/x, block_warmup: {start: 64, steps: 9}"
            ),
            "cuda-graphs needs a constant block size, but data.block_warmup changes it",
        ),
        (
            GOOD.replace("batch_sequences: 32, ", ""),
            "set exactly one of batch_tokens and batch_sequences",
        ),
        (GOOD.replace("data: {path: data/x}", ""), "data: required key is missing"),
        (GOOD + "data: {path: y}\n", "duplicate key 'data'"),
        (GOOD + "model: {n_head: 5}\n", "n_embd (768) must be a multiple of n_head (5)"),
        (
            GOOD + "averages: [{kind: emma}]\n",
            "line 7: averages.0: kind 'emma' is not one of ema, swa, lawa, running-mean, "
            "power-ema; did you mean ema?",
        ),
        (GOOD + "averages: [{kind: ema}, {kind: ema}]\n", "averages contains ema-0.9 twice"),
        (
            GOOD + "averages: [{kind: ema, save_every: 7}]\n",
            "must be a multiple of checkpoint.snapshot_every",
        ),
        (GOOD + "name: ../up\n", "name"),
        (GOOD + "log: !!python/object:os.system {}\n", "not valid YAML"),
        ("a: [", "line 1: not valid YAML"),
        ("- 1", "contains no keys"),
        ("", "contains no keys"),
    ],
)
def test_invalid_config_reports_place_and_problem(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_message(tmp_path, text)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = error_message(
        tmp_path, GOOD.replace("lr: 6e-3", "beta: 1"), "train.max_step=5", "log.every=x"
    )
    assert "optimizer.beta" in text
    assert "--set: train.max_step: unknown key; did you mean max_steps?" in text
    assert "--set: log.every: Input should be a valid integer (got 'x')" in text


def test_merge_keys_and_whole_floats(tmp_path: Path) -> None:
    text = GOOD.replace("name: cosine,", "<<: {horizon: 1e2}, name: cosine,")
    assert load_config(write(tmp_path, text)).train.max_steps == 100


def test_errors_in_overrides_name_the_option(tmp_path: Path) -> None:
    assert error_message(tmp_path, GOOD, "schedule.name=cosin").startswith(
        "--set: schedule: name 'cosin'"
    )
    assert error_message(tmp_path, GOOD, "averages=[{kind: emma}]").startswith(
        "--set: averages.0: kind 'emma'"
    )


@pytest.mark.parametrize("value", ["1" + 4000 * "0", "1e300", str(2**63)])
@pytest.mark.parametrize("key", ["train.max_steps", "train.micro_batch", "log.every"])
def test_integers_beyond_64_bits_are_one_short_error(tmp_path: Path, key: str, value: str) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match="should be less than 922337203685477") as caught:
        load_config(path, [f"{key}={value}"])
    assert len(str(caught.value)) < 500


def test_override_fills_empty_section(tmp_path: Path) -> None:
    text = GOOD.replace("  lr: 6e-3", "")
    assert load_config(write(tmp_path, text), ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3


def test_overrides_replace_file_values(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "averages: [{kind: ema}]\n")
    config = load_config(path, ["optimizer.lr=1e-3", "averages.0.decay=0.99", "eval.every=7"])
    assert (config.optimizer.lr, config.averages[0].decay, config.eval.every) == (1e-3, 0.99, 7)


@pytest.mark.parametrize(
    "override", ["lr", "=3", "name.x.y=3", "averages.4.decay=1", "a=[", "data=3"]
)
def test_invalid_override(tmp_path: Path, override: str) -> None:
    error_message(tmp_path, GOOD, override)


@pytest.mark.parametrize("path", ["nothing.yaml", "."])
def test_unreadable_file(path: str) -> None:
    with pytest.raises(UserError, match="cannot read the config"):
        load_config(Path(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_round_trips(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("file", ["demo.yaml", "README.md"])
def test_every_key_is_explained(file: str) -> None:
    text = (REPOSITORY / "configs" / file).read_text()
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    kinds = get_args(get_args(ScheduleConfig)[0]) + get_args(get_args(AverageConfig)[0])
    optional = (BlockWarmupConfig, MixConfig, MuonConfig, SpamConfig, TrainConfig)
    keys = {key.split(".")[-1] for key in flatten(config)}
    keys |= {key for section in (*kinds, *optional) for key in section.model_fields}
    assert [key for key in sorted(keys) if not re.search(rf"\b{key}\b", text)] == []


@pytest.mark.parametrize(
    ("name", "lr", "tokens", "every"),
    [
        ("gpt2-small", 6e-4, 393_216, 200),
        ("gpt2-small-highlr", 6e-3, 393_216, 200),
        ("gpt2-medium", 3e-4, 147_456, 2000),
        ("gpt2-medium-highlr", 3e-3, 147_456, 2000),
        ("gpt2-large", 2e-4, 49_152, 1000),
        ("gpt2-large-highlr", 2e-3, 49_152, 1000),
    ],
)
def test_recipes_match_the_paper(name: str, lr: float, tokens: int, every: int) -> None:
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    assert (config.optimizer.lr, config.tokens_per_step) == (lr, tokens)
    assert config.checkpoint.snapshot_every == every
    assert (config.train.max_steps, config.schedule.warmup_steps) == (70_000, 2000)


@given(st.text(max_size=60))
def test_any_text_loads_or_fails_with_a_hint(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        load_config(path)
    except UserError as error:
        assert error.hint


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*RunConfig.model_fields, "lr", "name", "path"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    )
)
def test_any_yaml_value_loads_or_fails_with_a_hint(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.mktemp("config") / "any.yaml"
    path.write_text(yaml.safe_dump(value))
    try:
        load_config(path)
    except UserError as error:
        assert str(error) and error.hint
