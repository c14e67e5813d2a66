"""Scores of continuations given their contexts, in batches over a mesh: what all scorers share."""

import abc
from collections.abc import Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from evo_jax.errors import UserError
from evo_jax.parallel import distributed, sharding
from evo_jax.run import Run

_QUERIES = (128, 512)  # whose attention scores are in memory at a time, from and to; a quarter of the slots between

Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Bound:
  """What a path says of a continuation. nats: a bound on -log p, the mean over the draws of the noise; by
  autoregression -log p itself. stderr: its standard error, None for a single draw. greedy: whether, in the first draw,
  every token was the most probable one when it became known. passes: of a draw, in the mean."""

  nats: float
  stderr: float | None
  greedy: bool
  passes: float

  @property
  def total(self) -> float:
    """The bound on the log-likelihood in nats."""
    return -self.nats


def power_of_two(count: int) -> int:
  """The smallest power of 2 that is no less."""
  return 1 << (count - 1).bit_length()


class BatchScorer(abc.ABC):
  """Pairs of a context and its continuation, both as ids, a context with its first token at position 0.

  In a run of several processes each makes it; number 0 calls it and then `close`, the others call `follow`.

  limit: tokens of the longest pair. compile_seconds: what compiling programs has taken so far.
  """

  limit: int

  def __init__(self, run: Run, stacked: bool = True):
    """stacked: whether layers stay stacked; else there is a copy of the parameters with layers by themselves."""
    self._mesh, self._compiled, self._stacked = run.mesh, {}, stacked
    self.compile_seconds = 0.0
    self._run = run if stacked else dataclasses.replace(run, params=run.unstacked_params(self._mesh))

  def _network(self, params: Any, slots: int, **config: Any) -> Any:
    """The network that reads clean streams of so many slots. config: fields of its configuration that differ."""
    block = min(max(slots // 4, _QUERIES[0]), _QUERIES[1])
    changed = dataclasses.replace(self._run.model.config, attention_block=block, **config)
    layout = sharding.Layout.of(self._mesh)
    model = self._run.model.clone(config=changed, layout=layout, stacked=self._stacked)
    return model.bind({"params": params})

  def __call__(self, pairs: Sequence[Pair]) -> list[Bound]:
    """The bounds of continuations given their contexts. Raises UserError as `batches`."""
    found: list[Bound | None] = [None] * len(pairs)
    for numbers, bounds in self.batches(pairs):
      for number, bound in zip(numbers, bounds):
        found[number] = bound
    return found

  @abc.abstractmethod
  def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Bound]]]:
    """The same as it comes: numbers of some pairs and their bounds. Raises UserError for a pair that is empty, or
    longer than `limit`."""

  def _check(self, pairs: Sequence[Pair]) -> None:
    for context, continuation in pairs:
      if not len(context) or not len(continuation) or len(context) + len(continuation) > self.limit:
        raise UserError(
          f"{len(context)} tokens and {len(continuation)} to be scored: both must have some, and together at most "
          f"{self.limit}"
        )

  @property
  def compilations(self) -> int:
    """Programs that were compiled so far."""
    return len(self._compiled)

  def follow(self) -> None:
    """In a process that asks for nothing: returns when process 0 has called `close`."""
    while (batch := distributed.broadcast(None)) is not None:
      self._run_batch(batch)

  def close(self) -> None:
    """Lets the other processes go."""
    self._send(None)

  def _send(self, batch: Any) -> None:
    if jax.process_count() > 1:
      distributed.broadcast(batch)

  @abc.abstractmethod
  def _run_batch(self, batch: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """The results of a batch's arrays, in all processes."""

  def _run_program(self, program: Any, batch: tuple[np.ndarray, ...], *args: Any) -> tuple[np.ndarray, ...]:
    """program(params, statistics, *batch, *args) on the host, compiled once for each shapes of the batch, whose arrays
    are sharded by their first axis. program: jitted, with results on all devices."""
    rows = sharding.batch_sharding(self._mesh)
    placed = [jax.make_array_from_callback(x.shape, rows, lambda index, x=x: x[index]) for x in batch]
    args = (self._run.params, self._run.statistics, *placed, *args)
    with jax.set_mesh(self._mesh):
      if (key := tuple(x.shape for x in batch)) not in self._compiled:
        start = time.perf_counter()
        self._compiled[key] = program.lower(*args).compile()
        self.compile_seconds += time.perf_counter() - start
      return jax.device_get(self._compiled[key](*args))
