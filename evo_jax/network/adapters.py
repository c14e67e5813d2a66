"""Parameters of windows alone: what slots at t > 0 compute with beside the matrices of the clean stream.

Low-rank changes of a block's matrices (LoRA, Hu et al., 2021), gated slot by slot as in "Your LLM Knows the Future"
(Samragh et al., 2025), and twins, matrices for queries, keys and values that begin as copies of the clean stream's. A
slot at t = 0, and every row that belongs to no window, computes with the clean stream's matrices alone. And a head that
sees the draft token before, for tokens that are drafted in one pass do not see each other.

Pure functions of their parameters. Letters in names: B batch, T slots, D width, H heads, K heads for keys and values, J
queries, key and value of one of them, E elements of a head, F hidden units, R rank, P hidden width of the head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from evo_jax import config as config_lib

Shape = tuple[tuple[int, ...], tuple[str | None, ...], float]  # sizes, logical axes, standard deviation at the start

HEAD = ("window_head_token", "window_head_hidden", "window_head_out")


def low_rank_shapes(config: config_lib.Model) -> dict[str, Shape]:
  """Of a block's low-rank parameters by name; none without a rank. Matrices with the same input share their first
  factor, NAME_a; the second, NAME_b, is zero before training."""
  D, H, K, E, F, R = config.width, config.heads, config.kv_heads, config.head_size, config.hidden, config.window_rank
  if not R:
    return {}
  return {
    "window_qkv_a": ((D, R), ("embed", "rank"), D**-0.5),
    "window_qkv_b": ((R, K, H // K + 2, E), ("rank", "kv_heads", None, "head_dim"), 0.0),
    "window_o_a": ((H, E, R), ("heads", "head_dim", "rank"), (H * E) ** -0.5),
    "window_o_b": ((R, D), ("rank", "embed"), 0.0),
    "window_mlp_a": ((D, R), ("embed", "rank"), D**-0.5),
    "window_gate_b": ((R, F), ("rank", "mlp"), 0.0),
    "window_up_b": ((R, F), ("rank", "mlp"), 0.0),
    "window_down_a": ((F, R), ("mlp", "rank"), F**-0.5),
    "window_down_b": ((R, D), ("rank", "embed"), 0.0),
  }


def head_shapes(config: config_lib.Model) -> dict[str, Shape]:
  """Of the head's parameters, by name."""
  D, P = config.width, config.window_head
  return {
    "window_head_token": ((D, P), ("embed", None), (2 * D) ** -0.5),
    "window_head_hidden": ((D, P), ("embed", None), (2 * D) ** -0.5),
    "window_head_out": ((P, D), (None, "embed"), 0.0),
  }


def head_change(params: tuple[jax.Array, ...], token: jax.Array, hidden: jax.Array) -> jax.Array:
  """What the head adds to a slot's hidden state (..., D), from the embedding of the draft token before and the hidden
  state, both normalized (..., D); in their dtype."""
  w_token, w_hidden, w_out = (w.astype(hidden.dtype) for w in params)
  return jax.nn.silu(token @ w_token + hidden @ w_hidden) @ w_out


@dataclasses.dataclass(frozen=True)
class WindowRows:
  """Which of the rows (B, T, ...) of a block's input are slots of windows: those from `begin` to `end`.

  unknown: (B, end - begin) bool, which of them are at t > 0; None: all.
  """

  begin: int
  end: int
  unknown: jax.Array | None

  def take(self, x_BxT: jax.Array) -> jax.Array:
    """The windows' rows of x (B, T, ...)."""
    return x_BxT[:, self.begin : self.end]

  def gate(self, x_BxT: jax.Array) -> jax.Array:
    """Windows' rows (B, end - begin, ...), zero at t = 0."""
    return x_BxT if self.unknown is None else jnp.where(self._like(x_BxT), x_BxT, 0)

  def add(self, x_BxT: jax.Array, change: jax.Array) -> jax.Array:
    """x (B, T, ...) with the change (B, end - begin, ...) added to the windows' rows. In zeros, since slicing the
    others out costs TPUs a copy."""
    rest = x_BxT.shape[1] - self.end
    return x_BxT + jnp.pad(change, ((0, 0), (self.begin, rest), *((0, 0),) * (x_BxT.ndim - 2)))

  def replace(self, x_BxT: jax.Array, other: jax.Array) -> jax.Array:
    """x (B, T, ...) with the windows' rows at t > 0 taken from `other` (B, end - begin, ...)."""
    if self.unknown is not None:
      other = jnp.where(self._like(other), other, self.take(x_BxT))
    return jnp.concatenate([x_BxT[:, : self.begin], other, x_BxT[:, self.end :]], axis=1)

  def _like(self, x_BxT: jax.Array) -> jax.Array:
    return self.unknown.reshape(*self.unknown.shape, *(1,) * (x_BxT.ndim - 2))
