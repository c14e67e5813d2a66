"""Texts being written: exact keys and values, and the four ways to settle tokens. Pure functions over a network.

  ar        the staircase: one token a pass
  flow      windows of tokens, one after another, each down the flow along any path (`policies.make`)
  adaptive  a window that slides with what is settled: its first token is autoregression's, others jump ahead as a
            policy says
  verify    tokens that the windows propose and the next causal pass accepts or corrects: autoregression's distribution

One pass of the network reads some *fresh* slots, known tokens whose keys and values are not final yet, and beside them
window slots that see the fresh ones before their anchor: a finished window enters the cache in the same pass that
begins the next one. Everything a row does depends on the row alone, its draws on its own key, so a text comes out the
same alone and in any batch.

Letters in names: B sequences, C places of the buffers, R fresh slots, T tokens of a window, S slots of a pass,
D width, V vocabulary, M code elements.
"""

from typing import Callable

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import elbo
from evo_jax import flow
from evo_jax import paths
from evo_jax import policies
from evo_jax import sample
from evo_jax.model import DOCUMENT

_START, _TOKEN, _PASS, _POLICY, _DRAFT = range(5)  # what a row's key is folded with first: no two draws share a key


def fresh_slots(window: int) -> int:
  """Slots for fresh tokens in a pass of `adaptive`: as many tokens as it can settle in a row a pass,
  over long texts."""
  return max(16, window // 4)


@flax.struct.dataclass
class Shaping:
  """How beliefs are made sharper before a token is drawn: greedy, or temperature, then top-k, then top-p.

  temperature, top_p: float32 scalars; top_k: 0 keeps all; nucleus: whether top_p is read at all; endless: the
  document token, which ends a text, is ruled out.
  """

  temperature: jax.Array
  top_p: jax.Array
  greedy: bool = flax.struct.field(pytree_node=False, default=False)
  top_k: int = flax.struct.field(pytree_node=False, default=0)
  nucleus: bool = flax.struct.field(pytree_node=False, default=False)
  endless: bool = flax.struct.field(pytree_node=False, default=False)

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Log-probabilities (..., V), -inf where a token is ruled out."""
    if self.endless:
      logits = jnp.where(jnp.arange(logits.shape[-1]) == DOCUMENT, -jnp.inf, logits)
    if self.greedy:
      best = jnp.argmax(logits, axis=-1, keepdims=True)
      return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits / self.temperature
    if self.top_k and self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
      logits = jnp.where(logits >= least, logits, -jnp.inf)
    if self.nucleus:
      # The fewest tokens whose probabilities reach top_p: those before which less than top_p has been gathered.
      p = jax.nn.softmax(logits, axis=-1)
      ordered = jnp.sort(p, axis=-1, descending=True)
      kept = jnp.cumsum(ordered, axis=-1) - ordered < self.top_p
      least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(p >= least, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


@flax.struct.dataclass
class Draft:
  """Tokens proposed for the places after the known ones: token (B, T) int32, log_q (B, T, V) that they were drawn from,
  count (B,), how many of them are there; most (B,), how many a row proposes; accepted, refused (B,) float32, their
  numbers of late, by which `most` is chosen."""

  token: jax.Array
  log_q: jax.Array
  count: jax.Array
  most: jax.Array
  accepted: jax.Array
  refused: jax.Array

  def holding(self, token_BxT: jax.Array, log_q_BxTxV: jax.Array) -> "Draft":
    """With new proposals, of which every row counts its own number."""
    rest = self.token.shape[1] - token_BxT.shape[1]
    return self.replace(token=jnp.pad(token_BxT, [(0, 0), (0, rest)]), count=self.most,
                        log_q=jnp.pad(log_q_BxTxV, [(0, 0), (0, rest), (0, 0)]))


@flax.struct.dataclass
class Texts:
  """Texts on their way, by absolute place; place 0 holds the document token.

  token (B, C) int32 and time (B, C): tokens and their progressions, 0 where known. length (B,): the first place that
  is not known. read (B,): places before it have final keys and values, k and v by layer (B, K, C, E) or (B K, C, E).
  begin, limit (B,): the places where what is written begins, and where it must end. fixed (B, C) bool: tokens that
  were given. settled (B, C): the number of the pass that settled a token, from 1. passes (B,); done (B,) bool; key
  (B,) of each row's draws. motion: latents of unknown tokens, where windows are used; context: the last pass's
  context logits (B, T, V) of the window behind `anchor` (B,), for models that condition themselves; draft: of
  `verify`. guess (B, C) int32: the token believed most when it was read last; kept where a trace is wanted.
  """

  token: jax.Array
  time: jax.Array
  length: jax.Array
  read: jax.Array
  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  begin: jax.Array
  limit: jax.Array
  fixed: jax.Array
  settled: jax.Array
  passes: jax.Array
  done: jax.Array
  key: jax.Array
  motion: flow.Motion | None = None
  context: jax.Array | None = None
  anchor: jax.Array | None = None
  draft: Draft | None = None
  guess: jax.Array | None = None


def start(net: elbo.Network, token_BxC: jax.Array, known_BxC: jax.Array, prefix_BxP: jax.Array, begin: jax.Array,
          limit: jax.Array, key: jax.Array, trace: bool = False, flat: bool = False) -> Texts:
  """Reads the tokens before the first gap.

  token_BxC, known_BxC: the buffers; C must leave room behind the limits for a pass's slots. prefix_BxP: the first
  places of the buffers, at least all before any row's first gap. key: (B,). `limit` is at least the first unknown
  place. flat: keys and values keep batch and heads in one axis (see `attention.enter`); for a single device, since
  one axis cannot be laid out as two.
  """
  C, P = token_BxC.shape[1], prefix_BxP.shape[1]
  _, cache = net.clean(prefix_BxP)
  def pad(a):
    a = jnp.pad(a, [(0, 0), (0, 0), (0, C - P), (0, 0)])
    return a.reshape(-1, *a.shape[2:]) if flat else a

  zeros = jnp.zeros(token_BxC.shape[:1], jnp.int32)
  length = jnp.argmin(known_BxC, axis=1)
  texts = Texts(token_BxC, jnp.where(known_BxC, 0.0, 1.0), length, length - 1, tuple(map(pad, cache.k)),
                tuple(map(pad, cache.v)), begin, limit, known_BxC, jnp.zeros_like(token_BxC), zeros, length >= limit,
                key)
  return texts.replace(guess=jnp.zeros_like(token_BxC)) if trace else texts


def with_motion(texts: Texts, codes_VxM: jax.Array, prior_logits: jax.Array | None = None, tokens: int = 0) -> Texts:
  """Texts with the noise that every place's flow starts from; for models that condition themselves with what a window
  of `tokens` tokens gets before its first pass, prior_logits (V,)."""
  C, M = texts.token.shape[1], codes_VxM.shape[1]
  noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, _START), (C, M), codes_VxM.dtype))(texts.key)
  texts = texts.replace(motion=flow.Motion.start(noise), anchor=texts.length - 1)
  if prior_logits is None:
    return texts
  return texts.replace(context=jnp.broadcast_to(prior_logits, (texts.token.shape[0], tokens, prior_logits.shape[0])))


def with_draft(texts: Texts, tokens: int, rows: int) -> Texts:
  """Texts with nothing proposed yet; `tokens` proposals at most, `rows` = V."""
  B = texts.token.shape[0]
  flat = jnp.zeros(B, jnp.int32)
  zeros = jnp.zeros(B, jnp.float32)
  return texts.replace(draft=Draft(jnp.zeros((B, tokens), jnp.int32), jnp.zeros((B, tokens, rows)), flat,
                                   jnp.full(B, min(tokens, 2), jnp.int32), zeros, zeros))


def at(values_BxC: jax.Array, place_BxT: jax.Array) -> jax.Array:
  """values[b, place[b, t], ...]."""
  index = place_BxT.reshape(*place_BxT.shape, *(1,) * (values_BxC.ndim - 2))
  return jnp.take_along_axis(values_BxC, index, axis=1)


def put(values_BxC: jax.Array, first_B: jax.Array, new_BxT: jax.Array) -> jax.Array:
  """values with new[b] at the places first[b], first[b] + 1, ..."""
  one = lambda row, new, first: jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), first, 0)
  return jax.vmap(one)(values_BxC, new_BxT, first_B)


def draws(texts: Texts, shaping: Shaping, logits_BxTxV: jax.Array, place_BxT: jax.Array) -> jax.Array:
  """Tokens (B, T) int32 for places, each place with its own key: a place is drawn for once."""
  log_p_BxTxV = shaping(logits_BxTxV)
  if shaping.greedy:
    return jnp.argmax(log_p_BxTxV, axis=-1).astype(jnp.int32)

  def one(key, log_p, place):
    key = jax.random.fold_in(jax.random.fold_in(key, _TOKEN), place)
    return jax.random.categorical(key, log_p).astype(jnp.int32)
  return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))(texts.key, log_p_BxTxV, place_BxT)


def pass_keys(texts: Texts, purpose: int = _PASS) -> jax.Array:
  """(B,) keys of each row's pass."""
  return jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, purpose), number))(
      texts.key, texts.passes)


