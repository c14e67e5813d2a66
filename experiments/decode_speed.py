"""How fast each mode writes, and how good what it writes is.

  pip install -e '.[plot]' && python -m experiments.decode_speed --workdir=DIR [--judge=DIR] [--masked=DIR]
      [--batches=1,8,64] [--tokens=192]

Writes texts in every setting of `SETTINGS` (one of each mode at every batch size, the others at the largest), each
text behind a piece of held-out text, and prints: tokens a second and passes a token; the texts' bits a token by the
model's own AR path and by a judge, an AR model that was trained apart (--judge; its tokenizer must be the same); and,
since low bits alone may mean dull texts, how many different n-grams they have (distinct-n: the share of n-grams that
are not repeats) and the entropy of their tokens, beside the same of the held-out text. --masked: a masked diffusion
model on the same text, which decodes whole texts by confidence, beside. Compilation is not in the times, peak memory
is the process's at the end of each setting's run.
"""

import dataclasses
from pathlib import Path
import resource

from absl import flags
import jax
import matplotlib
from matplotlib import pyplot as plt
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.decoding import sampler as sampler_lib
from evo_jax.decoding import settings
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.parallel import sharding
from experiments import common

matplotlib.use("Agg")

SETTINGS = {
  "ar": dict(mode="ar"),
  "ar greedy": dict(mode="ar", greedy=True),
  "verify": dict(mode="verify"),
  "verify greedy": dict(mode="verify", greedy=True),
  **{f"adaptive {t:g}": dict(mode="adaptive", threshold=t) for t in (0.13, 0.26, 0.35, 0.52, 1.04, 2.08)},
  **{f"even steps {k}": dict(mode="flow", steps=k) for k in (2, 4, 8, 16, 32, 64)},
  **{f"confidence {n}": dict(mode="flow", path=f"certain:{n}") for n in (2, 4, 8, 16, 32)},
  **{f"streams {n}": dict(mode="flow", path=f"streams:{n}") for n in (2, 4, 8, 16)},
}
MASKED = {f"masked diffusion {n}": dict(mode="flow", path=f"certain:{n}") for n in (2, 4, 8, 16, 32)}  # by --masked
# At all batch sizes.
SPEED = ("ar", "ar greedy", "verify", "verify greedy", "adaptive 0.26", "adaptive 0.52", "even steps 8", "streams 4")
FAMILIES = ("adaptive", "even steps", "confidence", "streams", "masked diffusion")


def distinct(texts: list[list[int]], n: int) -> float:
  """The share of n-grams within a text that are not repeats of another, over all texts."""
  grams = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in texts]
  return sum(len(set(g)) for g in grams) / max(sum(map(len, grams)), 1)


def token_entropy(texts: list[list[int]]) -> float:
  """Entropy in bits of the tokens' frequencies."""
  _, count = np.unique(np.concatenate([np.array(t, int) for t in texts]), return_counts=True)
  p = count / count.sum()
  return float(-(p * np.log2(p)).sum())


class Judge:
  """Bits a token that an AR path gives to texts behind their prompts."""

  def __init__(self, run: run_lib.Run):
    self._run = run
    self._evaluator = paths_lib.Evaluator(run.model, run.config, run.tokenizer, sharding.make_mesh(config_lib.Mesh()))

  def __call__(self, prompts: list[list[int]], texts: list[list[int]]) -> tuple[float, float]:
    """The mean over all tokens, and its standard error over texts."""
    L = self._run.config.model.context
    rows = np.zeros((len(texts), L + 1), np.int32)
    for row, prompt, text in zip(rows, prompts, texts):
      row[1 : len(prompt) + len(text) + 1] = prompt + text
    with jax.set_mesh(self._evaluator.mesh):
      nats, _ = self._evaluator.token_nll(self._run.params, self._run.statistics, Batch(rows), "ar")
    each = np.array([n[len(p) : len(p) + len(t)].sum() for n, p, t in zip(nats, prompts, texts)]) / np.log(2.0)
    return paths_lib.ratio(each, np.array([len(t) for t in texts]))


