"""What the compiler makes of a training step on eight devices: the collectives that the mesh asks for,
and no others."""

import math

from conftest import need_devices, small_config
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops, vocabulary
from evo_jax.parallel import sharding
from evo_jax.planning import hlo
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

V = 24


def compiled_step(mesh_sizes, **changes):
  """A training step's program as text, the mesh, and the parameters with their shardings."""
  need_devices(math.prod(mesh_sizes))
  config = small_config(model__kv_heads=2, model__remat="save:qkv,attention,gate,up", **changes)
  mesh = sharding.make_mesh(config_lib.Mesh(*mesh_sizes))
  model = evo_lib.Evo(config.model, V, sharding.Layout.of(mesh))
  with jax.set_mesh(mesh):
    state = state_lib.abstract_state(model, config, mesh)
    shape = config.data.batch_size, config.model.context + 1
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh)))
    return step_lib.make_step(model, config, mesh, "cpu").lower(state, batch).compile().as_text(), mesh, state.params


def test_loops_count_with_their_trip_count_and_bytes_as_rings_send_them():
  need_devices(8)
  mesh = sharding.make_mesh(config_lib.Mesh(2, 4, 1))

  def body(x_local):
    def step(carry, _):
      whole = jax.lax.all_gather(carry, "fsdp", tiled=True)
      return jax.lax.psum_scatter(jnp.sin(whole @ whole.T), "fsdp", tiled=True)[:, :16] + carry, None

    return jax.lax.psum(jax.lax.scan(step, x_local, None, length=5)[0], "data")

  function = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False))
  text = (
    function.lower(jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))))
    .compile()
    .as_text()
  )
  sent = hlo.read_program(text, dict(mesh.shape)).bytes_sent()
  assert sent["all-gather", ("fsdp",)] == 5 * 16 * 16 * 4 * 3 / 4
  assert sent["reduce-scatter", ("fsdp",)] == 5 * 16 * 16 * 4 * 3 / 4
  assert sent["all-reduce", ("data",)] == 4 * 16 * 4 * 2 * 1 / 2
  assert len(sent) == 3


def test_a_collective_between_slices_is_a_send_of_the_hosts():
  """Here an all-reduce of 2 x 128 float32 over two slices."""
  text = """
ENTRY %main (p: f32[2,128]) -> token[] {
  %send.1 = (f32[2,128]{1,0:T(2,128)}, u32[], token[]) send(%p, %token), channel_id=5, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
  (collective,) = hlo.read_program(text, {"data": 2, "fsdp": 4, "tensor": 1}).collectives
  assert collective == hlo.Collective("all-reduce", ("data",), 2 * 128 * 4 * 2 * 1 / 2, 1, True)


def test_exposed_time_is_what_the_schedule_does_not_overlap():
  """Five times: an all-gather of 96 bytes overlaps with 60 cycles, another over the same axis with 10 more; then a
  synchronous all-reduce."""
  text = """
%body (p: f32[8]) -> f32[8] {
  %first = (f32[8], f32[32]) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %second = (f32[8], f32[32]) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %work.1 = f32[8] fusion(%p), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"60"}
  %first.done = f32[32] all-gather-done(%first)
  %work.2 = f32[8] fusion(%first.done), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"10"}
  %second.done = f32[32] all-gather-done(%second)
  ROOT %sum = f32[8] all-reduce(%second.done), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}

