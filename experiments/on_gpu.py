"""What waits for a GPU, in pieces that go on where the last call stopped, the most valuable first.

  python -m experiments.on_gpu --output=FOLDER --model=MODEL.gguf --text='text/*.jsonl' [--windows=evo.safetensors]
      [--only=tests,decode] [--minutes=9] [--small]

  tests       the fast tests on this machine's CPU, and those of network, attention, vocabulary, objective and decoding
              on the GPU, with products in full float32: how many passed, and which failed
  decode      `ar` and `verify` of the model, greedy, in float32 and bfloat16, at batch 1, 8 and 64: tokens per second,
              tokens per pass, accepted drafts, share of equal texts
  golden      twenty steps of `tiny` on the CPU and on the GPU: metrics side by side, largest relative differences
  throughput  tokens per second and MFU of training steps of evo150m and of evo1b's shape, without and with windows,
              beside transformers' Llama of the same shape, compiled by torch, in turns
  windows     goes on training the model's windows for the rest of the time; writes evo.safetensors

Each piece has a process of its own and a limit of time. It writes FOLDER/NAME.json row by row: the same command
measures what is missing or has failed. `windows` is never done: it begins from FOLDER/evo.safetensors, where there is
one, with a fresh optimizer. --model is a work directory, or a source of evo_jax.convert. --small runs all pieces on a
CPU in small shapes. JAX_PLATFORMS names another platform than cuda (with --small: cpu).
"""

from collections import deque
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
import xml.etree.ElementTree as ElementTree

from absl import flags
import jax
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import files
from evo_jax.decoding.sampler import Sampler
from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops
from evo_jax.parallel import sharding
from evo_jax.pretrained import evo_file, exporter, importer
from evo_jax.pretrained.evo_file import EvoFile
from evo_jax.pretrained.source import open_source
from evo_jax.training import loop, metrics
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common, hf_speed, verify_speed

ROOT = Path(__file__).parents[1]
_BEGAN = time.monotonic()
_GRACE = 60  # seconds to save and leave, once a piece's time is over
_LEAST = 2  # seconds that a piece is begun with

GPU_TESTS = ("model", "attention", "vocabulary", "objective", "decode")
BATCHES = {1: 8, 8: 16, 64: 64}  # texts by batch size
GOLDEN = {"train.log_every": 1, "train.eval_every": 0, "eval.samples": 0, "eval.paths": ("ar", "diagonal:4")}
# Batch sizes to try, the largest that fits is taken: two models, their gradients and their moments are in memory.
THROUGHPUT = {"evo150m": (32, 16, 8), "evo1b": (8, 4, 2, 1)}
WINDOWS = {"data.batch_size": 32, "model.dtype": "bfloat16", "model.remat": "none", "eval.sequences": 8}

_ASKED = (
  "Write a short story about {}.",
  "Explain to a child what one should know about {}.",
  "List five facts about {}.",
  "Write a Python function that has to do with {}.",
  "Write an email to a friend about {}.",
  "What are the advantages and disadvantages of {}?",
  "Write a poem about {}.",
  "Summarize in three sentences the history of {}.",
)
_TOPICS = ("rivers", "bicycles", "bread", "the moon", "libraries", "chess", "trains", "honey bees")
PROMPTS = [asked.format(topic) for topic in _TOPICS for asked in _ASKED]


