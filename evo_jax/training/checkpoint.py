"""Work directories and their checkpoints (Orbax).

A work directory holds `config.json`, `checkpoints/STEP/{params,ema,statistics,optimizer}`, `metrics.jsonl`, the final
`table.json`, `table.txt` and `samples.txt`, `tokenizer/` where the tokenizer has files, `damaged/` with what had to
be set aside, and `lease.json` while a run writes there. The position in the data is the step. Orbax writes a checkpoint
into a temporary folder and renames it when it is complete, so that a killed run leaves no partial one; it restores onto
any mesh, any number of processes, and other dtypes.

The checkpoint of step 0, of an imported model or of a run that does not train all parameters, has all of them in
`params`, and no average or optimizer. Later ones have those that are trained; what is frozen stays where it is. It is
never deleted.
"""

from collections.abc import Callable
import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
from typing import Any

from etils import epath
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.network import evo as evo_lib
from evo_jax.training import files, partition

args = ocp.args


class CheckpointStore:
  """The checkpoints of one work directory. Saving runs in the background."""

  def __init__(self, workdir: epath.Path, keep: int | None):
    """keep: how many checkpoints a save leaves, not counting that of step 0 where it is older; None: all. Raises
    UserError if the folder cannot be written."""
    kept = None
    if keep is not None:
      policies = ocp.checkpoint_managers
      kept = policies.AnyPreservationPolicy([policies.LatestN(keep), policies.CustomSteps([0])])
    options = ocp.CheckpointManagerOptions(preservation_policy=kept, create=True, enable_async_checkpointing=True)
    self.folder = workdir / "checkpoints"
    if self.folder.exists() and not self.folder.is_dir():
      raise UserError(f"{self.folder}: is no folder")
    try:
      self._manager = ocp.CheckpointManager(self.folder, options=options)
    except OSError as error:
      raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

  def steps(self) -> list[int]:
    """The steps of all complete checkpoints."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The step of the last complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, items: dict[str, Any]) -> None:
    """Starts to save; the arrays may be donated afterwards. Raises UserError if this or the previous save failed."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    local = files.is_local(self.folder)  # in a bucket there is no folder before something is in it
    if local and not self.folder.is_dir():  # Orbax would wait for minutes
      raise UserError(f"{self.folder}: is gone; nothing can be saved there")
    if local and (free := shutil.disk_usage(self.folder).free) < size:
      raise UserError(
        f"{self.folder}: a checkpoint cannot be written: it needs {size:,} bytes, {free:,} are free; "
        f"{self._last_whole()}"
      )
    composite = args.Composite(**{name: args.StandardSave(item) for name, item in items.items()})
    self._guarded(lambda: self._manager.save(step, args=composite))

  def wait(self) -> None:
    """Returns when everything is on disk. Raises UserError if it could not be written."""
    self._guarded(self._manager.wait_until_finished)

  def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """The items as arrays of the shapes, dtypes and shardings in `abstract`.

    `frozen`, if it is among them, is read from the parameters of step 0. At step 0 that is where all parameters are
    read from: an average is the parameters themselves, and an optimizer there is not: none is among the result. Where
    step 0 has other windows than `abstract`, the result is the parameters that are not windows' own alone: those are to
    begin anew (`state.begin_windows`). Raises UserError if they cannot be read: in all processes if in one.
    """
    of_base = ("params", "ema", "frozen") if step == 0 else ("frozen",)
    base = {name: abstract[name] for name in of_base if name in abstract}
    if step == 0 and not self._has_windows_of(base):
      return {name: self._restore_from_base(partition.split(item, partition.WINDOWS)[1]) for name, item in base.items()}
    own = {name: item for name, item in abstract.items() if name not in (*of_base, *["optimizer"] * (step == 0))}
    composite = args.Composite(**{name: args.StandardRestore(item) for name, item in own.items()})
    items = self._all_or_none(step, lambda: dict(self._manager.restore(step, args=composite)))
    return items | {name: self._restore_from_base(item) for name, item in base.items()}

  def _has_windows_of(self, items: dict[str, dict[str, Any]]) -> bool:
    """Whether the parameters of step 0 have those of windows, by name and shape, that the `items` have; True where
    that cannot be read, which restoring will report."""
    shapes = lambda tree: {
      path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(tree).items() if evo_lib.is_of_windows(path)
    }
    try:
      saved = ocp.PyTreeCheckpointHandler().metadata(self.folder / "0" / "params").tree
      return shapes(saved) == {path: shape for item in items.values() for path, shape in shapes(item).items()}
    except Exception:  # Orbax and TensorStore raise many kinds
      return True

  def _restore_from_base(self, abstract: dict[str, Any]) -> dict[str, Any]:
    """Some of the parameters of step 0."""
    if not abstract:
      return {}
    if 0 not in self.steps():
      raise UserError(f"{self.folder / '0'}: is missing; the parameters that are not trained are there alone")

    def read():
      restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
      partial = args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(self.folder / "0" / "params", args=partial)
      for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if not isinstance(leaf, jax.Array):  # what is not there is left as it was asked for
          raise ValueError(f"it has no parameter {jax.tree_util.keystr(path, simple=True, separator='/')}")
      return found

    return self._all_or_none(0, read)

  def _all_or_none(self, step: int, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` gives. Raises UserError, in all processes if in one, where it fails."""
    items, problem = {}, None
    try:
      items = read()
    except Exception as error:  # Orbax and TensorStore raise many kinds, too
      problem = error
    if not _all_succeeded(problem is None):
      reason = _summary(problem) if problem else "another process could not read it"
      raise UserError(f"{self.folder / str(step)}: cannot be restored: {reason}") from problem
    return items

  def restore_latest(self, abstract: dict[str, Any], set_aside: bool = True) -> tuple[int, dict[str, Any]]:
    """The step and the items of the last checkpoint that can be read; each that cannot is skipped with a warning.

    Raises UserError if none can be read. set_aside: move skipped checkpoints to `damaged/STEP`, so that their steps
    can be saved again.
    """
    problems = []
    for step in reversed(self.steps()):
      try:
        items = self.restore(step, abstract)
      except UserError as error:
        problems.append(error)
        continue
      if jax.process_index() == 0:
        for problem in problems:
          print(f"evo_jax: warning: {problem}; step {step} is read instead", file=sys.stderr, flush=True)
      if problems and set_aside:
        self._set_aside([damaged for damaged in self.steps() if damaged > step])
      return step, items
    raise problems[0]

  def _set_aside(self, steps: list[int]) -> None:
    if jax.process_index() == 0:
      for step in steps:
        (self.folder / str(step)).rename(files.place_aside(self.folder.parent, str(step)))
    _all_succeeded(True)  # a barrier: the others wait for process 0
    self._manager.reload()

  def close(self) -> None:
    """Ends background work. What could not be written is `wait`'s to report; after another error nothing is added."""
    with contextlib.suppress(Exception):  # Orbax and TensorStore raise many kinds
      self._manager.close()

  def _guarded(self, act: Callable[[], Any]) -> None:
    try:
      act()
      self._manager.check_for_errors()
    except Exception as error:  # Orbax and TensorStore raise many kinds: OSError, ValueError, RuntimeError
      raise UserError(
        f"{self.folder}: a checkpoint cannot be written: {_summary(error)}; " + self._last_whole()
      ) from error

  def _last_whole(self) -> str:
    """A clause about the last checkpoint in the file system: after a failed save the manager counts that step too."""
    step = last_saved(self.folder.parent)
    return "none is saved" if step is None else f"the last whole one is of step {step}"


def read_checkpoint(workdir: epath.Path, abstract: dict[str, Any], step: int | None) -> tuple[int, dict[str, Any]]:
  """The step and the items, as in `abstract`, of the checkpoint of `step`, or of the last that can be read (None).

  Nothing in the work directory is changed. Raises UserError where there is no such checkpoint, or it cannot be read.
  """
  if not (workdir / "checkpoints").is_dir():
    raise UserError(f"{workdir}: holds no checkpoint")
  checkpoints = CheckpointStore(workdir, keep=None)
  try:
    if not checkpoints.steps() or step not in (None, *checkpoints.steps()):
      raise UserError(f"{workdir}: holds no checkpoint" + ("" if step is None else f" of step {step}"))
    if step is None:
      return checkpoints.restore_latest(abstract, set_aside=False)
    return step, checkpoints.restore(step, abstract)
  finally:
    checkpoints.close()


def _all_succeeded(succeeded: bool) -> bool:
  """Whether all processes did. Returns when all have called it."""
  if jax.process_count() == 1:
    return succeeded
  return bool(np.all(multihost_utils.process_allgather(np.array(succeeded))))


def _summary(error: BaseException) -> str:
  """The first line of an error, and the arrays, a line `NAME:` each, that Orbax finds on one side only."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  names = [line[:-1] for line in lines[1:] if re.fullmatch(r"[\w.]+:", line)]
  return " ".join([lines[0][:300], ", ".join(names)]).strip() if lines else type(error).__name__


def resolve_workdir(workdir: str) -> epath.Path:
  """The folder that --workdir names: an absolute path, which Orbax needs, unless it is in a bucket.

  Raises UserError for a name that is empty or not UTF-8, which Orbax cannot write to, of no known user, of other remote
  storage than gs://, and for that where its library is missing.
  """
  if not workdir.strip():
    raise UserError("--workdir: is empty")
  try:
    workdir.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"--workdir={workdir!a}: is not UTF-8") from error
  if workdir.startswith("~") and os.path.expanduser(workdir) == workdir:
    raise UserError(f"--workdir={workdir}: there is no such user")
  scheme = workdir.partition("://")[0] if "://" in workdir else ""
  if scheme not in ("", "gs"):
    raise UserError(f"--workdir={workdir}: is neither a local folder nor in gs://")
  if scheme and importlib.util.find_spec("gcsfs") is None:
    raise UserError(f"--workdir={workdir}: needs gcsfs: pip install 'evo_jax[gcs]'")
  folder = epath.Path(workdir).expanduser()
  return folder if scheme else folder.absolute()


def make_workdir(workdir: str) -> epath.Path:
  """Creates the folder that --workdir names. Raises UserError if nothing can be written there."""
  folder = resolve_workdir(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{jax.process_index()}"
    probe.write_text("")
    probe.unlink()
  except FileExistsError as error:
    raise UserError(f"--workdir={workdir}: is a file, or a link to nothing") from error
  except (OSError, ValueError) as error:  # ValueError: a name with a null byte
    raise UserError(f"--workdir={workdir}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
  return folder


def last_saved(workdir: epath.Path) -> int | None:
  """The step of the last checkpoint in a work directory, readable or not; None where nothing is saved."""
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if re.fullmatch("[0-9]{1,18}", name)), default=None)


def write_config(
  workdir: epath.Path,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  parameters: int,
  fingerprints: list[str] | None,
) -> None:
  """Writes config.json, and the tokenizer's files beside it. Raises UserError if they cannot be written.

  fingerprints: of the text; None: of an imported model, which no text has trained yet.
  """
  for name, content in tokenizer.files().items():
    try:
      (workdir / "tokenizer").mkdir(exist_ok=True)
    except OSError as error:
      raise UserError(f"{workdir / 'tokenizer'}: cannot be made: {error.strerror or error}") from error
    files.write_file(workdir / "tokenizer" / name, content)
  values = {
    "config": config_lib.to_dict(config),
    "tokenizer": tokenizer.identity,
    "vocab_size": tokenizer.vocab_size,
    "parameters": parameters,
    "text": fingerprints,
  }
  files.write_json(workdir / "config.json", values)


def check_resumable(
  workdir: epath.Path, config: config_lib.Config, tokenizer: tokenizers.Tokenizer, fingerprints: list[str]
) -> config_lib.Config | None:
  """The configuration that the checkpoints in a work directory were trained with; None where nothing is saved.

  Prints a line for each field that has changed. Raises UserError where the checkpoints' contents depend on that field,
  and, once a step was made, where batches and random draws do, or where the text is another.
  """
  step = last_saved(workdir)
  if step is None:
    if jax.process_index() == 0 and (workdir / "config.json").exists():
      print(f"{workdir}: no checkpoint is there: training begins at step 1", flush=True)
    return None
  old = read_config(workdir)
  for field, before, after, pin in config_lib.differences(old["config"], config):
    # Before the first step there may be no average yet, which then begins as the parameters, and windows begin anew.
    begins = step == 0 and (pin == "windows" or (field == "optim.ema" and before == 0))
    made = step > 0 and config_lib.differs_so_far(field, before, after, step)
    if (pin in ("contents", "windows") and not begins) or (pin and made):
      raise UserError(
        f"config.{field}: {after!r} does not fit {workdir}, which was trained with {before!r}; "
        f"go on with that, or use another --workdir"
      )
    if jax.process_index() == 0:
      print(f"config.{field}: {before!r} -> {after!r}", flush=True)
  if old["tokenizer"] != tokenizer.identity:
    raise UserError(
      f"config.data.tokenizer_path: tokenizer {tokenizer.identity} is not the checkpoint's, {old['tokenizer']}"
    )
  if step > 0 and old["text"] != fingerprints:
    raise UserError(
      f"config.data.path: the text of {config.data.path!r} is not what {workdir} was trained on: "
      "files were changed, added, removed or given in another order; go on with that text, or use another --workdir"
    )
  return old["config"]


def read_config(workdir: epath.Path) -> dict[str, Any]:
  """config.json with the configuration as a Config. Raises UserError where there is none, or it is damaged."""
  path = workdir / "config.json"
  try:
    values = json.loads(path.read_bytes())
    fields, tokenizer, text = values["config"], values["tokenizer"], values["text"]
    if isinstance(start := fields.get("window", {}).get("start"), float):  # of earlier versions: a share of the steps
      fields["window"]["start"] = int(start * fields["train"]["steps"])
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror or error}; is this the --workdir of a run?") from error
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{path}: is damaged ({type(error).__name__}: {str(error)[:100]})") from error
  try:
    return {**values, "tokenizer": tokenizer, "text": text, "config": config_lib.from_dict(fields)}
  except UserError as error:
    raise UserError(f"{path}: {error}; was it written by another version?") from error
