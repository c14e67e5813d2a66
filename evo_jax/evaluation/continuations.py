"""Bounds on -log p of continuations given their contexts, on any path."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any
import zlib

import jax
import numpy as np

from evo_jax.errors import UserError
from evo_jax.evaluation.paths import check_path
from evo_jax.flow import policies
from evo_jax.flow.bound import continuation_nll
from evo_jax.flow.schedules import Path
from evo_jax.parallel import distributed, sharding
from evo_jax.run import Run

_LENGTH_MULTIPLE = 128  # lengths of batches are rounded up, so that few programs are compiled
_PASSES = 64  # of a time grid; paths of fewer share compiled code
_FEW_WINDOWS = 4  # of a pair; a batch of pairs with more has fewer pairs

Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Bound:
  """What a path says of a continuation. nats: a bound on -log p, the mean over the draws of the noise; stderr: its
  standard error, None for a single draw. greedy: whether, in the first draw, every token was the most probable one
  when it became known. passes: of a draw, in the mean."""

  nats: float
  stderr: float | None
  greedy: bool
  passes: float

  @property
  def total(self) -> float:
    """The bound on the log-likelihood in nats."""
    return -self.nats


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


class ContinuationScorer:
  """Bounds by one path. A pair's noise depends on the seed and the pair alone, whatever else is asked for.

  In a run of several processes each makes it; number 0 calls it and then `close`, the others call `follow`.
  """

  def __init__(
    self, run: Run, path: Path, draws: int = 1, seed: int = 0, window: int = 0, rows: int = 4, length: int = 0
  ):
    """Prepares the model.

    Args:
      draws: of the noise.
      window: tokens of a window; 0: as in training.
      rows: pairs of a batch, at most.
      length: tokens of the longest pair, to which all batches are filled up; 0: so far as each batch needs.

    Raises UserError for a path that does not exist, or that the model does not have.
    """
    config, mesh = run.config, run.mesh
    check_path(path, config)
    if config.diffusion_alone:
      raise UserError("a model of diffusion alone has no windows behind a context, and no likelihoods of continuations")
    self.limit, self._length = min(length or config.model.position_limit, config.model.position_limit), length
    self.size = window or config.window.size
    if not 0 < self.size < self.limit:
      raise UserError(f"window={window}: is not from 1 to {self.limit - 1}")
    self._run, self._mesh = run, mesh
    shards = sharding.batch_shards(mesh)
    self.rows = -(-rows // shards) * shards
    policies.check_policy(path, self.size, run.model.rows, config)
    self._policy = policies.make_policy(path, self.size, config.paths.rolling_width, _PASSES)
    self._program = self._make_program(seed, 1 if self._policy is None else draws)
    self._compiled: dict[tuple, Any] = {}

  def _make_program(self, seed: int, draws: int):
    config, size = self._run.config, self.size
    model = self._run.model.clone(layout=sharding.Layout.of(self._mesh))

    @functools.partial(jax.jit, static_argnames="windows", out_shardings=sharding.replicated(self._mesh))
    def program(params, statistics, tokens, begin, end, digest, policy, windows):
      net, conditioned = model.bind({"params": params}), config.loss.self_conditioning > 0
      keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(digest)
      return continuation_nll(
        net, statistics, tokens, begin, end, keys, policy, size, windows, draws, conditioned, config.loss.chunk
      )

    return program

  def __call__(self, pairs: Sequence[Pair]) -> list[Bound]:
    """The bounds of continuations given their contexts, both as ids, a context with its first token at position 0."""
    found: list[Bound | None] = [None] * len(pairs)
    for numbers, bounds in self.batches(pairs):
      for number, bound in zip(numbers, bounds):
        found[number] = bound
    return found

  def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Bound]]]:
    """The same as it comes: numbers of some pairs of similar length, long ones first, and their bounds. Raises
    UserError for a pair that is empty, or longer than the model can read."""
    for context, continuation in pairs:
      if not len(context) or not len(continuation) or len(context) + len(continuation) > self.limit:
        raise UserError(
          f"{len(context)} tokens and {len(continuation)} to be scored: both must have some, and together at most "
          f"{self.limit}"
        )
    windows = [1 << (-(-len(continuation) // self.size) - 1).bit_length() for _, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (-windows[i], -len(pairs[i][0]) - len(pairs[i][1])))
    for count, same in itertools.groupby(order, windows.__getitem__):
      shards = sharding.batch_shards(self._mesh)
      rows = -(-max(self.rows * _FEW_WINDOWS // max(count, _FEW_WINDOWS), 1) // shards) * shards
      while numbers := list(itertools.islice(same, rows)):
        arrays = self._pack([pairs[i] for i in numbers], rows, count)
        self._send((arrays, count))
        found = self._run_batch(arrays, count)
        yield numbers, [_bound(*(a[:, i] for a in found)) for i in range(len(numbers))]

  def score_windows(self, pairs: Sequence[Pair]) -> list[Bound]:
    """Bounds of at most `rows` pairs whose continuations are windows at most, by one program, compiled at the first
    call. All processes call it with the same pairs."""
    found = self._run_batch(self._pack(pairs, self.rows, 1), 1)
    return [_bound(*(a[:, i] for a in found)) for i in range(len(pairs))]

  @property
  def compilations(self) -> int:
    """Programs that were compiled so far."""
    return len(self._compiled)

  def follow(self) -> None:
    """In a process that asks for nothing: returns when process 0 has called `close`."""
    while (batch := distributed.broadcast(None)) is not None:
      self._run_batch(*batch)

  def close(self) -> None:
    """Lets the other processes go."""
    self._send(None)

  def _pack(self, pairs: list[Pair], B: int, windows: int) -> tuple[np.ndarray, ...]:
    """tokens (B, T), begin, end (B,) int32 and digest (B,) uint32 of a batch with so many windows."""
    longest = max(len(context) + max(len(continuation), windows * self.size) for context, continuation in pairs)
    longest = max(longest, self._length + windows * self.size if self._length else 0)
    tokens = np.zeros((B, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE), np.int32)
    begin, end, digest = np.ones(B, np.int32), np.ones(B, np.int32), np.zeros(B, np.uint32)
    for i, (context, continuation) in enumerate(pairs):
      ids = np.array([*context, *continuation], np.int32)
      tokens[i, : len(ids)] = ids
      begin[i], end[i] = len(context), len(ids)
      digest[i] = zlib.crc32(ids.astype("<i4").tobytes(), len(context))
    return tokens, begin, end, digest

  def _run_batch(self, arrays: tuple[np.ndarray, ...], windows: int) -> tuple[np.ndarray, ...]:
    rows = sharding.batch_sharding(self._mesh)
    placed = [jax.make_array_from_callback(x.shape, rows, lambda index, x=x: x[index]) for x in arrays]
    args = (self._run.params, self._run.statistics, *placed, self._policy)
    with jax.set_mesh(self._mesh):
      if (key := (placed[0].shape, windows)) not in self._compiled:
        self._compiled[key] = self._program.lower(*args, windows=windows).compile()
      return jax.device_get(self._compiled[key](*args))

  def _send(self, batch: Any) -> None:
    if jax.process_count() > 1:
      distributed.broadcast(batch)


def _bound(nats: np.ndarray, greedy: np.ndarray, passes: np.ndarray) -> Bound:
  n = len(nats)
  stderr = float(np.std(nats, ddof=1, dtype=np.float64) / np.sqrt(n)) if n > 1 else None
  return Bound(float(np.mean(nats, dtype=np.float64)), stderr, bool(greedy[0]), float(passes.mean()))
