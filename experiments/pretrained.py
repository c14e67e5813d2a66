"""A pretrained model here beside transformers, both from the same GGUF file, in float32.

  pip install -e '.[hf,pretrained]'
  python -m evo_jax.convert --source=MODEL.gguf --workdir=DIR
  python -m experiments.pretrained --source=MODEL.gguf --workdir=DIR --text='a.txt,b.jsonl' --conversations=FILE.jsonl

Compares logits on text (largest difference, KL divergence per token, bits per byte), greedy answers to the first
messages of conversations (`messages` with `role` and `content` in each line), time and memory of loading, and tokens
per second of greedy decoding at batch 1, in turns.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import cli
from evo_jax import run as run_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data.chat import ChatTokenizer
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.flow.bound import BITS_PER_NAT
from experiments import common
from experiments.hf_speed import time_alternately

LIBRARIES = ("evo_jax", "transformers")


def load_reference(source: str) -> Any:
  """The model of a GGUF file in transformers, in float32. Raises UserError where the library is missing."""
  torch, transformers = common.transformers()
  folder, name = os.path.split(os.path.abspath(source))
  load = transformers.AutoModelForCausalLM.from_pretrained
  return load(folder, gguf_file=name, dtype=torch.float32).eval()


def compare_logits(run: run_lib.Run, reference: Any, sequences: np.ndarray) -> dict[str, Any]:
  """Logits behind every token of sequences (N, L + 1), which begin with the begin token.

  Divergences in float64 from float32 logits over the tokenizer's tokens.
  """
  import torch

  vocab, size = run.tokenizer.vocab_size, int(run.tokenizer.lengths()[sequences[:, 1:]].sum())

  @jax.jit
  def logits_of(params, tokens):
    net = run.model.bind({"params": params})
    return net.logits(net.clean(tokens)[0])[..., :vocab]

  largest, divergence, nll, agreements, deviation = 0.0, [], {name: [] for name in LIBRARIES}, [], []
  for sequence in sequences:
    ours = np.asarray(logits_of(run.params, jnp.asarray(sequence[None, :-1], jnp.int32)))[0]
    with torch.inference_mode():
      theirs = reference(torch.tensor(sequence[None, :-1].astype(np.int64))).logits[0, :, :vocab].numpy()
    largest = max(largest, float(np.abs(ours - theirs).max()))
    deviation.append(theirs.std())
    log_p, log_q = (
      x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (theirs.astype(float), ours.astype(float))
    )
    divergence.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    agreements.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
    for name, log in (("evo_jax", log_q), ("transformers", log_p)):
      nll[name].append(-log[np.arange(len(log)), sequence[1:]])
  return {
    "tokens": int(sequences[:, 1:].size),
    "largest_difference": largest,
    "standard_deviation": float(np.mean(deviation)),
    "kl_nats_per_token": float(np.mean(divergence)),
    "kl_largest": float(np.max(divergence)),
    "best_token_agrees": float(np.mean(agreements)),
    "bits_per_byte": {name: float(np.sum(values)) * BITS_PER_NAT / size for name, values in nll.items()},
  }


def compare_answers(run: run_lib.Run, reference: Any, questions: list[str], tokens: int) -> list[dict[str, Any]]:
  """Greedy answers under the chat template, from the same ids: the first difference of each, and how far the best two
  logits of the reference lie apart there."""
  import torch

  chat = ChatTokenizer(run.tokenizer)
  settings = Sampling(mode="ar", greedy=True, max_tokens=tokens, batch_size=1)
  sampler = Sampler(dataclasses.replace(run, tokenizer=chat), settings)
  rows = []
  for question in questions:
    answer = list(sampler([question])[0].tokens)
    prompt = [chat.begin_id, *chat.encode(question).tolist()]
    ids = torch.tensor([prompt])
    with torch.inference_mode():
      written = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(run.tokenizer.end_ids),
        pad_token_id=run.tokenizer.end_ids[0],
      )[0, len(prompt) :].tolist()
      ends = [i for i, token in enumerate(written) if token in run.tokenizer.end_ids]
      written = written[: ends[0]] if ends else written
      row = {"question": question[:60], "tokens": len(written), "equal": answer == written}
      if not row["equal"]:
        at = next((i for i, (a, b) in enumerate(zip(answer, written)) if a != b), min(len(answer), len(written)))
        best = reference(torch.tensor([prompt + written[:at]])).logits[0, -1].topk(2).values
        row |= {"first_difference": at, "best_two_apart": float(best[0] - best[1])}
    rows.append(row)
  return rows


def compare_speed(run: run_lib.Run, reference: Any, question: str, tokens: int, repeats: int) -> dict[str, Any]:
  """Tokens per second of greedy decoding at batch 1, without a token that ends the text."""
  import torch

  chat = ChatTokenizer(run.tokenizer)
  sampler = Sampler(
    dataclasses.replace(run, tokenizer=chat),
    Sampling(mode="ar", greedy=True, endless=True, max_tokens=tokens, batch_size=1),
  )
  ids = torch.tensor([[chat.begin_id, *chat.encode(question).tolist()]])

  @torch.inference_mode()
  def by_transformers(_):
    reference.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )

  functions = {"evo_jax": lambda prompt: sampler([prompt]), "transformers": by_transformers}
  seconds = time_alternately(functions, question, repeats)
  speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
  return {"tokens": tokens, "tokens_per_second": speed, "ratio": speed["evo_jax"] / speed["transformers"]}


def measure_loading(args: flags.FlagValues) -> dict[str, Any]:
  """Seconds and peak memory in MiB of a process that loads the model by each library, and of `convert`."""

  def child(*command: str) -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
      raise UserError(f"{command[0]}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.perf_counter() - began}

  flags_of = lambda name: (f"--source={args.source}", f"--workdir={args.workdir}", f"--load={name}")
  return {name: child("experiments.pretrained", *flags_of(name)) for name in LIBRARIES}


def load_alone(args: flags.FlagValues) -> None:
  """Loads the model by one library, and prints what it took, as JSON."""
  began = time.perf_counter()
  if args.load == "evo_jax":
    jax.block_until_ready(run_lib.load_run(args.workdir).params)
  else:
    load_reference(args.source)
  seconds = time.perf_counter() - began
  print(json.dumps({"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def read_sequences(corpus: corpora_lib.Corpus, count: int, length: int) -> np.ndarray:
  """The first `count` sequences (count, length + 1) int32 of a text, each behind the begin token."""
  stream = corpus.streams["test"]
  if stream.length < count * length:
    raise UserError(f"--text: {corpus.name} has {stream.length} tokens, fewer than {count * length}")
  tokens = stream.read(0, count * length).reshape(count, length).astype(np.int32)
  return np.concatenate([np.full((count, 1), corpus.begin_id, np.int32), tokens], axis=1)


def read_questions(path: str, count: int) -> list[str]:
  """The first messages of `count` conversations, evenly spread over a .jsonl file."""
  lines = common.read_lines(path)
  picked = [lines[i] for i in np.linspace(0, len(lines) - 1, count).round().astype(int)]
  return [json.loads(line)["messages"][0]["content"] for line in picked]


def main() -> None:
  args = flags.FLAGS
  for name in ("source", "workdir") + (() if args.load else ("text", "conversations")):
    if not args[name].value:
      raise UserError(f"--{name} is needed")
  if args.load:
    load_alone(args)
    return
  loading = measure_loading(args)
  run, reference = run_lib.load_run(args.workdir), load_reference(args.source)
  corpora = corpora_lib.load_text(args.text, "--text", run.config.data, run.tokenizer)
  count = args.tokens // len(corpora) // args.length
  texts = {os.path.basename(corpus.name): read_sequences(corpus, count, args.length) for corpus in corpora}
  questions = read_questions(args.conversations, args.questions)
  result = {
    "loading": loading,
    "texts": {name: compare_logits(run, reference, sequences) for name, sequences in texts.items()},
    "answers": compare_answers(run, reference, questions, args.answer_tokens),
    "speed": compare_speed(run, reference, questions[0], args.answer_tokens, args.repeats),
  }
  print(json.dumps(result, indent=2))
  common.write_result("pretrained", result)


if __name__ == "__main__":
  flags.DEFINE_string("source", "", "The model's GGUF file.")
  flags.DEFINE_string("workdir", "", "The work directory that convert made of it.")
  flags.DEFINE_string("text", "", "Text for the logits: comma-separated globs.")
  flags.DEFINE_string("conversations", "", "A .jsonl file whose lines have `messages`.")
  flags.DEFINE_integer("tokens", 20_000, "Tokens of text.", lower_bound=1)
  flags.DEFINE_integer("length", 1_000, "Tokens of a sequence.", lower_bound=1)
  flags.DEFINE_integer("questions", 20, "Conversations.", lower_bound=1)
  flags.DEFINE_integer("answer_tokens", 64, "Tokens of an answer at most.", lower_bound=1)
  flags.DEFINE_integer("repeats", 5, "Timed texts of each library.", lower_bound=1)
  flags.DEFINE_enum("load", "", ["", *LIBRARIES], "Only load the model by one library, and print what it took.")
  cli.run(main)
