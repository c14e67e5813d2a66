"""Plans of a run on a TPU pod: what follows from shapes alone, what does not fit, and, with the TPU compiler, the
rest."""

import json
import types

from conftest import run, small_config, train_flags
import numpy as np
import pytest

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.network import flops
from evo_jax.parallel import sharding
from evo_jax.planning import chips, planner

PARAMETERS = 8_103_404_544


def test_shapes_alone_give_the_state_of_each_chip(tmp_path):
  """With a line about what is not known, a table of several pods, and the same in JSON."""
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
  record = json.loads(file.read_text())
  assert record["fields"]["model"]["width"] == 4096 and record["assumptions"]
  for entry, data in zip(record["plans"], (1, 4)):
    assert entry["mesh"] == {"data": data, "fsdp": 64, "tensor": 1}
    assert entry["fits"] is None and entry["step_seconds"] is None
    # All but norms, codes and two small matrices of time conditioning is in 64 shards; the optimizer has two moments.
    shard = PARAMETERS * 4 / 64
    assert shard < entry["bytes"]["parameters"] < 1.15 * shard
    assert entry["bytes"]["optimizer"] == pytest.approx(2 * entry["bytes"]["parameters"], rel=0.01)
    assert entry["bytes"]["activations"] is None
    assert 0.6 < entry["model_operations"] / entry["operations"] < 1.0


@pytest.mark.slow
def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would():
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


def test_bad_input_gets_one_line():
  done = run("evo_jax.plan", "--config=configs/tiny.py")
  assert done.returncode == 1 and done.stderr == "evo_jax: --topology is needed, as in --topology=v5p:8x8x8\n"


def test_bad_input_names_the_flag():
  with pytest.raises(UserError, match="--mesh='rows:2': 'rows:2' is not AXIS:SIZE"):
    sharding.parse_mesh("rows:2", config_lib.Mesh())
  with pytest.raises(UserError, match="needs 3 devices, here are 4"):
    planner.make_plan(small_config(mesh__data=3), chips.parse_topology("v5e:2x2"), compiles=False)
  with pytest.raises(UserError, match="--json=/no/such/folder/x: there is no folder"):
    cli.check_output("json", "/no/such/folder/x")


def test_topologies_and_meshes_are_read():
  topology = chips.parse_topology("2*v5e:4x8")
  assert (topology.chip.hbm, topology.shape, topology.slices, topology.chips) == (15.75, (4, 8), 2, 64)
  assert topology.chip.peak == flops.peak_flops("TPU v5 lite") == 197e12
  assert chips.CHIPS["v5p"].peak == 459e12 and chips.CHIPS["v6e"].peak == 918e12
  assert sharding.parse_mesh("fsdp:4,tensor:2", config_lib.Mesh(-1, 8, 1)) == config_lib.Mesh(-1, 4, 2)
  for text in ("v9:2x2", "v5e", "v5e:4", "v5e:4x", "x*v5e:4x4", "v5e:0x4", "0*v5e:4x4"):
    with pytest.raises(UserError, match=r"--topology='.*': is not CHIP:AxB"):
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
def test_the_memory_that_a_program_would_need_is_read(message, size):
  assert planner.out_of_memory(message) == size


def test_bandwidth_counts_the_links_that_an_axis_covers():
  """On each physical axis that a mesh axis covers both directions, where it is closed to a ring; else one."""
  pod = chips.parse_topology("v5p:4x4x4")
  link = pod.chip.link
  grid = np.empty((4, 16, 1), object)
  for i, (x, y, z) in enumerate(np.ndindex(4, 4, 4)):
    grid[i // 16, i % 16, 0] = types.SimpleNamespace(coords=(x, y, z))
  mesh = types.SimpleNamespace(devices=grid, axis_names=("data", "fsdp", "tensor"))
  assert chips.bandwidth(("data",), mesh, pod) == 2 * link
  assert chips.bandwidth(("fsdp",), mesh, pod) == 4 * link
  assert chips.bandwidth(("data", "fsdp"), mesh, pod) == 6 * link
  open_below_16 = chips.Topology("v6e:4x4x4", chips.CHIPS["v6e"], (4, 4, 4), 1)
  assert chips.bandwidth(("fsdp",), mesh, open_below_16) == 2 * chips.CHIPS["v6e"].link
  assert chips.bandwidth(("data", "fsdp"), mesh, chips.parse_topology("2*v5p:4x4x4")) == chips.DCN


def test_the_compiler_plans_a_step(tmp_path):
  """The TPU's own, where it is installed: a small model on four chips."""
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
  (entry,) = json.loads(file.read_text())["plans"]
  assert entry["fits"] and 0 < entry["mfu"] < 1 and entry["bytes"]["code"] > 0 and entry["bytes"]["activations"] > 0
  assert (
    entry["step_seconds"] == pytest.approx(sum(entry["seconds"].values())) and entry["bottleneck"] in entry["seconds"]
  )
  assert any(name.startswith("all-gather over fsdp") for name in entry["traffic"]) and "step, s" in done.stdout
