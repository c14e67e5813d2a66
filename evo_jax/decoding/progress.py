"""What the host sees of a text while it is decoded: snapshots, streamed text, the finished generation."""

import bisect
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from evo_jax.data.tokenizers import Tokenizer, continuing
from evo_jax.decoding.prompts import Prompt, Request
from evo_jax.decoding.state import DecodingState

_INVALID = "\ufffd"  # what bytes that are not UTF-8 are decoded to
_CHARACTER = 4  # bytes that a character has at most


class TokenChoice(NamedTuple):
  """A written token, its log-probability in nats, and the most probable tokens with theirs: by autoregression, at
  temperature 1, whatever the settings."""

  token: int
  log_p: float
  best: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Generation:
  """A finished text.

  text: what was written; after infilling, the whole text with its gaps filled. tokens: ids of what was written, which
  decode to the text. settled: number of the pass that committed each of them. seconds: until this text was done,
  without compilation. end_id: the token by which the model ended the text behind them; None: something else ended it.
  Of mode verify, else None: rounds: passes that verified, each of which commits a token of its own. drafted_rounds:
  those of them that had a draft to verify. accepted: the drafted tokens that they committed, neither the corrections
  nor the tokens that come free behind accepted ones; so a text has `accepted + rounds` tokens, with an end token, but
  for its last round, which need not have a token of its own. All with what a stop string cuts off.
  choices: where an engine was asked for log-probabilities, of `tokens`, and of what the model drew behind them: an end
  token, or a part of a character.
  """

  prompt: Prompt
  text: str
  tokens: list[int]
  settled: list[int]
  passes: int
  seconds: float
  end_id: int | None = None
  accepted: int | None = None
  rounds: int | None = None
  drafted_rounds: int | None = None
  choices: list[TokenChoice] | None = None


class Snapshot(NamedTuple):
  """The part of a decoding state that the host looks at; see `DecodingState`. `accepted`, `rounds` and
  `drafted_rounds` are of mode verify, the last four for traces."""

  tokens: np.ndarray
  length: np.ndarray
  done: np.ndarray
  passes: np.ndarray
  committed_pass: np.ndarray
  accepted: np.ndarray | None = None
  rounds: np.ndarray | None = None
  drafted_rounds: np.ndarray | None = None
  time: np.ndarray | None = None
  top_tokens: np.ndarray | None = None
  draft_tokens: np.ndarray | None = None
  draft_pending: np.ndarray | None = None

  @classmethod
  def select(cls, state: DecodingState) -> "Snapshot":
    """The state's arrays, still on their devices."""
    arrays = dict(
      tokens=state.tokens,
      length=state.length,
      done=state.done,
      passes=state.passes,
      committed_pass=state.committed_pass,
    )
    if (draft := state.draft) is not None:
      record = draft.record
      arrays |= dict(accepted=record.accepted, rounds=record.rounds, drafted_rounds=record.drafted_rounds)
    if state.top_tokens is not None:
      arrays |= dict(time=state.time, top_tokens=state.top_tokens)
      arrays |= {} if draft is None else dict(draft_tokens=draft.tokens, draft_pending=draft.pending)
    return cls(**arrays)

  def without_traces(self) -> "Snapshot":
    return self._replace(time=None, top_tokens=None, draft_tokens=None, draft_pending=None)

  def row(self, i: int) -> "Snapshot":
    return Snapshot(*(None if array is None else array[i] for array in self))


def written_tokens(request: Request, row: Snapshot, end_ids: tuple[int, ...]) -> list[int]:
  """What stands without a gap behind the prompt, up to the first end token."""
  tokens = row.tokens[request.prompt_end : row.length].tolist()
  return tokens[: next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))]


def find_stop(text: str, stop: tuple[str, ...]) -> int | None:
  """Where the first stop string begins; None: there is none.

  The first is the one that is complete first, of several the longest: it is found as soon as the text has it, so that
  nothing depends on how often the text is looked at.
  """
  found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
  return min(found)[1] if found else None


