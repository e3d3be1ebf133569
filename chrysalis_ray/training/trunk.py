"""The part of a causal language model below its output head, called the same way for every model.

Documents share a row. `position_ids` start again at 0 with each, and attention stays inside: the mask is built here and
always given. transformers would build it too, but only for batches in which it sees two documents in a row; which kernel
runs for one variant would then depend on its neighbours' data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from chrysalis_ray.core.errors import ModelError

HEAD_ARITHMETIC = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Trunk(nn.Module):
    """ids and positions [N, T] -> hidden states [N, T, D] after the last norm. The head is held, not called."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        check_architecture(model.config)
        self.model = model

    def forward(self, input_ids_NT: Tensor, position_ids_NT: Tensor) -> Tensor:
        check_window(self.model.config, input_ids_NT.shape[1])
        decoder = self.model.base_model
        assert isinstance(decoder, nn.Module)
        output = decoder(
            input_ids=input_ids_NT,
            position_ids=position_ids_NT,
            attention_mask=document_mask(position_ids_NT),
            use_cache=False,
        )
        return output.last_hidden_state


def document_mask(position_ids_NT: Tensor) -> Tensor:
    """Who may look at whom, bool [N, 1, T, T]: earlier tokens of the same document, where documents count from 0 up."""
    jump_NT = position_ids_NT[:, 1:] != position_ids_NT[:, :-1] + 1
    document_NT = nn.functional.pad(jump_NT.cumsum(1), (1, 0))
    length = position_ids_NT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=position_ids_NT.device).tril()
    return ((document_NT[:, :, None] == document_NT[:, None, :]) & causal_TT)[:, None]


def check_architecture(config: PretrainedConfig) -> None:
    """Refuse, with ModelError, models whose documents would leak into each other or whose head is more than a matrix."""
    odd = sorted({kind for kind in getattr(config, "layer_types", None) or () if "attention" not in kind or "linear" in kind})
    if odd:
        raise ModelError(
            f"{config.model_type} has {', '.join(odd)} layers, which carry a state across the documents of a row",
            "choose a base with attention layers only",
        )
    for name in HEAD_ARITHMETIC:
        value = getattr(config, name, None)
        if value not in (None, 1.0):
            raise ModelError(
                f"{config.model_type} has {name} = {value}, which the frozen head does not apply", "choose another base"
            )


def check_window(config: PretrainedConfig, length: int) -> None:
    """Raise ModelError where a sliding window would be shorter than the sequences."""
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < length:
        raise ModelError(
            f"rows of {length} tokens are longer than the {window} that {config.model_type} attends to",
            f"set lanes.sequence_length to at most {window}",
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations (arXiv 1604.06174).

    Only the layers themselves are told that they train; what is inside them, dropout above all, stays in evaluation mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
