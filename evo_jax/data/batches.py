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
  processes, whichever rows each of them needs, and nothing is read twice or skipped. Raises UserError where a corpus
  is shorter than one sequence.

  rows: which rows of each global batch to yield; None: all. segments: whether batches say which document each token
  belongs to.
  """
  rows = range(config.batch_size) if rows is None else rows
  sources = [_shuffled_sequences(corpus, length, config.seed + i) for i, corpus in enumerate(corpora)]
  weights = config.weights or [float(len(corpus.tokens["train"])) for corpus in corpora]
  mixed = grain.MapDataset.mix(sources, weights=list(weights)) if len(sources) > 1 else sources[0]
  batch = lambda step: _stack([mixed[step * config.batch_size + row] for row in rows], corpora[0], segments)
  return (
    grain.MapDataset.range(start, sys.maxsize // config.batch_size)
    .map(batch)
    .to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads))
  )


def held_out(
  corpora: list[corpora_lib.Corpus], split: str, length: int, count: int = 0, segments: bool = False
) -> Batch:
  """Consecutive sequences of a split, each of `length` tokens behind the begin token; the remainder is dropped.

  Raises UserError where there is not even one sequence. count: at most so many, evenly spread over the split; 0: all.
  segments: as for `training_stream`.
  """
  positions = [
    (corpus, start) for corpus in corpora for start in range(0, len(corpus.tokens[split]) - length + 1, length)
  ]
  if not positions:
    raise UserError(
      f"{', '.join(c.name for c in corpora)}: the {split} split is shorter than one sequence "
      f"(config.model.context = {length})"
    )
  if 0 < count < len(positions):
    positions = [positions[i] for i in np.linspace(0, len(positions) - 1, count).round().astype(int)]
  return _stack([_sequence(corpus, split, start, length) for corpus, start in positions], corpora[0], segments)


def segment_numbers(tokens: np.ndarray, begin_id: int, separator_id: int) -> np.ndarray:
  """(B, L + 1) int32, the number of the document that each of `tokens` (B, L + 1) belongs to, counted from 1 per row.

  A separator belongs to the document after it, before which it takes the place of the begin token.
  """
  return np.cumsum(np.isin(tokens, (begin_id, separator_id)), axis=1, dtype=np.int32)


def _shuffled_sequences(corpus: corpora_lib.Corpus, length: int, seed: int) -> grain.MapDataset:
  """Training sequences from every position of a corpus: all once in random order, then all again in another, ..."""
  positions = len(corpus.tokens["train"]) - length + 1
  if positions < 1:
    raise UserError(
      f"{corpus.name}: {len(corpus.tokens['train'])} training tokens are fewer than one sequence "
      f"(config.model.context = {length})"
    )
  stride = 1 + positions // _SHUFFLE_LIMIT
  sequence = lambda record: _sequence(corpus, "train", record * stride, length)
  return grain.MapDataset.range(positions // stride).shuffle(seed=seed).map(sequence).repeat()


def _sequence(corpus: corpora_lib.Corpus, split: str, start: int, length: int) -> np.ndarray:
  """(length + 1,) int32: the begin token, then `length` tokens from `start`."""
  return np.concatenate([[corpus.begin_id], corpus.tokens[split][start : start + length]]).astype(np.int32)


def _stack(sequences: list[np.ndarray], corpus: corpora_lib.Corpus, segments: bool) -> Batch:
  tokens = np.stack(sequences)
  return Batch(tokens, segments=segment_numbers(tokens, corpus.begin_id, corpus.separator_id) if segments else None)
