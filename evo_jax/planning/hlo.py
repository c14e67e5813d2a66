"""Reads optimized HLO text: collectives by mesh axis, the compiler's cycle estimates, and exposed communication time.

The text of a compiled program (`Compiled.as_text()`) is a list of computations that call each other. The body of a
`while` loop stands there once; here it counts as often as the loop runs. All figures are for one device.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import math
import re

import numpy as np

from evo_jax.network import vocabulary

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5}  # other element types have their bits in the name
_NO_ESTIMATE = 2**62  # from here on an estimate of cycles stands for none
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|true_computation|false_computation|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_BETWEEN_SLICES = re.compile(
  r'_xla_megascale_target="\{(?P<slices>[\d,]+)\}.*_xla_megascale_transfer_type="(?P<kind>\w+)"'
)
# TPUs fuse an all-reduce with the slice of its result that is used into a computation of this name.
_ALL_REDUCE_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of the program.

  axes: the mesh axes that it spans; `data` between slices; empty if its groups span no whole set of axes. bytes: what
  one device sends per call on a ring: S (g - 1) / g for a whole array of S bytes over g devices, twice that for an
  all-reduce. count: calls per run. asynchronous: computation can hide it.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  count: int
  asynchronous: bool


@dataclasses.dataclass(frozen=True)
class Compute:
  """An instruction that computes.

  cycles: the compiler's estimate (TPUs only), 0 without one. matmul: a matrix product, or fused with one. kernel: a
  custom kernel, for which there is no estimate.
  """

  cycles: float
  matmul: bool = False
  kernel: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """A collective starts."""

  collective: Collective


@dataclasses.dataclass(frozen=True)
class Done:
  """The program waits here until the collective that `start` started is done."""

  start: Start


@dataclasses.dataclass(frozen=True)
class Loop:
  """A schedule that runs `trip_count` times."""

  trip_count: int
  schedule: tuple["Event", ...]


Event = Compute | Start | Done | Loop


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program on one device: its events in execution order."""

  schedule: tuple[Event, ...]

  @functools.cached_property
  def collectives(self) -> tuple[Collective, ...]:
    """All collectives, each with its number of calls per run."""
    return tuple(
      dataclasses.replace(event.collective, count=count)
      for event, count in _with_counts(self.schedule)
      if isinstance(event, Start)
    )

  @property
  def matmul_cycles(self) -> float:
    """Estimated cycles per run of instructions with matrix products."""
    return self._cycles(matmul=True)

  @property
  def other_cycles(self) -> float:
    """Estimated cycles per run of all other instructions but custom kernels."""
    return self._cycles(matmul=False)

  def _cycles(self, matmul: bool) -> float:
    return sum(count * c.cycles for c, count in self._computes() if c.matmul == matmul)

  @property
  def kernel_calls(self) -> int:
    """Calls of custom kernels per run."""
    return sum(count for c, count in self._computes() if c.kernel)

  def _computes(self) -> Iterator[tuple[Compute, int]]:
    return ((event, count) for event, count in _with_counts(self.schedule) if isinstance(event, Compute))

  def bytes_sent(self) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends per run, by kind of collective and mesh axes."""
    total = collections.Counter()
    for c in self.collectives:
      total[c.kind, c.axes] += c.bytes * c.count
    return dict(total)

  def exposed_seconds(self, cycle: float, kernel: float, duration: Callable[[Collective], float]) -> float:
    """Seconds per run in which the device computes nothing, because it waits for a collective.

    A collective overlaps with the computation that is scheduled between its start and its done. It begins at its start
    or, if collectives over the same axes are still in flight, after them.

    Args:
      cycle: seconds per cycle.
      kernel: seconds per call of a custom kernel.
      duration: seconds per call of a collective.
    """
    return _simulate(self.schedule, cycle, kernel, duration)[1]


def _with_counts(schedule: Iterable[Event], count: int = 1) -> Iterator[tuple[Event, int]]:
  """The events within all loops, each with the number of times that it happens."""
  for event in schedule:
    if isinstance(event, Loop):
      yield from _with_counts(event.schedule, count * event.trip_count)
    else:
      yield event, count


def _simulate(
  schedule: Iterable[Event], cycle: float, kernel: float, duration: Callable[[Collective], float]
) -> tuple[float, float]:
  """Seconds that a schedule takes, and how many of them are spent waiting for collectives."""
  now, waited = 0.0, 0.0
  axes_free_at, done_at = collections.Counter(), {}
  for event in schedule:
    match event:
      case Compute():
        now += kernel if event.kernel else event.cycles * cycle
      case Loop():
        seconds, waited_inside = _simulate(event.schedule, cycle, kernel, duration)
        now += event.trip_count * seconds
        waited += event.trip_count * waited_inside
      case Start():
        axes = event.collective.axes
        done_at[event] = axes_free_at[axes] = max(now, axes_free_at[axes]) + duration(event.collective)
      case Done():
        wait = max(done_at[event.start] - now, 0.0)
        now, waited = now + wait, waited + wait
  return now, waited


def read_program(text: str, mesh: dict[str, int]) -> Program:
  """Reads a compiled program, whose instructions stand in execution order (`is_scheduled=true`).

  Args:
    text: `Compiled.as_text()`.
    mesh: sizes of the mesh axes by name, in the order of the devices.
  """
  computations, entry = _parse(text)
  return Program(_Scheduler(computations, mesh).schedule(entry))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An HLO instruction.

  type: of the result. text: the whole line. operands: the line from the opening parenthesis of the operands on.
  computation: the name of the one that it stands in.
  """

  name: str
  type: str
  opcode: str
  text: str
  operands: str
  computation: str
  is_root: bool

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """The computations that it calls, apart from a loop's condition and body."""
    return tuple(name for names in _CALLED.findall(self.text) for name in re.findall(r"%([\w.\-]+)", names))

  def attribute(self, pattern: str) -> str | None:
    """The first group of a regular expression, where the line has it."""
    found = re.search(pattern, self.text)
    return found and found[1]


