"""A variant's mix resolved for people: what it asked for on the average, and what was said of it beside levels, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from chrysalis_ray.core.records import Epigenome, Variant
from chrysalis_ray.core.shares import Segment, mean_shares, schedule, unheard


@dataclass(frozen=True)
class Part:
    """What holds from a step on: the shares asked for, and whether a stage began there, or a change was appended."""

    step: int
    shares: Mapping[str, float]
    why: str  # start | stage | bred


@dataclass(frozen=True)
class ResolvedMix:
    """`words` say what beside levels makes the mix, prior first; `parts` its schedule, one part where nothing changes."""

    words: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()


def asked_shares(epigenome: Epigenome, tokens: Mapping[str, float], rows: int = 0) -> dict[str, float]:
    """The shares that were asked for in the first `rows`, or to begin with; domains without any are left out.

    `tokens` by domain serve priors and caps; where they are not known, every domain counts alike.
    """
    segments = _segments(epigenome, tokens)
    shares = mean_shares(segments, rows) if segments else {}
    return {domain: share for domain, share in sorted(shares.items()) if share > 0.0}


def shares_now(epigenome: Epigenome, tokens: Mapping[str, float], trained_tokens: float) -> dict[str, float]:
    """The shares that hold after `trained_tokens`. Changes were appended as it trained: all of them hold."""
    segments = _segments(epigenome, tokens)
    latest = max([change.row for change in epigenome.changes], default=0)
    rows = max(latest, int(trained_tokens // epigenome.row_tokens) if epigenome.row_tokens else 0)
    shares = next((part.shares for part in reversed(segments) if part.start <= rows), {})
    return {domain: share for domain, share in sorted(shares.items()) if share > 0.0}


def resolved_mix(variant: Variant, epigenome: Epigenome, tokens: Mapping[str, float]) -> ResolvedMix:
    """What makes the mix of a variant, as it is now."""
    stages = {stage.row for stage in epigenome.stages}
    return ResolvedMix(
        words=(*_words(epigenome), *_never_drawn(epigenome, tokens)),
        parts=tuple(
            Part(
                part.start // variant.rows_per_step,
                {domain: share for domain, share in sorted(part.shares.items()) if share > 0.0},
                "start" if part.start == 0 else "stage" if part.start in stages else "bred",
            )
            for part in _segments(epigenome, tokens)
        ),
    )


def _segments(epigenome: Epigenome, tokens: Mapping[str, float]) -> tuple[Segment, ...]:
    if not any(level > 0.0 for level in epigenome.express.values()):
        return ()
    named = _named(epigenome)
    if all(tokens.get(domain) for domain in named):
        return schedule(epigenome, tokens)
    return schedule(replace(epigenome, prior="uniform", caps={}, rows={}), dict.fromkeys(named, 1.0))


def _named(epigenome: Epigenome) -> set[str]:
    named = {*epigenome.express, *epigenome.replay, *epigenome.floors}
    return named | {domain for change in (*epigenome.stages, *epigenome.changes) for domain in change.express}


def _never_drawn(epigenome: Epigenome, tokens: Mapping[str, float]) -> tuple[str, ...]:
    if not all(tokens.get(domain) for domain in _named(epigenome)):
        return ()
    return tuple(f"no row of {domain}: {why}" for domain, why in unheard(epigenome, tokens).items())


def _words(epigenome: Epigenome) -> tuple[str, ...]:
    said = [f"prior {epigenome.prior}"]
    if silent := [domain for domain, level in sorted(epigenome.express.items()) if level == 0.0]:
        said.append(f"silent {', '.join(silent)}")
    if epigenome.floors:
        said.append(f"at least {_list(epigenome.floors, '.1%')}")
    if epigenome.caps:
        said.append(f"at most {_list(epigenome.caps, 'g')} epochs")
    if epigenome.replay_share:
        said.append(f"{epigenome.replay_share:.0%} replay of {_list(epigenome.replay, 'g')}")
    if epigenome.loss_weights:
        said.append(f"loss weights {_list(epigenome.loss_weights, 'g')}")
    if epigenome.kept != 1.0:
        said.append(f"{epigenome.kept:.3g} of the rows of every domain")
    return tuple(said)


def _list(values: Mapping[str, float], form: str) -> str:
    """``code 2, notes 3``; one value where all have it."""
    if len(values) > 1 and len(set(values.values())) == 1:
        return f"{next(iter(values.values())):{form}} each of {', '.join(sorted(values))}"
    return ", ".join(f"{domain} {value:{form}}" for domain, value in sorted(values.items()))
