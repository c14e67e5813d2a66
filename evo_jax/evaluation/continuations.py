"""Bounds on -log p of continuations given their contexts, on any path that has windows (`prefix_trees`: by `ar`)."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import zlib

import jax
import numpy as np

from evo_jax.errors import UserError
from evo_jax.evaluation.batches import BatchScorer, Bound, Pair, power_of_two
from evo_jax.evaluation.paths import check_path
from evo_jax.flow import policies
from evo_jax.flow.bound import TextWindows, needs_own_text, windows_nll
from evo_jax.flow.schedules import Path
from evo_jax.parallel import sharding
from evo_jax.run import Run

_LENGTH_MULTIPLE = 128  # lengths of batches are rounded up, so that few programs are compiled
_PASSES = 64  # of a time grid; paths of fewer share compiled code
_FEW_WINDOWS = 4  # of a row; a batch of rows with more has fewer rows
_MOST_WINDOWS = 64  # of a row
_ROWS_ON_CPU = 4  # of each shard: the logits of more windows are in no cache, and a batch takes longer by a quarter
_PACK = 512, 16  # tokens and windows of a row at most, beyond those of one text


def parts(pair: Pair, size: int) -> list[Pair]:
  """A continuation in parts of `size` tokens, each behind those before it, whose bounds add up to its own."""
  context, continuation = pair
  starts = range(0, len(continuation), size)
  return [((*context, *continuation[:start]), continuation[start : start + size]) for start in starts]


def total(bounds: Sequence[Bound]) -> Bound:
  """The bound of a continuation from those of its parts, whose noise is independent."""
  errors = [bound.stderr for bound in bounds]
  return Bound(
    sum(bound.nats for bound in bounds),
    None if None in errors else math.hypot(*errors),
    all(bound.greedy for bound in bounds),
    sum(bound.passes for bound in bounds),
  )


@dataclasses.dataclass(frozen=True)
class _Window:
  """A window of a pair's continuation. pair: number; ids: of the pair; start, end: the window's among them."""

  pair: int
  ids: tuple[int, ...]
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class _Reading:
  """Windows that are told of by one reading of a text. Several of them make a row of a batch."""

  text: tuple[int, ...]
  windows: list[_Window]


def check_bound(path: Path, window: int, limit: int, run: Run) -> None:
  """Raises UserError for a path that does not exist, or that the model does not have; and for windows that
  continuations of `limit` tokens at most, with their contexts, do not have."""
  config = run.config
  check_path(path, config)
  if config.diffusion_alone:
    raise UserError("a model of diffusion alone has no windows behind a context, and no likelihoods of continuations")
  if not 0 < window < limit:
    raise UserError(f"window={window}: is not from 1 to {limit - 1}")
  policies.check_policy(path, window, run.model.rows, config)
  if policies.make_policy(path, window, config.paths.rolling_width, _PASSES) is None:
    raise UserError(f"path {path!r}: has no windows, and no bound but the likelihood itself")


class ContinuationScorer(BatchScorer):
  """Bounds by one path. A pair's noise depends on the seed and the pair alone, whatever else is asked for.

  A context is read once for all continuations of at most a window that follow it, and for all windows of a long one;
  several short ones are a row of a batch.
  """

  def __init__(
    self,
    run: Run,
    path: Path,
    draws: int = 1,
    seed: int = 0,
    window: int = 0,
    rows: int = 4,
    lengths: Sequence[int] = (),
  ):
    """Prepares the model.

    Args:
      draws: of the noise.
      window: tokens of a window; 0: as in training.
      rows: readings of a batch, at most.
      lengths: tokens to which batches are filled up, ascending, the last those of the longest pair; none: so far as
        each batch needs.

    Raises UserError for a path that does not exist, or that the model does not have.
    """
    super().__init__(run)
    config = run.config
    self.limit, self._lengths = min([*lengths[-1:], config.model.position_limit]), lengths
    self.size = window or config.window.size
    check_bound(path, self.size, self.limit, run)
    shards = sharding.batch_shards(self._mesh)
    if sharding.Layout.of(self._mesh).platform == "cpu":
      rows = min(rows, _ROWS_ON_CPU * shards)
    self.rows = -(-rows // shards) * shards
    self._policy = policies.make_policy(path, self.size, config.paths.rolling_width, _PASSES)
    self._program = self._make_program(seed, draws)

  def _make_program(self, seed: int, draws: int):
    loss = self._run.config.loss

    @functools.partial(jax.jit, out_shardings=sharding.replicated(self._mesh))
    def program(params, statistics, text, segments, anchor, tokens, count, digest, policy):
      net = self._network(params, text.shape[1], isolate_documents=True)
      keys = jax.vmap(jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number)))(digest)
      windows = TextWindows(anchor, tokens, count, keys)
      return windows_nll(
        net, statistics, text, segments, windows, policy, draws, loss.self_conditioning > 0, loss.chunk
      )

    return program

  def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Bound]]]:
    """Those of long rows come first."""
    self._check(pairs)
    found: dict[int, list[np.ndarray]] = {}
    for rows, count in self._batches_of_rows(pairs):
      arrays = self._stack(rows, self._rows_of(count), count)
      self._send(arrays)
      results = self._run_batch(arrays)
      done = []
      for number, part in _by_pair(rows, results):
        found.setdefault(number, []).append(part)
        if len(found[number]) * self.size >= len(pairs[number][1]):
          done.append(number)
      if done:
        yield done, [_bound(found.pop(number)) for number in done]

  def _batches_of_rows(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[list[_Reading]], int]]:
    """Rows whose windows, filled up to a power of 2, and lengths are similar, large ones first; and that power."""
    readings = self._share([reading for number, pair in enumerate(pairs) for reading in self._readings(number, pair)])
    rows = self._rows(sorted(readings, key=lambda reading: (-power_of_two(len(reading.windows)), -len(reading.text))))
    count = lambda row: power_of_two(sum(len(reading.windows) for reading in row))
    for windows, same in itertools.groupby(sorted(rows, key=count, reverse=True), count):
      while some := list(itertools.islice(same, self._rows_of(windows))):
        yield some, windows

  def _rows(self, readings: Sequence[_Reading]) -> list[list[_Reading]]:
    """Readings in rows, in their order. One that needs its own text has a row for itself."""
    rows: list[list[_Reading]] = []
    tokens, windows = 0, 0
    for reading in readings:
      tokens, windows = tokens + len(reading.text), windows + len(reading.windows)
      if rows and tokens <= min(_PACK[0], self.limit) and windows <= _PACK[1] and not needs_own_text(self._policy):
        rows[-1].append(reading)
      else:
        rows.append([reading])
        tokens, windows = len(reading.text), len(reading.windows)
    return rows

  def _rows_of(self, windows: int) -> int:
    """Rows of a batch, each of so many windows."""
    shards = sharding.batch_shards(self._mesh)
    return -(-max(self.rows * _FEW_WINDOWS // max(windows, _FEW_WINDOWS), 1) // shards) * shards

  def _readings(self, number: int, pair: Pair) -> Iterator[_Reading]:
    """Those of a pair alone, which have as few tokens as their windows allow."""
    ids, first, reach = (*pair[0], *pair[1]), len(pair[0]), _MOST_WINDOWS * self.size
    for begin in range(first, len(ids), reach):
      starts = range(begin, min(begin + reach, len(ids)), self.size)
      windows = [_Window(number, ids, start, min(start + self.size, len(ids))) for start in starts]
      last = windows[-1]
      yield _Reading(ids[: last.end if needs_own_text(self._policy) else last.start], windows)

  def _share(self, readings: list[_Reading]) -> list[_Reading]:
    """Without readings whose text another one continues, which gets their windows."""
    shared: list[_Reading] = []
    for reading in sorted(readings, key=lambda one: one.text, reverse=True):  # what continues a text comes before it
      last = shared[-1] if shared else None
      together = last is not None and len(last.windows) + len(reading.windows) <= _MOST_WINDOWS
      if together and last.text[: len(reading.text)] == reading.text:
        last.windows.extend(reading.windows)
      else:
        shared.append(reading)
    return shared

  def score_windows(self, pairs: Sequence[Pair], windows: int) -> list[list[Bound]]:
    """Bounds of each window of at most `rows` pairs, each of so many windows at most, by a reading for each pair: one
    program for each of the `lengths`, compiled at the first call. All processes call it with the same pairs."""
    rows = [[reading] for number, pair in enumerate(pairs) for reading in self._readings(number, pair)]
    found: list[list[Bound]] = [[] for _ in pairs]
    for number, part in _by_pair(rows, self._run_batch(self._stack(rows, self.rows, windows))):
      found[number].append(_bound([part]))
    return found

  def _stack(self, rows: Sequence[list[_Reading]], B: int, N: int) -> tuple[np.ndarray, ...]:
    """Arrays of B rows with N windows each: text and segments, which tell a row's texts apart, (B, T), anchor (B, N),
    tokens (B, N, W), count (B, N), int32, and digest (B, N) uint32."""
    longest = max(sum(len(reading.text) for reading in row) for row in rows)
    length = next((length for length in self._lengths if length >= longest), longest)
    if needs_own_text(self._policy):
      length += self.size
    text, segments = np.zeros((2, B, -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE), np.int32)
    anchor, count, digest = np.zeros((B, N), np.int32), np.zeros((B, N), np.int32), np.zeros((B, N), np.uint32)
    tokens = np.zeros((B, N, self.size), np.int32)
    for i, row in enumerate(rows):
      begin, j = 0, 0
      for number, reading in enumerate(row):
        end = begin + len(reading.text)
        text[i, begin:end], segments[i, begin:] = reading.text, number
        for window in reading.windows:
          ids = np.array(window.ids[: window.end], "<i4")
          anchor[i, j], count[i, j] = begin + window.start - 1, window.end - window.start
          tokens[i, j, : count[i, j]] = ids[window.start :]
          digest[i, j] = zlib.crc32(ids.tobytes(), window.start)
          j += 1
        begin = end
    return text, segments, anchor, tokens, count, digest

  def _run_batch(self, batch: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return self._run_program(self._program, batch, self._policy)


def _by_pair(rows: list[list[_Reading]], results: tuple[np.ndarray, ...]) -> Iterator[tuple[int, list[np.ndarray]]]:
  """Numbers of pairs, and what a window of theirs has: nats, greedy and passes (draws,) each."""
  for i, row in enumerate(rows):
    for j, window in enumerate(itertools.chain.from_iterable(reading.windows for reading in row)):
      yield window.pair, [a[:, i, j] for a in results]


def _bound(found: list[list[np.ndarray]]) -> Bound:
  """Of a continuation, from what its windows have: nats, greedy and passes (draws,) each."""
  nats, greedy, passes = (np.stack(arrays) for arrays in zip(*found))
  nats, n = nats.sum(axis=0, dtype=np.float64), nats.shape[1]
  stderr = float(np.std(nats, ddof=1) / np.sqrt(n)) if n > 1 else None
  return Bound(float(nats.mean()), stderr, bool(greedy[:, 0].all()), float(passes.sum(axis=0).mean()))
