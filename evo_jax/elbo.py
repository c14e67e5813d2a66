"""The training objective and the bound of any path, over an `apply`-like network. Pure functions, no linen.

One variational bound covers every path from t = 1 to t = 0: a path's total of step costs (`flow.step_cost`, and
`flow.jump_cost` where a token becomes known), averaged over the latents' noise, is at least -log p(w) on average under
the data. The staircase path has no Gaussian step and costs exactly the autoregressive cross-entropy, which the clean
stream gives for all positions in one pass. All costs are in nats unless a name says bits.

Letters in names: B batch, L tokens of a sequence, N windows, W tokens of a window, S = W + 1 slots, V vocabulary,
M code elements, K steps.
"""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax import flow
from evo_jax import paths

BITS = 1.0 / np.log(2.0)  # bits in a nat
_UNIGRAM_MEMORY = 1000  # steps after which the unigram estimate forgets as fast as it learns


class Network(Protocol):
  """What the objective needs of a network; `Evo.bind` gives it (see model.py for shapes)."""

  def codes(self): ...
  def clean(self, tokens_BxL): ...
  def window(self, cache, anchor_BxN, x_BxNxSxD, time_BxNxS): ...
  def embed(self, latent, codes_VxM, prior_logits): ...
  def logits(self, hidden): ...


@flax.struct.dataclass
class Statistics:
  """What is measured, not learned by gradient, during training: the time warp and the unigram distribution."""

  warp: paths.Warp
  unigram_V: jax.Array  # float32 probabilities
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
    return Statistics(self.warp.update(measured.precision, measured.nats, measured.weight, decay),
                      self.unigram_V + share * (counts_V - self.unigram_V), self.steps + 1)


@flax.struct.dataclass
class Measurement:
  """A step's clean tokens (any shape), and cross-entropies `nats` at `precision` with `weight` (all one shape)."""

  token: jax.Array
  precision: jax.Array
  nats: jax.Array
  weight: jax.Array


def start_statistics(key: jax.Array, codes_VxM: jax.Array, vocab_size: int, config: config_lib.Warp) -> Statistics:
  """Statistics before training: a uniform unigram, and the warp of a field that knows nothing but the evidence."""
  rows = codes_VxM.shape[0]
  unigram_V = (jnp.arange(rows) < vocab_size) / vocab_size
  warp = paths.Warp.start(jnp.ones(config.knots), config.precision_max)
  token_key, noise_key = jax.random.split(key)
  token = jax.random.randint(token_key, (128,), 0, vocab_size)
  noise = jax.random.normal(noise_key, (128, codes_VxM.shape[1]))

  def entropy(precision):
    y = flow.observe(codes_VxM, token, jnp.broadcast_to(precision, token.shape), noise)
    belief = flow.log_belief(jnp.log(unigram_V + 1e-30), codes_VxM, y)
    return jnp.mean(flow.jump_cost(belief, token))

  return Statistics(paths.Warp.start(jax.lax.map(entropy, warp.precisions), config.precision_max), unigram_V,
                    jnp.zeros((), jnp.int32))


@flax.struct.dataclass
class Draw:
  """Everything random of one training step's windows. The first `bound_windows` of each sequence's N windows are taught
  by the bound, the others by cross-entropy."""

  anchor: jax.Array  # (B, N) int32: position of the anchor, the token before the window
  path: jax.Array  # (B, N) int32: index into config.TRAIN_PATHS
  time: jax.Array  # (B, N, W): progressions at which the field is asked
  time_next: jax.Array  # (B, N, W): where the step from there leads (read for bound windows)
  steps: jax.Array  # (B, N): K of the path's discretization
  noise: jax.Array  # (B, N, W, M) standard normal
  step_noise: jax.Array  # (B, bound windows, W, M) standard normal


