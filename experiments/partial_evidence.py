"""Does partial evidence earn anything on a pretrained model? Windows that know tokens or do not, beside windows that
also gather Gaussian evidence, on one frozen model.

  pip install -e '.[plot]'
  python -m evo_jax.convert --source=MODEL.gguf --workdir=DIR
  python -m experiments.partial_evidence --model=DIR --text='text/*.jsonl' --valid='held_out/*.jsonl' [--minutes=40]
      [--seeds=2] [--dtype=bfloat16] [--only=KIND,...] [--workdir=runs/partial_evidence] [--small]

Each of `KINDS` trains windows of the imported model, which stays as it is, for equally many steps of equally many
windows and tokens: as many as its slowest kind makes in --minutes. Runs that were stopped go on, measurements are
kept, and a run that the JSON of the results holds is not repeated. Measured on held-out text (--valid):

  bits     per token and per byte of every path that a kind has, against passes per token
  samples  of modes `flow` and `adaptive`, judged by autoregression of the same frozen weights: nats per token; and,
           since few nats may also mean dull texts, entropies of their tokens and pairs of tokens, and distinct-2

At each budget of passes, kinds of windows are compared by their cheapest strategy, a path or two that alternate, which
one half of the sequences selects and the other half measures. What partial evidence has to beat are the best jumps of
any kind of windows. --small: shapes for a smoke test.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.configs import smollm2_windows
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.decoding.prompts import Request
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import STEPS_PATHS, Sampling
from evo_jax.errors import UserError
from evo_jax.flow import schedules
from experiments import common, decode_speed, frontier

# What all kinds change in configs/smollm2_windows.py: windows are wide enough for a sixteenth of a pass per token, and
# learn from the text, since the clean stream, the teacher there, knows nothing of what is known of later tokens.
BASE = {
  "model.code_dim": 32,
  "model.window_head": 0,
  "window.size": 16,
  "window.count": 16,
  "loss.distill": 0.0,
  "loss.position_decay": 0.0,
  "optim.warmup": 30,
  "train.checkpoint_every": 50,
  "train.log_every": 1,
}
JUMPS = {"paths.parallel": 0.2, "paths.erasure": 0.2, "paths.ragged": 0.3, "paths.streams": 0.3}
# The same jumps; of sixteen windows four are trained by the bound, on Gaussian paths alone, and a third of the others
# is on Gaussian paths, too: half of all windows.
EVIDENCE = JUMPS | {
  "paths.diagonal": 0.2,
  "paths.rolling": 0.15,
  "paths.independent": 0.15,
  "paths.steps": (2, 4, 8, 16),
  "loss.bound_windows": 4,
}
KINDS = {
  "jumps": JUMPS,
  "evidence": EVIDENCE,
  "evidence_selfcond": EVIDENCE | {"loss.self_conditioning": 0.5},  # soft inputs from the pass before
}
# Paths by strategy, over windows of 16.
JUMP_PATHS = {
  "streams": ("staircase", "streams:2", "streams:4", "streams:8", "streams:16"),
  "left": ("left:2", "left:4", "left:8"),
  "random": ("random:16", "random:8", "random:4", "random:2"),
  "certain": ("certain:2", "certain:4", "certain:8"),
  "spread": ("spread:0.5", "spread:1", "spread:2", "spread:4"),
}
EVIDENCE_PATHS = {
  "diagonal": ("diagonal:1", "diagonal:2", "diagonal:4", "diagonal:8", "diagonal:16"),
  "rolling": ("rolling:4", "rolling:8", "rolling:16"),
  "error": ("error:0.1", "error:0.2", "error:0.4", "error:0.8"),
  "maturity": ("maturity:0.2", "maturity:0.4", "maturity:0.6", "maturity:0.8"),
  "scaffold": (
    "scaffold:2:1",
    "scaffold:4:2",
    "scaffold:2:2",
    "scaffold:2:4:0.25",
    "scaffold:2:4",
    "scaffold:1:4:0.8",
    "scaffold:1:4",
    "scaffold:2:8",
    "scaffold:1:8:0.8",
    "scaffold:1:8",
    "scaffold:1:16:0.8",  # scaffold:1:16 is diagonal:2
    "scaffold:1:16:0.25",
  ),
}
# Paths that texts are sampled along in mode flow, and in mode adaptive with their number as the threshold.
JUMP_SAMPLES = {
  "flow": ("streams:2", "streams:4", "streams:8", "certain:4", "random:4"),
  "adaptive": ("spread:0.5", "spread:1", "spread:2", "entropy:1", "entropy:3"),
}
EVIDENCE_SAMPLES = {
  "flow": ("diagonal:4", "diagonal:8", "diagonal:16", "rolling:8", "error:0.4", "scaffold:2:4", "scaffold:1:8"),
  "adaptive": ("maturity:0.2", "maturity:0.4", "maturity:0.6"),
}
BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)  # passes per token

# sequences: held-out ones that are measured; texts: sampled in each setting; tokens: of a text; every_path: whether
# all paths are measured and sampled.
SCALES: dict[str, dict[str, Any]] = {
  "full": {
    "minutes": 40.0,
    "timed_steps": 16,
    "sequences": 16,
    "texts": 16,
    "tokens": 96,
    "every_path": True,
    "changes": {},
  },
  "small": {
    "minutes": 0.05,
    "timed_steps": 4,
    "sequences": 4,
    "texts": 2,
    "tokens": 16,
    "every_path": False,
    "changes": {
      "model.context": 32,
      "model.code_dim": 8,
      "model.window_rank": 2,
      "window.count": 8,
      "data.batch_size": 2,
      "eval.batch_size": 4,
    },
  },
}

Points = frontier.Points


def main() -> None:
  args = flags.FLAGS
  for name in ("model", "text", "valid"):
    if not args[name].value:
      raise UserError(f"--{name} is needed")
  common.pyplot()  # a missing matplotlib is an error now, not after the measurements
  names = common.select(args.only, KINDS)
  scale = SCALES["small" if args.small else "full"]
  fingerprints = check_text(configure(names[0], 0, 1, scale, args), args.valid)
  folder = common.results_folder(args.output)
  given = {name: common.shortened(args[name].value) for name in ("text", "valid", "dtype")}
  given |= {"model": common.model_identity(args.model), "held_out": fingerprints}
  recorded = common.RecordedRuns("partial_evidence", folder, {"scale": scale, "base": BASE, **given})
  steps = read_steps(scale, recorded.runs, args)
  runs = [
    recorded.find(name=name, seed=seed, changes=KINDS[name], steps=steps)
    or recorded.add(run_kind(name, seed, steps, scale, args))
    for seed in range(args.seeds)
    for name in names
  ]
  budgets = compare(runs)
  print_bits(runs)
  print_samples(runs)
  print_budgets(budgets)
  recorded.write(budgets=budgets)
  draw(runs, budgets, folder / "partial_evidence.png")


def configure(name: str, seed: int, steps: int, scale: dict[str, Any], args: flags.FlagValues) -> config_lib.Config:
  """The configuration of a kind of windows. Raises UserError."""
  values = common.load_config(str(Path(args.model) / "config.py"))
  smollm2_windows.add_windows(values)
  no_paths = {f"paths.{path}": 0.0 for path in config_lib.TRAIN_PATHS}
  text = {"data.path": args.text, "data.valid": args.valid}
  run = {"train.steps": steps, "train.seed": seed, "data.seed": seed}
  run |= {"model.dtype": args.dtype} if args.dtype else {}
  return common.configure(values, BASE, no_paths, KINDS[name], scale["changes"], text, run)


def check_text(config: config_lib.Config, path: str) -> list[str]:
  """The text's fingerprints. Raises UserError unless the held-out text has sequences that select strategies and others
  that measure them."""
  corpora = corpora_lib.load_corpora(config.data, corpora_lib.load_tokenizer(config.data))
  if len(batches_lib.held_out(corpora, "valid", config.model.context, 4).tokens) < 4:
    raise UserError(f"--valid={path}: has fewer than four sequences of {config.model.context} tokens")
  return [corpus.fingerprint for corpus in corpora]


def read_steps(scale: dict[str, Any], recorded: list[dict[str, Any]], args: flags.FlagValues) -> int:
  """The steps of all runs, which short runs of all kinds find out; later, those that are written down, or recorded."""
  file = Path(args.workdir) / "steps.json"
  if not file.exists() and recorded:
    return recorded[0]["steps"]
  if not file.exists():
    file.parent.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for name in KINDS:
      config = configure(name, 0, scale["timed_steps"], scale, args)
      timed = common.time_training(config, file.with_name(f"{name}.timed"), args.model)
      seconds[name] = float(np.mean(timed))
    steps = max(int(60 * (args.minutes or scale["minutes"]) / max(seconds.values())), 1)
    file.write_text(json.dumps({"steps": steps, "seconds_per_step": seconds, "minutes": args.minutes}))
  found = json.loads(file.read_text())
  if (minutes := found.get("minutes", args.minutes)) != args.minutes:
    raise UserError(f"--minutes={args.minutes}: {file} is of {minutes}; give another --workdir")
  return found["steps"]


def paths_of(name: str, scale: dict[str, Any]) -> dict[str, tuple[str, ...]]:
  """The paths of a kind of windows by strategy; at a small scale the first and the last of each strategy."""
  strategies = JUMP_PATHS | ({} if name == "jumps" else EVIDENCE_PATHS)
  if scale["every_path"]:
    return {"ar": ("ar",)} | strategies
  return {"ar": ("ar",)} | {strategy: (paths[0], paths[-1]) for strategy, paths in strategies.items()}


def run_kind(name: str, seed: int, steps: int, scale: dict[str, Any], args: flags.FlagValues) -> dict[str, Any]:
  """Trains and measures a kind of windows, as far as its folder does not hold the results."""
  config = configure(name, seed, steps, scale, args)
  measured = common.MeasuredRun(config, Path(args.workdir) / f"{name}-{seed}", args.model)
  paths = tuple(path for strategy in paths_of(name, scale).values() for path in strategy)
  points = measured.measure("valid", scale["sequences"], paths)
  samples = sample(measured, name, scale)
  seconds = common.step_seconds(config, measured.workdir)
  jax.clear_caches()
  return {
    "name": name,
    "seed": seed,
    "changes": KINDS[name],
    "steps": steps,
    "positions": steps * config.data.batch_size * config.window.count * config.window.size,
    "training_seconds": steps * float(np.mean(seconds)),
    "training_bits": last_bits(measured.workdir, steps),
    "points": {path: per_token(point) for path, point in points.items()},
    "samples": samples,
  }


def last_bits(folder: Path, steps: int) -> dict[str, float]:
  """What windows were trained by over the last fifth of a run, in bits per token: means of the log's terms."""
  rows = [row for row in common.read_metrics(folder) if row["step"] > 0.8 * steps]
  terms = [term for term in rows[-1] if term in ("window_ce", "window_bound") or term.startswith("ce_")]
  means = {term: float(np.mean([row[term] for row in rows])) for term in terms}
  return {term: mean for term, mean in means.items() if mean}  # 0: of a path that is not trained


