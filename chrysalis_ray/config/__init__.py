"""Floor 1: what people write. pydantic and YAML; no torch, no Ray."""
