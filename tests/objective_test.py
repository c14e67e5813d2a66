"""The training objective: what is drawn, which terms train which parameters, and means over tokens that count."""

import dataclasses
import functools

from conftest import small_config
import flax.linen as nn
import jax
import jax.numpy as jnp
from model_test import V, build
import numpy as np
import pytest
from step_test import COUNTED, LEARNED, only, random_batch

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.flow import bound as bound_lib
from evo_jax.flow import objective, policies, schedules
from evo_jax.flow import windows as windows_lib
from evo_jax.flow.interface import WindowInputs
from evo_jax.network import evo as evo_lib
from evo_jax.training import state as state_lib

NAMES = config_lib.TRAIN_PATHS
draw_windows = jax.jit(windows_lib.draw_windows, static_argnums=range(1, 7))


def drawn(bound_windows=1, batch=2000, density=None, **changes):
  config = small_config(**{"loss__bound_windows": bound_windows, **changes})
  return draw_windows(jax.random.key(0), batch, 32, 4, config.window, config.paths, bound_windows, density)


@functools.partial(jax.jit, static_argnames=("model", "config", "learned"))
def _loss(params, statistics, batch, draw, model, config, learned):
  counts = objective.Counts.of(batch, draw)
  return objective.training_loss(model.bind(params), statistics, batch, draw, counts, config, learned)


def loss(net, statistics, batch, draw, config, learned=False):
  return _loss(net.variables, statistics, batch, draw, net.clone(), config, learned)


def test_windows_trained_by_the_bound_take_gaussian_paths():
  draw = drawn(paths__erasure=0.3, paths__ragged=0.3)
  path = np.asarray(draw.path)
  gaussian = [NAMES.index(n) for n in config_lib.GAUSSIAN_PATHS]
  assert np.isin(path[:, 0], gaussian).all() and not np.isin(path[:, 1], gaussian).all()
  share = np.bincount(path[:, 1], minlength=len(NAMES)) / len(path)
  want = np.array(
    [
      {"diagonal": 0.5, "rolling": 0.2, "independent": 0.2, "staircase": 0.1, "erasure": 0.3, "ragged": 0.3}.get(n, 0)
      for n in NAMES
    ]
  )
  np.testing.assert_allclose(share, want / want.sum(), atol=0.02)


def test_erasure_leaves_any_number_of_tokens_unknown_anywhere():
  time = np.asarray(drawn(0, **only("erasure")).time).reshape(-1, 8)
  assert np.isin(time, [0, 1]).all()
  counts = np.bincount(time.sum(1).astype(int), minlength=9) / len(time)
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:], 1 / 8, atol=0.01)
  np.testing.assert_allclose(time.mean(0), 4.5 / 8, atol=0.03)  # no position is preferred
  clipped = np.asarray(drawn(0, **only("erasure"), paths__erasure_range=(0.25, 0.75)).time).sum(-1)
  assert set(np.unique(clipped)) == {3, 4, 5, 6}


def test_ragged_windows_are_known_up_to_somewhere():
  time = np.asarray(drawn(0, **only("ragged")).time).reshape(-1, 8)
  first = time.argmax(1)
  assert np.isin(time, [0, 1]).all() and (time.max(1) == 1).all()
  np.testing.assert_allclose(np.bincount(first, minlength=8) / len(time), 1 / 8, atol=0.01)
  beyond = np.concatenate([row[f + 1 :] for row, f in zip(time, first)])
  assert 0.55 < beyond.mean() < 0.75  # a third of the tokens beyond is known


def test_streams_are_known_up_to_one_position_each():
  draw = drawn(0, **only("streams"), paths__stream_counts=(2,))
  time, front = np.asarray(draw.time).reshape(-1, 2, 4), np.asarray(draw.front).reshape(-1, 2, 4)
  assert (time[:, 0] == time[:, 1]).all() and (np.diff(time, axis=-1) >= 0).all() and np.isin(time, [0, 1]).all()
  np.testing.assert_allclose(np.bincount(time[:, 0].sum(-1).astype(int), minlength=5)[1:] / len(time), 0.25, atol=0.01)
  assert (front.sum(-1) == 1).all() and (front.argmax(-1) == 4 - time.sum(-1)).all()


