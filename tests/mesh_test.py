"""The same training on any mesh of eight devices; checkpoints move between meshes."""

import json
import re
import shutil

from conftest import assert_refused, call, need_devices, train_flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.parallel import sharding
from evo_jax.training import metrics as metrics_lib

STEPS = {
  "train.steps": 6,
  "train.checkpoint_every": 3,
  "model.kv_heads": 2,
  "model.head_dim": 24,  # not width / heads
  "model.qkv_bias": True,
  "model.qk_norm": True,
  "eval.samples": 0,
  "eval.paths": ("ar",),
}
MESHES = {"one": None, "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def train(workdir, text, mesh):
  """Trains in this process, on one device or on eight, and returns what the command printed."""
  sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh or (1, 1, 1)))
  changes = {**STEPS, **sizes, "loss.chunk": 96 if mesh else 0}
  done = call("evo_jax.main", *train_flags(workdir, text, **changes), devices=8 if mesh else 1)
  assert done.returncode == 0, done.stderr
  assert "rematerialization" not in done.stderr, done.stderr  # XLA's warning of a layout that it cannot reach well
  return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
  """A work directory by name of mesh."""
  folders = {name: tmp_path_factory.mktemp(name) for name in MESHES}
  for name, mesh in MESHES.items():
    train(folders[name], text, mesh)
  return folders


def losses(workdir, name="bits"):
  return [row[name] for row in metrics_lib.read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp", "all"])
def test_losses_are_the_same_on_every_mesh(runs, name):
  """On meshes the 264 rows of the vocabulary are read in three chunks, on one device at once."""
  for metric in ("bits", "window_ce", "window_bound", "gradient_norm"):
    np.testing.assert_allclose(losses(runs[name], metric), losses(runs["one"], metric), rtol=2e-3, err_msg=metric)
  params, expected = (run_lib.load_run(str(runs[n])).params for n in (name, "one"))
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, params, expected)) / optax.tree.norm(expected)
  assert difference < 1e-4


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(runs, text, tmp_path):
  """Three steps on one mesh and three on another are the six steps of either."""
  moved = tmp_path / "moved"
  shutil.copytree(runs["data"], moved)
  shutil.rmtree(moved / "checkpoints" / "6")
  assert "goes on after step 3" in train(moved, text, (2, 2, 2))
  np.testing.assert_allclose(losses(moved), losses(runs["data"]), rtol=2e-3)


def measure(workdir, devices, mesh=""):
  """Bits of two paths, and the tokens of three modes, by the commands on so many devices."""
  flags = (f"--workdir={workdir}", f"--mesh={mesh}")
  table = json_of("evo_jax.evaluate", devices, *flags, "--paths=ar,diagonal:2", "--json=/dev/stdout")
  prompts = ("--prompt=the ri", "--prompt=a", "--prompt=", "--max_tokens=12", "--json")
  texts = [
    json_of("evo_jax.generate", devices, *flags, *prompts, *mode.split())
    for mode in ("--mode=adaptive --threshold=1", "--mode=flow --steps=2", "--mode=verify --seed=3")
  ]
  return [e["bits"] for e in table], [[t["tokens"] for t in text] for text in texts]


def json_of(command, devices, *flags):
  done = call(command, *flags, devices=devices)
  assert done.returncode == 0, done.stderr
  return json.loads(re.search(r"^\[.*^\]$", done.stdout, re.S | re.M)[0])


@pytest.fixture(scope="module")
def on_one_device(runs):
  """What one device measures of the run that was trained on eight."""
  return measure(runs["all"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("devices, mesh", [(2, ""), (8, "data:1,fsdp:8,tensor:1")])
def test_commands_read_a_run_on_any_mesh(runs, on_one_device, devices, mesh):
  """Whatever mesh it was trained on: the same tokens, and bits to 1e-4."""
  bits, tokens = measure(runs["all"], devices, mesh)
  np.testing.assert_allclose(bits, on_one_device[0], atol=1e-4)
  assert tokens == on_one_device[1]


def test_a_run_is_restored_straight_into_its_shards(trained):
  """No device holds more than its eighth of a sharded parameter."""
  need_devices(8)
  mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=8))
  run = run_lib.load_run(str(trained), mesh=mesh)
  shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(run.params)]
  assert set(shares) == {1 / 8, 1.0} and run.mesh == mesh
  total = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(run.params))
  assert total < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(run.params))


def test_a_mesh_that_does_not_fit_is_refused(trained):
  flags = (f"--workdir={trained}", "--paths=ar")
  assert_refused(call("evo_jax.evaluate", *flags, "--mesh=fsdp:3", devices=8), "--mesh or config.mesh: {'data': -1")
  assert_refused(call("evo_jax.evaluate", *flags, "--mesh=fsdp:8", devices=2), "does not divide 2 devices")
  assert_refused(call("evo_jax.evaluate", *flags, "--mesh=rows:8", devices=8), "--mesh='rows:8'")
  assert_refused(call("evo_jax.generate", f"--workdir={trained}", "--mesh=tensor:8", devices=8), "do not divide the")


def test_tables_are_sharded_by_rows_over_fsdp_unless_tensor_takes_them():
  spec = lambda tensor: tuple(sharding.RULES.spec(("vocab", "embed"), tensor))
  assert spec(1) == ("fsdp", None) and spec(2) == ("tensor", "fsdp")


def test_rules_fail_loudly():
  with pytest.raises(ValueError, match="use a mesh axis twice"):
    sharding.RULES.spec(("vocab", "mlp"))
  with pytest.raises(AttributeError):
    sharding.RULES.spec(("embedd",))


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"mesh.data": 4, "mesh.tensor": 2, "model.kv_heads": 1, "mesh.fsdp": 1},
      "config.mesh: 2 devices do not divide the 1 kv_heads of parameter",
    ),
    ({"mesh.data": 8, "data.batch_size": 4}, "config.data.batch_size: 4 sequences"),
    ({"mesh.data": -1, "mesh.tensor": 3}, "does not divide 8 devices"),
  ],
)
def test_shapes_that_do_not_divide_the_mesh_are_named(tmp_path, text, changes, message):
  assert_refused(call("evo_jax.main", *train_flags(tmp_path / "run", text, **changes), devices=8), message)
