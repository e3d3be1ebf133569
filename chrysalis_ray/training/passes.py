"""How many variants one pass computes. Plain arithmetic, no torch.

A pass is one forward and backward of a thread, or of a GPU. All variants in it hold their activations until it is through;
what they save by it is its launch. So a pass takes as many variants as `tokens_per_pass` hold, one at least, and the others
wait: the memory of one pass then serves them all. Of what they wait for nothing can be felt, for gradients go to rows of
their own, and nobody steps before all passes of a micro-step are through.

In fixed lanes all passes compute equally many variants, so that a variant's arithmetic has the same shapes in any slot.
"""

from __future__ import annotations

import math

from chrysalis_ray.config.blueprint import BodyPatch

MOST_SHARDS = 4  # more threads than this wait for each other's Python more than they compute, on a base of a few million
# Without a backward pass a layer's activations are gone when the next one's are there: so many times as many tokens fit.
SCORED_TOKENS = 4
# A pass is long enough at this many tokens on any device, and where its launch is a tenth of its work, or hidden behind it.
LONG_ENOUGH, LAUNCHES, ROOFS = 1024, 10, 2

# The same on a CPU, where candidates are scored in turns: beyond CACHED tokens of a pass activations no longer stay near the
# core that reads them again. Layers that are worn (`worn.py`) see to that themselves, and what a pass costs beside them is paid
# less often. Of a candidate there are LANE_TOKENS at least, for its matrices are made once a pass.
CACHED, WORN, LANE_TOKENS = 2048, 8192, 2048
# Bytes of hidden states, as if of fp32, that a worker keeps while candidates are compared (`evaluate/listener.py`), of one row
# at the least; the plan counts them. More beside a GPU: reading the adapters anew for other rows is what takes time there.
KEPT_ON_CPU, KEPT_BESIDE_GPU = 1 << 28, 1 << 30

# Threads that are left over go into the operations of the others' variants from so many input features on, or from so many
# tokens that a variant brings at a time.
WIDE, LONG = 1024, 256

# The most tokens of logits at a time, and the fewest, for the head is read once a chunk; and numbers that a chunk should have:
# so many stay near a core, or keep a GPU busy.
MOST_LOGITS, FEWEST_LOGITS, CPU_NUMBERS, GPU_NUMBERS = 1024, 128, 1 << 20, 1 << 27


def logits_chunk(vocabulary: int, *, on_gpu: bool) -> int:
    """Labelled tokens whose logits are formed at a time, by the device and the vocabulary alone."""
    return max(FEWEST_LOGITS, min(MOST_LOGITS, (GPU_NUMBERS if on_gpu else CPU_NUMBERS) // vocabulary))


def most_kept(*, on_gpu: bool) -> int:
    """Bytes of hidden states that a worker keeps while candidates are compared."""
    return KEPT_BESIDE_GPU if on_gpu else KEPT_ON_CPU


def variants_per_pass(variants: int, lane: float, tokens_per_pass: int | None, even: bool = False) -> int:
    """How many of `variants` of `lane` tokens each are computed at once; with `even` a number that divides them."""
    if tokens_per_pass is None:
        return variants
    most = min(max(int(tokens_per_pass // lane), 1), variants)
    return max(size for size in range(1, most + 1) if variants % size == 0) if even else most


def passes_of(variants: int, at_once: int) -> list[slice]:
    """Neighbours together, at most `at_once` of them, as evenly as can be."""
    count = math.ceil(variants / at_once)
    return [slice(index * variants // count, (index + 1) * variants // count) for index in range(count)]


def shards_of(body: BodyPatch) -> int:
    """How many threads of a worker compute variants of their own (`shards.py`): on CPUs, where nothing must be in step."""
    alone = (body.workers or 1) == 1 and not body.virtual_workers and body.zero_stage != 3
    if (body.gpus_per_worker or 0) > 0 or not alone or body.compile:
        return 1
    return min(threads_of(body), MOST_SHARDS)


def splits(widest: int, lane: float) -> bool:
    """Whether an operation of so many input features on so many tokens of a variant is worth splitting over threads."""
    return widest >= WIDE or lane >= LONG


def threads_of(body: BodyPatch) -> int:
    """Threads that a CPU worker computes with."""
    return body.threads or math.ceil(body.cpus_per_worker or 1)


def tokens_at_once(variants: int, lane: float, tokens_per_pass: int | None, shards: int, fixed: bool = False) -> float:
    """Tokens whose activations a worker of so many shards holds at once, of `variants` with `lane` tokens each."""
    if fixed:  # as `shards.py` deals them: every shard as many
        shards = max(count for count in range(1, min(shards, variants) + 1) if variants % count == 0)
    live = min(shards, variants)
    return min(live * variants_per_pass(math.ceil(variants / live), lane, tokens_per_pass, fixed), variants) * lane


def long_enough(ridge: int, kind: str) -> int:
    """Tokens from which on a longer pass is hardly faster, by the ridge of a law of this kind (`pace.py`): a power of two.

    Where launch and work add up, another pass costs a tenth of its work at the most; where the longer of both counts, nothing.
    """
    wanted = max(LONG_ENOUGH, ridge * (LAUNCHES if kind == "sum" else ROOFS))
    return int(1 << (wanted - 1).bit_length())
