"""The tokenizer of a GGUF file, rebuilt from its metadata as the files that Hugging Face's libraries read.

Kinds (tokenizer.ggml.model): "gpt2", byte-level BPE with the pre-tokenizer that tokenizer.ggml.pre names, and "llama",
SentencePiece's BPE, whose merges follow from the scores of its pieces.
"""

from collections.abc import Mapping
import json
from typing import Any

from evo_jax.errors import UserError

# Token types (tokenizer.ggml.token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"
_TEMPLATE = "tokenizer.chat_template"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns by the name of the pre-tokenizer; each splits the pieces that those before it left. "default" is llama.cpp's
# for files that name none.
_SPLITS = {
  "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
  "gpt-2": (_GPT2,),
  "smollm": (r"\p{N}", _GPT2),
  "starcoder": (r"\p{N}", _GPT2),
  "llama-bpe": (_LLAMA3,),
  "llama3": (_LLAMA3,),
  "llama-v3": (_LLAMA3,),
  "smaug-bpe": (_LLAMA3,),
  "qwen2": (_QWEN2,),
  "deepseek-r1-qwen": (_QWEN2,),
  "tekken": (_TEKKEN,),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token needs no merges
_ADD_BEGIN = _WHOLE_WORDS  # where the file does not say it
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # text in normal form NFC


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
  """tokenizer.json, tokenizer_config.json and generation_config.json. Raises UserError, naming `where` and a key.

  metadata: the file's values by key.
  """
  kind = metadata.get("tokenizer.ggml.model")
  builders = {"gpt2": _byte_level, "llama": _sentencepiece}
  if kind not in builders:
    raise UserError(f"{where}: tokenizer.ggml.model {kind!r} cannot be read; {' and '.join(builders)} can")
  if not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
    raise UserError(f"{where}: has no tokenizer.ggml.tokens")
  tokens, types = _tokens_and_types(metadata, where)
  special = {name: _special_id(metadata, key, tokens, where) for name, key in _SPECIAL_KEYS.items()}
  for id_ in special.values():
    if id_ is not None and types[id_] != _UNKNOWN:
      types[id_] = _CONTROL
  adds_begin = metadata.get("tokenizer.ggml.add_bos_token")
  if adds_begin is None:
    adds_begin = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _ADD_BEGIN
  begin = special["bos_token"] if adds_begin else None
  specification = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": _added_tokens(tokens, types),
    "post_processor": None if begin is None else _begin_template(tokens[begin], begin),
    **builders[kind](metadata, tokens, types, where),
  }
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": bool(adds_begin),
    "clean_up_tokenization_spaces": False,
    **{name: tokens[special[name]] for name in _NAMED if special[name] is not None},
  }
  if template := metadata.get(_TEMPLATE):
    config["chat_template"] = template
  return {
    "tokenizer.json": _json(specification),
    "tokenizer_config.json": _json(config),
    "generation_config.json": _json(generation_config(metadata)),
  }


_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPECIAL_KEYS = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "unk_token": "unknown_token_id",
  "pad_token": "padding_token_id",
  "eot": "eot_token_id",
  "eom": "eom_token_id",
}


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """generation_config.json: the ids that begin and end texts."""
  get = lambda name: metadata.get(f"tokenizer.ggml.{name}_token_id")
  ends = list(dict.fromkeys(end for end in map(get, ("eos", "eot", "eom")) if end is not None))
  values = {"bos_token_id": get("bos"), "eos_token_id": ends or None, "pad_token_id": get("padding")}
  return {name: value for name, value in values.items() if value is not None}


def _json(value: dict[str, Any]) -> bytes:
  return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _tokens_and_types(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
  """Both without the rows at the end that no token belongs to, which converters call [PAD151665] and mark as unused."""
  tokens = list(metadata["tokenizer.ggml.tokens"])
  types = list(metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens))
  if len(types) != len(tokens):
    raise UserError(f"{where}: has {len(tokens)} tokenizer.ggml.tokens, but {len(types)} tokenizer.ggml.token_type")
  while tokens and types[-1] == _UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
    tokens.pop()
    types.pop()
  if len(set(tokens)) != len(tokens):
    twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
    raise UserError(f"{where}: tokenizer.ggml.tokens has {twice!r} twice")
  return tokens, types


