"""`python -m videochat_flash_jax` is `vcflash`."""

import sys

from videochat_flash_jax.cli.main import main

sys.exit(main())