@pytest.mark.slow
def test_the_loss_of_erasure_is_the_mean_over_unknown_tokens():
  """With the number of unknown tokens uniform that is masked diffusion's continuous-time bound."""
  net, statistics, _ = build()
  config = small_config(loss__bound_windows=0, **only("erasure"))
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 1, V)
  draw = draw_windows(jax.random.key(0), 4, 32, config.model.code_dim, config.window, config.paths, 0)
  (_, window), _, _ = loss(net, statistics, Batch(tokens), draw, dataclasses.replace(config.loss, window_weight=1.0))
  slots = windows_lib.gather_windows(tokens, draw.anchor, 8)

  @jax.jit
  def window_logits(params):
    bound = net.clone().bind(params)
    latent = windows_lib.observe_at(bound.codes(), statistics.warp, slots[..., 1:], draw.time, draw.noise)
    cache = bound.clean(tokens[:, :-1])[1]
    return bound_lib.window_logits(
      bound, cache, draw.anchor, slots[..., 0], latent, bound.codes(), statistics.log_unigram_V
    )

  logits = window_logits(net.variables)
  nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(slots)[..., 1:, None], -1)[..., 0]
  unknown = np.asarray(draw.time) > 0
  want = np.mean((nats * unknown).sum(-1) / unknown.sum(-1))
  np.testing.assert_allclose(window, want, rtol=1e-4)


def test_importance_sampled_steps_are_weighted_back():
  """Steps come as often as they are asked for, and the weights leave every mean over the clock as it was."""
  density = jnp.array([0.4, 0.3, 0.2, 0.1])
  draw = drawn(1, density=density, paths__steps=(64,), **only("diagonal"))
  clock, weight = np.asarray(draw.clock[:, 0]), np.asarray(draw.weight)
  np.testing.assert_allclose(np.histogram(clock, 4, (0, 1))[0] / len(clock), density, atol=0.01)
  plain = np.mean((np.arange(64) / 64)[:, None] ** [0, 1, 2], 0)
  for power, want in enumerate(plain):
    np.testing.assert_allclose(np.mean(weight[:, 0] * clock**power), want, atol=0.01)
  assert (weight[:, 1] == 1).all()
  statistics = build()[1].replace(squares_G=jnp.array([4.0] + [1.0] * 15))
  found = np.asarray(statistics.step_density())
  assert abs(found.sum() - 1) < 1e-6 and 1.7 < found[0] / found[1] < 2.0  # as the root of the squares, a tenth even


@pytest.mark.slow
def test_clocks_start_as_soft_streams_and_are_learned():
  """Before training q = p and the clock is that of streams; the bound trains both heads, and the AR term neither."""
  config = small_config(**LEARNED)
  model = evo_lib.Evo(config.model, V)
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 1, V)
  draw = draw_windows(jax.random.key(0), 4, 32, config.model.code_dim, config.window, config.paths, 1)

  @jax.jit
  def gradients():
    state = nn.unbox(state_lib.init_state(model, config))

    def losses(params):
      terms, _, metrics = loss(model.bind({"params": params}), state.statistics, Batch(tokens), draw, config.loss, True)
      return terms, metrics

    _, vjp, metrics = jax.vjp(losses, state.params, has_aux=True)
    one, zero = jnp.ones(()), jnp.zeros(())
    clock = model.bind({"params": state.params}).clock_prior(jnp.zeros((1, 1, 32)), 8, jnp.full((1, 1), 4))
    return *vjp((one, zero)), *vjp((zero, one)), metrics, clock

  ar, window, metrics, (delay, _, sharpness) = gradients()
  assert abs(float(metrics["progression_kl"].value)) < 1e-6
  for name in ("clock_prior_out", "clock_posterior_out"):
    assert np.isfinite(window[name]).all() and np.abs(window[name]).max() > 1e-5, name
  times = schedules.learned_clock(delay[0, 0], sharpness[0, 0], (jnp.arange(5) / 4)[:, None])
  np.testing.assert_allclose(times, schedules.time_grid("streams:2", 8, 0.5), atol=0.21)
  assert {name for name in ar if name.startswith("clock")} == {name for name in window if name.startswith("clock")}
  assert all((np.asarray(leaf) == 0).all() for name, leaf in ar.items() if name.startswith("clock"))


def test_inferred_clocks_differ_and_pay_kl():
  net, statistics, config = build(**LEARNED)
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 1, V)
  anchor = jnp.array([[0, 8], [16, 24]])
  token = windows_lib.gather_windows(tokens, anchor, 8)[..., 1:]

  @jax.jit
  def infer(passes, token):
    bound = net.clone().bind(net.variables)
    hidden, _ = bound.clean(tokens[:, :-1])
    nats = bound_lib.token_nll(bound, hidden, tokens)
    return bound_lib.infer_clock(bound, hidden, nats, token, anchor, jnp.full((2, 2), passes), jnp.zeros((2, 2, 8)))

  @jax.jit
  def prior(tokens):
    bound = net.clone().bind(net.variables)
    hidden = jnp.take_along_axis(bound.clean(tokens[:, :-1])[0], anchor[..., None], axis=1)
    return bound.clock_prior(hidden, 8, jnp.full((2, 2), 4))[0]

  delay, sharpness, kl = infer(4, token)
  assert delay.shape == kl.shape == (2, 2, 8) and (np.asarray(kl) > 0).all() and np.ptp(delay, axis=-1).min() > 1e-3
  assert (np.asarray(sharpness) > 0).all()
  assert not np.allclose(delay, infer(8, token)[0])  # the clock knows its passes
  other, _, _ = infer(4, token.at[0, 1, 3].set(1 + token[0, 1, 3] % 5))  # the posterior reads the token itself ...
  assert np.argwhere(~np.isclose(other, delay, atol=1e-6)).tolist() == [[0, 1, 3]]
  later = tokens.at[0, 12].set(1 + tokens[0, 12] % 5)  # ... the prior only the past
  np.testing.assert_allclose(prior(tokens)[0], prior(later)[0], atol=1e-6)
  earlier = tokens.at[0, 7].set(1 + tokens[0, 7] % 5)
  assert not np.allclose(prior(tokens)[0, 1], prior(earlier)[0, 1], atol=1e-6)


