"""The frontier: bits per character against forward passes per token, for every method at the same training compute.

  pip install -e '.[plot]' && python -m experiments.frontier [--scale=cpu|gpu] [--data='dir/*.txt'] [--only=NAME,...]
      [--seeds=2] [--test]

Trains each of `METHODS` on the same text for the same number of FLOPs (by the formula in `evo_jax/network/flops.py`,
checked here against XLA's count), in runs/frontier/SCALE/NAME-SEED; runs that were stopped continue, and measurements
are kept. Measures every path on validation text and prints the results. With --test, the last step, also measures test
text, and writes the JSON and the figure: at each budget of passes validation selects the strategy, or the pair of
strategies that alternate, and the test split gives its bits. Runs of the same scale and text that the JSON already
holds stay in it.

Text is read as 27 characters (a-z and space), as in text8.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import files as files_lib
from evo_jax.data import tokenizers
from evo_jax.network import evo as evo_lib
from evo_jax.network import flops
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common

# Shapes and budgets by scale. `budget`: FLOPs of each method's training; `valid`, `test`: numbers of sequences.
SCALES: dict[str, dict[str, Any]] = {
  "cpu": {
    "budget": 1.2e13,
    "valid": 24,
    "test": 48,
    "changes": {
      "model.layers": 3,
      "model.width": 128,
      "model.heads": 2,
      "model.kv_heads": 2,
      "model.hidden": 384,
      "data.batch_size": 8,
      "optim.learning_rate": 1.5e-3,
      "optim.warmup": 50,
    },
  },
  "gpu": {
    "budget": 4.0e16,
    "valid": 128,
    "test": 512,
    "changes": {
      "model.layers": 12,
      "model.width": 512,
      "model.heads": 8,
      "model.kv_heads": 8,
      "model.hidden": 1408,
      "model.dtype": "bfloat16",
      "data.batch_size": 256,
      "optim.learning_rate": 1.5e-3,
      "optim.warmup": 300,
      "eval.batch_size": 64,
    },
  },
}
COMMON = {
  "model.context": 256,
  "model.unroll": 3,
  "data.tokenizer": "chars27",
  "train.log_every": 50,
  "train.checkpoint_every": 200,
  "optim.schedule": "wsd",
  "train.eval_every": 0,
  "eval.samples": 0,
  "eval.paths": ("ar",),
  "eval.sequences": 16,
}

START = "window.start_share"  # in changes: the share of a run's steps before windows start, see `with_steps`
# Evo's windows are wide, so that streams in them are long, and start in the last tenth of training, since a trained AR
# model is already a crude field. Of four windows two have paths of partial evidence and train by the bound; the others
# have all paths, streams most often. experiments/ablations.py led to these values.
EVO = {
  "window.size": 64,
  "window.count": 4,
  START: 0.9,
  "loss.bound_windows": 2,
  "loss.window_weight": 0.5,
  "paths.diagonal": 0.1,
  "paths.rolling": 0.1,
  "paths.independent": 0.05,
  "paths.staircase": 0.0,
  "paths.streams": 0.45,
  "paths.erasure": 0.1,
  "paths.ragged": 0.2,
}
DIFFUSION = {"loss.ar_weight": 0.0, "loss.window_weight": 1.0}
ERASURE = DIFFUSION | {
  "paths.erasure": 1.0,
  "paths.diagonal": 0.0,
  "paths.rolling": 0.0,
  "paths.independent": 0.0,
  "paths.staircase": 0.0,
  "loss.bound_windows": 0,
  "loss.codes": "frozen",
}

POLICIES = (
  "streams:2",
  "streams:4",
  "streams:8",
  "left:2",
  "certain:2",
  "certain:4",
  "certain:8",
  "entropy:2.5",
  "confidence:0.5",
)
EVO_PATHS = (
  "ar",
  "streams:2",
  "streams:4",
  "streams:8",
  "streams:16",
  "spread:0.2",
  "spread:0.4",
  "spread:0.8",
  "left:2",
  "certain:8",
  "entropy:2.5",
  "diagonal:2",
  "diagonal:4",
  "diagonal:8",
  "diagonal:16",
  "diagonal:64",
  "rolling:8",
  "rolling:32",
  "random:8",
  "random:64",
)


class Method(NamedTuple):
  """A method to train and measure.

  changes: to the configuration. published: paths that its paper decodes with. extra: this project's policies, where
  they apply. every: measured on each `every`-th held-out sequence.
  """

  changes: dict[str, Any]
  published: tuple[str, ...]
  extra: tuple[str, ...] = ()
  every: int = 1


AR = {"window.count": 0, "loss.bound_windows": 0}
METHODS: dict[str, Method] = {
  "ar": Method(AR, ("ar",)),
  "ar_equal_text": Method(AR, ("ar",)),
  "mdlm": Method(
    ERASURE | {"window.size": 256, "window.count": 1},
    ("random:32", "random:64", "random:128", "random:256"),
    ("certain:8", "certain:4"),
    every=2,
  ),
  "bd3_4": Method(
    ERASURE | {"window.size": 4, "window.count": 64, "paths.erasure_range": (0.45, 0.95)},
    ("random:1", "random:2", "random:4"),
    ("streams:2", "certain:2", "entropy:2.5"),
  ),
  "bd3_16": Method(
    ERASURE | {"window.size": 16, "window.count": 16, "paths.erasure_range": (0.3, 0.8)},
    ("random:2", "random:4", "random:8", "random:16"),
    POLICIES,
  ),
  "plaid": Method(
    DIFFUSION
    | {
      "window.size": 256,
      "window.count": 1,
      "loss.bound_windows": 1,
      "loss.bound_weight": 1.0,
      "loss.self_conditioning": 0.25,
      "paths.rolling": 0.0,
      "paths.independent": 0.0,
      "paths.staircase": 0.0,
      "paths.steps": (32, 64, 128, 256),
    },
    ("diagonal:32", "diagonal:64", "diagonal:128", "diagonal:256"),
    every=4,
  ),
  "evo": Method(EVO, EVO_PATHS),
  "evo_learned": Method(
    EVO | {"model.progression": "learned", "paths.learned": 0.25},
    EVO_PATHS + ("learned:2", "learned:4", "learned:8"),
  ),
}
BASELINES = ("ar", "mdlm", "bd3_4", "bd3_16", "plaid")
BUDGETS = (1.0, 0.5, 0.25, 0.125)


def base(scale: dict[str, Any], text: str, seed: int) -> ml_collections.ConfigDict:
  """The configuration that all methods of a scale share."""
  return common.changed(
    config_lib.default(),
    COMMON,
    scale["changes"],
    {"train.seed": seed, "data.seed": seed, "data.path": text or "stdlib"},
    held_out_files(text or "stdlib"),
  )


def held_out_files(text: str) -> dict[str, str]:
  """Fields that name the held-out files: of 20 or more, sorted, numbers 9, 29, ... are for validation and 19, 39, ...
  for testing; of fewer, each gives its end, which is the default."""
  sources = files_lib.find_sources(text, "--data")
  return {
    f"data.{split}": ",".join(file for _, files in sources if len(files) >= 20 for file in files[first::20])
    for split, first in (("valid", 9), ("test", 19))
  }


def make_model(config: config_lib.Config) -> evo_lib.Evo:
  return state_lib.make_model(config, tokenizers.load_tokenizer(config.data.tokenizer, config.data.tokenizer_path))


def vocab_rows(config: config_lib.Config) -> int:
  """Rows of the embedding and output tables."""
  return make_model(config).rows


def with_steps(values: ml_collections.ConfigDict, changes: dict[str, Any], steps: int) -> config_lib.Config:
  """The configuration with so many training steps, of which the share START, where given, has no windows."""
  fields = {name: value for name, value in changes.items() if name != START}
  start = int(changes.get(START, 0.0) * steps)
  return common.configure(values, fields, {"train.steps": steps, "window.start": start})


def with_budget(values: ml_collections.ConfigDict, changes: dict[str, Any], budget: float) -> config_lib.Config:
  """The configuration whose training takes `budget` FLOPs, to a step."""
  config = with_steps(values, changes, 10)
  per_step = flops.train_run(config, vocab_rows(config)) / config.train.steps
  return with_steps(values, changes, max(round(budget / per_step), 1))


def check_flops(config: config_lib.Config) -> float:
  """The formula's FLOPs of a training step over XLA's count for the compiled step, layers unrolled."""
  model = make_model(config)
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  batch = Batch(jax.ShapeDtypeStruct((config.data.batch_size, config.model.context + 1), jnp.int32))
  step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config)).lower(state, batch).compile()
  return flops.train_step(config, model.rows) / step.cost_analysis()["flops"]


def method_config(name: str, scale: dict[str, Any], text: str, seed: int) -> config_lib.Config:
  """The configuration of a method, with its number of steps."""
  values = base(scale, text, seed)
  changes = METHODS[name].changes
  if name == "ar_equal_text":  # as many characters as Evo
    return with_steps(values, changes, method_config("evo", scale, text, seed).train.steps)
  budget = scale["budget"]
  if name.startswith("bd3"):
    budget *= 1.0 / (1.0 - anchor_share(with_steps(values, changes, 10)))
  return with_budget(values, changes, budget)


def anchor_share(config: config_lib.Config) -> float:
  """The share of a training step's FLOPs that windows' anchors take.

  Block diffusion's windows need no anchors; the baseline gets what ours take on top of its budget.
  """
  rows, keys = vocab_rows(config), config.model.context + config.window.size + 1
  anchors = config.window.count * flops.forward_pass(config.model, rows, config.data.batch_size, keys, True) * 3
  return anchors / flops.train_step(config, rows)


def run_method(
  name: str, seed: int, scale_name: str, text: str, workdir: str, splits: tuple[str, ...]
) -> dict[str, Any]:
  """Trains a method and measures it on `splits`, as far as its work directory does not hold the results."""
  scale, method = SCALES[scale_name], METHODS[name]
  config = method_config(name, scale, text, seed)
  run = common.MeasuredRun(config, Path(workdir) / scale_name / f"{name}-{seed}")
  curves = {split: run.measure(split, scale[split], method.published + method.extra, method.every) for split in splits}
  return {
    "name": name,
    "seed": seed,
    "commit": common.commit(),
    "changes": method.changes,
    "steps": config.train.steps,
    "characters": config.train.steps * config.data.batch_size * config.model.context,
    "flops": flops.train_run(config, vocab_rows(config)),
    "every": method.every,
    **curves,
  }


Points = dict[str, dict[str, Any]]  # measurements by path: bits, stderr, passes_per_token, each
Mixture = list[tuple[str, float]]  # paths that alternate window by window, with their shares of the windows


def cheapest(points: Points, budget: float) -> Mixture | None:
  """The path, or the mixture of two, with the fewest bits at no more than `budget` passes per token on average.

  A mixture's bits and passes are the weighted means of the two paths'. None: all paths need more passes.
  """
  slack = 1e-9
  choices = [(p["bits"], [(path, 1.0)]) for path, p in points.items() if p["passes_per_token"] <= budget + slack]
  for slow, a in points.items():
    for fast, b in points.items():
      if b["passes_per_token"] < budget < a["passes_per_token"] - slack:
        share = (budget - b["passes_per_token"]) / (a["passes_per_token"] - b["passes_per_token"])
        choices.append((share * a["bits"] + (1 - share) * b["bits"], [(slow, share), (fast, 1 - share)]))
  return min(choices, key=lambda choice: choice[0])[1] if choices else None


def mixed(points: Points, mixture: Mixture, field: str) -> Any:
  """A measurement of a mixture."""
  return sum(share * np.asarray(points[path][field]) for path, share in mixture)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """Mean and standard error of paired differences a - b over sequences."""
  d = np.asarray(a) - np.asarray(b)
  return {"difference": float(d.mean()), "stderr": float(d.std(ddof=1) / len(d) ** 0.5)}


class Each(NamedTuple):
  """Bits per character of single sequences: of the held-out ones number 0, every, 2 every, ..."""

  bits: np.ndarray
  every: int

  def minus(self, other: "Each") -> dict[str, float]:
    """The paired difference over the sequences that both have."""
    step = np.lcm(self.every, other.every)
    return difference(self.bits[:: step // self.every], other.bits[:: step // other.every])


class Choice(NamedTuple):
  """What validation selects for a run at a budget of passes: its mixture and bits, and the bits on another split."""

  mixture: Mixture
  valid_bits: float
  each: Each


def summarize(runs: list[dict[str, Any]], split: str, published_only: bool) -> list[dict[str, Any]]:
  """By budget: what validation selects for each run and its bits on `split`; for each run of Evo the paired difference
  to the best baseline of its seed, which validation selects, too.

  published_only: baselines decode as in their papers, without this project's policies.
  """
  table = []
  for budget in BUDGETS:
    methods, choices = [], {}
    for run in runs:
      name, seed = run["name"], run["seed"]
      paths = METHODS[name].published + (() if published_only and name in BASELINES else METHODS[name].extra)
      mixture = cheapest({path: run["valid"][path] for path in paths}, budget)
      if mixture is None:
        continue
      valid_bits, bits = (mixed(run[s], mixture, "bits") for s in ("valid", split))
      each = Each(mixed(run[split], mixture, "each"), run["every"])
      choices[name, seed] = Choice(mixture, float(valid_bits), each)
      methods.append(
        {
          "name": name,
          "seed": seed,
          "strategy": [[path, round(share, 4)] for path, share in mixture],
          "valid_bits": float(valid_bits),
          "bits": float(bits),
          "stderr": float(each.bits.std(ddof=1) / len(each.bits) ** 0.5),
          "passes": float(mixed(run[split], mixture, "passes_per_token")),
        }
      )
    table.append({"budget": budget, "methods": methods, "evo_against_best_baseline": against_baselines(choices)})
  return table


def against_baselines(choices: dict[tuple[str, int], Choice]) -> list[dict[str, Any]]:
  """Paired differences of Evo's runs to the baseline of the same seed with the fewest bits in validation."""
  entries = []
  for (name, seed), choice in choices.items():
    rivals = {n: c for (n, s), c in choices.items() if n in BASELINES and s == seed}
    if name.startswith("evo") and rivals:
      best = min(rivals, key=lambda n: rivals[n].valid_bits)
      entries.append({"name": name, "seed": seed, "baseline": best, **choice.each.minus(rivals[best].each)})
  return entries


