"""The command line `vcflash`; each verb is one module (see `main.py`)."""