@pytest.mark.slow
def test_self_conditioning_reads_twice():
  """At share 1 the windows' loss is that of a second pass given the first one's belief; in the bound likewise."""
  net, statistics, config = build()
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 1, V)
  draw = draw_windows(jax.random.key(0), 4, 32, config.model.code_dim, config.window, config.paths, 1)
  at = lambda share: dataclasses.replace(config.loss, self_conditioning=share)
  window = {share: float(loss(net, statistics, Batch(tokens), draw, at(share))[0][1]) for share in (0.0, 1e-9, 1.0)}
  assert abs(window[1.0] - window[0.0]) > 1e-4
  np.testing.assert_allclose(window[1e-9], window[0.0], rtol=1e-6)

  @functools.partial(jax.jit, static_argnums=1)
  def nll(policy, conditioned):
    bound = net.clone().bind(net.variables)
    return bound_lib.sequence_nll(bound, statistics, Batch(tokens), jax.random.key(2), policy, 8, conditioned)[0]

  difference = lambda path: np.abs(
    np.subtract(*(nll(policies.make_policy(path, 8, 0.5, 2), on) for on in (True, False)))
  )
  assert difference("diagonal:1").max() < 1e-5  # there is no belief before the first pass
  assert difference("diagonal:2").max() > 1e-4


def test_a_window_of_the_whole_sequence_needs_no_clean_stream():
  net, statistics, config = build(window__size=32, window__count=1)
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 1, V)
  anchor = jnp.zeros((2, 1), jnp.int32)

  @jax.jit
  def hidden_with_and_without_cache(params):
    bound = net.clone().bind(params)
    windows = WindowInputs(anchor, bound.embed_tokens(tokens)[:, None], jnp.full((2, 1, 33), 0.5))
    return [bound.window(cache, windows)[0] for cache in (bound.clean(tokens[:, :-1])[1], None)]

  np.testing.assert_allclose(*hidden_with_and_without_cache(net.variables), atol=1e-5)


