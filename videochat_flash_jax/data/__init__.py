"""From files on disk to batches of arrays, one folder for each stage; on the host, without jax.

| level | folder      | takes                      | gives                                        |
|-------|-------------|----------------------------|----------------------------------------------|
| 1     | `media/`    | a video or an image file   | pixels: uint8 `[frames, height, width, 3]`   |
| 1     | `text/`     | a conversation             | token ids and labels                         |
| 2     | `mixture/`  | annotation files           | checked rows, one at a time                  |
| 2     | `features/` | what a frozen encoder gave | the same, from disk, instead of pixels       |
| 3     | `batches/`  | rows                       | batches of fixed shape, with exact restore   |
| 3     | `check/`    | a mixture                  | a report of what is broken in it             |

A folder imports from lower levels only; `check` also reads rows the way `batches` does.
`tests/import_direction_test.py` enforces this.
"""
