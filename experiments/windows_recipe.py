"""What the windows of a pretrained model learn in equal time: one change at a time to configs/smollm2_windows.py.

  python -m evo_jax.convert --source=MODEL.gguf --workdir=DIR
  python -m evo_jax.generate --workdir=DIR --chat --prompts=chats.jsonl --output=own
  python -m experiments.windows_recipe --model=DIR --own='own/*.jsonl' --given='chats/*.jsonl'
      --kind=instructions:talk.jsonl [--chat=answers] [--minutes=20] [--dtype=bfloat16] [--only=NAME,...]
      [--workdir=runs/windows_recipe]

--own is text that the model wrote, --given text of others; with --chat both are conversations (data.chat). Every
setting trains from the imported weights for as long as base takes for --minutes of steps: short runs of both in turns
first measure how long a step takes, since a machine's own speed changes within hours; given_text, whose step is base's
own, takes as many. Measured are the KL divergence from autoregression, in bits per token, over the last fifth of
training, and, by the sampler on held-out prompts (--kind, as in experiments/verify_speed.py), the drafted tokens that
are accepted per round, drafted by windows alone, greedy and at temperature 1. Runs that were stopped go on, and a
setting that the JSON of the results holds is not repeated.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.configs import smollm2_windows
from evo_jax.errors import UserError
from evo_jax.training import partition
from experiments import common
from experiments.verify_speed import count_by_kind, read_kind, sampling

_TIMED_STEPS = 4

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
  selected = common.select(args.only, SETTINGS)
  for name in selected:
    configure(name, 1, args)  # what is wrong is said before anything is trained
  names = ("chat", "minutes", "every", "texts", "tokens", "draft", "seed", "dtype")
  settings = {name: args[name].value for name in names}
  sources = {"model": common.model_identity(args.model), "given": common.shortened(args.given)}
  sources |= {"own": common.shortened(args.own), "kinds": [common.shortened(kind) for kind in args.kind]}
  recorded = common.RecordedRuns("windows_recipe", common.results_folder(args.output), settings | sources)
  results = [
    recorded.find(name=name, changes=SETTINGS[name]) or recorded.add(run_setting(name, kinds, recorded, args))
    for name in selected
  ]
  print_table(results)


def run_setting(
  name: str, kinds: dict[str, list[str]], recorded: common.RecordedRuns, args: flags.FlagValues
) -> dict[str, Any]:
  """Trains and measures a setting, as far as its folder has not been trained."""
  folder = Path(args.workdir) / name
  common.check_begun_with(args.model, folder)
  time = read_time(name, recorded, args)
  config = configure(name, time["steps"], args)
  common.train(config, folder, args.model)
  rows = common.read_metrics(folder)
  last = [row["window_kl"] for row in rows if row["step"] > 0.8 * time["steps"] and "window_kl" in row]
  run = run_lib.load_run(str(folder))
  return {
    "name": name,
    "changes": SETTINGS[name],
    **time,
    "drafted_tokens": time["steps"] * config.data.batch_size * config.window.count * (config.window.size - 1),
    "parameters": sum(x.size for x in jax.tree.leaves(partition.split(run.params, partition.WINDOWS)[0])),
    "window_kl": sum(last) / max(len(last), 1),
    "accepted": measure(name, run, kinds, args),
  }


def read_time(name: str, recorded: common.RecordedRuns, args: flags.FlagValues) -> dict[str, Any]:
  """`steps` of a setting in its share of time, and `step_time`, that of one as a multiple of base's: as they are
  written down in the folder of the runs, as recorded, or as short runs find out."""
  file = Path(args.workdir) / f"{name}.json"
  if file.exists():
    found = json.loads(file.read_text())
    if found.pop("minutes") != args.minutes:
      raise UserError(f"--minutes={args.minutes}: {file} is of others; give another --workdir")
    return found
  if found := recorded.find(name=name, changes=SETTINGS[name]):
    return {key: found[key] for key in ("steps", "step_time")}
  if name == "base":
    time = {"steps": max(int(60 * args.minutes / time_step(name, args)), 1), "step_time": 1.0}
  elif not SETTINGS[name]:  # base's own step, on other text
    time = {"steps": read_time("base", recorded, args)["steps"], "step_time": 1.0}
  else:
    steps = read_time("base", recorded, args)["steps"]
    before, own, after = (time_step(each, args) for each in ("base", name, "base"))
    relative = own / min(before, after)
    time = {"steps": max(round(steps / relative), 1), "step_time": relative}
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(time | {"minutes": args.minutes}))
  return time


def time_step(name: str, args: flags.FlagValues) -> float:
  """Seconds of a setting's step, by a short run."""
  config = configure(name, _TIMED_STEPS, args, log_every=1)
  return min(common.time_training(config, Path(args.workdir) / f"{name}.timed", args.model))


def configure(name: str, steps: int, args: flags.FlagValues, log_every: int = 20) -> config_lib.Config:
  """The configuration of a setting. Raises UserError."""
  path = args.given if name == "given_text" else args.own
  if not path:
    raise UserError(f"--given: {name} needs it")
  values = common.load_config(str(Path(args.model) / "config.py"))
  smollm2_windows.add_windows(values)
  run = {"data.path": path, "optim.warmup": 20, "train.steps": steps, "train.seed": args.seed}
  run |= {"data.chat": args.chat, "model.isolate_documents": bool(args.chat)}
  run |= {"train.log_every": log_every, "train.checkpoint_every": 100}
  run |= {"model.dtype": args.dtype} if args.dtype else {}
  return common.configure(values, SETTINGS[name], run)


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
  flags.DEFINE_string("chat", "", "How conversations are trained on: data.chat. Default: text.")
  flags.DEFINE_float("minutes", 20.0, "Of each setting's training.")
  flags.DEFINE_integer("seed", 0, "Seed of parameters and random draws.")
  flags.DEFINE_enum("dtype", "", ["", *config_lib.DTYPES], "Of computation; default: the configuration's.")
  flags.DEFINE_string("only", "", "Comma-separated settings; default: all.")
  flags.DEFINE_string("workdir", "runs/windows_recipe", "Folder of the runs.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)
