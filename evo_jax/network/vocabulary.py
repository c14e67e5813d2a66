"""What is as wide as the vocabulary, some of its rows at a time: log-probabilities of tokens, and means under beliefs.

Sums over the vocabulary are gathered chunk by chunk, as attention's are over keys (FlashAttention, Dao et al., 2022),
so that logits are in memory for one chunk of the vocabulary alone; the backward pass computes them anew. In chunks of
the vocabulary, and not of the tokens, each row of the tables is read once, and its gradient is written once, not added
up. Where a shard of the batch computes by hand, a chunk of the table is gathered while the one before is read, and its
gradient scattered at once: no device has the whole. One chunk is the plain computation, which keeps its logits.

Letters in names: V vocabulary (rows of the tables), D width, M code elements. `...` are the axes of the tokens
that are read.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from evo_jax.flow import interface
from evo_jax.parallel import sharding

RARE_BRANCH = "rare_branch"  # the named scope of a branch that almost never runs: estimates of compute leave it out
FORBIDDEN = -1e9  # the logit of rows beyond the vocabulary
_TABLE = ("vocab", "embed")  # logical axes of the tables
_FAR = 40.0  # nats; exp(40) times as many rows as there ever are is less than float32's largest, exp(88)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def log_probs(
  chunk: int,
  rules: sharding.ShardingRules,
  beliefs: tuple[interface.Beliefs, ...],
  tokens: tuple[jax.Array, ...],
  table_VxD: jax.Array,
  bias_V: jax.Array,
) -> tuple[tuple[jax.Array, ...], ...]:
  """log softmax(c + E y + bias)[token] in nats (...), float32, of each of the beliefs' evidence vectors.

  Args:
    chunk: rows of the vocabulary whose logits are in memory at a time; 0: all, and they are kept for the backward pass.
    rules: by which the table is laid out.
    beliefs, tokens: of some tokens (...) each; several share a reading of the table.
    table_VxD: the table that `hidden` asks, in the dtype in which to multiply; by hand, this device's part of it.
    bias_V: float32, such as FORBIDDEN for rows that are no token; it is not taught.
  """
  return _log_probs(chunk, rules, beliefs, tokens, table_VxD, bias_V)[0]


def _log_probs(chunk, rules, beliefs, tokens, table_VxD, bias_V):
  def step(carry, table, part):
    ids, bias, codes = part
    here = [b.replace(codes_VxM=c) for b, c in zip(beliefs, codes)]
    logits = [b.logits(table, bias) for b in here]

    def add(b, x, total):
      if b.evidence or not chunk:
        # Evidence may put a token far above all others; logits that are kept are written anyway.
        return jnp.logaddexp(total, jax.nn.logsumexp(x, axis=-1))
      return _add_up(x, total, lambda: b.logits(table, bias)[0])

    after = tuple(
      tuple(
        (add(b, x, total), own + jnp.sum(jnp.where(_is(ids, token), x, 0.0), axis=-1))
        for x, (total, own) in zip(some, sums)
      )
      for b, some, token, sums in zip(here, logits, tokens, carry)
    )
    return after, None if chunk else logits

  start = lambda token: (jnp.full(token.shape, -jnp.inf), jnp.zeros(token.shape))
  carry = tuple(tuple(start(token) for _ in b.evidence or (None,)) for b, token in zip(beliefs, tokens))
  sums, logits = _over_chunks(step, carry, table_VxD, _wholes(beliefs, bias_V), chunk, rules)
  found = tuple(tuple(own - total for total, own in some) for some in sums)
  return found, (beliefs, tokens, table_VxD, bias_V, tuple(tuple(total for total, _ in some) for some in sums), logits)


def _add_up(logits: jax.Array, total: jax.Array, again: Callable[[], jax.Array]) -> jax.Array:
  """log(exp(total) + sum_v exp(logits[v])) (...), where logits (..., V) follow `total` (...), the same of those
  before; -inf: there are none.

  In one reading, which a compiler fuses with the product that makes them, so that they are never written: what was
  summed so far stands for the largest logit, from which it is seldom far. Where it is, the sum would overflow or
  vanish: then all logits are made anew, by `again`, and their largest is found first.
  """
  begun = total > -jnp.inf
  near = jnp.where(begun, total, 0.0)
  top, found = jnp.max(logits, axis=-1), jnp.sum(jnp.exp(logits - near[..., None]), axis=-1)
  fits = (top < near + _FAR) & (begun | (top > near - _FAR))
  anew = jax.named_scope(RARE_BRANCH)(lambda: jax.nn.logsumexp(again(), axis=-1))
  found = jax.lax.cond(jnp.all(fits), lambda: near + jnp.log(found), anew)
  return jnp.logaddexp(total, found)


def _log_probs_gradient(chunk, rules, saved, cotangents):
  beliefs, tokens, table_VxD, bias_V, total, kept = saved

  def step(inputs, table, part):
    ids, bias, codes = part
    pulled = []
    for i, (b, c) in enumerate(zip(beliefs, codes)):
      b = b.replace(codes_VxM=c)
      logits = b.logits(table, bias) if kept is None else [x[0] for x in kept[i]]
      # The token's own is found by comparing: by indexing it would be a scatter.
      pulled.append(
        b.pull(
          [
            g[..., None] * (_is(ids, tokens[i]) - jnp.exp(x - t[..., None]))
            for x, t, g in zip(logits, total[i], cotangents[i])
          ],
          table,
        )
      )
    inputs = _add(inputs, tuple((p.hidden, p.evidence) for p, _ in pulled))
    table_gradient = _scatter(rules, sum(t for _, t in pulled).astype(table.dtype), table_VxD)
    return inputs, (table_gradient, tuple(p.codes_VxM for p, _ in pulled))

  inputs, (table, codes) = _over_chunks(
    step, _zeros(tuple((b.hidden, b.evidence) for b in beliefs)), table_VxD, _wholes(beliefs, bias_V), chunk, rules
  )
  found = tuple(
    _like(interface.Beliefs(*own, c), b) for own, c, b in zip(inputs, _together(codes, _blocks(rules)), beliefs)
  )
  return found, (None,) * len(tokens), _together(table, _blocks(rules, own=True)), jnp.zeros_like(bias_V)


log_probs.defvjp(_log_probs, _log_probs_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expectations(
  chunk: int,
  rules: sharding.ShardingRules,
  beliefs: tuple[interface.Beliefs, ...],
  values_VxA: jax.Array,
  table_VxD: jax.Array | None,
  bias_V: jax.Array,
) -> tuple[jax.Array, ...]:
  """sum_v p(v) values[v] (..., A) float32 by each of the beliefs, p = softmax(c + E y + bias); they have one evidence
  vector each.

  chunk, rules, table_VxD, bias_V: as of `log_probs`; in one chunk the bias may be (..., V). values_VxA: a table, in
  whose dtype it is multiplied, laid out as `table_VxD`. That one, if any, and what is `hidden` are read,
  and not taught.
  """
  return _means(chunk, rules, beliefs, values_VxA, table_VxD, bias_V)[0]


def _means(chunk, rules, beliefs, values_VxA, table_VxD, bias_V):
  def step(carry, tables, part):
    (values, table), (_, bias, codes) = tables, part
    after, kept = [], []
    for b, c, (top, total, mean) in zip(beliefs, codes, carry):
      (logits,) = b.replace(codes_VxM=c).logits(table, bias)
      new = jnp.maximum(top, jnp.max(logits, axis=-1))
      weights, fade = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
      own = jnp.einsum("...v,va->...a", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
      after.append((new, total * fade + jnp.sum(weights, axis=-1), mean * fade[..., None] + own))
      kept.append(logits)
    return tuple(after), None if chunk else kept

  width = jax.eval_shape(functools.partial(_gather, rules), values_VxA).shape[1]
  start = lambda shape: (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width)))
  sums, logits = _over_chunks(
    step,
    tuple(start(b.evidence[0].shape[:-1]) for b in beliefs),
    (values_VxA, table_VxD),
    _wholes(beliefs, bias_V),
    chunk,
    rules,
  )
  found = tuple(mean / total[..., None] for _, total, mean in sums)
  return found, (
    beliefs,
    values_VxA,
    table_VxD,
    bias_V,
    tuple(top + jnp.log(total) for top, total, _ in sums),
    found,
    logits,
  )


def _means_gradient(chunk, rules, saved, cotangents):
  beliefs, values_VxA, table_VxD, bias_V, total, found, kept = saved
  common = [jnp.sum(g * f, axis=-1, keepdims=True) for g, f in zip(cotangents, found)]
  cotangents = [g.astype(values_VxA.dtype) for g in cotangents]

  def step(inputs, tables, part):
    (values, table), (_, bias, codes) = tables, part
    pulled, values_gradient = [], 0.0
    for i, (b, c, g) in enumerate(zip(beliefs, codes, cotangents)):
      b = b.replace(codes_VxM=c)
      logits = b.logits(table, bias)[0] if kept is None else kept[i][0]
      weights = jnp.exp(logits - total[i][..., None])
      own = jnp.einsum("...a,va->...v", g, values, preferred_element_type=jnp.float32)
      pulled.append(b.replace(hidden=None).pull([weights * (own - common[i])], None)[0])
      values_gradient += interface.outer_sum(weights.astype(values.dtype), g)
    values_gradient = _scatter(rules, values_gradient.astype(values.dtype), values_VxA)
    return _add(inputs, tuple(p.evidence for p in pulled)), (values_gradient, tuple(p.codes_VxM for p in pulled))

  evidence, (values, codes) = _over_chunks(
    step, _zeros(tuple(b.evidence for b in beliefs)), (values_VxA, table_VxD), _wholes(beliefs, bias_V), chunk, rules
  )
  still = lambda x: None if x is None else jnp.zeros_like(x)
  beliefs = tuple(
    _like(interface.Beliefs(still(b.hidden), y, c), b)
    for b, y, c in zip(beliefs, evidence, _together(codes, _blocks(rules)))
  )
  return beliefs, _together(values, _blocks(rules, own=True)), still(table_VxD), jnp.zeros_like(bias_V)


expectations.defvjp(_means, _means_gradient)


def _is(ids_V: jax.Array, token: jax.Array) -> jax.Array:
  return ids_V == token[..., None]


def _wholes(beliefs, bias_V):
  """What every device has all rows of: their numbers, the bias, and the codes of each of the beliefs."""
  return jnp.arange(bias_V.shape[-1]), bias_V, tuple(b.codes_VxM for b in beliefs)


def _gather(rules: sharding.ShardingRules, table: jax.Array) -> jax.Array:
  return rules.gather(table, _TABLE, table.dtype)


def _scatter(rules: sharding.ShardingRules, gradient: jax.Array, table: jax.Array) -> jax.Array:
  """The gradient of this device's part of a chunk of `table`, from that of the whole chunk."""
  rows = gradient.shape[0] * _blocks(rules, own=True) // _blocks(rules)
  (part,) = jax.linear_transpose(
    functools.partial(_gather, rules), jax.ShapeDtypeStruct((rows, table.shape[1]), gradient.dtype)
  )(gradient)
  return part


