"""`uninterrupted`: Ctrl-C waits for the end of a block."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
  """Lets Ctrl-C wait until the block has ended, so that what the block changes stays whole.

  A program that is given a cache to write into takes it away: without the program's result there
  is neither the old cache nor the new one. Blocks may be nested; the outermost one counts.

  with uninterrupted():
    cache, states = read(..., cache)
  """
  handler = signal.getsignal(signal.SIGINT)
  if threading.current_thread() is not threading.main_thread() or not callable(handler):
    yield  # signals reach the main thread alone
    return
  came = []
  signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
    if came:
      handler(*came[0])
