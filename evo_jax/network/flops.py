"""FLOPs of a forward pass and of a training step, by formula and as traced; peak FLOPs per second of devices.

A multiplication and an addition count as two. Only matrix products count (weights, attention scores and weighted sums,
soft inputs, beliefs, logits over the vocabulary); element-wise operations, a few per cent at small widths, do not.
`experiments/frontier.py` matches methods by these numbers; a test holds them against XLA's own count.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.extend import core

from evo_jax import config as config_lib
from evo_jax.network import vocabulary

# Dense bfloat16 FLOPs per second of one device, from the makers' data sheets, by prefix of `device_kind`.
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


def peak_flops(device_kind: str) -> float | None:
  """Peak FLOPs per second of a device of this kind; None if not known (a CPU)."""
  return next((value for name, value in PEAK.items() if device_kind.startswith(name)), None)


def forward_pass(
  model: config_lib.Model, vocab_rows: int, tokens: int, keys: float, windows: bool, all_unknown: bool = False
) -> float:
  """FLOPs of one forward pass over `tokens` positions, each of which attends to `keys` others, with the logits.

  windows: True for positions of windows, which also need soft inputs and time conditioning; all_unknown: which are the
  same for all of them. Windows' own parameters are counted by `window_adapters`.
  """
  D, E = model.width, model.head_size
  block = D * E * (2 * model.heads + 2 * model.kv_heads) + 3 * D * model.hidden
  attention = 2 * keys * E * model.heads
  outside = vocab_rows * D
  if windows and not all_unknown:
    block += 6 * D * model.time_dim
    outside += vocab_rows * (2 * model.code_dim + D)  # evidence for the input and for the belief, expected embedding
  return 2.0 * tokens * (model.layers * (block + attention) + outside)


def window_adapters(model: config_lib.Model, tokens: int) -> float:
  """FLOPs of what windows' own parameters (config.model.window_*) add to a forward pass over `tokens` positions."""
  D, F, H, C = model.width, model.hidden, model.heads * model.head_size, model.window_candidates
  qkv = H + 2 * model.kv_heads * model.head_size
  block = model.window_rank * (5 * D + qkv + H + 3 * F) + model.window_twins * D * qkv
  # The head, and the candidates' rows of the table for it, for the window's own belief and for the clean stream's.
  head = 3 * D * model.window_head + 3 * C * D if model.window_head else 0
  return 2.0 * tokens * (model.layers * block + head)


def train_step(
  config: config_lib.Config,
  vocab_rows: int,
  windows: bool = True,
  visible: bool = False,
  trained: float = 1.0,
  clean_frozen: bool = False,
) -> float:
  """FLOPs of one training step: a forward pass, and a backward pass that takes twice as many; of a frozen parameter
  there is no gradient, which is half of that.

  Self-conditioning, a second forward pass of the windows, counts with the share of steps that have it. Distillation
  reads logits that the clean stream has.

  Args:
    config: the configuration.
    vocab_rows: rows of the embedding and output tables.
    windows: False for a step before the windows start.
    visible: count only the keys that the mask admits, on average, as for model FLOPs utilization (MFU); otherwise
      attention counts as if no block of a mask were skipped.
    trained: the share of the parameters that are trained.
    clean_frozen: whether nothing that the clean stream reads is trained: it then has a forward pass alone.
  """
  model, L, B = config.model, config.model.context, config.data.batch_size
  W, N = config.window.size, config.window.count if windows else 0
  diffusion_alone = config.diffusion_alone and N > 0
  clean_keys = (L + 1) / 2 if visible else L
  slots, again = config.window_slots, config.loss.self_conditioning
  past_keys = 0 if diffusion_alone else (L - W) / 2 if visible else L  # anchors are spread evenly
  same = config.paths.all_unknown and slots < W
  trained = 0.0 if clean_frozen else trained  # what windows have of their own is counted by itself

  def passes(tokens, keys, of_windows):
    forward = forward_pass(model, vocab_rows, tokens, keys, of_windows, same)
    return forward, 3.0 * forward - (1.0 - trained) * forward_pass(model, vocab_rows, tokens, 0, of_windows, same)

  clean_forward, clean = (0.0, 0.0) if diffusion_alone else passes(B * L, clean_keys, False)
  window_forward, window = passes(B * N * slots, past_keys + slots, True)
  own = window_adapters(model, B * N * slots)
  return (clean_forward if clean_frozen else clean) + window + 3.0 * own + again * (window_forward + own)


def train_run(config: config_lib.Config, vocab_rows: int) -> float:
  """FLOPs of all training steps of a configuration."""
  before = config.windows_start
  return before * train_step(config, vocab_rows, windows=False) + (config.train.steps - before) * train_step(
    config, vocab_rows
  )


def traced(function: Callable, *args: Any) -> tuple[float, float]:
  """FLOPs of the matrix products of function(*args) on all devices together: (outside, inside) of Pallas kernels.

  What the backward pass recomputes counts again. Loops count with their length; `while` loops, whose length is not
  known, count once. A conditional counts as its most expensive branch, without branches named `RARE_BRANCH`. A kernel
  counts all its blocks, also those that a mask makes it skip. args: arrays or `jax.ShapeDtypeStruct`s.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  outside = _jaxpr_flops(jaxpr, kernels=False)
  return outside, _jaxpr_flops(jaxpr, kernels=True) - outside


def _jaxpr_flops(jaxpr: core.Jaxpr, kernels: bool) -> float:
  """FLOPs of a jaxpr's matrix products; kernels: those inside of Pallas kernels, too."""
  total = 0.0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if vocabulary.RARE_BRANCH in str(eqn.source_info.name_stack).split("/"):
      continue
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
      continue
    parts = [_jaxpr_flops(getattr(part, "jaxpr", part), kernels) for part in core.jaxprs_in_params(params)]
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
