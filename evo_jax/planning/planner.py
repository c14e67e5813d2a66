"""Plans a training step on a TPU pod: its memory, collectives and time, from the TPU compiler without a TPU.

The compiler is the TPU's own (libtpu). Without it a plan holds what follows from shapes alone.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
import re
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops
from evo_jax.parallel import sharding
from evo_jax.planning import chips, hlo
from evo_jax.training import partition
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

KERNEL_SHARE = 0.5  # the share of peak FLOPs that attention kernels are assumed to reach
ASSUMPTIONS = (
  "Cycles are the TPU compiler's own estimates for each instruction; instructions run one after another, and loops "
  "count with their length.",
  f"Attention kernels, for which the compiler has no estimate, reach {KERNEL_SHARE:.0%} of peak FLOPs on the blocks "
  "that their masks do not skip.",
  "Collectives use rings at the links' full speed, in both directions where an axis of the torus is closed (v5p from "
  "4, v5e and v6e at 16 chips), over all physical axes that a mesh axis covers; latency is not counted.",
  "An asynchronous collective overlaps with what the compiler schedules between its start and its done, after others "
  "over the same axes; the rest of it is waited for, as is every synchronous collective. All calls of attention "
  "kernels take equally long.",
  f"Between slices a chip has {chips.DCN / 1e9:.2f} GB per second.",
  "Input, checkpoints and evaluation cost nothing.",
  "Model FLOPs are the formula's (flops.train_step): forward and backward once, with the keys that masks admit.",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a training step needs, per chip unless stated otherwise. None: not known without the compiler.

  sequences: per step. bytes: `parameters`, `optimizer` (its moments, averages and statistics), `activations` (all
  temporary arrays, gradients included) and `code`. operations: FLOPs of all chips, as traced; model_operations: as the
  formula counts them. traffic: bytes that a chip sends per step, by kind of collective and mesh axes. seconds: the
  parts of a step. days: the whole run.
  """

  topology: str
  chips: int
  mesh: dict[str, int]
  sequences: int
  microbatches: int
  remat: str
  fits: bool | None
  hbm: float
  bytes: dict[str, float | None]
  operations: float
  model_operations: float
  traffic: dict[str, float] | None = None
  seconds: dict[str, float] | None = None
  step_seconds: float | None = None
  bottleneck: str | None = None
  tokens_per_second: float | None = None
  mfu: float | None = None
  days: float | None = None
  compile_seconds: float | None = None
  compile_peak_bytes: float | None = None
  advice: str | None = None

  @property
  def needed(self) -> float:
    """Bytes of HBM, as far as they are known."""
    return sum(size for size in self.bytes.values() if size is not None)


