"""Tasks of lm-eval that an experiment names: they tell what a benchmark makes of what a run releases, and choose nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from chrysalis_ray.config.written import Count, Written

TaskName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.+-]+$")]


class LmEval(Written):
    """`tasks` of lm-eval (an extra) by name, asked of the seed, the best variant and what is released, when all is chosen.
    `folder` holds YAML of tasks of your own beside those that lm-eval knows; `limit` takes so many items of each task."""

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)]
    folder: Annotated[str, Field(min_length=1)] | None = None
    limit: Count | None = None

    @field_validator("tasks")
    @classmethod
    def _no_twins(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twins = sorted({task for task in tasks if tasks.count(task) > 1})
        if twins:
            raise ValueError(f"task {twins[0]!r} is named twice; once is enough")
        return tasks
