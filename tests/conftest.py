"""Shared by all tests: eight CPU devices, a compilation cache, a small configuration, and runs of the command line."""

import gc
import os
import subprocess
import sys
import tempfile

# Nothing here runs long: what counts is how fast it compiles. The second flag halves that again; a jaxlib that does
# not know it would end.
_FLAGS, _MORE = "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"
if "EVO_JAX_TEST_FLAGS" not in os.environ:  # workers share it
  _known = (
    subprocess.run(
      [sys.executable, "-c", "import jax; jax.devices()"],
      capture_output=True,
      check=False,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _MORE},
    ).returncode
    == 0
  )
  os.environ["EVO_JAX_TEST_FLAGS"] = f"{_FLAGS} {_MORE}" if _known else _FLAGS
_FLAGS = os.environ["EVO_JAX_TEST_FLAGS"]
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_SCRATCH = os.environ.setdefault("EVO_JAX_TEST_SCRATCH", tempfile.mkdtemp(prefix="evo_jax_tests_"))  # workers share it
os.environ["XDG_CACHE_HOME"] = _SCRATCH  # of tokens
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_SCRATCH, "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

from evo_jax import config as config_lib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SMALL = {
  "model.layers": 2,
  "model.width": 32,
  "model.heads": 2,
  "model.kv_heads": 1,
  "model.hidden": 48,
  "model.context": 32,
  "model.code_dim": 8,
  "model.time_dim": 8,
  "window.size": 8,
  "window.count": 2,
  "data.batch_size": 8,
  "eval.sequences": 8,
  "eval.train_sequences": 8,
  "eval.batch_size": 8,
  "eval.samples": 1,
  "eval.sample_tokens": 12,
  "eval.paths": ("ar", "diagonal:2"),
  "eval.train_paths": ("ar",),
  "optim.warmup": 5,
  "train.steps": 12,
  "train.log_every": 1,
  "train.checkpoint_every": 4,
  "train.eval_every": 0,
}


def small_config(**changes) -> config_lib.Config:
  """The small configuration with changes, as model__layers=3."""
  values = config_lib.default()
  for name, value in {**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
    section, field = name.split(".")
    values[section][field] = value
  return config_lib.from_dict(values)


def run(module: str, *flags: str, devices: int = 1, **kwargs) -> subprocess.CompletedProcess:
  """Runs `python -m module flags` as a user would and returns it finished, output captured as text."""
  return subprocess.run(
    [sys.executable, "-m", module, *flags],
    capture_output=True,
    text=True,
    timeout=600,
    cwd=ROOT,
    env=environment(devices),
    **kwargs,
  )


def environment(devices: int = 1) -> dict[str, str]:
  return {**os.environ, "XLA_FLAGS": f"{_FLAGS} --xla_force_host_platform_device_count={devices}"}


def train_flags(workdir, data, **changes) -> list[str]:
  """Flags of evo_jax.main for the small configuration on `data`."""
  fields = {**SMALL, "data.path": str(data), **{k.replace("__", "."): v for k, v in changes.items()}}
  return ["--config=configs/tiny.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]


# Files that take minutes, the longest first.
_LONG = ("processes", "train", "mesh", "objective", "commands", "decode", "colab", "model")


def pytest_collection_modifyitems(items):
  """Long files first, so that no worker is left with one at the end."""
  place = {f"{name}_test": i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.module.__name__, len(_LONG)))


@pytest.fixture(scope="module", autouse=True)
def forget_programs(request):
  """Drops what a file of tests compiled, and what its functions keep (functools.cache): each program maps memory some
  hundred times, and a process that has used up its maps (vm.max_map_count, 65,530) crashes in the next compilation."""
  yield
  for value in vars(request.module).values():
    if hasattr(value, "cache_clear"):
      value.cache_clear()
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
  """A glob of 20 small files of made-up text with something to learn."""
  import numpy as np

  rng = np.random.default_rng(0)
  words = ["the", "flow", "token", "of", "a", "river", "runs", "and", "time", "is", "known", "at", "last"]
  folder = tmp_path_factory.mktemp("text")
  for i in range(20):
    (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(words, 400)) + "\n")
  return folder / "*.txt"
