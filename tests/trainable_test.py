"""Training of some parameters (config.train.trainable): the others stay as they are, and are saved once."""

import functools
import os
import shutil

from conftest import assert_refused, call, small_config, train_flags
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.training import metrics as metrics_lib
from evo_jax.training import partition
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

TRAINED = {("blocks", "w_time"), ("blocks", "w_o"), ("codes",)}
CHANGES = {
  "train.trainable": "blocks/w_[to]*, codes",
  "model.param_dtype": "bfloat16",  # of the frozen ones
  "mesh.data": 2,
  "mesh.fsdp": 2,
  "mesh.tensor": 2,
  "train.steps": 12,
  "train.checkpoint_every": 4,
  "optim.ema": 0.5,
  "eval.samples": 0,
  "eval.paths": ("ar",),
  "model.kv_heads": 2,
  "model.vocab_size": 4096,
}


def train(workdir, text, **changes):
  return call("evo_jax.main", *train_flags(workdir, text, **CHANGES | changes), devices=8)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, text):
  """The work directory of a run that trains three parameters, on a mesh of eight devices."""
  workdir = tmp_path_factory.mktemp("frozen")
  done = train(workdir, text)
  assert done.returncode == 0 and "of them trained; " in done.stdout, done.stderr
  assert "rematerialization" not in done.stderr, done.stderr  # XLA's warning of a layout that it cannot reach well
  return workdir


def flat(workdir, step=None):
  params = run_lib.load_run(str(workdir), step).params
  return {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params).items()}


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path], err_msg=str(path))


def rows(workdir):
  return [
    {k: v for k, v in row.items() if k not in metrics_lib.TIMING_FIELDS}
    for row in metrics_lib.read_metrics(workdir / "metrics.jsonl")
  ]


def test_what_is_frozen_keeps_every_bit(frozen):
  before, after = flat(frozen, 0), flat(frozen)
  assert {path for path in before if not np.array_equal(before[path], after[path])} == TRAINED
  for path, value in after.items():
    assert value.dtype == ("float32" if path in TRAINED else "bfloat16"), path
  bits = [row["bits"] for row in rows(frozen)]
  assert bits[-1] < bits[0] - 0.1, bits


def size(folder):
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_saved_once(frozen):
  """The first checkpoint is kept beside the last two."""
  saved = frozen / "checkpoints"
  assert sorted(os.listdir(saved)) == ["0", "12", "8"]
  assert sorted(p.name for p in (saved / "12").iterdir() if p.is_dir()) == ["ema", "optimizer", "params", "statistics"]
  assert sorted(p.name for p in (saved / "0").iterdir() if p.is_dir()) == ["params", "statistics"]
  assert size(saved / "12" / "params") < 0.5 * size(saved / "0" / "params")


@pytest.mark.parametrize("step", [0, 8])
def test_a_run_goes_on_bit_for_bit(frozen, text, tmp_path, step):
  """As if it had been killed before a step was saved, or after."""
  run = shutil.copytree(frozen, tmp_path / "run")
  for later in {8, 12} - {step}:
    shutil.rmtree(run / "checkpoints" / str(later))
  done = train(run, text)
  assert done.returncode == 0 and f"goes on after step {step}" in done.stdout, done.stderr
  assert rows(run) == rows(frozen)
  assert_equal(flat(run), flat(frozen))


def test_a_checkpoint_of_trained_parameters_needs_the_first(frozen, text, tmp_path):
  """One line; a damaged one is passed over."""
  run = shutil.copytree(frozen, tmp_path / "run")
  for file in (run / "checkpoints" / "12" / "ema").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:20])
  assert run_lib.load_run(str(run)).step == 8
  (run / "checkpoints" / "0").rename(run / "elsewhere")
  line = "checkpoints/0: is missing; the parameters that are not trained are there alone"
  shutil.rmtree(run / "checkpoints" / "12")
  assert_refused(call("evo_jax.generate", f"--workdir={run}", "--prompt=a"), line)
  assert_refused(train(run, text), line)
  (run / "elsewhere").rename(run / "checkpoints" / "0")
  assert run_lib.load_run(str(run)).step == 8


WINDOWS = {("codes",), ("time_in",), ("time_out",), ("blocks", "w_time")}
CLOCKS = {"model__progression": "learned", "paths__learned": 1.0}


@pytest.mark.parametrize("changes", [{}, CLOCKS], ids=["shared", "learned"])
def test_windows_own_parameters_are_those_that_the_clean_stream_does_not_read(changes):
  config = small_config(**changes)
  model = state_lib.make_model(config, tokenizers.Bytes())
  params = nn.unbox(jax.jit(functools.partial(state_lib.init_state, model, config))()).params
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
  tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 257)
  clean = lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, tokens)))
  gradient = traverse_util.flatten_dict(jax.jit(jax.grad(clean))(params))
  trained, _ = partition.split(params, "windows")
  trained = set(traverse_util.flatten_dict(trained))
  assert WINDOWS <= trained == {path for path, value in gradient.items() if not np.any(value)}
  assert partition.leaves_clean_stream(partition.split(params, "windows")[0])
  assert not partition.leaves_clean_stream(partition.split(params, "windows,final_norm")[0])


@functools.cache
def compiled(trainable, **changes):
  """The compiled step on one device."""
  config = small_config(train__trainable=trainable, **changes)
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  step = functools.partial(step_lib.train_step, model=model, config=config)
  batch = Batch(jax.ShapeDtypeStruct((8, 33), jnp.int32))
  return state, jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def test_nothing_is_computed_for_frozen_parameters():
  """No gradient of their size, neither of matrices nor of tables; no moments; and no copy."""
  shape = dict(model__width=128, model__hidden=512, model__vocab_size=520, loss__chunk=64)
  (_, everything), (state, some) = (compiled(name, **shape) for name in ("all", "codes"))
  assert some.cost_analysis()["flops"] < 0.7 * everything.cost_analysis()["flops"]
  assert sum(x.size for x in jax.tree.leaves(state.optimizer)) < 3 * state.params["codes"].size
  memory = some.memory_analysis()
  assert memory.alias_size_in_bytes > 0.99 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"train.trainable": "codes,blocks/w_tim"}, "'blocks/w_tim' fits no parameter; there are blocks/w_time, "),
    ({"train.trainable": "layers/0/*"}, "'layers/0/*' fits no parameter; there are "),
    ({"train.trainable": ""}, "'' is not all, windows, or patterns between commas"),
    ({"train.trainable": "windows,"}, "'windows,' is not all, windows, or patterns"),
    ({"train.trainable": "windows", "window.count": 0}, "'windows' with window.count = 0 trains nothing"),
    ({"train.trainable": "codes", "window.start": 3}, "'codes' before window.start = 3 trains nothing"),
    ({"train.trainable": "windows", "loss.window_weight": 0.0}, "with loss.window_weight = 0 trains nothing"),
  ],
  ids=str,
)
def test_what_trains_nothing_is_refused(text, tmp_path, changes, message):
  assert_refused(call("evo_jax.main", *train_flags(tmp_path / "run", text, **changes)), message)
  assert not (tmp_path / "run" / "config.json").exists()
