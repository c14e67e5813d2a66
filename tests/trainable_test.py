"""Training of some parameters (config.train.trainable): the others stay as they are, and are saved once."""

import os
import shutil

from conftest import assert_refused, call, small_config, train_flags
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import tokenizers
from evo_jax.network import evo as evo_lib
from evo_jax.training import metrics as metrics_lib
from evo_jax.training import optim, partition
from evo_jax.training import state as state_lib

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


@pytest.mark.slow
def test_what_is_frozen_keeps_every_bit(frozen):
  before, after = flat(frozen, 0), flat(frozen)
  assert {path for path in before if not np.array_equal(before[path], after[path])} == TRAINED
  for path, value in after.items():
    assert value.dtype == ("float32" if path in TRAINED else "bfloat16"), path
  bits = [row["bits"] for row in rows(frozen)]
  assert bits[-1] < bits[0] - 0.1, bits


def size(folder):
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_it_is_saved_once(frozen):
  """The first checkpoint is kept beside the last two."""
  saved = frozen / "checkpoints"
  assert sorted(os.listdir(saved)) == ["0", "12", "8"]
  assert sorted(p.name for p in (saved / "12").iterdir() if p.is_dir()) == ["ema", "optimizer", "params", "statistics"]
  assert sorted(p.name for p in (saved / "0").iterdir() if p.is_dir()) == ["params", "statistics"]
  for item in ("params", "ema", "optimizer"):  # codes of many rows are most of them
    assert size(saved / "12" / item) < 0.5 * size(saved / "0" / "params"), item


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("trainable", ["*", "codes"])
def test_what_is_trained_is_float32(trainable):
  """Also where patterns leave nothing that is frozen."""
  config = small_config(train__trainable=trainable, model__param_dtype="bfloat16", optim__ema=0.9)
  state = state_lib.init_state(state_lib.make_model(config, tokenizers.Bytes()), config)
  assert {x.dtype.name for x in jax.tree.leaves((state.params, state.ema))} == {"float32"}
  assert bool(state.frozen) == (trainable == "codes")


@pytest.mark.parametrize("steps, warmup, share", [(1000, 100, 1.0), (120, 100, 0.2), (100, 10, 0.2), (10, 0, 1.0)])
def test_the_learning_rate_ends_at_its_final_share(steps, warmup, share):
  for schedule in ("wsd", "cosine"):
    config = config_lib.Optim(learning_rate=1.0, warmup=warmup, schedule=schedule, decay_share=share, final=0.1)
    assert float(optim.learning_rate_schedule(config, steps)(steps)) == pytest.approx(0.1)


def test_windows_own_parameters_are_those_that_the_clean_stream_does_not_read():
  adapters = dict(model__window_rank=2, model__window_twins=True, model__window_unknown=True, model__window_head=8)
  config = small_config(model__progression="learned", paths__learned=1.0, model__layers=1, **adapters)
  model = evo_lib.Evo(config.model, 257)
  tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 257)

  @jax.jit
  def gradient_of_clean():
    params = nn.unbox(model.init(jax.random.key(1), tokens))["params"]
    leaves, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(tree, [x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape) for x in leaves])
    return jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, tokens))))(params)

  gradient = gradient_of_clean()
  trained, frozen = partition.split(gradient, "windows")
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(trained)), trained
  assert all(np.any(leaf) for leaf in jax.tree.leaves(frozen)), frozen
  assert {"codes", "time_in", "clock_prior_out", "window_unknown"} <= trained.keys()
  assert partition.leaves_clean_stream(trained)
  assert not partition.leaves_clean_stream(partition.split(gradient, "windows,final_norm")[0])


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
