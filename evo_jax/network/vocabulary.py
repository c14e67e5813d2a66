"""Blockwise softmax over the vocabulary: log-probabilities of tokens, expectations under beliefs, distillation.

Sums over the vocabulary are accumulated chunk by chunk, as attention's are over keys (FlashAttention, Dao et al.,
2022), so that logits are in memory for one chunk of the vocabulary alone; the backward pass recomputes them. In chunks
of the vocabulary, and not of the tokens, each row of the tables is read once, and its gradient is written once, not
accumulated. Inside a `shard_map` a chunk of the table is all-gathered while the one before is read, and its gradient is
reduce-scattered at once: no device has the whole table. A single chunk is the plain computation, which keeps its
logits.

Letters in names: V vocabulary (rows of the tables), D width, M code elements. `...` are the axes of the tokens.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from evo_jax.flow.interface import Beliefs, Distillation, Teacher, outer_sum
from evo_jax.parallel.sharding import Layout

RARE_BRANCH = "rare_branch"  # the named scope of a branch that almost never runs: estimates of compute leave it out
FORBIDDEN = -1e9  # the logit of rows beyond the vocabulary
_TABLE = ("vocab", "embed")  # logical axes of the tables
_FAR = 40.0  # nats; exp(40) times as many rows as there ever are is less than float32's largest, exp(88)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def log_probs(
  chunk: int,
  layout: Layout,
  beliefs: tuple[Beliefs, ...],
  tokens: tuple[jax.Array, ...],
  table_VxD: jax.Array,
  bias_V: jax.Array,
) -> tuple[tuple[jax.Array, ...], ...]:
  """log softmax(c + E y + bias)[token] in nats (...), float32, for each of the beliefs' evidence vectors.

  Args:
    chunk: rows of the vocabulary whose logits are in memory at a time; 0: all, and they are kept for the backward pass.
    layout: how the table is sharded.
    beliefs, tokens: about some tokens (...) each; several groups share a reading of the table.
    table_VxD: the table that makes context logits of hidden states, in the dtype in which to multiply; inside a
      `shard_map` this device's shard of it.
    bias_V: float32, such as FORBIDDEN for rows that are no token; it receives no gradient.
  """
  return _log_probs(chunk, layout, beliefs, tokens, table_VxD, bias_V)[0]


def _log_probs(chunk, layout, beliefs, tokens, table_VxD, bias_V):
  """The result, and the residuals of the backward pass. The carry holds, for each belief, the log of the summed
  exponentials so far and the token's own logit."""

  def step(carry, table, part):
    ids, bias, codes = part
    chunks = [b.replace(codes_VxM=c) for b, c in zip(beliefs, codes)]
    logits = [b.logits(table, bias) for b in chunks]
    carry = tuple(
      tuple(
        (
          _add_exponentials(b, x, log_sum, table, bias, chunk),
          own + jnp.sum(jnp.where(_is_token(ids, token), x, 0.0), axis=-1),
        )
        for x, (log_sum, own) in zip(group, sums)
      )
      for b, group, token, sums in zip(chunks, logits, tokens, carry)
    )
    return carry, None if chunk else logits

  start = lambda token: (jnp.full(token.shape, -jnp.inf), jnp.zeros(token.shape))
  carry = tuple(tuple(start(token) for _ in b.evidence or (None,)) for b, token in zip(beliefs, tokens))
  sums, logits = _scan_chunks(step, carry, table_VxD, _replicated(beliefs, bias_V), chunk, layout)
  result = tuple(tuple(own - log_sum for log_sum, own in group) for group in sums)
  log_sums = tuple(tuple(log_sum for log_sum, _ in group) for group in sums)
  return result, (beliefs, tokens, table_VxD, bias_V, log_sums, logits)


def _add_exponentials(belief, logits, log_sum, table, bias, chunk):
  if belief.evidence or not chunk:
    # Evidence may put a token far above all others; logits that are kept are written anyway.
    return jnp.logaddexp(log_sum, jax.nn.logsumexp(logits, axis=-1))
  return _add_near_exponentials(logits, log_sum, lambda: belief.logits(table, bias)[0])


