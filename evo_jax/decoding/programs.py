"""The programs of an engine: which settings need one of their own, all compiled before the first request.

A program decodes the rows of one mode; temperature, top-k, top-p, stop strings and the like are a row's own.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.decoding import modes, speculative, steps
from evo_jax.decoding import rows as rows_lib
from evo_jax.decoding.device import DeviceModel
from evo_jax.decoding.draft_policy import DraftPolicy
from evo_jax.decoding.logits import LogitsProcessor, make_processor, ruled_out
from evo_jax.decoding.modes import WindowSchedule
from evo_jax.decoding.page_pool import SCRATCH
from evo_jax.decoding.progress import Snapshot
from evo_jax.decoding.prompts import Request, padded
from evo_jax.decoding.settings import Sampling, check_sampling, shared_threshold
from evo_jax.decoding.setup import make_drafting, make_schedule, room_behind
from evo_jax.decoding.speculative import UNLIMITED
from evo_jax.errors import UserError
from evo_jax.run import Run

BEST = 20  # most probable tokens whose log-probabilities may be asked for
_END_IDS = 8  # of a text beside the tokenizer's, at most
_BIASES = 300  # ids of a text with a bias, at most
_OF_MODES = {
  "ar": (),
  "verify": ("draft", "draft_passes", "draft_from", "coupling"),
  "flow": ("steps", "path", "grid", "stepper", "window"),
  "adaptive": ("path", "stepper", "threshold", "window"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a text is written: the program, and what is the row's own. end_ids: beside the tokenizer's. logit_bias: pairs
  of id and bias. best: see `Engine.submit`."""

  sampling: Sampling
  infill: bool = False
  end_ids: tuple[int, ...] = ()
  logit_bias: tuple[tuple[int, float], ...] = ()
  best: int | None = None

  def with_row(self, end_ids, logit_bias, best) -> "Settings":
    """With what `Engine.submit` takes beside the sampling parameters."""
    bias = tuple((logit_bias or {}).items())
    return dataclasses.replace(self, end_ids=tuple(end_ids), logit_bias=bias, best=best)

  @functools.cached_property  # a turn asks for it, row by row
  def program(self) -> tuple[Sampling, bool]:
    """What a program is for: the sampling parameters without those of rows and of other modes."""
    own = {name: getattr(self.sampling, name) for name in _OF_MODES[self.sampling.mode]}
    if "threshold" in own:  # an argument of the program, which rows share that have the same
      own["threshold"] = shared_threshold(self.sampling)
    return Sampling(mode=self.sampling.mode, **own), self.infill

  @property
  def threshold(self) -> float | None:
    """What rows of a program that move together have in common; None in modes without it."""
    return self.sampling.threshold if self.sampling.mode == "adaptive" else None

  @property
  def stop(self) -> tuple[str, ...]:
    return self.sampling.stop