@flax.struct.dataclass
class Slots:
  """Window slots of a pass: x (B, S, D), time (B, S), place (B, S); stop (B, S): each sees clean places before it,
  None: none; sees_slot (B, S, S) bool, or broadcast to it: which of each other they see."""

  x: jax.Array
  time: jax.Array
  place: jax.Array
  stop: jax.Array | None
  sees_slot: jax.Array


def read(net: elbo.Network, texts: Texts, fresh: int, count_B: jax.Array,
         slots: Slots | None = None) -> tuple[jax.Array, jax.Array, Texts]:
  """One pass: `fresh` clean slots from place `texts.read` on, of which `count` (B,) are there, and window slots.

  Returns hidden states (B, R, D) and (B, S, D), and texts whose `read` has moved on by `count`.
  """
  B = texts.token.shape[0]
  place = texts.read[:, None] + jnp.arange(fresh)
  x, stop, time, visible = net.embed_tokens(at(texts.token, place)), place + 1, None, None
  if slots is not None:
    S = slots.x.shape[1]
    x = jnp.concatenate([x, slots.x], axis=1)
    time = jnp.pad(slots.time, [(0, 0), (fresh, 0)])
    place = jnp.concatenate([place, slots.place], axis=1)
    stop = None if slots.stop is None else jnp.concatenate([stop, slots.stop], axis=1)
    visible = jnp.pad(jnp.broadcast_to(slots.sees_slot, (B, S, S)), [(0, 0), (fresh, 0), (0, 0)])
  past = None if stop is None else (texts.k, texts.v)
  hidden, past = net.slots(past, texts.read, fresh, x, time, place, stop, visible)
  if fresh:
    texts = texts.replace(k=past[0], v=past[1], read=texts.read + count_B)
  return hidden[:, :fresh], hidden[:, fresh:], texts


