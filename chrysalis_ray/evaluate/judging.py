"""Candidates of every kind on one frozen base: as many in a pass as there is room for, all on the same held-out rows.

    adapter     a slot of the bank each; one of a higher rank than the bank's is a blend of itself alone
    blend       weighted sums of adapters, which share the members' projections (`training/blend.py`)
    mixture     nothing of its own: the losses of its members, token by token, give those of their mean probability; what the
                head is given of them gives its likeliest token, and how far others predict from them (`listener.py`)

A solo body wears one candidate after the other. Collective: every worker of a body calls it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from chrysalis_ray.evaluate.heldout import Mixture, Piece, Scorer, by_candidate, heldout_rows, judge_pieces
from chrysalis_ray.evaluate.inputs import keep_inputs
from chrysalis_ray.evaluate.listener import Listener
from chrysalis_ray.evaluate.scores import DocumentScore
from chrysalis_ray.evaluate.subjects import Candidate, Row, Rows
from chrysalis_ray.evaluate.whole_inputs import keep_whole_inputs
from chrysalis_ray.training.generation import Ids, Over, write_blend, write_slots
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.passes import LANE_TOKENS
from chrysalis_ray.training.solo import SoloPack

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import TokenStore
    from chrysalis_ray.seed.adapter import AdapterWeights

Find = Callable[[str], Path]
# prompts, when one ends, the most tokens a worker has of them -> what every candidate writes, [candidates][prompts]
Writer = Callable[[Sequence[Ids], Over, int], list[list[list[int]]]]
BATCH_ROWS = 8  # rows of a pass on one worker, times the slots of the bank


def judge_candidates(
    pack: Pack,
    tokens: TokenStore,
    candidates: Sequence[Candidate],
    split: str,
    rows_per_domain: int,
    find: Find = Path,
) -> Rows:
    """Every candidate's scores on the same held-out rows, in the order given. What the slots of `pack` held is lost.

    `find` makes a path of what a candidate calls its folder.
    """
    mixtures = {each.name: (Mixture(), [folder for folder, _ in each.members]) for each in candidates if each.made == "mixture"}
    given = [each for each in candidates if each.made != "mixture"]
    told = {each.folder for each in given if each.made == "adapter"}
    untold = sorted({folder for _, folders in mixtures.values() for folder in folders} - told)
    asked = [*given, *(Candidate("", folder) for folder in untold)]
    compare = next((each.compare for each in candidates if each.compare is not None), None)
    listener = Listener(asked, list(mixtures.values()), compare) if mixtures and not isinstance(pack, SoloPack) else None
    found: dict[int, tuple[Sequence[Candidate], list[Piece]]] = {}
    every_row = heldout_rows(tokens, split, rows_per_domain)
    for some in listener.turns(every_row, pack, tokens.sequence_length) if listener else [every_row]:
        unheard = [(mixture, set(folders)) for mixture, folders in mixtures.values()]  # in these rows
        for number, (group, score, _, batch_rows) in enumerate(passes(pack, asked, find, keep=listener is not None)):
            hear = [each for mixture, folders in unheard if (each := (mixture, _take(folders, group)))[1]]
            together = rows_at_once(pack, batch_rows, tokens.sequence_length)
            keep = partial(listener.keep, group) if listener else None
            pieces = judge_pieces(pack.engine, score, tokens, split, some, together, hear, keep)
            found.setdefault(number, (group, []))[1].extend(pieces)
        if listener:
            listener.compare(pack, tokens, split)
    rows: Rows = {}
    for group, pieces in found.values():
        rows |= {each.name: told_rows(own) for each, own in zip(group, by_candidate(sorted(pieces)), strict=True) if each.name}
    for name, (mixture, _) in mixtures.items():
        rows[name] = told_rows(mixture.scores(tokens, split, pack.engine.world))
    if listener and compare:
        listener.write(pack.engine, split, compare)
    keep_inputs(pack, tokens, candidates, split, rows_per_domain, find)
    keep_whole_inputs(pack, tokens, candidates, rows_per_domain * len(tokens.domains), find)
    return {each.name: rows[each.name] for each in candidates}


def rows_at_once(pack: Pack, batch_rows: int, length: int) -> int:
    """Rows of a pass: more of them where they are short and memory does not depend on their number (`Pack._lanes_at_once`)."""
    in_turns = type(pack) is Pack and pack.engine.device.type == "cpu" and pack.engine.copyable and pack.lanes != "fixed"
    return max(batch_rows, LANE_TOKENS // length) if in_turns else batch_rows


def _take(folders: set[str], group: Sequence[Candidate]) -> list[int]:
    """Where in a pass these adapters stand, each once; they are taken out of `folders`."""
    places = []
    for place, each in enumerate(group):
        if each.made == "adapter" and each.folder in folders:
            folders.remove(each.folder)
            places.append(place)
    return places


def told_rows(scores: Sequence[DocumentScore]) -> list[Row]:
    return [(s.domain, int(s.document), s.loss_sum, s.tokens, s.bytes, s.correct) for s in scores]


class Pass(NamedTuple):
    """Candidates that are judged together, ready to be scored and to write, and the rows of a batch."""

    group: Sequence[Candidate]
    score: Scorer
    write: Writer
    batch_rows: int


def passes(pack: Pack, candidates: Sequence[Candidate], find: Find, keep: bool = False) -> Iterator[Pass]:
    """The candidates in groups that are judged together; with `keep` a score holds what the head is given as well."""
    from chrysalis_ray.seed.adapter import read_adapter
    from chrysalis_ray.seed.streamed import open_adapter

    if isinstance(pack, SoloPack):
        for each in candidates:
            _wear(pack, each, find)
            yield Pass([each], partial(pack.judge, [0]), partial(write_slots, pack, [0]), BATCH_ROWS)
        return
    slots, fitting, blended = pack.bank.slots, list[Candidate](), list[Candidate]()
    for each in candidates:
        high = each.folder is not None and open_adapter(find(each.folder)).rank > pack.bank.room
        if each.folder is not None and high and pack.bank.patterns:  # a variant's own fits, whatever its largest rank
            high = not pack.bank.holds(read_adapter(find(each.folder)).factors)
        (blended if high or each.made == "blend" else fitting).append(each)
    for group in _groups(fitting, slots):
        for slot, each in enumerate(group):
            _place(pack, slot, None if each.folder is None else read_adapter(find(each.folder)))
        taken = list(range(len(group)))
        yield Pass(group, partial(pack.judge, taken, keep=keep), partial(write_slots, pack, taken), BATCH_ROWS)
    room = slots * BATCH_ROWS  # candidates times rows: no more memory than the slots need
    for group in _groups(blended, room):
        members = [each.members or ((each.folder or "", 1.0),) for each in group]
        folders = sorted({folder for own in members for folder, _ in own})
        weights_CM = torch.zeros(len(group), len(folders), dtype=torch.float64)
        for candidate, own in enumerate(members):
            for folder, weight in own:
                weights_CM[candidate, folders.index(folder)] += weight
        adapters = [open_adapter(find(folder)) for folder in folders]
        blend = pack.blend([(adapter.factors, adapter.scale) for adapter in adapters], weights_CM)
        rows = max(1, room // len(group))
        yield Pass(group, partial(pack.judge_blend, blend, keep=keep), partial(write_blend, pack, blend), rows)


def _groups(candidates: Sequence[Candidate], size: int) -> Iterator[Sequence[Candidate]]:
    return (candidates[start : start + size] for start in range(0, len(candidates), size))


def _wear(pack: SoloPack, candidate: Candidate, find: Find) -> None:
    """Put a candidate on the base of a solo body; a sum of plain adapters is one of all their ranks."""
    from chrysalis_ray.seed.adapter import read_adapter
    from chrysalis_ray.seed.solo import is_plain, read_solo

    if candidate.made == "blend":
        members = [(read_adapter(find(folder)), weight) for folder, weight in candidate.members]
        factors = {
            name: (
                torch.cat([member.factors[name][0] for member, _ in members]),
                torch.cat([member.factors[name][1] * (weight * member.scale) for member, weight in members], 1),
            )
            for name in members[0][0].factors
        }
        pack.load_adapter(0, factors, 1.0)
    elif candidate.folder is None or is_plain(find(candidate.folder)):
        _place(pack, 0, None if candidate.folder is None else read_adapter(find(candidate.folder)))
    else:
        pack.load_solo(0, *read_solo(find(candidate.folder), pack.worn))


def _place(pack: Pack, slot: int, adapter: AdapterWeights | None) -> None:
    """Put an adapter into a slot for judging only; None is the bare base. A target that it lacks is a change of zero there."""
    if adapter is None:
        pack.clear(slot)
        return
    factors = dict(adapter.factors)
    rank = next(iter(factors.values()))[0].shape[0]
    for target in pack.bank.targets:
        if target.name not in factors:
            factors[target.name] = (torch.zeros(rank, target.in_features), torch.zeros(target.out_features, rank))
    pack.load_adapter(slot, factors, adapter.scale)
