"""Logits processing: temperature, top-k, top-p, suppressed tokens; and drawing tokens from the result."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.data.tokenizers import Tokenizer, special_ids
from evo_jax.decoding.settings import Sampling
from evo_jax.decoding.state import KEY_TOKEN, DecodingState

_HUGE = 1e25  # float32 holds its reciprocal, and quotients by both of what logits differ by


@flax.struct.dataclass
class LogitsProcessor:
  """Turns logits into the distribution that tokens are drawn from: greedy; or temperature, then top-k, then top-p.

  Of each row of a batch, (B,), or of all rows, (): temperature, top_p: float32, inside the range of `make_processor`;
  top_k: int32 (0: all); greedy: bool; may_end: bool, whether the ids of `ends` are allowed. bias_id (B, n) int32 and
  bias (B, n) float32: what is added to logits of some ids; -1 where there are fewer; None: nothing is. suppressed:
  ids that are ruled out (static). vocab_size: rows from this one on are no token (static; None: all are).
  """

  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array
  greedy: jax.Array
  may_end: jax.Array
  bias_id: jax.Array | None = None
  bias: jax.Array | None = None
  suppressed: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  ends: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  vocab_size: int | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Log-probabilities (B, ..., V) in nats, -inf where a token is ruled out."""
    return self.shape(self.rule_out(logits))

  def rule_out(self, logits: jax.Array) -> jax.Array:
    """The logits (B, ..., V) with the bias, -inf where a row is no token or one that is suppressed."""
    logits = self._add_bias(logits)
    vocabulary = np.arange(logits.shape[-1])
    ruled_out = np.isin(vocabulary, self.suppressed)
    if self.vocab_size is not None:
      ruled_out |= vocabulary >= self.vocab_size
    ends = np.isin(vocabulary, self.ends) & ~_by_row(self.may_end, logits)
    return jnp.where(ruled_out | ends, -jnp.inf, logits)

  def shape(self, logits: jax.Array) -> jax.Array:
    """Log-probabilities (B, ..., C) in nats of any C candidates by their logits."""
    greedy = _by_row(self.greedy, logits)
    # The greatest is 0 first, so that nothing overflows, and at high temperatures the order of the others is kept.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / _by_row(self.temperature, logits)
    cut = jnp.any(((self.top_k > 0) | (self.top_p < 1.0)) & ~self.greedy)
    scaled = jax.lax.cond(cut, self._cut, lambda x: x, scaled)  # sorting a vocabulary takes long
    best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(greedy, jnp.where(best, 0.0, -jnp.inf), jax.nn.log_softmax(scaled, axis=-1))

  def noise(self, shape: tuple[int, ...], draw: Callable[[], jax.Array]) -> jax.Array:
    """draw(): Gumbel noise of this shape, float32. Zeros where all rows are greedy, since it takes long."""
    return jax.lax.cond(jnp.all(self.greedy), lambda: jnp.zeros(shape), draw)

  def _cut(self, logits):
    """Top-k, then top-p."""
    C, top_k, top_p = logits.shape[-1], _by_row(self.top_k, logits), _by_row(self.top_p, logits)
    descending = jnp.sort(logits, axis=-1, descending=True)
    least = jnp.take_along_axis(descending, jnp.broadcast_to(jnp.clip(top_k, 1, C) - 1, (*logits.shape[:-1], 1)), -1)
    least = jnp.where(top_k > 0, least, -jnp.inf)
    # The fewest tokens whose probabilities add up to top_p: those before which the sum is less than top_p.
    p = jax.nn.softmax(jnp.where(descending >= least, descending, -jnp.inf), axis=-1)
    in_nucleus = jnp.cumsum(p, axis=-1) - p < top_p
    least_of_nucleus = jnp.min(jnp.where(in_nucleus, descending, jnp.inf), axis=-1, keepdims=True)
    least = jnp.where(top_p < 1.0, jnp.maximum(least, least_of_nucleus), least)
    return jnp.where(logits >= least, logits, -jnp.inf)

  def _add_bias(self, logits):
    if self.bias is None:
      return logits

    def add(logits):
      by_row = lambda row, at, values: row.at[..., at].add(values, mode="drop")
      at = jnp.where(self.bias_id < 0, logits.shape[-1], self.bias_id)
      return jax.vmap(by_row)(logits, at, self.bias)

    return jax.lax.cond(jnp.any(self.bias_id >= 0), add, lambda logits: logits, logits)


def _by_row(values: jax.Array, like: jax.Array) -> jax.Array:
  """Values of rows (B,), or of all (), so that they broadcast to (B, ..., V)."""
  values = jnp.asarray(values)
  return values.reshape(*values.shape, *(1,) * (like.ndim - values.ndim))


def make_processor(
  sampling: Sampling, suppressed: tuple[int, ...] = (), vocab_size: int | None = None, ends: tuple[int, ...] = ()
) -> LogitsProcessor:
  """The processor that the settings describe, for all rows; `suppressed` ids, and rows from `vocab_size` on, are ruled
  out, and `ends` where texts are endless.

  Temperatures and top_p that float32 cannot divide by or tell from 0 are moved to where the distribution has long
  reached its limit: the most probable tokens, or all tokens alike.
  """
  return LogitsProcessor(
    temperature=np.float32(np.clip(sampling.temperature, 1.0 / _HUGE, _HUGE)),
    top_p=np.float32(max(sampling.top_p, 1.0 / _HUGE)),
    top_k=np.int32(min(sampling.top_k, 2**31 - 1)),
    greedy=np.bool_(sampling.greedy),
    may_end=np.bool_(not sampling.endless),
    suppressed=suppressed,
    ends=ends,
    vocab_size=vocab_size,
  )


def ruled_out(tokenizer: Tokenizer, infill: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Special ids that may not be written, and those that end a text, which may not where texts are endless. In a gap,
  which ends neither a text nor a turn, none may be."""
  ends = () if infill else tokenizer.end_ids
  written = () if infill else (*ends, *tokenizer.turn_end_ids)
  # What ends a turn alone is written even in endless texts.
  only_ends = tuple(i for i in ends if i not in tokenizer.turn_end_ids)
  return tuple(i for i in special_ids(tokenizer) if i not in written), only_ends


def draw_tokens(
  state: DecodingState, processor: LogitsProcessor, logits_BxTxV: jax.Array, position_BxT: jax.Array
) -> jax.Array:
  """Tokens (B, T) int32. Each position has noise of its own, since it is drawn only once (or again, as a draft)."""
  noise = processor.noise(logits_BxTxV.shape, lambda: token_noise(state, position_BxT, logits_BxTxV.shape[-1]))
  return jnp.argmax(processor(logits_BxTxV) + noise, axis=-1).astype(jnp.int32)


def token_noise(state: DecodingState, position_BxT: jax.Array, vocab_rows: int) -> jax.Array:
  """(B, T, V) float32 standard Gumbel noise of a row's positions: the token with the greatest sum of log-probability
  and noise is a draw from the distribution (Gumbel-max)."""

  def noise(key, position):
    key = jax.random.fold_in(jax.random.fold_in(key, KEY_TOKEN), position)
    return jax.random.gumbel(key, (vocab_rows,))

  return jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(state.key, position_BxT)
