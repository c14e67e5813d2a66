"""What all tokenizers do with token ids before they decode them."""

import numpy as np

from evo_jax.errors import UserError


def before_end(tokens: np.ndarray, end_ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
  """The tokens before the first end id, as int64. Raises UserError where one is outside the vocabulary."""
  tokens = np.asarray(tokens, np.int64)
  end = np.flatnonzero(np.isin(tokens, end_ids))
  tokens = tokens[: end[0]] if end.size else tokens
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
    raise UserError(f"token {outside} is outside the vocabulary of {vocab_size}")
  return tokens
