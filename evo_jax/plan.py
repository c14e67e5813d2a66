"""Plans a run on a TPU pod without the pod: compiles the training step for it and says what it needs and how
long it takes.

  python -m evo_jax.plan --config=configs/evo8b.py --topology=v5p:8x8x8 [--mesh=data:8,fsdp:64,tensor:1] [--json=FILE]

The compiler is the TPU's own (`pip install 'evo_jax[tpu]'`), which needs no TPU. Without it the answers that follow
from shapes are given.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import resource
import sys
import time
from typing import Any

from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import flops
from evo_jax import hlo
from evo_jax import sharding
from evo_jax import tokenizer as tokenizer_lib
from evo_jax import train
from evo_jax.cli import UserError
from evo_jax.model import Evo

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """hbm: GiB that a program may use; clock: cycles a second; link: bytes a second that one link sends one way; wraps:
  the sizes of a torus's axis from which on (v5p) or at which (v5e, v6e) its ends are joined."""

  kind: str
  hbm: float
  clock: float
  link: float
  wraps: int

  @property
  def peak(self) -> float:
    """Dense bfloat16 operations a second."""
    return flops.peak(self.kind)


# HBM as the compiler states it; clocks are the peak over the operations of a cycle; links by the makers' data.
CHIPS = {"v5e": Chip("TPU v5 lite", 15.75, 1.5e9, 45e9, 16), "v5p": Chip("TPU v5", 95.74, 1.75e9, 90e9, 4),
         "v6e": Chip("TPU v6 lite", 31.25, 1.75e9, 90e9, 16)}
KERNEL_SHARE = 0.5  # of the peak that attention kernels are taken to reach
DCN = 6.25e9  # bytes a second and chip between slices: 200 Gbit/s a host of four chips
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
    f"Between slices {DCN / 1e9:.2f} GB a second and chip.",
    "The input, checkpoints and evaluation cost nothing.",
    "Model operations are the formula's (flops.train_step): forward and backward once, keys that masks let through.")


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


def has_compiler() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...], int]:
  """The chip, the shape of a slice and the number of slices of CHIP:AxB[xC] or N*CHIP:AxB[xC]. Raises UserError."""
  match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", text)
  if not match or match[2] not in CHIPS:
    raise UserError(f"--topology={text!r}: is not CHIP:AxB or CHIP:AxBxC with one of the chips {', '.join(CHIPS)}")
  return CHIPS[match[2]], tuple(int(n) for n in match[3].split("x")), int(match[1] or 1)


def parse_mesh(text: str, mesh: config_lib.Mesh) -> config_lib.Mesh:
  """A mesh with some sizes replaced: AXIS:SIZE,... Raises UserError."""
  found = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition(":")
    if name not in sharding.AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
      raise UserError(f"--mesh={text!r}: {part!r} is not AXIS:SIZE with one of the axes {', '.join(sharding.AXES)}")
    found[name] = int(size)
  return dataclasses.replace(mesh, **found)


def devices_of(topology: str) -> list[Any]:
  """The devices of a pod that is not there, from the TPU compiler. Raises UserError where it knows no such shape."""
  chip, shape, slices = parse_topology(topology)
  for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
                      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
    os.environ.setdefault(name, value)  # it looks for TPUs otherwise
  name = topology.split("*")[-1]
  try:
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **({"num_slices": slices} if slices > 1 else {})).devices
  except Exception as error:  # whatever the plugin raises
    raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
  if len(found) != slices * math.prod(shape) or not found[0].device_kind.startswith(chip.kind):
    raise UserError(f"--topology={topology}: the compiler has {len(found)} devices {found[0].device_kind} for it")
  return list(found)


