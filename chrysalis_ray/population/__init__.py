"""Floor 6: all of Ray Tune. Branching, virtual trials, schedulers, the tune run."""
