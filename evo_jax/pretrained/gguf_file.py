"""GGUF files: configuration, tensors and tokenizer as Hugging Face's folders have them.

Tensors are read one at a time, as stored (F32, F16, BF16) or dequantized to float32 by the `gguf` package. Rows of q
and k of the architecture "llama", which GGUF keeps with each rotated pair side by side, are put in transformers' order:
all first elements of a head's pairs, then all second ones.
"""

from collections.abc import Mapping
import os
import re
from typing import Any

import ml_dtypes
import numpy as np

from evo_jax.errors import UserError
from evo_jax.pretrained import gguf_tokenizer
from evo_jax.pretrained.gguf_header import Tensor, read_header

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_TENSORS = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"
# Keys of an architecture that `_config` reads; any other might change the result, and is refused.
_KEYS = (
  "vocab_size",
  "context_length",
  "embedding_length",
  "block_count",
  "feed_forward_length",
  "attention.head_count",
  "attention.head_count_kv",
  "attention.key_length",
  "attention.value_length",
  "attention.layer_norm_rms_epsilon",
  "attention.sliding_window",
  "rope.dimension_count",
  "rope.freq_base",
  "rope.scale_linear",
  "rope.scaling.type",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
  "tensor_data_layout",
)
_NONE = ("expert_count", "expert_used_count")  # harmless where they are 0


def open_gguf(path: str | os.PathLike) -> "GgufFile":
  """The model in a GGUF file. Raises UserError for what cannot be read, before any tensor is."""
  try:
    import gguf
  except ImportError as error:
    raise UserError(f"{path}: GGUF files need the package gguf: pip install 'evo_jax[pretrained]'") from error
  try:
    return GgufFile(str(path), *read_header(path, gguf), gguf)
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


class GgufFile:
  """A source of pretrained weights, with the names, shapes and order of rows of Hugging Face's checkpoints.

  config: as in config.json. generation: as in generation_config.json.
  """

  def __init__(self, path: str, metadata: dict[str, Any], tensors: dict[str, Tensor], library):
    """library: the package gguf. Raises UserError for what cannot be represented."""
    self.description, self._metadata, self._tensors, self._library = path, metadata, tensors, library
    if metadata.get("general.type", "model") != "model":
      raise UserError(f"{path}: general.type is {metadata['general.type']!r}, not 'model'")
    if metadata.get("split.count", 1) > 1:
      raise UserError(f"{path}: is one of {metadata['split.count']} parts; join them by llama-gguf-split --merge")
    self.config = _config(metadata, tensors, path)
    self._gguf_names = {_huggingface_name(name, path): name for name in tensors if name != _ROPE_FREQS}
    self._check_types()
    self.generation = gguf_tokenizer.generation_config(metadata)

  def names(self) -> list[str]:
    """Of all tensors."""
    return sorted(self._gguf_names)

  def _tensor(self, name: str) -> Tensor:
    return self._tensors[self._gguf_names[name]]

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor."""
    return self._tensor(name).shape

  def dtype(self, name: str) -> str:
    """Of a tensor as `read` gives it: F32, F16, BF16."""
    stored = self._tensor(name).kind.name
    return stored if stored in _DTYPES else "F32"

  def read(self, name: str) -> np.ndarray:
    """A tensor in memory: float32, float16 or ml_dtypes.bfloat16."""
    array = self._stored(self._tensor(name))
    config, part = self.config, re.search(r"\.([qk])_proj\.", name)
    if part and config["model_type"] == "llama":
      heads = config["num_attention_heads"] if part[1] == "q" else config["num_key_value_heads"]
      array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array

  def _stored(self, tensor: Tensor) -> np.ndarray:
    """A tensor, its rows as the file has them."""
    if tensor.kind.name in _DTYPES:
      return np.array(tensor.data).view(_DTYPES[tensor.kind.name]).reshape(tensor.shape)
    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    return self._library.dequantize(rows, tensor.kind)

  def tokenizer_files(self) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata. Raises UserError."""
    return gguf_tokenizer.tokenizer_files(self._metadata, self.description)

  def close(self) -> None:
    """Lets go of the file."""
    self._tensors, self._metadata = {}, {}

  def _check_types(self) -> None:
    """Raises UserError for the first tensor whose type cannot be read."""
    known = {}
    for name, tensor in self._tensors.items():
      known.setdefault(tensor.kind, (name, tensor))
    for kind, (name, tensor) in known.items():
      try:
        if kind.name not in _DTYPES:
          block_bytes = self._library.GGML_QUANT_SIZES[kind][1]
          self._library.dequantize(tensor.data[:block_bytes].reshape(1, -1), kind)
      except NotImplementedError as error:
        raise UserError(f"{self.description}: {name} is of GGUF type {kind.name}, which cannot be read") from error


