"""Generates text with a trained model.

  python -m evo_jax.generate --workdir=DIR --prompt=TEXT [--prompt=TEXT ...] --mode=ar|flow|adaptive|verify [--num=N]
  python -m evo_jax.generate --workdir=DIR --infill='It was [...] in the morning.' --mode=adaptive
  python -m evo_jax.generate --workdir=DIR --chat --prompt='What is a river?' [--system='Be brief.']
  python -m evo_jax.generate --workdir=DIR --chat --prompts=questions.jsonl --output=gs://BUCKET/answers

  ar        one token per pass
  flow      windows of tokens, in --steps passes each, along any path (--path)
  adaptive  a sliding window: tokens that are certain, or far enough from others that jump in the same pass, jump ahead;
            --threshold, in bits with the default path, goes from 0 (autoregression) to one pass for all
  verify    ar's texts in fewer passes and less time: windows, or the text's own repetitions, draft tokens, and the next
            pass verifies them. How many, and by what, follows from the speeds measured on this machine; --draft=T
            drafts T tokens in every round, and windows follow all outcomes, for most tokens per pass

In float32 adaptive with --threshold=0, and verify, give the tokens that ar gives with the seed (verify with
--coupling=rejection: tokens of the same distribution); in bfloat16 rounding, which depends on how many tokens a pass
reads, decides between nearly equal ones (experiments/README.md).

--output writes texts for any number of prompts into a folder, local or gs://, of .jsonl files that training reads
(--config.data.path='OUTPUT/*.jsonl'); started again, the command goes on (`evo_jax.decoding.bulk`).

A text ends where the model ends the document, before a --stop string, or after --max_tokens tokens: 200, or what the
context leaves. In --infill a --stop string ends what is written into a gap; what is given is kept. Prompts and texts
are UTF-8; a model of bytes also takes arguments and lines that are not. From Python: `evo_jax.decoding.sampler`.
"""

from collections.abc import Iterator
import dataclasses
import json
import os
import sys
import time
from typing import Any

from absl import flags
import jax

from evo_jax import cli, functions
from evo_jax.data import chat
from evo_jax.decoding import bulk
from evo_jax.decoding.progress import Generation
from evo_jax.decoding.prompt_files import iterate_prompts, read_prompt_files
from evo_jax.decoding.prompts import Prompt, readable
from evo_jax.decoding.sampler import OnText, Sampler
from evo_jax.decoding.settings import COUPLINGS, DEFAULT_PATH, DEFAULT_TOKENS, DRAFT_SOURCES, MODES, Sampling
from evo_jax.decoding.trace import check_trace_file, write_trace
from evo_jax.errors import UserError, check_seed
from evo_jax.run import Run, load_run

_MOST_TEXTS = 1_000_000


def main() -> None:
  args = flags.FLAGS
  sampling = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
  sampling = dataclasses.replace(sampling, stop=tuple(sampling.stop))
  _check_flags(args, sampling)
  prompts = [] if args.output else _prompts(args)
  if args.trace:
    check_trace_file(args.trace)
  cli.join_processes()
  mesh = cli.make_mesh()
  if jax.process_count() > 1 and "-" in args.prompts:
    raise UserError("--prompts=-: several processes share no standard input; give a file that all of them see")
  if args.output:
    bulk.check_output(args.output)
  run = load_run(args.workdir, args.step, mesh)
  if args.chat:
    try:
      run = run.in_conversation(args.system, chat.DATE if args.output else None)
    except UserError as error:
      raise UserError(f"--chat: {error}") from error
  if args.output:
    _write_texts(args, run, sampling)
  else:
    _print_texts(args, Sampler(run, sampling), prompts)


