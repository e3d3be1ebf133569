"""The store after kills, torn writes, flipped bits, full disks and races: the previous or the next good cut, nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chrysalis_ray.core.errors import StoreConflict, StoreCorrupt, StoreError
from chrysalis_ray.core.store import Store


def cut_body(store: Store, turn: int, size: int = 64) -> dict:
    """A cut of two positions whose seeds are in the store."""
    return {
        "turn": turn,
        "results": {
            str(position): {
                "variant_id": f"v{position}",
                "seed": store.put(bytes([turn % 256, position]) * size),
                "chunk": turn,
                "metrics": {"loss": 1.0 / (turn + 1)},
            }
            for position in range(2)
        },
    }


def committed(tmp_path: Path, turns: int) -> Store:
    store = Store(tmp_path / "store")
    for turn in range(turns):
        store.commit_cut(turn, cut_body(store, turn))
    return store


def blob_path(store: Store, sha256: str) -> Path:
    return store.root / "blobs" / sha256[:2] / sha256


def cut_path(store: Store, number: int) -> Path:
    return store.root / "cuts" / f"{number:010d}.json"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_blob_comes_back_and_is_stored_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first, second = store.put(b"seed"), store.put(b"seed")
    assert first == second
    assert store.get(first) == b"seed"
    assert len([path for path in store.root.rglob("*") if path.is_file()]) == 1


def test_put_file_equals_put(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "adapter.safetensors").write_bytes(content)
    store = Store(tmp_path / "store")
    sha256 = store.put_file(tmp_path / "adapter.safetensors")
    assert sha256 == Store(tmp_path / "other").put(content) == store.put_file(tmp_path / "adapter.safetensors")
    assert store.get(sha256) == content


def test_an_absent_or_misnamed_blob_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match="no blob"):
        store.get("0" * 64)
    with pytest.raises(StoreError, match="not a sha256"):
        store.get("../../etc/passwd")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_blob_is_never_returned_and_put_repairs_it(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path / "store")
    sha256 = store.put(b"x" * 100)
    path = blob_path(store, sha256)
    if damage == "flipped":
        flip(path)
    else:
        os.truncate(path, 50 if damage == "truncated" else 0)
    with pytest.raises(StoreCorrupt):
        store.get(sha256)
    (tmp_path / "again").write_bytes(b"x" * 100)
    assert store.put_file(tmp_path / "again") == sha256
    assert store.get(sha256) == b"x" * 100


def test_cuts_come_back_in_order(tmp_path: Path) -> None:
    store = committed(tmp_path, 12)
    assert [number for number, _ in store.cuts()] == list(range(12))
    assert store.cuts()[7][1] == cut_body(store, 7)
    assert Store(tmp_path / "nothing").cuts() == []


def test_the_same_body_twice_is_nothing_and_another_body_a_conflict(tmp_path: Path) -> None:
    store = committed(tmp_path, 3)
    before = cut_path(store, 1).stat()
    store.commit_cut(1, cut_body(store, 1))
    assert cut_path(store, 1).stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(StoreConflict):
        store.commit_cut(1, cut_body(store, 2))
    assert store.cuts()[1][1] == cut_body(store, 1)


def test_a_cut_cannot_name_blobs_that_are_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match="does not hold"):
        store.commit_cut(0, {"turn": 0, "results": {"0": {"seed": "a" * 64}}})
    with pytest.raises(StoreError, match="JSON"):
        store.commit_cut(0, {"turn": 0, "results": {}, "loss": float("nan")})
    assert store.cuts() == []


@pytest.mark.parametrize("kept_bytes", [0, 1, 17, 80])
def test_a_torn_last_record_falls_back_to_the_cut_before_and_gives_way(tmp_path: Path, kept_bytes: int) -> None:
    store = committed(tmp_path, 4)
    os.truncate(cut_path(store, 3), kept_bytes)
    assert [number for number, _ in store.cuts()] == [0, 1, 2]
    store.commit_cut(3, cut_body(store, 3))
    assert store.cuts()[3] == (3, cut_body(store, 3))


def test_a_last_record_with_a_flipped_bit_is_skipped(tmp_path: Path) -> None:
    store = committed(tmp_path, 3)
    flip(cut_path(store, 2))
    assert [number for number, _ in store.cuts()] == [0, 1]


def test_a_last_cut_whose_blob_is_gone_or_damaged_is_skipped(tmp_path: Path) -> None:
    store = committed(tmp_path, 3)
    blob_path(store, cut_body(store, 2)["results"]["1"]["seed"]).unlink()
    assert [number for number, _ in store.cuts()] == [0, 1]
    other = cut_body(store, 2) | {"seconds": 4.5}
    store.commit_cut(2, other)
    assert store.cuts()[-1] == (2, other)
    flip(blob_path(store, other["results"]["0"]["seed"]))
    assert [number for number, _ in store.cuts()] == [0, 1]


def test_a_damaged_earlier_record_stops_with_a_remedy(tmp_path: Path) -> None:
    store = committed(tmp_path, 4)
    flip(cut_path(store, 1))
    with pytest.raises(StoreCorrupt, match="cut 1 ") as caught:
        store.cuts()
    assert "backup" in caught.value.remedy
    with pytest.raises(StoreConflict):
        store.commit_cut(1, cut_body(store, 1))


def test_collect_frees_what_no_one_needs_and_never_the_newest(tmp_path: Path) -> None:
    store = committed(tmp_path, 4)
    keep = cut_body(store, 3)["results"]["0"]["seed"]
    old = [path for path in (store.root / "blobs").rglob("*") if path.is_file()]
    long_ago = time.time() - 100
    for path in old:
        os.utime(path, (long_ago, long_ago))
    young = store.put(b"seed of the turn that is running now")
    assert store.collect(set()) == 3 * 2 * 128
    assert store.get(keep)
    assert store.get(young)
    assert [number for number, _ in store.cuts()] == [0, 1, 2, 3]
    with pytest.raises(StoreError):
        store.get(Store(tmp_path / "other").put(bytes([0, 0]) * 64))
    assert store.collect(set()) == 0


def test_collect_without_cuts_touches_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    sha256 = store.put(b"first seed")
    assert store.collect(set()) == 0
    assert store.get(sha256) == b"first seed"


COMMIT_FOREVER = """
import sys; from pathlib import Path; sys.path.insert(0, {tests!r})
from chrysalis_ray.core.store import Store
from test_core_store import cut_body
store = Store(Path({root!r}))
turn = len(store.cuts())
print("go", flush=True)
while True:
    store.commit_cut(turn, cut_body(store, turn, 20_000))
    turn += 1
