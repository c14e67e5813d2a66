"""This project's own tokenizers as Hugging Face's tokenizer.json, for models trained here."""

import json
from typing import Any

from evo_jax.data import tokenizers

_SPECIAL = "<|doc|>"  # id 0: begins sequences, separates documents, ends texts


def describe_tokenizer(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
  """The files of a tokenizer by name, as transformers reads them, and as `tokenizers.load_tokenizer` does."""
  own = tokenizer.files()
  if "tokenizer.json" in own:
    return own
  if isinstance(tokenizer, tokenizers.SentencePiece):
    specification = _sentencepiece(tokenizer)
  else:
    specification = _bytes() if isinstance(tokenizer, tokenizers.Bytes) else _chars27()
  special = {"bos_token": _SPECIAL, "eos_token": _SPECIAL}
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
  encode = lambda value: json.dumps(value, ensure_ascii=False).encode()
  return own | {"tokenizer.json": encode(specification), "tokenizer_config.json": encode(settings)}


def _specification(
  model: dict[str, Any], normalizer=None, pre_tokenizer=None, decoder=None, added=()
) -> dict[str, Any]:
  token = lambda i, content, special: {
    "id": i,
    "content": content,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": special,
  }
  # The special token stands in front of every text, as in training.
  begins = {"SpecialToken": {"id": _SPECIAL, "type_id": 0}}
  sequence = lambda letter, kind: {"Sequence": {"id": letter, "type_id": kind}}
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [token(0, _SPECIAL, True), *(token(i, content, False) for i, content in added)],
    "normalizer": normalizer,
    "pre_tokenizer": pre_tokenizer,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [begins, sequence("A", 0)],
      "pair": [begins, sequence("A", 0), sequence("B", 0)],
      "special_tokens": {_SPECIAL: {"id": _SPECIAL, "ids": [0], "tokens": [_SPECIAL]}},
    },
    "decoder": decoder,
    "model": model,
  }


def _bpe(vocabulary: dict[str, int]) -> dict[str, Any]:
  """A model without merges: each symbol is a token."""
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": {_SPECIAL: 0, **vocabulary},
    "merges": [],
  }


def _bytes() -> dict[str, Any]:
  """Byte b is token b + 1; bytes that are no printable character stand as others, from U+0100 on (GPT-2)."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  symbols = {byte: chr(byte) for byte in printable}
  others = (byte for byte in range(256) if byte not in symbols)
  symbols |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
  level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
  return _specification(_bpe({symbol: byte + 1 for byte, symbol in symbols.items()}), None, level, level)


def _chars27() -> dict[str, Any]:
  """Space, and a to z: other characters become one space."""
  vocabulary = {" ": 1} | {chr(ord("a") + i): i + 2 for i in range(26)}
  normalizer = {
    "type": "Sequence",
    "normalizers": [
      {"type": "Lowercase"},
      {"type": "Replace", "pattern": {"Regex": "[^a-z]+"}, "content": " "},
    ],
  }
  return _specification(_bpe(vocabulary), normalizer, None, {"type": "Fuse"})


def _sentencepiece(tokenizer: tokenizers.SentencePiece) -> dict[str, Any]:
  """Unigram with bytes for characters without a piece."""
  pieces = tokenizer.pieces()
  model = {
    "type": "Unigram",
    "unk_id": 1,
    "vocab": [[_SPECIAL, 0.0], *map(list, pieces[1:])],
    "byte_fallback": True,
  }
  replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
  decoder = {
    "type": "Sequence",
    "decoders": [replace("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
  }
  given = [(i, text) for i, (text, _) in enumerate(pieces) if text == "\n"]  # in no other piece
  return _specification(model, replace(" ", "\u2581"), None, decoder, given)
