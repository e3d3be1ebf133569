"""Write `peft_folders/`: adapters of the same two-layer Qwen3 as several versions of peft save them.

    for version in 0.17.1 0.18.1 0.19.0 0.20.0 0.21.0; do
        pip install --no-deps --target /tmp/peft_$version peft==$version
        HF_HUB_OFFLINE=1 PYTHONPATH=/tmp/peft_$version python tests/merge/write_peft_folders.py tests/merge/peft_folders
    done

peft 0.17 needs transformers below 5. `configs.json` holds every adapter_config.json: that of the plain adapter, and of the
others what differs from it. Weights are kept once for each kind, and of what is read the deltas that peft itself computes, as
long as every version writes the same bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

READ = ("plain", "rslora", "patterns", "regex")
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    "regex": {"target_modules": r".*\.0\.self_attn\.(q|v)_proj"},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "tokens": {"trainable_token_indices": [1, 2]},
}


def base():
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
                         num_key_value_heads=1, vocab_size=16, max_position_embeddings=32, attention_bias=True)  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.config._name_or_path = model.name_or_path = "org/base"
    return model


def adapter(kind: str):
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **KINDS[kind]}
    torch.manual_seed(1)
    return peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "configs.json"
    configs = json.loads(path.read_text()) if path.exists() else {}
    own = configs[peft.__version__] = {}
    for kind in KINDS:
        model = adapter(kind)
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            config = json.loads((Path(scratch) / "adapter_config.json").read_text())
            weights = (Path(scratch) / "adapter_model.safetensors").read_bytes()
        for key in ("target_modules", "exclude_modules"):  # peft writes sets in any order
            config[key] = sorted(config[key]) if isinstance(config.get(key), list) else config.get(key)
        own[kind] = config if kind == "plain" else {k: v for k, v in config.items() if v != own["plain"].get(k)}
        kept = folder / f"{kind}.safetensors"
        if kept.exists() and kept.read_bytes() != weights:
            kept = folder / f"{kind}-{peft.__version__}.safetensors"
        kept.write_bytes(weights)
        layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
        if kind in READ:
            save_file({n: m.get_delta_weight("default").detach().contiguous() for n, m in layers.items()},
                      folder / f"{kind}.deltas.safetensors")  # fmt: skip
    path.write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")
    print(peft.__version__, sorted(own))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
