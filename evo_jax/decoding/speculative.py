"""The decoding mode verify: speculative decoding, in which windows draft tokens and a clean pass verifies them.

Speculative rejection sampling (Leviathan et al., "Fast inference from transformers via speculative decoding", 2023;
Chen et al., "Accelerating large language model decoding with speculative sampling", 2023): texts have
autoregression's distribution, whatever the draft's quality, as the verifying pass computes it: to rounding, which
depends on how many slots a pass has. Greedy texts are greedy autoregression's in float32, in bfloat16 nearly all.

Letters in names: N windows of a pass, T drafted tokens; the others as in `state`.
"""

import jax
import jax.numpy as jnp

from evo_jax.decoding.logits import LogitsProcessor
from evo_jax.decoding.state import KEY_DRAFT, DecodingState, WindowSlots, commit, forward, gather, pass_keys, write_span
from evo_jax.flow import interface, latents
from evo_jax.flow.statistics import Statistics

_LEAST_ACCEPTANCE = 0.1  # a row drafts as many tokens as are all accepted with a probability above this


def verify_round(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  processor: LogitsProcessor,
  tokens: int,
  draft_passes: int = 1,
) -> DecodingState:
  """One round in `draft_passes` passes: the last verifies; with a single pass, it drafts the next tokens, too.

  tokens: T, drafted by the rows that draft most; no less than any row's `draft.length`.
  """
  if draft_passes == 1:
    return verify_pass(net, statistics, state, processor, tokens, draft_ahead=True)
  state = draft_tokens(net, statistics, state, processor, tokens, draft_passes - 1)
  return verify_pass(net, statistics, state, processor, tokens, draft_ahead=False)


def draft_slots(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  anchor_BxN: jax.Array,
  tokens_BxNxT: jax.Array,
  known: int,
) -> WindowSlots:
  """The slots of N windows a row, T + 1 each, in one axis. The anchor and the `known` tokens behind it are known.

  A row's windows are as wide as that row drafts tokens, whatever the batch's widest is.
  """
  B, N, S = *anchor_BxN.shape, tokens_BxNxT.shape[2] + 1
  codes, slot = net.codes(), jnp.arange(S)
  time = jnp.broadcast_to((slot > known).astype(jnp.float32), (B, N, S))
  token = jnp.concatenate([gather(state.tokens, anchor_BxN)[..., None], tokens_BxNxT], axis=2)
  latent = latents.Latent(jnp.zeros((B, N, S, codes.shape[1]), codes.dtype), time, token)
  (x,) = net.embed((latent,), (codes,), statistics.log_unigram_V)
  window, inside = jnp.repeat(jnp.arange(N), S), jnp.tile(slot, N) <= state.draft.length[:, None]
  visible = ((window[:, None] == window) & inside[:, None, :]) | jnp.eye(N * S, dtype=bool)
  flat = lambda a: a.reshape(B, N * S, *a.shape[3:])
  stop = jnp.repeat(anchor_BxN, S, axis=1)
  return WindowSlots(flat(x), flat(time), flat(anchor_BxN[..., None] + slot), stop, visible)


def draft_tokens(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  processor: LogitsProcessor,
  tokens: int,
  passes: int,
) -> DecodingState:
  """Drafts `tokens` tokens behind the committed prefix in `passes` passes of one window, from left to right."""
  T, draft = tokens, state.draft
  B, anchor = state.tokens.shape[0], state.length - 1
  token, log_q = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T, draft.log_q.shape[2]))
  for i in range(passes):
    low, high = -(-T * i // passes), -(-T * (i + 1) // passes)
    slots = draft_slots(net, statistics, state, anchor[:, None], token[:, None], low)
    _, hidden, _ = forward(net, state, 0, 0, slots)
    log_p = processor(net.logits(hidden[:, :-1]))
    keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(pass_keys(state, KEY_DRAFT))
    drawn = jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)
    in_pass = (jnp.arange(T) >= low) & (jnp.arange(T) < high)
    token, log_q = jnp.where(in_pass, drawn, token), jnp.where(in_pass[:, None], log_p, log_q)
  return state.replace(draft=draft.with_tokens(token, log_q), passes=state.passes + passes * ~state.done)


