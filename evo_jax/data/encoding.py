"""Documents to tokens: which split they belong to, long ones in parts, and the processes that do it side by side."""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
from multiprocessing import connection
import os
import re
import threading
from typing import Any

import numpy as np

from evo_jax.data import shards
from evo_jax.data.blocks import Block
from evo_jax.data.conversations import Conversations
from evo_jax.data.documents import Document, Tally, documents_of
from evo_jax.data.shards import SPLITS
from evo_jax.data.tokenizers import Tokenizer

PART = 1 << 20  # characters; longer documents are encoded in parts of at most so many
_AROUND = 256  # characters on each side of a cut, which must have the same tokens with it and without it
_TRIES = 32
_BORDERS = [  # of tokens in nearly all tokenizers, and places where a text without spaces may be cut
  re.compile(r"(?<=[A-Za-z])(?=[ ])"),
  re.compile(r"(?<=\n)(?=[^\s])"),
  re.compile(r"(?<=\S)(?=\s)"),
  re.compile(r"(?=[a-z])"),
  re.compile(r""),
]
BYTES_OF_HASH = 16


@dataclasses.dataclass(frozen=True)
class Encoder:
  """What the documents of all sources are encoded by. field: of JSON, or column. shares: of held-out documents."""

  tokenizer: Tokenizer
  field: str
  valid_share: float
  test_share: float

  @property
  def dtype(self) -> np.dtype:
    return shards.token_dtype(self.tokenizer.vocab_size)

  @functools.cached_property
  def conversations(self) -> Conversations:
    """Reads lines that hold no text."""
    return Conversations(self.tokenizer)

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    return self.tokenizer.lengths()

  def text_bytes(self, tokens: np.ndarray) -> int:
    """Bytes of text that a document's tokens (n,) stand for, as evaluation counts them; special tokens have none."""
    return max(0, int(self._lengths[tokens].sum() + self._lengths[self.tokenizer.separator_id]))

  def documents(self, block: Block) -> Iterator[Document]:
    """The documents of a block that holds them whole."""
    return documents_of(block, self.field, self.tokenizer.binary, self.conversations)

  def split_of(self, digest: bytes) -> str:
    """The split of a document, by the hash of its content."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < self.test_share else "valid" if place < self.test_share + self.valid_share else "train"

  def ranges(self, rule: str, digest: bytes, count: int) -> dict[str, tuple[int, int]]:
    """Which of a document's `count` tokens each split gets, for those that get any.

    rule: a split (all) | hash (all, to that of the hash) | end (its end is held out, validation before test).
    """
    if rule != "end":
      return {self.split_of(digest) if rule == "hash" else rule: (0, count)} if count else {}
    held_out = self.valid_share + self.test_share
    cuts = [0, int(count * (1 - held_out)), int(count * (1 - self.test_share)), count]
    return {split: (a, b) for split, a, b in zip(SPLITS, cuts, cuts[1:]) if a < b}


@dataclasses.dataclass
class Encoded:
  """What becomes of some documents. By split: tokens, a separator behind each document; documents; bytes of text."""

  tokens: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=lambda: {split: [] for split in SPLITS})
  documents: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
  text_bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
  tally: Tally = dataclasses.field(default_factory=Tally)
  duplicates: int = 0


def digest_of(raw: bytes) -> bytes:
  """The hash of a document's content, 16 bytes: the beginning of its SHA-256."""
  return hashlib.sha256(raw).digest()[:BYTES_OF_HASH]


def encode(encoder: Encoder, blocks: list[Block], rule: str, duplicates: frozenset[int]) -> Encoded:
  """The documents of blocks that hold them whole. duplicates: numbers, among the good ones, of those to be left out."""
  result, dtype, number = Encoded(), encoder.dtype, itertools.count()
  separator = np.full(1, encoder.tokenizer.separator_id, dtype)
  for block in blocks:
    for document in encoder.documents(block):
      result.tally.add(block.file, document)
      if document.problem:
        continue
      if next(number) in duplicates:
        result.duplicates += 1
        continue
      raw = document.raw
      digest = digest_of(raw) if rule == "hash" else b""
      if document.tokens is None:
        tokens, size = _encode_whole(encoder, raw if encoder.tokenizer.binary else document.text), len(raw)
      else:
        tokens, size = document.tokens.astype(dtype), encoder.text_bytes(document.tokens)
      for split, (a, b) in encoder.ranges(rule, digest, len(tokens)).items():
        result.tokens[split] += [tokens[a:b], separator]
        result.documents[split] += 1
        result.text_bytes[split] += size * b // len(tokens) - size * a // len(tokens)
  for split, parts in result.tokens.items():
    result.tokens[split] = [np.concatenate(parts, dtype=dtype)] if parts else []
  return result


