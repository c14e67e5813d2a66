"""The device mesh and the one set of rules by which everything is laid out on it.

Axes of the mesh: `data` (copies of the parameters), `fsdp` (parameters and optimizer state in shards, gathered where
they are used), `tensor` (heads, hidden units and vocabulary in shards). One device is the mesh (1, 1, 1).

Training runs by hand over `data` and `fsdp` (`by_shard`): each shard of the batch computes as if it were alone,
parameters are gathered where they are used and gradients are scattered where they come back, once for all that a use
adds up. The compiler lays out `tensor`, and everything outside of training.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from flax.core import meta
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from evo_jax import config as config_lib
from evo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Logical axis -> axis or axes of the mesh (None: every device holds all of it)."""

  batch: Any = ("data", "fsdp")
  # Parameters.
  layers: Any = None
  embed: Any = "fsdp"
  heads: Any = "tensor"
  kv_heads: Any = "tensor"
  head_dim: Any = None
  mlp: Any = "tensor"
  vocab: Any = "tensor"
  norm: Any = None
  code: Any = None
  time: Any = None
  # Activations.
  slots: Any = None
  width: Any = None

  def spec(self, names: tuple[str | None, ...], tensor: int | None = None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes. Raises on an unknown name or a mesh axis used twice.

    tensor: devices along that axis; None: of the mesh in place. Where it is one, a table of the vocabulary,
    (vocab, embed), lies by its rows over what its columns lie over otherwise: TPUs gather and scatter rows without
    turning the table over. Beside parts over `tensor`, rows that are gathered over `fsdp` would not stand in order.
    """
    rules = self
    if {"vocab", "embed"} <= set(names) and self.embed and (axis_size("tensor") if tensor is None else tensor) == 1:
      rules = dataclasses.replace(self, vocab=self.embed, embed=None)
    axes = [getattr(rules, name) if name is not None else None for name in names]
    used = [a for axis in axes if axis is not None for a in (axis if isinstance(axis, tuple) else (axis,))]
    if len(used) != len(set(used)):
      raise ValueError(f"logical axes {names} use a mesh axis twice: {axes}")
    return PartitionSpec(*axes)

  def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the layout of an activation, on axes that are not laid out by hand; outside a mesh (`jax.set_mesh`) it
    does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    rest = set(AXES) - set(mesh.manual_axes)
    if mesh.empty or not rest:
      return x
    return jax.lax.with_sharding_constraint(x, _only(self.spec(names), rest))

  def by_device(self, function: Callable, names: Sequence[tuple[str, ...]], result: tuple[str | None, ...]) -> Callable:
    """function(*arrays) on every device's part of them: for kernels, which the compiler cannot lay out.

    names: the leading logical axes of each argument's arrays, () for what every device has whole; result: those
    of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rest = set(AXES) - set(mesh.manual_axes)
    if mesh.empty or not rest:
      return function
    spec = lambda axes: _only(self.spec(axes), rest)
    return jax.shard_map(
      function, in_specs=tuple(spec(axes) for axes in names), out_specs=spec(result), axis_names=rest, check_vma=False
    )

  def gathered(self, names: tuple[str | None, ...]) -> int | None:
    """Which axis of a parameter lies over `fsdp`, where a shard computes by hand; None: none, or elsewhere."""
    if not in_shard_map() or axis_size("fsdp") == 1:
      return None
    return next((i for i, axis in enumerate(self.spec(names)) if "fsdp" in _axes(axis)), None)

  def gather(self, x: jax.Array, names: tuple[str | None, ...], dtype: Any) -> jax.Array:
    """A parameter whole along the axis that is `gathered`; as it is where there is none.

    It travels in `dtype`, and so does its gradient on its way back, which is summed over the shards and scattered.
    """
    i = self.gathered(names)
    if i is None:
      return x

    def whole(x):
      flat = x.astype(dtype).reshape(_flat(x.shape, i))
      found = jax.lax.all_gather(flat, "fsdp", axis=i if flat.ndim == x.ndim else min(i, 1), tiled=True)
      return found.reshape(*x.shape[:i], -1, *x.shape[i + 1 :]).astype(x.dtype)

    # Each device of `tensor` gathers its own part, which the compiler would make whole first.
    return self.by_device(whole, (names,), names)(x)


def _flat(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  """The shape in which an array is gathered along an axis: of two axes, where it is first or last.

  TPUs pad the last two axes, and scatter a gradient whose last but one has two elements only by way of the whole sum.
  """
  if axis not in (0, len(shape) - 1):
    return shape
  return (shape[0], -1) if axis == 0 else (-1, shape[-1])


RULES = ShardingRules()
BY_HAND = ("data", "fsdp")


def _axes(axis: Any) -> tuple[str, ...]:
  return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _only(spec: PartitionSpec, axes) -> PartitionSpec:
  """The spec on some axes of the mesh."""
  kept = (tuple(a for a in _axes(axis) if a in axes) for axis in spec)
  return PartitionSpec(*(None if not k else k[0] if len(k) == 1 else k for k in kept))


def in_shard_map() -> bool:
  """Whether this is traced for one shard of the batch (`by_shard`)."""
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def axis_size(name: str) -> int:
  """Devices along an axis of the mesh; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[name]


def platform() -> str:
  """What the code that is traced will run on: "cpu", "gpu" or "tpu"; the mesh's devices, which need not be at hand."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  if device is None:
    return jax.default_backend()
  kind = device.device_kind
  return "tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu"


def keeps_collective_order() -> bool:
  """Whether processes run collectives that do not wait for each other's results in one order. Those of CPUs do not:
  where one is inside a loop and one is not, each process may begin with another, and all wait without end (jaxlib
  0.10.2, Gloo)."""
  return jax.process_count() == 1 or platform() != "cpu"


def specs(boxed: Any, rules: ShardingRules = RULES) -> Any:
  """PartitionSpecs of a tree whose parameters carry logical axes (boxes of `flax.core.meta`); of what carries none,
  the empty one."""
  return jax.tree.map(lambda x: rules.spec(x.names) if _is_boxed(x) else PartitionSpec(), boxed, is_leaf=_is_boxed)


def _is_boxed(x: Any) -> bool:
  return isinstance(x, meta.Partitioned)


def per_shard(function: Callable, params_specs: Any, gradients: int, rules: ShardingRules = RULES) -> Callable:
  """function(params, shared, batch) for each shard of the batch by itself, as if it were alone.

  `function` gets its shard of the parameters (`gather` makes them whole), `shared` as it is, and its rows of the
  batch's trees. It returns `gradients` trees like the parameters, which are averaged over the shards; a tree of
  totals, which are summed; and a tree of arrays with the batch's rows in front. Over `data`, gradients travel in
  their own dtype, once. Outside a mesh it is the function.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in BY_HAND if axis_size(axis) > 1)
  if not axes:  # the compiler's partitioner fails over sums by hand along axes of one device
    return function
  # What is left to the compiler is what it has to lay out: if that is nothing, its partitioner does not come between.
  manual = set(axes) | {axis for axis in AXES if axis_size(axis) == 1}
  shards = math.prod(mesh.shape[axis] for axis in axes)
  params = jax.tree.map(lambda spec: _only(spec, axes), params_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
  rows = _only(rules.spec(("batch",)), axes)

  def mean(gradient, spec):
    # Over fsdp, on the way, where the parameter is scattered over it.
    summed = [a for axis in spec for a in _axes(axis)]
    return jax.lax.psum(gradient, tuple(a for a in axes if a not in summed)) / shards

  def one(local, shared, batch):
    found, totals, arrays = function(local, shared, batch)
    found = tuple(jax.tree.map(mean, gradient, params) for gradient in found)
    return found, jax.lax.psum(totals, axes), arrays

  return jax.shard_map(
    one,
    in_specs=(params, PartitionSpec(), rows),
    out_specs=((params,) * gradients, PartitionSpec(), rows),
    axis_names=manual,
    check_vma=False,
  )


def mesh_sizes(config: config_lib.Mesh, devices: int) -> tuple[int, ...]:
  """The sizes of the mesh's axes over so many devices. Raises UserError where they do not fit."""
  sizes = [getattr(config, axis) for axis in AXES]
  if -1 in sizes:
    others = int(np.prod([s for s in sizes if s != -1]))
    if devices % others:
      raise UserError(f"config.mesh: {dict(zip(AXES, sizes))} does not divide {devices} devices")
    sizes[sizes.index(-1)] = devices // others
  if int(np.prod(sizes)) != devices:
    raise UserError(f"config.mesh: {dict(zip(AXES, sizes))} needs {int(np.prod(sizes))} devices, here are {devices}")
  return tuple(sizes)


def make_mesh(config: config_lib.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over all devices of all processes, or over the given ones. Raises UserError where the sizes do not fit
  their number.

  Of several TPU slices, between which the network is slow, each holds whole copies of the parameters: `data`
  goes over them.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
  if sizes[0] % slices:
    raise UserError(f"config.mesh.data: {sizes[0]} does not divide into {slices} slices")
  if slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(
      (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(mesh: Mesh, boxed: Any, rules: ShardingRules = RULES) -> Any:
  """NamedShardings of a tree whose parameters carry logical axes (boxes of `flax.core.meta`); what carries none is replicated.

  Takes shapes (`jax.eval_shape`) as well as arrays; the result has the structure of the tree without boxes. Raises
  UserError where a size does not divide the mesh, naming parameter, axis and size.
  """

  def one(path, leaf):
    if not _is_boxed(leaf):
      return NamedSharding(mesh, PartitionSpec())
    spec = rules.spec(leaf.names, mesh.shape["tensor"])
    for size, name, axis in zip(leaf.value.shape, leaf.names, spec):
      parts = int(np.prod([mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())]))
      if size % parts:
        raise UserError(
          f"config.mesh: {parts} devices do not divide the {size} {name} of parameter "
          f"{jax.tree_util.keystr(path, simple=True, separator='.')}"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_boxed)


def batch_rows(mesh: Mesh, size: int, rules: ShardingRules = RULES) -> list[int]:
  """The rows of a global batch of `size` that this process's devices hold, in order; on a mesh whose tensor axis
  crosses processes several hold the same."""
  places = NamedSharding(mesh, rules.spec(("batch",))).addressable_devices_indices_map((size,))
  return sorted({row for (rows,) in places.values() for row in range(*rows.indices(size))})


def global_batch(mesh: Mesh, batch: np.ndarray, size: int, rules: ShardingRules = RULES) -> jax.Array:
  """The sharded global array of `size` rows, of which `batch` holds the `batch_rows` of this process."""
  rows = batch_rows(mesh, size, rules)
  sharding = NamedSharding(mesh, rules.spec(("batch",)))

  def part(index):
    wanted = range(*index[0].indices(size))
    first = rows.index(wanted[0])  # a device's rows follow one another, here too
    return batch[first : first + len(wanted)]

  return jax.make_array_from_callback((size, *batch.shape[1:]), sharding, part)
