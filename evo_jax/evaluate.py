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
import json
from typing import Any

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import checkpoint
from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import data
from evo_jax import elbo
from evo_jax import paths as paths_lib
from evo_jax import policies
from evo_jax import sharding
from evo_jax import tokenizer as tokenizer_lib
from evo_jax.cli import UserError
from evo_jax.model import Evo


GAP_PATHS = ("ar", "rolling:16", "diagonal:4", "diagonal:16", "diagonal:64", "random:16")


class Evaluator:
  """Measures sequences on paths; compiles once for `ar`, once for grids of up to `most` passes, once a
  kind of policy."""

  def __init__(self, model: Evo, config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer,
               mesh: jax.sharding.Mesh, seed: int = 0, most: int = 64, window: int = 0):
    """window: tokens of a window; 0: as in training. It must divide the context."""
    self.config, self.tokenizer, self.mesh, self.most = config, tokenizer, mesh, most
    self.window = window or config.window.size
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    self.rows = -(-config.eval.batch_size // shards) * shards
    self.key = jax.random.key(seed)
    self_conditioned = config.loss.self_conditioning > 0

    @functools.partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    def cost(params, statistics, sequence_BxT, key, policy):
      return elbo.sequence_cost(model.bind({"params": params}), statistics, sequence_BxT, key, policy, self.window,
                                self_conditioned, config.loss.chunk)

    self._cost = cost

  def check(self, paths: tuple[str, ...]) -> None:
    """Raises UserError for a path that is none, or that this model does not have."""
    for path in paths:
      if paths_lib.parse(path)[0] == "learned" and self.config.model.progression != "learned":
        raise UserError(f"path {path!r}: the model has a shared clock (config.model.progression)")

  def nats(self, params: Any, statistics: elbo.Statistics, sequences: np.ndarray,
           path: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, L) prices in nats of the tokens of sequences (n, L + 1), and the passes (n,); the noise is the same
    at every call."""
    policy = policies.make(path, self.window, self.config.paths.rolling_width, self.most)
    place = jax.sharding.NamedSharding(self.mesh, sharding.RULES.spec(("batch",)))
    found = []
    for i in range(0, len(sequences), self.rows):
      batch = sequences[i:i + self.rows]
      batch = np.concatenate([batch, np.repeat(batch[:1], self.rows - len(batch), axis=0)])  # one shape for all
      batch = jax.make_array_from_callback(batch.shape, place, lambda index, b=batch: b[index])
      found.append(self._cost(params, statistics, batch, jax.random.fold_in(self.key, i), policy))
    nats, passes = (np.concatenate(parts)[:len(sequences)] for parts in zip(*jax.device_get(found)))
    return nats, passes

  def __call__(self, params: Any, statistics: elbo.Statistics, sequences: np.ndarray,
               paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """One object a path: `path`, `bits` a byte or character, its `stderr`, `passes_per_token` and `unit`."""
    return [entry for entry, _ in self.measure(params, statistics, sequences, paths)]

  def measure(self, params: Any, statistics: elbo.Statistics, sequences: np.ndarray,
              paths: tuple[str, ...]) -> list[tuple[dict[str, Any], np.ndarray]]:
    """The same, each with the bits (n,) of the single sequences, for the errors of differences."""
    self.check(paths)
    units = self.tokenizer.lengths()[sequences[:, 1:]].sum(axis=1)
    table = []
    with jax.set_mesh(self.mesh):
      for path in paths:
        nats, passes = self.nats(params, statistics, sequences, path)
        each = nats.sum(axis=1, dtype=np.float64) * elbo.BITS
        bits, stderr = ratio(each, units)
        entry = {"path": path, "bits": bits, "stderr": stderr,
                 "passes_per_token": float(passes.mean() / (sequences.shape[1] - 1)),
                 "unit": f"bits per {self.tokenizer.unit}"}
        table.append((entry, each))
    return table


def path_gap(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """What each path pays above `ar`, which for an exact field is nothing once passes are many: `path`, `gap` in the
  table's unit. Of the two longest diagonals it extrapolates to infinitely many passes, where the excess of finite
  steps, which falls as 1 / K, is gone: "diagonal:inf". Empty where the table has no `ar` or only one diagonal.
  """
  bits = {entry["path"]: entry["bits"] for entry in table}
  diagonals = sorted(int(number) for name, number in map(paths_lib.parse, bits) if name == "diagonal")
  if "ar" not in bits or len(diagonals) < 2:
    return []
  few, many = diagonals[-2:]
  limit = (many * bits[f"diagonal:{many}"] - few * bits[f"diagonal:{few}"]) / (many - few)
  return [{"path": path, "gap": value - bits["ar"]} for path, value in (bits | {"diagonal:inf": limit}).items()
          if path != "ar"]


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


def progression(run: checkpoint.Run, sequence: np.ndarray, window: int, passes: int) -> list[dict[str, Any]]:
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
    nats = elbo.token_nats(net, hidden, sequence_1xT)
    anchor = jnp.arange(0, L, window)[None]
    token = elbo.gather_windows(sequence_1xT, anchor, window)[..., 1:]
    count = jnp.full(anchor.shape, passes)
    delay, sharpness, _ = elbo.infer_clock(net, hidden, nats, token, anchor, count, jnp.zeros(token.shape))
    expected, _, _ = net.clock_prior(hidden[:, ::window], window, count)
    times = paths_lib.learned_clock(delay, sharpness, (jnp.arange(passes + 1) / passes)[:, None, None, None])
    return (nats[0], jax.nn.sigmoid(delay).reshape(L), jax.nn.sigmoid(expected).reshape(L),
            times.reshape(passes + 1, L).T)

  found = (np.asarray(x).tolist() for x in infer(run.params, sequence[None]))
  return [{"token": int(token), "nats": nats, "half": half, "expected": expected, "times": times}
          for token, nats, half, expected, times in zip(sequence[1:], *found)]


def format_progression(found: list[dict[str, Any]], tokenizer: tokenizer_lib.Tokenizer, window: int) -> str:
  """A line a token, a rule a window: the token, its surprise, when its t is 1/2, and its t before each pass."""
  lines = [f"{'token':<12}{'bits':>7}{'half':>7}{'expected':>10}  t before each pass"]
  for i, entry in enumerate(found):
    if i % window == 0:
      lines.append("-" * 72)
    text = repr(tokenizer.decode(np.array([entry["token"]])))
    times = " ".join(f"{t:.2f}" if 0 < t < 1 else f"{t:<4.0f}" for t in entry["times"])
    lines.append(f"{text:<12}{entry['nats'] * elbo.BITS:>7.2f}{entry['half']:>7.2f}{entry['expected']:>10.2f}  {times}")
  return "\n".join(lines)


def main() -> None:
  args = flags.FLAGS
  paths = tuple(path.strip() for path in args.paths.split(",") if path.strip())
  if args.paths and not paths:
    raise UserError("--paths: is empty; give paths as in --paths=ar,diagonal:16,rolling:8")
  for path in paths:
    paths_lib.parse(path)
  for name in ("sequences", "window"):
    if getattr(args, name) < 0:
      raise UserError(f"--{name}={getattr(args, name)}: is negative")
  if args.json:
    try:
      epath.Path(args.json).open("a").close()
    except OSError as error:
      raise UserError(f"--json={args.json}: cannot be written: {error.strerror or error}") from error
  run = checkpoint.load_run(args.workdir, args.step)
  L = run.config.model.context
  window = args.window or run.config.window.size
  if L % window:
    raise UserError(f"--window={args.window}: does not divide the context of {L}")
  if not paths:
    paths = GAP_PATHS + (("learned:8",) if run.config.model.progression == "learned" else ())
  if args.data:
    corpora, split = [data.all_text(args.data, run.tokenizer, "--data")], "test"
  else:
    corpora, split = data.load(run.config.data.path, run.tokenizer), args.split
  if args.show_progression:
    sequence = data.held_out(corpora, split, L, 1)[0]
    found = progression(run, sequence, window, args.passes)
    print(format_progression(found, run.tokenizer, window))
    if args.json:
      epath.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return
  sequences = data.held_out(corpora, split, L, args.sequences)
  mesh = sharding.make_mesh(config_lib.Mesh())
  evaluator = Evaluator(run.model, run.config, run.tokenizer, mesh, args.seed, window=window)
  table = evaluator(run.params, run.statistics, sequences, paths)
  print(f"{args.data or run.config.data.path + ' (' + split + ')'}: {len(sequences)} sequences of {L} tokens, "
        f"windows of {window}, step {run.step}\n{format_table(table)}")
  if gap := path_gap(table):
    print("\n" + format_gap(gap, table[0]["unit"]))
  if args.json:
    epath.Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("paths", "", f"Comma-separated paths; default: {','.join(GAP_PATHS)}, and learned:8 where it is.")
  flags.DEFINE_string("data", "", "Text to measure: comma-separated globs; empty: the run's own held-out text.")
  flags.DEFINE_enum("split", "valid", ["valid", "test"], "Which held-out text of the run's.")
  flags.DEFINE_integer("sequences", 128, "At most so many sequences, evenly spread over the text; 0: all.")
  flags.DEFINE_integer("window", 0, "Tokens of a window; 0: as in training.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_integer("seed", 0, "Of the latents' noise.")
  flags.DEFINE_bool("show_progression", False,
                    "Print a passage's tokens with the times that the model infers for them.")
  flags.DEFINE_integer("passes", 8, "For --show_progression: the passes a window.")
  flags.DEFINE_string("json", "", "File for the table as JSON.")
  cli.run(main)
