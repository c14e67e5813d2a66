"""Ablations: one change at a time to the method and its training, in validation bits on several paths.

  python -m experiments.ablations [--data='dir/*.txt'] [--budget=4e12] [--only=NAME,...] [--workdir=runs/ablations]

All settings train the same model (the frontier's CPU scale) for the same number of FLOPs; runs that were stopped
continue. Nothing here reads the test split.
"""

from typing import Any

from absl import flags

from evo_jax import cli
from evo_jax.network import flops
from experiments import common, frontier

PATHS = (
  "ar",
  "streams:2",
  "streams:4",
  "streams:8",
  "certain:8",
  "random:16",
  "diagonal:4",
  "diagonal:16",
  "rolling:16",
)

# What all settings change. Their results led to frontier.EVO and to the frontier's learning rate and schedule, which
# therefore differ.
BASE = {"optim.learning_rate": 3e-3, "optim.schedule": "cosine"}
EVO = frontier.EVO | {"window.count": 2, frontier.START: 0.5, "loss.bound_windows": 1}

# Changes to EVO by the setting's name.
EVO_CHANGES = {
  "base": {},
  # The mixture of paths; when windows start, their number and size.
  "no_streams": {"paths.streams": 0.0},
  "no_ragged": {"paths.ragged": 0.0},
  "no_jumps": {"paths.streams": 0.0, "paths.erasure": 0.0, "paths.ragged": 0.0},
  "jumps_only": {"paths.diagonal": 0.0, "paths.rolling": 0.0, "paths.independent": 0.0, "loss.bound_windows": 0},
  "start_0": {frontier.START: 0.0},
  "start_0.75": {frontier.START: 0.75},
  "start_0.75_count_4": {frontier.START: 0.75, "window.count": 4, "loss.bound_windows": 2},
  "start_0.9": {frontier.START: 0.9},
  "start_0.9_count_4": {frontier.START: 0.9, "window.count": 4, "loss.bound_windows": 2},
  "start_0.75_wsd": {frontier.START: 0.75, "optim.schedule": "wsd"},
  "count_1": {"window.count": 1, "loss.bound_windows": 0},
  "size_16": {"window.size": 16, "window.count": 8, "loss.bound_windows": 4, "paths.stream_counts": (2, 4)},
  "size_32": {"window.size": 32, "window.count": 4, "loss.bound_windows": 2},
  "size_128": {"window.size": 128},
  # The losses, their weights and gradients.
  "window_weight_1": {"loss.window_weight": 1.0},
  "window_weight_0.25": {"loss.window_weight": 0.25},
  "clean_gradient_0": {"loss.clean_gradient": 0.0},
  "separate_clip": {"optim.separate_clip": True},
  "cross_entropy": {"loss.bound_windows": 0, "loss.codes": "all"},
  "frozen_codes": {"loss.codes": "frozen"},
  "bound_weight_1": {"loss.bound_weight": 1.0},
  # The bound's variance.
  "plain_noise": {"loss.antithetic": False},
  "small_step_rate": {"loss.integrand": "rate", "paths.steps": (1000,)},
  "importance_steps": {"paths.step_sampling": "importance"},
  # The network's inputs, and the size of codes.
  "self_conditioning": {"loss.self_conditioning": 0.5},
  "codes_8": {"model.code_dim": 8},
  "codes_128": {"model.code_dim": 128},
  "learned": {"model.progression": "learned", "paths.learned": 0.25},
}
# name: (method of the frontier, changes to it, paths to measure)
SETTINGS = {name: ("evo", changes, PATHS) for name, changes in EVO_CHANGES.items()}
SETTINGS["learned"] = (
  "evo",
  EVO_CHANGES["learned"],
  PATHS + ("diagonal:2", "diagonal:8", "learned:2", "learned:4", "learned:8"),
)
# Learning rates of the frontier's methods, Evo's among them: no baseline may be weak because of its learning rate.
SETTINGS |= {
  f"{method}_rate_{rate:g}": (method, {"optim.learning_rate": rate}, paths)
  for method, paths in (
    ("ar", ("ar",)),
    ("evo", PATHS),
    ("mdlm", ("random:64",)),
    ("bd3_16", ("random:16",)),
    ("plaid", ("diagonal:64",)),
  )
  for rate in (8e-4, 1.5e-3, 3e-3, 6e-3)
  if (method, rate) != ("evo", 3e-3)
}
SETTINGS["ar_wsd"] = ("ar", {"optim.schedule": "wsd"}, ("ar",))


def main() -> None:
  args = flags.FLAGS
  results = [run_setting(name, args) for name in common.select(args.only, SETTINGS)]
  print_table(results)
  common.write_result("ablations", results)


def run_setting(name: str, args: flags.FlagValues) -> dict[str, Any]:
  """Trains and measures a setting, as far as its work directory does not hold the results."""
  method, changes, paths = SETTINGS[name]
  start = BASE | (EVO if method == "evo" else frontier.METHODS[method].changes)
  values = frontier.base(frontier.SCALES["cpu"], args.data, args.seed)
  config = frontier.with_budget(values, start | changes, args.budget)
  table = common.MeasuredRun(config, f"{args.workdir}/{name}").measure("valid", args.sequences, paths)
  return {
    "name": name,
    "method": method,
    "changes": changes,
    "steps": config.train.steps,
    "flops": flops.train_run(config, frontier.vocab_rows(config)),
    "table": {path: {k: v for k, v in entry.items() if k != "each"} for path, entry in table.items()},
  }


def print_table(results: list[dict[str, Any]]) -> None:
  """Prints bits per character by setting and path, below a setting those on further paths."""
  print(f"{'setting':<20}" + "".join(f"{path:>12}" for path in PATHS))
  for result in results:
    bits = {path: entry["bits"] for path, entry in result["table"].items()}
    print(f"{result['name']:<20}" + "".join(f"{bits[path]:>12.3f}" if path in bits else " " * 12 for path in PATHS))
    for path in (p for p in bits if p not in PATHS):
      print(f"  {path}: {bits[path]:.3f}")


if __name__ == "__main__":
  flags.DEFINE_string("data", "", "Text, as config.data.path; default: the standard library's sources.")
  flags.DEFINE_float("budget", 4e12, "FLOPs of each setting's training.")
  flags.DEFINE_integer("sequences", 32, "Held-out sequences; 0: all.")
  flags.DEFINE_integer("seed", 0, "Seed of parameters and random draws.")
  flags.DEFINE_string("only", "", "Comma-separated settings; default: all.")
  flags.DEFINE_string("workdir", "runs/ablations", "Folder of the runs.")
  cli.run(main)
