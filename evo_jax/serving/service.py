"""Requests and an engine: who may ask how much at once, what an answer is made of, and what becomes of those who leave.

Everything here but `Engine.submit`, which encodes text, runs in the event loop's thread.
"""

import asyncio
from collections.abc import AsyncIterator
import concurrent.futures
import contextlib
import dataclasses
import math
import time
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from evo_jax.data.chat import ChatTokenizer
from evo_jax.data.tokenizers import continuing
from evo_jax.decoding import prompts
from evo_jax.decoding.engine import Engine, Handle, Score
from evo_jax.decoding.progress import TokenChoice
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.run import Run
from evo_jax.serving.answers import Answer, TokenNames, Written, count_usage
from evo_jax.serving.errors import ApiError, from_user_error
from evo_jax.serving.metrics import Metrics
from evo_jax.serving.requests import Asked

_LONGEST_WAIT = 60  # seconds that a client is told to wait at most


@dataclasses.dataclass(frozen=True)
class Limits:
  """queue: texts that may wait beside those that have rows. seconds: of a request. body: bytes. drain: seconds that
  requests may go on after the server was told to end. api_key: that clients must show; empty: none."""

  queue: int = 64
  seconds: float = 600.0
  body: int = 4 << 20
  drain: float = 30.0
  api_key: str = ""


@dataclasses.dataclass
class _Text:
  """A text on its way. prompt: its ids behind the begin token. begins: whether the prompt gave the begin token, too.
  score: of the prompt, where its log-probabilities are echoed."""

  index: int
  prompt: list[int]
  begins: bool
  echoed: str = ""
  handle: Handle | None = None
  score: concurrent.futures.Future[Score] | None = None


class Service:
  """What the routes call. `engine` is None until all programs are compiled."""

  def __init__(
    self,
    run: Run,
    modes: dict[str, Sampling],
    models: list[str],
    limits: Limits,
    rows: int,
    traces: bool = True,
    fingerprint: str = "",
  ):
    """modes: by name, the first by default. models: the model's name, and others that mean the same. rows, traces: as
    the engine will have them. fingerprint: of the model, by which clients see whether a seed still means the same."""
    self.traces, self.fingerprint = traces, fingerprint
    self.modes, self.models, self.limits = modes, models, limits
    self.run, self.rows = run, rows
    self.engine: Engine | None = None
    self.ending = False
    self.started = int(time.time())
    self.unfinished = 0  # texts
    self.metrics = Metrics(lambda: self.engine, lambda: self.unfinished)
    self.names = TokenNames(run.tokenizer)
    self._text_seconds = 1.0  # of recent requests, for each text
    try:
      self._chat, self._chat_problem = ChatTokenizer(run.tokenizer), ""
    except UserError as error:
      self._chat, self._chat_problem = None, str(error)

  @property
  def chats(self) -> bool:
    return self._chat is not None

  def check_ready(self) -> Engine:
    """The engine. Raises ApiError where nothing can be written yet, or any more."""
    if self.ending:
      raise ApiError(503, "the server is ending", code="shutting_down", retry_after=5)
    if self.engine is None:
      raise ApiError(503, "the model's programs are being compiled", code="not_ready", retry_after=5)
    if self.engine.failure is not None:
      raise ApiError(500, "the engine has failed", code="engine_failed")
    return self.engine

  def check_model(self, name: str | None) -> str:
    if name is not None and name not in self.models:
      message = f"the model {name!r} does not exist; there is {', '.join(self.models)}"
      raise ApiError(404, message, "model", "model_not_found")
    return name or self.models[0]

  async def open(self, asked: Asked) -> "Work":
    """Submits a request's texts. The caller closes what it gets. Raises ApiError."""
    engine, model = self.check_ready(), self.check_model(asked.model)
    count = len(asked.prompts) * asked.n
    self._check_room(count)
    work = Work(self, asked, model, count)
    try:
      await run_in_threadpool(work.submit, engine, self._chat)
    except BaseException as error:
      work.close()
      if isinstance(error, UserError):
        raise from_user_error(error, "messages" if asked.chat else "prompt") from error
      if isinstance(error, RuntimeError):  # the engine was closed meanwhile
        raise ApiError(503, "the server is ending", code="shutting_down") from error
      raise
    return work

  def check_chat(self) -> None:
    if self._chat is None:
      raise ApiError(400, self._chat_problem, "messages", "no_chat_template")

  def _check_room(self, count: int) -> None:
    most = self.rows + self.limits.queue
    if count > most:
      raise ApiError(400, f"n: {count} texts in one request are more than the {most} that may wait", "n")
    if self.unfinished + count > most:
      ahead = self.unfinished + count - most
      seconds = math.ceil(self._text_seconds * max(ahead / self.rows, 1.0))
      message = f"{self.unfinished} texts are on their way, and no more than {most} may be"
      raise ApiError(429, message, code="queue_full", retry_after=min(max(seconds, 1), _LONGEST_WAIT))

  def finished(self, seconds: float) -> None:
    """Learns how long a request took."""
    self._text_seconds += 0.2 * (seconds - self._text_seconds)

  def read_text(self, ids: list[int]) -> str:
    """The text of ids, special ones left out."""
    tokenizer, parts, part = self.run.tokenizer, [], []
    for token in [*ids, None]:
      if token is not None and token not in tokenizer.end_ids:
        part.append(token)
      elif part:
        parts.append((tokenizer if not parts else continuing(tokenizer)).decode(np.array(part, np.int64)))
        part = []
    return "".join(parts)


