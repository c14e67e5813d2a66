"""Decoding: the flow's marginals on the toy source (method fact 5), and exact caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from evo_jax import flow, generate, paths, policies, sample
from toy import LENGTH, STRINGS, Toy
from model_test import V, build


@pytest.fixture(scope="module")
def toy():
  return Toy()


def walk(toy, precisions_K, start, stepper=sample.euler, key=jax.random.key(3)):
  """All four latents from `start` (n, 4, M) down a grid of precisions shared by all: the field is asked at each."""
  def step(y, inputs):
    old, new, key = inputs
    latent = flow.Latent(y, jnp.full(y.shape[:-1], 0.5), jnp.zeros(y.shape[:-1], jnp.int32))
    log_belief = flow.log_belief(toy.field(latent), toy.codes, y)
    full = lambda x: jnp.full(y.shape[:-1], x)
    return stepper(key, y, log_belief, toy.codes, full(old), full(new)), None
  keys = jax.random.split(key, len(precisions_K) - 1)
  return jax.lax.scan(step, start, (precisions_K[:-1], precisions_K[1:], keys))[0]


def grid(last, steps, first=sample.PRECISION_MIN):
  return jnp.exp(jnp.linspace(jnp.log(first), jnp.log(last), steps + 1))


@pytest.mark.parametrize("stepper", [sample.euler, sample.ancestral])
def test_moments_match_the_forward_process(toy, stepper):
  """At a precision on the way the latents' mean and covariance are those of noised strings."""
  count, precision = 8_000, 3.0
  start = jnp.sqrt(sample.PRECISION_MIN) * jax.random.normal(jax.random.key(0), (count, LENGTH, 4))
  found = np.asarray(jax.jit(lambda y: walk(toy, grid(precision, 64), y, stepper))(start)).reshape(count, -1)
  token, _ = toy.sample(jax.random.key(1), count)
  true = flow.observe(toy.codes, token, jnp.full(token.shape, precision),
                      jax.random.normal(jax.random.key(2), (count, LENGTH, 4)))
  true = np.asarray(true).reshape(count, -1)
  scale = true.std(0)
  np.testing.assert_allclose(found.mean(0), true.mean(0), atol=5 * scale.max() * (2 / count) ** 0.5)
  np.testing.assert_allclose(np.cov(found.T), np.cov(true.T), atol=0.08 * scale.max() ** 2)


@pytest.mark.parametrize("stepper", ["ode", "ancestral"])
def test_decoded_strings_have_the_source_frequencies(toy, stepper):
  """Chi-square over 81 strings. 8,000 draws at level 1e-3 find, with power above 0.9, frequencies that are off by 10 %
  (non-centrality 80); one parallel jump is found at once."""
  count = 8_000
  draw = jax.jit(lambda key, times: sample.sample_window(toy.field, toy.codes, toy.warp, policies.Grid(times),
                                                         key, (count, LENGTH), sample.STEPPERS[stepper])[0])
  number = lambda tokens: np.asarray(tokens) @ 3 ** np.arange(LENGTH)[::-1]
  test = lambda tokens: stats.chisquare(np.bincount(number(tokens), minlength=81), count * toy.probability / toy.probability.sum())
  assert (number(STRINGS) == np.arange(81)).all()
  assert stats.ncx2.sf(stats.chi2.isf(1e-3, 80), 80, count * 0.1**2) > 0.9
  assert test(draw(jax.random.key(0), paths.grid("diagonal:100", LENGTH, 0.5))).pvalue > 1e-3
  assert test(draw(jax.random.key(0), paths.grid("diagonal:1", LENGTH, 0.5))).pvalue < 1e-6


def test_staircase_sampling_is_exact(toy):
  count = 8_000
  tokens = jax.jit(lambda key: sample.sample_window(toy.field, toy.codes, toy.warp, policies.Grid(
      paths.grid("staircase", LENGTH, 0.5)), key, (count, LENGTH))[0])(jax.random.key(1))
  found = np.bincount(np.asarray(tokens) @ 3 ** np.arange(LENGTH)[::-1], minlength=81)
  assert stats.chisquare(found, count * toy.probability / toy.probability.sum()).pvalue > 1e-3


def test_euler_is_of_first_order():
  """Halving the step of log-precision halves the error against a fine reference (in float64)."""
  with jax.enable_x64(True):
    toy = Toy(dtype=jnp.float64)
    start = 0.3 * jax.random.normal(jax.random.key(0), (200, LENGTH, 4), jnp.float64)
    end = jax.jit(lambda k: walk(toy, jnp.exp(jnp.linspace(jnp.log(0.09), jnp.log(6.0), k + 1)), start), static_argnums=0)
    reference = end(4096)
    errors = [float(jnp.sqrt(jnp.mean((end(k) - reference) ** 2))) for k in (16, 32, 64, 128)]
  orders = np.log2(np.divide(errors[:-1], errors[1:]))
  assert (np.abs(orders - 1.0) < 0.2).all(), (errors, orders)


def test_cached_decoding_equals_reading_anew():
  """After a prompt, `ar` tokens and a window, the cache is that of the clean stream over the whole text."""
  net, statistics, config = build(model__isolate_documents=True)
  model, params = net.clone(), net.variables["params"]
  prompt = jnp.zeros((3, 32), jnp.int32).at[:, 1:6].set(jnp.arange(1, 6))

  @jax.jit
  def write(params):
    net = model.bind({"params": params})
    state = sample.ar(net, sample.start_text(net, prompt, 6), jax.random.key(0), 7)
    times = paths.grid("diagonal:3", 8, 0.5)
    state, _ = sample.flow_windows(net, statistics, state, jax.random.key(1), 1, 8, policies.Grid(times))
    return state, net.clean(state.token[:, :-1])[1]

  state, cache = write(params)
  assert int(state.last) == 6 + 7 + 8 - 1 and (np.asarray(state.token) < V).all()
  n = int(state.last)
  np.testing.assert_allclose(state.cache.k[:, :, :n], cache.k[:, :, :n], atol=2e-5)
  np.testing.assert_allclose(state.cache.v[:, :, :n], cache.v[:, :, :n], atol=2e-5)
  np.testing.assert_array_equal(state.cache.segment[:, :n], cache.segment[:, :n])
  assert len(np.unique(np.asarray(state.token)[:, 6:], axis=0)) == 3  # the rows are different draws


def test_ar_tokens_follow_the_clean_stream():
  """The first token that `ar` draws has the clean stream's distribution (chi-square, 4,000 draws of 20 symbols)."""
  net, statistics, config = build()
  prompt = np.array([3, 1, 4])
  found = generate.generate(net.clone(), net.variables["params"], statistics, config, prompt, "ar", 4000, 1,
                            jax.random.key(0))
  p = np.asarray(jax.nn.softmax(net(jnp.array([[0, 3, 1, 4]]))[0, -1]), np.float64)[:V]
  assert stats.chisquare(np.bincount(found[:, 0], minlength=V), 4000 * p / p.sum()).pvalue > 1e-3


def test_flow_fills_any_length_and_the_whole_context():
  net, statistics, config = build()
  for tokens in (13, 32):
    found = generate.generate(net.clone(), net.variables["params"], statistics, config, np.zeros(0, int), "flow", 2, tokens,
                              jax.random.key(0), 2)
    assert found.shape == (2, tokens) and (found < V).all() and (found >= 0).all()
