"""The commands as Python functions, for scripts and notebooks. Importing it imports torch.

    run = pretrain(load_config(Path("configs/demo.yaml")), Path("runs/demo")).run
    average(run.path, AverageRequest(every=20))
    rows = evaluate(run.path)

Missing inputs and invalid values raise UserError; failures at run time raise RunFailed.
"""

from pathlib import Path

from llmtrain.averaging.average import average as average_series
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.averaging.spec import Average
from llmtrain.checkpoints.resolve import find_series, find_targets
from llmtrain.config.loading import load_config
from llmtrain.evaluation.generation import generate_text, load_generator
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions, Sampling
from llmtrain.evaluation.results import EvalResult
from llmtrain.evaluation.selection import choose_weights
from llmtrain.export.publish import export as export_weights
from llmtrain.training.run import pretrain

__all__ = [
    "AverageRequest",
    "EvalOptions",
    "Sampling",
    "average",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "pretrain",
]

Request = AverageRequest
Settings = EvalOptions
"""Earlier names, still accepted."""


def average(source: str | Path, request: AverageRequest) -> list[Average]:
    """Average checkpoints of a run, a folder or a series on the hub; return averages by step."""
    series = find_series(str(source))
    return average_series(series, make_specs(series, request))


def evaluate(target: str | Path, settings: EvalOptions | None = None) -> list[EvalResult]:
    """Return losses: of a run's averages and the raw weights of their steps, or of one model."""
    targets = find_targets(str(target), every_snapshot=False)
    return measure_losses(targets, settings or EvalOptions(), lambda *progress: None)


def generate(target: str | Path, prompt: str, sampling: Sampling | None = None) -> str:
    """Return the text that the model of a run, folder or hub repository generates."""
    weights = choose_weights(str(target)).weights
    return "".join(generate_text(*load_generator(weights.path), prompt, sampling or Sampling()))


def export(target: str | Path, to: Path, *, dtype: str = "fp32") -> Path:
    """Write weights as a Hugging Face repository into the new folder `to`."""
    weights = choose_weights(str(target)).weights
    export_weights(weights, to, dtype=dtype, name=str(to))
    return to