class Work:
  """The texts of one request. complete: whether the answer was made."""

  def __init__(self, service: Service, asked: Asked, model: str, count: int):
    self._service, self._asked, self._count = service, asked, count
    tokenizer = service.run.tokenizer
    self._answer = Answer(asked, model, service.fingerprint, service.names, tokenizer)
    self._texts: list[_Text] = []
    self._prompt_tokens = 0
    self._began = time.perf_counter()
    self._open, self.complete = True, False
    service.unfinished += count

  def close(self) -> None:
    """Ends what is not done, and frees its rows."""
    if not self._open:
      return
    self._open = False
    self._service.unfinished -= self._count
    for text in self._texts:
      if text.handle is not None and not text.handle.done:
        text.handle.cancel()

  @property
  def seconds(self) -> float:
    return time.perf_counter() - self._began

  # In another thread, which encodes.

  def submit(self, engine: Engine, chat: ChatTokenizer | None) -> None:
    """Submits all texts. Raises UserError for one that cannot be, and RuntimeError where the engine is closed."""
    asked, tokenizer = self._asked, self._service.run.tokenizer
    same: dict[tuple[int, ...], int] = {}  # texts that have a prompt so far
    for number, prompt in enumerate(asked.prompts):
      ids = prompts.to_ids(prompt, chat if asked.chat else tokenizer)
      begins = not isinstance(prompt, str) and not asked.chat and ids[:1] == [tokenizer.begin_id]
      ids = ids[begins:]
      self._prompt_tokens += len(ids) + (begins or asked.chat)
      echoed = ""
      if asked.echo:
        echoed = prompts.readable(prompt) if isinstance(prompt, str) else self._service.read_text(ids)
      for i in range(asked.n):
        text = _Text(number * asked.n + i, ids, begins, echoed)
        self._texts.append(text)
        repetition = same[tuple(ids)] = same.get(tuple(ids), -1) + 1
        self._submit(engine, text, repetition, chat if asked.chat else tokenizer)

  def _submit(self, engine: Engine, text: _Text, repetition: int, tokenizer: Any) -> None:
    asked = self._asked
    if asked.echo and asked.best is not None and text.prompt:
      text.score = engine.submit_score([], text.prompt, asked.best)
    if asked.max_tokens == 0:
      return
    prompt, most = text.prompt, asked.max_tokens
    if asked.suffix is not None:
      if most > engine.context:  # before a gap of that length is made
        problem = f"{most} is more than the context of {engine.context}"
        raise ApiError(400, f"max_tokens: {problem}", "max_tokens", "context_length_exceeded")
      prompt = [*prompt, *[None] * most, *prompts.to_ids(asked.suffix, continuing(tokenizer))]
    elif asked.chat and most is None:
      most = max(engine.context - len(prompt), 1)
    text.handle = engine.submit(
      prompt,
      dataclasses.replace(asked.sampling, max_tokens=most),
      seed=asked.seed,
      number=repetition,
      logit_bias=dict(asked.logit_bias),
      best=asked.best,
      infill=asked.suffix is not None,
      tokenizer=tokenizer,
      trace=asked.trace,
    )

  # In the event loop.

  async def whole(self) -> dict[str, Any]:
    """The answer. Raises ApiError."""
    try:
      async with asyncio.timeout(self._service.limits.seconds):
        written = [await self._written(text) for text in self._texts]
    except TimeoutError as error:
      raise self._late() from error
    return self._answer.whole(written, self._finish(written))

  async def chunks(self) -> AsyncIterator[dict[str, Any]]:
    """The answer in pieces, of all texts as they come. Raises ApiError."""
    news: asyncio.Queue = asyncio.Queue()
    readers = [asyncio.create_task(self._read(text, news)) for text in self._texts]
    written = []
    try:
      while len(written) < len(readers):
        left = self._service.limits.seconds - self.seconds
        try:
          new = await asyncio.wait_for(news.get(), max(left, 0.0))
        except TimeoutError as error:
          raise self._late() from error
        if isinstance(new, BaseException):
          raise new
        if isinstance(new, Written):
          written.append(new)
          new = self._answer.last_chunk(new)
        yield new
    finally:
      for reader in readers:
        reader.cancel()
    usage = self._finish(written)
    if self._asked.include_usage:
      yield self._answer.usage_chunk(usage)

  def _late(self) -> ApiError:
    return ApiError(504, f"not done after {self._service.limits.seconds:g} seconds", code="timeout")

  async def _read(self, text: _Text, news: asyncio.Queue) -> None:
    """Puts a text's chunks, and what it is in the end, into a queue; or what ended it."""
    try:
      for chunk in self._answer.first_chunks(text.index, "" if self._asked.best is not None else text.echoed):
        news.put_nowait(chunk)
      shows = self._asked.best is None and self._asked.suffix is None
      seen, first = 0, True
      if text.handle is not None:
        with _ended_as_error(text.handle):
          async with contextlib.aclosing(aiter(text.handle)) as pieces:
            async for piece in pieces:
              new, seen = text.handle.trace[seen:], len(text.handle.trace)
              if first and piece:
                self._service.metrics.first.observe(self.seconds)
                first = False
              if (piece and shows) or new:
                news.put_nowait(self._answer.piece(text.index, piece if shows else "", new))
      written = await self._written(text)
      if self._asked.suffix is not None:
        news.put_nowait(self._answer.piece(text.index, written.text))
      news.put_nowait(written)
    except Exception as error:
      news.put_nowait(error)

  async def _written(self, text: _Text) -> Written:
    given, generation = [], None
    if text.score is not None:
      with _ended_as_error(text.score):
        given = (await asyncio.wrap_future(text.score)).choices
    if text.begins and self._asked.echo:
      given = [TokenChoice(self._service.run.tokenizer.begin_id, None, []), *given]
    if text.handle is None:
      return Written(text.index, text.echoed, "length", given=given)
    with _ended_as_error(text.handle):
      generation = await text.handle.async_result()
    self._service.metrics.count(generation, self._asked.sampling.mode)
    ended = generation.end_id is not None
    content, stopped = generation.text, text.handle.stopped
    if self._asked.suffix is not None:
      content = continuing(self._service.run.tokenizer).decode(np.array(generation.tokens, np.int64))
      stopped = len(generation.tokens) < self._asked.max_tokens
    reason = "stop" if ended or stopped else "length"
    tokens = len(generation.tokens) + ended
    return Written(text.index, text.echoed + content, reason, tokens, not text.prompt, generation, given)

  def _finish(self, written: list[Written]) -> dict[str, Any]:
    """What the request used; counts it."""
    self.complete = True
    shared = sum(text.handle.shared for text in self._texts if text.handle and text.index % self._asked.n == 0)
    usage = count_usage(self._prompt_tokens, shared, written)
    self._service.metrics.prompt_tokens.inc(self._prompt_tokens)
    self._service.metrics.seconds.observe(self.seconds)
    self._service.finished(self.seconds)
    return usage


@contextlib.contextmanager
def _ended_as_error(what: Any):
  """Raises ApiError where the engine, not who waits, ended a text."""
  try:
    yield
  except (asyncio.CancelledError, concurrent.futures.CancelledError) as error:
    future = what.future if isinstance(what, Handle) else what
    if not future.done() or not isinstance(future.exception(), concurrent.futures.CancelledError):
      raise  # who waits was cancelled
    raise ApiError(503, "the server ended before the text did", code="shutting_down") from error
  except ApiError:
    raise
  except Exception as error:
    raise ApiError(500, f"the engine has failed: {type(error).__name__}", code="engine_failed") from error
