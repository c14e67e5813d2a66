"""Shared by the experiments: configurations with changes, runs that are trained and measured once, and results that
record where they come from."""

from collections.abc import Callable
import functools
import importlib.util
import json
import os
from pathlib import Path
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.training import loop

RESULTS = Path(__file__).parent / "results"


def load_config(name: str) -> ml_collections.ConfigDict:
  """The ConfigDict of a shipped configuration's name, or of a file's path. Raises UserError."""
  path = cli.config_file(name)
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def configure(values: ml_collections.ConfigDict, *changes: dict[str, Any]) -> config_lib.Config:
  """The configuration of `values` with changes, as {"model.layers": 3}; later ones win. Raises UserError."""
  return config_lib.from_dict(changed(values, *changes))


def changed(values: ml_collections.ConfigDict, *changes: dict[str, Any]) -> ml_collections.ConfigDict:
  """A copy of `values` with changes, not validated yet."""
  values = values.copy_and_resolve_references()
  for name, value in (item for change in changes for item in change.items()):
    section, field = name.split(".")
    values[section][field] = value
  return values


def select(only: str, names: dict[str, Any]) -> list[str]:
  """The names listed by --only, or all. Raises UserError for an unknown one."""
  selected = only.split(",") if only else list(names)
  for name in selected:
    if name not in names:
      raise UserError(f"--only: {name!r} is not one of {', '.join(names)}")
  return selected


def missing_extra(error: ImportError, extra: str) -> UserError:
  """The error to raise where an optional library cannot be imported."""
  return UserError(f"{error.name} is not installed: pip install 'evo_jax[{extra}]'")


def pyplot():
  """matplotlib.pyplot, drawing to files only. Raises UserError if matplotlib is not installed."""
  try:
    import matplotlib
    from matplotlib import pyplot as plt
  except ImportError as error:
    raise missing_extra(error, "plot") from error
  matplotlib.use("Agg")
  return plt


def transformers():
  """(torch, transformers), using all cores of this process. Raises UserError if they are not installed."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise missing_extra(error, "hf") from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  return torch, transformers


def results_folder(output: str) -> Path:
  """Where --output says that results are written; by default experiments/results."""
  return Path(output) if output else RESULTS


class MeasuredRun:
  """A configuration that is trained in `workdir` and measured on paths, each once: what exists on disk is reused.

  model: an imported model's work directory, from whose weights training begins; default: from nothing.
  """

  def __init__(self, config: config_lib.Config, workdir: str | Path, model: str = ""):
    self.config, self.workdir, self._model = config, Path(workdir), model
    self._run = None

  @functools.cached_property
  def corpora(self) -> list[corpora_lib.Corpus]:
    """The text of the configuration."""
    return corpora_lib.load_corpora(self.config.data, corpora_lib.load_tokenizer(self.config.data))

  def kept(self, name: str) -> "KeptValues":
    """What was measured of this run's text after this number of steps, and is kept in a file of the work directory.
    Raises UserError where that was begun with another model."""
    check_begun_with(self._model, self.workdir)
    text = [corpus.fingerprint for corpus in self.corpora]
    return KeptValues(self.workdir / f"{name}.json", {"step": self.config.train.steps, "text": text})

  def measure(self, split: str, sequences: int, paths: tuple[str, ...], every: int = 1) -> dict[str, dict[str, Any]]:
    """Measures held-out sequences on paths.

    Returns by path: `bits` per character, `stderr`, `passes_per_token`, and `each`, the bits per character of the
    single sequences.

    Args:
      split: "valid" or "test".
      sequences: number of sequences, evenly spaced over the split; 0: all.
      paths: names of paths.
      every: measure only sequences 0, every, 2 every, ... of them.
    """
    measured = self.kept(f"measured_{split}_{sequences}_{every}")
    for path in paths:
      if path not in measured.values:
        entry, each = self._measure_path(split, sequences, every, path)
        measured.add(path, entry | {"each": [round(float(x), 5) for x in each / self.config.model.context]})
        print(
          f"{self.workdir.name}: {split} {path:<20}{entry['bits']:.4f} +- {entry['stderr']:.4f} at "
          f"{entry['passes_per_token']:.4g} passes per token",
          flush=True,
        )
    return {path: measured.values[path] for path in paths}

  def _measure_path(self, split: str, sequences: int, every: int, path: str) -> tuple[dict[str, Any], np.ndarray]:
    run = self.trained()
    held_out = batches_lib.held_out(
      self.corpora, split, self.config.model.context, sequences, self.config.model.isolate_documents
    ).rows(slice(None, None, every))
    return self._evaluator.measure(run.params, run.statistics, held_out, (path,))[0]

  def trained(self) -> run_lib.Run:
    """The run, trained as far as the work directory's checkpoint has not been. Raises UserError."""
    if self._run is None:
      train(self.config, self.workdir, self._model)
      self._run = run_lib.load_run(str(self.workdir))
      self._evaluator = paths_lib.Evaluator(self._run.model, self.config, self._run.tokenizer, self._run.mesh)
    return self._run


