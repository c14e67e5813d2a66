"""The frontier: bits a character against forward passes a token, for every method, in one harness at one price.

  pip install -e '.[plot]' && python -m experiments.frontier [--scale=cpu|gpu] [--data='dir/*.txt'] [--only=NAME,...]
      [--seeds=2] [--test]

Trains each of `METHODS` on the same text for the same number of floating-point operations (formula in
`evo_jax/flops.py`, held against XLA's count here), in runs/frontier/SCALE/NAME-SEED; what was stopped goes on, what
is measured is kept. Measures every curve on validation text and prints it. With --test, the last step, measures test
text, too, and writes the JSON and the picture: at each budget of passes validation picks the strategy, or the pair of
strategies that take turns, and the test split says what it costs. Runs that the JSON already holds, of the same scale
and text, stay in it.

Text is read as 27 characters (a-z and space), as in text8.
"""

import functools
import json
from pathlib import Path
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
from matplotlib import pyplot as plt
import ml_collections
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.network import flops
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common

matplotlib.use("Agg")

# Shapes and budgets by scale. `budget`: floating-point operations of each method's training.
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

# The windows of Evo: wide, so that streams in them are long, and only in the last tenth of training, as a pretrained
# AR model is a crude field already; two windows of four on paths of partial evidence, taught by the bound, the others
# on all paths, most of all on streams. experiments/ablations.py has what led here.
EVO = {
  "window.size": 64,
  "window.count": 4,
  "window.start": 0.9,
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

# name: (changes, paths as its paper has it, paths that are this project's, one of how many held-out sequences)
METHODS: dict[str, tuple[dict, tuple, tuple, int]] = {
  "ar": ({"window.count": 0, "loss.bound_windows": 0}, ("ar",), (), 1),
  "ar_equal_text": ({"window.count": 0, "loss.bound_windows": 0}, ("ar",), (), 1),
  "mdlm": (
    ERASURE | {"window.size": 256, "window.count": 1},
    ("random:32", "random:64", "random:128", "random:256"),
    ("certain:8", "certain:4"),
    2,
  ),
  "bd3_4": (
    ERASURE | {"window.size": 4, "window.count": 64, "paths.erasure_range": (0.45, 0.95)},
    ("random:1", "random:2", "random:4"),
    ("streams:2", "certain:2", "entropy:2.5"),
    1,
  ),
  "bd3_16": (
    ERASURE | {"window.size": 16, "window.count": 16, "paths.erasure_range": (0.3, 0.8)},
    ("random:2", "random:4", "random:8", "random:16"),
    POLICIES,
    1,
  ),
  "plaid": (
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
    (),
    4,
  ),
  "evo": (EVO, EVO_PATHS, (), 1),
  "evo_learned": (
    EVO | {"model.progression": "learned", "paths.learned": 0.25},
    EVO_PATHS + ("learned:2", "learned:4", "learned:8"),
    (),
    1,
  ),
}
BASELINES = ("ar", "mdlm", "bd3_4", "bd3_16", "plaid")
BUDGETS = (1.0, 0.5, 0.25, 0.125)


def base(scale: dict[str, Any], text: str, seed: int) -> ml_collections.ConfigDict:
  """The configuration that a scale's methods share."""
  return common.changed(
    config_lib.default(),
    COMMON,
    scale["changes"],
    {"train.seed": seed, "data.seed": seed},
    {"data.path": text} if text else {},
  )


def rows(config: config_lib.Config) -> int:
  """Rows of the tables."""
  return state_lib.make_model(config, tokenizers.load_tokenizer(config.data.tokenizer, config.data.tokenizer_path)).rows


def fitted(values: ml_collections.ConfigDict, changes: dict[str, Any], budget: float) -> config_lib.Config:
  """A configuration with as many steps as its budget of operations pays for."""
  config = common.configure(values, changes, {"train.steps": 10})
  per_step = flops.train_run(config, rows(config)) / config.train.steps
  return common.configure(values, changes, {"train.steps": max(round(budget / per_step), 1)})


def check_flops(config: config_lib.Config) -> float:
  """The formula's operations of a training step over XLA's count of the compiled one, layers unrolled."""
  model = state_lib.make_model(config, tokenizers.load_tokenizer(config.data.tokenizer, config.data.tokenizer_path))
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  batch = jax.ShapeDtypeStruct((config.data.batch_size, config.model.context + 1), jnp.int32)
  step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config)).lower(state, batch).compile()
  return flops.train_step(config, model.rows) / step.cost_analysis()["flops"]


