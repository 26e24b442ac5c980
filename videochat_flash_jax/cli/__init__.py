"""The command line `vcflash`; one module a verb (see `main.py`)."""
