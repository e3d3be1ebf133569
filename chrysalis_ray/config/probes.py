"""Probe tasks as people write them: questions with answers, in a YAML of their own.

    name: plurals
    kind: multiple_choice
    items:
      - {prompt: "one mouse, two", choices: [" mice", " mouses"], answer: 0}

    name: capitals
    kind: exact_match
    items:
      - {prompt: "The capital of France is", answer: " Paris"}

Nothing is added between a prompt and what follows it: write the space that belongs there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, RootModel, model_validator

from chrysalis_ray.config.blueprint import Written
from chrysalis_ray.config.loading import _read, _refusal, _validate
from chrysalis_ray.config.population import Name
from chrysalis_ray.config.synonyms import EXPERIMENT

Text = Annotated[str, Field(min_length=1)]


class Choice(Written):
    """A prompt and what may follow it; `answer` numbers the right one from 0."""

    prompt: Text
    choices: Annotated[tuple[Text, ...], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _one_of_them(self) -> Choice:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, the choices are numbered 0 to {len(self.choices) - 1}")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are the same text")
        return self


class Match(Written):
    """A prompt and the one text that is right after it."""

    prompt: Text
    answer: Text


class ChoiceProbe(Written):
    """Right is the choice that is likelier than all others."""

    name: Name
    kind: Literal["multiple_choice"]
    items: Annotated[tuple[Choice, ...], Field(min_length=1)]


class MatchProbe(Written):
    """Right is an answer that greedy decoding would write, token for token."""

    name: Name
    kind: Literal["exact_match"]
    items: Annotated[tuple[Match, ...], Field(min_length=1)]


Probe = ChoiceProbe | MatchProbe


class _AnyProbe(RootModel[Annotated[Probe, Field(discriminator="kind")]]):
    pass


def read_probe(path: Path) -> Probe:
    """The probe of a file. Raises ConfigError that names every mistake with its line."""
    problems: list[str] = []
    _, tree = _read(path, str(path), "probe")
    problems += tree.problems
    probe = _validate(_AnyProbe, tree.root, EXPERIMENT, problems)
    if probe is None or problems:
        raise _refusal(path, problems)
    return probe.root
