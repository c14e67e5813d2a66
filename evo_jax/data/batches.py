"""Batches of training sequences, an endless resumable stream (grain), and of held-out sequences.

Of text a sequence is any stretch of the stream, behind a begin token. Of conversations it is some that fit, each from
its first token on (`packing`), and padding: nothing stands in front of a conversation but what the template writes, and
none attends to another, as when one is read for generation.
"""

import bisect
from collections.abc import Sequence
import concurrent.futures
import itertools
import sys
from typing import NamedTuple

import grain
import numpy as np

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import order
from evo_jax.data.corpora import Corpus
from evo_jax.data.packing import Packing
from evo_jax.errors import UserError

_READERS = 16  # threads that read held-out text: a bucket answers after some hundredths of a second


class _Row(NamedTuple):
  """A sequence. tokens: (T,) int32; answers (T,) bool and segments (T,) int32: of conversations."""

  tokens: np.ndarray
  answers: np.ndarray | None = None
  segments: np.ndarray | None = None


class _Text:
  """A source of text in training. size: tokens, of which weights are in proportion; tokens: those that are read."""

  def __init__(self, corpus: Corpus, length: int, seed: tuple[int, ...]):
    self._corpus, self._length = corpus, length
    self.size = self.tokens = corpus.streams["train"].length
    self._ring = order.Ring(self.size, length, seed)
    self.report, self.epochs = "", self._ring.epochs

  def row(self, k: int) -> _Row:
    return _Row(_sequence(self._corpus, "train", self._ring.start(k), self._length))


class _Chats:
  """A source of conversations in training, as `_Text`; size: with the padding."""

  def __init__(self, corpus: Corpus, length: int, seed: tuple[int, ...]):
    self._packing = Packing(corpus, "train", length, seed)
    self._deck = order.Deck(len(self._packing), seed)
    self.size, self.tokens = len(self._packing) * length, self._packing.tokens
    self.report, self.epochs = self._packing.report, self._deck.epochs

  def row(self, k: int) -> _Row:
    return _Row(*self._packing.read(self._deck.at(k)))


class TrainingText:
  """The training text of corpora in the order of a run. What batch n holds depends on the seed and n alone."""

  def __init__(self, corpora: Sequence[Corpus], config: config_lib.Data, length: int):
    """length: tokens of a sequence, apart from the begin token. Raises UserError where there is no training text, or
    the weights do not go with the corpora."""
    self.corpora = [corpus for corpus in corpora if corpus.streams["train"].length]
    if not self.corpora:
      raise UserError(f"{', '.join(c.name for c in corpora)}: there is no text to train on beside the held-out text")
    self._config, self._length = config, length
    self._sources = [
      (_Chats if corpus.indexes else _Text)(corpus, length, (config.seed, i)) for i, corpus in enumerate(self.corpora)
    ]
    self._mixture = order.Mixture(self._weights([source.size for source in self._sources]), config.batch_size)
    self._names = _ends([corpus.name for corpus in self.corpora])

  def batches(self, rows: Sequence[int] | None = None, start: int = 0, segments: bool = False) -> grain.DatasetIterator:
    """Endless batches from number `start` on. Reading raises UserError for text that is damaged, or cannot be read.

    A run that has made n steps resumes with start = n, on any number of processes, whichever rows each of them needs,
    and nothing is read twice or skipped.

    rows: which rows of each global batch to yield; None: all. segments: whether batches say which document each token
    belongs to.
    """
    size, threads = self._config.batch_size, self._config.threads
    rows = [int(row) for row in (range(size) if rows is None else rows)]

    def sequence(index: int) -> _Row:
      step, row = divmod(index, len(rows))
      source, k = self._mixture.at(step * size + rows[row])
      return self._sources[source].row(k)

    stack = _Stack(self.corpora, self._length, segments)
    return iter(
      grain.MapDataset.range(int(start) * len(rows), sys.maxsize // size)
      .map(sequence)
      .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2 * len(rows))))
      .batch(len(rows), batch_fn=stack)
    )

  @property
  def tokens(self) -> int:
    """Of all corpora."""
    return sum(source.tokens for source in self._sources)

  @property
  def reports(self) -> list[str]:
    """Of each corpus of conversations, how they are packed, in a line."""
    return [source.report for source in self._sources if source.report]

  def epochs(self, batches: int) -> dict[str, float]:
    """How often each corpus has been read by so many batches of the run, by the end of its name."""
    taken = self._mixture.taken(batches * self._config.batch_size)
    return {name: source.epochs(k) for name, source, k in zip(self._names, self._sources, taken)}

  def _weights(self, sizes: list[int]) -> list[tuple[int, Sequence[float]]]:
    weights = [(0, self._config.weights or sizes), *config_lib.parse_weight_changes(self._config.weight_changes)]
    for step, values in weights:
      if len(values) != len(sizes):
        field = "weight_changes" if step else "weights"
        raise UserError(
          f"config.data.{field}: {getattr(self._config, field)!r} must have one weight for each of the {len(sizes)} "
          f"sources of data.path: {', '.join(corpus.name for corpus in self.corpora)}"
        )
    return weights


