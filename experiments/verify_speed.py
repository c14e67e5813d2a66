"""Mode `verify` by kind of text: drafted tokens accepted, tokens per pass, and tokens per second beside transformers.

  pip install -e '.[hf,pretrained]'
  python -m evo_jax.convert --source=MODEL.gguf --workdir=DIR
  python -m experiments.verify_speed --source=MODEL.gguf --workdir=DIR --kind=instructions:talk.jsonl
      --kind=code:tasks.jsonl:prompt:'Complete this function.' --kind=web:pages.jsonl:text:'Continue this text.'

A kind of text is NAME:FILE[:FIELD[:INSTRUCTION]], a .jsonl file, of which every --every-th line, from the first on, is
held out: train windows on the others. FIELD is `messages` (the default: what is asked is the first message) or a field
with text, whose beginning is asked behind the instruction. All under the chat template, until the model ends the text.
At each temperature (0 is greedy):

  passes  with --draft tokens a round and windows for every outcome: accepted a round, tokens a pass; by windows alone,
          with drafts from the text, and, above temperature 0, by rejection instead of shared noise
  speed   batch 1, in turns, on the same weights in float32: `ar`, `verify` as it adapts itself, and transformers'
          `generate` without and with prompt_lookup_num_tokens; seconds without compilation

All texts are sampled, none is teacher-forced. Without --source transformers is left out. A temperature that the JSON of
the results holds is not measured again.
"""

import json
import time
from typing import Any

from absl import flags
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.decoding.progress import Generation
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from experiments import common
from experiments.pretrained import load_reference

PASSES = {
  "windows": dict(draft_from="windows"),
  "windows and text": dict(draft_from="both"),
  "windows, rejection": dict(draft_from="windows", coupling="rejection"),
}
SPEED = {"ar": dict(mode="ar"), "verify": dict(mode="verify")}
REFERENCE = {"transformers": {}, "transformers, prompt lookup": dict(prompt_lookup_num_tokens=10)}
_CHARACTERS = 500  # of a text that is asked


def read_kind(spec: str, every: int, count: int) -> tuple[str, list[str]]:
  """The name of a kind of text, and `count` of its held-out prompts, evenly spaced; see above. Raises UserError."""
  name, path, field, instruction = (spec.split(":", 3) + ["", "", ""])[:4]
  if not name or not path:
    raise UserError(f"--kind={spec}: is not NAME:FILE[:FIELD[:INSTRUCTION]]")
  try:
    rows = [json.loads(line) for line in common.read_lines(path)[::every]]
    if field in ("", "messages"):
      prompts = [row["messages"][0]["content"] for row in rows]
    else:
      prompts = [f"{instruction}\n\n{row[field][:_CHARACTERS]}".strip() for row in rows]
  except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
    raise UserError(f"--kind={spec}: {type(error).__name__}: {error}") from error
  if len(prompts) < count:
    raise UserError(f"--kind={spec}: has {len(prompts)} held-out texts, fewer than {count}")
  return name, [prompts[i] for i in np.linspace(0, len(prompts) - 1, count).round().astype(int)]


def sampling(temperature: float, tokens: int, **fields: Any) -> Sampling:
  """Sampling parameters at a temperature, of which 0 is greedy."""
  return Sampling(max_tokens=tokens, greedy=not temperature, temperature=temperature or 1.0, **fields)


def measure_passes(
  run: run_lib.Run, kinds: dict[str, list[str]], temperature: float, args: flags.FlagValues
) -> list[dict[str, Any]]:
  """What drafts of --draft tokens give, by kind and by what drafts."""
  rows = []
  for setting, fields in PASSES.items():
    if not temperature and "coupling" in fields:
      continue
    shape = sampling(temperature, args.tokens, mode="verify", draft=args.draft, batch_size=args.batch, **fields)
    rows += count_by_kind(run, kinds, temperature, setting, shape, args.seed)
  return rows


def count_by_kind(
  run: run_lib.Run, kinds: dict[str, list[str]], temperature: float, setting: str, shape: Sampling, seed: int
) -> list[dict[str, Any]]:
  """Writes a text for each prompt; a row of `count` for each kind."""
  sampler, rows = Sampler(run, shape), []
  for kind, prompts in kinds.items():
    row = {"kind": kind, "temperature": temperature, "setting": setting, **count(sampler(prompts, seed=seed))}
    print(
      f"{kind:<16}{temperature:>5g}  {setting:<28}{row['accepted_per_round']:>7.2f} accepted a round"
      f"{row['tokens_per_pass']:>7.2f} tokens a pass",
      flush=True,
    )
    rows.append(row)
  return rows


def count(generations: list[Generation]) -> dict[str, Any]:
  """Counts of texts; of mode verify also of its rounds."""
  total = lambda name: sum(getattr(g, name) for g in generations)
  tokens = sum(len(g.tokens) for g in generations)
  result = {"texts": len(generations), "tokens": tokens, "tokens_per_pass": tokens / total("passes")}
  if generations[0].rounds is None:
    return result
  rounds = total("rounds")
  return result | {
    "accepted_per_round": total("accepted") / rounds,
    "rounds_without_draft": 1.0 - total("drafted_rounds") / rounds,
  }


