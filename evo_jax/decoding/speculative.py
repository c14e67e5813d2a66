"""The decoding mode verify: speculative decoding. Windows or the text itself draft tokens, a clean pass verifies them.

Two couplings of drafts and autoregression, both exact, whatever drafts are worth, to rounding, which depends on how
many slots a pass has (in float32 it decides nearly never, in bfloat16 now and then):

  gumbel     The verifying pass draws each token as autoregression does, with the same noise of its position
             (Gumbel-max), and a drafted token is accepted if it is that token. The text is what `ar` writes with the
             seed, however it was drafted. Windows draw their drafts with the same noise, so that beliefs that are
             nearly equal draw the same token (Daliri et al., "Coupling without communication and drafter-invariant
             speculative decoding", 2025).
  rejection  Speculative rejection sampling (Leviathan et al., "Fast inference from transformers via speculative
             decoding", 2023; Chen et al., "Accelerating large language model decoding with speculative sampling",
             2023): texts have autoregression's distribution.

A round is a pass over the clean slots of the drafted tokens and over windows that draft the next ones. How many tokens
will be accepted is not known when it begins, so an outcome has a window of its own, if one is worth its slots: number k
follows the k-th drafted token and drafts the positions from the second behind it (verification gives the first). After
an outcome that has none, a round begins without a draft: one clean slot, and a window.

Letters in names: R = T + 1 clean slots, N windows of a pass, T drafted tokens, S slots of a window; the others as in
`state`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.decoding import lookup
from evo_jax.decoding.logits import LogitsProcessor, draw_tokens, token_noise
from evo_jax.decoding.state import (
  KEY_DRAFT,
  MATCH,
  DecodingState,
  Draft,
  DraftRecord,
  WindowSlots,
  commit,
  forward,
  gather,
  is_end,
  pass_keys,
  write_span,
)
from evo_jax.flow import interface, latents
from evo_jax.flow.statistics import Statistics

# Acceptance of a draft's first token, by source (see `Draft`), before it was tried; counts as much as one draft. Of the
# text's drafts it is what texts of people and of models have in common (experiments/lookup_acceptance.py), rather less
# than models' greedy ones, since a draft costs the most where it fails.
PRIORS = (0.5, 0.2, 0.4, 0.55, 0.7)
_RISE, _HIGHEST = 0.4, 0.95  # the text's: with each accepted token, so much of the way to the highest
_KEEP = 0.99  # of the counts of drafts, by round: a source that is not used is tried again after some hundred rounds
_KEEP_MATCHES = 0.95
_FEW_ROWS = 2  # rows of the vocabulary's product that cost less than a second reading of its table
_ALLOWANCE = 0.03  # passes a round that drafts may cost more than they give
_MOST_CREDIT = 4.0  # passes: what drafts gave long ago pays for no more failures than that


@dataclasses.dataclass(frozen=True)
class Drafting:
  """How tokens are drafted. A compiled program is for one of these.

  tokens: T. outcomes: the numbers of accepted tokens after which a window drafts; (): none does. from_text: whether
  the text itself drafts where that is the better bet. passes: of a round; with more than one, all but the last draft,
  by one window from left to right. coupling: "gumbel" or "rejection". reads_anchor: the model's
  `reads_clean_anchor`.
  """

  tokens: int
  outcomes: tuple[int, ...]
  from_text: bool
  passes: int = 1
  coupling: str = "gumbel"
  reads_anchor: bool = False

  @property
  def always(self) -> bool:
    """Whether each round leaves a draft to the next one."""
    return self.passes > 1 or len(self.outcomes) > self.tokens

  @property
  def slots(self) -> int:
    """S, of a window in a pass that verifies: with one for the anchor's token, unless windows read the clean anchor."""
    return self.tokens if self.reads_anchor else self.tokens + 1

  def rows(self, drafted: bool) -> int:
    """Slots of a round's pass, of each text; drafted: whether it verifies a draft."""
    if drafted:
      return self.tokens + 1 + len(self.outcomes) * self.slots
    return 1 + bool(self.outcomes) * self.slots