def per_token(point: dict[str, Any]) -> dict[str, Any]:
  """A measurement with `bits` and `stderr` per token, and `bits_per_byte`."""
  each = np.array(point["each"])
  return point | {
    "bits": float(each.mean()),
    "stderr": stderr(each),
    "bits_per_byte": point["bits"],
  }


def stderr(values: np.ndarray) -> float | None:
  """The standard error of a mean; None for a single value."""
  return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def settings(name: str, scale: dict[str, Any]) -> dict[str, Sampling]:
  """How texts of a kind of windows are sampled; at a small scale along the last path of each mode."""
  evidence = {} if name == "jumps" else EVIDENCE_SAMPLES
  paths = {mode: jumps + evidence.get(mode, ()) for mode, jumps in JUMP_SAMPLES.items()}
  if not scale["every_path"]:
    paths = {mode: mode_paths[-1:] for mode, mode_paths in paths.items()}
  result = {"ar": Sampling()}
  for path in paths["flow"]:
    kind, number = schedules.parse_path(path)
    fields = dict(path=kind, steps=number) if kind in STEPS_PATHS else dict(path=path)
    result[f"flow {path}"] = Sampling(mode="flow", **fields)
  for path in paths["adaptive"]:
    kind, number = schedules.parse_path(path)
    result[f"adaptive {path}"] = Sampling(mode="adaptive", path=kind, threshold=number, window=BASE["window.size"])
  return result


