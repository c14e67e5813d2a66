"""How often tokens that a text's own repetitions draft (prompt lookup) are accepted, by the length of the match.

  python -m evo_jax.generate --workdir=DIR --chat --greedy --prompts=chats.jsonl --output=own
  python -m experiments.lookup_acceptance --workdir=DIR --kind='greedy:own/*.jsonl' --kind='web:pages.jsonl:text'

A kind of text is NAME:FILES[:FIELD], .jsonl files of `generate --output`, whose tokens behind the prompt are drafted,
or of texts in FIELD, of which all tokens but the first --given are. No model runs: mode `verify` writes the text that
`ar` writes with the seed, so that what drafts are worth can be read off a text that is written already. For each
position the draft is `evo_jax.decoding.lookup`'s. Printed are, by the length n of the match, the share of positions,
how often the first, second, ... token is accepted where those before it are, and the accepted tokens of a draft of
--draft. `PRIORS` in evo_jax/decoding/speculative.py come from here.
"""

import glob
import json
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.decoding import lookup
from evo_jax.decoding.state import MATCH
from evo_jax.errors import UserError
from experiments import common

_MULTIPLE = 128  # to which numbers of tokens are rounded up: each is compiled once
_MOST_TOKENS = 512  # of a text


def read_texts(spec: str, tokenizer: Any, given: int, most: int) -> tuple[str, list[tuple[np.ndarray, int]]]:
  """The name of a kind of text, and tokens (n,) of up to `most` texts, evenly spaced, each with the number of those
  that are given. Raises UserError."""
  name, files, field = (spec.split(":", 2) + ["", ""])[:3]
  try:
    lines = [line for file in sorted(glob.glob(files)) for line in common.read_lines(file)]
    chosen = np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int)
    rows = [json.loads(lines[i]) for i in chosen]
    if field:
      texts = [(tokenizer.encode(row[field])[:_MOST_TOKENS], given) for row in rows]
    else:
      texts = [(np.array(row["tokens"][:_MOST_TOKENS]), row["prompt_tokens"]) for row in rows]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"--kind={spec}: {type(error).__name__}: {error}") from error
  texts = [(tokens, first) for tokens, first in texts if 0 < first < len(tokens)]
  if not texts:
    raise UserError(f"--kind={spec}: has no text with tokens behind what is given")
  return name, texts


def count(tokens: np.ndarray, first: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Counts over the positions of a text from `first` on, by the length of the match: how often each token of a draft is
  offered, and accepted (1 + MATCH, size), and the positions (1 + MATCH,)."""
  position = np.arange(first, len(tokens))
  up = lambda n: -(-n // _MULTIPLE) * _MULTIPLE
  row = np.pad(tokens, (0, up(len(tokens)) - len(tokens))).astype(np.int32)
  length = np.pad(position, (0, up(len(position)) - len(position)), constant_values=1)
  draft, match = (np.asarray(a)[: len(position)] for a in _continuations(row, length, size))
  behind = position[:, None] + np.arange(size)
  truth = np.where(behind < len(tokens), tokens[np.minimum(behind, len(tokens) - 1)], -1)
  accepted = np.cumprod(draft == truth, axis=1).astype(bool)
  offered = np.pad(accepted[:, :-1], [(0, 0), (1, 0)], constant_values=True) & (truth >= 0)
  by_match = [match == n for n in range(1 + MATCH)]
  total = lambda values: np.array([values[rows].sum(axis=0) for rows in by_match])
  return total(offered), total(accepted), total(np.ones(len(position), int))


@jax.jit(static_argnums=2)
def _continuations(tokens: jax.Array, length: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  return lookup.continuation(jnp.broadcast_to(tokens, (len(length), len(tokens))), length, size)


def main() -> None:
  args = flags.FLAGS
  for name in ("workdir", "kind"):
    if not args[name].value:
      raise UserError(f"--{name} is needed")
  tokenizer = run_lib.load_tokenizer(args.workdir)
  kinds = dict(read_texts(spec, tokenizer, args.given, args.texts) for spec in args.kind)
  result = []
  for kind, texts in kinds.items():
    offered, accepted, matched = (sum(a) for a in zip(*(count(*text, args.draft) for text in texts)))
    print(f"{kind}: {len(texts)} texts; of {matched.sum()} positions {matched[0] / matched.sum():.0%} have no match")
    for n in range(1, 1 + MATCH):
      rate = accepted[n] / np.maximum(offered[n], 1)
      expected = float(np.cumprod(rate).sum())
      rates = " ".join(f"{value:.2f}" for value in rate)
      print(f"  match {n}: {matched[n] / matched.sum():>4.0%}, accepted {rates}; {expected:.2f} tokens")
      share = float(matched[n] / matched.sum())
      row = {"kind": kind, "texts": len(texts), "match": n, "share": share, "expected": expected}
      result.append(row | {"accepted": rate.round(4).tolist(), "offered": offered[n].tolist()})
  common.write_result("lookup_acceptance", result, common.results_folder(args.output))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "The model's work directory, for its tokenizer.")
  flags.DEFINE_multi_string("kind", [], "NAME:FILES[:FIELD], see above; may be given several times.")
  flags.DEFINE_integer("given", 64, "Tokens of a text in FIELD that are given.", lower_bound=1)
  flags.DEFINE_integer("texts", 300, "Texts of each kind at most.", lower_bound=1)
  flags.DEFINE_integer("draft", 8, "Drafted tokens.", lower_bound=1)
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)
