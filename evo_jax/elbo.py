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
from evo_jax import policies
from evo_jax.vocabulary import Beliefs

BITS = 1.0 / np.log(2.0)  # bits in a nat
_UNIGRAM_MEMORY = 1000  # steps after which the unigram estimate forgets as fast as it learns
_COST_BINS = 16  # of the clock, over which the bound's squared step costs are followed
_ERASURE_PASSES = 32  # of a random order that are priced, at most
_LEARNED, _STAIRCASE, _STREAMS, _ERASURE, _RAGGED = (
    config_lib.TRAIN_PATHS.index(name) for name in ("learned", "staircase", "streams", "erasure", "ragged"))
_GAUSSIANS = len(config_lib.GAUSSIAN_PATHS)  # paths of a lower index have partial evidence


class Network(Protocol):
  """What the objective needs of a network; `Evo.bind` gives it (see model.py for shapes)."""

  def codes(self): ...
  def clean(self, tokens_BxL, x_BxLxD=None): ...
  def window(self, cache, anchor_BxN, x_BxNxSxD, time_BxNxS): ...
  def clean_and_window(self, tokens_BxL, x_BxLxD, anchor_BxN, x_BxNxSxD, time_BxNxS): ...
  def slots(self, past, read_B, x_BxSxD, time_BxS, position_BxS, visible_BxSxS): ...
  def embed(self, latents, codes, prior_logits, own=None, before=None, chunk=0): ...
  def logits(self, hidden): ...
  def log_probs(self, beliefs, tokens, chunk=0): ...
  def embed_tokens(self, tokens): ...
  def clock_prior(self, hidden_BxNxD, size, passes_BxN): ...
  def clock_posterior(self, hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN): ...


@flax.struct.dataclass
class Statistics:
  """What is measured, not learned by gradient, during training: the time warp and the unigram distribution."""

  warp: paths.Warp
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
    bins = jnp.minimum((measured.clock.reshape(-1) * _COST_BINS).astype(jnp.int32), _COST_BINS - 1)
    add = lambda values: jax.ops.segment_sum(values.reshape(-1), bins, num_segments=_COST_BINS)
    squares, count = add(measured.cost**2), add(jnp.ones_like(measured.cost))
    new = jnp.where(count > 0, squares / jnp.maximum(count, 1), self.squares_G)
    return Statistics(self.warp.update(measured.precision, measured.nats, measured.weight, decay),
                      self.unigram_V + share * (counts_V - self.unigram_V),
                      self.squares_G + jnp.maximum(share, 1 - decay) * (new - self.squares_G), self.steps + 1)

  def step_density(self) -> jax.Array:
    """(G,) probabilities of the clock's bins for importance sampling: in proportion to the steps' root mean square
    costs, with a tenth spread evenly, so that no weight exceeds ten."""
    root = jnp.sqrt(self.squares_G) + 1e-9
    return 0.9 * root / jnp.sum(root) + 0.1 / _COST_BINS


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
    belief = flow.belief(jnp.log(unigram_V + 1e-30), codes_VxM, y)
    return jnp.mean(flow.jump_cost(flow.log_prob(belief, token)))

  return Statistics(paths.Warp.start(jax.lax.map(entropy, warp.precisions), config.precision_max), unigram_V,
                    jnp.ones(_COST_BINS), jnp.zeros((), jnp.int32))


@flax.struct.dataclass
class Draw:
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


