"""What training measures instead of learning by gradient: the time warp, unigram frequencies, squared step costs."""

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import warp as warp_lib

_UNIGRAM_MEMORY = 1000  # steps after which the unigram estimate forgets as fast as it learns
NLL_BINS = 16  # of the clock, over which the bound's squared step costs are followed


@flax.struct.dataclass
class Statistics:
  """What is measured, not learned by gradient, during training: the time warp and the unigram distribution."""

  warp: warp_lib.Warp
  unigram_V: jax.Array  # float32 probabilities
  squares_G: jax.Array  # float32: running mean of squared step costs of the bound, by bins of the clock
  steps: jax.Array  # int32: measurements so far

  @property
  def log_unigram_V(self) -> jax.Array:
    """Log-probabilities (V,) in nats; tokens that were never seen get a little."""
    return jnp.log(self.unigram_V + 1e-8)

  def update(self, measured: "Measurement", decay: float) -> "Statistics":
    """Adds what a training step measured; the warp's running sums keep `decay` of their weight."""
    tokens = measured.token.reshape(-1)
    counts_V = jnp.zeros_like(self.unigram_V).at[tokens].add(1.0) / tokens.size
    share = 1.0 / (jnp.minimum(self.steps, _UNIGRAM_MEMORY) + 1)
    bins = jnp.minimum((measured.clock.reshape(-1) * NLL_BINS).astype(jnp.int32), NLL_BINS - 1)
    add = lambda values: jax.ops.segment_sum(values.reshape(-1), bins, num_segments=NLL_BINS)
    squares, count = add(measured.cost**2), add(jnp.ones_like(measured.cost))
    new = jnp.where(count > 0, squares / jnp.maximum(count, 1), self.squares_G)
    return Statistics(
      self.warp.update(measured.precision, measured.nats, measured.weight, decay),
      self.unigram_V + share * (counts_V - self.unigram_V),
      self.squares_G + jnp.maximum(share, 1 - decay) * (new - self.squares_G),
      self.steps + 1,
    )

  def step_density(self) -> jax.Array:
    """(G,) probabilities of the clock's bins for importance sampling: in proportion to the steps' root mean square
    costs, with a tenth spread evenly, so that no weight exceeds ten."""
    root = jnp.sqrt(self.squares_G) + 1e-9
    return 0.9 * root / jnp.sum(root) + 0.1 / NLL_BINS


@flax.struct.dataclass
class Measurement:
  """A step's clean tokens (any shape); cross-entropies `nats` at `precision` with `weight` (all one shape); and
  whole-path costs in nats that the bound's steps stood for, with the clock where they began (both one shape)."""

  token: jax.Array
  precision: jax.Array
  nats: jax.Array
  weight: jax.Array
  clock: jax.Array
  cost: jax.Array


@flax.struct.dataclass
class Mean:
  """A mean whose parts are added up first, over microbatches and devices: float32 scalars."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, values: jax.Array, mask: jax.Array | None = None) -> "Mean":
    """Over the values (...), or over those with `mask` (...)."""
    mask = jnp.ones(values.shape) if mask is None else jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
    return cls(jnp.sum(values * mask), jnp.sum(mask))

  @property
  def value(self) -> jax.Array:
    """0 where nothing was counted."""
    return self.total / jnp.maximum(self.count, 1)


def init_statistics(key: jax.Array, codes_VxM: jax.Array, vocab_size: int, config: config_lib.Warp) -> Statistics:
  """Statistics before training: a uniform unigram, and the warp of a field that knows nothing but the evidence."""
  rows = codes_VxM.shape[0]
  unigram_V = (jnp.arange(rows) < vocab_size) / vocab_size
  warp = warp_lib.Warp.start(jnp.ones(config.knots), config.precision_max)
  token_key, noise_key = jax.random.split(key)
  token = jax.random.randint(token_key, (128,), 0, vocab_size)
  noise = jax.random.normal(noise_key, (128, codes_VxM.shape[1]))

  def entropy(precision):
    y = latents_lib.observe(codes_VxM, token, jnp.broadcast_to(precision, token.shape), noise)
    belief = latents_lib.belief_logits(jnp.log(unigram_V + 1e-30), codes_VxM, y)
    return jnp.mean(latents_lib.jump_nll(latents_lib.log_prob(belief, token)))

  return Statistics(
    warp_lib.Warp.start(jax.lax.map(entropy, warp.precisions), config.precision_max),
    unigram_V,
    jnp.ones(NLL_BINS),
    jnp.zeros((), jnp.int32),
  )
