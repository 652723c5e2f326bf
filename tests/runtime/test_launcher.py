"""Settings of the process that must precede the import of torch."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from llmtrain.cli.main import main

sys.argv = ["llmtrain", "--version"]
try:
    main()
finally:
    assert "torch" not in sys.modules
    print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("chosen", "used"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),  # a count would override it
    ],
)
def test_compute_threads_spin_briefly_unless_the_user_chose(
    chosen: dict[str, str], used: str
) -> None:
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {k: v for k, v in os.environ.items() if k not in ours} | chosen
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == used