# The method's claims as paired differences of two methods' paths.
CLAIMS = {
  "evo's ar above AR alone, equal operations": (("evo", "ar"), ("ar", "ar")),
  "evo's ar above AR alone, equal text": (("evo", "ar"), ("ar_equal_text", "ar")),
  **{
    f"learned clock above shared clock, K = {k}": (("evo_learned", f"learned:{k}"), ("evo", f"diagonal:{k}"))
    for k in (2, 4, 8)
  },
  **{
    f"learned clock above the same model's diagonal, K = {k}": (
      ("evo_learned", f"learned:{k}"),
      ("evo_learned", f"diagonal:{k}"),
    )
    for k in (2, 4, 8)
  },
  "evo's diagonal:64 above masked diffusion's bound": (("evo", "diagonal:64"), ("mdlm", "random:256")),
  "evo's diagonal:64 above block diffusion's bound, blocks of 16": (("evo", "diagonal:64"), ("bd3_16", "random:16")),
  "plaid's bound above masked diffusion's bound": (("plaid", "diagonal:256"), ("mdlm", "random:256")),
}


def claim_differences(runs: list[dict[str, Any]], split: str) -> dict[str, list[dict[str, Any]]]:
  """The paired differences of CLAIMS on a split, for each seed that has both methods."""
  by_name = {(run["name"], run["seed"]): run for run in runs}
  each = lambda run, path: Each(np.array(run[split][path]["each"]), run["every"])
  differences = {}
  for claim, ((name_a, path_a), (name_b, path_b)) in CLAIMS.items():
    for seed in sorted({run["seed"] for run in runs}):
      if (name_a, seed) in by_name and (name_b, seed) in by_name:
        a, b = each(by_name[name_a, seed], path_a), each(by_name[name_b, seed], path_b)
        differences.setdefault(claim, []).append({"seed": seed, **a.minus(b)})
  return differences


