"""Plans a run on a TPU pod without the pod: compiles the training step for it and says what it needs and how
long it takes.

  python -m evo_jax.plan --config=configs/evo8b.py --topology=v5p:8x8x8 [--mesh=data:8,fsdp:64,tensor:1] [--json=FILE]

The compiler is the TPU's own (`pip install 'evo_jax[tpu]'`), which needs no TPU. Without it the answers that follow
from shapes are given.
"""

import contextlib
import dataclasses
import functools
import math
import re
import resource
import time

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
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

KERNEL_SHARE = 0.5  # of the peak that attention kernels are taken to reach
SPARE = 0.1  # of the HBM that should be left
ASSUMPTIONS = (
  "Cycles are the TPU compiler's own estimates for each instruction, which run one after another; loops count with "
  "their length.",
  f"Attention kernels, for which it has none, reach {KERNEL_SHARE:.0%} of the peak on the blocks that their masks do "
  "not leave out.",
  "Collectives go around rings at the links' full speed, both ways where a torus's axis is closed (v5p from 4, v5e "
  "and v6e at 16 chips), over all physical axes that a mesh axis covers; latency is not counted.",
  "An asynchronous collective runs beside what the compiler's schedule has between its beginning and its end, after "
  "those over the same axes; what is left is waited for, as are all others. All calls of attention kernels take "
  "equally long.",
  f"Between slices {chips.DCN / 1e9:.2f} GB a second and chip.",
  "The input, checkpoints and evaluation cost nothing.",
  "Model operations are the formula's (flops.train_step): forward and backward once, keys that masks let through.",
)