class Programs:
  """Compiled programs over an engine's rows, and what of a row's settings they read. Its state lies on the devices."""

  def __init__(
    self,
    run: Run,
    device: DeviceModel,
    shape: rows_lib.Shape,
    settings: Sequence[Settings],
    reads: bool = True,
    scores: bool = True,
  ):
    """Compiles everything. reads: whether prompts are read; scores: whether texts are scored. Raises UserError for
    what the model does not support."""
    self._run, self._device, self._shape = run, device, shape
    self._schedules: dict[tuple[Sampling, bool], WindowSchedule | None] = {}
    self._drafts: dict[tuple[Sampling, bool], DraftPolicy] = {}
    for each in dict.fromkeys(s.program for s in settings):
      sampling, _ = each
      self._schedules[each] = make_schedule(run, sampling)
      if sampling.mode == "verify":
        self._drafts[each] = DraftPolicy(*make_drafting(run, sampling), few=True)
    # Turns ask for it again and again, and clients choose the thresholds.
    self._schedule_of = functools.lru_cache(256)(
      lambda sampling, threshold: make_schedule(run, dataclasses.replace(sampling, threshold=threshold))
    )
    self._ruled_out = {infill: ruled_out(run.tokenizer, infill) for infill in (False, True)}
    B = shape.rows
    self._values = {
      "temperature": np.ones(B, np.float32),
      "top_p": np.ones(B, np.float32),
      "top_k": np.zeros(B, np.int32),
      "greedy": np.ones(B, bool),
      "may_end": np.ones(B, bool),
      "bias_id": np.full((B, _BIASES), -1, np.int32),
      "bias": np.zeros((B, _BIASES), np.float32),
    }
    with jax.set_mesh(device.mesh):
      self._state = self._empty()
      self._compile(reads, scores)
      if any(policy.adapts for policy in self._drafts.values()):
        self._time_rounds()

  @staticmethod
  def sizes(run: Run, settings: Sequence[Settings], traces: bool = False) -> dict[str, Any]:
    """Fields of `rows.Shape` that follow from the programs. Raises UserError for what the model does not support."""
    samplings = [s.program[0] for s in settings]
    drafts = [s for s in samplings if s.mode == "verify"]
    schedules = [schedule for s in samplings if (schedule := make_schedule(run, s)) is not None]
    sizes = {schedule.size for schedule in schedules}
    remembers = any(schedule.self_conditioning for schedule in schedules)
    if remembers and len(sizes) > 1:
      raise UserError(f"windows of {sorted(sizes)} tokens: with self-conditioning an engine has windows of one size")
    return {
      "end_ids": len(run.tokenizer.end_ids) + _END_IDS,
      "draft": max((s.draft_tokens for s in drafts), default=0),
      "coupling": "rejection" if any(s.coupling == "rejection" for s in drafts) else "gumbel",
      "window": max(sizes, default=0),
      "self_conditioning": remembers,
      "traced": traces,
    }

  @staticmethod
  def room(run: Run, settings: Sequence[Settings]) -> int:
    """Positions behind a text's end that the slots of a pass may reach."""
    return max(room_behind(s.program[0], make_schedule(run, s.program[0])) for s in settings)

  def room_of(self, settings: Settings) -> int:
    """The same of the passes of one program, which the engine has."""
    return room_behind(settings.program[0], self._schedules[settings.program])

  def check(self, sampling, settings: Settings, end_ids, logit_bias, best) -> None:
    """Raises UserError for what an engine's text cannot have."""
    check_sampling(sampling, self._run.config)
    if settings.program not in self._schedules:
      known = "; ".join(sorted({_named(*program) for program in self._schedules}))
      raise UserError(f"{_named(*settings.program)}: the engine has no such program; it has {known}")
    rows = self._run.tokenizer.vocab_size
    if len(end_ids) > _END_IDS:
      raise UserError(f"end_ids: {len(end_ids)} are more than {_END_IDS}")
    if logit_bias and len(logit_bias) > _BIASES:
      raise UserError(f"logit_bias: {len(logit_bias)} tokens are more than {_BIASES}")
    for name, ids in (("end_ids", end_ids), ("logit_bias", logit_bias or ())):
      for token in ids:
        if not 0 <= token < rows:
          raise UserError(f"{name}: {token} is no id; the tokenizer has {rows}")
    for token, value in (logit_bias or {}).items():
      if not math.isfinite(value):
        raise UserError(f"logit_bias: {value} of {token} is not finite")
    if best is not None and (not 0 <= best <= BEST or settings.infill):
      raise UserError(f"best={best}: is not from 0 to {BEST}" if not settings.infill else "best: goes without infill")

  def _empty(self):
    program = lambda net, statistics: rows_lib.empty(net, statistics, self._shape, self._run.model.config)
    return self._device.run(("empty",), program)

  def _compile(self, reads: bool, scores: bool) -> None:
    """Runs each program once, on no row."""
    X, W, J, B = self._shape.shards, self._shape.width, self._shape.columns, self._shape.rows
    first, pages = np.zeros(X, np.int32), np.zeros((X, J), np.int32)
    for size in dict.fromkeys((W, self._shape.narrow)) if reads else ():
      piece = np.zeros((X, size), np.int32)
      self.read_piece(piece, first, pages, None, 1)
      for best in ((1, BEST) if size == W else (1,)) if scores else ():
        self.read_piece(piece, first, pages, piece, best)
    nobody, table = np.zeros(B, bool), np.zeros((B, J), np.int32)
    for each, schedule in self._schedules.items():
      policy = self._drafts.get(each)
      for index in self._indices():
        for drafting in policy.candidates if policy else (None,):
          self._pass(each, schedule, nobody, table, 1, index, drafting)
        if policy:
          policy.assume_compiled(self._size(index))
    empty = Request("", (), 1, 0, 0)
    self.insert(0, empty, 0, Settings(Sampling()), 0)
    self.snapshot(self._shape.traced)

  def _time_rounds(self) -> None:
    """Tells the policies what a round of each drafting takes when all rows are written, so that no text tries what
    cannot pay. Afterwards the rows are empty again; their pages were scratch."""
    B, shape = self._shape.rows, self._shape
    table = np.full((B, shape.columns), SCRATCH, np.int32)

    def begin(net, statistics, state, pending):
      state = state.replace(done=jnp.zeros(B, bool), max_length=jnp.full(B, shape.capacity, jnp.int32))
      return state.replace(draft=state.draft.replace(pending=jnp.full(B, pending)))

    for (each, policy), index in itertools.product(self._drafts.items(), self._indices()):
      size = self._size(index)
      for drafting, pending in itertools.product(policy.candidates if policy.adapts else (), (0, 1)):
        for timed in (False, True):  # the first round of a program takes longer than those that follow
          self._state = self._device.run(("begin",), begin, self._state, np.int32(pending))
          self.wait()
          start = time.perf_counter()
          found = self._pass(each, self._schedules[each], np.arange(B) < size, table, 1, index, drafting)
          counts, _ = self._device.to_host(found)
          seconds = self._device.agree(time.perf_counter() - start)
          if timed:
            policy.add_time(drafting, size, counts, float(seconds))
    self._state = None  # frees it before there is another
    self._state = self._empty()

  def read_piece(
    self, tokens: np.ndarray, first: np.ndarray, table: np.ndarray, following: np.ndarray | None, best: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Reads a piece of a text in each shard; see `rows.score_piece`, whose results it gives where `following` is."""
    if following is None:
      read = lambda net, statistics, state, *args: rows_lib.read_piece(net, state, *args)[1]
      self._state = self._device.run(("read",), read, self._state, tokens, first, table)
      return None
    count, size = 1 if best == 1 else BEST, self._run.tokenizer.vocab_size
    count = min(count, size)

    def score(net, statistics, state, *args):
      return rows_lib.score_piece(net, state, *args, size, count)

    self._state, *found = self._device.run(("score", count), score, self._state, tokens, first, table, following)
    return self._device.to_host(tuple(found))

  def insert(self, row: int, request: Request, begin_id: int, settings: Settings, seed: int) -> None:
    """Gives a text, whose prompt is in its pages, a row."""
    shape, C = self._shape, self._shape.capacity
    tokens, known = padded(request, begin_id, C)
    end_ids = np.full(shape.end_ids, -1, np.int32)
    given = self._run.tokenizer.end_ids + settings.end_ids
    end_ids[: len(given)] = given
    record = None
    if shape.draft:
      policy = self._drafts.get(settings.program)
      record = speculative.no_record(shape.draft) if policy is None else policy.record
      record = tuple(_widened(a, shape.draft) if a.ndim == 2 else a for a in record)
    new = rows_lib.NewRow(
      tokens,
      known,
      np.int32(request.prompt_end),
      np.int32(request.max_length),
      np.uint32(seed),
      np.uint32(request.digest),
      np.uint32(request.repetition),
      end_ids,
      record,
    )

    def program(net, statistics, state, row, new):
      return rows_lib.insert(net, statistics, state, shape, row, new)

    self._state = self._device.run(("insert",), program, self._state, np.int32(row), new)
    one, values = make_processor(settings.sampling), self._values
    for name in ("temperature", "top_p", "top_k", "greedy", "may_end"):
      values[name][row] = getattr(one, name)
    values["bias_id"][row], values["bias"][row] = -1, 0.0
    for i, (token, bias) in enumerate(settings.logit_bias):
      values["bias_id"][row, i], values["bias"][row, i] = token, bias

  def take_passes(self, rows: Sequence, table: np.ndarray, passes: int) -> None:
    """Some passes of the texts that have a row, one mode after another. rows: jobs, with `progress` once they are
    inserted; None: the row is free. passes: at most so many, but for windows of mode flow, which are taken to their
    end."""
    together: dict[tuple, list[int]] = {}
    for row, job in enumerate(rows):
      if job is not None and job.progress is not None:
        together.setdefault((job.settings.program, job.settings.threshold), []).append(row)
    for (each, threshold), numbers in together.items():
      mine = np.isin(np.arange(self._shape.rows), numbers)
      schedule, policy = self._schedules[each], self._drafts.get(each)
      if threshold is not None:
        schedule = self._schedule_of(each[0], threshold)
      index = self._index(numbers)
      if policy is None:
        self._pass(each, schedule, mine, table, passes, index)
        continue
      if policy.adapts:
        self.wait()  # for prompts that are still read: their time is not the rounds'
      size = self._size(index)
      drafting, rounds, budget = policy.choose(size, len(numbers))
      start, compiled_before = time.perf_counter(), self._device.compile_seconds
      found = self._pass(each, schedule, mine, table, min(rounds, passes), index, drafting, budget)
      steps.learn_from_rounds(self._device, policy, drafting, self._state, found, mine, size, start, compiled_before)

  def _indices(self) -> Iterator[np.ndarray | None]:
    """The rows of a pass of each size; None: all."""
    yield from (np.arange(size, dtype=np.int32) for size in self._shape.few)
    yield None

  def _size(self, index: np.ndarray | None) -> int:
    return self._shape.rows if index is None else len(index)

  def _index(self, numbers: list[int]) -> np.ndarray | None:
    """The rows of the smallest pass that has all these; None: all."""
    size = next((size for size in self._shape.few if size >= len(numbers)), None)
    if size is None:
      return None
    others = (row for row in range(self._shape.rows) if row not in numbers)
    return np.array(sorted([*numbers, *itertools.islice(others, size - len(numbers))]), np.int32)

  def _pass(self, each, schedule, mine, table, passes, index, drafting=None, budget=UNLIMITED):
    """Some passes of the rows `mine`, which are all among `index`; of mode verify, what `verify_rounds` gives beside
    the state."""
    sampling, infill = each
    suppressed, ends = self._ruled_out[infill]
    values = self._values if index is None else {name: value[index] for name, value in self._values.items()}
    processor = LogitsProcessor(**values, suppressed=suppressed, ends=ends, vocab_size=self._run.tokenizer.vocab_size)

    def program(net, statistics, state, mine, table, index, processor, schedule, passes, budget):
      def step(state):
        if sampling.mode == "verify":
          return speculative.verify_rounds(net, state, processor, drafting, passes, budget)
        if sampling.mode == "flow":
          return (modes.flow_window(net, statistics, state, schedule, processor),)
        if sampling.mode == "adaptive":
          one = lambda state: modes.adaptive_pass(net, statistics, state, schedule, processor, infill)
        else:
          one = lambda state: modes.ar_pass(net, state, processor)
        return (modes.run_passes(one, state, passes),)

      return rows_lib.take_passes(state, mine, table, index, step)

    args = mine, table, index, processor, schedule, np.int32(passes), budget
    self._state, *found = self._device.run(("passes", *each, drafting), program, self._state, *args)
    return found

  def wait(self) -> None:
    """Until all programs that were started are done."""
    jax.block_until_ready(self._state.length)

  def snapshot(self, traced: bool = False) -> Snapshot:
    """What the host sees of all rows; traced: with what traces show."""
    snapshot = Snapshot.select(self._state)
    return self._device.to_host(snapshot if traced else snapshot.without_traces())


def _widened(counts: np.ndarray, tokens: int) -> np.ndarray:
  """Counts of drafts (1 + MATCH, T) in a buffer of longer ones."""
  return np.pad(counts, [(0, 0), (0, tokens - counts.shape[1])])


def _named(sampling: Sampling, infill: bool) -> str:
  fields = [f"{name}={getattr(sampling, name)}" for name in _OF_MODES[sampling.mode]]
  return " ".join([f"mode={sampling.mode}", *fields, *(["infill"] if infill else [])])
