"""Runs benchmarks by EleutherAI's lm-evaluation-harness: its tasks, prompts, metrics and few-shot rules.

  python -m evo_jax.benchmark --workdir=DIR --tasks=evo15 [--limit=N] [--data=DIR] [--json=FILE] [--mesh=data:1,fsdp:8]
    [--path=ar,streams:4 --draws=8] [--mode=ar,verify,adaptive --threshold=0.5,1,2] [--run_code]

--tasks has suites (evo15: the fifteen benchmarks of the paper, with the shots of LLaDA's table; quick: four that say
something in minutes; all) and any of the harness's tasks and groups. Likelihoods are by autoregression, or by the bound
of any path (--path), texts by any mode (--mode): each gives rows of its own. Texts are greedy where the task does not
sample.

--data=DIR reads documents from DIR/TASK/SPLIT.jsonl instead of the hub; `evo_jax.benchmarks.tasks` says which task
reads what. Answers are kept one by one in --output, so that the same command goes on after any end.

Tasks that execute what the model wrote need --run_code. They run it without network, with limits, in a folder that is
thrown away. evo_jax/benchmarks/README.md has the rest.
"""

import dataclasses
import json
import os
from typing import Any

from absl import flags
import jax
import numpy as np

from evo_jax import cli, functions
from evo_jax.benchmarks import tasks as tasks_lib
from evo_jax.benchmarks.answers import GAPS
from evo_jax.benchmarks.kept import make_folder
from evo_jax.benchmarks.pairs import BEGINS
from evo_jax.benchmarks.sandbox import Sandbox
from evo_jax.benchmarks.table import format_table, make_rows
from evo_jax.decoding.settings import DEFAULT_PATH, MODES, Sampling, check_sampling
from evo_jax.errors import UserError, check_seed
from evo_jax.evaluation.continuations import check_bound
from evo_jax.parallel import distributed
from evo_jax.run import load_run


@dataclasses.dataclass(frozen=True)
class Setting:
  """How texts are written: the name in the table, and the sampling parameters. infill: whether the middle of a document
  is written by infilling."""

  by: str
  sampling: Sampling
  infill: bool = False


def main() -> None:
  args = flags.FLAGS
  benchmarks = tasks_lib.parse_tasks(args.tasks)
  paths, settings = parse_paths(args.path), parse_settings(args)
  check_flags(args)
  harness = import_harness()
  cli.join_processes()
  mesh = cli.make_mesh()
  loaded = load_tasks(harness, args, benchmarks)
  run = load_run(args.workdir, args.step, mesh)
  for setting in settings:
    check_sampling(setting.sampling, run.config)
  for path in paths:
    if path != "ar":
      window = args.window or run.config.window.size
      check_bound(functions.read_path(path), window, run.config.model.position_limit, run)
  output = None
  if jax.process_index() == 0:
    output = args.output or os.path.join(args.workdir, "benchmark")
  asker = harness.Asker(
    run, output, begin=args.begin, chat=args.apply_chat_template, context=args.context, seed=args.seed
  )
  rows, results = Evaluation(harness, args, asker, loaded).run(paths, settings)
  if jax.process_index():
    return
  print(format_table(rows, loaded.left_out))
  if args.json:
    whole = {"settings": settings_of(args, run), "rows": rows, "left_out": loaded.left_out, "results": results}
    cli.write_output("json", args.json, json.dumps(whole, indent=2, default=str) + "\n")


