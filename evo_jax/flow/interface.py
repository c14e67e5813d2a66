"""What the flow asks of a network."""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.flow import latents as latents_lib


class Network(Protocol):
  """What the objective needs of a network; `Evo.bind` gives it (see model.py for shapes)."""

  def codes(self): ...
  def clean(self, tokens_BxL, x_BxLxD=None): ...
  def window(self, cache, anchor_BxN, x_BxNxSxD, time_BxNxS): ...
  def clean_and_window(self, tokens_BxL, x_BxLxD, anchor_BxN, x_BxNxSxD, time_BxNxS): ...
  def slots(self, past, read_B, x_BxSxD, time_BxS, position_BxS, visible_BxSxS): ...
  def embed(self, latents, codes, prior_logits, own=None, before=None, chunk=0): ...
  def logits(self, hidden): ...
  def log_probs(self, beliefs, tokens, chunk=0): ...
  def embed_tokens(self, tokens): ...
  def clock_prior(self, hidden_BxNxD, size, passes_BxN): ...
  def clock_posterior(self, hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN): ...


@flax.struct.dataclass
class Beliefs:
  """Logits c + E y, for some tokens (...), of one or several evidence vectors.

  hidden (..., D): whose logits are the context's, c = hidden @ table.T; None: c is 0. evidence: tuple of y (..., M)
  float32, one a belief; empty: one belief, c alone. codes_VxM: E; None where there is no evidence.
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

  def pull(self, cotangents: list[jax.Array], table_VxD: jax.Array | None) -> tuple["Beliefs", jax.Array | None]:
    """What cotangents (..., V) of `logits` are for the fields and for the table, all float32."""
    evidence = tuple(jnp.einsum("...v,vm->...m", d, self.codes_VxM) for d in cotangents if self.evidence)
    codes = sum(outer_sum(d, y) for d, y in zip(cotangents, self.evidence)) if self.evidence else None
    if self.hidden is None:
      return Beliefs(None, evidence, codes), None
    d = sum(cotangents).astype(self.hidden.dtype)
    hidden = jnp.einsum("...v,vd->...d", d, table_VxD, preferred_element_type=jnp.float32)
    return Beliefs(hidden, evidence, codes), outer_sum(d, self.hidden)


def outer_sum(a: jax.Array, b: jax.Array) -> jax.Array:
  """(A, B) float32 from (..., A) and (..., B): their outer products, summed over all else."""
  lead = tuple(range(a.ndim - 1))
  return jnp.tensordot(a, b, (lead, lead), preferred_element_type=jnp.float32)
