"""Training: the state, one pure step, and one loop that reads from top to bottom."""

import contextlib
import functools
import math
import os
import signal
from typing import Any
import zlib

from etils import epath
import flax.linen as nn
import flax.struct
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from evo_jax import checkpoint
from evo_jax import config as config_lib
from evo_jax import data
from evo_jax import elbo
from evo_jax import evaluate
from evo_jax import flops
from evo_jax import metrics as metrics_lib
from evo_jax import optim
from evo_jax import paths
from evo_jax import sharding
from evo_jax import tokenizer as tokenizer_lib
from evo_jax.cli import UserError
from evo_jax.model import Evo, abstract_params, count_parameters


@flax.struct.dataclass
class TrainState:
  """All that a step changes. `ema` is None unless config.optim.ema."""

  step: jax.Array  # int32
  params: Any
  ema: Any
  optimizer: Any
  statistics: elbo.Statistics

  def items(self) -> dict[str, Any]:
    """What a checkpoint holds, by item; the step is the checkpoint's own."""
    ema = {} if self.ema is None else {"ema": self.ema}
    return {"params": self.params, **ema, "statistics": self.statistics, "optimizer": self.optimizer}


def key_for(seed: int, purpose: str, step: jax.Array | int = 0) -> jax.Array:
  """The key of every random draw: the seed, folded with a named purpose and the step."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode())), step)


def make_model(config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer) -> Evo:
  """The network for a tokenizer. Raises UserError if its vocabulary does not fit the configuration."""
  if config.model.vocab_size and tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(f"config.model.vocab_size: {config.model.vocab_size} is less than the tokenizer's "
                    f"{tokenizer.vocab_size} tokens")
  return Evo(config.model, tokenizer.vocab_size)


def init_state(model: Evo, config: config_lib.Config) -> TrainState:
  """The state before training, parameters in linen's boxes (they carry the logical axes)."""
  seed = config.train.seed
  params = model.init(key_for(seed, "parameters"), jnp.zeros((1, 2), jnp.int32))["params"]
  optimizer = optim.make(config.optim, config.train.steps).init(params)
  codes = model.apply({"params": params}, method=Evo.codes)
  statistics = elbo.start_statistics(key_for(seed, "statistics"), codes, model.vocab_size, config.warp)
  ema = jax.tree.map(jnp.copy, params) if config.optim.ema else None
  return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer, statistics)


def abstract_state(model: Evo, config: config_lib.Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Any]:
  """The state's shapes, dtypes and shardings; and the shardings alone."""
  boxed = jax.eval_shape(functools.partial(init_state, model, config))
  places = sharding.shardings(mesh, boxed)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return jax.tree.map(place, nn.unbox(boxed), places), places


def abstract_items(model: Evo, config: config_lib.Config, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a checkpoint's items, to restore into; without a mesh, for one device."""
  if mesh is None:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), sharding.AXES)
  return abstract_state(model, config, mesh)[0].items()


def check_batch(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
  """Raises UserError where a microbatch does not divide by the shards of the batch."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.data.batch_size // config.train.accumulate % shards:
    raise UserError(f"config.data.batch_size: {config.data.batch_size} sequences in {config.train.accumulate} "
                    f"microbatches do not divide by data x fsdp = {shards} of the mesh")


def train_step(state: TrainState, sequence_BxT: jax.Array, *, model: Evo, config: config_lib.Config,
               windows: bool = True) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step on a global batch (B, L + 1) of int32 tokens: the new state and metrics (losses in bits a token).

  windows: False leaves them out (before `config.windows_start`).
  """
  B, L = sequence_BxT.shape[0], sequence_BxT.shape[1] - 1
  draw, learned = None, config.model.progression == "learned"
  if config.window.count and windows:
    density = state.statistics.step_density() if config.paths.step_sampling == "importance" else None
    draw = elbo.draw_windows(key_for(config.train.seed, "windows", state.step), B, L, config.model.code_dim,
                             config.window, config.paths, config.loss.bound_windows, density)

  def losses(params, statistics, sequence, draw):
    net = model.bind({"params": params})
    terms, measured, metrics = elbo.training_loss(net, statistics, sequence, draw, config.loss, learned)
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
    return (gradient, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics),
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured))

  terms = 2 if config.optim.separate_clip else 1
  specs = sharding.specs(abstract_params(model.config, model.vocab_size), model.rules)
  gradient, metrics, measured = sharding.by_shard(accumulated, specs, terms, model.rules)(
      state.params, state.statistics, (sequence_BxT, draw))
  metrics = {name: mean.value for name, mean in metrics.items()}
  clipped, norms = zip(*(optim.clip(g, config.optim.clip) for g in gradient))
  gradient = jax.tree.map(lambda *parts: sum(parts), *clipped)
  updates, optimizer = optim.make(config.optim, config.train.steps).update(gradient, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - config.optim.ema)
  statistics = state.statistics.update(measured, config.warp.decay)

  names = ("gradient_norm",) if len(norms) == 1 else ("gradient_norm_ar", "gradient_norm_window")
  metrics |= dict(zip(names, norms))
  metrics["parameter_norm"] = optax.tree.norm(params)  # finite: these parameters may be saved
  metrics["gradient_norm_codes"] = optax.tree.norm(gradient["codes"])
  metrics["learning_rate"] = optim.schedule(config.optim, config.train.steps)(state.step)
  codes = model.apply({"params": params}, method=Evo.codes)
  metrics["codes_spread"] = 1.0 - jnp.sum((statistics.unigram_V @ codes) ** 2)  # 0: all codes are one
  if draw is not None:
    metrics["warp_nats"] = statistics.warp.entropy()[0]
    for percent in (25, 50, 75):
      metrics[f"warp_precision_{percent}"] = statistics.warp.precision(jnp.float32(percent / 100))
  return TrainState(state.step + 1, params, ema, optimizer, statistics), metrics


