"""The format of prepared text: streams of tokens in checksummed records, and the manifest that describes them.

A data set is a folder, local or in a bucket:

  manifest.json        `Manifest`
  tokenizer/           the tokenizer's files, if it has any
  000-00012-0003.train tokens of a split of a source: one of its shards

A split of a source is one stream of tokens, of documents with a separator behind each: its shards, one after another.
A shard is a run of records of RECORD tokens, the last of which may be shorter:

  checksum             uint32: CRC-32 of the tokens, started from CRC-32(name of the shard) + number of the record, XOR
                       the shard's mark
  tokens               uint16, or uint32 where the vocabulary needs it

A data set of conversations (`CHAT_VERSION`) has uint32 tokens without separators, with two bits more that mark answers
and the beginnings of conversations (`answers`), and an index beside each shard:

  000-00012-0003.train.index   a shard of uint32: of each conversation its tokens, and those before its first answer

All numbers are little-endian. Records have one size, so that any token is found without an index, and each is checked
when it is read: damaged and moved ones are found, and those of another shard of the same name. For a shard's mark is
the beginning of its checksum in the manifest, a hash of all its tokens: a file that another data set's manifest
describes does not fit this one's. A sequence of 4,096 tokens at any place takes one read, of 1.25 times its bytes (with
records of 256 tokens 1.07 times, but a third more time; with records of 4,096, 2.0 times).
"""

import bisect
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any
import zlib

import numpy as np

from evo_jax.data.storage import Folder
from evo_jax.errors import UserError

SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
RECORD = 1024  # tokens
_WAITING = 256  # records that are written at a time
VERSION = 2  # of the format of text; 1 had no marks, and cannot be read
# Those of text with a tokenizer of Hugging Face, and of conversations. They had 2 and 3, with the same format, until
# processes that prepared them no longer took numbers of special tokens in text for these tokens.
HUGGINGFACE_VERSION = 4
CHAT_VERSION = 5
CHAT_FLAGS = {"": (), "answers": ("--chat",), "last": ("--chat", "--last_answer")}  # of evo_jax.prepare, by data.chat


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of tokens. checksum: of its records' CRCs, in hexadecimal."""

  file: str
  tokens: int
  documents: int  # that begin in it
  text_bytes: int  # of UTF-8
  checksum: str

  @property
  def mark(self) -> int:
    """What its records' checksums are marked with."""
    return int(self.checksum[:8], 16)


