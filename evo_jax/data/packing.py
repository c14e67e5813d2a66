"""Conversations packed into sequences: none is divided, those that are longer than a sequence are cut at their end.

Best fit, the longest first (`pack`), so that little is padding. The conversations of a sequence stay together from
epoch to epoch. Of a split no more than its index is in memory: some 50 bytes for each conversation.
"""

import numpy as np

from evo_jax.data import answers
from evo_jax.data.corpora import Corpus
from evo_jax.errors import UserError


class Packing:
  """The sequences of a split of conversations.

  tokens: of all sequences, without padding. cut: conversations of which the end is left out. left_out: those that are
  left out, since their first answer begins behind the end of a sequence.
  """

  def __init__(self, corpus: Corpus, split: str, length: int, seed: tuple[int, ...] = ()):
    """length: tokens of a sequence, and one more. seed: decides which conversations of the same length stand together.

    Raises UserError where no answer fits into a sequence.
    """
    self._stream, index = corpus.streams[split], corpus.indexes[split]
    lengths, first = index.read(0, index.length).reshape(-1, 2).astype(np.int64).T
    starts, room = np.cumsum(lengths) - lengths, length + 1
    fits = first < room
    if not fits.any():
      raise UserError(
        f"{corpus.name}: no answer begins within config.model.context = {length} tokens of its conversation"
      )
    self.cut, self.left_out = int((lengths[fits] > room).sum()), int((~fits).sum())
    self._starts, self._lengths = starts[fits], np.minimum(lengths[fits], room)
    self._members, self._ends = pack(self._lengths, room, seed)
    self.tokens, self._name, self._length = int(self._lengths.sum()), corpus.name, length

  def __len__(self) -> int:
    return len(self._ends)

  @property
  def report(self) -> str:
    """What was packed, in a line."""
    padding = 100 * (1 - self.tokens / (len(self) * (self._length + 1)))
    cut = f"; {self.cut:,} are longer and lose their end" if self.cut else ""
    left_out = f"; {self.left_out:,} more are left out: their answers begin behind it" if self.left_out else ""
    return (
      f"{self._name}: {len(self._lengths):,} conversations in {len(self):,} sequences of {self._length:,} tokens, "
      f"{padding:.1f} % of them padding{cut}{left_out}"
    )

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence `number`, at most length + 1 tokens: ids (n,) int32, which of them are answers' (n,) bool, and the
    numbers of their conversations (n,) int32, from 1."""
    members = self._members[self._ends[number - 1] if number else 0 : self._ends[number]]
    parts = [self._stream.read(int(self._starts[i]), int(self._lengths[i])) for i in members]
    numbers = np.concatenate(parts)
    segments = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [len(part) for part in parts])
    return answers.ids_of(numbers), answers.are_answers(numbers), segments


def pack(lengths: np.ndarray, room: int, seed: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
  """Packs items of `lengths` (n,) in 1..room into bins: their numbers by bin (n,), and where each bin ends (bins,).

  The longest first, each into the bin with the least room that is enough for it (best fit decreasing: Johnson, 1973);
  of the same length in an order that the seed draws. The same on every machine.
  """
  decreasing = np.lexsort((np.random.PCG64(seed or 0).random_raw(len(lengths)), -lengths))
  bins, waiting, open_rooms = [], {}, 0  # waiting: bins by their room; open_rooms: bit r: some have room r
  for item in decreasing.tolist():
    length = int(lengths[item])
    enough = open_rooms >> length
    if enough:
      left = length + (enough & -enough).bit_length() - 1
      number = waiting[left].pop()
      open_rooms ^= 0 if waiting[left] else 1 << left
    else:
      left, number = room, len(bins)
      bins.append([])
    bins[number].append(item)
    waiting.setdefault(left - length, []).append(number)
    open_rooms |= 1 << left - length
  return np.array([item for members in bins for item in members]), np.cumsum([len(members) for members in bins])
