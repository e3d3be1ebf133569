"""Every worker's folder on a fast disk is its own, goes with it, and is swept away where it was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.disk import DiskFolder

HOLDER = """
import sys, time
from pathlib import Path
from chrysalis_ray.training.disk import DiskFolder
folder = DiskFolder(Path(sys.argv[1]), 0)
(folder.path / "weights").write_bytes(b"0" * 1000)
print(folder.path, flush=True)
sys.stdin.readline()
"""


def held(disk: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(disk)], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_workers_do_not_share_a_folder_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "chrysalis-of-a-person").mkdir()
    ended, its = held(tmp_path)
    killed, left = held(tmp_path)
    try:
        assert its != left
        killed.kill()
        killed.wait()
        assert (left / "weights").exists()
        folder = DiskFolder(tmp_path, needed=1)
        assert not left.exists()
        assert (its / "weights").exists()  # the other one lives
        ended.communicate("\n", timeout=60)
        assert not its.exists()
        folder.close()
        assert [path.name for path in tmp_path.iterdir()] == ["chrysalis-of-a-person"]
    finally:
        for process in (ended, killed):
            process.kill()
            process.wait()


def test_a_disk_that_will_not_do_is_one_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        DiskFolder(tmp_path / "not-mounted", 0)
    assert not (tmp_path / "not-mounted").exists()
    with pytest.raises(ModelError, match=r"takes \d+ bytes and .* left"):
        DiskFolder(tmp_path, needed=1 << 62)
    assert not any(tmp_path.iterdir())
