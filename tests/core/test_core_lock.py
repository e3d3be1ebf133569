"""The lock on a run directory: one holder, told by name, gone with its holder however it ends."""

import signal
import subprocess
import sys

import pytest

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.lock import sole_owner

HOLDER = """
import sys, time
from pathlib import Path
from chrysalis_ray.core.lock import sole_owner
with sole_owner(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_kill_minus_nine_frees_the_place(tmp_path):
    lock = tmp_path / "run" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {holder.pid} on ") as refused, sole_owner(lock):
        pass
    assert "--name" in refused.value.remedy
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with sole_owner(lock):
        assert str(holder.pid) not in lock.read_text()


def test_the_lock_is_given_back_when_the_block_ends_and_when_it_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), sole_owner(tmp_path / ".lock"):
        raise ZeroDivisionError
    with sole_owner(tmp_path / ".lock"), pytest.raises(RunError, match="in use by"), sole_owner(tmp_path / ".lock"):
        pass


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written: ") as refused, sole_owner(tmp_path / "file" / "run" / ".lock"):
        pass
    assert "--runs" in refused.value.remedy
    assert (tmp_path / "file").read_text() == "in the way"
