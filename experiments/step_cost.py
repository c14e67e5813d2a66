"""What a training step costs: autoregression alone beside a plain linen Transformer, and windows beside
autoregression alone.

  python -m experiments.step_cost [--config=configs/tiny.py] [--repeats=30]

The plain Transformer has the same shape, optimizer and batch, and is written straight: no windows, no time
conditioning, no statistics, no scan over layers. Steps of all kinds alternate, so that a machine's changing speed
falls on all alike; medians are compared. With windows the network sees 1 + N (B + 1) / L times the tokens; the goal
is at most 1 + 1.3 N (B + 1) / L times the step without, and for autoregression alone at most the plain step.
"""

import functools
import statistics
import time

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.training import optim
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common

COUNTS = (2, 4, 8)  # windows of a sequence


class Plain(nn.Module):
  """A decoder as Llama's: next-token logits (B, L, V) of tokens (B, L)."""

  config: config_lib.Model
  rows: int

  @nn.compact
  def __call__(self, tokens):
    c = self.config
    H, K, E = c.heads, c.kv_heads, c.width // c.heads
    dense = functools.partial(nn.Dense, use_bias=False, dtype=c.dtype)
    angle = jnp.arange(tokens.shape[1])[:, None, None] * c.rope_base ** (-jnp.arange(E // 2) / (E // 2))

    def rotated(x):
      a, b = jnp.split(x, 2, axis=-1)
      return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
      ).astype(x.dtype)

    x = nn.Embed(self.rows, c.width, dtype=c.dtype)(tokens)
    for _ in range(c.layers):
      h = nn.RMSNorm(dtype=c.dtype)(x)
      q, k, v = (dense(n * E)(h).reshape(*h.shape[:2], n, E) for n in (H, K, K))
      y = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
      x = x + dense(c.width)(y.reshape(x.shape))
      h = nn.RMSNorm(dtype=c.dtype)(x)
      x = x + dense(c.width)(nn.silu(dense(c.hidden)(h)) * dense(c.hidden)(h))
    return dense(self.rows)(nn.RMSNorm(dtype=c.dtype)(x)).astype(jnp.float32)


def plain(config: config_lib.Config, rows: int):
  """A plain model's step, and its first state."""
  model, optimizer = Plain(config.model, rows), optim.make_optimizer(config.optim, config.train.steps)

  @jax.jit
  def init():
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return params, optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    def loss(params):
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.apply(params, batch[:, :-1]), batch[:, 1:]))

    value, gradient = jax.value_and_grad(loss)(state[0])
    gradient, norm = optim.clip(gradient, config.optim.clip)
    updates, moments = optimizer.update(gradient, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), (value, norm)

  return step, init()


def ours(values, count: int):
  """The project's step with so many windows, its first state, and its configuration and rows of the vocabulary."""
  values["window"]["count"] = count
  if not count:
    values["loss"]["bound_windows"] = 0
  config = config_lib.from_dict(values)
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  return (
    jax.jit(functools.partial(step_lib.train_step, model=model, config=config), donate_argnums=0),
    state,
    config,
    model.rows,
  )


def main() -> None:
  args = flags.FLAGS
  kinds = {}
  for count in (0, *COUNTS):
    step, state, config, rows = ours(common.load_config(args.config), count)
    kinds[count] = [step, state]
  kinds["plain"] = list(plain(config, rows))
  batch = np.random.default_rng(0).integers(1, 257, (config.data.batch_size, config.model.context + 1))
  batch = jnp.asarray(batch, jnp.int32)
  seconds = {kind: [] for kind in kinds}
  for repeat in range(args.repeats + 1):  # the first compiles
    for kind, (step, state) in kinds.items():
      begin = time.perf_counter()
      kinds[kind][1] = jax.block_until_ready(step(state, batch)[0])
      if repeat:
        seconds[kind].append(time.perf_counter() - begin)
  median = {kind: statistics.median(values) for kind, values in seconds.items()}
  result = {
    "config": args.config,
    "repeats": args.repeats,
    "seconds_plain": median["plain"],
    "seconds_ar": median[0],
    "ar_by_plain": median[0] / median["plain"],
    "windows": [],
  }
  print(
    f"autoregression alone takes {result['ar_by_plain']:.3f} times a plain linen Transformer "
    f"({median[0] * 1e3:.0f} and {median['plain'] * 1e3:.0f} ms)"
  )
  for count in COUNTS:
    share = count * (config.window.size + 1) / config.model.context
    entry = {
      "N(B+1)/L": share,
      "step_ratio": median[count] / median[0],
      "limit": 1 + 1.3 * share,
      "seconds": median[count],
    }
    result["windows"].append(entry)
    print(
      f"{count} windows: the network sees {1 + share:.3f} times the tokens; a step takes "
      f"{entry['step_ratio']:.3f} times one without, limit {entry['limit']:.3f}"
    )
  common.write_result("step_cost", result)


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/tiny.py", "A configuration with the bytes tokenizer.")
  flags.DEFINE_integer("repeats", 30, "Steps of each kind.")
  cli.run(main)