def finish(texts: Texts, token: jax.Array, time: jax.Array, active_B: jax.Array | None = None) -> Texts:
  """Texts after a pass that gave `token` and `time` (B, C): counts it for rows that are `active` (all that are not
  done), and ends rows that are full or have ended."""
  active_B = ~texts.done if active_B is None else active_B & ~texts.done
  token = jnp.where(active_B[:, None], token, texts.token)
  time = jnp.where(active_B[:, None], time, texts.time)
  passes = texts.passes + active_B
  newly = (time <= 0.0) & (texts.time > 0.0)
  length = jnp.argmax(time > 0.0, axis=1)
  place = jnp.arange(token.shape[1])
  ended = (token == DOCUMENT) & (place >= texts.begin[:, None]) & (place < length[:, None]) & ~texts.fixed
  return texts.replace(token=token, time=time, length=length, passes=passes,
                       settled=jnp.where(newly, passes[:, None], texts.settled),
                       done=texts.done | (length >= texts.limit) | jnp.any(ended, axis=1))


def ar(net: elbo.Network, texts: Texts, shaping: Shaping) -> Texts:
  """One pass, one token."""
  hidden, _, after = read(net, texts, 1, 1 * ~texts.done)
  drawn = draws(texts, shaping, net.logits(hidden), texts.length[:, None])
  return finish(after, put(texts.token, texts.length, drawn), put(texts.time, texts.length, jnp.zeros(drawn.shape)))


