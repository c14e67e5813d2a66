"""Scaling: bits against parameters and compute, for autoregression and Evo from the same code, with fitted exponents.

  pip install -e '.[plot]'
  python -m experiments.scaling [--scale=cpu|gpu|small] [--data='text/*.txt'] [--items=DIR [--tasks=NAME,...]]
      [--seeds=2] [--only=SIZE,...] [--workdir=runs/scaling] [--output=DIR]

Each size of a scale trains each of `METHODS`, for each seed, by one rule:

  operations     those that autoregression takes for `tokens_per_parameter` tokens (bytes) a parameter, for both methods
                 (`evo_jax/network/flops.py`); parameters are those of the blocks that the clean stream reads, without
                 the tables of the vocabulary, as in Kaplan et al., "Scaling Laws for Neural Language Models", 2020
  learning rate  `rate` / width, after a warm-up of a twentieth of the steps (`wsd`: the last fifth decays)

Measured are bits per byte of held-out text on some paths and, with --items, bits per byte of the right answers to
questions (--items=DIR: DIR/TASK/validation.jsonl, in the fields of lm-evaluation-harness) by the clean stream, given
the question; with `choices` in a scale, which all have to be scored, accuracy too: the share of the items whose right
answer has the fewest bits per byte. Each curve is fitted by

  bits = a * x^-exponent

without an offset: over a decade and a half of compute an irreducible loss can hardly be told from a smaller exponent,
so the exponents hold for this range alone. Whether there is more to see says the curvature, the second-order
coefficient of log bits in log x, which an offset makes positive. Errors are by bootstrap over held-out sequences, or
items, which all runs share, and over seeds.

What a stopped run has done is kept, and a run that the JSON of the results holds is not repeated; the same command goes
on. --scale=small: shapes for a smoke test.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from flax import traverse_util
import flax.linen as nn
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops
from experiments import common, frontier

_BOOTSTRAP = 2000


class Size(NamedTuple):
  layers: int
  width: int
  heads: int


# By scale: its sizes by name; tokens_per_parameter and rate of the rule; sequences: held-out ones that are measured;
# items: of a task at most; choices: whether wrong answers are scored, too; changes: to the configuration.
SCALES: dict[str, dict[str, Any]] = {
  "cpu": {
    "sizes": {
      "60k": Size(2, 48, 2),
      "106k": Size(2, 64, 2),
      "180k": Size(3, 68, 2),
      "300k": Size(3, 88, 2),
      "479k": Size(4, 96, 2),
    },
    "tokens_per_parameter": 8,
    "rate": 0.2,
    "sequences": 64,
    "items": 200,
    "choices": False,
    "changes": {"data.batch_size": 8, "eval.batch_size": 16},
  },
  "gpu": {
    "sizes": {
      "3M": Size(4, 256, 4),
      "8M": Size(6, 320, 5),
      "15M": Size(8, 384, 6),
      "34M": Size(10, 512, 8),
      "64M": Size(12, 640, 10),
    },
    "tokens_per_parameter": 20,
    "rate": 0.4,
    "sequences": 256,
    "items": 1000,
    "choices": True,
    "changes": {
      "model.context": 1024,
      "model.dtype": "bfloat16",
      "data.batch_size": 64,
      "eval.batch_size": 64,
      "train.checkpoint_every": 1000,
    },
  },
  "small": {
    "sizes": {"1k": Size(1, 8, 1), "3k": Size(1, 16, 1), "7k": Size(2, 16, 1)},
    "tokens_per_parameter": 0.5,
    "rate": 0.2,
    "sequences": 4,
    "items": 4,
    "choices": True,
    "changes": {
      "model.context": 64,
      "model.code_dim": 8,
      "data.batch_size": 2,
      "eval.batch_size": 8,
      "train.checkpoint_every": 4,
    },
  },
}
COMMON = {
  "model.context": 256,
  "data.tokenizer": "bytes",
  "optim.schedule": "wsd",
  "train.log_every": 20,
  "train.checkpoint_every": 200,
  "train.eval_every": 0,
  "eval.samples": 0,
}
# Changes to the configuration, and paths of held-out text, by method.
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
  "ar": (frontier.AR, ("ar",)),
  "evo": (frontier.EVO, ("ar", "streams:4", "diagonal:16")),
}
_SPLIT = "test"  # nothing is selected by it


class Item(NamedTuple):
  """A question of a benchmark, with the answers that continue it, and the right one's number."""

  task: str
  question: str
  answers: list[str]
  right: int


