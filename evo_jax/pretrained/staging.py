"""Folders that are complete or not there: written beside their place, and renamed when everything is in them."""

from collections.abc import Callable, Iterator
import contextlib
import shutil
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import safetensors

from evo_jax.errors import UserError


def check_place(folder: epath.Path, flag: str) -> None:
  """Raises UserError, naming the flag, where the folder is there and not an empty folder."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"--{flag}={folder}: exists, and is not an empty folder")


def check_space(folder: epath.Path, flag: str, size: int) -> None:
  """Raises UserError where the disk has no room for `size` bytes."""
  if _is_bucket(folder):
    return
  existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
  if (free := shutil.disk_usage(existing).free) < size:
    raise UserError(f"--{flag}={folder}: cannot be written: it needs {size:,} bytes, {free:,} are free")


@contextlib.contextmanager
def staged(folder: epath.Path, flag: str) -> Iterator[epath.Path]:
  """A folder beside `folder` that takes its place at the end, and is removed if something fails: in all processes.

  In a bucket, where nothing can be renamed at once, it is the folder itself. Raises UserError, naming the flag, where
  it cannot be written.
  """
  staging = folder if _is_bucket(folder) else folder.parent / f".{folder.name}.partial"
  try:
    on_first_process(lambda: _make(folder, staging))
    yield staging
    on_first_process(lambda: _move(staging, folder))
  except BaseException as error:
    if jax.process_index() == 0 and staging != folder:
      _remove(staging)
    if isinstance(error, (OSError, safetensors.SafetensorError)):
      reason = getattr(error, "strerror", None) or error
      raise UserError(f"--{flag}={folder}: cannot be written: {reason}") from error
    if isinstance(error, UserError):
      raise UserError(str(error).replace(str(staging), str(folder))) from error
    raise


def on_first_process(act: Callable[[], Any]) -> None:
  """act() in process 0; returns in all when it is done."""
  if jax.process_index() == 0:
    act()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("first process")


def _is_bucket(folder: epath.Path) -> bool:
  return "://" in str(folder)


def _make(folder: epath.Path, staging: epath.Path) -> None:
  if staging != folder and staging.exists():
    staging.rmtree()  # of a command that was killed
  staging.mkdir(parents=True, exist_ok=True)


def _move(staging: epath.Path, folder: epath.Path) -> None:
  if staging == folder:
    return
  if folder.exists():
    folder.rmdir()
  staging.rename(folder)


def _remove(folder: epath.Path) -> None:
  """Removes a folder into which threads of a checkpoint that failed may still write for a moment."""
  for _ in range(40):
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.05)
    if not folder.exists():
      return
