"""Adaptive policies, random orders and learned clocks on the exact toy source: one price, the same in the sampler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy import LENGTH, STRINGS, SYMBOLS, Toy

from evo_jax.flow import bound as bound_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies, schedules, steppers

NUMBER = 3 ** np.arange(LENGTH)[::-1]


@pytest.fixture(scope="module")
def toy():
  return Toy()


def priced(toy, policy, token, key=jax.random.key(1), field=None):
  return jax.jit(lambda token, policy: bound_lib.path_nll(field or toy.field, toy.codes, toy.warp, token, policy, key))(
    token, policy
  )


def blunt(toy):
  """A field that makes too little of the context of its first tokens: a model with errors, whose orders
  differ in price."""
  share = jnp.array([0.1, 0.5, 1.0, 1.0])[:, None]
  return lambda latent, context=None: share * jax.nn.log_softmax(toy.field(latent), axis=-1)


JUMPS = [
  "left:1",
  "left:2",
  "certain:2",
  "entropy:1.35",
  "entropy:1.45",
  "confidence:0.5",
  "confidence:1",
  "spread:0.3",
  "spread:0.75",
  "spread:1.9",
]


@pytest.mark.parametrize("path", JUMPS)
def test_a_policy_of_jumps_costs_what_it_samples(toy, path):
  """Its price of every string is -log of the probability with which the same object draws it: the prices' probabilities
  add up to one, and 8,000 draws agree (chi-square at 1e-3; power above 0.9 against frequencies that are
  off by 10 %)."""
  policy = policies.make_policy(path, LENGTH, 0.5)
  price, passes = priced(toy, policy, jnp.asarray(STRINGS))
  q = np.exp(-np.asarray(price.sum(-1), np.float64))
  assert abs(q.sum() - 1) < 1e-4
  drawn, _ = jax.jit(lambda key: steppers.sample_window(toy.field, toy.codes, toy.warp, policy, key, (8000, LENGTH)))(
    jax.random.key(2)
  )
  found = np.bincount(np.asarray(drawn) @ NUMBER, minlength=81)
  assert stats.chisquare(found, 8000 * q / q.sum()).pvalue > 1e-3
  cost = float((toy.probability * price.sum(-1)).sum())
  if path in ("left:1", "confidence:1", "spread:0.3"):  # one token at a time: exact, in any order
    assert abs(cost - toy.entropy) < 1e-4 and (passes == LENGTH).all()
  else:  # tokens that jump together are priced as if they were independent
    assert cost > toy.entropy + 0.01 and float(passes.mean()) < LENGTH


def test_thresholds_trade_bits_for_passes(toy):
  """A looser threshold takes fewer passes and costs more; at the loosest all jump at once."""
  found = []
  for limit in (0.0, 1.2, 1.35, 1.45, 64.0):
    price, passes = priced(toy, policies.make_policy(f"entropy:{limit}", LENGTH, 0.5), jnp.asarray(STRINGS))
    found.append(((toy.probability * price.sum(-1)).sum(), (toy.probability * passes).sum()))
  bits, passes = np.array(found).T
  assert (np.diff(bits) > -1e-4).all() and (np.diff(passes) <= 0).all() and passes[0] == 4 and passes[-1] == 1
  assert abs(bits[0] - toy.entropy) < 1e-4 and bits[-1] > toy.entropy + 0.3


@pytest.mark.parametrize("limit", [0.2, 0.6])
def test_maturity_is_a_bound(toy, limit):
  """Partial evidence up to the inferred maturity, then jumps: never below the entropy, and dearer with fewer passes."""
  token, number = toy.sample(jax.random.key(0), 4000)
  price, passes = priced(toy, policies.make_policy(f"maturity:{limit}", LENGTH, 0.5), token)
  excess = np.asarray(price.sum(-1), np.float64) + np.log(toy.probability)[np.asarray(number)]
  assert excess.mean() > 4 * excess.std() / 4000**0.5 and excess.mean() < 1.0
  assert 1 < float(passes.mean()) <= LENGTH
  drawn, taken = steppers.sample_window(
    toy.field,
    toy.codes,
    toy.warp,
    policies.make_policy(f"maturity:{limit}", LENGTH, 0.5),
    jax.random.key(3),
    (500, LENGTH),
    steppers.ancestral,
  )
  assert (
    drawn.shape == (500, LENGTH) and (drawn >= 0).all() and (drawn < SYMBOLS).all() and float(taken.mean()) <= LENGTH
  )


def test_a_policy_sees_no_unknown_token(toy):
  """As long as nothing is known, the truth does not change what moves: the same times for all strings."""
  seen = []

  def spy(reading):
    time = policies.make_policy("maturity:0.5", LENGTH, 0.5)(reading)
    jax.debug.callback(lambda index, time: seen.append((int(index), np.asarray(time))), reading.index, time)
    return time

  bound_lib.path_nll(toy.field, toy.codes, toy.warp, jnp.asarray(STRINGS), spy, jax.random.key(0))
  jax.effects_barrier()
  first = [time for index, time in seen if index == 0]
  assert first and all((time == time[0]).all() for time in first)


@pytest.mark.slow
def test_masked_diffusion_costs_the_any_order_average(toy):
  """Method fact 8, with a field whose orders differ in price: one token a pass in random order is the mean
  over all 24."""
  field, strings = blunt(toy), jnp.asarray(STRINGS)
  orders = [
    np.asarray(
      priced(
        toy,
        policies.TimeGrid(jnp.asarray((np.array(order)[None] >= np.arange(LENGTH + 1)[:, None]).astype(np.float32))),
        strings,
        field=field,
      )[0].sum(-1)
    )
    for order in itertools.permutations(range(LENGTH))
  ]
  assert np.std([(toy.probability * o).sum() for o in orders]) > 0.003  # or there is nothing to average
  many = jnp.repeat(strings, 200, axis=0)
  cost, passes = bound_lib.erasure_nll(
    field, toy.codes, many, policies.RandomOrder(np.int32(LENGTH)), jax.random.key(0)
  )
  cost = np.asarray(cost.sum(-1)).reshape(81, 200)
  want = np.mean(orders, axis=0)
  error = cost.std(1) / 200**0.5
  assert (passes == LENGTH).all() and (np.abs(cost.mean(1) - want) < 5 * error).all()
  assert abs((toy.probability * (cost.mean(1) - want)).sum()) < 4 * np.sqrt(((toy.probability * error) ** 2).sum())
  exact, _ = bound_lib.erasure_nll(
    toy.field,
    toy.codes,
    toy.sample(jax.random.key(0), 4000)[0],
    policies.RandomOrder(np.int32(LENGTH)),
    jax.random.key(1),
  )
  assert abs(float(exact.sum(-1).mean()) - toy.entropy) < 0.05


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_priced_pass_stands_for_a_walked_order(toy, passes):
  """`erasure_nll` evaluates passes apart; walking the same policy from end to end costs the same in mean."""
  field, token = blunt(toy), jnp.repeat(jnp.asarray(STRINGS), 150, axis=0)
  policy = policies.RandomOrder(np.int32(passes))
  apart = np.asarray(bound_lib.erasure_nll(field, toy.codes, token, policy, jax.random.key(0))[0].sum(-1))
  walked, taken = priced(
    toy, policy.replace(rank=bound_lib.random_rank(jax.random.key(1), token.shape)), token, field=field
  )
  walked = np.asarray(walked.sum(-1))
  assert (taken == passes).all()
  gap = (apart - walked).reshape(81, 150)
  assert abs(gap.mean()) < 4 * gap.std() / gap.size**0.5 + 1e-5


def test_blocks_of_one_are_autoregression(toy):
  """Method fact 8: a block of one token, masked and revealed, costs the token's AR cross-entropy."""
  price, _ = priced(
    toy,
    policies.RandomOrder(np.int32(LENGTH), jnp.broadcast_to(jnp.arange(LENGTH), STRINGS.shape)),
    jnp.asarray(STRINGS),
  )
  np.testing.assert_allclose(price.sum(-1), -np.log(toy.probability), atol=1e-4)


