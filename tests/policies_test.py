"""Policies, random orders and learned clocks on the exact toy source: bounds agree with what the sampler draws."""

import functools
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


@functools.partial(jax.jit, static_argnames=("toy", "field"))
def path_nll(toy, policy, token, key, field=None):
  """NLL bounds (..., T) in nats and passes (...). Compiles once per field, shape and kind of policy."""
  return bound_lib.path_nll(field or toy.field, toy.codes, toy.warp, token, policy, key)


@functools.partial(jax.jit, static_argnames=("toy", "count"))
def sample_window(toy, policy, key, count):
  return steppers.sample_window(toy.field, toy.codes, toy.warp, policy, key, (count, LENGTH))


@functools.cache
def blunt(toy):
  """A field that makes too little of the context of its first tokens: a model with errors, for which orders differ."""
  share = jnp.array([0.1, 0.5, 1.0, 1.0])[:, None]
  return lambda latent, context=None: share * jax.nn.log_softmax(toy.field(latent), axis=-1)


def test_a_text_that_ends_inside_a_window_costs_what_writing_it_costs(toy):
  """All texts of one or two tokens that end in symbol 0, and all strings of which neither is 0 among the first two:
  what a sampler may write. The costs, over all draws of the rest, are those of probabilities that add up to 1; if a
  path saw where a text ends, they would add up to more."""
  ended = [(0, 0, 0, 0), *((i, 0, 0, 0) for i in (1, 2))]
  whole = [string for string in STRINGS.tolist() if 0 not in string[:2]]
  texts = jnp.array(ended + whole)
  inside = jnp.arange(LENGTH) < jnp.array([1, 2, 2] + [LENGTH] * len(whole))[:, None]

  field = blunt(toy)

  @jax.jit
  def total(policy, key):
    lead = (4000, *texts.shape)
    nats, _ = bound_lib.path_nll(
      field, toy.codes, toy.warp, jnp.broadcast_to(texts, lead), policy, key, inside=jnp.broadcast_to(inside, lead)
    )
    return jnp.exp(-nats.sum(-1)).sum(-1)

  for path in ("left:1", "left:4", "streams:2", "certain:2", "spread:0.75", "diagonal:2"):
    totals = np.asarray(total(policies.make_policy(path, LENGTH, 0.5), jax.random.key(0)))
    assert totals.mean() == pytest.approx(1.0, abs=4 * totals.std() / np.sqrt(len(totals)) + 1e-5), path


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
def test_a_policy_of_jumps_samples_with_the_probability_of_its_nll(toy, path):
  """The NLL of every string is that of the probability with which the same object draws it.

  The probabilities add up to one, and 8,000 draws agree (chi-square at 1e-3; power above 0.9 against frequencies that
  are off by 10 %).
  """
  policy = policies.make_policy(path, LENGTH, 0.5)
  nll, passes = path_nll(toy, policy, jnp.asarray(STRINGS), jax.random.key(1))
  q = np.exp(-np.asarray(nll.sum(-1), np.float64))
  assert abs(q.sum() - 1) < 1e-4
  sample, _ = sample_window(toy, policy, jax.random.key(2), 8000)
  counts = np.bincount(np.asarray(sample) @ NUMBER, minlength=81)
  assert stats.chisquare(counts, 8000 * q / q.sum()).pvalue > 1e-3
  mean = float((toy.probability * nll.sum(-1)).sum())
  if path in ("left:1", "confidence:1", "spread:0.3"):  # one token at a time: exact, in any order
    assert abs(mean - toy.entropy) < 1e-4 and (passes == LENGTH).all()
  else:  # tokens that jump together count as if they were independent
    assert mean > toy.entropy + 0.01 and float(passes.mean()) < LENGTH


def test_thresholds_trade_bits_for_passes(toy):
  """A looser threshold takes fewer passes and costs more bits; at the loosest all tokens jump at once."""
  means = []
  for limit in (0.0, 1.2, 1.35, 1.45, 64.0):
    policy = policies.make_policy(f"entropy:{limit}", LENGTH, 0.5)
    nll, passes = path_nll(toy, policy, jnp.asarray(STRINGS), jax.random.key(1))
    means.append(((toy.probability * nll.sum(-1)).sum(), (toy.probability * passes).sum()))
  nats, passes = np.array(means).T
  assert (np.diff(nats) > -1e-4).all() and (np.diff(passes) <= 0).all() and passes[0] == 4 and passes[-1] == 1
  assert abs(nats[0] - toy.entropy) < 1e-4 and nats[-1] > toy.entropy + 0.3


