"""Checkpoints: the training state, and what a finished run leaves to readers.

A work directory holds `config.json`, `checkpoints/STEP/{params,ema,statistics,optimizer}`, `metrics.jsonl`, the final
`table.json`, `table.txt` and `samples.txt`, and `tokenizer/` where the tokenizer has a model. The place in the data
is the step. Orbax writes a checkpoint aside and renames it when it is whole, so that a killed run leaves none that is
half-written; it restores into any mesh, any number of processes, and other dtypes.
"""

import json
import re
import shutil
import sys
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError

args = ocp.args


class CheckpointStore:
  """The checkpoints of one work directory. Saving runs in the background."""

  def __init__(self, workdir: epath.Path, keep: int):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    self.folder = workdir / "checkpoints"
    try:
      self.manager = ocp.CheckpointManager(self.folder, options=options)
    except OSError as error:
      raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

  def latest(self) -> int | None:
    """The step of the last whole checkpoint."""
    return self.manager.latest_step()

  def save(self, step: int, items: dict[str, Any]) -> None:
    """Starts to save; the arrays may be donated afterwards. Raises UserError if this or the save before failed."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    if not str(self.folder).startswith("gs://") and (free := shutil.disk_usage(self.folder).free) < size:
      raise UserError(
        f"{self.folder}: a checkpoint cannot be written: it needs {size:,} bytes, {free:,} are free; "
        f"the last whole one is of step {self._last_whole()}"
      )
    self._guarded(
      lambda: self.manager.save(
        step, args=args.Composite(**{name: args.StandardSave(item) for name, item in items.items()})
      )
    )

  def wait(self) -> None:
    """Returns when everything is on disk. Raises UserError if it could not be written."""
    self._guarded(self.manager.wait_until_finished)

  def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """The items as arrays of the shapes, dtypes and shardings in `abstract`. Raises UserError, in all
    processes if in one."""
    wanted = {name: args.StandardRestore(item) for name, item in abstract.items()}
    found, problem = {}, None
    try:
      found = dict(self.manager.restore(step, args=args.Composite(**wanted)))
    except Exception as error:  # the readers underneath raise many kinds, too
      problem = error
    if not _all_well(problem is None):
      why = _first_line(problem) if problem else "another process could not read it"
      raise UserError(f"{self.folder / str(step)}: cannot be restored: {why}") from problem
    return found

  def restore_latest(self, abstract: dict[str, Any], set_aside: bool = True) -> tuple[int, dict[str, Any]]:
    """The last checkpoint that can be read, and its step. One that cannot is passed over with a warning and, with
    `set_aside`, moved to `damaged/STEP`, so that its step can be saved anew. Raises UserError if there are some, and
    none can be read."""
    problems = []
    for step in sorted(self.manager.all_steps(), reverse=True):
      try:
        found = self.restore(step, abstract)
      except UserError as error:
        problems.append(error)
        continue
      if problems and jax.process_index() == 0:
        for problem in problems:
          print(f"evo_jax: warning: {problem}; step {step} is read instead", file=sys.stderr, flush=True)
      if problems and set_aside:
        self._set_aside([s for s in self.manager.all_steps() if s > step])
      return step, found
    raise problems[0]

  def _set_aside(self, steps: list[int]) -> None:
    if jax.process_index() == 0:
      damaged = self.folder.parent / "damaged"
      damaged.mkdir(exist_ok=True)
      for step in steps:
        place = next(p for i in range(1000) if not (p := damaged / f"{step}{f'-{i}' if i else ''}").exists())
        (self.folder / str(step)).rename(place)
    _all_well(True)  # waits for process 0
    self.manager.reload()

  def close(self) -> None:
    self.manager.close()

  def _guarded(self, act) -> None:
    try:
      act()
      self.manager.check_for_errors()
    except Exception as error:  # the writers underneath raise many kinds: OSError, ValueError, RuntimeError
      raise UserError(
        f"{self.folder}: a checkpoint cannot be written: {_first_line(error)}; "
        f"the last whole one is of step {self._last_whole()}"
      ) from error

  def _last_whole(self) -> int | None:
    return max((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), default=None)


def _all_well(well: bool) -> bool:
  """Whether all processes are."""
  return bool(np.all(multihost_utils.process_allgather(np.array(well)))) if jax.process_count() > 1 else well


def _first_line(error: BaseException) -> str:
  """What an error says first, and the arrays, a line `NAME:` each, that Orbax finds on one side alone."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  names = [line[:-1] for line in lines[1:] if re.fullmatch(r"[\w.]+:", line)]
  return " ".join([lines[0][:300], ", ".join(names)]).strip() if lines else type(error).__name__


def resolve_workdir(workdir: str) -> epath.Path:
  """The folder that --workdir names: absolute, as Orbax wants it, unless it is in a bucket."""
  folder = epath.Path(workdir).expanduser()
  return folder if workdir.startswith("gs://") else folder.absolute()


def make_workdir(workdir: str) -> epath.Path:
  """The folder, made and tried. Raises UserError if nothing can be written there."""
  folder = resolve_workdir(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{jax.process_index()}"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise UserError(f"--workdir={workdir}: cannot be written: {error.strerror or error}") from error
  return folder


def write_json(path: epath.Path, value: Any) -> None:
  """Writes aside, then renames: a reader never sees half a file."""
  aside = path.parent / f".{path.name}.tmp"
  aside.write_text(json.dumps(value, indent=2) + "\n")
  aside.replace(path)


def write_config(
  workdir: epath.Path,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  parameters: int,
  fingerprints: list[str],
) -> None:
  """Writes config.json, and the tokenizer's model beside it. Raises UserError where an earlier run's does not fit.

  Fields that the checkpoint's contents depend on may not change; a change of another is printed and taken over.
  """
  path = workdir / "config.json"
  if path.exists():
    old = read_config(workdir)
    for field, before, after, pinned in config_lib.differences(old["config"], config):
      if pinned:
        raise UserError(
          f"config.{field}: {after!r} does not fit {workdir}, which was trained with {before!r}; use another --workdir"
        )
      if jax.process_index() == 0:
        print(f"config.{field}: {before!r} -> {after!r}", flush=True)
    if old["tokenizer"] != tokenizer.identity:
      raise UserError(
        f"config.data.tokenizer_path: tokenizer {tokenizer.identity} is not the checkpoint's, {old['tokenizer']}"
      )
    if old["text"] != fingerprints:
      raise UserError(
        f"config.data.path: the text of {config.data.path!r} is not what {workdir} was trained on: "
        "files were changed, added or removed; use another --workdir"
      )
  if jax.process_index() == 0:
    if isinstance(tokenizer, tokenizers.SentencePiece):
      (workdir / "tokenizer").mkdir(exist_ok=True)
      (workdir / "tokenizer" / tokenizers.MODEL_FILE).write_bytes(tokenizer.proto)
    write_json(
      path,
      {
        "config": config_lib.to_dict(config),
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "parameters": parameters,
        "text": fingerprints,
      },
    )


def read_config(workdir: epath.Path) -> dict[str, Any]:
  """config.json with the configuration as a Config. Raises UserError where there is none."""
  path = workdir / "config.json"
  try:
    values = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror or error}; is this the --workdir of a run?") from error
  except ValueError as error:
    raise UserError(f"{path}: is damaged ({error})") from error
  return {**values, "config": config_lib.from_dict(values["config"])}
