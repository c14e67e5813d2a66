"""Shared by all tests: eight CPU devices, a compilation cache, a small configuration, and runs of the command line."""

from collections.abc import Callable
import contextlib
import fcntl
import gc
import importlib
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest import mock
import warnings

# No test computes for long: what counts is how fast XLA compiles. The second flag halves that time again, and the third
# takes a tenth off, since workers keep all cores busy; a jaxlib that does not know them would exit. On a GPU
# (JAX_PLATFORMS=cuda), whose compiler needs its optimizations, none is set.
_FLAGS = "--xla_backend_optimization_level=0"
_CODEGEN = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":
  os.environ["EVO_JAX_TEST_FLAGS"] = ""
elif "EVO_JAX_TEST_FLAGS" not in os.environ:  # xdist's workers inherit it
  _known = (
    subprocess.run(
      [sys.executable, "-c", "import jax; jax.devices()"],
      capture_output=True,
      check=False,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _CODEGEN},
    ).returncode
    == 0
  )
  os.environ["EVO_JAX_TEST_FLAGS"] = f"{_FLAGS} {_CODEGEN}" if _known else _FLAGS
_FLAGS = os.environ["EVO_JAX_TEST_FLAGS"]
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8"
_MADE_SCRATCH = "EVO_JAX_TEST_SCRATCH" not in os.environ  # xdist's workers inherit it
if _MADE_SCRATCH:
  os.environ["EVO_JAX_TEST_SCRATCH"] = tempfile.mkdtemp(prefix="evo_jax_tests_")
SCRATCH = pathlib.Path(os.environ["EVO_JAX_TEST_SCRATCH"])
os.environ["XDG_CACHE_HOME"] = str(SCRATCH)  # the cache of encoded text
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(SCRATCH / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

from absl import app, flags
from absl.testing import flagsaver
import jax
import numpy as np
import pytest

from evo_jax import config as config_lib

gc.set_threshold(100_000, 20, 50)  # tracing makes many objects that live on: collect less often (8 % of the time)

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


def run(
  module: str, *arguments: str, devices: int = 1, variables: dict | None = None, **kwargs
) -> subprocess.CompletedProcess:
  """Runs `python -m module arguments` as a user would and returns it finished, output captured as text."""
  return subprocess.run(
    [sys.executable, "-m", module, *arguments],
    capture_output=True,
    text=True,
    timeout=600,
    cwd=ROOT,
    env=environment(devices) | (variables or {}),
    **kwargs,
  )


def environment(devices: int = 1) -> dict[str, str]:
  return {**os.environ, "XLA_FLAGS": f"{_FLAGS} --xla_force_host_platform_device_count={devices}"}


def call(module: str, *arguments: str, devices: int = 1, input: str = "") -> subprocess.CompletedProcess:
  """As `run`, but in this process, which has imported JAX already; an exception that would be a traceback is raised.

  The command sees the first `devices` devices, parses its flags from the start, and leaves no flag, hook or working
  directory behind. Output includes what native code writes. Skips the test where there are fewer devices.
  """
  if devices > 1:
    need_devices(devices)
  app.define_help_flags()  # they, and the flags of libraries, are defined once in a process and must not be undone
  importlib.import_module(module)
  hook, folder = sys.unraisablehook, os.getcwd()
  with contextlib.ExitStack() as stack:
    stack.callback(os.chdir, folder)
    stack.callback(setattr, sys, "unraisablehook", hook)
    stack.enter_context(flagsaver.flagsaver())
    stack.callback(flags.FLAGS.unparse_flags)
    stack.enter_context(mock.patch.object(sys, "argv", [module, *arguments]))
    stack.enter_context(mock.patch.object(jax, "devices", lambda *backend: _devices(*backend)[:devices]))
    stack.enter_context(mock.patch.object(jax, "device_count", lambda: devices))
    stdin = stack.enter_context(tempfile.TemporaryFile("w+"))
    stdin.write(input)
    stdin.seek(0)
    stack.enter_context(mock.patch.object(sys, "stdin", stdin))
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, that the module had been imported
    out, err = stack.enter_context(_captured())
    os.chdir(ROOT)
    status = 0
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaves:
      status = leaves.code or 0
    for stream in (out, err):
      stream.seek(0)
    return subprocess.CompletedProcess([module, *arguments], status, out.read(), err.read())


_devices = jax.devices


@contextlib.contextmanager
def _captured():
  """Files that receive what Python and native code write to stdout and stderr."""
  with contextlib.ExitStack() as stack:
    files = []
    for number, name in ((1, "stdout"), (2, "stderr")):
      file = stack.enter_context(tempfile.TemporaryFile("w+", buffering=1))
      saved = os.dup(number)
      stack.callback(os.close, saved)
      stack.callback(os.dup2, saved, number)
      os.dup2(file.fileno(), number)
      stack.enter_context(mock.patch.object(sys, name, file))
      files.append(file)
    yield files


def need_devices(count: int) -> None:
  """Skips the test where this process has fewer devices: on a platform whose devices are real ones."""
  if len(_devices()) < count:
    pytest.skip(f"needs {count} devices")


def assert_refused(done: subprocess.CompletedProcess, message: str) -> None:
  """Asserts exit status 1 and one line on stderr that has the message."""
  assert done.returncode == 1 and message in done.stderr, (done.stdout, done.stderr)
  assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr


def train_flags(workdir, data, **changes) -> list[str]:
  """Flags of evo_jax.main for the small configuration on `data`."""
  fields = {**SMALL, "data.path": str(data), **{k.replace("__", "."): v for k, v in changes.items()}}
  return ["--config=configs/tiny.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]


def pytest_configure(config):
  """A shell that starts the tests in the background has them ignore SIGINT, as would the commands that they start."""
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
  parser.addoption("--extended", action="store_true", help="also run tests that need torch, a browser or a real model")


# Files that take minutes, the longest first.
_LONG = (
  "processes",
  "decode",
  "commands",
  "step",
  "train",
  "pretrained",
  "model",
  "sample",
  "mesh",
  "hlo",
  "colab",
  "objective",
)


def pytest_collection_modifyitems(config, items):
  """Long files first, so that no worker is left with one at the end; extended tests only where they are asked for."""
  place = {f"{name}_test": i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.module.__name__, len(_LONG)))
  if not config.getoption("--extended"):  # not by -m in addopts, which another -m overrides
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("extended")])
    items[:] = [item for item in items if not item.get_closest_marker("extended")]


