"""One pure training step: draw windows, gradients in shards and microbatches, clip, update."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.flow import objective
from evo_jax.flow.bound import Price
from evo_jax.flow.windows import Redraw, WindowDraw, draw_windows
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding
from evo_jax.training import optim, partition
from evo_jax.training import state as state_lib
from evo_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class OwnFunctions:
  """Pure functions of one's own that a step is made with; None: as the configuration says.

  redraw: changes the step's windows, as `windows.follow` does. price: of a bound's step, where it is not to be its NLL.
  """

  redraw: Redraw | None = None
  price: Price | None = None


AS_CONFIGURED = OwnFunctions()


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: evo_lib.Evo,
  config: config_lib.Config,
  windows: bool = True,
  own: OwnFunctions = AS_CONFIGURED,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step on a global batch: the new state and metrics (losses in bits per token).

  windows: False leaves them out (before `config.windows_start`).
  """
  draw = _draw(state, batch, config) if config.window.count and windows else None
  draw = own.redraw(draw) if draw is not None and own.redraw else draw
  counts = objective.Counts.of(batch, draw)
  gradients_of = functools.partial(_gradients, model=model, config=config, price=own.price)
  specs = sharding.specs(model.layout, evo_lib.abstract_params(model.config, model.vocab_size))
  number = 2 if config.optim.separate_clip else 1
  map_batch_shards = model.layout.map_batch_shards
  gradients, sums, measured = map_batch_shards(gradients_of, *partition.split(specs, config.train.trainable), number)(
    state.params, state.frozen, (state.statistics, counts), (batch, draw)
  )
  clipped, norms = zip(*(optim.clip(gradient, config.optim.clip) for gradient in gradients))
  gradient = jax.tree.map(lambda *parts: sum(parts), *clipped)
  optimizer = optim.make_optimizer(config.optim, config.train.steps)
  updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - config.optim.ema)
  statistics = state.statistics.update(measured, config.warp.decay)
  new = TrainState(state.step + 1, params, ema, optimizer_state, statistics, state.frozen)

  names = ("gradient_norm",) if number == 1 else ("gradient_norm_ar", "gradient_norm_window")
  metrics = {name: mean.value for name, mean in sums.items()} | dict(zip(names, norms))
  if "codes" in gradient:
    metrics["gradient_norm_codes"] = optax.tree.norm(gradient["codes"])
  metrics["learning_rate"] = optim.learning_rate_schedule(config.optim, config.train.steps)(state.step)
  return new, metrics | _state_metrics(new, model, draw is not None)


def _draw(state: TrainState, batch: Batch, config: config_lib.Config) -> WindowDraw:
  """The step's windows."""
  B, L = batch.tokens.shape[0], batch.tokens.shape[1] - 1
  density = state.statistics.step_density() if config.paths.step_sampling == "importance" else None
  return draw_windows(
    state_lib.key_for(config.train.seed, "windows", state.step),
    B,
    L,
    config.model.code_dim,
    config.window,
    config.paths,
    config.loss.bound_windows,
    density,
    batch.counted,
    batch.answers,
  )


def _state_metrics(state: TrainState, model: evo_lib.Evo, with_windows: bool) -> dict[str, jax.Array]:
  """Metrics of a state by itself."""
  statistics = state.statistics
  codes = model.apply({"params": state.whole}, method=evo_lib.Evo.codes)
  metrics = {
    "parameter_norm": optax.tree.norm(state.params),  # finite: these parameters may be saved
    "codes_spread": 1.0 - jnp.sum((statistics.unigram_V @ codes) ** 2),  # 0: all codes are one
  }
  if with_windows:
    metrics["warp_nats"] = statistics.warp.entropy()[0]
    for percent in (25, 50, 75):
      metrics[f"warp_precision_{percent}"] = statistics.warp.precision(jnp.float32(percent / 100))
  return metrics