def make_plan(config: config_lib.Config, topology: chips.Topology, compiles: bool = True) -> Plan:
  """Plans one training step on a topology.

  compiles: False for what follows from shapes alone, which needs no libtpu. Raises UserError where configuration and
  topology do not fit together.
  """
  with _set_mesh(config, topology, compiles) as mesh:
    model = evo_lib.Evo(config.model, _vocab_size(config), sharding.Layout.of(mesh))
    state_lib.check_batch(config, mesh)
    state, batch = _abstract_inputs(model, config, mesh)
    train_step = functools.partial(step_lib.train_step, model=model, config=config)
    traced = flops.traced(train_step, state, batch)
    plan = _plan_from_shapes(config, topology, dict(mesh.shape), state, sum(traced), model.rows)
    if not compiles:
      return plan
    lowered = step_lib.make_step(model, config, mesh, topology.chip.kind).lower
    started = time.monotonic()
    try:
      compiled = lowered(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
      needed = out_of_memory(str(error))
      if needed is None:
        raise
      activations = max(needed - plan.needed, 0.0)
      return dataclasses.replace(plan, fits=False, bytes=plan.bytes | {"activations": activations})
  plan = dataclasses.replace(
    plan,
    compile_seconds=time.monotonic() - started,
    compile_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
  )
  plan = _with_memory(plan, compiled.memory_analysis())
  return _with_times(plan, hlo.read_program(compiled.as_text(), plan.mesh), traced[1], config, topology, mesh)


def _vocab_size(config: config_lib.Config) -> int:
  if config.model.vocab_size:
    return config.model.vocab_size
  return tokenizers.load_tokenizer(config.data.tokenizer, config.data.tokenizer_path).vocab_size


@contextlib.contextmanager
def _set_mesh(config: config_lib.Config, topology: chips.Topology, compiles: bool) -> Iterator[Any]:
  """Sets the mesh to plan for: of the compiler's devices, or an abstract one."""
  if compiles:
    mesh = sharding.make_mesh(config.mesh, chips.compiler_devices(topology))
    with jax.set_mesh(mesh):
      yield mesh
    return
  mesh = jax.sharding.AbstractMesh(
    sharding.mesh_sizes(config.mesh, topology.chips),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    abstract_device=jax.sharding.AbstractDevice(device_kind=topology.chip.kind, num_cores=1, platform="tpu"),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    yield mesh


def _abstract_inputs(model: evo_lib.Evo, config: config_lib.Config, mesh: Any) -> tuple[state_lib.TrainState, Batch]:
  """Shapes, dtypes and shardings of a training step's state and batch."""
  shape = config.data.batch_size, config.model.context + 1
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
  return state_lib.abstract_state(model, config, mesh), Batch(tokens)


def _plan_from_shapes(
  config: config_lib.Config,
  topology: chips.Topology,
  mesh: dict[str, int],
  state: state_lib.TrainState,
  operations: float,
  vocab_rows: int,
) -> Plan:
  """What is known without compiling."""
  parameters, whole_state = _bytes_per_device(state.whole), _bytes_per_device(state)
  hbm = topology.chip.hbm * chips.GIB
  return Plan(
    topology=topology.name,
    chips=topology.chips,
    mesh=mesh,
    sequences=config.data.batch_size,
    microbatches=config.train.accumulate,
    remat=config.model.remat,
    fits=False if whole_state > hbm else None,
    hbm=hbm,
    bytes={
      "parameters": parameters,
      "optimizer": whole_state - parameters,
      "activations": None,
      "code": None,
    },
    operations=operations,
    model_operations=flops.train_step(
      config, vocab_rows, visible=True, **partition.describe_work(state.params, state.frozen)
    ),
  )


def _bytes_per_device(tree: Any) -> int:
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def out_of_memory(message: str) -> float | None:
  """The bytes of HBM that a program would need, by the compiler's message; None if it is about something else."""
  match = re.search(r"(?:Used|\()\s*([\d.]+)([KMGT])\)?(?: of|,? exceeds)", message)
  if "RESOURCE_EXHAUSTED" not in message or not match:
    return None
  return float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) + 1)


def _with_memory(plan: Plan, memory: Any) -> Plan:
  """The plan with the compiled program's memory (`Compiled.memory_analysis()`), and whether it fits."""
  arrays = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  arrays += memory.output_size_in_bytes - memory.alias_size_in_bytes
  sizes = plan.bytes | {"activations": arrays - plan.needed, "code": memory.generated_code_size_in_bytes}
  plan = dataclasses.replace(plan, bytes=sizes)
  return dataclasses.replace(plan, fits=plan.needed <= plan.hbm)


