"""Reports of a training run: metrics as JSON lines, throughput, and a progress bar (or plain lines)."""

import contextlib
import json
import math
import os
import sys
import time

from etils import epath
import jax
from rich.progress import BarColumn, Progress, TextColumn

from evo_jax.errors import UserError
from evo_jax.network import flops
from evo_jax.training import files

TIMING_FIELDS = (
  "tokens_per_second",
  "tokens_per_second_per_chip",
  "mfu",
  "data_wait",
  "checkpoint_stall",
  "evaluation",
  "goodput",
)  # metrics that depend on the clock, in which two equal runs differ

_REWRITTEN = 60.0  # seconds between two writes of a log in a bucket


class MetricsLog:
  """`metrics.jsonl`: one object per logged step. Only process 0 writes. In a bucket, where nothing can be appended, the
  file is written anew now and then."""

  def __init__(self, workdir: epath.Path, step: int, checkpoint_every: int = 0):
    """Opens the log to continue after `step`. Rows of later steps, which will be written again, are dropped.

    The log is copied to the folder `damaged` before, with a warning, where it has damaged lines other than a last one
    that was cut off, or rows of more steps than an interruption between two checkpoints explains (0: of any number).
    Raises UserError if it cannot be written.
    """
    self.path = workdir / "metrics.jsonl"
    self._stream, self._rows = None, None  # rows: of a log in a bucket, all
    if jax.process_index():
      return
    try:
      raw = self.path.read_bytes() if self.path.exists() else b""
      rows = [(line, _row(line)) for line in raw.split(b"\n")]
      kept = b"".join(line + b"\n" for line, row in rows if row and row["step"] <= step)
      damaged = any(line.strip() and not row for line, row in rows[:-1])
      explained = step + 2 * checkpoint_every if checkpoint_every else math.inf
      if damaged or any(row and row["step"] > explained for _, row in rows):
        aside = files.place_aside(workdir, self.path.name)
        files.write_file(aside, raw)
        problem = "has damaged lines" if damaged else f"goes far beyond step {step}, from which training goes on"
        print(f"evo_jax: warning: {self.path}: {problem}; it is kept as {aside}", file=sys.stderr, flush=True)
      if kept != raw:
        files.write_file(self.path, kept)
      if files.is_local(self.path):
        self._stream = self.path.open("a")
      else:
        self._rows, self._written, self._whole = bytearray(kept), time.monotonic(), True
    except OSError as error:
      raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error

  def write(self, row: dict[str, float]) -> None:
    """Appends a row, which is on disk on return; in a bucket within a minute of rows. Raises UserError if it cannot be
    written."""
    line = json.dumps(row) + "\n"
    if self._rows is not None:
      self._rows += line.encode()
      self._whole = False
      if time.monotonic() - self._written > _REWRITTEN:
        self.flush()
    if self._stream is None:
      return
    try:
      self._stream.write(line)
      self._stream.flush()
      os.fsync(self._stream.fileno())
    except OSError as error:
      raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error

  def flush(self) -> None:
    """Has all rows written. Raises UserError if they cannot be."""
    if self._rows is not None and not self._whole:
      files.write_file(self.path, bytes(self._rows))
      self._written, self._whole = time.monotonic(), True

  def close(self) -> None:
    with contextlib.suppress(UserError):  # as below
      self.flush()
    if self._stream is not None:
      with contextlib.suppress(OSError):  # of a row that could not be written, which has been said
        self._stream.close()


def read_metrics(path: epath.Path) -> list[dict[str, float]]:
  """The rows of a log; damaged lines, as one that was cut off at the end, are left out."""
  path = epath.Path(path)
  lines = path.read_bytes().split(b"\n") if path.exists() else []
  return [row for line in lines if (row := _row(line))]


def _row(line: bytes) -> dict[str, float] | None:
  """The row that a line holds; None where it is damaged."""
  try:
    row = json.loads(line)
    return row if isinstance(row["step"], int) else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None


