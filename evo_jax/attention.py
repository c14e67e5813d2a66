"""Attention over the keys of a run of slots and, before them, of the clean stream. One `attend()`.

Letters in names: B batch, N runs of slots (windows; 1 for the clean stream), S slots of a run, L clean positions,
H heads, K heads for keys and values, G = H / K, E elements of a head.
"""

import jax
import jax.numpy as jnp


def attend(q_BxNxSxHxE: jax.Array, k_BxNxSxKxE: jax.Array, v_BxNxSxKxE: jax.Array, visible_NxSxS: jax.Array,
           past: tuple[jax.Array, jax.Array] | None = None, past_visible_BxNxL: jax.Array | None = None) -> jax.Array:
  """Softmax attention of every slot to the slots of its own run and to the clean past; returns (B, N, S, H, E).

  Args:
    q_BxNxSxHxE: queries. Heads h and h' share keys if h // G == h' // G (grouped-query attention).
    k_BxNxSxKxE, v_BxNxSxKxE: keys and values of the run's own slots.
    visible_NxSxS: bool, broadcastable to (B, N, S, S): which slots a slot sees. Each sees at least itself.
    past: keys and values (B, L, K, E) of the clean stream, shared by the N runs; None: there is no past.
    past_visible_BxNxL: bool, which clean positions a run sees.

  One softmax spans both parts, computed in float32. The result has q's dtype.
  """
  B, N, S, H, E = q_BxNxSxHxE.shape
  K = k_BxNxSxKxE.shape[-2]
  q = (q_BxNxSxHxE * E**-0.5).reshape(B, N, S, K, H // K, E)
  f32 = dict(preferred_element_type=jnp.float32)
  scores = jnp.einsum("bnskge,bntke->bnkgst", q, k_BxNxSxKxE, **f32)
  visible = jnp.broadcast_to(visible_NxSxS, (B, N, S, S))[:, :, None, None]
  scores = jnp.where(visible, scores, -jnp.inf)
  if past is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bnkgst,bntke->bnskge", weights, v_BxNxSxKxE)
    return out.reshape(B, N, S, H, E)
  past_k, past_v = past
  past_scores = jnp.einsum("bnskge,blke->bnkgsl", q, past_k, **f32)
  past_scores = jnp.where(past_visible_BxNxL[:, :, None, None, None, :], past_scores, -jnp.inf)
  L = past_k.shape[1]
  weights = jax.nn.softmax(jnp.concatenate([past_scores, scores], axis=-1), axis=-1).astype(q.dtype)
  out = (jnp.einsum("bnkgsl,blke->bnskge", weights[..., :L], past_v)
         + jnp.einsum("bnkgst,bntke->bnskge", weights[..., L:], v_BxNxSxKxE))
  return out.reshape(B, N, S, H, E)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding (Su et al., 2021), first half against second half, as in Llama.

  x: (..., S, heads, E); positions: (..., S) int32, broadcastable. Angles are in float32, the result has x's dtype.
  """
  half = x.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