class Evaluation:
  """The stages of an evaluation, the same in all processes: likelihoods by paths, then texts, by an engine."""

  def __init__(self, harness, args: flags.FlagValues, asker, loaded):
    """loaded: None in processes that only follow."""
    self._harness, self._args, self._asker, self._loaded = harness, args, asker, loaded
    self._rows: list[dict[str, Any]] = []
    self._results: dict[str, Any] = {}

  def run(self, paths: list[str], settings: list[Setting]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and by setting the harness's results."""
    harness, args = self._harness, self._args
    scored, written, filled = [], [], []
    if self._loaded is not None:
      scored = self._loaded.select(lambda task: not harness.is_written(task))
      written = self._loaded.select(harness.is_written)
      filled = [name for name in written if name in tasks_lib.INFILLING]
    has = distributed.in_first_process(
      lambda: np.array([bool(scored), bool(written), bool(filled)]), np.zeros(3, bool), "--tasks"
    )
    for path in paths if has[0] else ():
      self._score(path, scored)
    settings = [setting for setting in settings if (has[2] if setting.infill else has[1])]
    if not settings:
      return self._rows, self._results
    with self._asker.make_engine(args.rows, [setting.sampling for setting in settings], bool(has[2])) as engine:
      if jax.process_index():
        engine.follow()
        return [], {}
      for setting in settings:
        texts = self._asker.texts(engine, setting.sampling, gaps(args))
        self._evaluate(
          setting.by,
          filled if setting.infill else written,
          texts=texts,
          sampling=setting.sampling,
          infill=setting.infill,
        )
    return self._rows, self._results

  def _score(self, path: str, names: list[str]) -> None:
    """Asks for likelihoods."""
    args = self._args
    scorer = self._asker.scorer(path, args.draws, args.window, args.rows)
    if jax.process_index():
      scorer.follow()
      return
    try:
      self._evaluate(path, names, likelihoods=self._asker.likelihoods(path, args.draws, scorer, args.window))
    finally:
      scorer.close()

  def _evaluate(self, by: str, names: list[str], **answers) -> None:
    """Asks for some benchmarks with one setting."""
    harness, args, loaded = self._harness, self._args, self._loaded
    model = harness.Model(self._asker.run, self._asker.encoder, **answers)
    conversation = harness.Conversation(
      args.apply_chat_template, args.system_instruction or None, args.fewshot_as_multiturn
    )
    results = harness.evaluate_tasks(model, loaded, names, limit(args), conversation)
    members = {name: loaded.members[name] for name in names}
    self._rows += make_rows(results, members, model.counts, by, loaded.substituted)
    self._results[by] = {
      name: results[name] for name in ("results", "n-shot", "n-samples", "versions", "samples") if name in results
    }


def parse_paths(value: str) -> list[str]:
  """The paths of --path. Raises UserError."""
  paths = [path.strip() for path in value.split(",")]
  for path in paths:
    functions.read_path(path)
  return paths


def parse_settings(args: flags.FlagValues) -> list[Setting]:
  """The settings of --mode and --threshold, and of flow's flags. Raises UserError."""
  settings = []
  for mode in (part.strip() for part in args.mode.split(",")):
    if mode not in MODES:
      raise UserError(f"--mode={args.mode}: {mode!r} is not one of {', '.join(MODES)}")
    for threshold in parse_thresholds(args.threshold) if mode == "adaptive" else [None]:
      changes: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
      if mode == "flow":
        changes |= {"path": args.flow_path, "steps": args.steps}
      if mode in DEFAULT_PATH:
        changes["window"] = args.window
      if mode == "verify":
        changes["draft"] = args.draft
      by = mode if threshold is None else f"{mode}:{threshold:g}"
      sampling = Sampling(mode=mode, greedy=True, **changes)
      settings.append(Setting(by, sampling))
      if mode in DEFAULT_PATH:
        settings.append(Setting(f"{by} infilling", sampling, infill=True))
  return settings


def parse_thresholds(value: str) -> list[float]:
  """The numbers of --threshold. Raises UserError."""
  try:
    return [float(part) for part in value.split(",")]
  except ValueError as error:
    raise UserError(f"--threshold={value}: is not a list of numbers, as 0.1,0.2,0.4") from error


def gaps(args: flags.FlagValues) -> list[int]:
  """The lengths of --gap. Raises UserError."""
  try:
    found = [int(part) for part in args.gap.split(",")]
  except ValueError:
    found = [0]
  if min(found) < 1:
    raise UserError(f"--gap={args.gap}: is not a list of numbers of tokens, as 8,16,32")
  return found


def limit(args: flags.FlagValues) -> int:
  """Items of a benchmark; 0: all."""
  return args.limit or (tasks_lib.QUICK_LIMIT if args.tasks == "quick" else 0)


def check_flags(args: flags.FlagValues) -> None:
  """Raises UserError for flags that are impossible whatever the run is."""
  for name in ("limit", "context", "window"):
    if getattr(args, name) < 0:
      raise UserError(f"--{name}={getattr(args, name)}: is negative")
  for name in ("draws", "rows"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)}: is not positive")
  if args.shots is not None and args.shots < 0:
    raise UserError(f"--shots={args.shots}: is negative")
  check_seed(args.seed, "--seed")
  gaps(args)
  if args.system_instruction and not args.apply_chat_template:
    raise UserError("--system_instruction: is of a conversation, which --apply_chat_template makes of a prompt")
  if args.fewshot_as_multiturn and not args.apply_chat_template:
    raise UserError("--fewshot_as_multiturn: needs --apply_chat_template")
  if args.data and not os.path.isdir(os.path.expanduser(args.data)):
    raise UserError(f"--data={args.data}: is no folder")
  if "://" in (args.output or args.workdir):
    raise UserError("--output: answers are kept in a local folder; give one, as --output=answers")
  if args.output:
    make_folder(args.output)
  if args.json:
    cli.check_output("json", args.json)


