"""The decoding mode verify: speculative decoding."""

import jax
import jax.numpy as jnp

from evo_jax.decoding import logits as logits_lib
from evo_jax.decoding import state as state_lib
from evo_jax.flow import interface
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import statistics as statistics_lib


def verify_round(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  shaping: logits_lib.LogitsProcessor,
  tokens: int,
  draft_passes: int = 1,
) -> state_lib.DecodingState:
  """One round of proposals and judgement, up to `tokens` tokens, no fewer than any row's `most`:
  `draft_passes` passes."""
  if draft_passes == 1:
    return verify_pass(net, statistics, texts, shaping, tokens)
  return verify_pass(
    net, statistics, draft_tokens(net, statistics, texts, shaping, tokens, draft_passes - 1), shaping, tokens, False
  )


def draft_slots(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  anchor_BxN: jax.Array,
  token_BxNxT: jax.Array,
  known: int,
) -> state_lib.WindowSlots:
  """Slots of N windows a row, S = T + 1 each, flat over N S. The anchor's and `known` tokens
  behind it are known, of the others nothing. A row's windows are as wide as it proposes tokens, whatever the
  batch's widest is."""
  B, N, S = *anchor_BxN.shape, token_BxNxT.shape[2] + 1
  codes, slot = net.codes(), jnp.arange(S)
  time = jnp.broadcast_to((slot > known).astype(jnp.float32), (B, N, S))
  token = jnp.concatenate([state_lib.gather(texts.token, anchor_BxN)[..., None], token_BxNxT], axis=2)
  latent = latents_lib.Latent(jnp.zeros((B, N, S, codes.shape[1]), codes.dtype), time, token)
  (x,) = net.embed((latent,), (codes,), statistics.log_unigram_V)
  window, inside = jnp.repeat(jnp.arange(N), S), jnp.tile(slot, N) <= texts.draft.most[:, None]
  sees = ((window[:, None] == window) & inside[:, None, :]) | jnp.eye(N * S, dtype=bool)
  flat = lambda a: a.reshape(B, N * S, *a.shape[3:])
  return state_lib.WindowSlots(
    flat(x), flat(time), flat(anchor_BxN[..., None] + slot), jnp.repeat(anchor_BxN, S, axis=1), sees
  )


def draft_tokens(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  shaping: logits_lib.LogitsProcessor,
  tokens: int,
  passes: int,
) -> state_lib.DecodingState:
  """Proposes `tokens` tokens behind the known ones in `passes` passes of a window, each pass the next few
  from the left."""
  T, draft = tokens, texts.draft
  B, anchor = texts.token.shape[0], texts.length - 1
  token, log_q = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T, draft.log_q.shape[2]))
  for i in range(passes):
    low, high = -(-T * i // passes), -(-T * (i + 1) // passes)
    _, hidden, _ = state_lib.forward(
      net, texts, 0, 0, draft_slots(net, statistics, texts, anchor[:, None], token[:, None], low)
    )
    log_p = shaping(net.logits(hidden[:, :-1]))
    key = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(state_lib.pass_keys(texts, state_lib.KEY_DRAFT))
    drawn = jax.vmap(jax.random.categorical)(key, log_p).astype(jnp.int32)
    now = (jnp.arange(T) >= low) & (jnp.arange(T) < high)
    token, log_q = jnp.where(now, drawn, token), jnp.where(now[:, None], log_p, log_q)
  return texts.replace(draft=draft.holding(token, log_q), passes=texts.passes + passes * ~texts.done)


def verify_pass(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  shaping: logits_lib.LogitsProcessor,
  tokens: int,
  ahead: bool = True,
) -> state_lib.DecodingState:
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
  seen = texts.replace(token=state_lib.scatter(texts.token, texts.length, proposal))

  N, slots = T + 1, None
  if ahead:
    anchor = texts.length[:, None] - 1 + jnp.arange(N)
    slots = draft_slots(net, statistics, seen, anchor, jnp.zeros((B, N, T), jnp.int32), 0)
  clean, hidden, after = state_lib.forward(net, seen, N, jnp.where(texts.done, 0, N), slots)

  log_p = shaping(net.logits(clean))  # (B, T + 1, V): number j is of the j-th proposal
  log_q = draft.log_q[:, :T]
  keys = jax.vmap(lambda key: jax.random.split(key, 3))(state_lib.pass_keys(texts))
  ratio = latents_lib.pick(log_p[:, :T], proposal) - latents_lib.pick(log_q, proposal)
  chance = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(keys[:, 0])
  accepts = (jnp.log(chance) < ratio) & (jnp.arange(T) < count[:, None])
  accepted = jnp.sum(jnp.cumprod(accepts, axis=1), axis=1)
  at_end = state_lib.gather(log_p, accepted[:, None])[:, 0]
  refused = state_lib.gather(log_q, jnp.minimum(accepted, T - 1)[:, None])[
    :, 0
  ]  # read only where a proposal was refused
  rest = jnp.maximum(jnp.exp(at_end) - jnp.exp(refused), 0.0)
  rest = jnp.where(
    jnp.sum(rest, axis=-1, keepdims=True) > 0.0, jnp.log(rest), at_end
  )  # p = q to rounding: nothing is left
  rest = jnp.where((accepted < count)[:, None], rest, at_end)
  drawn = jax.vmap(jax.random.categorical)(keys[:, 1], rest).astype(jnp.int32)

  settled = jnp.where(jnp.arange(N) < accepted[:, None], jnp.pad(proposal, [(0, 0), (0, 1)]), drawn[:, None])
  known = (jnp.arange(N) <= accepted[:, None]) & (texts.length[:, None] + jnp.arange(N) < texts.limit[:, None])
  draft = draft.replace(
    count=jnp.zeros_like(count), accepted=draft.accepted + accepted, refused=draft.refused + (accepted < count)
  )
  if ahead:
    chosen = state_lib.gather(hidden.reshape(B, N, N, -1), accepted[:, None])[:, 0]
    new_log_q = shaping(net.logits(chosen[:, 1:]))
    draft = draft.holding(jax.vmap(jax.random.categorical)(keys[:, 2], new_log_q).astype(jnp.int32), new_log_q)
  after = after.replace(draft=draft)
  time = state_lib.scatter(texts.time, texts.length, jnp.where(known, 0.0, 1.0))
  texts = state_lib.commit(
    after.replace(token=texts.token), state_lib.scatter(texts.token, texts.length, settled), time
  )
  return texts.replace(read=texts.length - 1)


def adapt_draft_length(texts: state_lib.DecodingState) -> state_lib.DecodingState:
  """Lets every row propose as many tokens as are each accepted, together with those before, with a chance
  above a tenth."""
  draft = texts.draft
  chance = (draft.accepted + 1.0) / (draft.accepted + draft.refused + 2.0)
  most = jnp.floor(jnp.log(0.1) / jnp.log(chance)).astype(jnp.int32)
  return texts.replace(
    draft=draft.replace(
      most=jnp.clip(most, 1, draft.token.shape[1]), accepted=0.5 * draft.accepted, refused=0.5 * draft.refused
    )
  )