def test_the_ar_loss_is_the_mean_over_tokens_that_count():
  net, statistics, config = build(257)
  batch = random_batch(COUNTED)
  (ar, _), measured, metrics = loss(net, statistics, batch, None, config.loss)
  log_p = jax.jit(lambda params, tokens: jax.nn.log_softmax(net.clone().apply(params, tokens)))(
    net.variables, batch.tokens[:, :-1]
  )
  nats = -np.take_along_axis(np.asarray(log_p), np.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
  counted = np.asarray(batch.counted)[:, 1:]
  np.testing.assert_allclose(ar, nats[counted].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["bits"].value, nats[counted].mean() / np.log(2), rtol=1e-5)
  assert measured.token_weight.sum() == counted.sum()


def test_windows_lie_where_something_counts():
  """Every window of a sequence in which something counts holds a counted token, and all such anchors occur; with all
  tokens counted the draw is that without a mask."""
  config = small_config()
  draw = lambda counted: draw_windows(
    jax.random.key(1), len(counted), 32, 4, config.window, config.paths, 1, None, counted
  )
  counted = jnp.zeros((2000, 33), bool).at[:, [12, 13, 30]].set(True).at[-1].set(False)
  anchor = draw(counted).anchor
  inside = np.asarray(windows_lib.gather_windows(counted, anchor, 8))[..., 1:].any(-1)
  assert inside[:-1].all() and not inside[-1].any()
  assert set(np.unique(anchor[:-1])) == set(range(4, 13)) | set(range(22, 25))
  every = draw(jnp.ones((2000, 33), bool))
  plain = draw_windows(jax.random.key(1), 2000, 32, 4, config.window, config.paths, 1)
  jax.tree.map(np.testing.assert_array_equal, every, plain)


def test_windows_begin_in_answers_and_every_token_counts_alike():
  """Each window begins with a token of an answer and counts none behind the answer's end; in expectation the windows of
  a sequence count each of its answers' tokens once, wherever it stands and however short the answer is."""
  config = small_config(window__count=3)
  answers = np.zeros((4000, 33), bool)
  answers[:, [0, 3, 7, 8, *range(12, 25), 31, 32]] = True  # the first token is context only
  answers[-1] = False
  draw = draw_windows(jax.random.key(1), 4000, 32, 4, config.window, config.paths, 1, answers_BxT=jnp.asarray(answers))
  anchor, weight = np.asarray(draw.anchor), np.asarray(draw.token_weight)
  assert set(np.unique(anchor[:-1])) == {2, 6, 7, *range(11, 24), 30, 31} and not weight[-1].any()
  place = anchor[..., None] + 1 + np.arange(8)
  inside = np.cumprod(np.take_along_axis(np.pad(answers, ((0, 0), (0, 8)))[:, None], place, 2), -1)
  np.testing.assert_array_equal(weight[:-1] > 0, inside[:-1] > 0)
  counts = np.zeros((4000, 41))
  np.add.at(counts, (np.arange(4000)[:, None, None], place), weight)
  answers[:, 0] = False
  np.testing.assert_allclose(counts[:-1, :33].mean(0), answers[0], atol=0.1)


def test_the_loss_of_answers_is_the_mean_over_their_tokens():
  """By hand, over all windows that can be drawn; what stands behind an answer is not read by its windows."""
  answers = np.zeros((2, 33), bool)
  answers[0, [5, *range(20, 30), 31, 32]], answers[1, 3:16] = True, True  # 13 tokens each
  count = 13  # as many windows, each in a stratum of its own: all that there are
  config = small_config(loss__bound_windows=0, window__count=count, loss__window_weight=1.0, **only("parallel"))
  net, statistics, _ = build()
  tokens = np.random.default_rng(1).integers(1, V, (2, 33))
  mask = jnp.asarray(answers)
  draw = draw_windows(jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, 0, answers_BxT=mask)
  assert [sorted(row) for row in np.asarray(draw.anchor).tolist()] == [
    (np.flatnonzero(row) - 1).tolist() for row in answers
  ]

  @jax.jit
  def by_hand(params, tokens):
    bound = net.clone().bind(params)
    hidden, cache = bound.clean(tokens[:, :-1])
    slots = windows_lib.gather_windows(tokens, draw.anchor, 8)
    unknown = jnp.ones(draw.time.shape)
    latent = windows_lib.observe_at(bound.codes(), statistics.warp, slots[..., 1:], unknown, draw.noise)
    logits = bound_lib.window_logits(
      bound, cache, draw.anchor, slots[..., 0], latent, bound.codes(), statistics.log_unigram_V
    )
    pick = lambda logits, token: -jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
    return pick(logits, slots[..., 1:]), pick(bound.logits(hidden), tokens[:, 1:])

  batch = Batch(jnp.asarray(tokens, jnp.int32), None, None, mask)
  (ar, window), _, metrics = loss(net, statistics, batch, draw, config.loss)
  window_nats, nats = map(np.asarray, by_hand(net.variables, batch.tokens))
  means = []  # of each token of an answer, over the windows that it is in
  for row in range(2):
    for token in np.flatnonzero(answers[row]):
      starts = [a for a in draw.anchor[row].tolist() if a < token <= a + 8 and answers[row, a + 1 : token + 1].all()]
      means.append(np.mean([window_nats[row, draw.anchor[row].tolist().index(a), token - a - 1] for a in starts]))
  np.testing.assert_allclose(window, np.mean(means), rtol=1e-4)
  np.testing.assert_allclose(ar, nats[answers[:, 1:]].mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["window_ce"].value, np.mean(means) / np.log(2), rtol=1e-4)


def test_windows_do_not_read_what_stands_behind_an_answer():
  """On no path, and not in the bound either."""
  answers = np.zeros((2, 33), bool)
  answers[:, 8:12] = True
  config = small_config(
    paths__erasure=0.3, paths__ragged=0.3, paths__streams=0.3, window__count=6, loss__bound_windows=3
  )
  net, statistics, _ = build()
  tokens = np.random.default_rng(1).integers(1, V, (2, 33))
  draw = draw_windows(
    jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, 3, answers_BxT=jnp.asarray(answers)
  )
  other = tokens.copy()
  other[:, 12:] = 1 + other[:, 12:] % (V - 1)
  found = [
    loss(net, statistics, Batch(jnp.asarray(some, jnp.int32), None, None, jnp.asarray(answers)), draw, config.loss)[0]
    for some in (tokens, other)
  ]
  np.testing.assert_allclose(*found, rtol=1e-5)
