"""Torch and DeepSpeed, no Ray: many LoRA variants over one frozen base."""
