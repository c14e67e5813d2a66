"""Windows in training: where they lie, on which path each is, and at which point of it.

Letters in names: B batch, L tokens of a sequence, N windows of a sequence, W tokens of a window, S = W + 1 slots,
M code elements, P paths of the mixture.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import schedules
from evo_jax.flow.warp import Warp, precision_at

LEARNED, STAIRCASE, STREAMS, ERASURE, RAGGED, PARALLEL = (
  config_lib.TRAIN_PATHS.index(name) for name in ("learned", "staircase", "streams", "erasure", "ragged", "parallel")
)
GAUSSIANS = len(config_lib.GAUSSIAN_PATHS)  # paths of a lower index have partial evidence


@flax.struct.dataclass
class WindowDraw:
  """All random numbers of one training step's windows. The first `bound_windows` of each sequence's N windows are
  trained by the bound, on Gaussian paths; the others by cross-entropy, on all paths."""

  anchor: jax.Array  # (B, N) int32: position of the anchor, the token before the window
  path: jax.Array  # (B, N) int32: index into config.TRAIN_PATHS
  time: jax.Array  # (B, N, W): progressions at which the field is read
  time_next: jax.Array  # (B, N, W): where the step from there leads (used for bound windows)
  clock: jax.Array  # (B, N): the shared clock at `time`
  clock_next: jax.Array  # (B, N): and at `time_next`
  front: jax.Array  # (B, N, W) bool: on streams, the tokens that the next pass commits
  steps: jax.Array  # (B, N): K of the path's discretization
  weight: jax.Array  # (B, N): importance weight of the step, 1 / (how much more often than uniformly it is drawn)
  noise: jax.Array  # (B, N, W, M) standard normal
  step_noise: jax.Array  # (B, bound windows, W, M) standard normal
  delay_noise: jax.Array  # (B, N, W) standard normal, for the learned clock
  coin: jax.Array  # (B,) in [0, 1), all the same: decides on self-conditioning
  # (B, N, W) float32, of windows that begin in answers: what each token weighs (`draw_windows`); None: all the same
  token_weight: jax.Array | None = None
  drafts: bool = flax.struct.field(pytree_node=False, default=False)  # whether some windows are on the path parallel
  all_unknown: bool = flax.struct.field(pytree_node=False, default=False)  # whether all are


def draw_windows(
  key: jax.Array,
  batch: int,
  length: int,
  code_dim: int,
  window: config_lib.Window,
  mixture: config_lib.Paths,
  bound_windows: int,
  step_density_G: jax.Array | None = None,
  counted_BxT: jax.Array | None = None,
  answers_BxT: jax.Array | None = None,
) -> WindowDraw:
  """Draws positions, paths and points on them for `batch` sequences of `length` tokens.

  Positions are stratified over the sequence; the point on the path, the path and K come from one low-discrepancy set.

  With `answers`, a window begins at any token of an answer, and lies in it: what is behind the answer's end stays
  unknown and weighs nothing (`_draw_in_answers`).

  Args:
    step_density_G: probabilities of evenly spaced bins of the clock for the bound's steps; None: uniform.
    counted_BxT: (B, L + 1) bool, the tokens that count; windows lie where at least one does. None: all count.
    answers_BxT: (B, L + 1) bool, the tokens of answers, instead of counted_BxT; None: there are no answers.
  """
  N, W = window.count, window.size
  keys = jax.random.split(key, 6)
  point = schedules.low_discrepancy(keys[0], batch * N, 3).reshape(batch, N, 3)
  s, path_u, steps_u = jnp.moveaxis(point, -1, 0)
  uniform = jax.random.uniform(keys[1], (batch, N, 1 + W))
  noise = jax.random.normal(keys[2], (batch, N + bound_windows, W, code_dim))
  by_bound = jnp.arange(N) < bound_windows

  quantile = _stratified(keys[3], uniform[..., 0])
  token_weight = None
  if answers_BxT is None:
    anchor = _draw_anchors(quantile, length, W, counted_BxT)
  else:
    anchor, token_weight = _draw_in_answers(quantile, W, answers_BxT)
  path = _draw_paths(path_u, by_bound, mixture)
  choose_steps = lambda choices: jnp.asarray(choices)[(steps_u * len(choices)).astype(jnp.int32)]
  # The staircase has its own grid of W jumps; in between it is not a staircase.
  steps = jnp.select(
    [path == STAIRCASE, path == LEARNED], [W, choose_steps(mixture.learned_steps)], choose_steps(mixture.steps)
  )
  s, weight = _importance_sampled(s, by_bound, step_density_G)
  index = jnp.floor(s * steps)
  clock = jnp.where(by_bound | (path == STAIRCASE), index / steps, s)
  clock_next = jnp.where(index + 1 >= steps, 1.0, (index + 1) / steps)
  stream_length = -(-W // choose_steps(mixture.stream_counts))
  time, time_next, front = _times(mixture, path, s, clock, clock_next, uniform[..., 1:], steps_u, stream_length)
  return WindowDraw(
    anchor=anchor,
    path=path,
    time=time,
    time_next=time_next,
    clock=clock,
    clock_next=clock_next,
    front=front,
    steps=steps,
    weight=weight,
    noise=noise[:, :N],
    step_noise=noise[:, N:],
    delay_noise=jax.random.normal(keys[4], (batch, N, W)),
    coin=jnp.broadcast_to(jax.random.uniform(keys[5]), (batch,)),
    token_weight=token_weight,
    drafts=mixture.parallel > 0,
    all_unknown=mixture.all_unknown and not bound_windows,
  )


Redraw = Callable[[WindowDraw], WindowDraw]  # a pure function that changes a step's draw


def follow(draw: WindowDraw, path: Callable, instead_of: str) -> WindowDraw:
  """The draw with the windows of a Gaussian path on a path of one's own, path(s, tokens) as in `schedules.OwnPath`, at
  the clocks that were drawn; in `paths` and the metrics it goes by the other's name."""
  times = jax.vmap(jax.vmap(lambda s: jnp.broadcast_to(path(s, draw.time.shape[-1]), draw.time.shape[-1:])))
  chosen = (draw.path == config_lib.GAUSSIAN_PATHS.index(instead_of))[..., None]
  time_next = jnp.where((draw.clock_next >= 1.0)[..., None], 0.0, _snap(times(draw.clock_next)))
  return draw.replace(
    time=jnp.where(chosen, _snap(times(draw.clock)), draw.time),
    time_next=jnp.where(chosen, time_next, draw.time_next),
  )


