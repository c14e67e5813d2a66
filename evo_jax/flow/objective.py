"""The training objective: autoregressive cross-entropy on the clean stream, and a loss on windows along random paths.

Of a sequence's N windows the first are trained by the variational bound, a single step of a path standing for the
whole; the others by the cross-entropy of their beliefs, which has the same optimum for the network and a smoother
gradient, or by distillation: the KL divergence from the clean stream's belief about the same token. All sums are over
tokens that count, and are divided by the counts of the whole batch (`Counts`), so that microbatches and shards of any
composition add up to the same loss.

Letters in names: B batch, L tokens of a sequence (T = L + 1 with the first, which is context only), N windows,
W tokens of a window, S = W + 1 slots, V vocabulary, M code elements, D width.
"""

import functools

import chex
import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import schedules
from evo_jax.flow.bound import BITS_PER_NAT, Price, Step, infer_clock, token_nll
from evo_jax.flow.interface import Beliefs, Distillation, Network, Teacher, WindowInputs
from evo_jax.flow.statistics import Mean, Measurement, Statistics
from evo_jax.flow.warp import precision_at
from evo_jax.flow.windows import (
  ERASURE,
  GAUSSIANS,
  LEARNED,
  PARALLEL,
  RAGGED,
  STREAMS,
  WindowDraw,
  gather_windows,
  observe_at,
  with_anchor,
)

Metrics = dict[str, Mean]

_FORBIDDEN = -1e9  # the logit of what is ruled out
_TEACHER_TOKENS = 8  # of the clean stream's best ones, which the head scores in training beside a slot's candidates


@flax.struct.dataclass
class Counts:
  """What losses are divided by: tokens that count, and windows, each by the share of its tokens that count; of answers,
  as many windows as their tokens make."""

  tokens: jax.Array | float
  windows: jax.Array | float

  @classmethod
  def of(cls, batch: Batch, draw: WindowDraw | None) -> "Counts":
    """Of a whole batch, before it is cut into shards and microbatches."""
    B, L = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    N = 0 if draw is None else draw.anchor.shape[1]
    if batch.mask is None:
      return cls(float(B * L), float(max(B * N, 1)))
    tokens = jnp.maximum(jnp.sum(batch.mask[:, 1:].astype(jnp.float32)), 1.0)
    if draw is None:
      return cls(tokens, 1.0)
    W = draw.time.shape[-1]
    if batch.answers is not None:
      return cls(tokens, tokens / W)
    counted = gather_windows(batch.counted, draw.anchor, W)[..., 1:].astype(jnp.float32)
    return cls(tokens, jnp.maximum(jnp.sum(counted), 1.0) / W)


