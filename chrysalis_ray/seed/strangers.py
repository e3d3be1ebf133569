"""Tensors of an adapter's file that are no LoRA factor of a linear module, and what to do about each kind."""

from __future__ import annotations

from pathlib import Path

from chrysalis_ray.core.errors import MergeError


def no_factor(folder: Path, name: str) -> MergeError:
    """Why the tensor `name` cannot be part of a low-rank delta."""
    if name.endswith((".base_layer.weight", ".base_layer.bias")):
        return MergeError(
            f"{folder}: tensor {name!r} is a copy of the base's own weights, which peft adds for heads and embeddings",
            "if no words were added to the vocabulary, save it again with save_pretrained(..., save_embedding_layers=False)",
        )
    if ".lora_embedding_" in name:
        return MergeError(
            f"{folder}: tensor {name!r} is no LoRA factor of a linear module: it adapts an embedding, which looks words up",
            "train a plain LoRA on linear modules; a head that shares the embedding's weights can have one of its own",
        )
    return MergeError(f"{folder}: tensor {name!r} is no LoRA factor of a linear module", "train a plain LoRA on linear modules")
