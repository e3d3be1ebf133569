"""How far candidates predict from what members of a population predict, token by token.

    KL(m || c)   = sum_v p_m(v) (log p_m(v) - log p_c(v))       what c loses on text that m writes, beyond what m loses itself
    mean_m KL(m || c) = KL(mixture || c) + spread               mixture = mean_m p_m, spread = mean_m KL(m || mixture)

The second line is the compensation identity (Donsker, Csiszar): the spread, the Jensen-Shannon divergence of the members (Lin
1991), is what no single distribution can avoid. All in nats. Both sums are taken of differences to the mixture of all members,
which are small where the distributions are close: nothing large cancels.

    hidden_CKD   candidates x tokens x width        divergence_MCK   members x candidates x tokens        G   groups of members

Logits are never whole: of a few tokens at a time those of all candidates are formed, compared, and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.training.heads import Head
from chrysalis_ray.training.loss import chunk_of


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
        hidden_CkD = hidden_CKD[:, start : start + step].to(device)
        logits_CkV = head.logits(hidden_CkD.flatten(0, 1)).unflatten(0, hidden_CkD.shape[:2])
        parts.append(Agreement(*(part.cpu() for part in compare_logits(logits_CkV, members, groups))))
    return Agreement(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))


def compare_logits(logits_CkV: Tensor, members: Sequence[int], groups: Sequence[Sequence[int]]) -> Agreement:
    """The same of logits [candidates, tokens, vocabulary]."""
    likeliest_Ck = logits_CkV.argmax(-1)
    logs_CkV = torch.log_softmax(logits_CkV, -1)
    logs_MkV = logs_CkV[list(members)]
    chances_MkV = logs_MkV.exp()
    all_kV = _mixture(logs_MkV)
    near_Mk = (chances_MkV * (logs_MkV - all_kV)).sum(-1)  # KL(member || mixture of all)
    # KL(member || candidate) = KL(member || mixture of all) + sum_v p_m (log of that mixture - log p_c)
    apart_kCV = (all_kV - logs_CkV).transpose(0, 1)
    divergence_kMC = near_Mk.T[:, :, None] + torch.bmm(chances_MkV.transpose(0, 1), apart_kCV.transpose(1, 2))
    spreads, mixtures = [], []
    for group in groups:
        mixture_kV = all_kV if list(group) == list(range(len(members))) else _mixture(logs_MkV[list(group)])
        # mean KL(member || mixture of all) = spread + KL(mixture of the group || mixture of all)
        beyond_k = (mixture_kV.exp() * (mixture_kV - all_kV)).sum(-1)
        spreads.append(near_Mk[list(group)].mean(0) - beyond_k)
        mixtures.append(mixture_kV.argmax(-1))
    return Agreement(divergence_kMC.permute(1, 2, 0), torch.stack(spreads), likeliest_Ck, torch.stack(mixtures))


def _mixture(logs_MkV: Tensor) -> Tensor:
    """Logarithm of the mean of the members' probabilities."""
    return torch.logsumexp(logs_MkV, 0) - math.log(len(logs_MkV))
