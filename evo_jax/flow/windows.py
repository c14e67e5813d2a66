"""Windows: where they lie, on which path, and at which point of it."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import schedules
from evo_jax.flow import warp as warp_lib

LEARNED, STAIRCASE, STREAMS, ERASURE, RAGGED = (
  config_lib.TRAIN_PATHS.index(name) for name in ("learned", "staircase", "streams", "erasure", "ragged")
)
GAUSSIANS = len(config_lib.GAUSSIAN_PATHS)  # paths of a lower index have partial evidence


@flax.struct.dataclass
class WindowDraw:
  """Everything random of one training step's windows. The first `bound_windows` of each sequence's N windows are taught
  by the bound, on Gaussian paths; the others by cross-entropy, on all paths."""

  anchor: jax.Array  # (B, N) int32: position of the anchor, the token before the window
  path: jax.Array  # (B, N) int32: index into config.TRAIN_PATHS
  time: jax.Array  # (B, N, W): progressions at which the field is asked
  time_next: jax.Array  # (B, N, W): where the step from there leads (read for bound windows)
  clock: jax.Array  # (B, N): the shared clock at `time`
  clock_next: jax.Array  # (B, N): and at `time_next`
  front: jax.Array  # (B, N, W) bool: on streams, the tokens that the next pass makes known
  steps: jax.Array  # (B, N): K of the path's discretization
  weight: jax.Array  # (B, N): of the steps, 1 / (how much more often than evenly they are drawn)
  noise: jax.Array  # (B, N, W, M) standard normal
  step_noise: jax.Array  # (B, bound windows, W, M) standard normal
  delay_noise: jax.Array  # (B, N, W) standard normal, for the learned clock
  coin: jax.Array  # (B,) in [0, 1), all the same: decides on self-conditioning


def draw_windows(
  key: jax.Array,
  batch: int,
  length: int,
  code_dim: int,
  window: config_lib.Window,
  mixture: config_lib.Paths,
  bound_windows: int,
  step_density_G: jax.Array | None = None,
) -> WindowDraw:
  """Draws places, paths and points on them for `batch` sequences of `length` tokens.

  Places are stratified over the sequence; the point on the path, the path and K come from one low-discrepancy set.
  step_density_G: probabilities of evenly spaced bins of the clock for the bound's steps; None: all alike.
  """
  N, W = window.count, window.size
  keys = jax.random.split(key, 6)
  s_u, path_u, steps_u = jnp.moveaxis(schedules.low_discrepancy(keys[0], batch * N, 3).reshape(batch, N, 3), -1, 0)
  uniform = jax.random.uniform(keys[1], (batch, N, 1 + W))
  noise = jax.random.normal(keys[2], (batch, N + bound_windows, W, code_dim))
  by_bound = jnp.arange(N) < bound_windows

  # N strata over the places; a random rotation, so that no window number prefers a stratum.
  stratum = (jnp.arange(N) + jax.random.randint(keys[3], (batch, 1), 0, N)) % N
  place = (stratum + uniform[..., 0]) / N
  anchor = jnp.minimum((place * (length - W + 1)).astype(jnp.int32), length - W)

  # On jumps alone the bound is the cross-entropy: windows taught by the bound take the other paths.
  weights = np.array([getattr(mixture, name) for name in config_lib.TRAIN_PATHS])
  gaussian = weights * (np.arange(len(weights)) < GAUSSIANS)
  pick = lambda w: jnp.searchsorted(
    jnp.asarray(np.cumsum(w / max(w.sum(), 1e-9))[:-1], jnp.float32), path_u.reshape(-1), side="right"
  ).reshape(batch, N)
  path = jnp.where(by_bound, pick(gaussian), pick(weights))

  choose_steps = lambda choices: jnp.asarray(choices)[(steps_u * len(choices)).astype(jnp.int32)]
  # The staircase has its own grid of W jumps; in between it is not a staircase.
  steps = jnp.select(
    [path == STAIRCASE, path == LEARNED], [W, choose_steps(mixture.learned_steps)], choose_steps(mixture.steps)
  )
  on_grid = by_bound | (path == STAIRCASE)
  weight = jnp.ones_like(s_u)
  if step_density_G is not None:
    edges = jnp.concatenate([jnp.zeros(1), jnp.cumsum(step_density_G)])
    s = jnp.interp(s_u, edges / edges[-1], jnp.linspace(0.0, 1.0, len(edges)))
    found = jnp.minimum((s * len(step_density_G)).astype(jnp.int32), len(step_density_G) - 1)
    weight = jnp.where(by_bound, 1.0 / (len(step_density_G) * step_density_G[found]), weight)
    s_u = jnp.where(by_bound, jnp.minimum(s, 1.0 - 1e-6), s_u)
  index = jnp.floor(s_u * steps)
  clock = jnp.where(on_grid, index / steps, s_u)
  clock_next = jnp.where(index + 1 >= steps, 1.0, (index + 1) / steps)

  # Which tokens are unknown on the paths that only jump.
  rank = schedules.rank(uniform[..., 1:])
  low, high = mixture.erasure_range
  erased = jnp.clip(jnp.ceil((low + (high - low) * s_u) * W), 1, W)[..., None]
  first = jnp.floor(s_u * W)[..., None]
  places = jnp.arange(W)
  length = -(-W // choose_steps(mixture.stream_counts))[..., None]  # of a stream
  in_stream, reached = places % length, jnp.floor(s_u[..., None] * length)
  ragged = (places == first) | ((places > first) & (uniform[..., 1:] >= steps_u[..., None] ** 2))

  def times(s):
    found = []
    for name in config_lib.TRAIN_PATHS:
      if name == "erasure":
        found.append(rank < erased)
      elif name == "ragged":
        found.append(ragged)
      elif name == "streams":
        found.append(in_stream >= reached)
      else:  # of the learned clock's place the diagonal is a holder, until clocks are inferred
        name = "diagonal" if name == "learned" else name
        found.append(_snap(schedules.linear_clock(name, W, mixture.rolling_width, uniform[..., 1:])(s[..., None])))
    stacked = jnp.stack([jnp.broadcast_to(t, (batch, N, W)).astype(s.dtype) for t in found])
    return jnp.take_along_axis(stacked, path[None, ..., None], axis=0)[0]

  return WindowDraw(
    anchor=anchor,
    path=path,
    steps=steps,
    weight=weight,
    clock=clock,
    clock_next=clock_next,
    time=times(clock),
    front=in_stream == reached,
    time_next=jnp.where((clock_next >= 1.0)[..., None], 0.0, times(clock_next)),
    noise=noise[:, :N],
    step_noise=noise[:, N:],
    delay_noise=jax.random.normal(keys[4], (batch, N, W)),
    coin=jnp.broadcast_to(jax.random.uniform(keys[5]), (batch,)),
  )


def _snap(time: jax.Array) -> jax.Array:
  """Rounding of a clock's division leaves times a hair from 0 and 1: the ends are exact."""
  return jnp.where(time < 1e-5, 0.0, jnp.where(time > 1.0 - 1e-5, 1.0, time))


