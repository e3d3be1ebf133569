"""FlashAttention 2 for rows of several documents (arXiv 2307.08691): when it may be used, and what it is told.

transformers finds the documents of a row by itself for a batch of one row only, so their bounds are always given: all rows end
to end, each document a sequence of its own.

Its backward pass adds up the gradient of the queries in as many parts as a GPU has multiprocessors left, which is by the number
of documents. Bits would then depend on the neighbours' documents. A few empty documents at the end make it one part, always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from chrysalis_ray.core.errors import ModelError

KERNEL = "flash_attention_2"  # its name in transformers
MULTIPROCESSORS = 160  # no GPU of today has more


def chosen_kernel(attention: str, precision: str, cuda: bool, installed: bool, supported: bool) -> str | None:
    """What to ask transformers for: KERNEL where `attention` is "flash", None (its own choice) where it is "sdpa".

    Raises ModelError where FlashAttention cannot be: without a GPU, the package or bf16, or for an architecture that has none.
    """
    if attention == "sdpa":
        return None
    lacks = {
        "there is no GPU": cuda,
        f"precision is {precision}, and it computes in bf16": precision == "bf16",
        "the package flash_attn is not installed": installed,
        "the architecture of the base does not know it": supported,
    }
    if missing := [reason for reason, fulfilled in lacks.items() if not fulfilled]:
        raise ModelError(f"attention is flash, but {'; '.join(missing)}", "set body.attention: sdpa")
    return KERNEL


def is_supported(config: PretrainedConfig) -> bool:
    """Whether transformers says so of the architecture."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and bool(
        getattr(MODEL_FOR_CAUSAL_LM_MAPPING[kind], "_supports_flash_attn", False)
    )


def document_bounds(position_ids_NT: Tensor, heads: int) -> dict[str, Any]:
    """The documents of all rows, as arguments of the model: a document begins where a position does not follow the one before,
    and with every row. Sums of the backward pass are deterministic."""
    rows, length = position_ids_NT.shape
    begins_NT = torch.ones_like(position_ids_NT, dtype=torch.bool)
    begins_NT[:, 1:] = position_ids_NT[:, 1:] != position_ids_NT[:, :-1] + 1
    begins = begins_NT.flatten().nonzero().squeeze(1)
    empty = max(1, -(-MULTIPROCESSORS // heads) + 1 - len(begins))  # the end of the last document, and empty ones
    bounds = torch.cat([begins, begins.new_full((empty,), rows * length)]).to(torch.int32)
    return {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length, "deterministic": True,
    }  # fmt: skip
