"""What the compiler makes of a training step on eight devices: the collectives that the mesh asks for, and no others."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import small_config
from evo_jax import config as config_lib
from evo_jax import flops, hlo, sharding, train
from evo_jax.model import Evo

V = 24


def compiled_step(mesh_sizes, dtype="float32", **changes):
  """A training step's program as text, the mesh, and the parameters with their shardings."""
  config = small_config(model__kv_heads=2, model__dtype=dtype, model__remat="save:qkv,attention,mlp", **changes)
  mesh = sharding.make_mesh(config_lib.Mesh(*mesh_sizes))
  model = Evo(config.model, V)
  with jax.set_mesh(mesh):
    state, places = train.abstract_state(model, config, mesh)
    batch = jax.ShapeDtypeStruct((config.data.batch_size, config.model.context + 1), jnp.int32,
                                 sharding=NamedSharding(mesh, sharding.RULES.spec(("batch",))))
    return train.make_step(model, config, places, "cpu").lower(state, batch).compile().as_text(), mesh, state.params


def test_programs_are_read():
  """Loops count with their length, and bytes as rings send them."""
  mesh = sharding.make_mesh(config_lib.Mesh(2, 4, 1))

  def body(x_local):
    def step(carry, _):
      whole = jax.lax.all_gather(carry, "fsdp", tiled=True)
      return jax.lax.psum_scatter(jnp.sin(whole @ whole.T), "fsdp", tiled=True)[:, :16] + carry, None
    return jax.lax.psum(jax.lax.scan(step, x_local, None, length=5)[0], "data")

  function = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False))
  text = function.lower(jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))).compile().as_text()
  moved = hlo.read(text, dict(mesh.shape)).moved()
  assert moved["all-gather", ("fsdp",)] == 5 * 16 * 16 * 4 * 3 / 4
  assert moved["reduce-scatter", ("fsdp",)] == 5 * 16 * 16 * 4 * 3 / 4
  assert moved["all-reduce", ("data",)] == 4 * 16 * 4 * 2 * 1 / 2
  assert len(moved) == 3


@pytest.mark.parametrize("groups, members", [
    ("replica_groups={{0,2},{1,3}}", [0, 2]), ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]), ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("source_target_pairs={{0,0},{1,3}}", [1, 3]), ("", list(range(8)))])
def test_groups_of_devices_are_read(groups, members):
  assert hlo._group(f"all-gather(%x), {groups}, dimensions={{0}}", {"data": 2, "fsdp": 4}) == members


def test_a_step_over_fsdp_gathers_parameters_and_scatters_gradients():
  """Every parameter in shards is gathered once for each of its uses, and its gradient is scattered once; only small arrays are summed whole."""
  text, mesh, params = compiled_step((1, 8, 1))
  program = hlo.read(text, dict(mesh.shape))
  in_shards = [p for p in jax.tree.leaves(params) if "fsdp" in jax.tree.leaves(tuple(p.sharding.spec))]
  sent = sum(p.size for p in in_shards) * 7 / 8
  moved = program.moved()
  # Clean stream and windows, each forward and backward; the CPU's compiler widens bfloat16 to float32.
  gathered = moved["all-gather", ("fsdp",)] / 4
  assert sent <= gathered <= 4.6 * sent, (gathered, sent)
  scattered = moved["reduce-scatter", ("fsdp",)] / 4
  assert sent <= scattered <= 2.3 * sent, (scattered, sent)
  rest = [c for c in program.collectives if c.kind not in ("all-gather", "reduce-scatter")]
  largest = max(p.size for p in in_shards)
  assert all(c.bytes * c.count < largest * 4 for c in rest if c.kind != "all-reduce"), rest
  assert sum(size for (kind, _), size in moved.items() if kind == "all-reduce") < 0.5 * sent * 4