%condition (p: f32[8]) -> pred[] {
  ROOT %always = pred[] constant(true)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %loop = f32[8] while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
  program = hlo.read_program(text, {"data": 2, "fsdp": 4, "tensor": 1})
  assert program.bytes_sent() == {("all-gather", ("fsdp",)): 5 * 2 * 96.0, ("all-reduce", ("data",)): 5 * 32.0}
  assert program.matmul_cycles == 0.0 and program.other_cycles == 5 * 70.0
  # One byte per cycle: 36 cycles of the first are exposed; the second is done at 192, 86 after the work before it.
  assert program.exposed_seconds(1.0, 0.0, lambda c: c.bytes) == 5 * (36 + 86 + 32)
  # Behind slower computation more is hidden: 192 - (120 + 20).
  assert program.exposed_seconds(2.0, 0.0, lambda c: c.bytes) == 5 * (52 + 32)


def test_a_rare_branch_is_in_no_estimate():
  """Neither as traced nor as compiled; the other branch is."""

  def function(x):
    return jax.lax.cond(x[0, 0] > 0, jax.named_scope(vocabulary.RARE_BRANCH)(lambda: x @ x @ x), lambda: x @ x)

  x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
  assert flops.traced(function, x) == (2 * 16**3, 0)
  text = """
%often (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8] add(%p, %p), metadata={op_name="jit(f)/cond/branch_1_fun/add"}, \
backend_config={"estimated_cycles":"7"}
}

%rare (p: f32[8]) -> f32[8] {
  ROOT %b = f32[8] add(%p, %p), metadata={op_name="jit(f)/cond/branch_0_fun/rare_branch/add"}, \
backend_config={"estimated_cycles":"500"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8] conditional(%which, %p, %p), branch_computations={%rare, %often}
}
"""
  program = hlo.read_program(text, {"data": 1})
  assert program.matmul_cycles + program.other_cycles == 7.0


@pytest.mark.parametrize(
  "groups, members",
  [
    ("replica_groups={{0,2},{1,3}}", [0, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("source_target_pairs={{0,0},{1,3}}", [1, 3]),
    ("", list(range(8))),
  ],
)
def test_replica_groups_are_read(groups, members):
  assert hlo.replica_group(f"all-gather(%x), {groups}, dimensions={{0}}", {"data": 2, "fsdp": 4}) == members


@pytest.mark.parametrize(
  "sizes, passes, chunk",
  [
    pytest.param((1, 8, 1), 1, 0, marks=pytest.mark.slow),
    pytest.param((2, 4, 1), 1, 0, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), 1, 0, marks=pytest.mark.slow),
    pytest.param((2, 4, 1), 2, 0, marks=pytest.mark.slow),
    ((2, 4, 1), 1, 8),
  ],
  ids=str,
)
def test_a_step_gathers_each_parameter_where_it_is_used_and_scatters_its_gradient(sizes, passes, chunk, capfd):
  """To the byte: a layer's weights forward and backward, and their gradients, once for clean stream and windows
  together, or once for each; over `data` gradients are summed in shards; over `tensor` no parameter ever moves. In
  chunks a table is gathered where it is read, forward and backward, and the first chunk once more, since the last
  step of a loop gathers ahead, too."""
  text, mesh, params = compiled_step(sizes, loss__one_pass=passes == 1, loss__chunk=chunk)
  assert "rematerialization" not in capfd.readouterr().err
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  gathered, scattered, summed = 0.0, 0.0, 0.0
  for path, p in jax.tree_util.tree_leaves_with_path(params):
    if "fsdp" not in jax.tree.leaves(tuple(p.sharding.spec)):
      continue
    name = jax.tree_util.keystr(path)
    here = math.prod(p.sharding.shard_shape(p.shape)) * 4.0
    # Time conditions windows alone; a table is gathered once for all.
    uses = 1 if "w_time" in name or "blocks" not in name else passes
    gathered += (fsdp - 1) * here * uses * (2 if "blocks" in name else 1)
    if chunk and "blocks" not in name:
      gathered += (
        (fsdp - 1) * here * (2 + chunk / V - (0 if "embedding" in name else 1))
      )  # embeddings are looked up besides
    scattered += (
      (fsdp - 1) * here * (2 if "embedding" in name else uses)
    )  # embeddings are looked up, and averaged to soft inputs
    summed += 2 * here * (1 - 1 / mesh.shape["data"])
  program = hlo.read_program(text, dict(mesh.shape))
  sent = program.bytes_sent()
  # What windows tell the statistics, from all shards.
  measured = 3 * 256 * 4 * (fsdp - 1) / fsdp if mesh.shape["data"] == 1 else 0
  assert sent["all-gather", ("fsdp",)] == gathered + measured
  assert sent["reduce-scatter", ("fsdp",)] == scattered
  assert sent.get(("all-reduce", ("data",)), 0) == summed
  smallest = min(p.size * 4 // tensor for p in jax.tree.leaves(params["blocks"]) if p.ndim > 2)
  others = [c for c in program.collectives if c.kind == "all-gather" and c.axes != ("fsdp",)]
  assert all(c.bytes < smallest for c in others), others


def traced_step(**changes):
  """Operations of a training step on one device with context 64, outside of kernels and inside; and its
  configuration."""
  config = small_config(model__context=64, **changes)
  state = state_lib.abstract_state(
    evo_lib.Evo(config.model, V), config, sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  )
  step = lambda s, b: step_lib.train_step(s, Batch(b), model=evo_lib.Evo(config.model, V), config=config)
  return *flops.traced(step, state, jax.ShapeDtypeStruct((config.data.batch_size, 65), jnp.int32)), config


@pytest.mark.parametrize("changes", [{}, {"window__count": 0}], ids=str)
@pytest.mark.slow
def test_traced_operations_are_the_formula_with_what_is_computed_again(changes):
  """The trace counts what the backward pass computes anew, the formula does not."""
  plain, kernels, config = traced_step(**changes)
  full, *_ = traced_step(model__remat="full", **changes)
  assert kernels == 0 and 0.9 < plain / flops.train_step(config, V) < 1.1
  assert 1.15 < full / plain < 1.4


def test_what_is_kept_is_not_computed_again():
  """Beside what is named, the backward pass makes anew what its own products read: attention within, its way out, and
  the modulation. Not the hidden units' way out, of which windows' gates want the result."""
  (plain, *_), (kept, _, c) = traced_step(), traced_step(model__remat="save:qkv,attention,gate,up")
  D, L = c.model.width, c.model.context
  S = c.window.size + 1
  windows = c.window.count * S
  out = (L + windows) * D * D
  modulation = windows * c.model.time_dim * 6 * D
  attention = 2 * D * (L * L + windows * (L + S))
  assert kept - plain == 2 * c.data.batch_size * c.model.layers * (out + modulation + attention)
