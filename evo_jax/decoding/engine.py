"""An engine: requests come and go, each with its own settings, and every text is what it would be alone.

  with Engine(load_run("runs/tiny"), rows=8) as engine:
    handle = engine.submit("def ", Sampling(mode="verify", temperature=0.7), seed=1)
    for piece in handle:  # committed text, as it comes; `async for` in a coroutine
      print(piece, end="")
    print(handle.result().passes)
    print(engine.score("def ", "main():").total)

A thread of its own turns: it gives rows to waiting texts, reads some pieces of prompts, takes some passes of each mode,
and looks. All programs are compiled when the engine is made (`programs`, `Engine.compilations`). Keys and values are in
pages, which prompts with the same beginning share (`page_pool`); what does not fit waits its turn, and what would never
fit is refused when it is submitted. In a run of several processes each makes the engine, number 0 submits, the others
call `follow`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from typing import Any

import jax
import numpy as np

from evo_jax.data.tokenizers import Tokenizer, continuing
from evo_jax.decoding import rows as rows_lib
from evo_jax.decoding import steps
from evo_jax.decoding.device import DeviceModel
from evo_jax.decoding.page_pool import SCRATCH, PagePool, page_digests
from evo_jax.decoding.programs import BEST, Programs, Settings
from evo_jax.decoding.progress import Generation, Progress, TokenChoice
from evo_jax.decoding.prompts import Prompt, Request, make_request, to_ids
from evo_jax.decoding.recorder import LiveTrace, TracedPass
from evo_jax.decoding.settings import DEFAULT_PATH, Sampling
from evo_jax.errors import UserError, check_seed
from evo_jax.evaluation.continuations import Bound, ContinuationScorer, Pair, parts, total
from evo_jax.flow.schedules import Path
from evo_jax.parallel import distributed, sharding
from evo_jax.run import Run

WIDTH = 64  # positions of a page
DEFAULT_CONTEXT = 2048
_BOUNDS = 4  # windows of a continuation, whose bounds on a path are found at once
_PARTS = (4, 1)  # of the context: texts that are scored on a path are filled up to the shortest that holds them
_FEW_ROWS = (4, 8)  # of smaller passes
_PIECES = 8  # of prompts, that are read between passes at most
_OF_VERIFY = ("accepted", "rounds", "drafted_rounds", "draft_tokens", "draft_pending")  # fields of a snapshot
_HEARTBEAT = 1.0  # seconds that the other processes of an idle engine wait for news


@dataclasses.dataclass(frozen=True)
class Score:
  """What autoregression says of a continuation. tokens: (n,) its ids; log_p: (n,) float32 their log-probabilities in
  nats; greedy: (n,) bool, which of them are the most probable. choices: the same with the most probable tokens, where
  they were asked for."""

  tokens: np.ndarray
  log_p: np.ndarray
  greedy: np.ndarray
  choices: list[TokenChoice] | None = None

  @property
  def total(self) -> float:
    """The log-likelihood in nats."""
    return float(np.sum(self.log_p, dtype=np.float64))


class Handle:
  """A text on its way: iterate over it, or ask for its result.

  future: for `concurrent.futures.as_completed`. shared: tokens of the prompt whose keys and values were there.
  stopped: whether a stop string ended it. trace: of a text that is traced, what its passes did so far; while it is
  iterated over there is a piece for each look at it, which may be empty.
  """

  def __init__(self, cancel):
    self._cancel = cancel
    self.future: concurrent.futures.Future[Generation] = concurrent.futures.Future()
    self._pieces: list[str] = []
    self.shared, self.stopped = 0, False
    self.trace: list[TracedPass] = []
    self._changed = threading.Condition()
    self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    self.future.set_running_or_notify_cancel()  # a coroutine that no longer waits for it does not cancel it
    self.future.add_done_callback(lambda _: self._tell())

  def __iter__(self) -> Iterator[str]:
    """Pieces of committed text as they come: no half characters, no beginnings of stop strings, no drafts. Raises as
    `result`."""
    number = 0
    while True:
      with self._changed:
        self._changed.wait_for(lambda n=number: len(self._pieces) > n or self.future.done())
        new = self._pieces[number:]
      yield from new
      number += len(new)
      if not new:
        self.future.result()
        return

  async def __aiter__(self) -> AsyncIterator[str]:
    """The same in a coroutine."""
    number, waiter = 0, (asyncio.get_running_loop(), asyncio.Event())
    with self._changed:
      self._waiting.append(waiter)
    try:
      while True:
        waiter[1].clear()
        done, new = self.future.done(), self._pieces[number:]
        for piece in new:
          yield piece
        number += len(new)
        if done and number == len(self._pieces):
          self.future.result()
          return
        if not new:
          await waiter[1].wait()
    finally:
      with self._changed:
        self._waiting.remove(waiter)

  def result(self, timeout: float | None = None) -> Generation:
    """The finished text. Raises `concurrent.futures.CancelledError` after `cancel`, TimeoutError after `timeout`
    seconds, and what ended the engine, if anything did."""
    return self.future.result(timeout)

  async def async_result(self) -> Generation:
    """The same in a coroutine."""
    return await asyncio.wrap_future(self.future)

  @property
  def done(self) -> bool:
    return self.future.done()

  def cancel(self) -> None:
    """Frees the text's row and pages before the next passes. A text that is finished stays so."""
    self._cancel()

  def _add(self, piece: str) -> None:
    with self._changed:
      self._pieces.append(piece)
    self._tell()

  def _tell(self) -> None:
    with self._changed:
      self._changed.notify_all()
      waiting = list(self._waiting)
    for loop, event in waiting:
      with contextlib.suppress(RuntimeError):  # who waited has closed the loop, and is not told
        loop.call_soon_threadsafe(event.set)


