"""The step is pure; the loop owns side effects."""
