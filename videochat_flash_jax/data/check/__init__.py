"""Checks a mixture before a run: `vcflash data check`.

Takes a mixture. Gives counts and examples of the rows and media that a run could not read.

| file           | what it does                                  |
|----------------|-----------------------------------------------|
| `media_check`  | reads rows and opens media, as a run would    |
| `check_report` | the report as a table or as JSON              |
"""
