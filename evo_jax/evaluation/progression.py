"""The progression times that a model with a learned clock infers for the tokens of a passage."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.flow import schedules
from evo_jax.flow.bound import BITS_PER_NAT, infer_clock, token_nll
from evo_jax.flow.windows import gather_windows
from evo_jax.parallel import sharding


def infer_progression(run: run_lib.Run, batch: Batch, window: int, passes: int) -> list[dict[str, Any]]:
  """One object for each token that counts after the first of a sequence, a batch of one row. Raises UserError for a
  shared clock.

  `token`; `position`: its number in the sequence, from 1; `nats`: its autoregressive cross-entropy; `half` and
  `expected`: the clock's time in [0, 1] at which the token's t is 1/2, by the posterior's mean and by the prior's (from
  the past alone); `times`: its t before each of `passes` passes, and after the last.
  """
  if run.config.model.progression != "learned":
    raise UserError("--show_progression: the model has a shared clock (config.model.progression), it infers no times")

  @functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
  def infer(params, sequence_1xT, segments_1xT):
    net = run.model.bind({"params": params})
    L = sequence_1xT.shape[1] - 1
    hidden, _ = net.clean(sequence_1xT[:, :-1], None if segments_1xT is None else segments_1xT[:, :-1])
    nats = token_nll(net, hidden, sequence_1xT)
    anchor = jnp.arange(0, L, window)[None]
    token = gather_windows(sequence_1xT, anchor, window)[..., 1:]
    count = jnp.full(anchor.shape, passes)
    delay, sharpness, _ = infer_clock(net, hidden, nats, token, anchor, count, jnp.zeros(token.shape))
    prior_mean, _, _ = net.clock_prior(hidden[:, ::window], window, count)
    clock = (jnp.arange(passes + 1) / passes)[:, None, None, None]
    times = schedules.learned_clock(delay, sharpness, clock).reshape(passes + 1, L).T
    return nats[0], jax.nn.sigmoid(delay).reshape(L), jax.nn.sigmoid(prior_mean).reshape(L), times

  with jax.set_mesh(run.mesh):
    columns = [column.tolist() for column in jax.device_get(infer(run.params, batch.tokens, batch.segments))]
  tokens = batch.tokens[0, 1:].tolist()
  counts = np.ones(len(tokens), bool) if batch.mask is None else batch.mask[0, 1:]
  return [
    {"token": token, "position": i + 1, "nats": nats, "half": half, "expected": expected, "times": times}
    for i, (token, nats, half, expected, times) in enumerate(zip(tokens, *columns))
    if counts[i]
  ]


def format_progression(entries: list[dict[str, Any]], tokenizer: tokenizers.Tokenizer, window: int) -> str:
  """A line per token, a rule above each window: the token, its bits, when its t is 1/2, and its t before each pass."""
  lines = [f"{'token':<12}{'bits':>7}{'half':>7}{'expected':>10}  t before each pass"]
  before = None
  for entry in entries:
    number = (entry["position"] - 1) // window
    if number != before:
      lines.append("-" * 72)
    before = number
    text = repr(tokenizer.decode(np.array([entry["token"]])))
    times = " ".join(f"{t:.2f}" if 0 < t < 1 else f"{t:<4.0f}" for t in entry["times"])
    lines.append(
      f"{text:<12}{entry['nats'] * BITS_PER_NAT:>7.2f}{entry['half']:>7.2f}{entry['expected']:>10.2f}  {times}"
    )
  return "\n".join(lines)
