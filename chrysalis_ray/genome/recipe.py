"""What a genome was asked to be made of: its recipe, which its id stands on."""

from __future__ import annotations

from typing import Any

from chrysalis_ray.config.experiment import GenomeSpec, PythonSource, Source
from chrysalis_ray.config.genome import RecordsSource
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.genome.marks import VERSION as MARKS_VERSION
from chrysalis_ray.genome.sources.python_text import python_identity
from chrysalis_ray.genome.splits import VERSION as KINSHIP_VERSION

FORMAT = 3


def recipe_of(spec: GenomeSpec) -> dict[str, Any]:
    """What the genome is made of, whatever the order of the sources; with the Python version where its text is a source."""
    sources = [recipe_of_source(source) for source in spec.sources]
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "sources": sorted(sources, key=sha256_of),
        "split": spec.split.model_dump(mode="json"),
        "exclude": sorted(set(spec.exclude)),
        "marks": MARKS_VERSION,
        "kinship": KINSHIP_VERSION,
    }
    if spec.use_denied:
        recipe["use_denied"] = sorted((denial.model_dump(mode="json") for denial in spec.use_denied), key=sha256_of)
    if any(isinstance(source, PythonSource) for source in spec.sources):
        recipe["python"] = python_identity()
    return recipe


def recipe_of_source(source: Source) -> dict[str, Any]:
    """A source as written, with its defaults."""
    written = source.model_dump(mode="json")
    if isinstance(source, PythonSource):
        written["domains"] = sorted(written["domains"])
    if isinstance(source, RecordsSource):
        written["keeps"] = "json"  # before, the prose alone was sealed
    return written