def plan(config: config_lib.Config, topology: str, compiles: bool = True) -> Plan:
  """Plans one step of a configuration on a topology. Raises UserError where shapes do not fit together."""
  chip, shape, slices = parse_topology(topology)
  chips = slices * math.prod(shape)
  vocab = config.model.vocab_size or tokenizer_lib.load(config.data.tokenizer, config.data.tokenizer_path).vocab_size
  model = Evo(config.model, vocab)
  if compiles:
    mesh = sharding.make_mesh(config.mesh, devices_of(topology))
    inside = jax.set_mesh(mesh)
  else:
    mesh = jax.sharding.AbstractMesh(sharding.mesh_sizes(config.mesh, chips), sharding.AXES,
                                     axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
                                     abstract_device=jax.sharding.AbstractDevice(
                                         device_kind=chip.kind, num_cores=1, platform="tpu"))
    inside = jax.sharding.use_abstract_mesh(mesh)
  train.check_batch(config, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(inside)
    state, places = train.abstract_state(model, config, mesh)
    rows = jax.sharding.NamedSharding(mesh, sharding.RULES.spec(("batch",)))
    batch = jax.ShapeDtypeStruct((config.data.batch_size, config.model.context + 1), jnp.int32, sharding=rows)
    here = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                            for x in jax.tree.leaves(tree))
    parameters = here(state.params)
    sizes = {"parameters": parameters, "optimizer": here(state) - parameters, "activations": None, "code": None}
    step = train.make_step(model, config, places, chip.kind)
    traced = flops.traced(functools.partial(train.train_step, model=model, config=config), state, batch)
    found = Plan(topology, chips, dict(mesh.shape), config.data.batch_size, config.train.accumulate,
                 config.model.remat, None, chip.hbm * GIB, sizes, sum(traced),
                 flops.train_step(config, model.rows, visible=True))
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
  sizes["activations"] = (memory.temp_size_in_bytes + memory.argument_size_in_bytes - found.needed + sizes["code"]
                          + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  found.fits = found.needed <= found.hbm
  _time(found, hlo.read(compiled.as_text(), found.mesh), traced[1], chip, mesh, slices, config)
  return found


def _time(found: Plan, program: hlo.Program, kernels: float, chip: Chip, mesh: jax.sharding.Mesh, slices: int,
          config: config_lib.Config) -> None:
  """The roofline of a step, by ASSUMPTIONS."""
  blocks = max(config.model.context // 512, 1)
  kernels *= (blocks + 1) / (2 * blocks)  # of a triangle of blocks, those on and below the diagonal
  kernels /= found.chips * KERNEL_SHARE * chip.peak
  kind = lambda item: item[0] + (" over " + " and ".join(item[1]) if item[1] else "")
  found.traffic = {kind(item): size for item, size in sorted(program.moved().items(), key=lambda x: -x[1])}
  waits = program.waits(1 / chip.clock, kernels / max(program.kernels, 1),
                        lambda c: c.bytes / _bandwidth(c.axes, mesh, chip, slices))
  found.seconds = {"matrix products": program.cycles[True] / chip.clock, "attention kernels": kernels,
                   "vectors and memory": program.cycles[False] / chip.clock, "collectives that are waited for": waits}
  found.step_seconds = sum(found.seconds.values())
  found.bottleneck = max(found.seconds, key=found.seconds.get)
  found.tokens_per_second = config.data.batch_size * config.model.context / found.step_seconds
  found.mfu = found.model_operations / (found.chips * chip.peak * found.step_seconds)
  found.days = config.train.steps * found.step_seconds / 86400


def _bandwidth(axes: tuple[str, ...], mesh: jax.sharding.Mesh, chip: Chip, slices: int) -> float:
  """Bytes a second that a chip sends in a collective over these axes of the mesh."""
  if slices > 1 and "data" in axes:
    return DCN
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  coordinates = np.array([d.coords for d in mesh.devices[index].reshape(-1)])
  whole = np.array([d.coords for d in mesh.devices.reshape(-1)]).max(axis=0) + 1
  total = 0.0
  for along, size in zip(coordinates.T, whole):
    used = len(set(along.tolist()))
    closed = used == size and (size % chip.wraps == 0)
    total += 0.0 if used == 1 else (2.0 if closed else 1.0) * chip.link
  return total or chip.link


def _out_of_memory(message: str) -> float | None:
  """The bytes of HBM that the compiler says a program would need, if that is what it complains of."""
  match = re.search(r"(?:Used|\()\s*([\d.]+)([KMGT])\)?(?: of|,? exceeds)", message)
  if "RESOURCE_EXHAUSTED" not in message or not match:
    return None
  return float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) + 1)


