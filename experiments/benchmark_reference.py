"""The harness's own `hf` model beside this project's, on the same weights and items: the same answers, and how fast.

  pip install -e '.[bench,hf]'
  python -m experiments.benchmark_reference --workdir=DIR --data=BENCH --stages=FOLDER [--limit=100] [--texts=20]

The run's weights are exported, and `hf` reads them in float32. Both are asked the same requests, by the harness:

  likelihoods  the largest difference, also per token, how many differ by more than 1e-3 nats and by more than 1e-5 per
               token, the differing choices, and the metrics of both
  texts        greedy; of each pair that differs, the first token that does, and the logits' distance there: between the
               two tokens, as log-probabilities in nats
  speed        items per second of each task, without loading and compilation: `hf` (in batches of --hf_batch), this
               project by `ar`, without shared prefixes, and for texts by `verify`

Each stage is kept in --stages as a JSON file, and not repeated where that is there. Nothing else should run meanwhile.
The comparison is written to benchmark_reference.json in --output, and printed.
"""

from collections.abc import Callable
import functools
import json
import os
from pathlib import Path
import time
from typing import Any

from absl import flags
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.benchmarks import tasks as tasks_lib
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.evaluation.prefix_trees import PrefixTreeScorer
from evo_jax.pretrained import exporter
from experiments import common

LIKELIHOODS = "mmlu,hellaswag,arc_easy,arc_challenge,winogrande,piqa,sciq,lambada_openai,truthfulqa_mc2"
TEXTS = "gsm8k"
_TOLERANCES = 1e-3, 1e-5  # nats of a log-likelihood, or per token of a long one


def main() -> None:
  args = flags.FLAGS
  output = common.results_folder(args.output)
  stages = Path(args.stages)
  stages.mkdir(parents=True, exist_ok=True)
  harness = import_harness()
  run = run_lib.load_run(args.workdir)
  if run.config.model.dtype != "float32":
    raise UserError(f"--workdir={args.workdir}: computes in {run.config.model.dtype}; float32 is compared")
  names = {"likelihoods": args.tasks, "texts": args.text_tasks}
  loaded = {
    kind: harness.load_tasks(tasks_lib.parse_tasks(names[kind]), os.path.abspath(args.data), None) for kind in names
  }
  limits = {"likelihoods": args.limit, "texts": args.texts}
  ask = lambda kind, name, make: stage(
    stages / f"{kind} {name}.json",
    lambda: ask_tasks(harness, loaded[kind], limits[kind], make()),
  )
  found = {"likelihoods": {}, "texts": {}}
  for kind in found:
    found[kind]["hf"] = ask(kind, "hf", lambda: load_hf(args, stages))
    for name, (mode, share) in settings(kind).items():
      make = make_scored if kind == "likelihoods" else make_written
      found[kind][name] = ask(kind, name, functools.partial(make, harness, run, args, mode, share))
  with Engine(run, rows=1, context=args.context) as engine:
    texts = compare_texts(found["texts"]["hf"], found["texts"]["ar"], engine, harness, run)
  result = {
    "likelihoods": compare_likelihoods(
      found["likelihoods"]["hf"], found["likelihoods"]["ar"], harness.Encoder(run.tokenizer)
    ),
    "texts": texts,
    "speed": speeds(found),
  }
  common.write_result("benchmark_reference", result, output)
  print(format_result(result))


def import_harness():
  """The harness's module. Raises UserError where an extra is missing."""
  common.transformers()
  try:
    from evo_jax.benchmarks import harness
  except ImportError as error:
    raise common.missing_extra(error, "bench") from error
  return harness


def settings(kind: str) -> dict[str, tuple[str, bool]]:
  """By name, the mode, and whether prefixes are shared."""
  found = {"ar": ("ar", True), "ar without sharing": ("ar", False)}
  return found | ({"verify": ("verify", True)} if kind == "texts" else {})


