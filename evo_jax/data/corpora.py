"""Text to batches: files, documents, tokens, splits, and the resumable stream of training sequences (grain).

A source is a glob of text files (or "stdlib": Python's own standard library). Its documents (a file, or a line of a
.jsonl file) are tokenized once, into arrays that are cached on disk and memory-mapped, so that threads and processes
of a machine share one copy. Held-out text: of 20 documents or more, in sorted order, numbers 9, 29, 49, ... are for
validation and 19, 39, 59, ... for testing; of fewer documents, each gives its last 10 %, half for each.

A training sequence is the document token and then `context` tokens from a random place of the stream of documents, in
which a document token stands after each. Every place is drawn once before one is drawn again.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
import sys
import tempfile

import numpy as np

from evo_jax.data import documents as documents_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError

SPLITS = ("train", "valid", "test")
_HOLDOUT = 20  # one document in so many is for validation, one for testing
_CACHE_VERSION = 1  # of the tokens on disk; count it up when the same text would give other tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The tokens of one source by split, each (n,) unsigned ints, memory-mapped where they could be cached."""

  name: str
  tokens: dict[str, np.ndarray]
  fingerprint: str  # of all tokens


def load_corpora(path: str, tokenizer: tokenizers.Tokenizer, field: str = "config.data.path") -> list[Corpus]:
  """The corpora of comma-separated sources, tokenized or from the cache."""
  if not path.strip():
    raise UserError(f"{field}: is empty; give globs of text files, as in 'dir/*.txt'")
  return [_load_source(pattern.strip(), tokenizer, field) for pattern in path.split(",")]


def _load_source(pattern: str, tokenizer: tokenizers.Tokenizer, field: str) -> Corpus:
  files = documents_lib.find_files(pattern, field)
  digest = hashlib.sha256(f"{_CACHE_VERSION} {tokenizer.identity}".encode())
  for file in files:
    try:
      stat = os.stat(file)
    except OSError as error:
      raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    digest.update(f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  folder = _cache_folder() / digest.hexdigest()[:32]
  try:
    return _from_cache(pattern, folder)
  except (OSError, ValueError, KeyError):
    pass  # not there, or damaged: made anew
  splits = _split(
    [(name, tokenizer.encode(text)) for name, text in documents_lib.read_documents(files, tokenizer.binary)]
  )
  corpus = Corpus(pattern, splits, _fingerprint(splits))
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
      made = Path(scratch) / "made"
      made.mkdir()
      for split, tokens in splits.items():
        np.save(made / f"{split}.npy", tokens)
      (made / "fingerprint").write_text(corpus.fingerprint)
      try:
        os.rename(made, folder)
      except OSError:  # another process was faster, or a damaged one is in the way
        pass
    return _from_cache(pattern, folder)
  except (OSError, ValueError, KeyError) as error:
    print(f"evo_jax: tokens are kept in memory: {folder} cannot be used ({error})", file=sys.stderr)
    return corpus


def _cache_folder() -> Path:
  root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return Path(root) / "evo_jax" / "tokens"


def _from_cache(pattern: str, folder: Path) -> Corpus:
  tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
  return Corpus(pattern, tokens, (folder / "fingerprint").read_text())


def _fingerprint(splits: dict[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for split in SPLITS:
    digest.update(np.ascontiguousarray(splits[split]).data)
  return digest.hexdigest()[:16]


def _split(documents: list[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  parts = {split: [] for split in SPLITS}
  for i, (_, tokens) in enumerate(documents):
    end = np.full(1, tokenizers.DOCUMENT, tokens.dtype)
    if len(documents) >= _HOLDOUT:
      split = {_HOLDOUT // 2 - 1: "valid", _HOLDOUT - 1: "test"}.get(i % _HOLDOUT, "train")
      parts[split] += [tokens, end]
    else:
      cuts = [int(len(tokens) * 0.9), int(len(tokens) * 0.95)]
      for split, piece in zip(SPLITS, np.split(tokens, cuts)):
        parts[split] += [piece, end]
  return {split: np.concatenate(pieces) for split, pieces in parts.items()}


def check_vocabulary(corpora: list[Corpus], vocab_size: int) -> None:
  """Raises UserError where a corpus holds a token outside the vocabulary."""
  for corpus in corpora:
    for tokens in corpus.tokens.values():
      if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{corpus.name}: token {int(tokens.max())} is outside the vocabulary of {vocab_size}")


def all_text(pattern: str, tokenizer: tokenizers.Tokenizer, field: str) -> Corpus:
  """A corpus of which everything is the "test" split: text given to be measured."""
  documents = []
  for name in pattern.split(","):
    documents += documents_lib.read_documents(documents_lib.find_files(name, field), tokenizer.binary)
  pieces = [
    piece for _, text in documents for piece in (tokenizer.encode(text), np.full(1, tokenizers.DOCUMENT, np.uint32))
  ]
  tokens = np.concatenate(pieces)
  return Corpus(pattern, {"test": tokens}, "")
