"""What the package logs, for a person at a terminal: plain lines on stderr, above progress bars."""

import logging
import sys
import warnings

from tqdm import tqdm


class _AboveBars(logging.Handler):
  """Writes lines to stderr; a progress bar there stays below them."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(self.format(record), file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None):
  """Shows a warning without the line of Python that raised it."""
  tqdm.write(f"warning: {message}", file=sys.stderr)


def log_to_stderr() -> None:
  """Shows what this package logs from now on, and the warnings of all libraries."""
  logging.basicConfig(format="%(message)s", handlers=[_AboveBars()], force=True)
  logging.getLogger("videochat_flash_jax").setLevel(logging.INFO)
  warnings.showwarning = _show_warning
