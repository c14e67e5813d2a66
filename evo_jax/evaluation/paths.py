"""Evaluator: bits per byte or character of held-out sequences on any path, and the gap between paths.

Of conversations the answers are measured, in bits per token of theirs: their windows begin where answers do.
"""

import functools
from typing import Any

import jax
import numpy as np

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.flow import policies, schedules
from evo_jax.flow.bound import BITS_PER_NAT, Price, Tiles, sequence_nll
from evo_jax.flow.schedules import Path
from evo_jax.flow.statistics import Statistics
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding


class Evaluator:
  """Measures sequences on paths.

  Compiles once for `ar`, once for grids of up to `max_passes` passes, and once per kind of policy.
  """

  def __init__(
    self,
    model: evo_lib.Evo,
    config: config_lib.Config,
    tokenizer: tokenizers.Tokenizer,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    max_passes: int = 64,
    window: int = 0,
    price: Price | None = None,
  ):
    """seed: of the latents' noise. window: tokens of a window, which must divide the context; 0: as in training.
    price: of a step, where it is not to be its NLL; `ar` has none."""
    self.config, self.tokenizer, self.mesh, self.max_passes = config, tokenizer, mesh, max_passes
    self.window = window or config.window.size
    shards = sharding.batch_shards(mesh)
    self._rows = -(-config.eval.batch_size // shards) * shards  # of a batch on the devices
    self._key = jax.random.key(seed)

    self._vocab_rows = model.rows
    model = model.clone(layout=sharding.Layout.of(mesh))

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def nll(params, statistics, batch, key, policy, tiles):
      net = model.bind({"params": params})
      conditioned, chunk = config.loss.self_conditioning > 0, config.loss.chunk
      return sequence_nll(net, statistics, batch, key, policy, self.window, conditioned, chunk, price, tiles)

    self._nll = nll

  def check_paths(self, paths: tuple[Path, ...]) -> None:
    """Raises UserError for a path that does not exist, or that this model does not have."""
    for path in paths:
      check_path(path, self.config)
      policies.check_policy(path, self.window, self._vocab_rows, self.config)

  def token_nll(self, params: Any, statistics: Statistics, batch: Batch, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """NLL bounds (n, L) in nats of the tokens after the first of each sequence, and the passes (n,) taken.

    Tokens that the batch does not count are included. The noise is the same at every call.
    """
    policy = policies.make_policy(path, self.window, self.config.paths.rolling_width, self.max_passes)
    tiles = _tiles(batch, self.window)
    n, parts = len(batch.tokens), []
    for start in range(0, n, self._rows):
      rows = np.arange(start, start + self._rows)
      rows[rows >= n] = start  # one shape for all batches
      key = jax.random.fold_in(self._key, start)
      of_rows = None if tiles is None else Tiles(tiles.anchor_BxN[rows], tiles.tokens_BxN[rows])
      some, of_answers = self._to_devices((batch.rows(rows), of_rows))
      parts.append(self._nll(params, statistics, some, key, policy, of_answers))
    nll, passes = (np.concatenate(part)[:n] for part in zip(*jax.device_get(parts)))
    return nll, passes

  def _to_devices(self, tree: Any) -> Any:
    rows = sharding.batch_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda index: x[index]), tree)

  def __call__(
    self, params: Any, statistics: Statistics, batch: Batch, paths: tuple[Path, ...]
  ) -> list[dict[str, Any]]:
    """One object per path: `path`, `bits` per byte or character, or per answer token, its `stderr`,
    `passes_per_token` and `unit`.

    Raises UserError for a path that does not exist, or that this model does not have.
    """
    return [entry for entry, _ in self.measure(params, statistics, batch, paths)]

  def measure(
    self, params: Any, statistics: Statistics, batch: Batch, paths: tuple[Path, ...]
  ) -> list[tuple[dict[str, Any], np.ndarray]]:
    """As `__call__`, each object with the bits (n,) of the single sequences, for standard errors of differences."""
    self.check_paths(paths)
    lengths = self.lengths(batch)
    tiles = _tiles(batch, self.window)
    tokens = batch.tokens[:, 1:].size if tiles is None else tiles.tokens_BxN.sum()
    table = []
    with jax.set_mesh(self.mesh):
      for path in paths:
        nll, passes = self.token_nll(params, statistics, batch, path)
        sequence_bits = _counted(nll, batch).sum(axis=1, dtype=np.float64) * BITS_PER_NAT
        bits, stderr = ratio(sequence_bits, lengths)
        entry = {
          "path": str(path),
          "bits": bits,
          "stderr": stderr,
          "passes_per_token": float(passes.sum() / tokens),
          "unit": f"bits per {self.unit(batch)}",
        }
        table.append((entry, sequence_bits))
    return table

  def lengths(self, batch: Batch) -> np.ndarray:
    """Bytes or characters (n,) of the sequences' tokens that count; of conversations, as many as there are tokens."""
    tokens = batch.tokens[:, 1:]
    sizes = self.tokenizer.lengths()[tokens] if batch.answers is None else np.ones(tokens.shape, int)
    return _counted(sizes, batch).sum(axis=1)

  def unit(self, batch: Batch) -> str:
    """What bits are per. Sequences of text beside conversations are those of which all tokens count."""
    if batch.answers is None:
      return self.tokenizer.unit
    return "counted token" if batch.answers[:, 1:].all(axis=1).any() else "answer token"