def training_loss(
  net: Network,
  statistics: Statistics,
  batch: Batch,
  draw: WindowDraw | None,
  counts: Counts,
  config: config_lib.Loss,
  learned: bool = False,
  clean_frozen: bool = False,
  price: Price | None = None,
) -> tuple[tuple[jax.Array, jax.Array], Measurement, Metrics]:
  """The objective's two terms, and what was measured on the way.

  Args:
    net: the network at the parameters to be trained.
    statistics: read for the warp and the first pass's prior.
    batch: B sequences, or a part of the batch that `counts` is of.
    draw: `draw_windows` for these sequences; None: there are no windows.
    counts: what the terms are divided by.
    config: the weights.
    learned: whether the network infers progression times (config.model.progression).
    clean_frozen: whether nothing that the clean stream reads is trained: it then has no gradient, and its
      cross-entropy, a metric alone, is 0 among the terms.
    price: of a bound's step, where it is not to be its NLL; needs config.integrand = step.

  Returns:
    (ar, window): weighted losses in nats per token; the terms of all parts of a batch are to be added up. A
    Measurement. And metrics in bits per token, unweighted: `bits` (autoregression; where nothing reads the clean
    stream, the windows' cross-entropy), `window_ce`, `window_bound`, `progression_kl`, and the cross-entropy on the
    windows of each path. With distillation, or windows on the path `parallel`, those of `_draft_metrics`.
  """
  chex.assert_rank(batch.tokens, 2)
  chex.assert_type(batch.tokens, int)
  if draw is None:
    return _autoregression(net, batch, counts, config)
  N, W = draw.time.shape[1:]
  chex.assert_shape([draw.time, draw.time_next, draw.front], (len(batch.tokens), N, W))
  read = _read_streams(net, statistics, batch, draw, config, learned, clean_frozen)
  scene, slots, hidden_BxLxD, hidden_BxNxWxD, nats_BxL = read
  step = scene.step(statistics, draw, config)
  distilled = None
  drafts = config.distill or draw.drafts or net.head_candidates
  if hidden_BxLxD is not None and scene.bound < N and drafts:
    distilled = _distill(net, scene, batch, draw, slots, hidden_BxNxWxD, hidden_BxLxD, config)
  clean = None if hidden_BxLxD is None or learned else (Beliefs(hidden_BxLxD), batch.tokens[:, 1:])
  log_p_bound, log_p_ce, log_p_clean = _log_probs(
    net, scene, step, hidden_BxNxWxD, clean, distilled, clean_frozen, config
  )
  if log_p_clean is not None:
    nats_BxL = latents_lib.jump_nll(log_p_clean)
  needs_code = config.integrand == "rate" or price is not None
  expected = _expected_code(net, scene, hidden_BxNxWxD) if needs_code else None
  nats_BxNxW = jnp.where(scene.unknown, latents_lib.jump_nll(jnp.concatenate([log_p_bound[0], log_p_ce], axis=1)), 0.0)
  head = None
  if distilled is not None and net.head_candidates:
    head = _head_terms(net, scene, draw, hidden_BxNxWxD, hidden_BxLxD, distilled, config)
  loss_nats = _loss_nats(scene, nats_BxNxW, distilled, head, config)
  window, path_nats, bound_nats = _window_sums(scene, draw, step.nll(log_p_bound, expected, price), loss_nats, config)
  ar = jnp.zeros(()) if nats_BxL is None or clean_frozen else _sum_counted(nats_BxL, batch) / counts.tokens
  measured = _measurement(statistics, batch, scene, draw, nats_BxNxW, path_nats)
  metrics = _metrics(batch, scene, draw, nats_BxL, nats_BxNxW, bound_nats) | _draft_metrics(
    scene, draw, distilled, head
  )
  terms = config.ar_weight * ar, config.window_weight * window / counts.windows
  return terms, *jax.lax.stop_gradient((measured, metrics))


def _read_streams(net, statistics, batch, draw, config, learned, clean_frozen):
  """Reads both streams: the scene; which slots of windows were read; hidden states of the clean stream (B, L, D), and
  those that are about the windows' tokens (B, N, W, D); and, where clocks are learned, the clean stream's cross-
  entropies (B, L) in nats. What is not read, or not yet, is None."""
  order = _reading_order(config, learned, clean_frozen, whole=draw.time.shape[-1] == batch.tokens.shape[1] - 1)
  fixed = jax.lax.stop_gradient if clean_frozen else lambda x: x
  # Looked up once for both streams: the gradient of a lookup is as large as the table.
  x_BxTxD = fixed(net.embed_tokens(batch.tokens))
  hidden_BxLxD, cache = fixed(_read_clean(net, batch, x_BxTxD)) if order == "clean first" else (None, None)
  nats_BxL = token_nll(net, hidden_BxLxD, batch.tokens, config.chunk) if learned else None
  scene = _Scene.of(net, statistics, batch, draw, config, hidden_BxLxD if learned else None, nats_BxL)
  slots = _slots_read(net, draw, order)
  embed = functools.partial(_embed_windows, net, scene, draw, slots, x_BxTxD, config)
  if order == "joint":
    windows = embed(statistics.log_unigram_V)
    hidden_BxLxD, hidden = net.forward(x_BxTxD[:, :-1], _clean_segments(batch), windows, config.one_pass)
    hidden_BxNxWxD = _contexts(hidden, slots, draw, hidden_BxLxD)
  else:
    clean = hidden_BxLxD, cache
    hidden_BxNxWxD = _read_windows(net, clean, embed, slots, statistics.log_unigram_V, draw, config)
  return scene, slots, hidden_BxLxD, hidden_BxNxWxD, nats_BxL


