"""The error for bad input, which the user can correct, and how texts of users are shown."""

import logging
import re

_LONG_WORD = re.compile(r"(\S{80})\S{81,}(\S{40})")


class InputError(ValueError):
  """The user's input cannot be used.

  The message is one line: what is wrong, where (the file or field), and the remedy. The command
  line prints it without a traceback and exits with code 2.
  """

  def __init__(self, message: str = ""):
    super().__init__(one_line(message))


def one_line(text: object) -> str:
  r"""The text on one line that any terminal and any file can take.

  Line breaks and other characters that cannot be printed are written as in a Python string: `\n`,
  `\x1b`, `\udce9`. Names of files may hold them; those in another encoding have halves of surrogate
  pairs. A word of more than 200 letters is no name, but data: it is cut in its middle.
  """
  text = str(text)
  if not text.isprintable():
    text = "".join(
      letter if letter.isprintable() else letter.encode("unicode_escape").decode()
      for letter in text
    )
  return _LONG_WORD.sub(r"\1...\2", text)


def is_unicode(text: str) -> bool:
  """Whether a text has no half of a surrogate pair: only then can UTF-8 and tokenizers hold it."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _log_one_line(record: logging.LogRecord) -> bool:
  """Makes the message of a log record one line; every record is kept."""
  record.msg, record.args = one_line(record.getMessage()), None
  return True


# All modules log here, so no message has to care about the texts of users that it holds.
logging.getLogger("videochat_flash_jax").addFilter(_log_one_line)