@flax.struct.dataclass
class Walk:
  """How windows are walked: a policy, and what does not change from call to call. whole: there is one window, the whole
  text from the document token on with what is known of it, and no clean stream: for models of diffusion alone."""

  policy: policies.Policy
  tokens: int = flax.struct.field(pytree_node=False)
  stepper: str = flax.struct.field(pytree_node=False, default="ode")
  self_conditioned: bool = flax.struct.field(pytree_node=False, default=False)
  whole: bool = flax.struct.field(pytree_node=False, default=False)


def window_slots(net: elbo.Network, prior_logits: jax.Array, texts: Texts, anchor_B: jax.Array, tokens: int,
                 whole: bool = False) -> tuple[Slots, flow.Latent, jax.Array]:
  """The slots of one window a row: the anchor at `anchor_B` and the `tokens` places after it, cut off at the limit; the
  latents (B, T) of its tokens, and their places (B, T). prior_logits: (V,) or (B, T, V)."""
  place = anchor_B[:, None] + jnp.arange(tokens + 1)
  there = place < texts.limit[:, None]
  token, time = at(texts.token, place), jnp.where(there, at(texts.time, place), 0.0)
  latent = flow.Latent(at(texts.motion.y, place[:, 1:]), time[:, 1:], token[:, 1:])
  (x,) = net.embed((elbo.with_anchor(latent, token[:, 0]),), (net.codes(),), elbo.for_slots(prior_logits))
  sees_slot = there[:, None, :] | jnp.eye(tokens + 1, dtype=bool)
  stop = None if whole else jnp.broadcast_to(anchor_B[:, None], place.shape)
  return Slots(x, time, place, stop, sees_slot), latent, place[:, 1:]


def believe(net: elbo.Network, after: Texts, hidden: jax.Array, latent: flow.Latent,
            walk: Walk) -> tuple[Texts, jax.Array]:
  """The log beliefs (B, T, V) that a pass's hidden states (B, T + 1, D) give; texts remember the context where the
  walk wants it."""
  context = net.logits(hidden[:, :-1])
  after = after.replace(context=context) if walk.self_conditioned else after
  return after, flow.log_belief(context, net.codes(), latent.y)


def move(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, after: Texts, latent: flow.Latent,
         place: jax.Array, log_belief: jax.Array, walk: Walk, index: jax.Array, shaping: Shaping) -> Texts:
  """What the beliefs (B, T, V) that a pass of `texts` gave do to its window at `place` (B, T)."""
  codes, first = net.codes(), place[:, 0]
  motion = jax.tree.map(lambda a: at(a, place), texts.motion)
  reading = policies.Reading(index, latent.time, log_belief, statistics.warp.entropy()[0], motion, codes,
                             statistics.warp)
  time_next = jnp.minimum(walk.policy(reading), latent.time).astype(latent.time.dtype)
  jumps = (time_next <= 0.0) & ~latent.known
  token = jnp.where(jumps, draws(texts, shaping, log_belief, place), latent.token)
  motion = sample.move(motion, latent.time, time_next, log_belief, codes, statistics.warp,
                       sample.STEPPERS[walk.stepper], pass_keys(texts))
  after = after.replace(motion=jax.tree.map(lambda old, new: put(old, first, new), texts.motion, motion))
  if texts.guess is not None:
    after = after.replace(guess=put(texts.guess, first,
                                    jnp.where(latent.known, latent.token, jnp.argmax(log_belief, axis=-1))))
  inside = place < texts.limit[:, None]
  return finish(after, put(texts.token, first, token),
                put(texts.time, first, jnp.where(inside, time_next, at(texts.time, place))),
                jnp.any(~latent.known, axis=1))


def catch_up(net: elbo.Network, texts: Texts, fresh: int) -> Texts:
  """Passes without a window, until no row has more than `fresh` known tokens to read: behind gaps that were filled."""
  unread = lambda texts: jnp.where(texts.done, 0, texts.length - texts.read)

  def step(texts):
    behind = unread(texts) > fresh
    _, _, texts = read(net, texts, fresh, jnp.where(behind, fresh, 0))
    return texts.replace(passes=texts.passes + behind)

  return jax.lax.while_loop(lambda texts: jnp.any(unread(texts) > fresh), step, texts)


