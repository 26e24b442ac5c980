"""`vcflash data check`: a mixture becomes a report.

Takes a mixture. Gives counts and examples of what a run would not be able to read.

| file           | what it does                                  |
|----------------|-----------------------------------------------|
| `media_check`  | reads rows and opens media, as a run would    |
| `check_report` | the report as a table or as JSON              |
"""
