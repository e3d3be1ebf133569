"""Greedy decoding of many adapters at once: the same prompts under every lane, a token of all of them per pass.

    prompts, flush right --one pass--> keys, values and the first token of every (lane, prompt)
    token by token until all have ended: one pass over N = lanes x prompts tokens, the base's weights read once for all

Decoding is bound by reading weights, which a pack shares: that is where it gains most. What is written is the argmax of plain
logits, as `model.generate(do_sample=False)` has it where no penalty is set: nothing of a base's generation_config is heard but
which tokens end a text.

    ids_LPT   lanes x prompts x tokens        N   lanes x prompts, lane-major
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.blend import Blend
from chrysalis_ray.training.flash import KERNEL
from chrysalis_ray.training.lanes import MicroBatch
from chrysalis_ray.training.loss import Labelled
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.passes import SCORED_TOKENS, variants_per_pass
from chrysalis_ray.training.past import Past
from chrysalis_ray.training.probe import MOVED
from chrysalis_ray.training.shards import Shard

Ids = Sequence[int]
Over = Callable[[int, Ids], bool]  # prompt, what was written to it so far -> whether it ends here

TOKENS = 3  # of the row that a cache is tried on, twice


@dataclass
class _Lines:
    """What one shard writes: its rows' past, and the tokens that stand next."""

    past: Past
    ids_NT: Tensor


def write_slots(
    pack: Pack, slots: Sequence[int], prompts: Sequence[Ids], over: Over, tokens: int | None = None
) -> list[list[list[int]]]:
    """What the adapter of every slot writes to every prompt, token ids [slots][prompts], until `over` says so.

    Collective: all workers call it alike, each with prompts of its own, and all are done together. `tokens` are those of all
    prompts, filled up to the longest, on whichever worker has most: so many lanes are computed at a time as a pass may hold of
    them. Raises ModelError for a base that does not compute the same with its cache as without.
    """
    order = pack.arrange(slots)
    return _write(pack, pack.shards.rows, [order.index(slot) for slot in slots], prompts, over, None, tokens)


def write_blend(
    pack: Pack, blend: Blend, prompts: Sequence[Ids], over: Over, tokens: int | None = None
) -> list[list[list[int]]]:
    """The same for every candidate of a blend."""
    with pack.shards.blended(blend) as parts:
        return _write(pack, parts, list(range(len(blend))), prompts, over, blend, tokens)


