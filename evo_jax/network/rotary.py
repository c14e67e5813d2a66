"""Rotary position embedding (Su et al., 2021), first half of a head against the second half, as in Llama.

With the scalings by which models were trained further on longer texts: "linear" (position interpolation, Chen et al.,
2023) and that of Llama 3.1 ("The Llama 3 Herd of Models", 2024).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib

Angles = tuple[jax.Array, jax.Array]  # cosine and sine


def frequencies(config: config_lib.Model) -> np.ndarray:
  """(E / 2,) float32: radians per position of each pair of a head's elements.

  Computed on the host, in the reference's order of operations, since accelerators' powers are approximate, and at the
  last position of a long text an error of a frequency is multiplied by thousands.
  """
  size = config.head_size
  exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
  frequency = np.float32(1.0) / np.float32(config.rope_base) ** exponent
  if config.rope_scaling == "linear":
    return frequency / np.float32(config.rope_factor)
  return _llama3_frequencies(config, frequency) if config.rope_scaling == "llama3" else frequency


def _llama3_frequencies(config: config_lib.Model, frequency: np.ndarray) -> np.ndarray:
  """Long wavelengths are stretched by the factor, short ones kept, and between the two limits the share that is kept
  grows linearly with the number of turns within the original context."""
  turns = np.float32(config.rope_original_context) / (np.float32(2 * math.pi) / frequency)
  low, high = np.float32(config.rope_low_factor), np.float32(config.rope_high_factor)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - kept) * (frequency / np.float32(config.rope_factor)) + kept * frequency


def rotary_angles(positions: jax.Array, frequency: np.ndarray) -> Angles:
  """Cosine and sine (B, 1, 1, N, S, E / 2) float32 by which `apply_rotary` rotates heads of E elements at positions
  (B, N, S), or (N, S) or (S,) where they are the same for all. frequency: `frequencies`."""
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
