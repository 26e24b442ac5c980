"""Reads and writes weights and configs on disk.

| part          | what it does                                                                   |
|---------------|--------------------------------------------------------------------------------|
| `hub/`        | reads and writes the released format; only here upstream's names are known     |
| `runs/`       | reads and writes the checkpoints of a training run, through Orbax              |
| `convert`     | opens, loads and writes checkpoints of both kinds                              |

Imports go one way: `convert -> runs -> hub`.
"""
