"""Passes over text: groups of files, each read by a thread of its own, and worked on by processes, in order."""

import collections
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
import signal
import threading
from typing import Any

from evo_jax.data import encoding, items, storage
from evo_jax.data.plan import Group
from evo_jax.data.workers import Workers
from evo_jax.errors import UserError

_THREADS = 16


class Passes:
  """Workers, and what has been read. A context manager.

  total: bytes of files, as they stand, in all passes. progress: is told how many have been read, and the total.
  """

  def __init__(self, encoder: encoding.Encoder, workers: int, total: int, progress: Callable[[int, int], None]):
    self.encoder, self._count, self._workers = encoder, workers, Workers(workers, encoder)
    self._total, self._progress = total, progress
    self._threads = 1
    self._done, self._lock, self._stop = 0, threading.Lock(), threading.Event()

  def __enter__(self) -> "Passes":
    self._workers.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._workers.__exit__(*error)

  def each(self, groups: list[Group], do: Callable[[Group], None]) -> None:
    """Calls `do` for each group, several at a time."""
    self._threads = max(1, min(len(groups), 1 + self._count // 4, _THREADS))
    # Ctrl-C is for this process: those that are started by a thread inherit what it blocks.
    block = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with futures.ThreadPoolExecutor(self._threads, initializer=block) as threads:
      running = [threads.submit(do, group) for group in groups]
      try:
        for future in futures.as_completed(running):
          future.result()
      except OSError as error:  # of the file system; most are named where they arise
        raise UserError(f"{getattr(error, 'filename', None) or 'temporary files'}: {storage.reason(error)}") from error
      except BrokenProcessPool as error:
        raise UserError("a worker was killed, or could not start; with too little memory use less --workers") from error
      finally:
        self._stop.set()
        for future in running:
          future.cancel()
    self._stop.clear()

  def submit(self, function: Callable, *args) -> Callable[[], Any]:
    """Lets a worker call a function of `encoding`; what waits for its result."""
    return self._workers.submit(function, *args)

  def read(self, group: Group) -> Iterator[items.Item]:
    """The items of a group. Raises CancelledError when another thread has failed."""
    before = 0

    def moved(position: int) -> None:
      nonlocal before
      self._move(position - before)
      before = position

    for item in items.read_items(list(group.files), self.encoder.field, self.encoder.tokenizer, moved):
      if self._stop.is_set():
        raise futures.CancelledError
      yield item
    moved(group.size)

  def results(
    self, some: Iterator[items.Item], submit: Callable[[items.Item], Callable[[], Any] | None]
  ) -> Iterator[tuple[items.Item, Any]]:
    """Items with what became of them, in order; as many are on their way as keep the workers busy."""
    waiting = collections.deque()
    for item in some:
      waiting.append((item, submit(item)))
      if len(waiting) > 2 * self._count // self._threads + 1:
        yield _result(*waiting.popleft())
    while waiting:
      yield _result(*waiting.popleft())

  def skip(self, group: Group) -> None:
    """Counts a group as read."""
    self._move(group.size)

  def _move(self, count: int) -> None:
    with self._lock:
      self._done += count
      self._progress(self._done, self._total)


def _result(item: items.Item, wait: Callable[[], Any] | None) -> tuple[items.Item, Any]:
  return item, wait() if wait else None