def _add_near_exponentials(logits: jax.Array, log_sum: jax.Array, recompute: Callable[[], jax.Array]) -> jax.Array:
  """log(exp(log_sum) + sum_v exp(logits[v])) (...) of logits (..., V); log_sum (...) is -inf where nothing precedes.

  In one reading, which a compiler fuses with the product that makes the logits, so that they are never written: the
  running sum stands for the largest logit, from which it is seldom far. Where it is far, the sum would overflow or
  vanish: then all logits are recomputed, by `recompute`, and their maximum is found first.
  """
  begun = log_sum > -jnp.inf
  near = jnp.where(begun, log_sum, 0.0)
  maximum, total = jnp.max(logits, axis=-1), jnp.sum(jnp.exp(logits - near[..., None]), axis=-1)
  fits = (maximum < near + _FAR) & (begun | (maximum > near - _FAR))
  exact = jax.named_scope(RARE_BRANCH)(lambda: jax.nn.logsumexp(recompute(), axis=-1))
  return jnp.logaddexp(log_sum, jax.lax.cond(jnp.all(fits), lambda: near + jnp.log(total), exact))


def _log_probs_vjp(chunk, layout, residuals, cotangents):
  beliefs, tokens, table_VxD, bias_V, log_sums, saved_logits = residuals

  def step(inputs, table, part):
    ids, bias, codes = part
    gradients = []
    for i, (belief, c) in enumerate(zip(beliefs, codes)):
      belief = belief.replace(codes_VxM=c)
      logits = belief.logits(table, bias) if saved_logits is None else [x[0] for x in saved_logits[i]]
      # The token's own row is found by comparing: by indexing it would be a scatter.
      d_logits = [
        g[..., None] * (_is_token(ids, tokens[i]) - jnp.exp(x - log_sum[..., None]))
        for x, log_sum, g in zip(logits, log_sums[i], cotangents[i])
      ]
      gradients.append(belief.pull_back(d_logits, table))
    inputs = _add(inputs, tuple((b.hidden, b.evidence) for b, _ in gradients))
    d_table = _scatter(layout, sum(t for _, t in gradients).astype(table.dtype), table_VxD)
    return inputs, (d_table, tuple(b.codes_VxM for b, _ in gradients))

  start = _zeros(tuple((b.hidden, b.evidence) for b in beliefs))
  inputs, (d_table, d_codes) = _scan_chunks(step, start, table_VxD, _replicated(beliefs, bias_V), chunk, layout)
  d_codes = _merge_chunks(d_codes, _blocks(layout))
  d_beliefs = tuple(_cast_like(Beliefs(*own, c), b) for own, c, b in zip(inputs, d_codes, beliefs))
  d_table = _merge_chunks(d_table, _blocks(layout, shard=True))
  return d_beliefs, (None,) * len(tokens), d_table, jnp.zeros_like(bias_V)


log_probs.defvjp(_log_probs, _log_probs_vjp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expectations(
  chunk: int,
  layout: Layout,
  beliefs: tuple[Beliefs, ...],
  values_VxA: jax.Array,
  table_VxD: jax.Array | None,
  bias_V: jax.Array,
) -> tuple[jax.Array, ...]:
  """sum_v p(v) values[v] (..., A) float32 under each of the beliefs, p = softmax(c + E y + bias); each has one evidence
  vector.

  chunk, layout, table_VxD, bias_V: as for `log_probs`; with a single chunk the bias may be (..., V). values_VxA: a
  table, in whose dtype it is multiplied, sharded as `table_VxD`. Evidence, codes and values receive gradient; the
  hidden states and `table_VxD`, if any, do not.
  """
  return _expectations(chunk, layout, beliefs, values_VxA, table_VxD, bias_V)[0]


def _expectations(chunk, layout, beliefs, values_VxA, table_VxD, bias_V):
  """The result, and the residuals. The carry holds, for each belief, the maximum so far, the sum of exponentials and
  the weighted sum of values, both relative to the maximum."""

  def step(carry, tables, part):
    (values, table), (_, bias, codes) = tables, part
    after, kept = [], []
    for belief, c, (maximum, total, mean) in zip(beliefs, codes, carry):
      (logits,) = belief.replace(codes_VxM=c).logits(table, bias)
      new = jnp.maximum(maximum, jnp.max(logits, axis=-1))
      weights, decay = jnp.exp(logits - new[..., None]), jnp.exp(maximum - new)
      added = jnp.einsum("...v,va->...a", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
      after.append((new, total * decay + jnp.sum(weights, axis=-1), mean * decay[..., None] + added))
      kept.append(logits)
    return tuple(after), None if chunk else kept

  width = jax.eval_shape(functools.partial(_gather, layout), values_VxA).shape[1]
  start = lambda shape: (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width)))
  carry = tuple(start(b.evidence[0].shape[:-1]) for b in beliefs)
  sums, logits = _scan_chunks(step, carry, (values_VxA, table_VxD), _replicated(beliefs, bias_V), chunk, layout)
  means = tuple(mean / total[..., None] for _, total, mean in sums)
  log_sums = tuple(maximum + jnp.log(total) for maximum, total, _ in sums)
  return means, (beliefs, values_VxA, table_VxD, bias_V, log_sums, means, logits)


