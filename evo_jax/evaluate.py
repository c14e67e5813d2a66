"""Measures bits per byte or character of text on any path: upper bounds on the model's own code length.

  python -m evo_jax.evaluate --workdir=DIR [--paths=ar,diagonal:16,entropy:0.5] [--data='dir/*.txt'] [--json=FILE]
    [--csv=FILE] [--mesh=data:1,fsdp:8]
  python -m evo_jax.evaluate --workdir=DIR --workdir=OTHER [--paths=...]
  python -m evo_jax.evaluate --workdir=DIR --paths=mine.py:wave:16,mine.py:eager [--price=mine.py:rate]
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
  FILE.py:NAME  a pure function of your own (`flow/README.md`): a path function(s, tokens), with a number of passes
                behind its name, or a policy function(observation), or function(observation, number)

Of conversations (--chat, or what `evo_jax.prepare --chat` wrote) only the answers are measured, in bits per token of
theirs, each given the conversation before it; windows begin where answers do.

Text is cut into consecutive sequences of the model's context, or of --length tokens, each without what came before it;
the remainder at the end is dropped. Of a text shorter than that, its own tokens are measured. Where `ar` and diagonals
of two lengths are among the paths, the path gap is printed too.

Several runs measure the same held-out sequences with the same noise, and each pair of them is compared path by path:
the difference in bits, with the standard error of the paired differences. They must have the same tokenizer and the
same held-out text, or get it by --data. Their windows may differ.
"""

from collections.abc import Sequence
import dataclasses
import json
import sys
from typing import Any

from absl import flags
import jax
import numpy as np

from evo_jax import cli, functions
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import formats, tokenizers
from evo_jax.errors import UserError, check_seed
from evo_jax.evaluation import comparison, progression
from evo_jax.evaluation import paths as paths_lib
from evo_jax.flow import bound, schedules
from evo_jax.training import checkpoint

GAP_PATHS = ("ar", "rolling:16", "diagonal:4", "diagonal:16", "diagonal:64", "random:16")


def main() -> None:
  args = flags.FLAGS
  names = parse_paths(args.paths)
  check_flags(args)
  cli.join_processes()
  paths = tuple(functions.read_path(name) for name in names)
  price = functions.read_price(args.price) if args.price else None
  mesh, workdirs = cli.make_mesh(), args.workdir or [""]
  if len(workdirs) > 1:
    check_comparable(args, paths)
  if args.show_progression:
    result, text, table = *show_progression(args, workdirs[0], mesh), ""
  else:
    runs, texts = zip(*(measure(args, workdir, mesh, paths, price) for workdir in workdirs))
    result, text, table = summarize(runs, texts)
  if jax.process_index():
    return
  print(text)
  if args.json:
    cli.write_output("json", args.json, json.dumps(result, indent=2) + "\n")
  if args.csv:
    cli.write_output("csv", args.csv, table)


def parse_paths(value: str) -> tuple[str, ...]:
  """The names of --paths; () where it is not given. Raises UserError for a path that does not exist; files are not
  read yet."""
  names = tuple(name.strip() for name in value.split(",") if name.strip())
  if value and not names:
    raise UserError(f"--paths={value}: is empty; give paths as in --paths=ar,diagonal:16,rolling:8")
  for name in names:
    if not functions.is_own(name):
      schedules.parse_path(name)
  return names


def default_paths(run: run_lib.Run) -> tuple[str, ...]:
  """The paths whose gap is of interest, as far as the model has them."""
  names = GAP_PATHS + (("learned:8",) if run.config.model.progression == "learned" else ())
  return tuple(name for name in names if name != "ar" or not run.config.diffusion_alone)


def check_flags(args: flags.FlagValues) -> None:
  """Raises UserError for flags that are impossible whatever the runs are."""
  for name in ("sequences", "window", "length"):
    if getattr(args, name) < 0:
      raise UserError(f"--{name}={getattr(args, name)}: is negative")
  if args.passes < 1:
    raise UserError(f"--passes={args.passes}: is not positive")
  check_seed(args.seed, "--seed")
  for name in ("json", "csv"):
    if getattr(args, name):
      cli.check_output(name, getattr(args, name))
  for workdir in args.workdir:
    if args.workdir.count(workdir) > 1:
      raise UserError(f"--workdir={workdir}: is given twice")
  if args.show_progression:
    for name, several in (("workdir", len(args.workdir) > 1), ("csv", args.csv), ("price", args.price)):
      if several:
        raise UserError(f"--{name}: does not go with --show_progression, which shows one run's tokens")

  if args.chat is not None and not args.data:
    raise UserError(f"--chat={args.chat}: is how --data is read, which is not given")


