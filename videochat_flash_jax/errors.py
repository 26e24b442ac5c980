"""The error for bad input, which the user can correct."""


class InputError(ValueError):
  """The user's input cannot be used.

  The message is one line: what is wrong, where (the file or field), and the remedy. The command
  line prints it without a traceback and exits with code 2.
  """

  def __init__(self, message: str = ""):
    super().__init__(one_line(message))


def one_line(text: object) -> str:
  r"""The text with each line break written as `\n`; names of files may contain line breaks."""
  return str(text).replace("\r", "\\r").replace("\n", "\\n")
