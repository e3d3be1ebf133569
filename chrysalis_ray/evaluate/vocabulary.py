"""Whether adapters speak the same vocabulary: trainers leave the tokenizer beside the adapter, and it may not be the base's.

Two adapters of one base, one of them trained with words added, see other numbers for the same text. Of `tokenizer.json` (the
format of github.com/huggingface/tokenizers) only what makes numbers of text counts: its model and its added tokens. Padding and
truncation stand in the same file, and differ from run to run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.seed.tensors import unique_keys

TOKENIZER = "tokenizer.json"
MAX_BYTES = 128_000_000


def refuse_other_vocabularies(folders: Sequence[tuple[str, Path]]) -> None:
    """`folders` are (name, folder) of adapters; those without a tokenizer say nothing. Raises MergeError where two differ."""
    found = {name: vocabulary_sha256(folder / TOKENIZER) for name, folder in folders if (folder / TOKENIZER).is_file()}
    by_vocabulary = {sha256: name for name, sha256 in found.items()}
    if len(by_vocabulary) > 1:
        one, two = list(by_vocabulary.values())[:2]
        raise MergeError(
            f"{one} and {two} bring different tokenizers: the same text is other numbers to them",
            f"merge adapters of one vocabulary; if a {TOKENIZER} lies there by mistake, take it away",
        )


def vocabulary_sha256(path: Path) -> str:
    """What a tokenizer.json makes of text, as a hash. Raises MergeError for a file that is none."""
    remedy = "copy the adapter again, or take that file away"
    if path.stat().st_size > MAX_BYTES:
        raise MergeError(f"{path} is {path.stat().st_size} bytes long: no tokenizer", remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        spoken = {key: content.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
        spoken["added_tokens"] = [[token.get("id"), token.get("content")] for token in content.get("added_tokens") or []]
        return sha256_of(spoken)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise MergeError(f"{path} is no tokenizer: {type(error).__name__}", remedy) from error
