"""What a frozen encoder gave is kept on disk.

Takes the encoder's merged features of a clip or a tile, bfloat16 `[V, E]`. Gives them back by the
name of the video or image, so that an hour of video is encoded once.

| file            | what it does                                                      |
|-----------------|-------------------------------------------------------------------|
| `feature_store` | writes and reads features; the entry of this folder               |
| `feature_key`   | what features depend on, and the name of what they were made from |
| `record_file`   | an index on disk: small records found by a digest                 |
"""
