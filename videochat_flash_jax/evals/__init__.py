"""Evaluation: how well a model answers the questions of an annotation file (`exact_match`)."""
