"""Files of a folder on a local disk or in a bucket: read whole or by byte ranges, written so that they are complete.

What a bucket does not answer, or answers with an error that may pass, is tried again, with growing pauses.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO
import uuid

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from evo_jax.errors import UserError

SILENCE = 60.0  # seconds without an answer, after which a bucket is asked again
PATIENCE = 60.0  # seconds for which it is asked again where a command can start anew
LONG_PATIENCE = 900.0  # the same in the middle of training
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds
leaving = threading.Event()  # whether the command ends, and threads that wait for a bucket must not hold it up
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hub"}


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of a path or URL, and the path in it. Raises UserError for one that is unknown or not installed."""
  protocol = url.split("://", 1)[0] if "://" in url else ""
  try:
    if not protocol:
      return LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    return fsspec.core.url_to_fs(url)
  except ImportError as error:
    extra = _EXTRAS.get(protocol)
    hint = f"pip install 'evo_jax[{extra}]'" if extra else str(error)
    raise UserError(f"{url}: {protocol}:// needs a library that is not installed: {hint}") from error
  except Exception as error:  # an unknown protocol; libraries for buckets raise others, too
    raise UserError(f"{url}: cannot be opened: {reason(error)}") from error


def reason(error: BaseException) -> str:
  """Why a file operation failed, in one line."""
  text = str(getattr(error, "strerror", None) or error) or type(error).__name__
  return f"no answer for {SILENCE:.0f} s" if isinstance(error, FSTimeoutError) else " ".join(text.split())


def unwritable(path: str) -> str | None:
  """Why a local file could not be written, as far as that shows before; None: it can. Changes nothing."""
  folder = os.path.dirname(os.path.realpath(path))  # a link may lead into another one
  if not os.path.isdir(folder):
    return f"there is no folder {folder}"
  if os.path.isdir(path):
    return "is a folder"
  if not os.access(path if os.path.exists(path) else folder, os.W_OK):
    return "cannot be written: permission denied"
  return None


