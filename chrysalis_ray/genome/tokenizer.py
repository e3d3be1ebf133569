"""A tokenizer from a Hugging Face folder: `tokenizer.json` through `tokenizers`, anything else through `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import sha256_of, sha256_of_file

DOCUMENTS_AT_ONCE = 1024
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "added_tokens.json")


@dataclass(frozen=True)
class DocumentTokenizer:
    """`encode_batch` turns texts into id lists; `end_id` (if any) closes each document. `encode_ends`, where the tokenizer can
    tell, gives with each list where every token ends in its text, in characters."""

    encode_batch: Callable[[list[str]], list[list[int]]]
    end_id: int | None
    sha256: str
    encode_ends: Callable[[list[str]], list[tuple[list[int], list[int]]]] | None = None
    decode: Callable[[list[int]], str] | None = None  # text of ids, control tokens left out

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of every text, each closed by `end_id` unless the tokenizer's template did that already."""
        found = []
        for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
            for ids in self.encode_batch(list(texts[start : start + DOCUMENTS_AT_ONCE])):
                found.append(np.array(self._closed(ids), dtype=np.uint32))
        return found

    def encode_sized(self, texts: Sequence[str]) -> tuple[list[NDArray[np.uint32]], list[NDArray[np.int32]] | None]:
        """`encode`, and the bytes of text that each token stands for; None where the tokenizer cannot tell."""
        if self.encode_ends is None:
            return self.encode(texts), None
        ids, sizes = [], []
        for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
            together = list(texts[start : start + DOCUMENTS_AT_ONCE])
            for text, (own, ends) in zip(together, self.encode_ends(together), strict=True):
                ids.append(np.array(self._closed(own), dtype=np.uint32))
                sizes.append(byte_counts(text, [*ends, *[len(text)] * (len(ids[-1]) - len(ends))]))
        return ids, sizes

    def _closed(self, ids: list[int]) -> list[int]:
        return ids if self.end_id is None or (ids and ids[-1] == self.end_id) else [*ids, self.end_id]


def byte_counts(text: str, ends: Sequence[int]) -> NDArray[np.int32]:
    """Bytes of UTF-8 that each token adds to the text before it, from where each ends, in characters.

    A character that is split over tokens counts with the first of them, what no token covers with the one after, the rest of
    the text with the last. Together they are the bytes of the text, exactly.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths)])
    reached = np.maximum.accumulate(before[np.array(ends, dtype=np.int64)])
    reached[-1:] = before[-1]
    return np.diff(reached, prepend=0).astype(np.int32)


def load_tokenizer(folder: Path) -> DocumentTokenizer:
    """The tokenizer of `folder`. Code that a folder brings along is never run. Raises ModelError when none can be loaded."""
    if (folder / "tokenizer.json").is_file():
        return _fast(folder)
    return _any(folder)


def _fast(folder: Path) -> DocumentTokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception, with the reason as text
        raise ModelError(f"{path}: not a tokenizer ({error})", "use a folder written by `save_pretrained`") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that spells <|endoftext|> is text
    end = _end_token(folder)
    end_id = None if end is None else tokenizer.token_to_id(end)
    if end is not None and end_id is None:
        raise ModelError(f"{folder}: its tokenizer.json lacks the end token {end!r}", "repair its tokenizer_config.json")
    return DocumentTokenizer(
        lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)],
        end_id,
        _identity(folder),
        lambda texts: [(each.ids, [end for _, end in each.offsets]) for each in tokenizer.encode_batch(texts)],
        tokenizer.decode,
    )


def _any(folder: Path) -> DocumentTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"{folder}: no tokenizer could be loaded ({type(error).__name__}: {str(error)[:200]})",
            "the folder needs a tokenizer.json, as `save_pretrained` writes it",
        ) from error
    return DocumentTokenizer(
        lambda texts: tokenizer(texts, split_special_tokens=True, truncation=False, padding=False)["input_ids"],
        tokenizer.eos_token_id,
        _identity(folder),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


def _end_token(folder: Path) -> str | None:
    """The end token that tokenizer_config.json or special_tokens_map.json names, None where neither does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{path}: not a JSON object ({error})", "repair it or copy it again") from error
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return token
    return None


def _identity(folder: Path) -> str:
    """sha256 of what decides the ids: of tokenizer.json where there is one, else of the files it is made from."""
    if (folder / "tokenizer.json").is_file():
        return sha256_of_file(folder / "tokenizer.json")
    return sha256_of({name: sha256_of_file(folder / name) for name in FILES if (folder / name).is_file()})
