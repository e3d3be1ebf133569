"""The genome in tokens: rows of a fixed length, packed by domain and split, memory-mapped by every worker.

    manifest.json                         written last
    <domain>-<split>.input_ids.npy        [rows, T] uint16 or uint32
    <domain>-<split>.document.npy         [rows, T] int32: ordinal of the document each token is of, -1 for padding
    <domain>-<split>.label_counts.npy     [rows] int64: labelled tokens of the row
    <domain>-<split>.learned.npy          [rows, T] bool, of conversations only: tokens that an assistant says
    <domain>-<split>.bytes.npy            [rows, T] int32, of held-out text only: bytes of UTF-8 that each token stands for
    draft.json, pieces/, *.part.json      only while they are made: whose tokens, what is done of them

Of text every token is learned that has one before it in its piece; of conversations those among them that an assistant says.

Rows never mix domains, so a mix of rows is a mix of tokens and a loss per domain costs nothing. They lie in a keyed order: any
prefix is a fair sample of the domain. Opening needs numpy only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.records import is_draft, read_json, sha256_of, sha256_of_file, write_json
from chrysalis_ray.genome.documents import SPLITS
from chrysalis_ray.genome.mix import permutation
from chrysalis_ray.genome.packing import Packing, pack

if TYPE_CHECKING:
    from chrysalis_ray.genome.build import Genome
    from chrysalis_ray.genome.token_pieces import Encoding, Ids

FORMAT = 2
NO_LABEL = -100
DRAFT, PIECES = "draft.json", "pieces"
ARRAYS = ("input_ids", "document", "label_counts", "learned", "bytes")
REBUILD = "delete the tokens folder; it is made again from the genome"


@dataclass(frozen=True)
class RowBatch:
    """Rows ready for a causal language model; all arrays [n rows, T].

    `labels` are ALREADY SHIFTED: labels[i, t] is what follows input_ids[i, t], -100 where nothing of the same piece does, or
    nothing that is learned.
    `position_ids` restart at 0 with every document (or piece of a long one), padding at a row's end being a segment of its own.
    `document` is the ordinal inside its domain and split, in the order of `Genome.documents`, -1 for padding.
    `bytes` of text that each token of `input_ids` stands for, -1 where that is not known.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    document: NDArray[np.int32]
    bytes: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class TokenStore:
    """Memory-mapped rows of one genome for one tokenizer and one sequence length."""

    folder: Path
    manifest: dict[str, Any]
    arrays: Mapping[tuple[str, str], Mapping[str, NDArray[Any]]]

    @property
    def sequence_length(self) -> int:
        return self.manifest["key"]["sequence_length"]

    @property
    def genome_id(self) -> str:
        return self.manifest["key"]["genome_id"]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted(self.manifest["parts"]))

    def rows(self, domain: str, split: str) -> int:
        return self._part(domain, split)["rows"]

    def token_count(self, domain: str, split: str) -> int:
        """Tokens without padding."""
        return self._part(domain, split)["tokens"]

    def document_count(self, domain: str, split: str) -> int:
        """Documents, also those too short to have given a row."""
        return self._part(domain, split)["documents"]

    def label_counts(self, domain: str, split: str) -> NDArray[np.int64]:
        """[rows] labelled tokens of each row, at least 1."""
        self._part(domain, split)
        return np.asarray(self.arrays[domain, split]["label_counts"])

    def batch(self, domain_rows: Sequence[tuple[str, int]], split: str) -> RowBatch:
        """The rows named, in that order. Raises GenomeError for a domain, split or row that does not exist."""
        shape = (len(domain_rows), self.sequence_length)
        input_ids, document = np.empty(shape, np.int64), np.empty(shape, np.int32)
        learned, sizes = np.ones(shape, np.bool_), np.full(shape, -1, np.int32)
        places: dict[str, list[int]] = {}
        for place, (domain, _) in enumerate(domain_rows):
            places.setdefault(domain, []).append(place)
        for domain, where in places.items():
            chosen = np.array([domain_rows[place][1] for place in where], dtype=np.int64)
            if chosen.min() < 0 or chosen.max() >= self.rows(domain, split):
                raise GenomeError(
                    f"{split} of {domain!r} has rows 0 to {self.rows(domain, split) - 1}, not {chosen.min()} to {chosen.max()}"
                )
            input_ids[where] = self.arrays[domain, split]["input_ids"][chosen]
            document[where] = self.arrays[domain, split]["document"][chosen]
            if "learned" in self.arrays[domain, split]:
                learned[where] = self.arrays[domain, split]["learned"][chosen]
            if "bytes" in self.arrays[domain, split]:
                sizes[where] = self.arrays[domain, split]["bytes"][chosen]
        return RowBatch(input_ids, *_positions_and_labels(input_ids, document, learned), document, sizes)

    def _part(self, domain: str, split: str) -> dict[str, Any]:
        if domain not in self.manifest["parts"] or split not in SPLITS:
            raise GenomeError(
                f"there are no tokens of a {split!r} split of a domain {domain!r}",
                f"domains: {', '.join(self.domains)}; splits: {', '.join(SPLITS)}",
            )
        return self.manifest["parts"][domain][split]


