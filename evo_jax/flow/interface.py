"""What the flow asks of a network: the values that go in and out, and the methods that it needs.

Letters in names: B batch, L clean positions, N windows, W tokens of a window, S = W + 1 slots, D width, V vocabulary,
M code elements.
"""

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.flow import latents as latents_lib


@flax.struct.dataclass
class WindowInputs:
  """The slots of windows as a network reads them: a clean anchor token and, after it, tokens at any t.

  anchor_BxN: int32, the positions of the anchors; a window sees clean positions before its first slot. x_BxNxSxD:
  embedded slots. time_BxNxS: their progressions t; 0 for the anchor and other known tokens. all_unknown: whether it is
  known beforehand that t is 1 everywhere. skips_anchor: whether the first slot is the one behind the anchor, which the
  clean stream has; for networks whose slots are informed by what is known alone.
  """

  anchor_BxN: jax.Array
  x_BxNxSxD: jax.Array
  time_BxNxS: jax.Array
  all_unknown: bool = flax.struct.field(pytree_node=False, default=False)
  skips_anchor: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def first_BxN(self) -> jax.Array:
    """int32, the positions of the first slots."""
    return self.anchor_BxN + int(self.skips_anchor)


@flax.struct.dataclass
class Beliefs:
  """Logits c + E y of the beliefs about some tokens (...), for one or several evidence vectors.

  hidden (..., D): hidden states, whose logits are the context's, c = hidden @ table.T; None: c is 0. evidence: a tuple
  of y (..., M) float32, one for each belief; empty: a single belief, c alone. codes_VxM: E; None without evidence.
  """

  hidden: jax.Array | None
  evidence: tuple[jax.Array, ...] = ()
  codes_VxM: jax.Array | None = None

  def logits(self, table_VxD: jax.Array | None, bias_V: jax.Array) -> list[jax.Array]:
    """The beliefs' logits (..., V) float32, not normalized: c + E y + bias."""
    context = bias_V
    if self.hidden is not None:
      context = jnp.einsum("...d,vd->...v", self.hidden, table_VxD, preferred_element_type=jnp.float32) + bias_V
    return [latents_lib.belief_logits(context, self.codes_VxM, y) for y in self.evidence] or [context]

  def pull_back(self, cotangents: list[jax.Array], table_VxD: jax.Array | None) -> tuple["Beliefs", jax.Array | None]:
    """The vector-Jacobian product of `logits`: cotangents (..., V) pulled back to the fields and to the table, all
    float32."""
    evidence = tuple(jnp.einsum("...v,vm->...m", d, self.codes_VxM) for d in cotangents if self.evidence)
    codes = sum(outer_sum(d, y) for d, y in zip(cotangents, self.evidence)) if self.evidence else None
    if self.hidden is None:
      return Beliefs(None, evidence, codes), None
    d = sum(cotangents).astype(self.hidden.dtype)
    hidden = jnp.einsum("...v,vd->...d", d, table_VxD, preferred_element_type=jnp.float32)
    return Beliefs(hidden, evidence, codes), outer_sum(d, self.hidden)


@flax.struct.dataclass
class Teacher:
  """The clean stream's beliefs about the tokens of a text, from which others are to be learned.

  hidden_BxLxD: its hidden states; token_BxL: int32, the tokens that they predict; index: (B, ...) int32, which of them
  is about each token (B, ...) of the student.
  """

  hidden_BxLxD: jax.Array
  token_BxL: jax.Array
  index: jax.Array

  def gather(self, values_BxL: jax.Array) -> jax.Array:
    """values (B, L, ...) of the student's tokens (B, ..., ...); behind the end, those at the end."""
    rest = values_BxL.shape[2:]
    flat = self.index.reshape(self.index.shape[0], -1, *(1,) * len(rest))
    return jnp.take_along_axis(values_BxL, flat, axis=1, mode="clip").reshape(*self.index.shape, *rest)


@flax.struct.dataclass
class Distillation:
  """Beliefs about tokens (B, ...) beside the clean stream's about the same tokens; float32, in nats.

  log_p: log-probabilities of the tokens. kl: KL divergences from the clean stream's beliefs. overlap: sums over the
  vocabulary of the smaller of both probabilities, 1 - their total variation; None where the vocabulary is read in
  chunks. best: (B, ..., count) int32, the tokens with the highest logits, the best first. teacher_log_p_BxL,
  teacher_log_sum_BxL, teacher_best: log-probabilities of the tokens in the clean stream, what its logits are
  normalized by, and its best tokens (B, L, count), without gradient.
  """

  log_p: jax.Array
  kl: jax.Array
  overlap: jax.Array | None
  best: jax.Array
  teacher_log_p_BxL: jax.Array
  teacher_log_sum_BxL: jax.Array
  teacher_best: jax.Array


def outer_sum(a: jax.Array, b: jax.Array) -> jax.Array:
  """(A, B) float32 from (..., A) and (..., B): their outer products, summed over the leading axes."""
  lead = tuple(range(a.ndim - 1))
  return jnp.tensordot(a, b, (lead, lead), preferred_element_type=jnp.float32)


class Network(Protocol):
  """What the objective and the bound need of a network; `network.evo.Evo` bound to parameters has it."""

  @property
  def reads_clean_anchor(self) -> bool: ...
  @property
  def head_candidates(self) -> int: ...
  def codes(self) -> jax.Array: ...
  def embed_tokens(self, tokens: jax.Array) -> jax.Array: ...
  def embed(
    self, latents, codes, prior_logits, embeddings=None, previous_hidden=None, chunk: int = 0
  ) -> tuple[jax.Array, ...]: ...
  def clean(self, tokens_BxL, segments_BxL=None, x_BxLxD=None) -> tuple[jax.Array, Any]: ...
  def window(self, cache: Any, windows: WindowInputs) -> jax.Array: ...
  def forward(self, x_BxLxD, segments_BxL, windows: WindowInputs, one_pass: bool) -> tuple[jax.Array, jax.Array]: ...
  def embed_unknown(self, prior_logits: jax.Array, chunk: int = 0) -> jax.Array: ...
  def logits(self, hidden: jax.Array) -> jax.Array: ...
  def token_logits(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array: ...
  def rescore(self, hidden, previous_token, candidates, logits) -> jax.Array: ...
  def log_probs(self, beliefs, tokens, chunk: int = 0) -> tuple[tuple[jax.Array, ...], ...]: ...
  def distillation(self, student: Beliefs, tokens, teacher: Teacher, best, chunk: int = 0) -> Distillation: ...
  def clock_prior(self, hidden_BxNxD, size, passes_BxN) -> tuple[jax.Array, jax.Array, jax.Array]: ...
  def clock_posterior(
    self, hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN
  ) -> tuple[jax.Array, jax.Array]: ...