class Budget(NamedTuple):
  """What drafts may cost, in passes of autoregression with as many rows.

  costs: (2,) float32, of a round without and with a draft. credit: () float32, what drafts gave beyond their cost, with
  an allowance; where it is used up the text drafts nothing, until rounds have saved enough for another try.
  """

  costs: jax.Array | np.ndarray
  credit: jax.Array | np.ndarray

  @classmethod
  def of(cls, costs: tuple[float, float], credit: float) -> "Budget":
    return cls(np.array(costs, np.float32), np.float32(credit))

  @property
  def least_accepted(self) -> jax.Array:
    """Tokens that drafts must be expected to give, in the mean over rows, in a round that would have none otherwise."""
    return self.costs[1] - self.costs[0]

  def after(self, drafted: bool, tokens: jax.Array) -> "Budget":
    """The budget after a round that wrote so many tokens, in the mean over rows."""
    credit = self.credit + _ALLOWANCE + tokens - self.costs[int(drafted)]
    return self._replace(credit=jnp.minimum(credit, _MOST_CREDIT))


UNLIMITED = Budget.of((0.0, 0.0), _MOST_CREDIT)


def every_outcome(tokens: int) -> tuple[int, ...]:
  """All outcomes of a draft of `tokens` tokens."""
  return tuple(range(tokens + 1))


def start_draft(
  net: interface.Network,
  statistics: Statistics,
  rows: int,
  tokens: int,
  coupling: str,
  record: tuple[jax.Array, jax.Array, jax.Array],
) -> Draft:
  """Nothing drafted yet, in buffers of `tokens` tokens a row.

  record: `DraftRecord`'s offered and taken (1 + MATCH, T), and matched (1 + MATCH,), of each row.
  """
  zero, x_D = jnp.zeros(rows, jnp.int32), net.embed_unknown(statistics.log_unigram_V)
  by_row = lambda x: jnp.broadcast_to(x, (rows, *x.shape))
  return Draft(
    tokens=jnp.zeros((rows, tokens), jnp.int32),
    pending=zero,
    source=zero,
    log_q=jnp.zeros((rows, tokens, len(statistics.log_unigram_V))) if coupling == "rejection" else None,
    unknown_x=by_row(x_D),
    record=DraftRecord(zero, zero, zero, *map(by_row, record)),
  )


