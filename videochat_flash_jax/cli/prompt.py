"""The prompt of `vcflash chat`: lines that a person types, or that another program sends.

A terminal gets line editing and a history, which is kept for the next time. The prompt itself is
written to stderr, so that stdout holds answers alone.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from videochat_flash_jax.caches import cache_folder
from videochat_flash_jax.errors import InputError

_PROMPT = "> "


def lines(stdin: TextIO | None) -> Iterator[str]:
  """Yields lines without the white space around them, until the end; empty ones are skipped.

  Ctrl-C empties the line that is being typed, and Ctrl-D ends.

  Raises:
    InputError: there is no input.
  """
  if stdin is None or stdin.closed:
    raise InputError("there is no standard input to read questions from; give --question")
  for line in _typed() if stdin.isatty() else stdin:
    if line.strip():
      yield line.strip()


def _typed():
  """Yields what is typed at a terminal."""
  from prompt_toolkit import PromptSession
  from prompt_toolkit.history import FileHistory, InMemoryHistory
  from prompt_toolkit.output import create_output

  history = InMemoryHistory()
  with contextlib.suppress(OSError):  # without a folder for it, it lasts as long as the prompt
    path = cache_folder("history") / "questions"
    os.makedirs(path.parent, exist_ok=True)
    history = FileHistory(str(path))
  session = PromptSession(history=history, output=create_output(stdout=sys.stderr))
  while True:
    try:
      yield session.prompt(_PROMPT)
    except KeyboardInterrupt:
      print("Ctrl-D or /quit ends.", file=sys.stderr)
    except EOFError:
      return
