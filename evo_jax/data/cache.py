"""The cache of tokenized text: arrays on disk, memory-mapped, checked whenever they are read, mended if damaged."""

from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import sys
from typing import BinaryIO
import uuid

import numpy as np

SPLITS = ("train", "valid", "test")
_META = "meta.json"


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The streams of a source. by_split: each (n,) unsigned ints. report: of the documents that were skipped."""

  by_split: dict[str, np.ndarray]
  report: str
  fingerprint: str  # of all tokens

  @classmethod
  def of(cls, by_split: dict[str, np.ndarray], report: str = "") -> "Tokens":
    """With the fingerprint that the tokens have."""
    digest = hashlib.sha256()
    for split in SPLITS:
      digest.update(np.ascontiguousarray(by_split[split]).data)
    return cls(by_split, report, digest.hexdigest()[:16])


class Cache:
  """Tokens by key, in $XDG_CACHE_HOME/evo_jax/tokens or ~/.cache/evo_jax/tokens."""

  def __init__(self):
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    self._root = Path(home) / "evo_jax" / "tokens"
    self._failed = False

  def read(self, key: str) -> Tokens | None:
    """What was written under `key`, memory-mapped; None where there is nothing, or not what was written."""
    folder = self._root / key
    try:
      meta = json.loads((folder / _META).read_text())
      by_split = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
      tokens = Tokens.of(by_split, str(meta["report"]))
    except Exception:  # NumPy raises nearly anything on damaged files
      return None
    sound = all(tokens.ndim == 1 and tokens.dtype.kind == "u" for tokens in by_split.values())
    return tokens if sound and tokens.fingerprint == meta["fingerprint"] else None

  def write(self, key: str, tokens: Tokens) -> Tokens:
    """Writes tokens and returns them memory-mapped, or as they are, with one line on stderr, if that is impossible.

    Each file is replaced in one go: processes that write the same at once write the same bytes, and arrays that others
    have mapped stay valid.
    """
    folder = self._root / key
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for split in SPLITS:
        _replace(folder / f"{split}.npy", lambda file, split=split: np.save(file, tokens.by_split[split]))
      meta = json.dumps({"fingerprint": tokens.fingerprint, "report": tokens.report}).encode()
      _replace(folder / _META, lambda file: file.write(meta))
    except OSError as error:
      if not self._failed:
        print(
          f"evo_jax: tokens are kept in memory: {self._root} cannot be used ({error.strerror or error})",
          file=sys.stderr,
        )
      self._failed = True
    return self.read(key) or tokens


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
  """Writes a file beside `path` and renames it: whatever happens, `path` is complete, or as it was."""
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    with temporary.open("xb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise
