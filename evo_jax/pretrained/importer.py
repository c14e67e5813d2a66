"""Imports a pretrained model: a work directory at step 0, which evaluation, generation and training take.

Known tokens compute exactly what the pretrained model does, since all that Evo adds vanishes at t = 0. What it adds
begins as `training.state.init_windows` makes it.
"""

import dataclasses
import functools
import json
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding
from evo_jax.pretrained import architectures, evo_file, staging, tensors
from evo_jax.pretrained.evo_file import EvoFile
from evo_jax.pretrained.source import Source
from evo_jax.training import checkpoint, files
from evo_jax.training import state as state_lib

RECORD = "pretrained.json"  # in the work directory: what the export needs beside the parameters
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CONTEXT = 1024  # tokens of a sequence in evaluation and training, unless the model takes fewer
# Of training that goes on from good weights: small steps, and memory for large vocabularies and many layers.
_CONTINUED = {
  "optim": {"learning_rate": 3e-5},
  "data": {"tokenizer": "huggingface", "batch_size": 8},
  "loss": {"chunk": 8192},
  "model": {"remat": "full"},
  "eval": {"paths": ("ar", "diagonal:4"), "train_paths": ("ar",), "batch_size": 4, "sequences": 32},
}


# Fields of generation_config.json that the tokenizer reads, or that say nothing of texts; others are not used here.
_GENERATION = {
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "transformers_version",
  "_from_model_config",
  "output_attentions",
  "output_hidden_states",
  "use_cache",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """dtype: of computation. param_dtype: of the parameters; "": as stored. context: tokens of a sequence in evaluation
  and training; 0: 1024, or as many as the model takes. ignored: fields of config.json that change no result."""

  dtype: str = "float32"
  param_dtype: str = ""
  context: int = 0
  ignored: tuple[str, ...] = ()


_DERIVED = "rotary_emb.inv_freq"  # old files have what follows from the configuration


@dataclasses.dataclass(frozen=True)
class Imported:
  """What became of a source: its configuration here, tokenizer, number of parameters, of which `own` are Evo's alone,
  and what of the source is not used: tensors, files, settings."""

  config: config_lib.Config
  tokenizer: tokenizers.Tokenizer
  parameters: int
  own: int
  left_out: list[str]


def import_model(
  source: Source, workdir: str, options: Options, mesh: jax.sharding.Mesh, windows: EvoFile | None = None
) -> Imported:
  """Writes the model into `workdir`, which must be empty or not there. To be called by all processes.

  windows: what an Evo model has beyond the pretrained one; default: the folder's own, if it has one. Raises UserError
  for whatever is wrong; then there is no work directory.
  """
  folder = getattr(source, "folder", None)
  if windows is None and folder is not None and (folder / evo_file.NAME).exists():
    windows = EvoFile(folder / evo_file.NAME)
  config = make_config(source, options, windows)
  left_out = check_tensors(source, config.model) + _unused(source)
  folder = checkpoint.resolve_workdir(workdir)
  foreign = sum(int(np.prod(part.shape)) for part in tensors.parts(config.model, config.model.vocab_size))
  staging.check_place(folder, "workdir")
  staging.check_space(folder, "workdir", foreign * jnp.dtype(config.model.param_dtype).itemsize)
  with staging.staged(folder, "workdir") as place:
    staging.on_first_process(lambda: _write_tokenizer(source, place / "tokenizer"))
    tokenizer = _load_tokenizer(source, config, place / "tokenizer")
    model = state_lib.make_model(config, tokenizer, mesh)
    items = load_items(source, model, config, mesh, windows)
    store = checkpoint.CheckpointStore(place, keep=None)
    try:
      store.save(0, items)
      store.wait()
    finally:
      store.close()
    parameters = evo_lib.count_parameters(config.model, tokenizer.vocab_size)
    staging.on_first_process(lambda: _write_records(source, config, tokenizer, parameters, place))
  return Imported(config, tokenizer, parameters, parameters - foreign, left_out)


def make_config(source: Source, options: Options, windows: EvoFile | None = None) -> config_lib.Config:
  """The configuration of an imported model. Raises UserError for what cannot be represented."""
  fields = architectures.read_model(source.config, f"{source.description}: config.json", options.ignored)
  values = config_lib.to_dict(config_lib.Config() if windows is None else windows.config)
  if windows is None:
    for section, changes in _CONTINUED.items():
      values[section] |= changes
  stored = {_stored_dtype(source, name) for name in source.names() if not name.endswith(_DERIVED)}
  own = windows.config.model.param_dtype if windows else stored.pop() if len(stored) == 1 else "float32"
  limit = fields["context_limit"]
  context = options.context or (min(windows.config.model.context, limit) if windows else min(_CONTEXT, limit))
  if context > limit:
    raise UserError(f"--context={context}: is more than the {limit} positions of the model")
  values["model"] |= fields | {"context": context, "dtype": options.dtype, "param_dtype": options.param_dtype or own}
  values["optim"]["ema"] = 0.0  # there is no average beside the parameters
  if windows is None:
    values["window"]["size"] = int(np.gcd(context, values["window"]["size"]))
  try:
    return config_lib.from_dict(values)
  except UserError as error:
    raise UserError(f"{source.description}: config.json: {error}") from error


def _stored_dtype(source: Source, name: str) -> str:
  dtype = source.dtype(name)
  if dtype not in DTYPES:
    raise UserError(f"{source.description}: {name}: is stored as {dtype}, not as {', '.join(DTYPES)}")
  return DTYPES[dtype]


def check_tensors(source: Source, model: config_lib.Model) -> list[str]:
  """The tensors that mean nothing for this model. Raises UserError for one that is missing, surplus or of another
  shape, and for an output table that is not the input's though the configuration says so."""
  names = set(source.names())
  last = f"model.layers.{model.layers - 1}.input_layernorm.weight"
  if last not in names:  # asked first: a damaged file may speak of a billion layers
    raise UserError(f"{source.description}: {last}: is missing")
  expected = {part.name: part for part in tensors.parts(model, model.vocab_size)}
  for name, part in expected.items():
    if name not in names:
      raise UserError(f"{source.description}: {name}: is missing")
    if source.shape(name) != part.shape:
      raise UserError(f"{source.description}: {name}: has the shape {source.shape(name)}, not {part.shape}")
  left_out = []
  for name in sorted(names - set(expected)):
    if name == "lm_head.weight":  # written though it is tied
      if not np.array_equal(source.read(name), source.read("model.embed_tokens.weight")):
        raise UserError(
          f"{source.description}: {name}: differs from model.embed_tokens.weight, though tie_word_embeddings is true"
        )
    elif not name.endswith(_DERIVED):
      raise UserError(f"{source.description}: {name}: is no part of the architecture that config.json describes")
    left_out.append(name)
  return left_out


def _unused(source: Source) -> list[str]:
  """Files that are not read, and settings of generation and training that are not used."""
  own = {evo_file.NAME}
  unread = [name for name in getattr(source, "unread", list)() if name not in own]
  settings = [f"{name} of generation_config.json" for name in sorted(set(source.generation) - _GENERATION)]
  return unread + settings + (["attention_dropout"] if source.config.get("attention_dropout") else [])


def load_items(
  source: Source,
  model: evo_lib.Evo,
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  windows: EvoFile | None = None,
) -> dict[str, Any]:
  """Parameters and statistics, sharded over the mesh. One tensor of the source is in memory at a time."""
  shapes = traverse_util.flatten_dict(state_lib.abstract_state(model, config, mesh).whole)
  shardings = {path: shape.sharding for path, shape in shapes.items()}
  parts: dict[tuple[str, ...], list[tensors.Part]] = {}
  for part in tensors.parts(config.model, config.model.vocab_size):
    parts.setdefault(part.path, []).append(part)
  params = {path: _load_parameter(source, parts[path], shapes[path], shardings[path]) for path in parts}
  if windows is None:
    params, statistics = state_lib.init_windows(model, config, mesh, traverse_util.unflatten_dict(params))
    return {"params": params, "statistics": statistics}
  own = {path: shapes[path] for path in shapes if path not in parts}
  abstract = jax.eval_shape(functools.partial(state_lib.init_statistics, config, model.vocab_size), shapes[("codes",)])
  loaded, statistics = evo_file.unflatten(windows.read(evo_file.flatten(own, abstract)), abstract)
  params |= {path: _put(value, shardings[path]) for path, value in loaded.items()}
  statistics = jax.tree.map(lambda x: _put(x, sharding.replicated(mesh)), statistics)
  return {"params": traverse_util.unflatten_dict(params), "statistics": statistics}


def _put(value: np.ndarray, to: jax.sharding.Sharding) -> jax.Array:
  return jax.make_array_from_callback(value.shape, to, lambda index: value[index])


def _load_parameter(
  source: Source, parts: list[tensors.Part], shape: jax.ShapeDtypeStruct, to: jax.sharding.NamedSharding
) -> jax.Array:
  """A parameter, filled part by part on its devices."""
  whole = jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=to)()

  @functools.partial(jax.jit, static_argnums=3, donate_argnums=0, out_shardings=to)
  def write(whole, part, layer, start):
    if layer is None:
      return jax.lax.dynamic_update_slice(whole, part, start)
    return jax.lax.dynamic_update_slice(whole, part[None], (layer, *start))

  for part in parts:
    value = part.to_parameter(source.read(part.name)).astype(shape.dtype)
    if part.layer is None:  # rows that make a table divide over a mesh
      value = np.pad(value, [(0, shape.shape[0] - len(value)), *[(0, 0)] * (value.ndim - 1)])
    spec = to.spec if part.layer is None else jax.sharding.PartitionSpec(*to.spec[1:])
    layer = None if part.layer is None else np.int32(part.layer)
    whole = write(whole, _put(value, jax.sharding.NamedSharding(to.mesh, spec)), layer, part.start)
  return whole


