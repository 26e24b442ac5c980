"""Benchmarks: the speed of parts, compared with a peer and with the limits of the machine.

Peer and limits are measured at the same time as our code. `merge`, `vit` and `decode` have a
`run(repeats, ...)` that returns a report for JSON; the default sizes are those of the released
models. `floors.py` explains the limits.
"""
