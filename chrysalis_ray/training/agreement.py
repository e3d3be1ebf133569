"""How far candidates predict from what members of a population predict, token by token.

    KL(m || c)   = sum_v p_m(v) (log p_m(v) - log p_c(v))       what c loses on text that m writes, beyond what m loses itself
    mean_m KL(m || c) = KL(mixture || c) + spread               mixture = mean_m p_m, spread = mean_m KL(m || mixture)

The second line is the compensation identity (Donsker, Csiszar): the spread, the Jensen-Shannon divergence of the members (Lin
1991), is what no single distribution can avoid. All in nats. Sums are taken of differences to the mixture of all members, which
are small where the distributions are close: nothing large cancels.

    hidden_CKD   candidates x tokens x width        divergence_MCK   members x candidates x tokens        G   groups of members

Logits are never whole: of a few tokens at a time those of all candidates are formed, compared, and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.training.heads import Head
from chrysalis_ray.training.loss import chunk_of, likeliest


class Agreement(NamedTuple):
    """KL(member || candidate) in nats, the spread of each group of members in nats, and which token each candidate and the
    mixture of each group found likeliest (of equals the first)."""

    divergence_MCK: Tensor
    spread_GK: Tensor
    likeliest_CK: Tensor
    mixture_GK: Tensor


@torch.no_grad()
def compare_hidden(
    hidden_CKD: Tensor, head: Head, members: Sequence[int], groups: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Agreement:
    """What the candidates make of K tokens, from what the head is given of them; all on the CPU.

    `members` are candidates by place, `groups` are of members by their place among `members`. The head must be gathered. So
    many tokens are compared at a time that all candidates' logits together are no more than one candidate's while it is scored.
    """
    step = max(1, chunk_of(head.weight) // len(hidden_CKD))
    parts = []
    for start in range(0, hidden_CKD.shape[1], step):
        hidden_kCD = hidden_CKD[:, start : start + step].to(device).transpose(0, 1)
        logits_kCV = head.logits(hidden_kCD.flatten(0, 1)).unflatten(0, hidden_kCD.shape[:2])
        parts.append(Agreement(*(part.cpu() for part in compare_logits(logits_kCV, members, groups))))
    return Agreement(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))


def compare_logits(logits_kCV: Tensor, members: Sequence[int], groups: Sequence[Sequence[int]]) -> Agreement:
    """The same of logits [tokens, candidates, vocabulary]."""
    likeliest_kC = likeliest(logits_kCV)
    logs_kCV = torch.log_softmax(logits_kCV, -1)
    chances_kMV = logs_kCV[:, _places(members)].exp()
    mixture_kV = chances_kMV.mean(1)
    whole_kV = _log(mixture_kV)
    apart_kCV = torch.sub(whole_kV[:, None], logs_kCV, out=logs_kCV)
    # sum_v p_m (log mixture - log p_c), which is -KL(m || mixture) where c is m itself
    across_kMC = torch.bmm(chances_kMV, apart_kCV.mT)
    own_kM1 = torch.stack([across_kMC[:, place, member] for place, member in enumerate(members)], 1)[:, :, None]
    spreads, mixtures = [], []
    for group in groups:
        everybody = list(group) == list(range(len(members)))
        own_kV = mixture_kV if everybody else chances_kMV[:, _places(group)].mean(1)
        # mean KL(member || mixture of all) = spread + KL(mixture of the group || mixture of all)
        beyond_k = own_kV.new_zeros(len(own_kV)) if everybody else (own_kV * (_log(own_kV) - whole_kV)).sum(-1)
        spreads.append(-own_kM1[:, list(group), 0].mean(1) - beyond_k)
        mixtures.append(likeliest(own_kV))
    return Agreement((across_kMC - own_kM1).permute(1, 2, 0), torch.stack(spreads), likeliest_kC.T, torch.stack(mixtures))


def _log(chances_kV: Tensor) -> Tensor:
    """Logarithm of probabilities, finite also where one is nothing: there it is multiplied by nothing."""
    return chances_kV.clamp_min(torch.finfo(chances_kV.dtype).tiny).log()


def _places(places: Sequence[int]) -> slice | list[int]:
    """Neighbours as a slice, of which no copy is made."""
    first, last = places[0], places[-1]
    return slice(first, last + 1) if list(places) == list(range(first, last + 1)) else list(places)