def draw_windows(key: jax.Array, batch: int, length: int, code_dim: int, window: config_lib.Window,
                 mixture: config_lib.Paths, bound_windows: int, step_density_G: jax.Array | None = None) -> Draw:
  """Draws places, paths and points on them for `batch` sequences of `length` tokens.

  Places are stratified over the sequence; the point on the path, the path and K come from one low-discrepancy set.
  step_density_G: probabilities of evenly spaced bins of the clock for the bound's steps; None: all alike.
  """
  N, W = window.count, window.size
  keys = jax.random.split(key, 6)
  s_u, path_u, steps_u = jnp.moveaxis(paths.low_discrepancy(keys[0], batch * N, 3).reshape(batch, N, 3), -1, 0)
  uniform = jax.random.uniform(keys[1], (batch, N, 1 + W))
  noise = jax.random.normal(keys[2], (batch, N + bound_windows, W, code_dim))
  by_bound = jnp.arange(N) < bound_windows

  # N strata over the places; a random rotation, so that no window number prefers a stratum.
  stratum = (jnp.arange(N) + jax.random.randint(keys[3], (batch, 1), 0, N)) % N
  place = (stratum + uniform[..., 0]) / N
  anchor = jnp.minimum((place * (length - W + 1)).astype(jnp.int32), length - W)

  # On jumps alone the bound is the cross-entropy: windows taught by the bound take the other paths.
  weights = np.array([getattr(mixture, name) for name in config_lib.TRAIN_PATHS])
  gaussian = weights * (np.arange(len(weights)) < _GAUSSIANS)
  pick = lambda w: jnp.searchsorted(jnp.asarray(np.cumsum(w / max(w.sum(), 1e-9))[:-1], jnp.float32),
                                    path_u.reshape(-1), side="right").reshape(batch, N)
  path = jnp.where(by_bound, pick(gaussian), pick(weights))

  choose_steps = lambda choices: jnp.asarray(choices)[(steps_u * len(choices)).astype(jnp.int32)]
  # The staircase has its own grid of W jumps; in between it is not a staircase.
  steps = jnp.select([path == _STAIRCASE, path == _LEARNED], [W, choose_steps(mixture.learned_steps)],
                     choose_steps(mixture.steps))
  on_grid = by_bound | (path == _STAIRCASE)
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
  rank = paths.rank(uniform[..., 1:])
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
        found.append(_snap(paths.clock(name, W, mixture.rolling_width, uniform[..., 1:])(s[..., None])))
    stacked = jnp.stack([jnp.broadcast_to(t, (batch, N, W)).astype(s.dtype) for t in found])
    return jnp.take_along_axis(stacked, path[None, ..., None], axis=0)[0]

  return Draw(
      anchor=anchor, path=path, steps=steps, weight=weight, clock=clock, clock_next=clock_next, time=times(clock),
      front=in_stream == reached,
      time_next=jnp.where((clock_next >= 1.0)[..., None], 0.0, times(clock_next)),
      noise=noise[:, :N], step_noise=noise[:, N:],
      delay_noise=jax.random.normal(keys[4], (batch, N, W)),
      coin=jnp.broadcast_to(jax.random.uniform(keys[5]), (batch,)))


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
  """Slots (B, N, size + 1, ...): the anchor's token and the `size` tokens after it, out of the sequence
  (B, L + 1, ...)."""
  index = anchor_BxN[..., None] + jnp.arange(size + 1)
  rest = sequence_BxT.shape[2:]
  flat = index.reshape(index.shape[0], -1, *(1,) * len(rest))
  return jnp.take_along_axis(sequence_BxT, flat, axis=1).reshape(*index.shape, *rest)


def window_logits(net: Network, cache, anchor_BxN: jax.Array, anchor_token_BxN: jax.Array, latent: flow.Latent,
                  codes_VxM: jax.Array, prior_logits: jax.Array) -> jax.Array:
  """Context logits (B, N, W, V) of a window's tokens, of which `latent` (B, N, W) is known.

  prior_logits: (V,), or (B, N, W, V) from the pass before (self-conditioning).
  """
  slots = with_anchor(latent, anchor_token_BxN)
  (x,) = net.embed((slots,), (codes_VxM,), for_slots(prior_logits))
  hidden = net.window(cache, anchor_BxN, x, slots.time)
  return net.logits(hidden[:, :, :-1])


def for_slots(logits: jax.Array) -> jax.Array:
  """Logits (..., W, V) of a window's tokens as those of its slots (..., W + 1, V); the anchor's are not
  read. (V,) stays."""
  return logits if logits.ndim == 1 else jnp.pad(logits, [*[(0, 0)] * (logits.ndim - 2), (1, 0), (0, 0)])


