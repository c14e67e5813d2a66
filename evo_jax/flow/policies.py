"""Which tokens move in a pass, and how far: what makes a path of a network's answers. Pure functions.

A policy is asked once a pass, after the network was read, and gives the times that the window's tokens move to. It may
look at all that a `Reading` holds, which is what a sampler knows, and never at a token that is not known yet. The same
object therefore runs in the bound (`elbo.path_cost`) and in the sampler (`sample.sample_window`), and the price that
the one measures is the price of what the other does.

Letters in names: T tokens of a window, K passes, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.flow import latents as latents_lib
from evo_jax.flow import schedules
from evo_jax.flow import warp as warp_lib

_SPREAD_ROUNDS = 3
_SEED = 1e3  # bits: more than any entropy
# Steps of t that are tried, from 1/32 to 1; the first is the least.
_CONTROL_STEPS = tuple(2.0 ** (i / 2 - 5) for i in range(11))


@flax.struct.dataclass
class Observation:
  """What one pass has told.

  index: int32 scalar, the pass's number from 0. time: (..., T) progressions. log_belief: (..., T, V) in nats, the
  belief about every token (of no meaning where it is known). uncertainty: scalar, CE(0) in nats, what a token costs
  of which nothing is known. motion: where the tokens' latents are on the flow; codes_VxM: the codes; warp:
  precisions by time.
  """

  index: jax.Array
  time: jax.Array
  log_belief: jax.Array
  uncertainty: jax.Array
  motion: latents_lib.SolverState
  codes_VxM: jax.Array
  warp: warp_lib.Warp

  @property
  def unknown(self) -> jax.Array:
    """(..., T) bool: t > 0."""
    return self.time > 0.0

  @property
  def leftmost(self) -> jax.Array:
    """(..., T) bool: the first unknown token."""
    return self.unknown & (jnp.cumsum(self.unknown, axis=-1) == 1)

  @property
  def entropy(self) -> jax.Array:
    """(..., T) the beliefs' entropies in nats."""
    return -jnp.sum(jnp.exp(self.log_belief) * self.log_belief, axis=-1)


class Policy(Protocol):
  def __call__(self, reading: Observation) -> jax.Array:
    """Times (..., T), or broadcast to it, nowhere above reading.time; 0 makes a token known."""


@flax.struct.dataclass
class TimeGrid:
  """Times that were fixed beforehand, whatever is read: times_KxT (K + 1, T), row k before pass k."""

  times_KxT: jax.Array

  def __call__(self, reading: Observation) -> jax.Array:
    return self.times_KxT[reading.index + 1]


@flax.struct.dataclass
class LearnedClock:
  """The learned clock in `passes` passes (int32 scalar); `delay` and `sharpness` (..., T) are inferred anew for each
  window."""

  passes: jax.Array
  delay: jax.Array | None = None
  sharpness: jax.Array | None = None

  def __call__(self, reading: Observation) -> jax.Array:
    time = schedules.learned_clock(self.delay, self.sharpness, (reading.index + 1) / self.passes)
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

  def __call__(self, reading: Observation) -> jax.Array:
    return jnp.where(self.rank < self.known_after(reading.index, self.rank.shape[-1]), 0.0, reading.time)


@flax.struct.dataclass
class MostCertain:
  """Jumps of what is certain: of all unknown tokens that score below `threshold`, of the `count` with the lowest score,
  and always of the leftmost.

  by: how a token scores:
    "left"        its place: the leftmost first
    "entropy"     the belief's entropy in bits
    "confidence"  1 - the belief's largest probability
    "maturity"    t_hat = entropy / CE(0), the progression at which a belief is usually that sharp; tokens that do not
                  jump gather evidence up to t_hat, but not below 1 - threshold
  """

  threshold: jax.Array
  count: jax.Array
  by: str = flax.struct.field(pytree_node=False)

  def __call__(self, reading: Observation) -> jax.Array:
    unknown, time = reading.unknown, reading.time
    if self.by == "left":
      score = jnp.broadcast_to(jnp.arange(unknown.shape[-1], dtype=time.dtype), unknown.shape)
    elif self.by == "confidence":
      score = 1.0 - jnp.exp(jnp.max(reading.log_belief, axis=-1))
    else:
      score = reading.entropy / (np.log(2.0) if self.by == "entropy" else reading.uncertainty)
      if self.by == "maturity":
        time = jnp.minimum(time, jnp.maximum(score, 1.0 - self.threshold))
    score = jnp.where(reading.leftmost, -jnp.inf, jnp.where(unknown, score, jnp.inf))
    jumps = unknown & ((score < self.threshold) | (schedules.rank(score) < jnp.maximum(self.count, 1)))
    return jnp.where(jumps, 0.0, time)