Computations = dict[str, list[Instruction]]  # by name


def _parse(text: str) -> tuple[Computations, str]:
  """The computations of a program, and the name of the one that is its entry."""
  computations, entry, name = {}, "", ""
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      name = head["name"]
      computations[name] = []
      entry = name if head["entry"] else entry
    elif line.startswith("  ") and (match := _INSTRUCTION.match(line := line.strip())):
      operands = line[match.end() - 1 :]
      computations[name].append(
        Instruction(match["name"], match["type"], match["opcode"], line, operands, name, bool(match["root"]))
      )
  return computations, entry


class _Scheduler:
  """Turns computations into schedules of events."""

  def __init__(self, computations: Computations, mesh: dict[str, int]):
    self._computations, self._mesh = computations, mesh
    self._schedules: dict[str, tuple[Event, ...]] = {}  # a computation that is called twice is read once

  def schedule(self, computation: str) -> tuple[Event, ...]:
    """The events of a computation in execution order."""
    if computation not in self._schedules:
      self._schedules[computation] = tuple(self._events(computation))
    return self._schedules[computation]

  def _events(self, computation: str) -> Iterator[Event]:
    in_flight: dict[str, list[Start]] = {}  # by the name of the instruction that started them
    for instruction in self._computations[computation]:
      if instruction.opcode == "while":
        yield self._loop(instruction)
      elif instruction.opcode in ("call", "conditional", "async-start"):
        for called in instruction.called:
          if not self._contains([called], f"/{vocabulary.RARE_BRANCH}/"):
            yield from self.schedule(called)
      else:
        yield from map(Done, in_flight.pop(self._started_by(instruction), ()))
        for start in map(Start, self._collectives_started(instruction)):
          yield start
          if start.collective.asynchronous:
            in_flight.setdefault(instruction.name, []).append(start)
          else:
            yield Done(start)
        yield from self._compute(instruction)
    for starts in in_flight.values():
      yield from map(Done, starts)

  def _loop(self, instruction: Instruction) -> Loop:
    condition, body = (instruction.attribute(rf"{role}=%?([\w.\-]+)") for role in ("condition", "body"))
    return Loop(_trip_count(instruction, self._computations[condition]), self.schedule(body))

  def _compute(self, instruction: Instruction) -> Iterator[Compute]:
    """The instruction's computation, if it is a custom kernel or the compiler has an estimate for it."""
    kernel = 'custom_call_target="tpu_custom_call"' in instruction.text
    estimate = int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or _NO_ESTIMATE)
    if kernel or estimate < _NO_ESTIMATE:
      matmul = instruction.opcode in ("convolution", "dot") or any(
        self._contains(instruction.called, f" {opcode}(") for opcode in ("convolution", "dot")
      )
      yield Compute(0.0 if kernel else float(estimate), matmul, kernel)

  def _collectives_started(self, instruction: Instruction) -> list[Collective]:
    """The collectives that start with an instruction."""
    called = instruction.called
    if instruction.opcode == "call-start":  # a TPU's SparseCores run them
      return list(self._collectives_in(called))
    if instruction.opcode == "fusion":
      # On TPUs an asynchronous collective, fused with the computation that hides it, is spread over several fusions:
      # its start, its steps and its done.
      starts = self._contains(called, '"AsyncCollectiveStart"')
      starts |= any(name.startswith(_ALL_REDUCE_SCATTER) for name in called)
      return list(self._collectives_in(called)) if starts else []
    collective = self._as_collective(instruction, asynchronous=instruction.opcode.endswith("-start"))
    return [collective] if collective else []

  def _started_by(self, instruction: Instruction) -> str | None:
    """The name of the instruction that started what is done with this one; None if nothing is."""
    if instruction.opcode == "fusion" and self._contains(instruction.called, '"AsyncCollectiveDone"'):
      return "-start".join(instruction.name.rsplit("-done", 1))
    if instruction.opcode.endswith("-done") and (operand := re.search(r"\(%?([\w.\-]+)", instruction.operands)):
      return operand[1]
    return None

  def _collectives_in(self, computations: Iterable[str]) -> Iterator[Collective]:
    """The asynchronous collectives in computations and in those that they call, loops apart."""
    for name in computations:
      for instruction in self._computations.get(name, ()):
        if collective := self._as_collective(instruction, asynchronous=True):
          yield collective
        else:
          yield from self._collectives_in(instruction.called)

  def _as_collective(self, instruction: Instruction, asynchronous: bool) -> Collective | None:
    """The collective that an instruction is; None if it is none, or one within single devices."""
    if instruction.opcode == "send" and (between := _BETWEEN_SLICES.search(instruction.text)):
      # Between slices the hosts of TPUs exchange data, each device's with that of its counterparts in other slices.
      kind, slices = between["kind"].lower().replace("_", "-"), between["slices"].count(",") + 1
      return Collective(kind, ("data",), _bytes_sent(kind, instruction, slices), 1, True)
    kind = instruction.opcode.removesuffix("-start")
    group = replica_group(instruction.text, self._mesh) if kind in COLLECTIVES else []
    if len(group) < 2:
      return None
    if instruction.computation.startswith(_ALL_REDUCE_SCATTER):
      kind, asynchronous = "reduce-scatter", False
    return Collective(kind, _axes(group, self._mesh), _bytes_sent(kind, instruction, len(group)), 1, asynchronous)

  def _contains(self, computations: Iterable[str], text: str) -> bool:
    """Whether an instruction of one of the computations contains a text."""
    return any(text in instruction.text for name in computations for instruction in self._computations.get(name, ()))


