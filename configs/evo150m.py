"""150 million parameters: one GPU, or a small TPU slice.

  python -m evo_jax.tokenizer --input='text/*.txt' --vocab_size=32000 --output=tokenizer
  python -m evo_jax.prepare --input='text/*.jsonl.zst' --tokenizer=sentencepiece --tokenizer_path=tokenizer \\
      --output=tokens
  python -m evo_jax.main --config=evo150m --workdir=runs/evo150m --config.data.path=tokens

Its 10.5 billion tokens are about 43 GB of English text, and 21 GB as tokens, which take about two hours of one core.
"""

from evo_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.layers = 16
  c.model.width = 768
  c.model.heads = 12
  c.model.kv_heads = 4
  c.model.hidden = 2048
  c.model.context = 1024
  c.model.vocab_size = 32_000
  c.model.vocab_multiple = 128
  c.model.code_dim = 64
  c.model.time_dim = 64
  c.model.dtype = "bfloat16"
  c.model.remat = "dots"
  c.window.size = 16
  c.window.count = 16  # N (B + 1) / L = 27 % more tokens through the network
  c.loss.bound_windows = 4
  c.data.path = ""
  c.data.tokenizer = "sentencepiece"
  c.data.batch_size = 256
  c.optim.learning_rate = 1e-3
  c.optim.warmup = 1000
  c.optim.ema = 0.9995
  c.train.steps = 40_000  # 10.5 billion tokens
  c.train.log_every = 20
  c.train.checkpoint_every = 1000
  c.train.eval_every = 1000
  c.eval.batch_size = 64
  c.eval.sequences = 512
  c.eval.train_sequences = 128
  return c
