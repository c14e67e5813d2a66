"""One model on all benchmarks with local documents: autoregression, each decoding mode, and bounds of other paths.

  pip install -e '.[bench]'
  python -m experiments.benchmark_table --workdir=DIR --data=BENCH --answers=FOLDER [--limit=100] [--texts=40]
    [--output=FOLDER] [--run_code]

This runs `evo_jax.benchmark` twice, on tasks of likelihoods and on those of texts, with the same items in every row:
`ar` and two paths for the ones; `ar`, `verify`, and `adaptive` at three thresholds for the others. Answers are kept in
--answers, so that the same command goes on after any end. It prints the table, and writes benchmark_table.json into
--output.
"""

import json
import subprocess
import sys
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
  output = common.results_folder(args.output)
  texts = f"{TEXTS},{CODE}" if args.run_code else TEXTS
  parts = [
    benchmark(
      args, f"--tasks={LIKELIHOODS}", f"--limit={args.limit}", f"--path=ar,{args.paths}", f"--draws={args.draws}"
    ),
    benchmark(
      args, f"--tasks={texts}", f"--limit={args.texts}", "--mode=ar,verify,adaptive", f"--threshold={args.thresholds}"
    ),
  ]
  rows = [row for part in parts for row in part["rows"]]
  left_out = {name: why for part in parts for name, why in part["left_out"].items()}
  result = {"settings": [part["settings"] for part in parts], "rows": rows, "left_out": left_out}
  common.write_result("benchmark_table", result, output)
  text = format_table(rows, left_out)
  print(text)


def benchmark(args: flags.FlagValues, *arguments: str) -> dict[str, Any]:
  """What `evo_jax.benchmark --json` writes. Raises UserError where it ends without."""
  path = f"{args.answers.rstrip('/')}/table.json"
  command = [sys.executable, "-m", "evo_jax.benchmark", f"--workdir={args.workdir}", f"--data={args.data}", *arguments]
  command += [f"--output={args.answers}", f"--json={path}", f"--rows={args.rows}", f"--context={args.context}"]
  command += ["--run_code"] if args.run_code else []
  if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
    raise UserError("the benchmark ended; the same command goes on")
  with open(path) as file:
    return json.load(file)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("data", "", "Folder of documents, as DIR/TASK/SPLIT.jsonl.")
  flags.DEFINE_string("answers", "", "Folder in which answers are kept.")
  flags.DEFINE_integer("limit", 100, "Items of a benchmark of likelihoods.")
  flags.DEFINE_integer("texts", 40, "Items of a benchmark of texts.")
  flags.DEFINE_string("paths", "left:2,streams:2", "Paths whose bounds are taken beside ar.")
  flags.DEFINE_integer("draws", 1, "Draws of a bound; on the default paths nothing is drawn.")
  flags.DEFINE_string("thresholds", "0.1,0.25,0.5", "Thresholds of mode adaptive.")
  flags.DEFINE_integer("rows", 8, "Texts that are written at once.")
  flags.DEFINE_integer("context", 2048, "Tokens of the longest text.")
  flags.DEFINE_bool("run_code", False, "Also benchmarks that execute what the model wrote, in a sandbox.")
  flags.DEFINE_string("output", "", "Folder for results; default: experiments/results.")
  cli.run(main)
