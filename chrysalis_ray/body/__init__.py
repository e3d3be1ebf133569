"""Floor 5: all of Ray Train and core Ray. A body is a worker group that holds the frozen base once and hosts many slots."""
