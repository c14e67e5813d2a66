"""Documents to tokens: which split they belong to, and long ones in parts."""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import hashlib
import itertools
import re

import numpy as np

from evo_jax.data import answers, shards
from evo_jax.data.blocks import Block
from evo_jax.data.conversations import Conversations
from evo_jax.data.documents import Document, Tally, documents_of
from evo_jax.data.shards import SPLITS
from evo_jax.data.token_ids import join_documents
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
  """What the documents of all sources are encoded by. field: of JSON, or column. shares: of held-out documents.

  chat: "" for text; else documents are conversations, of which `answers.Answers` marks the answers.
  """

  tokenizer: Tokenizer
  field: str
  valid_share: float
  test_share: float
  chat: str = ""

  @property
  def dtype(self) -> np.dtype:
    return answers.DTYPE if self.chat else shards.token_dtype(self.tokenizer.vocab_size)

  @functools.cached_property
  def conversations(self) -> Conversations | answers.Answers:
    """Reads lines that hold no text."""
    return answers.Answers(self.tokenizer, self.chat) if self.chat else Conversations(self.tokenizer)

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    return self.tokenizer.lengths()

  def size_of(self, document: Document) -> int:
    """Bytes of a document's text, or those that its tokens stand for, as evaluation counts them; special ones: none."""
    if document.tokens is None:
      return len(document.raw)
    ids = answers.ids_of(document.tokens) if self.chat else document.tokens
    return max(0, int(self._lengths[ids].sum() + self._lengths[self.tokenizer.separator_id]))

  def documents(self, block: Block) -> Iterator[Document]:
    """The documents of a block that holds them whole."""
    return documents_of(block, self.field, self.tokenizer.binary, self.conversations)

  def split_of(self, digest: bytes) -> str:
    """The split of a document, by the hash of its content."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < self.test_share else "valid" if place < self.test_share + self.valid_share else "train"

  def ranges(self, rule: str, digest: bytes, count: int) -> dict[str, tuple[int, int]]:
    """Which of a document's `count` tokens each split gets, for those that get any.

    rule: a split (all) | hash (all, to that of the hash) | end (its end is held out, validation before test; not of
    conversations).
    """
    if rule != "end":
      return {self.split_of(digest) if rule == "hash" else rule: (0, count)} if count else {}
    held_out = self.valid_share + self.test_share
    cuts = [0, int(count * (1 - held_out)), int(count * (1 - self.test_share)), count]
    return {split: (a, b) for split, a, b in zip(SPLITS, cuts, cuts[1:]) if a < b}


@dataclasses.dataclass
class Encoded:
  """What becomes of some documents. By split: tokens, a separator behind each document of text; documents; bytes of
  text."""

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
  result, number = Encoded(), itertools.count()
  documents = {split: [] for split in SPLITS}
  for block in blocks:
    for document in encoder.documents(block):
      result.tally.add(block.file, document)
      if document.problem:
        continue
      if next(number) in duplicates:
        result.duplicates += 1
      elif rule == "end":
        _add_ranges(encoder, document, result)
      else:
        documents[encoder.split_of(digest_of(document.raw)) if rule == "hash" else rule].append(document)
  for split, found in documents.items():
    if found:
      tokens, counts = _encode_documents(encoder, found)
      result.tokens[split].append(tokens)
      result.documents[split] += sum(map(bool, counts))
      result.text_bytes[split] += sum(encoder.size_of(document) for document, count in zip(found, counts) if count)
  return result


def _add_ranges(encoder: Encoder, document: Document, result: Encoded) -> None:
  """Gives each split its part of a document, the end of which is held out."""
  tokens, size = _encode_document(encoder, document), encoder.size_of(document)
  for split, (a, b) in encoder.ranges("end", b"", len(tokens)).items():
    result.tokens[split] += [tokens[a:b], np.full(1, encoder.tokenizer.separator_id, encoder.dtype)]
    result.documents[split] += 1
    result.text_bytes[split] += size * b // len(tokens) - size * a // len(tokens)


def encode_part(encoder: Encoder, text: str | bytes, begins: bool) -> np.ndarray:
  """The tokens of a part of a document."""
  return encoder.tokenizer.encode(text, begins).astype(encoder.dtype, copy=False)


def hash_documents(encoder: Encoder, blocks: list[Block]) -> list[bytes]:
  """The hashes of the good documents of blocks that hold them whole."""
  documents = (document for block in blocks for document in encoder.documents(block))
  return [digest_of(document.raw) for document in documents if not document.problem]


def _encode_documents(encoder: Encoder, documents: list[Document]) -> tuple[np.ndarray, list[int]]:
  """As the tokenizer's `encode_documents`; long texts in parts, and tokens that are there as they are. Conversations
  have no separator behind them."""
  tokenizer = encoder.tokenizer
  if encoder.chat:
    return np.concatenate([document.tokens for document in documents]), [len(document.tokens) for document in documents]
  texts = [document.raw if tokenizer.binary else document.text for document in documents if document.tokens is None]
  if len(texts) == len(documents) and (tokenizer.binary or max(map(len, texts)) <= PART):
    return tokenizer.encode_documents(texts)
  return join_documents([_encode_document(encoder, document) for document in documents], tokenizer.separator_id)


def _encode_document(encoder: Encoder, document: Document) -> np.ndarray:
  if document.tokens is not None:
    return document.tokens.astype(encoder.dtype)
  text = document.raw if encoder.tokenizer.binary else document.text
  if encoder.tokenizer.binary or len(text) <= PART:
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
