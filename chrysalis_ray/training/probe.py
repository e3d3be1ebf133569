"""A few tokens through a base before anything is trained on it, for what no config says.

Variants share a batch and documents share a row. That is sound only if

    a document's hidden states do not change when everything around it does     (bit for bit: the shapes are the same)
    nor with the place in the row at which it stands                            (but for rounding)
    the logits are those of the output matrix, its scale and its cap            (but for rounding)
    every target is given activations row by row                                (variants own consecutive rows)

State-space, recurrent and convolution layers fail the first, positions that the model counts itself the second, heads with
layers of their own the third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.bank import Window
from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.heads import Head
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.trunk import longest_row

DOCUMENTS = (4, 12, 32)  # tokens of the documents of a probe's row; the second one is looked at
# Rounding that moving a document may cost, as a share of its hidden states' norm: several times what two attention kernels
# differ by (2 % in bf16, for 28 layers and for 64). Eager attention rounds to fp32 in fp64 too.
MOVED = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}
REMEDY = "choose a dense base with attention layers only, such as Qwen3, Llama, Mistral, Gemma, Phi or GPT-2"


@torch.no_grad()
def probe(trunk: nn.Module, model: PreTrainedModel, head: Head, window: Window, engine: Engine) -> None:
    """Check that documents and variants can share a batch. `trunk` is `model` as prepared, its adapters still zero.

    Raises ModelError with the reason.
    """
    kind, (before, looked_at, after) = model.config.model_type, _lengths(model)
    positions_T = torch.cat([torch.arange(length) for length in (before, looked_at, after)])
    moved_T = torch.cat([torch.arange(length) for length in (after, looked_at, before)])
    positions_NT = torch.stack([positions_T, moved_T]).to(engine.device)
    first_NT, second_NT = _tokens(model, before, looked_at, after, engine.device)
    here, there = slice(before, before + looked_at), slice(after, after + looked_at)

    window.show(slice(0, 1))
    try:
        with _watched(model, (len(first_NT), first_NT.shape[1])), _one_thread(engine.device):
            hidden_NTD = _run(kind, lambda: trunk(first_NT, positions_NT))
            changed_NTD = _run(kind, lambda: trunk(second_NT, positions_NT))
            own_NTV, seen = _own_logits(trunk, model, kind, first_NT, positions_NT)
    finally:
        window.show(slice(0, window.bank.slots))

    if not torch.isfinite(hidden_NTD).all():
        raise ModelError(f"{kind} gives hidden states that are not finite", "copy the base again, or try precision fp32")
    leak = (hidden_NTD[0, here] - changed_NTD[0, here]).abs().max().item()
    if leak != 0.0:
        raise ModelError(
            f"in {kind} what stands around a document changes its hidden states (by up to {leak:.2g}): layers carry a state "
            "across the documents of a row, or do not heed the attention mask",
            REMEDY,
        )
    shift = _distance(hidden_NTD[1, there], hidden_NTD[0, here])
    if not shift <= MOVED[hidden_NTD.dtype]:
        raise ModelError(
            f"in {kind} the hidden states of a document change by {shift:.1%} when it stands elsewhere in its row: "
            "position_ids are not heeded",
            REMEDY,
        )
    with engine.gather(head.parameters):
        logits_KV = head.logits((hidden_NTD if seen is None else seen).flatten(0, 1))
    other = _largest(logits_KV - own_NTV.flatten(0, 1)) / _largest(own_NTV)
    if not other <= 8 * torch.finfo(own_NTV.dtype).eps:
        raise ModelError(
            f"the logits of {kind} differ by {other:.2g} of the largest from those of its output matrix: its head is more "
            "than a matrix, a scale and a soft cap",
            REMEDY,
        )


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread in every operation: bits of several passes are compared, and how an operation is split over threads
    need not be the same in all of them."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _own_logits(
    trunk: nn.Module, model: PreTrainedModel, kind: str, ids_NT: Tensor, positions_NT: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The model's own logits [N, T, V], and the very hidden states [N, T, D] they were made of, where they can be seen.

    Those of another pass need not be the same bits: a product split over threads may be split otherwise the next time. They
    cannot be seen where a model calls a part of its decoder instead of the decoder (OPT).
    """
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    try:
        logits_NTV = _run(kind, lambda: trunk(ids_NT, positions_NT, "logits"))
    finally:
        handle.remove()
    return logits_NTV, seen[-1] if seen else None


def _lengths(model: PreTrainedModel) -> tuple[int, int, int]:
    room = longest_row(model)
    before, looked_at, after = DOCUMENTS
    return (before, looked_at, after) if room is None else (before, looked_at, max(1, min(after, room - before - looked_at)))


def _tokens(model: PreTrainedModel, before: int, looked_at: int, after: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two batches of two rows. One document stands in both rows of the first and in one of the second; all else differs."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randint(embedding.num_embeddings, (count,), generator=generator)

    document = draw(looked_at)
    first = torch.stack([torch.cat([draw(before), document, draw(after)]), torch.cat([draw(after), document, draw(before)])])
    length = before + looked_at + after
    second = torch.stack([torch.cat([draw(before), document, draw(after)]), draw(length)])
    return first.to(device), second.to(device)


def _run(kind: str, forward: Callable[[], Tensor]) -> Tensor:
    try:
        return forward()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ModelError(f"{kind} cannot be run on rows of several documents: {error}", REMEDY) from error


@contextmanager
def _watched(model: nn.Module, rows: tuple[int, int]) -> Iterator[None]:
    """Refuse targets whose input does not run through the rows one after the other: which part is whose could not be told."""

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].shape[0] not in (rows[0], rows[0] * rows[1]):
            assert isinstance(module, PackedLinear)
            raise ModelError(
                f"{module.name} is given activations of shape {list(arguments[0].shape)}, not row by row",
                "leave it out of lora.targets",
            )

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, PackedLinear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(left: Tensor, right: Tensor) -> float:
    return ((left - right).double().norm() / right.double().norm()).item()


def _largest(values: Tensor) -> float:
    return values.abs().max().item()
