"""TIES' election against the words of the paper, entry by entry."""

from __future__ import annotations

import pytest
import torch

from chrysalis_ray.merge.elementwise import Block, elected_mean

MEMBERS, ROWS, COLUMNS = 4, 5, 7
WEIGHTS = [0.4, 0.3, 0.2, 0.1]


def in_words(entries, weights, scale, agreeing):
    """The sign of the weighted sum is elected; of those that have it the weighted mean, or sum; of a draw, nothing."""
    total = sum(w * x for w, x in zip(weights, entries, strict=True))
    sizes = sum(w * abs(x) for w, x in zip(weights, entries, strict=True))
    if abs(total) <= 1e-6 * sizes:
        return 0.0
    agree = [(w, x) for w, x in zip(weights, entries, strict=True) if x * total > 0.0]
    share = sum(w for w, _ in agree) if agreeing == "mean" else 1.0
    return scale * sum(w * x for w, x in agree) / share


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("agreeing", ["mean", "sum"])
@pytest.mark.parametrize("units", [None, [1.0, 0.5, 2.0, 4.0]])
def test_the_election_is_that_of_the_paper(dtype, agreeing, units):
    entries = torch.randn(MEMBERS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=dtype)
    entries[entries.abs() < 0.5] = 0.0  # trimmed
    entries[:, 0, 0] = 0.0  # nothing was kept
    entries[:, 0, 1] = torch.tensor([-0.75, 0.0, 0.0, 0.0])  # one alone
    in_units = torch.tensor(units or [1.0] * MEMBERS, dtype=dtype)
    drawn = torch.tensor([0.3, -0.4, 0.1, -0.2], dtype=dtype)  # 0.4 x 0.3 + 0.2 x 0.1 against 0.3 x 0.4 + 0.1 x 0.2
    entries[:, 0, 2] = drawn / in_units
    whole = (entries * in_units[:, None, None]).tolist()
    weights_N = torch.tensor(WEIGHTS, dtype=dtype)
    block = Block(entries, weights_N, torch.ones(MEMBERS, dtype=dtype), [], None if units is None else in_units)
    elected = elected_mean(block, entries, 1.5, agreeing)
    expected = torch.tensor(
        [
            [in_words([whole[n][r][c] for n in range(MEMBERS)], WEIGHTS, 1.5, agreeing) for c in range(COLUMNS)]
            for r in range(ROWS)
        ],
        dtype=torch.float64,
    )
    assert elected[0, 0] == 0.0
    assert elected[0, 1] < 0.0
    assert (elected.double() - expected).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)
    assert elected[0, 2] == 0.0