def _special_id(metadata: Mapping[str, Any], key: str, tokens: list[str], where: str) -> int | None:
  id_ = metadata.get(f"tokenizer.ggml.{key}")
  if id_ is not None and not (isinstance(id_, int) and 0 <= id_ < len(tokens)):
    raise UserError(f"{where}: tokenizer.ggml.{key} = {id_!r} is not among the {len(tokens)} tokens")
  return id_


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
  """Tokens that are found in text as they stand: special (control, unknown) and user-defined ones."""
  fixed = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  return [
    {"id": i, "content": token, **fixed, "special": type_ != _USER_DEFINED}
    for i, (token, type_) in enumerate(zip(tokens, types))
    if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
  ]


def _begin_template(token: str, id_: int) -> dict[str, Any]:
  """The post-processor that puts a begin token in front of text."""
  begin = {"SpecialToken": {"id": token, "type_id": 0}}
  first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
  return {
    "type": "TemplateProcessing",
    "single": [begin, first],
    "pair": [begin, first, begin, second],
    "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
  }


def _bpe(tokens: list[str], merges: list[list[str]], **fields: Any) -> dict[str, Any]:
  default = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
  affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "dropout": None}
  vocab = {token: i for i, token in enumerate(tokens)}
  return {"type": "BPE", **affixes, **default, **fields, "vocab": vocab, "merges": merges}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
  """Model, normalizer, pre-tokenizer and decoder of byte-level BPE."""
  pre = metadata.get("tokenizer.ggml.pre", "default")
  if pre not in _SPLITS:
    raise UserError(f"{where}: tokenizer.ggml.pre {pre!r} is not known; {', '.join(_SPLITS)} are")
  if not isinstance(metadata.get("tokenizer.ggml.merges"), list):
    raise UserError(f"{where}: has no tokenizer.ggml.merges")
  merges = [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]]
  splits = [
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    for pattern in _SPLITS[pre]
  ]
  to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  return {
    "normalizer": {"type": "NFC"} if pre in _COMPOSED else None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]},
    "decoder": to_bytes,
    "model": _bpe(tokens, merges, ignore_merges=pre in _WHOLE_WORDS),
  }


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
  """Model, normalizer and decoder of SentencePiece's BPE. It puts a space in front of text unless the file says no."""
  if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
    raise UserError(f"{where}: tokenizer.ggml.remove_extra_whitespaces cannot be done")
  scores = metadata.get("tokenizer.ggml.scores")
  if "tokenizer.ggml.merges" in metadata:
    merges = [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]]
  elif isinstance(scores, list) and len(scores) >= len(tokens):
    merges = _merges_by_score(tokens, types, scores)
  else:
    raise UserError(f"{where}: has no tokenizer.ggml.scores for its tokens")
  prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
  to_symbol = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
  to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
  strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
  unknown = next((token for token, type_ in zip(tokens, types) if type_ == _UNKNOWN), None)
  return {
    "normalizer": {
      "type": "Sequence",
      "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), to_symbol],
    },
    "pre_tokenizer": None,
    "decoder": {
      "type": "Sequence",
      "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])],
    },
    "model": _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types),
  }


def _merges_by_score(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
  """All ways to make a piece of two others, those of the best piece first.

  SentencePiece merges the two neighbours that make the piece of the best score. Control, unknown, unused and byte
  tokens are neither made of others nor parts of them.
  """
  apart = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
  pieces = {token: i for i, (token, type_) in enumerate(zip(tokens, types)) if type_ not in apart}
  merges = []
  for piece in sorted(pieces, key=lambda piece: -scores[pieces[piece]]):
    pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    pairs = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
    merges += sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
  return [list(pair) for pair in merges]
