"""Reads and writes the checkpoints of a training run.

| file              | what it does                                                               |
|-------------------|----------------------------------------------------------------------------|
| `manager`         | writes and restores checkpoints; the entry of this folder                  |
| `run_files`       | knows where the files of a run are                                         |
| `frozen_weights`  | writes the weights that never change, once; reads them                     |
| `array_check`     | checks that a checkpoint holds the arrays that a run needs                 |
| `processes`       | exchanges what the processes of a run must agree on                        |
| `orbax_files`     | opens a run's checkpoint as if it had the released format                  |
| `adapters`        | adds LoRA adapters to the kernels that they belong to                      |
"""
