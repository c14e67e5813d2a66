"""The frontier: bits a character against forward passes a token, for every method, in one harness at one price.

  python -m experiments.frontier [--scale=cpu|gpu] [--data='dir/*.txt'] [--only=NAME,...] [--seeds=2] [--draw]

Trains each of `METHODS` on the same text for the same number of floating-point operations (formula in `evo_jax/flops.py`,
held against XLA's count here), in runs/frontier/SCALE/NAME-SEED; what was stopped goes on, what is measured is kept. Measures every
curve on validation and test text. At each budget of passes validation picks the strategy, or the pair of strategies that take
turns, and the test split says what it costs. --draw only collects what is there and draws it.

Text is read as 27 characters (a-z and space), as in text8.
"""

import functools
from pathlib import Path
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from evo_jax import cli, flops, train
from evo_jax import config as config_lib
from evo_jax import tokenizer as tokenizer_lib
from evo_jax.cli import UserError
from experiments import common

# Shapes and budgets by scale. `budget`: floating-point operations of each method's training.
SCALES: dict[str, dict[str, Any]] = {
    "cpu": {"budget": 1.8e13, "valid": 32, "test": 64, "changes": {
        "model.layers": 3, "model.width": 128, "model.heads": 2, "model.kv_heads": 2, "model.hidden": 384,
        "data.batch_size": 16, "optim.learning_rate": 3e-3, "optim.warmup": 50}},
    "gpu": {"budget": 4.0e16, "valid": 128, "test": 512, "changes": {
        "model.layers": 12, "model.width": 512, "model.heads": 8, "model.kv_heads": 8, "model.hidden": 1408,
        "model.dtype": "bfloat16", "data.batch_size": 256, "optim.learning_rate": 1.5e-3, "optim.warmup": 300,
        "eval.batch_size": 64}},
}
COMMON = {
    "model.context": 256, "model.unroll": 3, "data.tokenizer": "chars27", "train.log_every": 50, "train.checkpoint_every": 200,
    "train.eval_every": 0, "eval.samples": 0, "eval.paths": ("ar",), "eval.sequences": 16}

# The windows of Evo: most states that policies meet, and a path of partial evidence that the bound teaches.
EVO = {
    "window.size": 16, "window.count": 4, "loss.bound_windows": 1, "loss.window_weight": 0.5, "paths.diagonal": 0.3,
    "paths.rolling": 0.15, "paths.independent": 0.05, "paths.staircase": 0.0, "paths.erasure": 0.2, "paths.ragged": 0.3}
DIFFUSION = {"loss.ar_weight": 0.0, "loss.window_weight": 1.0}
ERASURE = DIFFUSION | {
    "paths.erasure": 1.0, "paths.diagonal": 0.0, "paths.rolling": 0.0, "paths.independent": 0.0, "paths.staircase": 0.0,
    "loss.bound_windows": 0, "loss.codes": "frozen"}

POLICIES = ("left:2", "left:4", "certain:2", "certain:4", "certain:8", "entropy:0.5", "entropy:1", "entropy:1.5", "entropy:2",
            "entropy:2.5", "confidence:0.9", "confidence:0.7", "confidence:0.5")
EVO_PATHS = ("ar", "staircase", *POLICIES, "maturity:0.1", "maturity:0.25", "maturity:0.5", "diagonal:2", "diagonal:4",
             "diagonal:8", "diagonal:16", "diagonal:64", "rolling:4", "rolling:8", "rolling:16", "random:2", "random:4",
             "random:8", "random:16")