def _gradients(params, frozen, shared, batch, *, model: evo_lib.Evo, config: config_lib.Config, price: Price | None):
  """Of one shard of the batch, in microbatches, of which one is in memory at a time: gradients of the trained
  parameters (of the AR term and the window term where they are clipped apart, of their sum otherwise), metrics as sums
  and counts, and measurements.

  shared: statistics, and the counts of the whole batch. batch: sequences and their windows.
  """
  statistics, counts = shared
  # Inside the shard_map, if there is one.
  local = model.clone(layout=model.layout.per_batch_shard())

  def losses(params, batch, draw):
    net = local.bind({"params": partition.merge(params, frozen)})
    learned, clean_frozen = config.model.progression == "learned", partition.leaves_clean_stream(params)
    terms, measured, metrics = objective.training_loss(
      net, statistics, batch, draw, counts, config.loss, learned, clean_frozen, price
    )
    return terms, (metrics, measured)

  gradient = _gradient_by_term(losses) if config.optim.separate_clip else _gradient_of_sum(losses)
  micro = config.train.accumulate
  if micro == 1:
    return gradient(params, *batch)
  parts = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), batch)
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

  def accumulate(total, part):
    trees, *aux = gradient(params, *part)
    return jax.tree.map(jnp.add, total, trees), aux

  number = 2 if config.optim.separate_clip else 1
  trees, (metrics, measured) = jax.lax.scan(accumulate, (zeros,) * number, parts)
  metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
  # Not by -1: without windows of the bound there is nothing measured, and no size to be found.
  return trees, metrics, jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), measured)


def _gradient_of_sum(losses: Callable) -> Callable[..., tuple[tuple[Any], Any, Any]]:
  """(gradient of the terms' sum,), and what `losses` gives beside the terms."""

  def total(params, *batch):
    terms, aux = losses(params, *batch)
    return sum(terms), aux

  def gradient(params, *batch):
    tree, aux = jax.grad(total, has_aux=True)(params, *batch)
    return (tree,), *aux

  return gradient


def _gradient_by_term(losses: Callable) -> Callable[..., tuple[tuple[Any, Any], Any, Any]]:
  """The gradient of each of the two terms, and what `losses` gives beside them."""

  def gradient(params, *batch):
    _, vjp, aux = jax.vjp(lambda params: losses(params, *batch), params, has_aux=True)
    one, zero = jnp.ones(()), jnp.zeros(())
    return (vjp((one, zero))[0], vjp((zero, one))[0]), *aux

  return gradient


_FUSION, _SPARSE_CORE = "xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_sparse_core_collective_offload_"
# By beginnings of `device_kind`, the first that fits. Half of a core's fast memory, on v6e three quarters, for one
# product: with the compiler's 16 MiB, products of a large model take 1.4 times as long, on v6e twice. Parameters are
# gathered and gradients scattered while products run: within their loops on v5e, by SparseCores on v5p and v6e, where
# newer compilers refuse the former.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_BESIDE = {_FUSION + "_fuse_all_gather": False} | {
  _SPARSE_CORE + part: True
  for part in ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")
}
_COMPILER_OPTIONS = {
  "TPU v5 lite": {
    _VMEM: 65536,
    _FUSION: True,
    _FUSION + "_fuse_all_gather": True,
    _FUSION + "_multiple_steps": True,
    "xla_enable_async_all_gather": True,
  },
  "TPU v5": _BESIDE | {_VMEM: 65536},
  "TPU v6": _BESIDE | {_VMEM: 98304},
}


def make_step(
  model: evo_lib.Evo,
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  device_kind: str,
  own: OwnFunctions = AS_CONFIGURED,
):
  """`train_step` as it is compiled for devices of a kind: (state, batch, windows=True), where `state` is donated."""
  options = next((value for name, value in _COMPILER_OPTIONS.items() if device_kind.startswith(name)), None)
  return jax.jit(
    functools.partial(train_step, model=model, config=config, own=own),
    static_argnames="windows",
    donate_argnums=0,
    out_shardings=(state_lib.state_shardings(model, config, mesh), None),
    compiler_options=options,
  )