LABELS = {
  "ar": "AR",
  "ar_equal_text": "AR, as much text as Evo",
  "mdlm": "masked diffusion",
  "bd3_4": "block diffusion, 4",
  "bd3_16": "block diffusion, 16",
  "plaid": "Gaussian diffusion",
  "evo": "Evo",
  "evo_learned": "Evo, learned clock",
}


COLORS = ("black", "gray", "tab:green", "tab:olive", "tab:orange", "tab:purple", "tab:blue", "tab:red")  # of LABELS


def draw(runs: list[dict[str, Any]], file: Path) -> None:
  """Draws test bits against passes: a line along each method's best mixtures, a dot for each path."""
  figure, axes = common.pyplot().subplots(figsize=(11, 5.2))
  colors = dict(zip(LABELS, COLORS))
  for run in runs:
    if run["seed"] == 0 and run["name"] != "ar_equal_text":
      draw_run(axes, run, colors[run["name"]])
  axes.set_xscale("log", base=2)
  axes.set_xlim(0.0625, 4.0)
  ticks = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4)
  axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
  axes.set_xlabel("forward passes per character")
  axes.set_ylabel("bits per character (upper bound, test text)")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
  figure.tight_layout()
  figure.savefig(file, dpi=130)


def draw_run(axes, run: dict[str, Any], color: str) -> None:
  """Draws one run: dots, and lines with the published paths alone (solid) and with all (dashed)."""
  method, label = METHODS[run["name"]], LABELS[run["name"]]
  paths = method.published + method.extra
  axes.scatter(
    [run["test"][path]["passes_per_token"] for path in paths],
    [run["test"][path]["bits"] for path in paths],
    s=40 if run["name"] == "ar" else 12,
    color=color,
    alpha=0.5,
  )
  lines = [(method.published, "-", label)]
  if method.extra:
    lines.append((paths, "--", label + " with this project's policies"))
  for paths, style, label in lines:
    if len(paths) == 1:
      axes.plot([], [], "o", color=color, label=label)
      continue
    budgets = np.geomspace(0.0625, 4.0, 200)
    mixtures = [cheapest({path: run["valid"][path] for path in paths}, budget) for budget in budgets]
    line = [(budget, mixed(run["test"], mixture, "bits")) for budget, mixture in zip(budgets, mixtures) if mixture]
    axes.plot(*zip(*line), style, color=color, label=label)