def check_comparable(args: flags.FlagValues, paths: tuple[schedules.Path, ...]) -> None:
  """Raises UserError, naming the run, unless all of --workdir measure the same sequences of the same tokens, on paths
  that they have; their parameters are not read yet."""
  first = None
  for workdir in args.workdir:
    config, tokenizer = read_run(workdir)
    length, window = args.length or config.model.context, args.window or config.window.size
    if first is None:
      first = tokenizer.identity, length
    if tokenizer.identity != first[0]:
      problem = f"its tokenizer, {tokenizer.identity}, is not that of {args.workdir[0]}, {first[0]}"
      raise UserError(f"--workdir={workdir}: {problem}: their bits are of other tokens")
    if length != first[1]:
      problem = f"its context of {length} tokens is not the {first[1]} of {args.workdir[0]}"
      raise UserError(f"--workdir={workdir}: {problem}; give a --length that both can read")
    check_lengths(args, config, length, window)
    for path in paths:
      paths_lib.check_path(path, config)
  texts = [
    (batch.tokens, batch.counted, batch.answers)
    for batch, _ in (read_text(args, *read_run(workdir)) for workdir in args.workdir)
  ]
  for workdir, text in zip(args.workdir[1:], texts[1:]):
    if not all(map(np.array_equal, text, texts[0])):
      problem = f"its held-out text is not that of {args.workdir[0]}"
      raise UserError(f"--workdir={workdir}: {problem}; measure all runs on the same text by --data")


def read_run(workdir: str) -> tuple[config_lib.Config, tokenizers.Tokenizer]:
  """A run's configuration and tokenizer. Raises UserError."""
  folder = checkpoint.resolve_workdir(workdir)
  if not folder.is_dir():
    raise UserError(f"--workdir={workdir}: is no folder")
  config = checkpoint.read_config(folder)["config"]
  return config, tokenizers.load_tokenizer(config.data.tokenizer, str(folder / "tokenizer"))


def check_lengths(args: flags.FlagValues, config: config_lib.Config, length: int, window: int) -> None:
  """Raises UserError for sequences that the model cannot read, and for windows that do not divide them."""
  limit = config.model.position_limit
  if length > limit:
    raise UserError(f"--length={length}: is more than the {limit} tokens that the model can read")
  if config.diffusion_alone and window != length:
    problem = f"is not the sequence, {length} tokens, and a model of diffusion alone reads nothing before a window"
    raise UserError(f"--window={window}: {problem}")
  if length % window and args.length:
    raise UserError(f"--length={length}: is no multiple of the window, {window} tokens")
  if length % window:
    raise UserError(f"--window={window}: does not divide the context of {length}")


def read_text(
  args: flags.FlagValues, config: config_lib.Config, tokenizer: tokenizers.Tokenizer, workdir: str = ""
) -> tuple[Batch, str]:
  """The sequences to measure, at most --sequences (0: all), one for --show_progression, and what to call them. workdir:
  of the run that is told where its text has changed since training; "": nothing is told."""
  if args.data:
    chat = {None: config.data.chat, "text": ""}.get(args.chat, args.chat)
    data = dataclasses.replace(config.data, chat=chat)
    corpora = corpora_lib.load_text(args.data, "--data", data, tokenizer)
    source = formats.shown(args.data)
  else:
    corpora = corpora_lib.load_corpora(config.data, tokenizer)
    source = f"{formats.shown(config.data.path)} ({args.split})"
    if workdir:
      tell_of_changes(workdir, config, [corpus.fingerprint for corpus in corpora])
  length, count = args.length or config.model.context, 1 if args.show_progression else args.sequences
  return batches_lib.held_out(corpora, args.split, length, count, config.model.isolate_documents), source


def tell_of_changes(workdir: str, config: config_lib.Config, fingerprints: list[str]) -> None:
  """Says so where a run's text has changed since training."""
  trained_on = checkpoint.read_config(checkpoint.resolve_workdir(workdir))["text"]
  if trained_on is not None and fingerprints != trained_on and jax.process_index() == 0:
    print(
      f"evo_jax: the text of {config.data.path!r} has changed since training: "
      "held-out documents may have been trained on",
      file=sys.stderr,
    )


