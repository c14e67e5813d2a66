"""A training step: one gradient however it is put together, clipping, levers of the objective, FLOPs, compilations."""

import functools

import chex
from conftest import call, need_devices, small_config, train_flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.evaluation import paths as paths_lib
from evo_jax.network import flops
from evo_jax.parallel import sharding
from evo_jax.training import partition
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

# Without clipping to a limit and with a large epsilon a parameter moves in proportion to its gradient. Without warm-up
# it moves in the first step, whose learning rate would be 0 otherwise.
AT_ONCE = dict(optim__clip=0.0, optim__epsilon=1e-3, optim__warmup=0)
COUNTED = np.random.default_rng(3).uniform(size=(8, 33)) < np.array([1, 0.9, 0.5, 0.3, 0.1, 0.05, 0, 0])[:, None]


def random_batch(counted=None):
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 257, (8, 33)), jnp.int32)
  return Batch(tokens, None if counted is None else jnp.asarray(counted))


@functools.cache
def program(mesh=(1, 1, 1), **changes):
  """The compiled step of a configuration on the first devices, and a function that makes its initial state."""
  need_devices(np.prod(mesh))
  config = small_config(model__kv_heads=2, **changes)
  mesh = sharding.make_mesh(config_lib.Mesh(*mesh), jax.devices()[: np.prod(mesh)])
  model = state_lib.make_model(config, tokenizers.Bytes(), mesh)
  state = state_lib.sharded_init(model, config, mesh)
  return mesh, step_lib.make_step(model, config, mesh, "cpu"), lambda: jax.tree.map(jnp.copy, state)


@functools.cache
def first_step(counted, **changes):
  """The state and the metrics after a step. counted: "all" tokens, "some" (by sequence fewer and fewer, and none in two
  of them), or None: all, without a mask."""
  mesh, step, initial = program(**changes)
  batch = random_batch({"some": COUNTED, "all": np.ones_like(COUNTED), None: None}[counted])
  with jax.set_mesh(mesh):
    return jax.device_get(step(initial(), sharding.global_batch(mesh, jax.tree.map(np.asarray, batch), 8)))


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_a_mask_of_all_tokens_changes_nothing():
  (a, a_metrics), (b, b_metrics) = (first_step(counted, **AT_ONCE) for counted in ("all", None))
  assert_close((a.params, a.statistics, a_metrics), (b.params, b.statistics, b_metrics), rtol=1e-3, atol=2e-6)


PARTS = [
  {"train__accumulate": 4},
  {"mesh": (4, 1, 1)},
  {"mesh": (2, 4, 1)},
  {"optim__separate_clip": True},
  {"train__accumulate": 2, "optim__separate_clip": True},
]


@pytest.mark.parametrize("changes", [pytest.param(c, marks=pytest.mark.slow) if i else c for i, c in enumerate(PARTS)])
def test_parts_of_a_batch_and_of_the_loss_add_up(changes):
  """Without a limit to clip to, the step is the same in microbatches, in shards, and with a gradient for each term.

  With a mask, parts hold from 0 to all tokens that count: sums and counts are added up and divided once. A mean of
  means would be off by far more. The same program takes both batches.
  """
  for counted, rtol in (("all", 1e-3), ("some", 2e-3)):
    whole, metrics = first_step(counted, **AT_ONCE)
    state, other = first_step(counted, **AT_ONCE, **changes)
    assert_close(whole.params, state.params, rtol=2e-3, atol=2e-6)
    assert_close(whole.statistics, state.statistics, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(metrics["bits"], other["bits"], rtol=1e-5 if counted == "all" else 1e-4)
    for name in ("window_ce", "window_bound"):
      np.testing.assert_allclose(metrics[name], other[name], rtol=1e-4, err_msg=name)
  everything, _ = first_step("all", **AT_ONCE)
  assert np.abs(whole.params["embedding"] - everything.params["embedding"]).max() > 1e-5


@pytest.mark.slow
def test_separate_clipping_keeps_the_window_gradient_from_shrinking_the_ar_gradient():
  """Window weight 1,000: a shared limit leaves AR next to nothing, separate limits leave it all that it had.

  The optimizer's first moment is the clipped gradient times 1 - beta1. What the shared limit leaves is nearly the
  window's gradient at length 1; what separate limits add to that is AR's, which is below its limit.
  """
  gradient, norms = {}, {}
  for separate in (False, True):
    state, norms[separate] = first_step(
      None, optim__separate_clip=separate, loss__window_weight=1000.0, optim__clip=1.0
    )
    moment = jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))
    gradient[separate] = np.concatenate([leaf.ravel() for leaf in moment]) / 0.1
  assert float(norms[False]["gradient_norm"]) > 50
  assert float(norms[True]["gradient_norm_window"]) > 50 and 0.1 < float(norms[True]["gradient_norm_ar"]) < 1
  np.testing.assert_allclose(np.linalg.norm(gradient[False]), 1.0, rtol=1e-3)
  difference = np.linalg.norm(gradient[True] - gradient[False])
  np.testing.assert_allclose(difference, norms[True]["gradient_norm_ar"], rtol=0.1)


def test_ar_only_is_a_configuration():
  state, metrics = first_step(None, window__count=0)
  assert "window_ce" not in metrics and np.isfinite(metrics["bits"]) and int(state.statistics.steps) == 1


def only(name):
  return {f"paths__{path}": float(path == name) for path in config_lib.TRAIN_PATHS if path != "learned"}


