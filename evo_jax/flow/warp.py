"""The time warp t(precision), fitted to the cross-entropy measured during training."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_LEAST_WEIGHT = 1e-3  # of a knot


@flax.struct.dataclass
class Warp:
  """The time warp: t(precision) = CE(precision) / CE(0), the expected share of a token's uncertainty that is left.

  CE is measured during training (`update`) at G knots, evenly spaced in log(1 + precision), as weighted running sums,
  and read through its isotonic (least-squares monotone) fit, piecewise linear in between. Time warping after Dieleman
  et al., "Continuous diffusion for categorical data", 2022.
  """

  nats_G: jax.Array  # float32: running sum of weight * cross-entropy
  weight_G: jax.Array  # float32: running sum of weights
  precision_max: float = flax.struct.field(pytree_node=False)

  @classmethod
  def start(cls, entropy_G: jax.Array, precision_max: float, weight: float = 50.0) -> "Warp":
    """A warp that starts from a guess of CE at the knots, in nats, which counts as `weight` measurements a knot."""
    return cls(entropy_G * weight, jnp.full_like(entropy_G, weight), precision_max)

  @property
  def _spacing(self) -> float:
    return float(np.log1p(self.precision_max)) / (self.nats_G.shape[0] - 1)

  @property
  def precisions(self) -> jax.Array:
    """(G,) precisions of the knots, from 0 to precision_max."""
    return jnp.expm1(jnp.arange(self.nats_G.shape[0]) * self._spacing)

  def entropy(self) -> jax.Array:
    """(G,) the fitted cross-entropy at the knots, nats, never rising."""
    # The fit takes differences of running sums: in float32 a weight below a millionth of their total would be lost.
    weight_G = jnp.maximum(self.weight_G, 1e-5 * jnp.sum(self.weight_G))
    return isotonic_decreasing(self.nats_G / self.weight_G, weight_G)

  def _times(self) -> jax.Array:
    entropy_G = self.entropy()
    share = jnp.clip(entropy_G / jnp.maximum(entropy_G[0], 1e-6), 0.0, 1.0)
    # A hair of slope keeps the curve strictly falling, so that its inverse is a function.
    return (1.0 - 1e-4) * share + 1e-4 * jnp.linspace(1.0, 0.0, share.shape[0])

  def time(self, precision: jax.Array) -> jax.Array:
    """t in (0, 1] (...) of precisions (...)."""
    return jnp.interp(jnp.log1p(precision) / self._spacing, jnp.arange(self.nats_G.shape[0]), self._times())

  def precision(self, time: jax.Array) -> jax.Array:
    """Precision (...) of times (...), the inverse of `time`; times below the last knot's give precision_max."""
    knots = jnp.arange(self.nats_G.shape[0], dtype=jnp.float32)
    return jnp.expm1(jnp.interp(time, self._times()[::-1], knots[::-1]) * self._spacing)

  def update(self, precision: jax.Array, nats: jax.Array, weight: jax.Array, decay: float) -> "Warp":
    """Adds measured cross-entropies `nats` (...) at `precision` (...) with `weight` (...), each to its two knots."""
    last = self.nats_G.shape[0] - 1
    u = jnp.clip(jnp.log1p(precision) / self._spacing, 0.0, last)
    low = jnp.minimum(jnp.floor(u).astype(jnp.int32), last - 1)
    share = u - low
    index = jnp.stack([low, low + 1]).reshape(-1)
    parts = (jnp.stack([1.0 - share, share]) * weight).reshape(-1)
    both = jnp.broadcast_to(nats, (2, *nats.shape)).reshape(-1)
    add = lambda values: jax.ops.segment_sum(values, index, num_segments=last + 1)
    nats_G, weight_G = decay * self.nats_G + add(parts * both), decay * self.weight_G + add(parts)
    keep_G = jnp.maximum(_LEAST_WEIGHT / weight_G, 1.0)  # a knot that is no longer measured keeps its mean
    return self.replace(nats_G=keep_G * nats_G, weight_G=keep_G * weight_G)


def isotonic_decreasing(values_G: jax.Array, weights_G: jax.Array) -> jax.Array:
  """The weighted least-squares fit of a never-rising sequence, by the max-min formula: min over j <= i of the max over
  k >= i of the weighted mean of j..k (Robertson, Wright & Dykstra, 1988). O(G^2) memory, for short sequences."""
  zero = jnp.zeros(1, values_G.dtype)
  sums = jnp.concatenate([zero, jnp.cumsum(values_G * weights_G)])
  mass = jnp.concatenate([zero, jnp.cumsum(weights_G)])
  j, k = jnp.arange(values_G.shape[0])[:, None], jnp.arange(values_G.shape[0])[None, :]
  mean_JxK = (sums[k + 1] - sums[j]) / jnp.where(k >= j, mass[k + 1] - mass[j], 1.0)
  mean_JxK = jnp.where(k >= j, mean_JxK, -jnp.inf)
  best_JxI = jax.lax.cummax(mean_JxK, axis=1, reverse=True)  # max over k >= i, for every j
  best_JxI = jnp.where(j <= k, best_JxI, jnp.inf)
  return jnp.min(best_JxI, axis=0)


def precision_at(warp: Warp, time: jax.Array) -> jax.Array:
  """The warp's precision (...) with exact ends: 0 where t = 1; at t = 0, where none is needed, 0 too."""
  return jnp.where((time >= 1.0) | (time <= 0.0), 0.0, warp.precision(time))
