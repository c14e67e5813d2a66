"""Makes the tiny random models of this folder, and what transformers computes with them. Run by hand:

  python tests/pretrained/make_references.py     (torch 2.13.0, transformers 5.24.0, tokenizers)

Each folder holds a model as `save_pretrained` writes it, and `reference.safetensors`: tokens (L,), logits (P, V)
float32 at `positions` (P,), short and beyond the original rotary length, and `greedy` (24,), the tokens that follow
PROMPT where none ends the text. The weights are scaled so that attention is peaked and logits have a standard deviation
above 1: then a wrong reading shows. Half of the configurations are written as older versions of transformers did.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

FOLDER = Path(__file__).parent
ROWS, TOKENS = 288, 281  # rows beyond the tokenizer's tokens, as Qwen has them
LENGTH, WRITTEN = 80, 24
PROMPT = "the rest of the night and"
SHARED = dict(
  vocab_size=ROWS,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=None,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)


def rope(theta, **more):
  return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


# By name: configuration, dtype, whether config.json is written in the old way, number of shards' bytes.
MODELS = {
  "llama2": (
    LlamaConfig(**SHARED | dict(num_key_value_heads=4, rms_norm_eps=1e-5) | rope(10_000.0)),
    torch.float16,
    True,
    "1GB",
  ),
  "llama31": (
    LlamaConfig(
      **SHARED
      | dict(
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, eos_token_id=[2, 3], rope_parameters=LLAMA3
      )
    ),
    torch.bfloat16,
    True,
    "1GB",
  ),
  "mistral": (
    MistralConfig(**SHARED | dict(rms_norm_eps=1e-5, sliding_window=None) | rope(1e6)),
    torch.bfloat16,
    False,
    "30KB",
  ),
  "smollm2": (
    LlamaConfig(
      **SHARED
      | dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5)
      | rope(100_000.0)
    ),
    torch.bfloat16,
    False,
    "1GB",
  ),
  "qwen25": (
    Qwen2Config(**SHARED | dict(rms_norm_eps=1e-6, tie_word_embeddings=True) | rope(1e6)),
    torch.bfloat16,
    True,
    "1GB",
  ),
  "qwen3": (Qwen3Config(**SHARED | dict(rms_norm_eps=1e-6, head_dim=16) | rope(1e6)), torch.bfloat16, False, "1GB"),
}


def draw_weights(model, tied: bool) -> None:
  """Random weights, of such sizes that every part matters."""
  generator = torch.Generator().manual_seed(0)
  for name, value in model.named_parameters():
    noise = torch.randn(value.shape, generator=generator)
    if "norm" in name:
      value.data = (1.7 if "q_norm" in name or "k_norm" in name else 1.0) + 0.3 * noise
    elif name.endswith("bias"):
      value.data = 0.7 * noise
    elif "embed_tokens" in name:
      value.data = (0.4 if tied else 0.01) * noise  # small: then the norm's epsilon matters
    elif "lm_head" in name:
      value.data = 0.4 * noise
    else:
      gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
      value.data = gain * value.shape[1] ** -0.5 * noise


def old_style(config: dict) -> dict:
  """config.json as versions before 5 wrote it: theta beside the scaling."""
  parameters = config.pop("rope_parameters")
  config["rope_theta"] = parameters.pop("rope_theta")
  config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
  config["torch_dtype"] = config.pop("dtype")
  if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
    del config["head_dim"]
  return config


def make(name: str) -> None:
  config, dtype, is_old, shard_size = MODELS[name]
  folder = FOLDER / name
  model = AutoModelForCausalLM.from_config(config)
  draw_weights(model, config.tie_word_embeddings)
  model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
  if is_old:
    file = folder / "config.json"
    file.write_text(json.dumps(old_style(json.loads(file.read_text())), indent=2) + "\n")
  (folder / "README.md").unlink(missing_ok=True)

  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokens = torch.randint(4, TOKENS, (LENGTH,), generator=torch.Generator().manual_seed(1))
  with torch.no_grad():
    logits = model(tokens[None]).logits[0].numpy()
    attention = (
      AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
      .eval()(tokens[None], output_attentions=True)
      .attentions
    )
    prompt = [1, *Tokenizer.from_file(str(FOLDER / "tokenizer" / "tokenizer.json")).encode(PROMPT).ids]
    text = torch.tensor(prompt)
    for _ in range(WRITTEN):
      scores = model(text[None]).logits[0, -1, :TOKENS]  # of the tokens alone
      scores[[2, 3]] = -torch.inf  # which end a text
      best = scores.topk(2)
      assert best.values[0] - best.values[1] > 1e-3, name
      text = torch.cat([text, best.indices[:1]])
  positions = np.r_[:12, LENGTH - 12 : LENGTH]
  peak = np.mean([a[0, :, -12:].amax(-1).mean().item() for a in attention])
  print(f"{name}: logits' deviation {logits.std():.2f}, largest attention {peak:.2f} of {LENGTH} keys")
  assert logits.std() > 1 and peak > 0.15
  save_file(
    {
      "tokens": tokens.numpy().astype(np.int32),
      "positions": positions.astype(np.int32),
      "logits": logits[positions].astype(np.float32),
      "greedy": text[len(prompt) :].numpy().astype(np.int32),
    },
    folder / "reference.safetensors",
  )


def make_tokenizer() -> None:
  """A byte-level BPE of 281 tokens, four of them special: shared by the models."""
  symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
  specials = ["<unk>", "<s>", "</s>", "<|end|>"]
  pairs = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "a"), ("o", "n")]
  pairs += [("Ġ", "s"), ("Ġ", "w"), ("e", "r"), ("o", "u"), ("r", "e"), ("i", "s"), ("Ġ", "and"), ("in", "g")]
  pairs += [("Ġ", "o"), ("o", "r"), ("Ġo", "f"), ("a", "t"), ("e", "n")]
  vocabulary = {token: i for i, token in enumerate(specials + symbols + [a + b for a, b in pairs])}
  tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(specials)
  assert tokenizer.get_vocab_size() == TOKENS, tokenizer.get_vocab_size()
  folder = FOLDER / "tokenizer"
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
  names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, **names}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
  make_tokenizer()
  for model_name in MODELS:
    make(model_name)
