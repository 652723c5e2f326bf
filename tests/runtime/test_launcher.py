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
    print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(("chosen", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_compute_threads_sleep_unless_the_user_chose(chosen: str | None, used: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == used