# name: (changes, paths as its paper has it, paths that are this project's, share of the held-out sequences)
METHODS: dict[str, tuple[dict, tuple, tuple, int]] = {
    "ar": ({"window.count": 0, "loss.bound_windows": 0}, ("ar",), (), 1),
    "ar_equal_text": ({"window.count": 0, "loss.bound_windows": 0}, ("ar",), (), 1),
    "mdlm": (ERASURE | {"window.size": 256, "window.count": 1},
             ("random:32", "random:64", "random:128", "random:256"), ("certain:8", "certain:4"), 2),
    "bd3_4": (ERASURE | {"window.size": 4, "window.count": 64, "paths.erasure_range": (0.45, 0.95)},
              ("random:1", "random:2", "random:4"), ("certain:2", "entropy:0.5", "entropy:1", "entropy:2"), 1),
    "bd3_16": (ERASURE | {"window.size": 16, "window.count": 16, "paths.erasure_range": (0.3, 0.8)},
               ("random:2", "random:4", "random:8", "random:16"), POLICIES, 1),
    "plaid": (DIFFUSION | {"window.size": 256, "window.count": 1, "loss.bound_windows": 1, "loss.bound_weight": 1.0,
                           "loss.self_conditioning": 0.25, "paths.rolling": 0.0, "paths.independent": 0.0,
                           "paths.staircase": 0.0, "paths.steps": (32, 64, 128, 256)},
              ("diagonal:32", "diagonal:64", "diagonal:128", "diagonal:256"), (), 4),
    "evo": (EVO, EVO_PATHS, (), 1),
    "evo_learned": (EVO | {"model.progression": "learned", "paths.learned": 0.4, "paths.diagonal": 0.1},
                    EVO_PATHS + ("learned:2", "learned:4", "learned:8"), (), 1),
}
BASELINES = ("ar", "mdlm", "bd3_4", "bd3_16", "plaid")
BUDGETS = (1.0, 0.5, 0.25, 0.125)


def base(scale: dict[str, Any], text: str, seed: int) -> ml_collections.ConfigDict:
  """The configuration that a scale's methods share."""
  from evo_jax import config
  values = config.default()
  changes = COMMON | scale["changes"] | {"train.seed": seed, "data.seed": seed}
  for name, value in (changes | ({"data.path": text} if text else {})).items():
    section, field = name.split(".")
    values[section][field] = value
  return values


def rows(config: config_lib.Config) -> int:
  """Rows of the tables."""
  return train.make_model(config, tokenizer_lib.load(config.data.tokenizer, config.data.tokenizer_path)).rows


def fitted(values: ml_collections.ConfigDict, changes: dict[str, Any], budget: float) -> config_lib.Config:
  """A configuration with as many steps as its budget of operations pays for."""
  config = common.configure(values, changes, {"train.steps": 10})
  per_step = flops.train_run(config, rows(config)) / config.train.steps
  return common.configure(values, changes, {"train.steps": max(round(budget / per_step), 1)})


def check_flops(config: config_lib.Config) -> float:
  """The formula's operations of a training step over XLA's count of the compiled one, layers unrolled."""
  model = train.make_model(config, tokenizer_lib.load(config.data.tokenizer, config.data.tokenizer_path))
  state = jax.eval_shape(lambda: nn.unbox(train.init_state(model, config)))
  batch = jax.ShapeDtypeStruct((config.data.batch_size, config.model.context + 1), jnp.int32)
  step = jax.jit(functools.partial(train.train_step, model=model, config=config)).lower(state, batch).compile()
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
    anchors = changes["window.count"] * flops.read(plain.model, rows(plain), plain.data.batch_size, 256 + size + 1, True) * 3
    budget *= 1.0 / (1.0 - anchors / flops.train_step(plain, rows(plain)))
  return fitted(values, changes, budget)


def run(name: str, seed: int) -> None:
  """Trains and measures a method."""
  args = flags.FLAGS
  scale = SCALES[args.scale]
  config = method_config(name, scale, args.data, seed)
  measure = common.Measured(config, Path(args.workdir) / args.scale / f"{name}-{seed}")
  _, published, ours, share = METHODS[name]
  for split in ("valid", "test"):
    measure(split, scale[split] // share, published + ours)


def main() -> None:
  args = flags.FLAGS
  names = args.only.split(",") if args.only else list(METHODS)
  for name in names:
    if name not in METHODS:
      raise UserError(f"--only: {name!r} is not one of {', '.join(METHODS)}")
  for seed in range(args.first_seed, args.seeds):
    for name in names:
      run(name, seed)


if __name__ == "__main__":
  flags.DEFINE_enum("scale", "cpu", list(SCALES), "Model and budget.")
  flags.DEFINE_string("data", "", "Text, as config.data.path; default: the standard library's sources.")
  flags.DEFINE_string("only", "", "Comma-separated methods; default: all.")
  flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... of each method.")
  flags.DEFINE_integer("first_seed", 0, "The first of them.")
  flags.DEFINE_bool("draw", False, "Train and measure nothing: collect what is there.")
  flags.DEFINE_string("workdir", "runs/frontier", "Where the runs live.")
  cli.run(main)
