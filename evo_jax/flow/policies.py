"""Policies: which tokens move in a pass, and how far; with a network's answers they make a path. Pure functions.

A policy is called once per pass, after the network was read, and gives the times that the window's tokens move to. It
may look at all that an `Observation` holds, which is what a sampler knows, and never at a token that is not known yet.
The same object therefore runs in the bound (`bound.path_nll`) and in the samplers (`steppers.sample_window`, decoding),
and the NLL that the one measures is that of what the others do.

Letters in names: T tokens of a window, K passes, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import schedules
from evo_jax.flow.warp import Warp

_SPREAD_ROUNDS = 3
_LATER = 1e3  # bits: more than any entropy
# Steps of t that error control tries, from 1/32 to 1.
_CONTROL_STEPS = tuple(2.0 ** (i / 2 - 5) for i in range(11))


@flax.struct.dataclass
class Observation:
  """What a policy knows after a pass.

  index: int32 scalar, the pass's number from 0. time: (..., T) progressions. log_belief: (..., T, V) in nats, the
  belief about every token (meaningless where it is known). uncertainty: scalar, CE(0) in nats, the cross-entropy of a
  token of which nothing is known. solver: where the tokens' latents are on the flow; codes_VxM: the codes; warp:
  precisions by time.
  """

  index: jax.Array
  time: jax.Array
  log_belief: jax.Array
  uncertainty: jax.Array
  solver: latents_lib.SolverState
  codes_VxM: jax.Array
  warp: Warp

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
  def __call__(self, observation: Observation) -> jax.Array:
    """Times (..., T), or broadcast to it, nowhere above observation.time; 0 makes a token known."""


@flax.struct.dataclass
class TimeGrid:
  """Times that are fixed beforehand: times_KxT (K + 1, T), row k before pass k."""

  times_KxT: jax.Array

  def __call__(self, observation: Observation) -> jax.Array:
    return self.times_KxT[observation.index + 1]


@flax.struct.dataclass
class LearnedClock:
  """The learned clock in `passes` passes (int32 scalar); `delay` and `sharpness` (..., T) are inferred for each
  window."""

  passes: jax.Array
  delay: jax.Array | None = None
  sharpness: jax.Array | None = None

  def __call__(self, observation: Observation) -> jax.Array:
    time = schedules.learned_clock(self.delay, self.sharpness, (observation.index + 1) / self.passes)
    return jnp.minimum(time, observation.time)


@flax.struct.dataclass
class RandomOrder:
  """Masked diffusion's reverse process on its linear schedule: in each of `passes` passes (int32 scalar) equally many
  tokens jump, in the order `rank` (..., T) int32, drawn for each window."""

  passes: jax.Array
  rank: jax.Array | None = None

  def known_after(self, index: jax.Array, tokens: int) -> jax.Array:
    """How many of `tokens` tokens are known after pass `index` (-1: before the first)."""
    return jnp.minimum((index + 1) * tokens // self.passes, tokens)

  def __call__(self, observation: Observation) -> jax.Array:
    return jnp.where(self.rank < self.known_after(observation.index, self.rank.shape[-1]), 0.0, observation.time)


@flax.struct.dataclass
class MostCertain:
  """Jumps of the most certain tokens: all unknown ones that score below `threshold`, the `count` with the lowest
  scores, and always the leftmost.

  by: the score:
    "left"        the token's position: the leftmost first
    "entropy"     the belief's entropy in bits
    "confidence"  1 - the belief's largest probability
    "maturity"    t_hat = entropy / CE(0), the progression at which a belief is usually that sharp; tokens that do not
                  jump gather evidence up to t_hat, but not below 1 - threshold
  """

  threshold: jax.Array
  count: jax.Array
  by: str = flax.struct.field(pytree_node=False)

  def __call__(self, observation: Observation) -> jax.Array:
    unknown, time = observation.unknown, observation.time
    if self.by == "left":
      score = jnp.broadcast_to(jnp.arange(unknown.shape[-1], dtype=time.dtype), unknown.shape)
    elif self.by == "confidence":
      score = 1.0 - jnp.exp(jnp.max(observation.log_belief, axis=-1))
    else:
      score = observation.entropy / (np.log(2.0) if self.by == "entropy" else observation.uncertainty)
      if self.by == "maturity":
        time = jnp.minimum(time, jnp.maximum(score, 1.0 - self.threshold))
    score = jnp.where(observation.leftmost, -jnp.inf, jnp.where(unknown, score, jnp.inf))
    jumps = unknown & ((score < self.threshold) | (schedules.rank(score) < jnp.maximum(self.count, 1)))
    return jnp.where(jumps, 0.0, time)


@flax.struct.dataclass
class Spread:
  """Jumps of tokens with little mutual information, by one threshold in bits: an estimate of what a token loses when
  another jumps in the same pass and it does not see it.

  That loss is the tokens' mutual information. It is at most a token's entropy, so all tokens below the threshold jump.
  And it falls with distance, here about CE(0) / d for tokens d apart, so that of the others those jump that are far
  enough from each other: always the leftmost, then those that follow a known token, which the network knows best, then
  the first tokens of new runs, evenly spaced from the leftmost on; the most certain first. At 0 the leftmost jumps
  alone; at CE(0) all jump at once.
  """

  threshold: jax.Array

  def __call__(self, observation: Observation) -> jax.Array:
    T = observation.time.shape[-1]
    entropy = observation.entropy / np.log(2.0)
    spacing = observation.uncertainty / np.log(2.0) / jnp.maximum(self.threshold, 1e-6)
    spacing = jnp.ceil(T / jnp.maximum(jnp.floor(T / spacing), 1.0))  # runs of equal length, which end together
    position = jnp.arange(T)
    near_TxT = jnp.abs(position[:, None] - position) < spacing
    follows = jnp.pad(~observation.unknown, [(0, 0)] * (entropy.ndim - 1) + [(1, 0)], constant_values=True)[..., :-1]
    even = (position - jnp.argmax(observation.leftmost, axis=-1)[..., None]) % spacing == 0
    score = jnp.where(follows, 0.0, jnp.where(even, _LATER, 2.0 * _LATER)) + entropy
    order = schedules.rank(jnp.where(observation.leftmost, -jnp.inf, jnp.where(observation.unknown, score, jnp.inf)))
    chosen, candidates = jnp.zeros(order.shape, bool), jnp.broadcast_to(observation.unknown, order.shape)
    # Tokens that come first among all near candidates (Luby's independent set).
    for _ in range(_SPREAD_ROUNDS):
      first_TxT = order[..., :, None] <= jnp.where(candidates, order, T)[..., None, :]
      best = candidates & jnp.all(first_TxT | ~near_TxT, axis=-1)
      chosen |= best
      candidates &= ~jnp.any(best[..., None, :] & near_TxT, axis=-1)
    return jnp.where(chosen | (observation.unknown & (entropy < self.threshold)), 0.0, observation.time)


@flax.struct.dataclass
class ErrorControlled:
  """All of a window's tokens together, as on the diagonal, in steps as long as their estimated error allows: the root
  mean square, over the unknown tokens, of what a second-order step would add to z = y / sqrt(lambda), whose noise has
  variance 1."""

  tolerance: jax.Array

  def __call__(self, observation: Observation) -> jax.Array:
    unknown = observation.unknown
    now = jnp.max(observation.time, axis=-1, keepdims=True)
    code = latents_lib.expected_code(observation.log_belief, observation.codes_VxM)
    best = jnp.maximum(now - _CONTROL_STEPS[0], 0.0)
    for step in _CONTROL_STEPS[1:]:
      time = jnp.maximum(now - step, 0.0)
      precision = jnp.broadcast_to(observation.warp.precision(time), unknown.shape)
      added = latents_lib.multistep_correction(observation.solver, code, precision) / jnp.sqrt(precision)[..., None]
      square = jnp.sum(jnp.where(unknown, jnp.sum(added**2, axis=-1), 0.0), axis=-1, keepdims=True)
      error = jnp.sqrt(square / jnp.maximum(jnp.sum(unknown, axis=-1, keepdims=True), 1))
      best = jnp.where((error <= self.tolerance) & (now < 1.0), time, best)
    return jnp.where(unknown, jnp.minimum(jnp.where(best < schedules.END, 0.0, best), observation.time), 0.0)


@flax.struct.dataclass
class OwnPolicy:
  """A policy by a function of one's own: function(observation), or function(observation, number).

  What it asks for is made good: tokens never move back, a time below 0 is 0, a token with none (NaN) stays, and where
  no token of a window would move, its leftmost becomes known, so that every path ends. `function` must be pure, and
  must not mix windows, the leading axes of (..., T), which are others in the bound than in the samplers.
  """

  function: Callable = flax.struct.field(pytree_node=False)
  number: jax.Array | None = None

  def __call__(self, observation: Observation) -> jax.Array:
    time = observation.time
    asked = self.function(observation) if self.number is None else self.function(observation, self.number)
    asked = jnp.broadcast_to(jnp.asarray(asked, time.dtype), time.shape)
    moved = jnp.where(asked < time, jnp.maximum(asked, 0.0), time)
    stands = jnp.all(moved == time, axis=-1, keepdims=True)
    return jnp.where(stands & observation.leftmost, 0.0, moved)


def check_policy(path: schedules.Path, tokens: int, rows: int, config: config_lib.Config) -> None:
  """Raises UserError for a policy of one's own that fails on windows of `tokens` tokens, or does not give a time for
  each; nothing is computed. Any other path passes. rows: of the vocabulary's tables."""
  if not isinstance(path, schedules.OwnPath) or path.fixed:
    return
  policy = OwnPolicy(path.function, None if path.number is None else np.float32(path.number))

  def times(lead: tuple[int, ...]) -> jax.Array:
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    solver = latents_lib.SolverState.start(zeros(*lead, tokens, config.model.code_dim))
    warp = Warp.start(zeros(config.warp.knots), config.warp.precision_max)
    log_belief, codes = zeros(*lead, tokens, rows), zeros(rows, config.model.code_dim)
    return policy(Observation(jnp.int32(0), zeros(*lead, tokens), log_belief, zeros(), solver, codes, warp))

  for lead in ((2,), (2, 3)):  # of samplers, and of the bound
    path.call(jax.eval_shape, lambda lead=lead: times(lead))


