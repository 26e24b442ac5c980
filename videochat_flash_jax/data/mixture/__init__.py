"""Annotation files become rows.

Takes one annotation file, or a YAML list of them with shares. Gives rows: dicts with `video` or
`image` (or neither) and `conversations`, each checked and read only when asked for.

| file             | what it does                                                        |
|------------------|---------------------------------------------------------------------|
| `mixture`        | which annotation files are read, and how much of each               |
| `rows`           | the rows of a mixture, read one at a time; the entry of this folder |
| `row_index`      | where each row stands in its file, with its kind and length         |
| `row_text`       | goes through the rows of a file of any size                         |
| `annotations`    | rules for rows: which ones, which media, which frames               |
| `row_check`      | finds what is wrong with a row without opening its media            |
| `row_conversion` | turns other tables and lists into checked rows                      |
| `broken`         | the reasons why a row cannot be used                                |
"""
