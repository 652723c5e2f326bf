"""List the runs of an experiment: the paper's comparison as `llmtrain pretrain` commands.

A list of commands can be read, printed and handed to a scheduler.

    for training in first_seed(plan): print(training.arguments(plan.config, Path("runs")))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.config.loading import load_config

WINDOW = 5
"""Checkpoints of a LAWA window, as in the paper's code."""


_ONE_STATE = "checkpoint.keep_states=1"
"""Value of `checkpoint` for runs without branches."""


@dataclass(frozen=True)
class Training:
    """One `llmtrain pretrain` command."""

    name: str
    """Name of the run and of its folder."""
    kind: str
    """constant, cosine, cooldown, burst, after or calm."""
    rate: str
    """The peak learning rate, as in the name."""
    seed: int
    end: int
    """The last step."""
    settings: tuple[str, ...]
    """Overrides of the recipe (`--set`)."""
    parent: str | None = None
    """The run from which it branches."""
    step: int | None = None
    """Where."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.end - (self.step or 0)

    def arguments(self, config: Path, root: Path) -> list[str]:
        """Return the arguments of `llmtrain`."""
        words = [
            "pretrain",
            "--config",
            str(config),
            "--run-dir",
            str(root / (self.parent or self.name)),
        ]
        if self.parent is not None:
            words += ["--branch", self.name, "--from", str(self.step)]
        else:
            words += ["--set", f"name={self.name}"]
        return words + [word for setting in self.settings for word in ("--set", setting)]


@dataclass(frozen=True)
class Plan:
    """The sizes of an experiment and the recipe of its runs."""

    config: Path
    settings: tuple[str, ...]
    """Overrides of the recipe in all runs."""
    steps: int
    warmup: int
    spacing: int
    """Steps between two snapshots and between the checkpoints of a window."""
    rates: tuple[str, ...]
    """Peak learning rates, ascending."""
    seeds: tuple[int, ...]
    third: bool
    """Train all seeds at a third of the tuned rate, at it and at the largest; else at all rates."""
    fifths: tuple[int, ...]
    """Fifths of the run after which a cooldown is forecast, ending with 4."""
    tokens_per_step: int

    @classmethod
    def of(
        cls,
        config: Path,
        settings: Sequence[str],
        rates: Sequence[str],
        seeds: Sequence[int],
        *,
        third: bool,
        fifths: Sequence[int] = (2, 3, 4),
    ) -> "Plan":
        """Create a plan with the steps of the recipe and `settings`."""
        read = load_config(config, list(settings))
        return cls(
            config=config,
            settings=tuple(settings),
            steps=read.train.max_steps,
            warmup=read.schedule.warmup_steps,
            spacing=read.checkpoint.snapshot_every,
            rates=tuple(rates),
            seeds=tuple(seeds),
            third=third,
            fifths=tuple(fifths),
            tokens_per_step=read.tokens_per_step,
        )

    @property
    def cooldown(self) -> int:
        """First step of the cooldown over the last fifth."""
        return self.steps * 4 // 5

    @property
    def forecasts(self) -> tuple[int, ...]:
        """Steps at which a cooldown of a quarter of the steps so far begins."""
        return tuple(self.steps * fifths // 5 for fifths in self.fifths)

    @property
    def swa_early(self) -> int:
        """Start of the paper's early SWA: 7% of the run."""
        return self.steps * 7 // 100

    @property
    def swa_late(self) -> int:
        """Start of the paper's late SWA: 75% of the run."""
        return self.steps * 3 // 4

    def merged(self, end: int) -> int:
        """Return the number of checkpoints in a merge over the last fifth before step `end`."""
        return end // 5 // self.spacing

    @property
    def burst(self) -> int:
        """Steps with ten times the learning rate."""
        return max(self.steps // 180, 2)

    def constant(self, rate: str, seed: int) -> Training:
        """Return the schedule with warm-up and a constant rate."""
        return self._training("constant", rate, seed, self._schedule("constant"))

    def cosine(self, rate: str, seed: int) -> Training:
        """Return the cosine schedule from the peak to a tenth of it."""
        schedule = self._schedule("cosine", f"min_lr: {text(float(rate) / 10)}")
        return self._training("cosine", rate, seed, schedule, _ONE_STATE)

    def cooldown_from(self, step: int, rate: str, seed: int) -> Training:
        """Return a 1-sqrt cooldown to 0 branched from the constant run, over its last fifth.

        Bitwise equal to a run with this schedule from the beginning.
        """
        end = step + step // 4
        schedule = self._schedule("wsd", f"decay_steps: {end - step}", "shape: 1-sqrt")
        cooldown = self._training(
            "cooldown", rate, seed, f"train.max_steps={end}", schedule, _ONE_STATE
        )
        name = cooldown.name.replace("seed", f"to{end}-seed")
        return replace(
            cooldown, name=name, end=end, parent=self.constant(rate, seed).name, step=step
        )

    def spike(self, rate: str, seed: int) -> list[Training]:
        """Return a burst of ten times the rate, the run after it, and the same run without a burst.

        All are evaluated often. The third is bitwise equal to the constant run.
        """
        constant, end = self.constant(rate, seed).name, self.cooldown + self.burst
        close = (self._schedule("constant"), f"eval.every={max(self.spacing // 2, 1)}", _ONE_STATE)
        high = (f"optimizer.lr={text(10 * float(rate))}", f"train.max_steps={end}")
        burst = self._training("burst", rate, seed, *close, *high)
        after, calm = (self._training(kind, rate, seed, *close) for kind in ("after", "calm"))
        return [
            replace(burst, end=end, parent=constant, step=self.cooldown),
            replace(after, parent=burst.name, step=end),
            replace(calm, parent=constant, step=self.cooldown),
        ]

    def _schedule(self, name: str, *more: str) -> str:
        return f"schedule={{{', '.join([f'name: {name}', f'warmup_steps: {self.warmup}', *more])}}}"

    def _training(self, kind: str, rate: str, seed: int, *settings: str) -> Training:
        every = (*self.settings, f"optimizer.lr={rate}", f"seed={seed}", *settings)
        return Training(f"{kind}-{rate}-seed{seed}", kind, rate, seed, self.steps, every)


def text(rate: float) -> str:
    """Format a learning rate as in a run's name: 0.006 → "6e-3"."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def three_schedules(plan: Plan, rate: str, seed: int) -> list[Training]:
    """Return the constant, cosine and cooldown runs."""
    return [
        plan.constant(rate, seed),
        plan.cosine(rate, seed),
        plan.cooldown_from(plan.cooldown, rate, seed),
    ]


def first_seed(plan: Plan) -> list[Training]:
    """Return every rate with every schedule for one seed; the cosine runs come first."""
    seed = plan.seeds[0]
    runs = [three_schedules(plan, rate, seed) for rate in plan.rates]
    return [training for order in zip(*runs, strict=True) for training in order]


def further_seeds(plan: Plan, rates: Sequence[str], spiked: str) -> list[Training]:
    """Return these rates with all seeds, the forecasts, and a spike at one rate."""
    trainings = []
    for seed in plan.seeds:
        for rate in rates:
            trainings += three_schedules(plan, rate, seed)
        trainings += plan.spike(spiked, seed)
        for rate in rates:
            trainings += [plan.cooldown_from(step, rate, seed) for step in plan.forecasts[:-1]]
    done = set(first_seed(plan))
    return [training for training in trainings if training not in done]