def main() -> None:
  args = flags.FLAGS
  run = run_lib.load_run(args.workdir)
  judges = {"bits_own": Judge(run)}
  others = {flag: run_lib.load_run(getattr(args, flag)) for flag in ("judge", "masked") if getattr(args, flag)}
  for flag, other in others.items():
    if other.tokenizer.identity != run.tokenizer.identity or other.config.model.context != run.config.model.context:
      raise UserError(f"--{flag}={getattr(args, flag)}: has another tokenizer or context than {args.workdir}")
  if "judge" in others:
    judges["bits_judge"] = Judge(others["judge"])
  try:
    batches = [int(b) for b in args.batches.split(",")]
  except ValueError:
    raise UserError(f"--batches={args.batches}: is no list of numbers, as 1,8,64") from None
  L = run.config.model.context
  if not 0 < args.tokens < L:
    raise UserError(f"--tokens={args.tokens}: is not in 1..{L - 1}, inside the model's context")
  corpora = corpora_lib.load_corpora(args.data or run.config.data.path, run.tokenizer)
  held = batches_lib.held_out(corpora, "valid", L, args.texts).tokens
  prompts = [row[1 : L - args.tokens + 1].tolist() for row in held]
  true = [row[L - args.tokens + 1 :].tolist() for row in held]
  measure = lambda prompts, texts: {
    **{name: dict(zip(("mean", "stderr"), judge(prompts, texts))) for name, judge in judges.items()},
    "distinct_2": distinct(texts, 2),
    "distinct_4": distinct(texts, 4),
    "entropy": token_entropy(texts),
  }
  results = [{"setting": "held-out text", "batch": 0, **measure(prompts, true)}]
  print(
    f"{'setting':<24}{'batch':>6}{'tokens/s':>10}{'passes/token':>14}{'bits own':>10}{'judge':>8}"
    f"{'distinct-2':>12}{'-4':>7}{'entropy':>9}{'MB':>7}"
  )
  show(results[0])
  modes = SETTINGS | (MASKED if "masked" in others else {})
  for name in common.chosen(args.only, modes):
    sampling = settings.Sampling(**modes[name], max_tokens=args.tokens, endless=True, batch_size=max(batches))
    for batch in batches if name in SPEED else [max(batches)]:
      sampler = sampler_lib.Sampler(
        others["masked"] if name in MASKED else run, dataclasses.replace(sampling, batch_size=batch)
      )
      texts = [run.tokenizer.decode(np.array(p)) for p in prompts]
      sampler(texts[:batch])  # compiles
      many = texts if batch == max(batches) else texts[: max(batch, args.repeats)]
      found = sampler(many, seed=1)
      seconds = sum(max(g.seconds for g in found[i : i + batch]) for i in range(0, len(found), batch))
      entry = {
        "setting": name,
        "batch": batch,
        "tokens_per_second": sum(len(g.tokens) for g in found) / seconds,
        "passes_per_token": sum(g.passes for g in found) / sum(len(g.tokens) for g in found),
        "compile_seconds": sampler.compile_seconds,
        "peak_megabytes": peak_megabytes(),
      }
      if batch == max(batches):
        entry |= measure(prompts, [g.tokens for g in found])
      results.append(entry)
      show(entry)
  folder = Path(args.output) if args.output else common.RESULTS
  common.write_result("decode_speed", results, folder)
  draw(results, max(batches), folder / "decode_speed.png")


def peak_megabytes() -> float:
  """Of the accelerator where it says, else of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20


def show(entry: dict) -> None:
  get = lambda name: entry.get(name, {}).get("mean", float("nan"))
  number = lambda name: entry.get(name, float("nan"))
  print(
    f"{entry['setting']:<24}{entry['batch']:>6}{number('tokens_per_second'):>10.0f}"
    f"{number('passes_per_token'):>14.3f}{get('bits_own'):>10.3f}{get('bits_judge'):>8.3f}"
    f"{number('distinct_2'):>12.3f}{number('distinct_4'):>7.3f}{number('entropy'):>9.3f}"
    f"{number('peak_megabytes'):>7.0f}",
    flush=True,
  )


def draw(results: list[dict], batch: int, file: Path) -> None:
  """The judge's bits, and beside them the speed, against passes a token."""
  judged = "bits_judge" if "bits_judge" in results[0] else "bits_own"
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
  for family, color in zip(
    FAMILIES + ("ar", "verify"), ("tab:blue", "tab:purple", "tab:green", "tab:orange", "tab:brown", "black", "tab:red")
  ):
    rows = sorted(
      (
        r
        for r in results[1:]
        if r["setting"].startswith(family) and r["batch"] == batch and not r["setting"].endswith("greedy")
      ),
      key=lambda r: r["passes_per_token"],
    )
    if rows:
      x = [r["passes_per_token"] for r in rows]
      left.errorbar(
        x,
        [r[judged]["mean"] for r in rows],
        [r[judged]["stderr"] for r in rows],
        fmt="o-",
        ms=4,
        color=color,
        label=family,
      )
      right.plot(x, [r["tokens_per_second"] for r in rows], "o-", ms=4, color=color, label=family)
  left.axhline(results[0][judged]["mean"], color="gray", lw=1, ls=":", label="held-out text")
  left.set_ylabel("bits a token by an AR judge" if judged == "bits_judge" else "bits a token by the own AR path")
  right.set_ylabel(f"tokens a second, batch {batch}")
  right.set_yscale("log")
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xlabel("passes a token")
    axes.grid(alpha=0.3)
  left.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(file, dpi=130)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("judge", "", "An AR model's, on the same text.")
  flags.DEFINE_string("masked", "", "A masked diffusion model's, on the same text.")
  flags.DEFINE_string("data", "", "Text for prompts; default: the run's.")
  flags.DEFINE_string("batches", "1,8,64", "Batch sizes; the largest one's texts are judged.")
  flags.DEFINE_integer("tokens", 192, "Tokens of each text.")
  flags.DEFINE_integer("texts", 64, "Texts that are judged.")
  flags.DEFINE_integer("repeats", 2, "Texts that are timed where the batch is smaller.")
  flags.DEFINE_string("only", "", "Comma-separated settings; default: all.")
  flags.DEFINE_string("output", "", "Folder for the JSON and the picture; default: experiments/results.")
  cli.run(main)