_FUSION, _SPARSE_CORE = "xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_sparse_core_collective_offload_"
# By beginnings of `device_kind`, the first that fits. Half of a core's fast memory, on v6e three quarters, for one
# product: with the compiler's 16 MiB, products of a large model take 1.4 times as long, on v6e twice. Parameters are
# gathered and gradients scattered while products run: within their loops on v5e, by SparseCores on v5p and v6e, where
# newer compilers refuse the former.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_BESIDE = {_FUSION + "_fuse_all_gather": False} | {_SPARSE_CORE + part: True for part in (
    "all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")}
_COMPILER_OPTIONS = {
    "TPU v5 lite": {_VMEM: 65536, _FUSION: True, _FUSION + "_fuse_all_gather": True, _FUSION + "_multiple_steps": True,
                    "xla_enable_async_all_gather": True},
    "TPU v5": _BESIDE | {_VMEM: 65536},
    "TPU v6": _BESIDE | {_VMEM: 98304}}


def make_step(model: Evo, config: config_lib.Config, places: Any, device_kind: str):
  """`train_step` as it is compiled for devices of a kind: (state, batch, windows=True), where `state` is given away
  and laid out as `places` say."""
  options = next((value for name, value in _COMPILER_OPTIONS.items() if device_kind.startswith(name)), None)
  return jax.jit(functools.partial(train_step, model=model, config=config), static_argnames="windows", donate_argnums=0,
                 out_shardings=(places, None), compiler_options=options)