"""


def test_sigkill_at_any_moment_leaves_only_whole_cuts(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    program = COMMIT_FOREVER.format(tests=str(Path(__file__).parent), root=str(store.root))
    before = 0
    for delay in (0.0, 0.011, 0.023, 0.037, 0.052):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"go\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        cuts = store.cuts()
        assert [number for number, _ in cuts] == list(range(len(cuts)))
        assert len(cuts) >= before
        for number, body in cuts:
            assert body == cut_body(store, number, 20_000)
            assert all(len(store.get(result["seed"])) == 40_000 for result in body["results"].values())
        before = len(cuts)
    assert before > 0


COMMIT_ONCE = """
import sys; from pathlib import Path
from chrysalis_ray.core.errors import StoreConflict
from chrysalis_ray.core.store import Store
store = Store(Path({root!r}))
wins = 0
print("ready", flush=True); sys.stdin.readline()
for number in range({rounds}):
    try:
        store.commit_cut(number, {{"turn": number, "results": {{}}, "who": {who}}})
        wins += 1
    except StoreConflict:
        pass
print(wins)
"""


@pytest.mark.parametrize("torn", ["fresh", "torn"])
def test_of_two_racing_processes_exactly_one_commits(tmp_path: Path, torn: str) -> None:
    root, rounds = tmp_path / "store", 40 if torn == "fresh" else 1
    if torn == "torn":
        (root / "cuts").mkdir(parents=True)
        (root / "cuts" / "0000000000.json").write_text('{"sha2')
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", COMMIT_ONCE.format(root=str(root), who=who, rounds=rounds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in range(3)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    wins = [int(racer.communicate()[0]) for racer in racers]
    winners = [body["who"] for _, body in Store(root).cuts()]
    assert sum(wins) == rounds
    assert [winners.count(who) for who in range(3)] == wins


DISK_FULL = """
import resource; from pathlib import Path
from chrysalis_ray.core.errors import StoreError
from chrysalis_ray.core.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
store = Store(Path({root!r}))
try:
    store.commit_cut(1, {{"turn": 1, "results": {{"0": {{"seed": store.put(b"s" * {size}), "note": "n" * 900}}}}}})
except StoreError as error:
    print(error.remedy)
"""


@pytest.mark.parametrize(
    ("limit", "size"), [(100, 5000), (600, 200)], ids=["while the blob is written", "while the cut is written"]
)
def test_a_disk_that_takes_no_more_leaves_the_cut_before(tmp_path: Path, limit: int, size: int) -> None:
    store = committed(tmp_path, 1)
    program = DISK_FULL.format(limit=limit, size=size, root=str(store.root))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "free disk space" in done.stdout
    assert [number for number, _ in store.cuts()] == [0]
    assert not [path for path in store.root.rglob(".*") if path.is_file()]
    store.commit_cut(1, cut_body(store, 1))
    assert len(store.cuts()) == 2