def flow_first(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, walk: Walk,
               shaping: Shaping) -> tuple[Texts, Walk]:
  """The first pass of the next window of every row, which also reads what was settled before; and the walk with what is
  drawn anew for each window."""
  T = walk.tokens
  prior = statistics.log_unigram_V
  if walk.whole:
    fresh, count, anchor = 0, 0, jnp.zeros_like(texts.length)
  else:
    texts = catch_up(net, texts, T)
    fresh, count, anchor = T, jnp.where(texts.done, 0, texts.length - texts.read), texts.length - 1
  slots, latent, place = window_slots(net, prior, texts, anchor, T, walk.whole)
  clean, hidden, after = read(net, texts, fresh, count, slots)
  if isinstance(walk.policy, policies.RandomOrder):
    draw = lambda key: jax.random.uniform(key, (T,))
    walk = walk.replace(policy=walk.policy.replace(rank=paths.rank(jax.vmap(draw)(pass_keys(texts, _POLICY)))))
  if isinstance(walk.policy, policies.Learned):
    last = at(clean, jnp.maximum(count - 1, 0)[:, None])
    passes = jnp.broadcast_to(walk.policy.passes, anchor[:, None].shape)
    mean, log_std, sharpness = (a[:, 0] for a in net.clock_prior(last, T, passes))
    noise = jax.vmap(lambda key: jax.random.normal(key, (T,)))(pass_keys(texts, _POLICY))
    walk = walk.replace(policy=walk.policy.replace(delay=mean + jnp.exp(log_std) * noise, sharpness=sharpness))
  after, log_belief = believe(net, after.replace(anchor=anchor), hidden, latent, walk)
  return move(net, statistics, texts, after, latent, place, log_belief, walk, jnp.zeros((), jnp.int32), shaping), walk


def flow_next(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, walk: Walk, shaping: Shaping,
              index: jax.Array) -> Texts:
  """Pass `index` of the windows that `flow_first` began."""
  prior = texts.context if walk.self_conditioned else statistics.log_unigram_V
  slots, latent, place = window_slots(net, prior, texts, texts.anchor, walk.tokens, walk.whole)
  _, hidden, after = read(net, texts, 0, 0, slots)
  after, log_belief = believe(net, after, hidden, latent, walk)
  return move(net, statistics, texts, after, latent, place, log_belief, walk, index, shaping)


def unfinished(texts: Texts, tokens: int) -> jax.Array:
  """Whether any row's window has unknown tokens."""
  place = texts.anchor[:, None] + 1 + jnp.arange(tokens)
  open_ = (at(texts.time, place) > 0.0) & (place < texts.limit[:, None]) & ~texts.done[:, None]
  return jnp.any(open_)


def flow_window(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, walk: Walk, shaping: Shaping) -> Texts:
  """One window of every row, down to its end."""
  texts, walk = flow_first(net, statistics, texts, walk, shaping)
  step = lambda texts, index: flow_next(net, statistics, texts, walk, shaping, index)
  return policies.follow(walk.policy, step, texts, lambda texts: unfinished(texts, walk.tokens), first=1)


