"""What logits over a large vocabulary cost in memory and time, whole and in chunks of the vocabulary (loss.chunk).

  python -m experiments.vocabulary_cost [--vocab_size=32768] [--chunks=0,4096,1024] [--repeats=3]

A training step of a narrow model whose vocabulary outweighs the rest, of the clean stream alone (cross-entropy) and
with windows (soft input, and two softmaxes for each slot). Temporary memory is the compiler's; steps of all kinds
alternate, and medians are compared.
"""

import functools
import statistics
import time

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.network import evo as evo_lib
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common


def compiled(vocab_size: int, windows: bool, chunk: int):
  """A compiled step, and its first state and configuration."""
  values = common.load_config("configs/tiny.py")
  values.model.update(
    {"layers": 1, "width": 128, "context": 512, "vocab_size": vocab_size, "remat": "full", "attention_block": 128}
  )
  values.data.batch_size, values.loss.chunk = 1, chunk
  values.window.count, values.loss.bound_windows = (8, 2) if windows else (0, 0)
  config = config_lib.from_dict(values)
  model = evo_lib.Evo(config.model, vocab_size)
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  batch = jax.ShapeDtypeStruct((1, config.model.context + 1), jnp.int32)
  step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config), donate_argnums=0)
  return step.lower(state, batch).compile(), state, config


def main() -> None:
  args = flags.FLAGS
  chunks = [int(c) for c in args.chunks]
  kinds = {(windows, chunk): compiled(args.vocab_size, windows, chunk) for windows in (False, True) for chunk in chunks}
  batch = np.random.default_rng(0).integers(1, args.vocab_size, (1, next(iter(kinds.values()))[2].model.context + 1))
  batch = jnp.asarray(batch, jnp.int32)
  seconds = {kind: [] for kind in kinds}
  states = {kind: state for kind, (_, state, _) in kinds.items()}
  for _ in range(args.repeats):
    for kind, (step, *_) in kinds.items():
      begin = time.perf_counter()
      states[kind] = jax.block_until_ready(step(states[kind], batch)[0])
      seconds[kind].append(time.perf_counter() - begin)
  rows = []
  for (windows, chunk), (step, *_) in kinds.items():
    size = step.memory_analysis().temp_size_in_bytes
    took = statistics.median(seconds[windows, chunk])
    row = {"windows": windows, "chunk": chunk, "temporary_bytes": size, "seconds": took}
    first = next((r for r in rows if r["windows"] == windows), row)
    row |= {"memory_ratio": size / first["temporary_bytes"], "time_ratio": took / first["seconds"]}
    rows.append(row)
    print(
      f"{'with windows' if windows else 'clean stream':<14}chunk {chunk:>5}  {size / 2**20:>8.0f} MiB "
      f"({row['memory_ratio']:.2f})  {took:.2f} s ({row['time_ratio']:.2f})"
    )
  common.write_result("vocabulary_cost", {"vocab_size": args.vocab_size, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
  flags.DEFINE_integer("vocab_size", 32_768, "Tokens.")
  flags.DEFINE_list("chunks", ["0", "4096", "1024"], "Values of loss.chunk; the first is compared with.")
  flags.DEFINE_integer("repeats", 3, "Steps of each kind.")
  cli.run(main)