def _write_tokenizer(source: Source, folder: epath.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in source.tokenizer_files().items():
    files.write_file(folder / name, content)


def _load_tokenizer(source: Source, config: config_lib.Config, folder: epath.Path) -> tokenizers.Tokenizer:
  """Raises UserError where there is none, or where it has more tokens than the tables have rows."""
  name, rows = config.data.tokenizer, config.model.vocab_size
  if name == "huggingface" and not (folder / "tokenizer.json").exists():
    hint = (
      ", which AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers makes of tokenizer.model"
    )
    raise UserError(
      f"{source.description}: has no tokenizer.json" + (hint if (folder / "tokenizer.model").exists() else "")
    )
  try:
    tokenizer = tokenizers.load_tokenizer(name, str(folder))
  except UserError as error:
    raise UserError(str(error).replace(str(folder), source.description)) from error
  if tokenizer.vocab_size > rows:
    raise UserError(
      f"{source.description}: the tokenizer has {tokenizer.vocab_size} tokens, the model's tables have {rows} rows"
    )
  return tokenizer


def _write_records(
  source: Source,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  parameters: int,
  folder: epath.Path,
) -> None:
  """All but parameters and tokenizer; config.json, which makes the folder a work directory, last."""
  record = {
    "source": source.description if "://" in source.description else source.description.rpartition("/")[2],
    "config": source.config,
    "generation": source.generation,
    "dtypes": {name: DTYPES[source.dtype(name)] for name in source.names()},
  }
  files.write_json(folder / RECORD, record)
  files.write_file(folder / "config.py", config_file(config).encode())
  files.write_file(folder / "windows.py", _WINDOWS_FILE.encode())
  checkpoint.write_config(folder, config, tokenizer, parameters, None)


def config_file(config: config_lib.Config) -> str:
  """A file for --config, with all that differs from the defaults, but that parameters are trained in float32."""
  changes = config_lib.differences(config_lib.Config(), config)
  lines = [f"  c.{field} = {value!r}" for field, _, value, _ in changes if field != "model.param_dtype"]
  return (
    '"""Goes on training the imported model of this folder:\n\n'
    "  python -m evo_jax.main --config=DIR/config.py --config.data.path='text/*.txt'\n"
    '"""\n\nfrom pathlib import Path\n\nfrom evo_jax import config\n\n\n'
    "def get_config():\n  c = config.default()\n" + "\n".join(lines) + "\n"
    '  c.data.tokenizer_path = str(Path(__file__).parent / "tokenizer")\n  return c\n'
  )


_WINDOWS_FILE = '''"""Trains windows of the imported model of this folder, which stays as it is, as smollm2_windows:

  python -m evo_jax.main --config=DIR/windows.py --config.data.path='text/*.jsonl'
"""

from pathlib import Path
import runpy

from evo_jax.configs import smollm2_windows


def get_config():
  c = runpy.run_path(str(Path(__file__).parent / "config.py"))["get_config"]()
  smollm2_windows.add_windows(c)
  return c
'''


def read_record(folder: epath.Path) -> dict[str, Any] | None:
  """What `import_model` wrote about a source; None: the model was trained here. Raises UserError."""
  path = folder / RECORD
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: cannot be read: {error}") from error