class Throughput:
  """Where the time goes, as metrics of a log's row.

  Since the previous row: tokens_per_second, tokens_per_second_per_chip (of clean text, in the time spent on steps);
  mfu (model FLOPs utilization: operations by formula, without what rematerialization repeats, as a share of the
  devices' peak, where that is known); data_wait (share of the time spent on steps that the loop waited for text);
  checkpoint_stall, evaluation (seconds). Since the command began: goodput, the share of the time spent on steps, apart
  from compilation, waiting for text, saving and evaluating.
  """

  def __init__(self, tokens_per_step: int):
    self._tokens = tokens_per_step
    self._began = self._marked = time.monotonic()  # marked: when the previous row was made
    self._compiled = False
    self._steps = 0  # since the previous row
    self._waited = dict.fromkeys(("data_wait", "checkpoint_stall", "evaluation"), 0.0)
    self._good = 0.0  # seconds of goodput

  @contextlib.contextmanager
  def waits(self, what: str):
    """Counts the time of its block as `data_wait`, `checkpoint_stall` or `evaluation`."""
    began = time.monotonic()
    yield
    self._waited[what] += time.monotonic() - began

  def step(self) -> None:
    """Counts a finished step. The first one is mostly compilation and sets the clock."""
    if self._compiled:
      self._steps += 1
    else:
      self._compiled, self._marked = True, time.monotonic()
      self._waited = dict.fromkeys(self._waited, 0.0)

  def row(self, operations: float) -> dict[str, float]:
    """The metrics of a row, after steps of `operations` FLOPs each; resets what is counted per row."""
    now = time.monotonic()
    stall = self._waited["checkpoint_stall"] + self._waited["evaluation"]
    stepping = max(now - self._marked - stall, 1e-9)
    self._good += stepping - self._waited["data_wait"] if self._steps else 0.0
    row = {
      "goodput": round(max(self._good, 0.0) / (now - self._began), 4),
      "checkpoint_stall": round(self._waited["checkpoint_stall"], 3),
      "evaluation": round(self._waited["evaluation"], 3),
    }
    if self._steps:
      rate, chips = self._steps / stepping, jax.device_count()
      row |= {
        "tokens_per_second": round(rate * self._tokens, 1),
        "tokens_per_second_per_chip": round(rate * self._tokens / chips, 1),
        "data_wait": round(self._waited["data_wait"] / stepping, 4),
      }
      if peak := flops.peak_flops(jax.devices()[0].device_kind):
        row["mfu"] = round(rate * operations / (chips * peak), 4)
    self._marked, self._steps = now, 0
    self._waited = dict.fromkeys(self._waited, 0.0)
    return row


class ProgressBar:
  """Step, bits per token, tokens per second and time left, on stderr: a bar on a terminal, else lines."""

  def __init__(self, steps: int, start: int, tokens_per_step: int):
    self.steps, self.start, self.tokens_per_step = steps, start, tokens_per_step
    self._marked = None  # when the last step finished; None before the first
    self._step = start
    self._rate = None  # steps per second, a running mean
    self._progress = None
    if jax.process_index() == 0 and sys.stderr.isatty():
      from rich.console import Console

      self._progress = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
      )
      self._task = self._progress.add_task("compiling", total=steps, completed=start)
      self._progress.start()

  def step(self, step: int, bits: float) -> None:
    """Counts a finished step. The first one is mostly compilation and does not enter the speed."""
    now = time.monotonic()
    if self._marked is None:
      self._step, self._marked = step, now
    elif step > self._step:
      rate = (step - self._step) / max(now - self._marked, 1e-9)
      self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
      self._step, self._marked = step, now
    if self._progress:
      self._progress.update(self._task, completed=step, description=self._text(bits))

  def pause(self) -> None:
    """Leaves the time since the last step out of the speed: that of an evaluation or a save."""
    if self._marked is not None:
      self._marked = time.monotonic()

  def line(self, step: int, bits: float) -> None:
    """Prints a line where there is no terminal."""
    if not self._progress and jax.process_index() == 0:
      print(f"step {step}/{self.steps}  {self._text(bits)}", file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._progress:
      self._progress.stop()

  def _text(self, bits: float) -> str:
    if not self._rate:
      return f"{bits:.3f} bits"
    left = int((self.steps - self._step) / self._rate)
    return f"{bits:.3f} bits  {self._rate * self.tokens_per_step:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