def pytest_unconfigure(config):
  """Removes the scratch folder, in the process that made it."""
  if _MADE_SCRATCH:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs(request):
  """Drops what a test file compiled, and what its functions cache (functools.cache): each program maps memory some
  hundred times, and a process that has used up its maps (vm.max_map_count, 65,530) crashes in the next compilation."""
  yield
  for value in vars(request.module).values():
    if hasattr(value, "cache_clear"):
      value.cache_clear()
  jax.clear_caches()
  gc.collect()


def make_once(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The folder `name` in the scratch folder, which `make` fills in the first of xdist's workers that asks for it."""
  folder, done = SCRATCH / name, SCRATCH / f"{name}.done"
  with (SCRATCH / f"{name}.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
      folder.mkdir()
      make(folder)
      done.touch()
  return folder


@pytest.fixture(scope="session")
def text():
  """A glob of 20 small files of made-up text with something to learn."""
  return make_once("text", _write_text) / "*.txt"


def _write_text(folder):
  rng = np.random.default_rng(0)
  words = ["the", "flow", "token", "of", "a", "river", "runs", "and", "time", "is", "known", "at", "last"]
  for i in range(20):
    (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(words, 400)) + "\n")


LONG = {"train.steps": 120, "train.checkpoint_every": 20, "train.eval_every": 50, "optim.ema": 0.5}


@pytest.fixture(scope="session")
def trained(text):
  """The work directory of an undisturbed run of `train_flags(..., **LONG)`. It is shared: nothing may be written to it.

  It is the golden run, what runs with interruptions are compared with, and what evaluation and generation read.
  """

  def train(folder):
    done = run("evo_jax.main", *train_flags(folder, text, **LONG))
    assert done.returncode == 0, done.stderr

  return make_once("trained", train)


TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '<|end|>' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="session")
def talker():
  """A work directory of a tiny model with a chat template. It is shared: nothing may be written to it."""

  def convert(folder):
    for name in ("smollm2", "tokenizer"):
      ignored = shutil.ignore_patterns("reference.safetensors")
      shutil.copytree(pathlib.Path(ROOT) / "tests/pretrained" / name, folder / "source", ignored, dirs_exist_ok=True)
    (folder / "source" / "chat_template.jinja").write_text(TEMPLATE)
    done = call("evo_jax.convert", f"--source={folder / 'source'}", f"--workdir={folder / 'run'}", "--dtype=float32")
    assert done.returncode == 0, done.stderr

  return make_once("talker", convert) / "run"
