"""Runs beside each other on the same held-out sequences: paired differences with standard errors; tables as CSV."""

from collections.abc import Sequence
import csv
import dataclasses
import io
import itertools
from typing import Any

import numpy as np

from evo_jax.evaluation.paths import ratio


@dataclasses.dataclass(frozen=True)
class Measured:
  """A run's table (`Evaluator.measure`), and what differences to another run are made from.

  name: the run's, its work directory. bits: by path (n,), of the single sequences. lengths: (n,) bytes or characters
  that the bits are of.
  """

  name: str
  table: list[dict[str, Any]]
  bits: dict[str, np.ndarray]
  lengths: np.ndarray

  @classmethod
  def of(cls, name: str, measured: list[tuple[dict[str, Any], np.ndarray]], lengths: np.ndarray) -> "Measured":
    """From the entries and bits that `Evaluator.measure` gives."""
    table = [entry for entry, _ in measured]
    return cls(name, table, {entry["path"]: bits for entry, bits in measured}, lengths)


def differences(runs: Sequence[Measured]) -> list[dict[str, Any]]:
  """For each pair of runs and each path that both have: `run`, `minus` (names), `path`, `difference` in the tables'
  unit, its `stderr` and the difference in `passes_per_token`.

  The runs must have measured the same sequences, with the same noise: a sequence that is hard for one is hard for the
  other, so that the standard error of the paired differences is far below either table's.
  """
  found = []
  for first, second in itertools.combinations(runs, 2):
    passes = {entry["path"]: entry["passes_per_token"] for entry in first.table}
    for entry in second.table:
      if (path := entry["path"]) not in passes:
        continue
      difference, stderr = ratio(second.bits[path] - first.bits[path], first.lengths)
      found.append(
        {
          "run": second.name,
          "minus": first.name,
          "path": path,
          "difference": difference,
          "stderr": stderr,
          "passes_per_token": entry["passes_per_token"] - passes[path],
        }
      )
  return found


def format_differences(found: list[dict[str, Any]], unit: str) -> str:
  """The differences as text, a block for each pair of runs."""
  blocks = []
  for (run, minus), entries in itertools.groupby(found, lambda entry: (entry["run"], entry["minus"])):
    entries = list(entries)
    width = max([14, *(len(entry["path"]) + 1 for entry in entries)])
    lines = [f"{run} minus {minus}: {unit}, paired over sequences"]
    lines.append(f"{'path':<{width}}{'difference':>12}{'stderr':>10}")
    for entry in entries:
      stderr = "-" if entry["stderr"] is None else f"{entry['stderr']:.4f}"
      lines.append(f"{entry['path']:<{width}}{entry['difference']:>+12.4f}{stderr:>10}")
    blocks.append("\n".join(lines))
  return "\n\n".join(blocks)


def to_csv(runs: Sequence[Measured], found: list[dict[str, Any]]) -> str:
  """One table: a row for each run and path, with `minus` empty, and one for each difference between two runs."""
  fields = ("run", "minus", "path", "bits", "stderr", "passes_per_token", "unit")
  file = io.StringIO()
  writer = csv.DictWriter(file, fields, lineterminator="\n")
  writer.writeheader()
  for run in runs:
    writer.writerows({"run": run.name} | entry for entry in run.table)
  unit = {"unit": runs[0].table[0]["unit"]}
  for entry in found:
    writer.writerow({("bits" if name == "difference" else name): value for name, value in entry.items()} | unit)
  return file.getvalue()
