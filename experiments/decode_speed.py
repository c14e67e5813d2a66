"""Decoding speed of each mode, and the quality of its texts.

  pip install -e '.[plot]' && python -m experiments.decode_speed --workdir=DIR [--judge=DIR] [--masked=DIR]
      [--batches=1,8,64] [--tokens=192]

Generates texts in every setting of `SETTINGS` (some at every batch size, the others at the largest), each after a
prompt of held-out text, and prints: tokens per second and passes per token; the texts' bits per token by the model's
own AR path and by a judge, an AR model trained separately (--judge; its tokenizer must be the same); and, since few
bits may also mean dull texts, distinct-n (the share of n-grams that are not repeats) and the entropy of token
frequencies, all beside those of the held-out text. --masked: also a masked diffusion model on the same text, which
decodes whole texts by confidence. Times are without compilation; peak memory is the process's at the end of a setting.
"""

import dataclasses
from pathlib import Path
import resource
from typing import Any

from absl import flags
import jax
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from experiments import common

SETTINGS = {
  "ar": dict(mode="ar"),
  "ar greedy": dict(mode="ar", greedy=True),
  "verify": dict(mode="verify", draft=4),
  "verify greedy": dict(mode="verify", greedy=True, draft=4),
  **{f"adaptive {t:g}": dict(mode="adaptive", threshold=t) for t in (0.13, 0.26, 0.35, 0.52, 1.04, 2.08)},
  **{f"even steps {k}": dict(mode="flow", steps=k) for k in (2, 4, 8, 16, 32, 64)},
  **{f"confidence {n}": dict(mode="flow", path=f"certain:{n}") for n in (2, 4, 8, 16, 32)},
  **{f"streams {n}": dict(mode="flow", path=f"streams:{n}") for n in (2, 4, 8, 16)},
}
MASKED = {f"masked diffusion {n}": dict(mode="flow", path=f"certain:{n}") for n in (2, 4, 8, 16, 32)}  # with --masked
# Settings that are timed at all batch sizes.
SPEED = ("ar", "ar greedy", "verify", "verify greedy", "adaptive 0.26", "adaptive 0.52", "even steps 8", "streams 4")
FAMILIES = ("adaptive", "even steps", "confidence", "streams", "masked diffusion")
COLORS = ("tab:blue", "tab:purple", "tab:green", "tab:orange", "tab:brown", "black", "tab:red")


def distinct(texts: list[list[int]], n: int) -> float:
  """The share of n-grams that are not repeats of another within their text, over all texts."""
  grams = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in texts]
  return sum(len(set(g)) for g in grams) / max(sum(map(len, grams)), 1)


def token_entropy(texts: list[list[int]], n: int = 1) -> float:
  """Entropy in bits of the frequencies of n-grams of tokens."""
  grams = np.array([t[i : i + n] for t in texts for i in range(len(t) - n + 1)], int)
  _, count = np.unique(grams, axis=0, return_counts=True)
  p = count / count.sum()
  return float(-(p * np.log2(p)).sum())


class Scorer:
  """Scores texts, given their prompts, by a model's AR path."""

  def __init__(self, run: run_lib.Run):
    self._run = run
    self._evaluator = paths_lib.Evaluator(run.model, run.config, run.tokenizer, run.mesh)

  def bits_per_token(self, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, float]:
    """The mean over all tokens of the texts, and its standard error over texts."""
    shape = len(texts), self._run.config.model.context + 1
    rows = np.full(shape, self._run.tokenizer.begin_id, np.int32)
    for row, prompt, text in zip(rows, prompts, texts):
      row[1 : len(prompt) + len(text) + 1] = prompt + text
    with jax.set_mesh(self._evaluator.mesh):
      nats, _ = self._evaluator.token_nll(self._run.params, self._run.statistics, Batch(rows), "ar")
    bits = np.array([n[len(p) : len(p) + len(t)].sum() for n, p, t in zip(nats, prompts, texts)]) / np.log(2.0)
    mean, stderr = paths_lib.ratio(bits, np.array([len(t) for t in texts]))
    return {"mean": mean, "stderr": stderr}


