"""Turns annotation files into rows.

Takes one annotation file, or a YAML list of annotation files with a share of each. Gives annotation
rows: dicts with `video` or `image` (or neither) and `conversations`. A row is read and checked only
when it is needed.

| file             | what it does                                                        |
|------------------|---------------------------------------------------------------------|
| `mixture`        | which annotation files are read, and how much of each               |
| `rows`           | the rows of a mixture, read one at a time; start reading here       |
| `row_index`      | where each row begins in its file, with its kind and length         |
| `row_text`       | reads the rows of a file of any size, one at a time                 |
| `annotations`    | rules for rows: which ones, which media, which frames               |
| `row_check`      | finds what is wrong with a row without opening its media            |
| `yaml_text`      | parses YAML; a key that stands twice is an error                    |
| `row_conversion` | turns other tables and lists into checked rows                      |
| `broken`         | the reasons why a row cannot be used                                |
"""
