"""The training loop: check everything, restore or initialize, then step, log, evaluate and save.

Resuming: a checkpoint holds parameters, averages, statistics and the optimizer's state; the position in the data and
every random draw follow from the step alone, so that a run that is killed and started again goes on bit for bit.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import math
import os
import signal
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.flow import schedules
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops
from evo_jax.parallel import sharding
from evo_jax.training import checkpoint, optim, partition
from evo_jax.training import lease as lease_lib
from evo_jax.training import metrics as metrics_lib
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from evo_jax.training import trackers as trackers_lib

# Held-out metrics by name, from parameters (the averaged ones where an average is kept) and statistics.
Evaluate = Callable[[Any, Any], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run before its first step: all input is read and checked, nothing is compiled.

  text: to train on. held_out: sequences of the validation split. previous: the configuration of the checkpoints to go
  on from, if any.
  """

  config: config_lib.Config
  tokenizer: tokenizers.Tokenizer
  model: evo_lib.Evo
  mesh: jax.sharding.Mesh
  folder: epath.Path
  text: batches_lib.TrainingText
  held_out: Batch
  lease: lease_lib.Lease
  previous: config_lib.Config | None


def say(text: str) -> None:
  """Prints a line; of several processes only number 0 does."""
  if jax.process_index() == 0:
    print(text, flush=True)


@contextlib.contextmanager
def prepare(config: config_lib.Config, workdir: str) -> Iterator[Setup]:
  """Reads and checks all that a run needs, and writes config.json; holds the work directory while the block runs.

  Raises UserError for whatever is wrong, and where another run holds the work directory.
  """
  config.check_trainable()
  for path in (*config.eval.paths, *config.eval.train_paths):
    if schedules.parse_path(path)[0] == "learned" and config.model.progression != "learned":
      raise UserError(f"config.eval.paths: {path!r} needs config.model.progression = learned")
  trackers_lib.check_installed(config.train)
  tokenizer = _load_tokenizer(config.data, checkpoint.resolve_workdir(workdir))
  mesh = sharding.make_mesh(config.mesh)
  model = state_lib.make_model(config, tokenizer, mesh)
  state_lib.check_batch(config, mesh)
  state = state_lib.abstract_state(model, config, mesh)  # names a size that does not divide the mesh
  partition.check_trains(config, state.params)
  folder = checkpoint.make_workdir(workdir)
  with lease_lib.held(folder) as lease:
    corpora = corpora_lib.load_corpora(config.data, tokenizer)
    if any(corpus.indexes for corpus in corpora):
      config.check_isolates()
    L = config.model.context
    text = batches_lib.TrainingText(corpora, config.data, L)
    held_out = batches_lib.held_out(corpora, "valid", L, config.eval.sequences, config.model.isolate_documents)
    parameters = evo_lib.count_parameters(config.model, tokenizer.vocab_size)
    fingerprints = [corpus.fingerprint for corpus in corpora]
    previous = checkpoint.check_resumable(folder, config, tokenizer, fingerprints)
    if previous and any(pin == "windows" for *_, pin in config_lib.differences(previous, config)):
      state_lib.check_begins_windows(model, config)
    if jax.process_index() == 0:
      checkpoint.write_config(folder, config, tokenizer, parameters, fingerprints)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
      f"{parameters:,} parameters{f', {trained:,} of them trained' if state.frozen else ''}; "
      f"{text.tokens:,} training tokens; "
      f"mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}; {folder}"
    )
    for report in text.reports:
      say(report)
    if config.window.count and config.window.start >= config.train.steps:
      say(f"config.window.start: {config.window.start} is not before the last step: no windows are trained")
    yield Setup(config, tokenizer, model, mesh, folder, text, held_out, lease, previous)


def _load_tokenizer(config: config_lib.Data, folder: epath.Path) -> tokenizers.Tokenizer:
  """The configuration's tokenizer, or, where it cannot be read, the copy of it that the work directory holds."""
  try:
    return corpora_lib.load_tokenizer(config)
  except UserError as error:
    copy = folder / "tokenizer"
    if not copy.is_dir():
      raise
    tokenizer = tokenizers.load_tokenizer(config.tokenizer, str(copy))
    say(f"{error}; its copy {copy} is used")
    return tokenizer