def held_out(corpora: Sequence[Corpus], split: str, length: int, count: int = 0, segments: bool = False) -> Batch:
  """Consecutive sequences of a split, each of `length` tokens behind the begin token; the remainder is dropped.

  Where there is not even one, each corpus is one, padded with separators that do not count. Of conversations all are
  read; a line on stderr says where some are cut at their end, or left out. Raises UserError where there is no text, or
  it cannot be read. count: at most so many, evenly spread over the split; 0: all. segments: as for
  `TrainingText.batches`.
  """
  lengths = [corpus.streams[split].length for corpus in corpora]
  if not any(lengths):
    names = ", ".join(corpus.name for corpus in corpora)
    raise UserError(f"{names}: the {split} split has no text (config.data.{split}_share, config.data.{split})")
  packings = [Packing(corpus, split, length) if corpus.indexes and n else None for corpus, n in zip(corpora, lengths)]
  for packing in packings:
    if packing and packing.cut + packing.left_out:
      print(f"evo_jax: held-out text of {packing.report}", file=sys.stderr)
  padded = max(lengths) < length and not any(packings)
  counts = [len(packing) if packing else bool(n) if padded else n // length for packing, n in zip(packings, lengths)]
  ends = list(itertools.accumulate(counts))
  numbers = range(ends[-1])
  if 0 < count < ends[-1]:
    numbers = np.linspace(0, ends[-1] - 1, count).round().astype(int).tolist()

  def sequence(number: int) -> _Row:
    i = bisect.bisect_right(ends, number)
    place = number - ends[i] + counts[i]
    if packing := packings[i]:
      return _Row(*packing.read(place))
    return _Row(_sequence(corpora[i], split, place * length, min(length, lengths[i])))

  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    return _Stack(corpora, length, segments, padded)(list(pool.map(sequence, numbers)))


def segment_numbers(tokens: np.ndarray, begin_id: int, separator_id: int) -> np.ndarray:
  """(B, L + 1) int32, the number of the document that each of `tokens` (B, L + 1) belongs to, counted from 1 per row.

  A separator belongs to the document after it, before which it takes the place of the begin token.
  """
  return np.cumsum(np.isin(tokens, (begin_id, separator_id)), axis=1, dtype=np.int32)


def _ends(names: list[str]) -> list[str]:
  """The last parts of paths, as many as tell them apart."""
  parts = [name.split("/") for name in names]
  ends = (["/".join(part[-count:]) for part in parts] for count in range(1, max(map(len, parts)) + 1))
  return next((found for found in ends if len(set(found)) == len(found)), names)


def _sequence(corpus: Corpus, split: str, start: int, length: int) -> np.ndarray:
  """(length + 1,) int32: the begin token, then tokens from `start` on, around the stream's end where it ends before."""
  stream = corpus.streams[split]
  if start + length <= stream.length:
    tokens = stream.read(start, length)
  elif length < stream.length:
    tokens = np.concatenate([stream.read(start, stream.length - start), stream.read(0, start + length - stream.length)])
  else:
    tokens = np.take(stream.read(0, stream.length), np.arange(start, start + length), mode="wrap")
  if tokens.max() >= corpus.vocab_size:
    raise UserError(f"{corpus.name}: token {tokens.max()} is outside the vocabulary of {corpus.vocab_size}")
  return np.concatenate([[corpus.begin_id], tokens]).astype(np.int32)


class _Stack:
  """Makes a batch of sequences: of length + 1 tokens; of conversations, and where `padded`, of at most so many."""

  def __init__(self, corpora: Sequence[Corpus], length: int, segments: bool, padded: bool = False):
    self._corpus, self._length, self._segments, self._padded = corpora[0], length, segments, padded
    self._chat = any(corpus.indexes for corpus in corpora)

  def __call__(self, rows: Sequence[_Row]) -> Batch:
    tokens = np.full((len(rows), self._length + 1), self._corpus.separator_id, np.int32)
    for out, row in zip(tokens, rows):
      out[: len(row.tokens)] = row.tokens
    counted = np.arange(self._length + 1) < np.array([len(row.tokens) for row in rows])[:, None]
    numbers = segment_numbers(tokens, self._corpus.begin_id, self._corpus.separator_id) if self._segments else None
    if self._chat:
      return self._chat_batch(rows, tokens, counted, numbers)
    return Batch(tokens, counted if self._padded else None, numbers)

  def _chat_batch(self, rows: Sequence[_Row], tokens: np.ndarray, counted: np.ndarray, numbers: np.ndarray) -> Batch:
    """numbers: of documents of text; None: they are not isolated."""
    numbers = np.zeros_like(tokens) if numbers is None else numbers
    for row, answers, segments in zip(rows, counted, numbers):
      if row.answers is not None:
        answers[: len(row.tokens)] = row.answers
        segments[:] = 0  # the padding's
        segments[: len(row.tokens)] = row.segments
    counted[:, 0] = False
    return Batch(tokens, None, numbers, counted)
