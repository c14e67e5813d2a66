"""Reads what XLA compiled: which collectives run how often over which axes of the mesh, and what the compiler expects of time.

The text of a compiled program (`Compiled.as_text()`) is a list of computations that call each other; the body of a loop stands there
once and runs as often as the loop says. Everything is counted for one device.
"""

import collections
import dataclasses
import math
import re
from typing import Sequence

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5}
_INSTRUCTION = re.compile(r"(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective as the program states it.

  axes: of the mesh, over which it goes, between slices `data`; empty: over no whole set of axes. bytes: that a device sends in one call, were it done around
  rings: of a whole array of S bytes over g devices S (g - 1) / g, twice that for an all-reduce. count: calls a run. hidden:
  asynchronous, so that computation can hide it.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  count: int
  hidden: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, for one device. Cycles are the compiler's own estimates (TPUs only): of what has matrix products, and of the
  rest; unpriced: calls of instructions for which it has none, of which kernels: calls of custom kernels."""

  collectives: tuple[Collective, ...]
  matrix_cycles: float
  other_cycles: float
  unpriced: int
  kernels: int

  def moved(self, hidden: bool | None = None) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends in a run, by kind and axes; of all collectives, or of those that are `hidden` or not."""
    total = collections.Counter()
    for c in self.collectives:
      if hidden is None or c.hidden == hidden:
        total[c.kind, c.axes] += c.bytes * c.count
    return dict(total)


def read(text: str, mesh: dict[str, int]) -> Program:
  """Reads a compiled program. mesh: sizes of the axes by name, in the order of the devices."""
  computations, entry = _split(text)
  found, cycles, unpriced, kernels = [], {True: 0.0, False: 0.0}, 0, 0
  has_product = lambda name: any(" convolution(" in line or " dot(" in line for line in computations.get(name, ()))

  def walk(name: str, times: int, timed: bool, aside: bool = False) -> None:
    """timed: the instructions run one after another; within a fusion, the fusion has the estimate. aside: they run beside others."""
    nonlocal unpriced, kernels
    for line in computations[name]:
      match = _INSTRUCTION.match(line)
      if not match:
        continue
      op = match["op"]
      if op == "while":
        condition, body = (re.search(rf"{role}=%?([\w.\-]+)", line)[1] for role in ("condition", "body"))
        walk(body, times * _trips(line, computations[condition]), timed)
        continue
      if kind := next((k for k in KINDS if op in (k, k + "-start")), None):
        scatters = name.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scatters else kind
        members = _group(line, mesh)
        # An asynchronous one on TPUs stands in several fusions: its beginning, its steps and its end.
        later = not timed and not scatters and not aside and not any(
            "AsyncCollectiveStart" in l and f"%{match['name']}" in l for l in computations[name])
        if len(members) > 1 and not later:
          found.append(Collective(kind, _axes(members, mesh), _sent(kind, op, match["type"], len(members), name), times,
                                  op.endswith("-start") or not timed and not scatters))
      if op == "send" and (between := re.search(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"', line)):
        # Between slices a TPU's hosts do it, each device with those in its place in the other slices.
        kind = between[2].lower().replace("_", "-")
        found.append(Collective(kind, ("data",), _sent(kind, op, match["type"], between[1].count(",") + 1, name), times, True))
      called = [c for group in _CALLED.findall(line) for c in re.findall(r"%([\w.\-]+)", group)]
      if timed and (estimate := re.search(r'"estimated_cycles":"(\d+)"', line)):
        if int(estimate[1]) < 2**62:
          product = op in ("convolution", "dot") or any(has_product(c) for c in called)
          cycles[product] += times * int(estimate[1])
        else:
          unpriced += times
      if 'custom_call_target="tpu_custom_call"' in line:
        kernels += times
        unpriced += times
      if op not in ("all-reduce", "reduce-scatter", "reduce", "scatter", "sort", "reduce-window", "map", "select-and-scatter"):
        for c in called:
          walk(c, times, timed and op in ("call", "conditional", "async-start"), op == "call-start")  # a TPU's SparseCores

  walk(entry, 1, True)
  return Program(tuple(found), cycles[True], cycles[False], unpriced, kernels)


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
  return [width(name) * math.prod(int(n) for n in dims.split(",") if n)
          for name, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_)]


def _sent(kind: str, op: str, type_: str, devices: int, computation: str) -> float:
  sizes = _size(type_)
  total = max(sizes) if op == "send" or op.endswith("-start") and kind != "all-reduce" else sum(sizes)
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
