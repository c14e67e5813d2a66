"""Autoregressive decoding beside Hugging Face transformers' `generate`, one shape, one machine, one run.

  pip install -e '.[hf]' && python -m experiments.hf_speed [--tokens=256] [--repeats=3] [--small]

SmolLM2-135M's shape with random weights, float32, batch 1, greedy, caches on, no end token. The two take turns, so that
a machine's changing speed falls on both alike; medians are compared. Compilation and a warm-up are not in the times.
"""

import os
import statistics
import time

from absl import flags
import flax.linen as nn
import jax
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.decoding import sampler as sampler_lib
from evo_jax.decoding import settings
from evo_jax.errors import UserError
from evo_jax.training import state as state_lib
from experiments import common

SMOLLM2 = {
  "model.layers": 30,
  "model.width": 576,
  "model.heads": 9,
  "model.kv_heads": 3,
  "model.hidden": 1536,
  "model.vocab_size": 49152,
  "model.tie_embeddings": True,
  "model.context": 1024,
}
SMALL = SMOLLM2 | {"model.layers": 2, "model.vocab_size": 512}


class Numbers:
  """Token ids written as numbers, separated by spaces."""

  vocab_size, unit, identity, binary = 0, "token", "numbers", False
  begin_id, separator_id, end_ids, turn_end_ids = 0, 0, (0,), ()

  def encode(self, text):
    return np.array(text.split(), np.int64)

  def decode(self, tokens):
    return " ".join(map(str, tokens))

  def lost(self, text):
    return ""


def ours(config: config_lib.Config, tokens: int):
  """A function that writes `tokens` tokens behind a prompt, and the sampler in it."""
  tokenizer = Numbers()
  tokenizer.vocab_size = config.model.vocab_size
  model = state_lib.make_model(config, tokenizer)
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  run = run_lib.Run(config, tokenizer, model, state.params, state.statistics, 0)
  sampler = sampler_lib.Sampler(run, settings.Sampling(mode="ar", greedy=True, endless=True, max_tokens=tokens))
  return lambda prompt: sampler([prompt]), sampler


def theirs(config: config_lib.Config, tokens: int):
  """The same by transformers."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise UserError(f"{error.name} is not installed: pip install 'evo_jax[hf]'") from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  c = config.model
  shape = transformers.LlamaConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.width,
    intermediate_size=c.hidden,
    num_hidden_layers=c.layers,
    num_attention_heads=c.heads,
    num_key_value_heads=c.kv_heads,
    max_position_embeddings=c.context,
    rope_theta=c.rope_base,
    tie_word_embeddings=c.tie_embeddings,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=0,
  )
  model = transformers.LlamaForCausalLM(shape).eval()

  @torch.inference_mode()
  def write(prompt):
    ids = torch.tensor([[0] + [int(t) for t in prompt.split()]])
    return model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=tokens,
      min_new_tokens=tokens,
      do_sample=False,
      use_cache=True,
    )

  return write, f"transformers {transformers.__version__}, torch {torch.__version__}"


def main() -> None:
  args = flags.FLAGS
  config = common.configure(config_lib.default(), SMALL if args.small else SMOLLM2)
  write_hf, versions = theirs(config, args.tokens)
  write_evo, sampler = ours(config, args.tokens)
  prompt = " ".join(map(str, np.random.default_rng(0).integers(1, config.model.vocab_size, 16)))
  write_evo(prompt), write_hf(prompt)  # compiles, and warms up
  seconds = {"evo_jax": [], "transformers": []}
  for _ in range(args.repeats):
    for name, write in (("evo_jax", write_evo), ("transformers", write_hf)):
      clock = time.perf_counter()
      write(prompt)
      seconds[name].append(time.perf_counter() - clock)
  speed = {name: args.tokens / statistics.median(s) for name, s in seconds.items()}
  result = {
    "shape": config_lib.to_dict(config)["model"],
    "tokens": args.tokens,
    "versions": versions,
    "tokens_per_second": speed,
    "ratio": speed["evo_jax"] / speed["transformers"],
    "seconds": seconds,
    "compile_seconds": sampler.compile_seconds,
  }
  print(
    f"evo_jax {speed['evo_jax']:.2f} tokens a second, transformers {speed['transformers']:.2f} ({versions}): "
    f"ratio {result['ratio']:.2f}; {sampler.compile_seconds:.0f} s to compile"
  )
  if not args.small:
    common.write_result("hf_speed", result)


if __name__ == "__main__":
  flags.DEFINE_integer("tokens", 256, "New tokens.")
  flags.DEFINE_integer("repeats", 3, "Times that each writes.")
  flags.DEFINE_bool("small", False, "Two layers, to try the harness.")
  cli.run(main)
