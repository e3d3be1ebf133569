"""How much a merge may lose on a domain: one number for all domains, or numbers by domain, with `*` for all others.

max_domain_loss: 0.02
max_domain_loss: {code: 0.0, chats: null, "*": 0.02}       null: it may lose anything there
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from chrysalis_ray.config.epigenome import OTHERS, Selector
from chrysalis_ray.config.problems import Finding, suggestion

MOST_LOST = 0.1  # nats per token, where nothing is said


def _kind(written: Any) -> str:
    return "by domain" if isinstance(written, Mapping) else "for all"


def _not_empty(written: Any) -> Any:
    if isinstance(written, Mapping) and not written:
        raise ValueError("is an empty mapping; a number was meant, or numbers by domain")
    return written


_Limit = Annotated[float, Field(ge=0.0)]
_ByDomain = Annotated[dict[Selector, _Limit | None], AfterValidator(lambda limits: {OTHERS: MOST_LOST, **limits})]
DomainLoss = Annotated[
    Annotated[_Limit | None, Tag("for all")] | Annotated[_ByDomain, Tag("by domain")],
    Discriminator(_kind),
    BeforeValidator(_not_empty),
]
Limits = float | Mapping[str, float | None] | None  # what became of it


def limit_of(limits: Limits, domain: str) -> float | None:
    """How many nats per token a merge may lose on `domain`; None where it may lose anything."""
    if isinstance(limits, Mapping):
        return limits.get(domain, limits[OTHERS])
    return limits


def check_domain_loss(evaluate: Any, domains: Sequence[str]) -> Iterator[Finding]:
    """Domains that no source provides."""
    limits = evaluate.max_domain_loss
    for domain in limits if isinstance(limits, Mapping) else ():
        if domain not in domains and domain != OTHERS:
            what = f"no source provides the domain {domain!r}; {suggestion(domain, domains)}; '*' speaks for all others"
            yield ("evaluate", "max_domain_loss", domain), what
