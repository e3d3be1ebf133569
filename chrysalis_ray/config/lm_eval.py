"""Tasks of lm-eval that an experiment names: they tell what a benchmark makes of what a run releases, and choose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from chrysalis_ray.config.problems import problem_at
from chrysalis_ray.config.written import Count, Written
from chrysalis_ray.config.yaml_tree import Node

if TYPE_CHECKING:
    from chrysalis_ray.config.experiment import Experiment

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


def with_task_folder(experiment: Experiment, tree: Node, beside: Path, problems: list[str]) -> Experiment:
    """The experiment with the whole path of its folder of tasks, which is relative to `beside`. One that is not there is added
    to `problems`."""
    told = experiment.evaluate.lm_eval
    if told is None or told.folder is None:
        return experiment
    folder = (beside / Path(told.folder).expanduser()).absolute()
    if not _has_tasks(folder):
        what = f"there is no folder with the YAML of tasks at {folder}; give one, relative to the experiment, or leave it out"
        problems.append(problem_at(tree, ("evaluate", "lm_eval", "folder"), what))
        return experiment
    own = told.model_copy(update={"folder": str(folder)})
    return experiment.model_copy(update={"evaluate": experiment.evaluate.model_copy(update={"lm_eval": own})})


def _has_tasks(folder: Path) -> bool:
    found: Sequence[Path] = [*folder.rglob("*.yaml"), *folder.rglob("*.yml")] if folder.is_dir() else []
    return bool(found)
