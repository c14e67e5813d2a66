"""Batches of training sequences, an endless resumable stream (grain), and of held-out sequences."""

import bisect
from collections.abc import Sequence
import concurrent.futures
import itertools
import sys

import grain
import numpy as np

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import order
from evo_jax.data.corpora import Corpus
from evo_jax.errors import UserError

_READERS = 16  # threads that read held-out text: a bucket answers after some hundredths of a second


class TrainingText:
  """The training text of corpora in the order of a run. What batch n holds depends on the seed and n alone."""

  def __init__(self, corpora: Sequence[Corpus], config: config_lib.Data, length: int):
    """length: tokens of a sequence, apart from the begin token. Raises UserError where there is no training text, or
    the weights do not go with the corpora."""
    self.corpora = [corpus for corpus in corpora if corpus.streams["train"].length]
    if not self.corpora:
      raise UserError(f"{', '.join(c.name for c in corpora)}: there is no text to train on beside the held-out text")
    self._config, self._length = config, length
    sizes = [corpus.streams["train"].length for corpus in self.corpora]
    self._rings = [order.Ring(size, length, (config.seed, i)) for i, size in enumerate(sizes)]
    self._mixture = order.Mixture(self._weights(sizes), config.batch_size)
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

    def sequence(index: int) -> np.ndarray:
      step, row = divmod(index, len(rows))
      source, k = self._mixture.at(step * size + rows[row])
      return _sequence(self.corpora[source], "train", self._rings[source].start(k), self._length)

    return iter(
      grain.MapDataset.range(int(start) * len(rows), sys.maxsize // size)
      .map(sequence)
      .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2 * len(rows))))
      .batch(len(rows), batch_fn=lambda sequences: _stack(sequences, self.corpora[0], self._length, segments))
    )

  @property
  def tokens(self) -> int:
    """Of all corpora."""
    return sum(ring.tokens for ring in self._rings)

  def epochs(self, batches: int) -> dict[str, float]:
    """How often each corpus has been read by so many batches of the run, by the end of its name."""
    taken = self._mixture.taken(batches * self._config.batch_size)
    return {name: ring.epochs(k) for name, ring, k in zip(self._names, self._rings, taken)}

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

  Where there is not even one, each corpus is one, padded with separators that do not count: `ar` gives its tokens the
  bits that they have in front of any other text, other paths let those of its last window see where it ends. Raises
  UserError where there is no text, or it cannot be read. count: at most so many, evenly spread over the split; 0: all.
  segments: as for `TrainingText.batches`.
  """
  lengths = [corpus.streams[split].length for corpus in corpora]
  if not any(lengths):
    names = ", ".join(corpus.name for corpus in corpora)
    raise UserError(f"{names}: the {split} split has no text (config.data.{split}_share, config.data.{split})")
  padded = max(lengths) < length
  counts = [bool(n) if padded else n // length for n in lengths]
  ends = list(itertools.accumulate(counts))
  numbers = range(ends[-1])
  if 0 < count < ends[-1]:
    numbers = np.linspace(0, ends[-1] - 1, count).round().astype(int).tolist()

  def sequence(number: int) -> np.ndarray:
    i = bisect.bisect_right(ends, number)
    start = (number - ends[i] + counts[i]) * length
    return _sequence(corpora[i], split, start, min(length, lengths[i]))

  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    return _stack(list(pool.map(sequence, numbers)), corpora[0], length, segments, padded)


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


def _stack(sequences: Sequence[np.ndarray], corpus: Corpus, length: int, segments: bool, padded: bool = False) -> Batch:
  """The batch of sequences (length + 1,) or, if `padded`, shorter."""
  tokens = np.full((len(sequences), length + 1), corpus.separator_id, np.int32)
  for row, sequence in zip(tokens, sequences):
    row[: len(sequence)] = sequence
  counted = np.arange(length + 1) < np.array([len(sequence) for sequence in sequences])[:, None]
  numbers = segment_numbers(tokens, corpus.begin_id, corpus.separator_id) if segments else None
  return Batch(tokens, counted if padded else None, numbers)
