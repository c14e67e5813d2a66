"""The host's steps: each takes a batch some passes on by a compiled program. One function for each mode."""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.decoding import modes, speculative
from evo_jax.decoding.device import DeviceModel
from evo_jax.decoding.draft_policy import DraftPolicy, mean_record
from evo_jax.decoding.logits import LogitsProcessor
from evo_jax.decoding.modes import WindowSchedule
from evo_jax.decoding.settings import Sampling
from evo_jax.decoding.speculative import Drafting
from evo_jax.decoding.state import DecodingState

PASSES = 8  # between two looks of the host


@dataclasses.dataclass
class RunningBatch:
  """A batch that is being decoded, as the host holds it; the steps replace its state.

  schedule: of windows, in modes that have them. stopped: (B,) bool, rows that the host has ended. infill: whether gaps
  are filled. drafts: how mode verify drafts. window: of flow that is traced, the schedule of the windows on their way
  and the number of their next pass; None: new ones are to begin.
  """

  sampling: Sampling
  schedule: WindowSchedule | None
  processor: LogitsProcessor
  state: DecodingState
  stopped: np.ndarray
  infill: bool
  drafts: DraftPolicy | None = None
  window: tuple[WindowSchedule, int] | None = None

  @property
  def traced(self) -> bool:
    """Whether the host looks after every pass."""
    return self.state.top_tokens is not None

  @property
  def passes(self) -> int:
    """Passes of one step, in modes in which a step is a number of passes."""
    return 1 if self.traced else PASSES


def ar_step(device: DeviceModel, batch: RunningBatch) -> None:
  """Some passes, one token each."""
  passes = batch.passes

  def program(net, statistics, state, processor):
    return modes.run_passes(lambda state: modes.ar_pass(net, state, processor), state, passes)

  batch.state = _run(device, batch, ("ar", passes), program, rehearsals=(_one_token,))


def adaptive_step(device: DeviceModel, batch: RunningBatch) -> None:
  """Some passes of the sliding window."""
  passes, infill = batch.passes, batch.infill

  def program(net, statistics, state, processor, schedule):
    step = lambda state: modes.adaptive_pass(net, statistics, state, schedule, processor, infill)
    return modes.run_passes(step, state, passes)

  batch.state = _run(device, batch, ("adaptive", passes, infill), program, batch.schedule, rehearsals=(_one_token,))


def verify_step(device: DeviceModel, batch: RunningBatch) -> None:
  """Some rounds, drafted as the policy says, which learns from them."""
  policy, rows = batch.drafts, len(batch.stopped)
  drafting, rounds, budget = policy.choose(rows, rows - int(batch.stopped.sum()))
  rounds = 1 if batch.traced else rounds
  start, compiled_before = time.perf_counter(), device.compile_seconds

  def program(net, statistics, state, processor, rounds, budget):
    return speculative.verify_rounds(net, state, processor, drafting, rounds, budget)

  extra, rehearsals = (np.int32(rounds), budget), (_one_token, _one_draft)
  batch.state, *found = _run(device, batch, ("verify", drafting), program, *extra, rehearsals=rehearsals)
  learn_from_rounds(device, policy, drafting, batch.state, found, np.ones(rows, bool), rows, start, compiled_before)


def learn_from_rounds(
  device: DeviceModel,
  policy: DraftPolicy,
  drafting: Drafting,
  state: DecodingState,
  found: Sequence[Any],
  mine_B: np.ndarray,
  rows: int,
  start: float,
  compiled_before: float,
) -> None:
  """Tells a policy that adapts what the rounds of the rows `mine` showed. found: counts and budget of `verify_rounds`.
  rows: of the passes. start, compiled_before: `time.perf_counter()` and the device's `compile_seconds` before them."""
  if not policy.adapts:
    return
  record = state.draft.record
  *record, done, (counts, budget) = device.to_host((record.offered, record.taken, record.matched, state.done, found))
  compiled = device.compile_seconds - compiled_before
  seconds, compiled = device.agree((time.perf_counter() - start - compiled, compiled))
  active = mine_B & ~done
  record = mean_record(*record, active if active.any() else mine_B)
  policy.add_step(drafting, rows, counts, seconds, compiled, record, float(budget.credit))


def flow_step(device: DeviceModel, batch: RunningBatch) -> None:
  """A window to its end; where a trace is wanted, one pass of it."""
  if batch.traced:
    _flow_pass(device, batch)
  else:
    batch.state = _run(device, batch, ("flow",), _flow_window, batch.schedule)


STEPS: dict[str, Callable[[DeviceModel, RunningBatch], None]] = {
  "ar": ar_step,
  "flow": flow_step,
  "adaptive": adaptive_step,
  "verify": verify_step,
}


def _flow_window(net, statistics, state, processor, schedule):
  return modes.flow_window(net, statistics, state, schedule, processor)


def _flow_pass(device: DeviceModel, batch: RunningBatch) -> None:
  def first(net, statistics, state, processor, schedule):
    state, schedule = modes.flow_first_pass(net, statistics, state, schedule, processor)
    return state, schedule, modes.window_unfinished(state, schedule.size)

  def following(net, statistics, state, processor, schedule, index):
    state = modes.flow_next_pass(net, statistics, state, schedule, processor, index)
    return state, modes.window_unfinished(state, schedule.size)

  if batch.window is None:
    index = 0
    batch.state, schedule, unfinished = _run(device, batch, ("flow first",), first, batch.schedule)
  else:
    schedule, index = batch.window
    batch.state, unfinished = _run(device, batch, ("flow next",), following, schedule, np.int32(index))
  batch.window = (schedule, index + 1) if device.to_host(unfinished) else None


def _one_token(state: DecodingState) -> DecodingState:
  """The state with texts that end with their next token."""
  return state.replace(max_length=state.length + 1)


def _one_draft(state: DecodingState) -> DecodingState:
  """The same with a draft for each text, whatever it says."""
  return _one_token(state).replace(draft=state.draft.replace(pending=jnp.ones_like(state.draft.pending)))


def _run(
  device: DeviceModel,
  batch: RunningBatch,
  name: tuple,
  program: Callable,
  *extra: Any,
  rehearsals: tuple[Callable[[DecodingState], DecodingState], ...] = (),
) -> Any:
  """program(net, statistics, state, processor, *extra) on the batch, where rows that the host has stopped are done.

  rehearsals: states for short runs of a new program, from the batch's: a CPU's library prepares each product when it
  runs first, which together takes as long as ten passes. That is compilation, and no text's seconds.
  """

  def stopping(net, statistics, state, processor, stopped, *extra):
    state = state.replace(done=jnp.logical_or(state.done, stopped))
    return program(net, statistics, state, processor, *extra)

  def rehearse(state, *others):
    layout = jax.tree.map(lambda x: x.sharding, state)  # for which programs are compiled; a small array may lose it
    for rehearsal in rehearsals:
      kept = jax.tree.map(jnp.copy, state.replace(k=(), v=()))
      after = device.run(name, stopping, jax.device_put(rehearsal(state), layout), *others)
      after = after if isinstance(after, DecodingState) else after[0]
      state = jax.block_until_ready(kept.replace(k=after.k, v=after.v))  # new keys and values will be overwritten
    return jax.device_put(state, layout), *others

  return device.run(name, stopping, batch.state, batch.processor, batch.stopped, *extra, rehearse=rehearse)