def adaptive(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, walk: Walk, shaping: Shaping,
             infill: bool = False) -> Texts:
  """One pass of a window that slides: it begins behind the tokens that are known without a gap and read.

  The leftmost unknown token always jumps, and its belief is autoregression's where all before it is read, unless
  `infill`: text behind a gap has its say. What else jumps or gathers evidence is the policy's.
  """
  T, prior = walk.tokens, statistics.log_unigram_V
  unread, fresh = texts.length - texts.read, fresh_slots(T)
  count = jnp.where(texts.done, 0, jnp.minimum(unread, fresh))
  anchor = jnp.minimum(texts.length - 1, texts.read + count)
  if walk.self_conditioned:  # the pass before, moved along with the window
    index = jnp.arange(T) + (anchor - texts.anchor)[:, None]
    moved = at(texts.context, jnp.minimum(index, T - 1))
    prior = jnp.where((index < T)[..., None], moved, prior)
  slots, latent, place = window_slots(net, prior, texts, anchor, T)
  clean, hidden, after = read(net, texts, fresh, count, slots)
  after, log_belief = believe(net, after.replace(anchor=anchor), hidden, latent, walk)
  if not infill:
    last = net.logits(at(clean, jnp.maximum(count - 1, 0)[:, None]))  # (B, 1, V)
    fresh_y = jnp.where((latent.time < 1.0)[..., None], latent.y, 0.0)
    exact = (place == texts.length[:, None]) & (unread <= fresh)[:, None]
    log_belief = jnp.where(exact[..., None], flow.log_belief(last, net.codes(), fresh_y), log_belief)
  return move(net, statistics, texts, after, latent, place, log_belief, walk, jnp.zeros((), jnp.int32), shaping)


def verify(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, shaping: Shaping, tokens: int,
           draft_passes: int = 1) -> Texts:
  """One round of proposals and judgement, up to `tokens` tokens, no fewer than any row's `most`:
  `draft_passes` passes."""
  if draft_passes == 1:
    return judge(net, statistics, texts, shaping, tokens)
  return judge(net, statistics, propose(net, statistics, texts, shaping, tokens, draft_passes - 1), shaping, tokens,
               False)


def unread_slots(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, anchor_BxN: jax.Array,
                 token_BxNxT: jax.Array, known: int) -> Slots:
  """Slots of N windows a row, S = T + 1 each, flat over N S. The anchor's and `known` tokens
  behind it are known, of the others nothing. A row's windows are as wide as it proposes tokens, whatever the
  batch's widest is."""
  B, N, S = *anchor_BxN.shape, token_BxNxT.shape[2] + 1
  codes, slot = net.codes(), jnp.arange(S)
  time = jnp.broadcast_to((slot > known).astype(jnp.float32), (B, N, S))
  token = jnp.concatenate([at(texts.token, anchor_BxN)[..., None], token_BxNxT], axis=2)
  latent = flow.Latent(jnp.zeros((B, N, S, codes.shape[1]), codes.dtype), time, token)
  (x,) = net.embed((latent,), (codes,), statistics.log_unigram_V)
  window, inside = jnp.repeat(jnp.arange(N), S), jnp.tile(slot, N) <= texts.draft.most[:, None]
  sees = ((window[:, None] == window) & inside[:, None, :]) | jnp.eye(N * S, dtype=bool)
  flat = lambda a: a.reshape(B, N * S, *a.shape[3:])
  return Slots(flat(x), flat(time), flat(anchor_BxN[..., None] + slot), jnp.repeat(anchor_BxN, S, axis=1), sees)