def draw_windows(key: jax.Array, batch: int, length: int, code_dim: int, window: config_lib.Window,
                 mixture: config_lib.Paths, bound_windows: int) -> Draw:
  """Draws places, paths and points on them for `batch` sequences of `length` tokens.

  Places are stratified over the sequence; the point on the path, the path and K come from one low-discrepancy set.
  """
  N, W = window.count, window.size
  keys = jax.random.split(key, 4)
  s_u, path_u, steps_u = jnp.moveaxis(paths.low_discrepancy(keys[0], batch * N, 3).reshape(batch, N, 3), -1, 0)
  uniform = jax.random.uniform(keys[1], (batch, N, 1 + W))
  noise = jax.random.normal(keys[2], (batch, N + bound_windows, W, code_dim))

  # N strata over the places; a random rotation, so that no window number prefers a stratum.
  stratum = (jnp.arange(N) + jax.random.randint(keys[3], (batch, 1), 0, N)) % N
  place = (stratum + uniform[..., 0]) / N
  anchor = jnp.minimum((place * (length - W + 1)).astype(jnp.int32), length - W)

  weights = np.array([getattr(mixture, name) for name in config_lib.TRAIN_PATHS])
  edges = np.cumsum(weights / weights.sum())[:-1]
  path = jnp.searchsorted(jnp.asarray(edges, jnp.float32), path_u.reshape(-1), side="right").reshape(batch, N)
  clocks = [paths.clock(name, W, mixture.rolling_width, uniform[..., 1:])
            for name in config_lib.TRAIN_PATHS]
  spread = lambda part: jnp.stack([jnp.broadcast_to(getattr(c, part), (batch, N, W)) for c in clocks])
  choose = lambda stacked: jnp.take_along_axis(stacked, path[None, ..., None], axis=0)[0]
  clock = paths.Clock(choose(spread("start")), choose(spread("width")))

  # The staircase has its own grid of W jumps; in between it is not a staircase.
  jumps = path == config_lib.TRAIN_PATHS.index("staircase")
  choices = jnp.asarray(mixture.steps)
  steps = jnp.where(jumps, W, choices[(steps_u * len(mixture.steps)).astype(jnp.int32)])
  on_grid = jumps | (jnp.arange(N) < bound_windows)
  index = jnp.floor(s_u * steps)
  time_at = lambda s: _snap(clock(s[..., None]))
  return Draw(
      anchor=anchor, path=path, steps=steps,
      time=time_at(jnp.where(on_grid, index / steps, s_u)),
      time_next=jnp.where((index + 1 >= steps)[..., None], 0.0, time_at((index + 1) / steps)),
      noise=noise[:, :N], step_noise=noise[:, N:])


def _snap(time: jax.Array) -> jax.Array:
  """Rounding of a clock's division leaves times a hair from 0 and 1: the ends are exact."""
  return jnp.where(time < 1e-5, 0.0, jnp.where(time > 1.0 - 1e-5, 1.0, time))


def observe_at(codes_VxM: jax.Array, warp: paths.Warp, token: jax.Array, time: jax.Array,
               noise: jax.Array) -> flow.Latent:
  """The latent of known truth `token` (...) at progressions `time` (...) with standard normal `noise` (..., M)."""
  return flow.Latent(flow.observe(codes_VxM, token, precision_at(warp, time), noise), time, token)


def precision_at(warp: paths.Warp, time: jax.Array) -> jax.Array:
  """The warp's precision (...) with exact ends: 0 where t = 1; at t = 0, where none is needed, 0 too."""
  return jnp.where((time >= 1.0) | (time <= 0.0), 0.0, warp.precision(time))


def with_anchor(latent: flow.Latent, anchor_token: jax.Array) -> flow.Latent:
  """A window's latent (..., W) with the clean anchor (...) in front: (..., W + 1)."""
  pad = [(0, 0)] * anchor_token.ndim + [(1, 0)]
  return flow.Latent(jnp.pad(latent.y, [*pad, (0, 0)]), jnp.pad(latent.time, pad),
                     jnp.concatenate([anchor_token[..., None], latent.token], axis=-1))


def gather_windows(sequence_BxT: jax.Array, anchor_BxN: jax.Array, size: int) -> jax.Array:
  """Slots (B, N, size + 1): the anchor's token and the `size` tokens after it, out of the sequence (B, L + 1)."""
  index = anchor_BxN[..., None] + jnp.arange(size + 1)
  return jnp.take_along_axis(sequence_BxT, index.reshape(index.shape[0], -1), axis=1).reshape(index.shape)


def window_logits(net: Network, cache, anchor_BxN: jax.Array, anchor_token_BxN: jax.Array, latent: flow.Latent,
                  codes_VxM: jax.Array, prior_logits: jax.Array) -> jax.Array:
  """Context logits (B, N, W, V) of a window's tokens, of which `latent` (B, N, W) is known."""
  slots = with_anchor(latent, anchor_token_BxN)
  hidden, _ = net.window(cache, anchor_BxN, net.embed(slots, codes_VxM, prior_logits), slots.time)
  return net.logits(hidden[:, :, :-1])


def token_nats(net: Network, hidden_BxLxD: jax.Array, sequence_BxT: jax.Array) -> jax.Array:
  """(B, L) autoregressive cross-entropies in nats of tokens 1..L of the sequences (B, L + 1)."""
  return flow.jump_cost(jax.nn.log_softmax(net.logits(hidden_BxLxD), axis=-1), sequence_BxT[:, 1:])