def _huggingface_name(name: str, path: str) -> str:
  if name in _TENSORS:
    return _TENSORS[name]
  match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
  if not match or match[2] not in _LAYER_TENSORS:
    raise UserError(f"{path}: tensor {name} is of no architecture that can be read")
  return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
  """The model's config.json. Raises UserError that names a key."""
  architecture = metadata.get("general.architecture")
  if architecture not in _ARCHITECTURES:
    raise UserError(f"{path}: architecture {architecture!r} cannot be read; {', '.join(_ARCHITECTURES)} can")
  for key in metadata:
    of, _, name = key.partition(".")
    if of == architecture and name not in _KEYS and (name not in _NONE or metadata[key]):
      raise UserError(f"{path}: {key} = {metadata[key]!r} is not known, and might change the result")
  get = lambda key, default=None: _number(metadata, f"{architecture}.{key}", default, path)
  if "token_embd.weight" not in tensors:
    raise UserError(f"{path}: has no tensor token_embd.weight")
  heads, width = get("attention.head_count"), get("embedding_length")
  head_dim = get("attention.key_length", width // max(heads, 1))
  for key in ("attention.value_length", "rope.dimension_count"):
    if get(key, head_dim) != head_dim:
      raise UserError(f"{path}: {architecture}.{key} = {get(key)} is not the head size {head_dim}")
  config = {
    "architectures": [_ARCHITECTURES[architecture]],
    "model_type": architecture,
    "hidden_size": width,
    "intermediate_size": get("feed_forward_length"),
    "num_hidden_layers": get("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": get("context_length"),
    "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
    "rope_theta": get("rope.freq_base", 10_000.0),
    "vocab_size": tensors["token_embd.weight"].shape[0],
    "tie_word_embeddings": "output.weight" not in tensors,
    "torch_dtype": _DTYPES.get(tensors["token_embd.weight"].kind.name, _DTYPES["F32"]).name,
    "rope_scaling": _rope_scaling(metadata, architecture, tensors, head_dim, path),
    **gguf_tokenizer.generation_config(metadata),
  }
  if architecture != "qwen2":  # whose biases go without saying
    config["attention_bias"] = any(re.search(r"attn_(q|k|v|output)\.bias", name) for name in tensors)
  if window := get("attention.sliding_window", 0):
    config["sliding_window"] = window
  return config


def _number(metadata: Mapping[str, Any], key: str, default: Any, path: str) -> Any:
  value = metadata.get(key, default)
  if value is None:
    raise UserError(f"{path}: has no {key}")
  if isinstance(value, list):
    raise UserError(f"{path}: {key} has a value for each layer, which cannot be represented")
  if not isinstance(value, int | float) or value < 0:
    raise UserError(f"{path}: {key} = {value!r} is not a number of that kind")
  return value


def _rope_scaling(
  metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Tensor], head_dim: int, path: str
) -> dict[str, Any] | None:
  """As in config.json; None: there is no scaling."""
  get = lambda key, default: metadata.get(f"{architecture}.rope.{key}", default)
  if _ROPE_FREQS in tensors:
    return _llama3_scaling(tensors[_ROPE_FREQS].data.view(np.float32), get("freq_base", 10_000.0), head_dim, path)
  kind, factor = get("scaling.type", None), get("scaling.factor", get("scale_linear", 1.0))
  kind = kind or ("none" if factor == 1 else "linear")
  if kind == "none" or (kind == "linear" and factor == 1):
    return None
  scaling = {"rope_type": kind, "factor": factor}
  if original := get("scaling.original_context_length", None):
    scaling["original_max_position_embeddings"] = original
  return scaling


def _llama3_scaling(divisors: np.ndarray, base: float, head_dim: int, path: str) -> dict[str, Any] | None:
  """Llama 3.1's parameters, which GGUF does not keep, from what they divide each rotary frequency by (head_dim / 2,).

  Raises UserError where no parameters give these divisors: they are of another kind of scaling.
  """
  factor = float(divisors.max())
  if np.all(divisors == 1):
    return None
  wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
  low, high = 1.0, 4.0  # of all models so far
  for original in (2**power for power in range(5, 20)):
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape == smooth.shape and np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
      return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
      }
  raise UserError(f"{path}: {_ROPE_FREQS} is not Llama 3.1's scaling, and no other of its kind is known")
