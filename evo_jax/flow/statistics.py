"""What training measures instead of learning by gradient: the time warp, unigram frequencies, how much the bound's
steps scatter.

Letters in names: V vocabulary, M code elements, G bins of the clock.
"""

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow.warp import Warp

_UNIGRAM_MEMORY = 1000  # steps after which the unigram estimate forgets as fast as it learns
_CLOCK_BINS = 16  # over which the bound's squared steps are averaged


@flax.struct.dataclass
class Measurement:
  """What one training step measured; weights that are None are 1.

  token: the clean tokens (any shape), with token_weight; nats: cross-entropies at `precision` with `weight` (all one
  shape); path_nats: NLL bounds of whole paths in nats that the bound's single steps estimate, with the clock where
  these began and path_weight (all one shape).
  """

  token: jax.Array
  token_weight: jax.Array | None
  precision: jax.Array
  nats: jax.Array
  weight: jax.Array
  clock: jax.Array
  path_nats: jax.Array
  path_weight: jax.Array | None


@flax.struct.dataclass
class Statistics:
  """The time warp, the unigram distribution, and how much the bound's steps scatter along the clock."""

  warp: Warp
  unigram_V: jax.Array  # float32 probabilities
  squares_G: jax.Array  # float32: running mean of squared path_nats, by bins of the clock
  steps: jax.Array  # int32: measurements so far

  @property
  def log_unigram_V(self) -> jax.Array:
    """Log-probabilities (V,) in nats; tokens that were never seen get a little."""
    return jnp.log(self.unigram_V + 1e-8)

  def update(self, measured: Measurement, decay: float) -> "Statistics":
    """Adds what a training step measured; the warp's running sums keep `decay` of their weight."""
    share = 1.0 / (jnp.minimum(self.steps, _UNIGRAM_MEMORY) + 1)
    counts_V = _frequencies(self.unigram_V, measured.token, measured.token_weight)
    bins = jnp.minimum((measured.clock.reshape(-1) * _CLOCK_BINS).astype(jnp.int32), _CLOCK_BINS - 1)
    weight = jnp.ones_like(measured.path_nats) if measured.path_weight is None else measured.path_weight
    add = lambda values: jax.ops.segment_sum(values.reshape(-1), bins, num_segments=_CLOCK_BINS)
    squares, count = add(weight * measured.path_nats**2), add(weight)
    new = jnp.where(count > 0, squares / jnp.maximum(count, 1), self.squares_G)
    return Statistics(
      self.warp.update(measured.precision, measured.nats, measured.weight, decay),
      self.unigram_V + share * (counts_V - self.unigram_V),
      self.squares_G + jnp.maximum(share, 1 - decay) * (new - self.squares_G),
      self.steps + 1,
    )

  def step_density(self) -> jax.Array:
    """(G,) probabilities of the clock's bins for importance sampling: in proportion to the steps' root mean square,
    with a tenth spread evenly, so that no weight exceeds ten."""
    root = jnp.sqrt(self.squares_G) + 1e-9
    return 0.9 * root / jnp.sum(root) + 0.1 / _CLOCK_BINS


def _frequencies(unigram_V: jax.Array, token: jax.Array, weight: jax.Array | None) -> jax.Array:
  """(V,) relative frequencies of the tokens; the unigram distribution itself where none counts."""
  zeros = jnp.zeros_like(unigram_V)
  if weight is None:
    return zeros.at[token.reshape(-1)].add(1.0) / token.size
  total = jnp.sum(weight)
  counts = zeros.at[token.reshape(-1)].add(weight.reshape(-1)) / jnp.maximum(total, 1.0)
  return jnp.where(total > 0, counts, unigram_V)


@flax.struct.dataclass
class Mean:
  """A mean as a sum and a count, which are added up over microbatches and devices before they are divided: float32
  scalars."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, values: jax.Array, mask: jax.Array | None = None) -> "Mean":
    """Over the values (...), weighted by `mask` (...) where it is given."""
    mask = jnp.ones(values.shape) if mask is None else jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
    return cls(jnp.sum(values * mask), jnp.sum(mask))

  @property
  def value(self) -> jax.Array:
    """0 where nothing counts."""
    return self.total / jnp.where(self.count > 0, self.count, 1)


def init_statistics(key: jax.Array, codes_VxM: jax.Array, vocab_size: int, config: config_lib.Warp) -> Statistics:
  """Statistics before training: a uniform unigram, and the warp of a field that reads the evidence alone."""
  rows = codes_VxM.shape[0]
  unigram_V = (jnp.arange(rows) < vocab_size) / vocab_size
  warp = Warp.start(jnp.ones(config.knots), config.precision_max)
  token_key, noise_key = jax.random.split(key)
  token = jax.random.randint(token_key, (128,), 0, vocab_size)
  noise = jax.random.normal(noise_key, (128, codes_VxM.shape[1]))

  def entropy(precision):
    y = latents_lib.observe(codes_VxM, token, jnp.broadcast_to(precision, token.shape), noise)
    belief = latents_lib.belief_logits(jnp.log(unigram_V + 1e-30), codes_VxM, y)
    return jnp.mean(latents_lib.jump_nll(latents_lib.log_prob(belief, token)))

  return Statistics(
    Warp.start(jax.lax.map(entropy, warp.precisions), config.precision_max),
    unigram_V,
    jnp.ones(_CLOCK_BINS),
    jnp.zeros((), jnp.int32),
  )
