"""Rotary position embedding."""

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.parallel import sharding


def rotary_angles(positions: jax.Array, size: int, base: float) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine (B, 1, 1, N, S, E / 2) float32 by which `rotate` turns heads of `size` = E elements at positions
  (B, N, S), or (N, S) or (S,) where they are the same for all.
  """
  frequency = base ** (-jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
  positions = positions.reshape((1,) * (3 - positions.ndim) + positions.shape)  # B N S
  angle = positions[:, None, None, ..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: jax.Array, angles_: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary position embedding (Su et al., 2021) of x (..., E), first half against second half, as in Llama; by
  `angles`, whose leading axes broadcast with x's, in float32. The result has x's dtype."""
  if sharding.platform() == "tpu":
    return apply_rotary_by_product(x, *angles_)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = angles_
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def apply_rotary_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """`rotate`, where the halves change places by a product with a matrix of 0, 1 and -1, which is exact. For TPUs,
  which cut and join rows of 128 elements by way of arrays of 64 that are padded to 128: from the product that makes
  heads to attention and back took them 1.7 times as long. Angles are not taught.
  """
  half = x.shape[-1] // 2
  swap = np.kron([[0.0, 1.0], [-1.0, 0.0]], np.eye(half))  # (a, b) -> (-b, a)
  swapped = jnp.einsum(
    "...e,ef->...f",
    x,
    jnp.asarray(swap, x.dtype),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  twice = lambda a: jnp.concatenate([a, a], axis=-1)
  return (x.astype(jnp.float32) * twice(cos) + swapped * twice(sin)).astype(x.dtype)


apply_rotary_by_product.defvjp(
  lambda x, cos, sin: (apply_rotary_by_product(x, cos, sin), (cos, sin)),
  lambda angles_, g: (apply_rotary_by_product(g, angles_[0], -angles_[1]), None, None),
)