def _autoregression(net, batch, counts, config):
  """The objective without windows."""
  hidden_BxLxD, _ = net.clean(batch.tokens[:, :-1], _clean_segments(batch))
  nats_BxL = token_nll(net, hidden_BxLxD, batch.tokens, config.chunk)
  ar = config.ar_weight * _sum_counted(nats_BxL, batch) / counts.tokens
  none = jnp.zeros((0,))
  measured = Measurement(batch.tokens[:, 1:], _counted_tokens(batch), none, none, none, none, none, None)
  metrics = {"bits": Mean.of(nats_BxL * BITS_PER_NAT, _counted_tokens(batch))}
  return (ar, jnp.zeros(())), measured, jax.lax.stop_gradient(metrics)


def _reading_order(config: config_lib.Loss, learned: bool, clean_frozen: bool, whole: bool) -> str:
  """How the streams are read: "windows alone", where windows are whole sequences and nothing trains the clean stream;
  "clean first", where windows need more of the clean stream than its keys and values, or it has no gradient; "joint"
  otherwise."""
  if config.ar_weight == 0 and whole:
    return "windows alone"
  if clean_frozen or learned or config.self_conditioning or config.clean_gradient != 1.0:
    return "clean first"
  return "joint"


def _clean_segments(batch: Batch) -> jax.Array | None:
  return None if batch.segments is None else batch.segments[:, :-1]


def _counted_tokens(batch: Batch) -> jax.Array | None:
  return None if batch.mask is None else batch.mask[:, 1:].astype(jnp.float32)


def _sum_counted(values_BxL: jax.Array, batch: Batch) -> jax.Array:
  counted = _counted_tokens(batch)
  return jnp.sum(values_BxL if counted is None else values_BxL * counted)


def _read_clean(net, batch, x_BxTxD):
  """Hidden states and KV cache of the clean stream."""
  return net.clean(batch.tokens[:, :-1], _clean_segments(batch), x_BxTxD[:, :-1])


