"""What teaches the windows best: cross-entropy, the bound, or both; and what it costs the AR path.

  python -m experiments.window_loss [--config=configs/tiny.py] [--steps=520] [--data='dir/*.txt'] [--only=NAME,...]

Trains the same model on the same batches under each setting of `SETTINGS`, in runs/window_loss/NAME (interrupted runs go
on), and measures validation bits on every path. Validation picks; nothing here reads the test split.
"""

from absl import flags

from evo_jax import checkpoint, cli, evaluate, data, train
from evo_jax import config as config_lib
from evo_jax import sharding
from experiments import common

PATHS = ("ar", "staircase", "diagonal:1", "diagonal:4", "diagonal:16", "diagonal:64", "rolling:8", "rolling:32")

SETTINGS = {
    "ar_only": {"window.count": 0, "loss.bound_windows": 0},
    "cross_entropy": {"loss.bound_windows": 0, "loss.codes": "all"},
    "frozen_codes": {"loss.bound_windows": 0, "loss.codes": "frozen"},
    "half_bound": {"loss.bound_windows": 1, "loss.bound_weight": 0.2, "loss.codes": "bound"},
    "half_bound_codes_all": {"loss.bound_windows": 1, "loss.bound_weight": 0.2, "loss.codes": "all"},
    "half_bound_weight_1": {"loss.bound_windows": 1, "loss.bound_weight": 1.0, "loss.codes": "bound"},
    "all_bound": {"loss.bound_windows": 2, "loss.bound_weight": 0.2, "loss.codes": "bound"},
    "all_bound_weight_1": {"loss.bound_windows": 2, "loss.bound_weight": 1.0, "loss.codes": "bound"},
    "separate_clip": {"loss.bound_windows": 1, "loss.bound_weight": 0.2, "optim.separate_clip": True},
    "window_weight_1": {"loss.bound_windows": 1, "loss.window_weight": 1.0},
    "clean_gradient_0": {"loss.bound_windows": 1, "loss.clean_gradient": 0.0},
}


def measure(name: str, changes: dict) -> dict:
  """Trains (or finds trained) one setting; returns its validation bits by path."""
  values = common.load_config(flags.FLAGS.config)
  common_changes = {"train.steps": flags.FLAGS.steps, "train.eval_every": 0, "eval.samples": 0, "eval.paths": ("ar",)}
  if flags.FLAGS.data:
    common_changes["data.path"] = flags.FLAGS.data
  workdir = f"{flags.FLAGS.workdir}/{name}"
  train.train(common.configure(values, common_changes, changes), workdir)
  run = checkpoint.load_run(workdir)
  sequences = data.held_out(data.load(run.config.data.path, run.tokenizer), "valid", run.config.model.context,
                            flags.FLAGS.sequences)
  evaluator = evaluate.Evaluator(run.model, run.config, run.tokenizer, sharding.make_mesh(config_lib.Mesh()))
  paths = PATHS[:1] if name == "ar_only" else PATHS
  table = evaluator(run.params, run.statistics, sequences, paths)
  print(f"\n{name}: {changes}\n{evaluate.format_table(table)}\n", flush=True)
  return {"name": name, "changes": changes, "table": table}


def main() -> None:
  results = [measure(name, SETTINGS[name]) for name in common.chosen(flags.FLAGS.only, SETTINGS)]
  print(f"{'setting':<22}" + "".join(f"{path:>13}" for path in PATHS))
  for result in results:
    print(f"{result['name']:<22}" + "".join(f"{entry['bits']:>13.3f}" for entry in result["table"]))
  common.write_result("window_loss", results)


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/tiny.py", "The configuration that all settings start from.")
  flags.DEFINE_integer("steps", 520, "Training steps of each setting.")
  flags.DEFINE_string("data", "", "Text, as config.data.path; default: the configuration's.")
  flags.DEFINE_integer("sequences", 256, "Held-out sequences; 0: all.")
  flags.DEFINE_string("only", "", "Comma-separated settings; default: all.")
  flags.DEFINE_string("workdir", "runs/window_loss", "Where the runs live.")
  cli.run(main)