DRAFTS = dict(
  loss__ar_weight=0.0, loss__bound_windows=0, loss__distill=1.0, model__window_attention="informed", **only("parallel")
)
LEARNED = dict(model__progression="learned", paths__learned=1.0, loss__bound_windows=1)
DIFFUSION = dict(loss__ar_weight=0.0, window__size=32, window__count=1)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    dict(DIFFUSION, loss__bound_windows=0, **only("erasure")),
    dict(DIFFUSION, loss__self_conditioning=0.5, **only("diagonal")),
    dict(LEARNED, loss__self_conditioning=0.5, train__accumulate=2, paths__step_sampling="importance"),
    dict(loss__antithetic=False, loss__integrand="rate", paths__steps=(1000,)),
  ],
  ids=["masked diffusion", "Gaussian diffusion", "learned clocks", "the rate's bound"],
)
def test_every_lever_is_a_configuration(changes):
  """A step of each is finite and changes every parameter that its loss reads."""
  state, metrics = first_step(None, **AT_ONCE, **changes)
  _, _, initial = program(**AT_ONCE, **changes)
  assert all(np.isfinite(value) for value in metrics.values()), metrics
  assert float(metrics["gradient_norm"]) > 0.01 and 3 < float(metrics["bits"]) < 12
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, jax.device_get(initial().params))
  assert moved["embedding"] > 1e-4 and min(jax.tree.leaves(moved["blocks"])) > 0, moved
  assert "clock_prior_out" not in moved or moved["clock_prior_out"] > 0 < moved["clock_posterior_out"], moved


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes", [{}, {"loss__self_conditioning": 1.0, "loss__bound_windows": 2}, {"window__count": 0}], ids=str
)
def test_chunks_of_the_vocabulary_change_no_value_and_save_memory(changes):
  """Loss and gradient are those of all logits at once; the compiled step needs less memory."""
  results = {}
  for chunk in (0, 8):
    config = small_config(
      **{
        **AT_ONCE,
        "model__vocab_size": 512,
        "model__remat": "full",
        "loss__chunk": chunk,
        "window__count": 4,
        **changes,
      }
    )
    model = state_lib.make_model(config, tokenizers.Bytes())
    state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
    batch = random_batch()
    step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config)).lower(state, batch).compile()
    after, metrics = step(state, batch)
    results[chunk] = after.params, metrics, step.memory_analysis().temp_size_in_bytes
  for name, value in results[0][1].items():
    np.testing.assert_allclose(results[8][1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
  assert_close(results[0][0], results[8][0], rtol=1e-2, atol=1e-5)
  assert float(optax.tree.norm(jax.tree.map(jnp.subtract, results[0][0], state.params))) > 0.01
  assert results[8][2] < 0.7 * results[0][2], (results[8][2], results[0][2])


def abstract(config, length):
  """The model, and the shapes of its state and of a batch."""
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  return model, state, Batch(jax.ShapeDtypeStruct((8, length), jnp.int32))


def test_windows_can_start_later():
  config = small_config(window__start=6)
  assert config.windows_start == 6
  model, state, batch = abstract(config, 33)
  step = functools.partial(step_lib.train_step, model=model, config=config)
  names = lambda windows: jax.eval_shape(lambda s, b: step(s, b, windows=windows), state, batch)[1]
  assert "window_ce" in names(True) and "window_ce" not in names(False)
  assert flops.train_run(config, 264) == 6 * flops.train_step(config, 264) + 6 * flops.train_step(config, 264, False)


@pytest.mark.parametrize(
  "changes",
  [
    dict(window__count=0),
    dict(window__count=2, model__head_dim=96),
    dict(DIFFUSION, loss__bound_windows=0, model__context=128, window__size=128, **only("erasure")),
    dict(window__count=4, train__trainable="windows"),
    dict(window__count=2, train__trainable="blocks/w_*"),
    dict(DRAFTS, train__trainable="windows", model__window_rank=64, model__window_head=512, window__count=8),
  ],
  ids=["AR", "Evo", "masked diffusion", "windows alone", "blocks alone", "drafts"],
)
def test_flops_by_formula_are_those_that_xla_counts(changes):
  """At a width where matrix products are nearly all there is."""
  shape = dict(model__width=256, model__heads=4, model__kv_heads=2, model__hidden=512, model__unroll=2)
  config = small_config(**{**shape, "model__context": 128, "window__size": 16, **changes})
  model, state, batch = abstract(config, 129)
  step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config)).lower(state, batch)
  counted = (step.compile() if state.frozen else step).cost_analysis()["flops"]  # without gradients that none asks for
  work = partition.describe_work(state.params, state.frozen)
  assert abs(flops.train_step(config, model.rows, **work) / counted - 1) < 0.06


def test_nothing_is_compiled_twice(text, tmp_path, monkeypatch):
  """A run traces its step once with and once without windows, and the evaluator once for grids of any length."""
  chex.clear_trace_counter()
  monkeypatch.setattr(step_lib, "train_step", chex.assert_max_traces(step_lib.train_step, n=2))
  monkeypatch.setattr(paths_lib, "sequence_nll", chex.assert_max_traces(paths_lib.sequence_nll, n=1))
  changes = {"window.start": 3, "train.steps": 6, "train.eval_every": 2, "eval.samples": 0}
  paths = {"eval.train_paths": ("diagonal:2",), "eval.paths": ("rolling:8", "diagonal:4", "staircase")}
  done = call("evo_jax.main", *train_flags(tmp_path, text, **changes, **paths))
  assert done.returncode == 0 and "staircase" in done.stdout, done.stderr
