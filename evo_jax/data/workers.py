"""Worker processes that call functions of `encoding` side by side.

Arguments and results are pickled into files: blocks and tokens take a third of the CPU time that they take in pipes.
"""

from collections.abc import Callable
from concurrent import futures
import itertools
import multiprocessing
from multiprocessing import connection
import os
import pickle
import shutil
import tempfile
import threading
from typing import Any

from evo_jax.data.encoding import Encoder


class Workers:
  """`count` processes, or this one for 1. A context manager.

  encoder: what the functions get in front of their arguments.
  """

  def __init__(self, count: int, encoder: Encoder):
    self._encoder, self._count, self._numbers = encoder, count, itertools.count()
    self._pool, self._folder = None, ""

  def __enter__(self) -> "Workers":
    if self._count > 1:
      self._folder = tempfile.mkdtemp(prefix="evo_jax-")
      # Not forked: this process has threads, of JAX and others.
      processes = multiprocessing.get_context("spawn")
      self._pool = futures.ProcessPoolExecutor(self._count, processes, _start, (self._encoder, self._folder))
    return self

  def __exit__(self, *error) -> None:
    if self._pool:
      self._pool.shutdown(cancel_futures=True)
      shutil.rmtree(self._folder, ignore_errors=True)

  def submit(self, function: Callable, *args) -> Callable[[], Any]:
    """Begins function(encoder, *args). Returns what waits for its result, and raises what it raised."""
    if self._pool is None:
      result = function(self._encoder, *args)
      return lambda: result
    file = os.path.join(self._folder, str(next(self._numbers)))
    _write((function, args), file)
    future = self._pool.submit(_call, file)

    def result() -> Any:
      future.result()
      return _take(file)

    return result


def _write(value: Any, file: str) -> None:
  with open(file, "wb") as stream:
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)


def _take(file: str) -> Any:
  """What a file holds, which is removed."""
  with open(file, "rb") as stream:
    value = pickle.load(stream)
  os.unlink(file)
  return value


_ENCODER: Encoder | None = None  # of a worker process


def _start(encoder: Encoder, folder: str) -> None:
  global _ENCODER
  _ENCODER = encoder
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()


def _end_with_parent(folder: str) -> None:
  """Ends this process when the one that started it is gone, however it ended, and removes what it has left."""
  connection.wait([multiprocessing.parent_process().sentinel])
  shutil.rmtree(folder, ignore_errors=True)
  os._exit(1)


def _call(file: str) -> None:
  """Lets a file with a function and arguments hold the result."""
  function, args = _take(file)
  _write(function(_ENCODER, *args), file)