def run_until_known(step: Callable, carry: Any, unfinished: Callable, first: int = 0) -> Any:
  """Runs carry = step(carry, index) for passes `first`, ... as long as `unfinished(carry)`."""
  start = (jnp.asarray(first, jnp.int32), carry)
  return jax.lax.while_loop(lambda c: unfinished(c[1]), lambda c: (c[0] + 1, step(c[1], c[0])), start)[1]


def run_policy(policy: Policy, step: Callable, carry: Any, unfinished: Callable, first: int = 0) -> Any:
  """The same for a policy; a time grid's passes are scanned."""
  if not isinstance(policy, TimeGrid):
    return run_until_known(step, carry, unfinished, first)
  steps = jnp.arange(first, policy.times_KxT.shape[0] - 1)
  return jax.lax.scan(lambda carry, index: (step(carry, index), None), carry, steps)[0]


def make_policy(
  path: schedules.Path, tokens: int, rolling_width: float, most: int = 0, s: jax.Array | None = None
) -> Policy | None:
  """The policy that a path's name, or a path of one's own, stands for, over windows of `tokens` tokens; None for "ar",
  which needs no window.

  Time grids are padded with zeros to `most` passes, so that paths of different lengths share compiled code. s: the
  clock of a grid, as in `schedules.time_grid`. Raises UserError for an unknown name, and for a path of one's own whose
  times are not those of a path.
  """
  pad = lambda times: TimeGrid(jnp.pad(times, [(0, max(most + 1 - len(times), 0)), (0, 0)]))
  if isinstance(path, schedules.OwnPath):
    if path.fixed:
      return pad(schedules.own_grid(path, tokens))
    return OwnPolicy(path.function, None if path.number is None else np.float32(path.number))
  name, number = schedules.parse_path(path)
  if name == "ar":
    return None
  if name in ("diagonal", "rolling", "streams", "staircase", "scaffold"):
    return pad(schedules.time_grid(path, tokens, rolling_width, s))
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
