"""TPU chips, topologies of pods, and the bandwidth of their links."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from evo_jax.errors import UserError
from evo_jax.network import flops

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip.

  hbm: GiB that a program may use. clock: cycles per second. link: bytes per second that one link sends in one
  direction. torus: an axis of a slice is closed to a ring where its size is a multiple of this.
  """

  kind: str
  hbm: float
  clock: float
  link: float
  torus: int

  @property
  def peak(self) -> float:
    """Dense bfloat16 FLOPs per second."""
    return flops.peak_flops(self.kind)


# HBM as the compiler states it; clocks are the peak over the FLOPs per cycle; links from the maker's data sheets.
CHIPS = {
  "v5e": Chip("TPU v5 lite", 15.75, 1.5e9, 45e9, 16),
  "v5p": Chip("TPU v5", 95.74, 1.75e9, 90e9, 4),
  "v6e": Chip("TPU v6 lite", 31.25, 1.75e9, 90e9, 16),
}
DCN = 6.25e9  # bytes per second and chip between slices: 200 Gbit/s for a host of four chips


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` slices of a pod, each of chips in a grid of `shape`. name: as given to --topology."""

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int

  @property
  def chips(self) -> int:
    return self.slices * math.prod(self.shape)


def has_compiler() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


def parse_topology(text: str) -> Topology:
  """Parses CHIP:AxB[xC] or N*CHIP:AxB[xC]. Raises UserError."""
  match = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
  if not match or match[2] not in CHIPS:
    raise UserError(f"--topology={text!r}: is not CHIP:AxB or CHIP:AxBxC with one of the chips {', '.join(CHIPS)}")
  return Topology(text, CHIPS[match[2]], tuple(int(n) for n in match[3].split("x")), int(match[1] or 1))


def compiler_devices(topology: Topology) -> list[Any]:
  """Devices of a topology to compile for, from the TPU compiler. Raises UserError if it knows no such topology."""
  for name, value in {  # or it looks for TPUs
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }.items():
    os.environ.setdefault(name, value)
  options = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name.split("*")[-1], **options
    ).devices
  except Exception as error:  # whatever the plugin raises
    raise UserError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from error
  kind = devices[0].device_kind
  if len(devices) != topology.chips or not kind.startswith(topology.chip.kind):
    raise UserError(f"--topology={topology.name}: the compiler has {len(devices)} devices {kind} for it")
  return list(devices)


def bandwidth(axes: tuple[str, ...], mesh: jax.sharding.Mesh, topology: Topology) -> float:
  """Bytes per second that a chip sends in a collective over these mesh axes.

  It uses one link in each direction along every physical axis that the mesh axes cover; on an axis that is not closed
  to a ring only one direction counts.
  """
  if topology.slices > 1 and "data" in axes:
    return DCN
  chip = topology.chip
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  coordinates = np.array([d.coords for d in mesh.devices[index].reshape(-1)])
  sizes = np.array([d.coords for d in mesh.devices.reshape(-1)]).max(axis=0) + 1
  total = 0.0
  for along_axis, size in zip(coordinates.T, sizes):
    covered = len(set(along_axis.tolist()))
    if covered > 1:
      is_ring = covered == size and size % chip.torus == 0
      total += (2.0 if is_ring else 1.0) * chip.link
  return total or chip.link


def format_gib(size: float | None) -> str:
  """Bytes in GiB as text; None: not known."""
  return "not known" if size is None else f"{size / GIB:.2f}"
