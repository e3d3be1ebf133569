"""Tokens made once for all runs: the same bytes by any way, after a kill at any point, and for several runs at once."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from test_genome_chat import MARKED, conversations, save_tokenizer
from test_genome_tokens import make_genome, tokenizer_folder, write_rows  # noqa: F401  # a fixture

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core import records
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.core.lock import in_turn
from chrysalis_ray.genome import token_pieces, tokens
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.token_cache import shared_tokens
from chrysalis_ray.genome.token_pieces import joined, pieces_of, read_rows
from chrysalis_ray.genome.tokens import open_tokens, quiet, tokenize_genome, verify_tokens

LENGTH = 48


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    drawn = random.Random(4)
    lengths = {name: [drawn.randrange(20, 400) for _ in range(40)] for name in ("essays", "notes")}
    return make_genome(tmp_path_factory.mktemp("genome"), **lengths)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, genome, tokenizer_folder):  # noqa: F811
    """The manifest, every file's hash in it, of tokens made in one go."""
    return tokenize_genome(genome, tokenizer_folder, tmp_path_factory.mktemp("whole") / "tokens", LENGTH).manifest


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(token_pieces, "PIECE_BYTES", 900)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def note_pieces(monkeypatch, made):
    """Have the names of all pieces that this process makes from now on in `made`."""
    make_piece = token_pieces.make_piece

    def noted(piece, encoding):
        make_piece(piece, encoding)
        made.append(piece.file.name)

    monkeypatch.setattr(token_pieces, "make_piece", noted)


# making


def test_pieces_are_stretches_that_cover_every_document_once(tmp_path, genome, small_pieces):
    pieces = pieces_of(genome, tmp_path)
    assert sum(map(len, pieces.values())) > 10
    for (domain, split), of_part in pieces.items():
        documents = list(genome.documents(domain, split))
        assert [piece.start for piece in of_part] == [0, *(piece.stop for piece in of_part[:-1])]
        read = [document for piece in of_part for document in read_rows(piece.shards, domain, piece.start, piece.stop)]
        assert [(d.doc_id, d.path, d.text) for d in read] == [(d.doc_id, d.path, d.text) for d in documents]
        assert sum(piece.text_bytes for piece in of_part) == sum(document.size for document in documents)
    with pytest.raises(GenomeCorrupt, match="in its shards, not 9000"):
        read_rows(pieces["notes", "train"][0].shards, "notes", 0, 9000)


@pytest.mark.parametrize("shard_bytes", [16_000_000, 2_000])
def test_rows_are_found_across_groups_and_shards(tmp_path, genome, monkeypatch, shard_bytes):
    monkeypatch.setattr("chrysalis_ray.genome.sealing.ROWS_PER_GROUP", 7)
    monkeypatch.setattr("chrysalis_ray.genome.sealing.SHARD_BYTES", shard_bytes)
    again = build_genome(
        GenomeSpec.model_validate({"sources": genome.manifest["content"]["recipe"]["sources"]}, strict=False),
        tmp_path / "g",
        genome.folder.parent,
    )
    documents = list(again.documents("notes", "train"))
    shards = pieces_of(again, tmp_path)["notes", "train"][0].shards
    assert (len(shards) > 1) == (shard_bytes < 16_000_000)
    for start, stop in ((0, 7), (6, 8), (7, 14), (3, 25), (0, len(documents)), (5, 5)):
        assert [d.text for d in read_rows(shards, "notes", start, stop)] == [d.text for d in documents[start:stop]]


def test_small_pieces_change_no_byte_and_leave_nothing_behind(tmp_path, genome, tokenizer_folder, whole, small_pieces):  # noqa: F811
    store = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", LENGTH)
    assert store.manifest == whole
    verify_tokens(tmp_path / "tokens")
    named = [name for splits in whole["parts"].values() for part in splits.values() for name in part["files"]]
    assert files_of(tmp_path / "tokens") == sorted([*named, "manifest.json"])