@dataclasses.dataclass(frozen=True)
class Split:
  """A stream of tokens of a source. index: its shards, of conversations. answers: tokens of theirs that are."""

  shards: tuple[Shard, ...]
  index: tuple[Shard, ...] = ()
  answers: int = 0

  @functools.cached_property
  def tokens(self) -> int:
    return sum(shard.tokens for shard in self.shards)

  @functools.cached_property
  def documents(self) -> int:
    return sum(shard.documents for shard in self.shards)

  @functools.cached_property
  def conversations(self) -> int:
    """More than documents where the chat template rewrites earlier turns."""
    return sum(shard.documents for shard in self.index)

  @functools.cached_property
  def text_bytes(self) -> int:
    return sum(shard.text_bytes for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Source:
  """What one pattern of --input (all splits), --valid or --test (that split alone) gave.

  skipped: by reason, how many documents could not be used. report: the same in one line, with the first of them.
  """

  name: str
  files: int
  file_bytes: int
  inputs: str  # fingerprint of the files' names and sizes
  splits: dict[str, Split]  # those with tokens
  skipped: dict[str, int]
  report: str
  duplicates: int
  versions: str = ""  # fingerprint of what the files held, by times or tags of their changes; "": not written down


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Describes a data set. fingerprint: of all tokens, the same wherever the text stands. flags: how it was made."""

  version: int
  fingerprint: str
  tokenizer: str  # its name, as in data.tokenizer
  tokenizer_identity: str
  vocab_size: int
  begin_id: int
  separator_id: int
  dtype: str  # of tokens: uint16 | uint32
  record: int  # tokens
  sources: tuple[Source, ...]
  flags: dict[str, Any]

  def total(self, split: str) -> int:
    """Tokens of a split over all sources."""
    return sum(source.splits[split].tokens for source in self.sources if split in source.splits)

  @property
  def chat(self) -> str:
    """What answers are in a data set of conversations; "": it is of text."""
    return self.flags.get("chat", "")

  @property
  def shards(self) -> list[Shard]:
    """All files, of tokens and of indexes."""
    splits = [split for source in self.sources for split in source.splits.values()]
    return [shard for split in splits for shard in (*split.shards, *split.index)]

  def to_json(self) -> str:
    values = dataclasses.asdict(self)
    for split in (split for source in values["sources"] for split in source["splits"].values()):
      if not split["index"]:  # of text
        del split["index"], split["answers"]
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def version_of(tokenizer: str, chat: str) -> int:
  """The version of the format. tokenizer: its name. chat: as `Manifest.chat`."""
  return CHAT_VERSION if chat else HUGGINGFACE_VERSION if tokenizer == "huggingface" else VERSION


def token_dtype(vocab_size: int) -> np.dtype:
  """The type in which a tokenizer's ids are kept."""
  return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def read_manifest(path: str) -> Manifest:
  """The manifest of the data set in a folder. Raises UserError where there is none that can be read."""
  folder = Folder(path)
  try:
    raw = folder.read(MANIFEST)
  except FileNotFoundError as error:
    raise UserError(f"{folder.shown(MANIFEST)}: there is none; python -m evo_jax.prepare writes it") from error
  try:
    values = json.loads(raw)
    version = version_of(values.get("tokenizer", ""), values.get("flags", {}).get("chat", ""))
    if values["version"] != version:
      raise UserError(
        f"{folder.shown(MANIFEST)}: has version {values['version']} of the format, not {version}: "
        "prepare the text again, into another folder (python -m evo_jax.prepare)"
      )
    sources = [dict(source, splits=_splits(source["splits"])) for source in values.pop("sources")]
    return Manifest(**values, sources=tuple(Source(**source) for source in sources))
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"{folder.shown(MANIFEST)}: is damaged") from error


def _splits(values: dict[str, Any]) -> dict[str, Split]:
  of = lambda some: tuple(Shard(**shard) for shard in some)
  return {
    split: Split(of(value["shards"]), of(value.get("index", ())), value.get("answers", 0))
    for split, value in values.items()
  }


def fingerprint(dtype: str, sources: tuple[Source, ...]) -> str:
  """Of all tokens: it depends on nothing else, neither on names nor on where the text stood."""
  digest = hashlib.sha256(f"{dtype} {RECORD}\n".encode())
  for source in sources:
    for split in SPLITS:
      shards = source.splits[split].shards if split in source.splits else ()
      digest.update(f"{split} {[(shard.tokens, shard.checksum) for shard in shards]}\n".encode())
  return digest.hexdigest()[:16]


def open_stream(path: str, manifest: Manifest, source: Source, split: str) -> "TokenStream":
  """The tokens of a split of one of the manifest's sources in the folder `path`; none where the source lacks it."""
  return TokenStream(Folder(path), source.splits.get(split, Split(())).shards, manifest.dtype, manifest.record)


def open_index(path: str, manifest: Manifest, source: Source, split: str) -> "TokenStream":
  """The index of a split of conversations, as a stream of uint32."""
  return TokenStream(Folder(path), source.splits.get(split, Split(())).index, "uint32", manifest.record)


def missing(path: str, manifest: Manifest) -> str:
  """One line about the first shard that is missing or has another size than it should have; "" for none."""
  folder = Folder(path)
  for shard in manifest.shards:
    dtype = "uint32" if shard.file.endswith(".index") else manifest.dtype
    try:
      size = folder.size(shard.file)
    except FileNotFoundError:
      return f"{folder.shown(shard.file)}: is missing"
    if size != _shard_bytes(shard.tokens, _record_type(np.dtype(dtype), manifest.record)):
      return f"{folder.shown(shard.file)}: has {size:,} bytes, not those of {shard.tokens:,} tokens"
  return ""