def _stratified(key, uniform_BxN):
  """Quantiles (B, N) in [0, 1), one in each of N strata, which are rotated at random: no window number prefers one."""
  batch, N = uniform_BxN.shape
  stratum = (jnp.arange(N) + jax.random.randint(key, (batch, 1), 0, N)) % N
  return (stratum + uniform_BxN) / N


def _draw_anchors(quantile_BxN, length, size, counted_BxT):
  """Anchors (B, N) at quantiles of the possible ones."""
  if counted_BxT is None:
    return jnp.minimum((quantile_BxN * (length - size + 1)).astype(jnp.int32), length - size)
  # Anchors behind which at least one token counts; in a sequence where none does, any: its windows count nothing.
  sums = jnp.pad(jnp.cumsum(counted_BxT, axis=1), ((0, 0), (1, 0)))
  possible = sums[:, size + 1 :] - sums[:, 1:-size] > 0  # (B, L - W + 1)
  return _pick(quantile_BxN, possible)


def _draw_in_answers(quantile_BxN, size, answers_BxT):
  """Anchors (B, N) in front of tokens of answers, and the weights (B, N, size) of the windows' tokens.

  Token j of an answer, from 0, is in min(j + 1, size) of the windows that can be drawn. It weighs 1 / min(j + 1, size),
  times the sequence's answer tokens per window, so that the sum over windows of weighted values is, in expectation, the
  sum over all tokens of answers of a token's value, averaged over the windows that it can be in: no answer, however
  short, and no place in one counts more than another.
  """
  position = jnp.arange(answers_BxT.shape[1])
  answers = answers_BxT & (position > 0)  # the first token is context only
  anchor = _pick(quantile_BxN, answers[:, 1:])
  place = position - jax.lax.cummax(jnp.where(answers, 0, position), axis=1)  # in the answer, from 1; 0: in none
  weight = jnp.where(answers, 1.0 / jnp.clip(place, 1, size), 0.0)
  weight = weight * jnp.sum(answers, axis=1, keepdims=True) / quantile_BxN.shape[1]
  weight = gather_windows(jnp.pad(weight, ((0, 0), (0, size))), anchor, size)[..., 1:]
  return anchor, weight * jnp.cumprod(weight > 0.0, axis=-1)  # up to the end of the answer, none of the next


