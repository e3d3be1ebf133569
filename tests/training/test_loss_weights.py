"""What a token weighs in the loss, and who computes it: the same for any number of workers, across a change of the mix."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from training_texts import TextTokens, variant

from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.training.lanes import Feed, LaneStep, Take, microbatch

ROWS = 96
MIX = Epigenome(
    {"code": 1.0, "prose": 2.0},
    loss_weights={"prose": 3.0},
    stages=(Change(ROWS // 3, {"prose": 0.5}),),
    changes=(Change(ROWS + 7, {"code": 5.0}),),
)


@pytest.mark.parametrize("step", [0, 1, 10**7])
def test_workers_share_a_step_and_its_weights_whatever_their_number(step: int, tokens: TextTokens) -> None:
    """Step 0 holds a stage, step 1 a change; the last stands at position 9.6 x 10^8."""
    member = replace(variant(0), epigenome=MIX, rows_per_step=ROWS)

    def parts(world: int) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        total = 0.0
        for rank in range(world):
            take = Take(Feed(member, tokens).step(step), 0, ROWS)  # each worker makes its own plan
            batch = microbatch([take], tokens, ROWS, rank, world, torch.device("cpu"))
            labelled = batch.labelled
            total += labelled.weights_K.sum().item()
            rows = labelled.index_K // tokens.sequence_length
            for row in rows.unique().tolist():
                (weight,) = labelled.weights_K[rows == row].unique().tolist()  # one weight in a row
                found[(round(weight * 1e12), *batch.input_ids_NT[row].tolist())] += 1
        assert total == pytest.approx(1.0)
        return found

    alone = parts(1)
    assert sum(alone.values()) == ROWS
    for world in (2, 3, 4, 6, 8, 32, 95, 96):
        assert parts(world) == alone


def test_a_token_weighs_its_domains_weight_over_the_sum() -> None:
    step = LaneStep((("code", 0), ("prose", 1), ("code", 2)), (5, 2, 3), None, {"prose": 4.0})
    assert step.token_weights() == (1 / 16, 4 / 16, 1 / 16)
    assert LaneStep((("code", 0), ("prose", 1)), (5, 2)).token_weights() == (1 / 7, 1 / 7)
    assert LaneStep((("code", 0),), (0,)).token_weights() == (1.0,)  # no label, nothing to weigh
