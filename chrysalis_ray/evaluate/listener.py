"""Who listens to what all candidates predict, and compares: the probabilities of a mixture, and how far others are from it.

A probability for every token of the vocabulary is too much to keep, and members and merges seldom share a pass. What the head
is given is small: it is kept, on the CPU, of every candidate for so many rows as `most_kept` bytes hold; then all of them are
compared on those (`training/agreement.py`) and it is let go of. Every candidate goes through the base once for its losses and
this together; only the head is asked twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.records import write_json
from chrysalis_ray.evaluate.agreement import MEASURES
from chrysalis_ray.evaluate.heldout import Mixture, Place, gathered
from chrysalis_ray.evaluate.subjects import Candidate, Comparing
from chrysalis_ray.training.agreement import Agreement, compare_hidden
from chrysalis_ray.training.passes import most_kept

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import RowBatch, TokenStore
    from chrysalis_ray.training.engine import Engine
    from chrysalis_ray.training.pack import Pack

TURN_ROWS = 8  # rows of a worker at a time are a multiple of these, where so many are kept: the passes of judging alone


class _Compared(NamedTuple):
    """Candidates to compare, each with its group of members; all of them places among those who are listened to."""

    names: Sequence[str]
    places: Sequence[int]
    groups: Sequence[int]


class Listener:
    """Listens to the candidates `judged`, for the `mixtures` of the adapters in some folders, and for what is to be compared.

    Raises EvaluationError where something is to be compared that is not judged.
    """

    def __init__(
        self, judged: Sequence[Candidate], mixtures: Sequence[tuple[Mixture, Sequence[str]]], compare: Comparing | None
    ) -> None:
        self.place_of = {(each.name, each.folder): place for place, each in enumerate(judged)}
        by_name = {each.name: place for place, each in enumerate(judged)}
        folders = {each.folder: place for place, each in reversed(list(enumerate(judged))) if each.made == "adapter"}
        groups: list[tuple[int, ...]] = []
        self.mixtures = [(mixture, _group(groups, [folders[own] for own in members])) for mixture, members in mixtures]
        told = dict(compare.members) if compare else {}
        unknown = sorted({name for name, own in told.items() for name in (name, *own)} - by_name.keys())
        if unknown:
            raise EvaluationError(f"{unknown[0]!r} is to be compared and is not judged", "judge it in the same call")
        places = [by_name[name] for name in told]
        own = [_group(groups, [by_name[member] for member in members]) for members in told.values()]
        self.compared = _Compared(tuple(told), places, own)
        self.members = sorted({place for group in groups for place in group})
        self.names_of = [[judged[place].name for place in group] for group in groups]
        self.groups = [[self.members.index(place) for place in group] for group in groups]
        self.kept: dict[Place, dict[int, Tensor]] = {}  # of every row by candidate: what the head is given, [T, D]
        self.pieces: list[Any] = []  # domain, document, row, tokens, then what `_documents` says

    def turns(self, rows: Sequence[Place], pack: Pack, length: int) -> Iterator[Sequence[Place]]:
        """The rows in turns, of which so many are kept as there is room for."""
        width = pack.shards.all[0].head.linear.in_features
        room = most_kept(on_gpu=pack.engine.device.type != "cpu")
        own = max(1, room // (4 * len(self.place_of) * length * width))
        own = own // TURN_ROWS * TURN_ROWS or own
        step = own * pack.engine.world
        return (rows[start : start + step] for start in range(0, len(rows), step))

    def keep(self, group: Sequence[Candidate], row: Place, hidden_CTD: Tensor) -> None:
        """Keep what the head is given on a row, by the candidates of a pass."""
        for each, hidden_TD in zip(group, hidden_CTD, strict=True):
            self.kept.setdefault(row, {})[self.place_of[each.name, each.folder]] = hidden_TD

    def compare(self, pack: Pack, tokens: TokenStore, split: str) -> None:
        """Compare all on the rows that were kept, and let go of them. Collective."""
        head = pack.shards.all[0].head
        with pack.engine.gather(head.parameters):
            for row, kept in self.kept.items():
                batch = tokens.batch([row], split)
                learned_T = batch.labels[0] != -100
                hidden_CKD = torch.stack([kept[place][torch.from_numpy(learned_T)] for place in range(len(self.place_of))])
                found = compare_hidden(hidden_CKD, head, self.members, self.groups, pack.engine.device)
                for mixture, group in self.mixtures:
                    hits_T = np.zeros(len(learned_T), np.bool_)
                    hits_T[learned_T] = found.mixture_GK[group].numpy() == batch.labels[0][learned_T]
                    mixture.hits[row] = hits_T
                if self.compared.names:
                    self.pieces += self._documents(row, batch, learned_T, found)
                pack.shards.all[0].progress()
        self.kept.clear()

    def _documents(self, row: Place, batch: RowBatch, learned_T: NDArray[np.bool_], found: Agreement) -> list[Any]:
        """What every document of a row comes to: the measures of each candidate, summed over tokens, and by member."""
        document_K = batch.document[0][learned_T]
        divergence_MCK, likeliest_CK = found.divergence_MCK.double().numpy(), found.likeliest_CK.numpy()
        spread_GK, mixture_GK = found.spread_GK.double().numpy(), found.mixture_GK.numpy()
        measured = []
        for place, group in zip(self.compared.places, self.compared.groups, strict=True):
            members, own_K = self.groups[group], likeliest_CK[place]
            chosen_MK = likeliest_CK[[self.members[member] for member in members]]
            agreed_MK = (chosen_MK == own_K).astype(np.float64)
            most_K, majority_K = _majority(chosen_MK)
            apart_MK = divergence_MCK[members, place]
            rows = [
                apart_MK.mean(0), spread_GK[group], agreed_MK.mean(0), mixture_GK[group] == own_K,
                majority_K & (most_K == own_K), majority_K, *apart_MK, *agreed_MK,
            ]  # fmt: skip
            measured.append(np.stack([np.asarray(each, np.float64) for each in rows]))
        pieces: list[Any] = []
        for document in np.unique(document_K):
            inside_K = document_K == document
            sums = [values[:, inside_K].sum(1) for values in measured]
            pieces.append((row[0], int(document), row[1], int(inside_K.sum()), sums))
        return pieces

    def write(self, engine: Engine, split: str, compare: Comparing) -> None:
        """Write what was found on all workers. A candidate of which something is no number is left out. Collective."""
        pieces = cast(list[Any], gathered(self.pieces, engine.world))
        if engine.rank != 0:
            return
        written: dict[str, Any] = {"split": split, "members": {}, "documents": {}, "by_member": {}}
        for number, name in enumerate(self.compared.names):
            own = [(*piece[:2], piece[3], piece[4][number]) for piece in pieces]
            if not all(np.isfinite(sums).all() for *_, sums in own):
                continue
            documents: dict[tuple[str, int], tuple[int, NDArray[np.float64]]] = {}
            for domain, document, tokens, sums in own:
                before = documents.get((domain, document), (0, np.zeros_like(sums)))
                documents[domain, document] = before[0] + tokens, before[1] + sums
            members = self.names_of[self.compared.groups[number]]
            written["members"][name] = members
            written["documents"][name] = [
                [*key, count, *sums[: len(MEASURES)].tolist()] for key, (count, sums) in sorted(documents.items())
            ]
            written["by_member"][name] = _by_member(members, documents)
        write_json(Path(compare.file), written)


def _group(groups: list[tuple[int, ...]], places: Sequence[int]) -> int:
    """The number of a group of members, which is added where it is new."""
    group = tuple(sorted(places))
    if group not in groups:
        groups.append(group)
    return groups.index(group)


def _majority(chosen_MK: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The token that most members chose, [K], and whether those are more than half of them."""
    votes_MK = (chosen_MK[:, None] == chosen_MK[None]).sum(0)
    first_K = votes_MK.argmax(0)
    places_K = np.arange(chosen_MK.shape[1])
    return chosen_MK[first_K, places_K], 2 * votes_MK[first_K, places_K] > len(chosen_MK)


def _by_member(
    members: Sequence[str], documents: dict[tuple[str, int], tuple[int, NDArray[np.float64]]]
) -> dict[str, dict[str, float]]:
    """KL(member || candidate) in nats per token and the share of tokens in agreement, the means over domains, by member."""
    domains = sorted({domain for domain, _ in documents})
    means = []
    for domain in domains:
        own = [told for (where, _), told in documents.items() if where == domain]
        means.append(np.sum([sums for _, sums in own], axis=0) / sum(count for count, _ in own))
    told = np.mean(means, axis=0)[len(MEASURES) :]
    apart, agreed = told[: len(members)].tolist(), told[len(members) :].tolist()
    return {name: {"divergence": apart[place], "agreement": agreed[place]} for place, name in enumerate(members)}
