"""What is judged, by whom, and what comes back. Plain data: the body of a run and a single process judge alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json

Row = tuple[str, int, float, int, int | None, int | None]  # domain, document, loss sum in nats, tokens, bytes, hits
Rows = dict[str, list[Row]]  # by candidate, all of the same documents in the same order


@dataclass(frozen=True)
class Candidate:
    """An adapter to judge: a PEFT folder that every worker can read, or None for the bare base.

    With `members`, (folder, weight), it is made of several. A ``blend`` is the adapter sum of weight x delta, exact and never
    written. A ``mixture`` is the mean of the members' probabilities, token by token; their weights are equal.

    With `compare`, a mixture also tells how far candidates predict from what others do.

    With `inputs`, a file, what an adapter feeds the modules of the base is written there, as far as the adapters `beside` it
    read it; with `own`, all of it, on rows that it was trained on.
    """

    name: str
    folder: str | None = None
    members: tuple[tuple[str, float], ...] = ()
    made: Literal["adapter", "blend", "mixture"] = "adapter"
    inputs: str | None = None
    beside: tuple[str, ...] = ()
    own: OwnRows | None = None
    compare: Comparing | None = None


@dataclass(frozen=True)
class Comparing:
    """Candidates whose predictions are compared with those of their members, token by token, all of which are judged with
    them; `members` are names by candidate. What comes of it is written to `file` (`agreement.py`)."""

    file: str
    members: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class OwnRows:
    """The rows of its own mix that a variant has been trained on: the first `rows` of its plan. What it feeds the modules of
    the base there is written to `file`."""

    file: str
    variant: Mapping[str, Any]
    rows: int


# candidates, split, rows per domain -> their scores
Judge = Callable[[Sequence[Candidate], str, int], Rows]


def blend_of(name: str, folders: Sequence[str]) -> Candidate:
    """The mean of the adapters' deltas."""
    return Candidate(name, None, tuple((folder, 1.0 / len(folders)) for folder in folders), "blend")


def mixture_of(name: str, folders: Sequence[str], compare: Comparing | None = None) -> Candidate:
    """The mean of the adapters' probabilities."""
    return Candidate(name, None, tuple((folder, 1.0 / len(folders)) for folder in folders), "mixture", compare=compare)


def with_inputs(candidates: Sequence[Candidate], layout: RunLayout) -> list[Candidate]:
    """The same candidates; what each variant among them feeds the modules is measured as well."""
    beside = (str(layout.seed), *(candidate.folder for candidate in candidates if candidate.folder is not None))
    return [
        candidate if candidate.folder is None
        else replace(candidate, inputs=str(layout.inputs(candidate.name)), beside=beside)
        for candidate in candidates
    ]  # fmt: skip


def with_own_rows(candidates: Sequence[Candidate], layout: RunLayout) -> list[Candidate]:
    """The same candidates; what each variant among them feeds the modules on its own rows is measured as well."""
    standing = read_json(layout.population_manifest)["variants"]

    def asked(candidate: Candidate) -> Candidate:
        row = standing.get(candidate.name) if candidate.folder is not None else None
        if row is None:
            return candidate
        variant = row["variant"]
        rows = int(row["chunks"]) * int(variant["chunk_steps"]) * int(variant["rows_per_step"])
        return replace(candidate, own=OwnRows(str(layout.whole_inputs(candidate.name)), variant, rows))

    return [asked(candidate) for candidate in candidates]


# Questions: rows whose answers are listened to, prompts that are gone on with ------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A prompt with one answer, in tokens: those from `start` on are the answer's."""

    ids: tuple[int, ...]
    start: int
    size: int  # bytes of the answer


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens, and how far it is gone on with: at most so many tokens, or until one of `stop` is written."""

    ids: tuple[int, ...]
    most: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """All that is asked at once."""

    answered: tuple[Answered, ...] = ()
    prompts: tuple[Prompt, ...] = ()


# loss of every answer in nats, and whether greedy decoding would write it; the tokens written to every prompt
Replies = tuple[list[tuple[float, bool]], list[list[int]]]