def quality(scorers: dict[str, Scorer], prompts: list[list[int]], texts: list[list[int]]) -> dict[str, Any]:
  """Scores of texts by the scorers' names, the diversity of their n-grams and the entropy of their tokens."""
  return {
    **{name: scorer.bits_per_token(prompts, texts) for name, scorer in scorers.items()},
    "distinct_2": distinct(texts, 2),
    "distinct_4": distinct(texts, 4),
    "entropy": token_entropy(texts),
  }


def main() -> None:
  args = flags.FLAGS
  batch_sizes = parse_batch_sizes(args.batches)
  common.pyplot()  # a missing matplotlib is an error now, not after the measurements
  runs = load_runs(args)
  run = runs["own"]
  prompts, continuations = held_out_texts(run, args.data, args.tokens, args.texts)
  scorers = {f"bits_{name}": Scorer(runs[name]) for name in ("own", "judge") if name in runs}
  results = [{"setting": "held-out text", "batch": 0, **quality(scorers, prompts, continuations)}]
  print(
    f"{'setting':<24}{'batch':>6}{'tokens/s':>10}{'passes/token':>14}{'bits own':>10}{'judge':>8}"
    f"{'distinct-2':>12}{'-4':>7}{'entropy':>9}{'MB':>7}"
  )
  print_row(results[0])
  settings = SETTINGS | (MASKED if "masked" in runs else {})
  largest = max(batch_sizes)
  for name in common.select(args.only, settings):
    sampling = Sampling(**settings[name], max_tokens=args.tokens, endless=True)
    for batch_size in batch_sizes if name in SPEED else [largest]:
      count = len(prompts) if batch_size == largest else max(batch_size, args.repeats)
      sampler = Sampler(runs["masked"] if name in MASKED else run, dataclasses.replace(sampling, batch_size=batch_size))
      speed, texts = generate(sampler, [run.tokenizer.decode(np.array(p)) for p in prompts[:count]], batch_size)
      entry = {"setting": name, "batch": batch_size, **speed}
      if batch_size == largest:
        entry |= quality(scorers, prompts, texts)
      results.append(entry)
      print_row(entry)
  folder = common.results_folder(args.output)
  common.write_result("decode_speed", results, folder)
  draw(results, largest, folder / "decode_speed.png")


def parse_batch_sizes(text: str) -> list[int]:
  """The numbers of --batches. Raises UserError."""
  try:
    return [int(n) for n in text.split(",")]
  except ValueError:
    raise UserError(f"--batches={text}: is not a list of numbers, as 1,8,64") from None


def load_runs(args: flags.FlagValues) -> dict[str, run_lib.Run]:
  """The runs "own" and, where their flags are given, "judge" and "masked". Raises UserError if they do not match."""
  runs = {"own": run_lib.load_run(args.workdir)}
  kind = lambda run: (run.tokenizer.identity, run.config.model.context)
  for name in ("judge", "masked"):
    workdir = getattr(args, name)
    if workdir:
      runs[name] = run_lib.load_run(workdir)
      if kind(runs[name]) != kind(runs["own"]):
        raise UserError(f"--{name}={workdir}: has another tokenizer or context than {args.workdir}")
  return runs


