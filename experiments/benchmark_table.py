"""One model on all benchmarks with local documents: autoregression, each decoding mode, and bounds of other paths.

  pip install -e '.[bench]'
  python -m experiments.benchmark_table --workdir=DIR --data=BENCH --answers=FOLDER [--limit=100] [--texts=40]
    [--only=WAY,...] [--output=FOLDER] [--run_code]

This runs `evo_jax.benchmark` once for each way to answer, with the same items in every row: likelihoods by `ar` and by
the bounds of two paths; texts by `ar`, `verify`, and `adaptive` at three thresholds. Answers are kept in --answers, and
ways that are done in benchmark_table.json in --output, so that the same command goes on after any end, and ways can be
measured in several sittings (--only=ar,left:2 or texts:ar). It prints the table of all that are done.
"""

import json
import subprocess
import sys
import time
from typing import Any

from absl import flags

from evo_jax import cli
from evo_jax.benchmarks.kept import make_folder
from evo_jax.benchmarks.table import format_table
from evo_jax.errors import UserError
from experiments import common

LIKELIHOODS = (
  "mmlu,arc_challenge,hellaswag,truthfulqa_mc2,winogrande,piqa,cmmlu,ceval-valid,arc_easy,boolq,commonsense_qa,"
  "lambada_openai,openbookqa,sciq"
)
TEXTS = "bbh,gsm8k,minerva_math"
CODE = "humaneval,humaneval_single_line_infilling,mbpp"


def main() -> None:
  args = flags.FLAGS
  if not args.answers:
    raise UserError("--answers: a folder is needed, in which answers are kept")
  make_folder(args.answers)
  names = ("limit", "texts", "draws", "rows", "context", "run_code")
  recorded = common.RecordedRuns(
    "benchmark_table",
    common.results_folder(args.output),
    {name: args[name].value for name in names}
    | {"data": common.shortened(args.data), "model": common.model_identity(args.workdir)},
  )
  every_way = ways(args)
  for way in common.select(args.only, every_way):
    if not recorded.find(way=way):
      recorded.add({"way": way, **benchmark(args, every_way[way])})
  rows = [row for run in recorded.runs for row in run["rows"]]
  tasks = list(dict.fromkeys(row["task"] for row in rows))
  rows.sort(key=lambda row: tasks.index(row["task"]))  # ways to answer beneath each other
  print(format_table(rows, {name: why for run in recorded.runs for name, why in run["left_out"].items()}))


def ways(args: flags.FlagValues) -> dict[str, list[str]]:
  """By name of a way to answer, the options of `evo_jax.benchmark`."""
  likelihoods = [f"--tasks={LIKELIHOODS}", f"--limit={args.limit}", f"--draws={args.draws}"]
  texts = [f"--tasks={TEXTS},{CODE}" if args.run_code else f"--tasks={TEXTS}", f"--limit={args.texts}"]
  return (
    {path: [*likelihoods, f"--path={path}"] for path in ("ar", *args.paths)}
    | {f"texts:{mode}": [*texts, f"--mode={mode}"] for mode in ("ar", "verify")}
    | {f"texts:adaptive:{t}": [*texts, "--mode=adaptive", f"--threshold={t}"] for t in args.thresholds}
  )


def benchmark(args: flags.FlagValues, options: list[str]) -> dict[str, Any]:
  """What `evo_jax.benchmark --json` writes, but for the single samples; and the seconds that it took, of which an
  interrupted run's first part is missing. Raises UserError where it ends without."""
  path = f"{args.answers.rstrip('/')}/table.json"
  command = [sys.executable, "-m", "evo_jax.benchmark", f"--workdir={args.workdir}", f"--data={args.data}", *options]
  command += [f"--output={args.answers}", f"--json={path}", f"--rows={args.rows}", f"--context={args.context}"]
  command += ["--run_code"] if args.run_code else []
  start = time.monotonic()
  if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
    raise UserError("the benchmark ended; the same command goes on")
  with open(path) as file:
    found = json.load(file)
  settings = {
    name: common.shortened(value) if isinstance(value, str) else value for name, value in found["settings"].items()
  }
  return {
    "seconds": time.monotonic() - start,
    "settings": settings,
    "rows": found["rows"],
    "left_out": found["left_out"],
  }


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("data", "", "Folder of documents, as DIR/TASK/SPLIT.jsonl.")
  flags.DEFINE_string("answers", "", "Folder in which answers are kept.")
  flags.DEFINE_integer("limit", 100, "Items of a benchmark of likelihoods.")
  flags.DEFINE_integer("texts", 40, "Items of a benchmark of texts.")
  flags.DEFINE_list("paths", ["left:2", "streams:2"], "Paths whose bounds are taken beside ar.")
  flags.DEFINE_integer("draws", 1, "Draws of a bound; on the default paths nothing is drawn.")
  flags.DEFINE_list("thresholds", ["1", "2", "3"], "Thresholds of mode adaptive, for large vocabularies.")
  flags.DEFINE_integer("rows", 8, "Texts that are written at once.")
  flags.DEFINE_integer("context", 2048, "Tokens of the longest text.")
  flags.DEFINE_bool("run_code", False, "Also benchmarks that execute what the model wrote, in a sandbox.")
  flags.DEFINE_string("only", "", "Comma-separated ways to answer; default: all.")
  flags.DEFINE_string("output", "", "Folder for results; default: experiments/results.")
  cli.run(main)