def sample(measured: common.MeasuredRun, name: str, scale: dict[str, Any]) -> list[dict[str, Any]]:
  """Texts of every setting, judged, each behind a prompt of held-out text; the first row is that text's own."""
  tokens = scale["tokens"]
  rows = measured.kept(f"samples_{scale['texts']}_{tokens}")
  wanted = {"held-out text": None} | settings(name, scale)
  if not wanted.keys() <= rows.values.keys():
    run = measured.trained()
    prompts, continuations = decode_speed.held_out_texts(run, "", tokens, scale["texts"])
    scorer = decode_speed.Scorer(run)
  for setting, sampling in wanted.items():
    if setting in rows.values:
      continue
    row, texts = {"setting": setting}, continuations
    if sampling is not None:
      texts, row["passes_per_token"] = generate(run, sampling, prompts, tokens)
    rows.add(setting, row | judge(scorer, prompts, texts))
    print(f"{measured.workdir.name}: {format_sample(rows.values[setting])}", flush=True)
  return [rows.values[setting] for setting in wanted]


def generate(
  run: run_lib.Run, sampling: Sampling, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], float]:
  """A text of so many tokens behind each prompt, and the passes per token that they took."""
  sampling = dataclasses.replace(sampling, endless=True, batch_size=len(prompts))
  requests = [Request("", tuple(prompt), len(prompt) + 1 + tokens, i, 0) for i, prompt in enumerate(prompts)]
  generations = Sampler(run, sampling).decode(requests)
  return [g.tokens for g in generations], sum(g.passes for g in generations) / sum(len(g.tokens) for g in generations)


