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

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.data import tokenizers
from evo_jax.flow import interface
from evo_jax.flow import latents as latents_lib

KEY_START, KEY_TOKEN, KEY_PASS, KEY_POLICY, KEY_DRAFT = range(
  5
)  # what a row's key is folded with first: no two draws share a key


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
    return self.replace(
      token=jnp.pad(token_BxT, [(0, 0), (0, rest)]),
      count=self.most,
      log_q=jnp.pad(log_q_BxTxV, [(0, 0), (0, rest), (0, 0)]),
    )


@flax.struct.dataclass
class DecodingState:
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
  motion: latents_lib.SolverState | None = None
  context: jax.Array | None = None
  anchor: jax.Array | None = None
  draft: Draft | None = None
  guess: jax.Array | None = None


def prefill(
  net: interface.Network,
  token_BxC: jax.Array,
  known_BxC: jax.Array,
  prefix_BxP: jax.Array,
  begin: jax.Array,
  limit: jax.Array,
  key: jax.Array,
  trace: bool = False,
  flat: bool = False,
) -> DecodingState:
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
  texts = DecodingState(
    token_BxC,
    jnp.where(known_BxC, 0.0, 1.0),
    length,
    length - 1,
    tuple(map(pad, cache.k)),
    tuple(map(pad, cache.v)),
    begin,
    limit,
    known_BxC,
    jnp.zeros_like(token_BxC),
    zeros,
    length >= limit,
    key,
  )
  return texts.replace(guess=jnp.zeros_like(token_BxC)) if trace else texts


def with_latents(
  texts: DecodingState, codes_VxM: jax.Array, prior_logits: jax.Array | None = None, tokens: int = 0
) -> DecodingState:
  """Texts with the noise that every place's flow starts from; for models that condition themselves with what a window
  of `tokens` tokens gets before its first pass, prior_logits (V,)."""
  C, M = texts.token.shape[1], codes_VxM.shape[1]
  noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, KEY_START), (C, M), codes_VxM.dtype))(
    texts.key
  )
  texts = texts.replace(motion=latents_lib.SolverState.start(noise), anchor=texts.length - 1)
  if prior_logits is None:
    return texts
  return texts.replace(context=jnp.broadcast_to(prior_logits, (texts.token.shape[0], tokens, prior_logits.shape[0])))


def with_draft(texts: DecodingState, tokens: int, rows: int) -> DecodingState:
  """Texts with nothing proposed yet; `tokens` proposals at most, `rows` = V."""
  B = texts.token.shape[0]
  flat = jnp.zeros(B, jnp.int32)
  zeros = jnp.zeros(B, jnp.float32)
  return texts.replace(
    draft=Draft(
      jnp.zeros((B, tokens), jnp.int32),
      jnp.zeros((B, tokens, rows)),
      flat,
      jnp.full(B, min(tokens, 2), jnp.int32),
      zeros,
      zeros,
    )
  )


def gather(values_BxC: jax.Array, place_BxT: jax.Array) -> jax.Array:
  """values[b, place[b, t], ...]."""
  index = place_BxT.reshape(*place_BxT.shape, *(1,) * (values_BxC.ndim - 2))
  return jnp.take_along_axis(values_BxC, index, axis=1)


def scatter(values_BxC: jax.Array, first_B: jax.Array, new_BxT: jax.Array) -> jax.Array:
  """values with new[b] at the places first[b], first[b] + 1, ..."""
  one = lambda row, new, first: jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), first, 0)
  return jax.vmap(one)(values_BxC, new_BxT, first_B)


def pass_keys(texts: DecodingState, purpose: int = KEY_PASS) -> jax.Array:
  """(B,) keys of each row's pass."""
  return jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, purpose), number))(
    texts.key, texts.passes
  )


@flax.struct.dataclass
class WindowSlots:
  """Window slots of a pass: x (B, S, D), time (B, S), place (B, S); stop (B, S): each sees clean places before it,
  None: none; sees_slot (B, S, S) bool, or broadcast to it: which of each other they see."""

  x: jax.Array
  time: jax.Array
  place: jax.Array
  stop: jax.Array | None
  sees_slot: jax.Array


def forward(
  net: interface.Network, texts: DecodingState, fresh: int, count_B: jax.Array, slots: WindowSlots | None = None
) -> tuple[jax.Array, jax.Array, DecodingState]:
  """One pass: `fresh` clean slots from place `texts.read` on, of which `count` (B,) are there, and window slots.

  Returns hidden states (B, R, D) and (B, S, D), and texts whose `read` has moved on by `count`.
  """
  B = texts.token.shape[0]
  place = texts.read[:, None] + jnp.arange(fresh)
  x, stop, time, visible = net.embed_tokens(gather(texts.token, place)), place + 1, None, None
  if slots is not None:
    S = slots.x.shape[1]
    x = jnp.concatenate([x, slots.x], axis=1)
    time = jnp.pad(slots.time, [(0, 0), (fresh, 0)])
    place = jnp.concatenate([place, slots.place], axis=1)
    stop = None if slots.stop is None else jnp.concatenate([stop, slots.stop], axis=1)
    visible = jnp.pad(jnp.broadcast_to(slots.sees_slot, (B, S, S)), [(0, 0), (fresh, 0), (0, 0)])
  past = None if stop is None else (texts.k, texts.v)
  hidden, past = net.decode(past, texts.read, fresh, x, time, place, stop, visible)
  if fresh:
    texts = texts.replace(k=past[0], v=past[1], read=texts.read + count_B)
  return hidden[:, :fresh], hidden[:, fresh:], texts


def commit(texts: DecodingState, token: jax.Array, time: jax.Array, active_B: jax.Array | None = None) -> DecodingState:
  """Texts after a pass that gave `token` and `time` (B, C): counts it for rows that are `active` (all that are not
  done), and ends rows that are full or have ended."""
  active_B = ~texts.done if active_B is None else active_B & ~texts.done
  token = jnp.where(active_B[:, None], token, texts.token)
  time = jnp.where(active_B[:, None], time, texts.time)
  passes = texts.passes + active_B
  newly = (time <= 0.0) & (texts.time > 0.0)
  length = jnp.argmax(time > 0.0, axis=1)
  place = jnp.arange(token.shape[1])
  ended = (token == tokenizers.DOCUMENT) & (place >= texts.begin[:, None]) & (place < length[:, None]) & ~texts.fixed
  return texts.replace(
    token=token,
    time=time,
    length=length,
    passes=passes,
    settled=jnp.where(newly, passes[:, None], texts.settled),
    done=texts.done | (length >= texts.limit) | jnp.any(ended, axis=1),
  )
