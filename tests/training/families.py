"""Tiny real models of many families, saved as ordinary model folders: two layers, hidden 48, vocabulary 512, random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

WORDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ROOM = {"max_position_embeddings": 256}
LLAMA = {
    **WORDS, **ROOM, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
UNGROUPED = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT = {**WORDS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0,
       "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, and the linear modules that carry its adapters."""

    config: Callable[[], PretrainedConfig]
    targets: tuple[str, ...] = GATED
    exact: bool = True  # False: attention rounds to fp32 whatever the precision, as transformers' eager kernels do


def _make(kind: str, base: dict[str, Any] = LLAMA, **changes: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, kind)(**{**base, **changes})


SUPPORTED = {
    "qwen3": Family(_make("Qwen3Config", head_dim=16, tie_word_embeddings=True)),
    "qwen2": Family(_make("Qwen2Config")),
    "llama": Family(_make("LlamaConfig")),
    "mistral": Family(_make("MistralConfig", sliding_window=128)),
    "ministral": Family(_make("MinistralConfig", head_dim=16, sliding_window=128)),
    "ministral3": Family(_make("Ministral3Config", head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                               "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16})),
    "gemma": Family(_make("GemmaConfig", head_dim=16)),
    "gemma2": Family(_make("Gemma2Config", head_dim=16, sliding_window=128, query_pre_attn_scalar=16,
                           attn_logit_softcapping=2.0, final_logit_softcapping=3.0), exact=False),
    "gemma3": Family(_make("Gemma3TextConfig", head_dim=16, sliding_window=128, query_pre_attn_scalar=16,
                           layer_types=["sliding_attention", "full_attention"])),
    "gemma3-capped": Family(_make("Gemma3TextConfig", head_dim=16, sliding_window=128, query_pre_attn_scalar=16,
                                  final_logit_softcapping=3.0)),
    "phi": Family(_make("PhiConfig"), ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "phi3": Family(_make("Phi3Config"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "smollm3": Family(_make("SmolLM3Config", no_rope_layers=[1, 0])),
    "olmo2": Family(_make("Olmo2Config")),
    "granite": Family(_make("GraniteConfig", logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5,
                            attention_multiplier=0.2)),
    "cohere2": Family(_make("Cohere2Config", sliding_window=128, logit_scale=0.25)),
    "gpt2": Family(_make("GPT2Config", GPT), ("c_attn", "c_proj", "c_fc")),
    "gpt_neox": Family(_make("GPTNeoXConfig", UNGROUPED, rotary_pct=0.5),
                       ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "opt": Family(_make("OPTConfig", {**WORDS, **ROOM}, hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                        word_embed_proj_dim=48), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "starcoder2": Family(_make("Starcoder2Config"), ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")),
}  # fmt: skip

SEQUENCE = {
    **WORDS, **ROOM, "d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "is_decoder": True, "is_encoder_decoder": False,
    "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# family -> how to make it, a target, and what the refusal must say
REFUSED = {
    "mamba": (_make("MambaConfig", WORDS, hidden_size=48, num_hidden_layers=2, state_size=8), "in_proj", "linear_attention"),
    "jamba": (_make("JambaConfig", num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
                    mamba_d_state=8, mamba_dt_rank=4), "q_proj", "linear_attention"),
    "lfm2": (_make("Lfm2Config", layer_types=["conv", "full_attention"]), "q_proj", "has conv layers"),
    "qwen3_next": (_make("Qwen3NextConfig", **EXPERTS, head_dim=16, num_experts=4, shared_expert_intermediate_size=32,
                         linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                         layer_types=["linear_attention", "full_attention"]), "q_proj", "linear_attention"),
    "rwkv": (_make("RwkvConfig", {"vocab_size": 512}, hidden_size=48, num_hidden_layers=2, context_length=256), "key",
             "what stands around a document changes its hidden states"),
    "bart": (_make("BartConfig", SEQUENCE), "q_proj", "position_ids are not heeded"),
    "pegasus": (_make("PegasusConfig", SEQUENCE), "q_proj", "position_ids are not heeded"),
    "bloom": (_make("BloomConfig", WORDS, hidden_size=48, n_layer=2, n_head=4), "query_key_value",
              "bloom cannot be run on rows of several documents"),
    "mixtral": (_make("MixtralConfig", num_local_experts=4), "q_proj", "mixture of experts"),
    "qwen3_moe": (_make("Qwen3MoeConfig", **EXPERTS, head_dim=16, num_experts=4), "q_proj", "mixture of experts"),
    "granitemoe": (_make("GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2), "q_proj", "mixture of experts"),
    "modernbert-decoder": (_make("ModernBertDecoderConfig", UNGROUPED, local_attention=256), "Wi", "more than a matrix"),
}  # fmt: skip


def write_family(config: PretrainedConfig, folder: Path, tokenizer_from: Path) -> Path:
    """Random weights of a size at which norms, biases and caps matter, and the tokenizer of another folder."""
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder
