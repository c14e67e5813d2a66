"""The device mesh, the sharding rules, and how a network computes on a mesh.

Axes of the mesh: `data` (replicas of the parameters), `fsdp` (parameters and optimizer state in shards, all-gathered
where they are used), `tensor` (heads, hidden units and vocabulary in shards). One device is the mesh (1, 1, 1).

Training uses `shard_map` with manual axes `data` and `fsdp` (`map_batch_shards`): each shard of the batch computes as
if it were alone, parameters are all-gathered where they are used, and their gradients are reduce-scattered there, once
for all that a use adds up. The compiler partitions along `tensor`, and everything outside of training.
"""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Any

from flax.core import meta
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Logical axis -> axis or axes of the mesh (None: replicated)."""

  batch: Any = BATCH_AXES
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
  rank: Any = None
  # Activations.
  slots: Any = None
  width: Any = None

  def spec(self, names: tuple[str | None, ...], tensor: int = 1) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes on a mesh with `tensor` devices along that axis.

    Without tensor parallelism a table of the vocabulary, (vocab, embed), is sharded along the vocabulary axis over
    what its columns are sharded over otherwise: TPUs gather and scatter rows without transposing the table. Beside
    shards over `tensor`, rows that are gathered over `fsdp` would not stand in order. Raises AttributeError for an
    unknown name, ValueError where a mesh axis is used twice.
    """
    rules = self
    if {"vocab", "embed"} <= set(names) and self.embed and tensor == 1:
      rules = dataclasses.replace(self, vocab=self.embed, embed=None)
    axes = [getattr(rules, name) if name is not None else None for name in names]
    used = [a for axis in axes for a in _axes(axis)]
    if len(used) != len(set(used)):
      raise ValueError(f"logical axes {names} use a mesh axis twice: {axes}")
    return PartitionSpec(*axes)


