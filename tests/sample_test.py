"""The sampler on the toy source: the flow's marginals and the order of its steps (method fact 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy import LENGTH, STRINGS, Toy

from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies, schedules, steppers


@pytest.fixture(scope="module")
def toy():
  return Toy()


def walk(toy, precisions_K, start, stepper=steppers.euler, key=jax.random.key(3)):
  """All four latents from `start` (n, 4, M) down a grid of precisions shared by all: the field is asked at each."""

  def step(motion, inputs):
    precision, key = inputs
    latent = latents_lib.Latent(motion.y, jnp.full(motion.y.shape[:-1], 0.5), jnp.zeros(motion.y.shape[:-1], jnp.int32))
    log_belief = latents_lib.log_belief(toy.field(latent), toy.codes, motion.y)
    code = latents_lib.expected_code(log_belief, toy.codes)
    precision = jnp.full_like(motion.precision, precision)
    return motion.after(stepper(key, motion, log_belief, code, toy.codes, precision), precision, code), None

  keys = jax.random.split(key, len(precisions_K) - 1)
  motion = latents_lib.SolverState.start(start)
  motion = motion.replace(y=start, precision=jnp.full_like(motion.precision, precisions_K[0]))
  return jax.lax.scan(step, motion, (precisions_K[1:], keys))[0].y


def grid(last, steps, first=latents_lib.PRECISION_MIN):
  return jnp.exp(jnp.linspace(jnp.log(first), jnp.log(last), steps + 1))


@pytest.mark.parametrize("stepper", [steppers.euler, steppers.multistep, steppers.ancestral])
def test_moments_match_the_forward_process(toy, stepper):
  """At a precision on the way the latents' mean and covariance are those of noised strings."""
  count, precision = 8_000, 3.0
  start = jnp.sqrt(latents_lib.PRECISION_MIN) * jax.random.normal(jax.random.key(0), (count, LENGTH, 4))
  found = np.asarray(jax.jit(lambda y: walk(toy, grid(precision, 64), y, stepper))(start)).reshape(count, -1)
  token, _ = toy.sample(jax.random.key(1), count)
  true = latents_lib.observe(
    toy.codes, token, jnp.full(token.shape, precision), jax.random.normal(jax.random.key(2), (count, LENGTH, 4))
  )
  true = np.asarray(true).reshape(count, -1)
  scale = true.std(0)
  np.testing.assert_allclose(found.mean(0), true.mean(0), atol=5 * scale.max() * (2 / count) ** 0.5)
  np.testing.assert_allclose(np.cov(found.T), np.cov(true.T), atol=0.08 * scale.max() ** 2)


@pytest.mark.parametrize("stepper", ["ode", "ode2", "ancestral"])
def test_decoded_strings_have_the_source_frequencies(toy, stepper):
  """Chi-square over 81 strings. 8,000 draws at level 1e-3 find, with power above 0.9, frequencies that are off by 10 %
  (non-centrality 80); one parallel jump is found at once."""
  count = 8_000
  draw = jax.jit(
    lambda key, times: steppers.sample_window(
      toy.field, toy.codes, toy.warp, policies.TimeGrid(times), key, (count, LENGTH), steppers.STEPPERS[stepper]
    )[0]
  )
  number = lambda tokens: np.asarray(tokens) @ 3 ** np.arange(LENGTH)[::-1]
  test = lambda tokens: stats.chisquare(
    np.bincount(number(tokens), minlength=81), count * toy.probability / toy.probability.sum()
  )
  assert (number(STRINGS) == np.arange(81)).all()
  assert stats.ncx2.sf(stats.chi2.isf(1e-3, 80), 80, count * 0.1**2) > 0.9
  assert test(draw(jax.random.key(0), schedules.time_grid("diagonal:100", LENGTH, 0.5))).pvalue > 1e-3
  assert test(draw(jax.random.key(0), schedules.time_grid("diagonal:1", LENGTH, 0.5))).pvalue < 1e-6


def test_staircase_sampling_is_exact(toy):
  count = 8_000
  tokens = jax.jit(
    lambda key: steppers.sample_window(
      toy.field,
      toy.codes,
      toy.warp,
      policies.TimeGrid(schedules.time_grid("staircase", LENGTH, 0.5)),
      key,
      (count, LENGTH),
    )[0]
  )(jax.random.key(1))
  found = np.bincount(np.asarray(tokens) @ 3 ** np.arange(LENGTH)[::-1], minlength=81)
  assert stats.chisquare(found, count * toy.probability / toy.probability.sum()).pvalue > 1e-3


@pytest.mark.parametrize("stepper,order", [(steppers.euler, 1), (steppers.multistep, 2)])
@pytest.mark.slow
def test_the_error_falls_with_the_order(stepper, order):
  """Halving the steps of sqrt(precision) divides the error against a fine reference by 2 ^ order (in float64)."""
  with jax.enable_x64(True):
    toy = Toy(dtype=jnp.float64)
    start = 0.3 * jax.random.normal(jax.random.key(0), (200, LENGTH, 4), jnp.float64)
    end = jax.jit(
      lambda k, stepper: walk(toy, jnp.linspace(0.3, 2.45, k + 1) ** 2, start, stepper), static_argnums=(0, 1)
    )
    reference = end(4096, steppers.multistep)
    errors = [float(jnp.sqrt(jnp.mean((end(k, stepper) - reference) ** 2))) for k in (16, 32, 64, 128)]
  orders = np.log2(np.divide(errors[:-1], errors[1:]))
  assert (np.abs(orders - order) < 0.25).all(), (errors, orders)


@pytest.mark.slow
def test_few_second_order_steps_are_closer_to_the_source(toy):
  """Frequencies of decoded strings after 12 passes: the total variation from the source falls."""
  count, times = 8_000, policies.TimeGrid(schedules.time_grid("diagonal:12", LENGTH, 0.5))

  def distance(stepper):
    draw = jax.jit(
      lambda key: steppers.sample_window(toy.field, toy.codes, toy.warp, times, key, (count, LENGTH), stepper)[0]
    )
    found = [
      np.bincount(np.asarray(draw(jax.random.key(seed))) @ 3 ** np.arange(LENGTH)[::-1], minlength=81)
      for seed in range(4)
    ]
    return 0.5 * np.abs(sum(found) / (4 * count) - toy.probability / toy.probability.sum()).sum()

  assert distance(steppers.multistep) < distance(steppers.euler)


def test_controlled_steps_follow_their_tolerance(toy):
  """A smaller tolerance takes more passes, a large one few; the strings have the source's frequencies when
  it is small."""
  count, passes = 8_000, []
  for tolerance in (0.01, 0.1, 10.0):
    policy = policies.make_policy(f"error:{tolerance}", LENGTH, 0.5)
    tokens, taken = jax.jit(
      lambda key, policy: steppers.sample_window(
        toy.field, toy.codes, toy.warp, policy, key, (count, LENGTH), steppers.multistep
      )
    )(jax.random.key(0), policy)
    passes.append(float(taken.mean()))
    if tolerance == 0.01:
      found = np.bincount(np.asarray(tokens) @ 3 ** np.arange(LENGTH)[::-1], minlength=81)
      assert stats.chisquare(found, count * toy.probability / toy.probability.sum()).pvalue > 1e-3
  assert passes == sorted(passes, reverse=True) and passes[0] > 2 * passes[-1] and passes[-1] <= 4
