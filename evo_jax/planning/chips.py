"""TPU chips and topologies."""

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
    return flops.peak_flops(self.kind)


# HBM as the compiler states it; clocks are the peak over the operations of a cycle; links by the makers' data.
CHIPS = {
  "v5e": Chip("TPU v5 lite", 15.75, 1.5e9, 45e9, 16),
  "v5p": Chip("TPU v5", 95.74, 1.75e9, 90e9, 4),
  "v6e": Chip("TPU v6 lite", 31.25, 1.75e9, 90e9, 16),
}
DCN = 6.25e9  # bytes a second and chip between slices: 200 Gbit/s a host of four chips


def has_compiler() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...], int]:
  """The chip, the shape of a slice and the number of slices of CHIP:AxB[xC] or N*CHIP:AxB[xC]. Raises UserError."""
  match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", text)
  if not match or match[2] not in CHIPS:
    raise UserError(f"--topology={text!r}: is not CHIP:AxB or CHIP:AxBxC with one of the chips {', '.join(CHIPS)}")
  return CHIPS[match[2]], tuple(int(n) for n in match[3].split("x")), int(match[1] or 1)


def devices_of(topology: str) -> list[Any]:
  """The devices of a pod that is not there, from the TPU compiler. Raises UserError where it knows no such shape."""
  chip, shape, slices = parse_topology(topology)
  for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }.items():
    os.environ.setdefault(name, value)  # it looks for TPUs otherwise
  name = topology.split("*")[-1]
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **({"num_slices": slices} if slices > 1 else {})
    ).devices
  except Exception as error:  # whatever the plugin raises
    raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
  if len(found) != slices * math.prod(shape) or not found[0].device_kind.startswith(chip.kind):
    raise UserError(f"--topology={topology}: the compiler has {len(found)} devices {found[0].device_kind} for it")
  return list(found)


def bandwidth(axes: tuple[str, ...], mesh: jax.sharding.Mesh, chip: Chip, slices: int) -> float:
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


def gib(size: float | None) -> str:
  return "not known" if size is None else f"{size / GIB:.2f}"
