"""Speed of autoregressive decoding against Hugging Face transformers' `generate`: one shape, one machine, one run.

  pip install -e '.[hf]' && python -m experiments.hf_speed [--tokens=256] [--repeats=3] [--small]

SmolLM2-135M's shape with random weights, float32, batch 1, greedy, with KV caches, no end token. The two alternate, so
that changes of the machine's speed affect both alike; medians are compared. Times are without compilation and warm-up.
"""

from collections.abc import Callable
import statistics
import time
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
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
  """A tokenizer whose text is the token ids, separated by spaces."""

  vocab_size, unit, identity, binary = 0, "token", "numbers", False
  begin_id = separator_id = 0
  end_ids, turn_end_ids = (0,), ()

  def encode(self, text):
    return np.array(text.split(), np.int64)

  def decode(self, tokens):
    return " ".join(map(str, tokens))

  def lost(self, text):
    return ""

  def lengths(self):
    return (np.arange(self.vocab_size) != self.begin_id).astype(int)


def evo_generate(config: config_lib.Config, tokens: int) -> tuple[Callable[[str], Any], Sampler]:
  """A function that generates `tokens` tokens after a prompt, and its sampler."""
  tokenizer = Numbers()
  tokenizer.vocab_size = config.model.vocab_size
  model = state_lib.make_model(config, tokenizer)
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  run = run_lib.Run(config, tokenizer, model, state.params, state.statistics, 0)
  sampler = Sampler(run, Sampling(mode="ar", greedy=True, endless=True, max_tokens=tokens))
  return lambda prompt: sampler([prompt]), sampler


def make_llama(c: config_lib.Model) -> Any:
  """A Llama of transformers in this shape, with random float32 weights. Raises UserError where it is missing."""
  _, transformers = common.transformers()
  llama = transformers.LlamaConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.width,
    intermediate_size=c.hidden,
    num_hidden_layers=c.layers,
    num_attention_heads=c.heads,
    num_key_value_heads=c.kv_heads,
    max_position_embeddings=c.context,
    rope_theta=c.rope_base,
    tie_word_embeddings=c.tie_embeddings,
    bos_token_id=Numbers.begin_id,
    eos_token_id=None,
    pad_token_id=0,
  )
  return transformers.LlamaForCausalLM(llama)


def transformers_generate(config: config_lib.Config, tokens: int) -> tuple[Callable[[str], Any], str]:
  """The same by transformers, and the versions of the libraries. Raises UserError if they are not installed."""
  torch, transformers = common.transformers()
  model = make_llama(config.model).eval()

  @torch.inference_mode()
  def generate(prompt):
    ids = torch.tensor([[Numbers.begin_id] + [int(t) for t in prompt.split()]])
    return model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=tokens,
      min_new_tokens=tokens,
      do_sample=False,
      use_cache=True,
    )

  return generate, f"transformers {transformers.__version__}, torch {torch.__version__}"


def main() -> None:
  args = flags.FLAGS
  config = common.configure(config_lib.default(), SMALL if args.small else SMOLLM2)
  by_transformers, versions = transformers_generate(config, args.tokens)
  by_evo_jax, sampler = evo_generate(config, args.tokens)
  prompt = " ".join(map(str, np.random.default_rng(0).integers(1, config.model.vocab_size, 16)))
  seconds = time_alternately({"evo_jax": by_evo_jax, "transformers": by_transformers}, prompt, args.repeats)
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
    f"evo_jax {speed['evo_jax']:.2f} tokens per second, transformers {speed['transformers']:.2f} ({versions}): "
    f"ratio {result['ratio']:.2f}; {sampler.compile_seconds:.0f} s to compile"
  )
  if not args.small:
    common.write_result("hf_speed", result)


def time_alternately(functions: dict[str, Callable[[str], Any]], prompt: str, repeats: int) -> dict[str, list[float]]:
  """Seconds of each call, by name; first each is called once to compile and warm up."""
  for function in functions.values():
    function(prompt)
  seconds = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      started = time.perf_counter()
      function(prompt)
      seconds[name].append(time.perf_counter() - started)
  return seconds


if __name__ == "__main__":
  flags.DEFINE_integer("tokens", 256, "New tokens.")
  flags.DEFINE_integer("repeats", 3, "Timed texts of each.")
  flags.DEFINE_bool("small", False, "Two layers, to try the experiment; writes no result.")
  cli.run(main)