@dataclasses.dataclass
class _Job:
  """A text that an engine works on: one to be written, or one to be scored.

  tokens: what is read, with the begin token. scored: the first position that is predicted; None: nothing is. path: on
  which a bound is found, instead of autoregression.
  """

  number: int
  tokens: np.ndarray
  pages_wanted: int
  request: Request | None = None
  settings: Settings | None = None
  seed: int = 0
  scored: int | None = None
  best: int | None = None  # most probable tokens that `choices` are to have; None: there are none
  trace: bool = False
  live: LiveTrace | None = None
  digests: list[bytes] = dataclasses.field(default_factory=list)
  group: int = 0
  row: int | None = None
  pages: list[int] = dataclasses.field(default_factory=list)
  read: int = 0  # positions that are in pages
  progress: Progress | None = None
  started: float = 0.0
  path: Path | None = None
  found: list = dataclasses.field(default_factory=list)  # (log_p, token, best log_p) of pieces; of a path, bounds
  generation: Generation | None = None

  @property
  def last(self) -> int:
    """So many positions are read: of a text that is written all but the last, which its first pass reads."""
    return len(self.tokens) - 1


def default_pass_rows(rows: int, mesh: jax.sharding.Mesh) -> list[int]:
  """Rows of smaller passes that are worth their compilation: on a CPU, which does not compute many at once, what is
  at most half of `rows`; elsewhere none."""
  one_cpu = mesh.size == 1 and sharding.Layout.of(mesh).platform == "cpu"
  return [few for few in _FEW_ROWS if one_cpu and 2 * few <= rows]


