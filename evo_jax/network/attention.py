"""Attention of slots to the clean stream's keys and to the keys of their own run, in one softmax.

`attend` picks an implementation: fused kernels, plain XLA operations (`attend_plain`), or these blockwise.

Letters in names: B batch, N runs of slots (windows; 1 for the clean stream), S slots of a run, T those of them that
are keys, L clean positions, H heads, K heads for keys and values, G = H / K, E elements of a head.
"""

import math

import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.network import kernels
from evo_jax.network.pages import Pages, attend_pages
from evo_jax.parallel.sharding import Layout

KeysValues = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Visibility:
  """Which keys a slot sees.

  stop_BxNxS, start_BxNxS: int32: clean positions from `start` (None: 0) on and before `stop`; axes may have size 1.
  own_NxSxT: bool, broadcastable to (B, N, S, T): slots of its own run; None: none. own_causal: whether no slot sees one
  behind itself.
  """

  stop_BxNxS: jax.Array | None
  start_BxNxS: jax.Array | None = None
  own_NxSxT: jax.Array | None = None
  own_causal: bool = flax.struct.field(pytree_node=False, default=False)

  def runs(self, begin: int, end: int) -> "Visibility":
    """Of some of the runs."""
    part = lambda x: x if x is None or x.shape[1] == 1 else x[:, begin:end]
    own = part(self.own_NxSxT) if self.masks_by_text else self.own_NxSxT
    return self.replace(stop_BxNxS=part(self.stop_BxNxS), start_BxNxS=part(self.start_BxNxS), own_NxSxT=own)

  @property
  def masks_by_text(self) -> bool:
    """Whether each text of the batch has a mask of its own for the slots of a run."""
    return self.own_NxSxT is not None and self.own_NxSxT.ndim == 4

  def slots(self, begin: int, end: int) -> "Visibility":
    """Of some of the slots of each run."""
    part = lambda x: x if x is None else x[..., begin:end]
    return self.replace(stop_BxNxS=part(self.stop_BxNxS), start_BxNxS=part(self.start_BxNxS))


def informed_slots(time: jax.Array, position: jax.Array) -> jax.Array:
  """(..., S, S) bool: which slots of its window each slot sees, if it is to be informed by what is known alone.

  A slot at t = 0 sees those at t = 0 up to itself, as in the clean stream: behind the known tokens before it, its keys
  and its output are the clean stream's. One at t > 0 sees all up to itself, and of those behind it the ones that carry
  information, t < 1: what it gives does not depend on how many unknown ones follow.

  time, position: (..., S) progressions and positions of the slots.
  """
  up_to = position[..., None, :] <= position[..., :, None]
  known = time <= 0.0
  return jnp.where(known[..., :, None], up_to & known[..., None, :], up_to | (time < 1.0)[..., None, :])


def attend_plain(
  q_BxKxGxNxSxE: jax.Array,
  past: KeysValues | None,
  visibility: Visibility,
  own: KeysValues | None = None,
) -> jax.Array:
  """Softmax attention of every slot to a stretch of the clean stream and to slots of its own run: (B, K, G, N, S, E).

  Args:
    q_BxKxGxNxSxE: queries; G of them share keys (grouped-query attention).
    past: keys and values (B, K, L, E), or (B K, L, E), of the clean stream, shared by the N runs.
    visibility: which of both a slot sees.
    own: keys and values (B, K, N, T, E) of the run itself.

  `past` or `own` may be None; every slot sees something of what remains. The softmax spans both parts and is computed
  in float32. The result has q's dtype.
  """
  q = q_BxKxGxNxSxE * q_BxKxGxNxSxE.shape[-1] ** -0.5
  parts = []  # (masked scores (B, K, G, N, S, keys), function that sums values by weights)
  if past is not None:
    parts.append(_clean_part(q, past, visibility))
  if own is not None:
    parts.append(_own_part(q, own, visibility))
  maxima = [jnp.max(scores, axis=-1, keepdims=True) for scores, _ in parts]
  maximum = jax.lax.stop_gradient(jnp.maximum(maxima[0], maxima[-1]))
  weights = [jnp.exp(scores - maximum) for scores, _ in parts]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = sum(sum_values(w.astype(q.dtype)) for w, (_, sum_values) in zip(weights, parts))
  return (out / total).astype(q.dtype)


