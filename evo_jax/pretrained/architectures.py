"""Fields of a checkpoint's config.json against those of config.model, both ways.

Every field is known: what describes the network becomes a field of config.model, what changes no result is passed
over, what cannot be represented is refused by its name, and so is a field that is not known at all.
"""

from collections.abc import Iterable
from typing import Any

from evo_jax import config as config_lib
from evo_jax.errors import UserError

# By name in `architectures`: fields of config.model that the name itself decides.
ARCHITECTURES = {
  "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
  "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False},
  "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
  "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
}
_SIZES = {
  "num_hidden_layers": "layers",
  "hidden_size": "width",
  "intermediate_size": "hidden",
  "num_attention_heads": "heads",
  "num_key_value_heads": "kv_heads",
  "head_dim": "head_dim",
  "max_position_embeddings": "context_limit",
  "vocab_size": "vocab_size",
}
# The only values with which a field means nothing.
_WITHOUT_EFFECT = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "partial_rotary_factor": (1, None),
  "rope_interleaved": (False, None),
  "quantization_config": (None,),
  "logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "attn_logit_softcapping": (None,),
  "num_experts": (0, None),
  "num_local_experts": (0, None),
  "is_decoder": (True, False, None),
  "add_cross_attention": (False, None),
  "is_encoder_decoder": (False, None),
}
# Fields that change no result of the network: training, generation, bookkeeping.
_PASSED_OVER = {
  "architectures",
  "model_type",
  "torch_dtype",
  "dtype",
  "transformers_version",
  "transformers.js_config",
  "_name_or_path",
  "name_or_path",
  "_attn_implementation",
  "_from_model_config",
  "initializer_range",
  "attention_dropout",
  "hidden_dropout",
  "pretraining_tp",  # splits products, whose sum it is
  "use_cache",
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "unk_token_id",
  "max_window_layers",  # only with use_sliding_window
  "is_llama_config",
  "output_attentions",
  "output_hidden_states",
  "return_dict",
  "tokenizer_class",
  "chunk_size_feed_forward",
  "id2label",
  "label2id",
  "problem_type",
  "unsloth_fixed",
  "unsloth_version",
}
_MISTRALS_WINDOW = 4096  # where the field is missing (transformers' MistralConfig)
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
_READ = {*_SIZES, *_ROPE, "rms_norm_eps", "tie_word_embeddings", "sliding_window", "layer_types"}


