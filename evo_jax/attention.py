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
  G = H // K
  # Heads to the front, so that every product is a plain batch of matrix products (XLA's CPU backend gains a third).
  q = (q_BxNxSxHxE * E**-0.5).reshape(B, N, S, K, G, E).transpose(0, 3, 1, 4, 2, 5)  # B K N G S E
  k, v = (x.transpose(0, 3, 1, 2, 4) for x in (k_BxNxSxKxE, v_BxNxSxKxE))  # B K N S E
  f32 = dict(preferred_element_type=jnp.float32)
  scores = jnp.einsum("bknme,bknte->bknmt", q.reshape(B, K, N, G * S, E), k, **f32).reshape(B, K, N, G, S, S)
  scores = jnp.where(jnp.broadcast_to(visible_NxSxS, (B, N, S, S))[:, None, :, None], scores, -jnp.inf)
  top = jnp.max(scores, axis=-1, keepdims=True)
  if past is not None:
    past_k, past_v = (x.transpose(0, 2, 1, 3) for x in past)  # B K L E
    past_scores = jnp.einsum("bkme,bkle->bkml", q.reshape(B, K, N * G * S, E), past_k, **f32)
    past_scores = past_scores.reshape(B, K, N, G, S, past_k.shape[2])
    past_scores = jnp.where(past_visible_BxNxL[:, None, :, None, None], past_scores, -jnp.inf)
    top = jnp.maximum(top, jnp.max(past_scores, axis=-1, keepdims=True))
  top = jax.lax.stop_gradient(top)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1)
  out = jnp.einsum("bknmt,bknte->bknme", weights.astype(q.dtype).reshape(B, K, N, G * S, S), v, **f32)
  if past is not None:
    past_weights = jnp.exp(past_scores - top)
    total += jnp.sum(past_weights, axis=-1)
    out += jnp.einsum("bkml,bkle->bkme", past_weights.astype(q.dtype).reshape(B, K, N * G * S, -1), past_v,
                      **f32).reshape(out.shape)
  out = out.reshape(B, K, N, G, S, E) / total[..., None]
  return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, N, S, H, E).astype(q.dtype)


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
