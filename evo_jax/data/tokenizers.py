"""Tokenizers: bytes, 27 characters, SentencePiece. And `python -m evo_jax.tokenizer`, which trains the last.

In every vocabulary token 0 (`DOCUMENT`) stands between documents, in front of every sequence, and ends a text.

  python -m evo_jax.tokenizer --input='dir/*.txt' --vocab_size=8000 --output=DIR
"""

import hashlib
import io
from typing import Protocol

from etils import epath
import numpy as np
import sentencepiece

from evo_jax.errors import UserError

MODEL_FILE = "tokenizer.model"
DOCUMENT = 0  # the token between documents, in front of every sequence, and the end of a text


class Tokenizer(Protocol):
  """Text to token ids and back.

  `unit` is what `length` counts, the denominator of bits: "byte" or "character". `identity` is a string that differs
  between tokenizers that differ. `binary`: whether documents are taken as raw bytes, valid UTF-8 or not.
  """

  vocab_size: int
  unit: str
  identity: str
  binary: bool

  def encode(self, text: str | bytes) -> np.ndarray: ...
  def decode(self, tokens: np.ndarray) -> str: ...
  def lost(self, text: str) -> str: ...  # its characters that `encode` would not give back
  def lengths(self) -> np.ndarray: ...


class Bytes:
  """Byte b is token b + 1."""

  vocab_size = 257
  unit = "byte"
  identity = "bytes"
  binary = True
  begin_id = 0
  separator_id = 0
  end_ids = (0,)
  turn_end_ids = ()

  def encode(self, text: str | bytes) -> np.ndarray:
    """(n,) uint16 ids; text is taken as UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.uint16) + 1

  def decode(self, tokens: np.ndarray) -> str:
    """Text up to the end of the document; bytes that are no UTF-8 show as U+FFFD."""
    tokens = _checked(tokens, self)
    return (tokens - 1).astype(np.uint8).tobytes().decode(errors="replace")

  def lost(self, text: str) -> str:
    """None: every text is bytes."""
    return ""

  def lengths(self) -> np.ndarray:
    """(vocab_size,) how many units of text each token stands for; the document token stands for none."""
    return (np.arange(self.vocab_size) > 0).astype(np.int64)


class Chars27:
  """Space and a-z, as in text8: lower-cased, every run of other characters made one space. Space is token 1."""

  vocab_size = 28
  unit = "character"
  identity = "chars27"
  binary = False
  begin_id = 0
  separator_id = 0
  end_ids = (0,)
  turn_end_ids = ()

  def encode(self, text: str | bytes) -> np.ndarray:
    """(n,) uint8 ids. No text is refused: what is not a letter is a space."""
    text = text.decode() if isinstance(text, bytes) else text
    raw = np.frombuffer(text.lower().encode("ascii", errors="replace"), np.uint8)
    letter = (raw >= ord("a")) & (raw <= ord("z"))
    keep = letter | np.concatenate([[True], letter[:-1]])[: len(raw)]
    return np.where(letter, raw - (ord("a") - 2), 1).astype(np.uint8)[keep]

  def decode(self, tokens: np.ndarray) -> str:
    """Text up to the end of the document."""
    alphabet = np.frombuffer(b"? abcdefghijklmnopqrstuvwxyz", np.uint8)
    return alphabet[_checked(tokens, self)].tobytes().decode()

  def lost(self, text: str) -> str:
    """The characters that are neither letters (of either case) nor white space."""
    return "".join(c for c in text if not ("a" <= c.lower() <= "z" or c.isspace()))

  def lengths(self) -> np.ndarray:
    """(vocab_size,) characters of each token."""
    return (np.arange(self.vocab_size) > 0).astype(np.int64)


class SentencePiece:
  """A SentencePiece model that `train` made: piece 0 is the document token, unknown characters fall back to bytes."""

  unit = "byte"
  binary = False
  begin_id = 0
  separator_id = 0
  end_ids = (0,)
  turn_end_ids = ()

  def __init__(self, folder: str):
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
      raise UserError(f"{self.path}: piece 0 is not the document token; train one with python -m evo_jax.tokenizer")
    self.vocab_size = self._processor.vocab_size()
    self.identity = f"sentencepiece:{hashlib.sha256(self.proto).hexdigest()[:16]}"

  def encode(self, text: str | bytes) -> np.ndarray:
    """(n,) uint16 or uint32 ids."""
    text = text.decode() if isinstance(text, bytes) else text
    ids = self._processor.EncodeAsIds(text)
    return np.asarray(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)

  def decode(self, tokens: np.ndarray) -> str:
    """Text up to the end of the document."""
    return self._processor.DecodeIds(_checked(tokens, self).tolist())

  def lost(self, text: str) -> str:
    """None: what has no piece falls back to bytes."""
    return ""

  def lengths(self) -> np.ndarray:
    """(vocab_size,) UTF-8 bytes of each piece. `train` leaves text as it is, so that they add up to the text's."""
    pieces = range(self.vocab_size)
    return np.asarray(
      [
        0
        if self._processor.IsControl(i)
        else 1
        if self._processor.IsByte(i)
        else len(self._processor.IdToPiece(i).replace("\u2581", " ").encode())
        for i in pieces
      ],
      np.int64,
    )


def load_tokenizer(name: str, folder: str = "") -> Tokenizer:
  """The tokenizer of a configuration's data.tokenizer and data.tokenizer_path."""
  if name != "sentencepiece":
    return {"bytes": Bytes, "chars27": Chars27}[name]()
  if not folder:
    raise UserError("config.data.tokenizer_path: is empty; sentencepiece needs the folder that evo_jax.tokenizer wrote")
  return SentencePiece(folder)


def _checked(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  tokens = np.asarray(tokens, np.int64)
  end = np.flatnonzero(tokens == 0)
  tokens = tokens[: end[0]] if end.size else tokens
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
    outside = tokens[(tokens < 0) | (tokens >= tokenizer.vocab_size)][0]
    raise UserError(f"token {outside} is outside the vocabulary of {tokenizer.vocab_size}")
  return tokens


def train_sentencepiece(texts, vocab_size: int, output: str, seed: int = 0) -> SentencePiece:
  """Trains a SentencePiece unigram model with byte fallback on an iterator of texts, into the folder `output`."""
  model = io.BytesIO()
  sentences = (line for text in texts for line in text.splitlines() if line.strip())
  sentencepiece.set_random_generator_seed(seed)
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=sentences,
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
      max_sentence_length=1 << 16,
      input_sentence_size=2_000_000,
      shuffle_input_sentence=True,
      num_threads=2,
      minloglevel=2,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0].split("] ")[-1].strip() or "training failed"
    raise UserError(f"--vocab_size={vocab_size}: {reason}") from error
  folder = epath.Path(output)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model.getvalue())
  except OSError as error:
    raise UserError(f"--output={output}: cannot be written: {error.strerror or error}") from error
  return SentencePiece(output)
