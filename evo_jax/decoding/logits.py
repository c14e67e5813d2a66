"""Logits processing: temperature, top-k, top-p, suppressed tokens; and drawing tokens from the result."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.decoding.settings import Sampling
from evo_jax.decoding.state import KEY_TOKEN, DecodingState, is_any_of

_HUGE = 1e25  # float32 holds its reciprocal, and quotients by both of what logits differ by


@flax.struct.dataclass
class LogitsProcessor:
  """Turns logits into the distribution that tokens are drawn from: greedy; or temperature, then top-k, then top-p.

  temperature, top_p: float32 scalars, inside the range of `make_processor`. greedy, top_k (0: all), use_top_p: static.
  suppressed: ids that are ruled out (static). vocab_size: rows from this one on are no token (static; None: all are).
  """

  temperature: jax.Array
  top_p: jax.Array
  greedy: bool = flax.struct.field(pytree_node=False, default=False)
  top_k: int = flax.struct.field(pytree_node=False, default=0)
  use_top_p: bool = flax.struct.field(pytree_node=False, default=False)
  suppressed: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  vocab_size: int | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Log-probabilities (..., V) in nats, -inf where a token is ruled out."""
    return self.shape(self.rule_out(logits))

  def rule_out(self, logits: jax.Array) -> jax.Array:
    """The logits (..., V), -inf where a row is no token or one that is suppressed."""
    if not self.suppressed and self.vocab_size is None:
      return logits
    vocabulary = jnp.arange(logits.shape[-1])
    ruled_out = is_any_of(vocabulary, self.suppressed)
    if self.vocab_size is not None:
      ruled_out |= vocabulary >= self.vocab_size
    return jnp.where(ruled_out, -jnp.inf, logits)

  def shape(self, logits: jax.Array) -> jax.Array:
    """Log-probabilities (..., C) in nats of any C candidates by their logits."""
    if self.greedy:
      best = jnp.argmax(logits, axis=-1, keepdims=True)
      return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    # The greatest is 0 first, so that nothing overflows, and at high temperatures the order of the others is kept.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
    if self.top_k and self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
      logits = jnp.where(logits >= least, logits, -jnp.inf)
    if self.use_top_p:
      # The fewest tokens whose probabilities add up to top_p: those before which the sum is less than top_p.
      p = jax.nn.softmax(logits, axis=-1)
      descending = jnp.sort(p, axis=-1, descending=True)
      in_nucleus = jnp.cumsum(descending, axis=-1) - descending < self.top_p
      least = jnp.min(jnp.where(in_nucleus, descending, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(p >= least, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def make_processor(
  sampling: Sampling, suppressed: tuple[int, ...] = (), vocab_size: int | None = None
) -> LogitsProcessor:
  """The processor that the settings describe; `suppressed` ids, and rows from `vocab_size` on, are ruled out.

  Temperatures and top_p that float32 cannot divide by or tell from 0 are moved to where the distribution has long
  reached its limit: the most probable tokens, or all tokens alike.
  """
  return LogitsProcessor(
    temperature=np.float32(np.clip(sampling.temperature, 1.0 / _HUGE, _HUGE)),
    top_p=np.float32(max(sampling.top_p, 1.0 / _HUGE)),
    greedy=sampling.greedy,
    top_k=sampling.top_k,
    use_top_p=sampling.top_p < 1.0,
    suppressed=suppressed,
    vocab_size=vocab_size,
  )


def draw_tokens(
  state: DecodingState, processor: LogitsProcessor, logits_BxTxV: jax.Array, position_BxT: jax.Array
) -> jax.Array:
  """Tokens (B, T) int32. Each position has noise of its own, since it is drawn only once (or again, as a draft)."""
  log_p_BxTxV = processor(logits_BxTxV)
  if not processor.greedy:
    log_p_BxTxV += token_noise(state, position_BxT, log_p_BxTxV.shape[-1])
  return jnp.argmax(log_p_BxTxV, axis=-1).astype(jnp.int32)


def token_noise(state: DecodingState, position_BxT: jax.Array, vocab_rows: int) -> jax.Array:
  """(B, T, V) float32 standard Gumbel noise of a row's positions: the token with the greatest sum of log-probability
  and noise is a draw from the distribution (Gumbel-max)."""

  def noise(key, position):
    key = jax.random.fold_in(jax.random.fold_in(key, KEY_TOKEN), position)
    return jax.random.gumbel(key, (vocab_rows,))

  return jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(state.key, position_BxT)