def method_config(name: str, scale: dict[str, Any], text: str, seed: int) -> config_lib.Config:
  """The configuration of a method, with its steps."""
  values = base(scale, text, seed)
  changes = METHODS[name][0]
  if name == "ar_equal_text":  # as many characters as Evo saw
    return common.configure(values, changes, {"train.steps": method_config("evo", scale, text, seed).train.steps})
  budget = scale["budget"]
  if name.startswith("bd3"):
    # The paper's windows need no anchor: what ours cost is given to the baseline on top of its budget.
    size = changes["window.size"]
    plain = common.configure(values, changes, {"train.steps": 10})
    anchors = (
      changes["window.count"]
      * flops.forward_pass(plain.model, rows(plain), plain.data.batch_size, 256 + size + 1, True)
      * 3
    )
    budget *= 1.0 / (1.0 - anchors / flops.train_step(plain, rows(plain)))
  return fitted(values, changes, budget)


def measured(name: str, seed: int, scale_name: str, text: str, workdir: str, splits: tuple[str, ...]) -> dict[str, Any]:
  """A method's run: trained and measured on `splits` as far as it is not yet."""
  scale = SCALES[scale_name]
  config = method_config(name, scale, text, seed)
  measure = common.Measured(config, Path(workdir) / scale_name / f"{name}-{seed}")
  changes, published, ours, every = METHODS[name]
  curves = {split: measure(split, scale[split], published + ours, every) for split in splits}
  return {
    "name": name,
    "seed": seed,
    "commit": common.commit(),
    "changes": changes,
    "steps": config.train.steps,
    "characters": config.train.steps * config.data.batch_size * config.model.context,
    "flops": flops.train_run(config, rows(config)),
    "every": every,
    **curves,
  }


Points = dict[str, dict[str, Any]]  # by path: bits, stderr, passes_per_token, each


def cheapest(points: Points, budget: float) -> list[tuple[str, float]] | None:
  """The strategy, or the two that take turns window by window, with the fewest bits at not more than `budget` passes
  a token on average: [(path, share of the windows)]. A mixture's bits and passes are means of the two's. None:
  all need more."""
  slack = 1e-9
  choices = [(p["bits"], [(path, 1.0)]) for path, p in points.items() if p["passes_per_token"] <= budget + slack]
  for slow, a in points.items():
    for fast, b in points.items():
      if b["passes_per_token"] < budget < a["passes_per_token"] - slack:
        share = (budget - b["passes_per_token"]) / (a["passes_per_token"] - b["passes_per_token"])
        choices.append((share * a["bits"] + (1 - share) * b["bits"], [(slow, share), (fast, 1 - share)]))
  return min(choices, key=lambda choice: choice[0])[1] if choices else None


def mixed(points: Points, mixture: list[tuple[str, float]], field: str) -> Any:
  """A field of a mixture of strategies."""
  return sum(share * np.asarray(points[path][field]) for path, share in mixture)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """Mean and standard error of paired differences a - b over sequences."""
  d = np.asarray(a) - np.asarray(b)
  return {"difference": float(d.mean()), "stderr": float(d.std(ddof=1) / len(d) ** 0.5)}


