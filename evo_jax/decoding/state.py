"""Decoding state: the tokens, key-value cache and latents of a batch of texts, and one forward pass over them.

A pass reads *uncached* tokens, committed ones whose keys and values are not in the cache yet, and beside them the slots
of windows, which see the uncached tokens before their anchor: a finished window enters the cache in the same pass that
begins the next one. What happens to a row depends on that row alone, and its draws on its own key, so a text is the
same alone and in any batch: in float32, where rounding, which depends on how many slots and rows a pass has, is smaller
than what separates tokens. In bfloat16 it now and then is not (`experiments/precision.py`).

Letters in names: B rows of the batch, C positions of the buffers, R slots for uncached tokens, T tokens of a window,
S window slots of a pass, P positions of the prefill, D width, V vocabulary, M code elements.
"""

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.flow import interface, latents
from evo_jax.network.pages import Pages

# The first number that is folded into a row's key: no two draws share a key.
KEY_START, KEY_TOKEN, KEY_PASS, KEY_POLICY, KEY_DRAFT = range(5)
MATCH = 4  # tokens at the end of a text that are looked up in it at most


@flax.struct.dataclass
class DraftRecord:
  """What became of drafts so far. T: tokens of the longest draft.

  accepted: (B,) int32, drafted tokens that were committed. drafted_rounds: (B,) int32, rounds that verified a draft;
  rounds: (B,) int32, all.
  offered, taken: (B, 1 + MATCH, T) float32, by source (see `Draft`) and position in the draft: how often the tokens
  before it were all accepted, and how often it was, too; decayed with every round.
  matched: (B, 1 + MATCH) float32, shares of recent rounds in which the text's last 0, 1, ... tokens occurred before.
  """

  accepted: jax.Array
  rounds: jax.Array
  drafted_rounds: jax.Array
  offered: jax.Array
  taken: jax.Array
  matched: jax.Array


@flax.struct.dataclass
class Draft:
  """Tokens drafted for the positions behind the committed prefix.

  tokens: (B, T) int32. pending: (B,) int32, how many of them are to be verified. source: (B,) int32, what drafted them:
  0 windows; n the text itself, where its last n tokens, of at most MATCH, occurred before. log_q: (B, T, V) float32,
  the log-probabilities that they were drawn from; None: their draws share the noise of autoregression's.
  unknown_x: (B, D), the embedded slot of an unknown token.
  """

  tokens: jax.Array
  pending: jax.Array
  source: jax.Array
  log_q: jax.Array | None
  unknown_x: jax.Array
  record: DraftRecord


@flax.struct.dataclass
class DecodingState:
  """Texts that are being written. Positions are absolute; position 0 holds the tokenizer's begin token.

  tokens: (B, C) int32. time: (B, C) float32, progressions t; 0 where a token is committed.
  length: (B,) int32, the length of the committed prefix: the first position that is not committed.
  cached: (B,) int32, positions whose keys and values are in the cache.
  k, v: the cache, by layer (B, K, C, E) or (B K, C, E); with a table in pages (see `network.pages`), which rows share.
  prompt_end: (B,) int32, the first position that the prompt does not give. max_length: (B,) int32, the length at which
    a text is full.
  given: (B, C) bool, tokens of the prompt, also behind gaps.
  committed_pass: (B, C) int32, number of the pass that committed a token, from 1; 0 for given ones.
  passes: (B,) int32, passes so far. done: (B,) bool. key: (B,) keys, one for each row's draws.
  end_ids: (B, n) int32, any of these tokens ends a text; -1 where there are fewer.
  solver: latents of tokens on the flow, in modes with windows.
  context_logits: (B, T, V) float32, the last pass's for the window behind `anchor` (B,), for models with
    self-conditioning.
  draft: of mode verify.
  top_tokens: (B, C) int32, the most probable token when a position was last read, -1 before; kept for traces.
  table: (B, J) int32, the pages of a row's positions; None: the cache is not in pages.
  """

  tokens: jax.Array
  time: jax.Array
  length: jax.Array
  cached: jax.Array
  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  prompt_end: jax.Array
  max_length: jax.Array
  given: jax.Array
  committed_pass: jax.Array
  passes: jax.Array
  done: jax.Array
  key: jax.Array
  end_ids: jax.Array
  solver: latents.SolverState | None = None
  context_logits: jax.Array | None = None
  anchor: jax.Array | None = None
  draft: Draft | None = None
  top_tokens: jax.Array | None = None
  table: jax.Array | None = None