def _print_texts(args: flags.FlagValues, sampler: Sampler, prompts: list[Prompt]) -> None:
  writes = jax.process_index() == 0
  streams = writes and len(prompts) * args.num == 1 and not args.json and not args.infill
  shown = lambda prompt: "" if args.infill or args.chat else readable(prompt)
  on_text = _stream(shown(prompts[0])) if streams else None  # prints the prompt, too, once it has been accepted
  traces = [] if args.trace else None
  generations = sampler(prompts, args.num, args.seed, bool(args.infill), on_text, traces)
  if not writes:
    return
  if streams:
    print("" if generations[0].text else shown(prompts[0]))
  elif args.json:
    print(json.dumps([_to_json(generation) for generation in generations], indent=2))
  else:
    for i, generation in enumerate(generations):
      print(("-" * 20 + "\n" if i else "") + shown(generation.prompt) + generation.text)
  sys.stdout.flush()
  if traces:
    write_trace(traces[0], args.trace)
  print(_summary(generations, sampler.compile_seconds), file=sys.stderr)


def _write_texts(args: flags.FlagValues, run: Run, sampling: Sampling) -> None:
  """Writes texts into the folder --output."""
  depends = {name: value for name, value in dataclasses.asdict(sampling).items() if name != "batch_size"}
  depends |= {"chat": args.chat, "system": args.system}
  if functions.is_own(args.path):
    depends["path_file"] = functions.digest(args.path)
  writes, started = jax.process_index() == 0, time.monotonic()
  progress = _Progress() if writes else lambda totals, written: None
  prompts = lambda: _located_prompts(args)
  try:
    totals = bulk.write_texts(run, sampling, prompts, args.num, args.seed, args.output, depends, progress)
  except KeyboardInterrupt as error:
    raise UserError("interrupted; what is done is kept, and the same command goes on") from error
  if not writes:
    return
  path = f"{args.output.rstrip('/')}/*.jsonl"
  print(f"{args.output}: has all {totals.texts:,} texts; train with --config.data.path='{path}'")
  if totals.passes:
    seconds = time.monotonic() - started
    print(
      f"{totals.tokens:,} tokens in {totals.passes:,} passes ({totals.tokens / totals.passes:.2f} per pass), "
      f"{seconds:,.0f} s, {totals.tokens / seconds:,.1f} tokens per second",
      file=sys.stderr,
    )


class _Progress:
  """Says how far a long command is: in a terminal in one line that is replaced, else in a line a minute."""

  def __init__(self):
    self._started = self._said = time.monotonic()
    self._terminal = sys.stderr.isatty()
    self._written = 0

  def __call__(self, totals: bulk.Totals, written: int) -> None:
    """written: texts of the batch that is done."""
    self._written += written
    now, left = time.monotonic(), totals.texts - totals.done
    if left and now - self._said < (1 if self._terminal else 60):
      return
    self._said, seconds = now, now - self._started
    line = (
      f"evo_jax: {totals.done:,} of {totals.texts:,} texts, {totals.tokens / seconds:,.1f} tokens per second, "
      f"{left * seconds / self._written / 60:,.0f} minutes left"
    )
    print(line, end="\r" if self._terminal and left else "\n", file=sys.stderr, flush=True)


def _located_prompts(args: flags.FlagValues) -> Iterator[tuple[str, Prompt]]:
  """The prompts, and for messages where they stand."""
  for prompt in args.prompt or ([] if args.prompts else [""]):
    yield "--prompt", prompt
  for name in args.prompts:
    yield from iterate_prompts(name, args.chat)


def _stream(prompt: str) -> OnText:
  """What prints a text as it comes, with the prompt before its first piece."""
  printed = []

  def on_text(_, piece):
    print("" if printed else prompt, piece, sep="", end="", flush=True)
    printed.append(piece)

  return on_text