@flax.struct.dataclass
class _Scene:
  """The windows of a step as the objective sees them; the first of N, `bound` in number, are trained by the bound."""

  token_BxNxS: jax.Array  # the true tokens, the anchor's first
  latent: latents_lib.Latent  # (B, N, W)
  time_next: jax.Array  # (B, N, W)
  kl: jax.Array | None  # (B, bound, W), nats: of the learned clock's delays
  counted: jax.Array | None  # (B, N, W) float32, 0 or what a token weighs; None: all tokens count
  codes_VxM: jax.Array
  fixed_codes_VxM: jax.Array  # the codes as cross-entropy reads them
  bound: int = flax.struct.field(pytree_node=False)

  @classmethod
  def of(cls, net, statistics, batch, draw, config, hidden_BxLxD, nats_BxL):
    """hidden, nats: of the clean stream, where clocks are learned; None otherwise."""
    codes = net.codes() if config.codes != "frozen" else jax.lax.stop_gradient(net.codes())
    W, bound = draw.time.shape[-1], draw.step_noise.shape[1]
    token = gather_windows(batch.tokens, draw.anchor, W)
    is_bound = jnp.arange(token.shape[1]) < bound
    time, time_next, kl = draw.time, draw.time_next, None
    if nats_BxL is not None:
      time, time_next, kl = _learned_times(net, draw, token[..., 1:], is_bound, hidden_BxLxD, nats_BxL)
      kl = kl[:, :bound]
    if draw.token_weight is not None:  # behind an answer's end nothing is known
      time, time_next = (jnp.where(draw.token_weight > 0.0, t, 1.0) for t in (time, time_next))
    latent = observe_at(codes, jax.lax.stop_gradient(statistics.warp), token[..., 1:], time, draw.noise)
    # Cross-entropy only wants codes far apart: by default its windows read them without training them.
    if config.codes == "bound":
      y = jnp.where(is_bound[:, None, None], latent.y, jax.lax.stop_gradient(latent.y))
      latent = latent.replace(y=y)
    fixed = codes if config.codes != "bound" else jax.lax.stop_gradient(codes)
    counted = draw.token_weight
    if counted is None and batch.counted is not None:
      counted = gather_windows(batch.counted, draw.anchor, W)[..., 1:].astype(jnp.float32)
    return cls(token, latent, time_next, kl, counted, codes, fixed, bound)

  @property
  def token_BxNxW(self) -> jax.Array:
    return self.token_BxNxS[..., 1:]

  @property
  def unknown(self) -> jax.Array:
    """(B, N, W) bool."""
    return ~self.latent.known

  def split(self, tree):
    """A tree of (B, N, ...) as those of the windows trained by the bound, and of the others."""
    return (
      jax.tree.map(lambda x: x[:, : self.bound], tree),
      jax.tree.map(lambda x: x[:, self.bound :], tree),
    )

  def mask(self, values: jax.Array) -> jax.Array:
    """Values of the first windows (B, n, W), times what their tokens weigh: zero where they do not count."""
    return values if self.counted is None else values * self.counted[:, : values.shape[1]]

  def step(self, statistics, draw, config) -> Step:
    """The step of the windows trained by the bound."""
    (latent, _), (token, _), (time_next, _) = map(self.split, (self.latent, self.token_BxNxW, self.time_next))
    warp = jax.lax.stop_gradient(statistics.warp)
    return Step.of(self.codes_VxM, warp, latent, token, time_next, draw.step_noise, config.antithetic)


def _learned_times(net, draw, token_BxNxW, is_bound_N, hidden_BxLxD, nats_BxL):
  """The draw's progressions, those of the learned clock on its path; and the KL of its delays (B, N, W) in nats."""
  delay, sharpness, kl = infer_clock(
    net, hidden_BxLxD, nats_BxL, token_BxNxW, draw.anchor, draw.steps, draw.delay_noise
  )
  # Like the codes, clocks are trained by the bound alone: cross-entropy only wants all tokens known at once.
  delay, sharpness = (jnp.where(is_bound_N[:, None], x, jax.lax.stop_gradient(x)) for x in (delay, sharpness))
  on_path = (draw.path == LEARNED)[..., None]
  at = lambda clock, time: jnp.where(on_path, schedules.learned_clock(delay, sharpness, clock[..., None]), time)
  return at(draw.clock, draw.time), at(draw.clock_next, draw.time_next), jnp.where(on_path, kl, 0.0)


def _slots_read(net, draw, order) -> slice:
  """Which of a window's slots, its anchor and its tokens, are computed: see config.window_slots."""
  if order == "windows alone" or not net.reads_clean_anchor:
    return slice(0, draw.time.shape[-1] + 1)
  return slice(1, draw.time.shape[-1] + 1 - draw.all_unknown)


