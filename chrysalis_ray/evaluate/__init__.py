"""Floor 4: held-out loss and the verdict."""
