"""Exports a model: a folder that transformers loads without this project's code, and from which `importer` gives the
whole Evo model again."""

from collections.abc import Iterator
import functools
import os
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import numpy as np
from safetensors.numpy import save_file

from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding
from evo_jax.pretrained import architectures, evo_file, staging, tensors
from evo_jax.pretrained.importer import read_record
from evo_jax.pretrained.tokenizer_json import describe_tokenizer
from evo_jax.run import Run
from evo_jax.training import checkpoint, files, partition

_INDEX = "model.safetensors.index.json"


def check_output(output: str) -> epath.Path:
  """The folder that --export names. Raises UserError where it is there and not an empty folder."""
  if "://" in output:
    raise UserError(f"--export={output}: is no local folder")
  folder = epath.Path(output).expanduser().absolute()
  staging.check_place(folder, "export")
  return folder


def export_run(run: Run, workdir: str, output: str, dtype: str = "", shard_bytes: int = 2**31) -> list[str]:
  """Writes the run that was loaded from `workdir`; the names of the files, in process 0. To be called by all processes.

  dtype: of the tensors; "": each as it came in, if that loses nothing, else as it was trained. Raises UserError; then
  `output` is as it was.
  """
  folder = check_output(output)
  saved = checkpoint.resolve_workdir(workdir)
  record = read_record(saved)
  rows = run.config.model.vocab_size if record else run.tokenizer.vocab_size
  parts = tensors.parts(run.config.model, rows)
  names = {part.name for part in parts}
  stored = {} if record is None else {name: kind for name, kind in record["dtypes"].items() if name in names}
  trained, _ = partition.split(run.params, run.config.train.trainable)
  came_in = record is not None and partition.leaves_clean_stream(trained)
  if run.config.loss.ar_weight == 0 and not came_in:
    raise UserError(f"{workdir}: config.loss.ar_weight is 0: nothing trained what would be exported")
  if record is None:
    config = architectures.describe_model(run.config.model, dtype or run.config.model.param_dtype, rows)
  else:
    config = dict(record["config"])
  size = sum(leaf.nbytes for leaf in jax.tree.leaves((run.params, run.statistics)))
  staging.check_space(folder, "export", size)
  with staging.staged(folder, "export") as place:
    kinds = {}
    for shard, values in enumerate(_shards(run, parts, stored, dtype, shard_bytes), 1):
      kinds |= {name: (shard, value.dtype.name, value.nbytes) for name, value in values.items()}
      _save(values, place / _shard_name(shard), {"format": "pt"})
    own = _own_tensors(run, {part.path for part in parts}, rows, dtype)
    _save(own, place / evo_file.NAME, evo_file.describe_config(run.config))
    dtypes = {kind for _, kind, _ in kinds.values()}
    staging.on_first_process(lambda: _name_shards(place, kinds))
    staging.on_first_process(lambda: _write_small_files(run, saved, record, config, dtypes, place))
  return [] if jax.process_index() else sorted(file.name for file in folder.iterdir())


def _save(values: dict[str, np.ndarray], file: epath.Path, metadata: dict[str, str]) -> None:
  """Writes a file of tensors, in process 0."""
  if jax.process_index():
    return
  file.touch()  # with the mode that the user's files have; safetensors would make it unreadable for others
  mode = file.stat().mode
  save_file({name: np.asarray(value, order="C") for name, value in values.items()}, str(file), metadata)
  os.chmod(file, mode)


def _shards(
  run: Run, parts: list[tensors.Part], stored: dict[str, str], dtype: str, limit: int
) -> Iterator[dict[str, np.ndarray]]:
  """The tensors in files of at most `limit` bytes, one file in memory at a time."""
  params = traverse_util.flatten_dict(run.params)
  shard, size = {}, 0
  for part in parts:
    value = part.to_tensor(_to_host(params[part.path], part.slices, run.mesh))
    value = value.astype(dtype) if dtype else _as_stored(value, stored.get(part.name))
    if shard and size + value.nbytes > limit:
      yield shard
      shard, size = {}, 0
    shard[part.name] = value
    size += value.nbytes
  yield shard


def _as_stored(value: np.ndarray, dtype: str | None) -> np.ndarray:
  """In the dtype that it came in, if that loses nothing."""
  if dtype is None or value.dtype == np.dtype(dtype):
    return value
  narrow = value.astype(dtype)
  return narrow if np.array_equal(narrow.astype(value.dtype), value) else value


