"""An engine beside batches that run to their end, here and in transformers; scores with shared prefixes; a soak.

  pip install -e '.[hf,pretrained]'
  python -m experiments.engine_speed --workdir=DIR --conversations=FILE.jsonl --source=MODEL.gguf [--rows=1,8,32]
  python -m experiments.engine_speed --workdir=runs/tiny --soak=20000

Requests are the first messages of conversations, each for as many tokens as the first answer there has, so that lengths
are mixed as they are in reality. Three ways to write them, in turns:

  engine        rows that are filled again as texts end; mode ar, and verify
  batches       a `Sampler` on as many texts at once as the engine has rows, each batch until its longest text is full
  transformers  `generate` on the same batches, padded on the left, the same weights in float32

Each ends a text after the tokens that it is to have, and counts no other tokens. And:

  where time goes   of an engine that waits for each program: prompts, passes, host
  costs             the same requests as they are, with every text streamed to a thread of its own, and traced
  scores            four continuations of contexts with the same five conversations in front: pages shared, or not
  soak              random requests of all modes: memory, compilations, and a random 5 % again, alone
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import json
import resource
import time
from typing import Any

from absl import flags
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.prompts import make_request
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from experiments import common
from experiments.pretrained import load_reference

_LONGEST = 128  # tokens of a question, and of an answer
_SHORT = 32  # tokens of an answer where costs are measured
_SHOTS = 5
_REPORTS = 10  # of a soak

Wanted = list[tuple[str, int]]  # prompts, and how many tokens each is to get


def read_requests(path: str, run: run_lib.Run, count: int) -> Wanted:
  """The first messages of `count` conversations, and tokens of the first answers. Raises UserError."""
  try:
    rows = [json.loads(line)["messages"] for line in common.read_lines(path)]
    pairs = [(row[0]["content"], row[1]["content"]) for row in rows]
  except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
    raise UserError(f"--conversations={path}: {type(error).__name__}: {error}") from error
  plain = run.tokenizer
  sized = [(q, min(len(plain.encode(a)), _LONGEST)) for q, a in pairs if len(plain.encode(q)) <= _LONGEST]
  if len(sized) < count:
    raise UserError(f"--conversations={path}: has {len(sized)} short questions, fewer than {count}")
  return [sized[i] for i in np.linspace(0, len(sized) - 1, count).round().astype(int)]


def with_engine(run: run_lib.Run, rows: int, mode: str, **options: Any) -> Callable[[Wanted], dict[str, Any]]:
  """Writes requests by an engine."""
  engine = Engine(run, rows, modes=[mode], context=min(1024, run.config.model.position_limit), **options)

  def write(requests):
    before, looks = dict(engine.seconds), engine.looks
    shape = lambda tokens: Sampling(mode=mode, max_tokens=tokens, greedy=True, endless=True)
    handles = [engine.submit(prompt, shape(tokens)) for prompt, tokens in requests]
    for handle in handles:
      handle.result()
    spent = {name: seconds - before[name] for name, seconds in engine.seconds.items()}
    return {"seconds_of": spent, "looks": engine.looks - looks, "compilations": engine.compilations}

  write.close = engine.close
  return write


def in_batches(run: run_lib.Run, rows: int) -> Callable[[Wanted], dict[str, Any]]:
  """Writes requests by a sampler, whose batches run to the end of their longest text."""
  sampler = Sampler(run, Sampling(greedy=True, endless=True, batch_size=rows))

  def write(requests):
    asked = [
      make_request(prompt, False, Sampling(max_tokens=tokens), run.tokenizer, run.config.model.position_limit)
      for prompt, tokens in requests
    ]
    for start in range(0, len(asked), rows):
      sampler.decode(asked[start : start + rows])
    return {}

  return write


def in_transformers(source: str, run: run_lib.Run, rows: int) -> Callable[[Wanted], dict[str, Any]]:
  """Writes requests by transformers' `generate`."""
  torch, _ = common.transformers()
  model, tokenizer = load_reference(source), run.tokenizer

  def write(requests):
    for start in range(0, len(requests), rows):
      part = requests[start : start + rows]
      ids = [[tokenizer.begin_id, *tokenizer.encode(prompt).tolist()] for prompt, _ in part]
      longest, width = max(tokens for _, tokens in part), max(map(len, ids))
      padded = torch.tensor([[tokenizer.end_ids[0]] * (width - len(row)) + row for row in ids])
      mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
      with torch.inference_mode():
        model.generate(
          padded,
          attention_mask=mask,
          max_new_tokens=longest,
          min_new_tokens=longest,
          do_sample=False,
          pad_token_id=tokenizer.end_ids[0],
        )
    return {}

  return write


