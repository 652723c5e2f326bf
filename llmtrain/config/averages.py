"""The averages that a run can keep while it trains, as its configuration names them.

Why apart from the other sections: post-hoc averaging reads them too.

    EmaConfig(kind="ema", decay=0.9).label  # "ema-0.9"
"""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.base import Natural, Positive, Section


class _AverageConfig(Section):
    every: Positive = 1
    """Steps between two updates, which happen at multiples of it."""
    start: Natural | None = None
    """The first step that may be an update; default: see each kind."""
    save_every: Positive | None = None
    """Steps between two saves, a multiple of checkpoint.snapshot_every; default: see each kind. The
    last step is always saved."""
    offload: bool = False
    """Keep the average in (pinned) host memory instead of on the device."""

    def _spaced(self, label: str) -> str:
        return label if self.every == 1 else f"{label}-every-{self.every}"


class EmaConfig(_AverageConfig):
    """Exponential moving average, from the first step; saved at checkpoint.state_every.

    Source: the paper's code; decay at update n is min(decay, 1 - (1 + n)^(-2/3)).
    """

    kind: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return self._spaced(f"ema-{self.decay:g}")


class SwaConfig(_AverageConfig):
    """Uniform mean of all weights from step `start` on (SWA); saved at checkpoint.state_every."""

    kind: Literal["swa"]
    start: Natural

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return self._spaced(f"swa-from-{self.start}")


class LawaConfig(_AverageConfig):
    """Mean of the last `window` weights, `every` steps apart, once warm-up is over (LAWA).

    The weights wait in a queue in host memory. Saved at checkpoint.state_every.
    """

    kind: Literal["lawa"]
    every: Positive
    window: Positive = 5
    offload: Literal[True] = True

    @property
    def label(self) -> str:
        """The name under which it is logged and saved; not that of the post-hoc average."""
        return f"online-lawa-{self.window}x{self.every}"


class RunningMeanConfig(_AverageConfig):
    """Mean of all weights since warm-up, exact to float64; saved with each snapshot.

    From two of them, `llmtrain average --method dense` makes the mean over every step between.
    """

    kind: Literal["running-mean"]

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return "running-mean"


class PowerEmaConfig(_AverageConfig):
    """Power-function EMA of relative width `sigma_rel`; saved with each snapshot.

    From two of them, `llmtrain average --method posthoc-ema` makes one of any width.
    """

    kind: Literal["power-ema"]
    sigma_rel: Annotated[float, Field(gt=0, lt=0.288)]

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return f"power-ema-{self.sigma_rel:g}"


AverageConfig = Annotated[
    EmaConfig | SwaConfig | LawaConfig | RunningMeanConfig | PowerEmaConfig,
    Field(discriminator="kind"),
]
