"""The one error that is the user's to mend."""


class InputError(ValueError):
  """Something the user gave cannot be used.

  The message is one line: what is wrong, where (file or field), and the remedy. The command
  line prints it without a traceback and exits with code 2.
  """
