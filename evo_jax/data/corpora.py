"""Corpora: text sources as streams of tokens, split into training and held-out text, and cached on disk.

Each source's documents are tokenized once, into arrays that are cached and memory-mapped, so that the threads and
processes of a machine share one copy. In a stream, the tokenizer's separator stands after each document.

Held-out text: of 20 documents or more, in sorted order, numbers 9, 29, 49, ... are for validation and 19, 39, 59, ...
for testing; of fewer documents, each gives its last 10 %, half for each. A document that cannot be used keeps its
number, so that the others stay where they are when it is mended.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import os
import stat
import sys

import numpy as np

from evo_jax import config as config_lib
from evo_jax.data import cache as cache_lib
from evo_jax.data import documents as documents_lib
from evo_jax.data import files as files_lib
from evo_jax.data import formats, tokenizers
from evo_jax.data.cache import SPLITS
from evo_jax.errors import UserError

_HOLDOUT = 20  # of so many documents one is for validation, one for testing
_CACHE_VERSION = 2  # of the tokens on disk: to be raised when the same text would give other tokens


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


def load_corpora(config: config_lib.Data, tokenizer: tokenizers.Tokenizer) -> list[Corpus]:
  """The corpora of config.path's sources, from the cache or tokenized. Raises UserError.

  Prints a line for each source with documents that are skipped, and one if the cache cannot be used.
  """
  sources = files_lib.find_sources(config.path, "config.data.path")
  if config.weights and len(config.weights) != len(sources):
    raise UserError(
      f"config.data.weights: {config.weights!r} must have one weight for each of data.path's {len(sources)} sources"
    )
  cache = cache_lib.Cache()
  return [_load_source(name, files, tokenizer, config.strict, cache) for name, files in sources]


def all_text(path: str, tokenizer: tokenizers.Tokenizer, field: str, strict: bool = False) -> Corpus:
  """One corpus of comma-separated sources with a "test" split only, which holds everything. Raises UserError."""
  documents = []
  for name, files in files_lib.find_sources(path, field):
    reader = documents_lib.Reader(name, files, tokenizer.binary, strict)
    documents += _tokenize(reader, tokenizer)
    _say(name, reader.report)
  tokens = _join([d for d in documents if d is not None], tokenizer.separator_id, np.uint32)
  return Corpus(formats.shown(path), {"test": tokens}, "", tokenizer.begin_id, tokenizer.separator_id)


def check_vocabulary(corpora: list[Corpus], vocab_size: int) -> None:
  """Raises UserError where a corpus holds a token outside the vocabulary."""
  for corpus in corpora:
    for tokens in corpus.tokens.values():
      if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{corpus.name}: token {int(tokens.max())} is outside the vocabulary of {vocab_size}")


def _load_source(
  name: str, files: list[str], tokenizer: tokenizers.Tokenizer, strict: bool, cache: cache_lib.Cache
) -> Corpus:
  versions = [_version(file) for file in files]
  key = _cache_key(versions, tokenizer)
  tokens = cache.read(key)
  if tokens is None:
    reader = documents_lib.Reader(name, files, tokenizer.binary, strict)
    by_split = _split(_tokenize(reader, tokenizer), tokenizer.separator_id)
    for file, version in zip(files, versions):
      if _version(file) != version:
        raise UserError(f"{formats.shown(file)}: was changed while it was read")
    tokens = cache.write(key, cache_lib.Tokens.of(by_split, reader.report))
  elif strict and tokens.report:
    raise UserError(f"{name}: {tokens.report}")
  _say(name, tokens.report)
  return Corpus(name, tokens.by_split, tokens.fingerprint, tokenizer.begin_id, tokenizer.separator_id)


def _say(name: str, report: str) -> None:
  if report:
    print(f"evo_jax: {name}: {report}", file=sys.stderr)


def _tokenize(documents: Iterable[str | bytes | None], tokenizer: tokenizers.Tokenizer) -> list[np.ndarray | None]:
  """The tokens of each document, None of bad ones."""
  return [None if text is None else tokenizer.encode(text) for text in documents]


def _join(documents: Sequence[np.ndarray], separator_id: int, dtype: np.dtype) -> np.ndarray:
  """One stream of documents, a separator after each."""
  separator = np.full(1, separator_id, dtype)
  return np.concatenate([np.zeros(0, dtype), *(x for tokens in documents for x in (tokens, separator))], dtype=dtype)


def _split(documents: list[np.ndarray | None], separator_id: int) -> dict[str, np.ndarray]:
  """The stream of each split."""
  good = [tokens for tokens in documents if tokens is not None]
  if len(documents) >= _HOLDOUT:
    split_of = lambda i: {_HOLDOUT // 2 - 1: "valid", _HOLDOUT - 1: "test"}.get(i % _HOLDOUT, "train")
    by_split = {split: [] for split in SPLITS}
    for i, tokens in enumerate(documents):
      by_split[split_of(i)] += [] if tokens is None else [tokens]
  else:
    pieces = [np.split(tokens, [int(len(tokens) * 0.9), int(len(tokens) * 0.95)]) for tokens in good]
    by_split = dict(zip(SPLITS, zip(*pieces)))
  return {split: _join(part, separator_id, good[0].dtype) for split, part in by_split.items()}


def _version(file: str) -> str:
  """Names the content that a file has now. Raises UserError where it cannot be read."""
  try:
    status = os.stat(file)
  except OSError as error:
    raise UserError(f"{formats.shown(file)}: cannot be read: {error.strerror or error}") from error
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f"{formats.shown(file)}: is a pipe, which can be read only once; training needs files")
  return f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def _cache_key(versions: list[str], tokenizer: tokenizers.Tokenizer) -> str:
  digest = hashlib.sha256(f"{_CACHE_VERSION} {tokenizer.identity}".encode())
  for version in versions:
    digest.update(os.fsencode(f"{version}\n"))
  return digest.hexdigest()[:32]
