"""The optimizer: learning-rate schedules, AdamW with a weight-decay mask, gradient clipping."""

import jax
import optax

from evo_jax import config as config_lib

_DECAYED = ("w_qkv", "w_o", "w_gate", "w_up", "w_down", "head")


def learning_rate_schedule(config: config_lib.Optim, steps: int) -> optax.Schedule:
  """The learning rate by step: linear warm-up to the peak, then "cosine" decay, or "wsd": constant, then linear decay.

  Both end at `final` times the peak.
  """
  peak = config.learning_rate
  warmup = min(config.warmup, max(steps - 1, 0))
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), peak * config.final
    )
  decay = max(min(int(steps * config.decay_share), steps - warmup), 1)
  stable = max(steps - warmup - decay, 0)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0 if warmup else peak, peak, warmup),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, peak * config.final, decay),
    ],
    [warmup, warmup + stable],
  )


def decay_mask(params) -> dict:
  """A tree like the parameters, True where weight decay applies: matrices of the blocks, and the head."""
  names = lambda path: {getattr(entry, "key", None) for entry in path}  # boxes of flax add entries without a key
  return jax.tree_util.tree_map_with_path(lambda path, _: bool(names(path) & set(_DECAYED)), params)


def make_optimizer(config: config_lib.Optim, steps: int) -> optax.GradientTransformation:
  """AdamW without clipping: the training step clips, since it may clip two gradients separately."""
  return optax.adamw(
    learning_rate_schedule(config, steps),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=decay_mask,
    mu_dtype=config.moment_dtype,
  )


def clip(gradient, limit: float):
  """The gradient, scaled to a global norm of at most `limit` (0: unchanged), and its norm before scaling."""
  norm = optax.tree.norm(gradient)
  if limit:
    gradient, _ = optax.clip_by_global_norm(limit).update(gradient, optax.EmptyState())
  return gradient, norm
