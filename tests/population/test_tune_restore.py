"""Why a run that was killed is replayed from its cuts, and not restored by Ray Tune: what Tune's own restore brings back.

Should a later Ray keep its schedulers, this is where it is noticed.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("restored_by_tune.py")


def told(folder, what):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), what], capture_output=True, text=True, timeout=240, check=False
    )
    return done, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_tune_restores_trials_and_forgets_what_its_scheduler_knew(tmp_path):
    killed, before = told(tmp_path, "first")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(line["trial"] for line in before if line["report"] == 2) == [1.0, 2.0, 3.0, 4.0]  # the whole first rung
    restored, after = told(tmp_path, "restored")
    assert restored.returncode == 0, restored.stderr[-2000:]
    (resumed,) = [line for line in after if "rungs" in line]
    assert resumed == {"rungs": [0, 0, 0], "trials": 4}
