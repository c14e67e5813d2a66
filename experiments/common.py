"""What the experiments share: loading a configuration file, and results that say where they come from."""

import importlib.util
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
from typing import Any

import jax
import ml_collections

RESULTS = Path(__file__).parent / "results"


def load_config(path: str) -> ml_collections.ConfigDict:
  """The ConfigDict of a configuration file."""
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def write_result(name: str, result: Any) -> None:
  """Writes experiments/results/NAME.json with the command, the commit and the machine."""
  commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
  options = " ".join(a if " " not in a else f"'{a}'" for a in sys.argv[1:])
  record = {
      "command": f"python -m experiments.{Path(sys.argv[0]).stem} {options}".strip(),
      "commit": commit.stdout.strip(),
      "machine": f"{_processor()}, {os.cpu_count()} cores; {len(jax.devices())} x {jax.devices()[0].device_kind}; "
                 f"Python {platform.python_version()}, jax {jax.__version__}",
      "result": result,
  }
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
