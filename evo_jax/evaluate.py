"""Measures bits per byte or character of text on any path: upper bounds on the model's own code length.

  python -m evo_jax.evaluate --workdir=DIR [--paths=ar,diagonal:16,entropy:0.5] [--data='dir/*.txt'] [--json=FILE]
    [--mesh=data:1,fsdp:8]
  python -m evo_jax.evaluate --workdir=DIR --show-progression

Paths, over windows of the training size (or --window), each after the text before it:

  ar            autoregression on the clean stream: one token per pass
  staircase     the same inside the windows; left:n is n tokens per pass, leftmost first
  streams:n     n staircases side by side, one in each n-th of the window: n tokens per pass that are far apart
  scaffold:K:n:t  partial evidence down to t (0.5) in K passes, then n staircases (1) that read it
  diagonal:K    all of a window's tokens together, in K passes of partial evidence
  rolling:K     a wave of partial evidence from left to right, in K passes
  learned:K     each token by the clock that the model infers for it, in K passes (model.progression = learned)
  random:K      masked diffusion: equally many tokens per pass, in random order
  certain:n     n tokens per pass: the leftmost and those whose beliefs have the least entropy
  entropy:h     all tokens whose beliefs have less than h bits, and the leftmost; also confidence:p (largest
                probability above p) and maturity:t (inferred progression below t; the others gather evidence)
  spread:h      the leftmost, all of less than h bits, and others that are far enough apart
  error:e       all of a window's tokens together, in steps as long as their estimated error allows

Of conversations (--chat, or what `evo_jax.prepare --chat` wrote) only the answers are measured, in bits per token of
theirs, each given the conversation before it; windows begin where answers do.

Text is cut into consecutive sequences of the model's context, or of --length tokens, each without what came before it;
the remainder at the end is dropped. Of a text shorter than that, its own tokens are measured. Where `ar` and diagonals
of two lengths are among the paths, the path gap is printed too.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import formats
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.evaluation import progression
from evo_jax.flow import schedules
from evo_jax.training import checkpoint

GAP_PATHS = ("ar", "rolling:16", "diagonal:4", "diagonal:16", "diagonal:64", "random:16")


def main() -> None:
  args = flags.FLAGS
  paths = parse_paths(args.paths)
  check_flags(args)
  cli.join_processes()
  run = run_lib.load_run(args.workdir, args.step, cli.make_mesh())
  length, window = args.length or run.config.model.context, args.window or run.config.window.size
  check_lengths(args, run.config.model, length, window)
  batch, source = read_text(args, run, length, 1 if args.show_progression else args.sequences)
  if batch.answers is not None:
    run = isolating(run)
  if args.show_progression:
    result, text = show_progression(run, batch, window, args.passes)
  else:
    result, text = measure(run, batch, paths or default_paths(run), window, args.seed)
    tokens = f"{length}" if batch.counted is None else f"up to {batch.counted[:, 1:].sum(1).max()}"
    answers = "" if batch.answers is None else f", {batch.answers[:, 1:].sum():,} of which count"
    what = f"{len(batch.tokens)} sequences of {tokens} tokens{answers}, windows of {window}, step {run.step}"
    text = f"{source}: {what}\n{text}"
  if jax.process_index():
    return
  print(text)
  if args.json:
    cli.write_output("json", args.json, json.dumps(result, indent=2) + "\n")


def parse_paths(value: str) -> tuple[str, ...]:
  """The paths of --paths; () where it is not given. Raises UserError for a path that does not exist."""
  paths = tuple(path.strip() for path in value.split(",") if path.strip())
  if value and not paths:
    raise UserError("--paths: is empty; give paths as in --paths=ar,diagonal:16,rolling:8")
  for path in paths:
    schedules.parse_path(path)
  return paths


def default_paths(run: run_lib.Run) -> tuple[str, ...]:
  """The paths whose gap is of interest, as far as the model has them."""
  return GAP_PATHS + (("learned:8",) if run.config.model.progression == "learned" else ())


def check_flags(args: flags.FlagValues) -> None:
  """Raises UserError for flags that are impossible whatever the run is."""
  for name in ("sequences", "window", "length"):
    if getattr(args, name) < 0:
      raise UserError(f"--{name}={getattr(args, name)}: is negative")
  if args.chat is not None and not args.data:
    raise UserError(f"--chat={args.chat}: is how --data is read, which is not given")
  if args.json:
    cli.check_output("json", args.json)


def check_lengths(args: flags.FlagValues, model: config_lib.Model, length: int, window: int) -> None:
  """Raises UserError for sequences that the model cannot read, and for windows that do not divide them."""
  if length > model.position_limit:
    raise UserError(f"--length={length}: is more than the {model.position_limit} tokens that the model can read")
  if length % window and args.length:
    raise UserError(f"--length={length}: is no multiple of the window, {window} tokens")
  if length % window:
    raise UserError(f"--window={window}: does not divide the context of {length}")


def read_text(args: flags.FlagValues, run: run_lib.Run, length: int, count: int) -> tuple[Batch, str]:
  """The sequences of `length` tokens to measure, at most `count` (0: all), and what to call them."""
  split = args.split
  if args.data:
    config = run.config.data
    config = config if args.chat is None else dataclasses.replace(config, chat="" if args.chat == "text" else args.chat)
    corpora = corpora_lib.load_text(args.data, "--data", config, run.tokenizer)
    source = formats.shown(args.data)
  else:
    corpora = corpora_lib.load_corpora(run.config.data, run.tokenizer)
    source = f"{formats.shown(run.config.data.path)} ({split})"
    trained_on = checkpoint.read_config(checkpoint.resolve_workdir(args.workdir))["text"]
    changed = trained_on is not None and [corpus.fingerprint for corpus in corpora] != trained_on
    if changed and jax.process_index() == 0:
      print(
        f"evo_jax: the text of {run.config.data.path!r} has changed since training: "
        "held-out documents may have been trained on",
        file=sys.stderr,
      )
  return batches_lib.held_out(corpora, split, length, count, run.config.model.isolate_documents), source


def isolating(run: run_lib.Run) -> run_lib.Run:
  """The run, whose model keeps conversations of one sequence apart."""
  config = dataclasses.replace(run.model.config, isolate_documents=True)
  return dataclasses.replace(run, model=run.model.clone(config=config))


def measure(
  run: run_lib.Run, batch: Batch, paths: tuple[str, ...], window: int, seed: int
) -> tuple[list[dict[str, Any]], str]:
  """The table of the paths, and as text, with the path gap where there is one."""
  evaluator = paths_lib.Evaluator(run.model, run.config, run.tokenizer, run.mesh, seed, window=window)
  table = evaluator(run.params, run.statistics, batch, paths)
  text = paths_lib.format_table(table)
  if gap := paths_lib.path_gap(table):
    text += "\n\n" + paths_lib.format_gap(gap, table[0]["unit"])
  return table, text


def show_progression(run: run_lib.Run, batch: Batch, window: int, passes: int) -> tuple[list[dict[str, Any]], str]:
  """The inferred progression of the first sequence's tokens that count, and as text."""
  entries = progression.infer_progression(run, batch.tokens[0], window, passes)
  if batch.mask is not None:
    entries = [entry for entry, counts in zip(entries, batch.mask[0, 1:]) if counts]
  return entries, progression.format_progression(entries, run.tokenizer, window)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string(
    "paths", "", f"Comma-separated paths; default: {','.join(GAP_PATHS)}, and learned:8 where the clock is learned."
  )
  flags.DEFINE_string(
    "data", "", "Text to measure: comma-separated globs, or prepared folders; empty: the run's own held-out text."
  )
  flags.DEFINE_enum(
    "chat",
    None,
    [*config_lib.CHATS, "text"],
    "What files of --data are: conversations, as data.chat; default: as the run's.",
  )
  flags.DEFINE_enum("split", "valid", ["valid", "test"], "Which held-out text of the run, or of a prepared folder.")
  flags.DEFINE_integer("sequences", 128, "At most so many sequences, evenly spread over the text; 0: all.")
  flags.DEFINE_integer("window", 0, "Tokens of a window; 0: as in training.")
  flags.DEFINE_integer("length", 0, "Tokens of a sequence; 0: as in training.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_integer("seed", 0, "Seed of the latents' noise.")
  flags.DEFINE_bool("show_progression", False, "Print the tokens of a passage with the times inferred for them.")
  flags.DEFINE_integer("passes", 8, "For --show_progression: passes per window.")
  flags.DEFINE_string("json", "", "File for the table as JSON.")
  cli.define_mesh()
  cli.define_processes()
  cli.run(main)
