"""Upstream's layout of weights and configs, in and out."""
