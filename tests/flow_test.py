"""The step cost: its limits, its sign, its variance (method facts 1 and 4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax.flow import bound as bound_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies, schedules
from evo_jax.flow import warp as warp_lib

V, M = 50, 16


@pytest.fixture
def scene():
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 5)
    codes = latents_lib.unit(jax.random.normal(keys[0], (V, M), jnp.float64))
    context = 2.0 * jax.random.normal(keys[1], (V,), jnp.float64)
    token = jax.random.categorical(keys[2], context, shape=(20_000,))
    precision = jnp.full(token.shape, 2.0)
    y = latents_lib.observe(codes, token, precision, jax.random.normal(keys[3], (*token.shape, M), jnp.float64))
    noise = jax.random.normal(keys[4], (*token.shape, M), jnp.float64)
    yield codes, context, token, y, noise


def cost(scene, d, sign=1.0):
  codes, context, token, y, noise = scene
  before = latents_lib.log_belief(context, codes, y)
  after = latents_lib.log_belief(
    context, codes, y + latents_lib.observe(codes, token, jnp.full(token.shape, d), sign * noise)
  )
  own = latents_lib.pick(before, token)
  return latents_lib.step_nll(own, latents_lib.pick(after, token)), latents_lib.jump_nll(own), before


def test_codes_are_unit():
  codes = latents_lib.unit(jnp.asarray(np.random.default_rng(0).normal(size=(V, M)), jnp.float32))
  np.testing.assert_allclose(jnp.sum(codes**2, -1), 1.0, rtol=1e-5)


def test_latent_is_zero_at_precision_zero():
  codes = latents_lib.unit(jnp.ones((3, 4)))
  y = latents_lib.observe(codes, jnp.array([0, 1]), jnp.zeros(2), jnp.ones((2, 4)))
  assert (np.asarray(y) == 0).all()


def test_large_step_costs_the_cross_entropy(scene):
  step, jump, _ = cost(scene, 1e4)
  np.testing.assert_allclose(step, jump, atol=1e-9)


def test_small_step_costs_the_squared_error(scene):
  codes, _, token, _, _ = scene
  for d, tolerance in ((1e-2, 0.03), (1e-3, 0.003)):
    plus, _, before = cost(scene, d)
    minus, _, _ = cost(scene, d, sign=-1.0)
    rate = jnp.mean(latents_lib.small_step_rate(codes, latents_lib.expected_code(before, codes), token))
    np.testing.assert_allclose(jnp.mean(plus + minus) / (2 * d), rate, rtol=tolerance)


@pytest.mark.parametrize("d", [0.05, 0.5, 2.0, 8.0, 40.0])
def test_step_cost_is_not_negative_in_expectation(scene, d):
  step, _, _ = cost(scene, d)
  standard_error = jnp.std(step) / len(step) ** 0.5
  assert jnp.mean(step) > -2 * standard_error
  assert d > 1 or jnp.min(step) < 0  # single values may be


@pytest.mark.parametrize("d", [0.1, 1.0, 5.0, 20.0, 80.0])
def test_antithetic_price_beats_the_linear_control_variate(scene, d):
  """Same mean as the plain price; never a larger variance than it or than with either linear control variate."""
  codes, context, token, y, noise = scene
  plus, _, before = cost(scene, d)
  minus, _, _ = cost(scene, d, sign=-1.0)
  pair = (plus + minus) / 2
  linear = lambda belief: jnp.sqrt(d) * jnp.sum(noise * (codes[token] - latents_lib.expected_code(belief, codes)), -1)
  at_y = plus - linear(before)
  at_end = plus - linear(latents_lib.log_belief(context, codes, y + d * codes[token]))
  assert abs(jnp.mean(pair - plus)) < 4 * jnp.std(pair - plus) / len(token) ** 0.5
  for other in (plus, at_y, at_end):
    assert jnp.std(pair) <= 1.01 * jnp.std(other)


def test_telescoping(scene):
  """With context logits that never change, every path costs one jump from the first belief, to rounding."""
  codes, context, *_ = scene
  warp = warp_lib.Warp.start(jnp.linspace(4.0, 0.0, 32, dtype=jnp.float64), 100.0)
  token = jax.random.randint(jax.random.key(7), (50, 6), 0, V)
  field = lambda latent: jnp.broadcast_to(context, (*latent.time.shape, V))
  jump = -jax.nn.log_softmax(context)[token]
  for path in ("diagonal:1", "diagonal:7", "rolling:5", "staircase"):
    price = jax.jit(
      lambda times: bound_lib.path_nll(field, codes, warp, token, policies.TimeGrid(times), jax.random.key(1))[0]
    )
    total = price(schedules.time_grid(path, 6, 0.5))
    np.testing.assert_allclose(total, jump, atol=1e-9)


def test_euler_step_keeps_a_known_token_on_its_way():
  """With e_hat = e[w] the flow carries lambda e + sqrt(lambda) eps to lambda' e + sqrt(lambda') eps,
  whatever the step."""
  code, noise = jnp.array([0.6, 0.8]), jnp.array([1.0, -2.0])
  at = lambda precision: precision * code + precision**0.5 * noise
  moved = latents_lib.euler_step(at(0.01), code, jnp.asarray(0.01), jnp.asarray(50.0))
  np.testing.assert_allclose(moved, at(50.0), rtol=1e-4)


def test_rotated_codes_are_the_same_model():
  """A rotation of the codes turns the latents with it and leaves evidence, beliefs and prices as they were."""
  keys = jax.random.split(jax.random.key(0), 4)
  codes = latents_lib.unit(jax.random.normal(keys[0], (5, 4)))
  turn = jnp.linalg.qr(jax.random.normal(keys[1], (4, 4)))[0]
  token, noise = jnp.arange(5), jax.random.normal(keys[2], (5, 4))
  y = latents_lib.observe(codes, token, jnp.full(5, 3.0), noise)
  turned = latents_lib.observe(codes @ turn, token, jnp.full(5, 3.0), noise @ turn)  # isotropic: as likely as `noise`
  np.testing.assert_allclose(turned, y @ turn, atol=1e-5)
  np.testing.assert_allclose(latents_lib.evidence(codes @ turn, turned), latents_lib.evidence(codes, y), atol=1e-5)
