"""Llama 3.1 8B, imported, and trained on in all its parameters: 1 billion tokens in sequences of 4096.

  python -m evo_jax.convert --source=hf://meta-llama/Llama-3.1-8B --workdir=DIR --param_dtype=float32 --context=4096 \\
      --mesh=data:1,fsdp:-1
  python -m evo_jax.main --config=llama3_8b --workdir=DIR --config.data.path='text/*.jsonl' \\
      --config.data.tokenizer_path=DIR/tokenizer

As planned by compilation, a billion tokens take 1.9 hours on v5p:2x4x4 (MFU 55.9 %, 13.3 GiB of a chip's memory) and
3.4 hours on v5e:8x8 (35.6 %, 7.1 GiB): python -m evo_jax.plan --config=llama3_8b --topology=v5p:2x4x4,v5e:8x8
"""

from evo_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.layers = 32
  c.model.width = 4096
  c.model.heads = 32
  c.model.kv_heads = 8
  c.model.hidden = 14_336
  c.model.context = 4096
  c.model.context_limit = 131_072
  c.model.vocab_size = 128_256
  c.model.rope_base = 500_000.0
  c.model.rope_scaling = "llama3"
  c.model.norm_casts_first = True
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.model.attention_block = 512
  c.window.size = 16
  c.window.count = 32
  c.loss.bound_windows = 8
  c.loss.chunk = 8192
  c.loss.one_pass = False  # as in evo8b
  c.data.path = ""
  c.data.tokenizer = "huggingface"
  c.data.batch_size = 64
  c.optim.learning_rate = 2e-5
  c.optim.schedule = "wsd"
  c.optim.warmup = 200
  c.train.steps = 3815  # of 262,144 tokens
  c.train.log_every = 10
  c.train.checkpoint_every = 500
  c.train.eval_every = 500
  c.eval.paths = ("ar", "diagonal:4", "diagonal:16")
  c.eval.batch_size = 64
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
