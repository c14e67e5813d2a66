"""Bits per byte or character of text, on any path. Every number is an upper bound on the model's own code length.

  python -m evo_jax.evaluate --workdir=DIR --paths=ar,diagonal:16,rolling:8 [--data='dir/*.txt'] [--json=FILE]

Paths: `ar` (one token a pass), `diagonal:K` (a window's tokens together in K passes), `rolling:K` (a wave from left to
right in K passes), `staircase` (one token a pass, inside the windows). Text is cut into consecutive sequences of the
model's context, each read from scratch; what is left over at the end is dropped.
"""

import functools
import json
from typing import Any

from absl import flags
from etils import epath
import jax
import numpy as np

from evo_jax import checkpoint
from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import data
from evo_jax import elbo
from evo_jax import paths as paths_lib
from evo_jax import sharding
from evo_jax import tokenizer as tokenizer_lib
from evo_jax.cli import UserError
from evo_jax.model import Evo


class Evaluator:
  """Measures sequences on paths; compiles twice, for `ar` and for all other paths of up to `most` passes."""

  def __init__(self, model: Evo, config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer,
               mesh: jax.sharding.Mesh, seed: int = 0, most: int = 64):
    self.config, self.tokenizer, self.mesh, self.most = config, tokenizer, mesh, most
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    self.rows = -(-config.eval.batch_size // shards) * shards
    self.key = jax.random.key(seed)

    @functools.partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    def cost(params, statistics, sequence_BxT, key, times, passes):
      return elbo.sequence_cost(model.bind({"params": params}), statistics, sequence_BxT, key, times, passes)

    self._cost = cost

  def nats(self, params: Any, statistics: elbo.Statistics, sequences: np.ndarray, path: str) -> np.ndarray:
    """(n, L) prices in nats of the tokens of sequences (n, L + 1); the noise is the same at every call."""
    times = passes = None
    if paths_lib.parse(path)[0] != "ar":
      times = paths_lib.grid(path, self.config.window.size, self.config.paths.rolling_width)
      passes = len(times) - 1
      times = np.pad(times, [(0, max(self.most - passes, 0)), (0, 0)])
    place = jax.sharding.NamedSharding(self.mesh, sharding.RULES.spec(("batch",)))
    found = []
    for i in range(0, len(sequences), self.rows):
      batch = sequences[i:i + self.rows]
      batch = np.concatenate([batch, np.repeat(batch[:1], self.rows - len(batch), axis=0)])  # one shape for all
      batch = jax.make_array_from_callback(batch.shape, place, lambda index, b=batch: b[index])
      found.append(self._cost(params, statistics, batch, jax.random.fold_in(self.key, i), times, passes))
    return np.concatenate([np.asarray(jax.device_get(part)) for part in found])[:len(sequences)]

  def __call__(self, params: Any, statistics: elbo.Statistics, sequences: np.ndarray,
               paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """One object a path: `path`, `bits` a byte or character, its `stderr`, `passes_per_token` and `unit`."""
    units = self.tokenizer.lengths()[sequences[:, 1:]].sum(axis=1)
    table = []
    with jax.set_mesh(self.mesh):
      for path in paths:
        nats = self.nats(params, statistics, sequences, path).sum(axis=1, dtype=np.float64)
        bits, stderr = ratio(nats * elbo.BITS, units)
        name, steps = paths_lib.parse(path)
        passes = {"ar": 1.0, "staircase": 1.0}.get(name, steps / self.config.window.size)
        table.append({"path": path, "bits": bits, "stderr": stderr, "passes_per_token": passes,
                      "unit": f"bits per {self.tokenizer.unit}"})
    return table


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


def main() -> None:
  args = flags.FLAGS
  paths = tuple(path.strip() for path in args.paths.split(",") if path.strip())
  if not paths:
    raise UserError("--paths: is empty; give paths as in --paths=ar,diagonal:16,rolling:8")
  for path in paths:
    paths_lib.parse(path)
  if args.sequences < 0:
    raise UserError(f"--sequences={args.sequences}: is negative")
  if args.json:
    try:
      epath.Path(args.json).open("a").close()
    except OSError as error:
      raise UserError(f"--json={args.json}: cannot be written: {error.strerror or error}") from error
  run = checkpoint.load_run(args.workdir, args.step)
  L = run.config.model.context
  if args.data:
    corpora, split = [data.all_text(args.data, run.tokenizer, "--data")], "test"
  else:
    corpora, split = data.load(run.config.data.path, run.tokenizer), args.split
  sequences = data.held_out(corpora, split, L, args.sequences)
  mesh = sharding.make_mesh(config_lib.Mesh())
  table = Evaluator(run.model, run.config, run.tokenizer, mesh, args.seed)(run.params, run.statistics, sequences, paths)
  print(f"{args.data or run.config.data.path + ' (' + split + ')'}: {len(sequences)} sequences of {L} tokens, "
        f"step {run.step}\n{format_table(table)}")
  if args.json:
    epath.Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("paths", "ar,diagonal:1,diagonal:4,diagonal:16,rolling:8", "Comma-separated paths.")
  flags.DEFINE_string("data", "", "Text to measure: comma-separated globs; empty: the run's own held-out text.")
  flags.DEFINE_enum("split", "valid", ["valid", "test"], "Which held-out text of the run's.")
  flags.DEFINE_integer("sequences", 0, "At most so many sequences, evenly spread over the text; 0: all.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_integer("seed", 0, "Of the latents' noise.")
  flags.DEFINE_string("json", "", "File for the table as JSON.")
  cli.run(main)