def _check_flags(args: flags.FlagValues, sampling: Sampling) -> None:
  """Raises UserError for flags that are impossible, or do not go together."""
  if args.num < 1:
    raise UserError(f"--num={args.num}: is not positive")
  check_seed(args.seed, "--seed")
  if args.infill and (args.prompt or args.prompts):
    raise UserError("--infill: is a text of its own, and goes without --prompt and --prompts")
  if args.chat and not (args.prompt or args.prompts):
    raise UserError("--chat: needs a --prompt, which is what the user says; it goes without --infill")
  if args.system and not args.chat:
    raise UserError("--system: is of a conversation, which --chat makes of a prompt")
  if args.infill and sampling.mode not in DEFAULT_PATH:
    raise UserError(f"--infill: needs --mode=flow or --mode=adaptive; {sampling.mode} sees no text behind a gap")
  if args.output:
    _check_output_flags(args)


def _check_output_flags(args: flags.FlagValues) -> None:
  for flag in ("infill", "json", "trace"):
    if getattr(args, flag):
      raise UserError(f"--{flag}: does not go with --output")
  for name in args.prompts:
    if name == "-" or not ("://" in name or os.path.isfile(os.path.expanduser(name))):
      raise UserError(f"--prompts={name}: with --output prompts are read more than once: give a file")
  if args.output.endswith(".jsonl"):
    raise UserError(f"--output={args.output}: is a folder, in which .jsonl files are written; name it without .jsonl")


def _prompts(args: flags.FlagValues) -> list[Prompt]:
  """The prompts, or texts with gaps, that the flags give. Raises UserError for what cannot be read, and too many."""
  prompts = args.infill or args.prompt + read_prompt_files(args.prompts, args.chat) or [""]
  if len(prompts) * args.num > _MOST_TEXTS:
    what = f"is more than {_MOST_TEXTS} texts, which are held in memory until they are done; --output writes more"
    raise UserError(f"--num={args.num}: {what}")
  return prompts


def _to_json(generation: Generation) -> dict[str, Any]:
  prompt = generation.prompt
  fields = dataclasses.asdict(generation) | {"prompt": readable(prompt) if isinstance(prompt, str) else prompt}
  optional = ("accepted", "rounds", "drafted_rounds", "choices")
  return {name: value for name, value in fields.items() if name not in optional or value is not None}


def _summary(generations: list[Generation], compile_seconds: float) -> str:
  tokens = sum(len(generation.tokens) for generation in generations)
  passes = sum(generation.passes for generation in generations)
  seconds = max(generation.seconds for generation in generations)
  summary = (
    f"{tokens} tokens in {passes} passes ({tokens / max(passes, 1):.2f} per pass), {seconds:.2f} s, and "
    f"{compile_seconds:.1f} s to compile"
  )
  if generations[0].rounds is None:
    return summary
  total = lambda name: sum(getattr(generation, name) for generation in generations)
  accepted, rounds = total("accepted"), max(total("rounds"), 1)
  undrafted = 1.0 - total("drafted_rounds") / rounds
  return f"{summary}; {accepted / rounds:.2f} drafted tokens accepted per round, {undrafted:.0%} of rounds had no draft"