class Rows:
  """The rows of a piece by name, in FOLDER/NAME.json; those of earlier calls are kept, unless they are errors."""

  def __init__(self, piece: str, folder: Path, of: dict[str, Any]):
    """of: what the rows are of. Raises UserError where the file's are of something else."""
    self._piece, self._folder, self._of = piece, folder, of
    found = read_record(folder, piece).get("result", {})
    if found.get("of", of) != of:
      raise UserError(f"{folder / piece}.json: is of {found['of']}, not {of}; give another --output")
    self.rows = found.get("rows", {})

  def measure(self, name: str, function: Callable[..., dict[str, Any]], *args: Any) -> None:
    """Adds function(*args) as a row, unless it is there; what goes wrong becomes a row with `error`."""
    if name in self.rows and "error" not in self.rows[name]:
      return
    try:
      row = function(*args)
    except (UserError, RuntimeError) as error:  # of JAX and torch: mostly a lack of memory
      row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"}
    self.rows[name] = row | {"device": jax.devices()[0].device_kind}
    shown = {key: value for key, value in self.rows[name].items() if not isinstance(value, (dict, list))}
    print(f"{name}: {json.dumps(shown)}", flush=True)
    self.save()

  def save(self, done: bool = False) -> None:
    common.write_result(self._piece, {"done": done, "of": self._of, "rows": self.rows}, self._folder)


def read_record(folder: Path, piece: str) -> dict[str, Any]:
  """What FOLDER/NAME.json holds; {} where there is none. Raises UserError where it cannot be read."""
  file = folder / f"{piece}.json"
  try:
    return json.loads(file.read_text()) if file.exists() else {}
  except (OSError, ValueError) as error:
    raise UserError(f"{file}: cannot be read: {error}") from error


def run_tests(rows: Rows, args: flags.FlagValues) -> None:
  """The piece `tests`."""
  every, some = (), tuple(f"tests/{name}_test.py" for name in GPU_TESTS)
  if args.small:
    every = some = ("tests/flow_test.py",)
  on = platform(args.small)
  rows.measure("fast tests, cpu", pytest, "cpu", len(os.sched_getaffinity(0)), every)
  rows.measure(f"of computation, {on}", pytest, on, 4, some)


def pytest(on: str, workers: int, selected: tuple[str, ...]) -> dict[str, Any]:
  """Runs the selected fast tests on a platform: counts, and the failed ones with the first line of what they say."""
  report = Path(tempfile.mkdtemp()) / "report.xml"
  command = ["pytest", "-q", "-m", "not slow", "-n", str(workers), f"--junitxml={report}", *selected]
  done = module(command, {"JAX_PLATFORMS": on} | ({} if on == "cpu" else {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}))
  if not report.exists():
    raise UserError(f"pytest: {last_line(done.stdout + done.stderr)}")
  cases = list(ElementTree.parse(report).iter("testcase"))
  failed = {f"{case.get('classname')}.{case.get('name')}": case_problem(case) for case in cases}
  failed = {name: problem for name, problem in failed.items() if problem is not None}
  skipped = sum(case.find("skipped") is not None for case in cases)
  if not cases:
    raise UserError(f"pytest: {last_line(done.stdout + done.stderr)}")
  return {
    "passed": len(cases) - len(failed) - skipped,
    "failed": len(failed),
    "skipped": skipped,
    "seconds": float(ElementTree.parse(report).getroot().find("testsuite").get("time")),
    "failures": failed,
  }


def case_problem(case: ElementTree.Element) -> str | None:
  """What a failed test says; None: it did not fail."""
  problem = case.find("failure") if case.find("failure") is not None else case.find("error")
  return None if problem is None else " ".join((problem.get("message") or "failed").split())[:300]


def module(command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess:
  """Runs `python -m command`, finished, output captured as text."""
  environment = os.environ | variables
  return subprocess.run(
    [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )


def last_line(text: str) -> str:
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def run_decode(rows: Rows, args: flags.FlagValues) -> None:
  """The piece `decode`."""
  for dtype in ("float32", "bfloat16"):
    batches = {2: 2} if args.small else BATCHES
    loaded = functools.cache(functools.partial(load_model, args, dtype))
    for batch, texts in batches.items():
      rows.measure(f"{dtype}, batch {batch}", lambda b, n, load=loaded: decode(load(), b, n, args.small), batch, texts)


def load_model(args: flags.FlagValues, dtype: str) -> run_lib.Run:
  """--model with --windows, in a dtype; what is asked is what a user says, where it has a chat template."""
  folder = bring_in(args.model, args.windows, importer.Options(dtype, dtype))
  run = run_lib.load_run(str(folder))
  with contextlib.suppress(UserError):
    run = run.in_conversation()
  return run


def bring_in(model: str, windows: str, options: importer.Options) -> Path:
  """A new work directory at step 0 of a work directory or source, with windows ("": its own). Raises UserError."""
  folder = Path(tempfile.mkdtemp())
  if is_workdir(model):
    exporter.export_run(run_lib.load_run(model, exact=True), model, str(folder / "source"))
    model = str(folder / "source")
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])
  with contextlib.closing(open_source(model)) as source:
    importer.import_model(source, str(folder / "run"), options, mesh, EvoFile(Path(windows)) if windows else None)
  return folder / "run"


