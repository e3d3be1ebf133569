"""Whether a base hears older states of a repository where no mix says so."""

from __future__ import annotations

from collections.abc import Sequence

from chrysalis_ray.config.experiment import Experiment, GenomeSpec
from chrysalis_ray.config.genome import HistorySource
from chrysalis_ray.config.population import DirichletMixes, LevelMixes, ListedMixes

SMALL_BELOW = 3_000_000_000  # parameters of a base


def history_domains(genome: GenomeSpec, heard: str | None = None) -> tuple[str, ...]:
    """The domains of all histories, or of those with this `heard`, in order."""
    sources = [source for source in genome.sources if isinstance(source, HistorySource)]
    return tuple(sorted(d for source in sources if heard in (None, source.heard) for d in source.domains))


def heard_by_default(
    experiment: Experiment, domains: Sequence[str], parameters: int | None
) -> tuple[tuple[str, ...], str | None]:
    """The domains that mixes are made of, and why some are not among them (None where all are).

    A history is at level 0 for a base of less than `SMALL_BELOW` parameters, unless the source says ``heard: always`` or the
    mixes name the domain. Where they are listed they name all they express, and nothing is left out. `parameters` is None where
    the base is not known yet.
    """
    mixes = experiment.population.epigenomes
    if isinstance(mixes, ListedMixes) or (parameters is not None and parameters >= SMALL_BELOW):
        return tuple(domains), None
    named = set(mixes.levels if isinstance(mixes, LevelMixes) else ())
    named |= set(mixes.concentrations if isinstance(mixes, DirichletMixes) else ())
    silent = [d for d in domains if d in history_domains(experiment.genome, "large") and d not in named]
    heard = tuple(domain for domain in domains if domain not in silent)
    if not silent or not heard:
        return tuple(domains), None
    if parameters is None:
        small = f"a base of less than {SMALL_BELOW / 1e9:g} billion parameters, and the size of this one is not known yet"
        return tuple(domains), f"{_span(silent)}: at level 0 for {small}"
    return heard, (
        f"{_span(silent)} at level 0: older states of what is heard already, and a base of {parameters / 1e6:,.0f} million "
        f"parameters is small (below {SMALL_BELOW / 1e9:g} billion); name them in the mixes, or write heard: always"
    )


def _span(domains: Sequence[str]) -> str:
    return domains[0] if len(domains) == 1 else f"{domains[0]} to {domains[-1]} ({len(domains)} domains)"
