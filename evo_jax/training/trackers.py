"""Experiment trackers: metrics for TensorBoard and for Weights & Biases, beside `metrics.jsonl`."""

from collections.abc import Callable
import os
import tempfile
from typing import Protocol
import uuid

from etils import epath
import jax

from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.training import files


class Tracker(Protocol):
  """Takes rows of the log, `step` and metrics, in order."""

  def write(self, row: dict[str, float]) -> None: ...
  def close(self) -> None: ...


def check_installed(config: config_lib.Train) -> None:
  """Raises UserError where a library of config.log_to is not installed."""
  for name in config.trackers:
    try:
      _MODULES[name]()
    except ImportError as error:
      raise UserError(f"config.train.log_to: {name} needs {error.name}: pip install 'evo_jax[{name}]'") from error


def start_trackers(config: config_lib.Config, workdir: epath.Path, step: int) -> list[Tracker]:
  """The trackers of config.train.log_to, to go on after `step`; of several processes only number 0 has any.

  Raises UserError where one cannot be started.
  """
  if jax.process_index():
    return []
  return [_START[name](config, workdir, step) for name in config.train.trackers]


class _TensorBoard:
  """Event files in the folder `tensorboard` of the work directory."""

  def __init__(self, config: config_lib.Config, workdir: epath.Path, step: int):
    try:
      # Events of later steps, which will be written again, are not shown any more.
      self._writer = _import_tensorboard().SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
    except Exception as error:  # OSError; in buckets of other kinds
      reason = getattr(error, "strerror", None) or error
      raise UserError(f"{workdir / 'tensorboard'}: cannot be written: {reason}") from error

  def write(self, row: dict[str, float]) -> None:
    for name, value in row.items():
      if name != "step":
        self._writer.add_scalar(name, value, row["step"])
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _WeightsAndBiases:
  """A run of Weights & Biases, which goes on when the work directory's does. Its name is kept in the file `wandb_id`.

  Project, account and mode (as offline) are those of its environment variables.
  """

  def __init__(self, config: config_lib.Config, workdir: epath.Path, step: int):
    file = workdir / "wandb_id"
    if not (step and file.exists()):
      files.write_file(file, uuid.uuid4().hex.encode())
    wandb = _import_wandb()
    try:
      self._run = wandb.init(
        id=file.read_text().strip(),
        resume="allow",
        project=os.environ.get("WANDB_PROJECT", "evo_jax"),
        name=workdir.name,
        dir=tempfile.mkdtemp() if "://" in str(workdir) else str(workdir),
        config=config_lib.to_dict(config),
      )
    except Exception as error:  # the library raises many kinds
      raise UserError(f"config.train.log_to: wandb cannot be started: {' '.join(str(error).split())}") from error

  def write(self, row: dict[str, float]) -> None:
    # Rows of steps that it knows already, which a run that was killed writes again, it leaves out.
    self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

  def close(self) -> None:
    self._run.finish()


def _import_tensorboard():
  import tensorboardX

  return tensorboardX


def _import_wandb():
  import wandb

  return wandb


_MODULES: dict[str, Callable] = {"tensorboard": _import_tensorboard, "wandb": _import_wandb}
_START: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
