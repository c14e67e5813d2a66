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

  anchor_BxN: int32, the anchors' positions; a window sees clean positions before its anchor. x_BxNxSxD: embedded slots.
  time_BxNxS: their progressions t; 0 for the anchor and other known tokens.
  """

  anchor_BxN: jax.Array
  x_BxNxSxD: jax.Array
  time_BxNxS: jax.Array


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


def outer_sum(a: jax.Array, b: jax.Array) -> jax.Array:
  """(A, B) float32 from (..., A) and (..., B): their outer products, summed over the leading axes."""
  lead = tuple(range(a.ndim - 1))
  return jnp.tensordot(a, b, (lead, lead), preferred_element_type=jnp.float32)


class Network(Protocol):
  """What the objective and the bound need of a network; `network.evo.Evo` bound to parameters has it."""

  def codes(self) -> jax.Array: ...
  def embed_tokens(self, tokens: jax.Array) -> jax.Array: ...
  def embed(
    self, latents, codes, prior_logits, embeddings=None, previous_hidden=None, chunk: int = 0
  ) -> tuple[jax.Array, ...]: ...
  def clean(self, tokens_BxL, segments_BxL=None, x_BxLxD=None) -> tuple[jax.Array, Any]: ...
  def window(self, cache: Any, windows: WindowInputs) -> jax.Array: ...
  def forward(self, x_BxLxD, segments_BxL, windows: WindowInputs, one_pass: bool) -> tuple[jax.Array, jax.Array]: ...
  def logits(self, hidden: jax.Array) -> jax.Array: ...
  def log_probs(self, beliefs, tokens, chunk: int = 0) -> tuple[tuple[jax.Array, ...], ...]: ...
  def clock_prior(self, hidden_BxNxD, size, passes_BxN) -> tuple[jax.Array, jax.Array, jax.Array]: ...
  def clock_posterior(
    self, hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN
  ) -> tuple[jax.Array, jax.Array]: ...