def test_several_processes_change_no_byte_and_tell_how_far_they_are(
    tmp_path, genome, tokenizer_folder, whole, small_pieces, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(token_pieces, "TOLD_EVERY", 0.0)
    told = []
    assert tokenize_genome(genome, tokenizer_folder, tmp_path / "t", LENGTH, None, told.append, processes=2).manifest == whole
    megabytes = sum(row["bytes"] for row in genome.manifest["content"]["documents"]) / 1e6
    assert told[-1] == f"100% of {megabytes:.1f} MB tokenised by 2 processes"
    shares = [int(line.partition("%")[0]) for line in told]
    assert shares == sorted(shares)
    assert len(shares) > 10


def test_an_error_in_a_process_is_the_error_that_is_raised(tmp_path, tokenizer_folder, small_pieces):  # noqa: F811
    genome = make_genome(tmp_path, notes=[300] * 20)
    (genome.folder / "shards" / "notes-train.parquet").write_bytes(b"no parquet")
    with pytest.raises(GenomeCorrupt, match="cannot be read as a shard"):
        tokenize_genome(genome, tokenizer_folder, tmp_path / "t", LENGTH, None, quiet, processes=2)
    assert not (tmp_path / "t" / "manifest.json").exists()


@pytest.mark.slow
def test_conversations_in_several_processes(tmp_path, small_pieces):
    base = save_tokenizer(tmp_path / "base", MARKED)
    lines = [json.dumps({"messages": messages}) for messages in conversations()]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    source = {"type": "jsonl", "path": "talk.jsonl", "domain": "talk", "messages_key": "messages"}
    genome = build_genome(GenomeSpec.model_validate({"sources": [source]}), tmp_path / "g", tmp_path)
    alone = tokenize_genome(genome, base, tmp_path / "alone", 96)
    assert tokenize_genome(genome, base, tmp_path / "together", 96, None, quiet, processes=2).manifest == alone.manifest
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{{ raise_exception('not this one') }}")
    with pytest.raises(GenomeError, match="cannot render this conversation: not this one"):
        tokenize_genome(genome, base, tmp_path / "refused", 96, refusing, quiet, processes=2)


# kills


class Killed(BaseException):
    """What stands in for a kill inside this process."""


def test_a_stop_at_any_write_is_gone_on_from(tmp_path, genome, tokenizer_folder, whole, monkeypatch):  # noqa: F811
    """Stop before the n-th file is put in its place, for every n; then go on. What was done is not done again."""
    monkeypatch.setattr(token_pieces, "PIECE_BYTES", 8000)
    replace, left = os.replace, [0]

    def counted(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(source, target)

    stops, made = 0, []
    monkeypatch.setattr(records.os, "replace", counted)
    note_pieces(monkeypatch, made)
    for allowed in range(100):
        folder, left[0] = tmp_path / str(allowed), allowed
        made.clear()
        try:
            tokenize_genome(genome, tokenizer_folder, folder, LENGTH)
            break
        except Killed:
            stops += 1
        assert not (folder / "manifest.json").exists()
        (folder / ".manifest.json.abcd1234").write_text("{")  # what a kill, unlike this exception, leaves of a write
        first, left[0] = set(made), 10**9
        assert tokenize_genome(genome, tokenizer_folder, folder, LENGTH).manifest == whole
        assert len(made) == len(set(made)), "a piece was made twice"
        assert first <= set(made)
        assert all(name.endswith((".npy", "manifest.json")) for name in files_of(folder))
    pieces = sum(map(len, pieces_of(genome, tmp_path).values()))
    assert stops == 1 + pieces + 6 + 1  # the draft, the pieces, an entry for every domain and split, the manifest


SCRIPT = """
    import sys
    from pathlib import Path
    from chrysalis_ray.genome import token_pieces
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.tokens import tokenize_genome

    if __name__ == "__main__":
        token_pieces.PIECE_BYTES, token_pieces.TOLD_EVERY = 300, 0.0
        genome, tokenizer, folder, processes = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
        tokenize_genome(open_genome(genome), tokenizer, folder, 48, None, lambda line: print(line, flush=True), processes)
"""


def test_a_killed_pool_ends_and_is_gone_on_from(tmp_path, genome, tokenizer_folder, whole, monkeypatch):  # noqa: F811
    """A real SIGKILL of the parent in the middle: its processes end too, and the same bytes come out afterwards."""
    (tmp_path / "make.py").write_text(textwrap.dedent(SCRIPT))
    folder = tmp_path / "tokens"
    arguments = [sys.executable, str(tmp_path / "make.py"), str(genome.folder), str(tokenizer_folder), str(folder), "2"]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for _ in range(4):
        assert "tokenised by 2 processes" in parent.stdout.readline()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)
    assert (folder / "draft.json").exists()
    assert not (folder / "manifest.json").exists()
    monkeypatch.setattr(token_pieces, "PIECE_BYTES", 300)
    told = []
    assert tokenize_genome(genome, tokenizer_folder, folder, LENGTH, None, told.append).manifest == whole
    assert "were tokenised before: going on" in told[0]
    verify_tokens(folder)


def test_a_draft_of_other_tokens_and_a_damaged_one_are_begun_anew(tmp_path, genome, tokenizer_folder, whole):  # noqa: F811
    for draft in ('{"key": {"genome_id": "of another"}}', "{", "[]"):
        folder = tmp_path / str(len(draft))
        (folder / "pieces").mkdir(parents=True)
        (folder / "draft.json").write_text(draft)
        (folder / "notes-train.part.json").write_text("{}")
        assert tokenize_genome(genome, tokenizer_folder, folder, LENGTH).manifest == whole


def test_a_damaged_piece_is_never_taken(tmp_path, genome, tokenizer_folder, small_pieces):  # noqa: F811
    encoding = tokens.encoding_of(genome, tokenizer_folder, LENGTH, None)[1]
    piece = pieces_of(genome, tmp_path / "pieces")["notes", "train"][0]
    token_pieces.make_piece(piece, encoding)
    whole = piece.file.read_bytes()
    good = joined([piece])
    for at in range(0, len(whole), 7):
        piece.file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            read = joined([piece])
        except GenomeCorrupt:
            continue
        assert (read.flat == good.flat).all(), "a flipped bit was taken for a token"
        assert (read.lengths == good.lengths).all()
    piece.file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GenomeCorrupt, match="not the piece that was written"):
        joined([piece])