def advise(config: config_lib.Config, found: Plan, compiles: bool) -> str:
  """Which knob makes a plan fit: tried one on top of the other, in the order of what they cost, until it does."""
  chip, *_ = parse_topology(found.topology)
  tried = []
  while True:
    rows = config.data.batch_size // config.train.accumulate // (found.mesh["data"] * found.mesh["fsdp"])
    state = found.bytes["parameters"] + found.bytes["optimizer"]
    more = _wider(config, found)
    if state > 0.6 * found.hbm and more:
      config, knob = (dataclasses.replace(config, mesh=more),
                      f"--mesh=data:{more.data},fsdp:{more.fsdp},tensor:{more.tensor}")
    elif rows % 2 == 0 and rows > 1:
      config = dataclasses.replace(config, train=dataclasses.replace(
          config.train, accumulate=2 * config.train.accumulate))
      knob = f"--config.train.accumulate={config.train.accumulate}"
    elif config.model.remat != "full":
      config, knob = (dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full")),
                      "--config.model.remat=full")
    elif more:
      config, knob = (dataclasses.replace(config, mesh=more),
                      f"--mesh=data:{more.data},fsdp:{more.fsdp},tensor:{more.tensor}")
    else:
      return (f"nothing that was tried makes it fit ({', '.join(tried) or 'there is nothing to try'}): it needs more "
              "chips, or larger ones")
    tried = [t for t in tried if t.split("=")[0] != knob.split("=")[0]] + [knob]
    try:
      found = plan(config, found.topology, compiles)
    except UserError:
      continue
    if found.fits or found.fits is None:
      return f"{' '.join(tried)} makes it fit: {_gib(found.needed)} of {chip.hbm:.2f} GiB" + (
          "" if compiles else ", activations not counted")


