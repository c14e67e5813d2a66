"""Heads that infer the learned clock: a prior from the past alone, and a posterior from the tokens themselves.

Both give, for each of a window's tokens, the mean and the log standard deviation of a Gaussian delay; the prior also
gives the sharpness. Before training both are equal, and the clock is that of as many streams as the passes ask for,
with soft jumps. Pure functions of their parameters, which `PRIOR` and `POSTERIOR` name.

Letters in names: B batch, L clean positions, N windows, W tokens of a window, D width.
"""

import math

import jax
import jax.numpy as jnp

_WIDTH = 64  # of the hidden layers
_DELAY_SPREAD, _SHARPNESS = 0.2, 8.0  # standard deviation of delays, and sharpness, before training
_POSITION_FEATURES = 8
_PHASE = _POSITION_FEATURES  # index of the slot feature that is a token's position in its stream
_FEATURES = _POSITION_FEATURES + 4

PRIOR = ("clock_prior_in", "clock_prior_slot", "clock_prior_out")
POSTERIOR = ("clock_posterior_in", "clock_posterior_slot", "clock_posterior_out")


def parameter_shapes(width: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...], float]]:
  """Of each parameter by name: its shape, its logical axes, and the standard deviation that it starts with."""
  P, F, D = _WIDTH, _FEATURES, width
  return {
    "clock_prior_in": ((D, P), ("width", None), D**-0.5),
    "clock_prior_slot": ((F, P), (None, None), F**-0.5),
    "clock_prior_out": ((P + F, 3), (None, None), 0.0),
    "clock_posterior_in": ((3, D, P), (None, "width", None), (3 * D) ** -0.5),
    "clock_posterior_slot": ((F + 1, P), (None, None), (F + 1) ** -0.5),
    "clock_posterior_out": ((P, 2), (None, None), 0.0),
  }


def prior(
  params: tuple[jax.Array, ...], hidden_BxNxD: jax.Array, size: int, passes_BxN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The delays' means and log standard deviations, and the sharpnesses, each (B, N, size) float32.

  hidden_BxNxD: normalized hidden states of the clean stream at the windows' anchors, float32. passes_BxN: in how many
  passes a window is resolved.
  """
  w_in, w_slot, w_out = params
  slots = _slot_features(size, passes_BxN)
  hidden = jax.nn.silu((hidden_BxNxD @ w_in)[:, :, None] + slots @ w_slot)
  out = jnp.concatenate([hidden, slots], axis=-1) @ w_out
  mean, log_std, log_sharpness = jnp.moveaxis(out, -1, 0)
  sharpness = jnp.exp(jnp.clip(log_sharpness + math.log(_SHARPNESS), -2.0, 4.0))
  return mean + slots[..., _PHASE], log_std + math.log(_DELAY_SPREAD), sharpness


def posterior(
  params: tuple[jax.Array, ...],
  features: tuple[jax.Array, jax.Array, jax.Array],
  nats_BxNxW: jax.Array,
  passes_BxN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """What the tokens add to the prior's means and log standard deviations (B, N, W), float32.

  features: of each token, normalized float32 (B, N, W or 1, D): its context's hidden state, its embedding, and the last
  hidden state that the window allows. nats_BxNxW: its autoregressive cross-entropy.
  """
  w_in, w_slot, w_out = params
  slots = _slot_features(nats_BxNxW.shape[-1], passes_BxN)
  slots = jnp.concatenate([slots, nats_BxNxW[..., None]], axis=-1) @ w_slot
  hidden = jax.nn.silu(sum(x @ w for x, w in zip(features, w_in)) + slots)
  mean, log_std = jnp.moveaxis(hidden @ w_out, -1, 0)
  return mean, log_std


def _slot_features(size: int, passes: jax.Array) -> jax.Array:
  """(..., size, 12) float32: a token's position in its window as cosines; its position in its stream, were the window
  resolved in as many streams as `passes` (...) ask for, on the scale of delays; and the number of passes."""
  index = jnp.arange(size)
  position = jnp.cos(jnp.pi * (index[:, None] + 0.5) / size * jnp.arange(_POSITION_FEATURES))
  passes = passes[..., None]
  phase = (index % jnp.maximum(passes, 1) + 0.5) / jnp.maximum(passes, 1)
  passes = passes.astype(jnp.float32)
  counts = jnp.concatenate([jnp.log2(passes) / 4.0, 1.0 / passes, passes / size], axis=-1)[..., None, :]
  shape = (*counts.shape[:-2], size)
  return jnp.concatenate(
    [
      jnp.broadcast_to(position, (*shape, _POSITION_FEATURES)),
      jnp.log(phase / (1.0 - phase))[..., None],
      jnp.broadcast_to(counts, (*shape, 3)),
    ],
    axis=-1,
  )
