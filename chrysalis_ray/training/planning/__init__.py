"""What an experiment will build, and what this machine can: the planner, its law, its measurement and its rules."""
