"""The journal: chained, repaired after a torn last line, refused after anything else, free of secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import StoreCorrupt, StoreError
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.core.weave import ORIGIN, Weave

words = st.text(max_size=20)
bodies = st.dictionaries(
    words, st.one_of(st.integers(), words, st.floats(), st.none(), st.lists(words, max_size=3)), max_size=4
)


def written(path: Path, turns: int) -> Weave:
    weave = Weave(path)
    for index in range(turns):
        weave.append("cut", {"number": index, "path": "a\nb\u2028c"})
    return weave


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words, bodies), min_size=1, max_size=6))
def test_any_turns_come_back_chained(tmp_path_factory: pytest.TempPathFactory, turns: list) -> None:
    path = tmp_path_factory.mktemp("weave") / "weave.jsonl"
    returned = [Weave(path).append(kind, body) for kind, body in turns]
    read = Weave(path).turns()
    assert read == returned
    assert [turn["n"] for turn in read] == list(range(len(turns)))
    assert [turn["prev"] for turn in read] == [ORIGIN, *(turn["sha256"] for turn in read[:-1])]
    for turn in read:
        assert turn["sha256"] == sha256_of({key: value for key, value in turn.items() if key != "sha256"})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_found_or_drops_the_last_line_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("weave") / "weave.jsonl"
    whole = written(path, 4).turns()
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    last_line_starts = len(content) - len(content.rstrip(b"\n").split(b"\n")[-1]) - 1
    try:
        assert Weave(path).turns() == whole[:3]
        assert where >= last_line_starts - 1
    except StoreCorrupt:
        assert where <= len(content)


@pytest.mark.parametrize(("written", "altered"), [(b"0.30000000000000004", b"0.30000000000000005"), (b"1e-05", b"1E-05")])
def test_a_line_that_says_the_same_in_other_bytes_is_altered(tmp_path: Path, written: bytes, altered: bytes) -> None:
    path = tmp_path / "weave.jsonl"
    for value in (0.1 + 0.2, 1e-5):
        Weave(path).append("measured", {"value": value})
    Weave(path).append("end", {})
    content = path.read_bytes()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, altered))
    with pytest.raises(StoreCorrupt, match="the chain breaks"):
        Weave(path).turns()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_torn_end_is_dropped_and_mended_by_the_next_turn(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("weave") / "weave.jsonl"
    whole = written(path, 3).turns()
    lines = path.read_bytes().splitlines(keepends=True)
    intact = sum(map(len, lines[:2]))
    os.truncate(path, data.draw(st.integers(intact, intact + len(lines[2]) - 1)))
    if data.draw(st.booleans()):
        with path.open("ab") as stream:
            stream.write(b"\0\r\0garbage")
    assert Weave(path).turns() == whole[:2]
    turn = Weave(path).append("resumed", {})
    assert Weave(path).turns() == [*whole[:2], turn]
    assert turn["prev"] == whole[1]["sha256"]


@pytest.mark.parametrize("change", ["removed", "swapped", "edited", "repeated"])
def test_an_altered_history_is_refused_by_readers_and_writers(tmp_path: Path, change: str) -> None:
    path = tmp_path / "weave.jsonl"
    written(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    lines = {
        "removed": [lines[0], *lines[2:]],
        "swapped": [lines[0], lines[2], lines[1], lines[3]],
        "edited": [lines[0], lines[1].replace(b'"number":1', b'"number":7'), *lines[2:]],
        "repeated": [lines[0], lines[0], *lines[1:]],
    }[change]
    path.write_bytes(b"".join(lines))
    with pytest.raises(StoreCorrupt, match="turn 1"):
        Weave(path).turns()
    with pytest.raises(StoreCorrupt, match="turn 1"):
        Weave(path).append("cut", {})
    assert path.read_bytes() == b"".join(lines)


def test_a_journal_that_shrinks_under_its_writer_is_refused(tmp_path: Path) -> None:
    weave = written(tmp_path / "weave.jsonl", 3)
    os.truncate(weave.path, 10)
    with pytest.raises(StoreCorrupt, match="shorter"):
        weave.append("cut", {})


def test_no_journal_is_an_empty_one_and_a_folder_is_an_error(tmp_path: Path) -> None:
    assert Weave(tmp_path / "weave.jsonl").turns() == []
    with pytest.raises(StoreError):
        Weave(tmp_path).append("cut", {})


APPEND = """
import sys; from pathlib import Path
from chrysalis_ray.core.weave import Weave
weave = Weave(Path({path!r}))
for index in range(30): weave.append("cut", {{"who": {who}, "index": index}})
"""


def test_several_processes_weave_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "weave.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND.format(path=str(path), who=who)]) for who in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    turns = Weave(path).turns()
    assert [turn["n"] for turn in turns] == list(range(90))
    for who in range(3):
        assert [turn["body"]["index"] for turn in turns if turn["body"]["who"] == who] == list(range(30))


DISK_FULL = """
import resource; from pathlib import Path
from chrysalis_ray.core.errors import StoreError
from chrysalis_ray.core.weave import Weave
weave = Weave(Path({path!r}))
weave.append("begun", {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
try:
    weave.append("cut", {{"note": "n" * 2000}})
except StoreError as error:
    print(error.remedy)
weave.append("small", {{}})
"""


def test_a_line_the_disk_did_not_take_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "weave.jsonl"
    program = DISK_FULL.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "free disk space" in done.stdout
    assert [turn["kind"] for turn in Weave(path).turns()] == ["begun", "small"]


def test_no_secret_reaches_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-very-private-cluster-word")
    secrets = [
        "hf_" + "a1" * 17,
        "sk-" + "b2" * 12,
        "AKIA" + "C3" * 8,
        "plain-words-under-a-telling-name",
        "a-very-private-cluster-word",
    ]
    turn = Weave(tmp_path / "weave.jsonl").append(
        "begun",
        {
            "command": f"run --set x={secrets[0]} Bearer {secrets[1]}",
            "nested": [{"api_key": secrets[3], "wandb-token": secrets[3]}, secrets[2]],
            "error": f"could not join with {secrets[4]} at https://user:{secrets[3]}@host/path",
            "tokens": 4096,
            "tokenizer": "byte-level",
            "commit": "4f" * 20,
            "loss": float("nan"),
        },
    )
    content = (tmp_path / "weave.jsonl").read_text()
    assert [secret for secret in secrets if secret in content] == []
    assert (turn["body"]["tokens"], turn["body"]["tokenizer"], turn["body"]["commit"]) == (4096, "byte-level", "4f" * 20)
    assert turn["body"]["loss"] == "nan"
