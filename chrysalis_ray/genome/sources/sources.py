"""Documents from what a user has: a folder, a JSON lines file, a data set. The one door to `datasets`.

Every reader yields in an order that does not depend on the machine, keeps bytes as they are, never follows a path out of the
folder it was given, and counts what it leaves out. A path is relative to the experiment file; what is recorded in a document is
the path as it was written, so that two machines agree.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from chrysalis_ray.config.experiment import DatasetSource, FolderSource, JsonlSource, PythonSource, Records, Source
from chrysalis_ray.config.genome import ArchiveSource, GitSource, HistorySource, PackagesSource, PackedSource, RecordsSource
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.genome.chat import conversation_text
from chrysalis_ray.genome.documents import Document, capped, decoded, hash_order, make_document, shown_path
from chrysalis_ray.genome.globs import matches
from chrysalis_ray.genome.licences import tagged
from chrysalis_ray.genome.sources.archives import read_archive
from chrysalis_ray.genome.sources.git_source import read_git
from chrysalis_ray.genome.sources.history import read_history
from chrysalis_ray.genome.sources.hub_records import read_records
from chrysalis_ray.genome.sources.packages import read_packages
from chrysalis_ray.genome.sources.python_text import read_python

DATA_FILES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
SKIPPED_FOLDERS = frozenset({".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv", ".ipynb_checkpoints"})


def read_source(source: Source, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
    """Documents of one source. `skipped` counts what was left out, by reason; `facts` receives what the source is pinned to.
    Raises GenomeError, with a remedy, when the source is missing, unreadable, malformed or empty."""
    if isinstance(source, PythonSource):
        yield from read_python(source, skipped)
        return
    if isinstance(source, HistorySource):
        yield from read_history(source, relative_to, skipped, facts)
        return
    if isinstance(source, FolderSource):
        documents = read_folder(source, relative_to, skipped)
    elif isinstance(source, JsonlSource):
        documents = read_jsonl(source, relative_to, skipped)
    elif isinstance(source, PackedSource):
        documents = _read_packed(source, relative_to, skipped, facts)
    elif isinstance(source, RecordsSource):
        documents = read_records(source, located(source.path, relative_to), skipped, facts)
    else:
        documents = read_dataset(source, relative_to, skipped)
    limit = None if source.max_megabytes is None else int(source.max_megabytes * 1_000_000)
    count = 0
    for document in capped(documents, limit, skipped):
        count += 1
        yield document
    if not count:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items())) or "nothing there"
        if isinstance(source, PackedSource):
            domains = ", ".join(repr(domain) for _, domain in source.patterns)
            raise GenomeError(
                f"no document for {domains} in {source.named!r} ({reasons})",
                "let a `glob` match text, or raise `max_megabytes`",
            )
        raise GenomeError(
            f"domain {source.domain!r}: no document in {source.path!r} ({reasons})",
            "point `path` (and `glob`, `text_key`, `messages_key`) at UTF-8 text, or raise `max_megabytes`",
        )


def _read_packed(
    source: GitSource | ArchiveSource | PackagesSource, relative_to: Path, skipped: Counter[str], facts: dict[str, Any]
) -> Iterator[Document]:
    if isinstance(source, GitSource):
        return read_git(source, relative_to, skipped, facts)
    if isinstance(source, ArchiveSource):
        return read_archive(source, relative_to, skipped, facts)
    return read_packages(source, skipped, facts)


def located(path: str, relative_to: Path) -> Path:
    """Where a written path lies: relative to the experiment's folder, ``~`` being the user's home."""
    return relative_to / written_path(path)


# folder -------------------------------------------------------------------------------------------------------------


def read_folder(source: FolderSource, relative_to: Path, skipped: Counter[str]) -> Iterator[Document]:
    """One document per file that matches `glob`, in hash order. Counts ``not_text``, ``empty``, ``outside`` (a link that leads
    out of the folder) and ``unreadable`` (files, and folders that cannot be listed)."""
    root = located(source.path, relative_to)
    if not root.is_dir():
        raise GenomeError(f"domain {source.domain!r}: {root} is no folder", "paths are relative to the experiment file")
    real_root = root.resolve()

    def unreadable(error: OSError) -> None:
        skipped["unreadable"] += 1

    for name in sorted(matching_files(root, source.glob, unreadable), key=hash_order):
        path = root / name
        try:
            if not path.resolve().is_relative_to(real_root):
                skipped["outside"] += 1
                continue
            content = path.read_bytes()
        except OSError:
            skipped["unreadable"] += 1
            continue
        found = decoded(content)
        if found is None:
            skipped["not_text"] += 1
        elif not found[0].strip():
            skipped["empty"] += 1
        else:
            (text, encoding), key = found, f"{PurePosixPath(source.path)}/{shown_path(os.fsencode(name))}"
            tag = tagged(text)
            evidence = "tag" if tag else "declared"
            yield make_document(text, key, key, source.domain, tag or source.licence, encoding, evidence)


def matching_files(root: Path, glob: str, unreadable: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """Relative posix names of regular files under `root` that match `glob`; folders are never entered through a link. A name
    that is no UTF-8 comes as `os.fsdecode` gives it; `unreadable` hears of folders that cannot be listed."""
    pattern = PurePosixPath(glob).parts
    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=False):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for file in files:
            path = Path(folder, file)
            relative = path.relative_to(root)
            if path.is_file() and matches(relative.parts, pattern):
                yield relative.as_posix()


# JSON lines ---------------------------------------------------------------------------------------------------------


def read_jsonl(source: JsonlSource, relative_to: Path, skipped: Counter[str]) -> Iterator[Document]:
    """One document per line; in order of content when capped, so that a cap takes a spread of the file. Counts ``empty``.

    Raises GenomeError naming ``file:line`` at the first line that is no JSON object, lacks its key, or holds something else
    there than text or a conversation.
    """
    path = located(source.path, relative_to)
    if not path.is_file():
        raise GenomeError(f"domain {source.domain!r}: {path} is no file", "paths are relative to the experiment file")
    documents = _lines(path, source, skipped)
    if source.max_megabytes is None:
        yield from documents
    else:
        yield from sorted(documents, key=lambda document: document.doc_id)


def _lines(path: Path, source: JsonlSource, skipped: Counter[str]) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            text = _text_of_record(_parse(line, path, number), source, f"{path}:{number}")
            if text.strip():
                yield _document(text, f"{PurePosixPath(source.path)}#{number}", f"{path}:{number}", source)
            else:
                skipped["empty"] += 1


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise GenomeError(f"{path}:{number}: not UTF-8 ({error.reason} at {error.start})", "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise GenomeError(
            f"{path}:{number}: not JSON ({error.msg} at column {error.colno})",
            "one JSON object per line, no line breaks inside it",
        ) from error
    except RecursionError as error:
        raise GenomeError(f"{path}:{number}: JSON nested too deeply", "one flat JSON object per line") from error


def _text_of_record(record: Any, source: JsonlSource, where: str) -> str:
    name, key = _written_key(source)
    if not isinstance(record, dict):
        raise GenomeError(f"{where}: a JSON object is wanted, this is {type(record).__name__}", f'{{"{key}": ...}}')
    if key not in record:
        raise GenomeError(f"{where}: no key {key!r}; it has {sorted(record)[:12]}", f"set `{name}` to one of them")
    return _text_of_value(record[key], source, where)


def _written_key(source: Records) -> tuple[str, str]:
    """Where the content of a record stands: the name of the setting, and the key."""
    return ("messages_key", source.messages_key) if source.messages_key else ("text_key", source.text_key)


def _text_of_value(value: Any, source: Records, where: str) -> str:
    name, key = _written_key(source)
    if source.messages_key:
        return conversation_text(value, f"{where}: {key!r}")
    if not isinstance(value, str):
        raise GenomeError(f"{where}: {key!r} is {type(value).__name__}, not text", f"set `{name}` to a text")
    return value


def _document(text: str, key: str, where: str, source: JsonlSource | DatasetSource) -> Document:
    """A document whose split follows its own content: rows have no file of their own to follow."""
    try:
        document = make_document(text, key, "", source.domain, source.licence)
    except UnicodeEncodeError as error:
        raise GenomeError(f"{where}: a lone surrogate at character {error.start}", "repair the text's encoding") from error
    return replace(document, source_key=f"content/{document.doc_id}")


# data sets ----------------------------------------------------------------------------------------------------------


def read_dataset(source: DatasetSource, relative_to: Path, skipped: Counter[str]) -> Iterator[Document]:
    """One document per row of a Hugging Face data set: a folder on this machine (data files, or one written by
    `save_to_disk`) or a single data file if `path` is one, else the hub. No code of the data set is ever run. Local files are
    read where they are, without a copy in a cache; a capped set of the hub is streamed from its beginning, so that a megabyte
    of a terabyte costs a megabyte. Counts ``empty``."""
    for number, row in enumerate(_rows(source, relative_to)):
        name, key = _written_key(source)
        if key not in row:
            raise GenomeError(
                f"data set {source.path!r} has no column {key!r}; it has {sorted(row)[:12]}", f"set `{name}` to one of them"
            )
        where = f"{source.path}[{number}]"
        text = "" if row[key] is None else _text_of_value(row[key], source, where)
        if not text.strip():
            skipped["empty"] += 1
            continue
        yield _document(text, f"{source.path}#{number}", where, source)


def _rows(source: DatasetSource, relative_to: Path) -> Iterator[dict[str, Any]]:
    """The rows of the wanted split; what `datasets` raises, at once or on the way, as GenomeError."""
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # an error is told once, below
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield from _load(source, relative_to, scratch)
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise GenomeError(
            f"domain {source.domain!r}: data set {source.path!r} (split {source.split!r}) cannot be read: "
            f"{type(error).__name__}: {str(error)[:300]}",
            "check `path`, `subset`, `split` and `revision`; a local folder is relative to the experiment file; "
            "data sets that need their own code are not run",
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _load(source: DatasetSource, relative_to: Path, scratch: str) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` when streamed. Local files are streamed; what little `datasets` writes for
    them goes to `scratch`. Only an uncapped set of the hub fills the user's cache."""
    import datasets

    folder = located(source.path, relative_to)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, dict):
            return saved
        if source.split not in saved:
            raise ValueError(f"no split {source.split!r}; it has {sorted(saved)}")
        return saved[source.split]
    if folder.is_file() and (builder := DATA_FILES.get(folder.suffix.lower())):
        files = {source.split: str(folder)}  # a file is the split that is asked for
        return datasets.load_dataset(builder, data_files=files, split=source.split, streaming=True, cache_dir=scratch)
    if folder.is_file():
        raise ValueError(f"{folder.name} is none of {', '.join(DATA_FILES)}")
    if folder.is_dir():
        return datasets.load_dataset(str(folder), source.subset, split=source.split, streaming=True, cache_dir=scratch)
    if source.path.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{folder} is no folder and no file")
    return datasets.load_dataset(
        source.path, source.subset, split=source.split, revision=source.revision, streaming=source.max_megabytes is not None
    )