@dataclasses.dataclass
class Plan:
  """What a training step needs, for one chip where nothing else is said. None: not known without the compiler.

  bytes: `parameters`, `optimizer` (with averages and statistics), `activations` (all temporary arrays, gradients
  too), `code`, in bytes; traffic: bytes that a chip sends a step, by kind of collective and mesh axes; seconds: the
  parts of a step; the rest of a run.
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
  operations: float  # of all chips, as traced
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


def parse_mesh(text: str, mesh: config_lib.Mesh) -> config_lib.Mesh:
  """A mesh with some sizes replaced: AXIS:SIZE,... Raises UserError."""
  found = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition(":")
    if name not in sharding.AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
      raise UserError(f"--mesh={text!r}: {part!r} is not AXIS:SIZE with one of the axes {', '.join(sharding.AXES)}")
    found[name] = int(size)
  return dataclasses.replace(mesh, **found)


def make_plan(config: config_lib.Config, topology: str, compiles: bool = True) -> Plan:
  """Plans one step of a configuration on a topology. Raises UserError where shapes do not fit together."""
  chip, shape, slices = chips.parse_topology(topology)
  count = slices * math.prod(shape)
  vocab = (
    config.model.vocab_size or tokenizers.load_tokenizer(config.data.tokenizer, config.data.tokenizer_path).vocab_size
  )
  if compiles:
    mesh = sharding.make_mesh(config.mesh, chips.devices_of(topology))
    inside = jax.set_mesh(mesh)
  else:
    mesh = jax.sharding.AbstractMesh(
      sharding.mesh_sizes(config.mesh, count),
      sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
      abstract_device=jax.sharding.AbstractDevice(device_kind=chip.kind, num_cores=1, platform="tpu"),
    )
    inside = jax.sharding.use_abstract_mesh(mesh)
  model = evo_lib.Evo(config.model, vocab, sharding.Layout.of(mesh))
  state_lib.check_batch(config, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(inside)
    state = state_lib.abstract_state(model, config, mesh)
    shape = config.data.batch_size, config.model.context + 1
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh)))
    here = lambda tree: sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    parameters = here(state.params)
    sizes = {"parameters": parameters, "optimizer": here(state) - parameters, "activations": None, "code": None}
    step = step_lib.make_step(model, config, mesh, chip.kind)
    traced = flops.traced(functools.partial(step_lib.train_step, model=model, config=config), state, batch)
    found = Plan(
      topology,
      count,
      dict(mesh.shape),
      config.data.batch_size,
      config.train.accumulate,
      config.model.remat,
      None,
      chip.hbm * chips.GIB,
      sizes,
      sum(traced),
      flops.train_step(config, model.rows, visible=True),
    )
    if found.needed > found.hbm:
      found.fits = False
    if not compiles:
      return found
    began = time.monotonic()
    try:
      compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
      needed = _out_of_memory(str(error))
      if needed is None:
        raise
      found.fits = False
      sizes["activations"] = max(needed - found.needed, 0.0)
      return found
  found.compile_seconds = time.monotonic() - began
  found.compile_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
  memory = compiled.memory_analysis()
  sizes["code"] = memory.generated_code_size_in_bytes
  sizes["activations"] = (
    memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    - found.needed
    + sizes["code"]
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  found.fits = found.needed <= found.hbm
  _time(found, hlo.read_program(compiled.as_text(), found.mesh), traced[1], chip, mesh, slices, config)
  return found


def _time(
  found: Plan,
  program: hlo.Program,
  kernels: float,
  chip: chips.Chip,
  mesh: jax.sharding.Mesh,
  slices: int,
  config: config_lib.Config,
) -> None:
  """The roofline of a step, by ASSUMPTIONS."""
  blocks = max(config.model.context // 512, 1)
  kernels *= (blocks + 1) / (2 * blocks)  # of a triangle of blocks, those on and below the diagonal
  kernels /= found.chips * KERNEL_SHARE * chip.peak
  kind = lambda item: item[0] + (" over " + " and ".join(item[1]) if item[1] else "")
  found.traffic = {kind(item): size for item, size in sorted(program.moved().items(), key=lambda x: -x[1])}
  waits = program.waits(
    1 / chip.clock, kernels / max(program.kernels, 1), lambda c: c.bytes / chips.bandwidth(c.axes, mesh, chip, slices)
  )
  found.seconds = {
    "matrix products": program.cycles[True] / chip.clock,
    "attention kernels": kernels,
    "vectors and memory": program.cycles[False] / chip.clock,
    "collectives that are waited for": waits,
  }
  found.step_seconds = sum(found.seconds.values())
  found.bottleneck = max(found.seconds, key=found.seconds.get)
  found.tokens_per_second = config.data.batch_size * config.model.context / found.step_seconds
  found.mfu = found.model_operations / (found.chips * chip.peak * found.step_seconds)
  found.days = config.train.steps * found.step_seconds / 86400


def _out_of_memory(message: str) -> float | None:
  """The bytes of HBM that the compiler says a program would need, if that is what it complains of."""
  match = re.search(r"(?:Used|\()\s*([\d.]+)([KMGT])\)?(?: of|,? exceeds)", message)
  if "RESOURCE_EXHAUSTED" not in message or not match:
    return None
  return float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) + 1)


def advise(config: config_lib.Config, found: Plan, compiles: bool) -> str:
  """Which knob makes a plan fit: tried one on top of the other, in the order of what they cost, until it does."""
  chip, *_ = chips.parse_topology(found.topology)
  tried = []
  while True:
    rows = config.data.batch_size // config.train.accumulate // (found.mesh["data"] * found.mesh["fsdp"])
    state = found.bytes["parameters"] + found.bytes["optimizer"]
    more = _wider(config, found)
    if state > 0.6 * found.hbm and more:
      config, knob = (
        dataclasses.replace(config, mesh=more),
        f"--mesh=data:{more.data},fsdp:{more.fsdp},tensor:{more.tensor}",
      )
    elif rows % 2 == 0 and rows > 1:
      config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, accumulate=2 * config.train.accumulate)
      )
      knob = f"--config.train.accumulate={config.train.accumulate}"
    elif config.model.remat != "full":
      config, knob = (
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full")),
        "--config.model.remat=full",
      )
    elif more:
      config, knob = (
        dataclasses.replace(config, mesh=more),
        f"--mesh=data:{more.data},fsdp:{more.fsdp},tensor:{more.tensor}",
      )
    else:
      return (
        f"nothing that was tried makes it fit ({', '.join(tried) or 'there is nothing to try'}): it needs more "
        "chips, or larger ones"
      )
    tried = [t for t in tried if t.split("=")[0] != knob.split("=")[0]] + [knob]
    try:
      found = make_plan(config, found.topology, compiles)
    except UserError:
      continue
    if found.fits or found.fits is None:
      return f"{' '.join(tried)} makes it fit: {chips.gib(found.needed)} of {chip.hbm:.2f} GiB" + (
        "" if compiles else ", activations not counted"
      )


def _wider(config: config_lib.Config, found: Plan) -> config_lib.Mesh | None:
  data, fsdp = found.mesh["data"], found.mesh["fsdp"]
  if data % 2 or config.model.width % (2 * fsdp):
    return None
  return dataclasses.replace(config.mesh, data=data // 2, fsdp=2 * fsdp, tensor=found.mesh["tensor"])
