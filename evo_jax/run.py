"""A finished or running model, for every reader."""

import dataclasses
from typing import Any

from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.training import checkpoint
from evo_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, to be read: `params` are the averaged ones where the run kept an average."""

  config: config_lib.Config
  tokenizer: tokenizers.Tokenizer
  model: Any  # model.Evo
  params: Any
  statistics: Any  # elbo.Statistics
  step: int


def load_run(workdir: str, step: int | None = None) -> Run:
  """Loads the last (or the given) checkpoint for evaluation or generation, without the optimizer's state."""

  folder = checkpoint.resolve_workdir(workdir)
  if not workdir or not folder.is_dir():
    raise UserError(f"--workdir={workdir}: is no folder")
  saved = checkpoint.read_config(folder)
  config = saved["config"]
  tokenizer = tokenizers.load_tokenizer(config.data.tokenizer, str(folder / "tokenizer"))
  if tokenizer.identity != saved["tokenizer"]:
    raise UserError(f"{folder}: tokenizer {tokenizer.identity} is not the checkpoint's, {saved['tokenizer']}")
  if not (folder / "checkpoints").is_dir():
    raise UserError(f"{folder}: holds no checkpoint")
  checkpoints = checkpoint.CheckpointStore(folder, config.train.checkpoints_kept)
  try:
    steps = checkpoints.manager.all_steps()
    if not steps or step not in (None, *steps):
      raise UserError(f"{folder}: holds no checkpoint" + ("" if step is None else f" of step {step}"))
    model = state_lib.make_model(config, tokenizer)
    which = "ema" if config.optim.ema else "params"
    abstract = {
      name: item for name, item in state_lib.abstract_items(model, config).items() if name in (which, "statistics")
    }
    if step is None:
      found, items = checkpoints.restore_latest(abstract, set_aside=False)
    else:
      found, items = step, checkpoints.restore(step, abstract)
  finally:
    checkpoints.close()
  return Run(config, tokenizer, model, items[which], items["statistics"], found)
