"""Scores on annotation files, by the public API only."""
