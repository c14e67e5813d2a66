"""The error that means bad input, and what seeds may be."""


class UserError(ValueError):
  """Bad input. The message is one line that names the file, flag or field."""


def check_seed(seed: int, name: str = "seed") -> None:
  """Raises UserError, naming the flag or field, unless the seed fits into 32 bits without a sign."""
  if not 0 <= seed < 2**32:
    raise UserError(f"{name}={seed}: is not in [0, 2^32)")