def _to_host(array: jax.Array, slices: tuple[int | slice, ...], mesh: jax.sharding.Mesh) -> np.ndarray:
  """A part of an array, whole in every process."""
  if mesh.size == 1:
    return np.asarray(array)[slices]
  layer, rest = (slices[0], slices[1:]) if slices and isinstance(slices[0], int) else (None, slices)
  bounds = tuple((s.start, s.stop) for s in rest)
  return np.asarray(_taker(mesh)(array, layer, bounds).addressable_data(0))


@functools.lru_cache
def _taker(mesh: jax.sharding.Mesh):
  """(array, layer or None, bounds) -> that part, on every device: compiled once for all layers."""

  def take(array, layer, bounds):
    array = array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return array[tuple(slice(*ends) for ends in bounds)]

  return jax.jit(take, static_argnums=2, out_shardings=sharding.replicated(mesh))


def _own_tensors(run: Run, taken: set[tuple[str, ...]], rows: int, dtype: str) -> dict[str, np.ndarray]:
  """What evo.safetensors holds; the parameters in `dtype` ("": as they were trained)."""
  own = evo_file.own_paths(run.params, taken)
  if dtype:
    own = {path: value.astype(dtype) for path, value in own.items()}
  named = evo_file.flatten(own, run.statistics)
  whole = lambda value: _to_host(value, tuple(slice(0, size) for size in value.shape), run.mesh)
  return evo_file.cut_rows({name: whole(value) for name, value in named.items()}, rows)


def _shard_name(number: int, of: int = 0) -> str:
  return f"model-{number:05d}-of-{of:05d}.safetensors"


def _name_shards(place: epath.Path, kinds: dict[str, tuple[int, str, int]]) -> None:
  """Gives the files their final names, and writes the index where there are several."""
  count = max(shard for shard, _, _ in kinds.values())
  if count == 1:
    (place / _shard_name(1)).rename(place / "model.safetensors")
    return
  for shard in range(1, count + 1):
    (place / _shard_name(shard)).rename(place / _shard_name(shard, count))
  index = {
    "metadata": {"total_size": sum(size for _, _, size in kinds.values())},
    "weight_map": {name: _shard_name(shard, count) for name, (shard, _, _) in sorted(kinds.items())},
  }
  files.write_json(place / _INDEX, index)


def _write_small_files(
  run: Run, saved: Any, record: dict[str, Any] | None, config: dict[str, Any], dtypes: set[str], place: epath.Path
) -> None:
  """Configuration, tokenizer, generation's configuration, model card."""
  if len(dtypes) == 1:
    field = "dtype" if "dtype" in config else "torch_dtype"
    config = config | {field: next(iter(dtypes))}
  tokenizer = run.tokenizer
  generation = {"bos_token_id": tokenizer.begin_id, "eos_token_id": list(tokenizer.end_ids)}
  if record is None:
    config |= generation
    contents = describe_tokenizer(tokenizer)
  else:
    generation = record["generation"]
    contents = {file.name: file.read_bytes() for file in (saved / "tokenizer").iterdir()}
  for name, content in contents.items():
    files.write_file(place / name, content)
  if generation:
    files.write_json(place / "generation_config.json", generation)
  files.write_json(place / "config.json", config)
  (place / "README.md").write_text(_card(run, record, config))


def _card(run: Run, record: dict[str, Any] | None, config: dict[str, Any]) -> str:
  """The model card."""
  model = run.config.model
  count = evo_lib.count_parameters(model, run.tokenizer.vocab_size)
  origin = "trained from nothing" if record is None else f"from `{record['source']}`, whose licence holds"
  trained = f", trained for {run.step:,} steps" if run.step else ""
  return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config["architectures"][0]}, with windows of an Evo model

{origin[0].upper() + origin[1:]}{trained}. {model.layers} layers x {model.width}, {count:,} parameters with Evo's own.

As an autoregressive model:
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (c.from_pretrained("THIS_FOLDER") for c in (AutoModelForCausalLM, AutoTokenizer))
```

As an Evo model, which also writes several tokens per pass, by `evo.safetensors`:
```
python -m evo_jax.convert --source=THIS_FOLDER --workdir=DIR
python -m evo_jax.generate --workdir=DIR --prompt=TEXT --mode=verify
```
"""