def test_inferred_clocks_pay_their_way(toy):
  """Delays that a posterior draws from the tokens: with KL(q || p) the total stays above the entropy; without it, it
  need not. Here q tells the tokens' values apart by delay alone, and the path's own price falls below the entropy's."""
  token, number = toy.sample(jax.random.key(0), 6000)
  prior = (jnp.zeros(token.shape), jnp.full(token.shape, jnp.log(1.0)))
  posterior = (1.5 * (token - 1.0), jnp.full(token.shape, jnp.log(0.5)))
  delay = posterior[0] + jnp.exp(posterior[1]) * jax.random.normal(jax.random.key(1), token.shape)

  def telling(latent, context=None):  # a field that reads the token off the delay, as a network could off the times
    clue = -0.5 * ((delay[..., None] - 1.5 * (jnp.arange(SYMBOLS) - 1.0)) / 0.5) ** 2
    return jnp.where((latent.time < 1.0)[..., None], toy.field(latent) + clue, toy.field(latent))

  kl = np.asarray(bound_lib.gaussian_kl(posterior, prior).sum(-1), np.float64)
  assert (kl > 0).all()
  price = np.asarray(
    priced(toy, policies.LearnedClock(np.int32(8), delay, jnp.ones(token.shape)), token, field=telling)[0].sum(-1),
    np.float64,
  )
  surprise = -np.log(toy.probability)[np.asarray(number)]
  assert (price - surprise).mean() < -0.1 and (price + kl - surprise).mean() > 0.1
  fair = (
    np.asarray(
      priced(
        toy,
        policies.LearnedClock(np.int32(64), jax.random.normal(jax.random.key(2), token.shape), jnp.ones(token.shape)),
        token,
      )[0].sum(-1),
      np.float64,
    )
    - surprise
  )  # q = p: an average over paths
  assert -4 * fair.std() / 6000**0.5 < fair.mean() < 0.1