def _embed_windows(net, scene, draw, slots, x_BxTxD, config, prior_logits, previous_hidden=None) -> WindowInputs:
  """The windows' slots, embedded, those of the slice `slots`. prior_logits, previous_hidden (B, N, W, D): as in
  `Evo.embed`."""
  latent = with_anchor(scene.latent, scene.token_BxNxS[..., 0])
  skips_anchor = slots.start > 0
  all_unknown = draw.all_unknown and skips_anchor
  take = lambda tree: jax.tree.map(lambda x: x[:, :, slots], tree)
  latent = take(latent)
  if all_unknown and previous_hidden is None:
    x_D = net.embed_unknown(prior_logits, config.chunk)
    x = jnp.broadcast_to(x_D, (*latent.time.shape, len(x_D)))
    return WindowInputs(draw.anchor, x, latent.time, all_unknown, skips_anchor)
  embeddings = take(gather_windows(x_BxTxD, draw.anchor, scene.latent.time.shape[-1]))
  if previous_hidden is not None:
    previous_hidden = jnp.pad(previous_hidden, ((0, 0), (0, 0), (1, 0), (0, 0)))  # the anchor's are not read
    previous_hidden = scene.split(take(previous_hidden))
  codes = scene.codes_VxM, scene.fixed_codes_VxM
  x = net.embed(scene.split(latent), codes, prior_logits, scene.split(embeddings), previous_hidden, config.chunk)
  return WindowInputs(draw.anchor, jnp.concatenate(x, axis=1), latent.time, all_unknown, skips_anchor)


def _contexts(hidden, slots, draw, hidden_BxLxD):
  """Hidden states (B, N, W, D) that are about the windows' tokens, from those of their slots (B, N, slots, D); where
  the anchor has no slot, about the first token the clean stream's."""
  W = draw.time.shape[-1]
  if slots.start == 0:
    return hidden[:, :, :W]
  first = jnp.take_along_axis(hidden_BxLxD, draw.anchor[..., None], axis=1)
  return jnp.concatenate([first[:, :, None], hidden[:, :, : W - 1]], axis=2)


def _read_windows(net, clean, embed, slots, log_unigram_V, draw, config):
  """Hidden states (B, N, W, D) of the windows' tokens; under self-conditioning of a second pass that reads the first's
  belief, in a share of the steps. clean: the clean stream's hidden states and cache, or (None, None). embed:
  `_embed_windows` by prior and previous hidden states."""
  hidden_BxLxD, cache = _scale_gradient(*clean, config.clean_gradient)
  read = lambda *prior: _contexts(net.window(cache, embed(*prior)), slots, draw, hidden_BxLxD)
  if not config.self_conditioning:
    return read(log_unigram_V)
  twice = draw.coin[0] < config.self_conditioning
  first = lambda: jax.lax.stop_gradient(read(log_unigram_V))
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first))
  previous = jax.lax.cond(twice, first, zeros)
  return read(jnp.where(twice, 0.0, log_unigram_V), previous)


def _scale_gradient(hidden_BxLxD, cache, scale):
  """The clean stream's hidden states and cache with the same values, bit for bit, and their gradient scaled."""
  if scale == 1.0 or cache is None:
    return hidden_BxLxD, cache
  through = lambda x: x + (scale - 1.0) * (x - jax.lax.stop_gradient(x))
  return through(hidden_BxLxD), cache.replace(k=through(cache.k), v=through(cache.v))


def _distill(net, scene, batch, draw, slots, hidden_BxNxWxD, hidden_BxLxD, config) -> Distillation:
  """The beliefs of the windows that are not trained by the bound, (B, N - bound, W), beside the clean stream's; with
  the best tokens that the head scores."""
  _, (hidden, token, latent) = scene.split((hidden_BxNxWxD, scene.token_BxNxW, scene.latent))
  # Without any evidence there is none to add, and a first token whose context is the clean stream's is its own.
  alone = draw.all_unknown and slots.start > 0
  first, evidence = int(alone), () if draw.all_unknown else (latent.y,)
  student = Beliefs(hidden[:, :, first:], evidence, scene.fixed_codes_VxM if evidence else None)
  teacher = _teacher(scene, batch.tokens[:, 1:], draw, hidden_BxLxD, first)
  best = net.head_candidates, _TEACHER_TOKENS if net.head_candidates and config.distill else 0
  found = net.distillation(student, token[..., first:], teacher, best, config.chunk)
  if not alone:
    return found
  pad = lambda x, value: jnp.pad(x, ((0, 0), (0, 0), (1, 0)), constant_values=value)
  log_p = jnp.take_along_axis(found.teacher_log_p_BxL, draw.anchor[:, scene.bound :], axis=1)[..., None]
  return found.replace(
    log_p=jnp.concatenate([log_p, found.log_p], axis=-1),
    kl=pad(found.kl, 0.0),
    overlap=None if found.overlap is None else pad(found.overlap, 1.0),
    best=jnp.pad(found.best, ((0, 0), (0, 0), (1, 0), (0, 0))),
  )


