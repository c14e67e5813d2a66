"""Writes text with a trained model."""

import dataclasses
import json
import sys

from absl import flags

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.decoding import prompts as prompts_lib
from evo_jax.decoding import sampler as sampler_lib
from evo_jax.decoding import settings
from evo_jax.decoding import trace as trace_lib
from evo_jax.errors import UserError


def main() -> None:
  args = flags.FLAGS
  fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(settings.Sampling)}
  sampling = settings.Sampling(**fields | {"stop": tuple(args.stop)})
  if args.num < 1:
    raise UserError(f"--num={args.num}: is not positive")
  if not 0 <= args.seed < 2**32:
    raise UserError(f"--seed={args.seed}: is not in [0, 2^32)")
  prompts = args.infill or args.prompt + (prompts_lib.read_prompts(args.prompts) if args.prompts else [])
  if args.infill and (args.prompt or args.prompts):
    raise UserError("--infill: is a text of its own, and goes without --prompt and --prompts")
  if args.infill and sampling.mode not in settings.DEFAULT_PATH:
    raise UserError(f"--infill: needs --mode=flow or --mode=adaptive; {sampling.mode} sees no text behind a gap")
  if args.prompts and not prompts:
    raise UserError(f"--prompts={args.prompts}: has no prompts")
  if args.trace:
    trace_lib.check_trace_file(args.trace)
  run = run_lib.load_run(args.workdir, args.step)
  sampler = sampler_lib.Sampler(run, sampling)
  prompts = prompts or [""]
  single = len(prompts) * args.num == 1 and not args.json and not args.infill
  if single:  # is shown as it comes
    print(prompts[0], end="", flush=True)
  traces = [] if args.trace else None
  found = sampler(
    prompts,
    args.num,
    args.seed,
    bool(args.infill),
    (lambda _, piece: print(piece, end="", flush=True)) if single else None,
    traces,
  )
  if args.json:
    print(json.dumps([dataclasses.asdict(generation) for generation in found], indent=2))
  elif single:
    print()
  else:
    for i, generation in enumerate(found):
      print(("-" * 20 + "\n" if i else "") + ("" if args.infill else generation.prompt) + generation.text)
  if traces:
    trace_lib.write_trace(traces[0], args.trace)
  tokens, passes = (sum(x) for x in zip(*((len(g.tokens), g.passes) for g in found)))
  seconds = max(generation.seconds for generation in found)
  print(
    f"{tokens} tokens in {passes} passes ({tokens / max(passes, 1):.2f} a pass), {seconds:.2f} s, and "
    f"{sampler.compile_seconds:.1f} s to compile",
    file=sys.stderr,
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_multi_string("prompt", [], "A text's beginning; may be given several times.")
  flags.DEFINE_string("prompts", "", "File of prompts, one a line, or .jsonl; - is standard input.")
  flags.DEFINE_multi_string(
    "infill", [], "A text whose [...] ([...12]: of 12 tokens) are filled, what stands behind held fixed."
  )
  flags.DEFINE_integer("num", 1, "Texts for each prompt.")
  flags.DEFINE_integer("seed", 0, "Of all draws.")
  flags.DEFINE_bool(
    "json", False, "Print a list of objects: prompt, text, tokens, settled (each token's pass), passes, seconds."
  )
  flags.DEFINE_string("trace", "", "File (.html or .png) for a picture of how the first text matured.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  default = settings.Sampling()
  flags.DEFINE_enum("mode", default.mode, settings.MODES, "How tokens are settled.")
  flags.DEFINE_integer("max_tokens", default.max_tokens, "Tokens of each text at most.")
  flags.DEFINE_float("temperature", default.temperature, "Below 1 draws are sharper.")
  flags.DEFINE_integer("top_k", default.top_k, "Only the k most probable tokens are drawn; 0: all.")
  flags.DEFINE_float("top_p", default.top_p, "Only the most probable tokens that make up this probability are drawn.")
  flags.DEFINE_bool("greedy", default.greedy, "The most probable token always.")
  flags.DEFINE_multi_string("stop", list(default.stop), "A string that ends a text; may be given several times.")
  flags.DEFINE_integer("steps", default.steps, "Passes a window (mode flow).")
  flags.DEFINE_string(
    "path",
    default.path,
    "Mode flow: diagonal (default), rolling, random or learned, in --steps "
    "passes, or any that evaluate prices, as streams:4. Mode adaptive: spread (default), entropy, "
    "confidence or maturity.",
  )
  flags.DEFINE_string(
    "grid",
    default.grid,
    "Steps of diagonal and rolling: even in time, in (log-)precision, or t after each pass as 0.8,0.5,0.2.",
  )
  flags.DEFINE_string("stepper", default.stepper, "How a step is taken: ode, ode2 (second order) or ancestral.")
  flags.DEFINE_float(
    "threshold", default.threshold, "Mode adaptive: 0 is autoregression; the higher, the fewer passes."
  )
  flags.DEFINE_integer(
    "window",
    default.window,
    "Tokens of a window; 0: as in training; in mode adaptive, where the "
    "threshold asks for few passes, up to four times as many.",
  )
  flags.DEFINE_integer("draft", default.draft, "Mode verify: tokens proposed a pass, at most.")
  flags.DEFINE_integer(
    "draft_passes", default.draft_passes, "Mode verify: passes of a round; 1 judges and proposes in one."
  )
  flags.DEFINE_integer("gap", default.gap, "Tokens of a gap [...] without a number.")
  flags.DEFINE_bool("endless", default.endless, "The end of a document is ruled out.")
  flags.DEFINE_integer("batch_size", default.batch_size, "Texts that are written at once.")
  cli.run(main)
