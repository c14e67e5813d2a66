"""evo.safetensors: what an Evo model has beyond the pretrained one, beside the pretrained model's own files.

Parameters that no transformers checkpoint has (codes, time conditioning, clocks), what training measured
(`statistics.`), and in the header the configuration. Tables have as many rows as the checkpoint's.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.pretrained.source import guarded, open_tensors

NAME = "evo.safetensors"
_STATISTICS = "statistics"
_BY_ROW = ("codes", "statistics.unigram_V")  # have a row for each of the vocabulary's


class EvoFile:
  """An evo.safetensors that is read."""

  def __init__(self, path: Path):
    """Reads the header. Raises UserError."""
    self.path = path
    self._handle = open_tensors(path)
    try:
      values = json.loads((self._handle.metadata() or {})["evo_config"])
      self.config = config_lib.from_dict(values)
    except UserError as error:
      raise UserError(f"{path}: {error}; was it written by another version?") from error
    except (KeyError, ValueError, TypeError) as error:
      raise UserError(f"{path}: has no configuration of an Evo model in its header") from error

  def read(self, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The arrays `abstract` by their names. Raises UserError where the file has others, or of other shapes."""
    names = set(self._handle.keys())
    for name in sorted(names ^ set(abstract)):
      raise UserError(f"{self.path}: {name}: is {'surplus' if name in names else 'missing'}; it is of another model")
    return {name: self._read(name, want) for name, want in abstract.items()}

  def _read(self, name: str, want: jax.ShapeDtypeStruct) -> np.ndarray:
    value = guarded(self.path, lambda: self._handle.get_tensor(name))
    fits = value.shape == want.shape
    if name in _BY_ROW and value.ndim == len(want.shape) and len(value) <= want.shape[0]:
      fits = value.shape[1:] == want.shape[1:]
      value = np.pad(value, [(0, want.shape[0] - len(value)), *[(0, 0)] * (value.ndim - 1)])
    if not fits:
      raise UserError(f"{self.path}: {name}: has the shape {value.shape}, not {want.shape}; it is of another model")
    return value.astype(want.dtype)


# Of `config.data`, what belongs to the text that was trained on: another's is elsewhere, and of another kind.
_OF_TEXT = ("path", "weights", "weight_changes", "valid", "test", "chat", "tokenizer_path")


def describe_config(config: config_lib.Config) -> dict[str, str]:
  """The header's entry, without what is said of the text: names of folders of this machine among it."""
  default = config_lib.Data()
  data = dataclasses.replace(config.data, **{field: getattr(default, field) for field in _OF_TEXT})
  return {"evo_config": json.dumps(config_lib.to_dict(dataclasses.replace(config, data=data)))}


def flatten(own_params: dict[tuple[str, ...], Any], statistics: Any) -> dict[str, Any]:
  """The leaves of an Evo model's own parameters, by path, and of its statistics, under the file's names."""
  named = {".".join(path): value for path, value in own_params.items()}
  leaves, _ = jax.tree_util.tree_flatten_with_path(statistics)
  join = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return named | {f"{_STATISTICS}.{join(path)}": value for path, value in leaves}


def unflatten(named: dict[str, Any], abstract_statistics: Any) -> tuple[dict[tuple[str, ...], Any], Any]:
  """The inverse of `flatten`."""
  own = {tuple(name.split(".")): value for name, value in named.items() if not name.startswith(f"{_STATISTICS}.")}
  structure = jax.tree.structure(abstract_statistics)
  names = flatten({}, abstract_statistics)
  return own, jax.tree.unflatten(structure, [named[name] for name in names])


def cut_rows(named: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
  """Without the rows that the checkpoint's tables do not have."""
  return {name: value[:rows] if name in _BY_ROW else value for name, value in named.items()}


def own_paths(params: dict, taken: set[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
  """The parameters that no transformers checkpoint has, by path. taken: the paths that one has."""
  return {path: value for path, value in traverse_util.flatten_dict(params).items() if path not in taken}