def measure_rates(run: run_lib.Run, requests: Wanted, rows: int, source: str) -> dict[str, Any]:
  """Requests a second of every way, each of which wrote something before: the better of two turns."""
  ways = {f"engine, {mode}": with_engine(run, rows, mode) for mode in ("ar", "verify")}
  ways["batches"] = in_batches(run, rows)
  if source:
    ways["transformers"] = in_transformers(source, run, rows)
  result = {"rows": rows, "requests": len(requests), "tokens": sum(tokens for _, tokens in requests), "ways": {}}
  for name, write in ways.items():
    write(requests[: min(len(requests), rows)] if name != "batches" else requests)  # compiles, warms up
  turns: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(2):
    for name, write in ways.items():
      began = time.perf_counter()
      result["ways"][name] = write(requests)
      turns[name].append(time.perf_counter() - began)
  for name, seconds in turns.items():
    rate = len(requests) / min(seconds)
    result["ways"][name] |= {"seconds": seconds, "requests_per_second": rate}
    print(f"{rows:>4} rows  {name:<16}{rate:>8.3f} requests a second", flush=True)
  for write in ways.values():
    getattr(write, "close", lambda: None)()
  write = with_engine(run, rows, "ar", measure=True)
  result["where_time_goes"] = write(requests)
  write.close()
  spent, looks = result["where_time_goes"]["seconds_of"], result["where_time_goes"]["looks"]
  print("           " + ", ".join(f"{name} {value:.2f} s" for name, value in spent.items()), end="")
  print(f"; host {1e3 * spent['host'] / max(looks, 1):.2f} ms a look", flush=True)
  return result


def measure_costs(run: run_lib.Run, requests: Wanted, rows: int) -> dict[str, float]:
  """Seconds for the requests, each for _SHORT tokens, by one engine, in turns: nobody looks until they are done; a
  thread takes the pieces of each; each is traced, and so looked at after every pass. The least of three turns."""
  sampling = Sampling(max_tokens=_SHORT, greedy=True, endless=True)
  found: dict[str, list[float]] = {"waited for": [], "streamed": [], "traced": []}
  with Engine(run, rows, context=min(1024, run.config.model.position_limit), traces=True) as engine:
    for _ in range(3):
      for way, seconds in found.items():
        began = time.perf_counter()
        handles = [engine.submit(prompt, sampling, trace=way == "traced") for prompt, _ in requests]
        if way == "streamed":
          with concurrent.futures.ThreadPoolExecutor(len(handles)) as pool:
            list(pool.map(list, handles))
        for handle in handles:
          handle.result()
        seconds.append(time.perf_counter() - began)
  least = {way: min(seconds) for way, seconds in found.items()}
  print(f"{rows:>4} rows  " + ", ".join(f"{way} {seconds:.2f} s" for way, seconds in least.items()), flush=True)
  return least


def measure_scores(run: run_lib.Run, requests: Wanted, items: int) -> dict[str, Any]:
  """Items a second: a context with five conversations' beginnings in front, and four continuations."""
  context = "\n\n".join(prompt for prompt, _ in requests[:_SHOTS])
  questions = [prompt for prompt, _ in requests[_SHOTS : _SHOTS + items]]
  rates, found = {}, {}
  for name, share in (("shared", True), ("from scratch", False)):
    with Engine(run, 1, context=min(2048, run.config.model.position_limit), share=share) as engine:
      ask = lambda question: [engine.submit_score(f"{context}\n\n{question}", f" {a}") for a in "ABCD"]
      engine.score(context, " A")
      began = time.perf_counter()
      futures = [ask(question) for question in questions]
      found[name] = [[future.result().total for future in four] for four in futures]
      rates[name] = len(questions) / (time.perf_counter() - began)
  equal = found["shared"] == found["from scratch"]
  print(f"scores: {rates['shared']:.3f} items a second, {rates['from scratch']:.3f} from scratch; equal: {equal}")
  return {"items_per_second": rates, "equal": equal}


