"""Hugging Face's tokenizers: a folder with tokenizer.json, encoded by the `tokenizers` library.

Three families: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), and BPE and Unigram models over text in which U+2581
stands for a space, as SentencePiece has it (Llama 2, Mistral). Files of the folder:

  tokenizer.json            the model, its normalizer and pre-tokenizer, added tokens
  tokenizer_config.json     bos_token, eos_token, add_bos_token, chat_template, ... (optional, as are the others)
  special_tokens_map.json   the same tokens, where tokenizer_config.json does not name them
  generation_config.json    eos_token_id: more ids that end a text
  chat_template.jinja       takes the place of tokenizer_config.json's chat_template

Special tokens are those that one of the files calls special, bos_token and eos_token. In text they are text: `encode`
gives none of their ids. Added tokens that are not special ("<think>") belong to the vocabulary like any other.

The ids of `Tokenizer`:

  separator_id  eos_token; where that ends turns ("<|im_end|>"), the token that ends documents ("<|endoftext|>")
  begin_id      bos_token where the tokenizer puts it in front of text (add_bos_token, or tokenizer.json's
                post-processor); elsewhere the separator, behind which texts began in pretraining: SmolLM2-Instruct's
                bos_token is "<|im_start|>", but web text costs it 0.02 nats per token less behind "<|endoftext|>"
  end_ids       eos_token, generation_config.json's ids, the separator, and tokens known to end turns
"""

import bisect
from collections.abc import Iterator, Sequence
import functools
import hashlib
import json
import re
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from evo_jax.data.token_ids import before_end, join_documents
from evo_jax.errors import UserError

FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
  "chat_template.json",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|return|>")
_SPACE = "\u2581"
_BATCH = 32  # texts that the library encodes at a time: its results take a hundred bytes per token


class _Ids(NamedTuple):
  """The special ids that a tokenizer's files name; see the module's docstring."""

  begin: int
  separator: int
  end: tuple[int, ...]
  turn_end: tuple[int, ...]


