"""What a healing hub notes of an activity: one record a line of JSON. Nothing must be there; how much is, is measured."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from chrysalis_ray.config.blueprint import Written

HubKind = Literal["food", "housing", "clothing", "training", "health", "connection"]
Modality = Literal["text", "quantitative", "geospatial", "visual", "audio", "biochemical"]  # only the first two are read here
Text = Annotated[str, Field(max_length=100_000)]
WANTED = (
    "kind", "activity", "context", "place", "start", "end", "action", "measures", "outcome", "consent", "licence", "provenance",
)  # fmt: skip


class Measure(Written):
    """One quantity before and after, in one `unit` (UCUM, such as ``kg`` or ``Cel``); `uncertainty` is in that unit too."""

    name: Annotated[Text, Field(min_length=1)]
    unit: Text | None = None
    before: float | None = None
    after: float | None = None
    method: Text | None = None
    instrument: Text | None = None
    uncertainty: Annotated[float, Field(ge=0.0)] | None = None

    @property
    def whole(self) -> bool:
        """Whether the change can be told: from what to what, in which unit, and how it was found."""
        return None not in (self.unit, self.before, self.after, self.method)


class Consent(Written):
    """What those concerned agreed to. `place_characters` is how much of the place's geohash may be kept (5 is about 5 km)."""

    training: bool
    place_characters: Annotated[int, Field(ge=0, le=12)] = 5
    by: Text | None = None
    date: Text | None = None


class Media(Written):
    """A picture, film, sound or sample that belongs to the record and is kept elsewhere. Its hash is sealed as evidence."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    kind: Text | None = None
    modality: Modality | None = None


class HubRecord(Written):
    """An activity of a hub: what there was (`context`), what was done (`action`), what was measured and what came of it."""

    kind: HubKind | None = None
    activity: Text | None = None
    context: Text | None = None
    place: Annotated[str, Field(pattern=r"^[0-9b-hjkmnp-z]{1,12}$")] | None = None  # a geohash
    start: Text | None = None
    end: Text | None = None
    action: Text | None = None
    measures: tuple[Measure, ...] = ()
    outcome: Text | None = None
    consent: Consent | None = None
    licence: Text | None = None
    provenance: Text | None = None
    media: tuple[Media, ...] = ()

    @field_validator("start", "end")
    @classmethod
    def _a_day(cls, written: str | None) -> str | None:
        if written is not None:
            try:
                usual = date.fromisoformat(written).isoformat() == written  # ISO 8601 has other ways, which sort otherwise
            except ValueError:
                usual = False
            if not usual:
                raise ValueError(f"{written!r} is no date; write YYYY-MM-DD")
        return written

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ValueError(f"it ends ({self.end}) before it starts ({self.start})")
        return self

    @property
    def missing(self) -> tuple[str, ...]:
        """What of `WANTED` is not there; measures count where each tells its change."""
        return tuple(name for name in WANTED if not self._has(name))

    def _has(self, name: str) -> bool:
        value = getattr(self, name)
        if name == "measures":
            return bool(value) and all(measure.whole for measure in value)
        return bool(value.strip()) if isinstance(value, str) else value is not None

    @property
    def may_train(self) -> bool:
        return self.consent is not None and self.consent.training

    @property
    def coarse_place(self) -> str:
        """As much of the place as consent allows, which without consent is nothing."""
        return "" if self.consent is None or self.place is None else self.place[: self.consent.place_characters]
