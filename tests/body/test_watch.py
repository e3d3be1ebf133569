"""When a body that makes no progress is taken for dead, and when not; and that a process is what it was before it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from chrysalis_ray.body.roster import Life, Roster
from chrysalis_ray.body.turn import Turn, Work
from chrysalis_ray.body.watch import LEAST_SECONDS, LOOK_SECONDS, TIMES, UNKNOWN_SECONDS, Pulse, Watch, birth, end_process


def silent(watch: Watch, life: Life, seconds: float) -> list[Life]:
    """Who hangs after so many seconds in which omega looked every second."""
    found = []
    for _ in range(int(seconds)):
        found += watch.hanging([life], LOOK_SECONDS)
    return found


def test_too_long_is_many_times_the_longest_silence_that_ended_by_itself() -> None:
    watch, life = Watch(1), Life(0, number=1)
    watch.sign(life)  # it asks for work
    assert watch.limit(life) == UNKNOWN_SECONDS  # nobody knows yet how long a pass takes
    assert not silent(watch, life, 40)
    watch.sign(life)
    assert watch.limit(life) == TIMES * 40
    assert not silent(watch, life, TIMES * 40)
    assert silent(watch, life, 1) == [life]
    quick = Watch(1)
    for _ in range(3):
        quick.sign(life)
        quick.hanging([life], 0.1)
    assert quick.limit(life) == LEAST_SECONDS


def test_a_life_that_loads_its_base_is_given_longer_than_was_written_and_no_measure_is_taken_of_it() -> None:
    watch, life = Watch(1, hang_seconds=10.0), Life(0, number=1)
    assert not silent(watch, life, 500)
    watch.sign(life)
    assert watch.longest is None
    assert not silent(watch, life, 10)
    assert silent(watch, life, 1) == [life]
    younger = Life(0, number=2)
    assert not silent(watch, younger, 500)


def test_seconds_count_only_while_omega_gets_to_run_and_the_body_has_something_to_do() -> None:
    watch, life = Watch(2, hang_seconds=10.0), Life(1, number=7)
    watch.sign(life)
    for _ in range(4):
        assert not watch.hanging([life], 3600.0)  # the machine slept, or was too slow to look
    assert watch.silent == [0.0, 8 * LOOK_SECONDS]
    assert not watch.hanging([], LOOK_SECONDS)
    assert watch.silent == [0.0, 0.0]
    watch.ended.add(life.number)
    assert not silent(watch, life, 100)  # it was killed, and waits to be manifested anew


def test_only_a_life_with_a_part_of_the_turn_and_workers_is_watched() -> None:
    roster = Roster(2)
    first = roster.begin(0)
    roster.life(first).workers[0] = (1, "node", "then")
    roster.begin(1)  # its workers have not said where they are
    assert roster.busy() == []
    work = tuple(Work(None, "a", f"b{index}", 0, None) for index in range(2))  # type: ignore[arg-type]
    roster.publish(Turn(0, "train", work=work))
    assert [life.number for life in roster.busy()] == [first]
    roster.hand_in(first, 0, ())
    assert roster.busy() == []


def test_a_pulse_is_sent_at_once_and_then_at_most_every_so_often() -> None:
    sent: list[int] = []
    pulse = Pulse(lambda: sent.append(1), seconds=3600.0)
    for _ in range(100):
        pulse()
    assert sent == [1]


def test_a_stopped_process_is_killed_and_another_with_its_number_is_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        born = birth(process.pid)
        assert born.isdigit()
        assert born != birth(os.getpid())
        assert not end_process(process.pid, str(int(born) - 1))
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        assert end_process(process.pid, born)
        assert process.wait(timeout=30) == -signal.SIGKILL
        assert birth(process.pid) == ""
        assert not end_process(process.pid, born)
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["a b) c", "plain"])
def test_a_birth_is_read_whatever_a_process_calls_itself(name: str) -> None:
    code = f"import ctypes, time; ctypes.CDLL(None).prctl(15, {name.encode()!r}); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert birth(process.pid).isdigit()
    finally:
        process.kill()
        process.wait()
