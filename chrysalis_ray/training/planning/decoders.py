"""Which parameters one decoder layer of each model family has, by the `model_type` of its config.json. No torch.

    D hidden   Q heads x head size   K key-value heads x head size   H head size   F intermediate   V vocabulary   P positions

A family that is not listed is taken for a Llama: gated, without biases, two norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_GATED = {
    "q_proj": "D:Q", "k_proj": "D:K", "v_proj": "D:K", "o_proj": "Q:D",
    "gate_proj": "D:F", "up_proj": "D:F", "down_proj": "F:D",
}  # fmt: skip
_TERM = re.compile(r"(\d*)([DQKHFVP])(D?)")


@dataclass(frozen=True)
class Decoder:
    """`linears`: in and out of every matrix of a layer, by the end of its name. `layer`: its norms and biases. `outside`:
    what the model has beside layers and token tables. `tied`: whether the head is, if the config does not say."""

    linears: Mapping[str, str] = field(default_factory=lambda: _GATED)
    layer: str = "2D"
    outside: str = "D"
    tied: bool = False

    @property
    def gated(self) -> bool:
        """Whether the network multiplies two projections: then it keeps more activations."""
        return sum(_count(shape.partition(":")[2], "F") for shape in self.linears.values()) > 1


def _count(text: str, letter: str) -> int:
    return sum(int(times or 1) for times, found, _ in _TERM.findall(text) if found == letter)


def size_of(text: str, sizes: Mapping[str, int]) -> int:
    """A sum such as "2D+Q+PD" in numbers; "PD" is P times D."""
    return sum(
        int(times or 1) * sizes[letter] * (sizes["D"] if per_width else 1) for times, letter, per_width in _TERM.findall(text)
    )


DECODERS: dict[str, Decoder] = {
    "qwen3": Decoder(layer="2D+2H"),
    "qwen2": Decoder(layer="2D+Q+2K"),
    "gemma": Decoder(tied=True),
    "gemma2": Decoder(layer="4D", tied=True),
    "gemma3_text": Decoder(layer="4D+2H", tied=True),
    "olmo2": Decoder(layer="2D+Q+K"),
    "smollm3": Decoder(tied=True),
    "cohere2": Decoder(layer="D", tied=True),
    "phi3": Decoder({"qkv_proj": "D:Q+2K", "o_proj": "Q:D", "gate_up_proj": "D:2F", "down_proj": "F:D"}),
    "phi": Decoder(
        {"q_proj": "D:Q", "k_proj": "D:K", "v_proj": "D:K", "dense": "Q:D", "fc1": "D:F", "fc2": "F:D"},
        layer="4D+Q+2K+F", outside="2D+V",
    ),
    "starcoder2": Decoder(
        {"q_proj": "D:Q", "k_proj": "D:K", "v_proj": "D:K", "o_proj": "Q:D", "c_fc": "D:F", "c_proj": "F:D"},
        layer="6D+Q+2K+F", outside="2D", tied=True,
    ),
    "gpt2": Decoder(
        {"attn.c_attn": "D:3Q", "attn.c_proj": "Q:D", "mlp.c_fc": "D:F", "mlp.c_proj": "F:D"},
        layer="6D+3Q+F", outside="2D+PD", tied=True,
    ),
    "gpt_neox": Decoder(
        {"query_key_value": "D:3Q", "dense": "Q:D", "dense_h_to_4h": "D:F", "dense_4h_to_h": "F:D"},
        layer="6D+3Q+F", outside="2D",
    ),
    "opt": Decoder(
        {"q_proj": "D:Q", "k_proj": "D:K", "v_proj": "D:K", "out_proj": "Q:D", "fc1": "D:F", "fc2": "F:D"},
        layer="6D+Q+2K+F", outside="4D+PD", tied=True,  # its table of positions has two more rows
    ),
}  # fmt: skip
LLAMA = Decoder()
UNSAID = Decoder(tied=True)  # a config.json that names no model_type

# What config.json calls the same size, by family.
SYNONYMS = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "d_ff"),
    "max_position_embeddings": ("n_positions",),
}
