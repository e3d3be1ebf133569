"""What a blueprint lets its base be fed: small bases get a selected genome, large ones the whole."""

from __future__ import annotations

from collections.abc import Iterator

from chrysalis_ray.config.blueprint import Blueprint, Selection
from chrysalis_ray.config.experiment import Experiment, Source
from chrysalis_ray.config.genome import MARKS, GitSource
from chrysalis_ray.config.population import DirichletMixes, LevelMixes, ListedMixes
from chrysalis_ray.config.problems import Finding, suggestion


def check_selection(blueprint: Blueprint) -> Iterator[Finding]:
    """Marks of `genome.exclude` that there are none of."""
    for position, mark in enumerate(blueprint.genome.exclude):
        if mark not in MARKS:
            yield ("genome", "exclude", position), f"{mark!r} is no mark; {suggestion(mark, MARKS)}"


def select_genome(experiment: Experiment, selection: Selection) -> tuple[Experiment, tuple[str, ...]]:
    """The experiment with what `selection` leaves of its genome, and what was left out, in words.

    What the experiment says itself stands: its own `genome.exclude`, and sources whose domains its mixes name.
    """
    genome, words = experiment.genome, []
    if "exclude" not in genome.model_fields_set and (more := set(selection.exclude) - set(genome.exclude)):
        genome = genome.model_copy(update={"exclude": tuple(sorted({*genome.exclude, *more}))})
        words.append(f"genome: documents marked {' or '.join(sorted(more))} are left out")
    if selection.histories == "none" and (older := _older_snapshots(experiment)):
        genome = genome.model_copy(update={"sources": tuple(source for source in genome.sources if source not in older)})
        words += [f"genome: {source.url} at {source.commit} is left out: the first snapshot written stands" for source in older]
    return experiment.model_copy(update={"genome": genome}), tuple(words)


def _older_snapshots(experiment: Experiment) -> list[GitSource]:
    """Git sources of a repository that an earlier source has too, unless the mixes name a domain of theirs."""
    named, seen, older = _named(experiment), set(), []
    for source in experiment.genome.sources:
        if not isinstance(source, GitSource):
            continue
        if source.url in seen and not named & _domains(source):
            older.append(source)
        seen.add(source.url)
    return older


def _domains(source: Source) -> set[str]:
    return {domain for _, domain in source.patterns} if isinstance(source, GitSource) else set()


def _named(experiment: Experiment) -> set[str]:
    epigenomes = experiment.population.epigenomes
    if isinstance(epigenomes, ListedMixes):
        return {domain for mix in epigenomes.mixes for domain in mix.express}
    if isinstance(epigenomes, DirichletMixes):
        return set(epigenomes.concentrations)
    return set(epigenomes.levels) if isinstance(epigenomes, LevelMixes) else set()
