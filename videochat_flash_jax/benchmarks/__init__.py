"""How fast the parts are, beside a peer and beside what the machine can do in the same minute.

Each of `merge`, `vit` and `decode` has a `run(repeats, ...)` that returns a report for JSON; its
defaults are the sizes of the released models. `floors.py` says what the limits are.
"""