def no_record(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """offered, taken and matched of `DraftRecord`, for drafts of at most `tokens` tokens, before the first round."""
  counts = np.zeros((1 + MATCH, tokens), np.float32)
  return counts, counts, np.zeros(1 + MATCH, np.float32)


def survival(offered: jax.Array, taken: jax.Array, tokens: int, windows: float = PRIORS[0]) -> jax.Array:
  """(..., 1 + MATCH, T): probabilities that the first 1, 2, ... tokens of a source's draft are all accepted, by counts
  (..., 1 + MATCH, >= T).

  Of what was counted little, the first token is expected to be accepted as often as a prior says, `windows` of windows;
  a later one as often as the one before it, and in drafts from the text more often, since a repetition that goes on
  becomes more certain. Arrays are numpy's or JAX's.
  """
  xp = jnp if isinstance(taken, jax.Array) else np
  acceptance, products = xp.array([windows, *PRIORS[1:]], np.float32), []
  rise = np.array([0.0, *[_RISE] * MATCH], np.float32)
  for i in range(tokens):
    acceptance = (taken[..., i] + acceptance) / (offered[..., i] + 1.0)
    products.append(acceptance * products[-1] if products else acceptance)
    acceptance = acceptance + rise * xp.maximum(_HIGHEST - acceptance, 0.0)
  return xp.stack(products, axis=-1)


def verify_rounds(
  net: interface.Network,
  state: DecodingState,
  processor: LogitsProcessor,
  drafting: Drafting,
  rounds: jax.Array,
  budget: Budget,
) -> tuple[DecodingState, jax.Array, Budget]:
  """`rounds` rounds, fewer if all rows are done; how many of them (2,) int32 had no draft, and had one; and what is
  left of the budget.

  Rounds of both kinds are inner loops, since the branches of a conditional would copy the KV cache.
  """

  def loop(drafted, condition, carry):
    def step(carry):
      state, count, budget = carry
      state, budget = verify_round(net, state, processor, drafting, drafted, budget)
      return state, count.at[int(drafted)].add(1), budget

    return jax.lax.while_loop(lambda carry: unfinished(carry) & condition(carry[0]), step, carry)

  unfinished = lambda carry: (jnp.sum(carry[1]) < rounds) & ~jnp.all(carry[0].done)
  pending = lambda state: jnp.any((state.draft.pending > 0) & ~state.done)
  start = state, jnp.zeros(2, jnp.int32), jax.tree.map(jnp.asarray, budget)
  if drafting.always:
    return loop(True, lambda state: True, start)
  if not drafting.outcomes and not drafting.from_text:
    return loop(False, lambda state: True, start)
  both = lambda carry: loop(True, pending, loop(False, lambda state: ~pending(state), carry))
  return jax.lax.while_loop(unfinished, both, start)


def verify_round(
  net: interface.Network,
  state: DecodingState,
  processor: LogitsProcessor,
  drafting: Drafting,
  drafted: bool,
  budget: Budget,
) -> tuple[DecodingState, Budget]:
  """One round: verifies the pending draft, commits what was accepted and the token behind it, drafts the next tokens.

  drafted: whether any row has a pending draft.
  """
  if drafting.passes > 1:
    state = draft_tokens(net, state, processor, drafting)
  T = drafting.tokens if drafted else 0
  pending = jnp.minimum(state.draft.pending, T)
  with_draft = state.replace(tokens=write_span(state.tokens, state.length, state.draft.tokens[:, :T])) if T else state
  outcomes = drafting.outcomes if drafted else drafting.outcomes and (0,)
  slots = None
  if outcomes:
    anchor_BxN = state.length[:, None] - 1 + jnp.array(outcomes)
    slots = window_slots(net, with_draft, drafting, anchor_BxN)
  clean, hidden, after = forward(net, with_draft, T + 1, jnp.where(state.done, 0, T + 1), slots)
  hidden_BxNxTxD = _of_windows(hidden, len(outcomes), drafting.tokens)
  logits_BxRxV, logits_BxNxTxV = _read_vocabulary(net, clean, hidden_BxNxTxD)
  keys = jax.vmap(lambda key: jax.random.split(key, 3))(pass_keys(state))
  verify = _verify_by_rejection if drafting.coupling == "rejection" else _verify_by_noise
  accepted, verified_BxR = verify(state, processor, logits_BxRxV, pending, keys)

  index = jnp.arange(T + 1)
  known = (index <= accepted[:, None]) & (state.length[:, None] + index < state.max_length[:, None])
  record = _add_round(state, accepted, pending, verified_BxR, known)
  active = jnp.sum(~state.done)
  budget = budget.after(drafted, 1.0 + jnp.sum(record.accepted - state.draft.record.accepted) / jnp.maximum(active, 1))
  after = commit(
    after.replace(tokens=state.tokens, draft=state.draft.replace(record=record, pending=jnp.zeros_like(pending))),
    write_span(state.tokens, state.length, verified_BxR),
    write_span(state.time, state.length, jnp.where(known, 0.0, 1.0)),
  )
  after = after.replace(cached=after.length - 1)  # keys and values of rejected tokens are overwritten
  if drafting.passes > 1:
    return after, budget
  window = None
  if outcomes:
    window = _draw_window(net, after, processor, drafting, outcomes, accepted, hidden_BxNxTxD, logits_BxNxTxV, keys)
  return _draft_next(after, drafting, window, budget), budget


def window_slots(
  net: interface.Network, state: DecodingState, drafting: Drafting, anchor_BxN: jax.Array, known: int | None = None
) -> WindowSlots:
  """The slots of N windows a row, in one axis, which draft T tokens each.

  known: None: all tokens behind the anchor are unknown, and the anchor is among the pass's clean slots. Else so many
  are known, and the anchor has a slot of its own.
  """
  T = drafting.tokens
  has_anchor = known is not None or not drafting.reads_anchor
  B, N, offset = *anchor_BxN.shape, np.arange(0 if has_anchor else 1, T + 1)
  S, is_known = len(offset), offset <= (known or 0)
  position = anchor_BxN[..., None] + offset
  x = jnp.broadcast_to(state.draft.unknown_x[:, None, None], (B, N, S, state.draft.unknown_x.shape[1]))
  if known_slots := int(is_known.sum()):
    tokens = jax.vmap(lambda row, at: row[at])(state.tokens, position[..., :known_slots])
    x = jnp.concatenate([net.embed_tokens(tokens), x[:, :, known_slots:]], axis=2)
  visible = np.kron(np.eye(N, dtype=bool), np.ones((S, S), bool))
  stop = jnp.broadcast_to((anchor_BxN if has_anchor else anchor_BxN + 1)[..., None], position.shape)
  time = jnp.broadcast_to(np.tile(1.0 - is_known, N).astype(np.float32), (B, N * S))
  flat = lambda a: a.reshape(B, N * S, *a.shape[3:])
  return WindowSlots(flat(x), time, flat(position), flat(stop), jnp.asarray(visible))


def _of_windows(hidden_BxSxD, windows, tokens):
  """(B, N, T, D): of each window the outputs about tokens behind its anchor's next."""
  B, _, D = hidden_BxSxD.shape
  if not windows:
    return hidden_BxSxD.reshape(B, 0, tokens, D)
  return hidden_BxSxD.reshape(B, windows, -1, D)[:, :, -tokens:]


def _read_vocabulary(net, clean_BxRxD, hidden_BxNxTxD):
  """Logits (B, R, V) of the clean slots, and (B, N, T, V) of the windows' where reading all of them at once is cheaper
  than reading the one that is chosen by itself: else None."""
  B, N, T, D = hidden_BxNxTxD.shape
  R = clean_BxRxD.shape[1]
  if not N or (N - 1) * T > _FEW_ROWS:
    return net.logits(clean_BxRxD), None
  logits = net.logits(jnp.concatenate([clean_BxRxD, hidden_BxNxTxD.reshape(B, N * T, D)], axis=1))
  return logits[:, :R], logits[:, R:].reshape(B, N, T, -1)


def _verify_by_noise(state, processor, logits_BxRxV, pending_B, keys):
  """How many drafted tokens are accepted (B,), and the tokens (B, R) of which so many and one are committed: those that
  autoregression draws."""
  T = logits_BxRxV.shape[1] - 1
  drawn = draw_tokens(state, processor, logits_BxRxV, state.length[:, None] + jnp.arange(T + 1))
  accepts = (drawn[:, :T] == state.draft.tokens[:, :T]) & (jnp.arange(T) < pending_B[:, None])
  return jnp.sum(jnp.cumprod(accepts, axis=1), axis=1), drawn


def _verify_by_rejection(state, processor, logits_BxRxV, pending_B, keys):
  """The same by `accept_drafted`."""
  T, draft = logits_BxRxV.shape[1] - 1, state.draft
  log_p, drafted = processor(logits_BxRxV), draft.tokens[:, :T]
  if not T:
    token = jax.vmap(jax.random.categorical)(keys[:, 1], log_p[:, 0])
    return jnp.zeros_like(pending_B), token[:, None].astype(jnp.int32)
  accepted, token = accept_drafted(keys[:, 0], keys[:, 1], log_p, draft.log_q[:, :T], drafted, pending_B)
  index = jnp.arange(T + 1)
  return accepted, jnp.where(index < accepted[:, None], jnp.pad(drafted, [(0, 0), (0, 1)]), token[:, None])


def accept_drafted(
  accept_key_B: jax.Array,
  token_key_B: jax.Array,
  log_p_BxRxV: jax.Array,
  log_q_BxTxV: jax.Array,
  drafted_BxT: jax.Array,
  pending_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Speculative rejection sampling: how many drafted tokens are accepted (B,), and the token (B,) that follows them.

  A drafted token d is accepted with probability min(1, p(d) / q(d)). In place of the first that is not, a token is
  drawn from max(p - q, 0), normalized; behind accepted ones, one from p. So each token has the distribution p.

  log_p_BxRxV: number j is for the position of the j-th drafted token. pending_B: drafted tokens of each row.
  """
  T = drafted_BxT.shape[1]
  ratio = latents.pick(log_p_BxRxV[:, :T], drafted_BxT) - latents.pick(log_q_BxTxV, drafted_BxT)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(accept_key_B)
  accepts = (jnp.log(uniform) < ratio) & (jnp.arange(T) < pending_B[:, None])
  accepted = jnp.sum(jnp.cumprod(accepts, axis=1), axis=1)
  log_p = gather(log_p_BxRxV, accepted[:, None])[:, 0]
  # Meaningful only where a token was rejected.
  log_q = gather(log_q_BxTxV, jnp.minimum(accepted, T - 1)[:, None])[:, 0]
  residual = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
  # Where p = q to rounding nothing is left.
  residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0.0, jnp.log(residual), log_p)
  next_logits = jnp.where((accepted < pending_B)[:, None], residual, log_p)
  return accepted, jax.vmap(jax.random.categorical)(token_key_B, next_logits).astype(jnp.int32)


def _add_round(state, accepted_B, pending_B, verified_BxR, known_BxR) -> DraftRecord:
  """The record after a round. Accepted tokens behind the text's end do not count as such."""
  record, T = state.draft.record, verified_BxR.shape[1] - 1
  active, index = ~state.done, jnp.arange(state.draft.tokens.shape[1])
  ends = is_end(state, verified_BxR)
  in_text = known_BxR & (jnp.cumsum(ends, axis=1) - ends == 0)
  committed = jnp.sum(in_text & (jnp.arange(T + 1) < accepted_B[:, None]), axis=1)
  offered = (index <= accepted_B[:, None]) & (index < pending_B[:, None])
  source = (jnp.arange(1 + MATCH) == state.draft.source[:, None])[..., None]
  decayed = lambda counts, new: _KEEP * counts + source * new[:, None]
  return record.replace(
    accepted=record.accepted + active * committed,
    rounds=record.rounds + active,
    drafted_rounds=record.drafted_rounds + (active & (pending_B > 0)),
    offered=decayed(record.offered, offered),
    taken=decayed(record.taken, index < accepted_B[:, None]),
  )


def _draw_window(net, state, processor, drafting, outcomes, accepted_B, hidden_BxNxTxD, logits_BxNxTxV, keys):
  """What the window of the outcome that came true drafts behind the new prefix: whether there is one (B,), the tokens
  (B, T), and the log-probabilities (B, T, V) that they were drawn from; None for tokens by noise."""
  number = np.full(max(drafting.tokens, *outcomes) + 1, -1)
  number[list(outcomes)] = np.arange(len(outcomes))
  chosen = jnp.asarray(number)[accepted_B]
  pick = lambda a: gather(a, jnp.maximum(chosen, 0)[:, None])[:, 0]
  hidden = pick(hidden_BxNxTxD)
  logits = net.logits(hidden) if logits_BxNxTxV is None else pick(logits_BxNxTxV)
  return chosen >= 0, *_draw_draft(net, state, processor, drafting, hidden, logits, keys[:, 2], state.length)


def _draw_draft(net, state, processor, drafting, hidden_BxTxD, logits_BxTxV, key_B, first_B):
  """Tokens (B, T) for positions first[b], first[b] + 1, ..., drawn from slots' logits, and what they were drawn from:
  log-probabilities (B, T, V), None for tokens by noise."""
  position = first_B[:, None] + jnp.arange(logits_BxTxV.shape[1])
  by_noise = drafting.coupling == "gumbel"
  if net.head_candidates:
    previous = gather(state.tokens, first_B[:, None] - 1)[:, 0]
    if by_noise:
      draw = lambda: token_noise(state, position, logits_BxTxV.shape[-1])
    else:
      draw = lambda: jax.vmap(lambda key: jax.random.gumbel(key, logits_BxTxV.shape[1:]))(key_B)
    noise = processor.noise(logits_BxTxV.shape, draw)
    token, log_q = draw_rescored(net, processor, net.head_candidates, hidden_BxTxD, logits_BxTxV, previous, noise)
    return token, None if by_noise else log_q
  if by_noise:
    return draw_tokens(state, processor, logits_BxTxV, position), None
  log_q = processor(logits_BxTxV)
  return jax.vmap(jax.random.categorical)(key_B, log_q).astype(jnp.int32), log_q


def draw_rescored(
  net: interface.Network,
  processor: LogitsProcessor,
  candidates: int,
  hidden_BxTxD: jax.Array,
  logits_BxTxV: jax.Array,
  previous_B: jax.Array,
  noise_BxTxV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Tokens (B, T) from left to right: each of the slot's best candidates, rescored by the head, which sees the token
  before; and the log-probabilities (B, T, V) that they are drawn from. noise: Gumbel noise."""
  V = logits_BxTxV.shape[-1]
  logits_BxTxC, candidate_BxTxC = jax.lax.top_k(processor.rule_out(logits_BxTxV), min(candidates, V))
  noise = jnp.take_along_axis(noise_BxTxV, candidate_BxTxC, 2)

  def draw(previous_B, slot):
    hidden, candidate, logits, noise = slot
    log_p = processor.shape(net.rescore(hidden, previous_B, candidate, logits))
    best = jnp.argmax(log_p + noise, axis=-1, keepdims=True)
    token = jnp.take_along_axis(candidate, best, axis=-1)[:, 0].astype(jnp.int32)
    return token, (token, log_p)

  slots = (hidden_BxTxD, candidate_BxTxC, logits_BxTxC, noise)
  _, (token, log_p) = jax.lax.scan(draw, previous_B, jax.tree.map(lambda a: a.swapaxes(0, 1), slots))
  scatter = jax.vmap(jax.vmap(lambda at, values: jnp.full(V, -jnp.inf).at[at].set(values)))
  return token.swapaxes(0, 1), scatter(candidate_BxTxC, log_p.swapaxes(0, 1))


def _draft_next(state, drafting, window, budget):
  """The state with the draft for its next round: the window's, or the text's where more of it are expected to be
  accepted, or none. window: of `_draw_window`; None: there is none. A round that would have no draft has one where the
  text's are worth the slots, which all rows pay for, and the budget allows it."""
  T, draft, record = drafting.tokens, state.draft, state.draft.record
  B, room = draft.tokens.shape
  none = jnp.zeros(B, bool), jnp.zeros((B, T), jnp.int32), None
  available, token, log_q = none if window is None else window
  source, pending = jnp.zeros(B, jnp.int32), T * available
  if drafting.from_text:
    from_text, match = lookup.continuation(state.tokens, state.length, T)
    expected = jnp.sum(survival(record.offered, record.taken, T), axis=-1)
    gain, active = gather(expected, match[:, None])[:, 0], ~state.done
    takes = (match > 0) & (gain > jnp.where(available, expected[:, 0], 0.0))
    promised = jnp.sum(gain, where=takes & active)
    pays = (promised > budget.least_accepted * jnp.sum(active)) & (budget.credit > 0.0)
    takes &= jnp.any(available & active) | pays
    token = jnp.where(takes[:, None], from_text, token)
    source, pending = jnp.where(takes, match, 0), jnp.where(takes, T, pending)
    matched = (jnp.arange(1 + MATCH) == match[:, None]).astype(jnp.float32)
    record = record.replace(matched=_KEEP_MATCHES * record.matched + (1.0 - _KEEP_MATCHES) * matched)
    if draft.log_q is not None:
      certain = jnp.where(jnp.arange(draft.log_q.shape[2]) == from_text[..., None], 0.0, -jnp.inf)
      log_q = certain if log_q is None else jnp.where(takes[:, None, None], certain, log_q)
  if draft.log_q is not None and log_q is not None:
    draft = draft.replace(log_q=jnp.pad(log_q, [(0, 0), (0, room - T), (0, 0)]))
  token = jnp.pad(token, [(0, 0), (0, room - T)])
  return state.replace(draft=draft.replace(tokens=token, pending=pending, source=source, record=record))


def draft_tokens(
  net: interface.Network, state: DecodingState, processor: LogitsProcessor, drafting: Drafting
) -> DecodingState:
  """Drafts T tokens behind the committed prefix in all passes of a round but its last, from left to right."""
  T, passes, anchor, draft = drafting.tokens, drafting.passes - 1, state.length - 1, state.draft
  for i in range(passes):
    low, high = -(-T * i // passes), -(-T * (i + 1) // passes)
    with_draft = state.replace(tokens=write_span(state.tokens, state.length, draft.tokens[:, :T]))
    slots = window_slots(net, with_draft, drafting, anchor[:, None], known=low)
    _, hidden, _ = forward(net, state, 0, 0, slots)
    hidden = hidden[:, low:high]  # slot j's output is about the token behind it
    keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(pass_keys(state, KEY_DRAFT))
    first = state.length + low
    token, log_q = _draw_draft(net, with_draft, processor, drafting, hidden, net.logits(hidden), keys, first)
    draft = draft.replace(tokens=draft.tokens.at[:, low:high].set(token))
    if log_q is not None:
      draft = draft.replace(log_q=draft.log_q.at[:, low:high].set(log_q))
  pending, source = jnp.full_like(draft.pending, T), jnp.zeros_like(draft.source)
  return state.replace(draft=draft.replace(pending=pending, source=source), passes=state.passes + passes * ~state.done)
