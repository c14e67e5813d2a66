"""A model's answers to a benchmark's requests: likelihoods of continuations and generated texts, kept as they come."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
import dataclasses
import math
import operator
import time
from typing import Any

import numpy as np
from rich import progress as rich_progress
from rich.console import Console

from evo_jax.benchmarks.kept import KeptAnswers, digest
from evo_jax.benchmarks.pairs import Encoder, Pair, fitted, fitted_prompt
from evo_jax.data.tokenizers import continuing
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.settings import Sampling
from evo_jax.evaluation.batches import BatchScorer, Bound

_IN_FLIGHT = 256  # requests that an engine has at once
_CHARACTERS = 4  # of a prompt, that are read in the time of a written token, about; only the time left depends on it
GAPS = (8, 16, 32)  # tokens of a gap whose text is written, of which the most probable is taken


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Of a continuation: log_p in nats, of a path a bound; greedy: whether it is what greedy decoding writes; stderr: of
  the noise's draws, in nats; cut: whether the context was too long."""

  log_p: float
  greedy: bool
  stderr: float | None = None
  cut: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
  """A text to be written behind a context. sampling: with its stop strings and length. number: of those with the same
  context, sampling and document. document: the text before and behind a gap, where that is to be filled instead."""

  context: str
  sampling: Sampling
  number: int = 0
  document: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was written. tokens: so many; passes: until the last of them was committed; of infilling those of all gaps
  that were tried, and one for each that was scored. cut: whether the prompt was too long, or left no room for as many
  tokens as were asked for."""

  text: str
  tokens: int
  passes: int
  cut: bool = False


class Likelihoods:
  """Likelihoods of continuations, or a path's bounds on them."""

  def __init__(self, scorer: BatchScorer, encoder: Encoder, kept: KeptAnswers, limit: int | None = None):
    """limit: tokens of the longest text; None: what the scorer takes."""
    self._scorer, self._encoder, self._kept = scorer, encoder, kept
    self.limit = min(limit or scorer.limit, scorer.limit)

  def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """Of continuations given their contexts."""
    compute = lambda numbers: self._compute([fitted(self._encoder.pair(*pairs[i]), self.limit) for i in numbers])
    return self._all([("pair", *pair) for pair in pairs], compute, [sum(map(len, pair)) for pair in pairs])

  def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
    """Of whole texts, each token behind as many as the model can read."""
    compute = lambda numbers: self._compute([(self._encoder.rolling(texts[i], self.limit), False) for i in numbers])
    return self._all([("rolling", text) for text in texts], compute, list(map(len, texts)))

  def _all(self, requests: Sequence[tuple], compute: Callable, sizes: Sequence[int]) -> list[Likelihood]:
    values = complete(self._kept, requests, compute, "likelihoods", sizes)
    return [Likelihood(**value) for value in values]

  def _compute(self, asked: list[tuple[list[Pair], bool]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and likelihoods as they come. asked: the windows of each request, and whether it was cut."""
    windows = [(number, pair) for number, (pairs, _) in enumerate(asked) for pair in pairs]
    left, found = Counter(number for number, _ in windows), {number: [] for number in range(len(asked))}
    done = (number for number in range(len(asked)) if not left[number])  # nothing to be predicted
    for number in done:
      yield number, _summed([], asked[number][1])
    for places, bounds in self._scorer.batches([pair for _, pair in windows]):
      for place, bound in zip(places, bounds):
        number = windows[place][0]
        found[number].append((place, bound))
        if len(found[number]) == left[number]:
          parts = sorted(found.pop(number), key=operator.itemgetter(0))
          yield number, _summed([bound for _, bound in parts], asked[number][1])


def _summed(found: list[Bound], cut: bool) -> dict[str, Any]:
  errors = [bound.stderr for bound in found if bound.stderr is not None]
  return {
    "log_p": float(sum(bound.total for bound in found)),
    "greedy": all(bound.greedy for bound in found),
    "stderr": math.hypot(*errors) if errors else None,
    "cut": cut,
  }


class Texts:
  """Generated texts."""

  def __init__(self, engine: Engine, encoder: Encoder, kept: KeptAnswers, seed: int = 0, gaps: Sequence[int] = GAPS):
    """gaps: lengths of a gap, in tokens, that are tried where a document is to be filled."""
    self._engine, self._encoder, self._kept, self._seed, self._gaps = engine, encoder, kept, seed, tuple(gaps)

  def __call__(self, questions: Sequence[Question]) -> list[Answer]:
    requests = [("text", dataclasses.asdict(question), self._gaps) for question in questions]
    compute = lambda numbers: self._compute([questions[i] for i in numbers])
    sizes = [len(question.context) + _CHARACTERS * question.sampling.max_tokens for question in questions]
    return [Answer(**value) for value in complete(self._kept, requests, compute, "texts", sizes)]

  def _compute(self, questions: list[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and answers as they come, those to the longest prompts first."""
    waiting: deque = deque()
    for number in sorted(range(len(questions)), key=lambda i: -len(questions[i].context)):
      question = questions[number]
      waiting.append((number, (self._fill if question.document else self._write)(question)))
      if len(waiting) >= _IN_FLIGHT:
        number, finish = waiting.popleft()
        yield number, dataclasses.asdict(finish())
    for number, finish in waiting:
      yield number, dataclasses.asdict(finish())

  def _write(self, question: Question) -> Callable[[], Answer]:
    """Begins a text; what finishes it."""
    asked = question.sampling.max_tokens
    ids, room, cut = fitted_prompt(self._encoder.encode_context(question.context), asked, self._engine.context)
    handle = self._submit(ids, ids[1:], question, room)

    def finish():
      written = handle.result()
      return Answer(
        first_part(written.text, question.sampling.stop),
        len(written.tokens),
        max(written.settled, default=0),
        cut or room < asked,
      )

    return finish

  def _submit(self, ids, tokens, question, room=None, infill=False):
    """Submits ids, the first of them at position 0; tokens: those behind it, with gaps; room: tokens that follow."""
    sampling = dataclasses.replace(question.sampling, max_tokens=room)
    return self._engine.submit(tokens, sampling, seed=self._seed, number=question.number, infill=infill, begin=ids[0])

  def _fill(self, question: Question) -> Callable[[], Answer]:
    """Begins to fill a document's gap, in all lengths that are tried. Where the answer is a line, the line's end is
    part of the document."""
    before, behind = question.document
    line = question.sampling.stop == ("\n",)
    rest = self._encoder.continue_text("\n" + behind if line else behind)
    ids, limit = self._encoder.encode_context(before), self._engine.context
    gaps = [gap for gap in self._gaps if gap < limit // 2] or [limit // 4]
    room = limit - max(gaps)
    cut = len(ids) + len(rest) > room
    rest = rest[: max(room - len(ids), room // 2)]  # what is near the gap is kept
    ids = ids[-(room - len(rest)) :]
    begun = [self._submit(ids, [*ids[1:], *[None] * gap, *rest], question, infill=True) for gap in gaps]

    def finish():
      filled = [handle.result() for handle in begun]
      scores = []
      if len(filled) > 1:  # that of the text and of all that follows, as of documents of any length
        scores = [
          self._engine.submit_score(ids[1:], [*one.tokens, *rest] or rest, begin=ids[0])
          for one in filled
          if one.tokens or rest
        ]
      passes = sum(one.passes for one in filled) + len(scores)
      scores = [score.result().total for score in scores] or [0.0]
      best = filled[int(np.argmax(scores))]
      text = continuing(self._engine.run.tokenizer).decode(np.array(best.tokens, np.int64))
      text = first_part(text, question.sampling.stop) + ("\n" if line else "")
      return Answer(text, len(best.tokens), passes, cut)

    return finish


def first_part(text: str, stop: Iterable[str]) -> str:
  """What stands before each stop string, as the harness cuts texts."""
  for string in stop:
    text = text.split(string)[0]
  return text


def complete(
  kept: KeptAnswers,
  requests: Sequence[Hashable],
  compute: Callable[[list[int]], Iterator[tuple[int, Any]]],
  what: str,
  sizes: Sequence[int],
) -> list[Any]:
  """The values of all requests. compute: gives those of some numbers, as they come; it is asked for what is not kept,
  of equal requests once, and what it gives is kept at once. sizes: what requests take, for the time left."""
  keys = [digest(request) for request in requests]
  first: dict[str, int] = {}
  for number, key in enumerate(keys):
    if key not in kept:
      first.setdefault(key, number)
  missing = list(first.values())
  if missing:
    total = len({*keys})
    with Progress(total, total - len(missing), what, sum(sizes[number] for number in missing)) as progress:
      for place, value in compute(missing):
        kept.add(keys[missing[place]], value)
        progress.advance(sizes[missing[place]])
  return [kept[key] for key in keys]


class Progress:
  """How far some requests are, with the time left: in a terminal a bar, else a line a minute.

  total, done: numbers of requests. work: the sizes of those that are left, in all; time goes with them, since the
  longest come first.
  """

  def __init__(self, total: int, done: int, what: str, work: int):
    self._console = Console(stderr=True)
    self._total, self._done, self._what = total, done, what
    self._work, self._worked = max(work, 1), 0
    self._started = self._said = time.monotonic()
    self._bar = None
    if self._console.is_terminal:
      columns = (
        rich_progress.TextColumn("{task.fields[done]:,} of {task.fields[total_requests]:,} {task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TimeRemainingColumn(),
      )
      self._bar = rich_progress.Progress(*columns, console=self._console, transient=True)
      self._task = self._bar.add_task(what, total=self._work, done=done, total_requests=total)

  def __enter__(self) -> "Progress":
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar:
      self._bar.stop()

  def advance(self, size: int) -> None:
    """One request more is done."""
    self._done += 1
    self._worked += size
    if self._bar:
      self._bar.update(self._task, advance=size, done=self._done)
      return
    now = time.monotonic()
    if now - self._said > 60:
      self._said = now
      left = (self._work - self._worked) * (now - self._started) / max(self._worked, 1)
      line = f"evo_jax: {self._done:,} of {self._total:,} {self._what}, {left / 60:,.0f} minutes left"
      self._console.file.write(line + "\n")
      self._console.file.flush()
