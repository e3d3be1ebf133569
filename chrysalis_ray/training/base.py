from __future__ import annotations
from pathlib import Path
import torch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
def load_base(folder: Path, precision: str):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True, trust_remote_code=False)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()
