"""The warm-up steps of a run, read without its other settings.

Why not `load_config`: importing the schema takes a twentieth of the time in which `llmtrain
average` processes five checkpoints of GPT-2 small.
"""

import re
from pathlib import Path

_RESOLVED = re.compile(r"^schedule:\n(?:  .*\n)*?  warmup_steps: (\d{1,15})\n", re.MULTILINE)
"""The setting as `dump_config` writes it."""


def warmup_steps(file: Path) -> int:
    """Return `schedule.warmup_steps` of the configuration of a run."""
    if file.is_file() and (match := _RESOLVED.search(file.read_text("utf-8", "replace"))):
        return int(match[1])
    from llmtrain.config.loading import load_config  # also raises errors

    return load_config(file).schedule.warmup_steps
