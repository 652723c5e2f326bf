"""Steps from the names of checkpoints, as trainers write them."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.checkpoints.step_names import parse_series, parse_step


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000", 1000),
        ("checkpoint-1000", 1000),
        ("ckpt_0001000", 1000),
        ("iter_0001000", 1000),
        ("global_step1000", 1000),
        ("globalstep1000", 1000),
        ("step=1000-epoch=3", 1000),
        ("epoch=3-step=1000-v1", 1000),
        ("epoch=03-val_loss=0.39", 3),
        ("epoch=03-val_loss=0.39-v2", 3),
        ("epoch3_acc91", 3),
        ("ep2-ba1000-rank0", 1000),
        ("model_001000_rank3", 1000),
        ("model_1000_loss0.39", 1000),
        ("ckpt_1000_lr3e-4", 1000),
        ("ckpt_10k", 10_000),
        ("ckpt_1.5k", 1500),
        ("step2M", 2_000_000),
        ("stage1-step1000-tokens5B", 1000),
        ("warmup_steps=100-step=1000", 1000),
        ("2024-05-01_ckpt_1000", 1000),
        ("step1000-unsharded", 1000),
        ("gpt2-124M-1000", 1000),
        ("checkpoint_3_1000", 1000),
        # without a step
        ("last", None),
        ("last-v1", None),
        ("best", None),
        ("val_loss=0.39", None),
        ("model-val_loss0.39", None),
        ("ckpt-2024-05-30", None),
        ("ckpt_20240530_123000", None),
        ("2024-05-30T12h30m00", None),
        ("step=1.5", None),
        ("model-00001-of-00002", None),
        (".tmp-step100", None),
        ("tmp-checkpoint-1000", None),
        ("step1000.tmp", None),
        ("step-00001000-rewound", None),
        ("checkpoint-1000.old", None),
    ],
)
def test_steps_of_names(name: str, step: int | None) -> None:
    found = parse_step(name)
    assert (found and found.step) == step


FORMS: dict[str, Callable[[int], str]] = {
    "plain": "ckpt_{}".format,
    "glued": "step{}".format,
    "padded": "iter_{:012d}".format,
    "equals": "epoch=0-step={}".format,
    "thousands": lambda step: f"ckpt_{step // 1000}k" if step % 1000 == 0 else f"ckpt_{step}",
    "fractions": lambda step: f"step{step / 1000:g}k" if 0 < step < 10**5 else f"step{step}",
}


@given(form=st.sampled_from(sorted(FORMS)), steps=st.sets(st.integers(1, 10**9), min_size=1))
def test_every_form_returns_its_step(form: str, steps: set[int]) -> None:
    names = {FORMS[form](step): step for step in steps}
    assert {name: found.step for name, found in parse_series(names).items()} == names
    assert len({found.series for found in parse_series(names).values()}) == 1


@given(
    epochs=st.lists(st.integers(0, 10**4), min_size=2, max_size=9, unique=True),
    metrics=st.lists(
        st.tuples(
            st.sampled_from(["val_loss={:.2f}", "val_ppl={:.3e}", "acc{:.0f}", "loss{:.4f}"]),
            st.floats(0, 1e4),
        ),
        min_size=9,
        max_size=9,
    ),
    suffix=st.sampled_from(["", "-v1", "_rank0", "-2024-05-30", "_20240530_1230"]),
    form=st.sampled_from(["epoch={}", "epoch={:04d}", "ep{}", "model_{:06d}", "ckpt-{}"]),
)
def test_metrics_dates_and_versions_do_not_change_the_order(
    epochs: list[int], metrics: list[tuple[str, float]], suffix: str, form: str
) -> None:
    names = {
        f"{form.format(epoch)}-{metric.format(value)}{suffix}": epoch
        for epoch, (metric, value) in zip(sorted(epochs), metrics, strict=False)
    }
    found = parse_series(names)
    assert {name: each.step for name, each in found.items()} == names


def test_names_that_count_different_things_differ_in_series() -> None:
    one = [parse_step(name) for name in ("step=100", "iter_200", "epoch=1-step=300", "step4k")]
    assert {each and each.series for each in one} == {"step"}
    names = ("step=100", "epoch=3", "ckpt_100", "ckpt_3_100", "stage2-step100", "seed1-step100")
    assert len({each and each.series for each in map(parse_step, names)}) == len(names)


def test_optimizer_states_and_copies_are_left_out() -> None:
    names = ["model_000100", "optim_000100_rank0", "optim_000100_rank1", "model_000200", "best_200"]
    assert sorted(parse_series(names)) == ["model_000100", "model_000200"]
    only = ["best-epoch=1-step=100", "best-epoch=2-step=200"]
    assert sorted(parse_series(only)) == only