def report(runs: list[dict[str, Any]], split: str) -> dict[str, Any]:
  """Prints the tables of a split; returns them."""
  result = {
    "split": split,
    "budgets_baselines_as_published": summarize(runs, split, True),
    "budgets_baselines_with_our_policies": summarize(runs, split, False),
    "differences": claim_differences(runs, split),
  }
  for title in ("budgets_baselines_as_published", "budgets_baselines_with_our_policies"):
    print(f"\n{title.replace('_', ' ')}: {split} bits per character (validation selects)")
    print_budgets(runs, result[title])
  print()
  for claim, entries in result["differences"].items():
    for entry in entries:
      print(f"{claim}, seed {entry['seed']}: {entry['difference']:+.4f} +- {entry['stderr']:.4f}")
  return result


def print_budgets(runs: list[dict[str, Any]], table: list[dict[str, Any]]) -> None:
  """Prints a table of `summarize`: a line per run, a column per budget, and Evo's differences to the baselines."""
  print(f"{'method':<16}{'seed':>5}" + "".join(f"{row['budget']:>18g}" for row in table))
  columns = [{(m["name"], m["seed"]): f"{m['bits']:.4f} +- {m['stderr']:.4f}" for m in row["methods"]} for row in table]
  for run in runs:
    name, seed = run["name"], run["seed"]
    print(f"{name:<16}{seed:>5}" + "".join(f"{column.get((name, seed), '-'):>18}" for column in columns))
  for row in table:
    for entry in row["evo_against_best_baseline"]:
      print(
        f"at {row['budget']:g} passes: {entry['name']}-{entry['seed']} minus {entry['baseline']}: "
        f"{entry['difference']:+.4f} +- {entry['stderr']:.4f}"
      )