def soak(run: run_lib.Run, count: int, seed: int) -> dict[str, Any]:
  """Random requests, at most 64 on their way at a time; memory and compilations on the way; 5 % again, alone."""
  modes = [Sampling(), Sampling(mode="verify"), Sampling(mode="adaptive"), Sampling(mode="flow", steps=4)]
  rng, rows, kept, on_their_way = np.random.default_rng(seed), [], {}, []
  context = run.config.model.position_limit
  with Engine(run, 8, modes=modes, cache_tokens=4 * context) as engine:
    for number in range(count):
      prompt = "def main():\n  " * int(rng.integers(4)) + "".join(rng.choice(list("abc (=):\n"), rng.integers(12)))
      sampling = dataclasses.replace(
        modes[rng.integers(len(modes))],
        max_tokens=int(rng.integers(1, context // 4)),
        temperature=float(rng.choice([0.5, 1.0])),
        top_k=int(rng.choice([0, 0, 5])),
        stop=("\n\n",) if rng.integers(2) else (),
      )
      asked = (prompt, sampling, int(rng.integers(2**32)))
      handle = engine.submit(prompt, sampling, seed=asked[2])
      if rng.integers(20) == 0:
        handle.cancel()
      else:
        on_their_way.append(handle)
        if rng.integers(20) == 0:
          kept[number] = (asked, handle)
      if len(on_their_way) >= 64:
        on_their_way.pop(0).result()
      if (number + 1) % max(count // _REPORTS, 1) == 0:
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({"requests": number + 1, "peak_mib": mib, "compilations": engine.compilations})
        print(f"{number + 1:>7} requests, peak memory {mib:,.0f} MiB, {engine.compilations} compilations", flush=True)
    different = 0
    for (prompt, sampling, one_seed), handle in kept.values():
      want = handle.result().tokens
      different += engine.submit(prompt, sampling, seed=one_seed).result().tokens != want
    print(f"{len(kept)} texts written again, alone: {different} differ")
    return {"steps": rows, "again": len(kept), "different": different, "compilations": engine.compilations}


def main() -> None:
  args = flags.FLAGS
  if not args.workdir:
    raise UserError("--workdir is needed")
  run, output = run_lib.load_run(args.workdir), common.results_folder(args.output)
  if args.soak:
    common.write_result("engine_soak", soak(run, args.soak, args.seed), output)
    return
  if not args.conversations:
    raise UserError("--conversations is needed, or --soak")
  sizes = [int(rows) for rows in args.rows.split(",")]
  requests = read_requests(args.conversations, run, max(args.requests, 2 * max(sizes), _SHOTS + args.items))
  result = {"rates": []}
  for rows in sizes:
    rates = measure_rates(run, requests[: max(args.requests, 2 * rows)], rows, args.source)
    result["rates"].append({**rates, "costs": measure_costs(run, requests[:rows], rows)})
  if args.items:
    result["scores"] = measure_scores(run, requests, args.items)
  common.write_result("engine_speed", result, output)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "The model's work directory.")
  flags.DEFINE_string("conversations", "", "A .jsonl file with `messages`.")
  flags.DEFINE_string("source", "", "The model's GGUF file, for transformers; default: without it.")
  flags.DEFINE_string("rows", "1,8,32", "Rows of engines, and texts of a batch.")
  flags.DEFINE_integer("requests", 24, "Requests; at least two for each row.", lower_bound=1)
  flags.DEFINE_integer("items", 8, "Items to be scored; 0: none.", lower_bound=0)
  flags.DEFINE_integer("soak", 0, "So many random requests instead.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Seed of a soak.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)
