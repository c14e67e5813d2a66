"""A finished or running model, loaded from its work directory for evaluation, generation and other readers."""

import dataclasses
import datetime
import hashlib
import math
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.data import conversations, tokenizers
from evo_jax.data.chat import ChatTokenizer
from evo_jax.errors import UserError
from evo_jax.flow.statistics import Statistics
from evo_jax.network.evo import Evo, narrow_matrices, unstack_layers
from evo_jax.parallel import sharding
from evo_jax.training import checkpoint, partition
from evo_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model and what it takes to use it. `model.bind({"params": params})` is the network.

  params: the averaged parameters where the run kept an average (config.optim.ema), else the last ones. step: training
  steps that they have seen.
  """

  config: config_lib.Config
  tokenizer: tokenizers.Tokenizer
  model: Evo
  params: Any
  statistics: Statistics
  step: int

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The mesh that the parameters lie on."""
    leaf = jax.tree.leaves(self.params)[0]
    if isinstance(leaf.sharding, jax.sharding.NamedSharding):
      return leaf.sharding.mesh
    return sharding.make_mesh(config_lib.Mesh(), list(leaf.devices()))

  def on(self, mesh: jax.sharding.Mesh) -> "Run":
    """The same model, laid out over a mesh by the rules of training. Raises UserError where a shape does not divide
    the mesh."""
    if mesh == self.mesh:
      return self
    shardings = self._shardings(mesh, self.model)
    statistics = jax.device_put(self.statistics, sharding.replicated(mesh))
    return dataclasses.replace(self, params=jax.device_put(self.params, shardings), statistics=statistics)

  def unstacked_params(self, mesh: jax.sharding.Mesh) -> Any:
    """The parameters of `model.clone(stacked=False)`, laid out over a mesh by the rules of training; matrices in the
    dtype that they are multiplied in, where that is narrower: cast once, not in every pass."""
    shardings = self._shardings(mesh, self.model.clone(stacked=False))
    prepare = lambda params: narrow_matrices(unstack_layers(params), self.config.model.dtype)
    return jax.jit(prepare, out_shardings=shardings)(self.params)

  def _shardings(self, mesh: jax.sharding.Mesh, model: Evo) -> Any:
    init, tokens = model.clone(layout=sharding.Layout()).init, jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return sharding.shardings(mesh, jax.eval_shape(init, jax.random.key(0), tokens)["params"])

  def in_conversation(self, system: str = "", date: datetime.datetime | None = None) -> "Run":
    """The model, to which a prompt is what a user says (`ChatTokenizer`). Raises UserError where the tokenizer has no
    usable template."""
    return dataclasses.replace(self, tokenizer=ChatTokenizer(self.tokenizer, system, date))


def fingerprint(run: Run) -> str:
  """Names what texts of a model depend on: its shape, tokenizer and values, whatever mesh these lie on."""
  replicated = sharding.replicated(run.mesh)
  leaves = jax.tree.leaves((run.params, run.statistics))
  sums = jax.jit(lambda leaves: jnp.stack([*map(_bit_sum, leaves)]), out_shardings=replicated)(leaves)
  identity = (run.tokenizer.identity, conversations.template_identity(run.tokenizer))
  digest = hashlib.sha256(repr((run.config.model, run.config.window, identity)).encode())
  digest.update(np.asarray(sums).astype("<u4").tobytes())
  return digest.hexdigest()[:16]


def _bit_sum(x: jax.Array) -> jax.Array:
  """() uint32, the sum of all elements' bits, each times an odd number of its own, modulo 2^32: exact in any order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  steps = [math.prod(x.shape[i + 1 :]) % 2**32 for i in range(x.ndim)]
  place = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, i) * np.uint32(step) for i, step in enumerate(steps))
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def load_tokenizer(workdir: str) -> tokenizers.Tokenizer:
  """The tokenizer of a run, whose parameters are not read. Raises UserError where `workdir` holds no readable run."""
  return _read_workdir(workdir)[2]


def _read_workdir(workdir: str) -> tuple[epath.Path, config_lib.Config, tokenizers.Tokenizer]:
  """A run's folder, configuration and tokenizer."""
  folder = checkpoint.resolve_workdir(workdir)
  if not workdir or not folder.is_dir():
    raise UserError(f"--workdir={workdir}: is no folder")
  saved = checkpoint.read_config(folder)
  config = saved["config"]
  tokenizer = tokenizers.load_tokenizer(config.data.tokenizer, str(folder / "tokenizer"))
  if tokenizer.identity != saved["tokenizer"]:
    raise UserError(f"{folder}: tokenizer {tokenizer.identity} is not the checkpoint's, {saved['tokenizer']}")
  return folder, config, tokenizer


def load_run(workdir: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None, exact: bool = False) -> Run:
  """Loads the last readable checkpoint, or that of `step`, without the optimizer's state.

  mesh: parameters are restored straight into their shards over it, whatever mesh the checkpoint was written from;
  default: all devices of all processes, each with a copy. exact: frozen parameters in float32, which holds what they
  were saved in, whatever dtype the run used them in. Raises UserError where `workdir` holds no such checkpoint, it
  cannot be read, or its shapes do not divide the mesh.
  """
  folder, config, tokenizer = _read_workdir(workdir)
  mesh = sharding.make_mesh(config_lib.Mesh()) if mesh is None else mesh
  model = state_lib.make_model(config, tokenizer, mesh)
  params_item = "ema" if config.optim.ema else "params"
  whole = exact and config.train.trainable != partition.ALL
  dtypes = dataclasses.replace(config.model, param_dtype="float32" if whole else config.model.param_dtype)
  abstract = state_lib.abstract_items(model.clone(config=dtypes), config, mesh)
  wanted = {name: abstract[name] for name in (params_item, "statistics", "frozen") if name in abstract}
  step, items = checkpoint.read_checkpoint(folder, wanted, step)
  if "statistics" not in items:  # of an imported model that is to have other windows, which no step has trained yet
    items = state_lib.begin_windows(model, config, mesh, items)
  params = partition.merge(items[params_item], items.get("frozen", {}))
  return Run(config, tokenizer, model, params, items["statistics"], step)