def prefill(
  net: interface.Network,
  tokens_BxC: jax.Array,
  known_BxC: jax.Array,
  prefix: int,
  prompt_end_B: jax.Array,
  max_length_B: jax.Array,
  key_B: jax.Array,
  end_ids: tuple[int, ...],
  traced: bool = False,
  flat_cache: bool = False,
) -> DecodingState:
  """The state after the clean stream has read the prompts, up to the first gap.

  Args:
    tokens_BxC, known_BxC: the buffers, and which of their tokens are given. C leaves room behind `max_length` for the
      slots of a pass.
    prefix: P, positions that are read: at least all before any row's first gap.
    max_length_B: no less than the first position that is not given.
    flat_cache: the cache keeps batch and heads in one axis (see `attention.write_cache`); for a single device, since
      one axis cannot be sharded like two.
  """
  C = tokens_BxC.shape[1]
  _, cache = net.clean(tokens_BxC[:, :prefix])

  def pad(a):
    a = jnp.pad(a, [(0, 0), (0, 0), (0, C - prefix), (0, 0)])
    return a.reshape(-1, *a.shape[2:]) if flat_cache else a

  state = behind_prompts(tokens_BxC, known_BxC, prompt_end_B, max_length_B, key_B, jnp.array(end_ids, jnp.int32))
  return state.replace(
    k=tuple(map(pad, cache.k)),
    v=tuple(map(pad, cache.v)),
    top_tokens=jnp.full_like(tokens_BxC, -1) if traced else None,
  )


def behind_prompts(
  tokens_BxC: jax.Array,
  known_BxC: jax.Array,
  prompt_end_B: jax.Array,
  max_length_B: jax.Array,
  key_B: jax.Array,
  end_ids: jax.Array,
) -> DecodingState:
  """The state before the first pass, without a cache, which is to hold what is before the first gap, but for its last
  token. end_ids: (n,) or (B, n)."""
  length = jnp.argmin(known_BxC, axis=1)
  return DecodingState(
    tokens=tokens_BxC,
    time=jnp.where(known_BxC, 0.0, 1.0),
    length=length,
    cached=length - 1,
    k=(),
    v=(),
    prompt_end=prompt_end_B,
    max_length=max_length_B,
    given=known_BxC,
    committed_pass=jnp.zeros_like(tokens_BxC),
    passes=jnp.zeros(tokens_BxC.shape[:1], jnp.int32),
    done=length >= max_length_B,
    key=key_B,
    end_ids=jnp.broadcast_to(end_ids, (len(tokens_BxC), end_ids.shape[-1])),
  )


def row_key(seed: jax.Array, digest: jax.Array, repetition: jax.Array) -> jax.Array:
  """The key of a text's draws: of the seed, its prompt, and its number among those with the prompt."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), digest), repetition)


def with_latents(
  state: DecodingState, codes_VxM: jax.Array, prior_logits_V: jax.Array | None = None, window: int = 0
) -> DecodingState:
  """The state with the noise in which each position's flow starts; prior_logits_V: for self-conditioning, the context
  logits that a window of `window` tokens has before its first pass."""
  B, C = state.tokens.shape
  shape = (C, codes_VxM.shape[1])
  noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, KEY_START), shape, codes_VxM.dtype))(state.key)
  state = state.replace(solver=latents.SolverState.start(noise), anchor=state.length - 1)
  if prior_logits_V is None:
    return state
  return state.replace(context_logits=jnp.broadcast_to(prior_logits_V, (B, window, prior_logits_V.shape[0])))


def gather(values_BxC: jax.Array, position_BxT: jax.Array) -> jax.Array:
  """values[b, position[b, t], ...]: (B, T, ...)."""
  index = position_BxT.reshape(*position_BxT.shape, *(1,) * (values_BxC.ndim - 2))
  return jnp.take_along_axis(values_BxC, index, axis=1)


def write_span(values_BxC: jax.Array, first_B: jax.Array, new_BxT: jax.Array) -> jax.Array:
  """values (B, C, ...) with new[b] at positions first[b], first[b] + 1, ..."""
  write = lambda row, new, first: jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), first, 0)
  return jax.vmap(write)(values_BxC, new_BxT, first_B)


def is_end(state: DecodingState, tokens_BxT: jax.Array) -> jax.Array:
  """(B, T) bool: which tokens end their row's text."""
  return jnp.any(tokens_BxT[..., None] == state.end_ids[:, None], axis=-1)


