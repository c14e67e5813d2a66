"""The training objective's levers: what is drawn, what is taught, and what is left alone."""

import dataclasses
import functools

from conftest import small_config
import flax.linen as nn
import jax
import jax.numpy as jnp
from model_test import V, build
import numpy as np
import pytest
from train_test import one_step

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.flow import bound as bound_lib
from evo_jax.flow import objective, policies, schedules
from evo_jax.flow import windows as windows_lib
from evo_jax.flow.interface import WindowInputs
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops
from evo_jax.parallel import sharding
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

NAMES = config_lib.TRAIN_PATHS


def drawn(bound_windows=1, batch=2000, density=None, **changes):
  config = small_config(**{"loss__bound_windows": bound_windows, **changes})
  return windows_lib.draw_windows(jax.random.key(0), batch, 32, 4, config.window, config.paths, bound_windows, density)


def loss(net, statistics, batch, draw, config, learned=False):
  return objective.training_loss(net, statistics, batch, draw, objective.Counts.of(batch, draw), config, learned)


def only(name):
  return {f"paths__{path}": float(path == name) for path in NAMES if path != "learned"}


def test_windows_taught_by_the_bound_take_gaussian_paths():
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
  np.testing.assert_allclose(time.mean(0), 4.5 / 8, atol=0.03)  # no place is preferred
  clipped = np.asarray(drawn(0, **only("erasure"), paths__erasure_range=(0.25, 0.75)).time).sum(-1)
  assert set(np.unique(clipped)) == {3, 4, 5, 6}


def test_ragged_windows_are_known_up_to_somewhere():
  time = np.asarray(drawn(0, **only("ragged")).time).reshape(-1, 8)
  first = time.argmax(1)
  assert np.isin(time, [0, 1]).all() and (time.max(1) == 1).all()
  np.testing.assert_allclose(np.bincount(first, minlength=8) / len(time), 1 / 8, atol=0.01)
  beyond = np.concatenate([row[f + 1 :] for row, f in zip(time, first)])
  assert 0.55 < beyond.mean() < 0.75  # a third of the tokens beyond is known


def test_streams_are_known_up_to_one_place_each():
  draw = drawn(0, **only("streams"), paths__stream_counts=(2,))
  time, front = np.asarray(draw.time).reshape(-1, 2, 4), np.asarray(draw.front).reshape(-1, 2, 4)
  assert (time[:, 0] == time[:, 1]).all() and (np.diff(time, axis=-1) >= 0).all() and np.isin(time, [0, 1]).all()
  np.testing.assert_allclose(np.bincount(time[:, 0].sum(-1).astype(int), minlength=5)[1:] / len(time), 0.25, atol=0.01)
  assert (front.sum(-1) == 1).all() and (front.argmax(-1) == 4 - time.sum(-1)).all()


def test_the_loss_of_erasure_is_the_mean_over_unknown_tokens():
  """With the number of unknown tokens uniform that is masked diffusion's continuous-time bound."""
  net, statistics, _ = build()
  config = small_config(loss__bound_windows=0, **only("erasure"))
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 1, V)
  draw = windows_lib.draw_windows(jax.random.key(0), 4, 32, config.model.code_dim, config.window, config.paths, 0)
  (_, window), _, _ = loss(net, statistics, Batch(tokens), draw, dataclasses.replace(config.loss, window_weight=1.0))
  slots = windows_lib.gather_windows(tokens, draw.anchor, 8)
  latent = windows_lib.observe_at(net.codes(), statistics.warp, slots[..., 1:], draw.time, draw.noise)
  logits = bound_lib.window_logits(
    net, net.clean(tokens[:, :-1])[1], draw.anchor, slots[..., 0], latent, net.codes(), statistics.log_unigram_V
  )
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


LEARNED = dict(model__progression="learned", paths__learned=1.0, loss__bound_windows=1)


