"""Records the trace of a text: a snapshot after every pass, turned into what was known and believed of each token.

`TraceRecorder` keeps all snapshots for a picture of the whole, `LiveTrace` tells what each new one shows.
"""

from typing import NamedTuple

import numpy as np

from evo_jax.data.tokenizers import Tokenizer, continuing
from evo_jax.decoding.progress import Snapshot, written_tokens
from evo_jax.decoding.prompts import Request
from evo_jax.decoding.settings import DEFAULT_PATH, STEPS_PATHS, Sampling
from evo_jax.decoding.trace import CORRECTION, DRAFT, JUMP, NONE, Trace


class _Pass(NamedTuple):
  """One row of a trace, T entries each."""

  time: np.ndarray
  pieces: list[str]
  event: np.ndarray


class TracedPass(NamedTuple):
  """What a pass did to the tokens that were not known before it. number: the pass's, from 1. cells: of each of them
  that is in play the index, from 0 for the first one written, t, the piece of text, and the event as in `Trace`."""

  number: int
  cells: list[tuple[int, float, str, int]]


class LiveTrace:
  """Follows one text, and looks at what changed alone."""

  def __init__(self, request: Request, tokenizer: Tokenizer):
    self._begin, self._end, self._tokenizer = request.prompt_end, request.max_length, tokenizer
    given = [True] + [token is not None for token in request.tokens]
    self._time = np.where(np.pad(given, (0, max(self._end - len(given), 0))), 0.0, 1.0)
    self._passes = 0
    self._shown: dict[int, str] = {}

  def update(self, row: Snapshot) -> list[TracedPass]:
    """The passes since the last look at the text: of all but the last, what they committed."""
    if int(row.passes) == self._passes:
      return []
    positions = np.flatnonzero(self._time > 0.0)
    index = positions - self._begin
    before = [self._shown.get(i, "") for i in index.tolist()]
    time, pieces, event = look(self._time, row, positions, before, self._tokenizer)
    self._shown |= {i: piece for i, piece in zip(index.tolist(), pieces) if piece}
    passes = {number: [] for number in range(self._passes + 1, int(row.passes) + 1)}
    self._time, self._passes = row.time[: len(self._time)], int(row.passes)
    for i, position, t, piece, what in zip(index.tolist(), positions.tolist(), time.tolist(), pieces, event.tolist()):
      if not np.isnan(t):
        number = int(row.committed_pass[position]) if t <= 0.0 else int(row.passes)
        passes[number].append((i, t, piece, what))
    return [TracedPass(number, cells) for number, cells in passes.items()]


class TraceRecorder:
  """Records one text of a batch that is decoded a pass at a time."""

  def __init__(self, request: Request, tokenizer: Tokenizer):
    self._request, self._tokenizer = request, tokenizer
    self._snapshots: list[Snapshot] = []

  def record(self, row: Snapshot) -> None:
    """Adds the text's state, if a pass was taken since the last one."""
    if not self._snapshots:
      self._snapshots.append(row)
      return
    new_passes = int(row.passes - self._snapshots[-1].passes)
    if new_passes > 0:
      # A round of passes that only draft, then one that verifies: the first commit nothing.
      self._snapshots += [self._snapshots[-1]] * (new_passes - 1) + [row]

  def trace(self, sampling: Sampling, text: str) -> Trace:
    """All passes, over the positions from the first that was not given to the last that was written.

    text: what `Generation` has.
    """
    begin, last = self._request.prompt_end, self._snapshots[-1]
    positions = begin + np.arange(len(written_tokens(self._request, last, self._tokenizer.end_ids)))
    passes, before = [], [""] * len(positions)
    for old, new in zip(self._snapshots, self._snapshots[1:]):
      passes.append(look(old.time, new, positions, before, self._tokenizer))
      before = passes[-1].pieces
    shape = (len(passes), len(positions))
    prompt = self._tokenizer.decode(np.array(self._request.tokens[: begin - 1], np.int64))
    return Trace(
      prompt=prompt,
      text=text.removeprefix(prompt) if self._request.gaps else text,
      mode=_describe(sampling),
      time=np.array([p.time for p in passes], float).reshape(shape),
      pieces=[p.pieces for p in passes],
      event=np.array([p.event for p in passes], np.int8).reshape(shape),
    )


def look(old_time: np.ndarray, new: Snapshot, positions: np.ndarray, before: list[str], tokenizer: Tokenizer) -> _Pass:
  """What the passes did between two snapshots, of the first of which the times (C,) are wanted; before: the pieces
  that were shown before it."""
  known, was_known = new.time[positions] <= 0.0, old_time[positions] <= 0.0
  drafting = new.draft_tokens is not None
  shown = np.where(known, new.tokens[positions], new.top_tokens[positions])
  drafted = np.zeros(len(positions), bool)
  if drafting:
    index = positions - int(new.length)
    drafted = (index >= 0) & (index < new.draft_pending) & ~known
    shown = np.where(drafted, new.draft_tokens[np.clip(index, 0, len(new.draft_tokens) - 1)], shown)
  in_play = known | drafted | (new.top_tokens[positions] >= 0)
  decode = lambda token: continuing(tokenizer).decode(np.array([token], np.int64))
  pieces = [decode(token) if shows else "" for token, shows in zip(shown.tolist(), in_play)]
  committed = known & ~was_known
  changed = np.array([bool(a) and a != b for a, b in zip(before, pieces)], bool)
  corrected = committed & changed & ((old_time[positions] < 1.0) | drafting)
  event = np.select([corrected, committed, drafted], [CORRECTION, JUMP, DRAFT], NONE)
  return _Pass(np.where(in_play, new.time[positions], np.nan), pieces, event)


def _describe(sampling: Sampling) -> str:
  if sampling.mode == "flow":
    path = sampling.path or DEFAULT_PATH["flow"]
    return f"flow, {path}" + (f", {sampling.steps} passes per window" if path in STEPS_PATHS else "")
  if sampling.mode == "adaptive":
    return f"adaptive, threshold {sampling.threshold:g}"
  return sampling.mode
