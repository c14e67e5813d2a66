"""Batches of training sequences and held-out sequences."""

from collections.abc import Sequence
import sys

import grain
import numpy as np

from evo_jax import config as config_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError


def sequence(tokens: np.ndarray, start: int, length: int) -> np.ndarray:
  """(length + 1,) int32: the document token, then `length` tokens from `start`."""
  return np.concatenate([[tokenizers.DOCUMENT], tokens[start : start + length]]).astype(np.int32)


def training_stream(
  corpora: list[corpora_lib.Corpus],
  config: config_lib.Data,
  length: int,
  rows: Sequence[int] | None = None,
  start: int = 0,
) -> grain.IterDataset:
  """Batches without end, from global batch number `start` on: of each the `rows` (None: all), (rows, length + 1) int32.

  What batch number n holds depends on the seed alone: a run that has made n steps goes on with start = n, on any
  number of processes, whichever rows each of them needs, and nothing is read twice or left out.
  """
  rows = range(config.batch_size) if rows is None else rows
  sources = []
  for i, corpus in enumerate(corpora):
    tokens = corpus.tokens["train"]
    if len(tokens) < length:
      raise UserError(
        f"{corpus.name}: {len(tokens)} training tokens are fewer than one sequence (config.model.context = {length})"
      )
    places = len(tokens) - length + 1
    stride = 1 + (places >> 31)  # grain shuffles up to 2^31 records
    pick = lambda record, tokens=tokens, stride=stride: sequence(tokens, record * stride, length)
    sources.append(grain.MapDataset.range(places // stride).shuffle(seed=config.seed + i).map(pick).repeat())
  weights = config.weights or [float(len(c.tokens["train"])) for c in corpora]
  mixed = grain.MapDataset.mix(sources, weights=list(weights)) if len(sources) > 1 else sources[0]
  batch = lambda step: np.stack([mixed[step * config.batch_size + row] for row in rows])
  return (
    grain.MapDataset.range(start, sys.maxsize // config.batch_size)
    .map(batch)
    .to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads))
  )


def held_out(corpora: list[corpora_lib.Corpus], split: str, length: int, count: int = 0) -> np.ndarray:
  """(n, length + 1) int32: consecutive sequences of a split, the remainder dropped; `count` > 0: so many at most,
  evenly spread over it. Raises UserError where there is not even one."""
  places = [
    (corpus.tokens[split], start)
    for corpus in corpora
    for start in range(0, len(corpus.tokens[split]) - length + 1, length)
  ]
  if not places:
    raise UserError(
      f"{', '.join(c.name for c in corpora)}: the {split} split is shorter than one sequence "
      f"(config.model.context = {length})"
    )
  if 0 < count < len(places):
    places = [places[i] for i in np.linspace(0, len(places) - 1, count).round().astype(int)]
  return np.stack([sequence(tokens, start, length) for tokens, start in places])
