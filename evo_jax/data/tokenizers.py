"""Tokenizers: UTF-8 bytes, 27 characters, SentencePiece; Hugging Face's are in `huggingface`.

The three here have one id, 0, that begins a sequence, separates documents and ends a text.
"""

from collections.abc import Iterable, Iterator
import contextlib
import hashlib
import io
import re
from typing import Protocol
import uuid

from etils import epath
import numpy as np
import sentencepiece

from evo_jax.data.huggingface import HuggingFace
from evo_jax.data.token_ids import before_end, join_documents
from evo_jax.errors import UserError

MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # by which SentencePiece stands for a space; as text it is encoded as the bytes that it is
_PROBE = f"a b  {_SPACE}Z\u00e9\u4e16\U0001f600\x00\t\r\n 42"
_LONGEST = 1 << 16  # bytes of a line that SentencePiece is trained on
_NOT_TRAINED_ON = re.compile("[\x00\u2581\u2585]")  # the trainer leaves out lines with one of them


class Tokenizer(Protocol):
  """Text to token ids and back. Special ids stand for no text.

  `encode` is told whether a text is the beginning of one: some tokenizers put a space there. No special id is among the
  result, but for that of unknown characters where a vocabulary lacks some.
  """

  vocab_size: int
  unit: str  # what `lengths` counts, the denominator of bits: "byte" or "character"
  identity: str  # differs between tokenizers that differ
  binary: bool  # whether documents are raw bytes, valid UTF-8 or not
  begin_id: int  # put in front of every sequence
  separator_id: int  # stands after each document in the token stream
  end_ids: tuple[int, ...]  # any of them ends a text
  turn_end_ids: tuple[int, ...]  # any of them ends a turn of a conversation

  def encode(self, text: str | bytes, begins: bool = True) -> np.ndarray: ...
  def encode_documents(self, texts: list[str] | list[bytes]) -> tuple[np.ndarray, list[int]]: ...  # `join_documents`
  def decode(self, tokens: np.ndarray) -> str: ...
  def lost(self, text: str) -> str: ...  # its characters that `encode` would not give back
  def lengths(self) -> np.ndarray: ...
  def files(self) -> dict[str, bytes]: ...  # what `load_tokenizer` reads, by name


def special_ids(tokenizer: Tokenizer) -> list[int]:
  """The ids that no text is written with, sorted.

  They begin, separate and end texts, or stand for none: unknown characters, roles of a conversation, unused ids.
  """
  return sorted({*structural_ids(tokenizer), *np.flatnonzero(tokenizer.lengths() == 0).tolist()})


def structural_ids(tokenizer: Tokenizer) -> list[int]:
  """The ids that begin, separate and end texts."""
  return [tokenizer.begin_id, tokenizer.separator_id, *tokenizer.end_ids, *tokenizer.turn_end_ids]