def is_workdir(path: str) -> bool:
  return (Path(path) / "checkpoints").is_dir()


def decode(run: run_lib.Run, batch: int, texts: int, small: bool) -> dict[str, Any]:
  """Greedy texts of `ar` and `verify`, batches in turns. In float32 products are not rounded to fewer bits."""
  highest = "highest" if run.config.model.dtype == "float32" else None
  tokens = 8 if small else 128
  make = lambda mode: Sampler(run, verify_speed.sampling(0.0, tokens, mode=mode, batch_size=batch))
  samplers, written, seconds = {mode: make(mode) for mode in ("ar", "verify")}, {}, {}
  with jax.default_matmul_precision(highest):
    for mode, sampler in samplers.items():
      sampler(PROMPTS[:batch])  # compiles; `verify` measures its passes
      written[mode], seconds[mode] = [], 0.0
    for start in range(0, texts, batch):
      for mode, sampler in samplers.items():
        generations = sampler(PROMPTS[start : min(start + batch, texts)])
        written[mode] += generations
        seconds[mode] += max(g.seconds for g in generations)
  equal = sum(a.tokens == b.tokens for a, b in zip(written["ar"], written["verify"])) / texts
  row = {"equal_texts": equal}
  for mode, generations in written.items():
    counts = verify_speed.count(generations)
    speed = {
      "tokens_per_second": counts["tokens"] / seconds[mode],
      "seconds_per_token": seconds[mode] / counts["tokens"],
    }
    row[mode] = counts | speed | {"compile_seconds": samplers[mode].compile_seconds}
  return row | {"speedup": row["verify"]["tokens_per_second"] / row["ar"]["tokens_per_second"]}


def run_golden(rows: Rows, args: flags.FlagValues) -> None:
  """The piece `golden`."""
  rows.measure("tiny", golden, platform(args.small), 2 if args.small else 20, args.small)


def golden(other: str, steps: int, small: bool) -> dict[str, Any]:
  """Trains `tiny` on the CPU and on another platform: metrics of each step side by side, and how far they differ."""
  folder = Path(tempfile.mkdtemp())
  changes = GOLDEN | {"train.steps": steps} | ({"data.path": "experiments/*.py", "model.layers": 1} if small else {})
  logs, tables = [], []
  for i, on in enumerate(("cpu", other)):
    workdir = folder / str(i)
    command = ["evo_jax.main", "--config=tiny", f"--workdir={workdir}"]
    command += [f"--config.{field}={value}" for field, value in changes.items()]
    done = module(command, {"JAX_PLATFORMS": on, "JAX_DEFAULT_MATMUL_PRECISION": "highest"})
    if done.returncode:
      raise UserError(f"evo_jax.main on {on}: {last_line(done.stderr)}")
    logs.append(metrics.read_metrics(workdir / "metrics.jsonl"))
    tables.append({row["path"]: row["bits"] for row in json.loads((workdir / "table.json").read_text())})
  names = [name for name in logs[0][0] if name not in (*metrics.TIMING_FIELDS, "step")]
  side_by_side = {name: [[log[i].get(name) for log in logs] for i in range(steps)] for name in names}
  table = {path: [table[path] for table in tables] for path in tables[0]}
  differences = {name: max(relative(*pair) for pair in pairs) for name, pairs in side_by_side.items()}
  return {
    "platforms": ["cpu", other],
    "largest_relative_difference": max(differences.values()),
    "table_relative_difference": max(relative(*pair) for pair in table.values()),
    "differences": differences,
    "metrics": side_by_side,
    "table": table,
  }