def _clean_part(q, past, visibility):
  B, K, G, N, S, E = q.shape
  k, v = (x.reshape(B, K, *x.shape[-2:]) for x in past)
  scores = jnp.einsum("bkme,bkle->bkml", q.reshape(B, K, -1, E), k, preferred_element_type=jnp.float32)
  position = jnp.arange(k.shape[2])
  visible = position < visibility.stop_BxNxS[..., None]
  if visibility.start_BxNxS is not None:
    visible &= position >= visibility.start_BxNxS[..., None]

  def sum_values(weights):
    flat = weights.reshape(B, K, G * N * S, -1)
    return jnp.einsum("bkml,bkle->bkme", flat, v, preferred_element_type=jnp.float32).reshape(q.shape)

  return jnp.where(visible[:, None, None], scores.reshape(B, K, G, N, S, -1), -jnp.inf), sum_values


def _own_part(q, own, visibility):
  B, K, G, N, S, _ = q.shape
  k, v = own
  # The queries of a run, which share its keys, as one axis.
  together = lambda x: x.swapaxes(2, 3).reshape(B, K, N, G * S, x.shape[-1])
  apart = lambda x: x.reshape(B, K, N, G, S, x.shape[-1]).swapaxes(2, 3)
  scores = apart(jnp.einsum("bknme,bknte->bknmt", together(q), k, preferred_element_type=jnp.float32))
  visible = jnp.broadcast_to(visibility.own_NxSxT, (B, N, S, k.shape[3]))

  def sum_values(weights):
    return apart(jnp.einsum("bknmt,bknte->bknme", together(weights), v, preferred_element_type=jnp.float32))

  return jnp.where(visible[:, None, None], scores, -jnp.inf), sum_values


def attend(
  config: config_lib.Model,
  layout: Layout,
  q_BxKxGxNxSxE: jax.Array,
  past: KeysValues | Pages | None,
  visibility: Visibility,
  own: KeysValues | None = None,
  causal: bool = False,
) -> jax.Array:
  """`attend_plain`, by the kernel that config.attention names where it takes these shapes; elsewhere blockwise. Over
  pages, which one run reads, by `attend_pages`.

  causal: the slots are the clean stream; slot s sees the positions from `start` to s. The result is named "attention"
  for `remat`; splash attention names it itself, and the residuals beside it.
  """
  if isinstance(past, Pages):
    one_run = lambda x, axis: None if x is None else jnp.squeeze(x, axis)
    mask = visibility.own_NxSxT
    if mask is not None and visibility.masks_by_text:
      mask = one_run(mask, 1)
    beside = own and tuple(one_run(x, 2) for x in own)
    return attend_pages(one_run(q_BxKxGxNxSxE, 3), past, one_run(visibility.stop_BxNxS, 1), beside, mask)[:, :, :, None]
  kind = config.attention
  if kind == "auto":
    kind = "splash" if layout.platform == "tpu" else "xla"
  q, heads, rows = q_BxKxGxNxSxE, ("batch", "kv_heads"), ("batch",)
  stop, start = visibility.stop_BxNxS, visibility.start_BxNxS
  interpret = layout.platform != "tpu"
  if causal and kind == "splash" and kernels.splash_takes_length(q.shape[4]):
    kernel = layout.per_device(
      lambda *args: kernels.splash_causal(*args, interpret=interpret), (heads, heads, heads, rows), heads
    )
    return kernel(q[:, :, :, 0], *past, None if start is None else start[:, 0])[:, :, :, None]
  if causal and kind == "cudnn" and start is None and layout.platform == "gpu":
    kernel = layout.per_device(kernels.library_causal, (heads,) * 3, heads)
    return checkpoint_name(kernel(q[:, :, :, 0], *past)[:, :, :, None], "attention")
  if kind == "splash" and past is not None and own is not None and not visibility.masks_by_text:
    kernel = layout.per_device(
      lambda *args: kernels.splash_windows(*args, interpret=interpret), (heads, heads, rows, rows, heads, ()), heads
    )
    return kernel(q, past, stop, start, own, visibility.own_NxSxT)
  return checkpoint_name(attend_blockwise(config.attention_block, q, past, visibility, own, causal), "attention")


