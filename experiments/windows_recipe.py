"""What the windows of a pretrained model learn in equal time: one change at a time to configs/smollm2_windows.py.

  python -m evo_jax.convert --source=MODEL.gguf --workdir=DIR
  python -m evo_jax.generate --workdir=DIR --chat --prompts=chats.jsonl --output=own
  python -m experiments.windows_recipe --model=DIR --own='own/*.jsonl' --given='chats/*.jsonl'
      --kind=instructions:talk.jsonl [--minutes=20] [--dtype=bfloat16] [--only=NAME,...] [--workdir=runs/windows_recipe]

--own is text that the model wrote, --given text of others. Every setting trains for --minutes on this machine, from the
imported weights: a short run first measures its seconds per step. Measured are the KL divergence from autoregression,
in bits per token, over the last fifth of training, and, by the sampler on held-out prompts (--kind, as in
experiments/verify_speed.py), the drafted tokens that are accepted per round, drafted by windows alone, greedy and at
temperature 1. Runs that were stopped go on, and a setting that the JSON of the results holds is not repeated.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.errors import UserError
from evo_jax.training import partition
from experiments import common
from experiments.verify_speed import count_by_kind, read_kind, sampling

_TIMED_STEPS = 8

SETTINGS = {
  "base": {},
  # Form and rank.
  "rank_8": {"model.window_rank": 8},
  "rank_128": {"model.window_rank": 128},
  "twins": {"model.window_rank": 0, "model.window_twins": True, "optim.learning_rate": 3e-4},
  "full_attention": {"model.window_attention": "full"},
  "no_vector": {"model.window_unknown": False},
  # The head that sees the draft token before.
  "no_head": {"model.window_head": 0},
  "candidates_16": {"model.window_candidates": 16},
  # What windows are trained by, and on.
  "cross_entropy": {"loss.distill": 0.0},
  "half_distilled": {"loss.distill": 0.5},
  "even_positions": {"loss.position_decay": 0.0},
  "given_text": {},
  # Windows of a sequence, and their size.
  "count_8": {"window.count": 8},
  "count_64": {"window.count": 64},
  "size_5": {"window.size": 5, "window.count": 56},
  "size_16": {"window.size": 16, "window.count": 15},
  "rate_3e-4": {"optim.learning_rate": 3e-4},
  "rate_3e-3": {"optim.learning_rate": 3e-3},
}


def main() -> None:
  args = flags.FLAGS
  for name in ("model", "own", "kind"):
    if not args[name].value:
      raise UserError(f"--{name} is needed")
  kinds = dict(read_kind(spec, args.every, args.texts) for spec in args.kind)
  settings = {name: args[name].value for name in ("minutes", "every", "texts", "tokens", "draft", "seed", "dtype")}
  sources = {"model": common.model_identity(args.model), "given": common.shortened(args.given)}
  sources |= {"own": common.shortened(args.own), "kinds": [common.shortened(kind) for kind in args.kind]}
  recorded = common.RecordedRuns("windows_recipe", common.results_folder(args.output), settings | sources)
  results = [
    recorded.find(name=name, changes=SETTINGS[name]) or recorded.add(run_setting(name, kinds, args))
    for name in common.select(args.only, SETTINGS)
  ]
  print_table(results)


def run_setting(name: str, kinds: dict[str, list[str]], args: flags.FlagValues) -> dict[str, Any]:
  """Trains and measures a setting, as far as its folder has not been trained."""
  folder = Path(args.workdir) / name
  path = args.given if name == "given_text" else args.own
  if not path:
    raise UserError(f"--given: {name} needs it")
  changes = SETTINGS[name] | {"data.path": path, "data.tokenizer_path": str(Path(args.model) / "tokenizer")}
  changes |= {"model.dtype": args.dtype} if args.dtype else {}
  timed = folder.with_name(f"{name}.json")  # a run that was stopped goes on for as many steps as it was given
  if not timed.exists():
    config = configure(changes | {"train.log_every": 2}, _TIMED_STEPS)
    seconds = common.time_training(config, folder.with_name(f"{name}.timed"), args.model)
    timed.write_text(json.dumps(min(seconds)))
  seconds = json.loads(timed.read_text())
  steps = max(int(60 * args.minutes / seconds), 1)
  config = configure(changes, steps, args.seed)
  common.train(config, folder, args.model)
  last = [row for row in common.read_metrics(folder) if row["step"] > 0.8 * steps and "window_kl" in row]
  run = run_lib.load_run(str(folder))
  return {
    "name": name,
    "changes": SETTINGS[name],
    "seconds_per_step": seconds,
    "steps": steps,
    "drafted_tokens": steps * config.data.batch_size * config.window.count * (config.window.size - 1),
    "parameters": sum(x.size for x in jax.tree.leaves(partition.split(run.params, partition.WINDOWS)[0])),
    "window_kl": sum(row["window_kl"] for row in last) / max(len(last), 1),
    "accepted": measure(name, run, kinds, args),
  }


def configure(changes: dict[str, Any], steps: int, seed: int = 0) -> config_lib.Config:
  changes = changes | {"train.steps": steps, "train.seed": seed, "train.checkpoint_every": 100, "eval.sequences": 8}
  return common.configure(common.load_config("smollm2_windows"), changes)


def measure(name: str, run: run_lib.Run, kinds: dict[str, list[str]], args: flags.FlagValues) -> list[dict[str, Any]]:
  """What windows alone draft of held-out texts."""
  fields = dict(mode="verify", draft=args.draft, draft_from="windows", batch_size=args.texts)
  return [
    row
    for temperature in (0.0, 1.0)
    for row in count_by_kind(
      run.in_conversation(), kinds, temperature, name, sampling(temperature, args.tokens, **fields), args.seed
    )
  ]


def print_table(results: list[dict[str, Any]]) -> None:
  """Prints, by setting, what was accepted per round of each kind of text, greedy and at temperature 1."""
  columns = [(row["kind"], row["temperature"]) for row in results[0]["accepted"]]
  print(f"{'setting':<16}{'steps':>7}{'kl':>7}" + "".join(f"{kind:>14} {t:g}" for kind, t in columns))
  for result in results:
    accepted = {(row["kind"], row["temperature"]): row["accepted_per_round"] for row in result["accepted"]}
    cells = "".join(f"{accepted[column]:>16.2f}" for column in columns)
    print(f"{result['name']:<16}{result['steps']:>7}{result['window_kl']:>7.2f}{cells}")


if __name__ == "__main__":
  flags.DEFINE_string("model", "", "The imported model's work directory.")
  flags.DEFINE_string("own", "", "Globs of text that the model wrote.")
  flags.DEFINE_string("given", "", "Globs of text that others wrote, for the setting given_text.")
  flags.DEFINE_multi_string("kind", [], "NAME:FILE[:FIELD[:INSTRUCTION]]: held-out prompts.")
  flags.DEFINE_integer("every", 10, "Every so many lines of a file are held out.", lower_bound=1)
  flags.DEFINE_integer("texts", 16, "Texts of each kind.", lower_bound=1)
  flags.DEFINE_integer("tokens", 128, "Tokens of a text at most.", lower_bound=1)
  flags.DEFINE_integer("draft", 7, "Drafted tokens a round.", lower_bound=1)
  flags.DEFINE_float("minutes", 20.0, "Of each setting's training.")
  flags.DEFINE_integer("seed", 0, "Seed of parameters and random draws.")
  flags.DEFINE_enum("dtype", "", ["", *config_lib.DTYPES], "Of computation; default: the configuration's.")
  flags.DEFINE_string("only", "", "Comma-separated settings; default: all.")
  flags.DEFINE_string("workdir", "runs/windows_recipe", "Folder of the runs.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)
