"""The bound on the exact toy source: one flow, one entropy (method fact 3)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import LENGTH, STRINGS, SYMBOLS, Toy

from evo_jax.flow import bound as bound_lib
from evo_jax.flow import policies, schedules

COUNT = 2000


def cost(toy, times, seed=0):
  """Mean price of a string in nats, and its standard error; the samples' own surprise is a control variate."""
  token, number = toy.sample(jax.random.key(seed), COUNT)
  price = jax.jit(
    lambda token: bound_lib.path_nll(
      toy.field, toy.codes, toy.warp, token, policies.TimeGrid(times), jax.random.key(seed + 1)
    )[0]
  )
  excess = np.asarray(price(token).sum(-1), np.float64) + np.log(toy.probability)[np.asarray(number)]
  return toy.entropy + excess.mean(), excess.std() / COUNT**0.5


@pytest.fixture(scope="module")
def toy():
  return Toy()


def random_order(steps):
  start = 0.6 * jax.random.uniform(jax.random.key(5), (LENGTH,))
  times = schedules.LinearClock(start, jnp.full(LENGTH, 0.4))((jnp.arange(steps + 1) / steps)[:, None])
  return times.at[-1].set(0.0)


@pytest.mark.parametrize("name", ["staircase", "backwards", "diagonal", "rolling", "random"])
def test_every_path_costs_the_entropy(toy, name):
  times = {
    "staircase": schedules.time_grid("staircase", LENGTH, 0.5),
    "diagonal": schedules.time_grid("diagonal:200", LENGTH, 0.5),
    "backwards": schedules.time_grid("staircase", LENGTH, 0.5)[:, ::-1],
    "rolling": schedules.time_grid("rolling:200", LENGTH, 0.3),
    "random": random_order(200),
  }[name]
  mean, stderr = cost(toy, times)
  # Finite Gaussian steps cost a little more than the flow: the excess falls as 1 / K.
  excess = 1e-6 if name in ("staircase", "backwards") else 0.012
  assert toy.entropy - 4 * stderr - 1e-6 < mean < toy.entropy + 4 * stderr + excess
  assert stderr < 0.003


def test_fewer_steps_cost_more(toy):
  means = [cost(toy, schedules.time_grid(f"diagonal:{k}", LENGTH, 0.5))[0] for k in (1, 2, 4, 16)]
  assert all(a > b + 0.005 for a, b in itertools.pairwise(means)), means
  marginals = np.array([[toy.probability[STRINGS[:, i] == v].sum() for v in range(SYMBOLS)] for i in range(LENGTH)])
  assert abs(means[0] + (marginals * np.log(marginals)).sum()) < 0.05  # one jump: the marginals' entropies


def test_staircase_has_no_noise(toy):
  _, stderr = cost(toy, schedules.time_grid("staircase", LENGTH, 0.5))
  assert stderr < 1e-5  # each string costs exactly its own surprise


def test_passes_end_with_the_path(toy):
  """A grid filled up with zeros costs and takes what the grid alone does."""
  token, _ = toy.sample(jax.random.key(0), 10)
  times = schedules.time_grid("diagonal:4", LENGTH, 0.5)
  price = jax.jit(
    lambda times: bound_lib.path_nll(toy.field, toy.codes, toy.warp, token, policies.TimeGrid(times), jax.random.key(1))
  )
  (a, passes), (b, filled) = price(times), price(jnp.pad(times, [(0, 9), (0, 0)]))
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert (passes == 4).all() and (filled == 4).all()
