"""Attention over the keys of the clean stream and of a run of slots. One `attend()`, and what stands for it where
it is faster.

Letters in names: B batch, N runs of slots (windows; 1 for the clean stream), S slots of a run, T those of them that
are keys, L clean positions, H heads, K heads for keys and values, G = H / K, E elements of a head.
"""

import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.network import kernels
from evo_jax.parallel import sharding

Keys = tuple[jax.Array, jax.Array]  # keys and values


def attend_plain(
  q_BxKxGxNxSxE: jax.Array,
  past: Keys | None = None,
  stop_BxNxS: jax.Array | None = None,
  start_BxNxS: jax.Array | None = None,
  own: Keys | None = None,
  visible_NxSxT: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention of every slot to a stretch of the clean stream and to slots of its own run; (B, K, G, N, S, E).

  Args:
    q_BxKxGxNxSxE: queries; G of them share keys (grouped-query attention).
    past: keys and values (B, K, L, E), or (B K, L, E), of the clean stream, shared by the N runs.
    stop_BxNxS, start_BxNxS: int32: a slot sees clean positions from `start` (None: 0) on and before `stop`.
    own: keys and values (B, K, N, T, E) of the run itself.
    visible_NxSxT: bool, broadcastable to (B, N, S, T): which of them a slot sees.

  `past` or `own` may be None; every slot sees something in what is there. One softmax spans both parts, computed in
  float32. The result has q's dtype.
  """
  B, K, G, N, S, E = q_BxKxGxNxSxE.shape
  q = q_BxKxGxNxSxE * E**-0.5
  f32 = dict(preferred_element_type=jnp.float32)
  parts = []  # (scores (B, K, G, N, S, keys), what sums values by weights)
  if past is not None:
    k, v = (x.reshape(B, K, *x.shape[-2:]) for x in past)
    scores = jnp.einsum("bkme,bkle->bkml", q.reshape(B, K, -1, E), k, **f32).reshape(B, K, G, N, S, -1)
    position = jnp.arange(k.shape[2])
    visible = position < stop_BxNxS[..., None]
    if start_BxNxS is not None:
      visible &= position >= start_BxNxS[..., None]
    parts.append(
      (
        jnp.where(visible[:, None, None], scores, -jnp.inf),
        lambda w, v=v: jnp.einsum("bkml,bkle->bkme", w.reshape(B, K, G * N * S, -1), v, **f32).reshape(q.shape),
      )
    )
  if own is not None:
    k, v = own
    together = lambda x: x.swapaxes(2, 3).reshape(
      B, K, N, G * S, x.shape[-1]
    )  # the queries of a run, which share its keys
    apart = lambda x: x.reshape(B, K, N, G, S, x.shape[-1]).swapaxes(2, 3)
    scores = apart(jnp.einsum("bknme,bknte->bknmt", together(q), k, **f32))
    visible = jnp.broadcast_to(visible_NxSxT, (B, N, S, k.shape[3]))
    parts.append(
      (
        jnp.where(visible[:, None, None], scores, -jnp.inf),
        lambda w, v=v: apart(jnp.einsum("bknmt,bknte->bknme", together(w), v, **f32)),
      )
    )
  tops = [jnp.max(scores, axis=-1, keepdims=True) for scores, _ in parts]
  top = jax.lax.stop_gradient(jnp.maximum(tops[0], tops[-1]))
  weights = [jnp.exp(scores - top) for scores, _ in parts]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = sum(gather(w.astype(q.dtype)) for w, (_, gather) in zip(weights, parts))
  return (out / total).astype(q.dtype)


def attend(
  config: config_lib.Model,
  rules: sharding.ShardingRules,
  q_BxKxGxNxSxE: jax.Array,
  past: Keys | None,
  stop_BxNxS: jax.Array | None,
  start_BxNxS: jax.Array | None,
  own: Keys | None,
  visible_NxSxT: jax.Array | None,
  causal: bool = False,
) -> jax.Array:
  """`attend`, by the kernel that config.attention names, where it takes these shapes; by `attend_in_blocks` elsewhere.

  causal: the slots are the clean stream; slot s sees the positions from `start` to s. The result is named "attention"
  for `remat`; splash attention names it itself, and what it keeps beside.
  """
  kind = config.attention
  if kind == "auto":
    kind = "splash" if sharding.platform() == "tpu" else "xla"
  q, heads, rows = q_BxKxGxNxSxE, ("batch", "kv_heads"), ("batch",)
  if causal and kind == "splash" and kernels.splash_takes_length(q.shape[4]):
    start = None if start_BxNxS is None else start_BxNxS[:, 0]
    return rules.by_device(kernels.splash_causal, (heads, heads, heads, rows), heads)(q[:, :, :, 0], *past, start)[
      :, :, :, None
    ]
  if causal and kind == "cudnn" and start_BxNxS is None:
    return checkpoint_name(
      rules.by_device(kernels.library_causal, (heads,) * 3, heads)(q[:, :, :, 0], *past)[:, :, :, None], "attention"
    )
  if (
    kind == "splash" and past is not None and own is not None and visible_NxSxT.ndim < 4
  ):  # windows, and not one text's slots
    return rules.by_device(kernels.splash_windows, (heads, heads, rows, rows, heads, ()), heads)(
      q, past, stop_BxNxS, start_BxNxS, own, visible_NxSxT
    )
  return checkpoint_name(
    attend_blockwise(config.attention_block, q, past, stop_BxNxS, start_BxNxS, own, visible_NxSxT, causal), "attention"
  )


def attend_blockwise(
  block: int,
  q_BxKxGxNxSxE: jax.Array,
  past: Keys | None,
  stop_BxNxS: jax.Array | None,
  start_BxNxS: jax.Array | None,
  own: Keys | None,
  visible_NxSxT: jax.Array | None,
  causal: bool = False,
) -> jax.Array:
  """`attend`, with the scores of about `block` queries of a sequence and head in memory at a time (0: of all).

  The backward pass computes a block's scores anew. causal: slot s sees no clean position behind s, so that a block
  reads only the keys up to its end: half of all products. Runs are read some at a time otherwise.
  """
  _, _, _, N, S, _ = q_BxKxGxNxSxE.shape
  if not block or block >= N * S:
    return attend_plain(q_BxKxGxNxSxE, past, stop_BxNxS, start_BxNxS, own, visible_NxSxT)
  some = jax.checkpoint(attend_plain, prevent_cse=False)
  if causal:
    # Places may be shared by the batch: axes of size 1 are.
    return jnp.concatenate(
      [
        some(
          q_BxKxGxNxSxE[..., i : i + block, :],
          tuple(x[:, :, : i + block] for x in past),
          stop_BxNxS[..., i : i + block],
          None if start_BxNxS is None else start_BxNxS[..., i : i + block],
        )
        for i in range(0, S, block)
      ],
      axis=4,
    )
  runs = max(block // S, 1)
  part = lambda x, i: x if x is None or x.shape[1] == 1 else x[:, i : i + runs]
  return jnp.concatenate(
    [
      some(
        q_BxKxGxNxSxE[:, :, :, i : i + runs],
        past,
        part(stop_BxNxS, i),
        part(start_BxNxS, i),
        own and tuple(x[:, :, i : i + runs] for x in own),
        visible_NxSxT,
      )
      for i in range(0, N, runs)
    ],
    axis=3,
  )


def write_cache(keys_BxKxLxE: jax.Array, first_B: jax.Array, new_BxKxTxE: jax.Array) -> jax.Array:
  """Keys or values of a text with new ones at the places first[b], first[b] + 1, ...

  The two leading axes of the old ones, and of the result, may be one, (B K, L, E): then XLA's CPU backend writes in
  place, for `attend` reads what is written as it is. In two axes it copies the whole, since it writes once for the
  reader and once for the text.
  """
  *lead, _, _ = keys_BxKxLxE.shape
  *_, T, E = new_BxKxTxE.shape
  write = lambda keys, new, first: jax.lax.dynamic_update_slice_in_dim(keys, new.astype(keys.dtype), first, axis=0)
  if math.prod(lead) == new_BxKxTxE.shape[1]:  # of one text: no place differs, a plain slice instead of a scatter
    return jax.vmap(lambda keys, new: write(keys, new, first_B[0]))(
      keys_BxKxLxE.reshape(-1, *keys_BxKxLxE.shape[-2:]), new_BxKxTxE.reshape(-1, T, E)
    ).reshape(keys_BxKxLxE.shape)
  first = jnp.repeat(first_B, math.prod(lead) // first_B.size).reshape(lead)
  for _ in lead:
    write = jax.vmap(write)
  return write(keys_BxKxLxE, new_BxKxTxE.reshape(*lead, T, E), first)
