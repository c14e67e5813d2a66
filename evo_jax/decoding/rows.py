"""Rows of an engine on its devices: texts come and go in one decoding state, whose cache is in pages. Pure functions.

All shapes are fixed, so that a text is the same whatever the other rows hold, bit for bit: a pass has all rows, prompts
are read in pieces whose borders depend on its length alone, and attention goes over pages (`network.pages`).

Letters in names: X shards of a batch, which have pages of their own, P pages, W positions of a page, and of a piece;
the others as in `state`.
"""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.decoding import speculative
from evo_jax.decoding.state import DecodingState, behind_prompts, row_key, with_latents
from evo_jax.flow import interface
from evo_jax.flow.statistics import Statistics
from evo_jax.network.pages import Pages


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of an engine. rows: B. capacity: C, positions of a row, with room for the slots of a pass. shards: X. pages:
  P. width: W. end_ids: of a text, at most. draft: tokens of the longest draft of mode verify; 0: there is none. window:
  of the modes with latents; 0: there are none. self_conditioning: whether such a window keeps its last context
  logits. traced: whether the state keeps what traces show. few: rows of the smaller passes, ascending."""

  rows: int
  capacity: int
  shards: int
  pages: int
  width: int
  end_ids: int
  draft: int = 0
  coupling: str = "gumbel"
  window: int = 0
  self_conditioning: bool = False
  traced: bool = False
  few: tuple[int, ...] = ()

  @property
  def columns(self) -> int:
    """J, of a row's table."""
    return -(-self.capacity // self.width)

  @property
  def narrow(self) -> int:
    """Tokens of the pieces in which the end of a text is read."""
    return -(-self.width // 4)


@flax.struct.dataclass
class NewRow:
  """A text that gets a row, as the host gives it: tokens (C,) int32, known (C,) bool; the numbers () of `Buffers`;
  seed () uint32; end_ids (n,) int32; record: see `speculative.start_draft`, None without mode verify."""

  tokens: np.ndarray
  known: np.ndarray
  prompt_end: np.ndarray
  max_length: np.ndarray
  seed: np.ndarray
  digest: np.ndarray
  repetition: np.ndarray
  end_ids: np.ndarray
  record: tuple | None


def cache_bytes(model: config_lib.Model) -> int:
  """Bytes of keys and values of a token."""
  return 2 * model.layers * model.kv_heads * model.head_size * jnp.dtype(model.dtype).itemsize


def empty(net: interface.Network, statistics: Statistics, shape: Shape, model: config_lib.Model) -> DecodingState:
  """The state without a text: all rows are done."""
  X, P, K, E, W = shape.shards, shape.pages, model.kv_heads, model.head_size, shape.width
  zeros = lambda *shape: jnp.zeros(shape, jnp.dtype(model.dtype))
  C, n = shape.capacity, shape.end_ids
  nothing = NewRow(
    tokens=jnp.zeros(C, jnp.int32),
    known=jnp.arange(C) < 1,
    **dict.fromkeys(("prompt_end", "max_length"), jnp.int32(1)),
    **dict.fromkeys(("seed", "digest", "repetition"), jnp.uint32(0)),
    end_ids=jnp.full(n, -1, jnp.int32),
    record=speculative.no_record(shape.draft) if shape.draft else None,
  )
  one = _one_row(net, statistics, shape, nothing)
  state = jax.tree.map(lambda a: jnp.repeat(a, shape.rows, axis=0), one)
  return state.replace(
    k=tuple(zeros(X, P, K, E, W) for _ in range(model.layers)),
    v=tuple(zeros(X, P, K, W, E) for _ in range(model.layers)),
    table=jnp.zeros((shape.rows, shape.columns), jnp.int32),
  )


def _one_row(net, statistics, shape, new: NewRow) -> DecodingState:
  """A state of one row, without cache, behind a prompt that is read up to its last token."""
  row = lambda a: jnp.asarray(a)[None]
  key = row_key(new.seed, new.digest, new.repetition)
  given = (new.tokens, new.known, new.prompt_end, new.max_length, key, new.end_ids)
  state = behind_prompts(*map(row, given))
  if shape.traced:
    state = state.replace(top_tokens=jnp.full_like(state.tokens, -1))
  if shape.draft:
    draft = speculative.start_draft(net, statistics, 1, shape.draft, shape.coupling, new.record)
    state = state.replace(draft=draft)
  if shape.window:
    prior = statistics.log_unigram_V if shape.self_conditioning else None
    state = with_latents(state, net.codes(), prior, shape.window)
  return state


def insert(
  net: interface.Network, statistics: Statistics, state: DecodingState, shape: Shape, row: jax.Array, new: NewRow
) -> DecodingState:
  """The state with a text in row number `row`, whose pages hold its prompt up to its last token."""
  one = _one_row(net, statistics, shape, new).replace(k=state.k, v=state.v, table=state.table)
  return _select(jnp.arange(shape.rows) == row, one, state)


def _select(mine_B, new, old):
  """The rows `mine` of one state, the others of another; the new one's cache."""

  def pick(new, old):
    return jnp.where(mine_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

  return jax.tree.map(pick, _bare(new), _bare(old)).replace(k=new.k, v=new.v, table=old.table)


def _bare(state):
  """The state without its cache: all that is left has an axis of rows."""
  return state.replace(k=(), v=(), table=None)


def take_passes(
  state: DecodingState,
  mine_B: jax.Array,
  table_BxJ: jax.Array,
  index_N: jax.Array | None,
  step: Callable[[DecodingState], tuple],
) -> tuple:
  """step(state), which gives a state and other results, of the rows `mine`; the others stay as they are.

  index: int32, different rows, all of `mine` among them, of which the state that `step` gets consists; None: all rows.
  """
  state = state.replace(table=table_BxJ)
  if index_N is None:
    after, *rest = step(state.replace(done=state.done | ~mine_B))
    return _select(mine_B, after, state), *rest
  few = jax.tree.map(lambda a: a[index_N], _bare(state)).replace(k=state.k, v=state.v, table=table_BxJ[index_N])
  after, *rest = step(few.replace(done=few.done | ~mine_B[index_N]))
  after = _select(mine_B[index_N], after, few)
  together = jax.tree.map(lambda all, some: all.at[index_N].set(some), _bare(state), _bare(after))
  return together.replace(k=after.k, v=after.v, table=table_BxJ), *rest


def read_piece(
  net: interface.Network, state: DecodingState, tokens_XxW: jax.Array, first_X: jax.Array, table_XxJ: jax.Array
) -> tuple[jax.Array, DecodingState]:
  """Hidden states (X, W, D) of a piece of a text in each shard, at positions first, first + 1, ...; and the state, with
  its keys and values in the pages that the table says. What stands behind a text's end means nothing."""
  W, J, page = tokens_XxW.shape[1], table_XxJ.shape[1], state.k[0].shape[-1]
  position = first_X[:, None] + jnp.arange(W)
  read = jnp.minimum(-(-(jnp.max(first_X) + W) // page), J)
  past = tuple(Pages(k, v, table_XxJ, read) for k, v in zip(state.k, state.v))
  hidden, (k, v) = net.decode(past, first_X, W, net.embed_tokens(tokens_XxW), None, position, position + 1, None)
  return hidden, state.replace(k=k, v=v)


def score_piece(
  net: interface.Network,
  state: DecodingState,
  tokens_XxW: jax.Array,
  first_X: jax.Array,
  table_XxJ: jax.Array,
  next_XxW: jax.Array,
  vocab_size: int,
  best: int,
) -> tuple[DecodingState, jax.Array, jax.Array, jax.Array]:
  """`read_piece`, and what autoregression says of the tokens that follow each of the piece's: the log-probabilities of
  `next` (X, W) in nats, and the `best` most probable tokens (X, W, best) with theirs."""
  hidden, state = read_piece(net, state, tokens_XxW, first_X, table_XxJ)
  logits = net.logits(hidden)
  logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
  log_sum = jax.nn.logsumexp(logits, axis=-1)
  log_p = jnp.take_along_axis(logits, next_XxW[..., None], axis=-1)[..., 0] - log_sum
  value, token = jax.lax.top_k(logits, best)
  return state, log_p, token, value - log_sum[..., None]
