"""A stage as jobs for Slurm: one `sbatch scripts/slurm.sbatch` a run, a branch after its parent.

Why lines for a shell: they can be read before they are run, and need no Slurm where they are made.

    print(script(first_seed(plan), plan.config, Path("runs/reproduce-gpu")))
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from reproduction.plan import Training

SBATCH = Path(__file__).resolve().parents[1] / "slurm.sbatch"


def script(trainings: Sequence[Training], config: Path, root: Path) -> str:
    """Shell commands that queue the runs; a parent that is not among them has ended before."""
    numbers = {training.name: number for number, training in enumerate(trainings)}
    lines = []
    for number, training in enumerate(trainings):
        after = ""
        if training.parent in numbers:
            after = f'--dependency="afterok:$job{numbers[training.parent]}" '
        words = shlex.join([str(SBATCH), *training.arguments(config, root)[2:]])
        lines.append(f"job{number}=$(sbatch --parsable {after}--job-name={training.name} {words})")
    return "\n".join(lines)