def _expectations_vjp(chunk, layout, residuals, cotangents):
  beliefs, values_VxA, table_VxD, bias_V, log_sums, means, saved_logits = residuals
  common = [jnp.sum(g * mean, axis=-1, keepdims=True) for g, mean in zip(cotangents, means)]
  cotangents = [g.astype(values_VxA.dtype) for g in cotangents]

  def step(d_evidence, tables, part):
    (values, table), (_, bias, codes) = tables, part
    gradients, d_values = [], 0.0
    for i, (belief, c, g) in enumerate(zip(beliefs, codes, cotangents)):
      belief = belief.replace(codes_VxM=c)
      logits = belief.logits(table, bias)[0] if saved_logits is None else saved_logits[i][0]
      weights = jnp.exp(logits - log_sums[i][..., None])
      own = jnp.einsum("...a,va->...v", g, values, preferred_element_type=jnp.float32)
      gradients.append(belief.replace(hidden=None).pull_back([weights * (own - common[i])], None)[0])
      d_values += outer_sum(weights.astype(values.dtype), g)
    d_values = _scatter(layout, d_values.astype(values.dtype), values_VxA)
    d_evidence = _add(d_evidence, tuple(b.evidence for b in gradients))
    return d_evidence, (d_values, tuple(b.codes_VxM for b in gradients))

  start = _zeros(tuple(b.evidence for b in beliefs))
  d_evidence, (d_values, d_codes) = _scan_chunks(
    step, start, (values_VxA, table_VxD), _replicated(beliefs, bias_V), chunk, layout
  )
  no_gradient = lambda x: None if x is None else jnp.zeros_like(x)
  d_codes = _merge_chunks(d_codes, _blocks(layout))
  d_beliefs = tuple(
    _cast_like(Beliefs(no_gradient(b.hidden), y, c), b) for b, y, c in zip(beliefs, d_evidence, d_codes)
  )
  d_values = _merge_chunks(d_values, _blocks(layout, shard=True))
  return d_beliefs, d_values, no_gradient(table_VxD), jnp.zeros_like(bias_V)