def held_out_texts(run: run_lib.Run, data: str, tokens: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
  """Prompts from held-out text, and the `tokens` tokens that follow each: together a context. Raises UserError.

  data: as config.data.path; empty: the run's.
  """
  L = run.config.model.context
  if not 0 < tokens < L:
    raise UserError(f"--tokens={tokens}: is not in 1..{L - 1}, inside the model's context")
  config = run.config.data
  if data:
    config = dataclasses.replace(config, path=data, weights=(), weight_changes="", valid="", test="")
  corpora = corpora_lib.load_corpora(config, run.tokenizer)
  held_out = batches_lib.held_out(corpora, "valid", L, count).tokens
  split = L - tokens + 1
  return [row[1:split].tolist() for row in held_out], [row[split:].tolist() for row in held_out]


def generate(sampler: Sampler, prompts: list[str], batch_size: int) -> tuple[dict[str, float], list[list[int]]]:
  """Generates a text for each prompt, after a first batch that compiles: speed and memory, and the texts' tokens."""
  sampler(prompts[:batch_size])
  generated = sampler(prompts, seed=1)
  batches = [generated[i : i + batch_size] for i in range(0, len(generated), batch_size)]
  seconds = sum(max(g.seconds for g in batch) for batch in batches)
  tokens = sum(len(g.tokens) for g in generated)
  speed = {
    "tokens_per_second": tokens / seconds,
    "passes_per_token": sum(g.passes for g in generated) / tokens,
    "compile_seconds": sampler.compile_seconds,
    "peak_megabytes": peak_megabytes(),
  }
  return speed, [g.tokens for g in generated]


def peak_megabytes() -> float:
  """Peak memory of the accelerator where it is known, else of the process, in MiB."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20


def print_row(entry: dict[str, Any]) -> None:
  """Prints a row of the table; what was not measured is nan."""
  mean = lambda name: entry.get(name, {}).get("mean", float("nan"))
  number = lambda name: entry.get(name, float("nan"))
  print(
    f"{entry['setting']:<24}{entry['batch']:>6}{number('tokens_per_second'):>10.0f}"
    f"{number('passes_per_token'):>14.3f}{mean('bits_own'):>10.3f}{mean('bits_judge'):>8.3f}"
    f"{number('distinct_2'):>12.3f}{number('distinct_4'):>7.3f}{number('entropy'):>9.3f}"
    f"{number('peak_megabytes'):>7.0f}",
    flush=True,
  )


def draw(results: list[dict[str, Any]], batch_size: int, file: Path) -> None:
  """Draws bits per token, by the judge if there is one, and speed against passes per token; a line per family."""
  score = "bits_judge" if "bits_judge" in results[0] else "bits_own"
  figure, (left, right) = common.pyplot().subplots(1, 2, figsize=(11, 4.6))
  for family, color in zip((*FAMILIES, "ar", "verify"), COLORS):
    rows = family_rows(results[1:], family, batch_size)
    if rows:
      style = dict(ms=4, color=color, label=family)
      passes = [r["passes_per_token"] for r in rows]
      left.errorbar(passes, [r[score]["mean"] for r in rows], [r[score]["stderr"] for r in rows], fmt="o-", **style)
      right.plot(passes, [r["tokens_per_second"] for r in rows], "o-", **style)
  left.axhline(results[0][score]["mean"], color="gray", lw=1, ls=":", label="held-out text")
  left.set_ylabel(f"bits per token by {'an AR judge' if score == 'bits_judge' else 'its own AR path'}")
  right.set_ylabel(f"tokens per second, batch {batch_size}")
  right.set_yscale("log")
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xlabel("passes per token")
    axes.grid(alpha=0.3)
  left.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(file, dpi=130)


def family_rows(results: list[dict[str, Any]], family: str, batch_size: int) -> list[dict[str, Any]]:
  """A family's results at a batch size, without greedy decoding, by passes per token."""
  rows = [r for r in results if r["setting"].startswith(family) and r["batch"] == batch_size]
  return sorted(
    (r for r in rows if not r["setting"].endswith("greedy")),
    key=lambda r: r["passes_per_token"],
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("judge", "", "Work directory of an AR model on the same text.")
  flags.DEFINE_string("masked", "", "Work directory of a masked diffusion model on the same text.")
  flags.DEFINE_string("data", "", "Text for prompts; default: the run's.")
  flags.DEFINE_string("batches", "1,8,64", "Batch sizes; the texts of the largest are scored.")
  flags.DEFINE_integer("tokens", 192, "Tokens per text.")
  flags.DEFINE_integer("texts", 64, "Number of texts that are scored.")
  flags.DEFINE_integer("repeats", 2, "Number of texts that are timed where the batch is smaller.")
  flags.DEFINE_string("only", "", "Comma-separated settings; default: all.")
  flags.DEFINE_string("output", "", "Folder for the JSON and the figure; default: experiments/results.")
  cli.run(main)
