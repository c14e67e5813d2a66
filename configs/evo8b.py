"""Llama-3-8B's shape: 32 layers, 4096 wide, 32 heads of which 8 for keys and values, 14336 hidden, context 4096.

The tokenizer, then the tokens, on any machines with CPUs (16 hosts, I from 0 to 15), then, on every host of a TPU pod,
training:

  python -m evo_jax.tokenizer --input='text/*.txt' --vocab_size=128256 --output=tokenizer
  python -m evo_jax.prepare --input='gs://BUCKET/text/*.jsonl.zst' --tokenizer=sentencepiece \\
      --tokenizer_path=tokenizer --output=gs://BUCKET/tokens --hosts=16 --host=I
  python -m evo_jax.main --config=evo8b --workdir=gs://BUCKET/evo8b --config.data.path=gs://BUCKET/tokens

A trillion tokens are about 4.4 TB of English text, and 4 TB as tokens. Extrapolated from 14.2 MB of text per second on
two cores (experiments/prepare_speed.py, pieces of a smaller vocabulary), they take 172 hours of one core, 40 minutes of
16 hosts with 16 cores each. A host of v5p:8x8x8 then reads 18 thousand tokens per second, 90 KB
(experiments/reading_speed.py reads 500 times as much from a disk).
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
  c.model.vocab_size = 128_256
  c.model.vocab_multiple = 1024
  c.model.code_dim = 128
  c.model.time_dim = 64
  c.model.rope_base = 500_000.0
  c.model.dtype = "bfloat16"
  c.model.remat = "save:qkv,attention,gate,up"
  c.model.attention_block = 512
  c.window.size = 32
  c.window.count = 32
  c.loss.bound_windows = 8
  c.loss.chunk = 9216
  # Planned step times are shorter with two passes: communication is hidden behind matrix products anyway, and arrays of
  # both streams together do not stay in fast memory.
  c.loss.one_pass = False
  c.data.path = ""
  c.data.tokenizer = "sentencepiece"
  c.data.batch_size = 1024
  c.optim.learning_rate = 3e-4
  c.optim.schedule = "wsd"
  c.optim.warmup = 2000
  c.train.steps = 250_000  # 1 trillion tokens
  c.train.log_every = 10
  c.train.checkpoint_every = 1000
  c.train.eval_every = 5000
  c.eval.batch_size = 128
  c.eval.sequences = 512
  c.eval.train_sequences = 128
  c.mesh.data = -1
  c.mesh.fsdp = 64
  return c
