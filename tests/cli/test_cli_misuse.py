"""What a user gets wrong around a run: each a message with a remedy and an exit code, and nothing written elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chrysalis_ray.cli.outcome import verb
from chrysalis_ray.core.lock import sole_owner

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chrysalis_ray", "run", "experiments/quickstart.yaml", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", ""])
def test_a_name_that_is_a_path_is_wrong_usage(tmp_path: Path, name: str) -> None:
    done = run("--runs", str(tmp_path / "runs"), "--name", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_second_identical_command_is_refused_while_the_first_works(tmp_path: Path) -> None:
    with sole_owner(tmp_path / "runs" / "quickstart" / ".lock"):
        done = run("--runs", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert f"in use by process {os.getpid()}" in done.stderr
    assert "remedy: " in done.stderr
    assert [path.name for path in (tmp_path / "runs" / "quickstart").iterdir()] == [".lock"]


def test_runs_that_cannot_be_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--runs", str(tmp_path / "file"))
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_where_nobody_answers_is_told_before_any_work(tmp_path: Path) -> None:
    done = run("--runs", str(tmp_path), "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert "nobody answers at 127.0.0.1:1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_message_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with open("/dev/full", "w") as stream:
            stream.write("x" * 100_000)

    with pytest.raises(SystemExit) as ended:
        verb(write)()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "remedy: free some disk space" in error
    assert "Traceback" not in error


def test_a_reader_that_leaves_early_is_no_failure_of_ours() -> None:
    done = subprocess.run(
        f"{sys.executable} -m chrysalis_ray schema | head -c 10",
        cwd=ROOT,
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
