"""What the experiments share: configurations with changes, runs that are trained once and measured once, and results
that say where they come from."""

import importlib.util
import json
import os
from pathlib import Path
import platform
import re
import subprocess
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from evo_jax import cli, main
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.parallel import sharding

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
  """A copy of `values` with changes, not checked yet."""
  values = values.copy_and_resolve_references()
  for name, value in (item for change in changes for item in change.items()):
    section, field = name.split(".")
    values[section][field] = value
  return values


def chosen(only: str, known: dict[str, Any]) -> list[str]:
  """The names that --only asks for, or all. Raises UserError for one that is not known."""
  names = only.split(",") if only else list(known)
  for name in names:
    if name not in known:
      raise UserError(f"--only: {name!r} is not one of {', '.join(known)}")
  return names


class Measured:
  """A configuration that is trained in `workdir` and measured on paths, as far as it was not yet."""

  def __init__(self, config: config_lib.Config, workdir: str | Path):
    self.config, self.workdir = config, Path(workdir)
    self._run = None

  def __call__(self, split: str, sequences: int, paths: tuple[str, ...], every: int = 1) -> dict[str, dict[str, Any]]:
    """By path: `bits` a character, `stderr`, `passes_per_token`, and `each`, the bits a character of the single
    sequences: of `sequences` evenly spread ones numbers 0, every, 2 every, ..."""
    file = self.workdir / f"measured_{split}_{sequences}_{every}.json"
    known = json.loads(file.read_text()) if file.exists() else {"step": self.config.train.steps}
    if known.pop("step") != self.config.train.steps:
      known = {}
    for path in paths:
      if path not in known:
        entry, each = self._measure(split, sequences, every, path)
        known[path] = entry | {"each": [round(float(x), 5) for x in each / self.config.model.context]}
        file.write_text(json.dumps({"step": self.config.train.steps} | known))
        print(
          f"{self.workdir.name}: {split} {path:<16}{entry['bits']:.4f} +- {entry['stderr']:.4f} at "
          f"{entry['passes_per_token']:.4g} passes a token",
          flush=True,
        )
    return {path: known[path] for path in paths}

  def _measure(self, split: str, sequences: int, every: int, path: str) -> tuple[dict[str, Any], np.ndarray]:
    if self._run is None:
      main.train(self.config, str(self.workdir))
      self._run = run_lib.load_run(str(self.workdir))
      self._corpora = corpora_lib.load_corpora(self.config.data.path, self._run.tokenizer)
      self._evaluator = paths_lib.Evaluator(
        self._run.model, self.config, self._run.tokenizer, sharding.make_mesh(config_lib.Mesh())
      )
    text = batches_lib.held_out(self._corpora, split, self.config.model.context, sequences)
    text = text.rows(slice(None, None, every))
    return self._evaluator.measure(self._run.params, self._run.statistics, text, (path,))[0]


def write_result(name: str, result: Any, folder: Path = RESULTS) -> None:
  """Writes NAME.json with the command, the commit and the machine into experiments/results, or another folder."""
  short = (
    re.sub(r"(?<==)/(?:[^/,]+/)*([^/,]+/[^/,]+)", r"\1", a) for a in sys.argv[1:]
  )  # whose machine it was, is no matter
  options = " ".join(a if not re.search(r"[ *]", a) else f"'{a}'" for a in short)
  record = {
    "command": f"python -m experiments.{Path(sys.argv[0]).stem} {options}".strip(),
    "commit": commit(),
    "machine": f"{_processor()}, {os.cpu_count()} cores; {len(jax.devices())} x {jax.devices()[0].device_kind}; "
    f"Python {platform.python_version()}, jax {jax.__version__}",
    "result": result,
  }
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def commit() -> str:
  """The commit that runs, with "-dirty" where files differ from it; empty outside a checkout."""
  found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
  return found.stdout.strip()


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
