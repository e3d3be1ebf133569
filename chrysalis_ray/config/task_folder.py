"""Where the YAML of tasks lies that an experiment brings along for lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.problems import problem_at
from chrysalis_ray.config.yaml_tree import Node
from chrysalis_ray.core.written_paths import written_path


def with_task_folder(experiment: Experiment, tree: Node, beside: Path, problems: list[str]) -> Experiment:
    """The experiment with the whole path of its folder of tasks, which is relative to `beside`. One that is not there is added
    to `problems`."""
    told = experiment.evaluate.lm_eval
    if told is None or told.folder is None:
        return experiment
    folder = (beside / written_path(told.folder)).absolute()
    if not _has_tasks(folder):
        what = f"there is no folder with the YAML of tasks at {folder}; give one, relative to the experiment, or leave it out"
        problems.append(problem_at(tree, ("evaluate", "lm_eval", "folder"), what))
        return experiment
    own = told.model_copy(update={"folder": str(folder)})
    return experiment.model_copy(update={"evaluate": experiment.evaluate.model_copy(update={"lm_eval": own})})


def _has_tasks(folder: Path) -> bool:
    found: Sequence[Path] = [*folder.rglob("*.yaml"), *folder.rglob("*.yml")] if folder.is_dir() else []
    return bool(found)
