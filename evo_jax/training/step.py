"""One pure training step."""

import functools

import jax
import jax.numpy as jnp
import optax

from evo_jax import config as config_lib
from evo_jax.flow import objective
from evo_jax.flow import windows as windows_lib
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding
from evo_jax.training import optim
from evo_jax.training import state as state_lib


def train_step(
  state: state_lib.TrainState,
  sequence_BxT: jax.Array,
  *,
  model: evo_lib.Evo,
  config: config_lib.Config,
  windows: bool = True,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """One step on a global batch (B, L + 1) of int32 tokens: the new state and metrics (losses in bits a token).

  windows: False leaves them out (before `config.windows_start`).
  """
  B, L = sequence_BxT.shape[0], sequence_BxT.shape[1] - 1
  draw, learned = None, config.model.progression == "learned"
  if config.window.count and windows:
    density = state.statistics.step_density() if config.paths.step_sampling == "importance" else None
    draw = windows_lib.draw_windows(
      state_lib.key_for(config.train.seed, "windows", state.step),
      B,
      L,
      config.model.code_dim,
      config.window,
      config.paths,
      config.loss.bound_windows,
      density,
    )

  def losses(params, statistics, sequence, draw):
    net = model.bind({"params": params})
    terms, measured, metrics = objective.training_loss(net, statistics, sequence, draw, config.loss, learned)
    return terms, (metrics, measured)

  def gradients(params, statistics, batch):
    """Gradients of the AR term and the window term: of their sum, unless they are clipped apart. With metrics and
    measurements."""
    if not config.optim.separate_clip:
      joint = lambda params: (lambda terms, aux: (sum(terms), aux))(*losses(params, statistics, *batch))
      gradient, aux = jax.grad(joint, has_aux=True)(params)
      return (gradient,), *aux
    _, pull, aux = jax.vjp(lambda params: losses(params, statistics, *batch), params, has_aux=True)
    return (pull((jnp.ones(()), jnp.zeros(())))[0], pull((jnp.zeros(()), jnp.ones(())))[0]), *aux

  def accumulated(params, statistics, batch):
    """The same in microbatches, of which one is in memory at a time."""
    micro = config.train.accumulate
    if micro == 1:
      return gradients(params, statistics, batch)
    parts = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), batch)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

    def body(total, part):
      gradient, *aux = gradients(params, statistics, part)
      return jax.tree.map(lambda a, b: a + b / micro, total, gradient), aux

    gradient, (metrics, measured) = jax.lax.scan(body, (zeros,) * terms, parts)
    return (
      gradient,
      jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics),
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured),
    )

  terms = 2 if config.optim.separate_clip else 1
  specs = sharding.specs(evo_lib.abstract_params(model.config, model.vocab_size), model.rules)
  gradient, metrics, measured = sharding.per_shard(accumulated, specs, terms, model.rules)(
    state.params, state.statistics, (sequence_BxT, draw)
  )
  metrics = {name: mean.value for name, mean in metrics.items()}
  clipped, norms = zip(*(optim.clip(g, config.optim.clip) for g in gradient))
  gradient = jax.tree.map(lambda *parts: sum(parts), *clipped)
  updates, optimizer = optim.make_optimizer(config.optim, config.train.steps).update(
    gradient, state.optimizer, state.params
  )
  params = optax.apply_updates(state.params, updates)
  ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - config.optim.ema)
  statistics = state.statistics.update(measured, config.warp.decay)

  names = ("gradient_norm",) if len(norms) == 1 else ("gradient_norm_ar", "gradient_norm_window")
  metrics |= dict(zip(names, norms))
  metrics["parameter_norm"] = optax.tree.norm(params)  # finite: these parameters may be saved
  metrics["gradient_norm_codes"] = optax.tree.norm(gradient["codes"])
  metrics["learning_rate"] = optim.learning_rate_schedule(config.optim, config.train.steps)(state.step)
  codes = model.apply({"params": params}, method=evo_lib.Evo.codes)
  metrics["codes_spread"] = 1.0 - jnp.sum((statistics.unigram_V @ codes) ** 2)  # 0: all codes are one
  if draw is not None:
    metrics["warp_nats"] = statistics.warp.entropy()[0]
    for percent in (25, 50, 75):
      metrics[f"warp_precision_{percent}"] = statistics.warp.precision(jnp.float32(percent / 100))
  return state_lib.TrainState(state.step + 1, params, ema, optimizer, statistics), metrics


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


def make_step(model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh, device_kind: str):
  """`train_step` as it is compiled for devices of a kind: (state, batch, windows=True), where `state` is donated."""
  options = next((value for name, value in _COMPILER_OPTIONS.items() if device_kind.startswith(name)), None)
  return jax.jit(
    functools.partial(train_step, model=model, config=config),
    static_argnames="windows",
    donate_argnums=0,
    out_shardings=(state_lib.state_shardings(model, config, mesh), None),
    compiler_options=options,
  )
