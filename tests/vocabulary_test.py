"""Sums over the vocabulary in chunks: values and gradients are those of whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax.flow import interface
from evo_jax.flow import latents as latents_lib
from evo_jax.network import vocabulary
from evo_jax.parallel.sharding import Layout

V, D, M, B, N = 24, 6, 4, 2, 5


@pytest.fixture
def scene():
  keys = jax.random.split(jax.random.key(0), 8)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  arrays = dict(
    hidden=2 * normal(0, B, N, D),
    table=normal(1, V, D),
    codes=normal(2, V, M),
    ys=(3 * normal(3, B, N, M), normal(4, B, N, M)),
    values=normal(5, V, 3),
  )
  bias = jnp.where(jnp.arange(V) < V - 2, 0.0, vocabulary.FORBIDDEN)
  token = jax.random.randint(keys[6], (B, N), 0, V - 2)
  return arrays, bias, token, jax.random.normal(keys[7], (4, B, N))


def whole(arrays, bias, y=None):
  return arrays["hidden"] @ arrays["table"].T + bias + (0.0 if y is None else y @ arrays["codes"].T)


def same(ours, plain, arrays):
  for found, expected in zip(
    jax.tree.leaves(jax.value_and_grad(ours)(arrays)), jax.tree.leaves(jax.value_and_grad(plain)(arrays))
  ):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [0, 100, 8, 7, 1])
def test_log_probs_are_the_log_softmax_and_so_are_their_gradients(scene, chunk):
  arrays, bias, token, weight = scene

  def ours(arrays):
    beliefs = (
      interface.Beliefs(arrays["hidden"], arrays["ys"], arrays["codes"]),
      interface.Beliefs(arrays["hidden"][:, 1:]),
    )
    first, second = vocabulary.log_probs(chunk, Layout(), beliefs, (token, token[:, 1:]), arrays["table"], bias)
    return sum(jnp.sum(w * x) for w, x in zip(weight, first)) + jnp.sum(weight[3, :, 1:] * second[0])

  def plain(arrays):
    log_p = lambda *y: latents_lib.pick(jax.nn.log_softmax(whole(arrays, bias, *y)), token)
    return sum(jnp.sum(w * log_p(y)) for w, y in zip(weight, arrays["ys"])) + jnp.sum((weight[3] * log_p())[:, 1:])

  same(ours, plain, arrays)


@pytest.mark.parametrize("rise", [[0, 90, 0], [90, 0, -90], [-90, -45, -90], [-30, 25, 50], [30, -30, -60]], ids=str)
def test_logits_far_from_those_before_are_summed_as_well(scene, rise):
  """Three chunks of eight rows, each raised by some nats."""
  arrays, _, token, weight = scene
  bias = jnp.repeat(jnp.array(rise, jnp.float32), 8)

  def ours(arrays):
    return jnp.sum(
      weight[0]
      * vocabulary.log_probs(8, Layout(), (interface.Beliefs(arrays["hidden"]),), (token,), arrays["table"], bias)[0][0]
    )

  same(
    ours, lambda arrays: jnp.sum(weight[0] * latents_lib.pick(jax.nn.log_softmax(whole(arrays, bias)), token)), arrays
  )


@pytest.mark.parametrize("chunk", [0, 8, 1])
@pytest.mark.parametrize("reads_context", [True, False])
def test_means_are_those_of_the_softmax_and_so_are_their_gradients(scene, chunk, reads_context):
  """The hidden states and the table behind the beliefs receive no gradient."""
  arrays, bias, _, weight = scene
  weight = jnp.moveaxis(weight[:3], 0, -1)
  fixed = jax.lax.stop_gradient

  def ours(arrays):
    hidden, table = (arrays["hidden"], arrays["table"]) if reads_context else (None, None)
    beliefs = tuple(interface.Beliefs(hidden, (y,), arrays["codes"]) for y in arrays["ys"])
    first, second = vocabulary.expectations(chunk, Layout(), beliefs, arrays["values"], table, bias)
    return jnp.sum(weight * first) + jnp.sum(weight[::-1] * second)

  def plain(arrays):
    context = fixed({k: arrays[k] if reads_context else jnp.zeros_like(arrays[k]) for k in ("hidden", "table")})
    first, second = (jax.nn.softmax(whole(arrays | context, bias, y)) @ arrays["values"] for y in arrays["ys"])
    return jnp.sum(weight * first) + jnp.sum(weight[::-1] * second)

  same(ours, plain, arrays)


def test_beliefs_that_are_nearly_certain_or_far_off_stay_finite(scene):
  arrays, bias, token, _ = scene
  for scale in (1e4, -1e4):
    value, gradient = jax.value_and_grad(
      lambda hidden: jnp.sum(
        vocabulary.log_probs(8, Layout(), (interface.Beliefs(hidden),), (token,), arrays["table"], bias)[0][0]
      )
    )(scale * arrays["hidden"])
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_chunks_divide_the_rows():
  assert [vocabulary.number_of_chunks(24, chunk) for chunk in (0, 24, 23, 7, 5, 1)] == [1, 1, 2, 4, 6, 24]
  assert (
    vocabulary.number_of_chunks(128_256, 8192) == 16 and vocabulary.number_of_chunks(129_024, 9216, blocks=64) == 14
  )
  assert vocabulary.number_of_chunks(24, 2, blocks=4) == 6  # a row of each block at least


def test_no_more_than_a_chunk_of_logits_is_in_memory(scene):
  """With 40,000 rows: the backward pass, too, needs less memory than the logits would take."""
  rows, tokens = 40_000, 500
  loss = lambda hidden, table: jnp.sum(
    vocabulary.log_probs(
      1000, Layout(), (interface.Beliefs(hidden),), (jnp.zeros(tokens, jnp.int32),), table, jnp.zeros(rows)
    )[0][0]
  )
  shapes = jax.ShapeDtypeStruct((tokens, 8), jnp.float32), jax.ShapeDtypeStruct((rows, 8), jnp.float32)
  used = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  assert used < 0.2 * 4 * rows * tokens


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("informed", [False, True])
def test_distillation_is_the_divergence_from_the_teacher_and_so_are_its_gradients(scene, chunk, informed):
  """With the student's evidence in both beliefs; the teacher receives no gradient. It is 0 where both are equal."""
  arrays, bias, token, weight = scene
  clean = jax.random.normal(jax.random.key(9), (B, 4, D))
  index = jnp.array([[0, 0, 2, 3, 1], [3, 1, 1, 0, 2]])
  clean_token = token[:, :4]

  def found(arrays, clean):
    evidence = (arrays["ys"][1:], arrays["codes"]) if informed else ((), None)
    belief = interface.Beliefs(arrays["hidden"], *evidence)
    teacher = interface.Teacher(clean, clean_token, index)
    return vocabulary.distillation(chunk, Layout(), (3, 2), belief, token, teacher, arrays["table"], bias)

  def ours(arrays):
    result = found(arrays, clean)
    return jnp.sum(weight[0] * result.kl + weight[1] * result.log_p)

  def logits(arrays):
    y = arrays["ys"][1] @ arrays["codes"].T if informed else 0.0
    teacher = jnp.take_along_axis(clean @ arrays["table"].T + bias, index[..., None], 1) + y
    return arrays["hidden"] @ arrays["table"].T + bias + y, jax.lax.stop_gradient(teacher)

  def plain(arrays):
    q, p = map(jax.nn.log_softmax, logits(arrays))
    return jnp.sum(weight[0] * jnp.sum(jnp.exp(p) * (p - q), -1) + weight[1] * latents_lib.pick(q, token))

  same(ours, plain, arrays)
  result, (q, p) = found(arrays, clean), logits(arrays)
  np.testing.assert_array_equal(result.best, jnp.argsort(-q)[..., :3])
  teacher = jax.nn.log_softmax(clean @ arrays["table"].T + bias)
  np.testing.assert_array_equal(result.teacher_best, jnp.argsort(-teacher)[..., :2])
  np.testing.assert_allclose(result.teacher_log_p_BxL, latents_lib.pick(teacher, clean_token), rtol=1e-5)
  if not chunk:
    total_variation = 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(q) - jax.nn.softmax(p)), -1)
    np.testing.assert_allclose(result.overlap, 1 - total_variation, atol=1e-6)
  equal = {**arrays, "hidden": jnp.take_along_axis(clean, index[..., None], 1)}
  np.testing.assert_allclose(found(equal, clean).kl, 0.0, atol=2e-6)