def encode_part(encoder: Encoder, text: str | bytes, begins: bool) -> np.ndarray:
  """The tokens of a part of a document."""
  return encoder.tokenizer.encode(text, begins).astype(encoder.dtype, copy=False)


def hash_documents(encoder: Encoder, blocks: list[Block]) -> list[bytes]:
  """The hashes of the good documents of blocks that hold them whole."""
  documents = (document for block in blocks for document in encoder.documents(block))
  return [digest_of(document.raw) for document in documents if not document.problem]


def _encode_whole(encoder: Encoder, text: str | bytes) -> np.ndarray:
  if isinstance(text, bytes) or len(text) <= PART:
    return encode_part(encoder, text, True)
  parts = (encode_part(encoder, part, i == 0) for i, part in enumerate(cut([text], encoder.tokenizer, PART)))
  return np.concatenate(list(parts))


def cut(texts: Iterable[str], tokenizer: Tokenizer, size: int) -> Iterator[str]:
  """A long document, which comes in any pieces, in parts of at most `size` characters.

  They are cut where the tokens on both sides do not depend on it: 256 characters on each side have the same tokens as
  one text and as two. The parts depend on the text alone. Their tokens are not the whole text's where no such place is
  found, as in a megabyte of one letter under BPE; and of a SentencePiece model, where two segmentations are nearly
  equally likely: it adds log-probabilities in float32 from the beginning on, so that of a long text rounding decides.
  """
  held, start, first = "", 0, True
  for text in texts:
    held, start = held[start:] + text, 0
    while len(held) - start >= size + _AROUND:
      end = _place_to_cut(held, start + size, tokenizer, size)
      yield held[start:end]
      start, first = end, False
  while len(held) - start > size:
    end = _place_to_cut(held, start + size, tokenizer, size)
    yield held[start:end]
    start, first = end, False
  if first or start < len(held):
    yield held[start:]


def _place_to_cut(text: str, latest: int, tokenizer: Tokenizer, size: int) -> int:
  window = max(latest - size // 2, latest - 16 * _AROUND)
  for border in _BORDERS:
    places = [match.start() for match in border.finditer(text, window, latest) if match.start() > window]
    for place in places[-_TRIES:][::-1]:
      before, after = text[max(window, place - _AROUND) : place], text[place : place + _AROUND]
      both = np.concatenate([tokenizer.encode(before), tokenizer.encode(after, begins=False)])
      if np.array_equal(both, tokenizer.encode(before + after)):
        return place
  return latest


class Here(futures.Executor):
  """Runs everything at once, in the calling thread."""

  def submit(self, function: Callable, /, *args, **kwargs) -> futures.Future:
    future = futures.Future()
    future.set_result(function(*args, **kwargs))
    return future


def start_workers(count: int, encoder: Encoder) -> tuple[futures.Executor, Callable[..., Any]]:
  """An executor of `count` processes, or of this one for 1; and the function to submit: call(function, *arguments).

  The functions are those above, which get the encoder in front of their arguments.
  """
  if count <= 1:
    return Here(), lambda function, *args: function(encoder, *args)
  # Not forked: this process has threads, of JAX and others.
  processes = multiprocessing.get_context("spawn")
  return futures.ProcessPoolExecutor(count, processes, _start_worker, (encoder,)), _call


_ENCODER: Encoder | None = None  # of a worker process


def _start_worker(encoder: Encoder) -> None:
  global _ENCODER
  _ENCODER = encoder
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends this process when the one that started it is gone, however it ended."""
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _call(function: Callable, *args) -> Any:
  return function(_ENCODER, *args)
