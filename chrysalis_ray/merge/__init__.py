"""Floor 2: merges of low-rank deltas, exact in delta space; no base model, no dense delta."""