class HuggingFace:
  """The tokenizer of a folder as Hugging Face writes it.

  chat_template: Jinja source, or None. special: by text, the id of every special token. adds_begin: whether it is the
  tokenizer itself that puts `begin_id` in front of text.
  """

  unit = "byte"
  binary = False

  def __init__(self, folder: str):
    """Loads the tokenizer in `folder`. Raises UserError where there is none, or one that cannot be represented."""
    self.path = epath.Path(folder)
    self._files = _read_files(self.path)
    specification = self._read_specification()
    vocabulary = _vocabulary(specification)
    self.vocab_size = max(vocabulary.values(), default=-1) + 1
    self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
    config = {**self._json("special_tokens_map.json"), **_without_none(self._json("tokenizer_config.json"))}
    self.named = self._named_tokens(config, vocabulary)
    self.chat_template = self._chat_template(config)
    ids = self._find_ids(specification, config, vocabulary)
    self.begin_id, self.separator_id, self.end_ids, self.turn_end_ids = ids
    self.special = _special_tokens(specification, config, vocabulary, self.named, ids)
    begin = self.named.get("bos_token")
    self.adds_begin = begin is not None and _adds_begin(specification, config, begin)
    self._pieces = _pieces(specification, vocabulary, self.special)
    self._around = {token["content"]: (token["lstrip"], token["rstrip"]) for token in specification["added_tokens"]}
    self._specification = _protected(specification, self.special)
    self._kept: dict[str, bool] = {}  # by character, what `_keeps` found
    self._prefixed = self._decode(self._ids(self._tokenizer, "a")).startswith(" ")
    digest = hashlib.sha256(self._files["tokenizer.json"])
    digest.update(f"{self.begin_id} {self.separator_id}".encode())
    self.identity = f"huggingface:{digest.hexdigest()[:16]}"

  def encode(self, text: str | bytes, begins: bool = True) -> np.ndarray:
    """(n,) ids, uint16 if the vocabulary fits, else uint32: no special token's, and no begin token in front.

    begins: whether the text is the beginning of one. Some tokenizers put a space in front of a beginning.
    """
    text = text.decode() if isinstance(text, bytes) else text
    ids = self._ids(self._tokenizer if begins or not self._prefixed else self._unprefixed, text)
    return np.asarray(ids, self._dtype)

  def encode_documents(self, texts: list[str] | list[bytes]) -> tuple[np.ndarray, list[int]]:
    """As `join_documents` of all documents' tokens."""
    texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
    found = []
    for start in range(0, len(texts), _BATCH):
      batch = self._tokenizer.encode_batch_fast(texts[start : start + _BATCH], add_special_tokens=False)
      found += [np.asarray(encoding.ids, self._dtype) for encoding in batch]
    return join_documents(found, self.separator_id)

  @property
  def continuing(self) -> "Continuing":
    """This tokenizer for what continues a text."""
    return Continuing(self)

  def encode_with_special(self, text: str, hidden: dict[str, str], ends: Sequence[int] = ()) -> list[list[int]]:
    """Ids of a text whose special tokens are meant as such: of each part of it, the last of which ends with the text.

    hidden: characters that stand for a string each, which is text whatever it looks like. ends: where the parts before
    the last one end, ascending. Each is encoded by itself, as what continues the text before it.
    """
    ends, start, begins, originals = [*ends, len(text)], 0, True, str.maketrans(hidden)
    parts, number = [[] for _ in ends], 0
    for match in [*self._special_pattern.finditer(text), None]:
      stop = match.start() if match else len(text)
      # The library splits text at special tokens, then treats each part for itself.
      while start < stop:
        number = bisect.bisect_right(ends, start)
        piece, start = text[start : min(stop, ends[number])], min(stop, ends[number])
        parts[number] += self.encode(piece.translate(originals), begins).tolist()
        begins = False
      if match:
        token = match[0] if match[0] in self.special else match[0].strip()
        number = bisect.bisect_right(ends, match.start() + match[0].index(token))
        parts[number].append(self.special[token])
        start, begins = match.end(), self._prefixes_parts
    return parts

  def decode(self, tokens: np.ndarray, begins: bool = True) -> str:
    """Text up to the first end id, without special tokens; bytes that are not UTF-8 become U+FFFD.

    begins: whether the tokens are the beginning of a text, so that the space is left out that `encode` puts there.
    """
    text = self._decode(before_end(tokens, self.end_ids, self.vocab_size))
    return text[1:] if begins and self._prefixed and text.startswith(" ") else text

  def lost(self, text: str) -> str:
    """Its characters that the vocabulary lacks. Normalized ones, such as those that NFC composes, are not lost."""
    for character in set(text) - self._kept.keys():
      self._kept[character] = self._keeps(character)
    lost = {character for character in set(text) if not self._kept[character]}
    return "".join(character for character in text if character in lost)

  def lengths(self) -> np.ndarray:
    """(vocab_size,) int64, bytes of normalized text that each token stands for: 0 for special tokens.

    They add up to the text's UTF-8 bytes where nothing is normalized (`description` says what is) or lost. Where the
    tokenizer puts a space in front of a text, the separator before it has -1, so that the text's sum is right; but for
    texts that begin with a space, which Mistral's kind does not tell from those that do not.
    """
    lengths = np.array([len(piece) for piece in self._pieces], np.int64)
    lengths[self.separator_id] = -1 if self._prefixed else 0
    return lengths

  def files(self) -> dict[str, bytes]:
    """The folder's files that this reads, by name."""
    return dict(self._files)

  @property
  def description(self) -> str:
    """Kind, size, and what the tokenizer does to text before it is encoded."""
    kind = self._specification["model"]["type"]
    kind = f"byte-level {kind}" if _is_byte_level(self._specification) else f"SentencePiece-style {kind}"
    steps = _steps(self._specification["normalizer"])
    changes = [step["type"] for step in steps if step["type"] not in ("Prepend", "ByteLevel") and not _is_space(step)]
    return f"{kind}, {self.vocab_size:,} tokens" + (f", text normalized by {', '.join(changes)}" if changes else "")

  def _json(self, name: str) -> dict[str, Any]:
    try:
      value = json.loads(self._files.get(name, b"{}"))
    except ValueError as error:
      raise UserError(f"{self.path / name}: is damaged ({error})") from error
    if not isinstance(value, dict):
      raise UserError(f"{self.path / name}: is not a JSON object")
    return value

  def _read_specification(self) -> dict[str, Any]:
    """tokenizer.json as the library understands it, so that every field is there. Raises UserError."""
    path = self.path / "tokenizer.json"
    specification = json.loads(self._from_json(self._files["tokenizer.json"]).to_str())
    model = specification["model"]
    if model["type"] not in ("BPE", "Unigram"):
      raise UserError(f"{path}: a model of type {model['type']} cannot be used; BPE and Unigram can")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
      if model.get(field):
        raise UserError(f"{path}: model.{field} = {model[field]!r} cannot be used")
    if not _is_byte_level(specification) and not _replaces_spaces(specification):
      raise UserError(f"{path}: is neither byte-level nor keeps spaces as {_SPACE}: its tokens do not give text back")
    ids = {token["content"]: token["id"] for token in self._json("tokenizer.json").get("added_tokens") or ()}
    for token in specification["added_tokens"]:  # which the library numbers by itself
      if token["id"] != ids[token["content"]]:
        raise UserError(
          f"{path}: added token {token['content']!r} has id {ids[token['content']]}, but is number {token['id']}"
        )
    return specification

  def _from_json(self, text: bytes):
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(
        "config.data.tokenizer: huggingface needs the package tokenizers: pip install 'evo_jax[pretrained]'"
      ) from error
    try:
      return tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises bare Exceptions
      raise UserError(f"{self.path / 'tokenizer.json'}: cannot be read: {error}") from error

  def _load(self, specification: dict[str, Any]):
    """The library's tokenizer, which never matches special tokens in text."""
    tokenizer = self._from_json(json.dumps(specification).encode())
    tokenizer.encode_special_tokens = True  # "as text"
    return tokenizer

  def __getstate__(self) -> dict[str, Any]:
    """For another process, which loads the library's tokenizers anew: pickled ones match special tokens in text."""
    return {name: value for name, value in self.__dict__.items() if name not in ("_tokenizer", "_unprefixed")}

  @functools.cached_property
  def _tokenizer(self):
    return self._load(self._specification)

  @functools.cached_property
  def _unprefixed(self):
    """The same tokenizer without a space in front of text."""
    return self._load(_without_prefix(self._specification))

  @functools.cached_property
  def _prefixes_parts(self) -> bool:
    return self._prefixed and any(
      step["type"] == "Prepend" or step.get("prepend_scheme") == "always" or step.get("add_prefix_space")
      for field in ("normalizer", "pre_tokenizer")
      for step in _steps(self._specification[field])
    )

  @functools.cached_property
  def _special_pattern(self) -> re.Pattern:
    """Any special token, with the white space around it that it takes in; of several, the longest."""
    longest_first = sorted(self.special, key=len, reverse=True)
    around = [self._around.get(token, (False, False)) for token in longest_first]
    patterns = [
      (r"\s*" if left else "") + re.escape(token) + (r"\s*" if right else "")
      for token, (left, right) in zip(longest_first, around)
    ]
    return re.compile("|".join(patterns) or "(?!)")

  def _keeps(self, character: str) -> bool:
    if character == _SPACE and not _is_byte_level(self._specification):
      return False
    text = self._decode(self._ids(self._unprefixed if self._prefixed else self._tokenizer, character))
    normalizer = self._tokenizer.normalizer
    return text == character or (bool(normalizer) and text.strip() == normalizer.normalize_str(character).strip(_SPACE))

  def _ids(self, tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids

  def _decode(self, tokens) -> str:
    return b"".join(self._pieces[token] for token in tokens).decode(errors="replace")

  def _named_tokens(self, config: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, str]:
    """The tokens that the files name, as bos_token. Raises UserError where one is not in the vocabulary."""
    named = {}
    for name in NAMED:
      token = config.get(name)
      token = token.get("content") if isinstance(token, dict) else token  # a string, or an object with more fields
      if token:
        if not isinstance(token, str) or token not in vocabulary:
          raise UserError(f"{self.path / 'tokenizer_config.json'}: {name} {token!r} is not in the vocabulary")
        named[name] = token
    return named

  def _chat_template(self, config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in self._files:
      try:
        return self._files["chat_template.jinja"].decode()
      except UnicodeDecodeError as error:
        raise UserError(f"{self.path / 'chat_template.jinja'}: is not UTF-8 text (byte {error.start})") from error
    template = config.get("chat_template") or self._json("chat_template.json").get("chat_template")
    if isinstance(template, list):  # of several templates with names
      entries = [entry for entry in template if isinstance(entry, dict)]
      template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
      raise UserError(f"{self.path / 'tokenizer_config.json'}: chat_template is not a string")
    return template

  def _generation_ends(self) -> list[int]:
    """generation_config.json's eos_token_id, one or several. Raises UserError."""
    ends = self._json("generation_config.json").get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    for end in ends:
      if not isinstance(end, int) or not 0 <= end < self.vocab_size:
        raise UserError(
          f"{self.path / 'generation_config.json'}: eos_token_id {end!r} is not in the vocabulary of {self.vocab_size}"
        )
    return ends

  def _find_ids(self, specification: dict[str, Any], config: dict[str, Any], vocabulary: dict[str, int]) -> _Ids:
    """The ids that the module's docstring describes. Raises UserError where no token could end a text."""
    begin, end = (vocabulary.get(self.named.get(name)) for name in ("bos_token", "eos_token"))
    control = {token["content"] for token in specification["added_tokens"]} | set(self.named.values())
    turn_ends = {vocabulary[token] for token in _TURN_ENDS if token in control}
    ends = [*([] if end is None else [end]), *self._generation_ends()]
    candidates = [id_ for id_ in ends[:1] if id_ not in turn_ends]
    candidates += [vocabulary[token] for token in _DOCUMENT_ENDS if token in control]
    candidates += [id_ for id_ in ends if id_ not in turn_ends] + ([] if begin is None else [begin]) + ends
    if not candidates:
      raise UserError(f"{self.path / 'tokenizer_config.json'}: names no eos_token, so that no text could end")
    separator = candidates[0]
    all_ends = {separator, *ends, *turn_ends}
    if not turn_ends and self.chat_template:
      turn_ends = {*ends[:1]} or {separator}
    adds_begin = begin is not None and _adds_begin(specification, config, self.named["bos_token"])
    return _Ids(begin if adds_begin else separator, separator, tuple(sorted(all_ends)), tuple(sorted(turn_ends)))


class Continuing:
  """A tokenizer for the continuation of a text: no space is put in front, or taken away."""

  def __init__(self, tokenizer: HuggingFace):
    self._tokenizer = tokenizer

  def __getattr__(self, name: str) -> Any:
    return getattr(self._tokenizer, name)

  def encode(self, text: str | bytes) -> np.ndarray:
    """As `HuggingFace.encode`."""
    return self._tokenizer.encode(text, begins=False)

  def decode(self, tokens: np.ndarray) -> str:
    """As `HuggingFace.decode`."""
    return self._tokenizer.decode(tokens, begins=False)


def _read_files(folder: epath.Path) -> dict[str, bytes]:
  files = {}
  for name in FILES:
    try:
      files[name] = (folder / name).read_bytes()
    except FileNotFoundError as error:
      if name == "tokenizer.json":
        hint = (
          ": only a SentencePiece model is there, which transformers can convert (AutoTokenizer, save_pretrained)"
          if (folder / "tokenizer.model").exists()
          else ""
        )
        raise UserError(f"{folder / name}: there is no such file{hint}") from error
    except OSError as error:
      raise UserError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
  return files


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def _vocabulary(specification: dict[str, Any]) -> dict[str, int]:
  """Ids by token, of the model and of added tokens."""
  vocab = specification["model"]["vocab"]
  vocabulary = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
  return {**vocabulary, **{token["content"]: token["id"] for token in specification["added_tokens"]}}


def _special_tokens(
  specification: dict[str, Any], config: dict[str, Any], vocabulary: dict[str, int], named: dict[str, str], ids: _Ids
) -> dict[str, int]:
  """By text, the ids of bos_token, eos_token, tokens that a file calls special, and added ones that end texts or turns.

  An ordinary token that generation_config.json lets end a text, such as a line end, stays one in text.
  """
  more = config.get("added_tokens_decoder")
  tokens = [*specification["added_tokens"], *(more.values() if isinstance(more, dict) else ())]
  special = {token.get("content") for token in tokens if isinstance(token, dict) and token.get("special")}
  added = {token["content"] for token in specification["added_tokens"] if token["id"] in {*ids.end, *ids.turn_end}}
  special |= added | {named.get("bos_token"), named.get("eos_token")}
  return {token: id_ for token, id_ in vocabulary.items() if token and token in special}


def _adds_begin(specification: dict[str, Any], config: dict[str, Any], token: str) -> bool:
  """Whether the tokenizer puts its begin token in front of text."""
  if isinstance(config.get("add_bos_token"), bool):
    return config["add_bos_token"]
  if str(config.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama")):
    return True
  processors = _steps(specification["post_processor"])
  singles = [step.get("single") or [] for step in processors if step["type"] == "TemplateProcessing"]
  return any(part.get("SpecialToken", {}).get("id") == token for single in singles for part in single[:1])


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
  """A normalizer, pre-tokenizer or post-processor, or the parts of a sequence of them."""
  if step is None:
    return
  if step["type"] != "Sequence":
    yield step
  for field in ("normalizers", "pretokenizers", "processors"):
    for part in step.get(field, ()):
      yield from _steps(part)


def _is_byte_level(specification: dict[str, Any]) -> bool:
  return any(
    step["type"] == "ByteLevel" for field in ("normalizer", "pre_tokenizer") for step in _steps(specification[field])
  )


def _is_space(step: dict[str, Any]) -> bool:
  """Whether a normalizer puts U+2581 for each space."""
  return step["type"] == "Replace" and step["content"] == _SPACE and step["pattern"] == {"String": " "}


def _replaces_spaces(specification: dict[str, Any]) -> bool:
  return any(step["type"] == "Metaspace" for step in _steps(specification["pre_tokenizer"])) or any(
    _is_space(step) for step in _steps(specification["normalizer"])
  )


def _protected(specification: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
  """The specification with names for special tokens that no text can have: they hold a space, and spaces are replaced.

  Otherwise merges, or pieces of a Unigram model, could make a special token of its text. Nothing that is random, cuts
  text or adds tokens to it is left either.
  """
  rename = {token: f" {id_}" for token, id_ in special.items()}
  model = dict(specification["model"])
  if model["type"] == "Unigram":
    model["vocab"] = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
  else:
    model["dropout"] = None
    model["vocab"] = {rename.get(token, token): id_ for token, id_ in model["vocab"].items()}
    model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & rename.keys()]
    model["unk_token"] = rename.get(model["unk_token"], model["unk_token"])
  added = [
    dict(token, content=rename.get(token["content"], token["content"]), special=token["content"] in special)
    for token in specification["added_tokens"]
  ]
  removed = dict(truncation=None, padding=None, post_processor=None, decoder=None)
  return {**specification, **removed, "model": model, "added_tokens": added}


def _without_prefix(specification: dict[str, Any]) -> dict[str, Any]:
  """The specification of a tokenizer that puts no space in front of text."""

  def change(step):
    if step is None or step["type"] == "Prepend":
      return None
    step = dict(step)
    for field in {"normalizers", "pretokenizers"} & step.keys():
      step[field] = [part for part in map(change, step[field]) if part is not None]
    if step["type"] == "Metaspace":
      step["prepend_scheme"] = "never"
    elif step["type"] == "ByteLevel":
      step["add_prefix_space"] = False
    return step

  return {**specification, **{field: change(specification[field]) for field in ("normalizer", "pre_tokenizer")}}


def _pieces(specification: dict[str, Any], vocabulary: dict[str, int], special: dict[str, int]) -> list[bytes]:
  """The bytes of text that each id stands for: none for special tokens, unknown ones, and ids without a token."""
  model = specification["model"]
  unknown = model.get("unk_token")
  pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
  if model["type"] == "Unigram" and model.get("unk_id") is not None:
    unknown = model["vocab"][model["unk_id"]][0]
  added = {token["content"] for token in specification["added_tokens"]}
  of_bytes, byte_level = byte_alphabet(), _is_byte_level(specification)
  for token, id_ in vocabulary.items():
    if token in special or token == unknown:
      continue
    if token in added:
      pieces[id_] = token.encode()
    elif byte_level:
      known = all(character in of_bytes for character in token)
      pieces[id_] = bytes(of_bytes[character] for character in token) if known else token.encode()
    elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
      pieces[id_] = bytes([int(token[3:5], 16)])
    else:
      pieces[id_] = token.replace(_SPACE, " ").encode()
  return pieces


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """The byte of each character in which byte-level tokens are written (GPT-2's): printable Latin-1 characters stand for
  themselves, the other 68 bytes for characters from U+0100 on."""
  itself = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in itself]
  return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}
