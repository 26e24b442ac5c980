"""The one error that is the user's to mend."""


class InputError(ValueError):
  """Something the user gave cannot be used.

  The message is one line: what is wrong, where (file or field), and the remedy. The command
  line prints it without a traceback and exits with code 2.
  """

  def __init__(self, message: str = ""):
    super().__init__(one_line(message))


def one_line(text: object) -> str:
  r"""A text without line breaks, which names of files may hold: they are written `\n`."""
  return str(text).replace("\r", "\\r").replace("\n", "\\n")