class TokenStream:
  """Random access to a stream of tokens. Threads may share it; nothing is kept in memory or open between reads.

  length: tokens.
  """

  def __init__(self, folder: Folder, shards: tuple[Shard, ...], dtype: str, record: int = RECORD):
    self._folder, self._shards = folder, shards
    self._record = _record_type(np.dtype(dtype), record)
    self._starts = [0, *itertools.accumulate(shard.tokens for shard in shards)]
    self.length = self._starts[-1]

  def read(self, start: int, count: int) -> np.ndarray:
    """(count,) tokens from number `start` on. Raises UserError, naming file and record, where they are damaged."""
    if not 0 <= start <= start + count <= self.length:
      raise IndexError(f"tokens {start}..{start + count} of {self.length}")
    parts = [np.zeros(0, self._record["tokens"].base)]
    i = bisect.bisect_right(self._starts, start) - 1
    while count:
      part = self._read_shard(self._shards[i], start - self._starts[i], count)
      parts.append(part)
      start, count, i = start + len(part), count - len(part), i + 1
    return parts[1] if len(parts) == 2 else np.concatenate(parts)

  def check(self) -> Iterator[tuple[Shard, str]]:
    """Reads everything: each shard, and what is wrong with it, "" for nothing."""
    for shard in self._shards:
      problem = ""
      try:
        checksums = hashlib.sha256()
        for start in range(0, shard.tokens, 1 << 20):
          for crc, _ in self._records(shard, start, min(shard.tokens, start + (1 << 20))):
            checksums.update(crc.to_bytes(4, "little"))
        size = self._folder.size(shard.file)
        if size != _shard_bytes(shard.tokens, self._record):
          problem = f"{self._folder.shown(shard.file)}: has {size:,} bytes, not those of {shard.tokens:,} tokens"
        elif checksums.hexdigest()[:32] != shard.checksum:
          problem = f"{self._folder.shown(shard.file)}: is not the file that the manifest describes"
      except UserError as error:
        problem = str(error)
      yield shard, problem

  def _read_shard(self, shard: Shard, start: int, count: int) -> np.ndarray:
    """Tokens from number `start` of a shard on: `count`, or as many as there are."""
    stop = min(start + count, shard.tokens)
    tokens = [tokens for _, tokens in self._records(shard, start, stop)]
    skip = start % self._record["tokens"].shape[0]
    return np.concatenate(tokens)[skip : skip + stop - start]

  def _records(self, shard: Shard, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """CRC and tokens of each record that has some of the tokens [start, stop) of a shard."""
    size, each = self._record["tokens"].shape[0], self._record.itemsize
    first, last = start // size, -(-stop // size)
    end = min(last * each, _shard_bytes(shard.tokens, self._record))
    try:
      raw = self._folder.read_range(shard.file, first * each, end)
    except FileNotFoundError as error:
      raise UserError(f"{self._folder.shown(shard.file)}: is missing") from error
    whole = len(raw) // each
    records = np.frombuffer(raw, self._record, whole)
    for number, checksum, tokens in zip(range(first, last), records["checksum"].tolist(), records["tokens"]):
      yield self._verify(shard, number, checksum, tokens), tokens
    if first + whole < last:  # the shorter one at the end, or what is left of a file that was cut off
      rest = raw[whole * each :]
      if len(raw) < end - first * each or len(rest) < 4:
        raise UserError(f"{self._folder.shown(shard.file)}: is cut off: it ends before record {first + whole} does")
      checksum, tokens = int.from_bytes(rest[:4], "little"), np.frombuffer(rest[4:], self._record["tokens"].base)
      yield self._verify(shard, first + whole, checksum, tokens), tokens

  def _verify(self, shard: Shard, number: int, checksum: int, tokens: np.ndarray) -> int:
    """The record's CRC, if its checksum is right."""
    crc = zlib.crc32(tokens, (_seed(shard.file) + number) % 2**32)
    if crc ^ shard.mark != checksum:
      raise UserError(
        f"{self._folder.shown(shard.file)}: record {number} is damaged: its checksum is wrong, or the file belongs to "
        "another data set"
      )
    return crc


class ShardWriter:
  """Writes the tokens of one shard. There is no file unless tokens come. Use `shard_writer`."""

  def __init__(self, stack: contextlib.ExitStack, folder: Folder, name: str, dtype: np.dtype):
    self._stack, self._folder, self._name = stack, folder, name
    self._file, self._checksums = None, hashlib.sha256()
    self._records = np.empty(_WAITING, _record_type(np.dtype(dtype), RECORD))
    self._waiting, self._written = 0, 0  # tokens, records

  def append(self, tokens: np.ndarray) -> None:
    """Adds (n,) tokens."""
    while len(tokens):
      tokens = tokens[self._fill(tokens) :]
      if self._waiting == _WAITING * RECORD:
        self._write()

  def finish(self, documents: int, text_bytes: int) -> Shard | None:
    """Writes what is left. Returns the shard, of so many documents and bytes of text, or None where it has no token."""
    count = self._written * RECORD + self._waiting
    self._write()
    shard = Shard(self._name, count, documents, text_bytes, self._checksums.hexdigest()[:32])
    if count:
      self._mark(shard)
    return shard if count else None

  def _fill(self, tokens: np.ndarray) -> int:
    """Takes tokens that fill the record that is begun, or else whole ones. Returns how many."""
    row, column = divmod(self._waiting, RECORD)
    waiting = self._records["tokens"]
    if column or len(tokens) < RECORD:
      count = min(RECORD - column, len(tokens))
      waiting[row, column : column + count] = tokens[:count]
    else:
      rows = min(_WAITING - row, len(tokens) // RECORD)
      count = rows * RECORD
      waiting[row : row + rows] = tokens[:count].reshape(rows, RECORD)
    self._waiting += count
    return count

  def _write(self) -> None:
    """Writes the tokens that wait, with their CRCs where checksums will stand; the last record may be shorter."""
    if not self._waiting:
      return
    whole, rest = divmod(self._waiting, RECORD)
    tokens = [*self._records["tokens"][:whole], *([self._records["tokens"][whole, :rest]] if rest else [])]
    seed = _seed(self._name) + self._written
    crcs = np.array([zlib.crc32(part, (seed + i) % 2**32) for i, part in enumerate(tokens)], "<u4")
    self._checksums.update(crcs.data)
    self._records["checksum"][: len(crcs)] = crcs
    if self._file is None:
      self._file = self._stack.enter_context(self._folder.write(self._name))
    self._file.write(self._records.view(np.uint8).data[: _shard_bytes(self._waiting, self._records.dtype)])
    self._written, self._waiting = self._written + len(crcs), 0

  def _mark(self, shard: Shard) -> None:
    """Turns all CRCs in the file into checksums."""
    size = _shard_bytes(shard.tokens, self._records.dtype)
    raw = self._records.view(np.uint8).data
    for start in range(0, size, len(raw)):
      self._file.seek(start)
      count = self._file.readinto(raw[: size - start])
      self._records["checksum"] ^= np.uint32(shard.mark)
      self._file.seek(start)
      self._file.write(raw[:count])


@contextlib.contextmanager
def shard_writer(folder: Folder, name: str, dtype: np.dtype) -> Iterator[ShardWriter]:
  """A writer whose file appears when the block is left without an error."""
  with contextlib.ExitStack() as stack:
    yield ShardWriter(stack, folder, name, dtype)


@functools.cache
def _seed(name: str) -> int:
  """What the checksums of a shard's records start from."""
  return zlib.crc32(name.encode())


def _record_type(dtype: np.dtype, size: int) -> np.dtype:
  return np.dtype([("checksum", "<u4"), ("tokens", dtype.newbyteorder("<"), (size,))])


def _shard_bytes(tokens: int, record: np.dtype) -> int:
  size = record["tokens"].shape[0]
  return tokens * record["tokens"].base.itemsize + 4 * -(-tokens // size)