def relative(a: float | None, b: float | None) -> float:
  """The difference of two numbers as a share of the larger; infinite where one is missing."""
  if a is None or b is None:
    return 0.0 if a is b else math.inf
  return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def run_throughput(rows: Rows, args: flags.FlagValues) -> None:
  """The piece `throughput`."""
  for name, batches in THROUGHPUT.items():
    rows.measure(name, throughput, name, batches[-1:] if args.small else batches, args.attention, args.small)


def throughput(name: str, batches: tuple[int, ...], kernel: str, small: bool) -> dict[str, Any]:
  """Steps of a configuration's shape at the largest of the batch sizes that fits the memory."""
  for i, batch in enumerate(batches):
    try:
      return throughput_at(name, batch, kernel, small)
    except RuntimeError as error:
      if i + 1 == len(batches) or not is_lack_of_memory(error):
        raise
      print(f"{name}: batch {batch} does not fit the memory", flush=True)
    gc.collect()
  raise ValueError("no batch sizes")


def is_lack_of_memory(error: RuntimeError) -> bool:
  """Of JAX or torch."""
  return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)


def throughput_at(name: str, batch: int, kernel: str, small: bool) -> dict[str, Any]:
  """Steps at a batch size, on random tokens. Both libraries keep all in float32, and compute in bfloat16."""
  changes = {"data.batch_size": batch, "train.accumulate": 1, "optim.ema": 0.0, "model.attention": kernel}
  if small:
    changes |= {"model.layers": 1, "model.width": 32, "model.heads": 2, "model.kv_heads": 1, "model.hidden": 64}
    changes |= {"model.context": 32, "model.vocab_size": 64, "model.vocab_multiple": 8, "model.code_dim": 8}
    changes |= {"window.count": 2, "loss.bound_windows": 1, "loss.chunk": 0, "model.attention": "auto"}
  config = common.configure(common.load_config(name), changes)
  c, device = config.model, jax.devices()[0]
  tokens = np.random.default_rng(0).integers(1, c.vocab_size, (batch, c.context + 1)).astype(np.int32)
  steps, rows = evo_steps(config)
  note = add_transformers(steps, config, tokens, on_gpu=device.platform == "gpu")
  mesh = sharding.make_mesh(config.mesh, [device])
  with jax.set_mesh(mesh):
    batch_on_device = sharding.global_batch(mesh, Batch(tokens), batch)
    seconds = common.time_steps(steps, dict.fromkeys(steps), batch_on_device, 2 if small else 10, 1 if small else 3)
  peak = flops.peak_flops(device.device_kind)
  work = lambda kind: flops.train_step(config, rows, windows=kind == "windows", visible=True)
  result = {
    "shape": config_lib.to_dict(config)["model"],
    "batch": batch,
    "note": note,
    "peak_bytes_of_jax": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    "steps": {
      kind: {
        "seconds": s,
        "tokens_per_second": batch * c.context / s,
        "mfu": work(kind) / s / peak if peak else None,
      }
      for kind, s in seconds.items()
    },
  }
  for kind, row in result["steps"].items():
    print(f"{name} {kind}: {row['tokens_per_second']:,.0f} tokens per second, MFU {row['mfu']}", flush=True)
  return result