def test_kl_of_normals_is_the_integral():
  q, p = (jnp.float32(0.7), jnp.float32(-0.4)), (jnp.float32(-0.2), jnp.float32(0.3))
  x = np.linspace(-12, 12, 200_001)
  density = lambda d: stats.norm(float(d[0]), float(np.exp(d[1])))
  want = np.trapezoid(density(q).pdf(x) * (density(q).logpdf(x) - density(p).logpdf(x)), x)
  np.testing.assert_allclose(bound_lib.gaussian_kl(q, p), want, rtol=1e-4)


def test_learned_clocks_fall_and_have_a_slope():
  delay, s = jnp.linspace(-3, 3, 13), jnp.linspace(0, 1, 21)[:, None]
  clock = lambda delay, s, sharpness=1.0: schedules.learned_clock(delay, sharpness, s)
  times = np.asarray(clock(delay, s))
  assert (times[0] == 1).all() and (times[-1] == 0).all() and (np.diff(times, axis=0) <= 0).all()
  np.testing.assert_allclose(times[1:-1, 6], 1 - s[1:-1, 0], atol=1e-6)  # no delay is the shared clock
  sharp = np.asarray(clock(delay, s, 50.0))
  assert np.isin(sharp[:, 6], [0, 1]).sum() == 20 and sharp[9, 6] == 1 and sharp[11, 6] == 0  # a jump at the middle
  slope = jax.vmap(jax.vmap(jax.grad(clock), (0, None)), (None, 0))(delay, s[:, 0])
  assert np.isfinite(slope).all() and (np.asarray(slope) >= 0).all() and (slope[10, 5:8] > 0.1).all()


@pytest.mark.parametrize("streams, passes", [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_streams_are_staircases_side_by_side(toy, streams, passes):
  times = np.asarray(schedules.time_grid(f"streams:{streams}", LENGTH, 0.5))
  assert times.shape == (passes + 1, LENGTH) and (times[0] == 1).all() and (times[-1] == 0).all()
  assert (np.diff(times.reshape(passes + 1, LENGTH), axis=0) <= 0).all()
  if streams == 2:
    assert times[1].tolist() == [0, 1, 0, 1]
  price, taken = priced(toy, policies.make_policy(f"streams:{streams}", LENGTH, 0.5), jnp.asarray(STRINGS))
  q = np.exp(-np.asarray(price.sum(-1), np.float64))
  assert abs(q.sum() - 1) < 1e-4 and (taken == passes).all()
  assert (abs((toy.probability * price.sum(-1)).sum() - toy.entropy) < 1e-4) == (streams == 1)


def test_the_rate_is_the_price_of_a_short_step(toy):
  """For a short step the limit price, which has no noise, is the mean of the exact one over 100,000 increments."""
  token = jnp.broadcast_to(jnp.asarray(STRINGS[7]), (100_000, LENGTH))
  y = jax.random.normal(jax.random.key(0), (LENGTH, 4))
  context = toy.field(latents_lib.Latent(y, jnp.full(LENGTH, 0.5), token[0]))
  latent = latents_lib.Latent(jnp.broadcast_to(y, (*token.shape, 4)), jnp.full(token.shape, 0.5), token)
  taken = bound_lib.Step.of(
    toy.codes,
    toy.warp,
    latent,
    token,
    jnp.full(token.shape, 0.497),
    jax.random.normal(jax.random.key(1), latent.y.shape),
  )
  log_belief = lambda y: latents_lib.log_belief(context, toy.codes, y)
  step = np.asarray(taken.nll([latents_lib.pick(log_belief(y), token) for y in (latent.y, *taken.ends)]))
  rate = np.asarray(
    taken.nll(
      [latents_lib.pick(log_belief(latent.y), token)], latents_lib.expected_code(log_belief(latent.y), toy.codes)
    )
  )
  assert np.ptp(rate, axis=0).max() < 1e-6 and (rate > 0).all()
  np.testing.assert_allclose(step.mean(0), rate[0], rtol=0.05, atol=4 * step.std(0).max() / 100_000**0.5)