def test_clocks_start_as_soft_streams_and_are_learned():
  """Before training q = p and the clock is that of streams; the bound teaches both heads, and nothing of it touches
  AR's gradient."""
  config = small_config(**LEARNED)
  model, state = evo_lib.Evo(config.model, V), None
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 1, V)
  draw = windows_lib.draw_windows(jax.random.key(0), 4, 32, config.model.code_dim, config.window, config.paths, 1)

  def losses(params, which):
    net = model.bind({"params": params})
    terms, _, metrics = loss(net, state.statistics, Batch(tokens), draw, config.loss, True)
    return terms[which], metrics

  (_, metrics), gradient = jax.jit(jax.value_and_grad(lambda p: losses(p, 1), has_aux=True))(state.params)
  assert abs(float(metrics["progression_kl"].value)) < 1e-6
  for name in ("clock_prior_out", "clock_posterior_out"):
    assert np.isfinite(gradient[name]).all() and np.abs(gradient[name]).max() > 1e-5, name
  delay, _, sharpness = model.bind({"params": state.params}).clock_prior(jnp.zeros((1, 1, 32)), 8, jnp.full((1, 1), 4))
  times = schedules.learned_clock(delay[0, 0], sharpness[0, 0], (jnp.arange(5) / 4)[:, None])
  np.testing.assert_allclose(times, schedules.time_grid("streams:2", 8, 0.5), atol=0.21)
  ar = jax.jit(jax.grad(lambda p: losses(p, 0)[0]))(state.params)
  assert all((np.asarray(leaf) == 0).all() for name, leaf in ar.items() if name.startswith("clock"))


def test_inferred_clocks_differ_and_pay_kl():
  net, statistics, config = build(**LEARNED)
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 1, V)
  hidden, _ = net.clean(tokens[:, :-1])
  anchor = jnp.array([[0, 8], [16, 24]])
  token = windows_lib.gather_windows(tokens, anchor, 8)[..., 1:]
  infer = lambda passes, token: bound_lib.infer_clock(
    net, hidden, bound_lib.token_nll(net, hidden, tokens), token, anchor, jnp.full((2, 2), passes), jnp.zeros((2, 2, 8))
  )
  delay, sharpness, kl = infer(4, token)
  assert delay.shape == kl.shape == (2, 2, 8) and (np.asarray(kl) > 0).all() and np.ptp(delay, axis=-1).min() > 1e-3
  assert (np.asarray(sharpness) > 0).all()
  assert not np.allclose(delay, infer(8, token)[0])  # the clock knows its passes
  other, _, _ = infer(4, token.at[0, 1, 3].set(1 + token[0, 1, 3] % 5))  # the posterior reads the token itself ...
  assert np.argwhere(~np.isclose(other, delay, atol=1e-6)).tolist() == [[0, 1, 3]]
  prior = lambda hidden: net.clock_prior(hidden, 8, jnp.full((2, 2), 4))[0]
  at_anchor = jnp.take_along_axis(hidden, anchor[..., None], axis=1)
  later = net.clean(tokens.at[0, 12].set(1 + tokens[0, 12] % 5)[:, :-1])[0]  # ... the prior only the past
  np.testing.assert_allclose(
    prior(at_anchor)[0], prior(jnp.take_along_axis(later, anchor[..., None], axis=1))[0], atol=1e-6
  )


def test_self_conditioning_reads_twice():
  """At share 1 the windows' loss is that of a second reading under the first one's belief; in the bound likewise."""
  net, statistics, config = build()
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 1, V)
  draw = windows_lib.draw_windows(jax.random.key(0), 4, 32, config.model.code_dim, config.window, config.paths, 1)
  at = lambda share: dataclasses.replace(config.loss, self_conditioning=share)
  window = lambda share: float(loss(net, statistics, Batch(tokens), draw, at(share))[0][1])
  assert abs(window(1.0) - window(0.0)) > 1e-4
  np.testing.assert_allclose(window(1e-9), window(0.0), rtol=1e-6)
  cost = lambda path, on: np.asarray(
    bound_lib.sequence_nll(
      net, statistics, Batch(tokens), jax.random.key(2), policies.make_policy(path, 8, 0.5), 8, on
    )[0]
  )
  np.testing.assert_allclose(cost("diagonal:1", True), cost("diagonal:1", False), atol=1e-5)  # nothing was read before
  assert np.abs(cost("diagonal:2", True) - cost("diagonal:2", False)).max() > 1e-4


