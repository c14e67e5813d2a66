"""The Transformer block, its streams and its key-value cache."""

import math

import flax.linen as nn
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.network import attention, rotary
from evo_jax.parallel import sharding


@flax.struct.dataclass
class KVCache:
  """What the clean stream leaves to be read: final keys and values of its positions.

  k, v: (layers, B, K, L, E), or a tuple of (B, K, L, E) by layer from a model whose layers are apart; start: (B, L)
  int32, the first position that each sees, its document's where documents are isolated.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array | tuple[jax.Array, ...]
  start: jax.Array | None


@flax.struct.dataclass
class Stream:
  """How the slots of a stream read: N runs of S slots; the clean stream is one run.

  angles: `attention.angles` of their places, whose shape tells N and S; stop, start: the clean positions that slots
  see, as `attention.attend` takes them; visible: which slots of its run each sees, (B, N, S, T) or broadcastable to
  it; None: there is nothing but clean slots; time_BxTxR: the time conditioning, T = N S; None: t is 0.
  """

  angles: tuple[jax.Array, jax.Array]
  stop_BxNxS: jax.Array | None
  start_BxNxS: jax.Array | None
  visible_NxSxT: jax.Array | None
  time_BxTxR: jax.Array | None

  @property
  def runs(self) -> int:
    return self.angles[0].shape[3]

  @property
  def slots(self) -> int:
    return self.angles[0].shape[4]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """RMSNorm over the last axis, computed in float32; the result has x's dtype."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
  return (wide * scale).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
  """x (..., in) times weight (in, out), either in several axes: `inputs` of the weight's are contracted; in x's dtype.

  Done as a product by one matrix: of weights with more axes TPUs' compiler makes copies. XLA's CPU backward pass takes
  twice as long over products of more axes, so that there x is a matrix, too; on TPUs making it one costs copies.
  """
  lead, out = x.shape[: x.ndim - inputs], weight.shape[inputs:]
  size = math.prod(weight.shape[:inputs])
  matrix = weight.astype(x.dtype).reshape(size, -1)
  rows = lead if sharding.platform() == "tpu" else (-1,)
  return (x.reshape(*rows, size) @ matrix).reshape(*lead, *out)


def parameter(
  module: nn.Module, rules: sharding.ShardingRules, name: str, init, shape, axes, param_dtype, dtype
) -> jax.Array:
  """A module's parameter with its logical axes; where a shard of the batch computes by hand, gathered in `dtype`
  (None: its part)."""
  if sharding.in_shard_map() and module.has_variable(
    "params", name
  ):  # this device's part, whose shape linen would not take
    part = module.get_variable("params", name)
    return part if dtype is None else rules.gather(part, axes, dtype)
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(param_dtype))


