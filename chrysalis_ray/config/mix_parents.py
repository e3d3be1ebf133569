"""Listed mixes that are made of others: what they inherit, and from whom.

A mix is made of mixes above it, so that a list reads from top to bottom and none is made of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chrysalis_ray.config.epigenome import Expression, ListedMixes, Mix, Mixes

SAID = (*Expression.model_fields, "prior")  # what may be said of a mix beside its levels


@dataclass(frozen=True)
class Descent:
    """What comes of a mix and its parents. `said` beside levels, by itself or by a parent: of two, what they agree in;
    `speakers` in whose lines that stands; `disputed` what two parents differ in and it does not say itself (levels under
    different priors are no parents, whatever it says). Every domain with a level and whether it is above 0: `given` before the
    operators of the mix, `heard` after them, of which only `swap` brings anybody to 0 or from there."""

    said: Mapping[str, Any]
    speakers: Mapping[str, Mix]
    disputed: tuple[str, ...]
    given: Mapping[str, bool]
    heard: Mapping[str, bool]


def parent_names(mix: Mix) -> tuple[str, ...]:
    """The mixes that it is like, or a cross of."""
    return mix.cross or ((mix.like,) if mix.like is not None else ())


def descents(mixes: ListedMixes) -> dict[str, Descent]:
    """The descent of every mix, by its name. Parents that do not stand above are none (`epigenome_checks` refuses them)."""
    found: dict[str, Descent] = {}
    for mix in mixes.mixes:
        parents = [found[name] for name in parent_names(mix) if name in found]
        found[mix.name] = _descent(mixes, mix, parents)
    return found


def _descent(mixes: ListedMixes, mix: Mix, parents: list[Descent]) -> Descent:
    own = [key for key in SAID if key in mix.model_fields_set and not (key == "prior" and mix.prior is None)]
    values = [{name: getattr(mixes, name) for name in SAID} | dict(parent.said) for parent in parents]
    agreed = [key for key in SAID if all(value[key] == values[0][key] for value in values)]
    speakers: dict[str, Mix] = {}
    for parent in reversed(parents):
        speakers |= {key: speaker for key, speaker in parent.speakers.items() if key in agreed}
    given = {domain: level > 0.0 for domain, level in mix.express.items()}
    for parent in parents:
        given |= {domain: given.get(domain, False) or loud for domain, loud in parent.heard.items()}
    heard = dict(given)
    for one, other in mix.swap:
        if one in heard and other in heard:
            heard[one], heard[other] = heard[other], heard[one]
    return Descent(
        said={key: values[0][key] for key in speakers} | {key: getattr(mix, key) for key in own},
        speakers=speakers | dict.fromkeys(own, mix),
        disputed=tuple(key for key in SAID if key not in agreed and (key == "prior" or key not in own)),
        given=given,
        heard=heard,
    )


def expression_of(mixes: Mixes, descent: Descent | None) -> tuple[Expression, str]:
    """What holds for a variant of a mix of this descent (None: not listed), and its prior: the mix's own keys, then those of
    its parents, then those of all."""
    told = {name: getattr(mixes, name) for name in SAID} | dict(descent.said if descent is not None else {})
    prior = told.pop("prior")
    return Expression.model_construct(**told), prior
