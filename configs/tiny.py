"""A million parameters, minutes on two CPU cores: the bytes of Python's standard library.

  python -m evo_jax.main --config=tiny

Your own text: --config.data.path='dir/*.txt'. A longer run: --config.train.steps=5000.
"""

from evo_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.layers = 4
  c.model.width = 128
  c.model.heads = 2
  c.model.kv_heads = 2
  c.model.hidden = 384
  c.model.context = 128
  c.window.size = 16
  c.window.count = 2
  c.data.batch_size = 16
  c.train.steps = 480
  c.train.checkpoint_every = 100
  c.train.eval_every = 240
  c.optim.learning_rate = 3e-3
  c.optim.warmup = 60
  return c
