"""The training state and its layout on a mesh."""

import functools
from typing import Any
import zlib

from flax import traverse_util
from flax.core import meta
import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.flow import latents
from evo_jax.flow import statistics as statistics_lib
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding
from evo_jax.training import optim, partition


@flax.struct.dataclass
class TrainState:
  """All that a step changes, and the frozen parameters.

  params: those that are trained, as are `ema`, their averages (None unless config.optim.ema), and the optimizer's.
  frozen: the others, which no step changes; {}: there are none.
  """

  step: jax.Array  # int32
  params: Any
  ema: Any
  optimizer: Any
  statistics: statistics_lib.Statistics
  frozen: Any

  @property
  def whole(self) -> Any:
    """All parameters, as the network takes them."""
    return partition.merge(self.params, self.frozen)

  @property
  def averaged(self) -> Any:
    """All parameters, to evaluate: the averaged ones where an average is kept."""
    return self.whole if self.ema is None else partition.merge(self.ema, self.frozen)

  def items(self) -> dict[str, Any]:
    """What a checkpoint holds, by item; the step is the checkpoint's own."""
    ema = {} if self.ema is None else {"ema": self.ema}
    return {"params": self.params, **ema, "statistics": self.statistics, "optimizer": self.optimizer}

  def base_items(self) -> dict[str, Any]:
    """What the checkpoint of step 0 holds: the frozen parameters, too, for those that follow."""
    return {"params": self.whole, "statistics": self.statistics}


def key_for(seed: int, purpose: str, step: jax.Array | int = 0) -> jax.Array:
  """The key of every random draw: the seed, folded with a named purpose and the step."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode())), step)


def make_model(
  config: config_lib.Config, tokenizer: tokenizers.Tokenizer, mesh: jax.sharding.Mesh | None = None
) -> evo_lib.Evo:
  """The network for a tokenizer, to compute on a mesh (None: on one device). Raises UserError if the vocabulary does
  not fit the configuration."""
  if config.model.vocab_size and tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(
      f"config.model.vocab_size: {config.model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens"
    )
  layout = sharding.Layout() if mesh is None else sharding.Layout.of(mesh)
  return evo_lib.Evo(config.model, tokenizer.vocab_size, layout)


def init_state(model: evo_lib.Evo, config: config_lib.Config) -> TrainState:
  """The state before training, parameters in boxes that carry their logical axes (`flax.core.meta`)."""
  seed = config.train.seed
  model = model.clone(layout=sharding.Layout())  # nothing of it depends on a mesh
  params = model.init(key_for(seed, "parameters"), jnp.zeros((1, 2), jnp.int32))["params"]
  codes = model.apply({"params": params}, method=evo_lib.Evo.codes)
  params, frozen = partition.split(params, config.train.trainable)
  if config.train.trainable != partition.ALL:
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  optimizer = optim.make_optimizer(config.optim, config.train.steps).init(params)
  statistics = statistics_lib.init_statistics(key_for(seed, "statistics"), codes, model.vocab_size, config.warp)
  ema = jax.tree.map(jnp.copy, params) if config.optim.ema else None
  return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer, statistics, frozen)


def state_shardings(model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh) -> Any:
  """The NamedShardings of the state. Raises UserError where a size does not divide the mesh."""
  return sharding.shardings(mesh, jax.eval_shape(functools.partial(init_state, model, config)))


def sharded_init(model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The state before training, sharded over a mesh, without boxes."""
  init = lambda: meta.unbox(init_state(model, config))
  return jax.jit(init, out_shardings=state_shardings(model, config, mesh))()