def define_flags() -> None:
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_multi_string("prompt", [], "Beginning of a text; may be given several times.")
  prompts = (
    "File of prompts, one per line, or .jsonl, both also .gz and .xz; - is standard input. May be given again. With "
    "--chat a line of .jsonl may have messages, of which those before the assistant's first are the prompt."
  )
  flags.DEFINE_multi_string("prompts", [], prompts)
  infill = (
    "A text whose gaps [...] ([...12]: 12 tokens) are filled; the rest stays as it is. May be given several times."
  )
  flags.DEFINE_multi_string("infill", [], infill)
  chat = "Wrap each prompt into a conversation by the tokenizer's chat template; what is written is the answer."
  flags.DEFINE_bool("chat", False, chat)
  flags.DEFINE_string("system", "", "With --chat: the system message; default: none, or the template's own.")
  flags.DEFINE_integer("num", 1, "Texts for each prompt.")
  flags.DEFINE_integer("seed", 0, "Seed of all draws.")
  output = (
    "Folder, local or gs://..., into which texts of any number of prompts are written as .jsonl; the same command goes "
    "on there."
  )
  flags.DEFINE_string("output", "", output)
  columns = (
    "prompt, text, tokens, settled (the pass that committed each token), passes, seconds, end_id (the token by which "
    "the model ended the text, or null); with --mode=verify also accepted (drafted tokens that were committed, neither "
    "corrections nor the tokens that come free), rounds (passes that verified) and drafted_rounds (those with a draft)"
  )
  flags.DEFINE_bool("json", False, f"Print a list of objects: {columns}.")
  flags.DEFINE_string("trace", "", "File (.html or .png) for a picture of how the first text matured.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  cli.define_mesh()
  cli.define_processes()
  _define_sampling_flags(Sampling())


def _define_sampling_flags(default: Sampling) -> None:
  """Flags with the names and defaults of `Sampling`'s fields."""
  flags.DEFINE_enum("mode", default.mode, MODES, "Decoding mode.")
  max_tokens = f"Tokens of each text at most; default: {DEFAULT_TOKENS}, or what the context leaves."
  flags.DEFINE_integer("max_tokens", default.max_tokens, max_tokens)
  flags.DEFINE_float("temperature", default.temperature, "Divides the logits; below 1 draws are sharper.")
  flags.DEFINE_integer("top_k", default.top_k, "Only the k most probable tokens are drawn; 0: all.")
  flags.DEFINE_float(
    "top_p", default.top_p, "Only the most probable tokens whose probabilities add up to this are drawn."
  )
  flags.DEFINE_bool("greedy", default.greedy, "Always the most probable token.")
  stop = "What is written ends before this string; may be given several times: before the one that is complete first."
  flags.DEFINE_multi_string("stop", list(default.stop), stop)
  flags.DEFINE_integer("steps", default.steps, "Mode flow: passes per window.")
  path = (
    "Mode flow: diagonal (default), rolling, random or learned, in --steps passes, or any path that evaluate knows, as "
    "streams:4 or FILE.py:NAME. Mode adaptive: spread (default), entropy, confidence or maturity."
  )
  flags.DEFINE_string("path", default.path, path)
  grid = "Steps of diagonal and rolling: even in time, in (log-)precision, or t after each pass as 0.8,0.5,0.2."
  flags.DEFINE_string("grid", default.grid, grid)
  stepper = "Solver of the flow: ode, ode2 (second order) or ancestral."
  flags.DEFINE_string("stepper", default.stepper, stepper)
  threshold = "Mode adaptive: 0 is autoregression; the higher, the fewer passes."
  flags.DEFINE_float("threshold", default.threshold, threshold)
  window = (
    "Tokens of a window; 0: as in training; four times as many in mode adaptive at thresholds above 0.3 (spread)."
  )
  flags.DEFINE_integer("window", default.window, window)
  draft = (
    "Mode verify: drafted tokens per round, and windows for all outcomes: most tokens per pass. 0: length and windows "
    "for most tokens per second, as measured on the way (4 with --coupling=rejection or --draft_passes)."
  )
  flags.DEFINE_integer("draft", default.draft, draft)
  draft_passes = "Mode verify: passes per round; with 1, a pass verifies and drafts the next tokens."
  flags.DEFINE_integer("draft_passes", default.draft_passes, draft_passes)
  draft_from = (
    "Mode verify: what drafts: windows, text (what followed its last tokens when they occurred before), or both: in "
    "each round the one of which more tokens were accepted."
  )
  flags.DEFINE_enum("draft_from", default.draft_from, DRAFT_SOURCES, draft_from)
  coupling = (
    "Mode verify: gumbel accepts a drafted token if it is the one that ar draws with the seed, so that the text is "
    "ar's; rejection samples another text of ar's distribution, and accepts a little more."
  )
  flags.DEFINE_enum("coupling", default.coupling, COUPLINGS, coupling)
  flags.DEFINE_integer("gap", default.gap, "Tokens of a gap [...] without a number.")
  flags.DEFINE_bool("endless", default.endless, "Rule out the tokens that end a text.")
  flags.DEFINE_integer("batch_size", default.batch_size, "Texts that are decoded at once.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
