"""Memory and time of logits over a large vocabulary, at once and in chunks of the vocabulary (loss.chunk).

  python -m experiments.vocabulary_cost [--vocab_size=32768] [--chunks=0,4096,1024] [--repeats=3]

Measures training steps of a narrow model whose vocabulary outweighs the rest, with the clean stream alone
(cross-entropy) and with windows (soft inputs, and two softmaxes per slot). Temporary memory is what the compiler
states; steps of all kinds alternate, and medians are compared.
"""

import functools

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.network import evo as evo_lib
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common


def compile_step(vocab_size: int, windows: bool, chunk: int):
  """A compiled training step, its initial state, and the configuration."""
  values = common.load_config("tiny")
  values.model.update(
    {"layers": 1, "width": 128, "context": 512, "vocab_size": vocab_size, "remat": "full", "attention_block": 128}
  )
  values.data.batch_size, values.loss.chunk = 1, chunk
  values.window.count, values.loss.bound_windows = (8, 2) if windows else (0, 0)
  config = config_lib.from_dict(values)
  model = evo_lib.Evo(config.model, vocab_size)
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  batch = Batch(jax.ShapeDtypeStruct((1, config.model.context + 1), jnp.int32))
  step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config), donate_argnums=0)
  return step.lower(state, batch).compile(), state, config


def main() -> None:
  args = flags.FLAGS
  kinds = [(windows, int(chunk)) for windows in (False, True) for chunk in args.chunks]
  steps, states = {}, {}
  for kind in kinds:
    steps[kind], states[kind], config = compile_step(args.vocab_size, *kind)
  tokens = np.random.default_rng(0).integers(1, args.vocab_size, (1, config.model.context + 1))
  seconds = common.time_steps(steps, states, Batch(jnp.asarray(tokens, jnp.int32)), args.repeats)
  rows = []
  for windows, chunk in kinds:
    size = steps[windows, chunk].memory_analysis().temp_size_in_bytes
    row = {"windows": windows, "chunk": chunk, "temporary_bytes": size, "seconds": seconds[windows, chunk]}
    first = next((r for r in rows if r["windows"] == windows), row)
    row |= {"memory_ratio": size / first["temporary_bytes"], "time_ratio": row["seconds"] / first["seconds"]}
    rows.append(row)
    print(
      f"{'with windows' if windows else 'clean stream':<14}chunk {chunk:>5}  {size / 2**20:>8.0f} MiB "
      f"({row['memory_ratio']:.2f})  {row['seconds']:.2f} s ({row['time_ratio']:.2f})"
    )
  common.write_result("vocabulary_cost", {"vocab_size": args.vocab_size, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
  flags.DEFINE_integer("vocab_size", 32_768, "Tokens of the vocabulary.")
  flags.DEFINE_list("chunks", ["0", "4096", "1024"], "Values of loss.chunk; the others are compared with the first.")
  flags.DEFINE_integer("repeats", 3, "Steps of each kind.")
  cli.run(main)
