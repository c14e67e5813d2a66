"""Text to batches: files, documents, tokens, splits, and the resumable stream of training sequences (grain).

A source is a glob of text files (or "stdlib": Python's own standard library). Its documents (a file, or a line of a
.jsonl file) are tokenized once, into arrays that are cached on disk and memory-mapped, so that threads and processes
of a machine share one copy. Held-out text: of 20 documents or more, in sorted order, numbers 9, 29, 49, ... are for
validation and 19, 39, 59, ... for testing; of fewer documents, each gives its last 10 %, half for each.

A training sequence is the document token and then `context` tokens from a random place of the stream of documents, in
which a document token stands after each. Every place is drawn once before one is drawn again.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path
import sys
import sysconfig
import tempfile
from typing import Iterator, Sequence
import zlib

import grain
import numpy as np

from evo_jax import config as config_lib
from evo_jax import tokenizer as tokenizer_lib
from evo_jax.cli import UserError
from evo_jax.model import DOCUMENT

SPLITS = ("train", "valid", "test")
_HOLDOUT = 20  # one document in so many is for validation, one for testing
_CACHE_VERSION = 1  # of the tokens on disk; count it up when the same text would give other tokens


def find_files(pattern: str, field: str) -> list[str]:
  """The sorted files of a glob, or of "stdlib". Raises UserError, naming `field`, where there are none."""
  pattern = pattern.strip()
  if pattern == "stdlib":
    root = Path(sysconfig.get_path("stdlib"))
    # Some systems ship no tests and keep installed packages in the same folder: leave out both, everywhere.
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = sorted(str(f) for f in root.rglob("*.py")
                   if not skip & set(f.relative_to(root).parts) and f.stat().st_size)
  else:
    files = sorted(f for f in glob.glob(os.path.expanduser(pattern), recursive=True) if not os.path.isdir(f))
  if not files:
    raise UserError(f"{field}: no file matches {pattern!r}")
  return files


def read_documents(files: list[str], binary: bool) -> Iterator[tuple[str, str | bytes]]:
  """(name, text) of every document; with `binary`, files that are no .jsonl are bytes, whatever their encoding.

  Raises UserError with the file's name (and line) for what is empty, unreadable, cut off, or not UTF-8.
  """
  for file in files:
    raw = _read(file)
    if not raw.strip():
      raise UserError(f"{file}: is empty")
    is_jsonl = any(file.endswith(".jsonl" + suffix) for suffix in ("", ".gz", ".xz"))
    if binary and not is_jsonl:
      yield file, raw
      continue
    try:
      text = raw.decode()
    except UnicodeDecodeError as error:
      raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    if not is_jsonl:
      yield file, text
      continue
    for number, line in enumerate(text.split("\n"), 1):
      if not line.strip():
        continue
      try:
        value = json.loads(line)["text"]
      except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {number} is not JSON ({error.msg})") from error
      except (KeyError, TypeError) as error:
        raise UserError(f"{file}: line {number} has no field 'text'") from error
      if not isinstance(value, str):
        raise UserError(f"{file}: line {number}: field 'text' is not a string")
      try:
        value.encode()
      except UnicodeEncodeError as error:
        raise UserError(f"{file}: line {number}: field 'text' is not valid Unicode") from error
      if value:
        yield f"{file}:{number}", value


def _read(file: str) -> bytes:
  opener = gzip.open if file.endswith(".gz") else lzma.open if file.endswith(".xz") else open
  try:
    with opener(file, "rb") as stream:
      return stream.read()
  except EOFError as error:
    raise UserError(f"{file}: is cut off in the middle of the compressed data") from error
  except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
    raise UserError(f"{file}: the compressed data is damaged ({error})") from error
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The tokens of one source by split, each (n,) unsigned ints, memory-mapped where they could be cached."""

  name: str
  tokens: dict[str, np.ndarray]
  fingerprint: str  # of all tokens


def load(path: str, tokenizer: tokenizer_lib.Tokenizer, field: str = "config.data.path") -> list[Corpus]:
  """The corpora of comma-separated sources, tokenized or from the cache."""
  if not path.strip():
    raise UserError(f"{field}: is empty; give globs of text files, as in 'dir/*.txt'")
  return [_load_source(pattern.strip(), tokenizer, field) for pattern in path.split(",")]


def _load_source(pattern: str, tokenizer: tokenizer_lib.Tokenizer, field: str) -> Corpus:
  files = find_files(pattern, field)
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
  splits = _split([(name, tokenizer.encode(text)) for name, text in read_documents(files, tokenizer.binary)])
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
    end = np.full(1, DOCUMENT, tokens.dtype)
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


def sequence(tokens: np.ndarray, start: int, length: int) -> np.ndarray:
  """(length + 1,) int32: the document token, then `length` tokens from `start`."""
  return np.concatenate([[DOCUMENT], tokens[start:start + length]]).astype(np.int32)


def training_stream(corpora: list[Corpus], config: config_lib.Data, length: int, rows: Sequence[int] | None = None,
                    start: int = 0) -> grain.IterDataset:
  """Batches without end, from global batch number `start` on: of each the `rows` (None: all), (rows, length + 1) int32.

  What batch number n holds depends on the seed alone: a run that has made n steps goes on with start = n, on any
  number of processes, whichever rows each of them needs, and nothing is read twice or left out.
  """
  rows = range(config.batch_size) if rows is None else rows
  sources = []
  for i, corpus in enumerate(corpora):
    tokens = corpus.tokens["train"]
    if len(tokens) < length:
      raise UserError(f"{corpus.name}: {len(tokens)} training tokens are fewer than one sequence "
                      f"(config.model.context = {length})")
    places = len(tokens) - length + 1
    stride = 1 + (places >> 31)  # grain shuffles up to 2^31 records
    pick = lambda record, tokens=tokens, stride=stride: sequence(tokens, record * stride, length)
    sources.append(grain.MapDataset.range(places // stride).shuffle(seed=config.seed + i).map(pick).repeat())
  weights = config.weights or [float(len(c.tokens["train"])) for c in corpora]
  mixed = grain.MapDataset.mix(sources, weights=list(weights)) if len(sources) > 1 else sources[0]
  batch = lambda step: np.stack([mixed[step * config.batch_size + row] for row in rows])
  return (grain.MapDataset.range(start, sys.maxsize // config.batch_size).map(batch)
          .to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)))


def held_out(corpora: list[Corpus], split: str, length: int, count: int = 0) -> np.ndarray:
  """(n, length + 1) int32: consecutive sequences of a split, the remainder dropped; `count` > 0: so many at most,
  evenly spread over it. Raises UserError where there is not even one."""
  places = [(corpus.tokens[split], start) for corpus in corpora
            for start in range(0, len(corpus.tokens[split]) - length + 1, length)]
  if not places:
    raise UserError(f"{', '.join(c.name for c in corpora)}: the {split} split is shorter than one sequence "
                    f"(config.model.context = {length})")
  if 0 < count < len(places):
    places = [places[i] for i in np.linspace(0, len(places) - 1, count).round().astype(int)]
  return np.stack([sequence(tokens, start, length) for tokens, start in places])


def all_text(pattern: str, tokenizer: tokenizer_lib.Tokenizer, field: str) -> Corpus:
  """A corpus of which everything is the "test" split: text given to be measured."""
  documents = []
  for name in pattern.split(","):
    documents += read_documents(find_files(name, field), tokenizer.binary)
  pieces = [piece for _, text in documents for piece in (tokenizer.encode(text), np.full(1, DOCUMENT, np.uint32))]
  tokens = np.concatenate(pieces)
  return Corpus(pattern, {"test": tokens}, "")
