"""The part of a causal language model below its output head, called the same way for every model.

Documents share a row. `position_ids` start again at 0 with each, and attention stays inside: the mask is built here and
always given (to FlashAttention the bounds of the documents, which say the same). transformers would build it too, but only
for batches in which it sees two documents in a row; which kernel runs for one variant would then depend on its neighbours'
data.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.flash import KERNEL, document_bounds
from chrysalis_ray.training.past import Past
from chrysalis_ray.training.quick import SHORT, SHORT_ROW, additive

WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")  # how far a layer looks back, by family


class Trunk(nn.Module):
    """ids and positions [N, T] -> hidden states [N, T, D] after the last norm. The head is held, not called."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        check_architecture(model.config)
        check_experts(model)
        self.model = model
        self.longest_row = longest_row(model)

    def forward(
        self,
        input_ids_NT: Tensor,
        position_ids_NT: Tensor,
        result: Literal["hidden", "logits"] = "hidden",
        past: Past | None = None,
    ) -> Tensor:
        """`result` "logits" gives the model's own logits [N, T, V] instead, to check the head against. With `past` the tokens
        go on where those that it has seen end, and it sees them."""
        check_length(self.model.config.model_type, self.longest_row, input_ids_NT.shape[1] + (past.length if past else 0))
        decoder = self.model.base_model
        assert isinstance(decoder, nn.Module)
        kernel, documents = self.model.config._attn_implementation, dict[str, Any]()
        if past is not None:
            mask = past.see(input_ids_NT.shape[1])
            documents = {"past_key_values": past.cache}
        elif kernel == KERNEL:
            mask, documents = None, document_bounds(position_ids_NT, self.model.config.num_attention_heads)
        else:
            mask = document_mask(position_ids_NT)
        if kernel == SHORT and mask is not None and mask.shape[-1] <= SHORT_ROW:
            mask = additive(mask, self.model.dtype)
        if kernel == "eager" and mask is not None:  # it adds its mask to the scores
            floor = torch.finfo(self.model.dtype).min
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, floor)
        called = decoder if result == "hidden" else self.model
        documents["use_cache"] = past is not None
        output = called(input_ids=input_ids_NT, position_ids=position_ids_NT, attention_mask=mask, **documents)
        return output.last_hidden_state if result == "hidden" else output.logits


def document_mask(position_ids_NT: Tensor) -> Tensor:
    """Who may look at whom, bool [N, 1, T, T]: earlier tokens of the same document, where documents count from 0 up."""
    jump_NT = position_ids_NT[:, 1:] != position_ids_NT[:, :-1] + 1
    document_NT = nn.functional.pad(jump_NT.cumsum(1), (1, 0))
    length = position_ids_NT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=position_ids_NT.device).tril()
    return ((document_NT[:, :, None] == document_NT[:, None, :]) & causal_TT)[:, None]


def check_architecture(config: PretrainedConfig) -> None:
    """Raise ModelError for layers that say of themselves that they are not attention."""
    odd = sorted({kind for kind in getattr(config, "layer_types", None) or () if "attention" not in kind or "linear" in kind})
    if odd:
        raise ModelError(
            f"{config.model_type} has {', '.join(odd)} layers, which carry a state across the documents of a row",
            "choose a base with attention layers only",
        )


def check_experts(model: nn.Module) -> None:
    """Raise ModelError for a mixture of experts: a stack of matrices [experts, in, out], or modules named so.

    Which tokens share an expert's product depends on all of them, and its bits on how many they are: whatever a neighbour's
    tokens are would show in a variant, and could tip a later routing.
    """
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    for name, parameter in model.named_parameters():
        stack = parameter.ndim == 3 and min(parameter.shape) > 1 and id(parameter) not in kernels
        if stack or (parameter.ndim == 2 and ".experts." in name):
            raise ModelError(
                f"{name} belongs to a mixture of experts, whose products mix the tokens of all variants: what a variant "
                "becomes would depend on its neighbours",
                "choose a dense base",
            )


def longest_row(model: PreTrainedModel) -> int | None:
    """The longest row that a model can take: its shortest window, or its table of positions; None if nothing limits it."""
    config = model.config
    rooms = [getattr(config, name, None) for name in WINDOWS]
    if not getattr(config, "use_sliding_window", True):
        rooms[0] = None
    known = getattr(config, "max_position_embeddings", None)
    tables = [
        m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()
    ]
    if known in tables or (known is not None and known + 2 in tables):  # OPT's table starts at position 2
        rooms.append(known)
    return min((room for room in rooms if room), default=None)


def check_length(kind: str, longest: int | None, length: int) -> None:
    """Raise ModelError where rows are longer than a sliding window, or than the table of positions, of the model."""
    if longest is not None and longest < length:
        raise ModelError(
            f"rows of {length} tokens are longer than the {longest} that {kind} attends to",
            f"set lanes.sequence_length to at most {longest}",
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations (arXiv 1604.06174).

    transformers would do it for layers in training mode only, where some turn on a dropout of their own. The layers stay in
    evaluation mode here. Raises ModelError for a model whose layers transformers does not mark.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{model.config.model_type} has no layers that can be recomputed", "set body.activation_checkpointing: false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