def _choices(row: dict[str, Any], question: str) -> tuple[str, list[str], int]:
  choices = row["choices"]
  right = choices["label"].index(row["answerKey"])
  return f"Question: {question}\nAnswer:", [f" {text}" for text in choices["text"]], right


def _sciq(row: dict[str, Any]) -> tuple[str, list[str], int]:
  answers = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
  return f"{row['support']}\nQuestion: {row['question']}\nAnswer:".lstrip(), [f" {text}" for text in answers], 0


def _piqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
  return f"Question: {row['goal']}\nAnswer:", [f" {row[name]}" for name in ("sol1", "sol2")], int(row["label"])


def _hellaswag(row: dict[str, Any]) -> tuple[str, list[str], int]:
  return f"{row['activity_label']}: {row['ctx']}", [f" {text}" for text in row["endings"]], int(row["label"])


# A line of a task's file as question, answers and the right one's number.
TASKS = {
  "arc_easy": lambda row: _choices(row, row["question"]),
  "arc_challenge": lambda row: _choices(row, row["question"]),
  "openbookqa": lambda row: _choices(row, row["question_stem"]),
  "sciq": _sciq,
  "piqa": _piqa,
  "hellaswag": _hellaswag,
}


def read_items(folder: str, tasks: list[str], most: int) -> list[Item]:
  """The first `most` items of each task. Raises UserError."""
  items = []
  for task in tasks:
    file = Path(folder).expanduser() / task / "validation.jsonl"
    try:
      lines = common.read_lines(file)[:most]
      items += [Item(task, *TASKS[task](json.loads(line))) for line in lines]
    except OSError as error:
      raise UserError(f"--items={folder}: {file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"--items={folder}: {file} has not the fields of {task} ({error!r})") from error
  return items


def item_batch(items: list[Item], tokenizer: Any, length: int, every_answer: bool) -> tuple[Batch, np.ndarray]:
  """Sequences of `length` tokens behind the begin token, of which the answers' count: one for each right answer, or for
  every answer; and the items' numbers (n,). Long questions lose their beginning, long answers, too."""
  rows, numbers = [], []
  for number, item in enumerate(items):
    for answer in item.answers if every_answer else [item.answers[item.right]]:
      encoded = tokenizer.encode(answer)[-length:]
      question = tokenizer.encode(item.question)[-(length - len(encoded)) :] if len(encoded) < length else encoded[:0]
      rows.append((question, encoded))
      numbers.append(number)
  tokens = np.full((len(rows), length + 1), tokenizer.separator_id, np.int32)
  tokens[:, 0] = tokenizer.begin_id
  counted = np.zeros(tokens.shape, bool)
  for i, (question, answer) in enumerate(rows):
    end = 1 + len(question) + len(answer)
    tokens[i, 1:end] = np.concatenate([question, answer])
    counted[i, 1 + len(question) : end] = True
  return Batch(tokens, counted), np.array(numbers)


def configure(
  size: Size, method: str, seed: int, scale: dict[str, Any], text: str
) -> tuple[config_lib.Config, int, float]:
  """The configuration of a run by the rule; its parameters (see above); and its budget of operations."""
  changes = {
    "model.layers": size.layers,
    "model.unroll": size.layers,
    "model.width": size.width,
    "model.heads": size.heads,
    "model.kv_heads": size.heads,
    "model.hidden": 3 * size.width,
    "optim.learning_rate": scale["rate"] / size.width,
    "train.seed": seed,
    "data.seed": seed,
    "data.path": text or "stdlib",
  }
  base = (config_lib.default(), COMMON, scale["changes"], changes, frontier.held_out_files(text or "stdlib"))
  values = common.changed(*base)
  alone = common.configure(values, frontier.AR)
  rows, parameters = frontier.vocab_rows(alone), block_parameters(alone)
  per_token = flops.train_step(alone, rows) / (alone.data.batch_size * alone.model.context)
  budget = per_token * scale["tokens_per_parameter"] * parameters
  steps = frontier.with_budget(values, METHODS[method][0], budget).train.steps
  values = common.changed(values, {"optim.warmup": max(steps // 20, 1)})
  return frontier.with_steps(values, METHODS[method][0], steps), parameters, budget


def block_parameters(config: config_lib.Config) -> int:
  """Parameters of the blocks that the clean stream reads."""
  params = evo_lib.abstract_params(config.model, frontier.make_model(config).vocab_size)
  flat = traverse_util.flatten_dict(nn.unbox(params)["blocks"])
  return sum(leaf.size for path, leaf in flat.items() if not evo_lib.is_of_windows(path))


def run_point(
  name: str, method: str, seed: int, scale: dict[str, Any], items: list[Item], args: flags.FlagValues
) -> dict[str, Any]:
  """Trains and measures a run, as far as its folder does not hold the results."""
  config, parameters, _ = configure(scale["sizes"][name], method, seed, scale, args.data)
  run = common.MeasuredRun(config, Path(args.workdir) / args.scale / f"{method}-{name}-{seed}")
  text = run.measure(_SPLIT, scale["sequences"], METHODS[method][1])
  answers = measure_items(run, items, scale["choices"]) if items else None
  seconds = common.step_seconds(config, run.workdir)
  return {
    "size": name,
    "method": method,
    "seed": seed,
    "shape": scale["sizes"][name]._asdict(),
    "parameters": parameters,
    "learning_rate": config.optim.learning_rate,
    "steps": config.train.steps,
    "tokens": config.train.steps * config.data.batch_size * config.model.context,
    "flops": flops.train_run(config, frontier.vocab_rows(config)),
    "seconds": config.train.steps * float(np.median(seconds)),
    "text": text,
    "items": answers,
  }


def measure_items(run: common.MeasuredRun, items: list[Item], every_answer: bool) -> dict[str, Any]:
  """Bits per byte of the right answers by the clean stream, in all and by task; where all answers are scored, accuracy.

  `each` and `lengths`: bits and bytes of the single right answers.
  """
  tasks = sorted({item.task for item in items})
  asked = {"steps": run.config.train.steps, "tasks": tasks, "count": len(items), "every_answer": every_answer}
  file = run.workdir / "items.json"
  found = json.loads(file.read_text()) if file.exists() else {}
  if found.get("asked") == asked:
    return found
  trained = run.trained()
  batch, numbers = item_batch(items, trained.tokenizer, run.config.model.context, every_answer)
  evaluator = paths_lib.Evaluator(trained.model, run.config, trained.tokenizer, trained.mesh)
  ((_, bits),) = evaluator.measure(trained.params, trained.statistics, batch, ("ar",))
  lengths = evaluator.lengths(batch)
  starts = np.searchsorted(numbers, np.arange(len(items)))
  right = starts + np.array([item.right * every_answer for item in items])
  of_task = np.array([item.task for item in items])
  ratio = lambda chosen: dict(zip(("bits", "stderr"), paths_lib.ratio(bits[chosen], lengths[chosen])))
  found = {"asked": asked, **ratio(right), "by_task": {task: ratio(right[of_task == task]) for task in tasks}}
  if every_answer:
    per_byte = np.split(bits / lengths, starts[1:])
    correct = np.array([values.argmin() == item.right for values, item in zip(per_byte, items)])
    found["accuracy"] = {task: float(correct[of_task == task].mean()) for task in tasks}
    found["chance"] = {t: float(np.mean([1 / len(i.answers) for i in items if i.task == t])) for t in tasks}
  found |= {"each": [round(float(x), 4) for x in bits[right]], "lengths": lengths[right].tolist()}
  file.write_text(json.dumps(found))
  print(f"{run.workdir.name}: right answers {found['bits']:.4f} +- {found['stderr']:.4f} bits per byte", flush=True)
  return found


class Curve(NamedTuple):
  """What is fitted: runs of a method by size and seed (S, R), with bits (S, R, n) and bytes (n,) of what they share."""

  label: str
  points: list[list[dict[str, Any]]]
  bits: np.ndarray
  lengths: np.ndarray

  def x(self, against: str) -> np.ndarray:
    """Parameters or operations of the sizes (S, R)."""
    return np.array([[point[against] for point in row] for row in self.points], float)

  @property
  def y(self) -> np.ndarray:
    """Bits per byte (S, R)."""
    return self.bits.sum(axis=-1) / self.lengths.sum()


def curves(points: list[dict[str, Any]]) -> dict[str, list[Curve]]:
  """The curves of text and, where there are some, of items."""
  sizes = list(dict.fromkeys(point["size"] for point in points))
  found = {"text": [], "items": []}
  for method, (_, paths) in METHODS.items():
    rows = [[p for p in points if p["size"] == size and p["method"] == method] for size in sizes]
    for path in paths:
      text = [[point["text"][path] for point in row] for row in rows]
      bits = np.array([[entry["each"] for entry in row] for row in text])
      mean = np.mean([[np.mean(entry["each"]) / entry["bits"] for entry in row] for row in text])
      label = method if len(paths) == 1 else f"{method}, {path}"
      found["text"].append(Curve(label, rows, bits, np.full(bits.shape[-1], mean)))
    if points[0]["items"]:
      bits = np.array([[point["items"]["each"] for point in row] for row in rows])
      found["items"].append(Curve(method, rows, bits, np.array(points[0]["items"]["lengths"], float)))
  return found


def fit(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Exponents and coefficients a (...) of y = a * x^-exponent, by least squares of log y (..., S, R)."""
  u, v = (np.log(np.broadcast_to(a, y.shape)).reshape(*y.shape[:-2], -1) for a in (x, y))
  du = u - u.mean(-1, keepdims=True)
  slope = (du * v).sum(-1) / (du**2).sum(-1)
  return -slope, np.exp(v.mean(-1) - slope * u.mean(-1))


def curvature(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """The second-order coefficient (...) of log y (..., S, R) in log x (S, R), by least squares; NaN below 3 sizes."""
  if len(x) < 3:
    return np.full(y.shape[:-2], np.nan)
  u = np.log(x).ravel()
  u = u - u.mean()
  v = np.log(y).reshape(-1, u.size)
  return np.linalg.lstsq(np.stack([np.ones_like(u), u, u**2], axis=1), v.T)[0][2].reshape(y.shape[:-2])


def resampled(curve: Curve) -> np.ndarray:
  """Bits per byte (draws, S, R) with sequences, or items, and seeds drawn with replacement; the same draws for all
  curves of as many."""
  rng = np.random.default_rng(0)
  S, R, n = curve.bits.shape
  weight = rng.multinomial(n, np.full(n, 1.0 / n), _BOOTSTRAP)  # how often each is drawn
  y = np.einsum("srn,bn->bsr", curve.bits, weight) / (weight @ curve.lengths)[:, None, None]
  seeds = rng.integers(0, R, (_BOOTSTRAP, S, R))
  return np.take_along_axis(y, seeds, axis=-1)


def fits(found: dict[str, list[Curve]]) -> list[dict[str, Any]]:
  """The fit of each curve against parameters and operations, and differences of exponents to the first curve's."""
  result = []
  for measure, group in found.items():
    for against in ("parameters", "flops"):
      first = None
      for curve in group:
        exponent, a = fit(curve.x(against), curve.y)
        draws, _ = fit(curve.x(against), resampled(curve))
        bend = curvature(curve.x(against), curve.y), curvature(curve.x(against), resampled(curve)).std(ddof=1)
        first = (exponent, draws) if first is None else first
        residual = np.log(curve.y / (a * curve.x(against) ** -exponent))
        result.append(
          {
            "measure": measure,
            "against": against,
            "curve": curve.label,
            "exponent": float(exponent),
            "stderr": float(draws.std(ddof=1)),
            "a": float(a),
            "curvature": None if np.isnan(bend[0]) else float(bend[0]),
            "curvature_stderr": None if np.isnan(bend[1]) else float(bend[1]),
            "residual": float(np.sqrt((residual**2).mean())),
            "above_first": float(exponent - first[0]),
            "above_first_stderr": float((draws - first[1]).std(ddof=1)),
          }
        )
  return result


def report(points: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
  """Prints a table of the runs and one of the fits."""
  print(f"\n{'size':<8}{'method':<8}{'seed':>4}{'parameters':>12}{'tokens':>13}{'flops':>10}{'s':>7}  bits per byte")
  for point in points:
    bits = [f"{path} {entry['bits']:.4f}" for path, entry in point["text"].items()]
    if point["items"]:
      bits.append(f"right answers {point['items']['bits']:.4f}")
      accuracy = point["items"].get("accuracy", {})
      bits += [f"{task} {100 * share:.1f} %" for task, share in accuracy.items()]
    head = f"{point['size']:<8}{point['method']:<8}{point['seed']:>4}{point['parameters']:>12,}{point['tokens']:>13,}"
    print(f"{head}{point['flops']:>10.2e}{point['seconds']:>7.0f}  {', '.join(bits)}")
  print("\nbits = a * x^-exponent")
  print(
    f"{'of':<7}{'against':<12}{'curve':<18}{'exponent':>10}{'stderr':>9}{'residual':>10}{'curvature':>20}"
    f"{'above the first':>20}"
  )
  for row in found:
    above = f"{row['above_first']:+.4f} +- {row['above_first_stderr']:.4f}" if row["above_first_stderr"] else ""
    bend = "" if row["curvature"] is None else f"{row['curvature']:+.4f} +- {row['curvature_stderr']:.4f}"
    print(
      f"{row['measure']:<7}{row['against']:<12}{row['curve']:<18}{row['exponent']:>10.4f}{row['stderr']:>9.4f}"
      f"{row['residual']:>10.4f}{bend:>20}{above:>20}"
    )


COLORS = ("black", "tab:blue", "tab:green", "tab:orange")


def draw(found: dict[str, list[Curve]], fitted: list[dict[str, Any]], file: Path) -> None:
  """Draws the curves: bits against compute and parameters, a dot for each run, a line for each fit."""
  panels = [("text", "flops"), ("text", "parameters")] + [("items", "flops")] * bool(found["items"])
  plt = common.pyplot()
  figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.4), squeeze=False)
  for axis, (measure, against) in zip(axes[0], panels):
    colors = dict(zip((curve.label for curve in found["text"]), COLORS)) | {"ar": COLORS[0], "evo": COLORS[1]}
    for curve in found[measure]:
      (row,) = (r for r in fitted if (r["measure"], r["against"], r["curve"]) == (measure, against, curve.label))
      x = curve.x(against)
      ends = np.geomspace(x.min(), x.max(), 50)
      label = f"{curve.label}: {row['exponent']:.3f} ± {row['stderr']:.3f}"
      axis.plot(ends, row["a"] * ends ** -row["exponent"], color=colors[curve.label], lw=1, label=label)
      axis.plot(x.ravel(), curve.y.ravel(), "o", ms=4, color=colors[curve.label], alpha=0.6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(plt.MaxNLocator(7))  # the range is less than a decade
    axis.yaxis.set_minor_locator(plt.NullLocator())
    axis.yaxis.set_major_formatter("{x:.2f}")
    if against == "parameters":
      sizes = {row[0]["parameters"]: row[0]["size"] for row in found[measure][0].points}
      axis.set_xticks([*sizes], [*sizes.values()])
      axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.set_xlabel({"flops": "training FLOPs", "parameters": "parameters of the blocks"}[against])
    what = {"text": "held-out text", "items": "right answers, given the question"}[measure]
    axis.set_ylabel(f"bits per byte, {what}")
    axis.grid(alpha=0.3, which="both")
    above = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axis.legend(fontsize=8, title="exponent", title_fontsize=8, **above)
  figure.tight_layout()
  figure.savefig(file, dpi=130)


def main() -> None:
  args = flags.FLAGS
  scale = SCALES[args.scale]
  sizes = common.select(args.only, scale["sizes"])
  tasks = args.tasks.split(",")
  for task in tasks:
    if task not in TASKS:
      raise UserError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}")
  common.pyplot()  # a missing matplotlib is an error now, not after the measurements
  items = read_items(args.items, tasks, scale["items"]) if args.items else []
  settings = scale | {
    "sizes": {name: size._asdict() for name, size in scale["sizes"].items()},
    "methods": METHODS,
    "text": ", ".join(Path(part).name for part in args.data.split(",")) if args.data else "standard library",
    "tasks": tasks if items else [],
  }
  folder, name = common.results_folder(args.output), f"scaling_{args.scale}"
  recorded = common.RecordedRuns(name, folder, settings)
  points = [
    recorded.find(size=size, method=method, seed=seed)
    or recorded.add(run_point(size, method, seed, scale, items, args))
    for size in sizes
    for seed in range(args.seeds)
    for method in METHODS
  ]
  found = curves(points)
  fitted = fits(found)
  report(points, fitted)
  recorded.write(fits=fitted)
  draw(found, fitted, folder / f"{name}.png")


if __name__ == "__main__":
  flags.DEFINE_enum("scale", "cpu", list(SCALES), "Sizes and their budgets.")
  flags.DEFINE_string("data", "", "Text, as config.data.path; default: the standard library's sources.")
  flags.DEFINE_string("items", "", "Folder with TASK/validation.jsonl of benchmarks' items; default: none is scored.")
  flags.DEFINE_string("tasks", "arc_easy,sciq,piqa,hellaswag", f"Comma-separated, of {', '.join(TASKS)}.")
  flags.DEFINE_integer("seeds", 2, "Seeds 0, 1, ... of each size and method.", lower_bound=1)
  flags.DEFINE_string("only", "", "Comma-separated sizes; default: all.")
  flags.DEFINE_string("workdir", "runs/scaling", "Folder of the runs.")
  flags.DEFINE_string("output", "", "Folder for the JSON and the figure; default: experiments/results.")
  cli.run(main)
