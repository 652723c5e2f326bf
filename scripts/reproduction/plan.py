"""Which runs are trained: the paper's comparison as `llmtrain pretrain` commands, by one recipe.

Why apart from what runs them: a list of commands can be read, printed and handed to a scheduler.

    for training in first_seed(plan): print(training.arguments(plan.config, Path("runs")))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.config.loading import load_config

WINDOW = 5
"""Checkpoints of a LAWA window, as in the paper's code."""


_ONE_STATE = "checkpoint.keep_states=1"
"""Where nothing branches off."""


@dataclass(frozen=True)
class Training:
    """One `llmtrain pretrain` command."""

    name: str
    """Of the run, and of its folder."""
    kind: str
    """constant, cosine, cooldown, burst, after or calm."""
    rate: str
    """The peak learning rate that it is compared by."""
    seed: int
    end: int
    """Its last step."""
    settings: tuple[str, ...]
    """What `--set` changes in the recipe."""
    parent: str | None = None
    """The run that it branches off."""
    step: int | None = None
    """Where."""

    @property
    def steps(self) -> int:
        """Steps that it takes."""
        return self.end - (self.step or 0)

    def arguments(self, config: Path, root: Path) -> list[str]:
        """The words after `llmtrain`."""
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
    third: bool
    """All seeds are given a third of the tuned rate, it and the largest that trains; else every rate."""
    fifths: tuple[int, ...]
    """Fifths of the run after which a cooldown is forecast; the last is 4."""
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
        """As the recipe, with `settings`, has the steps."""
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
        """The step from which the last fifth cools down."""
        return self.steps * 4 // 5

    @property
    def forecasts(self) -> tuple[int, ...]:
        """Steps from which a cooldown of a quarter of the steps so far (a fifth of its run) is trained."""
        return tuple(self.steps * fifths // 5 for fifths in self.fifths)

    @property
    def swa_early(self) -> int:
        """Where the paper's early SWA begins: at 7% of the run."""
        return self.steps * 7 // 100

    @property
    def swa_late(self) -> int:
        """Where its late SWA begins: at 75%."""
        return self.steps * 3 // 4

    def merged(self, end: int) -> int:
        """Checkpoints in a merge that stands for the cooldown that ends at step `end`: those of its fifth."""
        return end // 5 // self.spacing

    @property
    def burst(self) -> int:
        """Steps with ten times the learning rate."""
        return max(self.steps // 180, 2)

    def constant(self, rate: str, seed: int) -> Training:
        """Warm-up, then the peak to the end."""
        return self._training("constant", rate, seed, self._schedule("constant"))

    def cosine(self, rate: str, seed: int) -> Training:
        """From the peak to a tenth of it."""
        schedule = self._schedule("cosine", f"min_lr: {text(float(rate) / 10)}")
        return self._training("cosine", rate, seed, schedule, _ONE_STATE)

    def cooldown_from(self, step: int, rate: str, seed: int) -> Training:
        """A 1-sqrt cooldown to 0 off the constant run; it takes a fifth of the steps it ends with.

        The same steps as those of a run that had this schedule from its beginning, bit for bit.
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
        """A burst of ten times the rate off the constant run, what comes after it, and the same without a burst.

        All are evaluated closely. The third takes the same steps as the constant run, bit for bit.
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


def further_seeds(plan: Plan, rates: Sequence[str], spiked: str) -> list[Training]:
    """What the first seed's results ask for: these rates with all seeds, forecasts, and a spike at one rate."""
    trainings = []
    for seed in plan.seeds:
        for rate in rates:
            trainings += three_schedules(plan, rate, seed)
        trainings += plan.spike(spiked, seed)
        for rate in rates:
            trainings += [plan.cooldown_from(step, rate, seed) for step in plan.forecasts[:-1]]
    done = set(first_seed(plan))
    return [training for training in trainings if training not in done]
