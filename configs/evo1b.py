"""1.2 billion parameters, tied embeddings: a TPU slice, or a node of GPUs.

  python -m evo_jax.tokenizer --input='text/*.txt' --vocab_size=128256 --output=tokenizer
  python -m evo_jax.prepare --input='text/*.jsonl.zst' --tokenizer=sentencepiece --tokenizer_path=tokenizer \\
      --output=tokens
  python -m evo_jax.main --config=evo1b --workdir=runs/evo1b --config.data.path=tokens --config.mesh.fsdp=8

Its 105 billion tokens are about 460 GB of English text, and 420 GB as tokens, which take about 18 hours of one core.
"""

from evo_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.layers = 16
  c.model.width = 2048
  c.model.heads = 16
  c.model.kv_heads = 4
  c.model.hidden = 8192
  c.model.context = 2048
  c.model.vocab_size = 128_256
  c.model.vocab_multiple = 1024
  c.model.code_dim = 64
  c.model.time_dim = 64
  c.model.rope_base = 500_000.0
  c.model.tie_embeddings = True
  c.model.dtype = "bfloat16"
  c.model.remat = "save:qkv,attention,gate,up"
  c.model.attention_block = 512
  c.window.size = 16
  c.window.count = 32
  c.loss.bound_windows = 8
  c.loss.chunk = 9216
  c.data.path = ""
  c.data.tokenizer = "sentencepiece"
  c.data.batch_size = 512
  c.optim.learning_rate = 6e-4
  c.optim.schedule = "wsd"
  c.optim.warmup = 2000
  c.train.accumulate = 8
  c.train.steps = 100_000  # 105 billion tokens
  c.train.log_every = 20
  c.train.checkpoint_every = 1000
  c.train.eval_every = 2000
  c.eval.batch_size = 64
  c.eval.sequences = 512
  c.eval.train_sequences = 128
  c.mesh.data = -1
  return c
