"""Floor 0: errors, records, store, weave and the layout of a run directory. Standard library only."""
