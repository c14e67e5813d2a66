"""Batches of training sequences, an endless resumable stream (grain), and of held-out sequences."""

from collections.abc import Sequence
import sys

import grain
import numpy as np

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import corpora as corpora_lib
from evo_jax.errors import UserError

_SHUFFLE_LIMIT = 2**31  # records that grain can shuffle


def training_stream(
  corpora: list[corpora_lib.Corpus],
  config: config_lib.Data,
  length: int,
  rows: Sequence[int] | None = None,
  start: int = 0,
  segments: bool = False,
) -> grain.IterDataset:
  """Endless batches of sequences of `length` tokens behind the begin token, from global batch number `start` on.

  Batch number n depends on the seed alone: a run that has made n steps resumes with start = n, on any number of
  processes, whichever rows each of them needs, and nothing is read twice or skipped. A corpus shorter than one sequence
  is padded with separators that do not count. Raises UserError where a corpus has no training text.

  rows: which rows of each global batch to yield; None: all. segments: whether batches say which document each token
  belongs to.
  """
  rows = range(config.batch_size) if rows is None else rows
  sources = [_shuffled_sequences(corpus, length, config.seed + i) for i, corpus in enumerate(corpora)]
  weights = config.weights or [float(len(corpus.tokens["train"])) for corpus in corpora]
  mixed = grain.MapDataset.mix(sources, weights=list(weights)) if len(sources) > 1 else sources[0]
  padded = any(len(corpus.tokens["train"]) < length for corpus in corpora)  # one structure for all batches

  def batch(step: int) -> Batch:
    sequences = [mixed[step * config.batch_size + row] for row in rows]
    return _stack(sequences, corpora[0], length, segments, padded)

  return (
    grain.MapDataset.range(start, sys.maxsize // config.batch_size)
    .map(batch)
    .to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads))
  )


def held_out(
  corpora: list[corpora_lib.Corpus], split: str, length: int, count: int = 0, segments: bool = False
) -> Batch:
  """Consecutive sequences of a split, each of `length` tokens behind the begin token; the remainder is dropped.

  Where there is not even one, each corpus is one, padded with separators that do not count: `ar` gives its tokens the
  bits that they have in front of any other text, other paths let those of its last window see where it ends. Raises
  UserError where there is no text. count: at most so many, evenly spread over the split; 0: all. segments: as for
  `training_stream`.
  """
  positions = [
    (corpus, start) for corpus in corpora for start in range(0, len(corpus.tokens[split]) - length + 1, length)
  ]
  padded = not positions
  if padded:
    positions = [(corpus, 0) for corpus in corpora if _has_text(corpus, split)]
  if not positions:
    raise UserError(f"{', '.join(c.name for c in corpora)}: the {split} split has no text")
  if 0 < count < len(positions):
    positions = [positions[i] for i in np.linspace(0, len(positions) - 1, count).round().astype(int)]
  sequences = [_sequence(corpus, split, start, length) for corpus, start in positions]
  return _stack(sequences, corpora[0], length, segments, padded)


def segment_numbers(tokens: np.ndarray, begin_id: int, separator_id: int) -> np.ndarray:
  """(B, L + 1) int32, the number of the document that each of `tokens` (B, L + 1) belongs to, counted from 1 per row.

  A separator belongs to the document after it, before which it takes the place of the begin token.
  """
  return np.cumsum(np.isin(tokens, (begin_id, separator_id)), axis=1, dtype=np.int32)


def _shuffled_sequences(corpus: corpora_lib.Corpus, length: int, seed: int) -> grain.MapDataset:
  """Training sequences from every position of a corpus: all once in random order, then all again in another, ..."""
  if not _has_text(corpus, "train"):
    raise UserError(f"{corpus.name}: there is no text to train on beside the held-out text")
  positions = max(1, len(corpus.tokens["train"]) - length + 1)
  stride = 1 + positions // _SHUFFLE_LIMIT
  sequence = lambda record: _sequence(corpus, "train", record * stride, length)
  return grain.MapDataset.range(positions // stride).shuffle(seed=seed).map(sequence).repeat()


def _has_text(corpus: corpora_lib.Corpus, split: str) -> bool:
  """Whether a split has more than separators. Of less than 20 documents, the shortest give it nothing."""
  return bool((corpus.tokens[split][:100] != corpus.separator_id).any())


def _sequence(corpus: corpora_lib.Corpus, split: str, start: int, length: int) -> np.ndarray:
  """(length + 1,) int32, or fewer at the end: the begin token, then the tokens from `start`."""
  return np.concatenate([[corpus.begin_id], corpus.tokens[split][start : start + length]]).astype(np.int32)


def _stack(sequences: list[np.ndarray], corpus: corpora_lib.Corpus, length: int, segments: bool, padded: bool) -> Batch:
  """The batch of sequences (length + 1,) or, if `padded`, shorter."""
  tokens = np.full((len(sequences), length + 1), corpus.separator_id, np.int32)
  for row, sequence in zip(tokens, sequences):
    row[: len(sequence)] = sequence
  counted = np.arange(length + 1) < np.array([len(sequence) for sequence in sequences])[:, None]
  numbers = segment_numbers(tokens, corpus.begin_id, corpus.separator_id) if segments else None
  return Batch(tokens, counted if padded else None, numbers)