def training_loss(net: Network, statistics: Statistics, sequence_BxT: jax.Array, draw: Draw | None,
                  config: config_lib.Loss):
  """The objective's two terms and what was measured on the way.

  Args:
    net: the network at the parameters to be taught.
    statistics: read for the warp and the first pass's prior.
    sequence_BxT: (B, L + 1) int32 tokens; the first is context only.
    draw: `draw_windows` for these sequences; None: there are no windows.
    config: the weights.

  Returns:
    (ar, window): weighted losses in nats a token, to be added up or clipped apart; a Measurement; and a dict of scalars
    in bits a token, unweighted: `bits` (autoregression), `window_ce`, `window_bound`, and the cross-entropy on the
    windows of each path.
  """
  hidden, cache = net.clean(sequence_BxT[:, :-1])
  ar = jnp.mean(token_nats(net, hidden, sequence_BxT))
  metrics = {"bits": ar * BITS}
  if draw is None:
    none = jnp.zeros((0,))
    return (config.ar_weight * ar, jnp.zeros(())), Measurement(sequence_BxT[:, 1:], none, none, none), metrics

  codes = net.codes() if config.codes != "frozen" else jax.lax.stop_gradient(net.codes())
  W, bound_windows = draw.time.shape[-1], draw.step_noise.shape[1]
  warp = jax.lax.stop_gradient(statistics.warp)
  tokens = gather_windows(sequence_BxT, draw.anchor, W)
  anchor_token, token = tokens[..., 0], tokens[..., 1:]
  prior = statistics.log_unigram_V
  latent = observe_at(codes, warp, token, draw.time, draw.noise)

  # Cross-entropy only wants codes far apart: by default its windows read them and do not teach them.
  is_bound = jnp.arange(token.shape[1]) < bound_windows
  if config.codes == "bound":
    latent = latent.replace(y=jnp.where(is_bound[:, None, None], latent.y, jax.lax.stop_gradient(latent.y)))
  fixed = codes if config.codes != "bound" else jax.lax.stop_gradient(codes)
  split = lambda tree: (jax.tree.map(lambda x: x[:, :bound_windows], tree),
                        jax.tree.map(lambda x: x[:, bound_windows:], tree))
  latent_b, latent_c = split(latent)
  anchor_b, anchor_c = split(anchor_token)
  x = jnp.concatenate([net.embed(with_anchor(latent_b, anchor_b), codes, prior),
                       net.embed(with_anchor(latent_c, anchor_c), fixed, prior)], axis=1)
  if config.clean_gradient != 1.0:  # the same values, bit for bit, with another gradient
    through = lambda x: x + (config.clean_gradient - 1.0) * (x - jax.lax.stop_gradient(x))
    cache = cache.replace(k=through(cache.k), v=through(cache.v))
  hidden, _ = net.window(cache, draw.anchor, x, with_anchor(latent, anchor_token).time)
  context_b, context_c = split(net.logits(hidden[:, :, :-1]))
  token_b, token_c = split(token)

  unknown = ~latent.known
  belief_b, belief_c = flow.log_belief(context_b, codes, latent_b.y), flow.log_belief(context_c, fixed, latent_c.y)
  nats = jnp.concatenate([flow.jump_cost(belief_b, token_b), flow.jump_cost(belief_c, token_c)], axis=1)
  nats = jnp.where(unknown, nats, 0.0)
  cost_b, _ = take_step(context_b, codes, warp, latent_b, token_b, draw.time_next[:, :bound_windows], draw.step_noise)
  bound_BxN = jnp.mean(cost_b, axis=-1) * draw.steps[:, :bound_windows]
  ce_BxN = jnp.mean(nats[:, bound_windows:], axis=-1)
  window = (config.bound_weight * jnp.sum(bound_BxN) + jnp.sum(ce_BxN)) / (token.shape[0] * token.shape[1])

  nats = jax.lax.stop_gradient(nats)
  mean = lambda values, mask: jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)
  if bound_windows < token.shape[1]:
    metrics["window_ce"] = mean(nats[:, bound_windows:], unknown[:, bound_windows:]) * BITS
  if bound_windows:
    metrics["window_bound"] = jnp.mean(bound_BxN) * BITS
  for i, name in enumerate(config_lib.TRAIN_PATHS):
    metrics[f"ce_{name}"] = mean(nats, unknown & (draw.path == i)[..., None]) * BITS
  # The staircase's neighbours are known or not at all; the warp is the price list of partial knowledge.
  partial = unknown & (draw.path != config_lib.TRAIN_PATHS.index("staircase"))[..., None]
  measured = Measurement(sequence_BxT[:, 1:], precision_at(warp, draw.time), nats, partial.astype(jnp.float32))
  return (config.ar_weight * ar, config.window_weight * window), measured, metrics


