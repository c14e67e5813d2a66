"""The time warp, clocks, grids and low-discrepancy draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax.errors import UserError
from evo_jax.flow import schedules
from evo_jax.flow import warp as warp_lib


def test_isotonic_fit_is_the_least_squares_one():
  rng = np.random.default_rng(0)
  values, weights = rng.normal(size=40) - 0.1 * np.arange(40), rng.uniform(0.1, 3.0, 40)
  fit = np.asarray(warp_lib.isotonic_decreasing(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32)))
  from scipy.optimize import isotonic_regression

  np.testing.assert_allclose(fit, isotonic_regression(values, weights=weights, increasing=False).x, atol=1e-5)


def test_warp_inverts_and_is_fitted():
  """Measurements of a known CE curve give t = CE / CE(0), and precision() undoes time()."""
  warp = warp_lib.Warp.start(jnp.full(48, 3.0), 400.0)
  truth = lambda precision: 2.0 / (1.0 + 0.1 * precision)
  rng = np.random.default_rng(0)
  for _ in range(10):
    precision = jnp.asarray(np.expm1(rng.uniform(0, np.log1p(400), 20_000)), jnp.float32)
    noise = jnp.asarray(rng.exponential(size=20_000), jnp.float32)
    warp = warp.update(precision, truth(precision) * noise, jnp.ones(20_000), 0.9)
  where = jnp.array([0.0, 1.0, 5.0, 20.0, 100.0])
  np.testing.assert_allclose(warp.time(where), truth(where) / truth(0.0), atol=0.03)
  times = jnp.linspace(0.05, 1.0, 50)
  np.testing.assert_allclose(warp.time(warp.precision(times)), times, atol=1e-4)
  assert warp.precision(jnp.float32(1.0)) == 0.0


@pytest.mark.parametrize(
  "path",
  [
    "diagonal:1",
    "diagonal:5",
    "rolling:1",
    "rolling:8",
    "staircase",
    "streams:2",
    "streams:4",
    "scaffold:3",
    "scaffold:2:3:.25",
  ],
)
def test_grids_fall_from_one_to_zero(path):
  times = np.asarray(schedules.time_grid(path, 6, 0.5))
  assert (times[0] == 1).all() and (times[-1] == 0).all() and (np.diff(times, axis=0) <= 0).all()
  if path == "staircase":
    assert np.isin(times, [0, 1]).all() and (np.diff(times, axis=0).sum(1) == -1).all()


def test_rolling_finishes_left_to_right():
  times = np.asarray(schedules.time_grid("rolling:8", 6, 0.5))
  assert (np.diff(times, axis=1) >= 0).all() and times[4, 0] == 0 and times[4, -1] == 1


@pytest.mark.parametrize(
  "path",
  [
    "spiral:3",
    "diagonal",
    "diagonal:0",
    "ar:3",
    "rolling:x",
    "",
    "streams:0",
    "certain",
    "entropy",
    "entropy:-1",
    "confidence:2",
    "maturity:x",
    "learned:1.5",
    "scaffold",
    "scaffold:0",
    "scaffold:2:x",
    "scaffold:2:2:1.5",
    "scaffold:2:2:0",
    "scaffold:99999999",
  ],
)
def test_bad_paths_are_named(path):
  with pytest.raises(UserError, match="path"):
    schedules.parse_path(path)


def test_low_discrepancy_is_uniform_and_even():
  points = np.asarray(schedules.low_discrepancy(jax.random.key(0), 256, 3))
  assert points.shape == (256, 3) and (points >= 0).all() and (points < 1).all()
  for column in points.T:  # 16 bins of 16 points: independent draws miss by 3.9 (standard deviation), the worst by 9
    assert abs(np.histogram(column, 16, (0, 1))[0] - 16).max() <= 5
  many = np.stack([np.asarray(schedules.low_discrepancy(jax.random.key(i), 4, 3)) for i in range(200)])
  np.testing.assert_allclose(many.mean((0, 1)), 0.5, atol=0.05)  # every point is uniform over the keys
  first, more = (
    schedules.low_discrepancy(jax.random.key(1), 4, 2),
    schedules.low_discrepancy(jax.random.key(1), 10**6, 2),
  )
  np.testing.assert_array_equal(first, more[:4])  # exact far out, too
  assert len(np.unique(np.asarray(more[-1000:, 0]))) == 1000


def test_the_warp_outlives_knots_that_are_not_measured():
  """A knot whose weight has decayed to nothing beside the others keeps its mean: 3,000 steps at low precisions only."""
  warp = warp_lib.Warp.start(jnp.linspace(3.0, 0.1, 48), 400.0)
  precision = jnp.linspace(0.0, 5.0, 4096)
  step = lambda _, warp: warp.update(precision, jnp.exp(-precision), jnp.ones(4096), 0.99)
  warp = jax.jit(lambda warp: jax.lax.fori_loop(0, 3000, step, warp))(warp)
  entropy = np.asarray(warp.entropy())
  assert np.isfinite(entropy).all() and (np.diff(entropy) <= 0).all()
  assert entropy[0] == pytest.approx(1.0, abs=0.06) and np.isfinite(warp.precision(jnp.linspace(0.0, 1.0, 9))).all()