def _with_times(
  plan: Plan,
  program: hlo.Program,
  kernel_operations: float,
  config: config_lib.Config,
  topology: chips.Topology,
  mesh: jax.sharding.Mesh,
) -> Plan:
  """The plan with a roofline estimate of the step's time, by ASSUMPTIONS. kernel_operations: FLOPs of all chips."""
  chip = topology.chip
  blocks = max(config.model.context // 512, 1)
  kernel_operations *= (blocks + 1) / (2 * blocks)  # the blocks of a causal mask on and below the diagonal
  kernel_seconds = kernel_operations / (plan.chips * KERNEL_SHARE * chip.peak)
  exposed = program.exposed_seconds(
    cycle=1 / chip.clock,
    kernel=kernel_seconds / max(program.kernel_calls, 1),
    duration=lambda c: c.bytes / chips.bandwidth(c.axes, mesh, topology),
  )
  seconds = {
    "matrix products": program.matmul_cycles / chip.clock,
    "attention kernels": kernel_seconds,
    "vectors and memory": program.other_cycles / chip.clock,
    "collectives that are waited for": exposed,
  }
  step_seconds = sum(seconds.values())
  return dataclasses.replace(
    plan,
    traffic=_traffic(program),
    seconds=seconds,
    step_seconds=step_seconds,
    bottleneck=max(seconds, key=seconds.get),
    tokens_per_second=config.data.batch_size * config.model.context / step_seconds,
    mfu=plan.model_operations / (plan.chips * chip.peak * step_seconds),
    days=config.train.steps * step_seconds / 86400,
  )


def _traffic(program: hlo.Program) -> dict[str, float]:
  """Bytes that a chip sends per step, by kind of collective and mesh axes, the most first."""
  name = lambda kind, axes: kind + (" over " + " and ".join(axes) if axes else "")
  sent = sorted(program.bytes_sent().items(), key=lambda item: -item[1])
  return {name(*kind_and_axes): size for kind_and_axes, size in sent}


def advise(config: config_lib.Config, topology: chips.Topology, plan: Plan, compiles: bool) -> str:
  """Says which flags make a plan fit that does not: tries changes on top of each other, the cheapest first."""
  config = dataclasses.replace(config, mesh=config_lib.Mesh(**plan.mesh))
  tried = {}  # flags with their values, by name
  while change := _next_change(config, plan):
    config, name, value = change
    tried.pop(name, None)
    tried[name] = f"{name}={value}"
    try:
      plan = make_plan(config, topology, compiles)
    except UserError:
      continue
    if plan.fits is not False:
      return (
        f"{' '.join(tried.values())} makes it fit: {chips.format_gib(plan.needed)} of {topology.chip.hbm:.2f} GiB"
        + ("" if compiles else ", activations not counted")
      )
  return (
    f"nothing that was tried makes it fit ({', '.join(tried.values()) or 'there is nothing to try'}): it needs more "
    "chips, or larger ones"
  )


def _next_change(config: config_lib.Config, plan: Plan) -> tuple[config_lib.Config, str, str] | None:
  """The next change that saves memory: the changed configuration, and the flag that makes it with its value.

  Where parameters and optimizer take most of the HBM, more shards of them; then smaller microbatches, full
  rematerialization, and more shards after all.
  """
  wider = _wider_fsdp(config)
  if wider and plan.bytes["parameters"] + plan.bytes["optimizer"] > 0.6 * plan.hbm:
    return wider
  rows = config.data.batch_size // config.train.accumulate // (config.mesh.data * config.mesh.fsdp)
  if rows > 1 and rows % 2 == 0:
    train = dataclasses.replace(config.train, accumulate=2 * config.train.accumulate)
    return dataclasses.replace(config, train=train), "--config.train.accumulate", str(train.accumulate)
  if config.model.remat != "full":
    model = dataclasses.replace(config.model, remat="full")
    return dataclasses.replace(config, model=model), "--config.model.remat", "full"
  return wider


def _wider_fsdp(config: config_lib.Config) -> tuple[config_lib.Config, str, str] | None:
  """Twice as many shards of the parameters and half as many replicas, where they divide."""
  mesh = config.mesh
  if mesh.data % 2 or config.model.width % (2 * mesh.fsdp):
    return None
  mesh = dataclasses.replace(mesh, data=mesh.data // 2, fsdp=2 * mesh.fsdp)
  flag = f"data:{mesh.data},fsdp:{mesh.fsdp},tensor:{mesh.tensor}"
  return dataclasses.replace(config, mesh=mesh), "--mesh", flag