def judge(scorer: decode_speed.Scorer, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, float]:
  """Nats per token of texts by autoregression, and how diverse they are; entropies in bits."""
  bits = scorer.bits_per_token(prompts, texts)
  return {
    "nats": bits["mean"] * np.log(2.0),
    "stderr": bits["stderr"] * np.log(2.0),
    "unigram_entropy": decode_speed.token_entropy(texts),
    "bigram_entropy": decode_speed.token_entropy(texts, 2),
    "distinct_2": decode_speed.distinct(texts, 2),
  }


class Choice(NamedTuple):
  """Bits per token of single sequences on what was selected, and its name, for either half of the sequences."""

  each: np.ndarray
  strategies: list[str]


def cheapest(by_kind: dict[str, Points], budget: float) -> Choice:
  """The kind of windows and its path, or two that alternate, with the fewest bits at a budget of passes per token: one
  half of the sequences selects, the other is measured, and the other way round."""
  each, strategies = None, []
  for half in (0, 1):
    options = []
    for kind, points in by_kind.items():
      seen = {path: point | {"bits": float(np.mean(point["each"][half::2]))} for path, point in points.items()}
      mixture = frontier.cheapest(seen, budget)
      options.append((float(frontier.mixed(seen, mixture, "bits")), kind, mixture))
    _, kind, mixture = min(options)
    measured = frontier.mixed(by_kind[kind], mixture, "each")
    each = np.zeros_like(measured) if each is None else each
    each[1 - half :: 2] = measured[1 - half :: 2]
    strategies.append(f"{kind}: " + " + ".join(f"{share:.2g} {path}" for path, share in mixture))
  return Choice(each, strategies)


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """By budget: the best jumps of any kind of windows, and each kind's jumps and paths with evidence beside them."""
  by_seed: dict[int, dict[str, Points]] = {}
  for run in runs:
    by_seed.setdefault(run["seed"], {})[run["name"]] = run["points"]
  take = lambda points, strategies: {p: points[p] for paths in strategies.values() for p in paths if p in points}
  table = []
  for budget in BUDGETS:
    jumps = {name: {seed: take(kinds[name], JUMP_PATHS) for seed, kinds in by_seed.items()} for name in by_seed[0]}
    best = {seed: cheapest({name: points[seed] for name, points in jumps.items()}, budget) for seed in by_seed}
    row = {"budget": budget, "jumps": summary(best, best)}
    for name, points in jumps.items():
      own = {seed: cheapest({name: points[seed]}, budget) for seed in by_seed}
      row[f"{name}, jumps"] = summary(own, best)
      if name != "jumps":
        own = {seed: cheapest({name: take(by_seed[seed][name], EVIDENCE_PATHS)}, budget) for seed in by_seed}
        row[f"{name}, evidence"] = summary(own, best)
    table.append(row)
  return table


