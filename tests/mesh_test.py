"""The same training on any mesh of eight devices; checkpoints move between meshes."""

import shutil

from conftest import assert_refused, call, train_flags
import numpy as np
import pytest

from evo_jax.parallel import sharding
from evo_jax.training import checkpoint
from evo_jax.training import metrics as metrics_lib

STEPS = {"train.steps": 6, "train.checkpoint_every": 3, "model.kv_heads": 2, "eval.samples": 0, "eval.paths": ("ar",)}
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
  a, b = (checkpoint.read_config(runs[n]) for n in (name, "one"))
  assert a["parameters"] == b["parameters"]


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(runs, text, tmp_path):
  """Three steps on one mesh and three on another are the six steps of either."""
  moved = tmp_path / "moved"
  shutil.copytree(runs["data"], moved)
  shutil.rmtree(moved / "checkpoints" / "6")
  assert "goes on after step 3" in train(moved, text, (2, 2, 2))
  np.testing.assert_allclose(losses(moved), losses(runs["data"]), rtol=2e-3)


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