RULES = ShardingRules()


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a network computes on a mesh: decided once by `Layout.of`, handed down as a static field.

  rules: logical axes to mesh axes. sizes: devices along AXES. manual: the axes of an enclosing `shard_map`; a
  network's parameters are shards over them. platform: "cpu", "gpu" or "tpu", what the program will run on.
  gathers_tables_by_chunk: whether tables of the vocabulary are all-gathered chunk by chunk inside a loop, instead of
  whole. The default is one device without kernels of its own: plain XLA operations, no mesh.
  """

  rules: ShardingRules = RULES
  sizes: tuple[int, int, int] = (1, 1, 1)
  manual: tuple[str, ...] = ()
  platform: str = "cpu"
  gathers_tables_by_chunk: bool = True

  @classmethod
  def of(cls, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES) -> "Layout":
    """The layout for a mesh, whose devices need not be at hand."""
    platform = _platform(mesh)
    # CPU processes do not run collectives that are independent of each other in one order: where one is inside a loop
    # and one is not, each process may begin with another, and all wait without end (jaxlib 0.10.2, Gloo).
    ordered = jax.process_count() == 1 or platform != "cpu"
    return cls(rules, tuple(mesh.shape[axis] for axis in AXES), (), platform, ordered)

  @property
  def flattens_products(self) -> bool:
    """Whether a product's rows are made one axis first. XLA's CPU backward pass takes twice as long over products of
    more axes; on TPUs the reshape costs copies."""
    return self.platform != "tpu"

  @property
  def rotates_by_product(self) -> bool:
    """Whether rotary embeddings swap the halves of a head by a matrix product (`rotary.apply_rotary_by_product`)."""
    return self.platform == "tpu"

  def size(self, axis: str) -> int:
    """Devices along an axis of the mesh."""
    return self.sizes[AXES.index(axis)]

  def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; see `ShardingRules.spec`."""
    return self.rules.spec(names, self.size("tensor"))

  def per_batch_shard(self) -> "Layout":
    """The layout inside `map_batch_shards`."""
    if not self._batch_axes:
      return self
    # Only what has to be partitioned is left to the compiler: if that is nothing, its partitioner stays out.
    return dataclasses.replace(
      self, manual=tuple(axis for axis in AXES if axis in self._batch_axes or self.size(axis) == 1)
    )

  def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the layout of an activation along the axes that are not manual. On one device it does nothing; elsewhere
    the mesh must be set (`jax.set_mesh`)."""
    automatic = self._automatic_axes
    if not automatic:
      return x
    return jax.lax.with_sharding_constraint(x, _restricted(self.spec(names), automatic))

  def per_device(
    self, function: Callable, names: Sequence[tuple[str, ...]], result: tuple[str | None, ...]
  ) -> Callable:
    """function(*arrays) on every device's shard of them: for kernels, which the compiler cannot partition.

    names: the leading logical axes of each argument's arrays, () for what is replicated; result: those of the result.
    """
    automatic = self._automatic_axes
    if not automatic:
      return function
    spec = lambda axes: _restricted(self.spec(axes), automatic)
    return jax.shard_map(
      function,
      in_specs=tuple(spec(axes) for axes in names),
      out_specs=spec(result),
      axis_names=set(automatic),
      check_vma=False,
    )

  def gathered_axis(self, names: tuple[str | None, ...]) -> int | None:
    """Which axis of a parameter is sharded over a manual `fsdp`; None: none."""
    if "fsdp" not in self.manual or self.size("fsdp") == 1:
      return None
    return next((i for i, axis in enumerate(self.spec(names)) if "fsdp" in _axes(axis)), None)

  def gather(self, x: jax.Array, names: tuple[str | None, ...], dtype: Any) -> jax.Array:
    """A parameter, all-gathered in `dtype` along its `gathered_axis`; unchanged where it has none.

    Its gradient comes back in the same dtype, reduce-scattered.
    """
    i = self.gathered_axis(names)
    if i is None:
      return x

    def whole(x):
      flat = x.astype(dtype).reshape(_flat_for_gather(x.shape, i))
      gathered = jax.lax.all_gather(flat, "fsdp", axis=i if flat.ndim == x.ndim else min(i, 1), tiled=True)
      return gathered.reshape(*x.shape[:i], -1, *x.shape[i + 1 :]).astype(x.dtype)

    # Each device of `tensor` gathers its own shard, which the compiler would make whole first.
    return self.per_device(whole, (names,), names)(x)

  def map_batch_shards(self, function: Callable, params_specs: Any, frozen_specs: Any, gradients: int) -> Callable:
    """function(params, frozen, shared, batch) for each shard of the batch by itself, as if it were alone.

    `function` gets its shard of the parameters, trained and frozen (`gather` makes them whole), `shared` as it is, and
    its rows of the batch's trees. It returns `gradients` trees like `params`, which are summed over the shards; a tree
    of totals, which are summed, too; and a tree of arrays with the batch's rows in front. Over `data`, gradients are
    summed in their own dtype, once. With a single shard it is the function itself.
    """
    axes = self._batch_axes
    if not axes:  # the compiler's partitioner fails on manual sums along axes of one device
      return function
    params, frozen = jax.tree.map(
      lambda s: _restricted(s, axes), (params_specs, frozen_specs), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    rows = _restricted(self.spec(("batch",)), axes)

    def sum_gradient(gradient, spec):
      scattered = [a for axis in spec for a in _axes(axis)]  # summed where it was reduce-scattered
      return jax.lax.psum(gradient, tuple(a for a in axes if a not in scattered))

    def per_shard(params_shard, frozen_shard, shared, batch):
      trees, totals, arrays = function(params_shard, frozen_shard, shared, batch)
      trees = tuple(jax.tree.map(sum_gradient, tree, params) for tree in trees)
      return trees, jax.lax.psum(totals, axes), arrays

    return jax.shard_map(
      per_shard,
      in_specs=(params, frozen, PartitionSpec(), rows),
      out_specs=((params,) * gradients, PartitionSpec(), rows),
      axis_names=set(self.per_batch_shard().manual),
      check_vma=False,
    )

  @property
  def _batch_axes(self) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if self.size(axis) > 1)

  @property
  def _automatic_axes(self) -> tuple[str, ...]:
    """The axes that the compiler partitions along; none on one device."""
    if max(self.sizes) == 1:
      return ()
    return tuple(axis for axis in AXES if axis not in self.manual)


def _platform(mesh: Mesh | AbstractMesh) -> str:
  if isinstance(mesh, Mesh):
    return mesh.devices.flat[0].platform
  kind = mesh.abstract_device.device_kind
  return "tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu"


def _flat_for_gather(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  """The shape in which an array is gathered along an axis: of two axes, where it is first or last.

  TPUs pad the last two axes, and scatter a gradient whose last axis but one has two elements only by way of the whole
  sum.
  """
  if axis not in (0, len(shape) - 1):
    return shape
  return (shape[0], -1) if axis == 0 else (-1, shape[-1])


def _axes(axis: Any) -> tuple[str, ...]:
  return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _restricted(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
  """The spec along some axes of the mesh."""
  kept = (tuple(a for a in _axes(axis) if a in axes) for axis in spec)
  return PartitionSpec(*(None if not k else k[0] if len(k) == 1 else k for k in kept))


def _is_boxed(x: Any) -> bool:
  return isinstance(x, meta.Partitioned)


def specs(layout: Layout, boxed: Any) -> Any:
  """PartitionSpecs of a tree whose parameters carry logical axes (boxes of `flax.core.meta`); of what carries none,
  the empty one."""
  return jax.tree.map(lambda x: layout.spec(x.names) if _is_boxed(x) else PartitionSpec(), boxed, is_leaf=_is_boxed)


def parse_mesh(text: str, mesh: config_lib.Mesh) -> config_lib.Mesh:
  """The mesh with the sizes that AXIS:SIZE,... replaces. Raises UserError."""
  sizes = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition(":")
    if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
      raise UserError(f"--mesh={text!r}: {part!r} is not AXIS:SIZE with one of the axes {', '.join(AXES)}")
    sizes[name] = int(size)
  return dataclasses.replace(mesh, **sizes)


def mesh_sizes(config: config_lib.Mesh, devices: int) -> tuple[int, ...]:
  """The sizes of the mesh's axes over so many devices. Raises UserError where they do not fit."""
  sizes = [getattr(config, axis) for axis in AXES]
  if -1 in sizes:
    others = int(np.prod([s for s in sizes if s != -1]))
    if devices % others:
      raise UserError(f"{_describe(sizes)} does not divide {devices} devices")
    sizes[sizes.index(-1)] = devices // others
  if int(np.prod(sizes)) != devices:
    raise UserError(f"{_describe(sizes)} needs {int(np.prod(sizes))} devices, here are {devices}")
  return tuple(sizes)