class Engine:
  """Writes and scores texts for any number of threads and coroutines."""

  def __init__(
    self,
    run: Run,
    rows: int = 32,
    *,
    modes: Sequence[Sampling | str] = ("ar",),
    context: int | None = None,
    cache_tokens: int | None = None,
    page: int = WIDTH,
    infill: bool = False,
    scores: bool = True,
    paths: Sequence[Path] = (),
    draws: int = 4,
    share: bool = True,
    passes: int = steps.PASSES,
    pass_rows: Sequence[int] = (),
    traces: bool = False,
    measure: bool = False,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Compiles all programs.

    Args:
      rows: texts that are written at once.
      modes: what may be asked for: names of modes, or settings, of which those that need a program of their own count
        (`programs.Settings`).
      context: tokens of the longest text; default: DEFAULT_CONTEXT, or what the model can read.
      cache_tokens: so many tokens' keys and values have room; default: of `rows` texts of `context` tokens.
      page: tokens of a page, which is also what is read of a prompt at a time; of its end a quarter is.
      infill: whether the modes that fill gaps may be asked to, besides.
      scores: whether texts may be scored, and log-probabilities be asked for; a model of diffusion alone has none.
      paths: on which texts may be scored, beside autoregression, by their bounds.
      draws: of a bound's noise.
      share: whether texts share pages of prompts that begin alike.
      passes: of each mode, between two looks: fewer bring pieces, and new texts, earlier.
      pass_rows: of smaller passes, each with programs of its own, which are taken while no more texts are written. On a
        CPU they take less time, and give the same bits; elsewhere they may round otherwise.
      traces: whether texts may be traced; in modes with windows each pass then also finds the most probable tokens.
      measure: whether the thread waits for each program, so that `seconds` tells apart what takes time.
      mesh: rows and parameters are sharded over it by the rules of training; default: the one of the parameters.

    Raises UserError for sizes that are impossible, and modes that the model does not support.
    """
    self.run, self._device = run, DeviceModel(run, run.mesh if mesh is None else mesh)
    self.context = min(context or DEFAULT_CONTEXT, run.config.model.position_limit)
    shards, few = self._device.row_multiple, self._check_rows(rows, pass_rows)
    settings = _settings(modes, infill)
    self._reads = not run.config.diffusion_alone
    self.scores = scores and self._reads
    capacity, width = self.context + Programs.room(run, settings), min(page, self.context)
    pages, sizes = self._pages(rows, capacity, width, cache_tokens), Programs.sizes(run, settings, traces)
    self.shape = rows_lib.Shape(rows, capacity, shards, pages, width, few=few, **sizes)
    self._pools = [PagePool(self.shape.pages) for _ in range(shards)]
    self._programs = Programs(run, self._device, self.shape, settings, reads=self._reads, scores=self.scores)
    self._scorers = {path: self._make_scorer(path, draws) for path in paths}
    self._jobs: dict[int, _Job] = {}
    self._bounds: deque[tuple[_Job, Pair]] = deque()  # what is left of texts that are scored on a path
    self._handles: dict[int, Any] = {}
    self._waiting: deque[_Job] = deque()
    self._reading: list[_Job | None] = [None] * shards
    self._rows: list[_Job | None] = [None] * rows
    self._table = np.full((rows, self.shape.columns), SCRATCH, np.int32)
    self._news = threading.Condition()
    self._events: list[tuple] = []
    self._numbers, self.looks, self._closing, self._failure = 0, 0, False, None
    self._share, self._passes, self._measure = share, passes, measure
    self.seconds = {"prompts": 0.0, "bounds": 0.0, "passes": 0.0, "host": 0.0}  # of the thread so far; see `measure`
    self._compiled_at_start = self._compilations
    self._thread = threading.Thread(target=self._work, name="evo_jax engine", daemon=True)
    self._thread.start()

  def _check_rows(self, rows: int, pass_rows: Sequence[int]) -> tuple[int, ...]:
    """The rows of smaller passes, ascending. Raises UserError."""
    shards = self._device.row_multiple
    if rows < 1 or rows % shards:
      raise UserError(f"rows={rows}: is no positive multiple of the {shards} shards that the mesh has for texts")
    for few in pass_rows:
      if not 1 < few < rows or self._device.mesh.size > 1:
        raise UserError(f"pass_rows={few}: is not from 2 to {rows - 1}, or the mesh has several devices")
    return tuple(sorted(set(pass_rows)))

  def _pages(self, rows: int, capacity: int, width: int, cache_tokens: int | None) -> int:
    """Pages of each shard, of which one is scratch; by default those of full rows."""
    if cache_tokens is None:
      cache_tokens = rows * -(-capacity // width) * width
    return 1 + max(self._reads * cache_tokens // (self._device.row_multiple * width), 1)

  def _make_scorer(self, path: Path, draws: int) -> ContinuationScorer:
    lengths = [-(-self.context // part) for part in _PARTS]
    scorer = ContinuationScorer(self.run.on(self._device.mesh), path, draws, rows=1, lengths=lengths)
    for length in lengths:
      scorer.score_windows([([0] * (length - 1), [0])], _BOUNDS)  # compiles
    return scorer

  def __enter__(self) -> "Engine":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Cancels what is on its way, and ends the thread."""
    with self._news:
      self._closing = True
      self._news.notify_all()
    if self._thread.is_alive():
      self._thread.join()

  def follow(self) -> None:
    """In a process that submits nothing: returns when process 0 has closed the engine. Raises what ended it else."""
    self._thread.join()
    if self._failure:
      raise self._failure

  @property
  def compilations(self) -> int:
    """Programs that were compiled after the engine was ready: 0."""
    return self._compilations - self._compiled_at_start

  @property
  def _compilations(self) -> int:
    return self._device.compilations + sum(scorer.compilations for scorer in self._scorers.values())

  @property
  def memory(self) -> str:
    """How much memory keys and values have, in words."""
    each, tokens = rows_lib.cache_bytes(self.run.config.model), self._pools[0].size * self.shape.width
    total = each * tokens * self.shape.shards
    return (
      f"keys and values: {each:,} bytes a token, {tokens * self.shape.shards:,} tokens fit ({total / 2**30:.2f} GiB), "
      f"{self.shape.rows} texts of at most {self.context:,} tokens at once"
    )

  @property
  def running(self) -> int:
    """Texts that have a row now."""
    return sum(job is not None for job in self._rows)

  @property
  def waiting(self) -> int:
    """Texts, written or scored by autoregression, that have no pages yet."""
    return len(self._waiting) + len(self._events)

  @property
  def failure(self) -> BaseException | None:
    """What ended the engine, if anything did."""
    return self._failure

  @property
  def pages_free(self) -> int:
    """Pages that texts could have at once now."""
    return sum(pool.available for pool in self._pools)

  def submit(
    self,
    prompt: Prompt | Request,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    number: int = 0,
    end_ids: Sequence[int] = (),
    logit_bias: dict[int, float] | None = None,
    best: int | None = None,
    infill: bool = False,
    tokenizer: Tokenizer | None = None,
    trace: bool = False,
    begin: int | None = None,
  ) -> Handle:
    """Asks for a text. It is that of a `Sampler` with the seed, which is number `number` of those with its prompt.

    Args:
      prompt: a text, messages, or ids; or a request that is made of them already, with its number.
      sampling: default: `Sampling()`. `batch_size` means nothing here.
      end_ids: tokens that end the text beside the tokenizer's.
      logit_bias: what is added to the logits of some ids.
      best: log-probabilities are wanted, of what was chosen and of so many most probable tokens (0 to 20).
      infill: whether the prompt has gaps, which are filled.
      tokenizer: by which the prompt is encoded, as a `ChatTokenizer`; default: the run's.
      trace: whether what its passes do is recorded (`Handle.trace`), which takes a look after each pass.
      begin: the token at position 0; default: the tokenizer's begin token.

    Raises UserError for what cannot be, before anything runs.
    """
    sampling = sampling or Sampling()
    settings = Settings(sampling, infill)
    tokenizer = tokenizer or self.run.tokenizer
    self._programs.check(sampling, settings, end_ids, logit_bias, best)
    check_seed(seed)
    check_seed(number, "number")
    if trace and not self.shape.traced:
      raise UserError("trace: the engine was made without traces")
    if isinstance(prompt, Request):
      request = prompt
    else:
      request = make_request(prompt, infill, sampling, tokenizer, self.context)
      request = dataclasses.replace(request, repetition=number)
    if best is not None:
      self._check_scores()
    begin, known, pages = tokenizer.begin_id if begin is None else begin, [], 0
    if self._reads:
      known = request.tokens[: request.prompt_end - 1]
      pages = -(-(request.max_length + self._programs.room_of(settings)) // self.shape.width)
    tokens, settings = np.array([begin, *known], np.int32), settings.with_row(end_ids, logit_bias, best)
    job = _Job(0, tokens, pages, request, settings, seed, trace=trace)
    self._check_fits(pages, request.max_length)
    return self._send(job)

  def score(self, context: str | Sequence[int], continuation: str | Sequence[int], path: Path = "ar") -> Score | Bound:
    """What autoregression says of a continuation, or the bound on a path; both as text or as ids, the context without
    the begin token."""
    return self.submit_score(context, continuation, path=path).result()

  def submit_score(
    self,
    context: str | Sequence[int],
    continuation: str | Sequence[int],
    best: int | None = None,
    begin: int | None = None,
    path: Path = "ar",
  ) -> "concurrent.futures.Future[Score | Bound]":
    """The same, without waiting. A bound's noise depends on the texts alone.

    Args:
      best: `Score.choices` are wanted, with so many most probable tokens (0 to 20).
      begin: the token at position 0; default: the tokenizer's begin token.
      path: "ar", or one of `paths`.

    Raises UserError for what is too long, or empty, or no text of the tokenizer's, and for a path that the engine was
    not made for.
    """
    if path == "ar":
      self._check_scores()
    elif path not in self._scorers:
      known = ", ".join(map(str, self._scorers)) or "none"
      raise UserError(f"path {path!r}: is not among the paths that the engine was made for: {known}")
    elif best is not None:
      raise UserError(f"best={best}: a bound has no most probable tokens")
    if best is not None and not 0 <= best <= BEST:
      raise UserError(f"best={best}: is not from 0 to {BEST}")
    tokenizer = self.run.tokenizer
    before = [tokenizer.begin_id if begin is None else begin, *to_ids(context, tokenizer, "the context")]
    after = to_ids(continuation, continuing(tokenizer) if len(before) > 1 else tokenizer, "the continuation")
    if not after:
      raise UserError("the continuation to be scored is empty")
    tokens = np.array(before + after, np.int32)
    if len(tokens) > self.context:
      raise UserError(f"{len(before)} tokens and {len(after)} to be scored do not fit the context of {self.context}")
    if path != "ar":
      return self._send(_Job(0, tokens, 0, scored=len(before), path=path))
    pages = -(-(len(tokens) - 1) // self.shape.width)
    self._check_fits(pages, len(tokens))
    return self._send(_Job(0, tokens, pages, scored=len(before), best=best))

  def _check_scores(self) -> None:
    if not self.scores:
      raise UserError("this engine has no scores, or its model, of diffusion alone, has none by autoregression")

  def _check_fits(self, pages: int, tokens: int) -> None:
    if pages > self._pools[0].size:
      room = self._pools[0].size * self.shape.width
      raise UserError(
        f"a text of {tokens:,} tokens needs room for {pages * self.shape.width:,}; the cache has {room:,}"
      )

  def _send(self, job: _Job) -> Any:
    with self._news:
      if self._closing or self._failure:
        raise RuntimeError("the engine is closed") from self._failure
      self._numbers += 1
      job.number = number = self._numbers
      if job.request is None:
        handle = concurrent.futures.Future()
        handle.set_running_or_notify_cancel()
      else:
        handle = Handle(lambda: self._send_cancel(number))
      self._handles[number] = handle
      self._events.append(("new", job))
      self._news.notify_all()
    return handle

  def _send_cancel(self, number: int) -> None:
    with self._news:
      self._events.append(("cancel", number))
      self._news.notify_all()

  # Below: in the thread.

  def _work(self) -> None:
    try:
      with jax.set_mesh(self._device.mesh):
        while self._turn():
          pass
      ending: BaseException = concurrent.futures.CancelledError()
    except BaseException as error:
      ending = self._failure = error
    with self._news:
      self._closing = True
      handles, self._handles = list(self._handles.values()), {}
    for handle in handles:
      _end(handle, ending)

  def _turn(self) -> bool:
    """One turn; False at the end."""
    events, closing = self._exchange()
    for kind, what in events:
      if kind == "new" and what.path is not None:
        self._jobs[what.number] = what
        pair = what.tokens[: what.scored].tolist(), what.tokens[what.scored :].tolist()
        self._bounds += [(what, part) for part in parts(pair, _BOUNDS * self._scorers[what.path].size)]
      elif kind == "new":
        self._jobs[what.number] = what
        what.digests = page_digests(what.tokens[: what.last], self.shape.width) if self._share else []
        what.started = time.perf_counter()
        self._waiting.append(what)
      else:
        self._cancel(what)
    if closing:
      return False
    with self._timed("prompts"):
      for _ in range(_PIECES):
        if not self._read_pieces():
          break
    if self._bounds:
      with self._timed("bounds"):
        self._find_bounds()
    if any(job is not None and job.progress is not None for job in self._rows):
      with self._timed("passes"):
        self._programs.take_passes(self._rows, self._table, 1 if self._tracing else self._passes)
      with self._timed("host"):
        self._look()
    return True

  @property
  def _tracing(self) -> bool:
    return any(job is not None and job.trace for job in self._rows)

  @contextlib.contextmanager
  def _timed(self, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if self._measure:
      self._programs.wait()
    self.seconds[what] += time.perf_counter() - start

  def _exchange(self) -> tuple[list[tuple], bool]:
    """What was asked for since the last turn, in all processes; waits where there is nothing to do."""
    several = jax.process_count() > 1
    events, closing = [], False
    if jax.process_index() == 0:
      with self._news:
        idle = lambda: not self._jobs and not self._events and not self._closing
        while idle():
          if not self._news.wait(_HEARTBEAT if several else None) and several:
            break
        events, self._events = self._events, []
        closing = self._closing
    if not several:
      return events, closing
    return distributed.broadcast((events, closing))

  def _cancel(self, number: int) -> None:
    if (job := self._jobs.get(number)) is None:
      return
    if job in self._waiting:
      self._waiting.remove(job)
    self._end(job, concurrent.futures.CancelledError())

  def _end(self, job: _Job, result: Any) -> None:
    """Frees what a job has, and says how it ended."""
    del self._jobs[job.number]
    self._free(job)
    with self._news:
      handle = self._handles.pop(job.number, None)
    if handle is not None:
      _end(handle, result)

  def _free(self, job: _Job) -> None:
    """Takes back a job's row and pages."""
    if job.row is not None:
      self._rows[job.row] = None
      self._table[job.row] = SCRATCH
    if self._reading[job.group] is job:
      self._reading[job.group] = None
    self._pools[job.group].release(job.pages)
    job.row, job.pages = None, []

  def _read_pieces(self) -> bool:
    """Reads a piece of one text in each shard, if there is any to be read."""
    jobs = [self._next_to_read(group) for group in range(self.shape.shards)]
    if not any(jobs):
      return False
    W, X = next(self._piece_of(job) for job in jobs if job is not None), self.shape.shards
    jobs = [job if job is not None and self._piece_of(job) == W else None for job in jobs]
    tokens, following = np.zeros((X, W), np.int32), np.zeros((X, W), np.int32)
    first, table = np.zeros(X, np.int32), np.full((X, self.shape.columns), SCRATCH, np.int32)
    scores, best = False, 1
    for group, job in enumerate(jobs):
      if job is None:
        continue
      first[group] = job.read
      table[group, : len(job.pages)] = job.pages
      part, after = job.tokens[job.read : job.read + W], job.tokens[job.read + 1 : job.read + 1 + W]
      tokens[group, : len(part)], following[group, : len(after)] = part, after
      if job.scored is not None and job.read + W >= job.scored:
        scores, best = True, max(best, job.best or 1)
    found = self._programs.read_piece(tokens, first, table, following if scores else None, best)
    for group, job in enumerate(jobs):
      if job is not None:
        self._add_piece(job, W, None if found is None else [a[group] for a in found])
    return True

  def _piece_of(self, job: _Job) -> int:
    """Tokens of the next piece of a text: a page's, or fewer where less than half a page is left, whatever the other
    texts are. With most probable tokens always a page's, for fewer programs."""
    W, narrow = self.shape.width, self.shape.narrow
    return narrow if job.best is None and job.last - job.read <= W // 2 else W

  def _next_to_read(self, group: int) -> _Job | None:
    """The text in this shard of which a piece is to be read; begins with the next that waits, if there is room."""
    while True:
      job = self._reading[group]
      if job is None:
        if not self._waiting or (job := self._begin(self._waiting[0], group)) is None:
          return None
        self._waiting.popleft()
        self._reading[group] = job
      if job.read < job.last:
        return job
      self._finish_reading(job)

  def _begin(self, job: _Job, group: int) -> _Job | None:
    """Gives a text pages, and a row if it is to be written; None where there are none."""
    row = None
    if job.request is not None and job.generation is None:
      per_shard = self.shape.rows // self.shape.shards
      places = range(group * per_shard, (group + 1) * per_shard)
      if (row := next((i for i in places if self._rows[i] is None), None)) is None:
        return None
    pool = self._pools[group]
    found = pool.find(job.digests)
    if job.scored is not None:  # pieces that predict what is scored are read again: scores need their hidden states
      found = found[: (job.scored - 1) // self.shape.width]
    pages = pool.take(found, job.pages_wanted - len(found))
    if pages is None:
      return None
    job.group, job.pages, job.read, job.row = group, pages, len(found) * self.shape.width, row
    if row is not None:
      self._rows[row] = job
      if (handle := self._handles.get(job.number)) is not None:
        handle.shared = job.read
    return job

  def _add_piece(self, job: _Job, size: int, found: list[np.ndarray] | None) -> None:
    if job.scored is not None and job.read + size >= job.scored:
      log_p, token, best_log_p = found  # other shards' texts may want more of the most probable tokens
      columns = job.best or 1
      job.found.append((job.read, log_p, token[:, :columns], best_log_p[:, :columns]))
    number = job.read // self.shape.width
    if number < len(job.digests):
      self._pools[job.group].share(job.pages[number], job.digests[number])
    job.read += size

  def _finish_reading(self, job: _Job) -> None:
    self._reading[job.group] = None
    if job.scored is not None:
      self._finish_scoring(job)
      return
    self._table[job.row] = SCRATCH
    self._table[job.row, : len(job.pages)] = job.pages
    job.progress = Progress(
      job.request, self.run.tokenizer, job.settings.stop, job.settings.infill, job.settings.end_ids
    )
    job.live = LiveTrace(job.request, self.run.tokenizer) if job.trace else None
    self._programs.insert(job.row, job.request, job.tokens[0], job.settings, job.seed)

  def _finish_scoring(self, job: _Job) -> None:
    n, first = len(job.tokens) - job.scored, job.scored - 1
    log_p, token, best_log_p = (
      np.concatenate([piece[i] for piece in job.found])[first - job.found[0][0] :][:n] for i in (1, 2, 3)
    )
    tokens = job.tokens[job.scored :]
    score = Score(tokens, log_p, token[:, 0] == tokens)
    if job.best is not None:
      best = [list(zip(*(a[i, : job.best].tolist() for a in (token, best_log_p)))) for i in range(n)]
      choices = [TokenChoice(*choice) for choice in zip(tokens.tolist(), log_p.tolist(), best)]
      score = dataclasses.replace(score, choices=choices)
    self._end(job, score if job.generation is None else dataclasses.replace(job.generation, choices=score.choices))

  def _find_bounds(self) -> None:
    """Of some windows of texts that are scored on the path of the first, each text read once for them."""
    path = self._bounds[0][0].path
    scorer, some = self._scorers[path], []
    while self._bounds and len(some) < scorer.rows and self._bounds[0][0].path == path:
      some.append(self._bounds.popleft())
    for (job, _), bounds in zip(some, scorer.score_windows([part for _, part in some], _BOUNDS)):
      job.found += bounds
      if len(job.found) * scorer.size >= len(job.tokens) - job.scored:
        self._end(job, total(job.found))

  def _look(self) -> None:
    """Hands on what was committed, and ends texts that are done."""
    snapshot = self._programs.snapshot(self._tracing)
    self.looks += 1
    now = time.perf_counter()
    for row, job in enumerate(self._rows):
      if job is None or job.progress is None:
        continue
      view = snapshot.row(row)
      if job.settings.sampling.mode != "verify":
        view = view._replace(**dict.fromkeys(_OF_VERIFY))
      new_passes = [] if job.live is None else job.live.update(view)
      piece = job.progress.update(view, now - job.started)
      if (handle := self._handles.get(job.number)) is not None:
        handle.stopped = job.progress.stopped
        handle.trace += new_passes
        if piece or new_passes:
          handle._add(piece)
      if job.progress.seconds is None:
        continue
      generation = job.progress.generation(view)
      if job.settings.best is None or not (drawn := job.progress.drawn(view)):
        self._end(job, generation)
      else:
        self._score_written(job, generation, drawn)

  def _score_written(self, job: _Job, generation: Generation, drawn: list[int]) -> None:
    """Has what a job drew scored, for its log-probabilities."""
    self._free(job)
    job.generation = generation
    job.scored, job.best = len(job.tokens), job.settings.best
    job.tokens = np.concatenate([job.tokens, np.array(drawn, np.int32)])
    job.pages_wanted = -(-job.last // self.shape.width)
    self._waiting.appendleft(job)


def _settings(modes: Sequence[Sampling | str], infill: bool) -> list[Settings]:
  """What an engine's programs are for."""
  modes = [Sampling(mode=mode) if isinstance(mode, str) else mode for mode in modes]
  settings = [Settings(sampling, gaps) for sampling in modes for gaps in ((False, True) if infill else (False,))]
  return [each for each in settings if not each.infill or each.sampling.mode in DEFAULT_PATH]


def _end(handle: Any, result: Any) -> None:
  future = handle.future if isinstance(handle, Handle) else handle
  if isinstance(result, BaseException):
    future.set_exception(result)
  else:
    future.set_result(result)