def _pick(quantile_BxN, possible):
  """Numbers (B, N) of possible anchors (B, anchors), at quantiles of them; where none is possible, of any."""
  possible = possible | ~jnp.any(possible, axis=1, keepdims=True)
  rank = jnp.cumsum(possible, axis=1)  # from 1
  wanted = jnp.minimum((quantile_BxN * rank[:, -1:]).astype(jnp.int32) + 1, rank[:, -1:])
  return jax.vmap(jnp.searchsorted)(rank, wanted).astype(jnp.int32)


def _draw_paths(path_u_BxN, by_bound_N, mixture):
  """Indices (B, N) into config.TRAIN_PATHS, by the mixture's weights. On jumps alone the bound is the cross-entropy:
  windows trained by the bound take the Gaussian paths."""
  weights = np.array([getattr(mixture, name) for name in config_lib.TRAIN_PATHS])
  gaussian = weights * (np.arange(len(weights)) < GAUSSIANS)

  def pick(weights):
    edges = jnp.asarray(np.cumsum(weights / max(weights.sum(), 1e-9))[:-1], jnp.float32)
    return jnp.searchsorted(edges, path_u_BxN.reshape(-1), side="right").reshape(path_u_BxN.shape)

  return jnp.where(by_bound_N, pick(gaussian), pick(weights))


def _importance_sampled(s_BxN, by_bound_N, density_G):
  """Points of the clock for the bound's windows drawn by a density, and importance weights (B, N); the others as they
  are."""
  weight = jnp.ones_like(s_BxN)
  if density_G is None:
    return s_BxN, weight
  bins = len(density_G)
  edges = jnp.concatenate([jnp.zeros(1), jnp.cumsum(density_G)])
  s = jnp.interp(s_BxN, edges / edges[-1], jnp.linspace(0.0, 1.0, len(edges)))
  index = jnp.minimum((s * bins).astype(jnp.int32), bins - 1)
  weight = jnp.where(by_bound_N, 1.0 / (bins * density_G[index]), weight)
  return jnp.where(by_bound_N, jnp.minimum(s, 1.0 - 1e-6), s_BxN), weight


