"""Reads what XLA compiled: which collectives run how often over which axes of the mesh, and what the compiler
expects of time.

The text of a compiled program (`Compiled.as_text()`) is a list of computations that call each other; the body of a
loop stands there once and runs as often as the loop says. Everything is counted for one device.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
import re

import numpy as np

from evo_jax.network import flops

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5}
_INSTRUCTION = re.compile(r"(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|true_computation|false_computation|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective as the program states it.

  axes: of the mesh, over which it goes, between slices `data`; empty: over no whole set of axes. bytes: that a device
  sends in one call, were it done around rings: of a whole array of S bytes over g devices S (g - 1) / g, twice that
  for an all-reduce. count: calls a run. hidden: asynchronous, so that computation can hide it.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  count: int
  hidden: bool


@dataclasses.dataclass(frozen=True)
class Work:
  """An instruction that computes: the compiler's estimate of its cycles (TPUs only), 0 where it has none. product: a
  matrix product, or fused with one; kernel: a custom one."""

  cycles: float
  product: bool = False
  kernel: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Begin:
  """A collective begins."""

  collective: Collective


@dataclasses.dataclass(frozen=True)
class End:
  """What began is waited for."""

  begin: Begin


@dataclasses.dataclass(frozen=True)
class Loop:
  """A schedule that runs so many times."""

  times: int
  schedule: tuple["Event", ...]


Event = Work | Begin | End | Loop


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, for one device: what it does, in the order in which it does it."""

  schedule: tuple[Event, ...]

  @functools.cached_property
  def collectives(self) -> tuple[Collective, ...]:
    return tuple(
      dataclasses.replace(e.collective, count=times) for e, times in _flat(self.schedule) if isinstance(e, Begin)
    )

  @functools.cached_property
  def cycles(self) -> dict[bool, float]:
    """Estimated cycles of a run: of what has matrix products (True), and of the rest."""
    found = {True: 0.0, False: 0.0}
    for e, times in _flat(self.schedule):
      if isinstance(e, Work):
        found[e.product] += times * e.cycles
    return found

  @functools.cached_property
  def kernels(self) -> int:
    """Calls of custom kernels."""
    return sum(times for e, times in _flat(self.schedule) if isinstance(e, Work) and e.kernel)

  def moved(self) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends in a run, by kind and axes."""
    total = collections.Counter()
    for c in self.collectives:
      total[c.kind, c.axes] += c.bytes * c.count
    return dict(total)

  def waits(self, cycle: float, kernel: float, took: Callable[[Collective], float]) -> float:
    """Seconds of a run in which nothing is computed, since a collective is waited for.

    A collective runs from its beginning on beside what the schedule has until its end, or after those over the same
    axes that are still under way. cycle, kernel: seconds of one, and of a custom kernel's call; took: of one call of
    a collective.
    """
    return _waits(self.schedule, cycle, kernel, took)[1]


def _flat(schedule: tuple[Event, ...], times: int = 1) -> Iterator[tuple[Event, int]]:
  for e in schedule:
    if isinstance(e, Loop):
      yield from _flat(e.schedule, times * e.times)
    else:
      yield e, times


def _waits(schedule, cycle, kernel, took) -> tuple[float, float]:
  """Seconds that a schedule takes, and those of them that it waits."""
  now, waited, free, ready = 0.0, 0.0, collections.Counter(), {}
  for e in schedule:
    if isinstance(e, Work):
      now += kernel if e.kernel else e.cycles * cycle
    elif isinstance(e, Loop):
      took_once, waited_once = _waits(e.schedule, cycle, kernel, took)
      now, waited = now + e.times * took_once, waited + e.times * waited_once
    elif isinstance(e, Begin):
      axes = e.collective.axes
      ready[e] = free[axes] = max(now, free[axes]) + took(e.collective)
    else:
      wait = max(ready[e.begin] - now, 0.0)
      now, waited = now + wait, waited + wait
  return now, waited


def read_program(text: str, mesh: dict[str, int]) -> Program:
  """Reads a compiled program, whose instructions stand in the order in which they run. mesh: sizes of the axes by
  name, in the order of the devices."""
  computations, entry = _split(text)
  has = lambda names, what: any(what in line for name in names for line in computations.get(name, ()))

  def inside(names: list[str]) -> list[Collective]:
    """What is asked for in computations and in those that they call, apart from loops."""
    found = []
    for name in names:
      for line in computations.get(name, ()):
        if match := _INSTRUCTION.match(line):
          found += own if (own := of(match, line, name, True)) else inside(_calls(line))
    return found

  def of(match: re.Match, line: str, name: str, hidden: bool) -> list[Collective]:
    """The collective that an instruction is, if it is one, and not over single devices."""
    op, type_ = match["op"], match["type"]
    if op == "send" and (
      between := re.search(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"', line)
    ):
      # Between slices a TPU's hosts do it, each device with those in its place in the other slices.
      kind = between[2].lower().replace("_", "-")
      return [Collective(kind, ("data",), _sent(kind, op, type_, between[1].count(",") + 1, name), 1, True)]
    kind = next((k for k in KINDS if op in (k, k + "-start")), None)
    members = _group(line, mesh) if kind else []
    if len(members) < 2:
      return []
    scatters = name.startswith("all-reduce-scatter")
    kind = "reduce-scatter" if scatters else kind
    return [
      Collective(kind, _axes(members, mesh), _sent(kind, op, type_, len(members), name), 1, hidden and not scatters)
    ]

  def begins(match: re.Match, line: str, name: str) -> list[Collective]:
    """Collectives that begin with an instruction."""
    op, called = match["op"], _calls(line)
    if op == "call-start":  # a TPU's SparseCores
      return inside(called)
    if op == "fusion":
      # An asynchronous one on TPUs, with what hides it, stands in several: its beginning, its steps and its end.
      return (
        inside(called)
        if has(called, '"AsyncCollectiveStart"') or any(c.startswith("all-reduce-scatter") for c in called)
        else []
      )
    return of(match, line, name, op.endswith("-start"))

  def ends(match: re.Match, line: str) -> str | None:
    """The instruction with which began what ends with this one."""
    if match["op"] == "fusion" and has(_calls(line), '"AsyncCollectiveDone"'):
      return "-start".join(match["name"].rsplit("-done", 1))
    operand = re.search(r"\(%?([\w.\-]+)", line[match.end() - 1 :]) if match["op"].endswith("-done") else None
    return operand and operand[1]

  @functools.cache
  def schedule(name: str) -> tuple[Event, ...]:
    events, under_way = [], {}
    for line in computations[name]:
      match = _INSTRUCTION.match(line)
      if not match:
        continue
      op, called = match["op"], _calls(line)
      if op == "while":
        condition, body = (re.search(rf"{role}=%?([\w.\-]+)", line)[1] for role in ("condition", "body"))
        events.append(Loop(_trips(line, computations[condition]), schedule(body)))
        continue
      if op in ("call", "conditional", "async-start"):
        events += [e for c in called if not has([c], f"/{flops.SELDOM}/") for e in schedule(c)]
        continue
      events += [End(e) for e in under_way.pop(ends(match, line), ())]
      for begin in map(Begin, begins(match, line, name)):
        events.append(begin)
        if begin.collective.hidden:
          under_way.setdefault(match["name"], []).append(begin)
        else:
          events.append(End(begin))
      kernel = 'custom_call_target="tpu_custom_call"' in line
      estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
      if kernel or (estimate and int(estimate[1]) < 2**62):  # which stands for none
        product = op in ("convolution", "dot") or has(called, " convolution(") or has(called, " dot(")
        events.append(Work(0.0 if kernel else float(estimate[1]), product, kernel))
    return (*events, *(End(e) for some in under_way.values() for e in some))

  return Program(schedule(entry))


def _calls(line: str) -> list[str]:
  return [c for group in _CALLED.findall(line) for c in re.findall(r"%([\w.\-]+)", group)]


def _split(text: str) -> tuple[dict[str, list[str]], str]:
  computations, entry, lines = {}, "", []
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      lines = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line.startswith("  "):
      lines.append(line.strip())
  return computations, entry


def _trips(line: str, condition: list[str]) -> int:
  """How often a loop runs: as noted, or the constant that its counter is compared with; 1 where neither is there."""
  if noted := re.search(r'known_trip_count"?[:=]\{"n":"(\d+)"', line):
    return int(noted[1])
  constants = {m[1]: int(m[2]) for l in condition if (m := re.match(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", l))}
  last = next((l for l in condition if l.startswith("ROOT")), "")
  operands = re.search(r"\(([^()]*)\), direction=LT", last)
  names = re.findall(r"%([\w.\-]+)", operands[1]) if operands else []
  return next((constants[n] for n in names if n in constants), 1)


def _size(type_: str) -> list[float]:
  """Bytes of each array in a type."""
  width = lambda name: _BYTES.get(name) or int(re.sub(r"\D.*", "", name[1:]) or 32) / 8
  return [
    width(name) * math.prod(int(n) for n in dims.split(",") if n)
    for name, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_)
  ]


def _sent(kind: str, op: str, type_: str, devices: int, computation: str) -> float:
  sizes = _size(type_)
  total = max(sizes) if op == "send" or (op.endswith("-start") and kind != "all-reduce") else sum(sizes)
  share = (devices - 1) / devices
  if kind == "collective-permute":
    return total
  if kind == "reduce-scatter" and not computation.startswith("all-reduce-scatter") and not op.endswith("-start"):
    return total * (devices - 1)  # the result is a part
  return total * share * (2 if kind == "all-reduce" else 1)


def _group(line: str, mesh: dict[str, int]) -> list[int]:
  """The devices of the first group of a collective that has several."""
  if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", line):
    first = next((p for p in pairs[1].split("},{") if len(set(p.split(","))) > 1), "0")
    return [int(n) for n in first.split(",")]
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return [int(n) for n in listed[1].split(",")]
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    devices = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      devices = devices.transpose([int(n) for n in iota[3].split(",")])
    return list(devices.reshape(shape)[0])
  if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = {m[1]: int(m[2]) for m in re.finditer(r"'(\w+)'=(\d+)", named[1])}
    used = re.findall(r"'(\w+)'", named[2])
    index = tuple(slice(None) if name in used else 0 for name in sizes)
    return list(np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))[index].reshape(-1))
  return list(range(math.prod(mesh.values())))


def _axes(members: Sequence[int], mesh: dict[str, int]) -> tuple[str, ...]:
  places = np.stack(np.unravel_index(np.array(members), tuple(mesh.values())))
  return tuple(name for name, along in zip(mesh, places) if len(set(along)) > 1)
