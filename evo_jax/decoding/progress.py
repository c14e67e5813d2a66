"""What of a text is committed, as the host sees it."""

import dataclasses

import numpy as np

from evo_jax.data import tokenizers
from evo_jax.decoding import settings
from evo_jax.decoding import trace as trace_lib


@dataclasses.dataclass(frozen=True)
class Generation:
  """A text. `tokens`: what was written, by id; `settled`: the number of the pass that settled each; `seconds`: until
  this text was done, compilation apart. `text`: what was written; of infilling, the whole text with its gaps filled."""

  prompt: str
  text: str
  tokens: list[int]
  settled: list[int]
  passes: int
  seconds: float


@dataclasses.dataclass
class Row:
  """A text to be written: `tokens` from place 1 on (None in gaps), and the `number` that its key is made of."""

  prompt: str
  tokens: list[int | None]
  number: tuple[int, int]

  @property
  def begin(self) -> int:
    """The first place that is not known."""
    return (self.tokens + [None]).index(None) + 1

  def written(self, token: np.ndarray, length: int) -> list[int]:
    """Of the buffer `token` (C,), of which `length` places are known without a gap: what was written, up to the
    document's end."""
    tokens = token[self.begin : length].tolist()
    return tokens[: tokens.index(tokenizers.DOCUMENT)] if tokenizers.DOCUMENT in tokens else tokens


class Progress:
  """What is settled of one text, as the host sees it."""

  def __init__(self, row: Row, tokenizer: tokenizers.Tokenizer, stop: tuple[str, ...]):
    self._row, self._tokenizer, self._stop = row, tokenizer, stop
    self._told, self._cut = "", None
    self.seconds: float | None = None  # until it was done

  def _tokens(self, host: dict[str, np.ndarray], i: int) -> list[int]:
    """What is written without a gap, up to the document's end."""
    return self._row.written(host["token"][i], host["length"][i])

  def _decode(self, tokens: list[int]) -> str:
    return self._tokenizer.decode(np.array(tokens, np.int64))

  def look(self, host: dict[str, np.ndarray], i: int, seconds: float) -> str:
    """What is new and will stay."""
    if self.seconds is not None:
      return ""
    text = self._decode(self._tokens(host, i))
    found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
    if found:
      self._cut = min(found)
    if found or host["done"][i]:
      text, self.seconds = text[: self._cut], max(seconds, 1e-9)
    else:  # the first bytes of a character, and what may be the beginning of a stop string, wait
      text = text.rstrip("\ufffd")
      text = text[: len(text) - max(map(len, self._stop), default=1) + 1]
    new = text[len(self._told) :] if text.startswith(self._told) else ""
    self._told += new
    return new

  def generation(self, host: dict[str, np.ndarray], i: int, infill: bool) -> Generation:
    row = self._row
    if infill:
      places = [place for place, token in enumerate(row.tokens, 1) if token is None]
      text = self._decode(host["token"][i, 1 : len(row.tokens) + 1].tolist())
      tokens = host["token"][i, places].tolist()
    else:
      # A stop string shortens the text; the tokens that are left are those that the rest needs.
      tokens = self._tokens(host, i)
      text = self._decode(tokens)[: self._cut]
      if self._cut is not None:
        tokens = next(tokens[:n] for n in range(len(tokens) + 1) if len(self._decode(tokens[:n])) >= self._cut)
      places = [row.begin + j for j in range(len(tokens))]
    return Generation(
      row.prompt, text, tokens, host["settled"][i, places].tolist(), int(host["passes"][i]), self.seconds
    )


class TraceRecorder:
  """Looks at the first text of a batch after every pass."""

  def __init__(self, row: Row):
    self._row, self._looks = row, []

  def look(self, host: dict[str, np.ndarray]) -> None:
    new = {name: value[0] for name, value in host.items()}
    before = self._looks[-1]["passes"] if self._looks else -1
    # Between two looks there may be passes that only propose: nothing is settled by them.
    self._looks += [self._looks[-1]] * max(new["passes"] - before - 1, 0) if self._looks else []
    if new["passes"] > before:
      self._looks.append(new)

  def trace(self, sampling: settings.Sampling, tokenizer: tokenizers.Tokenizer) -> trace_lib.Trace:
    """The passes; places from the first unknown one to the last known one."""
    begin, last = self._row.begin, self._looks[-1]
    places = begin + np.arange(len(self._row.written(last["token"], last["length"])))
    decode_one = lambda token: tokenizer.decode(np.array([token], np.int64))
    time, believed, event = [], [], []
    before_text = [""] * len(places)
    for old, new in zip(self._looks, self._looks[1:]):
      known, was = new["time"][places] <= 0.0, old["time"][places] <= 0.0
      shown = np.where(known, new["token"][places], new["guess"][places])
      seen = known | (new["guess"][places] > 0)
      proposed = np.zeros(len(places), bool)
      if "proposal" in new:
        at = places - int(new["length"])
        proposed = (at >= 0) & (at < new["proposals"]) & ~known
        shown = np.where(proposed, new["proposal"][np.clip(at, 0, len(new["proposal"]) - 1)], shown)
        seen = known | proposed
      texts = [decode_one(token) if there else "" for token, there in zip(shown.tolist(), seen)]
      changed = np.array([bool(a) and a != b for a, b in zip(before_text, texts)])
      partial = (old["time"][places] < 1.0) | ("proposal" in new)
      newly = known & ~was
      event.append(
        np.where(
          newly & changed & partial,
          trace_lib.CORRECTION,
          np.where(newly, trace_lib.JUMP, np.where(proposed, trace_lib.DRAFT, trace_lib.NONE)),
        )
      )
      time.append(np.where(seen, new["time"][places], np.nan))
      believed.append(texts)
      before_text = texts
    prompt = tokenizer.decode(np.array(self._row.tokens[: begin - 1], np.int64))
    setting = {
      "flow": f", {sampling.path or 'diagonal'}, {sampling.steps} passes a window",
      "adaptive": f", threshold {sampling.threshold:g}",
    }.get(sampling.mode, "")
    return trace_lib.Trace(
      prompt,
      sampling.mode + setting,
      np.array(time, float).reshape(len(time), len(places)),
      believed,
      np.array(event, np.int8).reshape(len(time), len(places)),
    )
