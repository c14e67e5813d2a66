"""Time of a training step: autoregression alone against a plain linen Transformer, and windows against
autoregression alone.

  python -m experiments.step_cost [--config=tiny] [--repeats=30]

The plain Transformer has the same shape, optimizer and batch, without windows, time conditioning, statistics and the
scan over layers. Steps of all kinds alternate, so that changes of the machine's speed affect all alike; medians are
compared. With N windows of B tokens the network reads 1 + N (B + 1) / L times the tokens. The goal is at most
1 + 1.3 N (B + 1) / L times the time of a step without windows, and for autoregression alone at most that of the plain
Transformer.
"""

import functools

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.training import optim
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib
from experiments import common

COUNTS = (2, 4, 8)  # windows per sequence


class Plain(nn.Module):
  """A decoder like Llama's: next-token logits (B, L, V) of tokens (B, L)."""

  config: config_lib.Model
  rows: int

  @nn.compact
  def __call__(self, tokens):
    c = self.config
    H, K, E = c.heads, c.kv_heads, c.head_size
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


def plain_step(config: config_lib.Config, rows: int):
  """The plain Transformer's training step, and its initial state. rows: of the embedding table."""
  model, optimizer = Plain(config.model, rows), optim.make_optimizer(config.optim, config.train.steps)

  @jax.jit
  def init():
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return params, optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    def loss(params):
      logits = model.apply(params, batch.tokens[:, :-1])
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:]))

    value, gradient = jax.value_and_grad(loss)(state[0])
    gradient, norm = optim.clip(gradient, config.optim.clip)
    updates, moments = optimizer.update(gradient, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), (value, norm)

  return step, init()


def evo_step(values: ml_collections.ConfigDict, count: int):
  """The project's training step with so many windows per sequence, its initial state, configuration and table rows."""
  values["window"]["count"] = count
  if not count:
    values["loss"]["bound_windows"] = 0
  config = config_lib.from_dict(values)
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  step = jax.jit(functools.partial(step_lib.train_step, model=model, config=config), donate_argnums=0)
  return step, state, config, model.rows


def main() -> None:
  args = flags.FLAGS
  steps, states = {}, {}
  for count in (0, *COUNTS):
    steps[count], states[count], config, rows = evo_step(common.load_config(args.config), count)
  steps["plain"], states["plain"] = plain_step(config, rows)
  tokens = np.random.default_rng(0).integers(1, 257, (config.data.batch_size, config.model.context + 1))
  seconds = common.time_steps(steps, states, Batch(jnp.asarray(tokens, jnp.int32)), args.repeats, warmup=1)  # compiles
  result = {
    "config": args.config,
    "repeats": args.repeats,
    "seconds_plain": seconds["plain"],
    "seconds_ar": seconds[0],
    "ar_by_plain": seconds[0] / seconds["plain"],
    "windows": [],
  }
  print(
    f"autoregression alone takes {result['ar_by_plain']:.3f} times as long as a plain linen Transformer "
    f"({seconds[0] * 1e3:.0f} and {seconds['plain'] * 1e3:.0f} ms)"
  )
  for count in COUNTS:
    share = count * (config.window.size + 1) / config.model.context
    entry = {
      "N(B+1)/L": share,
      "step_ratio": seconds[count] / seconds[0],
      "limit": 1 + 1.3 * share,
      "seconds": seconds[count],
    }
    result["windows"].append(entry)
    print(
      f"{count} windows: the network reads {1 + share:.3f} times the tokens; a step takes "
      f"{entry['step_ratio']:.3f} times as long as one without, limit {entry['limit']:.3f}"
    )
  common.write_result("step_cost", result)


if __name__ == "__main__":
  flags.DEFINE_string("config", "tiny", "A configuration with the bytes tokenizer.")
  flags.DEFINE_integer("repeats", 30, "Steps of each kind.")
  cli.run(main)