def stage(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What `make` gives, from the file where that is there."""
  if not path.exists():
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(make(), default=str))
    temporary.replace(path)
  return json.loads(path.read_text())


def ask_tasks(harness, loaded, limit: int, model) -> dict[str, Any]:
  """By task its metrics, samples (arguments, responses), and the seconds that the model took for its requests."""
  timed = Timed(model)
  try:
    found = {}
    for name in loaded.members:
      timed.seconds = 0.0
      results = harness.evaluate_tasks(timed.model, loaded, [name], limit, harness.Conversation())
      samples = [
        {"task": task, "arguments": sample["arguments"], "responses": sample["resps"]}
        for task in loaded.members[name]
        for sample in first_filter(results["samples"][task])
      ]
      metrics = {key: value for key, value in results["results"][name].items() if isinstance(value, float)}
      found[name] = {"metrics": metrics, "samples": samples, "seconds": timed.seconds}
    return found
  finally:
    timed.close()


def first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Each document's sample once; a task with several filters has several."""
  return list({sample["doc_id"]: sample for sample in samples}.values())


class Timed:
  """Counts the seconds in which a model of the harness answers, without those in which programs are compiled."""

  def __init__(self, model):
    self.model, self.seconds = model, 0.0
    self._scorer = getattr(model, "scorer", None)
    for name in ("loglikelihood", "generate_until"):
      setattr(model, name, self._timed(getattr(model, name)))

  def _timed(self, answer):
    def answer_timed(requests, **kwargs):
      compiling = lambda: self._scorer.compile_seconds if self._scorer else 0.0
      start = time.perf_counter() - compiling()
      found = answer(requests, **kwargs)
      self.seconds += time.perf_counter() - compiling() - start
      return found

    return answer_timed

  def close(self) -> None:
    if engine := getattr(self.model, "engine", None):
      engine.close()


def load_hf(args: flags.FlagValues, stages: Path):
  """The harness's model on the exported weights."""
  folder = stages / "weights"
  if not folder.exists():
    exporter.export_run(run_lib.load_run(args.workdir, exact=True), args.workdir, str(folder), "float32")
  from lm_eval.models.huggingface import HFLM

  return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=args.hf_batch, max_length=args.context)


def make_scored(harness, run: run_lib.Run, args: flags.FlagValues, mode: str, share: bool):
  """This project's for likelihoods, with nothing kept."""
  del mode  # ar
  asker = harness.Asker(run, None, context=args.context)
  scorer = PrefixTreeScorer(run, args.context, args.rows, share)
  model = harness.Model(run, asker.encoder, asker.likelihoods("ar", 1, scorer))
  model.scorer = scorer
  return model


def make_written(harness, run: run_lib.Run, args: flags.FlagValues, mode: str, share: bool):
  """This project's for texts, with nothing kept."""
  sampling = Sampling(mode=mode, greedy=True)
  asker = harness.Asker(run, None, context=args.context)
  engine = Engine(
    run,
    args.rows,
    modes=[Sampling(mode=mode)],
    context=args.context,
    cache_tokens=args.rows * args.context,
    share=share,
  )
  model = harness.Model(run, asker.encoder, None, asker.texts(engine, sampling), sampling)
  model.engine = engine
  return model


def compare_likelihoods(theirs: dict[str, Any], ours: dict[str, Any], encoder) -> dict[str, Any]:
  """By task, the largest differences, how many are beyond `_TOLERANCES`, how many choices differ, and the metrics of
  both."""
  found = {}
  tokens = lambda sample: np.array([max(len(encoder.pair(*pair).continuation), 1) for pair in sample["arguments"]])
  for name in theirs:
    pairs = [
      (np.array([float(r[0][0]) for r in a["responses"]]), np.array([float(r[0][0]) for r in b["responses"]]), a)
      for a, b in zip(theirs[name]["samples"], ours[name]["samples"])
    ]
    apart = [np.abs(a - b) for a, b, _ in pairs]
    lengths = [tokens(sample) for *_, sample in pairs]
    found[name] = {
      "items": len(pairs),
      "largest": float(max(d.max() for d in apart)),
      "largest_per_token": float(max((d / n).max() for d, n in zip(apart, lengths))),
      "beyond": sum(int(((d > _TOLERANCES[0]) & (d / n > _TOLERANCES[1])).sum()) for d, n in zip(apart, lengths)),
      "other_choices": sum(int(a.argmax() != b.argmax()) for a, b, _ in pairs),
      "metrics": {"hf": theirs[name]["metrics"], "evo_jax": ours[name]["metrics"]},
    }
  return found