def end_tokens(pack: Pack) -> frozenset[int]:
    """The tokens that end a text, as the base says: its generation_config, else its config."""
    model: Any = pack.shards.all[0].trunk.model
    told = getattr(model, "generation_config", None)
    for config in (told, model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()


@torch.no_grad()
def _write(
    pack: Pack,
    parts: Sequence[slice],
    lanes: Sequence[int],
    prompts: Sequence[Ids],
    over: Over,
    blend: Blend | None,
    tokens: int | None,
) -> list[list[list[int]]]:
    """What these lanes write, in this order."""
    at_once = _lanes_at_once(pack, parts, tokens or len(prompts) * max(map(len, prompts)), blend)
    written: dict[int, list[list[int]]] = {}
    with _seeing_masks(pack):
        for pieces in pack.shards.in_turns(parts, at_once, blend):
            if not written:
                _try_cache(pack, pieces)
            written |= _write_together(pack, pieces, set(lanes), prompts, over)
    return [written[lane] for lane in lanes]


def _lanes_at_once(pack: Pack, parts: Sequence[slice], tokens: int, blend: Blend | None) -> int:
    """As many lanes of so many tokens as a pass may hold, as for judging (`pack.py`)."""
    most, trained = max(part.stop - part.start for part in parts), pack.shards.all[0].tokens_per_pass
    held = trained and trained * SCORED_TOKENS
    return variants_per_pass(most, tokens, held, even=pack.lanes == "fixed" and blend is None)


def _write_together(
    pack: Pack, pieces: Sequence[slice], heard: set[int], prompts: Sequence[Ids], over: Over
) -> dict[int, list[list[int]]]:
    """What the lanes that each live shard shows write to every prompt. Those not `heard` only keep the shape of a pack."""
    shown = [lane for piece in pieces for lane in range(piece.start, piece.stop)]
    lines = [_begun(prompts, piece.stop - piece.start, pack.engine.device) for piece in pieces]
    written: dict[int, list[list[int]]] = {lane: [[] for _ in prompts] for lane in shown}
    ended = {lane: [lane not in heard] * len(prompts) for lane in shown}
    while _somebody_writes(pack, ended):
        next_N = torch.cat(pack.shards.each(_next_tokens, lines))
        for place, token in enumerate(next_N.tolist()):
            row, prompt = divmod(place, len(prompts))
            lane = shown[row]
            if not ended[lane][prompt]:
                written[lane][prompt].append(token)
                ended[lane][prompt] = over(prompt, written[lane][prompt])
    return written


def _begun(prompts: Sequence[Ids], lanes: int, device: torch.device) -> _Lines:
    """The prompts, flush right, once for each lane."""
    longest = max(map(len, prompts))
    ids_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids_PT[place, longest - len(prompt) :] = torch.tensor(list(prompt))
    filling_P = torch.tensor([longest - len(prompt) for prompt in prompts])
    return _Lines(Past(filling_P.repeat(lanes).to(device)), ids_PT.repeat(lanes, 1).to(device))


def _next_tokens(shard: Shard, lines: _Lines) -> Tensor:
    """The token [N] that each row goes on with, on the CPU; it stands next."""
    hidden_ND = _last_hidden(shard, lines)
    with torch.no_grad(), shard.engine.gather(shard.head.parameters):
        next_N = shard.head.logits(hidden_ND).argmax(-1)
    lines.ids_NT = next_N[:, None]
    shard.progress()  # a long answer is no silence
    return next_N.cpu()


@torch.no_grad()
def _last_hidden(shard: Shard, lines: _Lines) -> Tensor:
    """Hidden states [N, D] of the last of the tokens that stand next."""
    count = lines.ids_NT.shape[1]
    batch = MicroBatch(lines.ids_NT, lines.past.positions(count), _nothing_labelled(lines.ids_NT.device))
    hidden_ND = shard.hidden(batch, lines.past)
    return hidden_ND.view(-1, count, hidden_ND.shape[-1])[:, -1]


def _nothing_labelled(device: torch.device) -> Labelled:
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    return Labelled(nothing, nothing, nothing, ())


def _somebody_writes(pack: Pack, ended: Mapping[int, Sequence[bool]]) -> bool:
    """Whether any text of any worker has not ended."""
    writing = sum(not each for of_lane in ended.values() for each in of_lane)
    if pack.engine.world == 1:
        return writing > 0
    everywhere = torch.tensor([float(writing)], device=pack.engine.device)
    pack.engine.reduce(everywhere)
    return bool(everywhere.item() > 0)


def _try_cache(pack: Pack, parts: Sequence[slice]) -> None:
    """Compute a short row in two pieces and at once. Raises ModelError where that is not the same but for rounding."""
    words = pack.shards.all[0].head.linear.out_features
    row = torch.randint(words, (2 * TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()

    def apart(shard: Shard, lanes: int) -> float:
        whole = _last_hidden(shard, _begun([row], lanes, shard.engine.device))
        lines = _begun([row[:TOKENS]], lanes, shard.engine.device)
        _last_hidden(shard, lines)
        lines.ids_NT = _begun([row[TOKENS:]], lanes, shard.engine.device).ids_NT
        pieces = _last_hidden(shard, lines)
        norm = max(whole.double().norm().item(), torch.finfo(torch.float64).tiny)
        return (pieces - whole).double().norm().item() / norm / MOVED[whole.dtype]

    far = max(pack.shards.each(apart, [part.stop - part.start for part in parts]))
    if not far <= 1.0:
        model: Any = pack.shards.all[0].trunk.model
        kind = model.config.model_type
        raise ModelError(
            f"{kind} does not go on from its cache as it reads a whole row: what it writes would be wrong",
            "ask this base by likelihood: leave `by: generation` out",
        )


@contextmanager
def _seeing_masks(pack: Pack) -> Iterator[None]:
    """A kernel that is told documents by their bounds cannot be told what was seen before: another one stands in for it. And
    what is compiled for fixed shapes is run as it was written: every token sees one more."""
    with ExitStack() as after:
        if "torch._dynamo" in sys.modules:
            after.enter_context(torch.compiler.set_stance("force_eager"))
        for shard in pack.shards.all:
            model: Any = shard.trunk.model
            config = model.config
            if config._attn_implementation == KERNEL:
                config._attn_implementation = "sdpa"
                after.callback(setattr, config, "_attn_implementation", KERNEL)
        yield
