"""Average a folder of checkpoints and check the result."""

from pathlib import Path

import torch
from oracles import average_of, ulps
from tiny_runs import load_all
from torch import Tensor

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.averaging.spec import Average
from llmtrain.checkpoints.resolve import find_series


def run(root: Path, settings: MergeOptions | None = None, window: int = 3) -> Average:
    """Average the last checkpoints of a folder, ten steps apart."""
    series = find_series(str(root))
    (result,) = average(
        series, make_specs(series, AverageRequest(every=10, window=window)), settings
    )
    return result


def assert_is_average(folder: Path, models: list[dict[str, Tensor]]) -> None:
    """Assert one unit in the last place of the float64 mean; integers are equal."""
    exact = average_of(models, [1 / len(models)] * len(models))
    got = load_all(folder)
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        assert (
            ulps(tensor, exact[name]) <= 1
            if tensor.is_floating_point()
            else torch.equal(tensor, exact[name])
        )