def with_earlier(runs: list[dict[str, Any]], origin: dict[str, Any], file: Path) -> list[dict[str, Any]]:
  """The runs and others that `file` holds of the same origin (scale, settings, text), by seed, then as in METHODS."""
  earlier = json.loads(file.read_text())["result"] if file.exists() else {}
  if {key: earlier.get(key) for key in origin} == json.loads(json.dumps(origin)):
    replaced = {(run["name"], run["seed"]) for run in runs}
    runs = runs + [run for run in earlier["runs"] if (run["name"], run["seed"]) not in replaced]
  return sorted(runs, key=lambda run: (run["seed"], list(METHODS).index(run["name"])))


def main() -> None:
  args = flags.FLAGS
  names = common.select(args.only, METHODS)
  if args.test:
    common.pyplot()  # a missing matplotlib is an error now, not after the measurements
  if args.budget:
    SCALES[args.scale]["budget"] = args.budget
  ratio = check_flops(method_config(names[-1], SCALES[args.scale], args.data, 0))
  print(f"FLOPs of a training step of {names[-1]}: the formula counts {ratio:.3f} of what XLA counts")
  splits = ("valid", "test") if args.test else ("valid",)
  runs = [
    run_method(name, seed, args.scale, args.data, args.workdir, splits)
    for seed in range(args.first_seed, args.seeds)
    for name in names
  ]
  if not args.test:
    report(runs, "valid")
    return
  folder = common.results_folder(args.output)
  origin = {
    "scale": args.scale,
    "settings": SCALES[args.scale],
    "text": ", ".join(Path(part).name for part in args.data.split(",")) if args.data else "standard library",
  }
  runs = with_earlier(runs, origin, folder / f"frontier_{args.scale}.json")
  common.write_result(f"frontier_{args.scale}", origin | report(runs, "test") | {"runs": runs}, folder)
  draw(runs, folder / f"frontier_{args.scale}.png")


if __name__ == "__main__":
  flags.DEFINE_enum("scale", "cpu", list(SCALES), "Model and budget.")
  flags.DEFINE_string("data", "", "Text, as config.data.path; default: the standard library's sources.")
  flags.DEFINE_float("budget", 0, "FLOPs of each method's training; 0: the scale's.")
  flags.DEFINE_bool("test", False, "Also measure the test split, and write the result: once all choices are made.")
  flags.DEFINE_string("output", "", "Folder for the JSON and the figure; default: experiments/results.")
  flags.DEFINE_string("only", "", "Comma-separated methods; default: all.")
  flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... of each method.")
  flags.DEFINE_integer("first_seed", 0, "The first of them.")
  flags.DEFINE_string("workdir", "runs/frontier", "Folder of the runs.")
  cli.run(main)
