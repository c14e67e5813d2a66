"""A model on its devices, and the programs that decode with it: the one place that compiles."""

from collections.abc import Callable, Iterator
import contextlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from evo_jax.decoding.state import DecodingState
from evo_jax.errors import UserError
from evo_jax.parallel import sharding
from evo_jax.run import Run


class DeviceModel:
  """A model laid out over a mesh for decoding, and programs over it, each compiled once, before its first run."""

  def __init__(self, run: Run, mesh: jax.sharding.Mesh):
    """Raises UserError where a parameter is no number, as after training that diverged: no text would mean anything."""
    self.mesh = mesh
    self.compile_seconds = 0.0
    self._replicated = sharding.replicated(mesh)
    self._model = run.model.clone(stacked=False, layout=sharding.Layout.of(mesh))
    self._params = run.unstacked_params(mesh)
    if not _all_finite(self._params):
      raise UserError(f"the parameters of step {run.step} are not all finite numbers: training diverged before it")
    self._statistics = jax.jit(lambda s: s, out_shardings=self._replicated)(run.statistics)
    self._replicate = jax.jit(lambda x: x, out_shardings=self._replicated)
    self._compiled = {}

  @property
  def compilations(self) -> int:
    """Programs that were compiled so far."""
    return len(self._compiled)

  @property
  def vocab_rows(self) -> int:
    """V: rows of the model's tables."""
    return self._model.rows

  @property
  def row_multiple(self) -> int:
    """A batch's rows must be a multiple of this."""
    return sharding.batch_shards(self.mesh)

  def run(self, name: tuple, program: Callable, *args: Any, rehearse: Callable | None = None) -> Any:
    """program(net, statistics, *args), compiled once for each name, and structure, shapes and dtypes of the arguments.

    The name must tell programs apart that differ in what they close over. Decoding states among the arguments are
    donated; those among the results are sharded by rows, all else is replicated. rehearse: called with the arguments of
    a new program once it is compiled, as a part of that; may run it, and gives the arguments back.
    """
    signature = tuple((x.shape, x.dtype) for x in jax.tree.leaves(args))
    key = (name, jax.tree.structure(args), signature)
    if key not in self._compiled:
      start = time.perf_counter()
      self._compiled[key] = self._compile(program, (self._params, self._statistics, *args))
      args = args if rehearse is None else rehearse(*args)
      self.compile_seconds += time.perf_counter() - start
    return self._compiled[key](self._params, self._statistics, *args)

  def _compile(self, program: Callable, args: tuple) -> Callable:
    def with_model(params, statistics, *args):
      return program(self._model.bind({"params": params}), statistics, *args)

    is_state = lambda value: isinstance(value, DecodingState)
    layout = jax.tree.map(self._layout, jax.eval_shape(with_model, *args), is_leaf=is_state)
    donated = tuple(i for i, arg in enumerate(args) if is_state(arg))
    return jax.jit(with_model, out_shardings=layout, donate_argnums=donated).lower(*args).compile()

  def _layout(self, value: Any) -> Any:
    if not isinstance(value, DecodingState):
      return self._replicated
    over = lambda *names: jax.sharding.NamedSharding(self.mesh, sharding.RULES.spec(names))
    if value.table is not None:
      cache = over("batch", None, "kv_heads", None, None)
    else:  # a flat one, of a single device, has no axis of its own for heads
      cache = self._replicated if self.mesh.size == 1 else over("batch", "kv_heads", None, None)
    rows = jax.tree.map(lambda _: over("batch"), value)
    return rows.replace(k=(cache,) * len(value.k), v=(cache,) * len(value.v))

  def to_host(self, value: Any) -> Any:
    """The value with numpy arrays, also where other processes hold parts of it. Copies, since states are donated."""
    return jax.tree.map(np.array, self._replicate(value) if jax.process_count() > 1 else value)

  def agree(self, values: Any) -> Any:
    """Process 0's numbers, in all processes, which must run the same programs."""
    return values if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(values)


@jax.jit
def _all_finite(params: Any) -> jax.Array:
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


@contextlib.contextmanager
def out_of_memory_as(flag: str) -> Iterator[None]:
  """Raises UserError that names the flag where the device has too little memory."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(f"{flag}: does not fit the device's memory; take less") from error
