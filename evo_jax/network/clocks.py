"""Heads that infer the learned clock."""

import jax
import jax.numpy as jnp

CLOCK_DIM = 64  # inner width of the heads that infer clocks
DELAY_SPREAD, SHARPNESS = 0.2, 8.0  # standard deviation of delays, and sharpness, before training
PHASE = 8  # of the slot features, a token's place in its stream


def slot_features(size: int, passes: jax.Array) -> jax.Array:
  """(..., size, 12) float32: a token's place in its window as cosines; its place in its stream, were the window
  walked in as many streams as `passes` (...) ask for, on the scale of delays; and the number of passes."""
  index = jnp.arange(size)
  place = jnp.cos(jnp.pi * (index[:, None] + 0.5) / size * jnp.arange(8))
  passes = passes[..., None]
  phase = (index % jnp.maximum(passes, 1) + 0.5) / jnp.maximum(passes, 1)
  passes = passes.astype(jnp.float32)
  counts = jnp.concatenate([jnp.log2(passes) / 4.0, 1.0 / passes, passes / size], axis=-1)[..., None, :]
  shape = (*counts.shape[:-2], size)
  return jnp.concatenate(
    [
      jnp.broadcast_to(place, (*shape, 8)),
      jnp.log(phase / (1.0 - phase))[..., None],
      jnp.broadcast_to(counts, (*shape, 3)),
    ],
    axis=-1,
  )