class Reference:
  """transformers' `generate` on the same prompts."""

  def __init__(self, source: str, run: run_lib.Run, tokens: int):
    self._model, self._tokenizer, self._tokens = load_reference(source), run.tokenizer, tokens

  def __call__(self, prompt: str, temperature: float, seed: int, **fields: Any) -> tuple[int, float]:
    """Tokens that were written, without the one that ends the text, and seconds."""
    torch, _ = common.transformers()
    torch.manual_seed(seed)
    ids = torch.tensor([[self._tokenizer.begin_id, *self._tokenizer.encode(prompt).tolist()]])
    if temperature:
      fields = fields | dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    else:
      fields = fields | dict(do_sample=False)
    began = time.perf_counter()
    with torch.inference_mode():
      written = self._model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=self._tokens,
        eos_token_id=list(self._tokenizer.end_ids),
        pad_token_id=self._tokenizer.end_ids[0],
        **fields,
      )[0, ids.shape[1] :].tolist()
    seconds = time.perf_counter() - began
    return next((i for i, token in enumerate(written) if token in self._tokenizer.end_ids), len(written)), seconds


def measure_speed(
  run: run_lib.Run, reference: Reference | None, kinds: dict[str, list[str]], temperature: float, args: flags.FlagValues
) -> list[dict[str, Any]]:
  """Tokens per second at batch 1, by kind, in turns. To warm up, this project's modes write all texts of the kind
  before, since prompts of other lengths are other programs, and transformers the first."""
  shape = lambda fields: sampling(temperature, args.tokens, batch_size=1, **fields)
  samplers = {name: Sampler(run, shape(fields)) for name, fields in SPEED.items()}
  rows = []
  for kind, prompts in kinds.items():
    written = {name: [] for name in SPEED}
    timed = {name: [] for name in (*SPEED, *(REFERENCE if reference else ()))}  # (tokens, seconds) of each text
    for prompt in prompts:
      for sampler in samplers.values():
        sampler([prompt], seed=args.seed)
    for name in REFERENCE if reference else ():
      reference(prompts[0], temperature, args.seed, **REFERENCE[name])
    for i, prompt in enumerate(prompts):
      for name in timed:
        if name in SPEED:
          generation = samplers[name]([prompt], seed=args.seed)[0]
          written[name].append(generation)
          timed[name].append((len(generation.tokens), generation.seconds))
        else:
          timed[name].append(reference(prompt, temperature, args.seed + i, **REFERENCE[name]))
    rate = {name: sum(t for t, _ in texts) / sum(s for _, s in texts) for name, texts in timed.items()}
    equal = sum(a.tokens == b.tokens for a, b in zip(written["ar"], written["verify"]))
    row = {"kind": kind, "temperature": temperature, "tokens_per_second": rate, "equal_texts": equal}
    row |= {"verify": count(written["verify"]), "texts": timed}
    rates = ", ".join(f"{name} {value:.1f}" for name, value in rate.items())
    print(f"{kind:<16}{temperature:>5g}  tokens per second: {rates}; {equal} of {len(prompts)} texts equal", flush=True)
    rows.append(row)
  return rows


def main() -> None:
  args = flags.FLAGS
  for name in ("workdir", "kind"):
    if not args[name].value:
      raise UserError(f"--{name} is needed")
  kinds = dict(read_kind(spec, args.every, args.texts) for spec in args.kind)
  try:
    temperatures = [float(t) for t in args.temperatures.split(",")]
  except ValueError:
    raise UserError(f"--temperatures={args.temperatures}: is not a list of numbers, as 0,0.7,1") from None
  names = ("every", "texts", "tokens", "draft", "batch", "seed")
  recorded = common.RecordedRuns(
    "verify_speed",
    common.results_folder(args.output),
    {name: args[name].value for name in names}
    | {"kinds": [common.shortened(kind) for kind in args.kind], "model": common.model_identity(args.workdir)},
  )
  run = run_lib.load_run(args.workdir).in_conversation()
  reference = Reference(args.source, run, args.tokens) if args.source else None
  for temperature in temperatures:
    if not recorded.find(temperature=temperature):
      passes = measure_passes(run, kinds, temperature, args)
      speed = measure_speed(run, reference, kinds, temperature, args)
      recorded.add({"temperature": temperature, "passes": passes, "speed": speed})
    else:
      print(f"temperature {temperature:g}: is measured already", flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("source", "", "The model's GGUF file, for transformers; default: without it.")
  flags.DEFINE_string("workdir", "", "The model's work directory.")
  flags.DEFINE_multi_string("kind", [], "NAME:FILE[:FIELD[:INSTRUCTION]], see above; may be given several times.")
  flags.DEFINE_integer("every", 10, "Every so many lines of a file are held out.", lower_bound=1)
  flags.DEFINE_integer("texts", 16, "Texts of each kind.", lower_bound=1)
  flags.DEFINE_integer("tokens", 200, "Tokens of a text at most.", lower_bound=1)
  flags.DEFINE_integer("draft", 8, "Drafted tokens a round, where passes are counted.", lower_bound=1)
  flags.DEFINE_integer("batch", 16, "Texts at once, where passes are counted.", lower_bound=1)
  flags.DEFINE_string("temperatures", "0,0.7,1", "Temperatures; 0 is greedy.")
  flags.DEFINE_integer("seed", 0, "Seed of all draws.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)
