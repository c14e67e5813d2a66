"""Kernels of attention against the plain one, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax.network import attention, kernels, rotary
from evo_jax.network.attention import Visibility
from evo_jax.parallel.sharding import Layout

K, G, E, L = 2, 2, 16, 256


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def close(function, reference, arrays, message=""):
  """Same values and same gradients in all arrays, of a random linear form."""
  weights = draw(99, *jax.eval_shape(reference, *arrays).shape)
  both = [
    jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * weights), argnums=tuple(range(len(arrays)))))(*arrays)
    for f in (function, reference)
  ]
  np.testing.assert_allclose(
    jax.jit(function)(*arrays), jax.jit(reference)(*arrays), rtol=1e-4, atol=1e-5, err_msg=message
  )
  for got, wanted in zip(both[0][1], both[1][1]):
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-5, err_msg=message)


def by(kind):
  return functools.partial(attention.attend, config_lib.Model(attention=kind), Layout(platform=jax.default_backend()))


@pytest.mark.parametrize("documents", [False, True])
def test_splash_attention_is_attend_on_the_clean_stream(documents):
  q, k, v = draw(0, 2, K, G, 1, L, E), draw(1, 2, K, L, E), draw(2, 2, K, L, E)
  place = jnp.arange(L)
  start = jnp.stack([jnp.where(place < 100, 0, 100), jnp.where(place < 7, 0, 7)])[:, None] if documents else None
  run = lambda kind: lambda q, k, v: by(kind)(q, (k, v), Visibility(place[None, None] + 1, start), causal=True)
  close(run("splash"), run("xla"), (q, k, v))


@pytest.mark.parametrize("documents", [False, True])
def test_splash_attention_is_attend_on_windows(documents):
  N, S, B = 3, 17, 2
  q, past = draw(0, B, K, G, N, S, E), (draw(1, B, K, L, E), draw(2, B, K, L, E))
  own = draw(3, B, K, N, S, E), draw(4, B, K, N, S, E)
  anchor = jnp.array([[0, 60, 200], [130, 239, 128]])[..., None]  # the first sees nothing before it
  start = jnp.minimum(anchor, 50) if documents else None
  visible = jnp.ones((S, S), bool)
  run = lambda kind: (
    lambda q, k, v, own_k, own_v: by(kind)(q, (k, v), Visibility(anchor, start, visible), (own_k, own_v))
  )
  close(run("splash"), run("xla"), (q, *past, *own))


def test_the_library_function_is_attend_on_the_clean_stream():
  """What cuDNN is asked for, computed by XLA here."""
  q, k, v = draw(0, 2, K, G, L, E), draw(1, 2, K, L, E), draw(2, 2, K, L, E)
  close(
    lambda q, k, v: kernels.library_causal(q, k, v, "xla"),
    lambda q, k, v: attention.attend_plain(q[:, :, :, None], (k, v), Visibility(jnp.arange(L)[None, None] + 1))[
      :, :, :, 0
    ],
    (q, k, v),
  )


def test_cudnn_attention_is_attend_on_the_clean_stream():
  """Both from the same bfloat16 arrays; the plain one computes in float32."""
  if jax.default_backend() != "gpu":
    pytest.skip("needs a GPU")
  q, k, v = (x.astype(jnp.bfloat16) for x in (draw(0, 2, K, G, 1, L, E), draw(1, 2, K, L, E), draw(2, 2, K, L, E)))
  weights, visibility = draw(99, *q.shape), Visibility(jnp.arange(L)[None, None] + 1)

  def form(kind, dtype):
    attend = lambda q, k, v: by(kind)(q.astype(dtype), (k.astype(dtype), v.astype(dtype)), visibility, causal=True)
    total = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32) * weights)
    return jax.jit(attend)(q, k, v), *jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

  for got, wanted in zip(form("cudnn", jnp.bfloat16), form("xla", jnp.float32)):
    wanted = np.asarray(wanted, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())


def test_a_model_of_cudnn_attention_is_read_where_there_is_no_gpu():
  q, past = draw(0, 2, K, G, 1, L, E), (draw(1, 2, K, L, E), draw(2, 2, K, L, E))
  visibility = Visibility(jnp.arange(L)[None, None] + 1)
  if jax.default_backend() == "gpu":
    pytest.skip("needs a machine without a GPU")
  cudnn, xla = (by(kind)(q, past, visibility, causal=True) for kind in ("cudnn", "xla"))
  np.testing.assert_array_equal(cudnn, xla)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_change_nothing(causal):
  q, past = draw(0, 2, K, G, 1, L, E), (draw(1, 2, K, L, E), draw(2, 2, K, L, E))
  stop = jnp.arange(L)[None, None] + 1
  run = lambda block: lambda q, k, v: attention.attend_blockwise(block, q, (k, v), Visibility(stop), causal=causal)
  close(run(64), run(0), (q, *past))


FREQUENCY = 100.0 ** (-np.arange(E // 2, dtype=np.float32) / (E // 2))


def test_turning_by_a_product_is_turning_by_halves():
  x, where = draw(0, 2, K, G, 3, 5, E), rotary.rotary_angles(jnp.arange(15).reshape(3, 5) * 7, FREQUENCY)
  by_product, by_halves = lambda x: rotary.apply_rotary_by_product(x, *where), lambda x: rotary.apply_rotary(x, where)
  close(by_product, by_halves, (x,))
  x = x.astype(jnp.bfloat16)  # which the product loses nothing of
  np.testing.assert_allclose(by_product(x).astype(jnp.float32), by_halves(x).astype(jnp.float32), rtol=2**-7)
