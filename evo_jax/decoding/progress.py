"""What the host sees of a text while it is decoded: snapshots, streamed text, the finished generation."""

import dataclasses
from typing import NamedTuple

import numpy as np

from evo_jax.data.tokenizers import Tokenizer
from evo_jax.decoding.prompts import Request
from evo_jax.decoding.state import DecodingState


@dataclasses.dataclass(frozen=True)
class Generation:
  """A finished text.

  text: what was written; after infilling, the whole text with its gaps filled. tokens: ids of what was written.
  settled: number of the pass that committed each of them. seconds: until this text was done, without compilation.
  """

  prompt: str
  text: str
  tokens: list[int]
  settled: list[int]
  passes: int
  seconds: float


class Snapshot(NamedTuple):
  """The part of a decoding state that the host looks at; see `DecodingState`. The last four are for traces."""

  tokens: np.ndarray
  length: np.ndarray
  done: np.ndarray
  passes: np.ndarray
  committed_pass: np.ndarray
  time: np.ndarray | None = None
  top_tokens: np.ndarray | None = None
  draft_tokens: np.ndarray | None = None
  draft_pending: np.ndarray | None = None

  @classmethod
  def select(cls, state: DecodingState) -> "Snapshot":
    """The state's arrays, still on their devices."""
    arrays = (state.tokens, state.length, state.done, state.passes, state.committed_pass)
    if state.top_tokens is None:
      return cls(*arrays)
    draft = (None, None) if state.draft is None else (state.draft.tokens, state.draft.pending)
    return cls(*arrays, state.time, state.top_tokens, *draft)

  def row(self, i: int) -> "Snapshot":
    return Snapshot(*(None if array is None else array[i] for array in self))


def written_tokens(request: Request, row: Snapshot, end_ids: tuple[int, ...]) -> list[int]:
  """What stands without a gap behind the prompt, up to the first end token."""
  tokens = row.tokens[request.prompt_end : row.length].tolist()
  return tokens[: next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))]


class Progress:
  """Follows one text: what may be streamed, and whether it is done, by the model or by a stop string."""

  def __init__(self, request: Request, tokenizer: Tokenizer, stop: tuple[str, ...]):
    self._request, self._tokenizer, self._stop = request, tokenizer, stop
    self._streamed = ""
    self._stop_at: int | None = None  # where the text has a stop string
    self.seconds: float | None = None  # until it was done

  def _decode(self, tokens: list[int]) -> str:
    return self._tokenizer.decode(np.array(tokens, np.int64))

  def update(self, row: Snapshot, seconds: float) -> str:
    """Text that is new since the last update and final."""
    if self.seconds is not None:
      return ""
    text = self._decode(written_tokens(self._request, row, self._tokenizer.end_ids))
    stops = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
    if stops:
      self._stop_at = min(stops)
    if stops or row.done:
      text, self.seconds = text[: self._stop_at], max(seconds, 1e-9)
    else:  # the first bytes of a character, and what may be the beginning of a stop string, wait
      text = text.rstrip("\ufffd")
      text = text[: len(text) - max(map(len, self._stop), default=1) + 1]
    new = text[len(self._streamed) :] if text.startswith(self._streamed) else ""
    self._streamed += new
    return new

  def generation(self, row: Snapshot, infill: bool) -> Generation:
    """The finished text."""
    request = self._request
    if infill:
      text = self._decode(row.tokens[1 : len(request.tokens) + 1].tolist())
      positions = request.gaps
      tokens = row.tokens[positions].tolist()
    else:
      tokens = written_tokens(request, row, self._tokenizer.end_ids)
      text = self._decode(tokens)[: self._stop_at]
      if self._stop_at is not None:  # the fewest tokens that have the text before the stop string
        tokens = next(tokens[:n] for n in range(len(tokens) + 1) if len(self._decode(tokens[:n])) >= self._stop_at)
      positions = [request.prompt_end + i for i in range(len(tokens))]
    committed = row.committed_pass[positions].tolist()
    return Generation(request.prompt, text, tokens, committed, int(row.passes), self.seconds)
