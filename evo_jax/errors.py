"""The error that means bad input."""


class UserError(ValueError):
  """Bad input. The message is one line that names the file, flag or field."""