def train(
  setup: Setup, evaluate: Evaluate | None = None, own: step_lib.OwnFunctions = step_lib.AS_CONFIGURED
) -> state_lib.TrainState | None:
  """Trains, or goes on training. Returns the state after the last step; None where a signal stopped the run.

  evaluate: called every config.eval.eval_every steps; its metrics go to the log. own: functions that steps are made
  with; nothing saved tells of them. Raises UserError where training has
  diverged, where a checkpoint or the log cannot be written, and where another run has taken over the work directory.
  """
  config, mesh = setup.config, setup.mesh
  checkpoints = checkpoint.CheckpointStore(setup.folder, config.train.checkpoints_kept)
  with contextlib.ExitStack() as stack:
    stack.callback(checkpoints.close)
    stack.enter_context(jax.set_mesh(mesh))
    state, done = _restore_or_initialize(setup, checkpoints)
    rows = sharding.batch_rows(mesh, config.data.batch_size)
    iterator = setup.text.batches(rows, done, config.model.isolate_documents)
    stack.callback(iterator.close)
    report = _Report(setup, done, checkpoints)
    stack.callback(report.close)
    profiler = _Profiler(config.train, done, setup.folder)
    stack.callback(profiler.close)
    stop = stack.enter_context(_stop_on_signal())
    step_fn = step_lib.make_step(setup.model, config, mesh, jax.devices()[0].device_kind, own)

    operations = functools.partial(
      flops.train_step, config, setup.model.rows, visible=True, **partition.describe_work(state.params, state.frozen)
    )

    pending = None  # metrics of the step before, read while the next one runs
    saved = done
    for step in range(done + 1, config.train.steps + 1):
      setup.lease.check()
      profiler.before(step)
      with report.throughput.waits("data_wait"):
        batch = sharding.global_batch(mesh, next(iterator), config.data.batch_size)
      windows = step > config.windows_start
      state, metrics = step_fn(state, batch, windows=windows)
      profiler.after(step, metrics)
      if pending is not None:
        report.count(step - 1, pending)
      pending = metrics
      due = _due(config, step, stop.asked(step))  # asked once: a signal may come at any time
      if due.log or due.evaluate or due.save:
        pending = None
        row = report.row(step, metrics, operations(windows=windows))
        if due.evaluate and evaluate is not None:
          with report.throughput.waits("evaluation"):
            row |= evaluate(state.averaged, state.statistics)
        if due.log:
          report.write(row)
        if due.save:
          with report.throughput.waits("checkpoint_stall"):
            report.flush()
            checkpoints.save(step, state.items())
          saved = step
        report.pause()
      if due.leave:
        break
    checkpoints.wait()
    report.close()
    if saved < config.train.steps:
      say(f"stopped by signal; step {saved} is saved, the same command goes on from there")
      return None
    return state


def _restore_or_initialize(setup: Setup, checkpoints: checkpoint.CheckpointStore) -> tuple[state_lib.TrainState, int]:
  """The state to go on from, and its step."""
  model, config, mesh = setup.model, setup.config, setup.mesh
  if checkpoints.latest() is None:
    state = state_lib.sharded_init(model, config, mesh)
    if state.frozen:
      checkpoints.save(0, state.base_items())
      checkpoints.wait()
    return state, 0
  done, items = checkpoints.restore_latest(state_lib.abstract_items(model, config, mesh))
  if "statistics" not in items:
    say("windows begin anew: step 0 has others")
    state_lib.check_begins_windows(model, config)
    items = state_lib.begin_windows(model, config, mesh, items)
  if done < config.train.steps:
    say(f"goes on after step {done}" + _consequences(setup.previous, config, done))
  else:
    say(f"is finished: {done} steps")
  if "optimizer" not in items:
    items["optimizer"] = state_lib.init_optimizer(model, config, mesh, items["params"])
  step = jax.device_put(np.int32(done), sharding.replicated(mesh))
  return state_lib.TrainState(step=step, **{"ema": None, "frozen": {}, **items}), done


def _consequences(old: config_lib.Config | None, new: config_lib.Config, done: int) -> str:
  """What changed fields do to the learning rate and to windows from the step after `done` on; "" where nothing."""
  if old is None:
    return ""
  parts = []
  before, after = (float(optim.learning_rate_schedule(c.optim, c.train.steps)(done)) for c in (old, new))
  if not math.isclose(before, after, rel_tol=1e-6):
    parts.append(f"the learning rate is {after:.4g} now, not {before:.4g}")
  elif (old.train.steps, old.optim) != (new.train.steps, new.optim):
    rises = f"the learning rate rises to {new.optim.learning_rate:.4g} until step {new.optim.warmup}"
    parts.append(rises if done < new.optim.warmup else f"the learning rate stays {after:.4g}")
  windows = (old.window.start, old.window.count) != (new.window.start, new.window.count)
  if new.window.count and (parts or windows):
    parts.append("windows are on" if done >= new.window.start else f"windows start after step {new.window.start}")
  return ": " + ", ".join(parts) if parts else ""


@dataclasses.dataclass(frozen=True)
class _Due:
  """What follows a step."""

  log: bool
  evaluate: bool
  save: bool
  leave: bool