def continuing(tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer for what continues a text. It differs where a tokenizer puts a space in front of text."""
  return getattr(tokenizer, "continuing", tokenizer)


class Bytes:
  """UTF-8 bytes: byte b is token b + 1."""

  vocab_size = 257
  unit = "byte"
  identity = "bytes"
  binary = True
  begin_id = 0
  separator_id = 0
  end_ids = (0,)
  turn_end_ids = ()

  def encode(self, text: str | bytes, begins: bool = True) -> np.ndarray:
    """(n,) uint16 ids; text is taken as UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return np.add(np.frombuffer(raw, np.uint8), 1, dtype=np.uint16)

  def encode_documents(self, texts: list[str] | list[bytes]) -> tuple[np.ndarray, list[int]]:
    """As `join_documents` of all documents' tokens."""
    raws = [text.encode() if isinstance(text, str) else text for text in texts]
    counts = [len(raw) for raw in raws]
    joined = b"".join(part for raw in raws if raw for part in (raw, b"\0"))
    tokens = np.add(np.frombuffer(joined, np.uint8), 1, dtype=np.uint16)
    tokens[np.cumsum([count + 1 for count in counts if count]) - 1] = self.separator_id
    return tokens, counts

  def decode(self, tokens: np.ndarray) -> str:
    """Text up to the first end id; bytes that are not UTF-8 become U+FFFD."""
    tokens = before_end(tokens, self.end_ids, self.vocab_size)
    return (tokens - 1).astype(np.uint8).tobytes().decode(errors="replace")

  def lost(self, text: str) -> str:
    """Nothing: every text is bytes."""
    return ""

  def lengths(self) -> np.ndarray:
    """(vocab_size,) int64, bytes of text that each token stands for: 0 for special ids."""
    return _one_each(self)

  def files(self) -> dict[str, bytes]:
    """Nothing to be read."""
    return {}


class Chars27:
  """Space (token 1) and a-z, as in text8: text in lower case, each run of other characters replaced by one space."""

  vocab_size = 28
  unit = "character"
  identity = "chars27"
  binary = False
  begin_id = 0
  separator_id = 0
  end_ids = (0,)
  turn_end_ids = ()

  def encode(self, text: str | bytes, begins: bool = True) -> np.ndarray:
    """(n,) uint8 ids. Accepts any text."""
    text = text.decode() if isinstance(text, bytes) else text
    raw = np.frombuffer(text.lower().encode("ascii", errors="replace"), np.uint8)
    letter = (raw >= ord("a")) & (raw <= ord("z"))
    keep = letter | np.concatenate([[True], letter[:-1]])[: len(raw)]
    return np.where(letter, raw - (ord("a") - 2), 1).astype(np.uint8)[keep]

  def encode_documents(self, texts: list[str] | list[bytes]) -> tuple[np.ndarray, list[int]]:
    """As `join_documents` of all documents' tokens."""
    return join_documents([self.encode(text) for text in texts], self.separator_id)

  def decode(self, tokens: np.ndarray) -> str:
    """Text up to the first end id."""
    alphabet = np.frombuffer(b"? abcdefghijklmnopqrstuvwxyz", np.uint8)
    return alphabet[before_end(tokens, self.end_ids, self.vocab_size)].tobytes().decode()

  def lost(self, text: str) -> str:
    """The characters that are neither letters (of either case) nor white space."""
    return "".join(c for c in text if not ("a" <= c.lower() <= "z" or c.isspace()))

  def lengths(self) -> np.ndarray:
    """(vocab_size,) int64, characters that each token stands for: 0 for special ids."""
    return _one_each(self)

  def files(self) -> dict[str, bytes]:
    """Nothing to be read."""
    return {}


class SentencePiece:
  """A model of `train_sentencepiece`. Characters without a piece fall back to bytes.

  proto: the serialized model.
  """

  unit = "byte"
  binary = False
  begin_id = 0
  separator_id = 0
  end_ids = (0,)
  turn_end_ids = ()

  def __init__(self, folder: str):
    """Loads the model in `folder`. Raises UserError where there is none, or of another kind."""
    self.path = epath.Path(folder) / MODEL_FILE
    try:
      self.proto = self.path.read_bytes()
    except OSError as error:
      raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from error
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(self.proto)
    except RuntimeError as error:
      raise UserError(f"{self.path}: is not a SentencePiece model") from error
    if self._processor.bos_id() != 0 or self._processor.eos_id() != -1:
      raise UserError(f"{self.path}: piece 0 is not the special one; train a model with python -m evo_jax.tokenizer")
    self.vocab_size = self._processor.vocab_size()
    self.identity = f"sentencepiece:{hashlib.sha256(self.proto).hexdigest()[:16]}"
    self._space = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    ids = self.encode(_PROBE)
    if self.decode(ids) != _PROBE or sum(map(self._piece_length, ids.tolist())) != len(_PROBE.encode()):
      raise UserError(f"{self.path}: does not keep text as it is; train a model with python -m evo_jax.tokenizer")

  def encode(self, text: str | bytes, begins: bool = True) -> np.ndarray:
    """(n,) ids, uint16 if the vocabulary fits, else uint32."""
    text = text.decode() if isinstance(text, bytes) else text
    first, *others = text.split(_SPACE)
    ids = [self._processor.Encode(first, return_type="numpy")]
    for part in others:
      ids += [self._space, self._processor.Encode(part, return_type="numpy")]
    return np.concatenate(ids, dtype=np.uint16 if self.vocab_size <= 2**16 else np.uint32, casting="unsafe")

  def encode_documents(self, texts: list[str] | list[bytes]) -> tuple[np.ndarray, list[int]]:
    """As `join_documents` of all documents' tokens."""
    return join_documents([self.encode(text) for text in texts], self.separator_id)

  def decode(self, tokens: np.ndarray) -> str:
    """Text up to the first end id."""
    return self._processor.DecodeIds(before_end(tokens, self.end_ids, self.vocab_size).tolist())

  def lost(self, text: str) -> str:
    """Nothing: characters without a piece fall back to bytes."""
    return ""

  def lengths(self) -> np.ndarray:
    """(vocab_size,) int64, UTF-8 bytes that each piece stands for: 0 for special ids.

    Nothing is normalized, so that the lengths of a text's pieces add up to the text's.
    """
    lengths = np.asarray([self._piece_length(i) for i in range(self.vocab_size)], np.int64)
    lengths[structural_ids(self)] = 0
    return lengths

  def files(self) -> dict[str, bytes]:
    """The model."""
    return {MODEL_FILE: self.proto}

  def pieces(self) -> list[tuple[str, float]]:
    """Text and score of each piece."""
    ids = range(self.vocab_size)
    return [(self._processor.IdToPiece(i), self._processor.GetScore(i)) for i in ids]

  def _piece_length(self, i: int) -> int:
    if self._processor.IsControl(i) or self._processor.IsUnknown(i) or self._processor.IsUnused(i):
      return 0
    if self._processor.IsByte(i):
      return 1
    return len(self._processor.IdToPiece(i).replace(_SPACE, " ").encode())


def load_tokenizer(name: str, folder: str = "") -> Tokenizer:
  """The tokenizer of a configuration's data.tokenizer and data.tokenizer_path. Raises UserError."""
  if name in ("bytes", "chars27"):
    return {"bytes": Bytes, "chars27": Chars27}[name]()
  if not folder:
    holds = {"sentencepiece": "that evo_jax.tokenizer wrote", "huggingface": "that holds tokenizer.json"}[name]
    raise UserError(f"config.data.tokenizer_path: is empty; {name} needs the folder {holds}")
  return {"sentencepiece": SentencePiece, "huggingface": HuggingFace}[name](folder)


def _one_each(tokenizer: Tokenizer) -> np.ndarray:
  lengths = np.ones(tokenizer.vocab_size, np.int64)
  lengths[structural_ids(tokenizer)] = 0
  return lengths


def train_sentencepiece(texts: Iterable[str], vocab_size: int, output: str, seed: int = 0) -> SentencePiece:
  """Trains a SentencePiece unigram model with byte fallback on an iterable of texts, into the folder `output`.

  Raises UserError where the text does not suffice for the vocabulary, or the folder cannot be written, and what `texts`
  raises.
  """
  if not 1 <= vocab_size < 2**31:
    raise UserError(f"--vocab_size={vocab_size}: is not in 1..2147483647")
  folder = epath.Path(output)
  temporary = folder / f".{MODEL_FILE}.{uuid.uuid4().hex}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(b"")  # before the work, not after it
    temporary.write_bytes(_trained_model(texts, vocab_size, seed))
    temporary.replace(folder / MODEL_FILE)
  except OSError as error:
    raise UserError(f"--output={output}: cannot be written: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()
  return SentencePiece(output)


def _trained_model(texts: Iterable[str], vocab_size: int, seed: int) -> bytes:
  model, raised = io.BytesIO(), []

  def lines():
    try:
      for text in texts:
        yield from training_lines(text)
    except UserError as error:  # of which the trainer would keep no more than the message
      raised.append(error)
      raise

  sentencepiece.set_random_generator_seed(seed)
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=lines(),
      model_writer=model,
      vocab_size=vocab_size,
      model_type="unigram",
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=["\n"],
      bos_id=0,
      unk_id=1,
      eos_id=-1,
      pad_id=-1,
      bos_piece="<doc>",
      max_sentence_length=_LONGEST,
      input_sentence_size=2_000_000,
      shuffle_input_sentence=True,
      num_threads=2,
      minloglevel=2,
    )
  except (RuntimeError, ValueError) as error:
    raise raised[0] if raised else UserError(f"--vocab_size={vocab_size}: {_reason(str(error))}") from error
  return model.getvalue()


def _reason(message: str) -> str:
  """Why a model could not be trained, from the trainer's message."""
  if "sentences_.empty()" in message:
    return "the text is empty"
  if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
    return f"is too small: the text's characters and the bytes take {needed[1]} pieces"
  return message.splitlines()[0].split("] ")[-1].strip() or "training failed"


def training_lines(text: str) -> Iterator[str]:
  """The lines that a SentencePiece model is trained on: those of the text, but for what the trainer would leave out.

  Lines of more than 65,536 bytes are cut, at a space where there is one in the last half, and those with characters
  that the trainer keeps for itself (NUL, U+2581, U+2585), at these.
  """
  for line in text.splitlines():
    for part in _NOT_TRAINED_ON.split(line):
      raw, start = part.encode(), 0
      while len(raw) - start > _LONGEST:
        end = start + _LONGEST
        if (space := raw.rfind(b" ", end - _LONGEST // 2, end)) >= 0:
          end = space
        while raw[end] & 0xC0 == 0x80:  # in the middle of a character
          end -= 1
        yield raw[start:end].decode()
        start = end
      if raw[start:].strip():
        yield raw[start:].decode() if start else part
