"""Files of a folder on a local disk or in a bucket: read whole or by byte ranges, written so that they are complete."""

from collections.abc import Iterator
import contextlib
import os
import tempfile
from typing import BinaryIO
import uuid

import fsspec
from fsspec.implementations.local import LocalFileSystem

from evo_jax.errors import UserError

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
  return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


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
    with self._errors(name, "read"):
      return self._files.cat_file(self._at(name))

  def read_all(self, names: list[str]) -> list[bytes]:
    """Whole files, small ones, whose names are sorted; those of a bucket side by side."""
    if not names:
      return []
    with self._errors(names[0], "read"):
      if self.local:
        return [self._files.cat_file(self._at(name)) for name in names]
      found = self._files.cat([self._at(name) for name in names])  # in a bucket, without regard to order
      return [found[name] for name in sorted(found)] if isinstance(found, dict) else [found]

  def read_range(self, name: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, fewer where it ends before."""
    with self._errors(name, "read"):
      if not self.local:
        return self._files.cat_file(self._at(name), start, stop)
      file = os.open(self._at(name), os.O_RDONLY)
      try:
        return os.pread(file, stop - start, start)
      finally:
        os.close(file)

  def size(self, name: str) -> int:
    """Bytes of a file."""
    with self._errors(name, "read"):
      return int(self._files.info(self._at(name))["size"])

  def exists(self, name: str) -> bool:
    with self._errors(name, "read"):
      return self._files.exists(self._at(name))

  def names(self, below: str = "") -> list[str]:
    """The sorted names of the files in the folder `below`, with it in front; none where there is no such folder."""
    try:
      with self._errors(below, "read"):
        self._files.invalidate_cache()
        found = self._files.ls(self._at(below).rstrip("/"), detail=True)
    except FileNotFoundError:
      return []
    files = sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")
    return [f"{below}/{name}" if below else name for name in files]

  @contextlib.contextmanager
  def write(self, name: str) -> Iterator[BinaryIO]:
    """A stream to a file that appears, or replaces another, once the stream is closed without an error."""
    path = self._at(name)
    with self._errors(name, "written"), contextlib.ExitStack() as stack:
      if self.local:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex}")
      else:
        temporary = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "file")
      stack.callback(_unlink, temporary)
      with open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      if self.local:
        os.replace(temporary, path)
      else:
        self._files.put_file(temporary, path)

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
    with self._errors(name, "removed"), contextlib.suppress(FileNotFoundError):
      self._files.rm(self._at(name), recursive=True)

  def _at(self, name: str) -> str:
    return f"{self._root.rstrip('/')}/{name}"

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


def _unlink(file: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(file)