class Progress:
  """Follows one text: what may be streamed, whether it is done, by the model or by a stop string, and what it is then.

  A text ends before the first stop string in what was written, and without the first bytes of a character that is not
  complete. In infilling each gap does, and what is given follows it at once.
  """

  def __init__(
    self,
    request: Request,
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    infill: bool = False,
    end_ids: tuple[int, ...] = (),
  ):
    """end_ids: tokens that end the text beside the tokenizer's."""
    self._end_ids = tokenizer.end_ids + end_ids
    self._request, self._stop, self._infill, self._whole = request, stop, infill, tokenizer
    self._tokenizer = tokenizer if request.prompt_end == 1 and not infill else continuing(tokenizer)
    self._streamed = ""
    self.seconds: float | None = None  # until it was done
    self.stopped = False  # whether a stop string ended it

  def _decode(self, tokens: list[int]) -> str:
    return self._tokenizer.decode(np.array(tokens, np.int64))

  def update(self, row: Snapshot, seconds: float) -> str:
    """Text that is new since the last update and final; of a text with gaps, nothing."""
    if self.seconds is not None:
      return ""
    if self._infill:
      self.seconds = max(seconds, 1e-9) if row.done else None
      return ""
    # Without the first bytes of a character at its end; what may be the beginning of a stop string waits.
    text = self._decode(written_tokens(self._request, row, self._end_ids)).rstrip(_INVALID)
    self.stopped = find_stop(text, self._stop) is not None
    if row.done or self.stopped:
      text, self.seconds = self._written(row)[0], max(seconds, 1e-9)
    else:
      text = text[: max(0, len(text) - max(map(len, self._stop), default=1) + 1)]
    new = text[len(self._streamed) :]
    self._streamed += new
    return new

  def generation(self, row: Snapshot) -> Generation:
    """The finished text."""
    text, tokens, committed = self._filled(row) if self._infill else self._written(row)
    end = None if self._infill or self.stopped else self._end_id(row)
    counts = (row.accepted, row.rounds, row.drafted_rounds)
    counts = (None if count is None else int(count) for count in counts)
    return Generation(self._request.prompt, text, tokens, committed, int(row.passes), self.seconds, end, *counts)

  def drawn(self, row: Snapshot) -> list[int]:
    """What the model drew: the text's tokens, the end token, and the part of a character that the text leaves out;
    where a stop string ended it, the text's tokens alone."""
    if self.stopped:
      return self._written(row)[1]
    tokens = written_tokens(self._request, row, self._end_ids)
    end = self._request.prompt_end + len(tokens)
    return row.tokens[self._request.prompt_end : min(end + 1, row.length)].tolist()

  def _written(self, row: Snapshot) -> tuple[str, list[int], list[int]]:
    """Text, tokens and their passes behind the prompt."""
    tokens, begin = written_tokens(self._request, row, self._end_ids), self._request.prompt_end
    tokens, committed = self._cut(tokens, row.committed_pass[begin : begin + len(tokens)].tolist())
    return self._decode(tokens), tokens, committed

  def _end_id(self, row: Snapshot) -> int | None:
    """The end token behind what was written, also where that ends with a part of a character."""
    end = self._request.prompt_end + len(written_tokens(self._request, row, self._end_ids))
    return int(row.tokens[end]) if end < row.length else None

  def _filled(self, row: Snapshot) -> tuple[str, list[int], list[int]]:
    """The whole text, and the gaps' tokens and their passes."""
    whole, filled, committed = [], [], []
    for gap, run in itertools.groupby(enumerate(self._request.tokens, 1), lambda item: item[1] is None):
      positions = [position for position, _ in run]
      tokens = row.tokens[positions].tolist()
      if gap:
        tokens, passes = self._cut(tokens, row.committed_pass[positions].tolist())
        filled, committed = filled + tokens, committed + passes
      whole += tokens
    return self._whole.decode(np.array(whole, np.int64)), filled, committed

  def _cut(self, tokens: list[int], committed: list[int]) -> tuple[list[int], list[int]]:
    """The tokens, and their passes, before the first stop string, without half a character at the end."""
    text = self._decode(tokens)
    stop = find_stop(text, self._stop)
    if stop is not None:
      text, length = text[:stop], lambda n: len(self._decode(tokens[:n]))
      n = bisect.bisect_right(range(len(tokens) + 1), stop + _CHARACTER, key=length) - 1
      while not text.startswith(self._decode(tokens[:n])):
        n -= 1
      # A token that has text on both sides of the cut is replaced by those of the text before it.
      rest = self._tokenizer.encode(text[length(n) :]).tolist()
      tokens, committed = tokens[:n] + rest, committed[:n] + committed[n : n + 1] * len(rest)
    for n in range(len(tokens), max(len(tokens) - _CHARACTER, -1), -1):
      if not self._decode(tokens[:n]).endswith(_INVALID):
        return tokens[:n], committed[:n]
    return tokens, committed  # more bytes that are no text than half a character has
