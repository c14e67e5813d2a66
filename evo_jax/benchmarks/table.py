"""Results of benchmarks as rows: of each benchmark and setting every metric, and beside it what was published."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from evo_jax.benchmarks.published import FIGURES, SETTINGS

_NOT_SHARES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")  # metrics that are no percentages


def make_rows(
  results: Mapping[str, Any],
  members: Mapping[str, Sequence[str]],
  counts: Mapping[str, Mapping[str, float]],
  by: str,
  substituted: Mapping[str, str],
) -> list[dict[str, Any]]:
  """Rows of some benchmarks, evaluated with one setting.

  results: the harness's. members: by benchmark, its tasks. counts: by task, what was counted while it was asked. by:
  the setting: a path, or a mode. substituted: by task, the file that stands for another split.

  A row has task, shots, by, metric, filter, value and stderr (in percent, but for perplexities; the harness's error, or
  over all items; None where there is neither), items, cut (requests whose context was too long), passes_per_token
  (None of likelihoods), draws_stderr (nats: of a likelihood, by the noise; None without), substituted, and published,
  by model in percent.
  """
  rows = []
  for name, tasks in members.items():
    metrics, total = results["results"][name], _total(counts, tasks)
    common = {
      "task": name,
      "shots": max(results["n-shot"][task] for task in tasks),
      "by": by,
      "items": sum(results["results"][task]["sample_len"] for task in tasks),
      "cut": int(total.get("cut", 0)),
      "passes_per_token": total["passes"] / total["tokens"] if total.get("tokens") else None,
      "draws_stderr": _draws_stderr(total),
      "substituted": "; ".join(sorted({substituted[task] for task in tasks if task in substituted})),
    }
    for key, value in metrics.items():
      metric, _, rule = key.partition(",")
      if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
        continue
      scale = 1.0 if metric in _NOT_SHARES else 100.0
      stderr = metrics.get(f"{metric}_stderr,{rule}")
      if not isinstance(stderr, float) or not math.isfinite(stderr):
        stderr = _stderr_over_items(results.get("samples", {}), tasks, metric, rule, value)
      rows.append(
        {
          **common,
          "metric": metric,
          "filter": "" if rule == "none" else rule,
          "value": scale * value,
          "stderr": None if stderr is None else scale * stderr,
          "published": {model: figures[name] for model, figures in FIGURES.items() if name in figures},
        }
      )
  return rows


def _stderr_over_items(
  samples: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[str], metric: str, rule: str, value: float
) -> float | None:
  """The standard error of a benchmark's mean over all its items, for which the harness has none where a subject has a
  single item; None where the value is not that mean."""
  items = [sample for task in tasks for sample in samples.get(task, ()) if sample["filter"] == rule]
  values = [sample[metric] for sample in items if isinstance(sample.get(metric), (int, float))]
  if len(values) < 2 or not math.isclose(np.mean(values), value, abs_tol=1e-9):
    return None
  return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _total(counts: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> dict[str, float]:
  total: dict[str, float] = {}
  for task in tasks:
    for name, value in counts.get(task, {}).items():
      total[name] = total.get(name, 0) + value
  return total


def _draws_stderr(total: Mapping[str, float]) -> float | None:
  variance = total.get("draws_variance", 0.0)
  return math.sqrt(variance / total["requests"]) if variance else None


def format_table(rows: Sequence[dict[str, Any]], left_out: Mapping[str, str]) -> str:
  """The rows as text, with notes."""
  models = list(FIGURES)
  heads = ["task", "shots", "by", "metric", "value", "stderr", "items", "passes/token", *models]
  lines = [heads, *(_cells(row, models) for row in rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
  left = (0, 2, 3)
  aligned = [
    "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
    for line in lines
  ]
  return "\n".join([*aligned, "", *_notes(rows, left_out, models)])


def _cells(row: dict[str, Any], models: Sequence[str]) -> list[str]:
  number = lambda value, form: "-" if value is None else format(value, form)
  metric = row["metric"] + (f" ({row['filter']})" if row["filter"] else "")
  return [
    row["task"] + ("*" if row["substituted"] else ""),
    str(row["shots"]),
    row["by"],
    metric,
    number(row["value"], ".2f"),
    number(row["stderr"], ".2f"),
    str(row["items"]),
    number(row["passes_per_token"], ".3f"),
    *(number(row["published"].get(model), ".1f") for model in models),
  ]


def _notes(rows: Sequence[dict[str, Any]], left_out: Mapping[str, str], models: Sequence[str]) -> list[str]:
  notes = [f"{model}: {SETTINGS[model]}" for model in models if any(model in row["published"] for row in rows)]
  for text in sorted({row["substituted"] for row in rows if row["substituted"]}):
    names = sorted({row["task"] for row in rows if row["substituted"] == text})
    notes.append(f"* other documents than the published figures: {text} ({', '.join(names)})")
  for name, by, cut in sorted({(row["task"], row["by"], row["cut"]) for row in rows if row["cut"]}):
    notes.append(f"{name}, {by}: {cut:,} requests were cut to fit the context")
  for name, by, stderr in sorted(
    {(row["task"], row["by"], row["draws_stderr"]) for row in rows if row["draws_stderr"] is not None}
  ):
    notes.append(f"{name}, {by}: a likelihood's standard error over the draws is {stderr:.3f} nats")
  return notes + [f"{name}: left out: {why}" for name, why in left_out.items()]
