"""What is as wide as the vocabulary, some of its rows at a time: log-probabilities of tokens, and means under beliefs.

Sums over the vocabulary are gathered chunk by chunk, as attention's are over keys (FlashAttention, Dao et al., 2022), so that logits are in
memory for one chunk of the vocabulary alone; the backward pass computes them anew. In chunks of the vocabulary, and not of the tokens, each
row of the tables is read once, and its gradient is written once, not added up. One chunk is the plain computation, which keeps its logits.

Letters in names: V vocabulary (rows of the tables), D width, M code elements. `...` are the axes of the tokens that are read.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import flow
from evo_jax import sharding
from evo_jax.sharding import RULES

FORBIDDEN = -1e9  # the logit of rows beyond the vocabulary


@flax.struct.dataclass
class Beliefs:
  """Logits c + E y, for some tokens (...), of one or several evidence vectors.

  hidden (..., D): whose logits are the context's, c = hidden @ table.T; None: c is 0. evidence: tuple of y (..., M) float32, one a belief;
  empty: one belief, c alone. codes_VxM: E; None where there is no evidence.
  """

  hidden: jax.Array | None
  evidence: tuple[jax.Array, ...] = ()
  codes_VxM: jax.Array | None = None

  def logits(self, table_VxD: jax.Array | None, bias_V: jax.Array) -> list[jax.Array]:
    """The beliefs' logits (..., V) float32, not normalized: c + E y + bias."""
    context = bias_V
    if self.hidden is not None:
      context = jnp.einsum("...d,vd->...v", self.hidden, table_VxD, preferred_element_type=jnp.float32) + bias_V
    return [flow.belief(context, self.codes_VxM, y) for y in self.evidence] or [context]

  def pull(self, cotangents: list[jax.Array], table_VxD: jax.Array | None) -> tuple["Beliefs", jax.Array | None]:
    """What cotangents (..., V) of `logits` are for the fields and for the table, all float32."""
    evidence = tuple(jnp.einsum("...v,vm->...m", d, self.codes_VxM) for d in cotangents if self.evidence)
    codes = sum(_outer(d, y) for d, y in zip(cotangents, self.evidence)) if self.evidence else None
    if self.hidden is None:
      return Beliefs(None, evidence, codes), None
    d = sum(cotangents).astype(self.hidden.dtype)
    hidden = jnp.einsum("...v,vd->...d", d, table_VxD, preferred_element_type=jnp.float32)
    return Beliefs(hidden, evidence, codes), _outer(d, self.hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_probs(chunk: int, beliefs: tuple[Beliefs, ...], tokens: tuple[jax.Array, ...], table_VxD: jax.Array,
              bias_V: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
  """log softmax(c + E y + bias)[token] in nats (...), float32, of each of the beliefs' evidence vectors.

  Args:
    chunk: rows of the vocabulary whose logits are in memory at a time; 0: all, and they are kept for the backward pass.
    beliefs, tokens: of some tokens (...) each; several share a reading of the table.
    table_VxD: the table that `hidden` asks, in the dtype in which to multiply.
    bias_V: float32, such as FORBIDDEN for rows that are no token; it is not taught.
  """
  return _log_probs(chunk, beliefs, tokens, table_VxD, bias_V)[0]


def _log_probs(chunk, beliefs, tokens, table_VxD, bias_V):
  def step(_, part):
    ids, bias, table, codes = part
    logits = [b.replace(codes_VxM=c).logits(table, bias) for b, c in zip(beliefs, codes)]
    sums = tuple(tuple((jax.nn.logsumexp(x, axis=-1), jnp.sum(jnp.where(_is(ids, token), x, 0.0), axis=-1)) for x in some)
                 for some, token in zip(logits, tokens))
    return None, (sums, None if chunk else logits)

  _, (sums, logits) = _over_chunks(step, None, _tables(beliefs, table_VxD, bias_V), chunk)
  total = tuple(tuple(jax.nn.logsumexp(t, axis=0) for t, _ in some) for some in sums)
  found = tuple(tuple(jnp.sum(own, axis=0) - t for (_, own), t in zip(some, ts)) for some, ts in zip(sums, total))
  return found, (beliefs, tokens, table_VxD, bias_V, total, logits)


def _log_probs_gradient(chunk, saved, cotangents):
  beliefs, tokens, table_VxD, bias_V, total, kept = saved

  def step(inputs, part):
    ids, bias, table, codes = part
    pulled = []
    for i, (b, c) in enumerate(zip(beliefs, codes)):
      b = b.replace(codes_VxM=c)
      logits = b.logits(table, bias) if kept is None else [x[0] for x in kept[i]]
      # The token's own is found by comparing: by indexing it would be a scatter.
      pulled.append(b.pull([g[..., None] * (_is(ids, tokens[i]) - jnp.exp(x - t[..., None]))
                            for x, t, g in zip(logits, total[i], cotangents[i])], table))
    inputs = _add(inputs, tuple((p.hidden, p.evidence) for p, _ in pulled))
    return inputs, (sum(t for _, t in pulled).astype(table.dtype), tuple(p.codes_VxM for p, _ in pulled))

  inputs, (table, codes) = _over_chunks(step, _zeros(tuple((b.hidden, b.evidence) for b in beliefs)),
                                        _tables(beliefs, table_VxD, bias_V), chunk)
  found = tuple(_like(Beliefs(*own, None if c is None else _together(c)), b) for own, c, b in zip(inputs, codes, beliefs))
  return found, (None,) * len(tokens), _together(table), jnp.zeros_like(bias_V)


log_probs.defvjp(_log_probs, _log_probs_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean(chunk: int, belief: Beliefs, values_VxA: jax.Array, table_VxD: jax.Array | None, bias_V: jax.Array) -> jax.Array:
  """sum_v p(v) values[v] (..., A) float32, p = softmax(c + E y + bias), for beliefs of one evidence vector.

  chunk, table_VxD, bias_V: as of `log_probs`; in one chunk the bias may be (..., V). Products with the values are done in their dtype.
  """
  return _mean(chunk, belief, values_VxA, table_VxD, bias_V)[0]


def _mean(chunk, belief, values_VxA, table_VxD, bias_V):
  def step(carry, part):
    (_, bias, table, (codes,)), values = part
    top, total, mean_ = carry
    (logits,) = belief.replace(codes_VxM=codes).logits(table, bias)
    new = jnp.maximum(top, jnp.max(logits, axis=-1))
    weights, fade = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
    mean_ = mean_ * fade[..., None] + jnp.einsum("...v,va->...a", weights.astype(values.dtype), values,
                                                 preferred_element_type=jnp.float32)
    return (new, total * fade + jnp.sum(weights, axis=-1), mean_), None if chunk else logits

  tables = _tables((belief,), table_VxD, bias_V), values_VxA
  shape = belief.evidence[0].shape[:-1]
  start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, values_VxA.shape[1]))
  (top, total, mean_), logits = _over_chunks(step, start, tables, chunk)
  found = mean_ / total[..., None]
  return found, (belief, values_VxA, table_VxD, bias_V, top + jnp.log(total), found, logits)


def _mean_gradient(chunk, saved, cotangent):
  belief, values_VxA, table_VxD, bias_V, total, found, kept = saved
  narrow = cotangent.astype(values_VxA.dtype)
  common = jnp.sum(cotangent * found, axis=-1)

  def step(inputs, part):
    (_, bias, table, (codes,)), values = part
    b = belief.replace(codes_VxM=codes)
    logits = b.logits(table, bias)[0] if kept is None else kept[0]
    weights = jnp.exp(logits - total[..., None])
    own = jnp.einsum("...a,va->...v", narrow, values, preferred_element_type=jnp.float32)
    pulled, table_gradient = b.pull([weights * (own - common[..., None])], table)
    values_gradient = _outer(weights.astype(values.dtype), narrow)
    table_gradient = None if table is None else table_gradient.astype(table.dtype)
    return _add(inputs, (pulled.hidden, pulled.evidence)), (values_gradient.astype(values.dtype), table_gradient, pulled.codes_VxM)

  (hidden, evidence), gradients = _over_chunks(step, _zeros((belief.hidden, belief.evidence)),
                                               (_tables((belief,), table_VxD, bias_V), values_VxA), chunk)
  values, table, codes = jax.tree.map(_together, gradients)
  return _like(Beliefs(hidden, evidence, codes), belief), values, table, jnp.zeros_like(bias_V)


mean.defvjp(_mean, _mean_gradient)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
  """(A, B) float32 from (..., A) and (..., B): their outer products, summed over all else."""
  lead = tuple(range(a.ndim - 1))
  return jnp.tensordot(a, b, (lead, lead), preferred_element_type=jnp.float32)


def _is(ids_V: jax.Array, token: jax.Array) -> jax.Array:
  return ids_V == token[..., None]


def _tables(beliefs, table_VxD, bias_V):
  """What is cut into chunks: numbers of the rows, bias, table, and the codes of each of the beliefs."""
  return jnp.arange(bias_V.shape[-1]), bias_V, table_VxD, tuple(b.codes_VxM for b in beliefs)


def chunks_of(rows: int, chunk: int) -> int:
  """Into how many chunks tables of so many rows are cut: as few as divide them into no more than `chunk` (0: one)."""
  parts = sharding.axis_size("tensor")
  return next(n for n in range(1, rows + 1) if rows % (n * parts) == 0 and (not chunk or rows // n <= chunk or n * parts == rows))


def _apart(table: jax.Array, n: int) -> jax.Array:
  """A table (V, ...) as (n, V / n, ...): chunks of rows, of each device of `tensor` some, so that none is gathered."""
  parts = sharding.axis_size("tensor")
  cut = table.reshape(parts, n, -1, *table.shape[1:]).swapaxes(0, 1).reshape(n, -1, *table.shape[1:])
  return RULES.constrain(cut, None, "vocab", *(None,) * (table.ndim - 1))


def _together(cut: jax.Array) -> jax.Array:
  """The inverse of `_apart`."""
  parts, n = sharding.axis_size("tensor"), cut.shape[0]
  return cut.reshape(n, parts, -1, *cut.shape[2:]).swapaxes(0, 1).reshape(-1, *cut.shape[2:])


def _over_chunks(step, carry, tables, chunk: int):
  """jax.lax.scan of step(carry, chunk of the tables) -> (carry, results) over the chunks; results are stacked, (1, ...) for one chunk."""
  n = chunks_of(jax.tree.leaves(tables)[0].shape[0], chunk)
  if n == 1:
    carry, found = step(carry, tables)
    return carry, jax.tree.map(lambda x: x[None], found)
  return jax.lax.scan(step, carry, jax.tree.map(lambda x: _apart(x, n), tables))


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _like(gradient, tree):
  return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, tree)
