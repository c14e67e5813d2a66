"""How often decoding modes, and batches, that should agree do, in float32 and in bfloat16.

  python -m experiments.precision --workdir=runs/tiny [--texts=256]

Greedy `verify` and greedy `adaptive --threshold=0` choose the tokens of greedy `ar`, `adaptive --threshold=0` draws
those of `ar`, and a text is the same in any batch, if a token's logits do not depend on how many slots and rows a pass
reads. By rounding they do: matrix products of other shapes add up in another order. Prints for each dtype of
computation and each pair how many texts are equal, and the gap in nats between the two best logits: its median over all
tokens, and its median and maximum over the tokens at which two texts first differ. Each text follows a piece of
held-out text and fills the context.
"""

import dataclasses
import functools
import math
from pathlib import Path

from absl import flags
import jax
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.decoding.progress import Generation
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from experiments import common
from experiments.decode_speed import held_out_texts

# Name: (the reference, the mode that is compared with it).
PAIRS = {
  "verify, greedy": (dict(mode="ar", greedy=True), dict(mode="verify", greedy=True, draft=4)),
  "adaptive 0, greedy": (dict(mode="ar", greedy=True), dict(mode="adaptive", threshold=0.0, greedy=True)),
  "adaptive 0, drawn": (dict(mode="ar"), dict(mode="adaptive", threshold=0.0)),
  "one by one, greedy": (dict(mode="ar", greedy=True), dict(mode="ar", greedy=True, batch_size=1)),
  "one by one, drawn": (dict(mode="ar"), dict(mode="ar", batch_size=1)),
}


def with_dtype(run: run_lib.Run, dtype: str) -> run_lib.Run:
  """The same parameters, computed with in another dtype."""
  model = dataclasses.replace(run.config.model, dtype=dtype)
  return dataclasses.replace(
    run, config=dataclasses.replace(run.config, model=model), model=run.model.clone(config=model)
  )


def held_out_prompts(run: run_lib.Run, data: str, tokens: int, count: int) -> list[str]:
  """Pieces of held-out text of `tokens` tokens, which are all of one document. Raises UserError."""
  prompts, _ = held_out_texts(run, data, run.config.model.context - tokens, count)
  texts = [run.tokenizer.decode(np.array(prompt)) for prompt in prompts]
  texts = [text for text in texts if len(run.tokenizer.encode(text)) == tokens]
  if not texts:
    raise UserError(f"--prompt_tokens={tokens}: no held-out piece has so many tokens of a single document")
  return texts


def logit_gaps(run: run_lib.Run, texts: list[list[int]]) -> np.ndarray:
  """(N, T) nats: how far apart the two best logits were for each token of N texts of T tokens, prompts included."""
  tokens = np.pad(np.array(texts), [(0, 0), (1, 0)], constant_values=run.tokenizer.begin_id)[:, :-1]

  @jax.jit
  def gaps(params, tokens):
    best = jax.lax.top_k(run.model.apply({"params": params}, tokens), 2)[0]
    return best[..., 0] - best[..., 1]

  return np.concatenate([gaps(run.params, part) for part in np.split(tokens, range(32, len(tokens), 32))])


def compare(run: run_lib.Run, reference: list[Generation], found: list[Generation]) -> dict[str, float]:
  """How many texts are equal, and how close the two best logits of the reference are where texts first differ."""
  prompts = [run.tokenizer.encode(text.prompt).tolist() for text in reference]
  whole = [prompt + text.tokens for prompt, text in zip(prompts, reference)]
  length = min(map(len, whole))  # texts that end in half a character are shorter
  gaps = logit_gaps(run, [text[:length] for text in whole])
  at_first = []
  for prompt, row, a, b in zip(prompts, gaps, reference, found):
    index = next((len(prompt) + i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
    if index is not None and index < length:
      at_first.append(float(row[index]))
  return {
    "texts": len(whole),
    "equal": len(whole) - len(at_first),
    "tokens_per_text": length - len(prompts[0]),
    "gap_median": float(np.median(gaps)),
    "gap_at_differences_median": float(np.median(at_first)) if at_first else None,
    "gap_at_differences_most": max(at_first, default=None),
  }


def main() -> None:
  args = flags.FLAGS
  if args.texts < 1:
    raise UserError(f"--texts={args.texts}: is not positive")
  own = run_lib.load_run(args.workdir)
  prompts, results = held_out_prompts(own, args.data, args.prompt_tokens, args.texts), []
  print(f"{'dtype':<10}{'compared with ar':<20}{'equal':>12}{'gap, median':>13}{'at differences':>16}{'most':>9}")
  for dtype in ("float32", "bfloat16"):
    run = with_dtype(own, dtype)
    write = functools.cache(lambda items, run=run: Sampler(run, Sampling(**dict(items), endless=True))(prompts))
    for name, pair in PAIRS.items():
      entry = compare(run, *(write(tuple(settings.items())) for settings in pair))
      results.append({"dtype": dtype, "pair": name} | entry)
      at_differences = [entry[f"gap_at_differences_{what}"] or math.nan for what in ("median", "most")]
      print(
        f"{dtype:<10}{name:<20}{entry['equal']:>6}/{entry['texts']:<5}{entry['gap_median']:>13.3f}"
        f"{at_differences[0]:>16.5f}{at_differences[1]:>9.5f}",
        flush=True,
      )
  if args.output:
    common.write_result("precision", results, Path(args.output))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("data", "", "Text for prompts; default: the run's.")
  flags.DEFINE_integer("texts", 256, "Number of texts.")
  flags.DEFINE_integer("prompt_tokens", 8, "Tokens of each prompt.")
  flags.DEFINE_string("output", "", "Folder for precision.json; default: none is written.")
  cli.run(main)
