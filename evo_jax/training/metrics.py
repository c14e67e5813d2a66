"""What a run tells: JSON lines for programs, a progress bar (or plain lines) for people."""

import contextlib
import json
import os
import sys
import time

from etils import epath
import jax
from rich.progress import BarColumn, Progress, TextColumn

from evo_jax.errors import UserError
from evo_jax.network import flops

TIMING_FIELDS = (
  "tokens_per_second",
  "tokens_per_second_per_chip",
  "mfu",
  "data_wait",
  "checkpoint_stall",
  "evaluation",
  "goodput",
)  # what of a row depends on the clock


class MetricsLog:
  """`metrics.jsonl`: one object a logged step. Only process 0 writes."""

  def __init__(self, workdir: epath.Path, step: int):
    """Opens the journal to go on after `step`: rows of later steps, which will be written again, are dropped."""
    self.path = workdir / "metrics.jsonl"
    self._stream = None
    if jax.process_index():
      return
    try:
      kept = [json.dumps(row) for row in read_metrics(self.path) if row["step"] <= step]
      aside = workdir / ".metrics.jsonl.tmp"
      aside.write_text("".join(line + "\n" for line in kept))
      aside.replace(self.path)
      self._stream = self.path.open("a")
    except OSError as error:
      raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error

  def write(self, row: dict[str, float]) -> None:
    """Appends a row and has it on disk when it returns. Raises UserError if it cannot be written."""
    if self._stream is None:
      return
    try:
      self._stream.write(json.dumps(row) + "\n")
      self._stream.flush()
      if hasattr(self._stream, "fileno"):
        os.fsync(self._stream.fileno())
    except OSError as error:
      raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error

  def close(self) -> None:
    if self._stream is not None:
      self._stream.close()


def read_metrics(path: epath.Path) -> list[dict[str, float]]:
  """The whole rows of a journal; a last line that was cut off in the middle is left out."""
  rows = []
  if epath.Path(path).exists():
    for line in epath.Path(path).read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except ValueError:
        break
  return rows


class Throughput:
  """Where the time goes. A row of the journal gets, all but the last since the row before:

  tokens_per_second, tokens_per_second_per_chip: of clean text, while steps were made; mfu: the formula's operations
  (`flops`, without what rematerialisation repeats) as a share of the devices' peak, where that is known; data_wait: the
  share of the time that the loop waited for text; checkpoint_stall, evaluation: seconds; goodput: since the command
  began, the share of the time in which steps were made, apart from compilation, waiting, saving and evaluating.
  """

  def __init__(self, tokens_a_step: int):
    self._tokens = tokens_a_step
    self._began = self._marked = time.monotonic()
    self._compiled = False
    self._steps = 0  # since the row before
    self._waited = dict.fromkeys(("data_wait", "checkpoint_stall", "evaluation"), 0.0)
    self._good = 0.0

  @contextlib.contextmanager
  def waits(self, what: str):
    """Time in which no step is made."""
    began = time.monotonic()
    yield
    self._waited[what] += time.monotonic() - began

  def step(self) -> None:
    """Counts a finished step. The first is mostly compilation, and does not count."""
    if self._compiled:
      self._steps += 1
    else:
      self._compiled, self._marked = True, time.monotonic()
      self._waited = dict.fromkeys(self._waited, 0.0)

  def row(self, operations: float) -> dict[str, float]:
    """What the journal is told after a step of so many operations; starts anew."""
    now = time.monotonic()
    stall = self._waited["checkpoint_stall"] + self._waited["evaluation"]
    stepping = max(now - self._marked - stall, 1e-9)
    self._good += stepping - self._waited["data_wait"] if self._steps else 0.0
    found = {
      "goodput": round(max(self._good, 0.0) / (now - self._began), 4),
      "checkpoint_stall": round(self._waited["checkpoint_stall"], 3),
      "evaluation": round(self._waited["evaluation"], 3),
    }
    if self._steps:
      rate, chips = self._steps / stepping, jax.device_count()
      found |= {
        "tokens_per_second": round(rate * self._tokens, 1),
        "tokens_per_second_per_chip": round(rate * self._tokens / chips, 1),
        "data_wait": round(self._waited["data_wait"] / stepping, 4),
      }
      if most := flops.peak_flops(jax.devices()[0].device_kind):
        found["mfu"] = round(rate * operations / (chips * most), 4)
    self._marked, self._steps = now, 0
    self._waited = dict.fromkeys(self._waited, 0.0)
    return found


class ProgressBar:
  """Step, bits, tokens per second and time left: a bar on a terminal, else a line a logged step, on stderr."""

  def __init__(self, steps: int, start: int, tokens_a_step: int):
    self.steps, self.start, self.tokens_a_step = steps, start, tokens_a_step
    self._began = self._marked = None
    self._step = start
    self._rate = None
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
    """Counts a finished step. The first one is compilation, and does not count as speed."""
    now = time.monotonic()
    if self._began is None:
      self._began = self._marked = now
      self._step = step
    elif step > self._step:
      rate = (step - self._step) / max(now - self._marked, 1e-9)
      self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
      self._step, self._marked = step, now
    if self._progress:
      self._progress.update(self._task, completed=step, description=self._text(bits))

  def pause(self) -> None:
    """Forgets the time since the last step, so that an evaluation or a save does not count as a slow step."""
    if self._marked is not None:
      self._marked = time.monotonic()

  def line(self, step: int, bits: float) -> None:
    """A plain line, where there is no terminal."""
    if not self._progress and jax.process_index() == 0:
      print(f"step {step}/{self.steps}  {self._text(bits)}", file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._progress:
      self._progress.stop()

  def _text(self, bits: float) -> str:
    if not self._rate:
      return f"{bits:.3f} bits"
    left = int((self.steps - self._step) / self._rate)
    return f"{bits:.3f} bits  {self._rate * self.tokens_a_step:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
