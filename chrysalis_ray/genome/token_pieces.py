"""Documents into ids, a piece of some megabytes at a time: in several processes, and not again what a kill left done.

    pieces/<domain>-<split>-<start>-<stop>.npz      lengths [documents], ids [tokens] and, of conversations, learned [tokens],
                                                    of held-out text bytes [tokens]

A piece is a stretch of the documents of one domain and split, in their order. Its file is there whole or not at all, and a zip
of numpy arrays carries checksums. What comes out does not depend on how many processes there are, or where pieces are cut.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.records import write_bytes
from chrysalis_ray.genome.documents import SPLITS, Document
from chrysalis_ray.genome.pools import deaf_to_ctrl_c, process_pool
from chrysalis_ray.genome.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from chrysalis_ray.genome.build import Genome

PIECE_BYTES = 4_000_000
ALONE_BELOW = 24_000_000  # bytes of text; starting processes costs more than they save
TOLD_EVERY = 10.0  # seconds

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Encoding:
    """What turns documents into ids. `identity` names its content: a process that loaded another loads this one."""

    tokenizer_folder: Path
    chat_template: Path | None
    identity: str


@dataclass(frozen=True)
class Piece:
    """Documents `start` to `stop` - 1 of one domain and split, and where their ids are to lie."""

    domain: str
    split: str
    start: int
    stop: int
    text_bytes: int
    is_chat: bool
    shards: tuple[Path, ...]
    file: Path


@dataclass(frozen=True)
class Ids:
    """Ids of some documents one after the other; `learned` of conversations only, `bytes` of held-out text only."""

    lengths: NDArray[np.int64]
    flat: NDArray[np.uint32]
    learned: NDArray[np.bool_] | None = None
    bytes: NDArray[np.int32] | None = None


def pieces_of(genome: Genome, folder: Path) -> dict[tuple[str, str], list[Piece]]:
    """(domain, split) -> its pieces, cut by the sizes that the manifest gives; no text is read."""
    from chrysalis_ray.genome.sealing import shards_of

    held: dict[tuple[str, str], list[tuple[str, int]]] = {(d, split): [] for d in genome.domains for split in SPLITS}
    for row in genome.manifest["content"]["documents"]:
        if row["split"] in SPLITS:
            held[row["domain"], row["split"]].append((row["doc_id"], row["bytes"]))
    found: dict[tuple[str, str], list[Piece]] = {}
    chats = genome.chats
    for (domain, split), documents in held.items():
        sizes = [size for _, size in sorted(documents)]
        shards = tuple(genome.folder / name for name in shards_of(domain, split, genome.manifest["shards"]))
        found[domain, split] = [
            Piece(
                domain, split, start, stop,
                text_bytes=sum(sizes[start:stop]),
                is_chat=domain in chats,
                shards=shards,
                file=folder / f"{domain}-{split}-{start}-{stop}.npz",
            )
            for start, stop in _cut(sizes)
        ]  # fmt: skip
    return found


def _cut(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = total = 0
    for place, size in enumerate(sizes, start=1):
        total += size
        if total >= PIECE_BYTES:
            yield start, place
            start, total = place, 0
    if start < len(sizes):
        yield start, len(sizes)


# making -------------------------------------------------------------------------------------------------------------


@contextmanager
def in_the_making(
    pieces: Sequence[Piece], total: int, encoding: Encoding, processes: int | None, tell: Tell
) -> Iterator[Callable[[Sequence[Piece]], Ids]]:
    """A function that waits for some of `pieces`, in their order, and gives their ids. Those whose files are there are not made
    again. `processes` is chosen by the work and the machine if None; `tell` hears now and then how much of `total` bytes of
    text is done."""
    missing = [piece for piece in pieces if not piece.file.is_file()]
    work = sum(piece.text_bytes for piece in missing)
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if work >= ALONE_BELOW else 1
    progress = Progress(total, work, processes, tell)
    if processes == 1 or len(missing) < 2:
        undone = set(missing)

        def made_here(wanted: Sequence[Piece]) -> Ids:
            for piece in wanted:
                if piece in undone:
                    make_piece(piece, encoding)
                    progress.done(piece)
            return joined(wanted)

        yield made_here
        return
    with process_pool(min(processes, len(missing))) as pool:
        with deaf_to_ctrl_c():
            futures: dict[Piece, Future[None]] = {piece: pool.submit(make_piece, piece, encoding) for piece in missing}

        def made_there(wanted: Sequence[Piece]) -> Ids:
            for piece in wanted:
                if piece in futures:
                    futures[piece].result()
                    progress.done(piece)
            return joined(wanted)

        yield made_there


class Progress:
    """How much of the text is tokenised, told at most every `TOLD_EVERY` seconds."""

    def __init__(self, total: int, work: int, processes: int, tell: Tell) -> None:
        self._total, self._left, self._processes, self._tell = total, work, processes, tell
        self._told = time.monotonic()
        if work < total:
            tell(f"{(total - work) / 1e6:.1f} of {total / 1e6:.1f} MB were tokenised before: going on")

    def done(self, piece: Piece) -> None:
        self._left -= piece.text_bytes
        if time.monotonic() - self._told >= TOLD_EVERY:
            self._told = time.monotonic()
            by = f" by {self._processes} processes" if self._processes > 1 else ""
            share = 1.0 - self._left / self._total
            self._tell(f"{share:.0%} of {self._total / 1e6:.1f} MB tokenised{by}")


def make_piece(piece: Piece, encoding: Encoding) -> None:
    """Tokenise the documents of a piece and put its file in place. Raises what the tokenizer or a chat template raises."""
    tokenizer, chat = _loaded(encoding, piece.is_chat)
    documents = read_rows(piece.shards, piece.domain, piece.start, piece.stop)
    arrays: dict[str, NDArray[Any]] = {}
    if piece.is_chat:
        both, sizes = (chat.encode(documents), []) if piece.split == "train" else chat.encode_sized(documents)
        ids, flags = [ids for ids, _ in both], [flags for _, flags in both]
        arrays["learned"] = np.concatenate(flags) if flags else np.empty(0, np.bool_)
        if sizes:
            arrays["bytes"] = np.concatenate(sizes)
    elif piece.split == "train":
        ids = tokenizer.encode([document.text for document in documents])
    else:
        ids, sizes = tokenizer.encode_sized([document.text for document in documents])
        if sizes is not None:
            arrays["bytes"] = np.concatenate(sizes)
    arrays |= {"lengths": np.array([len(one) for one in ids], np.int64), "ids": np.concatenate(ids)}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(piece.file, buffer.getvalue())


@lru_cache(maxsize=2)
def _loaded(encoding: Encoding, is_chat: bool) -> tuple[Any, Any]:
    """(tokenizer, None) or (None, chat tokenizer), loaded once per process."""
    from chrysalis_ray.genome.chat import load_chat_tokenizer

    if is_chat:
        return None, load_chat_tokenizer(encoding.tokenizer_folder, encoding.chat_template)
    return load_tokenizer(encoding.tokenizer_folder), None


# reading ------------------------------------------------------------------------------------------------------------


def read_rows(shards: Sequence[Path], domain: str, start: int, stop: int) -> list[Document]:
    """Documents `start` to `stop` - 1 of a part, which lies in these shards one after another, reading only the groups of rows
    that hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: list[Document] = []
    first = 0
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if first < stop and first + rows > start:
                        table = file.read_row_group(group, columns=["doc_id", "path", "text"])
                        part = table.slice(max(0, start - first), min(stop, first + rows) - max(start, first))
                        found += [Document(row["doc_id"], row["path"], "", domain, row["text"], "") for row in part.to_pylist()]
                    first += rows
        except (OSError, pa.ArrowException, KeyError) as error:
            raise GenomeCorrupt(f"{shard}: cannot be read as a shard ({error})", "build the genome again") from error
        if first >= stop:
            break
    if len(found) != stop - start:
        raise GenomeCorrupt(f"{domain} holds {first} documents in its shards, not {stop} or more", "build the genome again")
    return found


