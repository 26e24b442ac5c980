"""Benchmarks: the speed of parts, compared with a peer and with the limits of the machine.

| file            | what it does |
|-----------------|--------------|
| `merge`         | `vcflash bench merge`: token merging |
| `vit`           | `vcflash bench vit`: the video encoder |
| `decode`        | `vcflash bench decode`: a long prompt, and writing after it |
| `qwen2_peer`    | the peer of `decode` |
| `read`          | `vcflash bench read`: a few frames of a video |
| `read_files`    | the films of `read` |
| `pipeline`      | `vcflash bench pipeline`: whether a step waits for its batches |
| `comparison`    | times the phases of a benchmark beside a peer and the limits |
| `floors`        | the limits of the machine |
| `timing`        | wall-clock times of several things in turns |
| `ahead_of_time` | `vcflash compile`: programs for TPUs that are not here |
| `chips`         | the least time of a program at the peak of a chip |
| `hlo_text`      | parses a compiled program |
| `hlo_costs`     | counts its flops, bytes and collectives |
| `hlo_flops`     | counts the flops of one instruction |
| `hlo_loops`     | finds the trip counts of its loops |

Peer and limits are measured at the same time as our code. `merge`, `vit` and `decode` have a
`run(repeats, ...)` that returns a report for JSON; the default sizes are those of the released
models. `floors.py` explains the limits.
"""
