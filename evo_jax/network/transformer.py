"""The Transformer block (RMSNorm, rotary grouped-query attention, SwiGLU, as in Llama), for one or two streams.

Slots at t > 0 are modulated by adaptive normalisation as in DiT (Peebles & Xie, 2023; adaLN-zero), through a factor of
low rank that is zero at t = 0: there the block is an ordinary Transformer's. They may also have parameters of their own
(`adapters`).

Letters in names: B batch, L clean positions, N runs (windows), S slots of a run, T slots of all runs in one axis,
D width, H heads, K heads for keys and values, G = H / K queries that share them, J = G + 2 (queries, key, value),
E elements of a head, F hidden, R rank of the time conditioning.
"""

import math

import flax.linen as nn
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout as layouts
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.network import adapters, attention
from evo_jax.network.adapters import WindowRows
from evo_jax.network.attention import KeysValues, Visibility
from evo_jax.network.pages import Pages
from evo_jax.network.rotary import Angles, apply_rotary
from evo_jax.parallel.sharding import Layout

# Rows of a slot's modulation: shift, scale and gate of attention, then of the hidden units.
_ATTENTION, _MLP = 0, 3


@flax.struct.dataclass
class KVCache:
  """Keys and values of the clean stream.

  k, v: (layers, B, K, L, E), or a tuple of (B, K, L, E) by layer from a model whose layers are unstacked; start: (B, L)
  int32, the first position that each position sees, its document's where documents are isolated; None: 0.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array | tuple[jax.Array, ...]
  start: jax.Array | None


@flax.struct.dataclass
class Stream:
  """How the slots of a stream are read: N runs of S slots; the clean stream is one run.

  angles: `rotary.rotary_angles` of their positions, whose shape tells N and S; visibility: which keys they see; without
  slots of their own run it is the clean stream, or clean slots that continue it; time_BxTxR: the time conditioning,
  T = N S, or one that all slots share, (1, 1, R); None: t is 0, of slots that belong to no window. unknown_BxT: bool,
  which slots are at t > 0; None: all. clean: the first so many slots belong to no window, and are not among
  unknown_BxT.
  """

  angles: Angles
  visibility: Visibility
  time_BxTxR: jax.Array | None
  unknown_BxT: jax.Array | None = None
  clean: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def runs(self) -> int:
    return self.angles[0].shape[3]

  @property
  def slots(self) -> int:
    return self.angles[0].shape[4]


@flax.struct.dataclass
class CacheWrite:
  """The first `count` slots, of one run, are clean: they enter the cache at first[b], first[b] + 1, ... before it is
  read."""

  first_B: jax.Array
  count: int = flax.struct.field(pytree_node=False)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, casts_first: bool = False) -> jax.Array:
  """RMSNorm over the last axis, computed in float32; the result has x's dtype.

  casts_first: the scale multiplies what was cast to x's dtype before, as in transformers.
  """
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
  if casts_first:
    return wide.astype(x.dtype) * scale.astype(x.dtype)
  return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, layout: Layout, inputs: int = 1) -> jax.Array:
  """x (..., in) times weight (in, out), either in several axes: `inputs` of the weight's are contracted; in x's dtype.

  Computed as a product by one matrix: of weights with more axes TPUs' compiler makes copies.
  """
  lead, out = x.shape[: x.ndim - inputs], weight.shape[inputs:]
  size = math.prod(weight.shape[:inputs])
  matrix = weight.astype(x.dtype).reshape(size, -1)
  rows = (-1,) if layout.flattens_products else lead
  multiply = _multiply_on_cpu if layout.platform == "cpu" and x.dtype == jnp.bfloat16 else jnp.matmul
  return multiply(x.reshape(*rows, size), matrix).reshape(*lead, *out)


_CPU_ROWS = 8  # the fewest that XLA's CPU backend multiplies in bfloat16: a product of fewer takes five times as long


@jax.custom_vjp
def _multiply_on_cpu(x_TxA: jax.Array, w_AxB: jax.Array) -> jax.Array:
  """x @ w of bfloat16, in bfloat16, and its gradients in the same way. XLA's CPU backend has products of bfloat16 only
  with float32 results; before others it casts the factors, and is as slow as in float32, or slower (jaxlib 0.10.2)."""
  padding = max(_CPU_ROWS - len(x_TxA), 0)
  return _contract(jnp.pad(x_TxA, ((0, padding), (0, 0))), w_AxB, 1, 0)[: len(x_TxA)]


def _contract(a, b, axis_a, axis_b):
  dimensions = ((axis_a,), (axis_b,)), ((), ())
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32).astype(a.dtype)


def _contract_rows(a_TxA: jax.Array, b_TxB: jax.Array) -> jax.Array:
  """a.T @ b. The narrower factor is transposed first, in a layout that keeps the compiler from undoing it: it would
  multiply by rows of both, several times as slowly."""
  if a_TxA.shape[1] > b_TxB.shape[1]:
    return _contract_rows(b_TxB, a_TxA).T
  a_AxT = layouts.with_layout_constraint(a_TxA.T, layouts.Layout(major_to_minor=(0, 1)))
  return _contract(a_AxT, b_TxB, 1, 0)


_multiply_on_cpu.defvjp(
  lambda x, w: (_multiply_on_cpu(x, w), (x, w)),
  lambda factors, d: (_contract(d, factors[1], 1, 1), _contract_rows(factors[0], d)),
)


def parameter(module: nn.Module, layout: Layout, name: str, init, shape, axes, param_dtype, dtype) -> jax.Array:
  """A module's parameter with its logical axes; inside a `shard_map` all-gathered in `dtype` (None: the shard)."""
  if layout.manual and module.has_variable("params", name):  # a shard, whose shape linen would refuse
    shard = module.get_variable("params", name)
    return shard if dtype is None else layout.gather(shard, axes, dtype)
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(param_dtype))


