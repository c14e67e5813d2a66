"""Which tokens move in a pass, and how far: what makes a path of a network's answers. Pure functions.

A policy is asked once a pass, after the network was read, and gives the times that the window's tokens move to. It may
look at all that a `Reading` holds, which is what a sampler knows, and never at a token that is not known yet. The same
object therefore runs in the bound (`elbo.path_cost`) and in the sampler (`sample.sample_window`), and the price that
the one measures is the price of what the other does.

Letters in names: T tokens of a window, K passes, V vocabulary.
"""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import paths


@flax.struct.dataclass
class Reading:
  """What one pass has told.

  index: int32 scalar, the pass's number from 0. time: (..., T) progressions. log_belief: (..., T, V) in nats, the
  belief about every token (of no meaning where it is known). uncertainty: scalar, CE(0) in nats, what a token costs of which
  nothing is known.
  """

  index: jax.Array
  time: jax.Array
  log_belief: jax.Array
  uncertainty: jax.Array


class Policy(Protocol):

  def __call__(self, reading: Reading) -> jax.Array:
    """Times (..., T), or broadcast to it, nowhere above reading.time; 0 makes a token known."""


@flax.struct.dataclass
class Grid:
  """Times that were fixed beforehand, whatever is read: times_KxT (K + 1, T), row k before pass k."""

  times_KxT: jax.Array

  def __call__(self, reading: Reading) -> jax.Array:
    return self.times_KxT[reading.index + 1]


@flax.struct.dataclass
class Learned:
  """The learned clock in `passes` passes (int32 scalar); `delay` and `sharpness` (..., T) are inferred anew for each
  window."""

  passes: jax.Array
  delay: jax.Array | None = None
  sharpness: jax.Array | None = None

  def __call__(self, reading: Reading) -> jax.Array:
    time = paths.learned_clock(self.delay, self.sharpness, (reading.index + 1) / self.passes)
    return jnp.minimum(time, reading.time)


@flax.struct.dataclass
class RandomOrder:
  """Masked diffusion's reverse process on its linear schedule: in every of `passes` passes (int32 scalar) equally many
  tokens jump, in the order `rank` (..., T) int32, drawn anew for each window."""

  passes: jax.Array
  rank: jax.Array | None = None

  def known_after(self, index: jax.Array, tokens: int) -> jax.Array:
    """How many of `tokens` tokens are known when pass `index` is over (-1: before the first)."""
    return jnp.minimum((index + 1) * tokens // self.passes, tokens)

  def __call__(self, reading: Reading) -> jax.Array:
    return jnp.where(self.rank < self.known_after(reading.index, self.rank.shape[-1]), 0.0, reading.time)


@flax.struct.dataclass
class Certain:
  """Jumps of what is certain: of all unknown tokens that score below `threshold`, of the `count` with the lowest score,
  and always of the leftmost.

  by: how a token scores:
    "left"        its place: the leftmost first
    "entropy"     the belief's entropy in bits
    "confidence"  1 - the belief's largest probability
    "maturity"    t_hat = entropy / CE(0), the progression at which a belief is usually that sharp; tokens that do not
                  jump gather evidence up to min(t, t_hat)
  """

  threshold: jax.Array
  count: jax.Array
  by: str = flax.struct.field(pytree_node=False)

  def __call__(self, reading: Reading) -> jax.Array:
    unknown = reading.time > 0.0
    places = jnp.broadcast_to(jnp.arange(unknown.shape[-1], dtype=reading.time.dtype), unknown.shape)
    leftmost = unknown & (jnp.cumsum(unknown, axis=-1) == 1)
    time = reading.time
    if self.by == "left":
      score = places
    elif self.by == "confidence":
      score = 1.0 - jnp.exp(jnp.max(reading.log_belief, axis=-1))
    else:
      entropy = -jnp.sum(jnp.exp(reading.log_belief) * reading.log_belief, axis=-1)
      score = entropy / (np.log(2.0) if self.by == "entropy" else reading.uncertainty)
      if self.by == "maturity":
        time = jnp.minimum(time, score)
    score = jnp.where(leftmost, -jnp.inf, jnp.where(unknown, score, jnp.inf))
    rank = paths.rank(score)
    jumps = unknown & ((score < self.threshold) | (rank < jnp.maximum(self.count, 1)))
    return jnp.where(jumps, 0.0, time)


def make(path: str, tokens: int, rolling_width: float, most: int = 0) -> Policy | None:
  """The policy of a path's name over windows of `tokens` tokens; None for "ar", which needs no window.

  Grids are filled up with zeros to `most` passes, so that paths of different lengths share compiled code. Raises
  UserError where the name is none.
  """
  name, number = paths.parse(path)
  if name == "ar":
    return None
  if name in ("diagonal", "rolling", "streams", "staircase"):
    times = paths.grid(path, tokens, rolling_width)
    return Grid(jnp.pad(times, [(0, max(most + 1 - len(times), 0)), (0, 0)]))
  if name == "learned":
    return Learned(np.int32(number))
  if name == "random":
    return RandomOrder(np.int32(min(number, tokens)))
  if name in ("left", "certain"):
    return Certain(np.float32(-np.inf), np.int32(number), "left" if name == "left" else "entropy")
  return Certain(np.float32(1.0 - number if name == "confidence" else number), np.int32(1), name)