class KeptValues:
  """Values by name in a file, of one text and number of steps: those of others are left out, and written over."""

  def __init__(self, file: Path, of: dict[str, Any]):
    self._file, self._of = file, of
    found = json.loads(file.read_text()) if file.exists() else {}
    self.values: dict[str, Any] = found["values"] if found.get("of") == of else {}

  def add(self, name: str, value: Any) -> None:
    self.values[name] = value
    self._file.write_text(json.dumps({"of": self._of, "values": self.values}))


@functools.cache
def model_identity(workdir: str) -> str:
  """Names the weights, shape and tokenizer of a work directory's model. Raises UserError."""
  return run_lib.fingerprint(run_lib.load_run(workdir))


def train(config: config_lib.Config, folder: Path, model: str = "") -> None:
  """Trains in a folder, or goes on there, from the weights of an imported model's work directory, if given. Raises
  UserError, also where the folder was begun with another model."""
  check_begun_with(model, folder)
  if model and not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    _begun_with(folder).write_text(model_identity(model))
    partial = folder.with_name(f"{folder.name}.copied")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, copy_function=_link)
    partial.rename(folder)
  with loop.prepare(config, str(folder)) as setup:
    if loop.train(setup) is None:
      raise UserError(f"{folder}: training was stopped; the same command continues")


def check_begun_with(model: str, folder: Path) -> None:
  """Raises UserError where training in a folder was begun with another model."""
  begun = _begun_with(folder)
  if model and folder.exists() and begun.exists() and begun.read_text() != model_identity(model):
    raise UserError(f"{folder}: was begun with another model; remove it, or give another --workdir")


def _begun_with(folder: Path) -> Path:
  """The file that names the model."""
  return folder.with_name(f"{folder.name}.model")


def _link(source: str, target: str) -> str:
  """The weights are shared, all that is written anew is copied."""
  if "checkpoints" in Path(source).parts:
    os.link(source, target)
    return target
  return shutil.copy2(source, target)


def read_lines(file: str | Path) -> list[str]:
  """The lines of a file that are not blank; str.splitlines would also cut JSON at characters like U+2028."""
  return [line for line in Path(file).read_text().split("\n") if line.strip()]


def read_metrics(folder: Path) -> list[dict[str, float]]:
  """The rows that training in a folder has logged."""
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_seconds(config: config_lib.Config, folder: Path) -> list[float]:
  """Seconds per step, by row of the log, of training in a folder, without compilation and saving."""
  tokens = config.data.batch_size * config.model.context
  return [tokens / row["tokens_per_second"] for row in read_metrics(folder) if "tokens_per_second" in row]


def time_training(config: config_lib.Config, folder: Path, model: str) -> list[float]:
  """`step_seconds` of a run that is made anew in a folder, from an imported model's weights, and removed again."""
  shutil.rmtree(folder, ignore_errors=True)
  train(config, folder, model)
  seconds = step_seconds(config, folder)
  shutil.rmtree(folder)
  _begun_with(folder).unlink(missing_ok=True)
  return seconds


