"""The function check on the page: how far seed, best variant and merges predict from what their members do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from chrysalis_ray.report.comparison import SEED, Comparison
from chrysalis_ray.report.reading import mapping, number, numbers
from chrysalis_ray.report.sections import cell_of, section_of, table_of

HEADS = (
    "variant", "KL from members", "from", "to", "their spread", "same token", "as their mixture", "as most of them", "members",
)  # fmt: skip
NOTE = (
    "On <i>report</i>: the mean of KL(member || candidate) in nats per token, with its interval; of it the spread of the "
    "members, how far they are from their own mixture, is what no merge can avoid. Then the shares of tokens where the "
    "candidate finds the same likeliest as a member, as the members' mixture, and as most of them where more than half agree. "
    "The members of a merge are the variants it was made of; those of the seed are all variants, as are those of a variant, "
    "itself among them: compare rows of as many members."
)


def agreement_section(comparison: Comparison) -> str:
    """A table of who was compared; an empty text where nobody was."""
    verdict = comparison.verdict
    named = [SEED, *([verdict.winner] if verdict else []), *(row.name for row in comparison.merges)]
    told = {name: mapping(comparison.agreement[name]) for name in named if name in comparison.agreement}
    rows = [_row(name, found, verdict is not None and name == verdict.chosen) for name, found in told.items()]
    if not any(rows):
        return ""
    apart = "".join(_members(name, found) for name, found in told.items() if name != SEED)
    folded = f"<details><summary>Member by member</summary>{apart}</details>" if apart else ""
    return section_of(
        "Do they still do what their members do?", NOTE, f"{table_of('Agreement with members', HEADS, rows)}{folded}"
    )


def _row(name: str, told: Mapping[str, Any], chosen: bool) -> str:
    apart = mapping(told.get("divergence"))
    cells = "".join(cell_of(number(apart.get(key))) for key in ("mean", "low", "high")) + cell_of(number(told.get("spread")))
    shares = [
        number(mapping(told.get("agreement")).get("mean")),
        number(mapping(told.get("with_mixture")).get("mean")),
        number(told.get("with_majority")),
    ]
    cells += "".join(cell_of(share, ".1%") for share in shares) + cell_of(_count(told.get("members")), "d")
    style = " class='chosen'" if chosen else ""
    return f"<tr{style}><th scope='row'>{escape(name)}</th>{cells}</tr>"


def _count(members: Any) -> int | None:
    return len(members) if isinstance(members, Sequence) and not isinstance(members, str) else None


def _members(name: str, told: Mapping[str, Any]) -> str:
    rows = []
    for member, found in mapping(told.get("by_member")).items():
        own, loss = numbers(found), numbers(mapping(found).get("loss"))
        cells = cell_of(own.get("divergence")) + cell_of(own.get("agreement"), ".1%")
        cells += "".join(cell_of(loss.get(key), "+.4f") for key in ("mean", "low", "high"))
        rows.append(f"<tr><th scope='row'>{escape(str(member))}</th>{cells}</tr>")
    heads = ("variant", f"KL(variant || {name})", "same token", "loss against it", "from", "to")
    return f"<h3>{escape(name)}</h3>{table_of(f'{name} and its members', heads, rows)}" if rows else ""