def _blocks(rules: sharding.ShardingRules, own: bool = False) -> int:
  """Of how many blocks a chunk consists, a block of rows from each device over which a table's rows lie; own: of the
  table itself, where this device has its part alone by hand."""
  if rules.gathered(_TABLE) == 0:
    return 1 if own else sharding.axis_size("fsdp")
  return sharding.axis_size("tensor")


def number_of_chunks(rows: int, chunk: int, blocks: int = 1) -> int:
  """Into how many chunks of as many `blocks` tables of so many rows are cut: as few as have no more than `chunk`
  rows (0: one)."""
  per_block = rows // blocks
  return next(
    n for n in range(1, per_block + 1) if per_block % n == 0 and (not chunk or rows // n <= chunk or n == per_block)
  )


def _apart(rules: sharding.ShardingRules, table: jax.Array, n: int, blocks: int) -> jax.Array:
  """A table (V, ...) as (n, V / n, ...): chunks of rows, of each block some, so that none has to be moved."""
  cut = table.reshape(blocks, n, -1, *table.shape[1:]).swapaxes(0, 1).reshape(n, -1, *table.shape[1:])
  return rules.constrain(cut, None, "vocab", *(None,) * (table.ndim - 1))


def _together(cut, blocks: int):
  """The inverse of `_apart`, of a tree."""
  one = lambda x: x.reshape(len(x), blocks, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(one, cut)


def _over_chunks(step, carry, tables, wholes, chunk: int, rules: sharding.ShardingRules):
  """step(carry, tables, wholes) -> (carry, results) for one chunk of them after another, as jax.lax.scan; the tables'
  are gathered.

  Results are stacked, (1, ...) for one chunk.
  """
  blocks = _blocks(rules)
  n = number_of_chunks(wholes[0].shape[0], chunk, blocks)
  gather = lambda tree: jax.tree.map(functools.partial(_gather, rules), tree)
  if n == 1:
    carry, found = step(carry, gather(tables), wholes)
    return carry, jax.tree.map(lambda x: x[None], found)
  cut = lambda tree, blocks: jax.tree.map(lambda x: _apart(rules, x, n, blocks), tree)
  tables, wholes = cut(tables, _blocks(rules, own=True)), cut(wholes, blocks)
  if rules.gathered(_TABLE) is None:
    return jax.lax.scan(lambda carry, part: step(carry, *part), carry, (tables, wholes))
  some = lambda i: gather(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tables))

  def ahead(state, part):
    # While one chunk is computed with, the next is gathered; beside the last, the first once more.
    (carry, here), (i, whole) = state, part
    following = some((i + 1) % n)
    carry, found = step(carry, here, whole)
    return (carry, following), found

  (carry, _), found = jax.lax.scan(ahead, (carry, some(0)), (jnp.arange(n), wholes))
  return carry, found


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _like(gradient, tree):
  return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, tree)
