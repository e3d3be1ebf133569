"""Comparing a population: metrics file, comparison, HTML page, W&B runs, model card, lineage, live table.

Everything here reads the files of a run directory and nothing else; neither torch nor Ray is needed to look at a run.
"""