def time_steps(
  steps: dict[Any, Callable], states: dict[Any, Any], batch: Any, repeats: int, warmup: int = 0
) -> dict[Any, float]:
  """Median seconds of training steps of several kinds, which alternate.

  Args:
    steps: (state, batch) -> (state, metrics) by kind; a step may donate its state.
    states: initial states by kind; replaced by the last ones.
    batch: of all steps.
    repeats: timed steps of each kind.
    warmup: steps of each kind before them.
  """
  seconds = {kind: [] for kind in steps}
  for repeat in range(-warmup, repeats):
    for kind, step in steps.items():
      started = time.perf_counter()
      states[kind] = jax.block_until_ready(step(states[kind], batch)[0])
      if repeat >= 0:
        seconds[kind].append(time.perf_counter() - started)
  return {kind: statistics.median(values) for kind, values in seconds.items()}


class RecordedRuns:
  """The runs of an experiment in NAME.json of a folder, which is written after each of them.

  A run that the file holds need not be repeated, even on another machine, where nothing else is left of it: a long
  experiment goes on from what is committed.
  """

  def __init__(self, name: str, folder: Path, settings: dict[str, Any]):
    """settings: what all runs depend on. Raises UserError if the file has runs of others."""
    self._name, self._folder, self._settings = name, folder, _plain(settings)
    file = folder / f"{name}.json"
    found = json.loads(file.read_text())["result"] if file.exists() else {"settings": self._settings, "runs": []}
    if other := [key for key in self._settings if found.get("settings", {}).get(key) != self._settings[key]]:
      raise UserError(f"{file}: has runs of another {other[0]}; remove it, or give another --output")
    self.runs: list[dict[str, Any]] = found["runs"]

  def find(self, **fields: Any) -> dict[str, Any] | None:
    """The run that has these fields, or None."""
    return next((run for run in self.runs if _plain(fields).items() <= run.items()), None)

  def add(self, run: dict[str, Any]) -> dict[str, Any]:
    """The run as it is recorded from now on, with the commit and the machine."""
    self.runs.append(_plain(run | _origin()))
    self.write()
    return self.runs[-1]

  def write(self, **conclusions: Any) -> None:
    """Writes the file; `conclusions` stand before the runs."""
    write_result(self._name, {"settings": self._settings, **conclusions, "runs": self.runs}, self._folder)


def _plain(value: Any) -> Any:
  """What JSON gives back: lists for tuples, text for the keys of a dict."""
  return json.loads(json.dumps(value))


def write_result(name: str, result: Any, folder: Path = RESULTS) -> None:
  """Writes NAME.json with the command, the commit and the machine into experiments/results, or another folder.

  Warns if the code differs from the commit: committed results must come from clean commits.
  """
  record = {"command": _command(), **_origin(), "result": result}
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / f"{name}.json"
  file.write_text(json.dumps(record, indent=2) + "\n")
  if record["commit"].endswith("-dirty"):
    print(f"warning: {file} comes from uncommitted changes ({record['commit']})", file=sys.stderr)


def _origin() -> dict[str, str]:
  """The commit and the machine."""
  machine = f"{_processor()}, {os.cpu_count()} cores; {len(jax.devices())} x {jax.devices()[0].device_kind}"
  return {"commit": commit(), "machine": f"{machine}; Python {platform.python_version()}, jax {jax.__version__}"}


def shortened(text: str) -> str:
  """Text with absolute paths shortened to a file and its folder: the machine they are of does not matter."""
  return re.sub(r"(?:(?<=[=,:])|^)/(?:[^/,:]+/)*([^/,:]+/[^/,:]+)", r"\1", text)


def _command() -> str:
  """The command line, with absolute paths shortened."""
  options = map(shortened, sys.argv[1:])
  quoted = " ".join(f"'{a}'" if re.search(r"[ *]", a) else a for a in options)
  return f"python -m experiments.{Path(sys.argv[0]).stem} {quoted}".strip()


def commit() -> str:
  """The commit that is checked out, with "-dirty" if tracked files other than results differ; "" outside a checkout,
  and where there is no git."""
  if shutil.which("git") is None:
    return ""
  git = lambda *arguments: subprocess.run(
    ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
  ).stdout.strip()
  changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS.name}")
  return git("describe", "--always") + ("-dirty" if changes else "")


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