def _describe(sizes: Sequence[int]) -> str:
  return f"--mesh or config.mesh: {dict(zip(AXES, sizes))}"


def all_devices() -> list[jax.Device]:
  """The devices of all processes. Raises UserError where JAX cannot initialize the platform that it is told to use."""
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # AssertionError: a CUDA plugin that is not installed (jax 0.10.2)
    reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0] or "there is no such device"
    raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms}: cannot be used here ({reason})") from error


def make_mesh(config: config_lib.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over all devices of all processes, or over the given ones. Raises UserError where the sizes do not fit
  their number.

  Of several TPU slices, between which the network is slow, each holds whole replicas of the parameters: `data`
  spans them.
  """
  devices = all_devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
  if sizes[0] % slices:
    raise UserError(f"--mesh or config.mesh: data = {sizes[0]} does not divide into {slices} slices")
  if slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(
      (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(mesh: Mesh, boxed: Any, rules: ShardingRules = RULES) -> Any:
  """NamedShardings of a tree whose parameters carry logical axes (boxes of `flax.core.meta`); what carries none is
  replicated.

  Takes shapes (`jax.eval_shape`) as well as arrays; the result has the structure of the tree without boxes. Raises
  UserError where a size does not divide the mesh, naming parameter, axis and size.
  """

  def named_sharding(path, leaf):
    if not _is_boxed(leaf):
      return NamedSharding(mesh, PartitionSpec())
    spec = rules.spec(leaf.names, mesh.shape["tensor"])
    for size, name, axis in zip(leaf.value.shape, leaf.names, spec):
      parts = int(np.prod([mesh.shape[a] for a in _axes(axis)]))
      if size % parts:
        raise UserError(
          f"--mesh or config.mesh: {parts} devices do not divide the {size} {name} of parameter "
          f"{jax.tree_util.keystr(path, simple=True, separator='.')}"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(named_sharding, boxed, is_leaf=_is_boxed)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: ShardingRules = RULES) -> NamedSharding:
  """The sharding of arrays with the batch's rows in front."""
  return NamedSharding(mesh, rules.spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
  """Into how many shards the rows of a batch are cut."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_rows(mesh: Mesh, size: int, rules: ShardingRules = RULES) -> list[int]:
  """The rows of a global batch of `size` that this process's devices hold, in order; on a mesh whose tensor axis
  crosses processes several hold the same."""
  indices = batch_sharding(mesh, rules).addressable_devices_indices_map((size,))
  return sorted({row for (rows,) in indices.values() for row in range(*rows.indices(size))})


def global_batch(mesh: Mesh, batch: Batch, size: int, rules: ShardingRules = RULES) -> Batch:
  """The sharded global arrays of `size` rows, of which `batch` holds the `batch_rows` of this process."""
  rows = batch_rows(mesh, size, rules)

  def global_array(local: np.ndarray) -> jax.Array:
    def shard(index):
      wanted = range(*index[0].indices(size))
      first = rows.index(wanted[0])  # a device's rows follow one another, here too
      return local[first : first + len(wanted)]

    return jax.make_array_from_callback((size, *local.shape[1:]), batch_sharding(mesh, rules), shard)

  return jax.tree.map(global_array, batch)
