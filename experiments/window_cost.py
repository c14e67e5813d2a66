"""What windows cost: a training step with them beside a step of the same model without, in one run.

  python -m experiments.window_cost [--config=configs/tiny.py] [--repeats=30]

Steps of both kinds alternate, so that a machine's changing speed falls on both alike; medians are compared. The network sees
1 + N (B + 1) / L times the tokens; the goal is at most 1 + 1.3 N (B + 1) / L times the step.
"""

import functools
import statistics
import time

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import cli, train
from evo_jax import config as config_lib
from evo_jax import tokenizer as tokenizer_lib
from experiments import common


def prepare(values, **changes):
  """A compiled step and its first state."""
  for name, value in changes.items():
    section, field = name.split("__")
    values[section][field] = value
  config = config_lib.from_dict(values)
  model = train.make_model(config, tokenizer_lib.Bytes())
  state = jax.jit(lambda: nn.unbox(train.init_state(model, config)))()
  step = jax.jit(functools.partial(train.train_step, model=model, config=config), donate_argnums=0)
  batch = np.random.default_rng(0).integers(1, 257, (config.data.batch_size, config.model.context + 1))
  batch = jnp.asarray(batch, jnp.int32)
  state, _ = step(state, batch)
  return config, step, jax.block_until_ready(state), batch


def main() -> None:
  path = flags.FLAGS.config
  config, with_windows, state_w, batch = prepare(common.load_config(path))
  _, without, state_o, _ = prepare(common.load_config(path), window__count=0)
  seconds = {"with": [], "without": []}
  for _ in range(flags.FLAGS.repeats):
    begin = time.perf_counter()
    state_o = jax.block_until_ready(without(state_o, batch)[0])
    middle = time.perf_counter()
    state_w = jax.block_until_ready(with_windows(state_w, batch)[0])
    seconds["without"].append(middle - begin)
    seconds["with"].append(time.perf_counter() - middle)
  without_s, with_s = (statistics.median(seconds[k]) for k in ("without", "with"))
  share = config.window.count * (config.window.size + 1) / config.model.context
  result = {"config": path, "tokens_ratio": 1 + share, "limit": 1 + 1.3 * share, "step_ratio": with_s / without_s,
            "seconds_with": with_s, "seconds_without": without_s, "repeats": flags.FLAGS.repeats}
  print(f"a step with windows takes {result['step_ratio']:.3f} times one without ({with_s * 1e3:.0f} and "
        f"{without_s * 1e3:.0f} ms); tokens {result['tokens_ratio']:.3f}, limit {result['limit']:.3f}")
  common.write_result("window_cost", result)


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/tiny.py", "A configuration with the bytes tokenizer.")
  flags.DEFINE_integer("repeats", 30, "Steps of each kind.")
  cli.run(main)