expectations.defvjp(_expectations, _expectations_vjp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def distillation(
  chunk: int,
  layout: Layout,
  best: tuple[int, int],
  student: Beliefs,
  tokens: jax.Array,
  teacher: Teacher,
  table_VxD: jax.Array,
  bias_V: jax.Array,
) -> Distillation:
  """Log-probabilities of tokens (B, ...) under the student's beliefs, and KL(teacher || student) in nats.

  The teacher's beliefs have the student's evidence, and receive no gradient; the table receives that of the student's
  logits. Each of the clean stream's logits is computed once, however many of the student's tokens are about its
  position. Of the results `log_p` and `kl` have gradients.

  chunk, layout, table_VxD, bias_V: as for `log_probs`. best: how many of the student's and of the clean stream's best
  tokens are asked for. student: with at most one evidence vector.
  """
  return _distillation(chunk, layout, best, student, tokens, teacher, table_VxD, bias_V)[0]


def _teacher_logits(student: Beliefs, teacher: Teacher, clean_logits: jax.Array) -> jax.Array:
  """The teacher's logits about the student's tokens, under the student's evidence."""
  return student.replace(hidden=None).logits(None, teacher.gather(clean_logits))[0]


def _distillation(chunk, layout, best, student, tokens, teacher, table_VxD, bias_V):
  """The result, and the residuals. The carry holds (maximum, sum of exponentials relative to it) of the student's, the
  teacher's and the clean stream's logits, the sum of what the teacher's exceed the student's by, weighted by the
  teacher's exponentials, the tokens' own logits, and the student's and the clean stream's best tokens."""

  def step(carry, table, part):
    ids, bias, (codes,) = part
    (q, p, clean), excess, (own, clean_own), (top, clean_top) = carry
    belief = student.replace(codes_VxM=codes)
    logits = belief.logits(table, bias)[0]
    clean_logits = Beliefs(teacher.hidden_BxLxD).logits(table, bias)[0]
    teacher_logits = _teacher_logits(belief, teacher, clean_logits)
    before, p = p[0], _add_maximum_and_sum(p, teacher_logits)
    added = jnp.sum(jnp.exp(teacher_logits - p[0][..., None]) * (teacher_logits - logits), axis=-1)
    sums = _add_maximum_and_sum(q, logits), p, _add_maximum_and_sum(clean, clean_logits)
    pick = lambda token, logits: jnp.sum(jnp.where(_is_token(ids, token), logits, 0.0), axis=-1)
    excess = excess * jnp.exp(before - p[0]) + added
    own = own + pick(tokens, logits), clean_own + pick(teacher.token_BxL, clean_logits)
    tops = _add_best(top, logits, ids), _add_best(clean_top, clean_logits, ids)
    return (sums, excess, own, tops), None if chunk else (logits, teacher_logits)

  start = lambda shape: (jnp.full(shape, -jnp.inf), jnp.zeros(shape))
  mine, all_clean = tokens.shape, teacher.token_BxL.shape
  sums = start(mine), start(mine), start(all_clean)
  none = lambda shape, count: (jnp.full((*shape, count), -jnp.inf), jnp.zeros((*shape, count), jnp.int32))
  tops = none(mine, best[0]), none(all_clean, best[1])
  carry = sums, jnp.zeros(mine), (jnp.zeros(mine), jnp.zeros(all_clean)), tops
  carry, logits = _scan_chunks(step, carry, table_VxD, _replicated((student,), bias_V), chunk, layout)
  sums, excess, (own, clean_own), (top, clean_top) = carry
  log_q, log_p, log_clean = (maximum + jnp.log(total) for maximum, total in sums)
  overlap = None
  if not chunk:
    q, p = (jnp.exp(x[0] - log_sum[..., None]) for x, log_sum in zip(logits, (log_q, log_p)))
    overlap = jnp.sum(jnp.minimum(q, p), axis=-1)
  kl = excess / sums[1][1] - log_p + log_q
  result = Distillation(own - log_q, kl, overlap, top[1], clean_own - log_clean, log_clean, clean_top[1])
  return result, (student, tokens, teacher, table_VxD, bias_V, log_q, log_p, logits)


def _add_maximum_and_sum(carry, logits):
  """(maximum, sum of exponentials relative to it) with some more logits (..., V)."""
  maximum, total = carry
  new = jnp.maximum(maximum, jnp.max(logits, axis=-1))
  return new, total * jnp.exp(maximum - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=-1)


def _add_best(best, logits, ids_V):
  """(logits, tokens) of the best of those so far (..., count) and of some more logits (..., V), the best first."""
  if not (count := best[0].shape[-1]):
    return best
  values, index = jax.lax.top_k(logits, min(count, len(ids_V)))
  values = jnp.concatenate([best[0], values], axis=-1)
  tokens = jnp.concatenate([best[1], ids_V[index]], axis=-1)
  values, index = jax.lax.top_k(values, count)
  return values, jnp.take_along_axis(tokens, index, axis=-1)


def _distillation_vjp(chunk, layout, best, residuals, cotangent):
  student, tokens, teacher, table_VxD, bias_V, log_q, log_p, saved_logits = residuals

  def step(inputs, table, part):
    ids, bias, (codes,) = part
    belief = student.replace(codes_VxM=codes)
    if saved_logits is None:
      logits = belief.logits(table, bias)[0]
      clean_logits = Beliefs(teacher.hidden_BxLxD).logits(table, bias)[0]
      teacher_logits = _teacher_logits(belief, teacher, clean_logits)
    else:
      logits, teacher_logits = (x[0] for x in saved_logits)
    q, p = jnp.exp(logits - log_q[..., None]), jnp.exp(teacher_logits - log_p[..., None])
    d_logits = cotangent.log_p[..., None] * (_is_token(ids, tokens) - q) + cotangent.kl[..., None] * (q - p)
    gradient, d_table = belief.pull_back([d_logits], table)
    d_table = _scatter(layout, d_table.astype(table.dtype), table_VxD)
    return _add(inputs, (gradient.hidden, gradient.evidence)), (d_table, gradient.codes_VxM)

  start = _zeros((student.hidden, student.evidence))
  inputs, (d_table, d_codes) = _scan_chunks(step, start, table_VxD, _replicated((student,), bias_V), chunk, layout)
  d_student = _cast_like(Beliefs(*inputs, _merge_chunks(d_codes, _blocks(layout))), student)
  d_table = _merge_chunks(d_table, _blocks(layout, shard=True))
  d_teacher = Teacher(jnp.zeros_like(teacher.hidden_BxLxD), None, None)
  return d_student, None, d_teacher, d_table, jnp.zeros_like(bias_V)


distillation.defvjp(_distillation, _distillation_vjp)


def _is_token(ids_V: jax.Array, token: jax.Array) -> jax.Array:
  return ids_V == token[..., None]


def _replicated(beliefs, bias_V):
  """What every device has all rows of: their ids, the bias, and the codes of each of the beliefs."""
  return jnp.arange(bias_V.shape[-1]), bias_V, tuple(b.codes_VxM for b in beliefs)


def _gather(layout: Layout, table: jax.Array) -> jax.Array:
  return layout.gather(table, _TABLE, table.dtype)


def _scatter(layout: Layout, gradient: jax.Array, table: jax.Array) -> jax.Array:
  """The gradient of this device's shard of a chunk of `table`, from that of the whole chunk."""
  rows = gradient.shape[0] * _blocks(layout, shard=True) // _blocks(layout)
  shape = jax.ShapeDtypeStruct((rows, table.shape[1]), gradient.dtype)
  (shard,) = jax.linear_transpose(functools.partial(_gather, layout), shape)(gradient)
  return shard


def _blocks(layout: Layout, shard: bool = False) -> int:
  """Of how many blocks a chunk consists: a block of rows from each device that a table's rows are sharded over; shard:
  of the table itself, where inside a `shard_map` this device has its shard alone."""
  if layout.gathered_axis(_TABLE) == 0:
    return 1 if shard else layout.size("fsdp")
  return layout.size("tensor")


def number_of_chunks(rows: int, chunk: int, blocks: int = 1) -> int:
  """Into how many chunks, of a multiple of `blocks` rows, tables of so many rows are cut: as few as have at most
  `chunk` rows each (0: one)."""
  per_block = rows // blocks
  return next(
    n for n in range(1, per_block + 1) if per_block % n == 0 and (not chunk or rows // n <= chunk or n == per_block)
  )


def _split_chunks(layout: Layout, table: jax.Array, n: int, blocks: int) -> jax.Array:
  """A table (V, ...) as (n, V / n, ...): chunks of rows, with rows of each block, so that none has to be moved."""
  cut = table.reshape(blocks, n, -1, *table.shape[1:]).swapaxes(0, 1).reshape(n, -1, *table.shape[1:])
  return layout.constrain(cut, None, "vocab", *(None,) * (table.ndim - 1))


def _merge_chunks(chunks, blocks: int):
  """The inverse of `_split_chunks`, for a tree."""
  merge = lambda x: x.reshape(len(x), blocks, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(merge, chunks)


def _scan_chunks(step, carry, tables, replicated, chunk: int, layout: Layout):
  """step(carry, tables, replicated) -> (carry, results), chunk by chunk, as jax.lax.scan; the tables' chunks are
  gathered. Results are stacked, (1, ...) for a single chunk."""
  blocks = _blocks(layout)
  n = number_of_chunks(replicated[0].shape[0], chunk, blocks)
  gather = lambda tree: jax.tree.map(functools.partial(_gather, layout), tree)
  if n == 1:
    carry, results = step(carry, gather(tables), replicated)
    return carry, jax.tree.map(lambda x: x[None], results)
  split = lambda tree, blocks: jax.tree.map(lambda x: _split_chunks(layout, x, n, blocks), tree)
  tables, replicated = split(tables, _blocks(layout, shard=True)), split(replicated, blocks)
  if layout.gathered_axis(_TABLE) is None:
    return jax.lax.scan(lambda carry, part: step(carry, *part), carry, (tables, replicated))
  gather_chunk = lambda i: gather(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tables))

  def step_with_prefetch(state, part):
    # While one chunk is computed with, the next is gathered; beside the last, the first once more.
    (carry, current), (i, replicated) = state, part
    following = gather_chunk((i + 1) % n)
    carry, results = step(carry, current, replicated)
    return (carry, following), results

  (carry, _), results = jax.lax.scan(step_with_prefetch, (carry, gather_chunk(0)), (jnp.arange(n), replicated))
  return carry, results


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _cast_like(gradient, tree):
  return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, tree)