def test_a_window_of_the_whole_sequence_needs_no_clean_stream():
  net, statistics, config = build(window__size=32, window__count=1)
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 1, V)
  anchor = jnp.zeros((2, 1), jnp.int32)
  x, time = net.embed_tokens(tokens)[:, None], jnp.full((2, 1, 33), 0.5)
  windows = WindowInputs(anchor, x, time)
  with_cache, _ = net.window(net.clean(tokens[:, :-1])[1], windows)
  without, _ = net.window(None, windows)
  np.testing.assert_allclose(with_cache, without, atol=1e-5)


DIFFUSION = dict(loss__ar_weight=0.0, window__size=32, window__count=1)


@pytest.mark.parametrize(
  "changes",
  [
    dict(DIFFUSION, loss__bound_windows=0, **only("erasure")),
    dict(DIFFUSION, loss__self_conditioning=0.5, **only("diagonal")),
    dict(LEARNED, loss__self_conditioning=0.5, train__accumulate=2, paths__step_sampling="importance"),
    dict(loss__antithetic=False, loss__integrand="rate", paths__steps=(1000,)),
  ],
)
def test_every_lever_is_a_configuration(changes):
  """Masked diffusion, Gaussian diffusion, learned clocks, plain or priced noise: a step of each is finite
  and teaches."""
  state, metrics = one_step(**changes)
  assert all(np.isfinite(value) for value in metrics.values()), metrics
  assert float(metrics["gradient_norm"]) > 0.01 and 3 < float(metrics["bits"]) < 12
  assert np.asarray(state.params["embedding"]).std() > 0


def test_windows_can_start_later():
  config = small_config(window__start=0.5)
  assert config.windows_start == 6
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  batch = jax.ShapeDtypeStruct((8, 33), jnp.int32)
  names = lambda windows: jax.eval_shape(
    lambda s, b: step_lib.train_step(s, Batch(b), model=model, config=config, windows=windows), state, batch
  )[1]
  assert "window_ce" in names(True) and "window_ce" not in names(False)
  assert flops.train_run(config, 264) == 6 * flops.train_step(config, 264) + 6 * flops.train_step(config, 264, False)


@pytest.mark.parametrize(
  "changes",
  [
    dict(window__count=0),
    dict(window__count=2),
    dict(DIFFUSION, loss__bound_windows=0, model__context=128, window__size=128, **only("erasure")),
  ],
)
def test_operations_by_formula_are_those_that_xla_counts(changes):
  """At a width where matrix products are nearly all there is."""
  config = small_config(
    **{
      **dict(
        model__width=256,
        model__heads=4,
        model__kv_heads=2,
        model__hidden=512,
        model__unroll=2,
        model__context=128,
        window__size=16,
      ),
      **changes,
    }
  )
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  batch = jax.ShapeDtypeStruct((8, 129), jnp.int32)
  step = jax.jit(lambda s, b: step_lib.train_step(s, Batch(b), model=model, config=config)).lower(state, batch)
  assert abs(flops.train_step(config, model.rows) / step.cost_analysis()["flops"] - 1) < 0.06


@pytest.mark.parametrize(
  "changes", [{}, {"loss__self_conditioning": 1.0}, {"loss__bound_windows": 2}, {"window__count": 0}], ids=str
)
def test_chunks_of_the_vocabulary_change_no_value_and_save_memory(changes):
  """Loss and gradient are those of all logits at once; the compiled step needs less memory."""
  found = {}
  for chunk in (0, 8):
    config = small_config(
      **{"model__vocab_size": 512, "model__remat": "full", "loss__chunk": chunk, "window__count": 4, **changes}
    )
    model = state_lib.make_model(config, tokenizers.Bytes())
    state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
    batch = Batch(jnp.asarray(np.random.default_rng(0).integers(1, 257, (8, 33)), jnp.int32))
    step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config)).lower(state, batch).compile()
    after, metrics = step(state, batch)
    found[chunk] = after.params, metrics, step.memory_analysis().temp_size_in_bytes
  for name, value in found[0][1].items():
    np.testing.assert_allclose(found[8][1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5), found[0][0], found[8][0])
  assert found[8][2] < 0.7 * found[0][2], (found[8][2], found[0][2])


