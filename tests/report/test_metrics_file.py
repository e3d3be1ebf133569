import errno
import fcntl
import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.report.metrics import append_metrics, read_metrics, told_positions


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"variant": v, "report": r, "train_loss": 3.0 - r / 10} for r in range(3) for v in ("a", "b")]
    for row in rows:
        append_metrics(path, row)
    assert read_metrics(path) == rows
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_a_torn_last_line_is_dropped_and_cut_by_the_next_append(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"variant": "a", "report": 0})
    with path.open("ab") as stream:
        stream.write(b'{"variant":"a","rep')
    assert [row["report"] for row in read_metrics(path)] == [0]
    append_metrics(path, {"variant": "a", "report": 1})
    assert [row["report"] for row in read_metrics(path)] == [0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_is_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"variant"')
    assert read_metrics(path) == []
    append_metrics(path, {"variant": "a", "report": 0})
    assert read_metrics(path) == [{"variant": "a", "report": 0}]


def test_after_a_resume_the_later_report_counts_and_the_lost_future_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for report, loss in [(0, 4.0), (1, 3.0), (2, 2.0), (1, 3.5)]:
        append_metrics(path, {"variant": "a", "report": report, "train_loss": loss})
    append_metrics(path, {"variant": "b", "report": 2, "train_loss": 1.0})
    assert [(row["variant"], row["report"], row["train_loss"]) for row in read_metrics(path)] == [
        ("a", 0, 4.0),
        ("a", 1, 3.5),
        ("b", 2, 1.0),
    ]


def test_numbers_json_cannot_carry_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"variant": "a", "report": 0, "train_loss": math.nan, "epigenome": {"express": {"x": math.inf}}})
    assert read_metrics(path)[0] == {"variant": "a", "report": 0, "train_loss": None, "epigenome": {"express": {"x": None}}}


@pytest.mark.parametrize(
    "line", [b"[]", b'{"variant": 1, "report": 2}', b'{"variant": "a", "report": true}', b"\xff\xfe", b"{"]
)
def test_a_broken_line_inside_the_file_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"variant":"a","report":0}\n' + line + b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def _append_many(path: Path, variant: str) -> None:
    for report in range(50):
        append_metrics(path, {"variant": variant, "report": report, "filler": "x" * 2000})


def _append_slowly(path: Path) -> None:
    with path.open("ab") as stream:  # half a line, then the other half, under the lock that every append takes
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(b'{"variant":"a",')
        stream.flush()
        time.sleep(1.0)
        stream.write(b'"report":0}\n')


def test_a_line_that_another_process_is_still_writing_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = multiprocessing.get_context("fork").Process(target=_append_slowly, args=(path,))
    writer.start()
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.01)
    append_metrics(path, {"variant": "b", "report": 0})
    writer.join()
    assert read_metrics(path) == [{"variant": "a", "report": 0}, {"variant": "b", "report": 0}]


def test_a_file_that_cannot_be_written_is_one_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"variant": "a", "report": 0})

    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("chrysalis_ray.report.metrics.os.write", full)
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: .*No space left"):
            append_metrics(path, {"variant": "a", "report": 1})
    append_metrics(path, {"variant": "a", "report": 1})
    assert [row["report"] for row in read_metrics(path)] == [0, 1]


def test_two_processes_may_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(read_metrics(path)) == 100


def test_a_resumed_run_that_tells_only_what_is_new_leaves_replaced_reports_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # at report 3 the variant took over a donor that stood at report 2: its next report is the third once more
    life = [{"variant": "a", "report": r, "position": p} for r, p in ((1, "p1"), (2, "p2"), (3, "p3"), (3, "q3"), (4, "q4"))]
    for row in life:
        append_metrics(path, row)
    told = told_positions(path)
    assert told == {("a", position) for position in ("p1", "p2", "p3", "q3", "q4")}
    for row in life:  # the whole story again, after a kill
        if (row["variant"], row["position"]) not in told:
            append_metrics(path, row)
    assert [row["position"] for row in read_metrics(path)] == ["p1", "p2", "q3", "q4"]
