"""Turns rows of a mixture into batches of fixed shape.

Input: the rows of a mixture and a `DataConfig`. Output: batches of B packed training rows, as numpy
arrays, in a fixed order, read by worker processes. The whole state is a small dict. A run that
restores it continues exactly.

| file            | what it does                                                             |
|-----------------|--------------------------------------------------------------------------|
| `train_batches` | makes the batches of a run; the entry of this folder                     |
| `data_config`   | holds the settings of batches                                            |
| `example_order` | computes the order in which rows are read, and which stream reads which  |
| `examples`      | turns one annotation row into an example: frames, tiles, tokens, labels  |
| `row_media`     | reads the video or the images of an annotation row                       |
| `replacement`   | reads another row instead of one that cannot be read                     |
| `broken_share`  | stops the run when too many rows cannot be read                          |
| `row_packer`    | packs examples into rows of T tokens, C clips and some image tiles       |
| `packed_stream` | reads one stream of examples ahead and packs it                          |
| `shared_stream` | makes all processes that read a stream take the same examples            |
| `sharded_rows`  | arranges rows for a mesh that splits their tokens                        |
"""