# sharing


def share(genome, tokenizer, root, name, length=LENGTH, tell=quiet):
    return shared_tokens(genome, tokenizer, CacheLayout(root / ".cache"), root / name / "tokens", length, None, tell)


def inodes(store):
    return {path.name: path.stat().st_ino for path in store.folder.glob("*.npy")}


def test_two_runs_have_the_same_files_and_another_length_its_own(tmp_path, genome, tokenizer_folder, whole):  # noqa: F811
    one, two = (share(genome, tokenizer_folder, tmp_path, name) for name in ("one", "two"))
    assert one.manifest == two.manifest == whole
    assert inodes(one) == inodes(two)
    verify_tokens(one.folder)
    other = share(genome, tokenizer_folder, tmp_path, "two", length=32)
    assert other.sequence_length == 32
    assert verify_tokens(one.folder).manifest == whole, "nothing was written over"
    assert not set(inodes(other).values()) & set(inodes(one).values())
    assert len(CacheLayout(tmp_path / ".cache").token_stores()) == 2


def test_a_run_stays_whole_when_the_cache_is_emptied_and_an_old_one_as_it_is(tmp_path, genome, tokenizer_folder, whole):  # noqa: F811
    share(genome, tokenizer_folder, tmp_path, "one")
    shutil.rmtree(tmp_path / ".cache")
    assert verify_tokens(tmp_path / "one" / "tokens").manifest == whole
    tokenize_genome(genome, tokenizer_folder, tmp_path / "old" / "tokens", LENGTH)  # as before there was a cache
    before = inodes(open_tokens(tmp_path / "old" / "tokens"))
    assert inodes(share(genome, tokenizer_folder, tmp_path, "old")) == before
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize("damage", ["lost", "cut", "torn manifest", "no manifest"])
def test_a_damaged_cache_is_made_again_and_no_run_is_touched(tmp_path, genome, tokenizer_folder, whole, damage):  # noqa: F811
    first = share(genome, tokenizer_folder, tmp_path, "one")
    (entry,) = CacheLayout(tmp_path / ".cache").token_stores()
    victim = entry / ("manifest.json" if "manifest" in damage else "notes-train.input_ids.npy")
    content = victim.read_bytes()
    victim.unlink()
    if damage in ("cut", "torn manifest"):
        victim.write_bytes(content[: len(content) // 2])
    assert share(genome, tokenizer_folder, tmp_path, "two").manifest == whole
    assert verify_tokens(entry).manifest == whole
    assert verify_tokens(first.folder).manifest == verify_tokens(tmp_path / "two" / "tokens").manifest == whole


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_without_links_there_are_copies(tmp_path, genome, tokenizer_folder, whole, monkeypatch, number):  # noqa: F811
    def refused(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    assert share(genome, tokenizer_folder, tmp_path, "one").manifest == whole
    verify_tokens(tmp_path / "one" / "tokens")


def test_a_stop_between_links_is_made_good(tmp_path, genome, tokenizer_folder, whole, monkeypatch):  # noqa: F811
    link, count = os.link, [0]

    def stopping(source, target):
        count[0] += 1
        if count[0] == 5:
            raise Killed
        link(source, target)

    monkeypatch.setattr(os, "link", stopping)
    with pytest.raises(Killed):
        share(genome, tokenizer_folder, tmp_path, "one")
    assert not (tmp_path / "one" / "tokens" / "manifest.json").exists()
    assert share(genome, tokenizer_folder, tmp_path, "one").manifest == whole


def test_runs_that_come_at_once_make_them_once(tmp_path, genome, tokenizer_folder, whole, small_pieces, monkeypatch):  # noqa: F811
    made = []
    note_pieces(monkeypatch, made)
    stores, errors = {}, []

    def run(name):
        try:
            stores[name] = share(genome, tokenizer_folder, tmp_path, name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f"run{number}",)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(made) == len(set(made))
    assert all(store.manifest == whole for store in stores.values())
    assert len({tuple(sorted(inodes(store).items())) for store in stores.values()}) == 1


def test_who_comes_second_says_for_whom_it_waits(tmp_path):
    waiting, told = threading.Event(), []

    def second():
        with in_turn(tmp_path / "lock", lambda holder: (told.append(holder), waiting.set())):
            told.append("in")

    thread = threading.Thread(target=second)
    with in_turn(tmp_path / "lock", lambda holder: pytest.fail(f"waits for {holder}")):
        thread.start()
        assert waiting.wait(30)
        told.append("out")
    thread.join()
    assert told == [f"process {os.getpid()} on {os.uname().nodename}", "out", "in"]