def gaussian_kl(q: tuple[jax.Array, jax.Array], p: tuple[jax.Array, jax.Array]) -> jax.Array:
  """KL(q || p) in nats (...) of normal distributions given by means and log standard deviations (...)."""
  (mean_q, log_q), (mean_p, log_p) = q, p
  return log_p - log_q + 0.5 * (jnp.exp(2 * (log_q - log_p)) + ((mean_q - mean_p) * jnp.exp(-log_p)) ** 2 - 1.0)


def infer_clock(net: Network, hidden_BxLxD: jax.Array, nats_BxL: jax.Array, token_BxNxW: jax.Array,
                anchor_BxN: jax.Array, passes_BxN: jax.Array,
                noise_BxNxW: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A learned clock for windows: delays, drawn from what the clean text proposes; sharpnesses, which the past alone
  tells; and what the delays cost in nats, KL(q || p): each (B, N, W).

  hidden_BxLxD, nats_BxL: the clean stream's hidden states and cross-entropies. The heads learn from them and do
  not teach them.
  """
  hidden_BxLxD, nats_BxL = jax.lax.stop_gradient((hidden_BxLxD, nats_BxL))
  anchor_hidden = jnp.take_along_axis(hidden_BxLxD, anchor_BxN[..., None], axis=1)
  mean, log_std, sharpness = net.clock_prior(anchor_hidden, token_BxNxW.shape[-1], passes_BxN)
  change = net.clock_posterior(hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN)
  posterior = mean + change[0], log_std + change[1]
  delay = posterior[0] + jnp.exp(posterior[1]) * noise_BxNxW
  return delay, sharpness, gaussian_kl(posterior, (mean, log_std))


def token_nats(net: Network, hidden_BxLxD: jax.Array, sequence_BxT: jax.Array, chunk: int = 0) -> jax.Array:
  """(B, L) autoregressive cross-entropies in nats of tokens 1..L of the sequences (B, L + 1)."""
  ((log_p,),) = net.log_probs((Beliefs(hidden_BxLxD),), (sequence_BxT[:, 1:],), chunk)
  return flow.jump_cost(log_p)


def training_loss(net: Network, statistics: Statistics, sequence_BxT: jax.Array, draw: Draw | None,
                  config: config_lib.Loss, learned: bool = False):
  """The objective's two terms and what was measured on the way.

  Args:
    net: the network at the parameters to be taught.
    statistics: read for the warp and the first pass's prior.
    sequence_BxT: (B, L + 1) int32 tokens; the first is context only.
    draw: `draw_windows` for these sequences; None: there are no windows.
    config: the weights.
    learned: whether the network infers progression times (model.progression).

  Returns:
    (ar, window): weighted losses in nats a token, to be added up or clipped apart; a Measurement; and a dict of `Mean`s
    in bits a token, unweighted: `bits` (autoregression; where nothing reads the clean stream, the windows'
    cross-entropy), `window_ce`, `window_bound`, `progression_kl`, and the cross-entropy on the windows of each path.
  """
  L = sequence_BxT.shape[1] - 1
  # A window of the whole sequence has no past to read: diffusion alone needs no clean stream.
  alone = config.ar_weight == 0 and draw is not None and draw.time.shape[-1] == L
  # Where windows need nothing of the clean stream but its keys and values, one pass can read both.
  waits = alone or learned or config.self_conditioning or config.clean_gradient != 1.0
  together = config.one_pass and draw is not None and not waits
  hidden, cache, metrics = None, None, {}
  # Looked up once for both streams: the gradient of a lookup is as large as the table.
  x_BxTxD = net.embed_tokens(sequence_BxT)
  if not (alone or together):
    hidden, cache = net.clean(sequence_BxT[:, :-1], x_BxTxD[:, :-1])
  if draw is None:
    nats_BxL, none = token_nats(net, hidden, sequence_BxT, config.chunk), jnp.zeros((0,))
    metrics["bits"] = Mean.of(jax.lax.stop_gradient(nats_BxL) * BITS)
    return ((config.ar_weight * jnp.mean(nats_BxL), jnp.zeros(())), Measurement(sequence_BxT[:, 1:], *[none] * 5),
            metrics)

  codes = net.codes() if config.codes != "frozen" else jax.lax.stop_gradient(net.codes())
  W, bound_windows = draw.time.shape[-1], draw.step_noise.shape[1]
  warp = jax.lax.stop_gradient(statistics.warp)
  tokens = gather_windows(sequence_BxT, draw.anchor, W)
  anchor_token, token = tokens[..., 0], tokens[..., 1:]
  is_bound = jnp.arange(token.shape[1]) < bound_windows

  time, time_next, kl, nats_BxL = draw.time, draw.time_next, jnp.zeros(()), None
  if learned:
    nats_BxL = token_nats(net, hidden, sequence_BxT, config.chunk)
    delay, sharpness, kl = infer_clock(net, hidden, nats_BxL, token, draw.anchor, draw.steps, draw.delay_noise)
    # Like the codes, clocks are taught by the bound alone: cross-entropy only wants all tokens known at once.
    delay, sharpness = (jnp.where(is_bound[:, None], x, jax.lax.stop_gradient(x)) for x in (delay, sharpness))
    use = (draw.path == _LEARNED)[..., None]
    time = jnp.where(use, paths.learned_clock(delay, sharpness, draw.clock[..., None]), time)
    time_next = jnp.where(use, paths.learned_clock(delay, sharpness, draw.clock_next[..., None]), time_next)
    kl = jnp.where(use, kl, 0.0)[:, :bound_windows]
  latent = observe_at(codes, warp, token, time, draw.noise)

  # Cross-entropy only wants codes far apart: by default its windows read them and do not teach them.
  if config.codes == "bound":
    latent = latent.replace(y=jnp.where(is_bound[:, None, None], latent.y, jax.lax.stop_gradient(latent.y)))
  fixed = codes if config.codes != "bound" else jax.lax.stop_gradient(codes)
  split = lambda tree: (jax.tree.map(lambda x: x[:, :bound_windows], tree),
                        jax.tree.map(lambda x: x[:, bound_windows:], tree))
  latent_b, latent_c = split(latent)
  anchor_b, anchor_c = split(anchor_token)
  if config.clean_gradient != 1.0 and cache is not None:  # the same values, bit for bit, with another gradient
    through = lambda x: x + (config.clean_gradient - 1.0) * (x - jax.lax.stop_gradient(x))
    cache = cache.replace(k=through(cache.k), v=through(cache.v))

  # The windows taught by the bound, and by cross-entropy.
  parts = slice(None, bound_windows), slice(bound_windows, None)
  slots = with_anchor(latent_b, anchor_b), with_anchor(latent_c, anchor_c)
  own = gather_windows(x_BxTxD, draw.anchor, W)

  def embedded(before, prior):
    """The windows' slots (B, N, S, D), behind the pass that left hidden states `before` (B, N, W, D;
    None: the first)."""
    if before is not None:
      before = jnp.pad(before, ((0, 0), (0, 0), (1, 0), (0, 0)))  # the anchor's are not read
      before = tuple(before[:, some] for some in parts)
    return jnp.concatenate(net.embed(slots, (codes, fixed), prior, tuple(own[:, some] for some in parts), before,
                                     config.chunk), axis=1)

  prior, slot_time = statistics.log_unigram_V, with_anchor(latent, anchor_token).time
  if together:
    hidden, hidden_w = net.clean_and_window(sequence_BxT[:, :-1], x_BxTxD[:, :-1], draw.anchor, embedded(None, prior),
                                            slot_time)
    hidden_w = hidden_w[:, :, :-1]
  else:
    read = lambda before, prior: net.window(cache, draw.anchor, embedded(before, prior), slot_time)[:, :, :-1]
    before = None
    if config.self_conditioning:
      twice = draw.coin[0] < config.self_conditioning
      first = lambda: jax.lax.stop_gradient(read(None, prior))
      before = jax.lax.cond(
          twice, first, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first)))
    hidden_w = read(before, prior if before is None else jnp.where(twice, 0.0, prior))

  # All that is asked of the vocabulary's logits, in one reading of them.
  step = Step.of(codes, warp, latent_b, token[:, :bound_windows], time_next[:, :bound_windows], draw.step_noise,
                 config.antithetic)
  ends = step.ends if config.integrand == "step" else ()
  bound = Beliefs(hidden_w[:, :bound_windows], (latent_b.y, *ends), codes)
  beliefs = [(bound, token[:, :bound_windows]),
             (Beliefs(hidden_w[:, bound_windows:], (latent_c.y,), fixed), token[:, bound_windows:])]
  if hidden is not None and nats_BxL is None:
    beliefs.append((Beliefs(hidden), sequence_BxT[:, 1:]))
  (of_bound, (of_rest,), *of_clean) = net.log_probs(*zip(*beliefs), config.chunk)
  if of_clean:
    nats_BxL = flow.jump_cost(of_clean[0][0])
  ar = jnp.zeros(())
  if nats_BxL is not None:
    ar = jnp.mean(nats_BxL)
    metrics["bits"] = Mean.of(jax.lax.stop_gradient(nats_BxL) * BITS)
  expected = None
  if config.integrand == "rate":
    expected = flow.expected_code(flow.log_belief(net.logits(bound.hidden), codes, latent_b.y), codes)
  cost_b = step.price(of_bound, expected)
  unknown = ~latent.known
  nats = jnp.where(unknown, flow.jump_cost(jnp.concatenate([of_bound[0], of_rest], axis=1)), 0.0)
  whole_b = jnp.mean(cost_b, axis=-1) * draw.steps[:, :bound_windows]  # the path's cost that this step stands for
  bound_BxN = whole_b * draw.weight[:, :bound_windows] + jnp.mean(kl)
  # With the number of unknown tokens uniform, their mean is the continuous-time bound of masked diffusion.
  among = (draw.path == _ERASURE) | (draw.path == _RAGGED) | (draw.path == _STREAMS)
  share = jnp.where(among[..., None], unknown / jnp.maximum(jnp.sum(unknown, axis=-1, keepdims=True), 1), 1.0 / W)
  # Of streams the bound asks only for what the next pass makes known; half of the weight stays with all, for
  # more signal.
  front = draw.front / jnp.sum(draw.front, axis=-1, keepdims=True)
  share = jnp.where((draw.path == _STREAMS)[..., None], 0.5 * (share + front), share)
  ce_BxN = jnp.sum(nats * share, axis=-1)[:, bound_windows:]
  window = (config.bound_weight * jnp.sum(bound_BxN) + jnp.sum(ce_BxN)) / (token.shape[0] * token.shape[1])

  nats, whole_b = jax.lax.stop_gradient((nats, whole_b))
  if bound_windows < token.shape[1]:
    metrics["window_ce"] = Mean.of(nats[:, bound_windows:] * BITS, unknown[:, bound_windows:])
  if bound_windows:
    metrics["window_bound"] = Mean.of(jax.lax.stop_gradient(bound_BxN) * BITS)
  if learned and bound_windows:
    metrics["progression_kl"] = Mean.of(jax.lax.stop_gradient(kl) * BITS, use[:, :bound_windows])
  for i, name in enumerate(config_lib.TRAIN_PATHS):
    metrics[f"ce_{name}"] = Mean.of(nats * BITS, unknown & (draw.path == i)[..., None])
  if alone:
    metrics["bits"] = Mean.of(nats * BITS, unknown)
  # Where neighbours are known or not at all, nothing is learned of the price of partial knowledge.
  partial = unknown & (draw.path < _GAUSSIANS)[..., None]
  measured = Measurement(sequence_BxT[:, 1:], jax.lax.stop_gradient(precision_at(warp, time)), nats,
                         partial.astype(jnp.float32), draw.clock[:, :bound_windows], whole_b)
  return (config.ar_weight * ar, config.window_weight * window), measured, metrics


@flax.struct.dataclass
class Step:
  """A step of the true tokens from latents (..., T) to the next progressions, before it is priced.

  Fields: codes (V, M); `before` and `after`, latents; d (...): the step in precision; ends: latents' vectors y
  (..., T, M) under the step's noise, the first of which is `after`'s.
  """

  codes_VxM: jax.Array
  before: flow.Latent
  after: flow.Latent
  d: jax.Array
  ends: tuple[jax.Array, ...]

  @classmethod
  def of(cls, codes_VxM: jax.Array, warp: paths.Warp, latent: flow.Latent, token: jax.Array, time_next: jax.Array,
         noise: jax.Array, antithetic: bool = True) -> "Step":
    """The step to progressions `time_next` (..., T), with standard normal `noise` (..., T, M), and, `antithetic`,
    with -`noise`, too."""
    d = jnp.maximum(precision_at(warp, time_next) - precision_at(warp, latent.time), 0.0)
    ends = tuple(latent.y + flow.observe(codes_VxM, token, d, n) for n in ([noise, -noise] if antithetic else [noise]))
    return cls(codes_VxM, latent, flow.Latent(ends[0], time_next, token), d, ends)

  def price(self, log_probs: tuple[jax.Array, ...], expected_code: jax.Array | None = None) -> jax.Array:
    """Costs in nats (..., T): a known token costs nothing, one that becomes known pays for a jump, any other for its
    Gaussian increment.

    log_probs: of the token in nats under the belief before, and with each of the `ends` as evidence. The mean over
    antithetic ends has the expectation of one without the parts odd in the noise, of which the linear one is nearly all
    of the variance of a short step that stands for its whole path. expected_code (..., T, M): of the belief before; the
    increment is then priced by its limit for short steps, without noise, and `log_probs` need not have the ends'.
    """
    before, *after = log_probs
    if expected_code is None:
      increment = sum(flow.step_cost(before, log_p) for log_p in after) / len(after)
    else:
      increment = self.d * flow.small_step_rate(self.codes_VxM, expected_code, self.after.token)
    return jnp.where(self.before.known, 0.0, jnp.where(self.after.known, flow.jump_cost(before), increment))


def path_cost(field: flow.Field, codes_VxM: jax.Array, warp: paths.Warp, token: jax.Array, policy: policies.Policy,
              key: jax.Array, prior_logits: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """One draw of a path's whole price in nats for every token (..., T), and the passes (...) that it took.

  The price's mean bounds -log p from above. Steps are priced plainly, not in antithetic pairs: along one trajectory the
  noise of a step's price is made good by the steps after it, and the sum scatters little. `policy` makes the path of
  what is read. prior_logits (V,): what the field gets as the context logits before the first pass; later the last
  pass's; None: the field is asked by the latents alone.
  """
  shape = (*token.shape, codes_VxM.shape[1])
  start = flow.Latent(jnp.zeros(shape, codes_VxM.dtype), jnp.ones(token.shape, codes_VxM.dtype), token)
  context = None if prior_logits is None else jnp.broadcast_to(prior_logits, (*token.shape, prior_logits.shape[-1]))
  uncertainty = warp.entropy()[0]

  def step(carry, index):
    latent, motion, context, total, passes = carry
    noise = jax.random.normal(jax.random.fold_in(key, index), shape, codes_VxM.dtype)
    found = field(latent) if context is None else field(latent, context)
    log_belief = flow.log_belief(found, codes_VxM, latent.y)
    reading = policies.Reading(index, latent.time, log_belief, uncertainty, motion, codes_VxM, warp)
    time_next = jnp.broadcast_to(policy(reading), token.shape).astype(codes_VxM.dtype)
    taken = Step.of(codes_VxM, warp, latent, token, time_next, noise, antithetic=False)
    after, log_after = taken.after, flow.log_belief(found, codes_VxM, taken.after.y)
    cost = taken.price((flow.pick(log_belief, token), flow.pick(log_after, token)))
    precision = jnp.where(after.known, 0.0, precision_at(warp, after.time))
    motion = motion.after(after.y, precision, flow.expected_code(log_belief, codes_VxM))
    return after, motion, None if context is None else found, total + cost, passes + jnp.any(~latent.known, axis=-1)

  carry = (start, flow.Motion.start(jnp.zeros(shape, codes_VxM.dtype)), context,
           jnp.zeros(token.shape, codes_VxM.dtype), jnp.zeros(token.shape[:-1], jnp.int32))
  *_, total, passes = policies.until_known(step, carry, lambda carry: jnp.any(~carry[0].known))
  return total, passes


def erasure_cost(field: flow.Field, codes_VxM: jax.Array, token: jax.Array, policy: policies.RandomOrder,
                 key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A random order's price in nats for every token (..., T), and its passes (...): `path_cost` of the same
  policy in mean.

  Which tokens are known does not depend on what was read before, so each pass is priced by itself, over all tokens that
  it might reveal, and of many passes a stratified sample of _ERASURE_PASSES is enough.
  """
  T = token.shape[-1]
  count = jnp.minimum(policy.passes, _ERASURE_PASSES)

  def price(i, total):
    rank_key, pass_key = jax.random.split(jax.random.fold_in(key, i))
    low, high = i * policy.passes // count, (i + 1) * policy.passes // count  # the stratum's passes
    index = jax.random.randint(pass_key, (), low, high)
    known, after = policy.known_after(index - 1, T), policy.known_after(index, T)
    time = (random_rank(rank_key, token.shape) >= known).astype(codes_VxM.dtype)
    latent = flow.Latent(jnp.zeros((*token.shape, codes_VxM.shape[1]), codes_VxM.dtype), time, token)
    nats = flow.jump_cost(flow.log_prob(field(latent), token))
    share = (after - known) / jnp.maximum(T - known, 1) * (high - low)  # of the unknown that this pass reveals
    return total + jnp.where(latent.known, 0.0, nats * share)

  total = jax.lax.fori_loop(0, count, price, jnp.zeros(token.shape, codes_VxM.dtype))
  return total, jnp.full(token.shape[:-1], policy.passes)


