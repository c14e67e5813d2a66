"""A batch of sequences: the value that text becomes and that losses and NLL bounds are computed from."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
  """B sequences of L + 1 tokens, of which the first is context only. On the host numpy arrays, on devices JAX arrays.

  tokens: (B, L + 1) int32 ids. counted: (B, L + 1) bool, which of them losses and NLL bounds count; None: all (of the
  first there is none). segments: (B, L + 1) int32, numbers that differ between neighbouring documents; None: each
  sequence is one document. answers: (B, L + 1) bool, of conversations the tokens of answers: they alone count, and
  windows begin in them; in rows of text beside them all but the first. None: there are no conversations.
  """

  tokens: Any
  counted: Any = None
  segments: Any = None
  answers: Any = None

  @property
  def mask(self) -> Any:
    """(B, L + 1) bool, the tokens that count; None: all."""
    return self.counted if self.answers is None else self.answers

  def rows(self, index: Any) -> "Batch":
    """The batch of the rows that `index`, a slice or integers (n,), selects."""
    return Batch(*(None if field is None else field[index] for field in self))
