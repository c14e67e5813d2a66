"""How often decoding modes that should agree do, in float32 and in bfloat16.

  python -m experiments.precision --workdir=runs/tiny [--texts=256]

Greedy `verify` and greedy `adaptive --threshold=0` choose the tokens of greedy `ar`, and `adaptive --threshold=0` draws
those of `ar`, if a token's logits do not depend on how many slots a pass reads. They do by rounding: matrix products of
other shapes add up in another order. Prints for each dtype of computation and each pair how many texts are equal, and
over the first differences the gap between the two best logits, beside its median over all tokens of the texts. Each
text follows a piece of held-out text and fills the context.
"""

import dataclasses

from absl import flags
import jax
import jax.numpy as jnp
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
  "verify, greedy": (dict(mode="ar", greedy=True), dict(mode="verify", greedy=True)),
  "adaptive 0, greedy": (dict(mode="ar", greedy=True), dict(mode="adaptive", threshold=0.0, greedy=True)),
  "adaptive 0": (dict(mode="ar"), dict(mode="adaptive", threshold=0.0)),
}


def with_dtype(run: run_lib.Run, dtype: str) -> run_lib.Run:
  """The same parameters, computed with in another dtype."""
  model = dataclasses.replace(run.config.model, dtype=dtype)
  return dataclasses.replace(
    run, config=dataclasses.replace(run.config, model=model), model=run.model.clone(config=model)
  )


def logit_gaps(run: run_lib.Run, texts: list[list[int]]) -> np.ndarray:
  """(N, T) nats: how far apart the two best logits were for each token of N texts of T tokens, prompts included."""
  tokens = np.pad(np.array(texts), [(0, 0), (1, 0)], constant_values=run.tokenizer.begin_id)[:, :-1]

  @jax.jit
  def gaps(params, tokens):
    best = jax.lax.top_k(run.model.apply({"params": params}, tokens), 2)[0]
    return best[..., 0] - best[..., 1]

  return np.concatenate([gaps(run.params, jnp.asarray(part)) for part in np.split(tokens, range(32, len(tokens), 32))])


def compare(
  run: run_lib.Run, prompts: list[list[int]], reference: list[Generation], found: list[Generation]
) -> dict[str, float]:
  """How many texts are equal, and how close the two best logits of the reference are where texts first differ."""
  texts = [prompt + text.tokens for prompt, text in zip(prompts, reference)]
  gaps = logit_gaps(run, texts)
  first = []  # differences: the gap there
  for row, (prompt, a, b) in enumerate(zip(prompts, reference, found)):
    index = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
    if index is not None:
      first.append(float(gaps[row, len(prompt) + index]))
  return {
    "texts": len(texts),
    "equal": len(texts) - len(first),
    "tokens_per_text": len(reference[0].tokens),
    "median_gap": float(np.median(gaps)),
    "gap_at_differences_median": float(np.median(first)) if first else float("nan"),
    "gap_at_differences_most": max(first, default=float("nan")),
  }


def main() -> None:
  args = flags.FLAGS
  if args.texts < 1:
    raise UserError(f"--texts={args.texts}: is not positive")
  own = run_lib.load_run(args.workdir)
  context = own.config.model.context
  prompts, _ = held_out_texts(own, args.data, context - args.prompt_tokens, args.texts)
  results = []
  print(f"{'dtype':<10}{'pair':<20}{'equal':>12}{'gap, all':>10}{'where they differ':>19}{'at most':>9}")
  for dtype in ("float32", "bfloat16"):
    run, texts = with_dtype(own, dtype), {}
    fields = dict(max_tokens=context - args.prompt_tokens, endless=True)
    for name, pair in PAIRS.items():
      for settings in pair:
        key = str(settings)
        if key not in texts:
          decoded = [run.tokenizer.decode(np.array(prompt)) for prompt in prompts]
          texts[key] = Sampler(run, Sampling(**settings, **fields))(decoded)
      entry = compare(run, prompts, *(texts[str(settings)] for settings in pair))
      results.append({"dtype": dtype, "pair": name} | entry)
      print(
        f"{dtype:<10}{name:<20}{entry['equal']:>6}/{entry['texts']:<5}{entry['median_gap']:>10.3f}"
        f"{entry['gap_at_differences_median']:>19.5f}{entry['gap_at_differences_most']:>9.5f}",
        flush=True,
      )
  if args.output:
    common.write_result("precision", results, common.Path(args.output))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_string("data", "", "Text for prompts; default: the run's.")
  flags.DEFINE_integer("texts", 256, "Number of texts.")
  flags.DEFINE_integer("prompt_tokens", 8, "Tokens of each prompt.")
  flags.DEFINE_string("output", "", "Folder for precision.json; default: none is written.")
  cli.run(main)
