"""Plans of a run on a pod that is not there: what follows from shapes, what does not fit, and, with the TPU's
compiler, the rest."""

import json
import types

from conftest import run, train_flags
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.network import flops
from evo_jax.planning import chips, planner

PARAMETERS = 8_103_404_544


def test_shapes_alone_say_what_a_pod_holds(tmp_path):
  """A line for what is missing, a table of several pods, and the same in JSON."""
  file = tmp_path / "plans.json"
  done = run(
    "evo_jax.plan",
    "--config=configs/evo8b.py",
    "--topology=v5p:4x4x4,v6e:16x16",
    "--nocompile",
    f"--json={file}",
    "--config.train.accumulate=4",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("Not known without the TPU's compiler") == 2 and "of 95.74" in done.stdout
  assert [line.split()[:2] for line in done.stdout.splitlines()[-2:]] == [["v5p:4x4x4", "64"], ["v6e:16x16", "256"]]
  found = json.loads(file.read_text())
  assert found["fields"]["model"]["width"] == 4096 and found["assumptions"]
  for one, data in zip(found["plans"], (1, 4)):
    assert (
      one["mesh"] == {"data": data, "fsdp": 64, "tensor": 1} and one["fits"] is None and one["step_seconds"] is None
    )
    # All but norms, codes and the time's two small matrices lies in 64 shards; beside it two means of the gradient.
    whole = PARAMETERS * 4 / 64
    assert whole < one["bytes"]["parameters"] < 1.15 * whole
    assert one["bytes"]["optimizer"] == pytest.approx(2 * one["bytes"]["parameters"], rel=0.01)
    assert one["bytes"]["activations"] is None
    assert 0.6 < one["model_operations"] / one["operations"] < 1.0


def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path):
  done = run(
    "evo_jax.plan",
    "--config=configs/evo8b.py",
    "--topology=v5e:4x4",
    "--mesh=data:16,fsdp:1",
    "--nocompile",
    "--config.data.batch_size=16",
  )
  assert done.returncode == 1 and "a plan does not fit" in done.stderr and "Traceback" not in done.stderr, done.stderr
  assert f"does not fit, by {PARAMETERS * 12 / 2**30 - 15.75:.2f} GiB" in done.stdout
  assert "--mesh=data:2,fsdp:8,tensor:1 makes it fit" in done.stdout, done.stdout


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config=configs/tiny.py"], "--topology is needed"),
    (["--config=configs/tiny.py", "--topology=v9:2x2"], "--topology='v9:2x2': is not CHIP:AxB"),
    (["--config=configs/tiny.py", "--topology=v5e:2x2", "--mesh=rows:2"], "--mesh='rows:2': 'rows:2' is not AXIS:SIZE"),
    (["--config=configs/tiny.py", "--topology=v5e:2x2", "--mesh=data:3"], "needs 3 devices, here are 4"),
    (
      ["--config=configs/tiny.py", "--topology=v5e:2x2", "--nocompile", "--json=/no/such/folder/x.json"],
      "cannot be written",
    ),
  ],
)
def test_bad_input_gets_one_line(flags, message):
  done = run("evo_jax.plan", *flags)
  assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_topologies_and_meshes_are_read():
  chip, shape, slices = chips.parse_topology("2*v5e:4x8")
  assert (chip.hbm, shape, slices) == (15.75, (4, 8), 2) and chip.peak == flops.peak_flops("TPU v5 lite") == 197e12
  assert chips.CHIPS["v5p"].peak == 459e12 and chips.CHIPS["v6e"].peak == 918e12
  assert planner.parse_mesh("fsdp:4,tensor:2", config_lib.Mesh(-1, 8, 1)) == config_lib.Mesh(-1, 4, 2)
  for text in ("v5e", "v5e:4", "v5e:4x", "x*v5e:4x4"):
    with pytest.raises(UserError, match="--topology"):
      chips.parse_topology(text)


@pytest.mark.parametrize(
  "message, size",
  [
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 17.50G of 15.75G hbm.",
      17.5 * 2**30,
    ),
    ("RESOURCE_EXHAUSTED: something else", None),
    ("INTERNAL: Used 3.00G of 1.00G", None),
  ],
)
def test_the_compilers_complaint_of_memory_is_read(message, size):
  assert planner._out_of_memory(message) == size


def test_bandwidth_counts_the_links_that_an_axis_covers():
  """A mesh axis that covers physical axes has both ends of each, where these are closed."""
  chip = chips.CHIPS["v5p"]
  grid = np.empty((4, 16, 1), object)
  for i, (x, y, z) in enumerate(np.ndindex(4, 4, 4)):
    grid[i // 16, i % 16, 0] = types.SimpleNamespace(coords=(x, y, z))
  mesh = types.SimpleNamespace(devices=grid, axis_names=("data", "fsdp", "tensor"))
  assert chips.bandwidth(("data",), mesh, chip, 1) == 2 * chip.link
  assert chips.bandwidth(("fsdp",), mesh, chip, 1) == 4 * chip.link
  assert chips.bandwidth(("data", "fsdp"), mesh, chip, 1) == 6 * chip.link
  assert chips.bandwidth(("fsdp",), mesh, chips.CHIPS["v6e"], 1) == 2 * chips.CHIPS["v6e"].link  # open below 16
  assert chips.bandwidth(("data", "fsdp"), mesh, chip, 2) == chips.DCN


def test_the_compiler_plans_a_step(tmp_path):
  """The real one, where it is installed: a small model on four chips."""
  if not chips.has_compiler():
    pytest.skip("libtpu is not installed (pip install 'evo_jax[tpu]')")
  file = tmp_path / "plan.json"
  flags = [f for f in train_flags(tmp_path, "stdlib") if not f.startswith("--workdir")]
  done = run(
    "evo_jax.plan",
    *flags,
    "--topology=v5e:2x2",
    "--mesh=data:1,fsdp:4",
    f"--json={file}",
    "--config.model.vocab_size=512",
  )
  assert done.returncode == 0, done.stderr
  (one,) = json.loads(file.read_text())["plans"]
  assert one["fits"] and 0 < one["mfu"] < 1 and one["bytes"]["code"] > 0 and one["bytes"]["activations"] > 0
  assert one["step_seconds"] == pytest.approx(sum(one["seconds"].values())) and one["bottleneck"] in one["seconds"]
  assert any(name.startswith("all-gather over fsdp") for name in one["traffic"]) and "step, s" in done.stdout
