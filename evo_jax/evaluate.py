"""Bits per byte or character of text, on any path."""

import json

from absl import flags
from etils import epath

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.flow import schedules
from evo_jax.parallel import sharding

GAP_PATHS = ("ar", "rolling:16", "diagonal:4", "diagonal:16", "diagonal:64", "random:16")


def main() -> None:
  args = flags.FLAGS
  paths = tuple(path.strip() for path in args.paths.split(",") if path.strip())
  if args.paths and not paths:
    raise UserError("--paths: is empty; give paths as in --paths=ar,diagonal:16,rolling:8")
  for path in paths:
    schedules.parse_path(path)
  for name in ("sequences", "window"):
    if getattr(args, name) < 0:
      raise UserError(f"--{name}={getattr(args, name)}: is negative")
  if args.json:
    try:
      epath.Path(args.json).open("a").close()
    except OSError as error:
      raise UserError(f"--json={args.json}: cannot be written: {error.strerror or error}") from error
  run = run_lib.load_run(args.workdir, args.step)
  L = run.config.model.context
  window = args.window or run.config.window.size
  if L % window:
    raise UserError(f"--window={args.window}: does not divide the context of {L}")
  if not paths:
    paths = GAP_PATHS + (("learned:8",) if run.config.model.progression == "learned" else ())
  if args.data:
    corpora, split = [corpora_lib.all_text(args.data, run.tokenizer, "--data")], "test"
  else:
    corpora, split = corpora_lib.load_corpora(run.config.data.path, run.tokenizer), args.split
  if args.show_progression:
    sequence = batches_lib.held_out(corpora, split, L, 1)[0]
    found = paths_lib.progression(run, sequence, window, args.passes)
    print(paths_lib.format_progression(found, run.tokenizer, window))
    if args.json:
      epath.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return
  sequences = batches_lib.held_out(corpora, split, L, args.sequences)
  mesh = sharding.make_mesh(config_lib.Mesh())
  evaluator = paths_lib.Evaluator(run.model, run.config, run.tokenizer, mesh, args.seed, window=window)
  table = evaluator(run.params, run.statistics, sequences, paths)
  print(
    f"{args.data or run.config.data.path + ' (' + split + ')'}: {len(sequences)} sequences of {L} tokens, "
    f"windows of {window}, step {run.step}\n{paths_lib.format_table(table)}"
  )
  if gap := paths_lib.path_gap(table):
    print("\n" + paths_lib.format_gap(gap, table[0]["unit"]))
  if args.json:
    epath.Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("paths", "", f"Comma-separated paths; default: {','.join(GAP_PATHS)}, and learned:8 where it is.")
  flags.DEFINE_string("data", "", "Text to measure: comma-separated globs; empty: the run's own held-out text.")
  flags.DEFINE_enum("split", "valid", ["valid", "test"], "Which held-out text of the run's.")
  flags.DEFINE_integer("sequences", 128, "At most so many sequences, evenly spread over the text; 0: all.")
  flags.DEFINE_integer("window", 0, "Tokens of a window; 0: as in training.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_integer("seed", 0, "Of the latents' noise.")
  flags.DEFINE_bool(
    "show_progression", False, "Print a passage's tokens with the times that the model infers for them."
  )
  flags.DEFINE_integer("passes", 8, "For --show_progression: the passes a window.")
  flags.DEFINE_string("json", "", "File for the table as JSON.")
  cli.run(main)