def _wider(config: config_lib.Config, found: Plan) -> config_lib.Mesh | None:
  data, fsdp = found.mesh["data"], found.mesh["fsdp"]
  if data % 2 or config.model.width % (2 * fsdp):
    return None
  return dataclasses.replace(config.mesh, data=data // 2, fsdp=2 * fsdp, tensor=found.mesh["tensor"])


def _gib(size: float | None) -> str:
  return "not known" if size is None else f"{size / GIB:.2f}"


def report(found: Plan, config: config_lib.Config) -> str:
  """A plan in words."""
  mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
  lines = [f"{found.topology}: {found.chips} chips, mesh {mesh}; {found.sequences} sequences of "
           f"{config.model.context} tokens a step, in {found.microbatches} microbatches; remat {found.remat}"]
  row = lambda name, text: lines.append(f"  {name:<44}{text}")
  for name, size in found.bytes.items():
    row(f"{name}, GiB a chip", _gib(size))
  spare = 1 - found.needed / found.hbm
  verdict = {True: f"fits, {spare:.0%} to spare",
             False: f"does not fit, by {_gib(found.needed - found.hbm)} GiB", None: "at least"}[found.fits]
  row("together, of HBM", f"{_gib(found.needed)} of {_gib(found.hbm)}: {verdict}")
  row("operations a step",
      f"{found.operations:.3e}, of which the model's {found.model_operations / found.operations:.0%}")
  if found.seconds:
    for name, size in found.traffic.items():
      row(name + ", GB a chip", f"{size / 1e9:.2f}")
    for name, seconds in found.seconds.items():
      row(name + ", s", f"{seconds:.3f}")
    row("step, s", f"{found.step_seconds:.3f}; most of it {found.bottleneck}")
    row("tokens a second", f"{found.tokens_per_second:,.0f}")
    row("MFU", f"{found.mfu:.1%}")
    row(f"{config.train.steps * found.sequences * config.model.context / 1e9:,.0f} billion tokens, days",
        f"{found.days:.1f}")
    row("compiled in, s",
        f"{found.compile_seconds:.0f}, with {_gib(found.compile_peak_bytes)} GiB of this machine's memory")
  elif found.bytes["activations"] is None:
    lines.append("  Not known without the TPU's compiler (pip install 'evo_jax[tpu]'): activations, code, "
                 "collectives, time.")
  if found.advice:
    lines.append("  " + found.advice)
  return "\n".join(lines)


def table(plans: list[Plan]) -> str:
  """Several plans side by side, a line each."""
  head = (f"{'topology':<14}{'chips':>6}  {'mesh':<12}{'HBM GiB':>16}{'GB sent':>9}{'step s':>9}{'tokens/s':>13}"
          f"{'MFU':>7}{'days':>8}")
  lines = [head]
  for p in plans:
    known = lambda value, text: "-" if value is None else text.format(value)
    sent = None if p.traffic is None else sum(p.traffic.values()) / 1e9
    lines.append(f"{p.topology:<14}{p.chips:>6}  {'x'.join(str(n) for n in p.mesh.values()):<12}"
                 f"{_gib(p.needed) + ' / ' + _gib(p.hbm):>16}{known(sent, '{:.1f}'):>9}"
                 f"{known(p.step_seconds, '{:.3f}'):>9}{known(p.tokens_per_second, '{:,.0f}'):>13}"
                 f"{known(p.mfu, '{:.1%}'):>7}{known(p.days, '{:.1f}'):>8}")
  return "\n".join(lines)


def main() -> None:
  args = flags.FLAGS
  config, _ = cli.read_config()
  if not args.topology:
    raise UserError("--topology is needed, as in --topology=v5p:8x8x8")
  compiles = args.compile and has_compiler()
  jax.config.update("jax_platforms", "cpu")  # nothing runs here, whatever this machine has
  config = dataclasses.replace(config, mesh=parse_mesh(args.mesh, config.mesh))
  for topology in args.topology:
    sharding.mesh_sizes(config.mesh, math.prod(parse_topology(topology)[1]) * parse_topology(topology)[2])
  plans = []
  for topology in args.topology:
    found = plan(config, topology, compiles)
    if found.fits is False and args.advice:
      found.advice = advise(config, found, compiles)
    plans.append(found)
    print(report(found, config), flush=True)
  if len(plans) > 1:
    print("\n" + table(plans))
  if args.json:
    command = " ".join(["python -m evo_jax.plan", *(a for a in sys.argv[1:] if not a.startswith("--json"))])
    text = {"command": command, "fields": config_lib.to_dict(config), "assumptions": ASSUMPTIONS,
            "jax": jax.__version__, "plans": [dataclasses.asdict(p) for p in plans]}
    try:
      with open(args.json, "w", encoding="utf-8") as stream:
        json.dump(text, stream, indent=1)
    except OSError as error:
      raise UserError(f"--json={args.json}: cannot be written: {error.strerror}") from error
  if any(p.fits is False for p in plans):
    raise UserError("a plan does not fit" if len(plans) == 1 else
                    "plans do not fit: " + ", ".join(p.topology for p in plans if p.fits is False))


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_list("topology", [],
                    "CHIP:AxB[xC], of " + ", ".join(CHIPS) + "; several by commas; N*CHIP:... for N slices.")
  flags.DEFINE_string("mesh", "", "AXIS:SIZE,... instead of the configuration's.")
  flags.DEFINE_bool("compile", True, "Compile; else answer from shapes alone.")
  flags.DEFINE_bool("advice", True, "Look for what makes a plan fit that does not: a compilation a try.")
  flags.DEFINE_string("json", "", "A file to write the plans to.")
  cli.run(main)