def masked(seed=3):
  """A batch of 8 sequences in which fewer and fewer tokens count, in two of them none."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 257, (8, 33)).astype(np.int32)
  counted = rng.uniform(size=(8, 33)) < np.array([1.0, 0.9, 0.5, 0.3, 0.1, 0.05, 0.0, 0.0])[:, None]
  return Batch(jnp.asarray(tokens), jnp.asarray(counted))


@functools.cache
def masked_step(all_counted=None, mesh=None, **changes):
  """Parameters and metrics after a step on the masked batch; all_counted: on its tokens, with or without a mask."""
  config = small_config(optim__clip=0.0, optim__epsilon=1e-3, optim__warmup=0, model__kv_heads=2, **changes)
  mesh = sharding.make_mesh(config_lib.Mesh(*(mesh or (1, 1, 1))), jax.devices()[: np.prod(mesh or (1, 1, 1))])
  model = state_lib.make_model(config, tokenizers.Bytes(), mesh)
  batch = masked()
  if all_counted is not None:
    batch = batch._replace(counted=jnp.ones_like(batch.counted) if all_counted else None)
  with jax.set_mesh(mesh):
    state = state_lib.sharded_init(model, config, mesh)
    batch = sharding.global_batch(mesh, jax.tree.map(np.asarray, batch), 8)
    after, metrics = step_lib.make_step(model, config, mesh, "cpu")(state, batch)
  return jax.device_get((after.params, after.statistics, metrics))


def same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_a_mask_of_all_tokens_changes_nothing():
  same(masked_step(True), masked_step(False), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
  "changes",
  [{"train__accumulate": 4}, {"mesh": (4, 1, 1)}, {"mesh": (2, 4, 1)}, {"optim__separate_clip": True}],
  ids=str,
)
def test_parts_with_unequal_counts_add_up(changes):
  """Microbatches and shards hold from 0 to all tokens that count; sums and counts are added up and divided once. A mean
  of means would be off by far more."""
  params, statistics, metrics = masked_step()
  other = masked_step(**changes)
  same(params, other[0], rtol=2e-3, atol=2e-6)
  same(statistics, other[1], rtol=2e-3, atol=1e-5)
  for name in ("bits", "window_ce", "window_bound"):
    np.testing.assert_allclose(metrics[name], other[2][name], rtol=1e-4, err_msg=name)
  assert np.abs(params["embedding"] - masked_step(False)[0]["embedding"]).max() > 1e-5


def test_the_ar_loss_is_the_mean_over_tokens_that_count():
  net, statistics, config = build(257)
  batch = masked()
  (ar, _), measured, metrics = loss(net, statistics, batch, None, config.loss)
  log_p = jax.nn.log_softmax(net(batch.tokens[:, :-1]))
  nats = -np.take_along_axis(np.asarray(log_p), np.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
  counted = np.asarray(batch.counted)[:, 1:]
  np.testing.assert_allclose(ar, nats[counted].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["bits"].value, nats[counted].mean() / np.log(2), rtol=1e-5)
  assert measured.token_weight.sum() == counted.sum()


def test_windows_lie_where_something_counts():
  """Every window of a sequence in which something counts holds a token that counts, and all such places occur; with all
  tokens counted the draw is that without a mask."""
  config = small_config()
  draw = lambda counted: windows_lib.draw_windows(
    jax.random.key(1), len(counted), 32, 4, config.window, config.paths, 1, None, counted
  )
  counted = jnp.zeros((2000, 33), bool).at[:, [12, 13, 30]].set(True).at[-1].set(False)
  anchor = draw(counted).anchor
  inside = np.asarray(windows_lib.gather_windows(counted, anchor, 8))[..., 1:].any(-1)
  assert inside[:-1].all() and not inside[-1].any()
  assert set(np.unique(anchor[:-1])) == set(range(4, 13)) | set(range(22, 25))
  every = draw(jnp.ones((2000, 33), bool))
  plain = windows_lib.draw_windows(jax.random.key(1), 2000, 32, 4, config.window, config.paths, 1)
  jax.tree.map(np.testing.assert_array_equal, every, plain)
