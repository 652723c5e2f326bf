"""Print a stage as Slurm jobs: one `sbatch scripts/slurm.sbatch` per run, branches last.

The output is shell lines: they can be read before they run, and printing them needs no Slurm.

    print(script(first_seed(plan), plan.config, Path("runs/reproduce-gpu")))
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from reproduction.plan import Training

SBATCH = Path(__file__).resolve().parents[1] / "slurm.sbatch"


def script(trainings: Sequence[Training], config: Path, root: Path) -> str:
    """Return shell commands that queue the runs; a parent that is not listed has ended."""
    numbers = {training.name: number for number, training in enumerate(trainings)}
    lines = []
    for number, training in enumerate(trainings):
        after = ""
        if training.parent in numbers:
            after = f'--dependency="afterok:$job{numbers[training.parent]}" '
        words = shlex.join([str(SBATCH), *training.arguments(config, root)[2:]])
        lines.append(f"job{number}=$(sbatch --parsable {after}--job-name={training.name} {words})")
    return "\n".join(lines)
