"""The Python API: training, averaging, evaluating, exporting and generating."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmtrain.api import (
    Request,
    Sampling,
    average,
    evaluate,
    export,
    generate,
    load_config,
    pretrain,
)
from llmtrain.config.schema import RunConfig


def test_every_function_on_one_run(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    config = load_config(tmp_path / "tiny.yaml", ["train.max_steps=20", "averages=[]"])
    run = pretrain(config, tmp_path / "runs" / "tiny", log=lambda line: None).run

    (made,) = average(run.path, Request(every=2, window=5))
    assert made.spec.label == "lawa-5x2"
    rows = {row.label: row for row in evaluate(run.path)}
    assert set(rows) == {"raw", "lawa-5x2"}
    assert rows["lawa-5x2"].delta == pytest.approx(rows["lawa-5x2"].loss - rows["raw"].loss)
    assert rows["raw"].loss < 5.6  # untrained: ln 264 = 5.58

    greedy = Sampling(max_tokens=20, temperature=0)
    exported = export(run.path, tmp_path / "exported")
    text = generate(run.path, "The", greedy)
    assert text
    assert generate(exported, "The", greedy) == text
