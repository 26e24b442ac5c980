"""Weights and configs on disk, in and out.

| place         | what it knows                                                                  |
|---------------|--------------------------------------------------------------------------------|
| `hub/`        | the released layout on the hub; upstream's names stand here and nowhere else   |
| `runs/`       | the files of a training run, written through Orbax                             |
| `convert`     | opens, loads and writes checkpoints of either kind                             |

Imports go one way: `convert -> runs -> hub`.
"""