def evo_steps(config: config_lib.Config) -> tuple[dict[str, Callable], int]:
  """This project's step, for autoregression alone and with windows, which share one state; rows of the tables."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  model = evo_lib.Evo(config.model, config.model.vocab_size, sharding.Layout.of(mesh))
  with jax.set_mesh(mesh):
    shared = {"state": state_lib.sharded_init(model, config, mesh)}
  step_fn = step_lib.make_step(model, config, mesh, jax.devices()[0].device_kind)

  def step(_, batch, windows):
    shared["state"], values = step_fn(shared["state"], batch, windows=windows)
    return jax.block_until_ready((shared["state"], values))[1], None

  return {
    "autoregression": functools.partial(step, windows=False),
    "windows": functools.partial(step, windows=True),
  }, model.rows


def add_transformers(steps: dict[str, Callable], config: config_lib.Config, tokens: np.ndarray, on_gpu: bool) -> str:
  """Adds the step of transformers, which has run once; why it is left out, "" where it is not."""
  try:
    step = llama_step(config, tokens, on_gpu)
    step()
  except (UserError, RuntimeError) as error:
    if isinstance(error, RuntimeError) and is_lack_of_memory(error):
      raise
    note = f"transformers is left out: {' '.join(str(error).split())[:300]}"
    print(note, flush=True)
    return note
  steps["transformers"] = step
  return ""


def llama_step(config: config_lib.Config, tokens: np.ndarray, on_gpu: bool) -> Callable:
  """A step of transformers' Llama of this shape on tokens (B, L + 1): the loss compiled by torch, on a GPU. Raises
  UserError where the libraries, or torch's GPU, are missing."""
  torch, _ = common.transformers()
  if on_gpu and not torch.cuda.is_available():
    raise UserError("this torch has no GPU")
  device, optim = "cuda" if on_gpu else "cpu", config.optim
  model = hf_speed.make_llama(config.model).to(device).train()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=optim.learning_rate,
    betas=(optim.beta1, optim.beta2),
    eps=optim.epsilon,
    weight_decay=optim.weight_decay,
    fused=on_gpu,
  )
  ids = torch.tensor(tokens.astype(np.int64), device=device)

  def loss(ids):
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

  compiled = torch.compile(loss, disable=not on_gpu)

  def step(*_):
    with torch.autocast(device, dtype=torch.bfloat16):
      value = compiled(ids)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if on_gpu:
      torch.cuda.synchronize()
    return None, None

  return step


def run_windows(rows: Rows, args: flags.FlagValues) -> None:
  """The piece `windows`; a row for each call."""
  call = len(rows.rows) + 1
  rows.measure(f"call {call}", train_windows, args, call)