class Folder:
  """A folder, given by its path or URL. Names of files are relative to it, with slashes.

  Reading raises FileNotFoundError where there is no such file, everything else that fails UserError, which names it.
  """

  def __init__(self, path: str):
    self.path = str(path)
    self._files, self._root = open_filesystem(self.path)
    self.local = isinstance(self._files, LocalFileSystem)

  def shown(self, name: str) -> str:
    """The path or URL of a file."""
    return f"{self.path.rstrip('/')}/{name}"

  def read(self, name: str) -> bytes:
    """A whole file."""
    return self._call(name, "read", "cat_file", self._at(name))

  def read_all(self, names: list[str]) -> list[bytes]:
    """Whole files, small ones, whose names are sorted; those of a bucket side by side."""
    if self.local or not names:
      return [self.read(name) for name in names]
    found = self._call(names[0], "read", "cat", [self._at(name) for name in names])  # without regard to order
    return [found[name] for name in sorted(found)] if isinstance(found, dict) else [found]

  def read_range(self, name: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, fewer where it ends before."""
    if not self.local:
      return self._call(name, "read", "cat_file", self._at(name), start, stop, patience=LONG_PATIENCE)
    with self._errors(name, "read"):
      file = os.open(self._at(name), os.O_RDONLY)
      try:
        return os.pread(file, stop - start, start)
      finally:
        os.close(file)

  def size(self, name: str) -> int:
    """Bytes of a file."""
    return int(self._call(name, "read", "info", self._at(name))["size"])

  def exists(self, name: str) -> bool:
    return self._call(name, "read", "exists", self._at(name))

  def names(self, below: str = "") -> list[str]:
    """The sorted names of the files in the folder `below`, with it in front; none where there is no such folder."""
    try:
      self._files.invalidate_cache()
      found = self._call(below, "read", "ls", self._at(below).rstrip("/"), detail=True)
    except FileNotFoundError:
      return []
    files = sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")
    return [f"{below}/{name}" if below else name for name in files]

  @contextlib.contextmanager
  def write(self, name: str) -> Iterator[BinaryIO]:
    """A stream to a file that appears, or replaces another, once the stream is closed without an error.

    What was written to it can be read and changed meanwhile.
    """
    path = self._at(name)
    with self._errors(name, "written"), contextlib.ExitStack() as stack:
      if self.local:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex}")
      else:
        temporary = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "file")
      stack.callback(_unlink, temporary)
      with open(temporary, "x+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      if self.local:
        os.replace(temporary, path)
      else:
        self._call(name, "written", "put_file", temporary, path)

  def write_all(self, name: str, content: bytes) -> None:
    with self.write(name) as file:
      file.write(content)

  def scratch(self) -> str | None:
    """A local folder for temporary files: this one, or None for the system's."""
    if self.local:
      os.makedirs(self._root, exist_ok=True)
    return self._root if self.local else None

  def remove(self, name: str) -> None:
    """Removes a file or a folder with all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
      self._call(name, "removed", "rm", self._at(name), recursive=True)

  def _at(self, name: str) -> str:
    return f"{self._root.rstrip('/')}/{name}"

  def _call(self, name: str, what: str, operation: str, *args, patience: float = PATIENCE, **kwargs) -> Any:
    """An operation of the file system on a file; again and again while a bucket fails, for `patience` seconds."""
    began, pause = time.monotonic(), _FIRST_PAUSE
    while True:
      try:
        return self._operation(operation)(*args, **kwargs)
      except (UserError, FileNotFoundError):
        raise
      except Exception as error:  # OSError; libraries for buckets raise others, too
        ends = leaving.is_set() or time.monotonic() + pause > began + patience
        if self.local or ends or not _may_pass(error):
          tried = f" (tried for {time.monotonic() - began:,.0f} s)" if pause > _FIRST_PAUSE else ""
          raise UserError(f"{self.shown(name)}: cannot be {what}: {reason(error)}{tried}") from error
        if pause > _FIRST_PAUSE:
          _warn(f"{self.shown(name)}: cannot be {what} yet: {reason(error)}; is tried again")
      leaving.wait(pause * random.uniform(0.5, 1.0))  # readers that failed together do not come back together
      pause = min(2 * pause, _LONGEST_PAUSE)

  def _operation(self, name: str) -> Callable:
    """A method of the file system; one that reads gives up after some seconds of silence."""
    if isinstance(self._files, AsyncFileSystem) and name in ("cat_file", "info", "exists"):
      coroutine = getattr(self._files, f"_{name}")
      return lambda *args, **kwargs: fsspec.asyn.sync(self._files.loop, coroutine, *args, timeout=SILENCE, **kwargs)
    return getattr(self._files, name)

  @contextlib.contextmanager
  def _errors(self, name: str, what: str) -> Iterator[None]:
    try:
      yield
    except UserError:
      raise
    except OSError as error:
      if isinstance(error, FileNotFoundError) and what == "read":
        raise
      raise UserError(f"{self.shown(name)}: cannot be {what}: {reason(error)}") from error


def _may_pass(error: Exception) -> bool:
  """Whether what failed may succeed a moment later: not what is forbidden, or a wrong request."""
  lasting = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, ValueError, TypeError)
  if isinstance(error, lasting):
    return False
  status = str(getattr(error, "status", None) or getattr(error, "code", None) or "")
  if status.startswith("4"):
    return status in ("408", "425", "429")
  return not str(error).startswith("Forbidden")  # of gcsfs


_warned, _warning = -1e9, threading.Lock()


def _warn(text: str) -> None:
  """Prints a warning, at most one a minute: many readers fail together."""
  global _warned
  with _warning:
    if time.monotonic() - _warned > 60:
      _warned = time.monotonic()
      print(f"evo_jax: warning: {text}", file=sys.stderr, flush=True)


def _unlink(file: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(file)
