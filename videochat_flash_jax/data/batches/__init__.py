"""Rows become batches of fixed shape.

Takes the rows of a mixture and a `DataConfig`. Gives numpy arrays of B packed rows, in a fixed
order, from worker processes. The whole state is a small dict, and a run goes on from it exactly.

| file            | what it does                                                             |
|-----------------|--------------------------------------------------------------------------|
| `train_batches` | the batches of a run; the entry of this folder                           |
| `data_config`   | what batches are made of                                                 |
| `example_order` | in which order rows are read, and by which stream                        |
| `examples`      | one row becomes an example: frames, tiles, tokens and labels             |
| `row_media`     | reads the video or the images of a row                                   |
| `replacement`   | another row stands in for one that cannot be read                        |
| `broken_share`  | stops the run when too many rows cannot be read                          |
| `row_packer`    | packs examples into rows of T tokens, C clips and image tiles            |
| `packed_stream` | one stream of examples, read ahead and packed                            |
| `sharded_rows`  | lays rows out for a mesh that splits their tokens                        |
"""
