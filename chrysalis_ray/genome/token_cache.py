"""Tokens that several runs share: made once per genome, tokenizer, row length and chat template, in the cache beside the runs.

A run has names of its own for the files (hard links, so that all runs map the same pages), and stays whole when the cache is
emptied. Where the file system has no links, it has copies.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.core.lock import in_turn
from chrysalis_ray.core.records import sha256_of, write_json
from chrysalis_ray.genome.token_pieces import Tell
from chrysalis_ray.genome.tokens import TokenStore, cleared, encoding_of, has_tokens, open_tokens, tokenize_genome

if TYPE_CHECKING:
    from chrysalis_ray.genome.build import Genome

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


def shared_tokens(
    genome: Genome,
    tokenizer_folder: Path,
    cache: CacheLayout,
    folder: Path,
    sequence_length: int,
    chat_template: Path | None,
    tell: Tell,
    processes: int | None = None,
) -> TokenStore:
    """`tokenize_genome` into the cache, and its files under names in `folder`. Who comes while another run makes the same waits
    for it, and says so; a damaged entry of the cache is made again. Tokens that `folder` holds already are opened as they are.
    Raises what `tokenize_genome` raises."""
    key, _ = encoding_of(genome, tokenizer_folder, sequence_length, chat_template)
    if has_tokens(folder, key):
        return open_tokens(folder)
    entry = cache.tokens(sha256_of(key))
    with in_turn(
        entry.with_name(f"{entry.name}.lock"), lambda holder: tell(f"waiting for {holder}, who makes the same tokens")
    ):
        _check(entry)
        store = tokenize_genome(genome, tokenizer_folder, entry, sequence_length, chat_template, tell, processes)
        link_tokens(store, folder)
    return open_tokens(folder)


def _check(entry: Path) -> None:
    """Clear an entry whose files are not as they were written: it is a cache. Runs keep their own names for the files."""
    try:
        if (entry / "manifest.json").exists():
            open_tokens(entry)
    except GenomeCorrupt:
        cleared(entry)


def link_tokens(store: TokenStore, folder: Path) -> None:
    """Give the files of `store` names in `folder`, the manifest last; what was there goes."""
    cleared(folder)
    for splits in store.manifest["parts"].values():
        for part in splits.values():
            for name in part["files"]:
                link_or_copy(store.folder / name, folder / name)
    write_json(folder / "manifest.json", store.manifest)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)
