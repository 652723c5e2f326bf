"""Which runs are trained: the paper's comparison as `llmtrain pretrain` commands, by one recipe.

Why apart from what runs them: a list of commands can be read, printed and handed to a scheduler.

    for training in first_seed(Plan.of("configs/reproduce-cpu.yaml")): print(training.command(Path("runs")))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config_file import load_config

WINDOW = 5
"""Checkpoints of a LAWA window, as in the paper's code."""


@dataclass(frozen=True)
class Training:
    """One `llmtrain pretrain` command."""

    name: str
    """Of the run, and of its folder."""
    settings: tuple[str, ...]
    """What `--set` changes in the recipe."""
    parent: str | None = None
    """The run that it branches off."""
    step: int | None = None
    """Where."""

    def arguments(self, config: Path, root: Path) -> list[str]:
        """The words after `llmtrain`."""
        words = ["pretrain", "--config", str(config), "--run-dir", str(root / (self.parent or self.name))]
        if self.parent is not None:
            words += ["--branch", self.name, "--from", str(self.step)]
        else:
            words += ["--set", f"name={self.name}"]
        return words + [word for setting in self.settings for word in ("--set", setting)]


@dataclass(frozen=True)
class Plan:
    """The sizes of an experiment, and the recipe of its runs."""

    config: Path
    settings: tuple[str, ...]
    """Changes to the recipe that all runs have."""
    steps: int
    warmup: int
    spacing: int
    """Steps between two snapshots, and between the checkpoints of a window."""
    rates: tuple[str, ...]
    """Peak learning rates, ascending."""
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, config: Path, settings: Sequence[str], rates: Sequence[str], seeds: Sequence[int]) -> "Plan":
        """As the recipe, with `settings`, has the steps."""
        read = load_config(config, list(settings))
        return cls(
            config,
            tuple(settings),
            read.train.max_steps,
            read.schedule.warmup_steps,
            read.checkpoint.snapshot_every,
            tuple(rates),
            tuple(seeds),
        )

    @property
    def cooldown(self) -> int:
        """The step from which the last fifth cools down."""
        return self.steps * 4 // 5

    @property
    def forecasts(self) -> tuple[int, ...]:
        """Steps from which a cooldown of a quarter of the steps so far (a fifth of its run) is trained."""
        return tuple(self.steps * fifths // 5 for fifths in (2, 3, 4))

    @property
    def burst(self) -> int:
        """Steps with ten times the learning rate."""
        return max(self.steps // 180, 2)

    def constant(self, rate: str, seed: int) -> Training:
        """Warm-up, then the peak to the end."""
        schedule = f"schedule={{name: constant, warmup_steps: {self.warmup}}}"
        return self._whole(f"constant-{rate}-seed{seed}", rate, seed, schedule)

    def cosine(self, rate: str, seed: int) -> Training:
        """From the peak to a tenth of it."""
        schedule = f"schedule={{name: cosine, warmup_steps: {self.warmup}, min_lr: {text(float(rate) / 10)}}}"
        one_state = "checkpoint.keep_states=1"  # nothing branches off
        return self._whole(f"cosine-{rate}-seed{seed}", rate, seed, schedule, one_state)

    def cooldown_from(self, step: int, rate: str, seed: int) -> Training:
        """A 1-sqrt cooldown to 0 off the constant run; it takes a fifth of the steps it ends with.

        The same steps as those of a run that had this schedule from its beginning.
        """
        end = step + step // 4
        schedule = (
            f"schedule={{name: wsd, warmup_steps: {self.warmup}, decay_steps: {end - step}, shape: 1-sqrt}}"
        )
        name = f"cooldown-{rate}-to{end}-seed{seed}"
        settings = (f"train.max_steps={end}", schedule, "checkpoint.keep_states=1")
        return self._branch(name, self.constant(rate, seed), step, rate, seed, *settings)

    def spike(self, rate: str, seed: int) -> Iterator[Training]:
        """A burst of ten times the rate off the constant run, what comes after it, and the same without a burst.

        All are evaluated closely. The third takes the same steps as the constant run, bit for bit.
        """
        constant, end = self.constant(rate, seed), self.cooldown + self.burst
        high = text(10 * float(rate))
        close = (
            f"schedule={{name: constant, warmup_steps: {self.warmup}}}",
            f"eval.every={max(self.spacing // 2, 1)}",
            "checkpoint.keep_states=1",
        )
        end_burst = (f"train.max_steps={end}", *close)
        burst = self._branch(f"burst-{rate}-seed{seed}", constant, self.cooldown, high, seed, *end_burst)
        yield burst
        yield self._branch(f"after-{rate}-seed{seed}", burst, end, rate, seed, *close)
        yield self._branch(f"calm-{rate}-seed{seed}", constant, self.cooldown, rate, seed, *close)

    def _whole(self, name: str, rate: str, seed: int, *settings: str) -> Training:
        return Training(name, (*self.settings, f"optimizer.lr={rate}", f"seed={seed}", *settings))

    def _branch(
        self, name: str, parent: Training, step: int, rate: str, seed: int, *settings: str
    ) -> Training:
        whole = self._whole(name, rate, seed, *settings)
        return Training(name, whole.settings, parent.name, step)


def text(rate: float) -> str:
    """A learning rate in two digits, as it is written in a name: 0.006 → "6e-3"."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def three_schedules(plan: Plan, rate: str, seed: int) -> list[Training]:
    """Constant, cosine, and constant with a cooldown."""
    return [
        plan.constant(rate, seed),
        plan.cosine(rate, seed),
        plan.cooldown_from(plan.cooldown, rate, seed),
    ]


def first_seed(plan: Plan) -> list[Training]:
    """Every rate with every schedule, one seed: those that the best rate is looked for among come first."""
    seed = plan.seeds[0]
    runs = [three_schedules(plan, rate, seed) for rate in plan.rates]
    return [training for order in zip(*runs, strict=True) for training in order]


def further_seeds(plan: Plan, tuned: str, largest: str) -> list[Training]:
    """What the first seed's results ask for: three rates with all seeds, forecasts, and the spike."""
    rates = list(dict.fromkeys([tuned, largest, text(float(tuned) / 3)]))
    trainings = []
    for seed in plan.seeds:
        for rate in rates:
            trainings += three_schedules(plan, rate, seed)
        trainings += plan.spike(tuned, seed)
        for rate in rates:
            trainings += [plan.cooldown_from(step, rate, seed) for step in plan.forecasts[:-1]]
    done = set(first_seed(plan))
    return [training for training in trainings if training not in done]