def pass_keys(state: DecodingState, purpose: int = KEY_PASS) -> jax.Array:
  """(B,) keys, one for each row's next pass."""
  fold = lambda key, number: jax.random.fold_in(jax.random.fold_in(key, purpose), number)
  return jax.vmap(fold)(state.key, state.passes)


@flax.struct.dataclass
class WindowSlots:
  """The window slots of a pass.

  x: (B, S, D), embedded. time: (B, S). position: (B, S) int32. stop: (B, S) int32, each slot sees cached positions
  before it; None: no clean stream. visible: (B, S, S) bool, or broadcast to it, which slots each slot sees.
  """

  x: jax.Array
  time: jax.Array
  position: jax.Array
  stop: jax.Array | None
  visible: jax.Array


def forward(
  net: interface.Network, state: DecodingState, uncached: int, count_B: jax.Array, window: WindowSlots | None = None
) -> tuple[jax.Array, jax.Array, DecodingState]:
  """One pass over R = `uncached` clean slots, from position `state.cached` on, and over window slots.

  count_B: how many of the clean slots hold a committed token; they enter the cache, the others' outputs mean nothing.
  Returns hidden states (B, R, D) and (B, S, D), and the state with the cache after the pass.
  """
  B = state.tokens.shape[0]
  position = state.cached[:, None] + jnp.arange(uncached)
  x, stop, time, visible = net.embed_tokens(gather(state.tokens, position)), position + 1, None, None
  if window is not None:
    S = window.x.shape[1]
    x = jnp.concatenate([x, window.x], axis=1)
    time = jnp.pad(window.time, [(0, 0), (uncached, 0)])
    position = jnp.concatenate([position, window.position], axis=1)
    stop = None if window.stop is None else jnp.concatenate([stop, window.stop], axis=1)
    visible = jnp.pad(jnp.broadcast_to(window.visible, (B, S, S)), [(0, 0), (uncached, 0), (0, 0)])
  past = None if stop is None else _past(state, stop)
  hidden, cache = net.decode(past, state.cached, uncached, x, time, position, stop, visible)
  if uncached:
    state = state.replace(k=cache[0], v=cache[1], cached=state.cached + count_B)
  return hidden[:, :uncached], hidden[:, uncached:], state


def _past(state, stop_BxS):
  """The cache, for slots that see it up to these positions."""
  if state.table is None:
    return state.k, state.v
  width = state.k[0].shape[-1]
  seen = jnp.max(jnp.where(state.done[:, None], 0, stop_BxS))
  read = jnp.minimum(-(-seen // width), state.table.shape[1])
  return tuple(Pages(k, v, state.table, read) for k, v in zip(state.k, state.v))


def commit(
  state: DecodingState, tokens_BxC: jax.Array, time_BxC: jax.Array, active_B: jax.Array | None = None
) -> DecodingState:
  """The state after a pass that gave these tokens and progressions: newly known tokens are committed.

  The pass counts for the rows that are `active` (default: all that are not done). A row is done when it is full, or
  when the committed prefix has an end token that the prompt did not give.
  """
  active_B = ~state.done if active_B is None else active_B & ~state.done
  tokens = jnp.where(active_B[:, None], tokens_BxC, state.tokens)
  time = jnp.where(active_B[:, None], time_BxC, state.time)
  passes = state.passes + active_B
  newly_known = (time <= 0.0) & (state.time > 0.0)
  length = jnp.argmax(time > 0.0, axis=1)
  position = jnp.arange(tokens.shape[1])
  written = (position >= state.prompt_end[:, None]) & (position < length[:, None]) & ~state.given
  ended = is_end(state, tokens) & written
  return state.replace(
    tokens=tokens,
    time=time,
    length=length,
    passes=passes,
    committed_pass=jnp.where(newly_known, passes[:, None], state.committed_pass),
    done=state.done | (length >= state.max_length) | jnp.any(ended, axis=1),
  )