def train_windows(args: flags.FlagValues, seed: int) -> dict[str, Any]:
  """Trains windows for the rest of the time, and writes them. A short run measures the time of a step first.

  seed: of batches and anchors: another one in each call.
  """
  output = Path(args.output) / evo_file.NAME
  start = str(output) if output.exists() else args.windows
  workdir = bring_in(args.model, start, importer.Options())
  changes = WINDOWS | {"data.path": args.text, "data.seed": seed, "train.seed": seed} | of_file(start)
  if args.small:
    changes |= {"data.batch_size": 2, "window.count": 2, "model.dtype": "float32"}
  configure = lambda **train: common.configure(
    common.load_config(str(workdir / "windows.py")), changes, {f"train.{name}": value for name, value in train.items()}
  )
  timed = workdir.with_name("timed")
  common.train(configure(steps=2 if args.small else 12, log_every=1 if args.small else 4), timed, str(workdir))
  rate = max(row.get("tokens_per_second", 0) for row in metrics.read_metrics(timed / "metrics.jsonl"))
  config = configure(checkpoint_every=200)
  seconds = config.data.batch_size * config.model.context / rate
  left = 60 * args.minutes - (time.monotonic() - _BEGAN) - (0 if args.small else 45)  # for compilation and the export
  steps = 2 if args.small else max(int(0.9 * left / seconds), 1)
  with loop.prepare(configure(steps=steps, checkpoint_every=200), str(workdir)) as setup:
    stopped = loop.train(setup) is None
  run = run_lib.load_run(str(workdir), exact=True)
  exporter.export_run(run, str(workdir), str(workdir.with_name("export")), dtype="bfloat16")
  place = output.with_suffix(".new")
  shutil.copy(workdir.with_name("export") / evo_file.NAME, place)
  place.rename(output)
  log = [row["window_kl"] for row in metrics.read_metrics(workdir / "metrics.jsonl") if "window_kl" in row]
  size = output.stat().st_size / 2**20
  print(f"{output}: {size:.1f} MiB after {run.step} steps", flush=True)
  return {
    "began_with": Path(start).name,
    "text": args.text,
    "steps": run.step,
    "stopped": stopped,
    "seconds_per_step": seconds,
    "sequences": run.step * config.data.batch_size,
    "window_kl": {"first": log[:1], "last_fifth": float(np.mean(log[-max(len(log) // 5, 1) :])) if log else None},
    "mib": size,
  }


def of_file(windows: str) -> dict[str, Any]:
  """The changes of a configuration that the parameters in an evo.safetensors ask for; "": none."""
  if not windows:
    return {}
  saved = EvoFile(Path(windows)).config
  own = [field.name for field in dataclasses.fields(saved.model) if field.metadata.get("pinned") == "windows"]
  return {f"model.{name}": getattr(saved.model, name) for name in own} | {"window.size": saved.window.size}


# What runs a piece, and the minutes that it has at most.
PIECES = {
  "tests": (run_tests, 4.5),
  "decode": (run_decode, 5.0),
  "golden": (run_golden, 2.0),
  "throughput": (run_throughput, 6.0),
  "windows": (run_windows, math.inf),
}


def platform(small: bool) -> str:
  """The platform of what is no comparison with the CPU."""
  return os.environ.get("JAX_PLATFORMS") or ("cpu" if small else "cuda")


def what_is_measured(args: flags.FlagValues) -> dict[str, Any]:
  """What rows depend on, beside the code."""
  names = ("windows", "attention") + (() if args.small else ("model", "text"))  # small ones are made anew
  return {name: common.shortened(args[name].value) for name in names} | {"small": args.small}


def run_piece(name: str, args: flags.FlagValues) -> None:
  """Measures the rows of a piece that are missing, in this process."""
  rows = Rows(name, Path(args.output), what_is_measured(args))
  PIECES[name][0](rows, args)
  rows.save(done=name != "windows" and not any("error" in row for row in rows.rows.values()))


def main() -> None:
  args = flags.FLAGS
  names = common.select(args.only, PIECES)
  if args.piece:
    run_piece(args.piece, args)
    return
  check(names, args)
  until, waiting = _BEGAN + 60 * args.minutes, []
  with tempfile.TemporaryDirectory() as scratch:
    model = args.model or (str(small_model(Path(scratch))) if args.small else "")
    given = [f"--{name}={args[name].value}" for name in ("output", "windows", "attention")]
    given += [f"--model={model}", f"--text={args.text or ('experiments/*.py' if args.small else '')}"]
    given += ["--small"] if args.small else []
    for name in names:
      if read_record(Path(args.output), name).get("result", {}).get("done"):
        Rows(name, Path(args.output), what_is_measured(args))  # raises where that is of something else
        print(f"{name}: is done", flush=True)
        continue
      seconds = min(until - time.monotonic(), 60 * PIECES[name][1])
      if seconds < _LEAST:
        waiting.append(name)
        continue
      command = [sys.executable, "-m", "experiments.on_gpu", f"--piece={name}", f"--minutes={seconds / 60}", *given]
      failure = run_limited(name, command, environment(Path(scratch), args.small), seconds)
      print(f"{name}: {failure or 'ran'}", flush=True)
      record_failure(Path(args.output), name, failure)
  if waiting:
    print(f"the time is over; the same command goes on with {', '.join(waiting)}", flush=True)


def check(names: list[str], args: flags.FlagValues) -> None:
  """Raises UserError for what is missing or wrong, before a piece begins."""
  if not args.output:
    raise UserError("--output=FOLDER is needed")
  reads_model = [name for name in names if name in ("decode", "windows")]
  if reads_model and not args.model and not args.small:
    raise UserError(f"--model is needed by {' and '.join(reads_model)}; --only names pieces without it")
  if "windows" in names and not args.text and not args.small:
    raise UserError("--text is needed by windows; --only names pieces without it")
  if args.model and not is_workdir(args.model):
    open_source(args.model).close()
  if args.windows:
    EvoFile(Path(args.windows))
  if text := [
    pattern for pattern in files.split_patterns(args.text) if not Path(pattern).is_dir()
  ]:  # a folder is what evo_jax.prepare wrote
    files.find_sources(",".join(text), "--text")
  try:
    Path(args.output).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={args.output}: cannot be made: {error.strerror}") from error
  check_platform(platform(args.small))


def check_platform(name: str) -> None:
  """Raises UserError where JAX has no such devices; asked in another process, for this one is to hold no memory."""
  if name == "cpu":
    return
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": name}, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(f"JAX_PLATFORMS={name}: cannot be used here ({last_line(done.stderr)}); --small takes a CPU")


def small_model(folder: Path) -> Path:
  """A random model of SmolLM2's architecture, with its tokenizer, which the tests have."""
  references = ROOT / "tests" / "pretrained"
  shutil.copytree(references / "smollm2", folder / "small", ignore=shutil.ignore_patterns("reference.safetensors"))
  return shutil.copytree(references / "tokenizer", folder / "small", dirs_exist_ok=True)


def environment(scratch: Path, small: bool) -> dict[str, str]:
  """Variables of a piece: JAX takes the memory that it needs, so that other processes and torch find some, too, and
  processes share what they compile."""
  defaults = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": str(scratch / "jax")}
  defaults |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"} if small else {}  # which compiles sooner
  fixed = {"JAX_PLATFORMS": platform(small), "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
  return defaults | os.environ | fixed


def run_limited(name: str, command: list[str], variables: dict[str, str], seconds: float) -> str:
  """Runs a command, and shows its lines; what is wrong with it, "" for nothing.

  After so many seconds it and its own processes are asked to leave, and killed a while later.
  """
  process = subprocess.Popen(
    command,
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
    start_new_session=True,
  )
  late = threading.Event()

  def end(number):
    late.set()
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)

  timers = [threading.Timer(seconds, end, [signal.SIGTERM]), threading.Timer(seconds + _GRACE, end, [signal.SIGKILL])]
  lines = deque(maxlen=20)
  before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends both
  try:
    for timer in timers:
      timer.start()
    for line in process.stdout:
      lines.append(line.rstrip())
      print(f"{name}: {line}", end="", flush=True)
    process.wait()
  finally:
    for timer in timers:
      timer.cancel()
    signal.signal(signal.SIGTERM, before)
    with contextlib.suppress(ProcessLookupError):  # what it left behind, or all of it where this process is to end
      os.killpg(process.pid, signal.SIGKILL)
  if late.is_set():
    return f"stopped after {seconds:.0f} s, its time"
  return "" if process.returncode == 0 else f"failed with exit status {process.returncode}: " + "\n".join(lines)


def record_failure(folder: Path, piece: str, failure: str) -> None:
  """Adds to FOLDER/NAME.json what went wrong in this call, or takes out what did before."""
  record = read_record(folder, piece)
  record.pop("failure", None)
  record |= {"failure": failure} if failure else {}
  (folder / f"{piece}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("output", "", "Folder of what is measured; the same one goes on.")
  flags.DEFINE_string("only", "", "Comma-separated pieces, in their order; default: all.")
  flags.DEFINE_float("minutes", 9.0, "Of this call; pieces that find none left wait for the next.", lower_bound=0.0)
  flags.DEFINE_string("model", "", "A pretrained model: its work directory, or a source of evo_jax.convert.")
  flags.DEFINE_string("windows", "", "An evo.safetensors with the model's windows.")
  flags.DEFINE_string("text", "", "Text that windows are trained on, as config.data.path.")
  flags.DEFINE_enum("attention", "cudnn", ["auto", "xla", "cudnn"], "config.model.attention of `throughput`.")
  flags.DEFINE_bool("small", False, "Small shapes, on a CPU.")
  flags.DEFINE_enum("piece", "", ["", *PIECES], "Runs a piece in this process; used by this command itself.")
  cli.run(main)
