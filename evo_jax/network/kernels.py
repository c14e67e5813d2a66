"""Fused attention kernels, which keep no scores in memory: splash attention (Pallas) on TPUs, cuDNN's on GPUs.

Arguments and results are those of `attention.attend`; letters in names are those of attention.py. interpret: run
splash attention without a TPU: slow, for tests.
"""

import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp

_LANES = 128  # splash attention takes lengths that are multiples of it
Keys = tuple[jax.Array, jax.Array]


def splash_takes_length(length: int) -> bool:
  """Whether splash attention supports a clean stream of this length."""
  return length % _LANES == 0


def splash_causal(
  q_BxKxGxLxE: jax.Array,
  k_BxKxLxE: jax.Array,
  v_BxKxLxE: jax.Array,
  start_BxL: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention (B, K, G, L, E).

  start_BxL: the first key that a position attends to, the same for all positions of a document; None: key 0.
  """
  G, L = q_BxKxGxLxE.shape[2:4]
  mask = splash.MultiHeadMask([splash.CausalMask((L, L))] * G)
  kernel = _kernel(mask, _block(L), _block(L), interpret)

  def row(q_KxGxLxE, k, v, start_L):
    ids = None if start_L is None else splash.SegmentIds(start_L, start_L)
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q_KxGxLxE, k, v)

  return jax.vmap(row)(_scaled(q_BxKxGxLxE), k_BxKxLxE, v_BxKxLxE, start_BxL)


def splash_windows(
  q_BxKxGxNxSxE: jax.Array,
  past: Keys,
  stop_BxNxS: jax.Array,
  start_BxNxS: jax.Array | None,
  own: Keys,
  visible_NxSxT: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """`attend` for windows: one softmax over the clean stream before each window's anchor and over its own keys.

  All window slots of a sequence are the queries of one call; the keys are its clean stream, then those of all windows.
  The mask, which depends on the anchors, lets the kernel skip whole blocks of keys.
  """
  B, K, G, N, S, E = q_BxKxGxNxSxE.shape
  L, T = past[0].shape[2], own[0].shape[3]
  queries, keys = _padded(N * S), _padded(L + N * T)
  q = _scaled(q_BxKxGxNxSxE).reshape(B, K, G, N * S, E)
  q = jnp.pad(q, ((0, 0),) * 3 + ((0, queries - N * S), (0, 0)))
  k, v = (
    jnp.pad(jnp.concatenate([a, b.reshape(B, K, N * T, E)], axis=2), ((0, 0), (0, 0), (0, keys - L - N * T), (0, 0)))
    for a, b in zip(past, own)
  )
  inside = jnp.broadcast_to(visible_NxSxT, (N, S, T))
  inside = (inside[:, :, None] & jnp.eye(N, dtype=bool)[:, None, :, None]).reshape(N * S, N * T)
  position = jnp.arange(L)

  # One sequence at a time: the kernel reads the mask's blocks from scalar memory, over which it cannot be batched.
  def sequence(arrays):
    q, k, v, stop, start = arrays
    before = (position < stop.reshape(-1, 1)) & (position >= start.reshape(-1, 1))
    mask = jnp.pad(jnp.concatenate([before, inside], axis=1), ((0, queries - N * S), (0, keys - L - N * T)))
    mask = mask.at[N * S :, 0].set(True)  # padded queries attend to something, too
    kernel = _kernel(mask[None], _block(queries), _block(keys), interpret)
    return jax.vmap(kernel)(q, k, v)  # one head's mask serves all G

  stop = jnp.broadcast_to(stop_BxNxS, (B, N, S))
  start = jnp.zeros_like(stop) if start_BxNxS is None else jnp.broadcast_to(start_BxNxS, (B, N, S))
  out = (
    jax.lax.map(sequence, (q, k, v, stop, start))
    if B > 1
    else sequence(jax.tree.map(lambda x: x[0], (q, k, v, stop, start)))[None]
  )
  return out[:, :, :, : N * S].reshape(B, K, G, N, S, E)


def library_causal(
  q_BxKxGxLxE: jax.Array, k_BxKxLxE: jax.Array, v_BxKxLxE: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
  """Causal attention (B, K, G, L, E) by JAX's `dot_product_attention`: "cudnn" on GPUs, in bfloat16; "xla" anywhere."""
  B, K, G, L, E = q_BxKxGxLxE.shape
  length_first = lambda x: x.reshape(B, -1, L, E).swapaxes(1, 2)
  out = jax.nn.dot_product_attention(
    length_first(q_BxKxGxLxE),
    length_first(k_BxKxLxE),
    length_first(v_BxKxLxE),
    is_causal=True,
    implementation=implementation,
  )
  return out.swapaxes(1, 2).reshape(B, K, G, L, E)


def _scaled(q: jax.Array) -> jax.Array:
  return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _padded(length: int) -> int:
  # Blocks of 512 where padding to them costs little.
  step = 512 if length > 2048 else _LANES
  return -(-length // step) * step


def _block(length: int) -> int:
  return math.gcd(length, 512)


def _kernel(mask, queries: int, keys: int, interpret: bool):
  sizes = splash.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_kv_compute=keys,
    block_q_dkv=queries,
    block_kv_dkv=keys,
    block_kv_dkv_compute=keys,
    block_q_dq=queries,
    block_kv_dq=keys,
  )
  kernel = splash.make_splash_mqa(
    mask,
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name="attention",
    interpret=interpret,
  )
  # When made under jit, the kernel has turned this flag, which it branches on when called, into a traced value.
  kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=isinstance(mask, jax.Array))
  return kernel