class Block(nn.Module):
  """One layer, for both streams."""

  config: config_lib.Model
  layout: Layout

  def setup(self):
    c = self.config
    D, H, K, E, F = c.width, c.heads, c.kv_heads, c.head_size, c.hidden
    J = H // K + 2

    def param(name, init, shape, axes):
      return parameter(self, self.layout, name, init, shape, axes, c.param_dtype, c.dtype)

    def weight(name, shape, axes, fan_in, scale=1.0):
      return param(name, nn.initializers.truncated_normal(scale * fan_in**-0.5), shape, axes)

    def norm(name, size=D):
      return param(name, nn.initializers.ones, (size,), ("norm",))

    out = (2 * c.layers) ** -0.5  # keeps the residual stream's variance from growing with depth (GPT-2)
    self.attention_norm = norm("attention_norm")
    # Products with the same input are one: each shard of heads has its own queries, key and value side by side.
    self.w_qkv_DxKxJxE = weight("w_qkv", (D, K, J, E), ("embed", "kv_heads", None, "head_dim"), D)
    if c.qkv_bias:
      self.b_qkv_KxJxE = param("b_qkv", nn.initializers.zeros, (K, J, E), ("kv_heads", None, "head_dim"))
    if c.qk_norm:
      self.q_norm, self.k_norm = norm("q_norm", E), norm("k_norm", E)
    self.w_o_HxExD = weight("w_o", (H, E, D), ("heads", "head_dim", "embed"), H * E, out)
    self.mlp_norm = norm("mlp_norm")
    self.w_gate_DxF = weight("w_gate", (D, F), ("embed", "mlp"), D)
    self.w_up_DxF = weight("w_up", (D, F), ("embed", "mlp"), D)
    self.w_down_FxD = weight("w_down", (F, D), ("mlp", "embed"), F, out)
    self.w_time_Rx6xD = param("w_time", nn.initializers.zeros, (c.time_dim, 6, D), ("time", None, "embed"))
    if c.window_twins:
      axes = ("embed", "kv_heads", None, "head_dim")
      self.window_qkv_DxKxJxE = param("window_qkv", lambda *_: self.w_qkv_DxKxJxE, (D, K, J, E), axes)
    self.low_rank = {
      name: param(name, nn.initializers.truncated_normal(std) if std else nn.initializers.zeros, shape, axes)
      for name, (shape, axes, std) in adapters.low_rank_shapes(c).items()
    }

  def __call__(
    self, x_BxTxD: jax.Array, past: KeysValues | Pages | None, streams: tuple[Stream, ...], write: CacheWrite | None
  ) -> tuple[jax.Array, KeysValues | None]:
    """The new x, and the clean stream's keys and values (B, K, L, E); None where two streams are read, or none is
    clean.

    x_BxTxD: the slots of all streams, one after another; the slots of a stream's runs, too, are one axis, since TPUs
    pad the last two. past: keys and values of the clean stream; None: there are none, or the first of two streams is
    the clean one, which the second reads. write: clean slots that enter `past` first.
    """
    modulation, windows = self._modulation(streams), _window_rows(streams)
    h = self._normed(x_BxTxD, self.attention_norm, modulation, _ATTENTION)
    y, cache = self._attention(h, past, streams, write, windows)
    x = x_BxTxD + _gated(y, modulation, _ATTENTION)
    h = self._normed(x, self.mlp_norm, modulation, _MLP)
    # The gate's gradient needs what it scales. It is kept where anything is: else the product of all slots would be
    # recomputed for it.
    x = x + _gated(self._mlp(h, windows), modulation, _MLP, name="mlp_out")
    return self.layout.constrain(x, "batch", "slots", "width"), cache if len(streams) == 1 else None

  def _linear(self, x, weight, inputs=1):
    return linear(x, weight, self.layout, inputs)

  def _project_low(self, windows, x, name, inputs=1):
    """Of each group of windows' rows x times the first factor NAME_a, (B, rows, R), zero at t = 0; none without a
    rank."""
    if not self.low_rank:
      return []
    down = self.low_rank[f"window_{name}_a"]
    return [(rows, rows.gate(self._linear(rows.take(x), down, inputs))) for rows in windows]

  def _add_low_rank(self, y, low, name):
    """y with the windows' rows changed by their `_project_low` times the second factor NAME_b."""
    for rows, z in low:
      y = rows.add(y, self._linear(z, self.low_rank[f"window_{name}_b"]))
    return y

  def _modulation(self, streams):
    """By conditioned stream (begin, end, the six parts (B, end - begin, D)) of the slots from begin to end."""
    c = self.config
    ends = np.cumsum([s.runs * s.slots for s in streams])
    w_time_RxA = self.w_time_Rx6xD.reshape(c.time_dim, 6 * c.width)
    return [
      (end - s.runs * s.slots, end, jnp.split(self._linear(s.time_BxTxR, w_time_RxA), 6, axis=-1))
      for s, end in zip(streams, ends)
      if s.time_BxTxR is not None
    ]

  def _normed(self, x, norm, modulation, first):
    x = rms_norm(x, norm, self.config.norm_epsilon, self.config.norm_casts_first)
    return _add_to_slots(x, modulation, lambda x, parts: x * parts[first + 1] + parts[first])

  def _attention(self, h, past, streams, write, windows):
    B, T, _ = h.shape
    ends = np.cumsum([s.runs * s.slots for s in streams])[:-1]
    angles = tuple(map(_concatenate_angles, zip(*(s.angles for s in streams))))
    qk, v = self._project(h, angles, windows)
    parts = zip(streams, jnp.split(qk[:, :, :-1], ends, 3), jnp.split(qk[:, :, -1], ends, 2), jnp.split(v, ends, 2))
    outputs, cache = [], None
    for stream, q, key, value in parts:
      by_run = lambda x, s=stream: x.reshape(*x.shape[:-2], s.runs, s.slots, x.shape[-1])
      has_own = stream.visibility.own_NxSxT is not None
      own, is_clean = None, not has_own and past is None
      if is_clean:
        past = cache = (key, value)
      elif write is not None:
        n = write.count
        past = attention.write_cache(past, write.first_B, (key[:, :, :n], value[:, :, :n]))
        cache = (past.k, past.v) if isinstance(past, Pages) else past
        own = (key[:, :, None, n:], value[:, :, None, n:]) if has_own else None
      else:
        own = (by_run(key), by_run(value))
      y = attention.attend(self.config, self.layout, by_run(q), past, stream.visibility, own, causal=is_clean)
      outputs.append(y.reshape(q.shape))
    y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 3)
    y = y.transpose(0, 3, 1, 2, 4).reshape(B, T, self.config.heads, -1)
    out = self._add_low_rank(self._linear(y, self.w_o_HxExD, 2), self._project_low(windows, y, "o", 2), "o")
    return out, cache

  def _project(self, h, angles, windows):
    """Rotated queries and key (B, K, G + 1, T, E), and the value (B, K, T, E)."""
    c = self.config
    qkv = self._linear(h, self.w_qkv_DxKxJxE)
    for rows in windows if c.window_twins else ():
      qkv = rows.replace(qkv, self._linear(rows.take(h), self.window_qkv_DxKxJxE))
    qkv = self._add_low_rank(qkv, self._project_low(windows, h, "qkv"), "qkv")
    if c.qkv_bias:
      qkv = qkv + self.b_qkv_KxJxE.astype(qkv.dtype)
    qkv = self.layout.constrain(qkv, "batch", "slots", "kv_heads", None, "head_dim")
    # Heads to the front, so that attention's products are plain batches of matrix products.
    qkv_BxKxJxTxE = qkv.transpose(0, 2, 3, 1, 4)
    qk, v = qkv_BxKxJxTxE[:, :, :-1], checkpoint_name(qkv_BxKxJxTxE[:, :, -1], "qkv")
    if c.qk_norm:  # what the norm reads is kept for its gradient: norm and rotation are cheap to repeat
      scale_JxE = jnp.stack([*[self.q_norm] * (c.heads // c.kv_heads), self.k_norm])
      qk = rms_norm(checkpoint_name(qk, "qkv"), scale_JxE[:, None], c.norm_epsilon, c.norm_casts_first)
      return apply_rotary(qk, angles, self.layout.rotates_by_product), v
    return checkpoint_name(apply_rotary(qk, angles, self.layout.rotates_by_product), "qkv"), v

  def _mlp(self, h, windows):
    low = self._project_low(windows, h, "mlp")
    gate, up = (
      checkpoint_name(
        self.layout.constrain(self._add_low_rank(self._linear(h, w), low, name), "batch", "slots", "mlp"), name
      )
      for name, w in (("gate", self.w_gate_DxF), ("up", self.w_up_DxF))
    )
    hidden = nn.silu(gate) * up
    return self._add_low_rank(self._linear(hidden, self.w_down_FxD), self._project_low(windows, hidden, "down"), "down")


def _window_rows(streams: tuple[Stream, ...]) -> list[WindowRows]:
  """The rows of all windows' slots."""
  ends = np.cumsum([s.runs * s.slots for s in streams])
  return [
    WindowRows(int(end) - s.runs * s.slots + s.clean, int(end), s.unknown_BxT)
    for s, end in zip(streams, ends)
    if s.time_BxTxR is not None and s.clean < s.runs * s.slots
  ]


def _gated(y, modulation, first, name=None):
  """y (B, T, D), of conditioned slots y (1 + gate). name: of what the gate scales, for `remat`."""
  scaled = lambda y: checkpoint_name(y, name) if name else y
  return _add_to_slots(y, modulation, lambda y, parts: scaled(y) * parts[first + 2])


def _add_to_slots(x, modulation, change):
  """x and, of conditioned slots, change(x, parts). Added in zeros, since slicing clean slots out costs TPUs a copy."""
  T = x.shape[1]
  result = x
  for begin, end, parts in modulation:
    result = result + jnp.pad(change(x[:, begin:end], parts), ((0, 0), (begin, T - end), (0, 0)))
  return result


def _concatenate_angles(parts):
  """(B or 1, 1, 1, T, E / 2) of all slots, from what each stream has, (B or 1, 1, 1, N, S, E / 2)."""
  parts = [a.reshape(*a.shape[:3], -1, a.shape[-1]) for a in parts]
  batch = max(len(a) for a in parts)  # positions may be shared by the batch
  parts = [jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in parts]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 3)


def remat_policy(remat: str):
  """The policy of `jax.checkpoint` that config.model.remat names."""
  if remat.startswith("save:"):
    return jax.checkpoint_policies.save_only_these_names(*remat.removeprefix("save:").split(","), "mlp_out")
  return {
    "none": _save_all_but_gathered,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  }[remat]


def _save_all_but_gathered(primitive, *_, **__) -> bool:
  # A weight that was all-gathered, or then cast or reshaped, is gathered again: kept, the weights would be the whole
  # model.
  return primitive.name not in ("all_gather", "convert_element_type", "reshape", "transpose")