def _due(config: config_lib.Config, step: int, stopped: bool) -> _Due:
  last = step == config.train.steps
  every = lambda n: bool(n) and step % n == 0
  evaluates = every(config.train.eval_every) and not last
  saves = last or every(config.train.checkpoint_every) or stopped
  return _Due(every(config.train.log_every) or evaluates or last, evaluates, saves, stopped)


class _Report:
  """The log, the progress bar and the clock of a run."""

  def __init__(self, setup: Setup, done: int, checkpoints: checkpoint.CheckpointStore):
    tokens_per_step = setup.config.data.batch_size * setup.config.model.context
    self.throughput = metrics_lib.Throughput(tokens_per_step)
    self._checkpoints, self._text = checkpoints, setup.text
    self._log = metrics_lib.MetricsLog(setup.folder, done, setup.config.train.checkpoint_every)
    self._trackers = trackers_lib.start_trackers(setup.config, setup.folder, done)
    self._bar = metrics_lib.ProgressBar(setup.config.train.steps, done, tokens_per_step)

  def count(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Counts a finished step; its metrics as floats. Raises UserError if training has come to NaN or infinity."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
      self._checkpoints.wait()
      last = self._checkpoints.latest()
      saved = "nothing is saved yet" if last is None else f"the last good checkpoint is of step {last}"
      raise UserError(
        f"step {step}: {bad[0]} is {values[bad[0]]}: training has diverged; {saved}; "
        "a lower config.optim.learning_rate or config.optim.clip may help"
      )
    self._bar.step(step, values["bits"])
    self.throughput.step()
    return values

  def row(self, step: int, metrics: dict[str, jax.Array], operations: float) -> dict[str, float]:
    """Counts a step and gives its row of the log."""
    epochs = {f"epochs/{name}": round(count, 6) for name, count in self._text.epochs(step).items()}
    return {"step": step} | self.count(step, metrics) | epochs | self.throughput.row(operations)

  def write(self, row: dict[str, float]) -> None:
    self._bar.line(row["step"], row["bits"])
    self._log.write(row)
    for tracker in self._trackers:
      tracker.write(row)

  def flush(self) -> None:
    """Has the log written, before a checkpoint behind which nobody writes its rows again."""
    self._log.flush()

  def pause(self) -> None:
    self._bar.pause()

  def close(self) -> None:
    self._bar.close()
    self._log.close()
    for tracker in self._trackers:
      tracker.close()
    self._trackers = []


class _Profiler:
  """Traces the steps START:STOP of config.train.profile, as far as they are still to come, into WORKDIR/profile."""

  def __init__(self, config: config_lib.Train, done: int, folder: epath.Path):
    first, last = (int(end) for end in config.profile.split(":")) if config.profile else (0, 0)
    self._first, self._last = max(first, done + 1), min(last, config.steps)
    self._folder, self._since = folder / "profile", None  # since: the first step of a trace that runs
    if config.profile and self._first > self._last:
      steps = (
        f"this run makes steps {done + 1} to {config.steps}" if done < config.steps else f"step {done} was the last"
      )
      say(f"config.train.profile: {config.profile} is not traced: {steps}")

  def before(self, step: int) -> None:
    if step == self._first <= self._last:
      jax.profiler.start_trace(str(self._folder))
      self._since = step

  def after(self, step: int, metrics: Any) -> None:
    if step == self._last and self._since is not None:
      jax.block_until_ready(metrics)
      self.close()
      say(f"steps {self._first} to {self._last} are traced in {self._folder}")

  def close(self) -> None:
    """Ends a trace that still runs: what a stopped run has traced is kept."""
    if self._since is not None:
      self._since = None
      jax.profiler.stop_trace()


class _Stop:
  """Whether the loop is to save and leave: of one process, by its own signals; of several, when all have heard of a
  signal to any.

  With several, JAX's preemption service takes SIGTERM and names a step that none has passed yet. Where it is off
  (`jax_enable_preemption_service`), processes tell each other after every step.
  """

  def __init__(self):
    self.signalled = False
    self.by_service = jax.process_count() > 1 and jax.config.jax_enable_preemption_service

  def asked(self, step: int) -> bool:
    """Asked after every step, by all processes."""
    if self.by_service:
      return multihost_utils.reached_preemption_sync_point(step)
    if jax.process_count() > 1:
      return bool(np.any(multihost_utils.process_allgather(np.array(self.signalled))))
    return self.signalled


@contextlib.contextmanager
def _stop_on_signal():
  """SIGTERM and SIGINT ask the loop to save and leave; a second SIGINT interrupts at once."""
  stop = _Stop()

  def ask(number, frame):
    stop.signalled = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop.by_service:
      os.kill(os.getpid(), signal.SIGTERM)  # which the service passes on

  numbers = (signal.SIGINT,) if stop.by_service else (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, ask) for number in numbers}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
