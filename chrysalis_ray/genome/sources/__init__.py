"""Where documents come from: one file each kind of source, and what is kept to see that a source has not changed."""