def attend_blockwise(
  block: int,
  q_BxKxGxNxSxE: jax.Array,
  past: KeysValues | None,
  visibility: Visibility,
  own: KeysValues | None = None,
  causal: bool = False,
) -> jax.Array:
  """`attend_plain`, with the scores of about `block` queries of a sequence and head in memory at a time (0: of all).

  The backward pass recomputes a block's scores. causal: slot s sees no clean position behind s, so that a block reads
  only the keys up to its end: half of all products; so does one of slots that see none behind themselves in their run.
  Otherwise some runs are read at a time.
  """
  _, _, _, N, S, _ = q_BxKxGxNxSxE.shape
  if not block or block >= N * S:
    return attend_plain(q_BxKxGxNxSxE, past, visibility, own)
  attend_block = jax.checkpoint(attend_plain, prevent_cse=False)
  if causal:
    blocks = [
      attend_block(
        q_BxKxGxNxSxE[..., i : i + block, :],
        tuple(x[:, :, : i + block] for x in past),
        visibility.slots(i, i + block),
      )
      for i in range(0, S, block)
    ]
    return jnp.concatenate(blocks, axis=4)
  if past is None and visibility.own_causal:
    blocks = [
      attend_block(
        q_BxKxGxNxSxE[..., i : i + block, :],
        None,
        visibility.replace(own_NxSxT=visibility.own_NxSxT[..., i : i + block, : i + block]),
        tuple(x[..., : i + block, :] for x in own),
      )
      for i in range(0, S, block)
    ]
    return jnp.concatenate(blocks, axis=4)
  runs = max(block // S, 1)
  blocks = [
    attend_block(
      q_BxKxGxNxSxE[:, :, :, i : i + runs],
      past,
      visibility.runs(i, i + runs),
      own and tuple(x[:, :, i : i + runs] for x in own),
    )
    for i in range(0, N, runs)
  ]
  return jnp.concatenate(blocks, axis=3)


def write_cache(past: KeysValues | Pages, first_B: jax.Array, new: KeysValues) -> KeysValues | Pages:
  """Cached keys and values with new ones, (B, K, T, E) each, at the positions first[b], first[b] + 1, ..."""
  if isinstance(past, Pages):
    return past.write(first_B, *new)
  return tuple(_write_positions(old, first_B, added) for old, added in zip(past, new))


def _write_positions(keys_BxKxLxE: jax.Array, first_B: jax.Array, new_BxKxTxE: jax.Array) -> jax.Array:
  """Of keys, or values.

  The two leading axes of the cache, and of the result, may be one, (B K, L, E): then XLA's CPU backend writes in place,
  for attention reads what is written as it is. In two axes it copies the whole, since it writes once for the reader
  and once for the cache.
  """
  *lead, _, _ = keys_BxKxLxE.shape
  *_, T, E = new_BxKxTxE.shape
  write = lambda keys, new, first: jax.lax.dynamic_update_slice_in_dim(keys, new.astype(keys.dtype), first, axis=0)
  if math.prod(lead) == new_BxKxTxE.shape[1]:  # one text: a plain slice instead of a scatter
    flat_keys = keys_BxKxLxE.reshape(-1, *keys_BxKxLxE.shape[-2:])
    written = jax.vmap(lambda keys, new: write(keys, new, first_B[0]))(flat_keys, new_BxKxTxE.reshape(-1, T, E))
    return written.reshape(keys_BxKxLxE.shape)
  first = jnp.repeat(first_B, math.prod(lead) // first_B.size).reshape(lead)
  for _ in lead:
    write = jax.vmap(write)
  return write(keys_BxKxLxE, new_BxKxTxE.reshape(*lead, T, E), first)