def train(config: config_lib.Config, workdir: str) -> None:
  """Trains, or goes on training, in `workdir`; at the end evaluates held-out text and writes samples."""
  # Everything that can be wrong with the input comes up here, before anything compiles.
  if config.optim.learning_rate == 0:
    raise UserError("config.optim.learning_rate: 0.0 trains nothing")
  for path in (*config.eval.paths, *config.eval.train_paths):
    if paths.parse(path)[0] == "learned" and config.model.progression != "learned":
      raise UserError(f"config.eval.paths: {path!r} needs config.model.progression = learned")
  tokenizer = tokenizer_lib.load(config.data.tokenizer, config.data.tokenizer_path)
  model = make_model(config, tokenizer)
  mesh = sharding.make_mesh(config.mesh)
  check_batch(config, mesh)
  make_state = functools.partial(init_state, model, config)
  places = sharding.shardings(mesh, jax.eval_shape(make_state))
  folder = checkpoint.make_workdir(workdir)
  corpora = data.load(config.data.path, tokenizer)
  data.check_vocabulary(corpora, tokenizer.vocab_size)
  L = config.model.context
  rows = sharding.batch_rows(mesh, config.data.batch_size)
  data.training_stream(corpora, config.data, L)  # complains about text that is too short
  valid = data.held_out(corpora, "valid", L, config.eval.sequences)
  parameters = count_parameters(config.model, tokenizer.vocab_size)
  checkpoint.write_config(folder, config, tokenizer, parameters, [c.fingerprint for c in corpora])

  is_main = jax.process_index() == 0
  say = functools.partial(print, flush=True) if is_main else lambda *_: None
  say(f"{parameters:,} parameters; {sum(len(c.tokens['train']) for c in corpora):,} training tokens; "
      f"mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}; {folder}")

  checkpoints = checkpoint.Checkpoints(folder, config.train.checkpoints_kept)
  with contextlib.ExitStack() as stack:
    stack.callback(checkpoints.close)
    stack.enter_context(jax.set_mesh(mesh))
    done = 0
    if checkpoints.latest():
      done, items = checkpoints.restore_latest(abstract_items(model, config, mesh))
      replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      state = TrainState(jax.device_put(np.int32(done), replicated), items["params"], items.get("ema"),
                         items["optimizer"], items["statistics"])
      say(f"goes on after step {done}" if done < config.train.steps else f"is finished: {done} steps")
    else:
      state = jax.jit(lambda: nn.unbox(make_state()), out_shardings=places)()
    iterator = iter(data.training_stream(corpora, config.data, L, rows, start=done))
    stack.callback(iterator.close)
    journal = metrics_lib.Journal(folder, done)
    stack.callback(journal.close)
    bar = metrics_lib.Bar(config.train.steps, done, config.data.batch_size * L)
    stack.callback(bar.close)
    meter = metrics_lib.Meter(config.data.batch_size * L)
    profile = [int(end) for end in config.train.profile.split(":")] if config.train.profile else (0, 0)
    stop = stack.enter_context(_stop_on_signal())
    evaluator = evaluate.Evaluator(model, config, tokenizer, mesh)
    step_fn = make_step(model, config, places, jax.devices()[0].device_kind)

    pending = None  # metrics of the step before, read while the next one runs
    saved = done
    for step in range(done + 1, config.train.steps + 1):
      if step == profile[0]:
        jax.profiler.start_trace(str(folder / "profile"))
      with meter.waits("data_wait"):
        batch = next(iterator)
      windows = step > config.windows_start
      state, metrics = step_fn(state, sharding.global_batch(mesh, batch, config.data.batch_size), windows=windows)
      if step == profile[1]:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        say(f"steps {profile[0]} to {profile[1]} are traced in {folder / 'profile'}")
      if pending is not None:
        _checked(step - 1, pending, checkpoints)
        bar.step(step - 1, float(pending["bits"]))
        meter.step()
      pending = metrics
      last, leaves = step == config.train.steps, stop.asked(step)  # asked once: a signal may come at any time
      every = lambda n: bool(n) and step % n == 0
      evaluates = every(config.train.eval_every) and not last
      saves = last or every(config.train.checkpoint_every) or leaves
      if every(config.train.log_every) or evaluates or saves:
        pending = None
        row = {"step": step} | _checked(step, metrics, checkpoints)
        bar.step(step, row["bits"])
        meter.step()
        row |= meter.row(flops.train_step(config, model.rows, windows, visible=True))
        if evaluates:
          params = state.params if state.ema is None else state.ema
          with meter.waits("evaluation"):
            table = evaluator(params, state.statistics, valid[:: -(-len(valid) // config.eval.train_sequences)],
                              config.eval.train_paths)
          row |= {f"valid_{entry['path']}": entry["bits"] for entry in table}
        if every(config.train.log_every) or evaluates or last:
          bar.line(step, row["bits"])
          journal.write(row)
        if saves:
          with meter.waits("checkpoint_stall"):
            checkpoints.save(step, state.items())
          saved = step
        bar.pause()
      if leaves:
        break
    checkpoints.wait()
    bar.close()
    if saved < config.train.steps:
      say(f"stopped by signal; step {saved} is saved, the same command goes on from there")
      return
    _finish(folder, evaluator, state, valid, config, tokenizer, model, say)


def _finish(folder: epath.Path, evaluator, state: TrainState, valid: np.ndarray, config: config_lib.Config,
            tokenizer: tokenizer_lib.Tokenizer, model: Evo, say) -> None:
  """Held-out table and samples, printed and written."""
  from evo_jax import generate  # which loads runs

  params = state.params if state.ema is None else state.ema
  table = evaluator(params, state.statistics, valid, config.eval.paths)
  text = evaluate.format_table(table)
  say(f"\nheld-out text, {len(valid)} sequences of {config.model.context} tokens\n{text}")
  run = checkpoint.Run(config, tokenizer, model, params, state.statistics, config.train.steps)
  samples = generate.final_samples(run, evaluator.mesh)
  say("\n" + samples)
  if jax.process_index() == 0:
    checkpoint.write_json(folder / "table.json", table)
    (folder / "table.txt").write_text(text + "\n")
    (folder / "samples.txt").write_text(samples + "\n")


def _checked(step: int, metrics: dict[str, jax.Array], checkpoints: checkpoint.Checkpoints) -> dict[str, float]:
  """The metrics as floats. Raises UserError if training has come to NaN or infinity."""
  values = {name: float(value) for name, value in jax.device_get(metrics).items()}
  bad = [name for name, value in values.items() if not math.isfinite(value)]
  if bad:
    checkpoints.wait()
    raise UserError(f"step {step}: {bad[0]} is {values[bad[0]]}: training has diverged; the last good checkpoint is of "
                    f"step {checkpoints.latest()}; a lower config.optim.learning_rate or config.optim.clip may help")
  return values


class _Stop:
  """Whether the loop is to save and leave: of one process, by its own signals; of several, when all have heard of a
  SIGTERM to any.

  With several, JAX's preemption service takes SIGTERM and names a step that none has passed yet.
  """

  def __init__(self):
    self.signalled = False

  def asked(self, step: int) -> bool:
    """Asked after every step, by all processes."""
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self.signalled


@contextlib.contextmanager
def _stop_on_signal():
  """SIGTERM and SIGINT ask the loop to save and leave; a second SIGINT interrupts at once."""
  stop, several = _Stop(), jax.process_count() > 1

  def ask(number, frame):
    stop.signalled = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if several:
      os.kill(os.getpid(), signal.SIGTERM)  # which the service passes on

  numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, ask) for number in numbers}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
