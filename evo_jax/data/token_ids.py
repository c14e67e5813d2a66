"""What all tokenizers do with token ids, behind `encode` and before `decode`."""

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


def join_documents(documents: list[np.ndarray], separator_id: int) -> tuple[np.ndarray, list[int]]:
  """The tokens of at least one document, a separator behind each that has any, and how many each has."""
  separator = np.full(1, separator_id, documents[0].dtype)
  parts = [part for tokens in documents if len(tokens) for part in (tokens, separator)]
  return np.concatenate([separator[:0], *parts]), [len(tokens) for tokens in documents]