def init_windows(
  model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh, base: dict[str, Any]
) -> tuple[dict[str, Any], statistics_lib.Statistics]:
  """All parameters, and statistics, before windows are trained, of a model whose other parameters, `base`, are there
  already, sharded over the mesh.

  Windows' own begin as in training from nothing, except codes, which begin as a random projection of the embedding
  (near tokens have near codes), and twins, which are copies of `base`'s matrices.
  """
  base, seed = traverse_util.flatten_dict(base), config.train.seed
  plain = model.clone(layout=sharding.Layout())
  shardings = sharding.shardings(mesh, evo_lib.abstract_params(config.model, model.vocab_size))
  shardings = {path: to for path, to in traverse_util.flatten_dict(shardings).items() if path not in base}

  def init(embedding, w_qkv):
    params = plain.init(key_for(seed, "parameters"), jnp.zeros((1, 2), jnp.int32))["params"]
    params = traverse_util.flatten_dict(meta.unbox(params))
    codes = project_embedding(key_for(seed, "codes"), embedding, model.vocab_size, config.model.code_dim)
    params[("codes",)] = codes.astype(embedding.dtype)
    params[("blocks", "window_qkv")] = w_qkv
    return {path: params[path] for path in shardings}

  own = jax.jit(init, out_shardings=shardings)(base[("embedding",)], base[("blocks", "w_qkv")])
  statistics = functools.partial(init_statistics, config, model.vocab_size)
  statistics = jax.jit(statistics, out_shardings=sharding.replicated(mesh))(own[("codes",)])
  return traverse_util.unflatten_dict(base | own), statistics


def begin_windows(
  model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh, items: dict[str, Any]
) -> dict[str, Any]:
  """The items of a checkpoint of step 0 that has other windows, with windows as before training."""
  name = "params" if "params" in items else "ema"
  params, statistics = init_windows(model, config, mesh, partition.merge(items[name], items.get("frozen", {})))
  trained, frozen = partition.split(params, config.train.trainable)
  begun = {"statistics": statistics}
  if config.train.trainable != partition.ALL:
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
  if frozen:
    begun["frozen"] = frozen
  begun[name] = trained
  return begun if "ema" not in items else begun | {"ema": jax.tree.map(jnp.copy, trained)}


def check_begins_windows(model: evo_lib.Evo, config: config_lib.Config) -> None:
  """Raises UserError where windows cannot begin anew, since some of their parameters would not be trained: then no
  checkpoint would have them."""
  abstract = meta.unbox(evo_lib.abstract_params(config.model, model.vocab_size))
  _, frozen = partition.split(abstract, config.train.trainable)
  config.train.require(
    not any(map(evo_lib.is_of_windows, traverse_util.flatten_dict(frozen))),
    "trainable",
    "leaves out parameters of windows, which begin anew: they must all be trained (windows, or all)",
  )


def project_embedding(key: jax.Array, embedding_VxD: jax.Array, vocab_size: int, code_dim: int) -> jax.Array:
  """Unit codes (V, M) float32: a random projection of the centred embedding, which keeps angles approximately
  (Johnson and Lindenstrauss, 1984)."""
  is_token = (jnp.arange(len(embedding_VxD)) < vocab_size)[:, None]
  wide = jnp.where(is_token, embedding_VxD.astype(jnp.float32), 0.0)
  mean = jnp.sum(wide, axis=0) / vocab_size
  projection = jax.random.normal(key, (embedding_VxD.shape[1], code_dim))
  return latents.unit((wide - mean) @ projection)


def init_statistics(config: config_lib.Config, vocab_size: int, codes_VxM: jax.Array) -> statistics_lib.Statistics:
  """Statistics before training, of a model with these codes."""
  key = key_for(config.train.seed, "statistics")
  return statistics_lib.init_statistics(key, latents.unit(codes_VxM), vocab_size, config.warp)


def init_optimizer(model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh, params: Any) -> Any:
  """The optimizer's state before it trains these parameters, sharded over a mesh."""
  init = optim.make_optimizer(config.optim, config.train.steps).init
  return jax.jit(init, out_shardings=state_shardings(model, config, mesh).optimizer)(params)


def abstract_state(model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The state's shapes, dtypes and shardings."""
  boxed = jax.eval_shape(functools.partial(init_state, model, config))
  shape = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(shape, meta.unbox(boxed), sharding.shardings(mesh, boxed))


def abstract_items(model: evo_lib.Evo, config: config_lib.Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a checkpoint's items, and of the frozen parameters, to restore into."""
  state = abstract_state(model, config, mesh)
  return state.items() | ({"frozen": state.frozen} if state.frozen else {})


def check_batch(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
  """Raises UserError where a microbatch does not divide by the shards of the batch."""
  shards = sharding.batch_shards(mesh)
  if config.data.batch_size // config.train.accumulate % shards:
    raise UserError(
      f"config.data.batch_size: {config.data.batch_size} sequences in {config.train.accumulate} "
      f"microbatches do not divide by data x fsdp = {shards} of the mesh"
    )
