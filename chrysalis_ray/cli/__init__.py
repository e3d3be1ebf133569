"""Floor 8: the command line. Each verb is one file; what a verb needs is imported inside it, so that help is instant."""
