"""Logits processing: temperature, top-k, top-p, and draws."""

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.data import tokenizers
from evo_jax.decoding import state as state_lib


@flax.struct.dataclass
class LogitsProcessor:
  """How beliefs are made sharper before a token is drawn: greedy, or temperature, then top-k, then top-p.

  temperature, top_p: float32 scalars; top_k: 0 keeps all; nucleus: whether top_p is read at all; endless: the
  document token, which ends a text, is ruled out.
  """

  temperature: jax.Array
  top_p: jax.Array
  greedy: bool = flax.struct.field(pytree_node=False, default=False)
  top_k: int = flax.struct.field(pytree_node=False, default=0)
  nucleus: bool = flax.struct.field(pytree_node=False, default=False)
  endless: bool = flax.struct.field(pytree_node=False, default=False)

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Log-probabilities (..., V), -inf where a token is ruled out."""
    if self.endless:
      logits = jnp.where(jnp.arange(logits.shape[-1]) == tokenizers.DOCUMENT, -jnp.inf, logits)
    if self.greedy:
      best = jnp.argmax(logits, axis=-1, keepdims=True)
      return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits / self.temperature
    if self.top_k and self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
      logits = jnp.where(logits >= least, logits, -jnp.inf)
    if self.nucleus:
      # The fewest tokens whose probabilities reach top_p: those before which less than top_p has been gathered.
      p = jax.nn.softmax(logits, axis=-1)
      ordered = jnp.sort(p, axis=-1, descending=True)
      kept = jnp.cumsum(ordered, axis=-1) - ordered < self.top_p
      least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(p >= least, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def draw_tokens(
  texts: state_lib.DecodingState, shaping: LogitsProcessor, logits_BxTxV: jax.Array, place_BxT: jax.Array
) -> jax.Array:
  """Tokens (B, T) int32 for places, each place with its own key: a place is drawn for once."""
  log_p_BxTxV = shaping(logits_BxTxV)
  if shaping.greedy:
    return jnp.argmax(log_p_BxTxV, axis=-1).astype(jnp.int32)

  def one(key, log_p, place):
    key = jax.random.fold_in(jax.random.fold_in(key, state_lib.KEY_TOKEN), place)
    return jax.random.categorical(key, log_p).astype(jnp.int32)

  return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))(texts.key, log_p_BxTxV, place_BxT)