@flax.struct.dataclass
class Spread:
  """Jumps that cost each other little, by one threshold in bits: what a token may be thought to lose because another
  jumps in the same pass and it does not see it.

  That loss is the tokens' mutual information. It is at most a token's entropy, so all tokens below the threshold
  jump. And it falls with distance: about CE(0) / d for tokens d apart, so that of the others tokens jump that are far
  enough from each other: always the leftmost, then those that follow a known token, which the network knows best,
  then seeds of new runs, evenly spread from the leftmost on; the most certain first. At 0 the leftmost jumps alone;
  at CE(0) all jump at once.
  """

  threshold: jax.Array

  def __call__(self, reading: Observation) -> jax.Array:
    T = reading.time.shape[-1]
    entropy = reading.entropy / np.log(2.0)
    spacing = reading.uncertainty / np.log(2.0) / jnp.maximum(self.threshold, 1e-6)
    spacing = jnp.ceil(T / jnp.maximum(jnp.floor(T / spacing), 1.0))  # runs of one length, which end together
    place = jnp.arange(T)
    near_TxT = jnp.abs(place[:, None] - place) < spacing
    follows = jnp.pad(~reading.unknown, [(0, 0)] * (entropy.ndim - 1) + [(1, 0)], constant_values=True)[..., :-1]
    even = (place - jnp.argmax(reading.leftmost, axis=-1)[..., None]) % spacing == 0
    score = jnp.where(follows, 0.0, jnp.where(even, _SEED, 2.0 * _SEED)) + entropy
    order = schedules.rank(jnp.where(reading.leftmost, -jnp.inf, jnp.where(reading.unknown, score, jnp.inf)))
    chosen, left = jnp.zeros(order.shape, bool), jnp.broadcast_to(reading.unknown, order.shape)
    # Tokens that come first among all that are near and still left (Luby's independent set).
    for _ in range(_SPREAD_ROUNDS):
      first_TxT = order[..., :, None] <= jnp.where(left, order, T)[..., None, :]
      best = left & jnp.all(first_TxT | ~near_TxT, axis=-1)
      chosen |= best
      left &= ~jnp.any(best[..., None, :] & near_TxT, axis=-1)
    return jnp.where(chosen | (reading.unknown & (entropy < self.threshold)), 0.0, reading.time)


@flax.struct.dataclass
class ErrorControlled:
  """All of a window's tokens together, as on the diagonal, in steps as long as their estimated error allows: the root
  mean square, over the unknown tokens, of what a second-order step would add to z = y / sqrt(lambda),
  whose noise is 1."""

  tolerance: jax.Array

  def __call__(self, reading: Observation) -> jax.Array:
    unknown = reading.unknown
    now = jnp.max(reading.time, axis=-1, keepdims=True)
    code = latents_lib.expected_code(reading.log_belief, reading.codes_VxM)
    best = jnp.maximum(now - _CONTROL_STEPS[0], 0.0)
    for step in _CONTROL_STEPS[1:]:
      time = jnp.maximum(now - step, 0.0)
      precision = jnp.broadcast_to(reading.warp.precision(time), unknown.shape)
      added = latents_lib.multistep_correction(reading.motion, code, precision) / jnp.sqrt(precision)[..., None]
      square = jnp.sum(jnp.where(unknown, jnp.sum(added**2, axis=-1), 0.0), axis=-1, keepdims=True)
      error = jnp.sqrt(square / jnp.maximum(jnp.sum(unknown, axis=-1, keepdims=True), 1))
      best = jnp.where((error <= self.tolerance) & (now < 1.0), time, best)
    return jnp.where(unknown, jnp.minimum(jnp.where(best < schedules.END, 0.0, best), reading.time), 0.0)


def run_until_known(step: Callable, carry: Any, unfinished: Callable, first: int = 0) -> Any:
  """Runs carry = step(carry, index) for passes `first`, ... as long as `unfinished(carry)`."""
  start = (jnp.asarray(first, jnp.int32), carry)
  return jax.lax.while_loop(lambda c: unfinished(c[1]), lambda c: (c[0] + 1, step(c[1], c[0])), start)[1]


def run_policy(policy: Policy, step: Callable, carry: Any, unfinished: Callable, first: int = 0) -> Any:
  """The same for a policy; a grid's passes are scanned."""
  if not isinstance(policy, TimeGrid):
    return run_until_known(step, carry, unfinished, first)
  steps = jnp.arange(first, policy.times_KxT.shape[0] - 1)
  return jax.lax.scan(lambda carry, index: (step(carry, index), None), carry, steps)[0]


def make_policy(
  path: str, tokens: int, rolling_width: float, most: int = 0, s: jax.Array | None = None
) -> Policy | None:
  """The policy of a path's name over windows of `tokens` tokens; None for "ar", which needs no window.

  Grids are filled up with zeros to `most` passes, so that paths of different lengths share compiled code. s: the
  clock of a grid, as in `paths.grid`. Raises UserError where the name is none.
  """
  name, number = schedules.parse_path(path)
  if name == "ar":
    return None
  if name in ("diagonal", "rolling", "streams", "staircase"):
    times = schedules.time_grid(path, tokens, rolling_width, s)
    return TimeGrid(jnp.pad(times, [(0, max(most + 1 - len(times), 0)), (0, 0)]))
  if name == "learned":
    return LearnedClock(np.int32(number))
  if name == "random":
    return RandomOrder(np.int32(min(number, tokens)))
  if name == "spread":
    return Spread(np.float32(number))
  if name == "error":
    return ErrorControlled(np.float32(number))
  if name in ("left", "certain"):
    return MostCertain(np.float32(-np.inf), np.int32(number), "left" if name == "left" else "entropy")
  return MostCertain(np.float32(1.0 - number if name == "confidence" else number), np.int32(1), name)