def random_rank(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random orders over the last axis: int32 ranks, uniform over all permutations."""
  return paths.rank(jax.random.uniform(key, shape))


def sequence_cost(net: Network, statistics: Statistics, sequence_BxT: jax.Array, key: jax.Array,
                  policy: policies.Policy | None = None, size: int = 0,
                  self_conditioned: bool = False, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
  """Prices in nats (B, L) of the tokens of sequences (B, L + 1), whose first is context only; and the
  passes (B,) taken.

  policy: None for autoregression; else windows of `size` tokens tile the sequence (`size` must divide L), each read
  after the clean text before it, and the policy makes the path: the total is a bound on the sequence's -log p. A
  learned clock's delays, drawn from what the clean text proposes, pay their KL. chunk: as loss.chunk, for the
  clean stream.
  """
  B, L = sequence_BxT.shape[0], sequence_BxT.shape[1] - 1
  hidden, cache = None, None
  if policy is None or size < L:  # a window of the whole sequence has no past
    hidden, cache = net.clean(sequence_BxT[:, :-1])
  if policy is None:
    return token_nats(net, hidden, sequence_BxT, chunk), jnp.full(B, L)
  anchor_BxN = jnp.broadcast_to(jnp.arange(0, L, size), (B, L // size))
  tokens = gather_windows(sequence_BxT, anchor_BxN, size)
  codes, prior = net.codes(), statistics.log_unigram_V
  field = lambda latent, prior=prior: window_logits(net, cache, anchor_BxN, tokens[..., 0], latent, codes, prior)
  token, kl = tokens[..., 1:], 0.0
  key, start_key = jax.random.split(key)
  if isinstance(policy, policies.RandomOrder):
    if not self_conditioned:
      nats, passes = erasure_cost(field, codes, token, policy, key)
      return nats.reshape(B, L), jnp.sum(passes, axis=1)
    policy = policy.replace(rank=random_rank(start_key, token.shape))
  if isinstance(policy, policies.Learned):
    delay, sharpness, kl = infer_clock(net, hidden, token_nats(net, hidden, sequence_BxT, chunk), token, anchor_BxN,
                                       jnp.broadcast_to(policy.passes, anchor_BxN.shape),
                                       jax.random.normal(start_key, token.shape))
    policy = policy.replace(delay=delay, sharpness=sharpness)
  nats, passes = path_cost(field, codes, statistics.warp, token, policy, key, prior if self_conditioned else None)
  return (nats + kl).reshape(B, L), jnp.sum(passes, axis=1)