def _times(mixture, path, s, clock, clock_next, uniform_BxNxW, steps_u, stream_length):
  """Progressions (B, N, W) at the point on the path and at the step's end, and the front of streams."""
  W = uniform_BxNxW.shape[-1]
  index = jnp.arange(W)
  in_stream = index % stream_length[..., None]
  reached = jnp.floor(s[..., None] * stream_length[..., None])
  jumps = {
    "streams": in_stream >= reached,
    "erasure": _erased(mixture, s, uniform_BxNxW),
    "ragged": _ragged(s, uniform_BxNxW, steps_u),
    "parallel": jnp.ones(uniform_BxNxW.shape, bool),
  }

  def times(clock):
    by_path = []
    for name in config_lib.TRAIN_PATHS:
      if name in jumps:
        by_path.append(jumps[name])
      else:  # the diagonal stands in for the learned clock until it is inferred
        name = "diagonal" if name == "learned" else name
        linear = schedules.linear_clock(name, W, mixture.rolling_width, uniform_BxNxW)
        by_path.append(_snap(linear(clock[..., None])))
    stacked_PxBxNxW = jnp.stack([jnp.broadcast_to(t, uniform_BxNxW.shape).astype(s.dtype) for t in by_path])
    return jnp.take_along_axis(stacked_PxBxNxW, path[None, ..., None], axis=0)[0]

  time_next = jnp.where((clock_next >= 1.0)[..., None], 0.0, times(clock_next))
  return times(clock), time_next, in_stream == reached


def _erased(mixture, s, uniform_BxNxW):
  """Unknown tokens on the path of erasure: n of a window at random, n uniform in the range's share of 1..W."""
  W = uniform_BxNxW.shape[-1]
  low, high = mixture.erasure_range
  count = jnp.clip(jnp.ceil((low + (high - low) * s) * W), 1, W)[..., None]
  return schedules.rank(uniform_BxNxW) < count


def _ragged(s, uniform_BxNxW, steps_u):
  """Unknown tokens on the ragged path: all are known up to somewhere, the next is unknown, of those behind a random
  share is known."""
  index = jnp.arange(uniform_BxNxW.shape[-1])
  first = jnp.floor(s * uniform_BxNxW.shape[-1])[..., None]
  return (index == first) | ((index > first) & (uniform_BxNxW >= steps_u[..., None] ** 2))


def _snap(time: jax.Array) -> jax.Array:
  """Rounding of a clock's division leaves times a hair from 0 and 1: the ends are exact."""
  return jnp.where(time < 1e-5, 0.0, jnp.where(time > 1.0 - 1e-5, 1.0, time))


def observe_at(
  codes_VxM: jax.Array, warp: Warp, token: jax.Array, time: jax.Array, noise: jax.Array
) -> latents_lib.Latent:
  """The latent of known truth `token` (...) at progressions `time` (...) with standard normal `noise` (..., M)."""
  return latents_lib.Latent(latents_lib.observe(codes_VxM, token, precision_at(warp, time), noise), time, token)


def with_anchor(latent: latents_lib.Latent, anchor_token: jax.Array) -> latents_lib.Latent:
  """A window's latent (..., W) with the clean anchor (...) in front: (..., W + 1)."""
  pad = [(0, 0)] * anchor_token.ndim + [(1, 0)]
  token = jnp.concatenate([anchor_token[..., None], latent.token], axis=-1)
  return latents_lib.Latent(jnp.pad(latent.y, [*pad, (0, 0)]), jnp.pad(latent.time, pad), token)


def gather_windows(values_BxT: jax.Array, anchor_BxN: jax.Array, size: int) -> jax.Array:
  """Slots (B, N, size + 1, ...): what the sequence (B, L + 1, ...) holds at the anchor and the `size` positions after
  it; behind its end what it holds at the end."""
  index = anchor_BxN[..., None] + jnp.arange(size + 1)
  rest = values_BxT.shape[2:]
  flat = index.reshape(index.shape[0], -1, *(1,) * len(rest))
  return jnp.take_along_axis(values_BxT, flat, axis=1, mode="clip").reshape(*index.shape, *rest)


def for_slots(logits: jax.Array) -> jax.Array:
  """Logits (..., W, V) of a window's tokens as those of its slots (..., W + 1, V); the anchor's are not read. (V,)
  stays."""
  return logits if logits.ndim == 1 else jnp.pad(logits, [*[(0, 0)] * (logits.ndim - 2), (1, 0), (0, 0)])