def _teacher(scene, token_BxL, draw, hidden_BxLxD, first) -> Teacher:
  """The clean stream about the tokens, from number `first` on, of the windows that are not trained by the bound."""
  index = draw.anchor[:, scene.bound :, None] + jnp.arange(first, draw.time.shape[-1])
  return Teacher(jax.lax.stop_gradient(hidden_BxLxD), token_BxL, index)


def _log_probs(net, scene, step, hidden_BxNxWxD, clean, distilled, clean_frozen, config):
  """Log-probabilities in nats of the true tokens, in one reading of the vocabulary: for the windows trained by the
  bound a tuple (before the step, and after it, by noise), for the others (B, N - bound, W), for the clean stream (B,
  L).

  clean: beliefs about the clean stream's tokens, and the tokens; None: they are not asked for. distilled: what another
  reading gave of the other windows, and of the clean stream, which is enough where it is frozen; None: nothing.
  """
  (hidden_bound, hidden_ce), (token_bound, token_ce) = map(scene.split, (hidden_BxNxWxD, scene.token_BxNxW))
  latent_bound, latent_ce = scene.split(scene.latent)
  ends = step.ends if config.integrand == "step" else ()
  asked = [(Beliefs(hidden_bound, (latent_bound.y, *ends), scene.codes_VxM), token_bound)]
  if distilled is None:
    asked.append((Beliefs(hidden_ce, (latent_ce.y,), scene.fixed_codes_VxM), token_ce))
  if clean is not None and (distilled is None or not clean_frozen):
    asked.append(clean)
  bound, *rest = net.log_probs(*zip(*asked), config.chunk)
  ce = rest.pop(0)[0] if distilled is None else distilled.log_p
  if rest:
    return bound, ce, rest[0][0]
  return bound, ce, None if clean is None else distilled.teacher_log_p_BxL


@flax.struct.dataclass
class _HeadTerms:
  """What the head makes of the windows' tokens behind the first, (B, N - bound, W - 1): its loss in nats, and the sum
  over a slot's candidates of the smaller of its and the clean stream's probability."""

  nats: jax.Array
  overlap: jax.Array


def _head_terms(net, scene, draw, hidden_BxNxWxD, hidden_BxLxD, distilled, config) -> _HeadTerms:
  """The head's term, on the best tokens of a slot by its own belief, the true token, and, for distillation, the clean
  stream's best ones: the KL divergence from the clean stream's belief, cross-entropy, or both; each belief is
  normalized over these tokens. The token before is the true one."""
  _, (hidden, token) = scene.split((hidden_BxNxWxD, scene.token_BxNxW))
  hidden, previous, token = hidden[:, :, 1:], token[..., :-1], token[..., 1:]
  teacher = _teacher(scene, None, draw, hidden_BxLxD, 1)
  candidates = distilled.best[:, :, 1:]
  scored = jnp.concatenate([candidates, token[..., None], teacher.gather(distilled.teacher_best)], axis=-1)
  again = jnp.any((scored[..., :, None] == scored[..., None, :]) & jnp.tri(scored.shape[-1], k=-1, dtype=bool), axis=-1)
  only_once = lambda logits: jnp.where(again, _FORBIDDEN, logits)
  logits = net.rescore(hidden, previous, scored, net.token_logits(hidden, scored))
  teacher_logits = jax.lax.stop_gradient(net.token_logits(teacher.gather(teacher.hidden_BxLxD), scored))
  log_q, log_p = (jax.nn.log_softmax(only_once(x), axis=-1) for x in (logits, teacher_logits))
  ce = -jnp.sum(jnp.where((scored == token[..., None]) & ~again, log_q, 0.0), axis=-1)
  kl = jnp.sum(jnp.where(again, 0.0, jnp.exp(log_p) * (log_p - log_q)), axis=-1)
  count = candidates.shape[-1]
  p = jnp.exp(teacher_logits - teacher.gather(distilled.teacher_log_sum_BxL)[..., None])[..., :count]
  overlap = jnp.sum(jnp.minimum(jax.nn.softmax(logits[..., :count], axis=-1), p), axis=-1)
  return _HeadTerms(config.distill * kl + (1.0 - config.distill) * ce, overlap)