def take_step(context: jax.Array, codes_VxM: jax.Array, warp: paths.Warp, latent: flow.Latent, token: jax.Array,
              time_next: jax.Array, noise: jax.Array, antithetic: bool = True) -> tuple[jax.Array, flow.Latent]:
  """Moves the true tokens from `latent` (..., T) to progressions `time_next` (...): costs in nats (...), new latent.

  A known token costs nothing, one that becomes known pays for a jump, any other for its Gaussian increment with
  `noise` (..., M). `antithetic` prices the increment at `noise` and at -`noise` and takes the mean: the same
  expectation without the parts odd in the noise, of which the linear one is nearly all of the variance of a short step
  that stands for its whole path.
  """
  d = jnp.maximum(precision_at(warp, time_next) - precision_at(warp, latent.time), 0.0)
  before = flow.log_belief(context, codes_VxM, latent.y)
  ends = [latent.y + flow.observe(codes_VxM, token, d, n) for n in ([noise, -noise] if antithetic else [noise])]
  costs = [flow.step_cost(before, flow.log_belief(context, codes_VxM, y), token) for y in ends]
  cost = jnp.where(time_next <= 0.0, flow.jump_cost(before, token), sum(costs) / len(costs))
  return jnp.where(latent.known, 0.0, cost), flow.Latent(ends[0], time_next, token)


def path_cost(field: flow.Field, codes_VxM: jax.Array, warp: paths.Warp, token: jax.Array, times_KxT: jax.Array,
              key: jax.Array, passes: jax.Array | int | None = None) -> jax.Array:
  """One draw of a path's whole price in nats for every token (..., T); its mean bounds -log p from above.

  Steps are priced plainly, not in antithetic pairs: along one trajectory the noise of a step's price is made good by
  the steps after it (what a token gained by luck it does not gain again), and the sum scatters little.

  Args:
    field: asked once before each step.
    token: (..., T) int32, the truth.
    times_KxT: (K + 1, T) progressions: all 1 in the first row, all 0 in the last, never rising.
    key: of the latents' noise.
    passes: K, where rows after K + 1 only fill up: a traced number lets paths of any K share a compilation.
  """
  shape = (*token.shape, codes_VxM.shape[1])
  times = times_KxT.astype(codes_VxM.dtype)

  def step(k, carry):
    latent, total = carry
    noise = jax.random.normal(jax.random.fold_in(key, k), shape, codes_VxM.dtype)
    cost, latent = take_step(field(latent), codes_VxM, warp, latent, token, jnp.broadcast_to(times[k + 1], token.shape),
                             noise, antithetic=False)
    return latent, total + cost

  start = flow.Latent(jnp.zeros(shape, codes_VxM.dtype), jnp.ones(token.shape, codes_VxM.dtype), token)
  passes = times.shape[0] - 1 if passes is None else passes
  return jax.lax.fori_loop(0, passes, step, (start, jnp.zeros(token.shape, codes_VxM.dtype)))[1]


def sequence_cost(net: Network, statistics: Statistics, sequence_BxT: jax.Array, key: jax.Array,
                  times_KxW: jax.Array | None = None, passes: jax.Array | int | None = None) -> jax.Array:
  """Prices in nats (B, L) of the tokens of sequences (B, L + 1), whose first is context only.

  times_KxW: None for autoregression; else the path's grid (K + 1, W), with `passes` as in `path_cost`. Windows of W tokens then tile the sequence (W must
  divide L), each read after the clean text before it: the total is a bound on the sequence's -log p.
  """
  hidden, cache = net.clean(sequence_BxT[:, :-1])
  if times_KxW is None:
    return token_nats(net, hidden, sequence_BxT)
  B, L, W = sequence_BxT.shape[0], sequence_BxT.shape[1] - 1, times_KxW.shape[1]
  anchor_BxN = jnp.broadcast_to(jnp.arange(0, L, W), (B, L // W))
  tokens = gather_windows(sequence_BxT, anchor_BxN, W)
  codes = net.codes()
  field = lambda latent: window_logits(net, cache, anchor_BxN, tokens[..., 0], latent, codes, statistics.log_unigram_V)
  return path_cost(field, codes, statistics.warp, tokens[..., 1:], times_KxW, key, passes).reshape(B, L)
