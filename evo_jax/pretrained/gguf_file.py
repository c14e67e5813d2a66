"""GGUF files: configuration, tensors and tokenizer as Hugging Face's folders have them.

Tensors are read one at a time, as stored (F32, F16, BF16) or dequantized to float32 by the `gguf` package. Rows of q
and k of the architecture "llama", which GGUF keeps with each rotated pair side by side, are put in transformers' order:
all first elements of a head's pairs, then all second ones.
"""

from collections.abc import Iterator, Mapping
import os
import re
from typing import Any

import ml_dtypes
import numpy as np

from evo_jax.errors import UserError
from evo_jax.pretrained import gguf_tokenizer

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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


def open_gguf(path: str | os.PathLike) -> "GgufFile":
  """The model in a GGUF file. Raises UserError for what cannot be read, before any tensor is."""
  try:
    import gguf
  except ImportError as error:
    raise UserError(f"{path}: GGUF files need the package gguf: pip install 'evo_jax[pretrained]'") from error
  try:
    reader = gguf.GGUFReader(path)
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
  except Exception as error:  # the reader checks little: what is cut off or damaged fails somewhere in it
    kind = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
    reason = f"a tensor is of GGUF type {kind[1]}, which the package gguf does not know" if kind else str(error)
    raise UserError(f"{path}: is not a GGUF file, or cut off or damaged ({reason})") from error
  return GgufFile(str(path), reader, gguf.dequantize)


class GgufFile:
  """A source of pretrained weights, with the names, shapes and order of rows of Hugging Face's checkpoints.

  config: as in config.json. generation: as in generation_config.json.
  """

  def __init__(self, path: str, reader, dequantize):
    """reader: a gguf.GGUFReader. dequantize: gguf.dequantize. Raises UserError for what cannot be represented."""
    self.description, self._reader, self._dequantize = path, reader, dequantize
    self._metadata = _Metadata(reader.fields)
    if reader.byte_order != "I":
      raise UserError(f"{path}: is of the other byte order than this machine")
    if self._metadata.get("general.type", "model") != "model":
      raise UserError(f"{path}: general.type is {self._metadata['general.type']!r}, not 'model'")
    if self._metadata.get("split.count", 1) > 1:
      raise UserError(f"{path}: is one of {self._metadata['split.count']} parts; join them by llama-gguf-split --merge")
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self._gguf_names = {_huggingface_name(name, path): name for name in self._tensors if name != _ROPE_FREQS}
    self._check_types()
    self.config = _config(self._metadata, self._tensors, path)
    self.generation = gguf_tokenizer.generation_config(self._metadata)

  def names(self) -> list[str]:
    """Of all tensors."""
    return sorted(self._gguf_names)

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor."""
    return tuple(int(size) for size in reversed(self._tensors[self._gguf_names[name]].shape))

  def dtype(self, name: str) -> str:
    """Of a tensor as `read` gives it: F32, F16, BF16."""
    stored = self._tensors[self._gguf_names[name]].tensor_type.name
    return stored if stored in _DTYPES else "F32"

  def read(self, name: str) -> np.ndarray:
    """A tensor in memory: float32, float16 or ml_dtypes.bfloat16."""
    tensor = self._tensors[self._gguf_names[name]]
    if tensor.tensor_type.name in ("F32", "F16"):
      array = np.array(tensor.data)
    elif tensor.tensor_type.name == "BF16":
      array = np.array(tensor.data).view(ml_dtypes.bfloat16).reshape(self.shape(name))
    else:
      array = self._dequantize(tensor.data, tensor.tensor_type)
    config, part = self.config, re.search(r"\.([qk])_proj\.", name)
    if part and config["model_type"] == "llama":
      heads = config["num_attention_heads"] if part[1] == "q" else config["num_key_value_heads"]
      array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array

  def tokenizer_files(self) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata. Raises UserError."""
    return gguf_tokenizer.tokenizer_files(self._metadata, self.description)

  def close(self) -> None:
    """Lets go of the file."""
    self._reader, self._tensors, self._metadata = None, {}, {}

  def _check_types(self) -> None:
    """Raises UserError for the first tensor whose type cannot be read."""
    known = set()
    for name, tensor in self._tensors.items():
      kind = tensor.tensor_type
      if kind in known:
        continue
      try:
        if kind.name.startswith(("I8", "I16", "I32", "I64", "F64")):
          raise NotImplementedError
        self._dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
      except NotImplementedError as error:
        raise UserError(f"{self.description}: {name} is of GGUF type {kind.name}, which cannot be read") from error
      known.add(kind)


class _Metadata(Mapping):
  """A GGUF file's values by key, each decoded when it is asked for and then kept."""

  def __init__(self, fields: Mapping[str, Any]):
    self._fields, self._values = fields, {}

  def __getitem__(self, key: str) -> Any:
    if key not in self._values:
      value, last = self._fields[key].contents(), self._fields[key].types[-1].name
      # A float32 as the shortest decimal that names it, which is what it was written from: 1e-05.
      self._values[key] = float(str(np.float32(value))) if last == "FLOAT32" and isinstance(value, float) else value
    return self._values[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._fields)

  def __len__(self) -> int:
    return len(self._fields)


def _huggingface_name(name: str, path: str) -> str:
  if name in _TENSORS:
    return _TENSORS[name]
  match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
  if not match or match[2] not in _LAYER_TENSORS:
    raise UserError(f"{path}: tensor {name} is of no architecture that can be read")
  return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], path: str) -> dict[str, Any]:
  """The model's config.json. Raises UserError that names a key."""
  architecture = metadata.get("general.architecture")
  if architecture not in _ARCHITECTURES:
    raise UserError(f"{path}: architecture {architecture!r} cannot be read; {', '.join(_ARCHITECTURES)} can")
  for key in metadata:
    if key.startswith(architecture + ".") and key.removeprefix(architecture + ".") not in _KEYS:
      raise UserError(f"{path}: {key} = {metadata[key]!r} is not known, and might change the result")
  get = lambda key, default=None: _number(metadata, f"{architecture}.{key}", default, path)
  if "token_embd.weight" not in tensors:
    raise UserError(f"{path}: has no tensor token_embd.weight")
  heads, width = get("attention.head_count"), get("embedding_length")
  head_dim = get("attention.key_length", width // heads)
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
    "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
    "tie_word_embeddings": "output.weight" not in tensors,
    "torch_dtype": _DTYPES.get(tensors["token_embd.weight"].tensor_type.name, "float32"),
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
  return value


def _rope_scaling(
  metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any], head_dim: int, path: str
) -> dict[str, Any] | None:
  """As in config.json; None: there is no scaling."""
  get = lambda key, default: metadata.get(f"{architecture}.rope.{key}", default)
  if _ROPE_FREQS in tensors:
    return _llama3_scaling(np.array(tensors[_ROPE_FREQS].data), get("freq_base", 10_000.0), head_dim, path)
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