def import_harness():
  """The module that needs the harness. Raises UserError where that is not installed."""
  os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars
  try:
    from evo_jax.benchmarks import harness
  except ModuleNotFoundError as error:
    if (error.name or "").startswith("evo_jax"):
      raise
    raise UserError(f"benchmarks need the package {error.name}: pip install 'evo_jax[bench]'") from error
  return harness


def load_tasks(harness, args: flags.FlagValues, benchmarks):
  """The tasks, in process 0, and None in the others. Raises UserError in all of them."""
  loaded = []

  def load() -> np.ndarray:
    sandbox = Sandbox() if args.run_code else None
    if sandbox:
      sandbox.check()
    data = os.path.abspath(os.path.expanduser(args.data)) if args.data else None
    loaded.append(harness.load_tasks(benchmarks, data, sandbox, args.shots))
    return np.zeros(1, bool)

  distributed.in_first_process(load, np.zeros(1, bool), "--tasks: process 0 cannot load them")
  return loaded[0] if loaded else None


def settings_of(args: flags.FlagValues, run) -> dict[str, Any]:
  """What results depend on, for --json."""
  names = ("workdir", "tasks", "limit", "data", "shots", "path", "draws", "mode", "threshold", "steps", "flow_path")
  names += ("window", "draft", "gap", "begin", "context", "seed", "apply_chat_template", "system_instruction")
  values = {name: getattr(args, name) for name in (*names, "fewshot_as_multiturn", "run_code")}
  return values | {"step": run.step, "tokenizer": run.tokenizer.identity}


def define_flags() -> None:
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("tasks", "quick", f"Suites ({', '.join(tasks_lib.SUITES)}), tasks and groups of the harness.")
  limit_help = (
    f"Items of a benchmark, spread over its subjects, at least one of each; 0: all (quick: {tasks_lib.QUICK_LIMIT})."
  )
  flags.DEFINE_integer("limit", 0, limit_help)
  flags.DEFINE_string("data", "", "Folder of documents, as DIR/TASK/SPLIT.jsonl; empty: from the hub.")
  flags.DEFINE_integer(
    "shots", None, "Examples in front of each question; default: those of the suite, or the task's own."
  )
  flags.DEFINE_string(
    "path", "ar", "How likelihoods are found: ar, or paths whose bound is taken, as ar,streams:4,mine.py:wave:8."
  )
  flags.DEFINE_integer("draws", 8, "Draws of the noise of each bound.")
  flags.DEFINE_string("mode", "ar", f"How texts are written: {', '.join(MODES)}; several, each with rows of its own.")
  flags.DEFINE_string("threshold", "0.25", "Mode adaptive: thresholds, each with rows of its own, as 0.1,0.2,0.4.")
  flags.DEFINE_integer("steps", 8, "Mode flow: passes per window.")
  flags.DEFINE_string("flow_path", "", "Mode flow: the path; default: diagonal.")
  flags.DEFINE_integer(
    "window", 0, "Tokens of a window, of bounds and of the modes flow and adaptive; 0: as in training."
  )
  flags.DEFINE_integer("draft", 0, "Mode verify: drafted tokens per round; 0: by measured speed.")
  gap = "Infilling: lengths in tokens that are tried for the middle; the most probable text is taken."
  flags.DEFINE_string("gap", ",".join(map(str, GAPS)), gap)
  flags.DEFINE_bool("run_code", False, "Allow tasks that execute what the model wrote, in a sandbox.")
  flags.DEFINE_bool("apply_chat_template", False, "Make each prompt a conversation by the tokenizer's chat template.")
  flags.DEFINE_string("system_instruction", "", "With --apply_chat_template: the system message.")
  flags.DEFINE_bool(
    "fewshot_as_multiturn", False, "With --apply_chat_template: examples are turns of the conversation."
  )
  begin = "auto: a begin token where the tokenizer puts one; always: in front of every text, as in training."
  flags.DEFINE_enum("begin", "auto", BEGINS, begin)
  flags.DEFINE_integer(
    "context", 0, "Tokens of the longest text; what is longer is cut from the left; 0: 4,096 at most."
  )
  flags.DEFINE_integer("rows", 16, "Texts that are written at once, and at most that are scored in a pass.")
  flags.DEFINE_integer("seed", 0, "Seed of noise and of sampled texts.")
  flags.DEFINE_string("output", "", "Local folder in which answers are kept; default: WORKDIR/benchmark.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_string("json", "", "File for the rows, the harness's results and every sample as JSON.")
  cli.define_mesh()
  cli.define_processes()


if __name__ == "__main__":
  define_flags()
  cli.run(main)