def propose(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, shaping: Shaping, tokens: int,
            passes: int) -> Texts:
  """Proposes `tokens` tokens behind the known ones in `passes` passes of a window, each pass the next few
  from the left."""
  T, draft = tokens, texts.draft
  B, anchor = texts.token.shape[0], texts.length - 1
  token, log_q = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T, draft.log_q.shape[2]))
  for i in range(passes):
    low, high = -(-T * i // passes), -(-T * (i + 1) // passes)
    _, hidden, _ = read(net, texts, 0, 0, unread_slots(net, statistics, texts, anchor[:, None], token[:, None], low))
    log_p = shaping(net.logits(hidden[:, :-1]))
    key = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(pass_keys(texts, _DRAFT))
    drawn = jax.vmap(jax.random.categorical)(key, log_p).astype(jnp.int32)
    now = (jnp.arange(T) >= low) & (jnp.arange(T) < high)
    token, log_q = jnp.where(now, drawn, token), jnp.where(now[:, None], log_p, log_q)
  return texts.replace(draft=draft.holding(token, log_q), passes=texts.passes + passes * ~texts.done)


def judge(net: elbo.Network, statistics: elbo.Statistics, texts: Texts, shaping: Shaping, tokens: int,
          ahead: bool = True) -> Texts:
  """One pass that judges what was proposed before and, with `ahead`, proposes anew.

  Speculative rejection sampling (Leviathan et al., 2023; Chen et al., 2023): a proposed token d is accepted with
  probability min(1, p(d) / q(d)); the first that is not is drawn from max(p - q, 0), and behind accepted ones one
  more token from p, so that every token has autoregression's distribution p. Which tokens will be accepted is not
  known when the pass begins, so it has a window for every outcome: number k follows the k-th proposal, and proposes
  for the places from the second on behind it (the first is the token that p gives). All for the price of one pass
  over (T + 1) (T + 2) slots.
  """
  T, draft = tokens, texts.draft
  B = draft.log_q.shape[0]
  proposal, count = draft.token[:, :T], jnp.minimum(draft.count, draft.most)
  seen = texts.replace(token=put(texts.token, texts.length, proposal))

  N, slots = T + 1, None
  if ahead:
    anchor = texts.length[:, None] - 1 + jnp.arange(N)
    slots = unread_slots(net, statistics, seen, anchor, jnp.zeros((B, N, T), jnp.int32), 0)
  clean, hidden, after = read(net, seen, N, jnp.where(texts.done, 0, N), slots)

  log_p = shaping(net.logits(clean))  # (B, T + 1, V): number j is of the j-th proposal
  log_q = draft.log_q[:, :T]
  keys = jax.vmap(lambda key: jax.random.split(key, 3))(pass_keys(texts))
  ratio = flow.pick(log_p[:, :T], proposal) - flow.pick(log_q, proposal)
  chance = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(keys[:, 0])
  accepts = (jnp.log(chance) < ratio) & (jnp.arange(T) < count[:, None])
  accepted = jnp.sum(jnp.cumprod(accepts, axis=1), axis=1)
  at_end = at(log_p, accepted[:, None])[:, 0]
  refused = at(log_q, jnp.minimum(accepted, T - 1)[:, None])[:, 0]  # read only where a proposal was refused
  rest = jnp.maximum(jnp.exp(at_end) - jnp.exp(refused), 0.0)
  rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0.0, jnp.log(rest),
                   at_end)  # p = q to rounding: nothing is left
  rest = jnp.where((accepted < count)[:, None], rest, at_end)
  drawn = jax.vmap(jax.random.categorical)(keys[:, 1], rest).astype(jnp.int32)

  settled = jnp.where(jnp.arange(N) < accepted[:, None], jnp.pad(proposal, [(0, 0), (0, 1)]), drawn[:, None])
  known = (jnp.arange(N) <= accepted[:, None]) & (texts.length[:, None] + jnp.arange(N) < texts.limit[:, None])
  draft = draft.replace(count=jnp.zeros_like(count), accepted=draft.accepted + accepted,
                        refused=draft.refused + (accepted < count))
  if ahead:
    chosen = at(hidden.reshape(B, N, N, -1), accepted[:, None])[:, 0]
    new_log_q = shaping(net.logits(chosen[:, 1:]))
    draft = draft.holding(jax.vmap(jax.random.categorical)(keys[:, 2], new_log_q).astype(jnp.int32), new_log_q)
  after = after.replace(draft=draft)
  time = put(texts.time, texts.length, jnp.where(known, 0.0, 1.0))
  texts = finish(after.replace(token=texts.token), put(texts.token, texts.length, settled), time)
  return texts.replace(read=texts.length - 1)


def fit_draft(texts: Texts) -> Texts:
  """Lets every row propose as many tokens as are each accepted, together with those before, with a chance
  above a tenth."""
  draft = texts.draft
  chance = (draft.accepted + 1.0) / (draft.accepted + draft.refused + 2.0)
  most = jnp.floor(jnp.log(0.1) / jnp.log(chance)).astype(jnp.int32)
  return texts.replace(draft=draft.replace(most=jnp.clip(most, 1, draft.token.shape[1]), accepted=0.5 * draft.accepted,
                                           refused=0.5 * draft.refused))


def advance(step: Callable[[Texts], Texts], texts: Texts, passes: int) -> Texts:
  """`passes` passes, or as many as it takes until all rows are done."""
  unfinished = lambda carry: (carry[0] < passes) & ~jnp.all(carry[1].done)
  return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])), (0, texts))[1]
