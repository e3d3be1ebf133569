"""Processes that read or tokenise beside the one that builds: whatever ends that one ends them, and they say nothing of it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.pools import deaf_to_ctrl_c, process_pool

SCAN = """
    import sysconfig
    from pathlib import Path
    from chrysalis_ray.config.genome import GenomeBuild
    from chrysalis_ray.genome import batch
    from chrysalis_ray.genome.documents import make_document
    from chrysalis_ray.genome.scanning import scan

    if __name__ == "__main__":
        batch.BATCH_CHARACTERS = 2000
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))[:900]
        texts = {file: file.read_text(errors="ignore") for file in files}
        print("begun", flush=True)
        documents = [make_document(text, file.name, str(file), "code", "") for file, text in texts.items()]
        try:
            scan(documents, GenomeBuild(processes=2))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
"""


def children_of(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.fixture
def scanning(tmp_path):
    """A process of a session of its own that scans with two others; it, and they."""
    (tmp_path / "scan.py").write_text(textwrap.dedent(SCAN))
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, str(tmp_path / "scan.py")], **given)
    assert process.stdout.readline() == "begun\n"
    while len(children := children_of(process)) < 3:  # with the one that tracks resources
        assert process.poll() is None
        time.sleep(0.01)
    yield process, children
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def gone(children):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)
    return True


def test_whoever_scans_for_a_process_that_was_killed_ends_too(scanning):
    process, children = scanning
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(children)


def test_a_ctrl_c_in_a_terminal_is_told_once(scanning):
    process, children = scanning
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    said, complained = process.communicate(timeout=60)
    assert (said, complained) == ("interrupted\n", "")
    assert gone(children)


def test_a_process_of_the_pool_that_is_killed_is_an_error_with_a_remedy():
    def kill_one():
        with process_pool(2) as pool:
            assert list(pool.map(abs, [-1])) == [1]
            list(pool.map(os._exit, [9]))

    with pytest.raises(GenomeError, match="was killed, perhaps for want of memory"):
        kill_one()


def test_a_ctrl_c_that_comes_while_processes_start_is_heard_afterwards():
    passed = []

    def interrupted():
        with deaf_to_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)
            passed.append("the block")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert passed == ["the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
