"""Compute: floating-point operations of a forward pass and of a training step, by formula and as traced.

A multiplication and an addition count as two. Counted are the matrix products (weights, attention scores and sums, soft
inputs, beliefs, the vocabulary's logits); what is element by element is not, a few per cent at small widths.
`experiments/frontier.py` matches methods by these numbers; a test holds them against XLA's own count.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.extend import core

from evo_jax import config as config_lib

# Dense bfloat16 operations a second of one device, by the makers' data sheets; keys are beginnings of `device_kind`.
PEAK = {
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "TPU v4": 275e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}
SELDOM = "seldom"  # the name scope (jax.named_scope) of a branch that runs next to never: it is in no estimate


def peak_flops(device_kind: str) -> float | None:
  """Operations a second of a device of this kind; None where they are not known (a CPU)."""
  return next((value for name, value in PEAK.items() if device_kind.startswith(name)), None)


def forward_pass(model: config_lib.Model, vocab_rows: int, slots: int, keys: float, windows: bool) -> float:
  """Operations of one pass over `slots` tokens, each of which attends to `keys` positions.

  windows: True for slots of windows, which pay for soft inputs and time conditioning, too. With the
  vocabulary's logits.
  """
  D, E = model.width, model.width // model.heads
  block = D * E * (2 * model.heads + 2 * model.kv_heads) + 3 * D * model.hidden
  if windows:
    block += 6 * D * model.time_dim
  attention = 2 * keys * E * model.heads
  outside = vocab_rows * D
  if windows:
    outside += vocab_rows * (2 * model.code_dim + D)  # evidence for the input and for the belief, expected embedding
  return 2.0 * slots * (model.layers * (block + attention) + outside)


def train_step(config: config_lib.Config, vocab_rows: int, windows: bool = True, visible: bool = False) -> float:
  """Operations of one training step: forward, and backward at twice its price.

  windows: False for a step before the windows start. The windows' second reading under self-conditioning is a forward
  pass in the share of the steps that have it. visible: count only keys that a mask lets through, in the mean: what a
  model flops utilization (MFU) is measured by here; else attention counts as if it were computed without
  savings from masks.
  """
  model, L, B = config.model, config.model.context, config.data.batch_size
  W, N = config.window.size, config.window.count if windows else 0
  alone = config.diffusion_alone and N > 0
  clean = 0.0 if alone else 3.0 * forward_pass(model, vocab_rows, B * L, (L + 1) / 2 if visible else L, False)
  past = 0 if alone else (L - W) / 2 if visible else L  # anchors are spread evenly
  keys = past + W + 1
  window = forward_pass(model, vocab_rows, B * N * (W + 1), keys, True)
  return clean + window * (3.0 + config.loss.self_conditioning)


def train_run(config: config_lib.Config, vocab_rows: int) -> float:
  """Operations of all training steps of a configuration."""
  before = config.windows_start
  return before * train_step(config, vocab_rows, windows=False) + (config.train.steps - before) * train_step(
    config, vocab_rows
  )


def traced(function: Callable, *args: Any) -> tuple[float, float]:
  """Operations of the matrix products that function(*args) does, all devices together: outside of Pallas
  kernels, and inside.

  What a backward pass computes again counts again. args: arrays or their shapes. Loops count with their length, of a
  condition's branches the dearest, without what is named SELDOM; of a kernel all blocks, also those that a mask
  leaves out when it runs; loops whose length is not known (`while`) count once.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  outside = _of_jaxpr(jaxpr, kernels=False)
  return outside, _of_jaxpr(jaxpr, kernels=True) - outside


def _of_jaxpr(jaxpr: core.Jaxpr, kernels: bool) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if SELDOM in str(eqn.source_info.name_stack).split("/"):
      continue
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
      continue
    parts = [_of_jaxpr(getattr(part, "jaxpr", part), kernels) for part in core.jaxprs_in_params(params)]
    if name == "cond":
      total += max(parts)
    elif name == "scan":
      total += params["length"] * sum(parts)
    elif name == "shard_map":
      total += math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(parts)
    elif name == "pallas_call":
      total += kernels * math.prod(params["grid_mapping"].grid) * sum(parts)
    else:
      total += sum(parts)
  return total
