"""Scores on annotation files."""
