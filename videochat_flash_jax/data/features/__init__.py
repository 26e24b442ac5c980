"""Keeps the output of a frozen encoder on disk.

Takes the encoder's merged features of a clip or a tile, bfloat16 `[V, E]`. Gives them back for the
same video or image, so that an hour of video is encoded only once.

| file            | what it does                                                             |
|-----------------|--------------------------------------------------------------------------|
| `feature_store` | writes and reads features; start reading here                            |
| `feature_key`   | what features depend on, and the key of the video or image they are from |
| `record_file`   | an index on disk: small records found by a digest                        |
"""