def _loss_nats(scene, nats_BxNxW, distilled, head, config):
  """The loss (B, N - bound, W) in nats of tokens of the windows that are not trained by the bound: what the network
  is trained by of unknown ones, weighted by their place in the window."""
  nats, unknown = nats_BxNxW[:, scene.bound :], scene.unknown[:, scene.bound :]
  W = nats.shape[-1]
  if config.distill:
    nats = (1.0 - config.distill) * nats + config.distill * jnp.where(unknown, distilled.kl, 0.0)
  if head is not None:
    uninformed = scene.latent.time[:, scene.bound :, 1:] >= 1.0  # the head knows of no evidence
    nats += config.head_weight * jnp.pad(jnp.where(uninformed, head.nats, 0.0), ((0, 0), (0, 0), (1, 0)))
  if config.position_decay:
    weights = jnp.exp(-jnp.arange(W) / config.position_decay)
    nats = nats * (weights / jnp.mean(weights))
  return nats


def _expected_code(net, scene, hidden_BxNxWxD):
  """e_hat (B, bound, W, M) of the windows trained by the bound."""
  hidden, _ = scene.split(hidden_BxNxWxD)
  latent, _ = scene.split(scene.latent)
  log_belief = latents_lib.log_belief(net.logits(hidden), scene.codes_VxM, latent.y)
  return latents_lib.expected_code(log_belief, scene.codes_VxM)


def _window_sums(scene, draw, step_nats, loss_nats, config):
  """The windows' loss, summed over windows, in nats per token of a window; and of the windows trained by the bound
  (B, bound) the NLL bounds of their paths without and with importance weights and KL, in nats per token that counts.

  step_nats: (B, bound, W) NLL of the bound's steps. loss_nats: `_loss_nats` of the others' tokens.
  """
  W = loss_nats.shape[-1]
  steps, weight = draw.steps[:, : scene.bound], draw.weight[:, : scene.bound]
  share = 1.0
  if scene.counted is not None:
    share = jnp.mean(scene.counted[:, : scene.bound], axis=-1)
    share = jnp.where(share > 0.0, share, 1.0)
  # A single step stands for the whole path.
  path_nats = jnp.mean(scene.mask(step_nats), axis=-1) * steps
  kl = 0.0 if scene.kl is None else jnp.mean(scene.mask(scene.kl))
  bound_nats = path_nats * weight + kl
  # With the number of unknown tokens uniform, their mean is the continuous-time bound of masked diffusion.
  among_unknown = ((draw.path == ERASURE) | (draw.path == RAGGED) | (draw.path == STREAMS))[..., None]
  unknown = draw.time > 0.0  # before what lies behind an answer was made so: its tokens weigh the same in any window
  weights = jnp.where(among_unknown, unknown / jnp.maximum(jnp.sum(unknown, axis=-1, keepdims=True), 1), 1.0 / W)
  # On streams the bound asks only for what the next pass commits; half of the weight stays with all, for more signal.
  front = draw.front / jnp.sum(draw.front, axis=-1, keepdims=True)
  weights = jnp.where((draw.path == STREAMS)[..., None], 0.5 * (weights + front), weights)
  if scene.counted is not None:
    loss_nats = loss_nats * scene.counted[:, scene.bound :]
  total = config.bound_weight * jnp.sum(bound_nats) + jnp.sum(loss_nats * weights[:, scene.bound :])
  return total, path_nats / share, bound_nats / share


