"""Rotary position embedding (Su et al., 2021), first half of a head against the second half, as in Llama."""

import jax
import jax.numpy as jnp
import numpy as np

Angles = tuple[jax.Array, jax.Array]  # cosine and sine


def rotary_angles(positions: jax.Array, size: int, base: float) -> Angles:
  """Cosine and sine (B, 1, 1, N, S, E / 2) float32 by which `apply_rotary` rotates heads of `size` = E elements at
  positions (B, N, S), or (N, S) or (S,) where they are the same for all."""
  frequency = base ** (-jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
  positions = positions.reshape((1,) * (3 - positions.ndim) + positions.shape)  # B N S
  angle = positions[:, None, None, ..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: jax.Array, angles: Angles, by_product: bool = False) -> jax.Array:
  """x (..., E) rotated by `rotary_angles`, whose leading axes broadcast with x's, in float32; the result has x's dtype.

  by_product: see `apply_rotary_by_product`.
  """
  if by_product:
    return apply_rotary_by_product(x, *angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = angles
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def apply_rotary_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """`apply_rotary`, with the halves swapped by a product with a matrix of 0, 1 and -1, which is exact.

  For TPUs, which split and concatenate rows of 128 elements by way of arrays of 64 that are padded to 128: from the
  product that makes heads to attention and back that took 1.7 times as long. The angles receive no gradient.
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
  lambda angles, g: (apply_rotary_by_product(g, angles[0], -angles[1]), None, None),
)
