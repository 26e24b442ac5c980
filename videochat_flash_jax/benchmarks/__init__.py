"""Benchmarks: the speed of parts, compared with a peer and with the limits of the machine.

| file              | what it does |
|-------------------|--------------|
| `merge`           | `vcflash bench merge`: token merging |
| `vit`             | `vcflash bench vit`: the video encoder |
| `decode`          | `vcflash bench decode`: a long prompt, and writing after it |
| `tome_peer`       | the peer of `merge`, in torch |
| `umt_peer`        | the peer of `vit`, in torch |
| `qwen2_peer`      | the peer of `decode`, of transformers |
| `read`            | `vcflash bench read`: a few frames of a video |
| `read_files`      | writes films |
| `pipeline`        | `vcflash bench pipeline`: whether a step waits for its batches |
| `watch`           | `vcflash bench watch`: a long video, and each stage alone |
| `prefill`         | `vcflash bench prefill`: many visual tokens, in chunks and at once |
| `second_question` | `vcflash bench second-question`: later questions, beside the first answer |
| `length`          | `vcflash bench length`: time and peak memory by the length of a video |
| `long_videos`     | the films and models of these four |
| `log_plot`        | draws the result of `length` |
| `comparison`      | times the phases of a benchmark beside a peer and the limits |
| `floors`          | the limits of the machine |
| `timing`          | wall-clock times of several things in turns |
| `ahead_of_time`   | `vcflash compile`: programs for TPUs that are not here |
| `chips`           | the least time of a program at the peak of a chip |
| `hlo_text`        | parses a compiled program |
| `hlo_costs`       | counts its flops, bytes and collectives |
| `hlo_flops`       | counts the flops of one instruction |
| `hlo_loops`       | finds the trip counts of its loops |

Peer and limits are measured at the same time as our code. Each benchmark has a `run`
that returns a report for JSON; the default sizes are those of the released
models. `floors.py` explains the limits.
"""