@pytest.mark.parametrize("limit", [0.2, 0.6])
def test_maturity_is_a_bound(toy, limit):
  """Partial evidence up to the inferred maturity, then jumps: never below the entropy."""
  policy = policies.make_policy(f"maturity:{limit}", LENGTH, 0.5)
  token, number = toy.sample(jax.random.key(0), 4000)
  nll, passes = path_nll(toy, policy, token, jax.random.key(1))
  excess = np.asarray(nll.sum(-1), np.float64) + np.log(toy.probability)[np.asarray(number)]
  assert excess.mean() > 4 * excess.std() / 4000**0.5 and excess.mean() < 1.0
  assert 1 < float(passes.mean()) <= LENGTH
  sample = jax.jit(
    lambda key: steppers.sample_window(toy.field, toy.codes, toy.warp, policy, key, (500, LENGTH), steppers.ancestral)
  )
  tokens, passes = sample(jax.random.key(3))
  assert tokens.shape == (500, LENGTH) and (tokens >= 0).all() and (tokens < SYMBOLS).all()
  assert 1 < float(passes.mean()) <= LENGTH


def test_a_policy_sees_no_unknown_token(toy):
  """As long as nothing is known, the truth does not change what moves: the same times for all strings."""
  seen = []

  def spy(observation):
    time = policies.make_policy("maturity:0.5", LENGTH, 0.5)(observation)
    jax.debug.callback(lambda index, time: seen.append((int(index), np.asarray(time))), observation.index, time)
    return time

  bound_lib.path_nll(toy.field, toy.codes, toy.warp, jnp.asarray(STRINGS), spy, jax.random.key(0))
  jax.effects_barrier()
  first = [time for index, time in seen if index == 0]
  assert first and all((time == time[0]).all() for time in first)


def test_masked_diffusion_has_the_mean_nll_of_all_orders(toy):
  """Method fact 8, with a field for which orders differ: one token per pass in random order is the mean over all 24."""
  field, strings = blunt(toy), jnp.asarray(STRINGS)
  grid = lambda order: jnp.asarray((np.array(order)[None] >= np.arange(LENGTH + 1)[:, None]).astype(np.float32))
  orders = [
    np.asarray(path_nll(toy, policies.TimeGrid(grid(order)), strings, jax.random.key(1), field)[0].sum(-1))
    for order in itertools.permutations(range(LENGTH))
  ]
  assert np.std([(toy.probability * o).sum() for o in orders]) > 0.003  # or there is nothing to average
  erasure_nll = jax.jit(
    lambda tokens, key, field: bound_lib.erasure_nll(
      field, toy.codes, tokens, policies.RandomOrder(np.int32(LENGTH)), key
    ),
    static_argnums=2,
  )
  nll, passes = erasure_nll(jnp.repeat(strings, 200, axis=0), jax.random.key(0), field)
  nll = np.asarray(nll.sum(-1)).reshape(81, 200)
  want = np.mean(orders, axis=0)
  error = nll.std(1) / 200**0.5
  assert (passes == LENGTH).all() and (np.abs(nll.mean(1) - want) < 5 * error).all()
  assert abs((toy.probability * (nll.mean(1) - want)).sum()) < 4 * np.sqrt(((toy.probability * error) ** 2).sum())
  exact, _ = erasure_nll(toy.sample(jax.random.key(0), 4000)[0], jax.random.key(1), toy.field)
  assert abs(float(exact.sum(-1).mean()) - toy.entropy) < 0.05


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_single_pass_stands_for_a_whole_order(toy, passes):
  """`erasure_nll` evaluates passes apart; following the same policy from end to end has the same mean."""
  field, token = blunt(toy), jnp.repeat(jnp.asarray(STRINGS), 150, axis=0)
  policy = policies.RandomOrder(np.int32(passes))
  apart = jax.jit(lambda policy, key: bound_lib.erasure_nll(field, toy.codes, token, policy, key)[0].sum(-1))
  rank = bound_lib.random_rank(jax.random.key(1), token.shape)
  whole, taken = path_nll(toy, policy.replace(rank=rank), token, jax.random.key(1), field)
  assert (taken == passes).all()
  gap = np.asarray(apart(policy, jax.random.key(0)) - whole.sum(-1)).reshape(81, 150)
  assert abs(gap.mean()) < 4 * gap.std() / gap.size**0.5 + 1e-5


