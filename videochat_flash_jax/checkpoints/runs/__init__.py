"""The files of a training run.

| file              | what it does                                                               |
|-------------------|----------------------------------------------------------------------------|
| `manager`         | writes and restores checkpoints; the entry of this folder                  |
| `run_files`       | where the files of a run are                                               |
| `frozen_weights`  | weights that never change: written once                                    |
| `array_check`     | whether a checkpoint holds the arrays that a run asks for                  |
| `processes`       | what the processes of a run must agree on                                  |
| `orbax_files`     | opens a run's checkpoint like one of the hub                               |
| `adapters`        | adds LoRA adapters to the weights that they belong to                      |
"""