def _tiles(batch: Batch, size: int) -> Tiles | None:
  """The windows of answers, or of texts that end before their sequences; None: windows tile the sequences."""
  if batch.answers is not None:
    return tile_answers(batch.answers, size)
  if batch.counted is None or batch.counted[:, -1].all():
    return None
  counted = batch.counted[:, 1:]
  ends = np.where(counted.any(axis=1), counted.shape[1] - np.argmax(counted[:, ::-1], axis=1), 0)
  anchors = np.broadcast_to(np.arange(0, counted.shape[1], size, dtype=np.int32), (len(ends), counted.shape[1] // size))
  return Tiles(anchors, np.clip(ends[:, None] - anchors, 0, size).astype(np.int32))


def tile_answers(answers: np.ndarray, size: int) -> Tiles:
  """Windows of `size` tokens over the answers (n, L + 1) of sequences, whose first token is context only."""
  answers = np.pad(answers[:, 1:], ((0, 0), (1, 1)))
  tiles = []
  for row in answers:
    starts, ends = np.flatnonzero(np.diff(row.astype(np.int8))).reshape(-1, 2).T  # anchors, last tokens
    tiles.append([(at, min(size, end - at)) for start, end in zip(starts, ends) for at in range(start, end, size)])
  most = max([1, *map(len, tiles)])
  table = np.array([row + [(0, 0)] * (most - len(row)) for row in tiles], np.int32).reshape(len(tiles), most, 2)
  return Tiles(table[..., 0], table[..., 1])


def check_path(path: Path, config: config_lib.Config) -> None:
  """Raises UserError for a path that a model of this configuration does not have."""
  if schedules.parse_path(path)[0] == "learned" and config.model.progression != "learned":
    raise UserError(f"path {path!r}: the model has a shared clock (config.model.progression)")


def _counted(values: np.ndarray, batch: Batch) -> np.ndarray:
  """`values` (n, L) of the tokens after the first, zero where the batch does not count the token."""
  return values if batch.mask is None else np.where(batch.mask[:, 1:], values, 0)


def ratio(bits: np.ndarray, lengths: np.ndarray) -> tuple[float, float | None]:
  """sum(bits) / sum(lengths) over sequences, and its standard error (None for a single sequence)."""
  n, total = len(bits), lengths.sum()
  mean = float(bits.sum() / total)
  if n < 2:
    return mean, None
  return mean, float(np.sqrt(n / (n - 1) * ((bits - mean * lengths) ** 2).sum()) / total)


def path_gap(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """How much each path exceeds `ar`, as objects with `path` and `gap` in the table's unit.

  For an exact field the gap vanishes as passes grow. The excess of finite steps falls as 1 / K: from the two longest
  diagonals, "diagonal:inf" extrapolates to infinitely many passes. Empty where the table lacks `ar` or two diagonals.
  """
  bits = {entry["path"]: entry["bits"] for entry in table}
  diagonals = sorted(int(path.removeprefix("diagonal:")) for path in bits if path.startswith("diagonal:"))
  if "ar" not in bits or len(diagonals) < 2:
    return []
  few, many = diagonals[-2:]
  limit = (many * bits[f"diagonal:{many}"] - few * bits[f"diagonal:{few}"]) / (many - few)
  return [
    {"path": path, "gap": value - bits["ar"]}
    for path, value in (bits | {"diagonal:inf": limit}).items()
    if path != "ar"
  ]


def format_table(table: list[dict[str, Any]]) -> str:
  """The table as text."""
  unit = table[0]["unit"]
  width, number = max([14, *(len(entry["path"]) + 1 for entry in table)]), max(18, len(unit) + 2)
  lines = [f"{'path':<{width}}{unit:>{number}}{'stderr':>10}{'passes per token':>20}"]
  for entry in table:
    stderr = "-" if entry["stderr"] is None else f"{entry['stderr']:.4f}"
    lines.append(f"{entry['path']:<{width}}{entry['bits']:>{number}.4f}{stderr:>10}{entry['passes_per_token']:>20.4g}")
  return "\n".join(lines)


def format_gap(gap: list[dict[str, Any]], unit: str) -> str:
  """The path gap as text."""
  width = max([14, *(len(entry["path"]) + 1 for entry in gap)])
  return "\n".join([f"path gap: {unit} above ar"] + [f"{entry['path']:<{width}}{entry['gap']:>18.4f}" for entry in gap])
