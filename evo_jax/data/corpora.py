"""Corpora: text sources as streams of tokens, split into training and held-out text, and cached on disk.

A source is a glob of text files, or "stdlib": Python's own standard library. Its documents (a file, or a line of a
.jsonl file) are tokenized once, into arrays that are cached and memory-mapped, so that the threads and processes of a
machine share one copy. In a stream, the tokenizer's separator stands after each document.

Held-out text: of 20 documents or more, in sorted order, numbers 9, 29, 49, ... are for validation and 19, 39, 59, ...
for testing; of fewer documents, each gives its last 10 %, half for each.
"""

from collections.abc import Sequence
import contextlib
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
_HOLDOUT = 20  # of so many documents one is for validation, one for testing
_CACHE_VERSION = 1  # of the tokens on disk: to be raised when the same text would give other tokens
_CACHE_ERRORS = (OSError, ValueError, KeyError)  # of reading and writing a cache that is missing, damaged or read-only


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The token streams of one source.

  tokens: by split, each (n,) unsigned ints, memory-mapped where they could be cached. begin_id, separator_id: the
  tokenizer's, for sequences and their documents.
  """

  name: str
  tokens: dict[str, np.ndarray]
  fingerprint: str  # of all tokens
  begin_id: int
  separator_id: int


def load_corpora(path: str, tokenizer: tokenizers.Tokenizer, field: str = "config.data.path") -> list[Corpus]:
  """The corpora of comma-separated sources, from the cache or tokenized. Raises UserError, naming `field`."""
  if not path.strip():
    raise UserError(f"{field}: is empty; give globs of text files, as in 'dir/*.txt'")
  return [_load_source(pattern.strip(), tokenizer, field) for pattern in path.split(",")]


def all_text(path: str, tokenizer: tokenizers.Tokenizer, field: str) -> Corpus:
  """One corpus of comma-separated sources with a "test" split only, which holds everything. Raises UserError."""
  documents = []
  for pattern in path.split(","):
    documents += _tokenize(documents_lib.find_files(pattern, field), tokenizer)
  tokens = _join(documents, tokenizer.separator_id).astype(np.uint32)
  return Corpus(path, {"test": tokens}, "", tokenizer.begin_id, tokenizer.separator_id)


def check_vocabulary(corpora: list[Corpus], vocab_size: int) -> None:
  """Raises UserError where a corpus holds a token outside the vocabulary."""
  for corpus in corpora:
    for tokens in corpus.tokens.values():
      if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{corpus.name}: token {int(tokens.max())} is outside the vocabulary of {vocab_size}")


def _load_source(pattern: str, tokenizer: tokenizers.Tokenizer, field: str) -> Corpus:
  files = documents_lib.find_files(pattern, field)
  folder = _cache_root() / _cache_key(files, tokenizer)
  try:
    tokens, fingerprint = _read_cache(folder)
  except _CACHE_ERRORS:
    tokens = _split(_tokenize(files, tokenizer), tokenizer.separator_id)
    fingerprint = _fingerprint(tokens)
    try:
      _write_cache(folder, tokens, fingerprint)
      tokens, fingerprint = _read_cache(folder)
    except _CACHE_ERRORS as error:
      print(f"evo_jax: tokens are kept in memory: {folder} cannot be used ({error})", file=sys.stderr)
  return Corpus(pattern, tokens, fingerprint, tokenizer.begin_id, tokenizer.separator_id)


def _tokenize(files: list[str], tokenizer: tokenizers.Tokenizer) -> list[np.ndarray]:
  """The tokens of each document. Raises UserError where there is none."""
  documents = [tokenizer.encode(text) for _, text in documents_lib.read_documents(files, tokenizer.binary)]
  if not documents:
    raise UserError(f"{', '.join(files)}: no line has text")
  return documents


def _join(documents: Sequence[np.ndarray], separator_id: int) -> np.ndarray:
  """One stream of documents, a separator after each."""
  return np.concatenate([x for tokens in documents for x in (tokens, np.full(1, separator_id, tokens.dtype))])


def _split(documents: list[np.ndarray], separator_id: int) -> dict[str, np.ndarray]:
  """The stream of each split."""
  if len(documents) >= _HOLDOUT:
    split_of = lambda i: {_HOLDOUT // 2 - 1: "valid", _HOLDOUT - 1: "test"}.get(i % _HOLDOUT, "train")
    parts = {split: [tokens for i, tokens in enumerate(documents) if split_of(i) == split] for split in SPLITS}
  else:
    pieces = [np.split(tokens, [int(len(tokens) * 0.9), int(len(tokens) * 0.95)]) for tokens in documents]
    parts = dict(zip(SPLITS, zip(*pieces)))
  return {split: _join(part, separator_id) for split, part in parts.items()}


def _fingerprint(tokens: dict[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for split in SPLITS:
    digest.update(np.ascontiguousarray(tokens[split]).data)
  return digest.hexdigest()[:16]


def _cache_root() -> Path:
  root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return Path(root) / "evo_jax" / "tokens"


def _cache_key(files: list[str], tokenizer: tokenizers.Tokenizer) -> str:
  """Names the tokens of files as they are now. Raises UserError where a file cannot be read."""
  digest = hashlib.sha256(f"{_CACHE_VERSION} {tokenizer.identity}".encode())
  for file in files:
    try:
      stat = os.stat(file)
    except OSError as error:
      raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    digest.update(f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return digest.hexdigest()[:32]


def _read_cache(folder: Path) -> tuple[dict[str, np.ndarray], str]:
  """Memory-mapped tokens by split, and their fingerprint."""
  tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
  return tokens, (folder / "fingerprint").read_text()


def _write_cache(folder: Path, tokens: dict[str, np.ndarray], fingerprint: str) -> None:
  """Writes into a temporary folder, which is renamed when it is complete."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
    complete = Path(scratch) / "complete"
    complete.mkdir()
    for split in SPLITS:
      np.save(complete / f"{split}.npy", tokens[split])
    (complete / "fingerprint").write_text(fingerprint)
    with contextlib.suppress(OSError):  # another process was faster, or a damaged folder is in the way
      os.rename(complete, folder)
