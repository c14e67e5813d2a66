"""Writes text with a trained model.

  python -m evo_jax.generate --workdir=DIR --prompt=TEXT --mode=ar|flow --steps=K --num=N --max_tokens=M --seed=S

`ar` writes one token a pass; `flow` writes windows of tokens in K passes each. A text ends where the model ends the
document, or after M tokens. Several texts are parted by a line of dashes.
"""

import functools
from typing import Any

from absl import flags
import jax
import numpy as np

from evo_jax import checkpoint
from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import elbo
from evo_jax import paths
from evo_jax import policies
from evo_jax import sample
from evo_jax import tokenizer as tokenizer_lib
from evo_jax.cli import UserError
from evo_jax.model import DOCUMENT, Evo

MODES = ("ar", "flow")
PATHS = ("diagonal", "rolling", "random", "learned")  # whose number of passes is --steps


def generate(model: Evo, params: Any, statistics: elbo.Statistics, config: config_lib.Config, prompt: np.ndarray,
             mode: str, num: int, max_tokens: int, key: jax.Array, steps: int = 8, path: str = "diagonal",
             stepper: str = "ode") -> np.ndarray:
  """(num, max_tokens) int32: continuations of one prompt (n,) of token ids, the document token not in it.

  steps, path, stepper: of mode "flow": K passes a window along a path, by sample.STEPPERS; a path with a number of its own,
  as "entropy:0.5", takes as many passes as it needs. Raises UserError where prompt and continuation do not fit the context.
  """
  C = config.model.context
  length = len(prompt) + 1
  if length + max_tokens > C + 1:
    raise UserError(f"the prompt's {len(prompt)} tokens and {max_tokens} more do not fit the context of {C}")
  padded = np.full((num, C), DOCUMENT, np.int32)
  padded[:, 1:length] = prompt

  state = _start(model, params, padded, length)
  state = _write(model, config, mode, max_tokens, steps, path, stepper, params, statistics, state, key)
  return np.asarray(jax.device_get(state.token))[:, length:length + max_tokens]


def _with_passes(path: str, steps: int) -> str:
  """The path's full name: of "diagonal", "diagonal:8"."""
  return f"{path}:{steps}" if path in PATHS else path


@functools.partial(jax.jit, static_argnums=0)
def _start(model, params, prompt_BxC, length):
  return sample.start_text(model.bind({"params": params}), prompt_BxC, length)


@functools.partial(jax.jit, static_argnums=range(7))
def _write(model, config, mode, tokens, steps, path, stepper, params, statistics, state, key):
  net = model.bind({"params": params})
  if mode == "ar":
    return sample.ar(net, state, key, tokens)
  whole, rest = divmod(tokens, config.window.size)
  for windows, size in ((whole, config.window.size), (1, rest)):  # a window's size is free: the last may be shorter
    if windows and size:
      key, window_key = jax.random.split(key)
      policy = policies.make(_with_passes(path, steps), size, config.paths.rolling_width)
      state, _ = sample.flow_windows(net, statistics, state, window_key, windows, size, policy, sample.STEPPERS[stepper],
                                     config.loss.self_conditioning > 0)
  return state


def final_samples(model: Evo, params: Any, statistics: elbo.Statistics, config: config_lib.Config,
                  tokenizer: tokenizer_lib.Tokenizer) -> str:
  """A few texts in both modes, from nothing, for the end of training."""
  parts = []
  tokens = min(config.eval.sample_tokens, config.model.context)
  for mode in MODES if config.eval.samples else ():
    found = generate(model, params, statistics, config, np.zeros(0, np.int32), mode, config.eval.samples, tokens,
                     jax.random.key(config.train.seed), config.eval.flow_steps)
    passes = "one token a pass" if mode == "ar" else f"{config.eval.flow_steps} passes for {config.window.size} tokens"
    for text in map(tokenizer.decode, found):
      parts.append(f"--- {mode} ({passes})\n{text}")
  return "\n".join(parts)


def main() -> None:
  args = flags.FLAGS
  for name in ("num", "max_tokens", "steps"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)}: is not positive")
  path = _with_passes(args.path, args.steps)
  name, _ = paths.parse(path)
  if name == "ar":
    raise UserError(f"--path={args.path}: has a mode of its own, --mode=ar")
  run = checkpoint.load_run(args.workdir, args.step)
  if name == "learned" and run.config.model.progression != "learned":
    raise UserError(f"--path={args.path}: the model of {args.workdir} has a shared clock (model.progression)")
  prompt = run.tokenizer.encode(args.prompt)
  found = generate(run.model, run.params, run.statistics, run.config, prompt, args.mode, args.num, args.max_tokens,
                   jax.random.key(args.seed), args.steps, path, args.stepper)
  for i, tokens in enumerate(found):
    print(("-" * 20 + "\n" if i else "") + args.prompt + run.tokenizer.decode(tokens))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("prompt", "", "The text's beginning.")
  flags.DEFINE_enum("mode", "ar", MODES, "One token a pass, or windows of tokens down the flow.")
  flags.DEFINE_integer("steps", 8, "Passes a window (mode flow).")
  flags.DEFINE_string("path", "diagonal", "The window's path (mode flow): diagonal, rolling, random or learned, in --steps "
                      "passes; or any that evaluate prices, as entropy:0.5.")
  flags.DEFINE_enum("stepper", "ode", list(sample.STEPPERS), "How a step is taken (mode flow).")
  flags.DEFINE_integer("num", 1, "Number of texts.")
  flags.DEFINE_integer("max_tokens", 200, "Tokens of each text at most.")
  flags.DEFINE_integer("seed", 0, "Of all draws.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  cli.run(main)