def read_model(values: dict[str, Any], where: str, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
  """Fields of config.model from those of config.json.

  where: the file, for messages. ignored: fields that the user says change no result. Raises UserError for an
  architecture or a field that is not known or cannot be represented.
  """
  name = _architecture(values, where)
  values = {field: value for field, value in values.items() if field not in ignored}
  for field, value in values.items():
    if field in _WITHOUT_EFFECT and value not in _WITHOUT_EFFECT[field]:
      raise UserError(f"{where}: {field}: {_shortened(value)} cannot be represented")
    if field not in _READ | _PASSED_OVER | set(_WITHOUT_EFFECT):
      raise UserError(
        f"{where}: {field}: {_shortened(value)} is not known, and may change the result; if not: --ignore={field}"
      )
  fields = {ours: _size(values, theirs, name, where) for theirs, ours in _SIZES.items()}
  if fields["head_dim"] * fields["heads"] == fields["width"]:
    fields["head_dim"] = 0  # said or not said, it is the same model
  _refuse_sliding_windows(values, name, fields, where)
  return {
    **fields,
    **ARCHITECTURES[name],
    **_rope(values, name, where),
    "norm_epsilon": _number(values, "rms_norm_eps", where),
    "norm_casts_first": True,
    "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
  }


def _architecture(values: dict[str, Any], where: str) -> str:
  names = values.get("architectures") or []
  if not isinstance(names, list) or len(names) != 1 or not _is_one_of(names[0], ARCHITECTURES):
    names = names if isinstance(names, list) else [names]
    found = ", ".join(map(str, names)) or f"none (model_type {values.get('model_type')!r})"
    raise UserError(f"{where}: architectures: {found} is not one of {', '.join(ARCHITECTURES)}")
  return names[0]


def _is_one_of(value: Any, known: Iterable[str]) -> bool:
  return isinstance(value, str) and value in known


def _shortened(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else text[:56] + "..."


def _size(values: dict[str, Any], field: str, architecture: str, where: str) -> int:
  value = values.get(field)
  if value is None and architecture == "LlamaForCausalLM" and field == "num_key_value_heads":
    value = values.get("num_attention_heads")
  if value is None and field == "head_dim" and architecture != "Qwen3ForCausalLM":
    return 0
  if value is None:  # transformers' own default is another for each architecture
    raise UserError(f"{where}: {field}: is missing")
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise UserError(f"{where}: {field}: {_shortened(value)} is not a positive number")
  return value


def _number(values: dict[str, Any], field: str, where: str) -> float:
  value = values.get(field)
  if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
    raise UserError(f"{where}: {field}: {_shortened(value)} is not a positive number")
  return float(value)


def _refuse_sliding_windows(values: dict[str, Any], architecture: str, fields: dict[str, Any], where: str) -> None:
  default = _MISTRALS_WINDOW if architecture == "MistralForCausalLM" else None
  window = values.get("sliding_window", default)
  # Qwen's is off unless use_sliding_window, which was checked; others' files may have that field, and nobody reads it.
  if window is not None and not (architecture.startswith("Qwen") and "use_sliding_window" in values):
    if not isinstance(window, int) or isinstance(window, bool):
      raise UserError(f"{where}: sliding_window: {_shortened(window)} is no number")
    if window < fields["context_limit"]:  # one as long as all text hides nothing
      given = "" if "sliding_window" in values else f", which a {architecture} has without the field,"
      raise UserError(
        f"{where}: sliding_window: {window}{given} cannot be represented: attention is to all tokens before"
      )
  kinds = values.get("layer_types") or []
  for kind in kinds if isinstance(kinds, list) else [kinds]:
    if kind != "full_attention":
      raise UserError(f"{where}: layer_types: {_shortened(kind)} cannot be represented")


def _rope(values: dict[str, Any], architecture: str, where: str) -> dict[str, Any]:
  """Rotary base and scaling, of which older versions write rope_theta and rope_scaling, newer ones rope_parameters."""
  given = {field: values[field] for field in ("rope_parameters", "rope_scaling") if values.get(field) is not None}
  for field, value in given.items():
    if not isinstance(value, dict):
      raise UserError(f"{where}: {field}: {_shortened(value)} is not an object")
  thetas = {f"{field}.rope_theta": value["rope_theta"] for field, value in given.items() if "rope_theta" in value}
  if values.get("rope_theta") is not None:
    thetas["rope_theta"] = values["rope_theta"]
  scalings = {field: _scaling(value, field, where) for field, value in given.items()}
  for found in (thetas, scalings):
    if len({repr(value) for value in found.values()}) > 1:
      (a, x), (b, y) = list(found.items())[:2]
      raise UserError(f"{where}: {a} and {b} disagree: {_shortened(x)}, {_shortened(y)}")
  if not thetas and architecture != "LlamaForCausalLM":  # the first Llamas' files have none
    raise UserError(f"{where}: rope_theta: is missing")
  base = _number({"rope_theta": next(iter(thetas.values()), 10_000.0)}, "rope_theta", where)
  return {**_NO_SCALING, "rope_base": base, **next(iter(scalings.values()), {})}


_LLAMA3 = {
  "factor": "rope_factor",
  "low_freq_factor": "rope_low_factor",
  "high_freq_factor": "rope_high_factor",
  "original_max_position_embeddings": "rope_original_context",
}
_NO_SCALING = {field: getattr(config_lib.Model(), field) for field in ("rope_scaling", *_LLAMA3.values())}


def _scaling(values: dict[str, Any], field: str, where: str) -> dict[str, Any]:
  """The scaling that rope_parameters or rope_scaling describes, as fields of config.model."""
  kinds = [values[name] for name in ("rope_type", "type") if name in values]
  if not kinds or any(kind != kinds[0] for kind in kinds):
    raise UserError(f"{where}: {field}: has no single rope_type, but {sorted(map(str, kinds))}")
  kind = kinds[0]
  scalings = {"default": {}, "linear": {"factor": "rope_factor"}, "llama3": _LLAMA3}
  needed = scalings[kind] if _is_one_of(kind, scalings) else None
  if needed is None:
    raise UserError(f"{where}: {field}.rope_type: {kind!r} is not one of default, linear, llama3")
  passed_over = {"rope_type", "type", "rope_theta"}
  if kind == "linear":
    passed_over |= {"original_max_position_embeddings"}
  if values.get("partial_rotary_factor", 1) == 1:
    passed_over |= {"partial_rotary_factor"}
  if unknown := sorted(set(values) - set(needed) - passed_over):
    raise UserError(f"{where}: {field}.{unknown[0]}: {_shortened(values[unknown[0]])} is not known for {kind}")
  scaling = {ours: _number(values, theirs, f"{where}: {field}") for theirs, ours in needed.items()}
  if "rope_original_context" in scaling:
    scaling["rope_original_context"] = int(scaling["rope_original_context"])
  return {"rope_scaling": "none" if kind == "default" else kind, **scaling}


def describe_model(model: config_lib.Model, dtype: str, vocab_size: int) -> dict[str, Any]:
  """config.json of a model trained here, as the simplest architecture that has its fields. Raises UserError for one
  that none has.

  dtype: of its tensors. vocab_size: rows of its tables.
  """
  if model.qk_norm and model.qkv_bias:
    raise UserError("config.model.qkv_bias: no architecture that can be exported has it beside model.qk_norm")
  name, kind = "LlamaForCausalLM", "llama"
  if model.qk_norm:
    name, kind = "Qwen3ForCausalLM", "qwen3"
  elif model.qkv_bias:
    name, kind = "Qwen2ForCausalLM", "qwen2"
    if model.head_size * model.heads != model.width:
      raise UserError("config.model.head_dim: no architecture that can be exported has it beside model.qkv_bias")
  config = {"architectures": [name], "model_type": kind}
  ours = {**{field: getattr(model, field) for field in _SIZES.values()}}
  ours |= {"head_dim": model.head_size, "context_limit": model.position_limit, "vocab_size": vocab_size}
  config |= {theirs: ours[field] for theirs, field in _SIZES.items()}
  scaling = {"rope_type": "default"} if model.rope_scaling == "none" else {"rope_type": model.rope_scaling}
  if model.rope_scaling == "linear":
    scaling["factor"] = model.rope_factor
  if model.rope_scaling == "llama3":
    scaling |= {theirs: getattr(model, field) for theirs, field in _LLAMA3.items()}
  return config | {
    "hidden_act": "silu",
    "rms_norm_eps": model.norm_epsilon,
    "tie_word_embeddings": model.tie_embeddings,
    # Both forms, since older versions of transformers read rope_theta and rope_scaling alone.
    "rope_theta": model.rope_base,
    "rope_scaling": None if model.rope_scaling == "none" else scaling,
    "rope_parameters": scaling | {"rope_theta": model.rope_base},
    "attention_bias": False,
    "torch_dtype": dtype,
  }
