"""Floor 2: adapters on disk (the one door to peft), adapter zero, and the seed of a variant as bytes."""