class Block(nn.Module):
  """One layer, for both streams."""

  config: config_lib.Model
  rules: sharding.ShardingRules

  def setup(self):
    c = self.config
    D, H, K, E, F = c.width, c.heads, c.kv_heads, c.width // c.heads, c.hidden
    J = H // K + 2

    def param(name, init, shape, axes):
      return parameter(self, self.rules, name, init, shape, axes, c.param_dtype, c.dtype)

    def weight(name, shape, axes, fan_in, scale=1.0):
      return param(name, nn.initializers.truncated_normal(scale * fan_in**-0.5), shape, axes)

    def norm(name):
      return param(name, nn.initializers.ones, (D,), ("norm",))

    out = (2 * c.layers) ** -0.5  # keeps the residual stream's variance from growing with depth (GPT-2)
    self.attention_norm = norm("attention_norm")
    # Products with the same input are one: each shard of heads has its own queries, key and value side by side.
    self.w_qkv_DxKxJxE = weight("w_qkv", (D, K, J, E), ("embed", "kv_heads", None, "head_dim"), D)
    self.w_o_HxExD = weight("w_o", (H, E, D), ("heads", "head_dim", "embed"), D, out)
    self.mlp_norm = norm("mlp_norm")
    self.w_gate_DxF = weight("w_gate", (D, F), ("embed", "mlp"), D)
    self.w_up_DxF = weight("w_up", (D, F), ("embed", "mlp"), D)
    self.w_down_FxD = weight("w_down", (F, D), ("mlp", "embed"), F, out)
    self.w_time_Rx6xD = param("w_time", nn.initializers.zeros, (c.time_dim, 6, D), ("time", None, "embed"))

  def __call__(self, x_BxTxD, past, streams, write):
    """Returns the new x and the keys and values (B, K, L, E) that are kept, of clean slots; None: there are none.

    x_BxTxD: the slots of all streams, one after another; the slots of a stream's runs, too, lie in one axis, since TPUs
    pad the last two. past: keys and values of the clean stream; None: there are none, or the first of two streams is
    the clean one, which the second reads: then none are kept. streams: tuple of `Stream`. write: (first_B, fresh): the
    first `fresh` slots, of one run, are clean and enter `past` at these places before it is read.
    """
    c = self.config
    x = x_BxTxD
    B, T, _ = x.shape
    ends = np.cumsum([s.runs * s.slots for s in streams])
    cut = lambda x, axis: jnp.split(x, ends[:-1], axis)
    join = lambda parts, axis: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
    w_time_RxA = self.w_time_Rx6xD.reshape(c.time_dim, 6 * c.width)
    conditioned = [
      (end, jnp.split(linear(s.time_BxTxR, w_time_RxA), 6, axis=-1))
      for s, end in zip(streams, ends)
      if s.time_BxTxR is not None
    ]

    def add(x, change):
      """x and, of slots that time conditions, change(x, modulation). Added in zeros, since cutting clean slots out
      costs TPUs a copy."""
      for end, modulation in conditioned:
        begin = end - modulation[0].shape[1]
        x = x + jnp.pad(change(x[:, begin:end], modulation), ((0, 0), (begin, T - end), (0, 0)))
      return x

    def enter(x, norm, shift, scale):
      return add(rms_norm(x, norm.astype(jnp.float32), c.norm_epsilon), lambda x, m: x * m[scale] + m[shift])

    def of_slots(parts):
      """Something (B or 1, 1, 1, T, E / 2) of all slots, from what each stream has (B or 1, 1, 1, N, S, E / 2)."""
      parts = [a.reshape(*a.shape[:3], -1, a.shape[-1]) for a in parts]
      batch = max(len(a) for a in parts)  # places may be shared by the batch
      return join([jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in parts], 3)

    angles = tuple(map(of_slots, zip(*(s.angles for s in streams))))
    h = enter(x, self.attention_norm, 0, 1)
    qkv = self.rules.constrain(linear(h, self.w_qkv_DxKxJxE), "batch", "slots", "kv_heads", None, "head_dim")
    # Heads to the front, so that attention's products are plain batches of matrix products.
    qkv_BxKxJxTxE = qkv.transpose(0, 2, 3, 1, 4)
    qk, v = rotary.apply_rotary(qkv_BxKxJxTxE[:, :, :-1], angles), qkv_BxKxJxTxE[:, :, -1]
    qk, v = checkpoint_name(qk, "qkv"), checkpoint_name(v, "qkv")
    found, kept = [], None
    for stream, q, k, v in zip(streams, cut(qk[:, :, :-1], 3), cut(qk[:, :, -1], 2), cut(v, 2)):
      by_run = lambda x, shape=(stream.runs, stream.slots): x.reshape(*x.shape[:-2], *shape, x.shape[-1])
      own, is_clean = None, stream.visible_NxSxT is None and past is None
      if is_clean:
        past = kept = (k, v)
      elif write is not None:
        first, fresh = write
        past = kept = tuple(attention.write_cache(old, first, new[:, :, :fresh]) for old, new in zip(past, (k, v)))
        own = (k[:, :, None, fresh:], v[:, :, None, fresh:]) if stream.visible_NxSxT is not None else None
      else:
        own = (by_run(k), by_run(v))
      y_BxKxGxNxSxE = attention.attend(
        c,
        self.rules,
        by_run(q),
        past,
        stream.stop_BxNxS,
        stream.start_BxNxS,
        own,
        stream.visible_NxSxT,
        causal=is_clean,
      )
      found.append(y_BxKxGxNxSxE.reshape(q.shape))
    y = join(found, 3).transpose(0, 3, 1, 2, 4).reshape(B, T, c.heads, -1)
    x = x + add(linear(y, self.w_o_HxExD, 2), lambda y, m: y * m[2])
    h = enter(x, self.mlp_norm, 3, 4)
    gate, up = (
      checkpoint_name(self.rules.constrain(linear(h, w), "batch", "slots", "mlp"), name)
      for name, w in (("gate", self.w_gate_DxF), ("up", self.w_up_DxF))
    )
    h = nn.silu(gate) * up
    # The modulation's gradient asks for what it scales. Kept where anything is: for it the product of all slots
    # would be computed anew.
    x = x + add(linear(h, self.w_down_FxD), lambda y, m: checkpoint_name(y, "mlp_out") * m[5])
    return self.rules.constrain(x, "batch", "slots", "width"), kept if len(streams) == 1 else None


def _all_but_gathered(primitive, *_, **__) -> bool:
  # A weight that was gathered, or was given another shape or dtype then, is gathered anew: kept, they would be the
  # whole model.
  return primitive.name not in ("all_gather", "convert_element_type", "reshape", "transpose")


def remat_policy(remat: str):
  """The policy of `jax.checkpoint` that config.remat names."""
  if remat.startswith("save:"):
    return jax.checkpoint_policies.save_only_these_names(*remat.removeprefix("save:").split(","), "mlp_out")
  return {"none": _all_but_gathered, "full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[
    remat
  ]


def flatten_runs(x_BxNxSxD: jax.Array) -> jax.Array:
  """The slots of all runs one after another: (B, N S, D)."""
  return x_BxNxSxD.reshape(x_BxNxSxD.shape[0], -1, x_BxNxSxD.shape[-1])


def document_starts(clean: Stream) -> jax.Array | None:
  """(B, L) int32: of each position of a clean stream the first that it sees."""
  return None if clean.start_BxNxS is None else clean.start_BxNxS[:, 0]
