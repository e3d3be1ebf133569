"""What a base model's `config.json` says about sizes, enough to count parameters, FLOPs and bytes. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import Base, EmbeddedBase, PretrainedBase
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.training.planning.decoders import DECODERS, LLAMA, SYNONYMS, UNSAID, Decoder, size_of


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
    family: str = "qwen3"  # the model_type of its config.json
    window: int = 0  # how far a layer looks back, 0 where nothing limits it

    @property
    def longest_row(self) -> int | None:
        """Tokens that a row may have: those that every layer looks back on, and for which there are positions."""
        return min((room for room in (self.window, self.positions) if room > 1), default=None)

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
        """What the config.json of a model of the table below says of its sizes."""
        return {
            "architectures": [ARCHITECTURES[self.family]], "model_type": self.family, "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size, "intermediate_size": self.intermediate, "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied, "max_position_embeddings": self.positions, "sliding_window": self.window or None,
        }  # fmt: skip

    def lora_parameters(
        self, rank: int, targets: Sequence[str], layers: Iterable[int] | None = None, patterns: Patterns = PLAIN
    ) -> int:
        """Parameters of one adapter: rank x (in + out) for every target module of every layer, or of these."""
        meant = {name: sum(sides) for name, sides in self.linears().items() if any(_means(t, name) for t in targets)}
        if not patterns.ranks:
            return (self.layers if layers is None else len(set(layers))) * rank * sum(meant.values())
        return sum(
            _rank_in(layer, name, rank, patterns.ranks) * sides
            for layer in (range(self.layers) if layers is None else set(layers))
            for name, sides in meant.items()
        )

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


def _rank_in(layer: int, linear: str, rank: int, pattern: Mapping[str, int]) -> int:
    """The rank that an adapter of `rank` has in a linear module of a layer."""
    meant = [key for key in pattern if _reaches(key, layer, linear)]
    return pattern[max(meant, key=len)] if meant else rank


def _reaches(key: str, layer: int, linear: str) -> bool:
    """Whether a key such as "q_proj" or "layers.0.self_attn.q_proj" means this linear module of this layer."""
    parts = key.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return _means(key, linear)
    return int(parts[numbers[0]]) == layer and _means(".".join(parts[numbers[-1] + 1 :]), linear)


def _means(target: str, linear: str) -> bool:
    """Whether a target such as "q_proj" or "self_attn.q_proj" means this linear module of a layer."""
    return target == linear or target.endswith(f".{linear}") or linear.endswith(f".{target}")


# family: its class in transformers
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip

# From each model's config.json on the Hugging Face hub; those of Llama 3 from torchtune's model builders, since their
# repositories are not open. Tables: hidden, layers, heads, key-value heads, head size, intermediate, vocabulary, positions,
# window, tied.
_TABLE: dict[str, tuple[str, tuple[int, int, int, int, int, int, int, int, int, bool]]] = {
    "Qwen/Qwen3-0.6B": ("qwen3", (1024, 28, 16, 8, 128, 3072, 151_936, 40_960, 0, True)),
    "Qwen/Qwen3-1.7B": ("qwen3", (2048, 28, 16, 8, 128, 6144, 151_936, 40_960, 0, True)),
    "Qwen/Qwen3-4B": ("qwen3", (2560, 36, 32, 8, 128, 9728, 151_936, 40_960, 0, True)),
    "Qwen/Qwen3-8B": ("qwen3", (4096, 36, 32, 8, 128, 12288, 151_936, 40_960, 0, False)),
    "Qwen/Qwen3-14B": ("qwen3", (5120, 40, 40, 8, 128, 17408, 151_936, 40_960, 0, False)),
    "Qwen/Qwen3-32B": ("qwen3", (5120, 64, 64, 8, 128, 25600, 151_936, 40_960, 0, False)),
    "meta-llama/Llama-3.2-1B": ("llama", (2048, 16, 32, 8, 64, 8192, 128_256, 131_072, 0, True)),
    "meta-llama/Llama-3.2-3B": ("llama", (3072, 28, 24, 8, 128, 8192, 128_256, 131_072, 0, True)),
    "meta-llama/Llama-3.1-8B": ("llama", (4096, 32, 32, 8, 128, 14336, 128_256, 131_072, 0, False)),
    "google/gemma-2-2b": ("gemma2", (2304, 26, 8, 4, 256, 9216, 256_000, 8192, 4096, True)),
    "google/gemma-2-9b": ("gemma2", (3584, 42, 16, 8, 256, 14336, 256_000, 8192, 4096, True)),
    "google/gemma-3-270m": ("gemma3_text", (640, 18, 4, 1, 256, 2048, 262_144, 32_768, 512, True)),
    "google/gemma-3-1b-pt": ("gemma3_text", (1152, 26, 4, 1, 256, 6912, 262_144, 32_768, 512, True)),
    "mistralai/Mistral-7B-v0.3": ("mistral", (4096, 32, 32, 8, 128, 14336, 32_768, 32_768, 0, False)),
    "HuggingFaceTB/SmolLM2-135M": ("llama", (576, 30, 9, 3, 64, 1536, 49_152, 8192, 0, True)),
    "HuggingFaceTB/SmolLM2-360M": ("llama", (960, 32, 15, 5, 64, 2560, 49_152, 8192, 0, True)),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", (2048, 24, 32, 32, 64, 8192, 49_152, 8192, 0, True)),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", (2048, 36, 16, 4, 128, 11008, 128_256, 65_536, 0, True)),
}


def _known(name: str, family: str, sizes: tuple[int, int, int, int, int, int, int, int, int, bool]) -> ModelShape:
    hidden, layers, heads, key_value_heads, head_size, intermediate, vocabulary, positions, window, tied = sizes
    return ModelShape(
        name, hidden, layers, heads, key_value_heads, head_size, intermediate, vocabulary, tied,
        decoder=DECODERS.get(family, LLAMA), positions=positions, family=family, window=window,
    )  # fmt: skip


KNOWN: dict[str, ModelShape] = {name: _known(name, *entry) for name, entry in _TABLE.items()}
_VARIETIES = ("-Base", "-Instruct", "-it", "-pt")  # of equal sizes


def known_shape(model: str) -> ModelShape | None:
    """The shape of a hub model of the table, or of its base or instruct sibling."""
    for name in (model, *(model.removesuffix(end) for end in _VARIETIES)):
        for end in ("", *_VARIETIES):
            if name + end in KNOWN:
                return KNOWN[name + end]
    return None


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
    return known_shape(base.model)


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
        family=kind if isinstance(kind, str) else "",
        window=_window(content, path),
    )


def layers_of(content: dict[str, Any], path: Path) -> int:
    """The number of decoder layers in a config.json. Raises ModelError where it gives none."""
    return _size(content, "num_hidden_layers", path)


def _window(content: dict[str, Any], path: Path) -> int:
    if content.get("use_sliding_window") is False or not content.get("sliding_window"):
        return 0
    return _size(content, "sliding_window", path)


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
