"""Answers kept one by one, so that an evaluation that was killed goes on behind the last of them."""

import contextlib
import fcntl
import hashlib
import json
import os
from typing import Any

from evo_jax.errors import UserError


def digest(value: Any) -> str:
  """Names a value of JSON by its content."""
  return hashlib.sha256(
    json.dumps(value, ensure_ascii=False, sort_keys=True).encode(errors="surrogatepass")
  ).hexdigest()


def make_folder(folder: str) -> str:
  """The folder's path, once it is there and can be written to. Raises UserError."""
  path = os.path.expanduser(folder)
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={folder}: cannot be made: {error.strerror}") from error
  if not os.access(path, os.W_OK):
    raise UserError(f"--output={folder}: cannot be written: permission denied")
  return path


class KeptAnswers:
  """Answers of one model with one set of settings, in a file of its own: other settings never meet.

  The file's first line has the settings; each other one the key and the value of an answer. What a killed process left
  of a line is cut off.
  """

  def __init__(self, folder: str | None, kind: str, settings: dict[str, Any]):
    """folder: None: nothing is kept. Raises UserError where the file cannot be written, or another process has it."""
    self._answers: dict[str, Any] = {}
    self._file = None
    if folder is None:
      return
    settings = json.loads(json.dumps(settings))
    path = os.path.join(make_folder(folder), f"{kind}-{digest(settings)[:16]}.jsonl")
    try:
      self._file = open(path, "a+b")  # noqa: SIM115
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f"{path}: another process is writing there") from error
    except OSError as error:
      raise UserError(f"--output={folder}: cannot be written: {error.strerror}") from error
    self._read(path, settings)

  def _read(self, path: str, settings: dict[str, Any]) -> None:
    self._file.seek(0)
    data = self._file.read()
    whole = data.rpartition(b"\n")[0] + b"\n" if b"\n" in data else b""
    self._file.truncate(len(whole))
    lines = whole.splitlines()
    if not lines:
      self._write(settings)
      return
    try:
      if json.loads(lines[0]) != settings:
        raise UserError(f"{path}: is of other settings")
      for line in lines[1:]:
        answer = json.loads(line)
        self._answers[answer["key"]] = answer["value"]
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path}: is damaged; remove it, and its answers are found again") from error

  def __contains__(self, key: str) -> bool:
    return key in self._answers

  def __getitem__(self, key: str) -> Any:
    return self._answers[key]

  def add(self, key: str, value: Any) -> None:
    self._answers[key] = value
    if self._file is not None:
      self._write({"key": key, "value": value})

  def _write(self, line: dict[str, Any]) -> None:
    self._file.write(json.dumps(line).encode() + b"\n")
    self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None