def joined(pieces: Sequence[Piece]) -> Ids:
    """The ids of some pieces one after the other. Raises GenomeCorrupt for a piece that is not what was written."""
    lengths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    flat: list[NDArray[np.uint32]] = [np.empty(0, np.uint32)]
    beside: dict[str, list[NDArray[Any]]] = {}
    for piece in pieces:
        try:
            with np.load(piece.file, allow_pickle=False) as arrays:
                lengths.append(arrays["lengths"])
                flat.append(arrays["ids"])
                for name in ("learned", "bytes"):
                    if name in arrays:
                        beside.setdefault(name, []).append(arrays[name])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise GenomeCorrupt(
                f"{piece.file}: not the piece that was written ({error})", f"delete {piece.file.parent}"
            ) from error
        if len(lengths[-1]) != piece.stop - piece.start or lengths[-1].sum() != len(flat[-1]):
            raise GenomeCorrupt(f"{piece.file}: not the piece that was written", f"delete {piece.file.parent}")
    whole = {name: np.concatenate(parts) for name, parts in beside.items()}
    tokens = sum(len(part) for part in flat)
    if any(len(beside[name]) != len(pieces) or len(of_all) != tokens for name, of_all in whole.items()):
        raise GenomeCorrupt(f"{pieces[0].file.parent}: not the pieces that were written", f"delete {pieces[0].file.parent}")
    return Ids(np.concatenate(lengths), np.concatenate(flat), whole.get("learned"), whole.get("bytes"))