def accept_drafted(
  accept_key_B: jax.Array,
  token_key_B: jax.Array,
  log_p_BxNxV: jax.Array,
  log_q_BxTxV: jax.Array,
  drafted_BxT: jax.Array,
  pending_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Speculative rejection sampling: how many drafted tokens are accepted (B,), and the token (B,) that follows them.

  A drafted token d is accepted with probability min(1, p(d) / q(d)). In place of the first that is not, a token is
  drawn from max(p - q, 0), normalized; behind accepted ones, one from p. So each token has the distribution p.

  log_p_BxNxV: N = T + 1, number j is for the position of the j-th drafted token. pending_B: drafted tokens of each row.
  """
  T = drafted_BxT.shape[1]
  ratio = latents.pick(log_p_BxNxV[:, :T], drafted_BxT) - latents.pick(log_q_BxTxV, drafted_BxT)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(accept_key_B)
  accepts = (jnp.log(uniform) < ratio) & (jnp.arange(T) < pending_B[:, None])
  accepted = jnp.sum(jnp.cumprod(accepts, axis=1), axis=1)
  log_p = gather(log_p_BxNxV, accepted[:, None])[:, 0]
  # Meaningful only where a token was rejected.
  log_q = gather(log_q_BxTxV, jnp.minimum(accepted, T - 1)[:, None])[:, 0]
  residual = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
  # Where p = q to rounding nothing is left.
  residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0.0, jnp.log(residual), log_p)
  next_logits = jnp.where((accepted < pending_B)[:, None], residual, log_p)
  return accepted, jax.vmap(jax.random.categorical)(token_key_B, next_logits).astype(jnp.int32)


def verify_pass(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  processor: LogitsProcessor,
  tokens: int,
  draft_ahead: bool,
) -> DecodingState:
  """One pass that verifies the pending draft and, with `draft_ahead`, drafts the next tokens.

  How many tokens will be accepted is not known when the pass begins, so it has a window for every outcome: number k
  follows the k-th drafted token and drafts the positions from the second behind it (verification gives the first).
  It costs one pass over (T + 1) (T + 2) slots.
  """
  T, N, draft = tokens, tokens + 1, state.draft
  B = state.tokens.shape[0]
  drafted, pending = draft.tokens[:, :T], jnp.minimum(draft.pending, draft.length)
  with_draft = state.replace(tokens=write_span(state.tokens, state.length, drafted))
  slots = None
  if draft_ahead:
    anchor = state.length[:, None] - 1 + jnp.arange(N)
    slots = draft_slots(net, statistics, with_draft, anchor, jnp.zeros((B, N, T), jnp.int32), 0)
  clean, hidden, after = forward(net, with_draft, N, jnp.where(state.done, 0, N), slots)

  keys = jax.vmap(lambda key: jax.random.split(key, 3))(pass_keys(state))
  log_p = processor(net.logits(clean))
  accepted, next_token = accept_drafted(keys[:, 0], keys[:, 1], log_p, draft.log_q[:, :T], drafted, pending)
  draft = draft.replace(
    pending=jnp.zeros_like(pending),
    accepted=draft.accepted + accepted,
    rejected=draft.rejected + (accepted < pending),
  )
  if draft_ahead:
    chosen = gather(hidden.reshape(B, N, N, -1), accepted[:, None])[:, 0]
    log_q = processor(net.logits(chosen[:, 1:]))
    draft = draft.with_tokens(jax.vmap(jax.random.categorical)(keys[:, 2], log_q).astype(jnp.int32), log_q)

  index = jnp.arange(N)
  verified = jnp.where(index < accepted[:, None], jnp.pad(drafted, [(0, 0), (0, 1)]), next_token[:, None])
  known = (index <= accepted[:, None]) & (state.length[:, None] + index < state.max_length[:, None])
  state = commit(
    after.replace(draft=draft, tokens=state.tokens),
    write_span(state.tokens, state.length, verified),
    write_span(state.time, state.length, jnp.where(known, 0.0, 1.0)),
  )
  return state.replace(cached=state.length - 1)  # keys and values of rejected tokens are overwritten


def adapt_draft_length(state: DecodingState) -> DecodingState:
  """Sets how many tokens each row drafts, by its decayed counts of accepted and rejected ones."""
  draft = state.draft
  acceptance = (draft.accepted + 1.0) / (draft.accepted + draft.rejected + 2.0)
  length = jnp.floor(jnp.log(_LEAST_ACCEPTANCE) / jnp.log(acceptance)).astype(jnp.int32)
  draft = draft.replace(
    length=jnp.clip(length, 1, draft.tokens.shape[1]), accepted=0.5 * draft.accepted, rejected=0.5 * draft.rejected
  )
  return state.replace(draft=draft)
