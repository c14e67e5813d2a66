"""Bits per byte or character of text, on any path. Every number is an upper bound on the model's own code length.

  python -m evo_jax.evaluate --workdir=DIR [--paths=ar,diagonal:16,entropy:0.5] [--data='dir/*.txt'] [--json=FILE]
  python -m evo_jax.evaluate --workdir=DIR --show-progression

Paths, over windows of the model's size (or --window) that are read one after another:

  ar            autoregression on the clean stream: one token a pass
  staircase     the same inside the windows; left:n is n tokens a pass, leftmost first
  streams:n     n staircases side by side, one in each n-th of the window: n tokens a pass that are far apart
  diagonal:K    all of a window's tokens together, in K passes of partial evidence
  rolling:K     a wave of partial evidence from left to right, in K passes
  learned:K     each token by the clock that the model infers for it, in K passes (model.progression = learned)
  random:K      masked diffusion: equally many tokens a pass, in random order
  certain:n     n tokens a pass: the leftmost and those whose beliefs have the least entropy
  entropy:h     all tokens whose beliefs have less than h bits, and the leftmost; also confidence:p (largest
                probability above p) and maturity:t (inferred progression below t; the others gather evidence)
  spread:h      the leftmost, all of less than h bits, and others that are far enough apart
  error:e       all of a window's tokens together, in steps as long as their estimated error allows

Text is cut into consecutive sequences of the model's context, each read from scratch; what is left over at the end is
dropped. Where `ar` and a diagonal of more than one length are among the paths, the path gap is printed too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.flow import bound as bound_lib
from evo_jax.flow import policies, schedules
from evo_jax.flow import statistics as statistics_lib
from evo_jax.flow import windows as windows_lib
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding


class Evaluator:
  """Measures sequences on paths; compiles once for `ar`, once for grids of up to `most` passes, once a
  kind of policy."""

  def __init__(
    self,
    model: evo_lib.Evo,
    config: config_lib.Config,
    tokenizer: tokenizers.Tokenizer,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    most: int = 64,
    window: int = 0,
  ):
    """window: tokens of a window; 0: as in training. It must divide the context."""
    self.config, self.tokenizer, self.mesh, self.most = config, tokenizer, mesh, most
    self.window = window or config.window.size
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    self.rows = -(-config.eval.batch_size // shards) * shards
    self.key = jax.random.key(seed)
    self_conditioned = config.loss.self_conditioning > 0

    model = model.clone(layout=sharding.Layout.of(mesh))

    @functools.partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    def cost(params, statistics, sequence_BxT, key, policy):
      return bound_lib.sequence_nll(
        model.bind({"params": params}),
        statistics,
        Batch(sequence_BxT),
        key,
        policy,
        self.window,
        self_conditioned,
        config.loss.chunk,
      )

    self._cost = cost

  def check(self, paths: tuple[str, ...]) -> None:
    """Raises UserError for a path that is none, or that this model does not have."""
    for path in paths:
      if schedules.parse_path(path)[0] == "learned" and self.config.model.progression != "learned":
        raise UserError(f"path {path!r}: the model has a shared clock (config.model.progression)")

  def nats(
    self, params: Any, statistics: statistics_lib.Statistics, sequences: np.ndarray, path: str
  ) -> tuple[np.ndarray, np.ndarray]:
    """(n, L) prices in nats of the tokens of sequences (n, L + 1), and the passes (n,); the noise is the same
    at every call."""
    policy = policies.make_policy(path, self.window, self.config.paths.rolling_width, self.most)
    place = jax.sharding.NamedSharding(self.mesh, sharding.RULES.spec(("batch",)))
    found = []
    for i in range(0, len(sequences), self.rows):
      batch = sequences[i : i + self.rows]
      batch = np.concatenate([batch, np.repeat(batch[:1], self.rows - len(batch), axis=0)])  # one shape for all
      batch = jax.make_array_from_callback(batch.shape, place, lambda index, b=batch: b[index])
      found.append(self._cost(params, statistics, batch, jax.random.fold_in(self.key, i), policy))
    nats, passes = (np.concatenate(parts)[: len(sequences)] for parts in zip(*jax.device_get(found)))
    return nats, passes

  def __call__(
    self, params: Any, statistics: statistics_lib.Statistics, sequences: np.ndarray, paths: tuple[str, ...]
  ) -> list[dict[str, Any]]:
    """One object a path: `path`, `bits` a byte or character, its `stderr`, `passes_per_token` and `unit`."""
    return [entry for entry, _ in self.measure(params, statistics, sequences, paths)]

  def measure(
    self, params: Any, statistics: statistics_lib.Statistics, sequences: np.ndarray, paths: tuple[str, ...]
  ) -> list[tuple[dict[str, Any], np.ndarray]]:
    """The same, each with the bits (n,) of the single sequences, for the errors of differences."""
    self.check(paths)
    units = self.tokenizer.lengths()[sequences[:, 1:]].sum(axis=1)
    table = []
    with jax.set_mesh(self.mesh):
      for path in paths:
        nats, passes = self.nats(params, statistics, sequences, path)
        each = nats.sum(axis=1, dtype=np.float64) * bound_lib.BITS_PER_NAT
        bits, stderr = ratio(each, units)
        entry = {
          "path": path,
          "bits": bits,
          "stderr": stderr,
          "passes_per_token": float(passes.mean() / (sequences.shape[1] - 1)),
          "unit": f"bits per {self.tokenizer.unit}",
        }
        table.append((entry, each))
    return table


def path_gap(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """What each path pays above `ar`, which for an exact field is nothing once passes are many: `path`, `gap` in the
  table's unit. Of the two longest diagonals it extrapolates to infinitely many passes, where the excess of finite
  steps, which falls as 1 / K, is gone: "diagonal:inf". Empty where the table has no `ar` or only one diagonal.
  """
  bits = {entry["path"]: entry["bits"] for entry in table}
  diagonals = sorted(int(number) for name, number in map(schedules.parse_path, bits) if name == "diagonal")
  if "ar" not in bits or len(diagonals) < 2:
    return []
  few, many = diagonals[-2:]
  limit = (many * bits[f"diagonal:{many}"] - few * bits[f"diagonal:{few}"]) / (many - few)
  return [
    {"path": path, "gap": value - bits["ar"]}
    for path, value in (bits | {"diagonal:inf": limit}).items()
    if path != "ar"
  ]


def ratio(bits: np.ndarray, units: np.ndarray) -> tuple[float, float | None]:
  """sum(bits) / sum(units) over sequences, and its standard error (None for a single sequence)."""
  n, total = len(bits), units.sum()
  mean = float(bits.sum() / total)
  if n < 2:
    return mean, None
  return mean, float(np.sqrt(n / (n - 1) * ((bits - mean * units) ** 2).sum()) / total)


def format_table(table: list[dict[str, Any]]) -> str:
  """The table for people."""
  lines = [f"{'path':<14}{table[0]['unit']:>18}{'stderr':>10}{'passes per token':>20}"]
  for entry in table:
    stderr = "-" if entry["stderr"] is None else f"{entry['stderr']:.4f}"
    lines.append(f"{entry['path']:<14}{entry['bits']:>18.4f}{stderr:>10}{entry['passes_per_token']:>20.4g}")
  return "\n".join(lines)


def format_gap(gap: list[dict[str, Any]], unit: str) -> str:
  """The path gap for people."""
  return "\n".join([f"path gap: {unit} above ar"] + [f"{entry['path']:<14}{entry['gap']:>18.4f}" for entry in gap])


def progression(run: run_lib.Run, sequence: np.ndarray, window: int, passes: int) -> list[dict[str, Any]]:
  """What a model with a learned clock infers about one sequence (L + 1,), for each token after the first: `token`,
  `nats` (autoregression's), `half` and `expected`, the clock's time in [0, 1] at which its t is 1/2, by the
  posterior's mean and by the prior's (from the past alone), and `times`, its t before each pass. Raises UserError for
  a model with a shared clock.
  """
  if run.config.model.progression != "learned":
    raise UserError("--show_progression: the model has a shared clock (config.model.progression), it infers no times")

  @jax.jit
  def infer(params, sequence_1xT):
    net = run.model.bind({"params": params})
    L = sequence_1xT.shape[1] - 1
    hidden, _ = net.clean(sequence_1xT[:, :-1])
    nats = bound_lib.token_nll(net, hidden, sequence_1xT)
    anchor = jnp.arange(0, L, window)[None]
    token = windows_lib.gather_windows(sequence_1xT, anchor, window)[..., 1:]
    count = jnp.full(anchor.shape, passes)
    delay, sharpness, _ = bound_lib.infer_clock(net, hidden, nats, token, anchor, count, jnp.zeros(token.shape))
    expected, _, _ = net.clock_prior(hidden[:, ::window], window, count)
    times = schedules.learned_clock(delay, sharpness, (jnp.arange(passes + 1) / passes)[:, None, None, None])
    return (
      nats[0],
      jax.nn.sigmoid(delay).reshape(L),
      jax.nn.sigmoid(expected).reshape(L),
      times.reshape(passes + 1, L).T,
    )

  found = (np.asarray(x).tolist() for x in infer(run.params, sequence[None]))
  return [
    {"token": int(token), "nats": nats, "half": half, "expected": expected, "times": times}
    for token, nats, half, expected, times in zip(sequence[1:], *found)
  ]


def format_progression(found: list[dict[str, Any]], tokenizer: tokenizers.Tokenizer, window: int) -> str:
  """A line a token, a rule a window: the token, its surprise, when its t is 1/2, and its t before each pass."""
  lines = [f"{'token':<12}{'bits':>7}{'half':>7}{'expected':>10}  t before each pass"]
  for i, entry in enumerate(found):
    if i % window == 0:
      lines.append("-" * 72)
    text = repr(tokenizer.decode(np.array([entry["token"]])))
    times = " ".join(f"{t:.2f}" if 0 < t < 1 else f"{t:<4.0f}" for t in entry["times"])
    lines.append(
      f"{text:<12}{entry['nats'] * bound_lib.BITS_PER_NAT:>7.2f}{entry['half']:>7.2f}{entry['expected']:>10.2f}  {times}"
    )
  return "\n".join(lines)
