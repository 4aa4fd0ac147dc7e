"""A seeded few of the faults of `tests/faults`; `make test-faults` injects all of them."""

import subprocess
import sys


def test_no_fault_of_a_sample_shows() -> None:
    command = [sys.executable, "-m", "tests.faults", "--sample"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