def _trip_count(loop: Instruction, condition: Sequence[Instruction]) -> int:
  """How often a loop runs: as the compiler notes, or the constant that its counter is compared with; else 1."""
  if known := loop.attribute(r'known_trip_count"?[:=]\{"n":"(\d+)"'):
    return int(known)
  constants = {
    i.name: int(value)
    for i in condition
    if i.opcode == "constant" and i.type.startswith("s32[]") and (value := i.attribute(r" constant\((\d+)\)"))
  }
  compared = next((i.attribute(r"\(([^()]*)\), direction=LT") or "" for i in condition if i.is_root), "")
  return next((constants[name] for name in re.findall(r"%([\w.\-]+)", compared) if name in constants), 1)


def _array_bytes(type_: str) -> list[float]:
  """Bytes of each array in a type."""
  item = lambda name: _ITEM_BYTES.get(name) or int(re.sub(r"\D.*", "", name[1:]) or 32) / 8
  return [
    item(name) * math.prod(int(n) for n in dims.split(",") if n)
    for name, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_)
  ]


def _bytes_sent(kind: str, instruction: Instruction, devices: int) -> float:
  """Bytes that one device sends in a collective over so many devices, as `Collective` counts them."""
  starts = instruction.opcode.endswith("-start")
  sizes = _array_bytes(instruction.type)
  # The tuples of a start and a send hold operand and result: the larger of the two is the whole array.
  size = max(sizes) if instruction.opcode == "send" or (starts and kind != "all-reduce") else sum(sizes)
  if kind == "collective-permute":
    return size
  if kind == "reduce-scatter" and not starts and not instruction.computation.startswith(_ALL_REDUCE_SCATTER):
    return size * (devices - 1)  # the result is one device's part
  return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def replica_group(text: str, mesh: dict[str, int]) -> list[int]:
  """The devices of a collective's first group of several, from an instruction's text; without groups all of the mesh.

  Groups are written as source-target pairs, as lists, as a reshaped and transposed iota ([2,4]<=[4,2]T(1,0)), or by
  axes of a mesh.
  """
  if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", text):
    first = next((p for p in pairs[1].split("},{") if len(set(p.split(","))) > 1), "0")
    return [int(n) for n in first.split(",")]
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return [int(n) for n in listed[1].split(",")]
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    devices = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      devices = devices.transpose([int(n) for n in iota[3].split(",")])
    return list(devices.reshape(shape)[0])
  if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
    sizes = {m[1]: int(m[2]) for m in re.finditer(r"'(\w+)'=(\d+)", named[1])}
    axes = re.findall(r"'(\w+)'", named[2])
    index = tuple(slice(None) if name in axes else 0 for name in sizes)
    return list(np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))[index].reshape(-1))
  return list(range(math.prod(mesh.values())))


def _axes(group: Sequence[int], mesh: dict[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ."""
  coordinates = np.stack(np.unravel_index(np.array(group), tuple(mesh.values())))
  return tuple(name for name, along_axis in zip(mesh, coordinates) if len(set(along_axis)) > 1)
