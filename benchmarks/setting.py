"""What the baseline of `population.py` is told of a prepared run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Where the files of a prepared run lie, and how a report is scored."""

    base_folder: str
    tokens_folder: str
    seed_folder: str
    targets: tuple[str, ...]
    rows_per_report: int
    threads: int
