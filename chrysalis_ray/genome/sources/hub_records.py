"""Documents from records of healing hubs (`config/records.py`): one a line of JSON, as prose, with what they lack as marks.

The JSON is sealed beside the prose, byte for byte; only a place finer than consent allows is cut there too, and its document
written anew. No hash of the uncut line is kept: a geohash could be guessed from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from chrysalis_ray.config.genome import RecordsSource
from chrysalis_ray.config.records import WANTED, HubRecord, Measure
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.documents import Document, make_document


def read_records(source: RecordsSource, path: Path, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
    """One document per record; in order of content when capped, so that a cap takes a spread. Counts ``empty`` (a record that
    tells nothing) and puts into `facts` how complete the records are.

    A record without consent to training is marked ``use_denied``, one that fills less than `complete_from` of what it should
    ``incomplete``. Raises GenomeError naming ``file:line`` at the first line that is no record.
    """
    if not path.is_file():
        raise GenomeError(f"domain {source.domain!r}: {path} is no file", "paths are relative to the experiment file")
    told = facts["records"] = {"records": 0, "filled": 0, "wanted": 0, "missing": {}, "incomplete": 0, "denied": 0}
    documents = _documents(source, path, skipped, told)
    if source.max_megabytes is None:
        yield from documents
    else:
        yield from sorted(documents, key=lambda document: document.doc_id)


def _documents(source: RecordsSource, path: Path, skipped: Counter[str], told: dict[str, Any]) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            record = _record(line, f"{path}:{number}")
            text = as_prose(record)
            if not text:
                skipped["empty"] += 1
                continue
            licence = (record.licence or "").strip()
            where = f"{PurePosixPath(source.path)}#{number}"
            evidence = "record" if licence else "declared"
            document = make_document(text, where, "", source.domain, licence or source.licence, evidence=evidence)
            marks = _marks(record, source.complete_from)
            _count(record, marks, told)
            if record.media:
                media = [{"of": where, **each.model_dump(mode="json", exclude_none=True)} for each in record.media]
                told["media"] = told.get("media", []) + media
            kept = _as_consented(line, record)
            yield replace(document, source_key=f"content/{document.doc_id}", marks=marks, record=kept)


def _record(line: bytes, where: str) -> HubRecord:
    try:
        record = HubRecord.model_validate_json(line, strict=True)
        json.loads(line, object_pairs_hook=_no_twins)
        return record
    except _Twins as twins:
        raise GenomeError(f"{where}: no hub record: it says {twins.args[0]!r} twice", "leave one of them out") from twins
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise GenomeError(
            f"{where}: no hub record: {f'{place}: ' if place else ''}{first['msg']}",
            f"one JSON object per line, with {', '.join(WANTED)}, media",
        ) from error


class _Twins(Exception):
    """A key that stands twice in a mapping: readers of JSON differ in which they believe."""


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    told = dict(pairs)
    if len(told) < len(pairs):
        raise _Twins(next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])))
    return told


def _as_consented(line: bytes, record: HubRecord) -> str:
    """The record's line without its line break; written anew, its place cut, where that is finer than consent allows."""
    if (record.place or "") == record.coarse_place:
        return line.decode().removesuffix("\n").removesuffix("\r")
    told = json.loads(line)
    del told["place"]
    return json.dumps(told | ({"place": record.coarse_place} if record.coarse_place else {}), ensure_ascii=False)


def _marks(record: HubRecord, complete_from: float) -> dict[str, str]:
    marks = {}
    missing, filled = record.missing, len(WANTED) - len(record.missing)
    if filled < complete_from * len(WANTED):
        marks["incomplete"] = f"{filled} of {len(WANTED)}; no {', '.join(missing)}"
    if not record.may_train:
        marks["use_denied"] = "no consent is noted" if record.consent is None else "consent to training was not given"
    return marks


def _count(record: HubRecord, marks: dict[str, str], told: dict[str, Any]) -> None:
    told["records"] += 1
    told["wanted"] += len(WANTED)
    told["filled"] += len(WANTED) - len(record.missing)
    told["incomplete"] += "incomplete" in marks
    told["denied"] += "use_denied" in marks
    for name in record.missing:
        told["missing"][name] = told["missing"].get(name, 0) + 1


# prose --------------------------------------------------------------------------------------------------------------


def as_prose(record: HubRecord) -> str:
    """The record as a person would tell it, a line per part that is there; the place as coarse as consent says. Empty where
    nothing was told."""
    told = {"Context": record.context, "Action": record.action, "Outcome": record.outcome}
    if not any((part or "").strip() for part in (record.activity, *told.values())) and not record.measures:
        return ""
    head = f"{record.kind.capitalize()} hub" if record.kind else "Hub"
    lines = _told(head, record.activity) or [head]
    lines += [f"Place: {record.coarse_place}"] if record.coarse_place else []
    lines += [f"Time: {_span(record.start, record.end)}"] if record.start or record.end else []
    lines += _told("Context", record.context) + _told("Action", record.action)
    lines += [f"Measured: {_measured(measure)}" for measure in record.measures]
    lines += _told("Outcome", record.outcome) + _told("Source", record.provenance)
    return "\n".join(lines) + "\n"


def _told(name: str, text: str | None) -> list[str]:
    return [f"{name}: {text.strip()}"] if text and text.strip() else []


def _span(start: str | None, end: str | None) -> str:
    return f"{start} to {end}" if start and end and start != end else f"since {start}" if not end else f"until {end}"


def _measured(measure: Measure) -> str:
    unit = f" {measure.unit}" if measure.unit else ""
    parts = [
        f"{name} {value:.10g}{unit}"
        for name, value in (("before", measure.before), ("after", measure.after))
        if value is not None
    ]
    parts += [f"within {measure.uncertainty:.10g}{unit}"] if measure.uncertainty is not None else []
    parts += [f"by {measure.method}"] if measure.method else []
    parts += [f"with {measure.instrument}"] if measure.instrument else []
    return ", ".join([measure.name, *parts])
