"""Drafts from the text itself: what followed its last tokens when they occurred before (prompt lookup decoding).

Letters in names: B rows of the batch, C positions of the buffers, T drafted tokens.
"""

import jax
import jax.numpy as jnp

from evo_jax.decoding.state import MATCH, gather


def continuation(tokens_BxC: jax.Array, length_B: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """The tokens (B, T) that followed the last occurrence of the longest suffix, and that suffix's length (B,).

  The suffix has up to MATCH of a row's first `length` tokens; 0: its last token did not occur before, and the tokens
  mean nothing. A text whose end overlaps that occurrence repeats itself: so does the draft.
  """
  C = tokens_BxC.shape[1]
  position, last = jnp.arange(C), length_B[:, None] - 1
  runs, matched = position < last, jnp.zeros(tokens_BxC.shape, jnp.int32)
  for i in range(MATCH):  # does position - i hold what stands i before the end?
    before = jnp.pad(tokens_BxC[:, : C - i], [(0, 0), (i, 0)])
    runs &= (before == gather(tokens_BxC, jnp.maximum(last - i, 0))) & (position >= i)
    matched += runs
  found = jnp.argmax(matched * C + position * (matched > 0), axis=1)[:, None]
  begin = found + 1
  period = jnp.maximum(length_B[:, None] - begin, 1)
  return gather(tokens_BxC, begin + jnp.arange(size) % period), gather(matched, found)[:, 0]