def test_blocks_of_one_are_autoregression(toy):
  """Method fact 8: a block of one token, masked and revealed, costs the token's AR cross-entropy."""
  left_to_right = policies.RandomOrder(np.int32(LENGTH), jnp.broadcast_to(jnp.arange(LENGTH), STRINGS.shape))
  nll, _ = path_nll(toy, left_to_right, jnp.asarray(STRINGS), jax.random.key(1))
  np.testing.assert_allclose(nll.sum(-1), -np.log(toy.probability), atol=1e-4)


def test_inferred_clocks_pay_their_way(toy):
  """Delays that a posterior draws from the tokens: with KL(q || p) the total stays above the entropy; without it, it
  need not. Here q tells the tokens' values apart by delay alone, and the path's own NLL falls below the entropy."""
  token, number = toy.sample(jax.random.key(0), 6000)
  prior = (jnp.zeros(token.shape), jnp.full(token.shape, jnp.log(1.0)))
  posterior = (1.5 * (token - 1.0), jnp.full(token.shape, jnp.log(0.5)))
  delay = posterior[0] + jnp.exp(posterior[1]) * jax.random.normal(jax.random.key(1), token.shape)

  def telling(latent, context=None):  # a field that reads the token off the delay, as a network could off the times
    clue = -0.5 * ((delay[..., None] - 1.5 * (jnp.arange(SYMBOLS) - 1.0)) / 0.5) ** 2
    return jnp.where((latent.time < 1.0)[..., None], toy.field(latent) + clue, toy.field(latent))

  def excess(passes, delay, field=None):
    clock = policies.LearnedClock(np.int32(passes), delay, jnp.ones(token.shape))
    nll, _ = path_nll(toy, clock, token, jax.random.key(1), field)
    return np.asarray(nll.sum(-1), np.float64) + np.log(toy.probability)[np.asarray(number)]

  kl = np.asarray(bound_lib.gaussian_kl(posterior, prior).sum(-1), np.float64)
  assert (kl > 0).all()
  inferred = excess(8, delay, telling)
  assert inferred.mean() < -0.1 and (inferred + kl).mean() > 0.1
  fair = excess(64, jax.random.normal(jax.random.key(2), token.shape))  # q = p: an average over paths
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
  policy = policies.make_policy(f"streams:{streams}", LENGTH, 0.5)
  nll, taken = path_nll(toy, policy, jnp.asarray(STRINGS), jax.random.key(1))
  q = np.exp(-np.asarray(nll.sum(-1), np.float64))
  assert abs(q.sum() - 1) < 1e-4 and (taken == passes).all()
  assert (abs((toy.probability * nll.sum(-1)).sum() - toy.entropy) < 1e-4) == (streams == 1)


def test_scaffolds_are_partial_evidence_and_then_staircases(toy):
  """A scaffold in many passes costs nothing, as the shared flow wants it; in four passes it costs something, but makes
  two streams cheaper, which read it."""
  times = np.asarray(schedules.time_grid("scaffold:2:2:0.4", LENGTH, 0.5))
  np.testing.assert_allclose(times, [[1] * 4, [0.7] * 4, [0.4] * 4, [0, 0.4, 0, 0.4], [0] * 4], atol=1e-6)

  def nats(path):
    policy = policies.make_policy(path, LENGTH, 0.5)
    nll, passes = path_nll(toy, policy, jnp.repeat(jnp.asarray(STRINGS), 100, axis=0), jax.random.key(3))
    return float(toy.probability @ nll.sum(-1).reshape(len(STRINGS), -1).mean(1)), int(passes[0])

  (many, passes), (four, _), (streams, _) = nats("scaffold:50"), nats("scaffold:4:2"), nats("streams:2")
  assert passes == 54 and abs(many - toy.entropy) < 0.02
  assert toy.entropy + 0.04 < four < streams - 0.04


def test_the_rate_is_the_nll_of_a_short_step(toy):
  """For a short step the limit, which has no noise, is the mean of the exact NLL over 100,000 increments."""
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
