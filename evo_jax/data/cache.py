"""The cache of text files as prepared data sets, shared by the processes of a machine."""

from collections.abc import Mapping
import contextlib
import fcntl
import hashlib
import os
from pathlib import Path
import sys

import numpy as np

from evo_jax.data import preparation, shards
from evo_jax.data.conversations import template_identity
from evo_jax.data.plan import Job, make_plan
from evo_jax.data.storage import Folder
from evo_jax.data.tokenizers import Tokenizer
from evo_jax.errors import UserError

_VERSION = 4  # to be raised when the same text would give other tokens
_LARGE = 1 << 26  # bytes of files; more are tokenized by several processes


def prepared(job: Job, tokenizer: Tokenizer, tokenizer_name: str, fields: Mapping[str, str]) -> str:
  """The folder with what a job gives, prepared now or before.

  It stands in $XDG_CACHE_HOME/evo_jax/tokens or ~/.cache/evo_jax/tokens, or, with one line on stderr, in memory where
  that cannot be used. It is made again where files are missing or cut off. Of several processes one prepares, and the
  others wait. fields: as for `make_plan`. Raises UserError as `preparation.prepare` does.
  """
  plan = make_plan(job, tokenizer.binary, str(_root()), fields)
  identity = f"{tokenizer_name} {tokenizer.identity} {template_identity(tokenizer)}"
  version = shards.version_of(tokenizer_name, job.chat)
  digest = hashlib.sha256(f"{_VERSION} {version} {job} {identity}".encode())
  for group in plan.groups:
    digest.update(os.fsencode("\n".join([group.name, group.rule, *group.versions()])))
  key = digest.hexdigest()[:32]
  workers = os.cpu_count() or 1 if plan.size > _LARGE else 1
  with _locked(key) as folder:
    if folder.exists(shards.MANIFEST):
      if _is_whole(folder):
        return folder.path
      folder.remove("")
    preparation.prepare(job, tokenizer, tokenizer_name, folder.path, workers)
    return folder.path


def _is_whole(folder: Folder) -> bool:
  try:
    return not shards.missing(folder.path, shards.read_manifest(folder.path))
  except UserError:  # a damaged manifest
    return False


class CachedStream:
  """A stream of tokens in the cache; where they are damaged, they will be made again."""

  def __init__(self, path: str, stream: shards.TokenStream):
    self._path, self._stream, self.length = path, stream, stream.length

  def read(self, start: int, count: int) -> np.ndarray:
    """As `shards.TokenStream.read`."""
    try:
      return self._stream.read(start, count)
    except UserError as error:
      with contextlib.suppress(UserError):
        Folder(self._path).remove(shards.MANIFEST)
      raise UserError(f"{error}; the same command tokenizes the text again") from error


def _root() -> Path:
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return Path(home) / "evo_jax" / "tokens"


@contextlib.contextmanager
def _locked(key: str):
  """The folder of a key, which other processes leave alone meanwhile."""
  root = _root()
  with contextlib.ExitStack() as stack:
    try:
      root.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context((root / f"{key}.lock").open("wb"))
      fcntl.flock(lock, fcntl.LOCK_EX)
      folder = Folder(str(root / key))
    except OSError as error:
      print(f"evo_jax: tokens are kept in memory: {root} cannot be used ({error.strerror or error})", file=sys.stderr)
      folder = Folder(f"memory://evo_jax/tokens/{key}")
    yield folder
