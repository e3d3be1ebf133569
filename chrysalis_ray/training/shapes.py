"""What a base model's `config.json` says about sizes, enough to count parameters, FLOPs and bytes. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import Base, EmbeddedBase, PretrainedBase
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.decoders import DECODERS, LLAMA, SYNONYMS, UNSAID, Decoder, size_of


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, and which matrices and vectors its layers have."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    decoder: Decoder = DECODERS["qwen3"]
    positions: int = 0
    biases: str = ""  # of layers whose config.json turns them on

    @property
    def _sizes(self) -> dict[str, int]:
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        return {"D": self.hidden, "Q": queries, "K": keys, "H": self.head_size, "F": self.intermediate,
                "V": self.vocabulary, "P": self.positions}  # fmt: skip

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear modules of one layer."""
        sizes = self._sizes
        sides = {name: shape.partition(":") for name, shape in self.decoder.linears.items()}
        return {name: (size_of(inner, sizes), size_of(outer, sizes)) for name, (inner, _, outer) in sides.items()}

    @property
    def layer_parameters(self) -> int:
        matrices = sum(inner * outer for inner, outer in self.linears().values())
        return matrices + size_of(f"{self.decoder.layer}+{self.biases}", self._sizes)

    @property
    def embedding_parameters(self) -> int:
        """One table; a tied model uses it as its head too."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        tables = 1 if self.tied else 2
        return (
            self.layers * self.layer_parameters
            + tables * self.embedding_parameters
            + size_of(self.decoder.outside, self._sizes)
        )

    def to_config(self) -> dict[str, Any]:
        """What a Qwen3's config.json says of these sizes: the models of the table below are all Qwen3."""
        return {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size, "intermediate_size": self.intermediate, "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied, "max_position_embeddings": self.positions or 40_960,
        }  # fmt: skip

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of one adapter: rank x (in + out) for every target module of every layer."""
        meant = [sides for name, sides in self.linears().items() if any(_means(target, name) for target in targets)]
        return self.layers * rank * sum(inner + outer for inner, outer in meant)

    def training_flops(self, lora_parameters: int, sequence_length: int) -> float:
        """FLOPs per token, forward and backward, of LoRA training over a frozen base.

        Frozen matrices cost 2 forward and 2 for the gradient of their input (their own gradient is never formed), adapters
        2 + 4, causal attention half of 2 x 2 x T x width forward and twice that backward.
        """
        frozen = self.layers * self.layer_parameters + self.embedding_parameters
        attention = 6.0 * sequence_length * self.layers * self.heads * self.head_size
        return 4.0 * frozen + 6.0 * lora_parameters + attention

    def forward_flops(self, sequence_length: int) -> float:
        """FLOPs per token of one forward pass."""
        frozen = self.layers * self.layer_parameters + self.embedding_parameters
        return 2.0 * frozen + 2.0 * sequence_length * self.layers * self.heads * self.head_size

    @property
    def saved_elements(self) -> int:
        """Activations per token that one layer keeps for backward: norms, queries, keys, values, attention, network.

        Gives 64 KiB per token and layer for Qwen3-0.6B in bf16; 60.4 were counted from autograd's saved tensors.
        """
        attention = 3 * (self.heads + 2 * self.key_value_heads) * self.head_size
        return 8 * self.hidden + attention + (4 if self.decoder.gated else 3) * self.intermediate


def _means(target: str, linear: str) -> bool:
    """Whether a target such as "q_proj" or "self_attn.q_proj" means this linear module of a layer."""
    return target == linear or target.endswith(f".{linear}") or linear.endswith(f".{target}")


def _qwen3(name: str, hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> ModelShape:
    return ModelShape(name, hidden, layers, heads, 8, 128, intermediate, 151_936, tied)


# From each model's config.json on the Hugging Face hub. All have 8 key-value heads of 128 and 151,936 tokens.
KNOWN: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _qwen3("Qwen/Qwen3-0.6B", 1024, 28, 16, 3072, True),
        _qwen3("Qwen/Qwen3-1.7B", 2048, 28, 16, 6144, True),
        _qwen3("Qwen/Qwen3-4B", 2560, 36, 32, 9728, True),
        _qwen3("Qwen/Qwen3-8B", 4096, 36, 32, 12288, False),
        _qwen3("Qwen/Qwen3-14B", 5120, 40, 40, 17408, False),
        _qwen3("Qwen/Qwen3-32B", 5120, 64, 64, 25600, False),
    )
}


def shape_of(base: Base) -> ModelShape | None:
    """The shape of `base`: from the YAML, a local config.json, the hub cache of this machine, or the table above.

    None for a hub id that none of them knows. Raises ModelError if a config.json is there but cannot be used.
    """
    if isinstance(base, EmbeddedBase):
        return ModelShape(
            "embedded", base.hidden_size, base.layers, base.heads, base.key_value_heads, base.head_size, base.intermediate_size,
            base.vocabulary, tied=True,
        )  # fmt: skip
    config = config_of(base)
    if config is not None:
        return read_shape(config, base.model)
    return KNOWN.get(base.model) or KNOWN.get(base.model.removesuffix("-Base"))


def config_of(base: PretrainedBase) -> Path | None:
    """The config.json of `base` on this machine: in its folder, or the newest of the hub's cache."""
    local = Path(base.model) / "config.json"
    if local.is_file():
        return local
    return next(iter(_cached_configs(base.model)), None)


def read_shape(path: Path, name: str) -> ModelShape:
    """Shape from a Hugging Face config.json. Raises ModelError with the name of the first field that is missing or wrong."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ModelError(f"{path} is larger than 1 MiB", "a Hugging Face config.json was meant")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "give the folder of a Hugging Face model") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no mapping", "give the folder of a Hugging Face model")
    content = content["text_config"] if isinstance(content.get("text_config"), dict) else content
    kind = content.get("model_type")
    decoder = DECODERS.get(kind, LLAMA) if isinstance(kind, str) else UNSAID
    heads = _size(content, "num_attention_heads", path)
    hidden = _size(content, "hidden_size", path)
    biases = {"attention_bias": "Q+2K+D", "mlp_bias": "2F+D"} if decoder.gated else {}  # others have them or not for good
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers_of(content, path),
        heads=heads,
        key_value_heads=_size(content, "num_key_value_heads", path, heads),
        head_size=_size(content, "head_dim", path, max(hidden // heads, 1)),
        intermediate=_size(content, "intermediate_size", path, 4 * hidden if kind == "gpt2" else None),
        vocabulary=_size(content, "vocab_size", path),
        tied=content.get("tie_word_embeddings", decoder.tied) is not False,
        decoder=decoder,
        positions=_size(content, "max_position_embeddings", path, 1),
        biases="+".join(vectors for key, vectors in biases.items() if content.get(key) is True),
    )


def layers_of(content: dict[str, Any], path: Path) -> int:
    """The number of decoder layers in a config.json. Raises ModelError where it gives none."""
    return _size(content, "num_hidden_layers", path)


def _size(content: dict[str, Any], key: str, path: Path, otherwise: int | None = None) -> int:
    given = [content[name] for name in (key, *SYNONYMS.get(key, ())) if content.get(name) is not None]
    if not given and otherwise is not None:
        return otherwise
    value = given[0] if given else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"{path}: {key} is {value!r}, a positive whole number was meant", "give a causal language model's folder"
        )
    return value


def _cached_configs(model: str) -> list[Path]:
    """config.json files that the Hugging Face hub client has downloaded before, newest first."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{model.replace('/', '--')}" / "snapshots"
    return sorted(cache.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True) if cache.is_dir() else []