def summarize(runs: list[dict[str, Any]], split: str, published_only: bool) -> list[dict[str, Any]]:
  """By budget: what validation picks for each run and what that costs on `split`; for each run of Evo, the paired
  difference to the best baseline of its seed (validation picks that one, too). published_only: baselines decode as in
  their papers, without this project's policies."""
  table = []
  for budget in BUDGETS:
    row, picked = {"budget": budget, "methods": [], "evo_against_best_baseline": []}, {}
    for r in runs:
      name = r["name"]
      paths = METHODS[name][1] + (() if published_only and name in BASELINES else METHODS[name][2])
      mixture = cheapest({path: r["valid"][path] for path in paths}, budget)
      if mixture is None:
        continue
      each = mixed(r[split], mixture, "each")
      picked[name, r["seed"]] = (float(mixed(r["valid"], mixture, "bits")), each, r["every"])
      row["methods"].append(
        {
          "name": name,
          "seed": r["seed"],
          "strategy": [[path, round(share, 4)] for path, share in mixture],
          "valid_bits": picked[name, r["seed"]][0],
          "bits": float(mixed(r[split], mixture, "bits")),
          "stderr": float(each.std(ddof=1) / len(each) ** 0.5),
          "passes": float(mixed(r[split], mixture, "passes_per_token")),
        }
      )
    for (name, seed), (_, each, every) in picked.items():
      rivals = {n: p for (n, s), p in picked.items() if n in BASELINES and s == seed}
      if name.startswith("evo") and rivals:
        best = min(rivals, key=lambda n: rivals[n][0])
        step = np.lcm(every, rivals[best][2])  # the sequences that both have
        row["evo_against_best_baseline"].append(
          {
            "name": name,
            "seed": seed,
            "baseline": best,
            **difference(each[:: step // every], rivals[best][1][:: step // rivals[best][2]]),
          }
        )
    table.append(row)
  return table


def single_differences(runs: list[dict[str, Any]], split: str) -> dict[str, list[dict[str, Any]]]:
  """Paired differences on a split that the method's claims are about."""
  by = {(r["name"], r["seed"]): r for r in runs}
  each = lambda name, seed, path: (np.array(by[name, seed][split][path]["each"]), by[name, seed]["every"])
  claims = {
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
  found = {}
  for claim, ((name_a, path_a), (name_b, path_b)) in claims.items():
    for seed in sorted({r["seed"] for r in runs}):
      if (name_a, seed) in by and (name_b, seed) in by:
        (a, every_a), (b, every_b) = each(name_a, seed, path_a), each(name_b, seed, path_b)
        step = np.lcm(every_a, every_b)
        found.setdefault(claim, []).append({"seed": seed, **difference(a[:: step // every_a], b[:: step // every_b])})
  return found


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


def draw(runs: list[dict[str, Any]], file: Path) -> None:
  """The picture: test bits against passes, a line along each method's cheapest strategies, a dot for each strategy."""
  figure, axes = plt.subplots(figsize=(11, 5.2))
  colors = dict(
    zip(LABELS, ("black", "gray", "tab:green", "tab:olive", "tab:orange", "tab:purple", "tab:blue", "tab:red"))
  )
  for r in runs:
    if r["seed"] or r["name"] == "ar_equal_text":
      continue
    name, color = r["name"], colors[r["name"]]
    _, published, ours, _ = METHODS[name]
    sets = [(published, "-", LABELS[name])]
    if ours:
      sets.append((published + ours, "--", LABELS[name] + " with this project's policies"))
    axes.scatter(
      [r["test"][p]["passes_per_token"] for p in published + ours],
      [r["test"][p]["bits"] for p in published + ours],
      s=12 if name != "ar" else 40,
      color=color,
      alpha=0.5,
    )
    for paths, style, label in sets:
      if len(paths) == 1:
        axes.plot([], [], "o", color=color, label=label)
        continue
      budgets = np.geomspace(0.0625, 4.0, 200)
      mixtures = [cheapest({p: r["valid"][p] for p in paths}, b) for b in budgets]
      line = [(b, mixed(r["test"], m, "bits")) for b, m in zip(budgets, mixtures) if m]
      axes.plot(*zip(*line), style, color=color, label=label)
  axes.set_xscale("log", base=2)
  axes.set_xlim(0.0625, 4.0)
  ticks = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4)
  axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
  axes.set_xlabel("forward passes a character")
  axes.set_ylabel("bits a character (upper bound, test text)")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
  figure.tight_layout()
  figure.savefig(file, dpi=130)


def report(runs: list[dict[str, Any]], split: str) -> dict[str, Any]:
  """Prints the tables of a split; returns them."""
  result = {
    "split": split,
    "budgets_baselines_as_published": summarize(runs, split, True),
    "budgets_baselines_with_our_policies": summarize(runs, split, False),
    "differences": single_differences(runs, split),
  }
  for title in ("budgets_baselines_as_published", "budgets_baselines_with_our_policies"):
    print(f"\n{title.replace('_', ' ')}: {split} bits a character (validation picks)")
    print(f"{'method':<16}{'seed':>5}" + "".join(f"{row['budget']:>18g}" for row in result[title]))
    for r in runs:
      cells = []
      for row in result[title]:
        found = [m for m in row["methods"] if (m["name"], m["seed"]) == (r["name"], r["seed"])]
        cells.append(f"{found[0]['bits']:.4f} +- {found[0]['stderr']:.4f}" if found else "-")
      print(f"{r['name']:<16}{r['seed']:>5}" + "".join(f"{cell:>18}" for cell in cells))
    for row in result[title]:
      for entry in row["evo_against_best_baseline"]:
        print(
          f"at {row['budget']:g} passes: {entry['name']}-{entry['seed']} minus {entry['baseline']}: "
          f"{entry['difference']:+.4f} +- {entry['stderr']:.4f}"
        )
  print()
  for claim, entries in result["differences"].items():
    for entry in entries:
      print(f"{claim}, seed {entry['seed']}: {entry['difference']:+.4f} +- {entry['stderr']:.4f}")
  return result


def with_earlier(runs: list[dict[str, Any]], origin: dict[str, Any], file: Path) -> list[dict[str, Any]]:
  """The runs and those that `file` holds of the same origin (scale, settings, text), in the order of METHODS."""
  earlier = json.loads(file.read_text())["result"] if file.exists() else {}
  if {key: earlier.get(key) for key in origin} == json.loads(json.dumps(origin)):
    fresh = {(r["name"], r["seed"]) for r in runs}
    runs = runs + [r for r in earlier["runs"] if (r["name"], r["seed"]) not in fresh]
  return sorted(runs, key=lambda r: (r["seed"], list(METHODS).index(r["name"])))


def main() -> None:
  args = flags.FLAGS
  names = common.chosen(args.only, METHODS)
  if args.budget:
    SCALES[args.scale]["budget"] = args.budget
  ratio = check_flops(method_config(names[-1], SCALES[args.scale], args.data, 0))
  print(f"operations of a training step of {names[-1]}: the formula counts {ratio:.3f} of what XLA counts")
  splits = ("valid", "test") if args.test else ("valid",)
  runs = [
    measured(name, seed, args.scale, args.data, args.workdir, splits)
    for seed in range(args.first_seed, args.seeds)
    for name in names
  ]
  if not args.test:
    report(runs, "valid")
    return
  folder = Path(args.output) if args.output else common.RESULTS
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
  flags.DEFINE_float("budget", 0, "Floating-point operations of each method's training; 0: the scale's.")
  flags.DEFINE_bool("test", False, "Read the test split, too, and write the result: once all choices are made.")
  flags.DEFINE_string("output", "", "Folder for the JSON and the picture; default: experiments/results.")
  flags.DEFINE_string("only", "", "Comma-separated methods; default: all.")
  flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... of each method.")
  flags.DEFINE_integer("first_seed", 0, "The first of them.")
  flags.DEFINE_string("workdir", "runs/frontier", "Where the runs live.")
  cli.run(main)
