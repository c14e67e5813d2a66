"""Files of a work directory: written whole or not at all, and set aside where they would be lost."""

import contextlib
import json
import os
from typing import Any

from etils import epath

from evo_jax.errors import UserError


def is_local(path: epath.Path) -> bool:
  """Whether the operating system knows the file or folder, on a shared disk or not: it is not in a bucket."""
  return "://" not in str(path)


def write_file(path: epath.Path, data: bytes) -> None:
  """Writes a temporary file, then renames it: a reader never sees a partial one, whenever this process is killed. In a
  bucket every file appears as a whole.

  Raises UserError if it cannot be written; what was there before is then left.
  """
  temporary = path.parent / f".{path.name}.tmp"
  try:
    if not is_local(path):
      path.write_bytes(data)
      return
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      if is_local(path):
        temporary.unlink(missing_ok=True)
    raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: epath.Path, value: Any) -> None:
  """As `write_file`."""
  write_file(path, json.dumps(value, indent=2).encode() + b"\n")


def place_aside(workdir: epath.Path, name: str) -> epath.Path:
  """A free path in the folder `damaged`, for what would be lost otherwise: NAME, or NAME-1, NAME-2, ...

  Raises UserError if there can be no such folder.
  """
  folder = workdir / "damaged"
  try:
    folder.mkdir(exist_ok=True)
  except OSError as error:
    raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from error
  names = (f"{name}{f'-{i}' if i else ''}" for i in range(10**6))
  return next(path for n in names if not (path := folder / n).exists())