def load(args: flags.FlagValues, workdir: str, mesh: jax.sharding.Mesh) -> tuple[run_lib.Run, Batch, str, int]:
  """A run, the sequences to measure, what to call them, and the tokens of a window."""
  run = run_lib.load_run(workdir, args.step, mesh)
  window = args.window or run.config.window.size
  check_lengths(args, run.config, args.length or run.config.model.context, window)
  batch, source = read_text(args, run.config, run.tokenizer, workdir)
  return (run if batch.answers is None else isolating(run)), batch, source, window


def isolating(run: run_lib.Run) -> run_lib.Run:
  """The run, whose model keeps conversations of one sequence apart."""
  config = dataclasses.replace(run.model.config, isolate_documents=True)
  return dataclasses.replace(run, model=run.model.clone(config=config))


def measure(
  args: flags.FlagValues,
  workdir: str,
  mesh: jax.sharding.Mesh,
  paths: tuple[schedules.Path, ...],
  price: bound.Price | None,
) -> tuple[comparison.Measured, str]:
  """A run's table of the paths, and as text, with the path gap where there is one."""
  run, batch, source, window = load(args, workdir, mesh)
  evaluator = paths_lib.Evaluator(run.model, run.config, run.tokenizer, run.mesh, args.seed, window=window, price=price)
  measured = evaluator.measure(run.params, run.statistics, batch, paths or default_paths(run))
  found = comparison.Measured.of(workdir, measured, evaluator.lengths(batch))
  counted = None if batch.counted is None else batch.counted[:, 1:]
  tokens = f"{batch.tokens.shape[1] - 1}" if counted is None else f"up to {counted.sum(1).max()}"
  answers = "" if batch.answers is None else f", {batch.answers[:, 1:].sum():,} of which count"
  text = f"{source}: {len(batch.tokens)} sequences of {tokens} tokens{answers}, windows of {window}, step {run.step}"
  if price is not None:
    text += f", steps priced by {args.price}"
  text += "\n" + paths_lib.format_table(found.table)
  if gap := paths_lib.path_gap(found.table):
    text += "\n\n" + paths_lib.format_gap(gap, found.table[0]["unit"])
  return found, text


def summarize(runs: Sequence[comparison.Measured], texts: Sequence[str]) -> tuple[Any, str, str]:
  """What --json, the terminal and --csv get: of one run its table, of several the differences, too."""
  found = comparison.differences(runs)
  table = comparison.to_csv(runs, found)
  if len(runs) == 1:
    return runs[0].table, texts[0], table
  blocks = [f"{run.name}: {text}" for run, text in zip(runs, texts)]
  if found:
    blocks.append(comparison.format_differences(found, runs[0].table[0]["unit"]))
  return {"runs": {run.name: run.table for run in runs}, "differences": found}, "\n\n".join(blocks), table


def show_progression(args: flags.FlagValues, workdir: str, mesh: jax.sharding.Mesh) -> tuple[list[dict[str, Any]], str]:
  """The inferred progression of the first sequence's tokens that count, and as text."""
  run, batch, _, window = load(args, workdir, mesh)
  entries = progression.infer_progression(run, batch.rows(slice(1)), window, args.passes)
  return entries, progression.format_progression(entries, run.tokenizer, window)


if __name__ == "__main__":
  workdir = "A run's work directory; several, each by a flag, are compared on the same sequences, run by run."
  flags.DEFINE_multi_string("workdir", [], workdir)
  paths = (
    f"Comma-separated paths, or functions in files, FILE.py:NAME[:NUMBER]; default: {','.join(GAP_PATHS)}, and "
    "learned:8 where the clock is learned."
  )
  flags.DEFINE_string("paths", "", paths)
  price = "FILE.py:NAME, a function that prices steps in windows instead of their NLL; default: the NLL."
  flags.DEFINE_string("price", "", price)
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
  flags.DEFINE_string("json", "", "File for the table as JSON; of several runs {runs: by --workdir, differences: ...}.")
  flags.DEFINE_string("csv", "", "File for the table, and for differences between runs, as CSV.")
  cli.define_mesh()
  cli.define_processes()
  cli.run(main)
