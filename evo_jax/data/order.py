"""The order of training sequences: what sequence number i of a run reads, from the seed alone and without memory.

A source is a ring of its tokens. Sequence k of it covers tokens [k L, (k + 1) L) of the ring's endless repetition, and
epoch e is the sequences that begin in its e-th turn, in an order of its own. So an epoch reads each token once (but for
less than a sequence at either end, which the epochs beside it read), nothing is padded, and borders move from turn to
turn. After L / gcd(N, L) turns of N tokens they would be the first again: then the ring is rotated.

Conversations are not cut: a source of them is a deck of sequences that stay the same (`packing`), and each epoch reads
all in an order of its own.

Sources are mixed by weights as evenly as whole numbers allow: among any i first sequences each source has its share, to
two sequences or so.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import functools
import math

import numpy as np

_ROUNDS = 6  # of a permutation
_MASK = 2**64 - 1
_GOLDEN = 0.6180339887498949  # rotations by this share of a sequence stay apart for long
_UNITS = 2**40  # of weights, as whole numbers


@dataclasses.dataclass(frozen=True)
class Ring:
  """Sequences of `length` tokens of a source of `tokens` tokens, which may be fewer. seed: of the order."""

  tokens: int
  length: int
  seed: tuple[int, ...]

  def start(self, k: int) -> int:
    """The token, in [0, tokens), with which the sequence begins that is read as number k."""
    N, L = self.tokens, self.length
    epoch = k * L // N
    first, end = -(-epoch * N // L), -(-(epoch + 1) * N // L)
    k = first + _shuffled(k - first, end - first, (*self.seed, epoch))
    turns = L // math.gcd(N, L)  # after which borders are the same
    rotation = epoch // turns * max(1, round(_GOLDEN * L))
    return (k * L + rotation + self._phase) % N

  @functools.cached_property
  def _phase(self) -> int:
    """By which borders of other seeds are others."""
    return _keys(self.seed)[0] % self.length

  def epochs(self, count: int) -> float:
    """How often `count` sequences have read the source."""
    return count * self.length / self.tokens


@dataclasses.dataclass(frozen=True)
class Deck:
  """`count` sequences, each of which an epoch reads once, in an order of its own. seed: of the orders."""

  count: int
  seed: tuple[int, ...]

  def at(self, k: int) -> int:
    """The sequence, in [0, count), that is read as number k."""
    epoch, index = divmod(k, self.count)
    return _shuffled(index, self.count, (*self.seed, epoch))

  def epochs(self, count: int) -> float:
    """How often `count` sequences have read all."""
    return count / self.count


class Mixture:
  """Which source each sequence of a run is of. Sequences are numbered from 0 through all batches."""

  def __init__(self, weights: Sequence[tuple[int, Sequence[float]]], batch_size: int):
    """weights: (step, a weight for each source), by step, from 0 on: those of the batches from number `step` on."""
    self._firsts = [step * batch_size for step, _ in weights]
    self._shares = [_whole(values) for _, values in weights]
    self._before = [(0,) * len(self._shares[0])]  # sequences of each source before each change
    for first in self._firsts[1:]:
      self._before.append(tuple(self.taken(first)))

  def taken(self, count: int) -> list[int]:
    """How many of the first `count` sequences are of each source."""
    phase = max(0, bisect.bisect_left(self._firsts, count, hi=len(self._before)) - 1)
    among = _divide(count - self._firsts[phase], self._shares[phase])
    return [a + b for a, b in zip(self._before[phase], among)]

  def at(self, i: int) -> tuple[int, int]:
    """The source of sequence i, and its number among the source's."""
    before, after = self.taken(i), self.taken(i + 1)
    source = next(s for s, (a, b) in enumerate(zip(before, after)) if a != b)
    return source, before[source]


def _whole(weights: Sequence[float]) -> list[int]:
  """Weights as whole numbers in the same proportions; those above 0 stay above 0."""
  if all(isinstance(weight, int) for weight in weights):
    return list(weights)
  total = math.fsum(weights)
  return [max(1, round(weight / total * _UNITS)) if weight else 0 for weight in weights]


def _divide(count: int, shares: Sequence[int]) -> list[int]:
  """`count` sequences in proportion to shares; with one more, exactly one source has one more."""
  rest, total, parts = count, sum(shares), []
  for share in shares:
    parts.append((rest * share + total // 2) // total if share else 0)
    rest, total = rest - parts[-1], total - share
  return parts


def _shuffled(index: int, count: int, seed: tuple[int, ...]) -> int:
  """Where number `index` of a random permutation of `count` leads: a Feistel network on the numbers of an even count of
  bits, walked until it leads below `count` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

  That of grain, which has the same form, takes no more than 2^32 numbers, and 9 ms where they are few.
  """
  bits = max(3, ((count - 1).bit_length() + 1) // 2)  # of a half
  mask = (1 << bits) - 1
  keys = _keys(seed)
  while True:
    left, right = index >> bits, index & mask
    for key in keys:
      left, right = right, left ^ (_mixed(right + key) & mask)
    index = left << bits | right
    if index < count:
      return index


def _mixed(value: int) -> int:
  """32 bits, each of which all of `value` changes."""
  value = value * 0x9E3779B97F4A7C15 & _MASK
  value = (value ^ value >> 32) * 0xD6E8FEB86659FD93 & _MASK
  return value >> 32


@functools.lru_cache(1024)
def _keys(seed: tuple[int, ...]) -> list[int]:
  """Random numbers of 64 bits, of which each of the seed's numbers changes all."""
  return np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64).tolist()