def observe_at(
  codes_VxM: jax.Array, warp: warp_lib.Warp, token: jax.Array, time: jax.Array, noise: jax.Array
) -> latents_lib.Latent:
  """The latent of known truth `token` (...) at progressions `time` (...) with standard normal `noise` (..., M)."""
  return latents_lib.Latent(
    latents_lib.observe(codes_VxM, token, warp_lib.precision_at(warp, time), noise), time, token
  )


def with_anchor(latent: latents_lib.Latent, anchor_token: jax.Array) -> latents_lib.Latent:
  """A window's latent (..., W) with the clean anchor (...) in front: (..., W + 1)."""
  pad = [(0, 0)] * anchor_token.ndim + [(1, 0)]
  return latents_lib.Latent(
    jnp.pad(latent.y, [*pad, (0, 0)]),
    jnp.pad(latent.time, pad),
    jnp.concatenate([anchor_token[..., None], latent.token], axis=-1),
  )


def gather_windows(sequence_BxT: jax.Array, anchor_BxN: jax.Array, size: int) -> jax.Array:
  """Slots (B, N, size + 1, ...): the anchor's token and the `size` tokens after it, out of the sequence
  (B, L + 1, ...)."""
  index = anchor_BxN[..., None] + jnp.arange(size + 1)
  rest = sequence_BxT.shape[2:]
  flat = index.reshape(index.shape[0], -1, *(1,) * len(rest))
  return jnp.take_along_axis(sequence_BxT, flat, axis=1).reshape(*index.shape, *rest)


def for_slots(logits: jax.Array) -> jax.Array:
  """Logits (..., W, V) of a window's tokens as those of its slots (..., W + 1, V); the anchor's are not
  read. (V,) stays."""
  return logits if logits.ndim == 1 else jnp.pad(logits, [*[(0, 0)] * (logits.ndim - 2), (1, 0), (0, 0)])