def _positions_and_labels(
    input_ids: NDArray[np.int64], document: NDArray[np.int32], learned: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """position_ids and shifted labels, both [n, T], from tokens, whose they are and which are learned. Neighbouring pieces in a
    row are always of different documents: two pieces of one document together are longer than a row."""
    same = document[:, 1:] == document[:, :-1]
    places = np.arange(input_ids.shape[1], dtype=np.int64)
    begins = np.zeros(input_ids.shape, np.int64)
    begins[:, 1:] = np.where(same, 0, places[1:])
    labels = np.full(input_ids.shape, NO_LABEL, np.int64)
    labels[:, :-1] = np.where(same & (document[:, 1:] >= 0) & learned[:, 1:], input_ids[:, 1:], NO_LABEL)
    return places - np.maximum.accumulate(begins, axis=1), labels


def open_tokens(folder: Path) -> TokenStore:
    """The token store in `folder`, its files checked by presence and size. Raises GenomeError when there is none and
    GenomeCorrupt when a file is missing or of another size than sealed."""
    manifest = _read_manifest(folder)
    if manifest is None:
        raise GenomeError(f"no tokens in {folder}: there is no manifest.json", "`chrysalis run` makes them from the genome")
    if manifest["key"]["format"] != FORMAT:
        raise GenomeError(f"{folder} holds tokens of format {manifest['key']['format']}, this program reads {FORMAT}", REBUILD)
    arrays: dict[tuple[str, str], dict[str, NDArray[Any]]] = {}
    for domain, splits in manifest["parts"].items():
        for split, part in splits.items():
            for name, sealed in part["files"].items():
                path = folder / name
                if not path.is_file() or path.stat().st_size != sealed["bytes"]:
                    raise GenomeCorrupt(f"{path}: missing, or not the {sealed['bytes']} bytes that were written", REBUILD)
            names = {array: _file_name(domain, split, array) for array in ARRAYS}
            arrays[domain, split] = {array: _mapped(folder / name) for array, name in names.items() if name in part["files"]}
    return TokenStore(folder, manifest, arrays)


def _mapped(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise GenomeCorrupt(f"{path}: not the array that was written ({error})", REBUILD) from error


def verify_tokens(folder: Path) -> TokenStore:
    """`open_tokens`, and every file's sha256. Raises GenomeCorrupt naming the file that differs."""
    store = open_tokens(folder)
    for splits in store.manifest["parts"].values():
        for part in splits.values():
            for name, sealed in part["files"].items():
                found = sha256_of_file(folder / name)
                if found != sealed["sha256"]:
                    raise GenomeCorrupt(f"{folder / name}: sha256 is {found[:16]}, sealed as {sealed['sha256'][:16]}", REBUILD)
    return store


# making ------------------------------------------------------------------------------------------------------------


def quiet(line: str) -> None:
    """Who listens to nothing."""


def tokenize_genome(
    genome: Genome,
    tokenizer_folder: Path,
    folder: Path,
    sequence_length: int,
    chat_template: Path | None = None,
    tell: Callable[[str], None] = quiet,
    processes: int | None = None,
) -> TokenStore:
    """Tokenise and pack `genome` with the tokenizer of a Hugging Face folder; what is there already for the same genome,
    tokenizer and length is opened instead, and what a kill left half made is gone on with.

    The tokenizer's own template is kept (a beginning token, where the model wants one) and each document ends with the end
    token that the folder names, if any. Text that spells a special token stays text. Conversations are what the file
    `chat_template`, else the folder's own template, makes of them (`chat.py`). `tell` hears how far it is; the number of
    `processes` changes no byte. Raises ModelError when there is no usable tokenizer, or no chat template where there are
    conversations; GenomeError for a conversation that cannot be rendered, and when a split has nothing to predict.
    """
    from chrysalis_ray.genome.token_pieces import in_the_making, pieces_of

    key, encoding = encoding_of(genome, tokenizer_folder, sequence_length, chat_template)
    if has_tokens(folder, key):
        _tidy(folder)
        return open_tokens(folder)
    if not _is_draft_of(folder, key):
        cleared(folder)
        write_json(folder / DRAFT, {"key": key})
    pieces = pieces_of(genome, folder / PIECES)
    entries = {place: folder / f"{place[0]}-{place[1]}.part.json" for place in pieces}
    left = [piece for place, of_part in pieces.items() if not entries[place].is_file() for piece in of_part]
    total = sum(piece.text_bytes for of_part in pieces.values() for piece in of_part)
    with in_the_making(left, total, encoding, processes, tell) as made:
        for (domain, split), of_part in pieces.items():
            entry = entries[domain, split]
            if not entry.is_file():
                write_json(entry, _write_part(folder, domain, split, made(of_part), sequence_length))
            for piece in of_part:
                piece.file.unlink(missing_ok=True)
    parts: dict[str, dict[str, Any]] = {}
    for (domain, split), entry in entries.items():
        parts.setdefault(domain, {})[split] = read_json(entry)
    write_json(folder / "manifest.json", {"key": key, "sha256": sha256_of(parts), "parts": parts})
    _tidy(folder)
    return open_tokens(folder)


def encoding_of(
    genome: Genome, tokenizer_folder: Path, sequence_length: int, chat_template: Path | None
) -> tuple[dict[str, Any], Encoding]:
    """What decides the tokens, as a key, and what makes them."""
    from chrysalis_ray.genome.chat import load_chat_tokenizer
    from chrysalis_ray.genome.token_pieces import Encoding
    from chrysalis_ray.genome.tokenizer import load_tokenizer

    if sequence_length < 4:
        raise GenomeError(f"sequence_length is {sequence_length}: too short a row to learn from", "use at least 8")
    tokenizer = load_tokenizer(tokenizer_folder)
    chat = load_chat_tokenizer(tokenizer_folder, chat_template) if genome.chats else None
    key = {
        "format": FORMAT,
        "genome_id": genome.genome_id,
        "tokenizer_sha256": tokenizer.sha256,
        "end_id": tokenizer.end_id,
        "chat_template_sha256": chat.sha256 if chat else None,
        "sequence_length": sequence_length,
        **({"chat_bytes": True} if chat else {}),  # before, those of conversations were not counted
    }
    return key, Encoding(tokenizer_folder, chat_template, sha256_of(key))


def has_tokens(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether whole tokens of this key are in `folder`."""
    present = _read_manifest(folder)
    return present is not None and present["key"] == key


def cleared(folder: Path) -> None:
    """Make `folder` a place for other tokens. Files are unlinked, not written over: a run may have other names for them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for stale in (*folder.glob("*.npy"), *folder.glob("*.part.json")):
        stale.unlink()
    _tidy(folder)


def _is_draft_of(folder: Path, key: Mapping[str, Any]) -> bool:
    try:
        return read_json(folder / DRAFT)["key"] == key
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours: begin anew
        return False


def _tidy(folder: Path) -> None:
    """Remove what stands beside whole tokens only while they are made, or was left by a kill."""
    for entry in (*folder.glob("*.part.json"), *filter(is_draft, folder.iterdir())):
        entry.unlink()
    shutil.rmtree(folder / PIECES, ignore_errors=True)
    (folder / DRAFT).unlink(missing_ok=True)


def _write_part(folder: Path, domain: str, split: str, ids: Ids, sequence_length: int) -> dict[str, Any]:
    """Pack the documents of one domain and split, write its arrays, return its manifest entry."""
    packing = pack(ids.lengths, sequence_length, ids.learned)
    if not packing.rows:
        why = "all are shorter than 2 tokens" if ids.learned is None else "no answer of an assistant is in their tokens"
        raise GenomeError(
            f"{split} of domain {domain!r} has {len(ids.lengths)} documents but nothing to predict: {why}",
            "give the domain longer documents",
        )
    arrays = _rows(ids, packing, sequence_length)
    order = permutation(packing.rows, "rows", domain, split)
    files = {}
    for array, values in arrays.items():
        path = folder / _file_name(domain, split, array)
        path.unlink(missing_ok=True)
        with path.open("wb") as stream:
            np.save(stream, values[order], allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        files[path.name] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
    return {
        "rows": packing.rows,
        "documents": len(ids.lengths),
        "tokens": int(packing.length.sum()),
        "labels": int(arrays["label_counts"].sum()),
        "largest_id": int(arrays["input_ids"].max()),
        "files": files,
    }


def _rows(ids: Ids, packing: Packing, sequence_length: int) -> dict[str, NDArray[Any]]:
    """The arrays of a part, rows in the order of the packing."""
    offsets = np.cumsum(ids.lengths) - ids.lengths
    inside = np.arange(packing.length.sum()) - np.repeat(np.cumsum(packing.length) - packing.length, packing.length)
    source = np.repeat(offsets[packing.document] + packing.start, packing.length) + inside
    target = np.repeat(packing.row * sequence_length + packing.column, packing.length) + inside
    input_ids = np.zeros(packing.rows * sequence_length, np.uint16 if ids.flat.max() < 2**16 else np.uint32)
    document = np.full(packing.rows * sequence_length, -1, np.int32)
    input_ids[target] = ids.flat[source]
    document[target] = np.repeat(packing.document, packing.length)
    label_counts = np.bincount(packing.row, packing.labels, minlength=packing.rows).astype(np.int64)
    shape = (packing.rows, sequence_length)
    arrays = {"input_ids": input_ids.reshape(shape), "document": document.reshape(shape), "label_counts": label_counts}
    for name, values in (("learned", ids.learned), ("bytes", ids.bytes)):
        if values is not None:
            arrays[name] = np.zeros(shape, values.dtype)
            arrays[name].reshape(-1)[target] = values[source]
    return arrays


def _file_name(domain: str, split: str, array: str) -> str:
    return f"{domain}-{split}.{array}.npy"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none. Raises GenomeCorrupt when it is not what was written."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        intact = sha256_of(manifest["parts"]) == manifest["sha256"] and isinstance(manifest["key"]["format"], int)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise GenomeCorrupt(f"{path}: not a token manifest ({error})", REBUILD) from error
    if not intact:
        raise GenomeCorrupt(f"{path}: its content does not match its sha256", REBUILD)
    return manifest