def _measurement(statistics, batch, scene, draw, nats_BxNxW, path_nats) -> Measurement:
  # Where neighbours are known or not at all, nothing is learned of the NLL under partial evidence.
  partial = scene.unknown & (draw.path < GAUSSIANS)[..., None]
  path_weight = None
  if scene.counted is not None:
    path_weight = jnp.any(scene.counted[:, : scene.bound] > 0, axis=-1).astype(jnp.float32)
  return Measurement(
    token=batch.tokens[:, 1:],
    token_weight=_counted_tokens(batch),
    precision=precision_at(statistics.warp, scene.latent.time),
    nats=nats_BxNxW,
    weight=scene.mask(partial.astype(jnp.float32)),
    clock=draw.clock[:, : scene.bound],
    path_nats=path_nats,
    path_weight=path_weight,
  )


def _metrics(batch, scene, draw, nats_BxL, nats_BxNxW, bound_nats) -> Metrics:
  unknown, bound = scene.unknown, scene.bound
  mean = lambda nats, mask: Mean.of(nats * BITS_PER_NAT, mask)
  metrics = {}
  if nats_BxL is None:
    metrics["bits"] = mean(nats_BxNxW, scene.mask(unknown))
  else:
    metrics["bits"] = mean(nats_BxL, _counted_tokens(batch))
  if bound < nats_BxNxW.shape[1]:
    metrics["window_ce"] = mean(nats_BxNxW[:, bound:], scene.mask(unknown)[:, bound:])
  if bound:
    counted = None if scene.counted is None else jnp.mean(scene.counted[:, :bound], axis=-1)
    metrics["window_bound"] = mean(bound_nats, counted)
  if scene.kl is not None and bound:
    on_path = jnp.broadcast_to((draw.path == LEARNED)[:, :bound, None], scene.kl.shape)
    metrics["progression_kl"] = mean(scene.kl, scene.mask(on_path))
  for i, name in enumerate(config_lib.TRAIN_PATHS):
    metrics[f"ce_{name}"] = mean(nats_BxNxW, scene.mask(unknown & (draw.path == i)[..., None]))
  return metrics


def _draft_metrics(scene, draw, distilled, head) -> Metrics:
  """How well windows draft, of those that are not trained by the bound. Their first token does not count: when tokens
  are verified it comes free. None without a teacher.

  window_kl: the KL divergence from the clean stream's belief to the window's, in bits per unknown token.
  head_loss: the head's term, in bits per token of which nothing is known.
  draft_accept: of windows on the path `parallel`, sum_k prod_{j <= k} (1 - TV_j), with the total variation between the
    clean stream's belief about token j and what it is drafted from: how many drafted tokens rejection sampling accepts
    at temperature 1, in expectation over drafts from windows that have read the text, not the drafts, so far. Drafts
    are from the head, among a slot's candidates; without one from the window's belief, for which the vocabulary must
    not be read in chunks.
  """
  if distilled is None:
    return {}
  time = scene.latent.time[:, scene.bound :, 1:]
  counted = jnp.ones_like(time) if scene.counted is None else scene.counted[:, scene.bound :, 1:]
  metrics = {"window_kl": Mean.of(distilled.kl[..., 1:] * BITS_PER_NAT, counted * (time > 0.0))}
  overlap = None if distilled.overlap is None else distilled.overlap[..., 1:]
  if head is not None:
    metrics["head_loss"] = Mean.of(head.nats * BITS_PER_NAT, counted * (time >= 1.0))
    overlap = head.overlap
  if draw.drafts and overlap is not None:
    accepted = jnp.sum(jnp.cumprod(overlap, axis=-1), axis=-1)
    on_path = (draw.path == PARALLEL)[:, scene.bound :] & jnp.all(counted > 0, axis=-1)
    metrics["draft_accept"] = Mean.of(accepted, on_path)
  return metrics