def summary(own: dict[int, Choice], best: dict[int, Choice]) -> dict[str, Any]:
  """What choices by seed cost, in bits per token, and their differences to the best jumps, with standard errors over
  sequences, over seeds, and over both."""
  each = np.stack([choice.each for choice in own.values()])
  difference = each - np.stack([best[seed].each for seed in own])
  errors = {"over_sequences": stderr(difference.mean(axis=0)), "over_seeds": stderr(difference.mean(axis=1))}
  return {
    "bits": float(each.mean()),
    "stderr": stderr(each.mean(axis=0)),
    "difference": float(difference.mean()),
    "difference_stderr": errors | {"both": float(np.linalg.norm([error or 0.0 for error in errors.values()]))},
    "strategies": {seed: choice.strategies for seed, choice in own.items()},
  }


def verdict(entry: dict[str, Any]) -> str:
  """What evidence does at a budget, by two standard errors."""
  difference, error = entry["difference"], 2.0 * entry["difference_stderr"]["both"]
  return "earns" if difference < -error else "costs" if difference > error else "neither"


def averaged(runs: list[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
  """Measurements of a kind of windows by path: means over seeds, with the standard error over sequences."""
  points = [run["points"] for run in runs if run["name"] == name]
  mean = lambda path, field: float(np.mean([point[path][field] for point in points]))
  return {
    path: {field: mean(path, field) for field in ("bits", "bits_per_byte", "passes_per_token")}
    | {"stderr": stderr(np.mean([point[path]["each"] for point in points], axis=0))}
    for path in points[0]
  }


def names_of(runs: list[dict[str, Any]]) -> list[str]:
  return list(dict.fromkeys(run["name"] for run in runs))


def print_bits(runs: list[dict[str, Any]]) -> None:
  """Prints bits and passes per token of every path, means over seeds."""
  for name in names_of(runs):
    print(f"\n{name + ': path':<28}{'bits per token':>16}{'stderr':>9}{'per byte':>10}{'passes per token':>18}")
    for path, point in averaged(runs, name).items():
      print(
        f"{path:<28}{point['bits']:>16.4f}{point['stderr']:>9.4f}{point['bits_per_byte']:>10.4f}"
        f"{point['passes_per_token']:>18.4f}"
      )


def print_samples(runs: list[dict[str, Any]]) -> None:
  """Prints how texts were judged."""
  for run in runs:
    print(f"\n{run['name']}-{run['seed']}: samples")
    for row in run["samples"]:
      print(format_sample(row))


def format_sample(row: dict[str, Any]) -> str:
  """A row of the table of samples."""
  return (
    f"{row['setting']:<24}{row.get('passes_per_token', float('nan')):>7.3f} passes{row['nats']:>8.3f} +- "
    f"{row['stderr']:.3f} nats per token; entropy {row['unigram_entropy']:.2f}, of pairs {row['bigram_entropy']:.2f} "
    f"bits; distinct-2 {row['distinct_2']:.3f}"
  )


def print_budgets(table: list[dict[str, Any]]) -> None:
  """Prints, by budget, the best jumps, and what evidence earns or costs beside them."""
  print("\nbits per token by budget of passes per token; differences to the best jumps")
  for row in table:
    jumps = row["jumps"]
    print(f"{row['budget']:g} passes: jumps {jumps['bits']:.4f}, {jumps['strategies']}")
    for name, entry in row.items():
      if name in ("budget", "jumps"):
        continue
      print(
        f"  {name:<30}{entry['difference']:>+9.4f} +- {entry['difference_stderr']['both']:.4f}  {verdict(entry)}; "
        f"{entry['strategies']}"
      )


def draw(runs: list[dict[str, Any]], table: list[dict[str, Any]], file: Path) -> None:
  """Draws, by kind of windows, bits per token against passes per token, a curve for each strategy, with the best jumps
  of any kind and where evidence is below them; and what autoregression says of samples."""
  names = names_of(runs)
  figure, axes = common.pyplot().subplots(2, len(names), figsize=(6 * len(names), 10), squeeze=False, sharey="row")
  for name, (above, below) in zip(names, axes.T):
    draw_bits(above, name, averaged(runs, name), table)
    draw_samples(below, [run for run in runs if run["name"] == name])
    for axis in (above, below):
      axis.set_xscale("log", base=2)
      axis.set_xlabel("passes per token")
      axis.grid(alpha=0.3)
      axis.legend(fontsize=7)
  axes[0, 0].set_ylabel("bits per token (upper bound, held-out text)")
  axes[1, 0].set_ylabel("nats per written token, by autoregression")
  figure.tight_layout()
  figure.savefig(file, dpi=110)


def best_of(dots: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """Of (passes, bits), sorted, those that have fewer bits than all before them."""
  return [dot for i, dot in enumerate(dots) if i == 0 or dot[1] < min(bits for _, bits in dots[:i])]


def draw_bits(axes, name: str, points: dict[str, dict[str, float]], table: list[dict[str, Any]]) -> None:
  """A kind's paths as dots, with a line along the best of each strategy, dashed for jumps; the best jumps of all in
  black; where evidence is below them the space is shaded, and beyond two standard errors there is a ring."""
  axes.plot(points["ar"]["passes_per_token"], points["ar"]["bits"], "k*", ms=10, label="ar")
  for strategy, paths in (JUMP_PATHS | EVIDENCE_PATHS).items():
    dots = sorted((points[path]["passes_per_token"], points[path]["bits"]) for path in paths if path in points)
    if dots:
      (drawn,) = axes.plot(*zip(*dots), "o" if strategy in EVIDENCE_PATHS else "x", ms=4)
      style = dict(color=drawn.get_color(), ls="-" if strategy in EVIDENCE_PATHS else "--")
      axes.plot(*zip(*best_of(dots)), lw=1, label=strategy, **style)
  budgets, best = zip(*[(row["budget"], row["jumps"]["bits"]) for row in table])
  axes.plot(budgets, best, color="black", lw=2, label="best jumps of any windows")
  if name != "jumps":
    entries = [row[f"{name}, evidence"] for row in table]
    own = np.array([entry["bits"] for entry in entries])
    axes.plot(budgets, own, color="tab:red", lw=2, label="best evidence of these")
    axes.fill_between(budgets, own, best, where=own < best, color="tab:green", alpha=0.4, label="evidence earns")
    earns = np.array([verdict(entry) == "earns" for entry in entries])
    axes.scatter(np.array(budgets)[earns], own[earns], s=120, facecolors="none", edgecolors="tab:green", zorder=3)
  axes.set_title(name)


def draw_samples(axes, runs: list[dict[str, Any]]) -> None:
  """Judged samples of a kind's runs: a curve for each mode and strategy, means over seeds."""
  curves: dict[str, list[tuple[float, float]]] = {}
  for i, row in enumerate(runs[0]["samples"]):
    nats = np.mean([run["samples"][i]["nats"] for run in runs])
    if row["setting"] == "held-out text":
      axes.axhline(nats, color="gray", ls=":", label=row["setting"])
      continue
    passes = np.mean([run["samples"][i]["passes_per_token"] for run in runs])
    curves.setdefault(row["setting"].partition(":")[0], []).append((passes, nats))
  for label, curve in curves.items():
    axes.plot(*zip(*sorted(curve)), "o-", ms=4, lw=1, label=label)


if __name__ == "__main__":
  flags.DEFINE_string("model", "", "The imported model's work directory.")
  flags.DEFINE_string("text", "", "Text to train on, as config.data.path.")
  flags.DEFINE_string("valid", "", "Held-out text, as config.data.valid.")
  flags.DEFINE_float("minutes", 0.0, "Of the training of the slowest kind of windows; 0: 40.", lower_bound=0.0)
  flags.DEFINE_integer("seeds", 2, "Seeds 0, 1, ... of each kind.", lower_bound=1)
  flags.DEFINE_enum("dtype", "", ["", *config_lib.DTYPES], "Of computation; default: the model's.")
  flags.DEFINE_string("only", "", "Comma-separated kinds of windows; default: all.")
  flags.DEFINE_bool("small", False, "Small shapes and little training: a smoke test.")
  flags.DEFINE_string("workdir", "runs/partial_evidence", "Folder of the runs.")
  flags.DEFINE_string("output", "", "Folder for the JSON and the figure; default: experiments/results.")
  cli.run(main)
