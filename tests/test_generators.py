"""No call of the library moves a global generator of random numbers, torch's, numpy's or Python's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_public_function_and_every_command_leaves_the_generators_alone() -> None:
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.generators"], cwd=ROOT, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["failed"] == []
    assert found["not called"] == []
    assert found["functions"] > 150
    assert len(found["status"]) == 19
    assert set(found["status"].values()) == {0}
    assert found["moved"] == {}