def compare_texts(theirs, ours, engine: Engine, harness, run) -> dict[str, Any]:
  """By task, how many texts are equal, and where the others part."""
  encoder, found = harness.Encoder(run.tokenizer), {}
  for name in theirs:
    apart = []
    for number, (a, b) in enumerate(zip(theirs[name]["samples"], ours[name]["samples"])):
      if a["responses"] != b["responses"]:
        apart.append(
          {"item": number, **parting(encoder, engine, a["arguments"][0][0], a["responses"][0][0], b["responses"][0][0])}
        )
    metrics = {"hf": theirs[name]["metrics"], "evo_jax": ours[name]["metrics"]}
    found[name] = {"items": len(ours[name]["samples"]), "different": apart, "metrics": metrics}
  return found


def parting(encoder, engine: Engine, context: str, theirs: str, ours: str) -> dict[str, Any]:
  """Where two texts behind a context part: the tokens, and the log-probabilities of the two most probable there."""
  ids = encoder.encode_context(context)
  a, b = (encoder.pair(context, text).continuation if text else () for text in (theirs, ours))
  n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
  following = (a[n : n + 1] or b[n : n + 1])[:1]
  known = [*ids, *a[:n]][-(engine.context - 1) :]
  score = engine.submit_score(known[1:], following, best=2, begin=known[0]).result()
  first, second = score.choices[0].best
  return {
    "token": n,
    "hf": theirs[-80:] if n >= len(a) else engine.run.tokenizer.decode(np.array(a[n : n + 8])),
    "evo_jax": ours[-80:] if n >= len(b) else engine.run.tokenizer.decode(np.array(b[n : n + 8])),
    "best": [first, second],
    "distance": first[1] - second[1],
  }


def speeds(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
  """Items per second of each task, by what answered."""
  rows = []
  for by_name in found.values():
    for task in by_name["hf"]:
      items = len(by_name["hf"][task]["samples"])
      speed = {name: items / result[task]["seconds"] for name, result in by_name.items()}
      rows.append({"task": task, "items": items, "items_per_second": speed})
  return rows


def format_result(result: dict[str, Any]) -> str:
  """The comparison as text."""
  heads = f"{'task':<18}{'items':>6}{'largest difference':>20}{'per token':>11}{'beyond':>8}{'other choices':>15}"
  lines = [f"{heads}  accuracy of hf and evo_jax"]
  for name, row in result["likelihoods"].items():
    both = [row["metrics"][who].get("acc,none", float("nan")) for who in ("hf", "evo_jax")]
    lines.append(
      f"{name:<18}{row['items']:>6}{row['largest']:>20.2e}{row['largest_per_token']:>11.2e}"
      f"{row['beyond']:>8}{row['other_choices']:>15}"
      f"  {both[0]:.4f} {both[1]:.4f}"
    )
  for name, row in result["texts"].items():
    lines.append(f"{name}: {len(row['different'])} of {row['items']} texts differ")
    lines += [
      f"  item {d['item']}, token {d['token']}: {d['hf']!r} and {d['evo_jax']!r}, {d['distance']:.1e} nats apart"
      for d in row["different"]
    ]
  lines.append("")
  for row in result["speed"]:
    speed = ", ".join(f"{name} {value:.3f}" for name, value in row["items_per_second"].items())
    lines.append(f"{row['task']}: items per second: {speed}")
  return "\n".join(lines)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A work directory, as of an imported model, that computes in float32.")
  flags.DEFINE_string("data", "", "Folder of documents, as DIR/TASK/SPLIT.jsonl.")
  flags.DEFINE_string("tasks", LIKELIHOODS, "Tasks of likelihoods.")
  flags.DEFINE_string("text_tasks", TEXTS, "Tasks of texts.")
  flags.DEFINE_integer("limit", 100, "Items of a task of likelihoods.")
  flags.DEFINE_integer("texts", 20, "Items of a task of texts.")
  flags.DEFINE_integer("context", 2048, "Tokens of the longest text.")
  flags.DEFINE_integer("rows", 8, "Texts that an engine writes at once.")
  flags.DEFINE_integer("hf_batch", 8, "Batch size of hf.")
  flags.DEFINE_string("stages", "runs/benchmark_reference", "Folder in which stages are kept, and exported weights.")
  flags.DEFINE_string("output", "", "Folder for results; default: experiments/results.")
  cli.run(main)
