"""Reading probe tasks: each from a file of its own, as `chrysalis evaluate --probe` takes it, or all that an experiment names.

What an experiment names by a file stands in it from then on, question by question: its hash is of what is asked.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import RootModel

from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.problems import problem_at
from chrysalis_ray.config.questions import AnyProbe, ChoiceProbe, FileProbe, MatchProbe, Probe
from chrysalis_ray.config.reading import read, refusal, validate
from chrysalis_ray.config.synonyms import EXPERIMENT
from chrysalis_ray.config.yaml_tree import Node
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.core.written_paths import written_path

__all__ = ["ChoiceProbe", "MatchProbe", "Probe", "read_probe", "with_probes"]


class _AnyProbe(RootModel[AnyProbe]):
    pass


def read_probe(path: Path) -> Probe:
    """The probe of a file. Raises ConfigError that names every mistake with its line."""
    problems: list[str] = []
    _, tree = read(path, str(path), "probe")
    problems += tree.problems
    probe = validate(_AnyProbe, tree.root, EXPERIMENT, problems)
    if probe is None or problems:
        raise refusal(path, problems)
    return probe.root


def with_probes(experiment: Experiment, tree: Node, folder: Path, problems: list[str]) -> Experiment:
    """The experiment with the probes of the files that it names, relative to `folder`. What is wrong with them, two of one name
    or one too short to choose and to tell is added to `problems`."""
    told, found = experiment.evaluate, list[Probe]()
    for place, probe in enumerate(told.probes):
        at = ("evaluate", "probes", place)
        if isinstance(probe, FileProbe):
            try:
                probe = read_probe(folder / written_path(probe.path))
            except ConfigError as error:
                problems += [problem_at(tree, at, problem) for problem in error.problems]
                continue
        if probe.name in {other.name for other in found}:
            problems.append(problem_at(tree, at, f"two probes are called {probe.name!r}; give one of them another name"))
        if told.max_probe_drop is not None and len(probe.items) < 2:
            what = f"{probe.name} has one item; with max_probe_drop half of a probe chooses and the other half tells"
            problems.append(problem_at(tree, at, what))
        found.append(probe)
    return experiment.model_copy(update={"evaluate": told.model_copy(update={"probes": tuple(found)})})
