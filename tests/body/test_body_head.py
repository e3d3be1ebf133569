"""What stands in a head node for what nobody asks for."""

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import time

from ray._private import node, utils, worker

from chrysalis_ray.body import agent
from chrysalis_ray.body.head import own_sigterm


def test_the_agent_says_that_nothing_is_served_and_ends_with_its_raylet(tmp_path):
    """The parent plays the raylet: it starts the agent, tells its number, and is killed."""
    told = [f"--session-dir={tmp_path}", "--node-id=abc", "--grpc-port=1"]
    script = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, sys.executable, agent.__file__, "ray/agent.py", *told]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as raylet:
        started = int(raylet.stdout.readline())
        files = [tmp_path / f"{port}_abc" for port in agent.PORTS]
        waited_until(lambda: all(file.exists() for file in files))
        assert {file.read_text() for file in files} == {"-1"}
        os.kill(started, 0)
        raylet.kill()
    waited_until(lambda: not is_running(started))
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_the_agent_of_a_raylet_that_is_gone_already_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    told = [f"--session-dir={tmp_path}", "--node-id=abc"]
    late = {**os.environ, "RAY_RAYLET_PID": str(gone.pid)}
    subprocess.run([sys.executable, agent.__file__, *told], env=late, check=True, timeout=30)


def is_running(process):
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def waited_until(is_so, seconds=30):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ray_leaves_sigterm_to_whoever_heeds_it():
    before = signal.getsignal(signal.SIGTERM)

    def heed(number, frame):
        raise AssertionError

    def of_ray(number, frame):
        raise AssertionError

    try:
        for heeded, afterwards in ((heed, heed), (signal.SIG_DFL, of_ray)):
            signal.signal(signal.SIGTERM, heeded)
            with own_sigterm():
                utils.set_sigterm_handler(of_ray)
            assert signal.getsignal(signal.SIGTERM) is afterwards
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "set_sigterm_handler(" in inspect.getsource(worker) + inspect.getsource(node)  # both go by what is replaced
    assert "signal.signal(" not in inspect.getsource(worker) + inspect.getsource(node)
